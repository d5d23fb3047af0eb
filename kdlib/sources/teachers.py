"""A teacher from elsewhere: with its own normalisation, image size, classes, outputs, and the file of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.data import ImageSet
from kdlib.evaluate import outputs_of, predict_logits
from kdlib.records.artefacts import did_you_mean

OUTPUTS = ("logits", "probabilities")
FEWEST = 20  # labelled images from which on an agreement is worth a warning


class AdaptedTeacher(nn.Module):
    """A network from elsewhere that takes our images and gives logits for our classes; see :func:`adapt_teacher`."""

    def __init__(self, network: nn.Module, data: ImageSet, mean, std, size, columns, width, outputs):
        super().__init__()
        self.network, self.size, self.width, self.outputs = network, size, width, outputs
        channels = max(data.channels, len(mean or (0,)))

        def constant(values: Sequence[float]) -> Tensor:
            return torch.tensor([float(v) for v in values]).view(1, -1, 1, 1)

        self.register_buffer("data_mean", constant(data.mean))
        self.register_buffer("data_std", constant(data.std))
        self.register_buffer("mean", constant(mean or data.mean).expand(1, channels, 1, 1).clone())
        self.register_buffer("std", constant(std or data.std).expand(1, channels, 1, 1).clone())
        self.register_buffer("columns", torch.tensor(columns))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) for images (B, C, H, W) as the student sees them."""
        pixels = images * self.data_std + self.data_mean  # from 0 to 1
        if self.size is not None and tuple(pixels.shape[2:]) != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        made = outputs_of(self.network((pixels - self.mean) / self.std))
        if made.ndim == 4 and made.shape[2:] == (1, 1):
            made = made.flatten(1)
        if made.shape == (len(images),) or made.shape == (len(images), 1):  # of one logit, that of the second class
            made = made.reshape(-1, 1).float()
            probability = made if self.outputs == "probabilities" else made.sigmoid()
            made = torch.cat([1 - probability, probability] if self.outputs == "probabilities" else [0 * made, made], 1)
        if made.ndim != 2 or made.shape[1] != self.width:
            raise ValueError(
                f"the teacher's outputs are {tuple(made.shape)}, expected ({len(images)}, {self.width}): one column "
                "per class; name its classes in the order of its columns"
            )
        made = made.float()[:, self.columns]
        return made.clamp(min=1e-8).log() if self.outputs == "probabilities" else made


def adapt_teacher(
    network: nn.Module,
    data: ImageSet,
    *,
    weights: str | PathLike | Mapping | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
    classes: Sequence[str] | Mapping[str, int] | None = None,
    outputs: str = "logits",
) -> AdaptedTeacher:
    """A network from elsewhere as a teacher for `data`: for :func:`kdlib.generate` and :class:`kdlib.LiveTeacher`.

    Args:
        network: from (B, C, H, W) images to outputs (B, its classes): a tensor, a tuple or mapping that holds it, or an
            object with ``.logits``. A single output is the logit of the second of two classes.
        data: the training images. The student's normalisation is undone before the teacher's is applied.
        weights: a file or a mapping with the network's weights, wrapped however the training code left it.
        mean, std: of the images that the network was trained on, per channel, on a scale from 0 to 1; such as
            (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) for torchvision's. None: those of `data`. With three
            channels, grey images are shown in three equal ones.
        size: of the images that the network expects; None: as they are.
        classes: the names of its classes in the order of its outputs, or from each of our names to the number of its
            output. Classes that `data` does not have are left out. None: those of `data`, in their order.
        outputs: what it gives: ``logits``, or ``probabilities``, of which the logarithm is taken.

    Raises:
        ValueError: weights that do not fit the network, a class that it does not have, outputs of another shape or that
            are not finite.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}: expected one of {', '.join(OUTPUTS)}")
    for name, values in {"mean": mean, "std": std}.items():
        if values is not None and (
            len(values) not in (data.channels, 3) or not all(0 <= float(v) <= 1 for v in values)
        ):
            raise ValueError(f"{name} is {values!r}: expected one number per channel, of pixels from 0 to 1")
    if (mean is None) != (std is None):
        raise ValueError("expected mean and std both, or neither")
    if weights is not None:
        network.load_state_dict(weights_for(network, weights))
    columns, width = _columns(classes, data)
    teacher = AdaptedTeacher(network, data, mean, std, size, columns, width, outputs).eval()
    examine(teacher, data)
    return teacher


def _columns(classes: Sequence[str] | Mapping[str, int] | None, data: ImageSet) -> tuple[list[int], int]:
    """Which of the teacher's outputs each of our classes has, and how many outputs there are."""
    if classes is None:
        return list(range(data.classes)), data.classes
    number = dict(classes) if isinstance(classes, Mapping) else {str(name): k for k, name in enumerate(classes)}
    if not isinstance(classes, Mapping) and len(number) < len(classes):
        raise ValueError(f"classes has {len(classes)} names of which {len(number)} differ: expected each name once")
    if missing := [name for name in data.class_names if name not in number]:
        raise ValueError(
            f"the teacher has no class {missing[0]!r}: expected all of {', '.join(data.class_names[:8])}"
            f"{', …' * (data.classes > 8)} among its classes{did_you_mean(missing[0], number)}; for other names, give "
            "a mapping from each of ours to the number of its output"
        )
    width = max(number.values()) + 1 if isinstance(classes, Mapping) else len(classes)
    return [int(number[name]) for name in data.class_names], width


# --- weights -------------------------------------------------------------------------------------------------------


