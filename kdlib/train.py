"""One training loop for the teacher, the student alone and the distilled student: only the loss differs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdlib import artefacts
from kdlib.data import Batch, ImageSet, batches, cutout, mixup, steps_per_epoch
from kdlib.models import build, half_precision, mixed_precision, pick_device, predict_logits

CHECKPOINT_SECONDS = 60  # at least so long between two checkpoints of a long run


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: all that is not the data, the network or the loss. Vary it with ``replace``.

    Raises:
        ValueError: at construction, where a value is out of range.
    """

    epochs: int  # passes over the training images
    batch_size: int  # images a step
    learning_rate: float  # at its peak
    momentum: float = 0.9  # of SGD, Nesterov's form; 0 is plain SGD
    weight_decay: float = 5e-4  # on every parameter, per step and unit of learning rate
    warmup: float = 0.1  # share of the steps in which the learning rate rises from zero; then a half cosine to zero
    views: int | None = None  # how many views an image is drawn in, the clean one first; None: all there are
    cutout: int = 0  # side of the square set to the mean, pixels; 0: none
    mixup: float = 0.0  # strength of mixup, the parameter of a Beta distribution; 0: none
    seed: int = 0  # of the initial weights, the order and the views

    def __post_init__(self):
        for name, least in {"epochs": 1, "batch_size": 1, "cutout": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: expected a whole number of at least {least}")
        if self.views is not None and (not isinstance(self.views, int) or self.views < 1):
            raise ValueError(f"views is {self.views!r}: expected a whole number of at least 1, or None for all views")
        if not self.learning_rate > 0 or not math.isfinite(self.learning_rate):
            raise ValueError(f"learning_rate is {self.learning_rate!r}: expected a number above 0")
        for name, below in {"momentum": 1, "warmup": 1}.items():
            if not 0 <= getattr(self, name) < below:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a number from 0 to below {below}")
        for name in ("weight_decay", "mixup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a number of at least 0")

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate after that share (0 to 1) of the steps: a linear warm-up, then half a cosine to zero."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


@dataclass
class History:
    """What training went through: one value an epoch."""

    loss: list[float] = field(default_factory=list)  # mean over the epoch's steps, nats
    accuracy: list[float] = field(default_factory=list)  # on the validation images, a fraction of 1; empty without
    seconds: list[float] = field(default_factory=list)  # since the start, validation included


class Trained(NamedTuple):
    """A trained network, in eval mode, and what is known of it."""

    model: nn.Module
    history: History
    fingerprint: dict  # what it was made from
    path: Path  # its weights


def train(
    model: nn.Module,
    data: ImageSet,
    loss_fn: Callable[[Tensor, Batch], Tensor],
    recipe: Recipe,
    *,
    validation: ImageSet | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place: SGD with Nesterov momentum, a warm-up and a cosine, in half precision on a GPU.

    Args:
        model: any network from (B, C, H, W) images to (B, classes) logits; moved to `device`.
        data: the training images.
        loss_fn: ``(logits, batch) -> loss``, a scalar or a :class:`kdlib.losses.DistillationLoss`. Where it has a
            method ``check(data, recipe)``, that is called before the first step.
        validation: its accuracy is measured after every epoch. Nothing is chosen by it here.
        checkpoint: where an unfinished run is kept, at most once a minute; found there, it goes on. Removed at the end.
        progress: show a bar with the epoch, the loss, the validation accuracy and the time left; ``TQDM_DISABLE=1`` in
            the environment silences it too.

    Raises:
        FloatingPointError: the loss was infinite or not a number. It names the first such step.
        ValueError: the loss does not fit the data, or the checkpoint is of another run.
    """
    device = pick_device(device)
    model.to(device, memory_format=torch.channels_last)
    data, validation = data.to(device), validation and validation.to(device)
    if (recipe.views or 1) > len(data.view_table):
        raise ValueError(
            f"views is {recipe.views}: expected at most {len(data.view_table)}, which is all that {data.name} has with "
            f"{data.padding} pixels of padding and flip={data.flip}, or None for all"
        )
    if hasattr(loss_fn, "check"):
        loss_fn.check(data, recipe)
    if hasattr(loss_fn, "to"):
        loss_fn = loss_fn.to(device)
    steps = recipe.epochs * steps_per_epoch(data, recipe.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=half_precision(device) == torch.float16)
    generator = torch.Generator(device).manual_seed(recipe.seed)
    history, step = History(), 0
    key = artefacts.digest(run_fingerprint(data, loss_fn, recipe)) if checkpoint else None
    run = _Checkpoint(checkpoint, key, model, optimizer, scaler, generator)
    history, step = run.resume(history, step)
    start = time.perf_counter() - (history.seconds[-1] if history.seconds else 0)
    quiet = {} if progress else {"disable": True}  # left out where not needed, so that TQDM_DISABLE=1 is heard
    with tqdm(total=recipe.epochs, initial=len(history.loss), unit="epoch", leave=False, **quiet) as bar:
        for _ in range(len(history.loss), recipe.epochs):
            model.train()
            total, count = torch.zeros((), device=device), 0
            first_bad = torch.full((), -1, device=device)
            for batch in batches(data, recipe.batch_size, views=recipe.views, generator=generator):
                batch = _augmented(batch, recipe, data.classes, generator)
                # a step's learning rate is that of its middle, so that neither the first nor the last is zero
                optimizer.param_groups[0]["lr"] = recipe.learning_rate_at((step + 0.5) / steps)
                with mixed_precision(device):
                    logits = model(batch.images)
                loss = loss_fn(logits.float(), batch)
                loss = getattr(loss, "total", loss)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                # kept on the device and read once an epoch: a look every step would make the GPU wait for Python
                total += loss.detach()
                first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss), step, first_bad)
                step, count = step + 1, count + 1
            if (bad := int(first_bad)) >= 0:
                raise FloatingPointError(
                    f"the loss stopped being finite at step {bad} of {steps} (epoch {len(history.loss) + 1}): lower "
                    f"the learning rate ({recipe.learning_rate}), or lengthen the warm-up ({recipe.warmup}); nothing "
                    "was saved over"
                )
            history.loss.append(float(total) / count)
            if validation is not None:
                guessed = predict_logits(model, validation, device=device).argmax(1)
                history.accuracy.append((guessed == validation.labels.cpu()).double().mean().item())
                bar.set_postfix(loss=f"{history.loss[-1]:.4f}", validation=f"{history.accuracy[-1]:.2%}", refresh=False)
            else:
                bar.set_postfix(loss=f"{history.loss[-1]:.4f}", refresh=False)
            history.seconds.append(round(time.perf_counter() - start, 3))
            bar.update()
            run.keep(history, step)
    run.remove()
    return history


def load_or_train(
    folder: Path,
    file: str,
    network: str,
    data: ImageSet,
    loss_fn: Callable[[Tensor, Batch], Tensor],
    recipe: Recipe,
    *,
    validation: ImageSet | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Trained:
    """The network trained so, and what is known of it: loaded where `folder` holds just that, otherwise made and saved.

    What counts as *just that* is the fingerprint: the content of the data, the network, the loss and what it was
    distilled from, and the recipe with its seed. The rest is as in :func:`train`.
    """
    device = pick_device(device)
    model = build(network, data.classes, data.channels, seed=recipe.seed)
    fingerprint = {"network": network, **run_fingerprint(data, loss_fn, recipe)}
    if path := artefacts.find(folder, file, fingerprint):
        artefacts.load_weights(path, model)
        return Trained(model.to(device).eval(), History(**artefacts.record(path)["history"]), fingerprint, path)
    artefacts.check_writable(folder)  # shows itself before the training, not after it
    partial = (folder / file).with_suffix(f".{artefacts.digest(fingerprint)}.partial")
    history = train(
        model,
        data,
        loss_fn,
        recipe,
        validation=validation,
        checkpoint=partial,
        device=device,
        progress=progress,
    )
    known = {"history": asdict(history), "provenance": artefacts.provenance(device, history.seconds[-1])}
    artefacts.save_weights(folder / file, model, fingerprint=fingerprint, **known)
    return Trained(model.eval(), history, fingerprint, folder / file)


def run_fingerprint(data: ImageSet, loss_fn: Callable, recipe: Recipe) -> dict:
    """What decides the outcome of a training run beside the network, as a JSON-able dict."""
    if not hasattr(loss_fn, "describe"):
        raise TypeError(
            f"loss_fn {loss_fn!r} has no describe(): without it a saved run cannot be told from one with another loss; "
            "give it a method that returns its settings as a dict, or call train without a checkpoint"
        )
    return {"data": f"{data.name} {data.fingerprint}", "objective": loss_fn.describe(), "recipe": asdict(recipe)}


def _augmented(batch: Batch, recipe: Recipe, classes: int, generator: torch.Generator) -> Batch:
    if recipe.cutout:
        batch = batch._replace(images=cutout(batch.images, recipe.cutout, generator), views=None)
    if recipe.mixup:
        batch = mixup(batch, recipe.mixup, classes, generator)
    return batch


class _Checkpoint:
    """An unfinished run in a file: all that decides how it goes on."""

    def __init__(self, path: Path | None, key: str | None, model, optimizer, scaler, generator):
        self.path, self.key = path, key
        self.parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        self.generator, self.kept_at = generator, time.perf_counter()

    def resume(self, history: History, step: int) -> tuple[History, int]:
        if self.path is None or not self.path.exists():
            return history, step
        try:
            state = torch.load(self.path, weights_only=True)
            if state["key"] != self.key:
                raise ValueError("it is of a run with other data, another loss or another recipe")
            for name, part in self.parts.items():  # raises where it is of another network
                part.load_state_dict(state[name])
        except Exception as error:
            raise ValueError(
                f"{self.path} is not a checkpoint of this run ({artefacts.short_reason(error)}): move it away to start "
                "afresh"
            ) from error
        self.generator.set_state(state["generator"].cpu())
        return History(**{f.name: state[f.name] for f in fields(History)}), state["step"]

    def keep(self, history: History, step: int) -> None:
        if self.path is None or time.perf_counter() - self.kept_at < CHECKPOINT_SECONDS:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"key": self.key, "generator": self.generator.get_state(), "step": step, **asdict(history)}
        with artefacts.written_whole(self.path) as partial:
            torch.save(state, partial)
        self.kept_at = time.perf_counter()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
