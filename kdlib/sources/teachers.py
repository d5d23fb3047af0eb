"""A teacher from elsewhere: with its own normalisation, image size, classes, outputs, and the file of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.checks.logits import examine, warn_of_probabilities
from kdlib.data import Data, ImageSet
from kdlib.evaluate import outputs_of
from kdlib.records.artefacts import did_you_mean
from kdlib.sources.pictures import whole_number
from kdlib.sources.weights import weights_for

OUTPUTS = ("logits", "probabilities")


class AdaptedTeacher(nn.Module):
    """A network from elsewhere that takes our images and gives logits for our classes; see :func:`adapt_teacher`."""

    def __init__(self, network: nn.Module, data: ImageSet, mean, std, size, columns, width, outputs):
        super().__init__()
        self.network, self.size, self.outputs = network, size, outputs
        self.width = width  # how many outputs there must be; None: whatever there are
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
        made = self.all_outputs(images)[:, self.columns]
        return made.clamp(min=1e-8).log() if self.outputs == "probabilities" else made

    def all_outputs(self, images: Tensor) -> Tensor:
        """What the network gives for all of its own classes, (B, its classes) float32."""
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
        least = int(self.columns.max()) + 1
        if made.ndim != 2 or made.shape[1] != (self.width or max(least, made.shape[1])):
            raise ValueError(
                f"the teacher's outputs are {tuple(made.shape)}, expected ({len(images)}, {self.width or least}"
                f"{'' if self.width else ' or more'}): one column per class; name its classes in its order"
            )
        return made.float()


def adapt_teacher(
    network: nn.Module,
    data: ImageSet | Data,
    *,
    weights: str | PathLike | Mapping | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    size: int | None = None,
    classes: Sequence[str] | Mapping[str, int] | Mapping[int, str] | None = None,
    outputs: str = "logits",
) -> AdaptedTeacher:
    """A network from elsewhere as a teacher for `data`: for :func:`kdlib.generate` and :class:`kdlib.LiveTeacher`.

    Args:
        network: from images (B, C, H, W) to outputs (B, its classes): a tensor, a tuple or mapping that holds it, or an
            object with ``.logits``. A single output is the logit of the second of two classes.
        data: the training images, or the data set. The student's normalisation is undone, and the teacher's applied.
        weights: a file or a mapping with the network's weights, wrapped however the training code left it.
        mean, std: of the images that the network was trained on, per channel, on a scale from 0 to 1; such as
            (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) for torchvision's; one number: the same for all channels.
            None: those of `data`. With three channels, grey images are shown in three equal ones.
        size: of the images that the network expects; None: as they are.
        classes: the names of its classes in the order of its outputs, or from each of our names to the number of its
            output, or from numbers to names as Hugging Face's ``id2label``. Classes that `data` does not have are left
            out. None: those of `data`, in their order.
        outputs: what it gives: ``logits``, or ``probabilities``, of which the logarithm is taken.

    Raises:
        ValueError: weights that do not fit the network, a class that it does not have, outputs of another shape, or
            that are not finite, or that are no probabilities where these were announced.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}: expected one of {', '.join(OUTPUTS)}")
    data = data.train if isinstance(data, Data) else data
    mean, std = _per_channel("mean", mean, data, least=0.0), _per_channel("std", std, data, least=1e-6)
    if (mean is None) != (std is None):
        raise ValueError("expected mean and std both, or neither")
    size = whole_number("size", size, 1)
    if weights is not None:
        network.load_state_dict(weights_for(network, weights))
    columns, width = _columns(classes, data)
    teacher = AdaptedTeacher(network, data, mean, std, size, columns, width, outputs).eval()
    examine(teacher, data)
    _check_outputs(teacher, data)
    return teacher


def _per_channel(name: str, values: object, data: ImageSet, least: float) -> tuple[float, ...] | None:
    """A number, or one per channel, as a tuple; ValueError if they cannot be of pixels from 0 to 1."""
    if values is None:
        return None
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        found = np.full(1, np.nan)
    found = np.full(data.channels, found) if found.ndim == 0 else found
    if found.shape not in ((data.channels,), (3,)) or not ((found >= least) & (found <= 1)).all():
        above = " and above 0" if least else ""
        raise ValueError(f"{name} is {values!r}: expected one number per channel, of pixels from 0 to 1{above}")
    return tuple(found.tolist())


@torch.no_grad()
def _check_outputs(teacher: AdaptedTeacher, data: ImageSet) -> None:
    """Look at all the columns of a few outputs: whether they are probabilities, as far as that can be seen."""
    rows = torch.arange(min(64, len(data)), device=data.labels.device)
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    made = teacher.all_outputs(data.batch(rows, torch.zeros_like(rows)).to(device))
    if teacher.outputs == "logits":
        if made.shape[1] > len(teacher.columns):  # of as many as we have, examine has said it
            warn_of_probabilities(made)
    elif made.min() < -1e-3 or (made.sum(1) - 1).abs().max() > 0.02:
        raise ValueError(
            f"outputs is 'probabilities', but they run from {made.min():.3g} to {made.max():.3g} and sum to "
            f"{made.sum(1).min():.3g} to {made.sum(1).max():.3g}: expected numbers from 0 to 1 that sum to 1; if they "
            "are logits, leave outputs out"
        )


def _columns(classes: Sequence[str] | Mapping | None, data: ImageSet) -> tuple[list[int], int | None]:
    """Which of the teacher's outputs each of our classes has, and how many outputs there are, if that is known."""
    if classes is None:
        return list(range(data.classes)), data.classes
    if isinstance(classes, (str, bytes)) or not hasattr(classes, "__iter__"):
        raise ValueError(
            f"classes is {classes!r}: expected the names of the teacher's classes in its order, or a mapping"
        )
    if isinstance(classes, Mapping) and all(hasattr(key, "__index__") for key in classes):  # from numbers to names
        classes = {str(name): key for key, name in classes.items()}
    number = dict(classes) if isinstance(classes, Mapping) else {str(name): k for k, name in enumerate(classes)}
    if not isinstance(classes, Mapping) and len(number) < len(classes):
        raise ValueError(f"classes has {len(classes)} names of which {len(number)} differ: expected each name once")
    if missing := [name for name in data.class_names if name not in number]:
        raise ValueError(
            f"the teacher has no class {missing[0]!r}: expected all of {', '.join(data.class_names[:8])}"
            f"{', …' * (data.classes > 8)} among its classes{did_you_mean(missing[0], number)}; for other names, give "
            "a mapping from each of ours to the number of its output"
        )
    columns = [number[name] for name in data.class_names]
    if not all(hasattr(column, "__index__") and column >= 0 for column in columns):
        raise ValueError(f"classes gives the outputs {columns}: expected whole numbers from 0, one for each class")
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        both = [name for name in data.class_names if number[name] == twice]
        raise ValueError(f"classes gives output {twice} to {' and '.join(both)}: expected an output for each class")
    return [int(column) for column in columns], None if isinstance(classes, Mapping) else len(classes)
