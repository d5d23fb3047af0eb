"""Soft labels of many classes in few bytes: the k largest logits, and one number for all the others.

For a thousand classes, nearly all of a teacher's probability lies on a few. Of each image in each view are kept the k
largest logits, the numbers of their classes, and the log-sum-exp of the other C - k logits. When they are looked up,
each of the others gets the same logit, ``log_sum_exp - log(C - k)``. At T = 1 the k probabilities are then exact, and
what is left is spread evenly; at a higher temperature the others get slightly more than they should, since the mean of
exponentials is dominated by the largest. Fast knowledge distillation (Shen & Xing, arXiv 2112.01528, section 3.3)
spreads the remainder evenly too, but of probabilities, so that no other temperature can be chosen later.

What is looked up are dense logits (B, C), so the loss is the same as for all other targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdlib.checks.logits import check_pairing, check_plain
from kdlib.data import Batch, ImageSet, Targets
from kdlib.records import identity
from kdlib.soft_labels import SoftLabels, in_half
from kdlib.train import Recipe


class Layout(NamedTuple):
    """How the soft labels of one image in one view lie in memory."""

    classes: int  # C
    k: int  # how many of the largest logits are kept; all: they stand in the order of the classes

    @property
    def dtype(self) -> np.dtype:
        """As NumPy has it: little-endian, without gaps. If k = C, only the logits."""
        if self.k == self.classes:
            return np.dtype([("logits", "<f2", (self.k,))])
        number = "u1" if self.classes <= 2**8 else "<u2"
        return np.dtype([("logits", "<f2", (self.k,)), ("others", "<f2"), ("classes", number, (self.k,))])

    @property
    def bytes(self) -> int:
        """Per image and view."""
        return self.dtype.itemsize

    def encode(self, logits: Tensor) -> Tensor:
        """Logits (B, C) as bytes (B, bytes) uint8: rounded to half precision before anything is chosen or summed."""
        halves = in_half(logits)
        if self.k == self.classes:
            return halves.contiguous().view(torch.uint8)
        top, classes = halves.float().topk(self.k, dim=1)
        others = halves.float().scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        numbers = classes.to(torch.uint8 if self.classes <= 2**8 else torch.int16)  # the same bits as uint16
        return torch.cat([part.view(torch.uint8) for part in (top.half(), others.half(), numbers)], dim=1)

    def decode(self, rows: Tensor) -> Tensor:
        """Dense logits (B, C) float32 from bytes (B, bytes)."""
        after = 2 * self.k
        top = _read(rows[:, :after], torch.float16).float()
        if self.k == self.classes:
            return top
        others = _read(rows[:, after : after + 2], torch.float16).float()
        classes = rows[:, after + 2 :].long()
        if self.classes > 2**8:
            classes = _read(rows[:, after + 2 :], torch.int16).long() & 0xFFFF
        value = others - math.log(self.classes - self.k)
        return value.expand(-1, self.classes).scatter(1, classes, top)


def _read(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of bytes as numbers; copied, since in place they would start or end where no number may."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def layout(classes: int, k: int) -> Layout:
    """The layout for the `k` largest of so many classes.

    Raises:
        ValueError: k is not between 1 and the number of classes, or there are more classes than 16 bits can number.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__") or not 1 <= k <= classes:
        raise ValueError(
            f"k is {k!r}: expected a whole number from 1 to {classes}, the number of classes (which is exact)"
        )
    if classes > 2**16 and k < classes:
        raise ValueError(f"there are {classes:,} classes: expected at most 65,536, which 16 bits can number")
    return Layout(classes, int(k))


def bytes_per_view(images: int, classes: int, k: int) -> int:
    """How many bytes the compact soft labels of so many images take per view; k = C: dense ones in half precision."""
    return images * layout(classes, k).bytes


class Table(Protocol):
    """The encoded soft labels: a tensor of bytes (V, N, bytes) uint8, or what reads them from files."""

    shape: tuple[int, ...]

    def __getitem__(self, views_and_indices: tuple[Tensor, Tensor]) -> Tensor:
        """The bytes (B, bytes) of the images at those indices (B,) in those views (B,)."""

    def to(self, device: torch.device | str) -> Table:
        """The same for the memory of `device`."""


@dataclass(frozen=True)
class CompactSoftLabels(Targets):
    """The k largest logits of the teacher for V views of N images, and their remainder: targets by lookup."""

    table: Tensor | Table  # (V, N, bytes)
    layout: Layout
    data: str  # the `identity` of the images that they are for
    content: str  # sixteen hexadecimal digits that tell them from others
    path: Path | None = None  # the folder that they are read from

    def __call__(self, batch: Batch) -> Tensor:
        """The logits (B, C) float32 for those images in those views; all but k of them are one common value."""
        check_plain(batch)
        return self.layout.decode(self.table[batch.views, batch.indices])

    @property
    def views(self) -> int:
        """How many views of each image there are."""
        return self.table.shape[0]

    @property
    def k(self) -> int:
        """How many logits of each image are kept."""
        return self.layout.k

    @property
    def bytes_per_view(self) -> int:
        """Of all images together."""
        return self.table.shape[1] * self.layout.bytes

    @property
    def identity(self) -> dict:
        """What they are, by content."""
        return {"compact_soft_labels": self.content, "views": self.views, "k": self.k}

    def to(self, device: torch.device | str) -> CompactSoftLabels:
        """The same in the memory of `device`."""
        table = self.table.to(device)
        return self if table is self.table else replace(self, table=table)

    def check(self, data: ImageSet, recipe: Recipe) -> None:
        """Raise ValueError if these are not the soft labels of `data` in every view that `recipe` draws."""
        check_pairing(self.data, self.views, data, data.resolve_views(recipe.views))


def compress(soft_labels: SoftLabels, k: int) -> CompactSoftLabels:
    """Dense soft labels with only the `k` largest logits of each image, in memory.

    Raises:
        ValueError: k is not between 1 and the number of classes.
    """
    chosen = layout(soft_labels.logits.shape[2], k)
    # in parts, since each is computed in single precision
    encoded = [torch.cat([chosen.encode(part) for part in view.split(2**14)]) for view in soft_labels.logits]
    table = torch.stack(encoded)
    return CompactSoftLabels(table, chosen, soft_labels.data, identity.content(table))
