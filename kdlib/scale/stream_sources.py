"""Where pictures that are too many for memory lie: trees of class folders, and Hugging Face data sets on disk.

A source knows its labels before any picture is read. Its pictures are in an order that is the same everywhere: of a
tree, by class and path; of a data set, its own. So image i of a source is the same image for everybody.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.sources.folders import ENDINGS, SPLITS
from kdlib.sources.indexed import IMAGE_KEYS, LABEL_KEYS, common_names
from kdlib.sources.pictures import from_pil, read_picture

ANNOTATIONS = "val_annotations.txt"  # of TinyImageNet: file and class in the first two columns, separated by tabs
LAYOUT = f"train/<class>/… and val/<class>/… (or TinyImageNet's val/{ANNOTATIONS}), and perhaps test/<class>/…"


class FolderImages:
    """The pictures of one split of a tree of class folders.

    Args:
        root: of the tree.
        files: (N,) paths below it, with a slash on every system.
        labels: (N,) int64.
        class_names: in the order of the labels.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int], class_names: tuple[str, ...]):
        self.root, self.class_names = root, class_names
        self.files = np.array([os.fsencode(file) for file in files])  # no list: worker processes share its memory
        self.labels = np.array(labels, np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def identity(self) -> str:
        """The SHA-256 of all paths, sizes in bytes and labels: a changed tree is noticed without reading its pictures.

        Times of change have no part in it, since a copy of the tree may have others. So nothing is noticed if pictures
        were exchanged for others of just the same size in bytes.
        """
        digest = hashlib.sha256("\0".join(self.class_names).encode())
        for file, label in zip(self.files.tolist(), self.labels.tolist(), strict=True):
            digest.update(b"%s\0%d\0%d\n" % (file, os.stat(os.path.join(os.fsencode(self.root), file)).st_size, label))
        return digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        """The pixels (size, size, 3) uint8 of a picture; ValueError names one that cannot be read."""
        return read_picture(self.root / os.fsdecode(self.files[index]), size)[0]


class IndexedImages:
    """The pictures of a Hugging Face data set: a table on disk, mapped into memory, that is asked by index.

    Args:
        dataset: a ``datasets.Dataset`` with a column of images and one of labels under one of the usual names.
        class_names: in the order of the labels.

    Raises:
        ValueError: a data set without these columns, without a fingerprint, or a label that is no class's number.
    """

    def __init__(self, dataset: Any, where: str, class_names: tuple[str, ...]):
        columns = list(getattr(dataset, "column_names", []))
        keys = [next((key for key in known if key in columns), None) for known in (IMAGE_KEYS, LABEL_KEYS)]
        if None in keys:
            raise ValueError(
                f"{where} has the columns {', '.join(map(str, columns)) or 'none'}: expected images under one of "
                f"{', '.join(IMAGE_KEYS)} and labels under one of {', '.join(LABEL_KEYS)}; rename_column gives them one"
            )
        self._fingerprint = getattr(dataset, "_fingerprint", None)
        if not isinstance(self._fingerprint, str):
            raise ValueError(
                f"{where} is a {type(dataset).__name__} without a fingerprint, so nothing would tell whether what was "
                "kept of it still holds: expected a datasets.Dataset; others fit kdlib.from_dataset, which reads them "
                "into memory, or can be saved as a tree of class folders"
            )
        self._dataset, self._where, self._key, self.class_names = dataset, where, keys[0], class_names
        self.labels = np.array(list(dataset[keys[1]]), np.int64)
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(class_names):
            raise ValueError(
                f"{where}: labels run from {self.labels.min()} to {self.labels.max()}, expected 0 to "
                f"{len(class_names) - 1}: there are {len(class_names)} class names; leave out what has no label"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """The fingerprint that Hugging Face gives: it follows the table and whatever was done to it."""
        return f"datasets {self._fingerprint}"

    def read(self, index: int, size: int) -> np.ndarray:
        """The pixels (size, size, 3) uint8 of a picture; ValueError names one that cannot be read."""
        try:
            return from_pil(self._dataset[int(index)][self._key], size)[0]
        except Exception as error:  # PIL raises a dozen kinds for damaged pictures
            raise ValueError(
                f"{self._where}[{index}] is not an image that can be read ({error}): leave it out"
            ) from error


Source = FolderImages | IndexedImages


def find_sources(root: Path | Mapping[str, Any], name: str) -> dict[str, Source]:
    """The sources of a data set by split: ``train``, and those of ``validation`` and ``test`` that have labels.

    Args:
        root: a tree, laid out as ImageNet or TinyImageNet is; or Hugging Face data sets by split.

    Raises:
        ValueError: another layout, classes that differ between the splits, or a class without pictures.
    """
    if isinstance(root, Mapping):
        given = {split: next((root[key] for key in keys if key in root), None) for split, keys in SPLITS.items()}
        given = {split: dataset for split, dataset in given.items() if dataset is not None}
        if "train" not in given:
            raise ValueError(f"{name} has the splits {', '.join(root) or 'none'}: expected train among them")
        names = common_names(given, name)
        if names is None:
            raise ValueError(f"{name} names no classes: expected a ClassLabel as its labels' feature; cast_column")
        return {split: IndexedImages(dataset, f"{name}/{split}", tuple(names)) for split, dataset in given.items()}
    folders = {
        split: folder for split, keys in SPLITS.items() if (folder := _subfolder(root, keys)) and _has_labels(folder)
    }
    if "train" not in folders:
        raise ValueError(f"{root} has no folder train with a folder for each class: expected {LAYOUT}")
    found = {split: list(_labelled(root, folder)) for split, folder in folders.items()}
    names = tuple(sorted({name for _, name in found["train"]}))
    for split, pairs in found.items():
        if odd := {name for _, name in pairs} ^ set(names):
            raise ValueError(
                f"{root}: class {min(odd)!r} has pictures in only one of train and {folders[split].name}: expected "
                "the same classes in both; add what is missing, or remove the other"
            )
    number = {name: label for label, name in enumerate(names)}
    return {
        split: FolderImages(root, [file for file, _ in pairs], [number[name] for _, name in pairs], names)
        for split, pairs in found.items()
    }


def _subfolder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in names), None)


