"""Whether a published page still holds: what it depends on is stamped as it runs, and compared with what is here now.

A page depends (a) on its code cells, its recipe and the syntax trees of the kdlib modules that it uses, and (b) on what
those compute, for which the figures of ``tools/canary.py`` stand. Comments, docstrings and formatting are in neither.
While (a) is as it was, the page is current. If only modules changed and (b) did not, it is current and its code has
been tidied since. Otherwise it is stale.

kdlib/gpu is exempt from (a), since no CPU can say what a GPU computes. After a change of it, say that no figure does,

    python tools/stale.py gpu-unchanged "the kernel reads its input once instead of twice: same sums in the bench"

or raise ``kdlib.NUMERICS``, and every page that a GPU computed under another number is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import trees
from notebooks import BOOK, ROOT, STAMP, Chapter, chapters

import kdlib
from kdlib.datasets import DATA_SETS
from kdlib.records import artefacts

GPU_UNCHANGED = BOOK / "published" / "gpu_unchanged.json"
TOLERANCE = 1e-6  # relative, of the canary's figures: rounding in float64 stays far below, a changed method far above
NO_RESULT = ("start_from", "threads", "run")  # fields of a profile that change no figure


class CanaryError(RuntimeError):
    """The canary does not run on this kdlib."""


@dataclasses.dataclass(frozen=True)
class State:
    """Whether a page still holds.

    `kind` is "current"; "tidied": current, and the code, changed since, computes the same; "unconfirmed": kdlib/gpu has
    changed since, and nobody has said that it computes the same; or "stale".
    """

    kind: str
    reasons: tuple[str, ...]  # what changed, in words
    commit: str | None  # at which the page was run; None if it was not recorded
    code_only: bool = False  # stale for its code cells only: composing it again from the published records mends it

    def __str__(self) -> str:
        kind = "current, code tidied since" if self.kind == "tidied" else self.kind
        return f"{kind}: {'; '.join(self.reasons)}" if self.reasons else kind


def stamp(chapter: Chapter, profile: str) -> dict:
    """What to record of a page that is executed now: the commit, and everything that its outputs depend on.

    Args:
        profile: at which it is executed.

    Raises:
        CanaryError: the canary does not run.
        ValueError: an unknown profile.
    """
    cells = code_cells(chapter)
    recipe = {name: value for name, value, _ in resolved_recipe(profile)}
    modules = trees.used_modules(cells)
    text = "\n".join([*cells, json.dumps(recipe)])
    canary = {}
    for topic, figures in run_canary(trees.PACKAGE).items() if modules else ():
        module, _, network = topic.partition(" ")
        if f"kdlib.{module}" in modules and re.search(rf"\b{network}\b", text):
            canary |= of_the_page(figures, text)
    return {
        "commit": commit(),
        "depends_on": {
            "numerics": kdlib.NUMERICS,
            "cells": trees.cells_digest(cells),
            "recipe": recipe,
            "modules": modules,
            "gpu": trees.gpu_digest(),
            "canary": canary,
        },
    }


def of_the_page(figures: dict, text: str) -> dict:
    """The figures that concern a page with that code and recipe: those of a data set only if its name is in there."""
    elsewhere = {name for name in DATA_SETS if not re.search(rf"\b{name}\b", text)}
    elsewhere |= {"a file", "limit 10"}  # older stamps have figures of a file of the reader's own, which no page shows
    return {name: figure for name, figure in figures.items() if name.rpartition(", ")[2] not in elsewhere}


def state(chapter: Chapter, stamp: dict) -> State:
    """Whether the page with that stamp still holds.

    Args:
        stamp: the notebook's whole ``kdlib_published``, with what :func:`stamp` returned in it. If it also has
            ``{"tidied": {"commit", "proof"}}``, the outputs are of that commit, `depends_on` is of later code, and the
            proof says why the two compute the same.
    """
    tidied, then = stamp.get("tidied"), stamp.get("depends_on")
    commit = (tidied or stamp).get("commit")
    if then is None:
        return State("stale", ("stamped before records of this kind",), commit)
    changes = []
    on_gpu = not stamp.get("device", "").startswith("CPU")  # that a composed page names, too
    if on_gpu and then["numerics"] != kdlib.NUMERICS:
        changes.append(f"kdlib.NUMERICS is {kdlib.NUMERICS}, was {then['numerics']}")
    changes += changed_recipe(stamp["profile"], then["recipe"])
    modules = [name for name, digest in then["modules"].items() if trees.module_digest(name) != digest]
    if modules or trees.gpu_digest() != then["gpu"]:  # what of kdlib/gpu runs on a CPU, the canary can judge
        text = "\n".join([*code_cells(chapter), json.dumps(then["recipe"])])
        changes += changed_figures(of_the_page(then["canary"], text))
    code_only = not changes
    if trees.cells_digest(code_cells(chapter)) != then["cells"]:
        changes.append("code cells changed: execute it, or compose it again from the published records")
    tidying = [tidied["proof"]] if tidied else []
    if modules:
        tidying.append(f"code of {', '.join(modules)} changed")
    if changes:
        return State("stale", (*changes, *tidying), commit, code_only)
    if not gpu_unchanged_since(then["gpu"]):
        asked = 'kdlib/gpu changed: run it again, or say `python tools/stale.py gpu-unchanged "why no figure changes"`'
        return State("unconfirmed", (asked, *tidying), commit)
    return State("tidied" if tidying else "current", tuple(tidying), commit)


def commit() -> str | None:
    """The commit that is checked out, and whether kdlib differs from it; None outside a clone."""
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        head = git(["git", "rev-parse", "--short", "HEAD"])
        changes = git(["git", "status", "--porcelain", "--", "kdlib"])
    except OSError:  # git is not installed
        return None
    dirty = " with uncommitted changes" if changes.stdout else ""
    return None if head.returncode else head.stdout.strip() + dirty


def code_cells(chapter: Chapter) -> list[str]:
    """The code cells of a chapter except the set-up cell, which installs kdlib from an address that may change."""
    cells = (cell for cell in chapter.read().cells if cell.cell_type == "code")
    return [cell.source for cell in cells if "setup" not in cell.metadata.get("tags", [])]


# --- the recipe ----------------------------------------------------------------------------------------------------


def resolved_recipe(profile: str) -> list[tuple[str, object, object]]:
    """The fields of a profile that decide its results: name (``student_recipe.epochs``), value and default."""

    def flat(settings, prefix: str = "") -> Iterator[tuple[str, object, object]]:
        for field in dataclasses.fields(settings):
            value, name = getattr(settings, field.name), prefix + field.name
            if dataclasses.is_dataclass(value):
                yield from flat(value, f"{name}.")
            elif name not in NO_RESULT:
                yield name, list(value) if isinstance(value, tuple) else value, field.default

    return list(flat(kdlib.resolve(profile)))


def changed_recipe(profile: str, then: dict) -> list[str]:
    """In words, which fields of a profile's recipe are not as they were. A new field at its default is no change."""
    try:
        now = resolved_recipe(profile)
    except ValueError as error:
        return [str(error)]
    changes = [f"{name} is {v!r}, was {then.get(name)!r}" for name, v, default in now if v != then.get(name, default)]
    return changes + [f"{name} was {then[name]!r}, is gone" for name in then.keys() - {name for name, *_ in now}]


