"""A folder of pictures as a data set: ``train/<class>/*``, ``test/<class>/*`` and perhaps ``val/<class>/*``.

A folder that holds the classes' folders and nothing else is read as training images, of which a test set is held out.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdlib.records.limits import check_memory
from kdlib.sources.pictures import MANY, check_depth, read_picture
from kdlib.train import progress_bar

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif")
SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
DEEPEST = 64  # folders within one another in which pictures are looked for
HIDDEN, TWICE = "hidden", "that links lead to again"
LAYOUT = "train/<class>/ and test/<class>/, and val/<class>/ if the validation images are chosen already"


def read_folder(path: Path, size: int | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a data set, by name (see :mod:`kdlib.sources.arrays`), and remarks on what was read.

    Hidden files and folders are skipped, and so are files that are no pictures. Links are followed, but a file or
    folder that was met before is not read again. Pictures directly in ``train/`` have no label: theirs is −1.

    Args:
        size: see :func:`kdlib.sources.pictures.read_picture`.

    Raises:
        ValueError: a missing split, classes that differ between the splits, a class without pictures, or a picture
            that cannot be read or has another size than the others.
    """
    folders = _split_folders(path)
    skipped: Counter[str] = Counter()
    files = {split: _pictures(folder, skipped) for split, folder in folders.items()}
    names = _class_names(path, folders, files)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(names)}
    kinds: Counter = Counter()
    shape = None
    total = sum(map(len, files.values()))
    with progress_bar(total, total >= MANY, unit="image") as bar:
        for split, found in files.items():
            images = None
            for k, (file, _) in enumerate(found):
                pixels, kind = read_picture(file, size)
                shape = shape or pixels.shape
                if pixels.shape != shape:
                    raise ValueError(
                        f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, expected {shape[1]}x{shape[0]} like the "
                        f"others: give load_data a size, such as size={min(shape[:2])}, to resize and crop all of them "
                        "(or the notebook its parameter size)"
                    )
                if images is None:
                    check_memory(
                        len(found) * pixels.size, f"the {len(found):,} images of {path}", "give a smaller size"
                    )
                    images = np.empty((len(found), *shape), np.uint8)
                images[k] = pixels
                kinds[kind] += 1
                bar.update()
            arrays[f"{split}_images"] = images
            labels = [-1 if name is None else names.index(name) for _, name in found]
            arrays[f"{split}_labels"] = np.array(labels, np.int64)
            arrays[f"{split}_files"] = np.array([str(file.relative_to(path)) for file, _ in found], object)
    check_depth(kinds, str(path))
    return arrays, _remarks(kinds, skipped)


def _split_folders(path: Path) -> dict[str, Path]:
    """Where each split is; upper and lower case are the same."""
    found: dict[str, Path] = {}
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and not _hidden(folder))
    for split, names in SPLITS.items():
        folders = [folder for folder in inside if folder.name.lower() in names]
        if len(folders) > 1:
            raise ValueError(f"{path} has {' and '.join(f.name for f in folders)}: expected one of them; join the two")
        if folders:
            found[split] = folders[0]
    if not found and _classes_only(inside):
        return {"train": path}
    if list(found) == ["train"] and len(inside) == 1:
        return found
    for split in ("train", "test"):
        if split not in found:
            names = ", ".join(folder.name for folder in inside[:5]) or "no folder"
            raise ValueError(
                f"{path} has no folder {split} (it has {names}): expected {LAYOUT}, or one folder per class with its "
                "pictures directly in it; move the images"
            )
    return found


def _classes_only(folders: list[Path]) -> bool:
    """Whether each is the folder of a class: pictures lie in it, and it is not a split under another name."""
    return len(folders) > 1 and all(
        not folder.name.lower().startswith(("train", "test", "val"))
        and any(file.suffix.lower() in ENDINGS and not _hidden(file) for file in folder.iterdir())
        and not any(inside.is_dir() and not _hidden(inside) for inside in folder.iterdir())
        for folder in folders
    )


