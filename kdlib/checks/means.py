"""Whether a loss is a mean over the images of a batch, so that the losses of its parts give that of the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.gpu import ranks

ROWS = 60  # at least so many are compared


def check_mean(whole: Tensor, of_parts: Tensor, parts: str, advice: str, rtol: float = 1e-3) -> None:
    """ValueError if the loss of all images together is not the mean of the losses of their parts.

    Args:
        whole: a scalar, as `of_parts`.
        parts: what they are, in words.
        advice: the way out, after "expected a mean over images".
        rtol: how far apart they may be, as a share of the second.
    """
    whole, of_parts = whole.detach(), of_parts.detach()
    if not torch.isclose(of_parts, whole, rtol=rtol, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"the loss of {parts} together is {whole.item():.6g}, the mean of their own losses "
            f"{of_parts.item():.6g}: expected a mean over images; {advice}"
        )


def checked_mean(loss_fn: Callable[..., Tensor], labels: Tensor) -> Callable[..., Tensor]:
    """`loss_fn`, which with several processes raises ValueError at its first call unless it is a mean over images.

    Each process computes the loss of its share, and their mean trains the network. It would be another loss than that
    of the whole batch if classes have weights, labels are ignored, images are compared, or losses are summed.

    Args:
        labels: of all images that it trains with, -1 for those that have none.
    """
    if ranks.world() == 1:
        return loss_fn
    checked, lacking = [], bool((labels < 0).any())

    @functools.wraps(loss_fn, updated=())
    def first_checked(*given: Tensor) -> Tensor:
        if not checked:
            checked.append(True)
            cuda = [given[0].device] if given[0].is_cuda else []
            with torch.random.fork_rng(cuda):  # of a loss that draws: a run that is resumed checks once more
                _check_parts(loss_fn, given, lacking)
        return loss_fn(*given)

    return first_checked


def _check_parts(loss_fn: Callable[..., Tensor], like: tuple[Tensor, ...], lacking: bool = False) -> None:
    """Compare the loss of a batch with those of two parts that have no class in common, cut in several places.

    The batch is made up, and the same on every rank, so that all of them raise or none. A network's first logits may
    be all alike, and then so are the losses of any part; and a real batch need not hold a label that is ignored. Here
    logits grow from class to class, and losses with them, so that it shows if one class of very many has no weight.

    Args:
        like: what the loss is given: logits (B, C), perhaps a teacher's, and labels (B,) or probabilities (B, C).
        lacking: whether images may have no label.
    """
    student_logits, *_, labels = like
    classes = student_logits.shape[1]
    per_class = max(3, -(-ROWS // classes))
    rows = per_class * classes
    hard = torch.arange(classes).repeat_interleave(per_class)
    if lacking and labels.ndim == 1:
        hard[-per_class:] = -1
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, *x.shape[1:], generator=generator, dtype=torch.float32) for x in like[:-1]]
    made = [x * torch.linspace(1, 6, rows).view(-1, *[1] * (x.ndim - 1)) for x in made]
    made.append(hard if labels.ndim == 1 else 0.9 * F.one_hot(hard, classes) + 0.1 / classes)
    batch = [rows.to(x) for rows, x in zip(made, like, strict=True)]
    advice = (
        "with several processes, no class weights, no ignored labels, no sum, and nothing that compares the images of "
        "a batch; train with one process"
    )
    whole = loss_fn(*batch)
    for cut in sorted({per_class * k for k in (1, classes // 3, classes // 2, classes - 1) if 0 < k < classes}):
        sizes = [cut, rows - cut]
        first, second = (loss_fn(*part) for part in zip(*(x.split(sizes) for x in batch), strict=True))
        parts = f"two parts ({sizes[0]} and {sizes[1]} images of a test)"
        check_mean(whole, (sizes[0] * first + sizes[1] * second) / rows, parts, advice, 1e-5)
