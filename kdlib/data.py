"""Images, the views in which a network sees them, the batches of an epoch, and augmentation.

Where the images come from is in :mod:`kdlib.datasets`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

AT_ONCE = 160_000_000  # bytes of pixels gathered by one operation: a hundred batches of 512 images of CIFAR-10


class Batch(NamedTuple):
    """What a training step sees."""

    images: Tensor  # (B, C, H, W) float, normalised
    labels: Tensor  # (B,) class indices, or (B, C) probabilities after mixup
    indices: Tensor  # (B,) which images of the set
    views: Tensor | None  # (B,) which view of each image; None after cutout or mixup, whose images are no plain views


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set."""

    name: str  # "cifar10/train"
    images: Tensor  # (N, H, W, C) uint8
    labels: Tensor  # (N,) int64; -1 for none
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # (C,) of the training images, on a scale from 0 to 1
    std: tuple[float, ...]  # (C,) likewise
    padding: int = 0  # pixels of black around an image, from which a view is cropped
    flip: bool = False  # whether a view may be mirrored: only if a mirrored image keeps its class

    def __post_init__(self):
        height, width = self.images.shape[1:3]
        if len(self.images) != len(self.labels) or not 0 <= 2 * self.padding <= min(height, width):
            raise ValueError(
                f"{self.name} has {len(self.images)} images of {width}x{height} pixels, {len(self.labels)} labels and "
                f"padding={self.padding}: expected one label per image, and at most half of the shorter side as padding"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    @property
    def format(self) -> dict:
        """What a network that learned from it takes and gives: an image's (H, W, C), its scale, the classes' names."""
        about = {"mean": self.mean, "std": self.std, "class_names": self.class_names}
        return {"shape": list(self.images.shape[1:]), **{name: list(values) for name, values in about.items()}}

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the content: images, labels, classes, views and scale.

        It is computed once, and again after the tensors of images or labels were changed in place (by PyTorch: NumPy
        leaves no trace when it writes to memory that it shares with a tensor).
        """
        version = self.images._version, self.labels._version
        if self.__dict__.get("_fingerprint", (None,))[0] != version:
            self.__dict__["_fingerprint"] = version, self._content()
        return self.__dict__["_fingerprint"][1]

    def _content(self) -> str:
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().contiguous().numpy())
        settings = (tuple(self.images.shape), self.class_names, self.padding, self.flip, self.mean, self.std)
        digest.update(repr(settings).encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> str:
        """Name and fingerprint, as records have them: ``cifar10/train 5e271ce6b90ff750``."""
        return f"{self.name} {self.fingerprint}"

    @cached_property
    def view_table(self) -> Tensor:
        """Every view as (row offset, column offset, mirrored): ((2 * padding + 1)**2 * (1 + flip), 3) int64.

        View 0 is the clean image. The others follow in a shuffled order that is always the same, so that the first V
        views are a fair sample of all, and V = 4 is part of V = 16.
        """
        offsets = range(-self.padding, self.padding + 1)
        table = [(dy, dx, mirrored) for mirrored in range(1 + self.flip) for dy in offsets for dx in offsets]
        clean = table.index((0, 0, 0))
        others = np.random.RandomState(0).permutation([i for i in range(len(table)) if i != clean])
        return torch.tensor([table[i] for i in [clean, *others]], device=self.labels.device)

    def resolve_views(self, views: int | None) -> int:
        """How many views `views` means: itself, or for None all there are.

        Raises:
            ValueError: no whole number, fewer than 1, or more than there are.
        """
        most = len(self.view_table)
        if views is None:
            return most
        if isinstance(views, bool) or not hasattr(views, "__index__"):
            raise ValueError(f"views is {views!r}: expected a whole number, or None for all {most}")
        if not 1 <= (views := int(views)) <= most:
            limit = f"at most {most}, which is" if views > most else f"at least 1 (the clean image); {most} are"
            raise ValueError(
                f"views is {views}: expected {limit} all that {self.name} has with {self.padding} pixels of padding "
                f"and flip={self.flip}, or None for all"
            )
        return views

    @property
    def example(self) -> Tensor:
        """The first image in its clean view, normalised: (1, C, H, W)."""
        first = torch.zeros(1, dtype=torch.int64, device=self.labels.device)
        return self.batch(first, first)

    def batch(self, indices: Tensor, views: Tensor) -> Tensor:
        """The images at `indices` (B,) in those `views` (B,), normalised: (B, C, H, W), channels last in memory."""
        return self.normalize(self.pixels(indices, views).permute(0, 3, 1, 2))

    def pixels(self, indices: Tensor, views: Tensor) -> Tensor:
        """The images at `indices` (B,) in those `views` (B,): (B, H, W, C) uint8."""
        height, width = self.images.shape[1:3]
        dy, dx, mirrored = self.view_table[views].unbind(1)
        rows = self.padding + dy[:, None] + torch.arange(height, device=views.device)  # (B, H)
        columns = torch.arange(width, device=views.device).expand(len(views), width)  # (B, W)
        columns = torch.where(mirrored[:, None].bool(), width - 1 - columns, columns)
        columns = self.padding + dx[:, None] + columns
        return self._padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]

    def load(self, indices: Sequence[Tensor], views: Sequence[Tensor]) -> Iterator[Batch]:
        """One batch per entry: the images at those indices (B,) in those views (B,)."""
        # one operation gathers many batches, since launching it costs more than the work it does for one batch
        most = max(1, AT_ONCE // (self.images[0].numel() * max(map(len, indices))))
        for first in range(0, len(indices), most):
            chosen, seen = indices[first : first + most], views[first : first + most]
            pixels = self.pixels(torch.cat(chosen), torch.cat(seen)).permute(0, 3, 1, 2).split([*map(len, chosen)])
            for batch, rows, drawn in zip(pixels, chosen, seen, strict=True):
                yield Batch(self.normalize(batch), self.labels[rows], rows, drawn)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Scale (B, C, H, W) uint8 so that the training images have mean 0 and standard deviation 1 per channel.

        The result is of PyTorch's default dtype at the first call (float32 unless it was changed).
        """
        scale, shift = self._scale_shift
        return pixels * scale + shift

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set in the memory of `device`."""
        images, labels = self.images.to(device), self.labels.to(device)
        if images is self.images and labels is self.labels:
            return self  # with its cached properties
        moved = replace(self, images=images, labels=labels)
        # so that it is computed once, on the CPU
        moved.__dict__["_fingerprint"] = (images._version, labels._version), self.fingerprint
        return moved

    @property
    def _padded(self) -> Tensor:
        edge, version = self.padding, self.images._version
        if edge and self.__dict__.get("_bordered", (None,))[0] != version:  # once, and again after a change in place
            bordered = torch.nn.functional.pad(self.images, (0, 0, edge, edge, edge, edge))
            self.__dict__["_bordered"] = version, bordered
        return self.__dict__["_bordered"][1] if edge else self.images

    @cached_property
    def _scale_shift(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(x, device=self.labels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return 1 / (255 * std), -mean / std


class Targets:
    """The teacher's logits for the images of a batch: what a student learns from beside the labels, or without them.

    kdlib has two kinds (:mod:`kdlib.soft_labels`). Any other callable from a batch to (B, C) logits can be given to
    :func:`kdlib.train` as well, but nothing checks it, and what comes of it cannot be saved under a name.
    """

    identity: dict  # what they are, by content

    def __call__(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, C), without gradients."""
        raise NotImplementedError

    def check(self, data: ImageSet, recipe: object) -> None:
        """Raise ValueError if these targets do not fit the images or the recipe; called before the first step."""

    def to(self, device: torch.device | str) -> Targets:
        """The same targets in the memory of `device`."""
        raise NotImplementedError


class Data(NamedTuple):
    """A data set in its three splits. Choices are made on `validation`; `test` is for the reported figures."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def mean_and_std(images: np.ndarray, rows: np.ndarray | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (N, H, W, C) uint8, on a scale from 0 to 1, to six digits.

    They come from a histogram of the bytes, which needs no floating-point copy of the images.

    Args:
        rows: of the images that count; None: all.
    """
    # quotients in float32, as the fingerprints of published data sets have them
    values = (np.arange(256, dtype=np.uint8) / np.float32(255)).astype(np.float64)
    mean, std = [], []
    for channel in range(images.shape[3]):
        # image by image, since bincount copies what it counts to int64
        chosen = range(len(images)) if rows is None else rows
        counts = sum(np.bincount(images[row, ..., channel].ravel(), minlength=256) for row in chosen)
        centre = counts @ values / counts.sum()
        spread = np.sqrt(counts @ (values - centre) ** 2 / counts.sum())
        mean.append(round(float(centre), 6))
        std.append(round(float(spread), 6) or 1.0)  # 1 for a channel that never varies
    return tuple(mean), tuple(std)


def steps_per_epoch(data: ImageSet, batch_size: int) -> int:
    """How many batches :func:`batches` yields."""
    return len(data) // min(batch_size, len(data))


def batches(
    data: ImageSet, batch_size: int, *, views: int | None = None, generator: torch.Generator, share: slice = slice(None)
) -> Iterator[Batch]:
    """One epoch: every image once, shuffled, each in a view drawn from the first `views` of the view table.

    All batches have one size: images left over after the last full batch wait for the next epoch's shuffle. A set
    smaller than a batch is one batch. With a `share`, only that part of each batch is loaded.
    """
    indices, drawn = draw_epoch(data, batch_size, views=views, generator=generator)
    yield from data.load(indices[:, share].unbind(), drawn[:, share].unbind())


def draw_epoch(
    data: ImageSet, batch_size: int, *, views: int | None = None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The indices, and the views, that the batches of one epoch hold: two (steps, B) tensors of int64."""
    device = data.labels.device
    order = torch.randperm(len(data), generator=generator, device=device)
    drawn = torch.randint(data.resolve_views(views), (len(data),), generator=generator, device=device)
    shape = steps_per_epoch(data, batch_size), min(batch_size, len(data))
    return tuple(x[: shape[0] * shape[1]].view(shape) for x in (order, drawn))


def cutout(
    images: Tensor, size: int, generator: torch.Generator, share: slice = slice(None), batch_size: int | None = None
) -> Tensor:
    """Images (B, C, H, W) with a square of `size` pixels set to the mean (DeVries & Taylor, arXiv 1708.04552).

    The square's centre is anywhere in the image, so part of the square may lie outside. If the images are a `share` of
    a batch of `batch_size`, centres are drawn for the whole batch.
    """
    height, width = images.shape[2:]
    device, shape = images.device, (batch_size or len(images), 1, 1, 1)
    cy = torch.randint(height, shape, generator=generator, device=device)[share]
    cx = torch.randint(width, shape, generator=generator, device=device)[share]
    y = torch.arange(height, device=device).view(1, 1, -1, 1) - cy + size // 2
    x = torch.arange(width, device=device).view(1, 1, 1, -1) - cx + size // 2
    return images.masked_fill((y >= 0) & (y < size) & (x >= 0) & (x < size), 0)


def mixup(batch: Batch, strength: float, classes: int, generator: torch.Generator) -> Batch:
    """Each image blended with another of the batch, and the labels with it (Zhang et al., arXiv 1710.09412).

    One share for the whole batch, drawn from Beta(strength, strength); strength 1 makes every share equally likely.
    The labels become probabilities (B, classes); the views become None.
    """
    device, dtype = batch.images.device, batch.images.dtype
    # Beta(a, a) as G/(G + G') of two gamma variables, since PyTorch's own Beta takes no generator
    concentration = torch.full((2,), float(strength), device=device, dtype=dtype)
    first, second = torch._standard_gamma(concentration, generator=generator)
    share = first / (first + second)
    other = torch.randperm(len(batch.images), generator=generator, device=device)
    labels = torch.nn.functional.one_hot(batch.labels.clamp(min=0), classes).to(dtype)
    labels = labels.masked_fill((batch.labels < 0)[:, None], torch.nan)  # no label: whoever reads it shall notice
    images = share * batch.images + (1 - share) * batch.images[other]
    return Batch(images, share * labels + (1 - share) * labels[other], batch.indices, None)
