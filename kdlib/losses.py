"""The distillation loss, and the two objectives that the book trains with.

Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DistillationLoss(NamedTuple):
    """The loss and its two parts, each a scalar tensor in nats."""

    total: Tensor  # alpha * hard + beta * T**2 * soft: what is minimised
    hard: Tensor  # cross-entropy with the labels
    soft: Tensor  # KL(teacher || student) at temperature T, without the factor T**2


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    beta: float | None = None,
) -> DistillationLoss:
    """``alpha * CE(labels, student) + beta * T**2 * KL(softmax(teacher/T) || softmax(student/T))``.

    The KL divergence is summed over the classes and averaged over the batch. The factor ``T**2`` makes up for the
    gradient of the soft term, which shrinks as ``1/T**2`` (arXiv 1503.02531, section 2), so that `alpha` and `beta`
    keep their meaning when the temperature changes. No gradient flows into the teacher.

    Args:
        student_logits: (B, C), not softened.
        teacher_logits: (B, C), of the same images in the same order.
        labels: (B,) class indices, or (B, C) probabilities.
        temperature: T > 0; 1 leaves the teacher's probabilities as they are, larger is softer.
        alpha: weight of the labels' cross-entropy; in [0, 1] where `beta` is not given.
        beta: weight of the soft term, at least 0; ``1 - alpha`` where not given.

    Raises:
        ValueError: a weight or temperature out of range, or tensors that do not fit each other.
    """
    beta = check_weights(temperature, alpha, beta)
    _check_shapes(student_logits, teacher_logits, labels)
    hard = F.cross_entropy(student_logits, labels)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return DistillationLoss(alpha * hard + beta * temperature**2 * soft, hard, soft)


@dataclass(frozen=True)
class CrossEntropy:
    """The usual objective: cross-entropy with the labels. Called as ``loss_fn(logits, batch)``."""

    label_smoothing: float = 0.0  # the share of the target spread evenly over the classes

    def __call__(self, logits: Tensor, batch) -> Tensor:
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)

    def describe(self) -> dict:
        """What of this objective decides the result, for a fingerprint."""
        return {"loss": "cross_entropy", "label_smoothing": self.label_smoothing}


@dataclass(frozen=True)
class Distillation:
    """The distillation objective over a target source. Called as ``loss_fn(logits, batch)``.

    `targets` is any ``(images, indices, views) -> teacher_logits``: a lookup in soft labels or the live teacher (see
    :mod:`kdlib.soft_labels`). The loss does not know which.

    Raises:
        ValueError: at construction, where a weight or the temperature is out of range.
    """

    targets: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    temperature: float
    alpha: float
    beta: float | None = None

    def __post_init__(self):
        check_weights(self.temperature, self.alpha, self.beta)

    def __call__(self, logits: Tensor, batch) -> DistillationLoss:
        teacher_logits = self.targets(batch.images, batch.indices, batch.views)
        return distillation_loss(
            logits,
            teacher_logits,
            batch.labels,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
        )

    def to(self, device: torch.device) -> Distillation:
        """The same objective with its targets on `device`."""
        return replace(self, targets=self.targets.to(device)) if hasattr(self.targets, "to") else self

    def check(self, data, recipe) -> None:
        """Raise ValueError, before the first step, where the targets do not belong to `data` or `recipe`."""
        if hasattr(self.targets, "check"):
            self.targets.check(data, recipe)

    def describe(self) -> dict:
        """What of this objective decides the result, for a fingerprint."""
        beta = check_weights(self.temperature, self.alpha, self.beta)
        weights = {"temperature": float(self.temperature), "alpha": float(self.alpha), "beta": float(beta)}
        describe = getattr(self.targets, "describe", lambda: repr(self.targets))
        return {"loss": "distillation", **weights, "targets": describe()}


def check_weights(temperature: float, alpha: float, beta: float | None = None) -> float:
    """`beta`, or what it is where not given; ValueError where a weight or the temperature is out of range."""
    for name, value in {"temperature": temperature, "alpha": alpha, "beta": beta}.items():
        if value is not None and not _is_finite(value):
            raise ValueError(f"{name} is {value!r}: expected a finite number")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}: expected a number above 0 (1 leaves the probabilities as they are)"
        )
    if beta is None:
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha is {alpha}: expected a number in [0, 1], since beta is then 1 - alpha; "
                "to weight the two terms freely, give beta as well"
            )
        return 1 - alpha
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}: expected a number of at least 0")
    if not beta >= 0:
        raise ValueError(
            f"beta is {beta}: expected a number of at least 0 (leave it out for 1 - alpha); "
            "a negative weight would push the student away from the teacher"
        )
    return beta


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):  # no number at all
        return False


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}: "
            "expected both (B, C), one row an image and one column a class"
        )
    batch, classes = student_logits.shape
    if labels.shape not in ((batch,), (batch, classes)):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits ({batch}, {classes}): "
            f"expected ({batch},) class indices or ({batch}, {classes}) probabilities"
        )
    if not (labels.is_floating_point() if labels.ndim == 2 else labels.dtype == torch.int64):
        raise ValueError(
            f"labels {tuple(labels.shape)} are {labels.dtype}: expected int64 for ({batch},) class indices, floats "
            f"for ({batch}, {classes}) probabilities; convert them with .long() or .float()"
        )
