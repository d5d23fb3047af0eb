"""A published file: the one in the clone of the repository, or fetched from the repository by https.

Beside each lies its record with the file's SHA-256; a file that differs is never used. The SHA-256 of the records
themselves come with kdlib, in ``published.json``, and not from where the files are fetched.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
from pathlib import Path

from kdlib.records import artefacts
from kdlib.records.download import download

MOST, SECONDS = 2**26, 600  # bytes of a published file, and seconds to fetch it

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
        known = artefacts.record_path(path)  # first: nothing is used without it
        if (pinned := pins().get(f"{profile}/{name}.json")) is None:
            raise FileNotFoundError(
                f"{published}/{name} is not published as far as this kdlib knows: {_WITHOUT_FETCHING}"
            )
        if not known.exists():
            _fetch(f"{repository_address()}/raw/HEAD/{published}/{known.name}", known, pinned)
        if artefacts.file_digest(known) != pinned:
            raise ValueError(f"{known} is not what this kdlib expects: {renew}, or upgrade kdlib")
        if not path.exists():
            _fetch(f"{repository_address()}/raw/HEAD/{published}/{name}", path, artefacts.record(path).get("sha256"))
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


def pins() -> dict[str, str]:
    """The SHA-256 of each published file's record, by profile and name: ``quick/logits.npy.json``."""
    return json.loads(importlib.resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))


def _fetch(url: str, path: Path, sha256: str) -> None:
    try:
        if not url.startswith("https://"):
            raise OSError("expected an address that begins with https://")
        download(url, path, sha256, most=MOST, seconds=SECONDS)
    except OSError as error:
        reason = artefacts.short_reason(error)
        raise FileNotFoundError(f"{url} cannot be fetched ({reason}): {_WITHOUT_FETCHING}") from error
    except ValueError as error:
        raise ValueError(
            f"{error}; it was published again since, so upgrade kdlib, or run the earlier chapters instead "
            "(start_from=scratch)"
        ) from error


def clone_folder() -> Path | None:
    """The clone of the repository that kdlib is used from; None if it is installed without one."""
    clone = Path(__file__).resolve().parent.parent.parent
    return clone if (clone / "book" / "intro.md").exists() else None
