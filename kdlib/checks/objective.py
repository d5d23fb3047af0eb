"""Whether a loss of the reader's own is the distillation loss: by its gradient, on fixed tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.losses import distillation_loss

TINY = 1e-12
TEMPERATURES = [
    1,
    1.5,
    2,
    2.5,
    3,
    3.5,
    4,
    5,
    6,
    7,
    8,
    10,
    12,
    15,
    16,
    20,
    25,
    30,
    32,
    40,
    50,
    64,
    100,
]  # that people use


def look_at_loss(loss_fn: Callable, classes: int) -> list[tuple[str, bool]]:
    """Compare the gradient of the soft term with that of KL(teacher || student) times T², on fixed tensors.

    The soft term is what changes of the gradient if the teacher's logits change.

    Args:
        loss_fn: ``loss_fn(student_logits, teacher_logits, labels)``. Of one whose `temperature`, `alpha` and `beta` are
            bound with functools.partial, the weight of the soft term is known. T is otherwise the one that fits best.

    Returns:
        What was seen, and whether it is odd.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher, other = (3 * torch.randn(8, classes, generator=generator, dtype=torch.float64) for _ in range(3))
    labels = torch.arange(8) % classes
    keywords = getattr(loss_fn, "keywords", {})
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # what it raises is looked at below
        warnings.simplefilter("ignore")
        try:
            loss_fn(student, teacher, labels)
        except RuntimeError:  # it may hold weights in single precision
            loss_fn(student.float(), teacher.float(), labels)
            student, teacher, other = (logits.float() for logits in (student, teacher, other))

    def gradients(loss: Callable) -> Tensor:
        z = student.clone().requires_grad_()
        made = [loss(z, v, labels) for v in (teacher, other)]
        return torch.autograd.grad(made[0] - made[1], z)[0]

    found: list[tuple[str, bool]] = []

    def say(text: str, odd: bool) -> None:
        found.append((text, odd))

    z, v = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of some of the mistakes
        try:
            value = loss_fn(z, v, labels)
            if value.ndim:
                return [(f"it is a tensor {tuple(value.shape)}, expected a scalar, the mean over the batch", True)]
            into_teacher = torch.autograd.grad(value, v, allow_unused=True, retain_graph=True)[0]
            own = gradients(loss_fn)
            (hard,) = torch.autograd.grad(loss_fn(z, z.detach(), labels), z)
        except Exception as error:  # whatever a loss of the reader's own may raise
            return [(f"it fails on (8, {classes}) logits: {error}", True)]
    flows = into_teacher is not None and bool(into_teacher.abs().max() > TINY)
    text = "a gradient flows into the teacher's logits: detach them" if flows else "no gradient flows into the teacher"
    say(text, flows)
    if own.norm() < TINY:
        say("the teacher's logits change nothing: the soft term is missing or has no weight", True)
        return found
    if (off := _not_of_labels(hard, student, labels)) > 0.01:
        text = f"if both have the same logits there is still a gradient ({off:.0%} of it not of a plain cross-entropy)"
        say(f"{text}: is T applied to both alike, and is what else is added meant?", True)
    given = keywords.get("temperature")
    temperature = max([float(given)] if given else TEMPERATURES, key=lambda T: _compare(own, gradients(_soft(T)))[0])
    alike, scale = _compare(own, gradients(_soft(temperature)))
    if alike < 0.99:
        others = {
            "KL(student || teacher), the other way round": _reversed(temperature),
            "softmax applied twice to the teacher": lambda z, v, y: _soft(temperature)(z, v.softmax(1), y),
            "a squared difference of logits": lambda z, v, y: (z - v).square().mean(),
        }
        near = max(others, key=lambda name: _compare(own, gradients(others[name]))[0])
        guess = f"; it is that of {near}" if _compare(own, gradients(others[near]))[0] > 0.99 else ""
        say(f"the gradient of the soft term is not that of KL(teacher || student) at T = {temperature:g}{guess}", True)
        return found
    beta = keywords.get("beta")
    beta = beta if beta is not None else 1 - keywords["alpha"] if "alpha" in keywords else None
    reasons = {"": 1.0, "the factor T² is missing": temperature**-2, "its mean is over images and classes": 1 / classes}
    reasons["T² is missing, and its mean is over images and classes"] = temperature**-2 / classes
    reasons["it is summed over the batch, not averaged"] = 8.0
    text = (
        f"the gradient of the soft term is {scale:.3g} times that of T² KL(teacher || student) at T = {temperature:g}"
    )
    near = next((why for why, factor in reasons.items() if beta and abs(scale / (beta * factor) - 1) < 0.02), None)
    if beta is None:
        say(f"{text}: is that the weight that you meant?", scale > 1.01 or scale < 0.1)
    elif near is None:
        say(f"{text}, where its weight is {beta:g}", True)
    else:
        say(f"{text}{': ' + near if near else ', its weight'}", bool(near))
    return found


def _soft(temperature: float) -> Callable:
    return lambda z, v, y: distillation_loss(z, v, None, temperature=temperature, alpha=0)


def _reversed(temperature: float) -> Callable:
    def loss(z, v, y):
        p, q = (v / temperature).log_softmax(1), (z / temperature).log_softmax(1)
        return F.kl_div(p, q, reduction="batchmean", log_target=True)

    return loss


def _not_of_labels(gradient: Tensor, student: Tensor, labels: Tensor) -> float:
    """The share of a gradient that no cross-entropy explains, with or without label smoothing."""
    p, classes = student.softmax(1), student.shape[1]
    parts = torch.stack([(p - F.one_hot(labels, classes)).flatten(), (p - 1 / classes).flatten()], 1)
    rest = gradient.flatten() - parts @ torch.linalg.lstsq(parts, gradient.flatten()[:, None]).solution[:, 0]
    return (rest.norm() / gradient.norm().clamp(min=1e-6)).item()


def _compare(own: Tensor, reference: Tensor) -> tuple[float, float]:
    """Cosine of two gradients, and how many times as long the first is."""
    cosine = F.cosine_similarity(own.flatten(), reference.flatten(), dim=0).item()
    return cosine, (own.norm() / reference.norm()).item()
