"""Arrays as other programs write them, as those of a data set: cast if nothing is lost, refused otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdlib.records.files import open_plain
from kdlib.records.limits import check_archive
from kdlib.sources.pictures import from_floats

SPLITS = ("train", "validation", "test")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")  # and class_names, which can be counted
CHANNELS = (1, 2, 3, 4)
CHUNK = 256  # images that are cast at once, so that no second copy of all is needed


def names_of(split: str, kind: str) -> list[str]:
    """What the array of a split is called, here or elsewhere: Keras has ``x_train``, MedMNIST ``val_images``."""
    letter = {"images": "x", "labels": "y"}[kind]
    splits = {"validation": ("validation", "val", "valid")}.get(split, (split,))
    return [f"{s}_{kind}" for s in splits] + [f"{letter}_{s}" for s in splits]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set's file by name: ``train_images`` (N, H, W, C) uint8, ``train_labels`` (N,) int64, the
    same of test and, if there are any, of validation, and ``class_names``.

    A label of −1 stands for none; only training images may do without.

    Raises:
        ValueError: a file that is damaged, holds Python objects, or lacks an array; an array that cannot be cast.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with open_plain(path) as file:  # np.load leaves a damaged file open
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise ValueError("it is a single array")
            check_archive(file)
            stored = np.load(file, allow_pickle=False)
            for split in SPLITS:
                for kind in ("images", "labels"):
                    there = [name for name in names_of(split, kind) if name in stored.files]
                    if len(there) > 1:
                        raise ValueError(f"it has both {' and '.join(there)}")
                    if there:
                        arrays[f"{split}_{kind}"] = stored[there[0]]
            if "class_names" in stored.files:
                arrays["class_names"] = stored["class_names"]
            pairs = ["validation_images", "validation_labels"]
            wanted = [*ARRAYS, *(pairs if set(pairs) & set(arrays) else [])]
            if missing := [name for name in wanted if name not in arrays]:
                raise ValueError(f"it has no {', '.join(missing)}, but {_listed(stored.files)}")
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise ValueError(
            f"{path} is not a data set ({error}): expected an .npz file with the arrays {', '.join(ARRAYS)} and "
            "class_names, none of them of Python objects; if it was cut off, delete it and let it be made again"
        ) from error
    return checked(arrays, str(path))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", …" * (len(names) > 8) or "nothing"


def checked(arrays: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """The arrays of a data set as :func:`read_npz` returns them, cast from whatever they were; it empties `arrays`."""
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    cast: dict[str, np.ndarray] = {}
    for split in splits:
        for kind, to in (("images", _images), ("labels", _labels)):
            name = f"{split}_{kind}"
            array = arrays.pop(name)
            try:
                cast[name] = to(array)
            except ValueError as error:
                raise ValueError(
                    f"{where}: {name} is {array.dtype} {array.shape}, {error}; save the file again with this array"
                ) from error
    names = _class_names(arrays.pop("class_names", None), [cast[f"{s}_labels"] for s in splits], where)
    shape = cast["train_images"].shape[1:]
    for split in splits:
        images, labels = cast[f"{split}_images"], cast[f"{split}_labels"]
        if images.shape[1:] != shape:
            raise ValueError(
                f"{where}: {split}_images are {images.shape[1:]}, the training images {shape}: expected one size "
                "(height, width, channels); save the file again"
            )
        if len(labels) != len(images):
            raise ValueError(
                f"{where}: {len(labels):,} {split}_labels for {len(images):,} {split}_images: expected one label per "
                "image; save the file again"
            )
        least = -1 if split == "train" else 0
        if labels.min() < least or labels.max() >= len(names):
            raise ValueError(
                f"{where}: {split}_labels run from {labels.min()} to {labels.max()}, expected 0 to {len(names) - 1}: "
                f"there are {len(names)} class names; number the classes from 0, or name them all in class_names"
                + (", and only training images may lack a label (-1)" if labels.min() < 0 else "")
            )
    return {**cast, "class_names": names}


def _images(array: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) uint8."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not array.size:
        raise ValueError("expected (N, H, W, C), (N, C, H, W) or (N, H, W), not empty")
    if array.shape[3] not in CHANNELS and array.shape[1] in CHANNELS:
        array = array.transpose(0, 2, 3, 1)  # channels first
    if array.shape[3] not in CHANNELS or min(array.shape[1:3]) < 2:
        raise ValueError(f"expected (N, H, W, C) or (N, C, H, W) with {CHANNELS[0]} to {CHANNELS[-1]} channels")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind not in "buif":
        raise ValueError("expected uint8, or numbers that it can hold")
    low, high = array.min(), array.max()
    integral = array.dtype.kind in "bui" or all((part == np.round(part)).all() for part in _chunks(array))
    to_one = array.dtype.kind == "b" or (array.dtype.kind == "f" and low >= 0 and high <= 1)
    if not to_one and not (integral and low >= 0 and high <= 255):
        raise ValueError(f"with values from {low:g} to {high:g}, expected whole numbers to 255, or floats from 0 to 1")
    images = np.empty(array.shape, np.uint8)
    for k, part in enumerate(_chunks(array)):
        images[k * CHUNK : (k + 1) * CHUNK] = from_floats(part.astype(np.float32)) if to_one else part
    return images


def _chunks(array: np.ndarray) -> list[np.ndarray]:
    return [array[k : k + CHUNK] for k in range(0, len(array), CHUNK)]


def _labels(array: np.ndarray) -> np.ndarray:
    """Labels (N,) int64."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not array.size:
        raise ValueError("expected (N,) or (N, 1), one class number per image" + _one_hot(array))
    numbers = array.astype(np.float64) if array.dtype.kind in "uif" else np.array(np.nan)
    if not (np.abs(numbers) < 2**31).all() or (numbers != np.round(numbers)).any():
        raise ValueError("expected whole numbers, one class number per image")
    return array.astype(np.int64)


def _one_hot(array: np.ndarray) -> str:
    return ": of one-hot rows, save argmax(1)" if array.ndim == 2 else ""


def _class_names(names: np.ndarray | None, labels: list[np.ndarray], where: str) -> np.ndarray:
    """The classes' names (K,) as strings; without any, their numbers, as far as labels go."""
    images = sum(map(len, labels))
    if names is None and (most := int(max(own.max() for own in labels))) >= images:
        raise ValueError(
            f"{where}: a label is {most:,}, and there are {images:,} images: expected classes numbered from 0, "
            "each with images"
        )
    if names is None:
        return np.array([str(k) for k in range(int(max(own.max() for own in labels)) + 1)])
    if names.ndim != 1 or names.dtype.kind not in "US" or not names.size:
        raise ValueError(
            f"{where}: class_names is {names.dtype} {names.shape}, expected str (K,), one name per class; save the "
            "file again with this array, or without it"
        )
    try:
        names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: class_names are bytes that are no UTF-8 ({error}): save them as str") from error
    if len(set(names.tolist())) < len(names):
        twice = next(name for name in names.tolist() if names.tolist().count(name) > 1)
        raise ValueError(f"{where}: class_names has {twice!r} twice: expected a name of its own for each class")
    return names
