"""Training and measuring many students over a row store, and the search for their learning rates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.data import ImageSet
from kdlib.evaluate import agreement, predict_logits, scores
from kdlib.lab.batched import train_many
from kdlib.lab.rows import Job, RowStore
from kdlib.models import build, network_name
from kdlib.soft_labels import LiveTeacher
from kdlib.train import Recipe, fingerprint, train


@dataclass(frozen=True)
class TrainingSetup:
    """One way to train a network, whatever the seed."""

    network: str | Callable[[int, int], nn.Module]  # as kdlib.build takes it
    data: ImageSet  # the training images
    loss_fn: Callable[..., Tensor]  # as kdlib.train takes it
    recipe: Recipe  # its seed is ignored
    targets: Callable[[int], Callable] | None = None  # seed -> targets: another teacher for each seed, or the same


def train_setups(
    store: RowStore,
    setups: Mapping[str, TrainingSetup],
    seeds: Sequence[int],
    measured_on: Mapping[str, ImageSet],
    *,
    teacher: nn.Module | None = None,
    batched: bool = False,
) -> dict[str, list[dict]]:
    """Train a student for each setup and seed, and measure it: one row each, those in the store excepted.

    Args:
        setups: ``case -> setup``.
        measured_on: ``split -> images``. On ``"test"`` the measures are called accuracy, nll and ece; on any other
            split its name stands before them: "validation accuracy".
        teacher: whose agreement with the students is measured too.
        batched: train what is missing as one batched program per architecture. It changes the time that small networks
            take on a CPU, and nothing else. What cannot be trained so (mixup, cutout) is trained alone.

    Returns:
        ``case -> rows``, one row per seed. A student whose training diverged counts as one with equal logits for every
        image; its measure "diverged" is 1, that of the others 0.

    Raises:
        ValueError: a recipe, or targets, do not fit the data.
        TypeError: a network, loss or targets cannot be identified, so that nothing could tell their rows from others.
    """
    measured = {"measured on": {split: images.identity for split, images in measured_on.items()}}
    measured |= {"agreement with": LiveTeacher(teacher).identity} if teacher else {}
    wanted = {
        (case, seed): fingerprint(s.network, s.data, s.loss_fn, replace(s.recipe, seed=seed), _targets(s, seed))
        | measured
        for case, s in setups.items()
        for seed in seeds
    }

    @functools.cache
    def teacher_logits() -> dict[str, Tensor]:
        return {split: predict_logits(teacher, images) for split, images in measured_on.items()} if teacher else {}

    def run(jobs: list[Job]) -> list[dict]:
        models = _train([setups[case] for case, _ in jobs], [seed for _, seed in jobs])
        return [_measures(model, measured_on, teacher_logits()) for model in models]

    rows = store.measure_all(wanted, run, group=functools.partial(_programs, setups) if batched else None)
    return {case: [rows[case, seed] for seed in seeds] for case in setups}


def search_rate(
    store: RowStore,
    setups: Mapping[str, TrainingSetup],
    rates: Sequence[float],
    seeds: Sequence[int],
    validation: ImageSet,
    *,
    beyond: int = 2,
    batched: bool = False,
) -> dict[str, dict[float, float]]:
    """Mean validation accuracy of each setup at each learning rate, in ascending order of the rates.

    All get the same list. If the best rate is the first or the last of it, the search goes on beyond that end by the
    same factor, up to `beyond` times.

    Args:
        setups: ``name -> setup``; the learning rates of their recipes are ignored.
        rates: tried first, in ascending order.
        seeds: to train with, none of those that are reported.
        validation: the images that decide.
        batched: as for :func:`train_setups`.

    Returns:
        ``name -> rate -> accuracy``, fractions of 1.
    """
    tried: dict[str, dict[float, float]] = {name: {} for name in setups}
    to_try = dict.fromkeys(setups, tuple(rates))
    for _ in range(beyond + 1):
        trials = {f"search: {name}, rate {rate:g}": (name, rate) for name, more in to_try.items() for rate in more}
        at_rate = {
            case: replace(setups[name], recipe=replace(setups[name].recipe, learning_rate=rate))
            for case, (name, rate) in trials.items()
        }
        rows = train_setups(store, at_rate, seeds, {"validation": validation}, batched=batched)
        for case, (name, rate) in trials.items():
            tried[name][rate] = float(np.mean([row["validation accuracy"] for row in rows[case]]))
        tried = {name: dict(sorted(by_rate.items())) for name, by_rate in tried.items()}
        to_try = {name: _next_rate(by_rate) for name, by_rate in tried.items() if _next_rate(by_rate)}
    return tried


def _targets(setup: TrainingSetup, seed: int) -> Callable | None:
    return setup.targets(seed) if setup.targets else None


def _programs(setups: Mapping[str, TrainingSetup], jobs: list[Job]) -> list[list[Job]]:
    """The jobs (case, seed) in groups that `train_many` can train at once."""
    groups: dict[tuple, list[Job]] = {}
    for case, seed in jobs:
        setup = setups[case]
        alone = (case, seed) if setup.recipe.mixup or setup.recipe.cutout else ()
        shared = replace(setup.recipe, seed=0, learning_rate=1.0, weight_decay=0.0)
        groups.setdefault((setup.network, id(setup.data), shared, *alone), []).append((case, seed))
    return list(groups.values())


def _train(setups: Sequence[TrainingSetup], seeds: Sequence[int]) -> list[nn.Module | None]:
    """A trained network for each setup and seed; None for one that diverged."""
    data = setups[0].data
    models = [build(x.network, data.classes, data.channels, seed=s) for x, s in zip(setups, seeds, strict=True)]
    targets = [_targets(x, s) for x, s in zip(setups, seeds, strict=True)]
    recipes = [replace(x.recipe, seed=s) for x, s in zip(setups, seeds, strict=True)]
    try:
        if len(models) > 1:
            train_many(models, data, [x.loss_fn for x in setups], recipes, targets=targets)
        else:
            train(models[0], data, setups[0].loss_fn, recipes[0], targets=targets[0])
    except FloatingPointError as error:
        if len(models) == 1:
            print(f"{network_name(setups[0].network)}, seed {seeds[0]}: {error}")
            return [None]
        half = len(models) // 2  # which of them diverged?
        return _train(setups[:half], seeds[:half]) + _train(setups[half:], seeds[half:])
    return list(models)


def _measures(model: nn.Module | None, measured_on: Mapping[str, ImageSet], teacher_logits: Mapping) -> dict:
    measures: dict[str, object] = {"diverged": float(model is None)}
    for split, images in measured_on.items():
        prefix = "" if split == "test" else f"{split} "
        labels = images.labels.cpu()
        logits = torch.zeros(len(images), images.classes) if model is None else predict_logits(model, images)
        result = scores(logits, labels)
        correct = logits.argmax(1) == labels
        measures |= {f"{prefix}accuracy": correct, f"{prefix}nll": result.nll, f"{prefix}ece": result.ece}
        if split in teacher_logits:
            measures[f"{prefix}agreement"] = agreement(logits, teacher_logits[split])
    return measures


def _next_rate(by_rate: Mapping[float, float]) -> tuple[float, ...]:
    """The rate beyond the end of the list where the best one is; none if the best one is inside."""
    rates = list(by_rate)  # ascending
    best = max(by_rate, key=by_rate.__getitem__)
    if len(rates) > 1 and best == rates[-1]:
        return (rates[-1] ** 2 / rates[-2],)
    if len(rates) > 1 and best == rates[0]:
        return (rates[0] ** 2 / rates[1],)
    return ()
