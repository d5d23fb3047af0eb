"""One training loop for the teacher, the student alone and the distilled student: only loss and targets differ."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdlib import gpu
from kdlib.checks.fits import check_fits, check_labels
from kdlib.checks.means import checked_mean
from kdlib.data import Batch, ImageSet, Targets, batches, cutout, mixup, steps_per_epoch
from kdlib.evaluate import predict_logits
from kdlib.gpu import ranks
from kdlib.models import build
from kdlib.records import artefacts
from kdlib.records.checkpoint import Checkpoint, remove_checkpoint
from kdlib.records.fingerprint import fingerprint
from kdlib.records.identity import IdentityError, digest, identify


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: all but the data, the network and the objective. Vary it with ``dataclasses.replace``.

    Raises:
        ValueError: at construction, if a value is out of range.
    """

    epochs: int  # passes over the training images
    batch_size: int  # images per step
    learning_rate: float  # at its peak
    momentum: float = 0.9  # of SGD, Nesterov's form; 0 is plain SGD
    weight_decay: float = 5e-4  # on every parameter, per step and unit of learning rate
    warmup: float = 0.1  # share of the steps in which the learning rate rises from zero; then a half cosine to zero
    views: int | None = None  # how many views are drawn from, the clean one first; None: all there are
    cutout: int = 0  # side of the square set to the mean, pixels; 0: none
    mixup: float = 0.0  # strength of mixup, the parameter of a Beta distribution; 0: none
    seed: int = 0  # of the initial weights, the order and the views

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # a number of NumPy's as one of Python's, which JSON can hold
                object.__setattr__(self, name, value.item())
        for name, least in {"epochs": 1, "batch_size": 1, "cutout": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:  # True is an int, too
                raise ValueError(f"{name} is {value!r}: expected a whole number of at least {least}")
        if self.views is not None and (type(self.views) is not int or self.views < 1):
            raise ValueError(f"views is {self.views!r}: expected a whole number of at least 1, or None for all views")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed!r}: expected a whole number from 0 to 4,294,967,295")
        share = "from 0 to below 1"
        numbers = {"learning_rate": "above 0", "momentum": share, "warmup": share}
        for name, expected in (numbers | dict.fromkeys(("weight_decay", "mixup"), "of at least 0")).items():
            value = getattr(self, name)
            finite = type(value) in (int, float) and math.isfinite(value)
            if not finite or value < 0 or (expected == share and value >= 1) or (expected == "above 0" and not value):
                raise ValueError(f"{name} is {value!r}: expected a number {expected}")

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate after that share (0 to 1) of the steps: a linear warm-up, then half a cosine to zero."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


@dataclass
class History:
    """The course of a training: one value per epoch."""

    loss: list[float] = field(default_factory=list)  # mean over the epoch's steps, nats
    accuracy: list[float] = field(default_factory=list)  # on the validation images, a fraction of 1; empty without
    seconds: list[float] = field(default_factory=list)  # since the start, validation included

    def last(self) -> dict[str, str]:
        """The last epoch in words, for a progress bar."""
        shown = {"loss": f"{self.loss[-1]:.4f}"}
        return shown | ({"validation": f"{self.accuracy[-1]:.2%}"} if self.accuracy else {})


class Trained(NamedTuple):
    """A trained network, in eval mode, and what is known of it."""

    model: nn.Module
    history: History
    fingerprint: dict  # what it was made from
    path: Path  # its weights


