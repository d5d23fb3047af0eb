"""Saving what was computed, and using it again only where it is what is wanted.

Beside each file lies ``<file>.json`` with its *fingerprint* (what it was made from: matched) and its *provenance* (how,
when and where: recorded). A file that does not match is never used and never overwritten: it is set aside.

Some of what the book computed is *published*: kept in the repository, for readers who cannot compute it themselves. The
record of such a file holds its SHA-256 too, and a file that differs is never used.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import importlib.metadata
import json
import os
import pickle
import platform
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

_WITHOUT_FETCHING = (
    "clone the repository, install kdlib from the clone (`pip install -e .`), and what is published comes with it; or "
    "run the earlier chapters instead (start_from=scratch)"
)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and vanishes when it fails.

    So a file is there as a whole or not at all, whatever interrupts the writing.

    Raises:
        OSError: the folder cannot be written; the message names it and the setting that chooses another.
    """
    check_writable(path.parent)
    partial = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make `folder` where it is not there, and raise OSError where nothing can be written to it."""
    probe = folder / f".{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror or error}): choose another folder for artefacts with "
            "KDLIB_OUTPUTS, or for data sets with KDLIB_DATA"
        ) from error


def short_reason(error: Exception) -> str:
    """The first sentence of what an exception says; its kind where it says nothing."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def digest(described: object) -> str:
    """Eight hexadecimal digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:8]


def provenance(device: torch.device | str, seconds: float) -> dict:
    """How, when and where something was made: recorded beside it, never matched."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "seconds": round(seconds, 2),
    }


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's name, or ``CPU`` and its number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def find(folder: Path, name: str, fingerprint: dict) -> Path | None:
    """The file `name` made from just this: in `folder`, or in the folder of the same profile without overrides.

    A file in `folder` that was made from something else is set aside under another name, and the reason printed. One
    that was set aside before and is wanted again comes back.
    """
    own, base = folder / name, base_folder(folder) / name
    _make_room(own, fingerprint)
    aside = _aside(own, json.loads(json.dumps(fingerprint)))
    if not own.exists() and aside.exists() and not _mismatch(aside, fingerprint):
        os.replace(aside, own)
        os.replace(_record_path(aside), _record_path(own))
    return next((path for path in (own, base) if path.exists() and not _mismatch(path, fingerprint)), None)


def base_folder(folder: Path) -> Path:
    """``outputs/full`` for ``outputs/full-1a2b3c4d``."""
    return folder.with_name(folder.name.partition("-")[0])


def clone_folder() -> Path | None:
    """The clone of the repository that kdlib is used from; None where it is installed without one."""
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "book" / "intro.md").exists() else None


def published(profile: str, name: str, folder: Path) -> Path:
    """The published file `name` of a profile, its SHA-256 checked.

    It is that of the clone. Where there is none, it is fetched once, with its record, into ``<folder>/published/``.

    Raises:
        FileNotFoundError: it is not published, or cannot be fetched.
        ValueError: it is not the file that its record tells of.
    """
    place = f"book/published/{profile}"
    if clone := clone_folder():
        path, renew = clone / place / name, f"get it back with `git checkout -- {place}`"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is not there: profile {profile} is not published here, or without it; run the earlier "
                "chapters instead (start_from=scratch), or `git pull`"
            )
    else:
        path, renew = folder / "published" / name, f"delete {folder / 'published'}, so that it is fetched again"
        for own in (_record_path(path), path):  # the record first: it is small, and nothing is used without it
            if not own.exists():
                content = _fetch(f"{repository_address()}/raw/HEAD/{place}/{own.name}")
                with written_whole(own) as partial:
                    partial.write_bytes(content)
    expected = record(path).get("sha256", "one in its record, which has none")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
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
    found = dict(url.split(", ", 1) for url in urls).get("repository")
    if found is None:
        raise FileNotFoundError(f"kdlib's installation names no repository to fetch from: {_WITHOUT_FETCHING}")
    return found.removesuffix("/")


