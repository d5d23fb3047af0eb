"""Images that stay on the disk, behind the interface of :class:`kdlib.data.ImageSet`.

They are decoded once (:mod:`kdlib.scale.stream_cache`) and seen in views by seed (:mod:`kdlib.scale.views`), which
worker processes prepare while the network computes. :func:`kdlib.train`, :func:`kdlib.predict_logits` and
:func:`kdlib.generate` take them as they take images in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdlib.data import Batch, Data, ImageSet
from kdlib.datasets import data_folder
from kdlib.records import artefacts
from kdlib.scale.stream_cache import GIVEN, CachedImages, cache_images, cache_path, read_index
from kdlib.scale.stream_sources import find_sources
from kdlib.scale.views import MOST, SeededViews, blend, mixup_pair
from kdlib.sources.pictures import whole_number
from kdlib.sources.splits import Part, check_complete, described, part_of, split_rows, within

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class StreamedImages(ImageSet):
    """One split of a data set that is larger than memory: an :class:`ImageSet` whose images are read when needed.

    Its views are numbered without end (:class:`kdlib.scale.SeededViews`). With mixup among them, the labels of a batch
    are (B, classes) probabilities, and its views stay: soft labels hold the teacher's logits for the blended images.
    """

    images: CachedImages | Tensor  # (N, H, W, C) uint8
    views: SeededViews | None = None  # never None: the fields before it have defaults
    workers: int = 0  # processes that read and prepare images; 0: this one does. Their number changes the speed only

    def __post_init__(self):
        super().__post_init__()
        if self.views is None or self.padding or self.flip:
            raise ValueError(
                f"{self.name} has views={self.views!r}, padding={self.padding} and flip={self.flip}: expected "
                "SeededViews, which shift and mirror, and neither padding nor flip"
            )

    @property
    def format(self) -> dict:
        """As of any image set; the shape is a view's, which is what a network takes."""
        return {**super().format, "shape": [self.views.size, self.views.size, self.channels]}

    def _content(self) -> str:
        images = self.images
        pixels = images.digest if isinstance(images, CachedImages) else hashlib.sha256(images.numpy()).hexdigest()
        settings = (pixels, tuple(images.shape), self.class_names, self.mean, self.std, self.views.identity)
        digest = hashlib.sha256(self.labels.cpu().contiguous().numpy())
        digest.update(repr(settings).encode())
        return digest.hexdigest()[:16]

    def resolve_views(self, views: int | None) -> int:
        """How many views `views` means: itself, or for None 2**31, which no training exhausts.

        Raises:
            ValueError: no whole number, or one below 1 or above 2**31.
        """
        if views is None:
            return MOST
        if isinstance(views, bool) or not hasattr(views, "__index__") or not 1 <= int(views) <= MOST:
            raise ValueError(f"views is {views!r}: expected a whole number from 1 (the clean image) to {MOST:,}")
        return int(views)

    def pixels(self, indices: Tensor, views: Tensor) -> Tensor:
        """The images at `indices` (B,) in those `views` (B,): (B, size, size, C) uint8, prepared by this process."""
        made = self._prepared[indices.cpu().numpy(), views.cpu().numpy()]
        return made.to(self.labels.device)

    def load(self, indices: Sequence[Tensor], views: Sequence[Tensor]) -> Iterator[Batch]:
        """One batch per entry: the images at those indices (B,) in those views (B,), prepared by the workers."""
        if not (lengths := [*map(len, indices)]):
            return
        rows, drawn = (torch.cat([*x]).cpu().split(lengths) for x in (indices, views))
        wanted = [(i.numpy(), v.numpy()) for i, v in zip(rows, drawn, strict=True)]
        with self._loader.reading(wanted) as pixels:
            for batch, chosen, seen in zip(pixels, indices, views, strict=True):
                images = batch.to(self.labels.device, non_blocking=True).permute(0, 3, 1, 2)
                yield Batch(self.normalize(images), self._labels(chosen, seen), chosen, seen)

    def _labels(self, indices: Tensor, views: Tensor) -> Tensor:
        """The classes (B,) of images; with mixup the probabilities (B, classes) of blends."""
        if not self.views.mixup:
            return self.labels[indices]
        pairs = [mixup_pair(v, i, len(self)) for v, i in zip(views.tolist(), indices.tolist(), strict=True)]
        partners, shares = (torch.tensor(x, device=self.labels.device) for x in zip(*pairs, strict=True))
        own, other = (torch.nn.functional.one_hot(self.labels[i], self.classes) for i in (indices, partners))
        shares = shares.to(torch.get_default_dtype())[:, None]
        return shares * own + (1 - shares) * other

    def to(self, device: torch.device | str) -> StreamedImages:
        """The same set with its labels, and the batches to come, in the memory of `device`; images stay on the disk."""
        labels = self.labels.to(device)
        if labels is self.labels:
            return self
        moved = self.__dict__.setdefault("_moved", {})  # kept, since its workers are
        if (kept := moved.get(labels.device)) is None or kept[0] != self.labels._version:
            made = replace(self, labels=labels)
            made.__dict__["_fingerprint"] = (self.images._version, labels._version), self.fingerprint
            moved[labels.device] = kept = self.labels._version, made
        return kept[1]

    @cached_property
    def _prepared(self) -> _Prepared:
        return _Prepared(self.images, self.views)

    @cached_property
    def _loader(self) -> _Loader:
        workers = self.workers if isinstance(self.images, CachedImages) else 0  # a few in memory are no work
        return _Loader(self._prepared, workers, self.labels.is_cuda)