def _pictures(folder: Path, skipped: Counter) -> list[tuple[Path, str | None]]:
    """Every picture of a split with the name of its class; None for one that lies outside of any class's folder."""
    classes = [inside for inside in sorted(folder.iterdir()) if inside.is_dir() and not _hidden(inside)]
    whole = folder.resolve()
    seen: set[tuple[int, int]] = set()
    for above in (whole, *whole.parents, *classes):  # a link to one of them would read other pictures under this name
        _met(above, seen)
    found = [(file, None) for file in _files(folder, skipped, seen, deep=0)]
    for one in classes:
        found += [(file, _name(one)) for file in _files(one, skipped, seen)]
    return found


def _files(folder: Path, skipped: Counter, seen: set[tuple[int, int]], deep: int = DEEPEST) -> Iterator[Path]:
    """The pictures in a folder and the folders below it, in order, each once, whatever links lead to it."""
    if deep == 1:
        raise ValueError(f"{str(folder)[:200]}… lies {DEEPEST} folders below its class's: move the pictures up")
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read ({error}): change its permissions, or remove it") from error
    for entry in entries:
        if _hidden(entry):
            skipped[HIDDEN] += 1
        elif entry.is_dir():
            if deep and _met(entry, seen):
                skipped[TWICE] += 1
            elif deep:
                yield from _files(entry, skipped, seen, deep - 1)
        elif entry.suffix.lower() not in ENDINGS:
            skipped[entry.suffix or entry.name] += 1
        elif entry.exists() and _met(entry, seen):
            skipped[TWICE] += 1
        else:
            yield entry


def _name(folder: Path) -> str:
    """The name of a class: é may be one letter or two, as the system that wrote the folder liked."""
    if not folder.name.isprintable():
        raise ValueError(f"{str(folder)!r} has a name that cannot be printed: rename it")
    return unicodedata.normalize("NFC", folder.name)


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__MACOSX"


def _met(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether the file or folder was met before under another name."""
    about = os.stat(path)
    key = about.st_dev, about.st_ino
    if key in seen:
        return True
    seen.add(key)
    return False


def _class_names(path: Path, folders: dict[str, Path], files: dict[str, list]) -> list[str]:
    """The names of the classes, in order: the same in every split, each with pictures. ``train/`` may have none."""
    in_split = {
        split: sorted(_name(f) for f in folder.iterdir() if f.is_dir() and not _hidden(f))
        for split, folder in folders.items()
    }
    names = in_split["train"] or in_split.get("test", [])
    for split, own in in_split.items():
        if not own and names and files[split] and split == "train":
            continue  # without labels
        if not own:
            raise ValueError(f"{path}: no class folders in {folders[split]}, expected {LAYOUT}: move the images")
        if own != names:
            odd = min(set(own) ^ set(names))
            where = ", ".join(folders[s].name for s, other in in_split.items() if odd in other)
            raise ValueError(
                f"{path}: class {odd!r} is in {where} only, expected the same classes in "
                f"{', '.join(folder.name for folder in folders.values())}; add the missing folder, or remove the other"
            )
        loose = [file for file, name in files[split] if name is None]
        if loose and (split != "train" or folders[split] == path):
            raise ValueError(f"{loose[0]} lies outside of any class's folder, expected {LAYOUT}: move it")
        counts = Counter(name for _, name in files[split])
        if empty := [name for name in own if not counts[name]]:
            raise ValueError(
                f"{folders[split] / empty[0]} holds no image: remove the folder or add some ({', '.join(ENDINGS)})"
            )
    return names


def _remarks(kinds: Counter, skipped: Counter) -> list[str]:
    """What a reader may want to know of the pictures, and of the files that were skipped."""
    modes = Counter()
    for kind, count in kinds.items():
        modes[kind.mode] += count
    remarks = [", ".join(f"{count:,} {mode}" for mode, count in modes.most_common())]
    if animated := sum(count for kind, count in kinds.items() if kind.frames > 1):
        remarks.append(f"{animated:,} with several frames, of which the first was read")
    if skipped:
        others = sorted(kind for kind in skipped if kind not in (HIDDEN, TWICE))
        reasons = {HIDDEN: skipped[HIDDEN], TWICE: skipped[TWICE]}
        reasons[f"no pictures ({', '.join(others[:4])}{', …' * (len(others) > 4)})"] = sum(skipped[k] for k in others)
        remarks.append("skipped: " + ", ".join(f"{count:,} {why}" for why, count in reasons.items() if count))
    return remarks
