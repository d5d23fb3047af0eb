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

    Returns:
        Remarks on images that occur more than once where that matters: in two splits, or with two labels.
    """
    remarks, digests = [], {}
    for split in ("train", "validation", "test"):
        if f"{split}_images" not in arrays:
            continue
        labels = arrays[f"{split}_labels"]
        order, found = canonical_order(arrays[f"{split}_images"], labels)
        for kind in ("images", "labels"):
            arrays[f"{split}_{kind}"] = arrays[f"{split}_{kind}"][order]
        labels = labels[order]
        twice = sum(
            a == b and x != y and x >= 0 for a, b, x, y in zip(found, found[1:], labels, labels[1:], strict=False)
        )
        if twice:
            remarks.append(
                f"{twice:,} {split} image{'s occur' if twice > 1 else ' occurs'} twice with different labels"
            )
        digests[split] = set(found)
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if shared := len(digests.get(one, set()) & digests.get(other, set())):
            remarks.append(f"{shared:,} {other} image{'s are' if shared > 1 else ' is'} also in {one}")
    return remarks
