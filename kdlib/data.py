"""Data sets, their splits, and the views in which a network sees an image.

A data set is kept as one file, ``<KDLIB_DATA>/<name>.npz``, in canonical order: each split is sorted by the SHA-256 of
its images' bytes, so that index i is the same image for everybody, and a published soft label fits.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdlib.artefacts import written_whole

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "class_names")
GATHERED = 100  # batches whose pixels are gathered at once: 157 MB of CIFAR-10 in batches of 512
VALIDATION = 2_500  # images held out of a training set; a tenth of a small one


class Batch(NamedTuple):
    """What a training step sees."""

    images: Tensor  # (B, C, H, W) float, normalised
    labels: Tensor  # (B,) class indices, or (B, C) probabilities after mixup
    indices: Tensor  # (B,) which images of the set
    views: Tensor | None  # (B,) which view of each; None where cutout or mixup made images that no view has


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set."""

    name: str  # "cifar10/train"
    images: Tensor  # (N, H, W, C) uint8
    labels: Tensor  # (N,) int64
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # (C,) of the training images, on a scale from 0 to 1
    std: tuple[float, ...]  # (C,) likewise
    padding: int = 0  # pixels of black around an image, from which a view is cropped
    flip: bool = False  # whether a view may be mirrored: only where a mirrored image keeps its class

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    @cached_property
    def view_table(self) -> Tensor:
        """Every view as (row offset, column offset, mirrored): ((2 * padding + 1)**2 * (1 + flip), 3) int64.

        View 0 is the clean image; the others follow in a shuffled order that is the same for everybody, so that the
        first V of them are a fair sample of all, and V = 4 is part of V = 16.
        """
        offsets = range(-self.padding, self.padding + 1)
        table = [(dy, dx, mirrored) for mirrored in range(1 + self.flip) for dy in offsets for dx in offsets]
        clean = table.index((0, 0, 0))
        others = np.random.RandomState(0).permutation([i for i in range(len(table)) if i != clean])
        return torch.tensor([table[i] for i in [clean, *others]], device=self.labels.device)

    def batch(self, indices: Tensor, views: Tensor) -> Tensor:
        """Those images in those views, normalised: (B, C, H, W) float32, channels last in memory."""
        return self.normalize(self.pixels(indices, views).permute(0, 3, 1, 2))

    def pixels(self, indices: Tensor, views: Tensor) -> Tensor:
        """Those images in those views: (B, H, W, C) uint8."""
        height, width = self.images.shape[1:3]
        dy, dx, mirrored = self.view_table[views].unbind(1)
        rows = self.padding + dy[:, None] + torch.arange(height, device=views.device)  # (B, H)
        columns = torch.arange(width, device=views.device).expand(len(views), width)  # (B, W)
        columns = torch.where(mirrored[:, None].bool(), width - 1 - columns, columns)
        columns = self.padding + dx[:, None] + columns
        return self._padded[indices[:, None, None], rows[:, :, None], columns[:, None, :]]

    def normalize(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 to float32 of mean 0 and standard deviation 1, as the training set has them."""
        scale, shift = self._scale_shift
        return pixels * scale + shift

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set in the memory of `device`."""
        images, labels = self.images.to(device), self.labels.to(device)
        if images is self.images and labels is self.labels:
            return self  # with what it has computed of itself
        moved = replace(self, images=images, labels=labels)
        moved.__dict__["fingerprint"] = self.fingerprint  # so that it is computed once, on the CPU
        return moved

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of the content: images, labels, classes, views and scale."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().contiguous().numpy())
        described = (tuple(self.images.shape), self.class_names, self.padding, self.flip, self.mean, self.std)
        digest.update(repr(described).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _padded(self) -> Tensor:
        edge = self.padding
        return torch.nn.functional.pad(self.images, (0, 0, edge, edge, edge, edge)) if edge else self.images

    @cached_property
    def _scale_shift(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(x, device=self.labels.device).view(-1, 1, 1) for x in (self.mean, self.std))
        return 1 / (255 * std), -mean / std


class Data(NamedTuple):
    """A data set in its three splits. Choices are made on `validation`; `test` is for the figures reported."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def data_folder() -> Path:
    """``$KDLIB_DATA``, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KDLIB_DATA") or cache / "kdlib").expanduser()


def load_data(name: str | os.PathLike, *, limit: int | None = None) -> Data:
    """A data set, split into training, validation and test images.

    Args:
        name: one of ``DATA_SETS``; or the path of an ``.npz`` file, or of a folder of images with
            ``train/<class>/*`` and ``test/<class>/*``.
        limit: at most so many images in each split, evenly from every class.

    The validation images are the last of each class in canonical order: 2,500 in all, 1,147 of the digits, and
    of your own set a tenth where that is fewer. They are chosen before `limit` is applied: no run ever trains on one.

    Raises:
        ValueError: an unknown name, a limit below the number of classes, or a file that does not hold a data set.
        FileNotFoundError: a set that is neither there nor to be had.
    """
    label = str(name)
    if label in DATA_SETS:
        padding, flip, validation, _ = DATA_SETS[label]
        arrays = _stored(label)
    else:
        path = Path(name).expanduser()
        label = path.stem
        if path.suffix == ".npz":
            arrays = read_npz(path)
        elif path.is_dir():
            arrays = read_image_folder(path)
        elif path.suffix or path.parent != Path("."):
            wrong = "neither an .npz file nor a folder" if path.exists() else "no such file or folder"
            raise FileNotFoundError(
                f"data set {str(name)!r}: {wrong}; expected one of {', '.join(DATA_SETS)}, or the path of an .npz "
                "file or of a folder of images"
            )
        else:
            raise ValueError(
                f"data set {label!r} is unknown: expected one of {', '.join(DATA_SETS)}, the path of an .npz file, "
                "or the path of a folder with train/<class>/ and test/<class>/"
            )
        # safe for any set; ask for more in ImageSet
        padding, flip, validation = arrays["train_images"].shape[1] // 8, False, None
    names = tuple(str(n) for n in arrays["class_names"])
    train_labels, test_labels = arrays["train_labels"], arrays["test_labels"]
    if validation is None or validation >= len(train_labels):  # the reader's own set, or a part of a known one
        validation = min(VALIDATION, len(train_labels) // 10)
    held_out = _evenly(train_labels[::-1], validation, len(names))
    held_out = np.sort(len(train_labels) - 1 - held_out)
    kept = np.setdiff1d(np.arange(len(train_labels)), held_out)
    rows = {"train": kept, "validation": held_out, "test": np.arange(len(test_labels))}
    if limit is not None:
        if limit < len(names):
            raise ValueError(f"limit is {limit}: expected at least {len(names)}, one image a class of {label}")
        labels = {"train": train_labels, "validation": train_labels, "test": test_labels}
        rows = {s: r[_evenly(labels[s][r], limit, len(names))] if len(r) > limit else r for s, r in rows.items()}
    pixels = arrays["train_images"][rows["train"]].reshape(-1, arrays["train_images"].shape[3]) / np.float32(255)
    mean, std = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
    std[std == 0] = 1  # a channel that never varies
    splits = []
    for split, chosen in rows.items():
        source = "test" if split == "test" else "train"
        splits.append(
            ImageSet(
                name=f"{label}/{split}",
                images=torch.from_numpy(arrays[f"{source}_images"][chosen]),
                labels=torch.from_numpy(arrays[f"{source}_labels"][chosen]),
                class_names=names,
                mean=tuple(round(float(m), 6) for m in mean),
                std=tuple(round(float(s), 6) for s in std),
                padding=padding,
                flip=flip,
            )
        )
    return Data(*splits)


def _evenly(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """The first rows of each class, `count` in all, as evenly as the classes allow; in ascending order."""
    by_class = [np.flatnonzero(labels == c) for c in range(classes)]
    rounds = np.concatenate([np.arange(len(rows)) for rows in by_class])  # a row's rank within its class
    order = np.lexsort((np.concatenate(by_class), rounds))
    return np.sort(np.concatenate(by_class)[order[:count]])


def batches(
    data: ImageSet, batch_size: int, *, views: int | None = None, generator: torch.Generator
) -> Iterator[Batch]:
    """One epoch: every image once, shuffled, each in a view drawn from the first `views` of the view table.

    The images left over after the last full batch wait for the next epoch's shuffle, so that all batches are of one
    size. A set smaller than a batch is one batch.
    """
    indices, chosen = draw_epoch(data, batch_size, views=views, generator=generator)
    # many batches are gathered at once, since the starting of operations costs more than these operations themselves
    for part in zip(indices.split(GATHERED), chosen.split(GATHERED), strict=True):
        gathered = data.pixels(*(x.flatten() for x in part)).unflatten(0, part[0].shape).permute(0, 1, 4, 2, 3)
        for pixels, these, in_views in zip(gathered, *part, strict=True):
            yield Batch(data.normalize(pixels), data.labels[these], these, in_views)


def draw_epoch(
    data: ImageSet, batch_size: int, *, views: int | None = None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which images, and in which views, the batches of one epoch hold: two (steps, B) tensors of int64."""
    device = data.labels.device
    order = torch.randperm(len(data), generator=generator, device=device)
    drawn = torch.randint(views or len(data.view_table), (len(data),), generator=generator, device=device)
    shape = steps_per_epoch(data, batch_size), min(batch_size, len(data))
    return tuple(x[: shape[0] * shape[1]].view(shape) for x in (order, drawn))


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W) with a square of `size` pixels set to the mean (DeVries & Taylor, arXiv 1708.04552).

    The square's centre is anywhere in the image, so part of the square may lie outside.
    """
    b, _, height, width = images.shape
    device = images.device
    cy = torch.randint(height, (b, 1, 1, 1), generator=generator, device=device)
    cx = torch.randint(width, (b, 1, 1, 1), generator=generator, device=device)
    y = torch.arange(height, device=device).view(1, 1, -1, 1) - cy + size // 2
    x = torch.arange(width, device=device).view(1, 1, 1, -1) - cx + size // 2
    return images.masked_fill((y >= 0) & (y < size) & (x >= 0) & (x < size), 0)


def mixup(batch: Batch, strength: float, classes: int, generator: torch.Generator) -> Batch:
    """Each image blended with another of the batch, and the labels with it (Zhang et al., arXiv 1710.09412).

    One share for the batch, drawn from Beta(strength, strength); 1 makes every share equally likely.
    """
    device = batch.images.device
    # Beta(a, a) as G/(G + G') of two gamma variables, since torch's own Beta takes no generator
    concentration = torch.full((2,), float(strength), device=device)
    first, second = torch._standard_gamma(concentration, generator=generator)
    share = first / (first + second)
    other = torch.randperm(len(batch.images), generator=generator, device=device)
    labels = torch.nn.functional.one_hot(batch.labels, classes).to(batch.images.dtype)
    images = share * batch.images + (1 - share) * batch.images[other]
    return Batch(images, share * labels + (1 - share) * labels[other], batch.indices, None)


# --- where data sets come from -------------------------------------------------------------------------------------


def _digits(_: Path) -> dict[str, np.ndarray]:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels, 16 shades; 500 of them for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    whole = in_canonical_order(images, digits.target.astype(np.int64))
    test = _evenly(whole[1], 500, 10)
    train = np.setdiff1d(np.arange(len(images)), test)
    names = np.array([str(d) for d in range(10)])
    return _arrays(whole[0][train], whole[1][train], whole[0][test], whole[1][test], names)


def _torchvision(dataset: str) -> Callable[[Path], dict[str, np.ndarray]]:
    def load(folder: Path) -> dict[str, np.ndarray]:
        import torchvision

        kind = getattr(torchvision.datasets, dataset)
        train, test = (kind(folder / "downloads", train=split, download=True) for split in (True, False))
        parts = []
        for part in (train, test):
            images = np.asarray(part.data)
            parts += [images if images.ndim == 4 else images[..., None], np.asarray(part.targets, np.int64)]
        return _arrays(*parts, np.array([name.split(" - ")[0] for name in train.classes]))  # MNIST's "3 - three"

    return load


DATA_SETS: dict[str, tuple[int, bool, int, Callable[[Path], dict[str, np.ndarray]]]] = {
    # name: (padding in pixels, whether a mirrored image keeps its class, validation images, where it comes from)
    # Of the digits, 150 are for training: the fewer, the further a student alone falls behind its teacher, and the
    # clearer it shows what distillation adds. The others make the choices, which a tenth of so small a set could not.
    "digits": (1, False, 1147, _digits),
    "cifar10": (4, True, VALIDATION, _torchvision("CIFAR10")),
    "cifar100": (4, True, VALIDATION, _torchvision("CIFAR100")),
    "mnist": (2, False, VALIDATION, _torchvision("MNIST")),
    "fashion_mnist": (2, True, VALIDATION, _torchvision("FashionMNIST")),
}


def _stored(name: str) -> dict[str, np.ndarray]:
    """A known data set from its file, which is made, once, where it is not there."""
    if name == "digits":
        return _digits(data_folder())  # it comes with scikit-learn: nothing to download, nothing to keep
    path = data_folder() / f"{name}.npz"
    if path.exists():
        return read_npz(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = DATA_SETS[name][3](path.parent)
    except (OSError, RuntimeError) as error:  # torchvision says RuntimeError where no mirror answers
        raise FileNotFoundError(
            f"data set {name!r}: {path} is not there, and downloading it failed ({error}). Either let this machine "
            f"reach the network once, or put the file there from another machine, or set KDLIB_DATA to the folder "
            f"that holds {name}.npz"
        ) from error
    with written_whole(path) as partial:
        np.savez(partial, **arrays)
    return arrays


def in_canonical_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,), sorted by the SHA-256 of each image's bytes, then by label."""
    keys = [(hashlib.sha256(image.tobytes()).digest(), int(label)) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return images[order], labels[order]


def _arrays(train_images, train_labels, test_images, test_labels, class_names) -> dict[str, np.ndarray]:
    train_images, train_labels = in_canonical_order(train_images, train_labels)
    test_images, test_labels = in_canonical_order(test_images, test_labels)
    return dict(zip(ARRAYS, (train_images, train_labels, test_images, test_labels, class_names), strict=True))


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a data set's file, checked; in canonical order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, holds Python objects, or whose arrays are not those of a data set.
    """
    if not path.exists():
        known = ", ".join(DATA_SETS)
        raise FileNotFoundError(f"data set file {path} is not there: check the path, or name one of {known}")
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


def _check_arrays(arrays: dict[str, np.ndarray], source: Path) -> None:
    def wrong(name: str, expected: str) -> ValueError:
        found = f"{arrays[name].dtype} {arrays[name].shape}"
        return ValueError(f"{source}: {name} is {found}, expected {expected}; save the file again with it so")

    if arrays["class_names"].ndim != 1 or arrays["class_names"].dtype.kind != "U" or not arrays["class_names"].size:
        raise wrong("class_names", "str (K,), a name a class")
    classes = len(arrays["class_names"])
    shape = arrays["train_images"].shape[1:]
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size or images.shape[1:] != shape:
            raise wrong(f"{split}_images", "uint8 (N, H, W, C), not empty, one image size for training and test")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            raise wrong(f"{split}_labels", f"int64 ({len(images)},), a label an image")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"{source}: {split}_labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}: "
                f"there are {classes} class names; number the classes from 0, or name them all in class_names"
            )


def read_image_folder(path: Path) -> dict[str, np.ndarray]:
    """A folder with ``train/<class>/*`` and ``test/<class>/*``, images all of one size, as a data set's arrays.

    Raises:
        ValueError: a missing split, classes that differ between the splits, a class without images, or an image of
            another size.
    """
    import torchvision
    from torchvision.datasets.folder import IMG_EXTENSIONS

    parts, names = [], None
    for split in ("train", "test"):
        folder = path / split
        found = sorted(f.name for f in folder.iterdir() if f.is_dir()) if folder.is_dir() else []
        if not found:
            raise ValueError(
                f"{path}: no class folders in {folder}, expected train/<class>/ and test/<class>/: move the images"
            )
        names = names or found
        if found != names:
            odd = sorted(set(found) ^ set(names))
            raise ValueError(
                f"{path}: class {odd[0]!r} is in one of train and test only, expected the same in both; add the "
                "missing folder, or remove the other"
            )
        for name in names:
            if not any(f.suffix.lower() in IMG_EXTENSIONS for f in (folder / name).rglob("*")):
                raise ValueError(
                    f"{folder / name} holds no image: remove the folder or add some ({', '.join(IMG_EXTENSIONS)})"
                )
        samples = torchvision.datasets.ImageFolder(folder)
        images, labels = [], []
        for file, label in samples.samples:
            try:
                pixels = np.asarray(samples.loader(file))  # (H, W, 3): the loader converts to RGB
            except (OSError, SyntaxError) as error:  # what PIL says of a damaged file
                raise ValueError(f"{file} is not an image that can be read ({error}): replace or remove it") from error
            size = images[0].shape if images else parts[0].shape[1:] if parts else pixels.shape
            if pixels.shape != size:
                raise ValueError(
                    f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, expected {size[1]}x{size[0]} like the others: "
                    "resize all images to one size first"
                )
            images.append(pixels)
            labels.append(label)
        parts += [np.stack(images), np.array(labels, np.int64)]
    return _arrays(*parts, np.array(names))


def steps_per_epoch(data: ImageSet, batch_size: int) -> int:
    """How many batches :func:`batches` yields."""
    return len(data) // min(batch_size, len(data))
