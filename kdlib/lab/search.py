"""The search for learning rates, weight decays, temperatures: the same for all sides of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np

from kdlib.data import ImageSet
from kdlib.lab.rows import RowStore
from kdlib.lab.training import TrainingSetup, train_setups
from kdlib.train import Recipe

Axes = Mapping[str, Sequence[float]]  # name -> values, ascending


@dataclass(frozen=True)
class Tuned:
    """What a search found for one case."""

    setup: TrainingSetup  # with the best values
    best: dict[str, float] = field(default_factory=dict)  # axis -> value
    tried: dict[str, dict[float, float]] = field(default_factory=dict)  # axis -> value -> mean validation accuracy
    accuracy: float = float("nan")  # on the validation images, at the best values
    at_edge: tuple[str, ...] = ()  # open axes whose best value is the first or last that was tried


def tune(
    store: RowStore,
    setups: Mapping[str, TrainingSetup],
    axes: Axes | Mapping[str, Axes],
    seeds: Sequence[int],
    validation: ImageSet,
    *,
    beyond: int = 2,
    closed: Sequence[str] = ("alpha", "beta"),
    batched: bool = False,
) -> dict[str, Tuned]:
    """The best values for each case, one axis after the other: each is searched at the best values of those before it.

    The best value is that of the highest mean validation accuracy. If it is the first or the last of its list, the
    search goes on beyond that end by the same factor, up to `beyond` times. At last the first axis is searched once
    more, around its best value, since that depends on the others: the best learning rate on decay and temperature.

    Args:
        setups: ``case -> setup``.
        axes: ``name -> values`` in ascending order, for all cases, or ``case -> axes``. A field of Recipe changes the
            recipe; any other name is a keyword of the loss, such as ``temperature`` or ``label_smoothing``.
        seeds: to train with, none of those that are reported.
        validation: the images that decide.
        closed: axes that end where their lists end.
        batched: as for :func:`kdlib.lab.train_setups`.

    Raises:
        ValueError: an axis without values, or with values that do not ascend.
    """
    of_case = {case: axes if _is_shared(axes) else axes.get(case, {}) for case in setups}
    for name, values in (axis for own in of_case.values() for axis in own.items()):
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"axis {name} has the values {values!r}: expected some, in ascending order")
    found = {case: Tuned(setup) for case, setup in setups.items()}
    for place in range(max((len(own) + 1 for own in of_case.values()), default=0)):
        now = {case: _axis(own, place, found[case]) for case, own in of_case.items()}
        now = {case: axis for case, axis in now.items() if axis}
        tried: dict[str, dict[float, float]] = {case: {} for case in now}
        to_try = {case: tuple(values) for case, (_, values) in now.items()}
        for _ in range(beyond + 1):
            trials = {
                f"search: {case}, {_label(found[case].setup, of_case[case], now[case][0], value)}": (case, value)
                for case, values in to_try.items()
                for value in values
            }
            changed = {trial: _with(found[case].setup, now[case][0], value) for trial, (case, value) in trials.items()}
            rows = train_setups(store, changed, seeds, {"validation": validation}, batched=batched)
            for trial, (case, value) in trials.items():
                tried[case][value] = float(np.mean([row["validation accuracy"] for row in rows[trial]]))
            tried = {case: dict(sorted(by_value.items())) for case, by_value in tried.items()}
            to_try = {case: _beyond(tried[case]) for case, (name, _) in now.items() if name not in closed}
            if not any(to_try.values()):
                break
        for case, (name, _) in now.items():
            found[case] = _settled(found[case], name, tried[case], closed)
    return found


def search_rows(tuned: Mapping[str, Tuned]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of what a search found; a value at an end of what was tried is marked."""
    names = list(dict.fromkeys(name for result in tuned.values() for name in result.best))
    rows = []
    for case, result in tuned.items():
        mark = {name: " (at an end)" if name in result.at_edge else "" for name in names}
        values = [f"{result.best[n]:g}{mark[n]}" if n in result.best else "–" for n in names]
        rows.append([case, *values, f"{result.accuracy:.2%}" if result.tried else "–"])
    return ["", *(name.replace("_", " ") for name in names), "validation accuracy"], rows


def _is_shared(axes: Mapping) -> bool:
    return not any(isinstance(value, Mapping) for value in axes.values())


def _axis(axes: Axes, place: int, result: Tuned) -> tuple[str, Sequence[float]] | None:
    """The axis that is searched at that place; after the last one, if there are several, the first around its best."""
    if place < len(axes):
        return list(axes.items())[place]
    if place > len(axes) or len(axes) < 2:
        return None
    name = next(iter(axes))
    values = list(result.tried[name])
    at = values.index(result.best[name])
    return name, values[max(0, at - 1) : at + 2]


def _label(setup: TrainingSetup, axes: Axes, name: str, value: float) -> str:
    """A trial in words: the values of all axes, so that where two axes cross one training serves both."""
    bound = getattr(setup.loss_fn, "keywords", {})
    now = {axis: getattr(setup.recipe, axis, bound.get(axis)) for axis in axes} | {name: value}
    return ", ".join(f"{axis} {at:g}" for axis, at in now.items() if at is not None)


def _with(setup: TrainingSetup, name: str, value: float) -> TrainingSetup:
    if name in {field.name for field in fields(Recipe)}:
        return replace(setup, recipe=replace(setup.recipe, **{name: value}))
    loss_fn: Callable = partial(setup.loss_fn, **{name: value})
    return replace(setup, loss_fn=loss_fn)


def _settled(result: Tuned, name: str, by_value: Mapping[float, float], closed: Sequence[str]) -> Tuned:
    best = max(by_value, key=by_value.__getitem__)
    values = {*result.tried.get(name, {}), *by_value}
    at_end = name not in closed and len(values) > 1 and best in (min(values), max(values))
    return Tuned(
        setup=_with(result.setup, name, best),
        best={**result.best, name: best},
        tried={**result.tried, name: dict(by_value)},
        accuracy=by_value[best],
        at_edge=tuple(axis for axis in result.at_edge if axis != name) + ((name,) if at_end else ()),
    )


def _beyond(by_value: Mapping[float, float]) -> tuple[float, ...]:
    """The value beyond the end of the list where the best one is; none if the best one is inside, or next to a zero."""
    values = list(by_value)  # ascending
    best = max(by_value, key=by_value.__getitem__)
    if len(values) > 1 and best == values[-1] and values[-2] > 0:
        return (float(f"{values[-1] ** 2 / values[-2]:.6g}"),)
    if len(values) > 1 and best == values[0] > 0:
        return (float(f"{values[0] ** 2 / values[1]:.6g}"),)
    return ()
