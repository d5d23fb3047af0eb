"""Where images come from: scikit-learn, torchvision, or a file or folder of the reader's own; and how they are split.

A data set is kept as one file, ``<KDLIB_DATA>/<name>.npz``, in canonical order: each split is sorted by the SHA-256 of
its images' bytes, so that index i is the same image on every machine, and published soft labels fit.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdlib.data import Data, ImageSet, mean_and_std
from kdlib.records.artefacts import atomic_write, did_you_mean

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
VALIDATION = 2_500  # images held out of a training set; of a small one a tenth


def data_folder() -> Path:
    """``$KDLIB_DATA``, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KDLIB_DATA") or cache / "kdlib").expanduser()


def load_data(name: str | os.PathLike, *, limit: int | None = None) -> Data:
    """A data set, split into training, validation and test images.

    Args:
        name: one of ``DATA_SETS``; or the path of an ``.npz`` file, or of a folder of images with
            ``train/<class>/*`` and ``test/<class>/*``.
        limit: at most so many images in each split, taken evenly from all classes.

    The validation images are the last of each class in canonical order: 2,500 in all, 1,147 of the digits, and of the
    reader's own set a tenth if that is fewer. They are chosen before `limit` is applied: no run ever trains on one.

    Raises:
        ValueError: an unknown name, a limit below the number of classes, or a file that does not hold a data set.
        FileNotFoundError: a set that is not there and could not be downloaded.
    """
    label, arrays, source = _read(name)
    class_names = tuple(str(n) for n in arrays["class_names"])
    rows = _split_rows(arrays, source.validation)
    if limit is not None:
        if limit < len(class_names):
            raise ValueError(f"limit is {limit}: expected at least {len(class_names)}, one image per class of {label}")
        for split, chosen in rows.items():
            labels = arrays[f"{_part(split)}_labels"][chosen]
            rows[split] = chosen[stratified(labels, min(limit, len(chosen)), len(class_names))]
    mean, std = mean_and_std(arrays["train_images"][rows["train"]])
    shared = dict(class_names=class_names, mean=mean, std=std, padding=source.padding, flip=source.flip)
    splits = []
    for split, chosen in rows.items():
        images, labels = (torch.from_numpy(arrays[f"{_part(split)}_{kind}"][chosen]) for kind in ("images", "labels"))
        splits.append(ImageSet(f"{label}/{split}", images, labels, **shared))
    return Data(*splits)


def _part(split: str) -> str:
    return "test" if split == "test" else "train"


