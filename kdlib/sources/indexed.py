"""Any data set that is asked by index: torchvision's, Hugging Face's, or a plain ``Dataset`` of (image, label)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdlib.records.limits import check_memory
from kdlib.sources.arrays import CHANNELS
from kdlib.sources.pictures import GREY, MANY, Kind, check_depth, from_floats, from_pil, on_white, resized
from kdlib.train import progress_bar

IMAGE_KEYS = ("image", "img", "pixel_values", "images")
LABEL_KEYS = ("label", "labels", "fine_label", "target")


def read_indexed(dataset: Any, where: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, H, W, C) uint8 and labels (N,) int64 of a data set, each item read once.

    An item is (image, label), or a mapping with both under one of the usual names. An image is a PIL image, an array
    (H, W) or (H, W, C), or a tensor (C, H, W); of whole numbers to 255, or of floats from 0 to 1. A label is a whole
    number; None or −1 stands for none.

    Args:
        where: what messages call it.
        size: see :func:`kdlib.sources.pictures.read_picture`.

    Raises:
        TypeError: a data set without a length or an index.
        ValueError: no items, or one that is something else; the message names its index.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{where} is a {type(dataset).__name__}: expected a data set with len() and an index, not a stream"
        )
    if not len(dataset):
        raise ValueError(f"{where} is empty: expected at least one image of each class")
    check_memory(8 * len(dataset), f"the {len(dataset):,} labels of {where}", "expected a length that is true")
    images, labels, kinds = None, np.empty(len(dataset), np.int64), set()
    with progress_bar(len(dataset), len(dataset) >= MANY, unit="image") as bar:
        for k in range(len(dataset)):
            try:
                image, label = _pair(dataset[k])
                pixels, kind = _pixels(image, size)
                labels[k] = _label(label)
            except (ValueError, KeyError, IndexError, OSError, OverflowError) as error:
                reason = f"there is no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{where}[{k}]: {reason}") from error
            if images is None:
                check_memory(
                    len(dataset) * pixels.size, f"the {len(dataset):,} images of {where}", "give a smaller size"
                )
                images = np.empty((len(dataset), *pixels.shape), np.uint8)
            if {images.shape[3], pixels.shape[2]} == {1, 3}:  # grey pictures among those in colour
                images, pixels = (x if x.shape[-1] == 3 else np.repeat(x, 3, axis=-1) for x in (images, pixels))
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"{where}[{k}] is {pixels.shape}, expected {images.shape[1:]} like the others: "
                    f"give a size, such as size={min(images.shape[1:3])}, to resize and crop all of them"
                )
            images[k] = pixels
            kinds.add(kind)
            bar.update()
    check_depth(list(kinds), where)
    return images, labels


def names_of(dataset: Any) -> Sequence[str] | None:
    """The names of the classes, if the data set has them: torchvision in ``classes``, Hugging Face in ``features``."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        return next((features[key].names for key in LABEL_KEYS if hasattr(features.get(key), "names")), None)
    names = getattr(dataset, "classes", None)
    return names if isinstance(names, Mapping) or (hasattr(names, "__len__") and not isinstance(names, str)) else None


def in_order(names: Sequence[str] | Mapping, where: str) -> list[str]:
    """The names of classes in the order of their numbers: of a sequence, or of a mapping from or to the number."""
    if isinstance(names, Mapping):
        if not all(hasattr(number, "__index__") for number in names):
            names = {number: name for name, number in names.items()}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"{where}: the classes are numbered {sorted(names)[:6]}: expected 0 to {len(names) - 1}")
        names = [names[number] for number in range(len(names))]
    return [str(name) for name in names]


def common_names(splits: Mapping[str, Any], where: str) -> list[str] | None:
    """The names of the classes that data sets tell; None if none does.

    Raises:
        ValueError: two of them number their classes differently: the same label would mean two classes.
    """
    told = {split: in_order(found, where) for split, one in splits.items() if (found := names_of(one)) is not None}
    if not told:
        return None
    first, names = next(iter(told.items()))
    for split, own in told.items():
        if own != names:
            k = next((k for k, (a, b) in enumerate(zip(names, own, strict=False)) if a != b), min(len(names), len(own)))
            a, b = (listed[k] if k < len(listed) else "nothing" for listed in (names, own))
            raise ValueError(
                f"{where}: class {k} is {a!r} in {first} and {b!r} in {split}: expected the same classes in the same "
                "order; renumber the labels, or give class_names if the data sets name them wrongly"
            )
    return names


def alike(arrays: dict[str, np.ndarray]) -> None:
    """Give all splits three channels if theirs differ, in place; what is transparent becomes white."""
    names = [name for name in arrays if name.endswith("_images")]
    if len({arrays[name].shape[3] for name in names}) > 1:
        for name in names:
            if arrays[name].shape[3] == 4:
                arrays[name] = on_white(arrays[name])
            elif arrays[name].shape[3] == 1:
                arrays[name] = np.repeat(arrays[name], 3, axis=3)


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        found = [next((key for key in keys if key in item), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if found[0] is None:
            raise ValueError(f"it has {', '.join(map(str, item))}: expected an image under {', '.join(IMAGE_KEYS)}")
        return item[found[0]], item[found[1]] if found[1] else None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item
    raise ValueError(f"it is a {type(item).__name__}: expected (image, label), or a mapping with both")


def _label(label: Any) -> int:
    if label is None:
        return -1
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):  # of NumPy and PyTorch; not of one element
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not float(label).is_integer():
        raise ValueError(f"its label is {label!r}: expected a whole number, the number of its class")
    return int(label)


def _pixels(image: Any, size: int | None) -> tuple[np.ndarray, Kind]:
    """One image (H, W, C) uint8, and what it was."""
    if hasattr(image, "getbands"):  # PIL's
        pixels, kind = from_pil(image, size)
        return (pixels[..., :1] if kind.mode in GREY else pixels), kind
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"its image is {array.dtype} {array.shape}: expected (H, W), (H, W, C) or (C, H, W)")
    if isinstance(image, torch.Tensor) or array.shape[2] not in CHANNELS:
        array = array.transpose(1, 2, 0) if array.shape[0] in CHANNELS else array
    if array.shape[2] not in CHANNELS:
        raise ValueError(f"its image is {array.shape}: expected {CHANNELS[0]} to {CHANNELS[-1]} channels")
    if array.dtype.kind == "f":
        array = from_floats(array)
    elif array.dtype.kind not in "bui" or array.min() < 0 or array.max() > 255:
        raise ValueError(f"its image is {array.dtype}: expected whole numbers to 255, or floats from 0 to 1")
    pixels = array.astype(np.uint8) * (255 if array.dtype.kind == "b" else 1)
    return resized(pixels[None], size)[0] if size else np.ascontiguousarray(pixels, np.uint8), Kind("array")
