"""One training loop for the teacher, the student alone and the distilled student: only the loss differs."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdlib import artefacts
from kdlib.data import Batch, ImageSet, batches, cutout, draw_epoch, mixup, steps_per_epoch
from kdlib.models import (
    build,
    half_precision,
    mixed_precision,
    pick_device,
    predict_logits,
    quicker,
    tuned_convolutions,
)

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
    _check_views(data, recipe)
    if hasattr(loss_fn, "check"):
        loss_fn.check(data, recipe)
    if hasattr(loss_fn, "to"):
        loss_fn = loss_fn.to(device)
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    steps = recipe.epochs * per_epoch
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
    network = quicker(model.train(), device)

    def advance(batch: Batch) -> Tensor:
        with mixed_precision(device):
            logits = network(batch.images)
        loss = loss_fn(logits.float(), batch)
        loss = getattr(loss, "total", loss)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    if device.type == "cuda" and not scaler.is_enabled():
        advance = _Recorded(advance)
        optimizer.param_groups[0]["lr"] = torch.tensor(recipe.learning_rate, device=device)  # one that replays read
    start = time.perf_counter() - (history.seconds[-1] if history.seconds else 0)
    quiet = {} if progress else {"disable": True}  # left out where not needed, so that TQDM_DISABLE=1 is heard
    with (
        tqdm(total=recipe.epochs, initial=len(history.loss), unit="epoch", leave=False, **quiet) as bar,
        tuned_convolutions(device),
    ):
        for _ in range(len(history.loss), recipe.epochs):
            model.train()
            # kept on the device and read once an epoch: a look every step would make the GPU wait for Python
            losses = torch.zeros(per_epoch, device=device)
            for place, batch in enumerate(batches(data, recipe.batch_size, views=recipe.views, generator=generator)):
                # a step's learning rate is that of its middle, so that neither the first nor the last is zero
                _set_rate(optimizer, recipe.learning_rate_at((step + 0.5) / steps))
                losses[place] = advance(_augmented(batch, recipe, data.classes, generator))
                step += 1
            if not losses.isfinite().all():
                bad = step - per_epoch + int((~losses.isfinite()).nonzero()[0])
                raise FloatingPointError(
                    f"the loss stopped being finite at step {bad} of {steps} (epoch {len(history.loss) + 1}): lower "
                    f"the learning rate ({recipe.learning_rate}), or lengthen the warm-up ({recipe.warmup}); nothing "
                    "was saved over"
                )
            history.loss.append(losses.mean().item())
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


class _Recorded:
    """A training step on a GPU, recorded as one CUDA graph at its fourth call and replayed from then on.

    A small network's step is hundreds of kernels of a few microseconds each, and starting one from Python takes longer
    than running it. A replay starts them all at once. The first calls are ordinary steps: they let cuDNN choose,
    Triton compile and the optimiser make its buffers, none of which can be recorded. What cannot be recorded at all
    (a loss that looks at a value, say) goes on as ordinary steps, with a warning.
    """

    def __init__(self, step: Callable[[Batch], Tensor]):
        self.step, self.calls = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()  # recording is not allowed on the default one

    def __call__(self, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls == 4:
            self._record(batch)
        if self.graph is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        for place, value in zip(self.batch, batch, strict=True):
            if value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.loss

    def _record(self, batch: Batch) -> None:
        self.batch = Batch(*(value if value is None else value.clone() for value in batch))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.batch)
        except RuntimeError as error:
            warnings.warn(
                f"this training step cannot be recorded as a CUDA graph ({artefacts.short_reason(error)}): it goes on, "
                "more slowly, without; a loss_fn must not read values back to the CPU (.item(), print, if)",
                stacklevel=3,
            )
        else:
            self.graph = graph


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place, where the recorded step reads it
    else:
        group["lr"] = rate


def train_many(
    models: Sequence[nn.Module],
    data: ImageSet,
    loss_fns: Sequence[Callable[[Tensor, Batch], Tensor]],
    recipes: Sequence[Recipe],
    *,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[History]:
    """Train networks of one architecture side by side, in place, each as :func:`train` would alone.

    Small networks leave most of a processor idle: what a step costs is starting its operations, not computing them.
    Here the networks' tensors are stacked, and one operation serves them all (``torch.func.vmap``). Seeds, learning
    rates, weight decays and losses may differ; images are drawn for each seed as :func:`train` draws them.

    Args:
        models: of one architecture, without dropout.
        data: the training images, the same for all.
        loss_fns: one each: means over their batch. Networks whose losses describe themselves alike share one call.
        recipes: one each; they differ in seed, learning rate and weight decay only, without cutout and mixup.
        device: where to; the networks stay there.
        progress: show a bar.

    Returns:
        A history each; its loss is the mean over the networks with that loss.

    Raises:
        FloatingPointError: weights were infinite or not a number after an epoch. It says whose.
        ValueError: the lists do not fit each other, or a loss does not fit the data.
    """
    _check_side_by_side(models, loss_fns, recipes)
    device, recipe = pick_device(device), recipes[0]
    data = data.to(device)
    _check_views(data, recipe)
    groups: dict[str | int, list[int]] = {}
    for place, loss_fn in enumerate(loss_fns):
        if hasattr(loss_fn, "check"):
            loss_fn.check(data, recipe)
        key = artefacts.digest(loss_fn.describe()) if hasattr(loss_fn, "describe") else id(loss_fn)
        groups.setdefault(key, []).append(place)
    seeds = list(dict.fromkeys(own.seed for own in recipes))
    seed_of = torch.tensor([seeds.index(own.seed) for own in recipes], device=device)
    parts = [
        (loss_fn.to(device) if hasattr(loss_fn, "to") else loss_fn, torch.tensor(places, device=device))
        for loss_fn, places in ((loss_fns[places[0]], places) for places in groups.values())
    ]
    # on the device before they are stacked; a skeleton without weights stands for the architecture
    weights, buffers = torch.func.stack_module_state([model.to(device).train() for model in models])
    skeleton = copy.deepcopy(models[0]).to("meta")

    def answer(weights: dict, buffers: dict, images: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (weights, buffers), (images,))

    def each(name: str) -> Tensor:
        return torch.tensor([getattr(own, name) for own in recipes], device=device, dtype=torch.float32)

    shaped = {name: (-1, *[1] * (w.ndim - 1)) for name, w in weights.items()}
    rates, decays = each("learning_rate"), each("weight_decay")
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    steps, step = recipe.epochs * per_epoch, 0
    histories = [History() for _ in models]
    start = time.perf_counter()
    quiet = {} if progress else {"disable": True}  # left out where not needed, so that TQDM_DISABLE=1 is heard
    for _ in tqdm(range(recipe.epochs), unit="epoch", leave=False, **quiet):
        drawn = [draw_epoch(data, recipe.batch_size, views=recipe.views, generator=g) for g in generators]
        indices, views = (torch.stack(x, dim=1) for x in zip(*drawn, strict=True))  # (steps, S, B) each
        totals = torch.zeros(len(parts), device=device)
        for now in range(per_epoch):
            images = data.batch(indices[now].flatten(), views[now].flatten()).unflatten(0, indices.shape[1:])
            with mixed_precision(device):
                logits = torch.func.vmap(answer, randomness="error")(weights, buffers, images[seed_of]).float()
            total = torch.zeros((), device=device)
            for number, (loss_fn, places) in enumerate(parts):
                own = seed_of[places]
                which, view = indices[now][own].flatten(), views[now][own].flatten()
                batch = Batch(images[own].flatten(0, 1), data.labels[which], which, view)
                loss = loss_fn(logits[places].flatten(0, 1), batch)
                loss = getattr(loss, "total", loss)
                total = total + loss * len(places)  # a mean over their images: each network gets its own gradient
                totals[number] += loss.detach()
            gradients = torch.autograd.grad(total, list(weights.values()))
            rate = rates * (recipe.learning_rate_at((step + 0.5) / steps) / recipe.learning_rate)
            with torch.no_grad():  # SGD with Nesterov momentum, as torch.optim has it, with a rate for each network
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                    gradient = gradient.addcmul(weight, decays.view(shaped[name]))
                    torch.add(gradient, velocity[name], alpha=recipe.momentum, out=velocity[name])
                    ahead = gradient.add_(velocity[name], alpha=recipe.momentum)
                    weight.addcmul_(ahead, rate.view(shaped[name]), value=-1)
            step += 1
        for (_, places), loss in zip(parts, (totals / per_epoch).tolist(), strict=True):
            for place in places.tolist():
                histories[place].loss.append(loss)
                histories[place].seconds.append(round(time.perf_counter() - start, 3))
        sound = torch.stack([w.detach().flatten(1).isfinite().all(1) for w in weights.values()]).all(0)
        if not sound.all():
            lost = (~sound).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the weights of networks {lost} stopped being finite in epoch {len(histories[0].loss)}: lower their "
                f"learning rates ({[recipes[place].learning_rate for place in lost]}), or train without them"
            )
    for place, model in enumerate(models):
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                tensor.copy_((weights | buffers)[name][place])
        model.eval()
    return histories


def _check_views(data: ImageSet, recipe: Recipe) -> None:
    if (recipe.views or 1) > len(data.view_table):
        raise ValueError(
            f"views is {recipe.views}: expected at most {len(data.view_table)}, which is all that {data.name} has with "
            f"{data.padding} pixels of padding and flip={data.flip}, or None for all"
        )


def _check_side_by_side(models: Sequence[nn.Module], loss_fns: Sequence[Callable], recipes: Sequence[Recipe]) -> None:
    if not len(models) == len(loss_fns) == len(recipes) > 0:
        raise ValueError(
            f"{len(models)} models, {len(loss_fns)} loss_fns, {len(recipes)} recipes: expected as many of each, and at "
            "least one"
        )
    shapes = [{name: w.shape for name, w in model.state_dict().items()} for model in models]
    if odd := [place for place, shape in enumerate(shapes) if shape != shapes[0]]:
        raise ValueError(
            f"the models {odd} are of another architecture than the first ({type(models[0]).__name__}): expected one "
            "architecture; call train_many once for each"
        )
    free = {"learning_rate": 1.0, "weight_decay": 0.0, "seed": 0}
    if odd := [place for place, own in enumerate(recipes) if replace(own, **free) != replace(recipes[0], **free)]:
        raise ValueError(
            f"the recipes {odd} differ from the first in more than {', '.join(free)}: expected the same {recipes[0]}; "
            "call train_many once for each"
        )
    if recipes[0].cutout or recipes[0].mixup:
        raise ValueError(
            f"cutout is {recipes[0].cutout}, mixup is {recipes[0].mixup}: expected neither; train such networks with "
            "train, one at a time"
        )


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
