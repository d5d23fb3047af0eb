"""What decides the outcome of a training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor, nn

from kdlib.data import ImageSet, Targets
from kdlib.gpu import ranks
from kdlib.models import NETWORKS, build, network_name
from kdlib.records import identity
from kdlib.records.identity import IdentityError, identify


def fingerprint(
    network: str | Callable | nn.Module,
    data: ImageSet,
    loss_fn: Callable[..., Tensor],
    recipe: object,
    targets: Targets | None = None,
    *,
    model: nn.Module | None = None,
) -> dict:
    """What decides the outcome of a training, by content (see :mod:`kdlib.records.identity`), as a JSON-able dict.

    Args:
        network: as :func:`kdlib.build` takes it, or a network that is built already: then its weights count.
        recipe: a :class:`kdlib.Recipe`.
        model: what `network` builds, if it has been built.

    Raises:
        IdentityError: something cannot be identified by its content.
    """
    if isinstance(network, nn.Module):
        name, model = None, network
    else:
        name = network_name(network)
        model = model or build(network, data.classes, data.channels, seed=recipe.seed)
    if targets is not None and not isinstance(targets, Targets):
        raise IdentityError(
            f"targets {targets!r} are neither SoftLabels nor a LiveTeacher: they train, but cannot be identified by "
            "their content; make soft labels of them with kdlib.generate, or call kdlib.train without a checkpoint"
        )
    made_from = {
        "network": {"name": name, "architecture": identity.network(model), "start": _start(network, model)},
        "data": data.identity,
        "loss_fn": identify(loss_fn),
        "targets": None if targets is None else targets.identity,
        "recipe": asdict(recipe),
    }
    if ranks.world() > 1 and ranks.depends_on_processes(model, data.example):
        made_from["processes"] = ranks.world()
    return made_from


def _start(network: str | Callable | nn.Module, model: nn.Module) -> object:
    """What decides the first weights beside the seed: the code that makes one of kdlib's networks, else the weights."""
    if isinstance(network, str) and network in NETWORKS:
        with contextlib.suppress(IdentityError):
            return identify(NETWORKS[network])
    return {"weights": identity.weights(model)}
