"""Teachers for part two: one for each seed, so that the luck of a single teacher is not taken for a finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.data import Data, ImageSet
from kdlib.evaluate import file_megabytes
from kdlib.models import network_name
from kdlib.profiles import Profile
from kdlib.published import Logits, Network, load_teacher
from kdlib.records import artefacts
from kdlib.soft_labels import SoftLabels, load_or_generate
from kdlib.train import Recipe, load_or_train


def teachers(
    settings: Profile,
    data: Data,
    *,
    network: str | Callable[[int, int], nn.Module] | None = None,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    recipe: Recipe | None = None,
    targets: Callable[[int], Callable] | None = None,
    name: str | None = None,
    images: ImageSet | None = None,
) -> dict[int, Network]:
    """A teacher for each of ``settings.seeds`` and ``settings.search_seeds``: trained, or loaded if it was before.

    If the profile has no teachers of their own (``own_teachers``), all seeds share the one of the first seed.

    Args:
        network, recipe: by default the profile's. The recipe's seed is replaced.
        loss_fn, targets: as a :class:`kdlib.lab.TrainingSetup` has them; by default the teacher learns from the labels.
        name: of the files, for other teachers than the profile's; by default the network's.
        images: those that the teachers are trained on, in place of ``data.train``; the soft labels are always of that.

    Returns:
        ``seed -> network``. Its soft labels and its logits are computed when first asked for; the soft labels are kept.
    """
    plain = network is recipe is targets is name is images is None and loss_fn is F.cross_entropy
    made: dict[int, Network] = {}
    for seed in (*settings.seeds, *settings.search_seeds):
        first = settings.seed
        if seed != first and not settings.own_teachers:
            made[seed] = made[first]
        elif seed == first and plain:
            made[seed] = load_teacher(settings, data)
        else:
            kind, own = network or settings.teacher, "" if seed == first else f"_seed{seed}"
            label = f"{name or network_name(kind)}{own}"
            trained = load_or_train(
                settings.folder,
                f"teacher_{label}.pth",
                kind,
                images or data.train,
                loss_fn,
                replace(recipe or settings.teacher_recipe, seed=seed),
                targets=targets(seed) if targets else None,
            )
            soft_labels = partial(
                load_or_generate,
                settings.folder,
                trained.model,
                data.train,
                data.train.resolve_views(settings.views),
                file=f"soft_labels_{label}.npy",
            )
            about, size = artefacts.record(trained.path).get("provenance", {}), file_megabytes(trained.path)
            logits = Logits(trained.model, data, {})
            made[seed] = Network(
                trained.model, trained.history, logits, about, size, trained.path, make_soft_labels=soft_labels
            )
    return made


def soft_labels_of(teachers: Mapping[int, Network]) -> Callable[[int], SoftLabels]:
    """From a seed to the soft labels of its teacher: the targets of a :class:`kdlib.lab.TrainingSetup`."""
    return lambda seed: teachers[seed].soft_labels
