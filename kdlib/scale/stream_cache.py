"""Pictures decoded once, to one size, into a file that is mapped into memory: later only its pages are touched.

Beside ``<name>-<size>.npy``, images (N, size, size, 3) uint8, lie its record as beside everything that kdlib saves, and
``<name>-<size>.index.npz`` with what is known of each image. What is mapped belongs to the operating system's file
cache: it gives way when memory is needed, and all processes that read the file share it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdlib.gpu import ranks
from kdlib.records import artefacts
from kdlib.records.identity import digest
from kdlib.scale.stream_sources import Source
from kdlib.train import progress_bar

AT_ONCE = 2**23  # bytes that are written and hashed at once: what is lost at most when the making is stopped
GIVEN = "give load_images the tree again, so that the file is made once more"


class CachedImages:
    """Images (N, H, W, C) uint8 in a file: indexed like a tensor, without being in memory.

    Args:
        path: a file that :func:`cache_images` made.
        rows: (N,) those of its images that count, in this order; None: all.

    Raises:
        ValueError: a file without its record, one that was cut off, or one that took another's place since.
    """

    _version = 0  # nothing changes it in place

    def __init__(self, path: Path, rows: np.ndarray | None = None):
        self.path = path
        about = artefacts.record(path)
        if not about.get("sha256"):
            raise ValueError(f"{path} has no record that can be read: {GIVEN}")
        self.sha256: str = about["sha256"]
        self._stamp = _stamp(path)
        self.rows = np.arange(len(self._pixels)) if rows is None else rows

    @cached_property
    def _pixels(self) -> np.ndarray:
        try:
            pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)
            size, expected = self.path.stat().st_size, pixels.offset + pixels.nbytes
            if size != expected:
                raise ValueError(f"it has {size:,} bytes, its header tells of {expected:,}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be mapped into memory ({error}): delete it, and {GIVEN}") from error
        if (found := _stamp(self.path)) != self._stamp:  # after the mapping, so that it is of what was mapped
            raise ValueError(
                f"{self.path} is another file than when it was opened: its inode, size and time of change are {found}, "
                f"expected {self._stamp}; load the images again, each tree under a name of its own"
            )
        return pixels

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_pixels"}  # each process maps it itself

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, H, W, C), as a tensor's."""
        return len(self), *self._pixels.shape[1:]

    def __getitem__(self, chosen: int | slice | Tensor | np.ndarray) -> Tensor:
        """Some of the images, in memory: (n, H, W, C) uint8; of a number one, (H, W, C)."""
        chosen = chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen
        return torch.from_numpy(np.array(self._pixels[self.rows[chosen]]))

    def check(self) -> None:
        """Raise ValueError if the file's SHA-256 is not the one in its record; a process reads it once for that."""
        if (found := _digest_of(self.path, self._stamp)) != self.sha256:
            raise ValueError(
                f"{self.path} has changed since it was saved: its SHA-256 is {found}, its record says {self.sha256}; "
                f"delete it, and {GIVEN}"
            )

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, from the record, and of the choice of rows."""
        return hashlib.sha256(self.sha256.encode() + self.rows.tobytes()).hexdigest()

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, on a scale from 0 to 1, to six digits: from each image's sums."""
        sums = read_index(self.path, self.sha256)["sums"][self.rows].sum(0)  # (2, C)
        mean, square = sums / (len(self) * self.shape[1] * self.shape[2])
        std = np.sqrt(np.maximum(square - mean**2, 0))
        mean, std = ([round(float(x) / 255, 6) for x in values] for values in (mean, std))
        return tuple(mean), tuple(x or 1.0 for x in std)  # 1 for a channel that never varies


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when another file takes this one's place; None if there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


@lru_cache(maxsize=64)
def _digest_of(path: Path, stamp: tuple[int, int, int]) -> str:
    return artefacts.file_digest(path)


def cache_path(cache: Path, name: str, size: int) -> Path:
    """Where the images of that name are kept in that size."""
    return cache / f"{name.replace('/', '-')}-{size}.npy"


def index_path(path: Path) -> Path:
    """Where it is kept what is known of each image of a file."""
    return path.with_suffix(".index.npz")


