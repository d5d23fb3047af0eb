"""What every bench measures with: a setting of images and networks, noise of that size, and kdlib's epochs on it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import kdlib
from kdlib import data

TEACHER, SOFT_LABELS, STUDENT, LIVE = (
    "train the teacher",
    "generate soft labels",
    "train a student from soft labels",
    "train a student with the live teacher",
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the cases are measured on."""

    images: int  # in the training set
    size: int  # pixels, height and width
    channels: int
    padding: int  # pixels
    teacher: str
    students: tuple[str, ...]
    batch_size: int
    epochs: int  # timed, after one that is not; as many views are generated, so no more than there are
    matrix: int  # rows of the square matrices whose product shows what the device can do
    workers: tuple[int, ...]  # of the tutorial's DataLoader; the best is taken
    tutorial_share: float  # of the images that the tutorial's loop is timed on
    classes: int = 10


def noise(s: Setting, count: int) -> data.ImageSet:
    """Images of that size and number."""
    random = np.random.default_rng(0)
    return data.ImageSet(
        name=f"noise{count}/train",
        images=torch.from_numpy(random.integers(0, 256, (count, s.size, s.size, s.channels), dtype=np.uint8)),
        labels=torch.from_numpy(random.integers(0, s.classes, count)),
        class_names=tuple(map(str, range(s.classes))),
        mean=(0.5,) * s.channels,
        std=(0.25,) * s.channels,
        padding=s.padding,
        flip=s.channels == 3,
    )


def synchronize(device: torch.device) -> None:
    """Wait for the queued work; otherwise only the queueing would be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """The median time of one call."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def kdlib_epochs(case: str, network: str, s: Setting, count: int, device: torch.device) -> tuple[float, float]:
    """Seconds before the first timed epoch (compilation, warm-up), and seconds per epoch, with kdlib."""
    images = noise(s, count)
    teacher = kdlib.build(s.teacher, s.classes, s.channels).to(device).eval()
    if case == SOFT_LABELS:
        first = seconds(lambda: kdlib.generate(teacher, images, 1, device=device, progress=False), device)
        again = seconds(lambda: kdlib.generate(teacher, images, s.epochs, device=device, progress=False), device)
        return first, again / s.epochs
    loss_fn, targets, views = F.cross_entropy, None, None
    if case != TEACHER:
        loss_fn = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.1)
        targets = kdlib.LiveTeacher(teacher)
    if case == STUDENT:
        views = 2
        logits = torch.from_numpy(kdlib.generate(teacher, images, views, device=device, progress=False))
        targets = kdlib.SoftLabels(logits, data=images.identity)
    model = kdlib.build(network, s.classes, s.channels)
    recipe = kdlib.Recipe(1 + s.epochs, s.batch_size, 0.05, views=views)
    history = kdlib.train(model, images, loss_fn, recipe, targets=targets, device=device, progress=False)
    return history.seconds[0], float(np.median(np.diff(history.seconds)))
