"""One picture, of whatever kind, as pixels (H, W, C) uint8; or an error that says what it is and what to do."""

from __future__ import annotations

import functools
import math
import operator
import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kdlib.records.limits import RATIO, check_memory

# of the files that are opened, whatever their names end in: for others PIL may start another program, as for PostScript
FORMATS = ("JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")
PIXELS = 2**26  # bytes that any picture may take as RGB; or RATIO times its file's size, as in kdlib.records.limits
LARGEST = 8_192  # pixels that a side may be resized to
ORIENTATION = 0x0112  # EXIF's number for it
COLOURS = ("RGB", "CMYK", "YCbCr", "HSV")  # modes that PIL converts to RGB without a choice to be made
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # 16 bits of grey
MANY = 2_000  # pictures from which on a bar shows how far the reading is
GREY = ("1", "L", "F", "I", *DEEP)


class Kind(NamedTuple):
    """What a picture was before it was converted, as far as a reader may want to know."""

    mode: str  # as PIL names it
    highest: int | None = None  # the largest value of 16 bits of grey
    frames: int = 1


def read_picture(path: Path, size: int | None = None) -> tuple[np.ndarray, Kind]:
    """The pixels (H, W, 3) uint8 of an image file, turned as its EXIF orientation says.

    Transparent parts become white. Of several frames the first is read. 16 bits of grey are scaled to 8.

    Args:
        size: resize the shorter side to so many pixels, and cut a square from the centre; None: as it is.

    Raises:
        ValueError: anything that is not a picture of a mode that can be converted rightly; it names the file.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ValueError("no regular file")
        with warnings.catch_warnings():
            # a damaged or malicious file of a few bytes can claim any number of pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats()) as picture:
                claimed, held = 3 * picture.width * picture.height, path.stat().st_size
                if claimed > max(PIXELS, RATIO * held):
                    raise ValueError(
                        f"{picture.width}x{picture.height} pixels in {held:,} bytes: expected at most {RATIO} times as "
                        "many; save it smaller"
                    )
                frames = getattr(picture, "n_frames", 1)
                pixels, kind = from_pil(picture, size)
                if picture.mode == "RGB" and _bits(path, picture) == 16:  # PIL keeps the upper eight
                    kind = kind._replace(mode="RGB;16", highest=256 * int(pixels.max()) + 255)
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        raise ValueError(f"{path} is not an image that can be read ({error}): replace or remove it") from error
    return pixels, kind._replace(frames=frames)


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that the installed PIL knows."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _bits(path: Path, picture) -> int:
    """Bits per channel in the file, which PIL does not tell of pictures in colour."""
    if picture.format == "PNG":
        with open(path, "rb") as file:
            return file.read(25)[24]
    return max(np.atleast_1d(getattr(picture, "tag_v2", {}).get(258, 8)))  # TIFF's BitsPerSample


def from_pil(picture, size: int | None = None) -> tuple[np.ndarray, Kind]:
    """The same of a PIL image.

    Raises:
        ValueError: a mode that cannot be converted without knowing what its values mean.
    """
    from PIL import ImageOps

    if picture.getexif().get(ORIENTATION, 1) != 1:  # otherwise it would be a copy
        picture = ImageOps.exif_transpose(picture)
    kind = Kind(picture.mode)
    if picture.mode in DEEP or (picture.mode == "I" and picture.format == "PNG"):
        values = np.asarray(picture)
        kind, pixels = kind._replace(highest=int(values.max())), np.empty(values.shape, np.uint8)
        for made, row in zip(pixels, values, strict=True):  # row by row, since floats take four times the memory
            made[:] = np.round(row / 257)
    elif picture.mode == "F":
        pixels = from_floats(np.asarray(picture))
    elif picture.mode in ("1", "L", "RGB") and "transparency" in picture.info:  # one colour stands for none
        pixels = on_white(np.asarray(picture.convert("RGBA")))
    elif picture.mode in ("1", "L"):
        pixels = np.asarray(picture.convert("L"))
    elif picture.mode in COLOURS:
        pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    elif picture.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX"):
        pixels = on_white(np.asarray(picture if picture.mode == "RGBA" else picture.convert("RGBA")))
    else:
        raise ValueError(f"mode {picture.mode}: expected 8 or 16 bits of grey, floats from 0 to 1, or colours")
    pixels = np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))
    return (resized(pixels[None], size)[0] if size else pixels), kind


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images (N, H, W, C) uint8 with their shorter side resized to `size` pixels, and a square cut from the centre."""
    from torchvision.transforms.v2 import functional

    height, width = images.shape[1:3]
    most = 8 * min(height, width)  # of a picture that is a line, most is cut off at once: resized it might be huge
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    images = images[:, top : top + most, left : left + most]
    channels_first = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    square = functional.center_crop(functional.resize(channels_first, [size], antialias=True), [size, size])
    return square.permute(0, 2, 3, 1).contiguous().numpy()


def all_resized(images: np.ndarray, size: int) -> np.ndarray:
    """The same image by image, so that no second copy of all of them is needed."""
    shape = len(images), size, size, images.shape[3]
    check_memory(math.prod(shape), f"{len(images):,} images of size {size}", "give a smaller size")
    made = np.empty(shape, np.uint8)
    for k, one in enumerate(images):
        made[k] = resized(one[None], size)[0]
    return made


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Pixels (N, ..., 4) uint8 with their transparency as (N, ..., 3), laid on white."""
    made = np.empty((*pixels.shape[:-1], 3), np.uint8)
    for k, part in enumerate(pixels):  # rows or images, since floats take four times the memory
        opacity = part[..., 3:].astype(np.float32) / 255
        made[k] = np.round(part[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return made


def from_floats(values: np.ndarray) -> np.ndarray:
    """Floats from 0 to 1 as uint8 from 0 to 255, of any shape.

    Raises:
        ValueError: values that are not finite, or outside that range: nothing tells what they mean.
    """
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high) and low >= 0 and high <= 1):
        raise ValueError(
            f"floats from {low:g} to {high:g}: expected a range from 0 to 1; scale them, without subtracting a mean"
        )
    scaled = np.asarray(values, np.float32) * 255
    return np.round(scaled, out=scaled if scaled.ndim else None).astype(np.uint8)


def check_depth(kinds: dict[Kind, int] | list[Kind], where: str) -> None:
    """Raise ValueError if no 16-bit picture of a set uses the upper quarter of its range: all would be nearly black."""
    highest = max((kind.highest for kind in kinds if kind.highest is not None), default=None)
    if highest is not None and highest < 2**14:
        raise ValueError(
            f"{where}: the 16-bit pictures have no value above {highest:,}, expected the range to 65,535; scale them "
            "to it, or save them with 8 bits"
        )


def whole_number(name: str, value: object, least: int, most: int = LARGEST, unit: str = "pixels") -> int | None:
    """A whole number, of Python's or NumPy's kind, within bounds; None stays None."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        bound = f"from {least} to {most:,}" + ", a quarter of the shorter side" * (name == "padding")
        raise ValueError(f"{name} is {value!r}: expected a whole number of {unit} {bound}")
    return number