def _has_labels(folder: Path) -> bool:
    """Whether there are folders of classes, or a list of labels; the test images of a competition have neither."""
    inside = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return (folder / ANNOTATIONS).is_file() or (bool(inside) and inside != ["images"])


def _labelled(root: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Every picture of a split as (path below the root, name of the class), in order of class and path."""
    if (folder / ANNOTATIONS).is_file():
        yield from sorted(_listed(root, folder).items(), key=lambda pair: pair[::-1])
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            name = unicodedata.normalize("NFC", entry.name)  # é may be one letter or two
            yield from ((file, name) for file in sorted(_pictures(root, entry.path)))


def _listed(root: Path, folder: Path) -> dict[str, str]:
    """The class of every picture in ``images/``, by its path below the root, from TinyImageNet's list."""
    listed, pictures = {}, set(_pictures(root, folder / "images"))
    for number, line in enumerate((folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        file, name, *_ = [*line.split("\t"), ""]
        path, where = f"{(folder / 'images').relative_to(root).as_posix()}/{file}", f"{folder / ANNOTATIONS}:{number}"
        if not file or not name:
            raise ValueError(f"{where} is {line!r}: expected a file and its class, separated by a tab")
        if path in listed:
            raise ValueError(f"{where} names {file}, which an earlier line named: delete one of the two")
        if path not in pictures:
            raise ValueError(
                f"{where} names {file}: expected a picture at {root / path}; if the pictures lie in folders of their "
                f"classes, delete {ANNOTATIONS}"
            )
        listed[path] = name
    if unlisted := pictures - listed.keys():
        raise ValueError(
            f"{root / min(unlisted)} has no line in {ANNOTATIONS}, which tells its class: add it, or delete the picture"
        )
    return listed


def _pictures(root: Path, folder: str | Path) -> Iterator[str]:
    for place, _, files in os.walk(folder):
        below = Path(place).relative_to(root).as_posix()
        yield from (f"{below}/{file}" for file in files if file.lower().endswith(ENDINGS) and file[0] != ".")