def train(
    model: nn.Module,
    data: ImageSet,
    loss_fn: Callable[..., Tensor],
    recipe: Recipe,
    *,
    targets: Callable[[Batch], Tensor] | None = None,
    validation: ImageSet | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    fast: bool = True,
) -> History:
    """Train `model` in place: SGD with Nesterov momentum, a warm-up and a cosine, in half precision on a GPU.

    Under ``torchrun`` every process makes this call and takes its share of each batch (:mod:`kdlib.gpu.ranks`). The
    weights are those of one process, up to rounding and up to batch norm and dropout, which look at a share alone.

    The recipe's seed decides the order and the views, and what dropout draws; the global random state stays as it was.

    Args:
        model: any network from (B, C, H, W) images to (B, classes) logits; moved to `device`.
        data: the training images.
        loss_fn: ``loss_fn(student_logits, labels)``, such as ``F.cross_entropy``; with targets
            ``loss_fn(student_logits, teacher_logits, labels)``, such as ``partial(distillation_loss, temperature=4.0,
            alpha=0.1)``. A scalar, the mean over the images. After mixup the labels are (B, classes) probabilities.
        targets: the teacher's logits for a batch: :class:`kdlib.SoftLabels`, :class:`kdlib.LiveTeacher`, or any
            function of a :class:`kdlib.data.Batch`.
        validation: its accuracy is measured after every epoch. Nothing is chosen by it here.
        checkpoint: the unfinished run's file, written at most once a minute. If it is there, the run goes on from it.
            It stays at the end, so that nothing is lost before you have saved the network: delete it then. On another
            device the random numbers start afresh, and a warning says so.
        progress: show a bar (``TQDM_DISABLE=1`` in the environment silences it too).
        fast: False turns off all that :mod:`kdlib.gpu` does for speed; on a CPU that is nothing.

    Raises:
        FloatingPointError: the loss was infinite or not a number. It names the first such step.
        ValueError: the targets or the recipe do not fit the data, labels are missing, or the checkpoint is of another
            run; with several processes, the loss is not a mean over the images.
        IdentityError: with a checkpoint, if the objective cannot be identified by its content.
    """
    device = gpu.pick_device(device)
    if isinstance(targets, Targets):
        targets.check(data, recipe)
        targets = targets.to(device)
    check_labels(data, loss_fn, targets)
    data, validation = data.to(device), validation and validation.to(device)
    data.resolve_views(recipe.views)  # raises if there are not as many
    key = digest(fingerprint(model, data, loss_fn, recipe, targets)) if checkpoint else None
    batch_size = min(recipe.batch_size, len(data))
    engine = gpu.Engine(model.train(), device, data.example, batch_size=batch_size, fast=fast)
    momentum = {"momentum": recipe.momentum, "nesterov": recipe.momentum > 0}
    optimizer = engine.sgd(model, recipe.learning_rate, weight_decay=recipe.weight_decay, **momentum)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    run = Checkpoint(checkpoint, key, [generator], model=model, optimizer=optimizer, scaler=engine.scaler)
    history = History(**run.resume())
    loss_fn = checked_mean(loss_fn, data.labels)

    def step(batch: Batch) -> Tensor:
        student_logits = engine.forward(batch.images)
        if targets is None:
            loss = loss_fn(student_logits, batch.labels)
        else:
            teacher_logits = targets(batch)  # looked up in the soft labels, or asked of the live teacher
            loss = loss_fn(student_logits, teacher_logits, batch.labels)
        optimizer.zero_grad()
        engine.backward(loss)
        engine.scaler.step(optimizer)
        engine.scaler.update()
        return loss.detach()

    step = engine.record(step, optimizer, lambda: _identify_objective(loss_fn, targets))
    share = slice(None) if recipe.mixup else engine.share  # mixup blends an image with any other of the whole batch
    drawn = {"views": recipe.views, "generator": generator, "share": share}
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    steps = recipe.epochs * per_epoch
    start = time.perf_counter() - (history.seconds[-1] if history.seconds else 0)
    with run, progress_bar(recipe.epochs, progress, len(history.loss)) as bar, gpu.tuned_convolutions(device):
        for epoch in range(len(history.loss), recipe.epochs):
            model.train()
            # kept on the device and read once per epoch: a look every step would make the GPU wait for Python
            losses = torch.zeros(per_epoch, device=device)
            for i, batch in enumerate(batches(data, recipe.batch_size, **drawn)):
                # a step's learning rate is that of its middle, so that neither the first nor the last is zero
                learning_rate = recipe.learning_rate_at((epoch * per_epoch + i + 0.5) / steps)
                gpu.set_learning_rate(optimizer, learning_rate)
                losses[i] = step(augment(batch, recipe, data.classes, generator, engine))
            losses = engine.end_epoch(losses)
            _check_finite(losses, model, epoch, recipe)
            history.loss.append(losses.mean().item())
            if validation is not None:
                predicted = predict_logits(model, validation, device=device).argmax(1)
                history.accuracy.append((predicted == validation.labels.cpu()).double().mean().item())
            history.seconds.append(round(time.perf_counter() - start, 3))
            bar.set_postfix(history.last(), refresh=False)
            bar.update()
            run.save(asdict(history))
    return history