class _Prepared(Dataset):
    """The pixels of whole batches: what a worker process computes."""

    def __init__(self, images: CachedImages | Tensor, views: SeededViews):
        self.images, self.views = images, views

    def __getitem__(self, batch: tuple[np.ndarray, np.ndarray]) -> Tensor:
        """(B, size, size, C) uint8 for indices (B,) and views (B,)."""
        pairs = list(zip(*(x.tolist() for x in batch), strict=True))
        made = torch.empty(len(pairs), self.views.size, self.views.size, self.images.shape[3], dtype=torch.uint8)
        for k, (index, view) in enumerate(pairs):
            made[k] = self._view(view, index)
            if self.views.mixup:
                partner, share = mixup_pair(view, index, len(self.images))
                if partner != index:
                    made[k] = blend(made[k], self._view(view, partner), share)
        return made

    def _view(self, view: int, index: int) -> Tensor:
        return self.views.apply(self.images[index], self.views.parameters(view, index))


class _Loader:
    """PyTorch's DataLoader over batches that are named anew for every pass, with workers that stay."""

    def __init__(self, prepared: _Prepared, workers: int, pinned: bool):
        self._wanted: list = []
        self._busy = False
        self._options = dict(dataset=prepared, batch_size=None, pin_memory=pinned)
        self._loader = self._make(self._wanted, num_workers=workers, persistent_workers=workers > 0)

    def _make(self, wanted: list, **options: Any) -> DataLoader:
        # a generator of its own, so that the global one, of dropout and the like, does not notice the loader
        return DataLoader(sampler=wanted, generator=torch.Generator(), **self._options, **options)

    @contextlib.contextmanager
    def reading(self, wanted: list) -> Iterator[Iterator[Tensor]]:
        """The pixels of those batches, in order."""
        if self._busy:  # a pass within a pass: the workers belong to the outer one
            yield iter(self._make(wanted))
            return
        self._busy, self._wanted[:] = True, wanted
        try:
            yield iter(self._loader)
        finally:
            self._busy = False


