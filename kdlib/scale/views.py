"""Views by seed: what an image looks like in view v follows from v and the image's index alone.

Crops of any place and size, mirroring and RandAugment have no list that could be numbered. Here the pair (view, index)
is the key of a counter-based generator (Philox 4x64-10: Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3*,
SC 2011), so that everybody gets the same parameters for it, on every machine and in every worker process, and nobody
needs to store them. So a teacher's logits can be stored for such views, and looked up by view and index.

The parameters are computed from integers with the four basic operations and square roots alone, which IEEE 754 rounds
alike everywhere. The pixels are the same with the same PyTorch and torchvision, on any processor, except that two
operations of RandAugment, color and sharpness, may round a value to the next of the 256 levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

VERSION = 1  # raised by hand if a change alters parameters or pixels: soft labels of another version do not fit
MOST = 2**31  # views that `views=None` draws from
ONE = 2**16  # a crop's unit: an image's side has so many
ATTEMPTS = 10  # at a crop that lies within the image, as in torchvision
CROPS, OPERATIONS = 1, 1 + ATTEMPTS  # where the random words of each purpose begin; word 0 decides on mirroring
MIXUP = 1  # the first word of the counter for mixup's pairs; for the views' parameters it is 0

# RandAugment's operations with their largest strength (Cubuk et al., arXiv 1909.13719, in torchvision's form); those in
# SIGNED go either way
STRENGTHS = {
    "identity": 0.0,
    "shear_x": 0.3,  # tangent of the angle
    "shear_y": 0.3,
    "translate_x": 150 / 331,  # share of the side
    "translate_y": 150 / 331,
    "rotate": 30.0,  # degrees
    "brightness": 0.9,  # added to a factor of 1, and so with the next three
    "color": 0.9,
    "contrast": 0.9,
    "sharpness": 0.9,
    "posterize": 4.0,  # bits taken off
    "solarize": 1.0,  # how far the threshold is lowered from white to black
    "autocontrast": 0.0,
    "equalize": 0.0,
}
NAMES = tuple(STRENGTHS)
SIGNED = frozenset(NAMES[1:10])


class Parameters(NamedTuple):
    """What is done to an image, in this order. The crop is in 65,536ths of the image's height and width."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool
    operations: tuple[tuple[str, float], ...]  # of RandAugment: names in STRENGTHS, and how strongly


CLEAN = Parameters(0, 0, ONE, ONE, False, ())  # of view 0


