"""Saving what was computed, and using it again only if it is what is wanted.

Beside each file lies its record, ``<file>.json``: the *fingerprint* (what the file was made from: this is matched), the
*SHA-256* of its bytes, the *provenance* (how, when and where) and whatever else is known. A file that does not match is
never used and never overwritten: it is renamed to a backup.

The record is what makes a file count. It is written last, and an older one is deleted before the file that it describes
is replaced; so whatever interrupts the saving, no file lies beside a record that is not its own. A record holds a
checksum of itself.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import glob
import hashlib
import io
import pickle
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from kdlib.gpu import device_name, ranks
from kdlib.records.documents import as_read, as_text, differences, read_record, save_document, save_json, sealed  # noqa: F401
from kdlib.records.files import (  # noqa: F401  what others ask this module for
    atomic_write,
    check_room,
    check_writable,
    file_digest,
    lock,
    open_plain,
    remove,
    replace,
    sync,
    temporary,
)
from kdlib.records.identity import digest
from kdlib.records.limits import check_named, check_npy, load_tensors
from kdlib.records.unfinished import finish_saving


def short_reason(error: Exception) -> str:
    """The first sentence of an exception's message; its class if it has none."""
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'quick'?"`` for a name that is close to one of the known ones; otherwise empty."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def provenance(device: torch.device | str, seconds: float) -> dict:
    """How, when and where something was made: recorded beside it, never matched."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
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
    finish_saving(path, record_path(path))
    _finish_renaming(path)
    _make_room(path, fingerprint)
    backup = _backup(path, as_read(fingerprint))
    if not path.exists() and backup.exists() and not _mismatch(backup, fingerprint):
        _rename(backup, path)
    return next((p for p in (path, base) if p.exists() and not _mismatch(p, fingerprint)), None)


@contextlib.contextmanager
def reserve(folder: Path, name: str, fingerprint: dict) -> Iterator[Path | None]:
    """What :func:`find` finds; and in the block nobody else makes the file `name` in `folder`, rank 0 does for all."""
    first = not ranks.rank()
    # for what is in the profile's own folder, this one need not be made, as for a lock
    needless = not first or (not folder.exists() and find(folder, name, fingerprint))
    with contextlib.nullcontext() if needless else lock(folder / name):
        yield ranks.broadcast(find(folder, name, fingerprint) if first else None)
        ranks.barrier()  # what rank 0 makes is there for all


def base_folder(folder: Path) -> Path:
    """``outputs/full`` for ``outputs/full-1a2b3c4d``."""
    folder = folder if folder.name else folder.resolve()  # the working folder's name
    return folder.with_name(folder.name.partition("-")[0])


def record_path(path: Path) -> Path:
    """Where the record of a file lies: ``student_cnn.pth.json``."""
    return path.with_name(path.name + ".json")


def record(path: Path) -> dict:
    """The record of a file: fingerprint, SHA-256, provenance, of a network its history; {} if absent or damaged."""
    try:
        return read_record(record_path(path))
    except (OSError, ValueError):
        return {}


def save_record(path: Path, fingerprint: dict, **more: object) -> None:
    """Write the record of a file: its fingerprint, the SHA-256 of its bytes, and whatever else is known."""
    save_document(record_path(path), {"fingerprint": fingerprint, "sha256": file_digest(path), **more})


def check_content(path: Path, file: BinaryIO | None = None) -> None:
    """Raise ValueError if a file's SHA-256 is not the one in its record; a legacy record has none.

    Args:
        file: the file, opened, if its content has been read: what was read is what is verified.
    """
    known = record(path)
    if not known and record_path(path).exists():
        raise ValueError(
            f"{record_path(path)} is damaged, {path.name} cannot be verified: delete both and run the chapter again"
        )
    if (expected := known.get("sha256")) is None:
        return
    if file:
        file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest() if file else file_digest(path)
    if found != expected:
        raise ValueError(
            f"{path} has changed since it was saved: its SHA-256 is {found}, its record says {expected}; delete it and "
            "run its chapter again"
        )


def save_weights(path: Path, model: nn.Module, *, fingerprint: dict, **more: object) -> None:
    """Write the network's tensors and their record, with whatever else is known of it: history, provenance."""
    content = io.BytesIO()  # not a file: torch writes its name into it, and hides the reason if the disk is full
    torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, content)
    _save(path, lambda file: file.write(content.getbuffer()), fingerprint, more)