def load_or_train(
    folder: str | PathLike,
    file: str,
    network: str | Callable,
    data: ImageSet,
    loss_fn: Callable[..., Tensor],
    recipe: Recipe,
    *,
    targets: Targets | None = None,
    validation: ImageSet | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    fast: bool = True,
) -> Trained:
    """The network trained so, and what is known of it: loaded if `folder` holds just that, otherwise made and saved.

    What counts as *just that* is the :func:`fingerprint`. The arguments are those of :func:`train`, and `network` one
    that :func:`kdlib.build` takes.

    Raises:
        IdentityError: the network, the objective or the targets cannot be identified by their content.
        ValueError: the network does not take the images, or has another number of outputs than there are classes.
    """
    folder, device = Path(folder), gpu.pick_device(device)
    model = build(network, data.classes, data.channels, seed=recipe.seed)
    check_fits(model, data)
    made_from = fingerprint(network, data, loss_fn, recipe, targets, model=model)
    partial = (folder / file).with_suffix(f".{digest(made_from)}.partial")
    with artefacts.reserve(folder, file, made_from) as path:
        if path:
            artefacts.load_weights(path, model)
            remove_checkpoint(partial)  # of a run that was stopped when it had just saved its network
            known = artefacts.record(path)
            return Trained(model.to(device).eval(), History(**(known.get("history") or {})), known["fingerprint"], path)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        artefacts.check_room(folder / file, size)  # a full disk shows itself before the training, not after it
        options = {"validation": validation, "device": device, "progress": progress, "fast": fast}
        history = train(model, data, loss_fn, recipe, targets=targets, checkpoint=partial, **options)
        if identify(loss_fn) != made_from["loss_fn"]:
            raise IdentityError(
                f"loss_fn changed while {file} was trained, so nothing could tell what the weights were made from, and "
                "they were not saved: bind what it reads with functools.partial"
            )
        made = {"history": asdict(history), "provenance": artefacts.provenance(device, history.seconds[-1])}
        if not ranks.rank():
            artefacts.save_weights(folder / file, model, fingerprint=made_from, format=data.format, **made)
            remove_checkpoint(partial)  # not before: without it, what is not saved yet would be lost
    return Trained(model.eval(), history, made_from, folder / file)


def augment(batch: Batch, recipe: Recipe, classes: int, generator: torch.Generator, engine: gpu.Engine) -> Batch:
    """The batch after the recipe's cutout and mixup; its views are then None.

    With several processes, it comes with all its images if there is mixup, and leaves with `engine.share` of them.
    """
    if recipe.cutout:
        part = () if recipe.mixup else (engine.share, engine.batch_size)
        batch = batch._replace(images=cutout(batch.images, recipe.cutout, generator, *part), views=None)
    if recipe.mixup:
        batch = mixup(batch, recipe.mixup, classes, generator)
        batch = Batch(*(values if values is None else values[engine.share] for values in batch))
    return batch


def progress_bar(total: int, progress: bool, initial: int = 0, unit: str = "epoch") -> tqdm:
    """tqdm's bar, of rank 0; silent if `progress` is False, and with ``TQDM_DISABLE=1`` in the environment."""
    silent = {} if progress and not ranks.rank() else {"disable": True}  # False would overrule the environment
    return tqdm(total=total, initial=initial, unit=unit, leave=False, **silent)


def _identify_objective(loss_fn: Callable, targets: Callable | None) -> object:
    """What a step minimises; IdentityError if that may change during training."""
    if targets is not None and not type(targets).__module__.startswith("kdlib."):
        raise IdentityError("the targets are of your own making, and may change")
    return identify(loss_fn)


def _check_finite(losses: Tensor, model: nn.Module, epoch: int, recipe: Recipe) -> None:
    """FloatingPointError if a step of this epoch had a loss that is not finite, or the last one left such weights."""
    bad = (~losses.isfinite()).nonzero()
    if not len(bad) and all(parameter.isfinite().all() for parameter in model.parameters()):
        return
    step = epoch * len(losses) + (int(bad[0]) if len(bad) else len(losses) - 1)
    raise FloatingPointError(
        f"the loss stopped being finite at step {step} of {recipe.epochs * len(losses)} (epoch {epoch + 1}): lower the "
        f"learning rate ({recipe.learning_rate}), or lengthen the warm-up ({recipe.warmup}); nothing was saved over"
    )