def weights_for(network: nn.Module, weights: str | PathLike | Mapping) -> dict[str, Tensor]:
    """The weights of `network` in a file or mapping, whatever wraps them: ``state_dict``, ``model``, ``module.``, …

    Raises:
        ValueError: a file that cannot be read without executing code, or in which no weights fit.
    """
    where = "the mapping"
    if not isinstance(weights, Mapping):
        where = str(weights)
        try:
            weights = torch.load(Path(weights), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive shows itself in many ways
            raise ValueError(
                f"{where} cannot be read as weights ({str(error).strip().partition(chr(10))[0]}): expected a file that "
                "torch.save wrote of a state_dict; where it was made, save network.state_dict()"
            ) from error
    wanted = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    nearest: tuple[int, str] = (-1, "no tensors at all")
    for found in _tensors_in(weights):
        for prefix in sorted({name[:k] for name in found for k in _ends(name)}, key=len):
            own = {name.removeprefix(prefix): weight for name, weight in found.items() if name.startswith(prefix)}
            fitting = [name for name, shape in wanted.items() if name in own and tuple(own[name].shape) == shape]
            if len(fitting) == len(wanted) and len(own) == len(wanted):
                return own
            odd = sorted(set(wanted) - set(fitting)) or sorted(set(own) - set(wanted))
            there = tuple(own[odd[0]].shape) if odd[0] in own else "nothing"
            nearest = max(nearest, (len(fitting), f"{odd[0]}: {there} where {wanted.get(odd[0], 'nothing')} is needed"))
    raise ValueError(
        f"{where} holds no weights of this {type(network).__name__} (nearest: {nearest[0]} of {len(wanted)} fit; "
        f"{nearest[1]}): expected the weights of the same architecture, with as many classes"
    )


def _tensors_in(weights: object, depth: int = 3) -> list[dict[str, Tensor]]:
    """Every mapping of names to tensors in a checkpoint: the weights themselves before their running average."""
    if not isinstance(weights, Mapping):
        return []
    tensors = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    inside = sorted(
        (name for name, value in weights.items() if isinstance(value, Mapping)), key=lambda name: "ema" in str(name)
    )
    found = [tensors] if tensors else []
    return found + [one for name in inside if depth for one in _tensors_in(weights[name], depth - 1)]


def _ends(name: str) -> list[int]:
    """Where the first parts of a dotted name end: 0, and after each of the first three dots."""
    dots = [k + 1 for k, letter in enumerate(name) if letter == "."]
    return [0, *dots[:3]]


# --- what it says --------------------------------------------------------------------------------------------------


def examine(teacher: nn.Module, data: ImageSet, images: int = 500) -> None:
    """Ask a teacher about some of the training images, and check what it says: see :func:`check_logits`."""
    rows = torch.linspace(0, len(data) - 1, min(images, len(data))).long()
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    rows = rows.to(data.labels.device)
    some = replace(data, images=data.images[rows], labels=data.labels[rows])
    check_logits(predict_logits(teacher, some, device=device), some)


def check_logits(logits: Tensor, data: ImageSet) -> None:
    """Whether logits of the clean images of `data` can be a teacher's.

    Raises:
        ValueError: another shape than (N, classes), or values that are not a number or infinite.

    A warning says if they look like probabilities, if they agree with less than half of the labels, or if they would
    agree with far more in another order of the classes.
    """
    if tuple(logits.shape) != (len(data), data.classes):
        raise ValueError(
            f"the teacher's logits for {len(data)} images of {data.name} are {tuple(logits.shape)}, expected "
            f"({len(data)}, {data.classes}): one column for each of {', '.join(data.class_names[:6])}"
            f"{', …' * (data.classes > 6)}; if it has other classes, adapt it with kdlib.adapt_teacher(classes=...)"
        )
    odd = (~logits.isfinite()).any(1)
    if odd.any():
        raise ValueError(
            f"the teacher's logits are not finite for {int(odd.sum())} of {len(data)} images of {data.name}, first for "
            f"image {int(odd.nonzero()[0])}: expected numbers. Its training may have diverged, it may have overflowed "
            "in half precision (try .float()), or its weights may not be loaded"
        )
    if data.classes > 1 and (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        warnings.warn(
            "the teacher's outputs look like probabilities: none is negative, and they sum to 1. Expected logits: a "
            "softmax on top would be the second one, and its soft labels nearly uniform. Take the logarithm, as "
            "kdlib.adapt_teacher(outputs='probabilities') does",
            stacklevel=3,
        )
    labels = data.labels.cpu()
    labelled = labels >= 0
    if int(labelled.sum()) >= FEWEST:
        _compare(logits[labelled].argmax(1), labels[labelled], data.class_names)


def _compare(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> None:
    """Warn if predictions agree with few labels, and say whether another order of the classes would agree with more."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((len(names), len(names)), np.int64)  # [label, prediction]
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    agreed = np.trace(counts) / counts.sum()
    classes, outputs = linear_sum_assignment(-counts)
    reordered = counts[classes, outputs].sum() / counts.sum()
    if agreed >= 0.5 and reordered < agreed + 0.25:
        return
    reason = "Usual reasons: another normalisation or image size than in its training, other classes, little training"
    if reordered > max(agreed + 0.25, 0.6):
        moved = [(names[c], names[o]) for c, o in zip(classes, outputs, strict=True) if c != o and counts[c, o]]
        examples = ", ".join(f"{own} as {said}" for own, said in moved[:3])
        reason = (
            f"In another order of the classes it would agree with {reordered:.0%}: it predicts {examples}"
            f"{', …' * (len(moved) > 3)}. Give the names of its classes in its own order: "
            "kdlib.adapt_teacher(classes=...)"
        )
    warnings.warn(f"the teacher agrees with {agreed:.0%} of {len(labels):,} training labels. {reason}", stacklevel=4)