def _split_rows(arrays: dict[str, np.ndarray], validation: int | None) -> dict[str, np.ndarray]:
    """The rows of the training arrays, or of the test arrays, that each split holds."""
    labels = arrays["train_labels"]
    if validation is None or validation >= len(labels):  # the reader's own set, or a file with a part of one of ours
        validation = min(VALIDATION, len(labels) // 10)
    held_out = stratified(labels[::-1], validation, len(arrays["class_names"]))
    held_out = np.sort(len(labels) - 1 - held_out)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return {"train": kept, "validation": held_out, "test": np.arange(len(arrays["test_labels"]))}


def stratified(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """The first rows of each class, `count` in all, as evenly as the classes allow; in ascending order."""
    by_class = [np.flatnonzero(labels == c) for c in range(classes)]
    rounds = np.concatenate([np.arange(len(rows)) for rows in by_class])  # a row's rank within its class
    order = np.lexsort((np.concatenate(by_class), rounds))
    return np.sort(np.concatenate(by_class)[order[:count]])


# --- data sets by name ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a data set comes from, and how its images are split and viewed."""

    padding: int  # pixels, see ImageSet
    flip: bool  # whether a mirrored image keeps its class
    validation: int | None  # images held out of the training set; None: a tenth, at most VALIDATION
    load: Callable[[Path], dict[str, np.ndarray]] | None  # called with the data folder; returns the ARRAYS


def _digits(_: Path) -> dict[str, np.ndarray]:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels in 16 shades; 500 of them are the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    images, labels = in_canonical_order(images, digits.target.astype(np.int64))
    test = stratified(labels, 500, 10)
    train = np.setdiff1d(np.arange(len(images)), test)
    return _arrays(images[train], labels[train], images[test], labels[test], np.array([str(d) for d in range(10)]))


def _torchvision(dataset: str) -> Callable[[Path], dict[str, np.ndarray]]:
    def load(folder: Path) -> dict[str, np.ndarray]:
        import torchvision

        kind = getattr(torchvision.datasets, dataset)
        train, test = (kind(folder / "downloads", train=split, download=True) for split in (True, False))
        arrays = []
        for split in (train, test):
            images = np.asarray(split.data)
            arrays += [images if images.ndim == 4 else images[..., None], np.asarray(split.targets, np.int64)]
        return _arrays(*arrays, np.array([name.split(" - ")[0] for name in train.classes]))  # MNIST's "3 - three"

    return load


DATA_SETS = {
    # Only 150 of the digits are for training, so that a student alone falls well behind its teacher, and there are
    # enough others to make choices by.
    "digits": Source(padding=1, flip=False, validation=1147, load=_digits),
    "cifar10": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR10")),
    "cifar100": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR100")),
    "mnist": Source(padding=2, flip=False, validation=VALIDATION, load=_torchvision("MNIST")),
    "fashion_mnist": Source(padding=2, flip=True, validation=VALIDATION, load=_torchvision("FashionMNIST")),
}


def _read(name: str | os.PathLike) -> tuple[str, dict[str, np.ndarray], Source]:
    """The label, the arrays and the source of a data set that is given by its name or path."""
    if str(name) in DATA_SETS:
        return str(name), _read_stored(str(name)), DATA_SETS[str(name)]
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        arrays = read_npz(path)
    elif path.is_dir():
        arrays = read_image_folder(path)
    elif path.suffix or path.parent != Path("."):
        wrong = "neither an .npz file nor a folder" if path.exists() else "no such file or folder"
        raise FileNotFoundError(
            f"data set {str(name)!r}: {wrong}; expected one of {', '.join(DATA_SETS)}, or the path of an .npz file or "
            "of a folder of images"
        )
    else:
        raise ValueError(
            f"data set {str(name)!r} is unknown: expected one of {', '.join(DATA_SETS)}, the path of an .npz file, or "
            f"the path of a folder with train/<class>/ and test/<class>/{did_you_mean(str(name), DATA_SETS)}"
        )
    # views that are safe for any images; for others, replace padding and flip in the ImageSet
    return path.stem, arrays, Source(arrays["train_images"].shape[1] // 8, flip=False, validation=None, load=None)


def _read_stored(name: str) -> dict[str, np.ndarray]:
    """One of ``DATA_SETS`` from its file, which is downloaded and written if it is not there."""
    if name == "digits":
        return _digits(data_folder())  # it comes with scikit-learn: nothing to download, nothing to keep
    path = data_folder() / f"{name}.npz"
    if path.exists():
        return read_npz(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = DATA_SETS[name].load(path.parent)
    except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError if no mirror responds
        raise FileNotFoundError(
            f"data set {name!r}: {path} is not there, and downloading it failed ({error}). Either let this machine "
            f"reach the network once, or put the file there from another machine, or set KDLIB_DATA to the folder "
            f"that holds {name}.npz"
        ) from error
    with atomic_write(path) as partial:
        np.savez(partial, **arrays)
    return arrays


# --- files and folders ---------------------------------------------------------------------------------------------


def in_canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,), sorted by the SHA-256 of each image's bytes, then by label."""
    keys = [(hashlib.sha256(image.tobytes()).digest(), int(label)) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return images[order], labels[order]


def _arrays(train_images, train_labels, test_images, test_labels, class_names) -> dict[str, np.ndarray]:
    splits = *in_canonical_order(train_images, train_labels), *in_canonical_order(test_images, test_labels)
    return dict(zip(ARRAYS, (*splits, class_names), strict=True))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set's file, checked; in canonical order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, holds Python objects, or whose arrays are not those of a data set.
    """
    if not path.exists():
        names = ", ".join(DATA_SETS)
        raise FileNotFoundError(f"data set file {path} is not there: check the path, or name one of {names}")
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
    return _arrays(*(arrays[name] for name in ARRAYS))


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
    return _arrays(*arrays, np.array(class_names))


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
