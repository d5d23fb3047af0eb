"""What reading a file would take: told from its headers before anything is allocated, and refused if it is too much.

A file of a kilobyte can promise any amount of data. Plain arrays hold no more than their file does. What is compressed
may expand to 256 MB, or to fifty times the size of its file if that is more (photographs expand to about twice, MNIST
to five times); and nothing may take more memory than there is.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

EXPANDED, RATIO = 2**28, 50  # bytes that any compressed file may expand to; or that many times its own size
JSON_BYTES = 2**25  # of one document: those of the book have up to 0.7 MB; in memory the worst takes 25 times as much
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others one block may expand to any size
_UNBOUNDED = ("bytearray", "encode")  # what torch.load calls with whatever arguments a file gives
_CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory() -> int:
    """The bytes of memory that this process may have: the machine's, its container's, or the limit set for it."""
    found = [sys.maxsize]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(path).read_text(encoding="ascii")))
    with contextlib.suppress(ImportError):
        import resource

        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
        found += [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min(found)


def check_memory(size: int, what: str, mend: str) -> None:
    """Raise ValueError if `size` bytes are more than the memory there is."""
    if size > (there := memory()):
        raise ValueError(f"{what} take {size / 1e9:,.1f} GB, and there are {there / 1e9:,.1f} GB of memory: {mend}")


def check_npy(file: BinaryIO, size: int | None = None) -> None:
    """Raise ValueError if the header of an array promises more than follows it. The file is where it was afterwards.

    Args:
        file: at the beginning of what :func:`numpy.save` wrote.
        size: of all that, in bytes; None: to the end of the file.
    """
    start = file.tell()
    if size is None:
        size = file.seek(0, io.SEEK_END) - start
        file.seek(start)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # later ones are for structured arrays
        raise ValueError(f"it is of format {version[0]}.{version[1]}, expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if any(length < 0 for length in shape):
        raise ValueError(f"its header promises the shape {shape}")
    promised, held = math.prod(shape) * max(dtype.itemsize, 1), size - (file.tell() - start)
    if promised > held and not dtype.hasobject:  # those are refused anyway
        raise ValueError(f"its header promises {promised:,} bytes, {dtype} {shape}, and {held:,} follow")
    check_memory(promised, "its numbers", "read it on a machine with more, or save a part of it")
    file.seek(start)


def check_archive(file: BinaryIO) -> int:
    """The bytes that a zip archive expands to; ValueError for more than it may. The file is at its start afterwards."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if odd := [entry.filename for entry in entries if entry.compress_type not in _COMPRESSIONS]:
            raise ValueError(f"{odd[0][:80]!r} in it is compressed in an unusual way: expected stored or deflated")
        expanded, most = sum(entry.file_size for entry in entries), max(EXPANDED, RATIO * size)
        if expanded > most:
            raise ValueError(
                f"it has {size / 1e6:,.1f} MB and would expand to {expanded / 1e6:,.0f} MB, expected at most "
                f"{most / 1e6:,.0f} MB; if you trust it, save it again without compression, as numpy.savez does"
            )
        check_memory(expanded, "its contents", "read it on a machine with more, or save a part of it")
        for entry in entries:
            if entry.filename.endswith(".npy"):
                with archive.open(entry) as array:
                    check_npy(array, entry.file_size)
    file.seek(0)
    return expanded


def load_tensors(file: BinaryIO) -> object:
    """What ``torch.save`` wrote, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: it promises more than it holds.
        Exception: of many kinds for a damaged file; ``pickle.UnpicklingError`` for other Python objects.
    """
    if zipfile.is_zipfile(file):
        held = check_archive(file)
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith("data.pkl"):
                    _check_pickle(io.BytesIO(archive.read(name)))
    else:
        held = file.seek(0, io.SEEK_END)
        file.seek(0)
        for _ in range(5):  # pickles in a row: the fourth is the state; after the fifth come the numbers
            if file.tell() < held:
                _check_pickle(file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    _check_tensors(loaded, held)
    return loaded


def check_named(loaded: object) -> None:
    """Raise ValueError if that is not a dict from names to tensors."""
    if not isinstance(loaded, dict) or not all(isinstance(item, torch.Tensor) for item in loaded.values()):
        raise ValueError("it holds something other than named tensors")
    if odd := [name for name in loaded if not isinstance(name, str)]:
        raise ValueError(f"it holds tensors whose names are no texts, such as {str(odd[0])[:80]}")


def _check_pickle(file: BinaryIO) -> None:
    """Raise ValueError if a pickle calls what would make data of any size from nothing."""
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL" and argument.rpartition(" ")[2] in _UNBOUNDED:
            called = argument.replace(" ", ".")
            raise ValueError(f"it calls {called}, which makes data of any size: save named tensors only")


def _check_tensors(loaded: object, held: int) -> None:
    """Raise ValueError if a tensor in a mapping, or in mappings in it, has more numbers than the file holds."""
    waiting, seen = [loaded], set()
    while waiting:
        mapping = waiting.pop()
        if not isinstance(mapping, dict) or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        waiting += mapping.values()
        for name, value in mapping.items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.layout != torch.strided or value.device.type != "cpu":
                raise ValueError(f"{str(name)[:80]} is {value.layout} on {value.device}: expected plain numbers")
            if value.numel() * value.itemsize > held:
                raise ValueError(
                    f"{str(name)[:80]} promises {value.numel() * value.itemsize:,} bytes, and the file holds {held:,}: "
                    "save it with .contiguous()"
                )


def read_json(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        OSError: no such file.
        ValueError: it is no JSON, too large, or nested too deeply. The message does not name the file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a plain file")  # a pipe would be waited for
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"it has {size / 1e6:,.0f} MB, expected at most {JSON_BYTES / 1e6:,.0f} MB")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
