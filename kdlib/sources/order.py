"""The canonical order of images, in which index i is the same image on every machine."""

from __future__ import annotations

import hashlib

import numpy as np


def canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """The order of images (N, H, W, C) and labels (N,) by the SHA-256 of each image's bytes, then by label.

    Returns:
        The rows (N,) in that order, and the digests in it.
    """
    keys = [(hashlib.sha256(image.tobytes()).digest(), int(label)) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.array(order, np.int64), [keys[k][0] for k in order]


def in_canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,) in that order."""
    order, _ = canonical_order(images, labels)
    return images[order], labels[order]


def put_in_order(arrays: dict[str, np.ndarray]) -> list[str]:
    """Sort each split of a data set's arrays, in place in the dictionary, so that no third copy of it is in memory.

    If there is an array of file names beside them, such as ``train_files`` (N,), remarks name the files.

    Returns:
        Remarks on images that occur more than once where that matters: in two splits, or with two labels.
    """
    remarks: list[str] = []
    digests: dict[str, list[bytes]] = {}
    for split in ("train", "validation", "test"):
        if f"{split}_images" not in arrays:
            continue
        labels = arrays[f"{split}_labels"]
        order, found = canonical_order(arrays[f"{split}_images"], labels)
        for kind in ("images", "labels", "files"):
            if f"{split}_{kind}" in arrays:
                arrays[f"{split}_{kind}"] = arrays[f"{split}_{kind}"][order]
        labels = labels[order]
        equal = [k for k in range(len(found) - 1) if found[k] == found[k + 1]]
        if twice := [k for k in equal if labels[k] != labels[k + 1] and labels[k] >= 0]:
            occur = "images occur" if len(twice) > 1 else "image occurs"
            example = _files(arrays, (split, twice[0]), (split, twice[0] + 1))
            remarks.append(f"{len(twice):,} {split} {occur} twice with different labels{example}")
        digests[split] = found
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        first = {digest: k for k, digest in enumerate(digests.get(one, []))}
        if shared := [k for k, digest in enumerate(digests.get(other, [])) if digest in first]:
            example = _files(arrays, (other, shared[0]), (one, first[digests[other][shared[0]]]))
            are = "images are" if len(shared) > 1 else "image is"
            remarks.append(f"{len(shared):,} {other} {are} also in {one}{example}")
    return remarks


def _files(arrays: dict[str, np.ndarray], *places: tuple[str, int]) -> str:
    """Which files two images come from, if that is known."""
    names = [str(arrays[f"{split}_files"][k]) for split, k in places if f"{split}_files" in arrays]
    return f" (such as {' and '.join(names)})" if len(names) == len(places) else ""
