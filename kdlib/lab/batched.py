"""Many small networks trained as one program: where a network alone leaves most of a processor idle."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib import gpu
from kdlib.checks.fits import check_labels
from kdlib.checks.means import check_mean
from kdlib.data import Batch, ImageSet, Targets, draw_epoch, steps_per_epoch
from kdlib.losses import at_least_float32
from kdlib.records import identity
from kdlib.records.checkpoint import Checkpoint
from kdlib.records.identity import IdentityError, digest, identify
from kdlib.train import History, Recipe, progress_bar


def train_many(
    models: Sequence[nn.Module],
    data: ImageSet,
    loss_fns: Sequence[Callable[..., Tensor]],
    recipes: Sequence[Recipe],
    *,
    targets: Sequence[Callable[[Batch], Tensor] | None] | None = None,
    checkpoint: Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[History]:
    """Train networks of one architecture as one batched program, in place, each as :func:`kdlib.train` would alone.

    Most of the cost of a small network's step is starting its operations, not computing them. Here the networks'
    tensors are stacked, and one operation serves them all (``torch.func.vmap``). Seeds, learning rates, weight decays,
    losses and targets may differ; images are drawn for each seed as :func:`kdlib.train` draws them.

    Args:
        models: of one architecture, without dropout.
        data: the training images, the same for all.
        loss_fns: one per model, each a mean over its images. Networks with the same loss share one call.
        recipes: one per model; they differ in seed, learning rate and weight decay only, without cutout and mixup.
        targets: one per model, None for those that learn from the labels alone; None if all do.
        checkpoint: the unfinished program's file, as for :func:`kdlib.train`; delete it when the networks are saved.
        device: the networks stay there. On a GPU without bfloat16 they are trained in float32.
        progress: show a bar.

    Returns:
        One history per model; its loss is the mean over the networks with the same loss.

    Raises:
        FloatingPointError: weights were infinite or not a number after an epoch. It says whose.
        IdentityError: with a checkpoint, if a loss or targets cannot be identified by their content.
        ValueError: the lists do not fit each other, targets do not fit the data, labels are missing, or the checkpoint
            is of another program.
    """
    targets = targets if targets is not None else [None] * len(models)
    _check(models, loss_fns, recipes, targets)
    if blends(data):
        raise ValueError(
            f"{data.name} has mixup among its views, whose labels are blends: train such networks with train, one at a "
            "time"
        )
    device, recipe = gpu.pick_device(device), recipes[0]
    data = data.to(device)
    data.resolve_views(recipe.views)
    seeds = list(dict.fromkeys(r.seed for r in recipes))
    seed_of = torch.tensor([seeds.index(r.seed) for r in recipes], device=device)
    objectives = list(zip(loss_fns, targets, strict=True))
    for loss_fn, one in objectives:
        check_labels(data, loss_fn, one)
        if isinstance(one, Targets):
            one.check(data, recipe)
    known = {number: _identity(x) for number, x in {id(x): x for pair in objectives for x in pair}.items()}
    key = _key(models, data, objectives, recipes, known) if checkpoint else None
    groups = []  # (loss_fn, which models, [(their targets, which models have these)])
    for members in _same([(known[id(x)], own is None) for x, own in objectives]):
        parts = [[members[k] for k in part] for part in _same([known[id(targets[k])] for k in members])]
        shared = [targets[part[0]] for part in parts]
        shared = [target.to(device) if isinstance(target, Targets) else target for target in shared]
        members = [k for part in parts for k in part]
        numbered = [torch.tensor(part, device=device) for part in (members, *parts)]
        groups.append((loss_fns[members[0]], numbered[0], list(zip(shared, numbered[1:], strict=True))))
    # on the device before they are stacked; a skeleton without weights stands for the architecture
    weights, buffers = torch.func.stack_module_state([model.to(device).train() for model in models])
    skeleton = copy.deepcopy(models[0]).to("meta")

    def forward(weights: dict, buffers: dict, images: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, (weights, buffers), (images,))

    def per_model(name: str) -> Tensor:
        return torch.tensor([getattr(r, name) for r in recipes], device=device, dtype=dtype)

    def batch_of(members: Tensor, images: Tensor, now: int) -> Batch:  # what those models see, one after the other
        own = seed_of[members]
        chosen, seen = indices[now][own].flatten(), views[now][own].flatten()
        return Batch(images[own].flatten(0, 1), data.labels[chosen], chosen, seen)

    dtype = at_least_float32(next(iter(weights.values()))).dtype
    shaped = {name: (-1, *[1] * (w.ndim - 1)) for name, w in weights.items()}
    rates, decays = per_model("learning_rate"), per_model("weight_decay")
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    run = Checkpoint(checkpoint, key, generators, tensors=_Tensors(weights | buffers), velocity=_Tensors(velocity))
    histories = [History(**own) for own in run.resume().get("networks", [{} for _ in models])]
    done = len(histories[0].loss)
    per_epoch = steps_per_epoch(data, recipe.batch_size)
    steps, step = recipe.epochs * per_epoch, done * per_epoch
    start = time.perf_counter() - (histories[0].seconds[-1] if done else 0)
    with run, progress_bar(recipe.epochs, progress, done) as bar:
        for _ in range(done, recipe.epochs):
            drawn = [draw_epoch(data, recipe.batch_size, views=recipe.views, generator=g) for g in generators]
            indices, views = (torch.stack(x, dim=1) for x in zip(*drawn, strict=True))  # (steps, S, B) each
            totals = torch.zeros(len(groups), device=device, dtype=dtype)
            for now in range(per_epoch):
                images = data.batch(indices[now].flatten(), views[now].flatten()).unflatten(0, indices.shape[1:])
                with _precision(device):
                    logits = torch.func.vmap(forward, randomness="error")(weights, buffers, images[seed_of])
                logits = at_least_float32(logits)
                total = torch.zeros((), device=device, dtype=dtype)
                for number, (loss_fn, members, parts) in enumerate(groups):
                    student_logits, labels = logits[members].flatten(0, 1), data.labels[indices[now][seed_of[members]]]
                    given = [student_logits, labels.flatten()]
                    if parts[0][0] is not None:
                        given.insert(1, torch.cat([shared(batch_of(part, images, now)) for shared, part in parts]))
                    loss = loss_fn(*given)
                    if len(members) > 1 and not now and not histories[0].loss:
                        _check_mean(loss_fn, loss, given, len(members))
                    total = total + loss * len(members)  # a mean over their images: each network gets its own gradient
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
            for (_, members, _), loss in zip(groups, (totals / per_epoch).tolist(), strict=True):
                for member in members.tolist():
                    histories[member].loss.append(loss)
                    histories[member].seconds.append(round(time.perf_counter() - start, 3))
            finite = torch.stack([w.detach().flatten(1).isfinite().all(1) for w in weights.values()]).all(0)
            if not finite.all():
                diverged = (~finite).nonzero().flatten().tolist()
                raise FloatingPointError(
                    f"the weights of networks {diverged} stopped being finite in epoch {len(histories[0].loss)}: lower "
                    f"their learning rates ({[recipes[k].learning_rate for k in diverged]}), or train without them"
                )
            bar.update()
            run.save({"networks": [asdict(history) for history in histories]})
    for k, model in enumerate(models):
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                tensor.copy_((weights | buffers)[name][k])
        model.eval()
    return histories


class _Tensors(dict):
    """Tensors by name, as a part of a checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.items():
            tensor.copy_(state[name])


