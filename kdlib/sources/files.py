"""A data set's arrays: from an ``.npz`` file or a folder of images, checked, and in canonical order."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")


def in_canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,), sorted by the SHA-256 of each image's bytes, then by label."""
    keys = [(hashlib.sha256(image.tobytes()).digest(), int(label)) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return images[order], labels[order]


def in_order(train_images, train_labels, test_images, test_labels, class_names) -> dict[str, np.ndarray]:
    """The five arrays of a data set by name, each split in canonical order: images (N, H, W, C), labels (N,)."""
    splits = *in_canonical_order(train_images, train_labels), *in_canonical_order(test_images, test_labels)
    return dict(zip(ARRAYS, (*splits, class_names), strict=True))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set's file, checked; in canonical order.

    Raises:
        ValueError: a file that is missing or damaged, holds Python objects, or has not the arrays of a data set.
    """
    try:
        with open(path, "rb") as file:  # np.load leaves a damaged file open
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("it is a single array")
            missing = [name for name in ARRAYS if name not in stored.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            arrays = {name: stored[name] for name in ARRAYS}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is not a data set ({error}): expected an .npz file with the arrays {', '.join(ARRAYS)}, none of "
            "them of Python objects; if it was cut off, delete it and let it be made again"
        ) from error
    _check_arrays(arrays, path)
    return in_order(*(arrays[name] for name in ARRAYS))


def _check_arrays(arrays: dict[str, np.ndarray], file: Path) -> None:
    def wrong(name: str, expected: str) -> ValueError:
        actual = f"{arrays[name].dtype} {arrays[name].shape}"
        return ValueError(f"{file}: {name} is {actual}, expected {expected}; save the file again with this array")

    if arrays["class_names"].ndim != 1 or arrays["class_names"].dtype.kind != "U" or not arrays["class_names"].size:
        raise wrong("class_names", "str (K,), one name per class")
    classes = len(arrays["class_names"])
    shape = arrays["train_images"].shape[1:]
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size or images.shape[1:] != shape:
            raise wrong(f"{split}_images", "uint8 (N, H, W, C), not empty, one image size for training and test")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise wrong(f"{split}_labels", f"int64 ({len(images)},), one label per image")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{file}: {split}_labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}: "
                f"there are {classes} class names; number the classes from 0, or name them all in class_names"
            )


def read_image_folder(path: Path) -> dict[str, np.ndarray]:
    """A folder with ``train/<class>/*`` and ``test/<class>/*``, images all of one size, as a data set's arrays.

    Raises:
        ValueError: a missing split, classes that differ between the splits, a class without images, or an image of
            another size.
    """
    import torchvision

    class_names = _check_class_folders(path)
    arrays = []
    for split in ("train", "test"):
        samples = torchvision.datasets.ImageFolder(path / split)
        images, labels = [], []
        for file, label in samples.samples:
            try:
                pixels = np.asarray(samples.loader(file))  # (H, W, 3): the loader converts to RGB
            except (OSError, SyntaxError) as error:  # what PIL raises for a damaged file
                raise ValueError(f"{file} is not an image that can be read ({error}): replace or remove it") from error
            shape = images[0].shape if images else arrays[0].shape[1:] if arrays else pixels.shape
            if pixels.shape != shape:
                raise ValueError(
                    f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, expected {shape[1]}x{shape[0]} like the others: "
                    "resize all images to one size first"
                )
            images.append(pixels)
            labels.append(label)
        arrays += [np.stack(images), np.array(labels, np.int64)]
    return in_order(*arrays, np.array(class_names))


def _check_class_folders(path: Path) -> list[str]:
    """The names of the classes, in order: the same in both splits, each with images."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    names: list[str] = []
    for split in ("train", "test"):
        folder = path / split
        in_split = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
        if not in_split:
            wrong = f"no class folders in {folder}, expected train/<class>/ and test/<class>/"
            raise ValueError(f"{path}: {wrong}: move the images")
        names = names or in_split
        if in_split != names:
            odd = min(set(in_split) ^ set(names))
            wrong = f"class {odd!r} is in one of train and test only, expected the same in both"
            raise ValueError(f"{path}: {wrong}; add the missing folder, or remove the other")
        for name in names:
            if not any(f.suffix.lower() in IMG_EXTENSIONS for f in (folder / name).rglob("*")):
                kinds = ", ".join(IMG_EXTENSIONS)
                raise ValueError(f"{folder / name} holds no image: remove the folder or add some ({kinds})")
    return names