def _fetch(url: str) -> bytes:
    try:
        if not url.startswith("https://"):
            raise OSError("expected an address that begins with https://")
        with urllib.request.urlopen(url, timeout=30) as response:
            if not response.url.startswith("https://"):  # where it was sent on
                raise OSError(f"it leads to {response.url}, expected one that begins with https://")
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(f"{url} cannot be fetched ({short_reason(error)}): {_WITHOUT_FETCHING}") from error


def record(path: Path) -> dict:
    """What is known of an artefact: its fingerprint, provenance and, of a trained network, history."""
    try:
        return json.loads(_record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def save_weights(path: Path, model: nn.Module, *, fingerprint: dict, **known: object) -> None:
    """The network's tensors, and beside them a ``.json`` with the fingerprint and whatever else is `known`."""
    _make_room(path, fingerprint)
    with written_whole(path) as partial:
        torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, partial)
    save_json(_record_path(path), {"fingerprint": fingerprint, **known})


def load_weights(path: Path, model: nn.Module) -> nn.Module:
    """`model` with the tensors of a file; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file: a network is never left with random weights in silence.
        ValueError: a file that is damaged, holds anything but tensors, or belongs to another network.
    """
    if not path.exists():
        raise FileNotFoundError(f"weights {path} are not there: run the chapter that trains this network first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise ValueError("it holds something other than named tensors")
    except Exception as error:  # torch raises many kinds for a damaged file, and UnpicklingError for a foreign one
        foreign = isinstance(error, pickle.UnpicklingError)  # whose own message advises to execute it
        reason = "it holds Python objects, which are not executed" if foreign else short_reason(error)
        raise ValueError(
            f"{path} is not a weights file ({reason}): expected named tensors as torch.save(model.state_dict()) "
            "writes them; if it was cut off, delete it and run its chapter again"
        ) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} holds the weights of another network than {type(model).__name__} ({reason}): "
            "name the network that it was saved from"
        ) from error
    return model


def save_array(path: Path, array: np.ndarray, *, fingerprint: dict, **known: object) -> None:
    """An array, and beside it a ``.json`` with the fingerprint and whatever else is `known`."""
    _make_room(path, fingerprint)
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
    save_json(_record_path(path), {"fingerprint": fingerprint, **known})


def load_array(path: Path) -> np.ndarray:
    """The array of a file; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or holds Python objects.
    """
    if not path.exists():
        raise FileNotFoundError(f"array {path} is not there: run the chapter that makes it first")
    try:
        with open(path, "rb") as file:  # np.load leaves a damaged file open
            array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
        return array
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not an array file ({error}): expected .npy without Python objects; if it was cut off, delete "
            "it and run its chapter again"
        ) from error


def save_json(path: Path, value: object) -> None:
    """A value as JSON, written whole."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _aside(path: Path, fingerprint: dict | None) -> Path:
    """Where a file made from that is kept while something else has its name."""
    return path.with_name(f"{path.stem}.{digest(fingerprint)}{path.suffix}")


def _make_room(path: Path, fingerprint: dict) -> None:
    """Set the file at `path` aside where it was made from something else."""
    if not path.exists() or not (reasons := _mismatch(path, fingerprint)):
        return
    aside = _aside(path, record(path).get("fingerprint"))
    if aside.exists():  # such a file was set aside before, or nothing tells what this one was made from
        aside = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        os.replace(path, aside)
        if _record_path(path).exists():
            os.replace(_record_path(path), _record_path(aside))
    except OSError as error:
        raise OSError(f"{path} is not what this run needs ({reasons}) and cannot be set aside: {error}") from error
    print(f"{path} is not what this run needs ({reasons}); kept as {aside.name}")


def _mismatch(path: Path, fingerprint: dict) -> str:
    # through JSON and back, since that is how the recorded one came: tuples are lists there
    return _differences(record(path).get("fingerprint"), json.loads(json.dumps(fingerprint)))


def _differences(found: dict | None, wanted: dict, prefix: str = "") -> str:
    """In words, where two fingerprints differ; empty where they do not."""
    if found is None:
        return "nothing tells what it was made from"
    reasons = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = found.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            reasons.append(_differences(a, b, f"{prefix}{key}."))
        elif a != b:
            reasons.append(f"{prefix}{key} is {a}, not {b}")
    return "; ".join(r for r in reasons if r)
