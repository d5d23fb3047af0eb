"""Files that are there as a whole or not at all, whatever interrupts the writing; and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from kdlib.gpu import ranks

LOCKS = ".locks"  # the folder, beside the files, of the locks of those that are being made
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}-.+|\.[0-9a-f]{32}(-.+)?")  # the second: of older versions
_DAY = 86_400  # seconds
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # of some network drives, which cannot fsync
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A path in the folder of `path` to write to, for a file that is renamed to `path` later; it vanishes if it is not.

    The folder is made, and what dead processes left in it is deleted.

    Raises:
        OSError: the file cannot be written; the message names it and the setting that chooses another folder.
    """
    partial = path.with_name(f".{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        _make_folder(path.parent)
        yield partial
    except OSError as error:
        if error.errno is None:  # its message is one of ours already
            raise
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and vanishes when it fails.

    So a file is there as a whole or not at all, whatever interrupts the writing, a power failure included.

    Raises:
        OSError: the file cannot be written; the message names it and the setting that chooses another folder.
    """
    with temporary(path) as partial:
        yield partial
        sync(partial)
        replace(partial, path)


def replace(source: Path, path: Path) -> None:
    """Rename `source` to `path`, in place of what has that name; on the disk when this returns."""
    os.replace(source, path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Delete a file, if it is there; on the disk when this returns."""
    if path.exists():
        path.unlink(missing_ok=True)
        sync(path.parent)


def remove_whatever(path: Path) -> None:
    """Delete what has that name, if anything has: a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Make `folder` if it is not there yet; OSError if nothing can be written to it."""
    try:
        check_room(folder / "probe", 0)
    except OSError as error:
        raise _cannot_write(folder, error.__cause__ or error) from error


def check_room(path: Path, size: int) -> None:
    """OSError if no file of `size` bytes can be written at `path`; what is there stays as it is. Rank 0 tries."""
    if ranks.rank():
        return
    with temporary(path) as probe, open(probe, "wb") as file:
        if size > shutil.disk_usage(path.parent).free:  # seen without filling the disk, which others may share
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for start in range(0, size, 2**20):
            file.write(bytes(min(2**20, size - start)))


def open_plain(path: Path) -> BinaryIO:
    """The file, opened; ValueError for a folder, a pipe or a device, which might be waited for."""
    if not path.is_file():
        raise ValueError("it is not a plain file")
    return open(path, "rb")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits; ValueError for a folder, a pipe or a device."""
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file: move it away")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Be the only process, and the only thread, that makes the file or folder at `path`.

    If another is making it, a printed line says which, and this one waits. A process that dies, dies without its
    locks. Where nothing can be written, nobody writes, and no lock is needed.
    """
    folder = Path(os.path.realpath(path.parent)) / LOCKS
    own = FileLock(folder / f"{path.name}.lock", is_singleton=True)  # so that one thread may lock the same file twice
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            own.acquire(timeout=0)
        except Timeout:
            print(f"{path} is being made by {_owner(own)}: waiting until it is there", flush=True)
            own.acquire()
    except OSError:
        own = contextlib.nullcontext()
    else:
        with contextlib.suppress(OSError):
            Path(own.lock_file).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    try:
        yield
    finally:
        if isinstance(own, FileLock):
            own.release()


def _owner(held: FileLock) -> str:
    try:
        return Path(held.lock_file).read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _sweep(folder: Path) -> None:
    """Delete temporary files of processes that are dead: of this machine at once, of others after a day."""
    for entry in os.scandir(folder):
        if found := _TEMPORARY.fullmatch(entry.name):
            with contextlib.suppress(OSError):  # another process may have deleted it just now
                if (found[1] == _HOST and _is_dead(int(found[2]))) or time.time() - entry.stat().st_mtime > _DAY:
                    os.unlink(entry.path)


def _is_dead(process: int) -> bool:
    if os.name != "posix":
        return False  # there signal 0 ends a process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _cannot_write(path: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
    return OSError(
        f"{path} cannot be written ({reason}): choose another folder for artefacts with KDLIB_OUTPUTS, or for data "
        "sets with KDLIB_DATA"
    )
