"""Which images of a data set are for training, for choices, and for the test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

VALIDATION = 2_500  # images held out of a training set; of a small one a tenth


class Part(NamedTuple):
    """A part of the training images; validation and test stay whole. Blocks of one size are disjoint."""

    images: int  # how many, evenly from all classes
    block: int = 0  # which of the blocks of so many images


def part_of(split: str) -> str:
    """The arrays that hold a split: those of the test images, or those of the training images."""
    return "test" if split == "test" else "train"


def split_rows(arrays: dict[str, np.ndarray], validation: int | None) -> dict[str, np.ndarray]:
    """The rows (N,) of the training arrays, or of the test arrays, that each split holds.

    Args:
        arrays: of a data set, by name; see :mod:`kdlib.sources.files`.
        validation: images held out of the training set; None: a tenth of it, at most ``VALIDATION``.
    """
    labels = arrays["train_labels"]
    if validation is None or validation >= len(labels):  # the reader's own set, or a file with a part of one of ours
        validation = min(VALIDATION, len(labels) // 10)
    held_out = stratified(labels[::-1], validation, len(arrays["class_names"]))
    held_out = np.sort(len(labels) - 1 - held_out)
    kept = np.setdiff1d(np.arange(len(labels)), held_out)
    return {"train": kept, "validation": held_out, "test": np.arange(len(arrays["test_labels"]))}


def stratified(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """The first rows of each class of labels (N,), `count` in all, as evenly as the classes allow; ascending."""
    by_class = [np.flatnonzero(labels == c) for c in range(classes)]
    rounds = np.concatenate([np.arange(len(rows)) for rows in by_class])  # a row's rank within its class
    order = np.lexsort((np.concatenate(by_class), rounds))
    return np.sort(np.concatenate(by_class)[order[:count]])


def within(limit: int | Part, rows: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], name: str) -> dict:
    """The rows of each split that `limit` leaves: so many images of each, or a part of the training images.

    Raises:
        ValueError: fewer images than classes, or a block that lies beyond the training images.
    """
    part = limit if isinstance(limit, Part) else Part(limit)
    classes, end = len(arrays["class_names"]), part.images * (part.block + 1)
    if part.images < classes or part.block < 0:
        raise ValueError(f"limit is {limit}: expected at least {classes}, one image per class of {name}")
    if part is limit and end > len(rows["train"]):
        raise ValueError(f"limit is {limit}: expected a block within the {len(rows['train']):,} images of {name}/train")

    def first(split: str, count: int) -> np.ndarray:
        labels = arrays[f"{part_of(split)}_labels"][rows[split]]
        return rows[split][stratified(labels, min(count, len(labels)), classes)]

    if part is limit:
        return {**rows, "train": np.setdiff1d(first("train", end), first("train", end - part.images))}
    return {split: first(split, limit) for split in rows}
