"""Whether what a teacher says can be a teacher's: its shape, its scale, and how far it agrees with the labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.data import Batch, ImageSet
from kdlib.evaluate import predict_logits

FEWEST = 20  # labelled images from which on an agreement is worth a warning


def examine(teacher: nn.Module, data: ImageSet, images: int = 500) -> None:
    """Ask a teacher about some of the training images, and check what it says: see :func:`check_logits`."""
    rows = torch.linspace(0, len(data) - 1, min(images, len(data))).long()
    device = next((weight.device for weight in teacher.parameters()), torch.device("cpu"))
    rows = rows.to(data.labels.device)
    some = replace(data, images=data.images[rows], labels=data.labels[rows])
    try:
        logits = predict_logits(teacher, some, device=device)
    except (RuntimeError, TypeError) as error:  # PyTorch's own about layers that do not fit what they get
        height, width, channels = data.images.shape[1:]
        raise ValueError(
            f"the teacher {type(teacher).__name__} fails on images of {data.name}, {width}x{height} pixels with "
            f"{channels} channel{'s' if channels > 1 else ''} in float32 ({error}): expected logits. If it takes "
            "another size or colours, say so in kdlib.adapt_teacher(size=..., mean=..., std=...); if it is in half or "
            "double precision, call its .float() first"
        ) from error
    check_logits(logits, some)


def check_finite(logits: Tensor, data: ImageSet, view: int = 0) -> None:
    """Raise ValueError if logits (N, classes) of one view of the images are not all finite numbers."""
    odd = (~logits.isfinite()).any(1)
    if odd.any():
        raise ValueError(
            f"the teacher's logits are not finite for {int(odd.sum())} of {len(data)} images of {data.name} in view "
            f"{view}, first for image {int(odd.nonzero()[0])}: expected numbers. Its training may have diverged, it "
            "may have overflowed in half precision (try .float()), or its weights may not be loaded"
        )


def check_logits(logits: Tensor, data: ImageSet) -> None:
    """Whether logits of the clean images of `data` can be a teacher's.

    Raises:
        ValueError: another shape than (N, classes), or values that are not a number or infinite.

    A warning says if they look like probabilities, if they agree with less than half of the labels or with no more than
    a constant would, or if they would agree with clearly more in another order of the classes.
    """
    if tuple(logits.shape) != (len(data), data.classes):
        raise ValueError(
            f"the teacher's logits for {len(data)} images of {data.name} are {tuple(logits.shape)}, expected "
            f"({len(data)}, {data.classes}): one column for each of {', '.join(data.class_names[:6])}"
            f"{', …' * (data.classes > 6)}; if it has others, or one output for two classes, adapt it with "
            "kdlib.adapt_teacher"
        )
    check_finite(logits, data)
    warn_of_probabilities(logits)
    labels = data.labels.cpu()
    labelled = labels >= 0
    if int(labelled.sum()) >= FEWEST:
        _compare(logits[labelled].argmax(1), labels[labelled], data.class_names)


def warn_of_probabilities(outputs: Tensor) -> None:
    """Warn if a teacher's outputs (N, classes) look as if a softmax or a sigmoid had been applied already."""
    if outputs.shape[1] > 1 and (outputs >= 0).all() and (outputs <= 1).all():
        warnings.warn(
            "the teacher's outputs look like probabilities: all lie between 0 and 1. Expected logits: a softmax on top "
            "would be the second one, and its soft labels nearly uniform. Take the logarithm, as "
            "kdlib.adapt_teacher(outputs='probabilities') does",
            stacklevel=4,
        )


def _compare(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> None:
    """Warn if predictions agree with few labels, and say whether another order of the classes would agree with more."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((len(names), len(names)), np.int64)  # [label, prediction]
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    agreed = np.trace(counts) / counts.sum()
    classes, outputs = linear_sum_assignment(-counts)
    reordered = counts[classes, outputs].sum() / counts.sum()
    # swapping two classes of ten costs a fifth of the agreement; chance does not move it by three standard errors
    clearly = agreed + max(0.03, 3 * np.sqrt(agreed * (1 - agreed) / counts.sum()))
    commonest = counts.sum(1).max() / counts.sum()  # what a teacher that always says the same would reach
    if agreed >= 0.5 and agreed > commonest and reordered <= clearly:
        return
    reason = "Usual reasons: another normalisation or image size than in its training, other classes, little training"
    if agreed >= 0.5 and reordered <= clearly:
        reason = f"One that always predicts {names[int(counts.sum(1).argmax())]!r} would do as well. {reason}"
    elif reordered > max(clearly, 0.6):
        moved = [(names[c], names[o]) for c, o in zip(classes, outputs, strict=True) if c != o and counts[c, o]]
        examples = ", ".join(f"{own} as {said}" for own, said in moved[:3])
        reason = (
            f"In another order of the classes it would agree with {reordered:.0%}: it predicts {examples}"
            f"{', …' * (len(moved) > 3)}. Give the names of its classes in its own order: "
            "kdlib.adapt_teacher(classes=...)"
        )
    warnings.warn(f"the teacher agrees with {agreed:.0%} of {len(labels):,} training labels. {reason}", stacklevel=4)


def check_pairing(made_for: str, views: int, data: ImageSet, wanted: int) -> None:
    """Raise ValueError unless soft labels are of `data` and hold as many views as a student sees.

    Args:
        made_for: the identity of the images that they are for.
        views: how many views of each image they hold.
        wanted: how many the student sees.
    """
    if made_for != data.identity:
        raise ValueError(
            f"the soft labels are of {made_for}, the images of {data.identity}: expected the same images in the same "
            "order; generate them for these (chapter 03)"
        )
    if wanted > views:
        raise ValueError(
            f"the student would see {wanted} views, the soft labels hold {views}: generate more views (chapter 03), or "
            f"set views={views} in the student's recipe"
        )


def check_plain(batch: Batch) -> None:
    """Raise ValueError if images of a batch are no plain views, of which alone soft labels hold logits."""
    if batch.views is None:
        raise ValueError(
            "these images were changed by cutout or mixup after their view was drawn: soft labels hold plain views "
            "only; set cutout and mixup to 0 in the student's recipe, or use LiveTeacher"
        )