def load_weights(path: Path, model: nn.Module) -> nn.Module:
    """`model` with the tensors of a file; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file: a network is never left with random weights in silence.
        ValueError: a file that is damaged, holds anything but tensors, or belongs to another network.
    """
    if not path.exists():
        raise FileNotFoundError(f"weights {path} are not there: run the chapter that trains this network first")
    try:
        with open_plain(path) as file:
            state = load_tensors(file)
            changed = _changed(path, file)
        check_named(state)
        for name in state.keys() & dict(model.named_parameters()):
            if state[name].is_complex() or not state[name].isfinite().all():
                raise ValueError(f"{name} holds values that are not finite real numbers")
    except Exception as error:  # torch raises many kinds for a damaged file, and UnpicklingError for a foreign one
        foreign = isinstance(error, pickle.UnpicklingError)  # whose own message advises to execute it
        reason = "it holds Python objects, which are not executed" if foreign else short_reason(error)
        raise ValueError(
            f"{path} is not a weights file ({reason}): expected named tensors as torch.save(model.state_dict()) "
            "writes them; if it was cut off, delete it and run its chapter again"
        ) from error
    if changed:
        raise changed
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
    _save(path, lambda file: np.save(file, array, allow_pickle=False), fingerprint, more)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, fingerprint: dict, **more: object) -> None:
    """Write an archive of arrays (``.npz``) and its record."""
    _save(path, lambda file: np.savez(file, **arrays), fingerprint, more)


def save_bytes(path: Path, content: bytes, *, fingerprint: dict, **more: object) -> None:
    """Write a file and its record, in place of what was there before."""
    _save(path, lambda file: file.write(content), fingerprint, more, backup=False)


def load_array(path: Path) -> np.ndarray:
    """The array of a file; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged or holds Python objects.
    """
    if not path.exists():
        raise FileNotFoundError(f"array {path} is not there: run the chapter that makes it first")
    try:
        with open_plain(path) as file:  # np.load leaves a damaged file open
            check_npy(file)
            array = np.load(file, allow_pickle=False)
            changed = _changed(path, file)
    except Exception as error:  # numpy raises many kinds for a damaged header, tokenize.TokenError among them
        raise ValueError(
            f"{path} is not an array file ({error}): expected .npy without Python objects; if it was cut off, delete "
            "it and run its chapter again"
        ) from error
    if changed:
        raise changed
    return array


def _changed(path: Path, file: BinaryIO) -> ValueError | None:
    """The error of :func:`check_content`, for later: what is wrong with the file itself is to be said first."""
    try:
        check_content(path, file)
    except ValueError as error:
        return error
    return None


def _save(
    path: Path, write: Callable[[BinaryIO], object], fingerprint: dict, more: dict, *, backup: bool = True
) -> None:
    """Write a file and its record; at no time does one of them lie beside another's."""
    with temporary(path) as content, temporary(record_path(path)) as known:
        with open(content, "wb") as file:
            write(file)
        about = {"fingerprint": fingerprint, "sha256": file_digest(content), **more}
        known.write_text(as_text(sealed(about)), encoding="utf-8")
        sync(content)
        sync(known)  # there is room for both; from here on only names change
        if backup:
            _make_room(path, fingerprint)
        remove(record_path(path))
        replace(content, path)
        replace(known, record_path(path))


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
        _rename(path, backup)
    except OSError as error:
        raise OSError(f"{path} is not what this run needs ({reasons}) and cannot be renamed: {error}") from error
    print(f"{path} is not what this run needs ({reasons}); kept as {backup.name}")


def _rename(path: Path, to: Path) -> None:
    """Rename a file and its record: the record first, so that :func:`_finish_renaming` knows where the file belongs."""
    if record_path(path).exists():
        replace(record_path(path), record_path(to))
    replace(path, to)


def _finish_renaming(path: Path) -> None:
    """Of `path` and its backups, rename a file without record to where a record without file has its SHA-256."""
    names = [path, *path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}")]
    lonely = [file for file in names if file.is_file() and not record_path(file).exists()]
    records = [record_path(path), *path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}.json")]
    waiting = {record(f).get("sha256"): f for r in records if r.exists() and not (f := r.with_suffix("")).exists()}
    for file in lonely if waiting else ():
        if to := waiting.pop(file_digest(file), None):
            replace(file, to)


def _mismatch(path: Path, fingerprint: dict) -> str:
    if not (known := record(path)) and record_path(path).exists():
        return "its record is damaged"
    found, wanted = known.get("fingerprint"), as_read(fingerprint)
    if isinstance(found, dict) and "processes" not in found:
        wanted.pop("processes", None)  # what one process made serves several as well, but not the reverse
    return differences(found, wanted)
