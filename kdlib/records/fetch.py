"""A published file: the one in the clone of the repository, or fetched from the repository by https.

Beside each lies its record with the file's SHA-256; a file that differs is never used.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import urllib.request
from pathlib import Path

from kdlib.records import artefacts

_WITHOUT_FETCHING = (
    "clone the repository, install kdlib from the clone (`pip install -e .`), and what is published comes with it; or "
    "run the earlier chapters instead (start_from=scratch)"
)


def published_file(profile: str, name: str, folder: Path) -> Path:
    """The published file `name` of a profile, its SHA-256 checked.

    It is that of the clone. Without a clone it is fetched once, with its record, into ``<folder>/published/``.

    Raises:
        FileNotFoundError: it is not published, or cannot be fetched.
        ValueError: it is not the file that its record describes.
    """
    published = f"book/published/{profile}"
    if clone := clone_folder():
        path, renew = clone / published / name, f"restore it with `git checkout -- {published}`"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there: profile {profile} is not published here, or without it; run the earlier "
                "chapters instead (start_from=scratch), or `git pull`"
            )
    else:
        path, renew = folder / "published" / name, f"delete {folder / 'published'}, so that it is fetched again"
        for wanted in (artefacts.record_path(path), path):  # the record first: nothing is used without it
            if not wanted.exists():
                content = _fetch(f"{repository_address()}/raw/HEAD/{published}/{wanted.name}")
                with artefacts.atomic_write(wanted) as unfinished:
                    unfinished.write_bytes(content)
    expected = artefacts.record(path).get("sha256", "one in its record, which has none")
    found = artefacts.file_digest(path)
    if found != expected:
        raise ValueError(
            f"{path} is not what was published: its SHA-256 is {found}, expected {expected}; {renew}, or run the "
            "earlier chapters instead (start_from=scratch)"
        )
    return path


def repository_address() -> str:
    """The repository's address, as the installed package names it.

    Raises:
        FileNotFoundError: kdlib is not installed, or names none.
    """
    try:
        urls = importlib.metadata.metadata("kdlib").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    address = dict(url.split(", ", 1) for url in urls).get("repository")
    if address is None:
        raise FileNotFoundError(f"kdlib's installation names no repository to fetch from: {_WITHOUT_FETCHING}")
    return address.removesuffix("/")


def _fetch(url: str) -> bytes:
    try:
        if not url.startswith("https://"):
            raise OSError("expected an address that begins with https://")
        with urllib.request.urlopen(url, timeout=30) as response:
            if not response.url.startswith("https://"):  # after a redirection
                raise OSError(f"it leads to {response.url}, expected one that begins with https://")
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = artefacts.short_reason(error)
        raise FileNotFoundError(f"{url} cannot be fetched ({reason}): {_WITHOUT_FETCHING}") from error


def clone_folder() -> Path | None:
    """The clone of the repository that kdlib is used from; None if it is installed without one."""
    clone = Path(__file__).resolve().parent.parent.parent
    return clone if (clone / "book" / "intro.md").exists() else None