# --- the canary ----------------------------------------------------------------------------------------------------


@functools.cache
def run_canary(package: Path, *topics: str) -> dict[str, dict[str, list[float]]]:
    """The canary's figures on that kdlib, by topic: a module (``data``), or one of our networks (``models resnet50``).

    All topics if none is given.

    Raises:
        CanaryError: it does not run.
    """
    command = [sys.executable, str(Path(__file__).with_name("canary.py")), *topics]
    environment = os.environ | {"PYTHONPATH": str(package.parent), "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    if outcome.returncode:
        reason = (outcome.stderr.strip().splitlines() or [f"exit status {outcome.returncode}"])[-1]
        raise CanaryError(f"the canary does not run: {reason} (python tools/canary.py shows where)")
    return json.loads(outcome.stdout)


def changed_figures(then: dict[str, list[float]]) -> list[str]:
    """In words, which of a stamp's figures are computed otherwise now, or not at all."""
    try:
        now = {name: figure for figures in run_canary(trees.PACKAGE).values() for name, figure in figures.items()}
    except CanaryError as error:
        return [str(error)]
    gone = [name for name in then if name not in now]
    differ = [name for name in then if name in now and not agree(then[name], now[name])]
    words = {"figures changed": differ, "figures not computed any more": gone}
    return [f"{text}: {', '.join(names)}" for text, names in words.items() if names]


def agree(figure: list[float], other: list[float]) -> bool:
    """Whether two figures are the same, number by number, to within TOLERANCE; nothing agrees with a nan.

    Numbers far below a figure's largest one have come about by cancellation, and are compared more loosely.
    """
    least = max(map(abs, figure)) / 1000
    return len(figure) == len(other) and all(
        abs(a - b) <= TOLERANCE * max(abs(a), least) for a, b in zip(figure, other, strict=True)
    )


# --- kdlib/gpu -----------------------------------------------------------------------------------------------------


def gpu_unchanged_since(then: str) -> bool:
    """Whether kdlib/gpu has that hash, or what changed since was said to change no figure, at once or in steps."""
    same = {then}
    for statement in _statements():
        same |= {statement["now"]} if same.intersection(statement["before"]) else set()
    return trees.gpu_digest() in same


def gpu_unchanged(why: str) -> None:
    """Record that kdlib/gpu as it is now changes no figure of the pages published before."""
    stamps = [chapter.read().metadata.get(STAMP, {}) for chapter in chapters()]
    digests = {stamp["depends_on"]["gpu"] for stamp in stamps if "depends_on" in stamp}
    before = sorted(digest for digest in digests if not gpu_unchanged_since(digest))
    if before:
        statement = {"before": before, "now": trees.gpu_digest(), "why": why}
        artefacts.save_json(GPU_UNCHANGED, [*_statements(), statement])
    print(
        f"recorded in {GPU_UNCHANGED.name}" if before else "nothing to record: no page was run with another kdlib/gpu"
    )


def _statements() -> list[dict]:
    return json.loads(GPU_UNCHANGED.read_text(encoding="utf-8")) if GPU_UNCHANGED.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Whether published pages still hold; `make status` says which do.")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("gpu-unchanged", help=gpu_unchanged.__doc__)
    command.add_argument("why", help="how you know, in one line")
    gpu_unchanged(parser.parse_args(arguments).why)
    return 0


if __name__ == "__main__":
    sys.exit(main())
