"""Which images of a data set are for training, for choices, and for the test."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

VALIDATION = 2_500  # images held out of a training set; of a small one a tenth


class Part(NamedTuple):
    """A part of the training images; validation and test stay whole. Blocks of one size are disjoint."""

    images: int  # how many, evenly from all classes
    block: int = 0  # which of the blocks of so many images


def part_of(split: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The arrays that hold a split: its own, or the training images' if it is held out from these."""
    return split if f"{split}_labels" in arrays else "train"


def split_rows(arrays: Mapping[str, np.ndarray], validation: int | None) -> dict[str, np.ndarray]:
    """The rows (N,) that each split holds, of the arrays that :func:`part_of` names.

    Args:
        arrays: of a data set, by name; see :mod:`kdlib.sources.arrays`.
        validation: images held out of the training set, evenly from all classes; None: of each class a tenth, at least
            one image, and no more than ``VALIDATION`` in all, unless the arrays have validation images of their own.

    A test set that is not there is a fifth of each class.
    """
    labels, classes = arrays["train_labels"], len(arrays["class_names"])
    rows = {
        split: np.arange(len(arrays[f"{part_of(split, arrays)}_labels"])) for split in ("train", "validation", "test")
    }
    if "test_labels" not in arrays:
        rows["test"] = _last_of_each_class(rows["train"], labels, classes, 0.2)
        rows["train"] = np.setdiff1d(rows["train"], rows["test"])
    if "validation_labels" in arrays:
        return rows
    if validation is None:
        share = min(0.1, VALIDATION / len(rows["train"]))
        held_out = _last_of_each_class(rows["train"], labels, classes, share)
    else:
        if validation >= len(labels):  # a file with a part of one of our sets
            validation = min(VALIDATION, len(labels) // 10)
        held_out = np.sort(len(labels) - 1 - stratified(labels[::-1], validation, classes))
    return {"train": np.setdiff1d(rows["train"], held_out), "validation": held_out, "test": rows["test"]}


def _last_of_each_class(rows: np.ndarray, labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """A share of the rows of each class, at least one, from the end; ascending."""
    by_class = [rows[labels[rows] == c] for c in range(classes)]
    return np.sort(np.concatenate([own[len(own) - max(1, int(share * len(own))) :] for own in by_class]))


def check_complete(rows: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Raise ValueError if a class has no image in one of the splits; without labels, training images may be of any."""
    for split, chosen in rows.items():
        labels = arrays[f"{part_of(split, arrays)}_labels"][chosen]
        counts = np.bincount(labels[labels >= 0], minlength=len(arrays["class_names"]))
        if split == "train" and (labels < 0).any():
            continue
        held_out = sum(f"{s}_labels" not in arrays for s in ("validation", "test"))
        if split == "validation" and held_out and (arrays["train_labels"] < 0).all():
            raise ValueError(
                f"{name}: no training image has a label, so none can be held out for validation: expected validation "
                "images with labels, in a folder val/ with the classes' folders or an array validation_images"
            )
        if missing := [str(arrays["class_names"][c]) for c in np.flatnonzero(counts == 0)]:
            left = " left" if split == "train" and held_out else ""
            needs = f" A class needs {held_out + 1} of them, since {held_out} will be held out." if held_out else ""
            raise ValueError(
                f"{name}: class {missing[0]!r} has no {split} image{left}{_and_others(missing)}. Expected training, "
                f"validation and test images of every class: add training images, or leave the class out.{needs}"
                + (
                    " Are the classes numbered from 1? Expected 0."
                    if np.flatnonzero(counts == 0).tolist() == [0]
                    else ""
                )
            )


def _and_others(missing: list[str]) -> str:
    return f", nor have {', '.join(missing[1:4])}{', …' * (len(missing) > 4)}" if len(missing) > 1 else ""


def stratified(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """The first rows of each class of labels (N,), `count` in all, as evenly as the classes allow; ascending.

    Images without a label count as one class more.
    """
    by_class = [np.flatnonzero(labels == c) for c in [*range(classes), -1]]
    rounds = np.concatenate([np.arange(len(rows)) for rows in by_class])  # a row's rank within its class
    order = np.lexsort((np.concatenate(by_class), rounds))
    return np.sort(np.concatenate(by_class)[order[:count]])


def within(limit: int | Part, rows: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], name: str) -> dict:
    """The rows of each split that `limit` leaves: so many images of each, or a part of the training images.

    Raises:
        ValueError: not a whole number, fewer images than classes, or a block that lies beyond the training images.
    """
    try:
        part = limit if isinstance(limit, Part) else Part(operator.index(limit))
    except TypeError:
        raise ValueError(f"limit is {limit!r}: expected a whole number of images per split, or a Part") from None
    classes, end = len(arrays["class_names"]), part.images * (part.block + 1)
    if part.images < classes or part.block < 0:
        raise ValueError(f"limit is {limit}: expected at least {classes}, one image per class of {name}")
    if part is limit and end > len(rows["train"]):
        raise ValueError(f"limit is {limit}: expected a block within the {len(rows['train']):,} images of {name}/train")

    def first(split: str, count: int) -> np.ndarray:
        labels = arrays[f"{part_of(split, arrays)}_labels"][rows[split]]
        return rows[split][stratified(labels, min(count, len(labels)), classes)]

    if part is limit:
        return {**rows, "train": np.setdiff1d(first("train", end), first("train", end - part.images))}
    return {split: first(split, part.images) for split in rows}


def described(rows: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """What a data set holds, in a few words each: images by split and class, size, channels."""
    labels, names = arrays["train_labels"][rows["train"]], arrays["class_names"]
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    shown = [f"{names[c]} {counts[c]:,}" for c in (order if len(order) <= 6 else [*order[:3], *order[-2:]])]
    if len(order) > 6:
        shown.insert(3, "…")
    if unlabelled := int((labels < 0).sum()):
        shown = [*(shown if counts.any() else []), f"without a label {unlabelled:,}"]
    _, height, width, channels = arrays["train_images"].shape
    return [
        f"{len(labels):,} training images ({', '.join(shown)})",
        f"{len(rows['validation']):,} validation images {'given' if 'validation_labels' in arrays else 'held out'}",
        f"{len(rows['test']):,} test images{'' if 'test_labels' in arrays else ' held out'}",
        f"{len(names)} classes",
        f"{width}x{height} pixels, {channels} channel{'s' if channels > 1 else ''}",
    ]
