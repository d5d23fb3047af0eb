"""The data sets that are known by name: from scikit-learn, or downloaded once by torchvision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdlib.records.download import download
from kdlib.records.files import remove_whatever
from kdlib.sources.order import in_canonical_order
from kdlib.sources.splits import VALIDATION, stratified

MOST, SECONDS = 2**29, 3600  # bytes that an archive may have (CIFAR's have 170 MB), and seconds to fetch it


class Source(NamedTuple):
    """Where a data set comes from, and how its images are split and viewed."""

    padding: int | None  # pixels, see ImageSet; None: as the images' size suggests
    flip: bool  # whether a mirrored image keeps its class
    validation: int | None  # images held out of the training set; None: a share of each class, see split_rows
    load: Callable[[Path], dict[str, np.ndarray]] | None  # called with the data folder; returns the arrays


OWN = Source(padding=None, flip=False, validation=None, load=None)  # the reader's, of which nothing is known


def _digits(_: Path) -> dict[str, np.ndarray]:
    """The 1,797 handwritten digits that come with scikit-learn, 8x8 pixels in 16 shades; 500 of them are the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target.astype(np.int64)
    images, labels = in_canonical_order(images, labels)
    test = stratified(labels, 500, 10)
    train = np.setdiff1d(np.arange(len(images)), test)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
        "class_names": np.array([str(d) for d in range(10)]),
    }


def _torchvision(dataset: str) -> Callable[[Path], dict[str, np.ndarray]]:
    def load(folder: Path) -> dict[str, np.ndarray]:
        import torchvision

        kind, arrays = getattr(torchvision.datasets, dataset), {}
        prepare(kind, folder / "downloads")
        for split in ("train", "test"):
            loaded = kind(folder / "downloads", train=split == "train", download=True)
            images = np.asarray(loaded.data)
            arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
            arrays[f"{split}_labels"] = np.asarray(loaded.targets, np.int64)
        names = [name.split(" - ")[0] for name in loaded.classes]  # MNIST's "3 - three"
        return {**arrays, "class_names": np.array(names)}

    return load


def prepare(kind: type, folder: Path) -> None:
    """Leave in `folder` the archives of a data set of torchvision's, and nothing that was unpacked from them before.

    torchvision then unpacks them, and downloads nothing. An archive with another MD5 than torchvision names is fetched
    again: a truncated one goes on where it stopped. Unpacking may have been interrupted, which torchvision would not
    notice.

    Raises:
        OSError: an archive cannot be fetched from any of its addresses; the message names each and why.
    """
    if hasattr(kind, "resources"):  # MNIST and its like: four archives, each at several addresses
        place = folder / kind.__name__ / "raw"
        unpacked = [place / name.removesuffix(".gz") for name, _ in kind.resources]
        archives = {name: (md5, [f"{mirror}{name}" for mirror in kind.mirrors]) for name, md5 in kind.resources}
        unpacked.append(folder / kind.__name__ / "processed")
    else:
        place, unpacked = folder, [folder / kind.base_folder]
        archives = {kind.filename: (kind.tgz_md5, [kind.url])}
    for path in unpacked:
        remove_whatever(path)
    for name, (md5, addresses) in archives.items():
        _fetch_archive(place / name, md5, addresses)


def _fetch_archive(path: Path, md5: str, addresses: Sequence[str]) -> None:
    if path.is_file():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() == md5:
                return
        path.replace(path.with_name(f"{path.name}.part"))
    remove_whatever(path)
    refused = []
    for address in addresses:
        try:
            download(address, path, md5, kind="md5", most=MOST, seconds=SECONDS)
        except (OSError, ValueError) as error:
            refused.append(f"{address}: {error}")
        else:
            return
    raise OSError("; ".join(refused))


DATA_SETS = {
    # Only 150 of the digits are for training, so that a student alone falls well behind its teacher, and there are
    # enough others to make choices by.
    "digits": Source(padding=1, flip=False, validation=1147, load=_digits),
    "cifar10": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR10")),
    "cifar100": Source(padding=4, flip=True, validation=VALIDATION, load=_torchvision("CIFAR100")),
    "mnist": Source(padding=2, flip=False, validation=5_000, load=_torchvision("MNIST")),
    "fashion_mnist": Source(padding=2, flip=True, validation=VALIDATION, load=_torchvision("FashionMNIST")),
}
