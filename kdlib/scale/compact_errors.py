"""What a teacher's k largest logits leave out: measured against all of them, at the temperature of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib.scale.compact import layout


class CompactError(NamedTuple):
    """How far the targets of k logits are from those of all."""

    temperature: float  # T
    k: int
    bytes: int  # per image and view
    divergence: float  # KL(all || compact) at T, nats, mean over the images
    gradient: float  # of the soft term: its error's norm, as a share of an untrained student's gradient


def compact_errors(
    logits: Tensor, ks: Sequence[int], temperatures: Sequence[float] = (1.0, 4.0, 20.0)
) -> list[CompactError]:
    """The errors of compact soft labels of these logits, for each temperature and k.

    The gradient of ``T**2 * KL`` with respect to a student's logits is ``T`` times the difference of the student's and
    the teacher's probabilities, so what compact targets change in it is the same for every student. It is given as a
    share of the gradient of a student that gives all classes the same probability; of that of a student near its
    teacher it is a larger share.

    Args:
        logits: (N, C) of a teacher; one of minus infinity rules a class out.

    Raises:
        ValueError: a k that is not between 1 and C.
    """
    classes, found = logits.shape[1], []
    for temperature in temperatures:
        log_all = torch.log_softmax(logits.double() / temperature, dim=1)
        untrained = (log_all.exp() - 1 / classes).norm(dim=1).mean()
        for k in ks:
            rows = layout(classes, k)
            log_compact = torch.log_softmax(rows.decode(rows.encode(logits)).double() / temperature, dim=1)
            terms = log_all.exp() * (log_all - log_compact)
            divergence = terms.masked_fill(log_all == -torch.inf, 0).sum(1).mean().item()  # as p log p at p = 0
            error = (log_all.exp() - log_compact.exp()).norm(dim=1).mean() / untrained
            found.append(CompactError(temperature, k, rows.bytes, divergence, error.item()))
    return found


def made_up_logits(images: int, classes: int = 1000, *, groups: int = 50, seed: int = 0) -> Tensor:
    """Logits (N, C) of a teacher that does not exist: for sizes and errors where no teacher of many classes is at hand.

    Classes are directions in 128 dimensions, alike within a group, as kinds of dogs are; an image is its class's
    direction with noise, and a logit is their product. Nothing about a real teacher can be learned from them.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, 128, generator=generator)
    directions = centres[torch.arange(classes) % groups] + torch.randn(classes, 128, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    labels = torch.randint(classes, (images,), generator=generator)
    seen = directions[labels] + 0.13 * torch.randn(images, 128, generator=generator)
    return 12 * seen @ directions.T