def load_images(
    root: str | os.PathLike | Mapping[str, Any],
    size: int,
    *,
    views: SeededViews | None = None,
    cache: str | os.PathLike | None = None,
    name: str | None = None,
    validation: int | None = None,
    limit: int | Part | None = None,
    workers: int | None = None,
    in_memory: bool = False,
    padding: int = 0,
    flip: bool = False,
    progress: bool = True,
) -> Data:
    """A data set that may be larger than memory, split into training, validation and test images.

    Args:
        root: a folder laid out as ImageNet or TinyImageNet is, ``train/<class>/…`` and ``val/``; or Hugging Face data
            sets by split, such as what ``datasets.load_from_disk`` returns. A folder that is not there is no error if
            the cache holds what was read of it: of that path, whichever machine it was on.
        size: of the images that are kept, pixels: the shorter side is resized to it, and a square is cut out. A view
            that is cropped from more pixels than it has is sharper: keep 256 for views of 224.
        views: what a network sees of them; None: ``SeededViews(size)``.
        cache: the folder of what is kept, ``size * size * 3`` bytes per image; None: ``cache/`` in
            :func:`kdlib.datasets.data_folder`.
        name: in file names, records and messages; None: the folder's.
        validation: how many training images are held out, evenly from all classes; None: of each class a tenth, but no
            more than 2,500 in all, and at least one.
        limit: at most so many images in each split, evenly from all classes; see :func:`kdlib.load_data`.
        workers: processes that decode, and prepare the views; None: one per processor but one, at most 16.
        in_memory: read what is kept into memory, as an ordinary :class:`ImageSet` with `padding` and `flip` instead of
            views by seed: for what fits (TinyImageNet at 64x64: 1.2 GB; ImageNet at 64x64: 16 GB).

    The test images of both data sets are published without labels. So ``val/`` is the test set if no other has labels,
    as in most papers, and validation images, by which choices are made, are held out of ``train/``.

    Index i is the same image for everybody: images are in order of class and path.

    What is kept of a tree counts as long as its paths and their sizes in bytes are the same. After exchanging pictures
    for others of just the same size, as those of uncompressed formats are, delete the file in the cache.

    What is kept is read once per process, to compare its SHA-256 with the recorded one: ImageNet at 256x256, 250 GB,
    takes minutes.

    Raises:
        ValueError: another layout, a class without images in one of the splits, a picture that cannot be read, an
            option out of range, or a damaged file in the cache.
        FileNotFoundError: no such folder, and nothing in the cache.
    """
    size, workers = whole_number("size", size, 2), whole_number("workers", workers, 0, unit="processes")
    validation = whole_number("validation", validation, 1, most=10**9, unit="images")
    if workers is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(16, max(1, processors - 1))
    if in_memory and views is not None:
        raise ValueError("in_memory is True and views are given: expected one of them; in memory, give padding, flip")
    if not in_memory and (padding or flip):
        raise ValueError(
            f"padding is {padding} and flip {flip}: expected them with in_memory=True; views crop and flip"
        )
    name = name or ("own" if isinstance(root, Mapping) else Path(root).expanduser().resolve().name)
    cache = data_folder() / "cache" if cache is None else Path(cache).expanduser()
    images = _kept(root, name, cache, size, workers, progress)
    if "test" not in images and "validation" in images:
        images["test"] = images.pop("validation")
    arrays = {f"{split}_images": own for split, own in images.items()}
    for split, own in images.items():
        own.check()
        index = read_index(own.path, own.sha256)
        names = arrays.setdefault("class_names", index["class_names"])
        if not np.array_equal(names, index["class_names"]):
            raise ValueError(f"{own.path} has other classes than the training images: delete both, and {GIVEN}")
        arrays[f"{split}_labels"] = index["labels"]
    rows = split_rows(arrays, validation)
    check_complete(rows, arrays, name)
    print(f"{name}: {'; '.join(described(rows, arrays))}")
    if limit is not None:
        rows = within(limit, rows, arrays, name)
    chosen = {split: CachedImages(images[part_of(split, arrays)].path, rows[split]) for split in SPLITS}
    mean, std = chosen["train"].mean_and_std()
    shared = dict(class_names=tuple(map(str, arrays["class_names"])), mean=mean, std=std)
    splits = {}
    for split, own in chosen.items():
        labels = torch.from_numpy(arrays[f"{part_of(split, arrays)}_labels"][rows[split]])
        if in_memory:
            splits[split] = ImageSet(f"{name}/{split}", own[:], labels, **shared, padding=padding, flip=flip)
        else:
            seen = views or SeededViews(size)
            splits[split] = StreamedImages(f"{name}/{split}", own, labels, **shared, views=seen, workers=workers)
    return Data(**splits)


def _kept(root, name: str, cache: Path, size: int, workers: int, progress: bool) -> dict[str, CachedImages]:
    """The kept images of each split that has labels, read first if they are not there."""
    paths = {split: cache_path(cache, f"{name}/{split}", size) for split in SPLITS}
    folder = None if isinstance(root, Mapping) else Path(root).expanduser()
    if folder and not folder.is_dir():
        return _kept_without(folder, name, cache, size, paths)
    sources = find_sources(folder or root, name)
    identities = {split: source.identity for split, source in sources.items()}
    origin = {"root": str(folder.resolve()) if folder else "Hugging Face data sets", "splits": identities}
    options = dict(origin=origin, workers=workers, progress=progress)
    return {split: cache_images(source, paths[split], size, **options) for split, source in sources.items()}


def _kept_without(folder: Path, name: str, cache: Path, size: int, paths: dict[str, Path]) -> dict[str, CachedImages]:
    """The kept images of each split of a folder that is not there: of just this folder, as it was last seen."""
    missing = f"no such folder: {folder}; nor does {cache} hold"
    if not paths["train"].exists():
        raise FileNotFoundError(f"{missing} {name} in {size}x{size}")
    images = {"train": CachedImages(paths["train"])}  # which has a record that can be read
    origin = artefacts.record(paths["train"]).get("origin") or {"root": "an unrecorded folder", "splits": {}}
    if origin["root"] != str(folder.resolve()):
        raise FileNotFoundError(
            f"{missing} its images: {paths['train'].name} is of {origin['root']}; give that path if these are meant"
        )
    for split, identity in origin["splits"].items():
        if artefacts.record(paths[split]).get("fingerprint", {}).get("images") != identity:
            raise FileNotFoundError(f"{missing} all its images: {paths[split].name} is not there or of another folder")
        images[split] = CachedImages(paths[split])
    print(f"{name}: {folder} is not there; what {cache} keeps of it is used in its place")
    return images
