"""Saving what was computed, and using it again only if it is what is wanted.

Beside each file lies its record, ``<file>.json``: the *fingerprint* (what the file was made from: this is matched), the
*SHA-256* of its bytes, the *provenance* (how, when and where) and whatever else is known. A file that does not match is
never used and never overwritten: it is renamed to a backup.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import hashlib
import json
import os
import pickle
import platform
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdlib.gpu import device_name
from kdlib.records.identity import digest


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
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
    """Make `folder` if it is not there yet; OSError if nothing can be written to it."""
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
    """The first sentence of an exception's message; its class if it has none."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'quick'?"`` for a name that is close to one of the known ones; otherwise empty."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def find(folder: Path, name: str, fingerprint: dict) -> Path | None:
    """The file `name` made from just this: in `folder`, or in the folder of the same profile without overrides.

    A file in `folder` that was made from something else is renamed to a backup, and the reason printed. A backup that
    is what is wanted now gets its name back.
    """
    path, base = folder / name, base_folder(folder) / name
    _make_room(path, fingerprint)
    backup = _backup(path, _through_json(fingerprint))
    if not path.exists() and backup.exists() and not _mismatch(backup, fingerprint):
        os.replace(backup, path)
        os.replace(record_path(backup), record_path(path))
    return next((p for p in (path, base) if p.exists() and not _mismatch(p, fingerprint)), None)


def base_folder(folder: Path) -> Path:
    """``outputs/full`` for ``outputs/full-1a2b3c4d``."""
    folder = folder if folder.name else folder.resolve()  # the working folder's name
    return folder.with_name(folder.name.partition("-")[0])


def record_path(path: Path) -> Path:
    """Where the record of a file lies: ``student_cnn.pth.json``."""
    return path.with_name(path.name + ".json")


def record(path: Path) -> dict:
    """The record of a file: its fingerprint, SHA-256, provenance and, of a trained network, history; {} without one."""
    try:
        found = json.loads(record_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save_record(path: Path, fingerprint: dict, **more: object) -> None:
    """Write the record of a file: its fingerprint, the SHA-256 of its bytes, and whatever else is known."""
    save_json(record_path(path), {"fingerprint": fingerprint, "sha256": file_digest(path), **more})


def check_content(path: Path) -> None:
    """Raise ValueError if a file's SHA-256 is not the one in its record; a legacy record has none."""
    expected = record(path).get("sha256")
    if expected is not None and (found := file_digest(path)) != expected:
        raise ValueError(
            f"{path} has changed since it was saved: its SHA-256 is {found}, its record says {expected}; delete it and "
            "run its chapter again"
        )


def save_weights(path: Path, model: nn.Module, *, fingerprint: dict, **more: object) -> None:
    """Write the network's tensors and their record, with whatever else is known of it: history, provenance."""
    _make_room(path, fingerprint)
    with atomic_write(path) as partial:
        torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, partial)
    save_record(path, fingerprint, **more)


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
    check_content(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} holds the weights of another network than {type(model).__name__} ({reason}): "
            "name the network that it was saved from"
        ) from error
    return model


def save_array(path: Path, array: np.ndarray, *, fingerprint: dict, **more: object) -> None:
    """Write an array and its record, with whatever else is known of it: provenance."""
    _make_room(path, fingerprint)
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
    save_record(path, fingerprint, **more)


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
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not an array file ({error}): expected .npy without Python objects; if it was cut off, delete "
            "it and run its chapter again"
        ) from error
    check_content(path)
    return array


def save_json(path: Path, value: object) -> None:
    """Write a value as JSON, as a whole."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _backup(path: Path, fingerprint: dict | None) -> Path:
    """Where a file made from that is kept while another has its name."""
    return path.with_name(f"{path.stem}.{digest(fingerprint)}{path.suffix}")


def _make_room(path: Path, fingerprint: dict) -> None:
    """Rename the file at `path` to a backup if it was made from something else."""
    if not path.exists() or not (reasons := _mismatch(path, fingerprint)):
        return
    backup = _backup(path, record(path).get("fingerprint"))
    if backup.exists():  # there is such a backup already, or nothing tells what this file was made from
        backup = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        os.replace(path, backup)
        if record_path(path).exists():
            os.replace(record_path(path), record_path(backup))
    except OSError as error:
        raise OSError(f"{path} is not what this run needs ({reasons}) and cannot be renamed: {error}") from error
    print(f"{path} is not what this run needs ({reasons}); kept as {backup.name}")


def _through_json(fingerprint: dict) -> dict:
    """A fingerprint as a record gives it back: tuples are lists there."""
    return json.loads(json.dumps(fingerprint))


def _mismatch(path: Path, fingerprint: dict) -> str:
    return _differences(record(path).get("fingerprint"), _through_json(fingerprint))


def _differences(found: object, wanted: dict, prefix: str = "") -> str:
    """In words, where two fingerprints differ; empty if they do not."""
    if not isinstance(found, dict):
        return "it has no record of what it was made from"
    reasons = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = (fingerprint.get(key, "missing") for fingerprint in (found, wanted))
        if isinstance(a, dict) and isinstance(b, dict):
            reasons.append(_differences(a, b, f"{prefix}{key}."))
        elif a != b:
            reasons.append(f"{prefix}{key} is {a}, not {b}")
    return "; ".join(r for r in reasons if r)
