"""The distillation loss.

Hinton, Vinyals & Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    beta: float | None = None,
) -> Tensor:
    """``alpha * CE(labels, student) + beta * T**2 * KL(softmax(teacher/T) || softmax(student/T))``, in nats.

    The KL divergence is summed over the classes and averaged over the batch. The factor ``T**2`` makes up for the
    gradient of the soft term, which shrinks about as ``1/T**2`` (arXiv 1503.02531, section 2), so that a change of the
    temperature is not also a change of the two weights.

    In float32 the logarithms of the probabilities are rounded in their seventh digit, and the soft term multiplies what
    is lost by ``T**2``: it is good to about ``T**2 / 10**6``, at T = 10**4 to some tens. Beyond T = 100, give float64.

    Args:
        student_logits: (B, C) floats, before the softmax. Half precision is computed in float32.
        teacher_logits: (B, C) floats, of the same images in the same order. No gradient flows into them. A class may
            be masked with -inf: then the teacher gives it no probability. If a whole row is, the loss is not a number.
        labels: (B,) class indices, or (B, C) probabilities; may be None if `alpha` is 0.
        temperature: T > 0; 1 leaves the teacher's probabilities as they are, a higher one makes them softer.
        alpha: weight of the cross-entropy with the labels, at least 0; at most 1 without `beta`.
        beta: weight of the soft term, at least 0; None: ``1 - alpha``.

    Returns:
        The loss, a scalar tensor: in float64 for logits in float64, otherwise in float32.

    Raises:
        ValueError: a weight or temperature out of range, or tensors that do not fit each other. Values inside the
            tensors are checked on a CPU only, so that a GPU never waits.
    """
    beta = check_weights(temperature, alpha, beta)
    if labels is None and alpha:
        raise ValueError(f"labels is None and alpha is {alpha}: expected labels, or alpha=0 to learn without any")
    hard, soft = distillation_terms(student_logits, teacher_logits, labels if alpha else None, temperature=temperature)
    loss = beta * temperature**2 * soft
    return loss if hard is None else alpha * hard + loss


def distillation_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, *, temperature: float
) -> tuple[Tensor | None, Tensor]:
    """The two terms of :func:`distillation_loss` without their weights, in nats.

    Returns:
        The cross-entropy with the labels (None without labels), and KL(teacher || student) at temperature T, without
        the factor T**2: scalar tensors.

    Raises:
        ValueError: as for :func:`distillation_loss`, which explains the arguments.
    """
    check_weights(temperature, 0)
    _check_tensors(student_logits, teacher_logits, labels)
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if student_logits.device.type == "cpu" and not torch.compiler.is_compiling():
        with contextlib.suppress(RuntimeError):  # under torch.func.vmap no value can be read
            _check_values(student_logits, teacher_logits, labels, temperature)
    hard = None if labels is None else _cross_entropy(student_logits, labels)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    masked = log_teacher == -math.inf  # 0 * log 0 is 0: where the teacher gives nothing, whatever the student gives
    log_teacher = log_teacher.masked_fill(masked, torch.finfo(log_teacher.dtype).min)
    log_student = log_student.masked_fill(masked, 0)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return hard, soft


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32; as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def _cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 2:
        labels = labels.to(student_logits.dtype)
        finite = student_logits.clamp(min=torch.finfo(student_logits.dtype).min)
        student_logits = torch.where(labels == 0, finite, student_logits)  # 0 * log 0 is 0 here too
    return F.cross_entropy(student_logits, labels)


def check_weights(temperature: float, alpha: float, beta: float | None = None) -> float:
    """`beta`, or ``1 - alpha`` if it is None; ValueError for a weight or a temperature out of range."""
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
    except (TypeError, ValueError, OverflowError):  # no number at all, or too large for one
        return False


def _check_tensors(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None) -> None:
    """What can be told without reading a value: shapes and types."""
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)}: "
            "expected both (B, C), one row per image and one column per class"
        )
    batch, classes = student_logits.shape
    if not batch or not classes:
        raise ValueError(f"logits ({batch}, {classes}) are empty: expected at least one image and one class")
    for name, logits in {"student_logits": student_logits, "teacher_logits": teacher_logits}.items():
        if not logits.is_floating_point():
            raise ValueError(
                f"{name} are {logits.dtype}: expected floats, a network's outputs before the softmax; convert them "
                "with .float() if they are logits"
            )
    if labels is None:
        return
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


def _check_values(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None, temperature: float) -> None:
    """What takes a look at the values, each look at a whole tensor once."""
    for name, logits in {"student_logits": student_logits, "teacher_logits": teacher_logits}.items():
        lowest, highest = (value.item() for value in torch.aminmax(logits.detach()))
        if lowest == -math.inf:  # a masked class; the others must still be finite
            lowest = logits.detach().masked_fill(logits == -math.inf, math.inf).min().item()
        largest = max(abs(lowest), abs(highest))
        if math.isfinite(largest) and largest / temperature > torch.finfo(logits.dtype).max:
            raise ValueError(
                f"temperature is {temperature}: {name} of up to {largest:.3g}, divided by it, overflow {logits.dtype}; "
                "choose a higher temperature (1 leaves the probabilities as they are)"
            )
    if labels is None:
        return
    lowest, highest = (value.item() for value in torch.aminmax(labels))
    if labels.ndim == 1 and not 0 <= lowest <= highest < student_logits.shape[1]:
        raise ValueError(
            f"labels run from {lowest} to {highest}: expected class indices from 0 to {student_logits.shape[1] - 1}"
        )
    if labels.ndim == 2:
        sums = at_least_float32(labels).sum(dim=1)
        off = (sums - 1).abs().max().item()
        if lowest < 0 or not off < 0.02:  # twice what rounding to bfloat16 takes from a probability
            raise ValueError(
                f"labels are floats from {lowest:.3g} to {highest:.3g} whose rows sum to between {sums.min():.3g} and "
                f"{sums.max():.3g}: expected probabilities, none below 0, each row summing to 1"
            )
