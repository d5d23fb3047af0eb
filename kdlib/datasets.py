"""Where images come from: scikit-learn, torchvision, or a file or folder of the reader's own; and how they are split.

A data set is kept as one file, ``<KDLIB_DATA>/<name>.npz``, in canonical order: each split is sorted by the SHA-256 of
its images' bytes, so that index i is the same image on every machine, and published soft labels fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdlib.data import Data, ImageSet, mean_and_std
from kdlib.records.artefacts import atomic_write, did_you_mean
from kdlib.sources.files import in_canonical_order, in_order, read_image_folder, read_npz
from kdlib.splits import VALIDATION, Part, part_of, split_rows, stratified, within


def data_folder() -> Path:
    """``$KDLIB_DATA``, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KDLIB_DATA") or cache / "kdlib").expanduser()


def load_data(name: str | os.PathLike, *, limit: int | Part | None = None) -> Data:
    """A data set, split into training, validation and test images.

    Args:
        name: one of ``DATA_SETS``; or the path of an ``.npz`` file, or of a folder of images with
            ``train/<class>/*`` and ``test/<class>/*``.
        limit: at most so many images in each split, taken evenly from all classes; or a part of the training images.

    The validation images are the last of each class in canonical order: 2,500 in all, 5,000 of MNIST, 1,147 of the
    digits, and of the reader's own set a tenth if that is fewer. They are chosen before `limit`: no run trains on one.

    Raises:
        ValueError: an unknown name, a limit that is too small or too large, or a file that does not hold a data set.
        FileNotFoundError: a set that is not there and could not be downloaded.
    """
    label, arrays, source = _read(name)
    class_names = tuple(str(n) for n in arrays["class_names"])
    rows = split_rows(arrays, source.validation)
    if limit is not None:
        rows = within(limit, rows, arrays, label)
    mean, std = mean_and_std(arrays["train_images"][rows["train"]])
    shared = dict(class_names=class_names, mean=mean, std=std, padding=source.padding, flip=source.flip)
    splits = []
    for split, chosen in rows.items():
        images, labels = (torch.from_numpy(arrays[f"{part_of(split)}_{kind}"][chosen]) for kind in ("images", "labels"))
        splits.append(ImageSet(f"{label}/{split}", images, labels, **shared))
    return Data(*splits)


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
    return in_order(images[train], labels[train], images[test], labels[test], np.array([str(d) for d in range(10)]))


def _torchvision(dataset: str) -> Callable[[Path], dict[str, np.ndarray]]:
    def load(folder: Path) -> dict[str, np.ndarray]:
        import torchvision

        kind = getattr(torchvision.datasets, dataset)
        train, test = (kind(folder / "downloads", train=split, download=True) for split in (True, False))
        arrays = []
        for split in (train, test):
            images = np.asarray(split.data)
            arrays += [images if images.ndim == 4 else images[..., None], np.asarray(split.targets, np.int64)]
        return in_order(*arrays, np.array([name.split(" - ")[0] for name in train.classes]))  # MNIST's "3 - three"

    return load


DATA_SETS = {
    # Only 150 of the digits are for training, so that a student alone falls well behind its teacher, and there are
    # enough others to make choices by.
    "digits": Source(padding=1, flip=False, validation=1147, load=_digits),
    "cifar10": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR10")),
    "cifar100": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR100")),
    "mnist": Source(padding=2, flip=False, validation=5_000, load=_torchvision("MNIST")),
    "fashion_mnist": Source(padding=2, flip=True, validation=VALIDATION, load=_torchvision("FashionMNIST")),
}


def _read(name: str | os.PathLike) -> tuple[str, dict[str, np.ndarray], Source]:
    """The label, the arrays and the source of a data set that is given by its name or path."""
    if str(name) in DATA_SETS:
        return str(name), _read_stored(str(name)), DATA_SETS[str(name)]
    path = Path(name).expanduser()
    if path.suffix == ".npz" and path.exists():
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