@dataclass(frozen=True)
class SeededViews:
    """Views of images, numbered without end. View 0 is the clean image: resized, and a square cut from its centre.

    Every other view is a crop of random place, area and shape, resized to a square (Szegedy et al., arXiv 1409.4842),
    mirrored or not, and changed by RandAugment if wanted; it may be blended with another image.

    Raises:
        TypeError: at construction of a subclass, whose views would be taken for this class's.
        ValueError: at construction, if a value is out of range.
    """

    size: int  # of a view's sides, pixels
    scale: tuple[float, float] = (0.08, 1.0)  # least and largest area of a crop, as a share of the image
    ratio: tuple[float, float] = (0.75, 4 / 3)  # least and largest width by height of a crop of a square image
    flip: bool = True  # whether half of the views are mirrored: only if a mirrored image keeps its class
    rand_augment: tuple[int, int] | None = None  # operations per view, and their strength from 0 to 30; None: none
    mixup: bool = False  # whether each view is blended with the same view of another image: see `mixup_pair`
    resize: int | None = None  # shorter side to which an image is resized for its clean view, pixels; None: size

    def __post_init__(self):
        if type(self) is not SeededViews:  # the identity tells settings, and not what a subclass does with them
            raise TypeError(f"{type(self).__qualname__} is a subclass of SeededViews: expected SeededViews itself")
        for name, kind in {"scale": float, "ratio": float, "rand_augment": int}.items():
            value = getattr(self, name)
            if isinstance(value, Sequence) and all(kind(x) == x for x in value):  # written alike, they are known alike
                object.__setattr__(self, name, tuple(map(kind, value)))
        for name, least in {"size": 1, "resize": self.size}.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}: expected a whole number of pixels, at least {least}")
        if self.resize == self.size:  # the same views, and so the same identity
            object.__setattr__(self, "resize", None)
        for name in ("flip", "mixup"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}: expected True or False")
        for name, most in {"scale": 1.0, "ratio": 1000.0}.items():
            match getattr(self, name):
                case (float(low), float(high)) if 0 < low <= high <= most:
                    continue
            raise ValueError(
                f"{name} is {getattr(self, name)!r}: expected two numbers from above 0 to {most:g}, in order"
            )
        match self.rand_augment:
            case None:
                pass
            case (int(count), int(strength)) if count >= 1 and 0 <= strength <= 30:
                pass
            case other:
                raise ValueError(
                    f"rand_augment is {other!r}: expected the number of operations, at least 1, and their strength, a "
                    "whole number from 0 to 30; or None"
                )

    @property
    def identity(self) -> str:
        """What decides the pixels beside the image and torchvision: the version and every setting."""
        return f"seeded views {VERSION}: {self!r}"

    def parameters(self, view: int, index: int) -> Parameters:
        """What is done to image `index` in `view`, both whole numbers from 0 to below 2**63."""
        if view == 0:
            return CLEAN
        words = random_words(view, index, OPERATIONS + (self.rand_augment or (0, 0))[0])
        crop = self._crop(words[CROPS:OPERATIONS])
        return Parameters(*crop, self.flip and bool(words[0] & 1), tuple(map(self._operation, words[OPERATIONS:])))

    def _crop(self, words: Sequence[int]) -> tuple[int, int, int, int]:
        """The first crop that lies within the image; each attempt takes 16 bits for area, ratio, row and column."""
        for word in words:
            area, shape, row, column = ((word >> shift) % ONE for shift in (0, 16, 32, 48))
            area = self.scale[0] + (self.scale[1] - self.scale[0]) * ((area + 0.5) / ONE)
            shape = between(*self.ratio, shape)
            height, width = (int(ONE * math.sqrt(x) + 0.5) for x in (area / shape, area * shape))
            if height <= ONE and width <= ONE:
                return (row * (ONE - height + 1)) >> 16, (column * (ONE - width + 1)) >> 16, height, width
        # never seen at torchvision's values; as there, the largest crop of an allowed shape, from the centre
        shape = min(max(1.0, self.ratio[0]), self.ratio[1])
        height, width = int(ONE / max(shape, 1.0) + 0.5), int(ONE * min(shape, 1.0) + 0.5)
        return (ONE - height) // 2, (ONE - width) // 2, height, width

    def _operation(self, word: int) -> tuple[str, float]:
        name = NAMES[(word >> 16) % len(NAMES)]
        strength = STRENGTHS[name] * self.rand_augment[1] / 30
        return name, -strength if name in SIGNED and word & 1 else strength

    def apply(self, image: Tensor, parameters: Parameters) -> Tensor:
        """An image (H, W, C) uint8 in the view of those parameters: (size, size, C) uint8."""
        channels_first = image.permute(2, 0, 1)
        if parameters == CLEAN:  # resized in proportion, not stretched to a square
            return self._clean(channels_first).permute(1, 2, 0)
        height, width = image.shape[:2]
        rows, columns = _pixels(parameters.height, height), _pixels(parameters.width, width)
        top = min((parameters.top * height + ONE // 2) >> 16, height - rows)
        left = min((parameters.left * width + ONE // 2) >> 16, width - columns)
        made = _resized(channels_first[:, top : top + rows, left : left + columns], self.size, self.size)
        if parameters.mirrored:
            made = functional.horizontal_flip(made)
        for name, strength in parameters.operations:
            made = _changed(made, name, strength)
        return made.permute(1, 2, 0)

    def _clean(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        shorter = self.resize or self.size
        if min(height, width) != shorter and (height, width) != (self.size, self.size):
            image = _resized(image, *(max(1, side * shorter // min(height, width)) for side in (height, width)))
        return functional.center_crop(image, [self.size, self.size])


def random_words(view: int, index: int, count: int, purpose: int = 0) -> list[int]:
    """`count` random integers of 64 bits for image `index` in `view`; other ones for every purpose."""
    generator = np.random.Philox(key=[view, index], counter=[0, 0, 0, purpose])
    return generator.random_raw(count).tolist()


def between(low: float, high: float, bits: int) -> float:
    """A value from `low` to `high`, evenly spread over the logarithm, chosen by 16 bits.

    The geometric mean halves the range 16 times: logarithms and powers are not rounded alike everywhere, roots are.
    """
    for k in range(15, -1, -1):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bits >> k & 1 else (low, middle)
    return low


def mixup_pair(view: int, index: int, count: int) -> tuple[int, float]:
    """With which of `count` images image `index` is blended in `view`, and its own share: (partner, share).

    The blend is ``share * image[index] + (1 - share) * image[partner]``, both in this view, and so are the labels. The
    partner is any other image; all shares in (0, 1) are equally likely, in steps of 1/65536, as for the students of a
    patient teacher (Beyer et al., arXiv 2106.05237). In view 0, the clean image, the share is 1.

    The teacher's logits for the blended image are addressed like all others, by view and index: row [view, index] of
    the soft labels. They are no blend of two rows.
    """
    if view == 0 or count < 2:
        return index, 1.0
    partner, share = random_words(view, index, 2, MIXUP)
    return (index + 1 + partner % (count - 1)) % count, (share % ONE + 0.5) / ONE


def blend(image: Tensor, partner: Tensor, share: float) -> Tensor:
    """``share * image + (1 - share) * partner`` of two images (H, W, C) uint8, rounded, as uint8."""
    weight = int(share * 2 * ONE)  # whole: the share is a multiple of 1/131072
    mixed = image.to(torch.int32) * weight + partner.to(torch.int32) * (2 * ONE - weight)
    return ((mixed + ONE) >> 17).to(torch.uint8)


def _pixels(part: int, side: int) -> int:
    """How many of `side` pixels a crop has: at least 1."""
    return max(1, (part * side + ONE // 2) >> 16)


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """An image (C, H, W) uint8 in another size: in whole numbers, and so the same on every processor.

    torchvision's own function computes in floats where the processor has no AVX2.
    """
    return torch.nn.functional.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


def _changed(image: Tensor, name: str, strength: float) -> Tensor:
    """An image (C, H, W) uint8 after one of RandAugment's operations, as torchvision does it."""
    height, width = image.shape[1:]
    match name:
        case "shear_x" | "shear_y":
            angle = math.degrees(math.atan(strength))
            shear = [angle, 0.0] if name == "shear_x" else [0.0, angle]
            return functional.affine(image, 0.0, [0, 0], 1.0, shear, center=[0, 0])
        case "translate_x" | "translate_y":
            moved = [int(strength * width), 0] if name == "translate_x" else [0, int(strength * height)]
            return functional.affine(image, 0.0, moved, 1.0, [0.0, 0.0])
        case "rotate":
            return functional.rotate(image, strength)
        case "brightness":
            return functional.adjust_brightness(image, 1 + strength)
        case "color":
            return functional.adjust_saturation(image, 1 + strength)
        case "contrast":
            return functional.adjust_contrast(image, 1 + strength)
        case "sharpness":
            return functional.adjust_sharpness(image, 1 + strength)
        case "posterize":
            return functional.posterize(image, 8 - round(strength))
        case "solarize":
            return functional.solarize(image, 255 * (1 - strength))
        case "autocontrast":
            return functional.autocontrast(image)
        case "equalize":
            return functional.equalize(image)
    return image  # identity