def read_index(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """``labels`` (N,) int64, ``class_names`` (K,) and ``sums`` (N, 2, C) float64 of values and of their squares.

    Raises:
        ValueError: a file that is damaged, not there, or not of the images with that SHA-256.
    """
    index = index_path(path)
    try:
        artefacts.check_content(index)
        if (found := artefacts.record(index).get("fingerprint", {}).get("sha256")) != sha256:
            raise ValueError(f"it belongs to images with the SHA-256 {found}, not {sha256}")
        with open(index, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            return {name: stored[name] for name in ("labels", "class_names", "sums")}
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise ValueError(f"{index} cannot be read ({error}): delete it and {path.name}, and {GIVEN}") from error


def cache_images(
    source: Source, path: Path, size: int, *, origin: dict | None = None, workers: int = 0, progress: bool = True
) -> CachedImages:
    """The images of a source in that size, from `path` if it holds just those; otherwise they are read and kept there.

    What was read is kept if the reading is stopped, and the next call goes on from there. A file of other images is
    renamed to a backup. Two processes never make the same file: one waits for the other, and of ranks, rank 0 makes it.

    Args:
        size: the shorter side is resized to so many pixels, and a square is cut from the centre.
        origin: where the source lies, for the record; None: what is recorded of it stays.
        workers: processes that decode; their number changes the speed only.

    Raises:
        ValueError: a picture that cannot be read; the message names it.
    """
    made_from = {"images": source.identity, "size": size}
    with artefacts.reserve(path.parent, path.name, made_from) as kept:
        if not ranks.rank():
            if not kept or not _has_index(kept, made_from):
                _make(source, path, made_from, origin, workers, progress)
                kept = path
            elif origin and kept == path and artefacts.record(path).get("origin") != origin:
                artefacts.save_document(artefacts.record_path(path), {**artefacts.record(path), "origin": origin})
    return CachedImages(ranks.broadcast(kept))


def _has_index(path: Path, made_from: dict) -> bool:
    wanted = _of_index(made_from, CachedImages(path).sha256)
    return artefacts.find(path.parent, index_path(path).name, wanted) is not None


def _make(source: Source, path: Path, made_from: dict, origin: dict | None, workers: int, progress: bool) -> None:
    """Write a file, its index and, last, its record."""
    partial = path.with_name(f"{path.stem}.{digest(made_from)}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "ab+") as file, open(f"{partial}.txt", "a+", encoding="utf-8") as log:
        sha256, sums = _write(source, made_from["size"], file, log, workers, progress)
    artefacts.sync(partial)
    about = {"labels": source.labels, "class_names": np.array(source.class_names), "sums": sums}
    artefacts.save_arrays(index_path(path), about, fingerprint=_of_index(made_from, sha256))
    artefacts.remove(artefacts.record_path(path))
    artefacts.replace(partial, path)
    about = {"fingerprint": made_from, "sha256": sha256, "origin": origin}
    artefacts.save_document(artefacts.record_path(path), about)
    artefacts.remove(Path(f"{partial}.txt"))


def _of_index(made_from: dict, sha256: str) -> dict:
    return {**made_from, "sha256": sha256}  # of the file that it belongs to


def _write(source, size, file: BinaryIO, log, workers: int, progress: bool) -> tuple[str, np.ndarray]:
    """Bring the file to its end, from what is whole of it; its SHA-256, and the sums (N, 2, C) of each image."""
    shape = (len(source), size, size, 3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    whole, sums = hashlib.sha256(header.getvalue()), np.zeros((len(source), 2, 3))
    at_once = max(1, AT_ONCE // (3 * size * size))
    done = _resume(file, log, header.getvalue(), shape, at_once, whole, sums)
    loader = DataLoader(
        _Decoded(source, size),
        batch_size=None,
        sampler=range(done, len(source)),
        num_workers=workers,
        generator=torch.Generator(),  # so that the global one stays as it is
    )
    with progress_bar(len(source), progress, done, unit="image") as bar:
        pixels = np.empty((at_once, *shape[1:]), np.uint8)
        for k, one in enumerate(loader, done):
            pixels[k - done] = one.numpy()
            sums[k] = _sums(one.numpy())
            bar.update()
            if k + 1 - done == at_once or k + 1 == len(source):
                content = pixels[: k + 1 - done]
                file.write(content)
                file.flush()
                whole.update(content)
                log.write(json.dumps([k + 1, hashlib.sha256(content).hexdigest()]) + "\n")
                log.flush()
                done = k + 1
    return whole.hexdigest(), sums


def _resume(file, log, header: bytes, shape, at_once: int, whole, sums: np.ndarray) -> int:
    """How many images of an unfinished file are there as they were written; what follows them is cut off."""
    file.seek(0)
    log.seek(0)
    whole_lines, done, image = [], 0, int(np.prod(shape[1:]))
    for line in log if file.read(len(header)) == header else ():
        try:
            end, expected = json.loads(line)
        except ValueError:  # the line that was being written
            break
        content = file.read((end - done) * image)
        if end - done > at_once or hashlib.sha256(content).hexdigest() != expected:
            break
        whole.update(content)
        for k, pixels in enumerate(np.frombuffer(content, np.uint8).reshape(-1, *shape[1:]), done):
            sums[k] = _sums(pixels)
        whole_lines.append(line.rstrip() + "\n")
        done = end
    log.truncate(0)
    log.writelines(whole_lines)
    file.truncate(len(header) + done * image if done else 0)
    if not done:
        file.write(header)
    return done


def _sums(pixels: np.ndarray) -> np.ndarray:
    """The sums of an image's values and of their squares, per channel: (2, C), whole numbers as float64."""
    values = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64)
    return np.stack([np.ones(len(values)) @ values, np.einsum("pc,pc->c", values, values)])  # exact in any order


class _Decoded(Dataset):
    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.source.read(index, self.size)))
