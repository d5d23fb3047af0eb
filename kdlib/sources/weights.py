"""The weights of a network in a checkpoint, however the training code left them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.records.files import open_plain
from kdlib.records.limits import load_tensors

FEW = 16  # ways to take the first parts off the names that are tried
COUNTERS = ("total_ops", "total_params")  # that thop leaves among the weights


def weights_for(network: nn.Module, weights: str | PathLike | Mapping) -> dict[str, Tensor]:
    """The weights of `network` in a file or mapping, whatever wraps them: ``state_dict``, ``model``, ``module.``, …

    Raises:
        ValueError: a file that cannot be read without executing code, or in which no weights fit.
    """
    where = "the mapping"
    if not isinstance(weights, Mapping):
        where = str(weights)
        if not Path(weights).exists():
            raise FileNotFoundError(f"weights {where} are not there: expected a file that torch.save wrote")
        try:
            with open_plain(Path(weights)) as file:
                weights = load_tensors(file)
            if not isinstance(weights, Mapping):
                raise ValueError(f"it holds a {type(weights).__name__}")
        except Exception as error:  # a damaged archive shows itself in many ways
            raise ValueError(
                f"{where} cannot be read as weights ({str(error).strip().partition(chr(10))[0]}): expected a file that "
                "torch.save wrote of a state_dict; where it was made, save network.state_dict()"
            ) from error
    initial = network.state_dict()
    wanted = {name: tuple(weight.shape) for name, weight in initial.items()}
    nearest: tuple[int, str] = (-1, "no tensors at all")
    fits: dict[str, dict[str, Tensor]] = {}
    for key, found in _tensors_in(weights):
        for prefix in _prefixes(found, wanted):
            own = {name.removeprefix(prefix): weight for name, weight in found.items() if name.startswith(prefix)}
            own = {name: weight for name, weight in own.items() if name.rpartition(".")[2] not in COUNTERS}
            for name in set(wanted) - set(own):  # checkpoints of before PyTorch 0.4.1 do not count the batches
                if name.endswith("num_batches_tracked"):
                    own[name] = initial[name]
            fitting = [name for name, shape in wanted.items() if name in own and tuple(own[name].shape) == shape]
            if len(fitting) == len(wanted) and len(own) == len(wanted):
                fits.setdefault(f"{key}.{prefix}".strip("."), own)
                continue
            odd = sorted(set(wanted) - set(fitting)) or sorted(set(own) - set(wanted))
            there = tuple(own[odd[0]].shape) if odd[0] in own else "nothing"
            nearest = max(nearest, (len(fitting), f"{odd[0]}: {there} where {wanted.get(odd[0], 'nothing')} is needed"))
    rivals = [key for key in fits if "ema" not in key] or list(fits)
    if len(rivals) > 1:
        raise ValueError(
            f"{where} holds {len(rivals)} sets of weights that fit this {type(network).__name__}, under "
            f"{' and '.join(map(repr, rivals))}: give the one that you mean, such as "
            f"weights=torch.load(file, weights_only=True)[{rivals[-1].partition('.')[0]!r}]"
        )
    if rivals:
        for name, _ in network.named_parameters():
            weight = fits[rivals[0]].get(name, initial[name])
            if weight.is_complex() > initial[name].is_complex() or not weight.isfinite().all():
                raise ValueError(f"{where}: {name} holds values that are not finite real numbers: train it again")
        return fits[rivals[0]]
    raise ValueError(
        f"{where} holds no weights of this {type(network).__name__} (nearest: {nearest[0]} of {len(wanted)} fit; "
        f"{nearest[1]}): expected the weights of the same architecture, with as many classes"
    )


def _tensors_in(
    weights: Mapping, path: str = "", depth: int = 3, seen: frozenset | set = frozenset()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping of names to tensors in a checkpoint, each once, and the keys that lead to it."""
    seen = seen or {id(weights)}
    arrays = {str(n): torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in weights.items()}
    if tensors := {name: value for name, value in arrays.items() if isinstance(value, Tensor)}:
        yield path, tensors
    for name, value in weights.items():
        if isinstance(value, Mapping) and depth and id(value) not in seen:
            seen.add(id(value))
            yield from _tensors_in(value, f"{path}.{name}".strip("."), depth - 1, seen)


def _prefixes(found: Iterable[str], wanted: Mapping) -> list[str]:
    """What may stand before the names of a network's weights, the shortest first; the few that fit the most names."""
    counts = Counter(name[:k] for name in found for k in _ends(name) if name[k:] in wanted)
    return sorted((prefix for prefix, _ in counts.most_common(FEW)), key=len) or [""]


def _ends(name: str) -> list[int]:
    """Where the first parts of a dotted name end: 0, and after each of the first three dots."""
    dots = [k + 1 for k, letter in enumerate(name) if letter == "."]
    return [0, *dots[:3]]
