"""Training and measuring many students over a row store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib.data import ImageSet, Targets
from kdlib.evaluate import agreement, predict_logits, scores
from kdlib.lab.batched import blends, train_many
from kdlib.lab.rows import Job, RowStore
from kdlib.models import NETWORKS, build, network_name
from kdlib.published import Network
from kdlib.soft_labels import LiveTeacher
from kdlib.train import Recipe, fingerprint, train

AT_ONCE = 32  # networks in one program: more are no faster, and none is measured before all of them are trained


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
    teachers: Mapping[int, Network] | None = None,
    batched: bool = False,
) -> dict[str, list[dict]]:
    """Train a student for each setup and seed, and measure it: one row each, those in the store excepted.

    A training that was interrupted goes on from its checkpoint, which lies beside the store until the rows are saved.

    Args:
        setups: ``case -> setup``.
        measured_on: ``split -> images``. On ``"test"`` the measures are called accuracy, nll and ece; on any other
            split its name stands before them: "validation accuracy". Which images were classified correctly is kept of
            the test images only.
        teachers: by seed; if given, each student's agreement with the teacher of its seed is measured too.
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
    agreed = {seed: LiveTeacher(teachers[seed].model).identity for seed in seeds} if teachers else {}
    wanted = {}
    for case, setup in setups.items():
        known: dict = {}
        for seed in seeds:
            more = {"agreement with": agreed[seed]} if teachers else {}
            wanted[case, seed] = _made_from(setup, seed, known) | measured | more

    def run(jobs: list[Job], partial: Path) -> list[dict]:
        models = _train([setups[case] for case, _ in jobs], [seed for _, seed in jobs], partial)
        return [
            _measures(model, measured_on, teachers[seed].logits if teachers else None)
            for model, (_, seed) in zip(models, jobs, strict=True)
        ]

    rows = store.measure_all(wanted, run, group=functools.partial(_programs, setups) if batched else None)
    return {case: [rows[case, seed] for seed in seeds] for case in setups}


def _made_from(setup: TrainingSetup, seed: int, known: dict) -> dict:
    """What decides the outcome of a setup with that seed.

    The same as :func:`kdlib.train.fingerprint`, which reads the code of network and loss: for one of kdlib's networks
    by name that is the same for all seeds, and is kept in `known`.
    """
    recipe, targets = replace(setup.recipe, seed=seed), _targets(setup, seed)
    if not known or setup.network not in list(NETWORKS) or not isinstance(targets, Targets | None):
        known.update(fingerprint(setup.network, setup.data, setup.loss_fn, recipe, targets))
    changing = {"recipe": asdict(recipe), "targets": targets.identity if targets else None}
    return dict(known) | changing


def _targets(setup: TrainingSetup, seed: int) -> Targets | None:
    return setup.targets(seed) if setup.targets else None


def _programs(setups: Mapping[str, TrainingSetup], jobs: list[Job]) -> list[list[Job]]:
    """The jobs (case, seed) in groups that `train_many` can train at once."""
    groups: dict[tuple, list[Job]] = {}
    for case, seed in jobs:
        setup = setups[case]
        alone = (case, seed) if setup.recipe.mixup or setup.recipe.cutout or blends(setup.data) else ()
        shared = replace(setup.recipe, seed=0, learning_rate=1.0, weight_decay=0.0)
        groups.setdefault((setup.network, id(setup.data), shared, *alone), []).append((case, seed))
    return [group[k : k + AT_ONCE] for group in groups.values() for k in range(0, len(group), AT_ONCE)]


def _train(setups: Sequence[TrainingSetup], seeds: Sequence[int], partial: Path) -> list[nn.Module | None]:
    """A trained network for each setup and seed; None for one that diverged. `partial` is their checkpoint."""
    data = setups[0].data
    models = [build(x.network, data.classes, data.channels, seed=s) for x, s in zip(setups, seeds, strict=True)]
    targets = [_targets(x, s) for x, s in zip(setups, seeds, strict=True)]
    recipes = [replace(x.recipe, seed=s) for x, s in zip(setups, seeds, strict=True)]
    try:
        if len(models) > 1:
            train_many(models, data, [x.loss_fn for x in setups], recipes, targets=targets, checkpoint=partial)
        else:
            train(models[0], data, setups[0].loss_fn, recipes[0], targets=targets[0], checkpoint=partial)
    except FloatingPointError as error:
        if len(models) == 1:
            print(f"{network_name(setups[0].network)}, seed {seeds[0]}: {error}")
            return [None]
        half = len(models) // 2  # which of them diverged?
        first, second = (partial.with_suffix(f".{k}.partial") for k in (1, 2))
        return _train(setups[:half], seeds[:half], first) + _train(setups[half:], seeds[half:], second)
    return list(models)


def _measures(
    model: nn.Module | None, measured_on: Mapping[str, ImageSet], teacher_logits: Mapping[str, Tensor] | None
) -> dict:
    measures: dict[str, object] = {"diverged": float(model is None)}
    for split, images in measured_on.items():
        prefix = "" if split == "test" else f"{split} "
        labels = images.labels.cpu()
        logits = torch.zeros(len(images), images.classes) if model is None else predict_logits(model, images)
        result = scores(logits, labels)
        correct = logits.argmax(1) == labels if split == "test" else result.accuracy
        measures |= {f"{prefix}accuracy": correct, f"{prefix}nll": result.nll, f"{prefix}ece": result.ece}
        if teacher_logits is not None:
            measures[f"{prefix}agreement"] = agreement(logits, teacher_logits[split])
    return measures