def _content(thing: object) -> str:
    """The digest of what a loss or targets are by content; IdentityError if it cannot be known."""
    return digest(thing.identity if isinstance(thing, Targets) else identify(thing))


def _identity(thing: object) -> str | int:
    """The same, and of what cannot be known so, its number."""
    try:
        return _content(thing)
    except IdentityError:
        return id(thing)


def _key(models: Sequence, data: ImageSet, objectives: Sequence[tuple], recipes: Sequence[Recipe], known: dict) -> str:
    """What the program is: what the networks' fingerprints hold, each part of which is identified once."""
    for thing in (thing for pair in objectives for thing in pair):
        if isinstance(known[id(thing)], int):
            _content(thing)  # raises, and says why
    objectives = [(known[id(loss_fn)], known[id(own)]) for loss_fn, own in objectives]
    weights = [identity.weights(model) for model in models]
    return digest([identity.network(models[0]), data.identity, weights, objectives, list(map(asdict, recipes))])


def _check_mean(loss_fn: Callable, loss: Tensor, given: Sequence[Tensor], members: int) -> None:
    """ValueError if the loss of all networks' images together is not the mean of the networks' own losses."""
    with torch.no_grad():
        own = torch.stack([loss_fn(*part) for part in zip(*(rows.chunk(members) for rows in given), strict=True)])
    advice = "train with kdlib.train, one at a time, if the loss compares the images of a batch"
    check_mean(loss, own.mean(), f"{members} networks", advice)


def _same(things: Sequence) -> list[list[int]]:
    """The places at which a list holds the same."""
    groups: dict[object, list[int]] = {}
    for number, thing in enumerate(things):
        groups.setdefault(thing, []).append(number)
    return list(groups.values())


def _precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16; float16 would need the loss to be scaled, for each network by another factor."""
    return contextlib.nullcontext() if gpu.half_precision(device) == torch.float16 else gpu.mixed_precision(device)


def blends(data: ImageSet) -> bool:
    """Whether views of these images are blends of two, as those of :class:`kdlib.scale.SeededViews` may be."""
    return bool(getattr(getattr(data, "views", None), "mixup", False))


def _check(models: Sequence, loss_fns: Sequence, recipes: Sequence[Recipe], targets: Sequence) -> None:
    if not len(models) == len(loss_fns) == len(recipes) == len(targets) > 0:
        raise ValueError(
            f"{len(models)} models, {len(loss_fns)} loss_fns, {len(recipes)} recipes, {len(targets)} targets: expected "
            "as many of each, and at least one"
        )
    kinds = [(repr(model), {name: w.shape for name, w in model.state_dict().items()}) for model in models]
    if odd := [k for k, kind in enumerate(kinds) if kind != kinds[0]]:
        raise ValueError(
            f"the models {odd} are of another architecture than the first ({type(models[0]).__name__}): expected one "
            "architecture; call train_many once for each"
        )
    free = {"learning_rate": 1.0, "weight_decay": 0.0, "seed": 0}
    if odd := [k for k, r in enumerate(recipes) if replace(r, **free) != replace(recipes[0], **free)]:
        raise ValueError(
            f"the recipes {odd} differ from the first in more than {', '.join(free)}: expected the same {recipes[0]}; "
            "call train_many once for each"
        )
    if recipes[0].cutout or recipes[0].mixup:
        raise ValueError(
            f"cutout is {recipes[0].cutout}, mixup is {recipes[0].mixup}: expected neither; train such networks with "
            "train, one at a time"
        )
