"""Where images come from: scikit-learn, torchvision, or the reader's own; and how they are split.

A data set is kept as one file, ``<KDLIB_DATA>/<name>.npz``, in canonical order: each split is sorted by the SHA-256 of
its images' bytes, so that index i is the same image on every machine, and published soft labels fit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib.data import Data, ImageSet, mean_and_std
from kdlib.records.artefacts import did_you_mean
from kdlib.sources.arrays import checked, read_npz
from kdlib.sources.folders import read_folder
from kdlib.sources.indexed import alike, common_names, in_order, read_indexed
from kdlib.sources.known import DATA_SETS, OWN
from kdlib.sources.order import put_in_order
from kdlib.sources.pictures import all_resized, whole_number
from kdlib.sources.splits import Part, check_complete, described, part_of, split_rows, within
from kdlib.sources.stored import read_stored


def data_folder() -> Path:
    """``$KDLIB_DATA``, or a folder in the user's cache."""
    if own := os.environ.get("KDLIB_DATA"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "kdlib"


def load_data(
    name: str | os.PathLike,
    *,
    limit: int | Part | None = None,
    size: int | None = None,
    padding: int | None = None,
    flip: bool | None = None,
) -> Data:
    """A data set, split into training, validation and test images.

    Args:
        name: one of ``DATA_SETS``; or the path of an ``.npz`` file, or of a folder of images with
            ``train/<class>/*``, ``test/<class>/*`` and perhaps ``val/<class>/*``, or with ``<class>/*`` alone, of which
            a fifth of each class is held out as the test set. A Path is never one of the names.
        limit: at most so many images in each split, taken evenly from all classes; or a part of the training images.
        size: resize the shorter side of every image to so many pixels, and cut a square from its centre.
        padding: pixels by which a view may be shifted. By default as the set in ``DATA_SETS`` has it; of the reader's
            own an eighth of the shorter side, at most 4, so that there are at most 81 views to make soft labels of.
        flip: whether a mirrored image keeps its class. By default False for the reader's own: of a digit it does not.

    The validation images are the reader's own, if there are any. Otherwise they are the last of each class in canonical
    order: 2,500 in all, 5,000 of MNIST, 1,147 of the digits, a tenth of each class of the reader's own set. They are
    chosen before `limit`: no run trains on one. A printed line says what was read of the reader's own set.

    Training images without a label have the label −1: a student can learn of them from a teacher alone.

    Raises:
        ValueError: an unknown name, an option out of range, a class without images in one of the splits, or a file that
            does not hold a data set.
        FileNotFoundError: a set that is not there and could not be downloaded.
    """
    size = whole_number("size", size, 2)
    if isinstance(name, str) and name in DATA_SETS:
        label, arrays, source, remarks = name, read_stored(name, data_folder()), DATA_SETS[name], []
    else:
        label, arrays, remarks = _read_own(name, size)
        source = OWN
    return _split(label, arrays, source, remarks, limit=limit, size=size, padding=padding, flip=flip)


def from_dataset(
    train: Any,
    test: Any,
    *,
    validation: Any = None,
    class_names: Sequence[str] | None = None,
    name: str = "own",
    limit: int | Part | None = None,
    size: int | None = None,
    padding: int | None = None,
    flip: bool | None = None,
) -> Data:
    """The same from any data sets that are asked by index: torchvision's, Hugging Face's, or a plain ``Dataset``.

    Args:
        train, test, validation: with ``len()`` and ``[i]``; what an item may be, see
            :func:`kdlib.sources.indexed.read_indexed`. The images are read once, into memory.
        class_names: in the order of the labels, or a mapping from label to name; by default what the data sets tell,
            otherwise the numbers.
        name: in records and messages.

    Raises:
        TypeError: a data set without length or index.
        ValueError: as for :func:`load_data`; of an item, the message names its index.
    """
    size = whole_number("size", size, 2)
    arrays: dict[str, np.ndarray] = {}
    for split, dataset in {"train": train, "validation": validation, "test": test}.items():
        if dataset is not None:
            arrays[f"{split}_images"], arrays[f"{split}_labels"] = read_indexed(dataset, f"{name}/{split}", size)
    if class_names is None:
        class_names = common_names({"train": train, "validation": validation, "test": test}, name)
    if class_names is not None:
        arrays["class_names"] = np.array(in_order(class_names, name))
    alike(arrays)
    return _split(name, checked(arrays, name), OWN, [], limit=limit, size=size, padding=padding, flip=flip)


def _split(label, arrays, source, remarks, *, limit, size, padding, flip) -> Data:
    """The splits of a data set's arrays. Beside those, one copy of the images is made, and no second one."""
    if size and arrays["train_images"].shape[1:3] != (size, size):
        for kept in [kept for kept in arrays if kept.endswith("_images")]:
            arrays[kept] = all_resized(arrays[kept], size)
    leaks = put_in_order(arrays)
    rows = split_rows(arrays, source.validation)
    if source is OWN:
        check_complete(rows, arrays, label)
        print(f"{label}: {'; '.join([*described(rows, arrays), *remarks])}")
        if leaks:
            warnings.warn(f"{label}: {'; '.join(leaks)}. What is measured on them says little", stacklevel=3)
    if limit is not None:
        rows = within(limit, rows, arrays, label)
    height, width = arrays["train_images"].shape[1:3]
    padding = whole_number("padding", padding, 0, most=min(height, width) // 4)
    if padding is None:
        padding = min(min(height, width) // 8, 4) if source.padding is None else source.padding
    if flip is not None and flip not in (0, 1):
        raise ValueError(f"flip is {flip!r}: expected True or False")
    mean, std = mean_and_std(arrays["train_images"], rows["train"])
    class_names = tuple(str(n) for n in arrays["class_names"])
    shared = dict(mean=mean, std=std, padding=padding, flip=bool(source.flip if flip is None else flip))
    splits = {}
    for split, chosen in rows.items():
        images, labels = (arrays[f"{part_of(split, arrays)}_{kind}"][chosen] for kind in ("images", "labels"))
        splits[split] = ImageSet(
            f"{label}/{split}", torch.from_numpy(images), torch.from_numpy(labels), class_names, **shared
        )
    return Data(**splits)


def _read_own(name: str | os.PathLike, size: int | None) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """The label and the arrays of the reader's own data set, given by its path; and remarks."""
    path = Path(name).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return path.stem, read_npz(path), []
    if path.is_dir():
        return path.resolve().name, *read_folder(path, size)
    if isinstance(name, os.PathLike) or path.suffix or path.parent != Path("."):
        wrong = "neither an .npz file nor a folder" if path.exists() else "no such file or folder"
        raise FileNotFoundError(
            f"data set {str(name)!r}: {wrong}; expected one of {', '.join(DATA_SETS)}, or the path of an .npz file or "
            "of a folder of images"
        )
    raise ValueError(
        f"data set {str(name)!r} is unknown: expected one of {', '.join(DATA_SETS)}, the path of an .npz file, or "
        f"the path of a folder with train/<class>/ and test/<class>/{did_you_mean(str(name), DATA_SETS)}"
    )
