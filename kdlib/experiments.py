"""Experiments: measurements that survive an interruption, and claims that are judged by them.

An experiment is one JSON file with a row for each case and seed. A row is saved as soon as it is measured, and a row
that is there is not measured again, so that an experiment that was stopped goes on where it stopped. The claims lie in
the same file. Tables, figures and verdicts are computed from it and from nothing else.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.stats

from kdlib import artefacts
from kdlib.models import pick_device

HOLDS, PARTLY, NOT_SEEN = "holds", "holds partly", "not seen here"


@dataclass(frozen=True)
class Comparison:
    """That one case measures more than another, over seeds; or less, or about the same."""

    measure: str  # such as "accuracy"
    case: str
    than: str | float  # another case, compared seed by seed, or a number
    margin: float = 0.0  # by more than this
    sign: int = 1  # 1: more; -1: less; 0: the same to within `margin`
    unit: str = "points"  # of the figure shown; for points, measures are fractions of 1


@dataclass(frozen=True)
class Claim:
    """What somebody says of distillation, and the comparisons that it comes to."""

    text: str
    source: str  # who says it, as Markdown: usually a link to the paper
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Judgement:
    """What an experiment has to say of a claim."""

    verdict: str  # HOLDS, PARTLY or NOT_SEEN
    figure: str  # each comparison's difference, with its 95 % interval


class Experiment:
    """One experiment's file, and the rows of it that were asked for.

    Args:
        path: the file; made where it is not there.
        about: what is told of the experiment beside its rows: the profile, the data set.

    Raises:
        ValueError: the file is there and is not an experiment's.
    """

    def __init__(self, path: Path, **about: object):
        self.path, self.about = Path(path), about
        self.rows: list[dict] = []  # those asked for, measured now or before
        self._stored = load(self.path)["rows"] if self.path.exists() else []

    def measure(
        self,
        case: str,
        seeds: Sequence[int],
        run: Callable,
        *,
        made_from: Mapping,
        at_once: bool = False,
    ) -> list[dict]:
        """The rows of one case, a seed each: those in the file where they were made from the same, otherwise measured.

        Args:
            run: ``seed -> {measure: number}``; with `at_once`, ``seeds -> [{measure: number}, ...]`` for all the seeds
                that are missing, in their order.
            made_from: all that decides the outcome beside the seed (data, networks, recipes, objective), JSON-able.
                Rows that were made from something else are measured anew; the old file is kept under another name.

        Returns:
            A dict a seed, in the order of `seeds`: case, seed, made_from (a digest), device, seconds, and the measures.

        Raises:
            TypeError: `made_from` is not JSON-able: what stands for an object would change from run to run.
            ValueError: a measure is not a finite number.
        """
        key = artefacts.digest(json.loads(json.dumps(made_from)))
        known = {row["seed"]: row for row in self._stored if row["case"] == case and row["made_from"] == key}
        missing = [seed for seed in seeds if seed not in known]
        for part in [missing] if at_once and missing else [[seed] for seed in missing]:
            start = time.perf_counter()
            found = run(part) if at_once else [run(part[0])]
            seconds = (time.perf_counter() - start) / len(part)
            for seed, measured in zip(part, found, strict=True):
                numbers = {name: _number(case, name, value) for name, value in measured.items()}
                about = {"case": case, "seed": seed, "made_from": key, "device": artefacts.device_name(pick_device())}
                known[seed] = {**about, "seconds": round(seconds, 3), **numbers}
            self._keep([known[seed] for seed in part])
        rows = [known[seed] for seed in seeds]
        self.rows += rows
        return rows

    def finish(self, claims: Sequence[Claim] = ()) -> dict:
        """Write the file with just the rows that were asked for and the claims, and return what it holds.

        Raises:
            ValueError: a claim compares what was not measured.
        """
        found = self._described(self.rows) | {"claims": [asdict(claim) for claim in claims]}
        found = json.loads(json.dumps(found))
        for claim in found["claims"]:
            judge(claim, found)
        if any(row not in self.rows for row in self._stored):
            self._set_aside()
        artefacts.save_json(self.path, found)
        return found

    def _keep(self, rows: list[dict]) -> None:
        replaced = {(row["case"], row["seed"]) for row in rows}
        kept = [row for row in self._stored if (row["case"], row["seed"]) not in replaced]
        if len(kept) < len(self._stored):
            self._set_aside()
        self._stored = kept + rows
        artefacts.save_json(self.path, self._described(self._stored))

    def _set_aside(self) -> None:
        if self.path.exists():
            aside = self.path.with_name(f"{self.path.stem}.{artefacts.digest(load(self.path)['rows'])}.json")
            shutil.copy(self.path, aside)
            print(f"{self.path} holds measurements that this run does not ask for; kept as {aside.name}")

    def _described(self, rows: list[dict]) -> dict:
        known = {k: v for k, v in artefacts.provenance("cpu", 0).items() if k in ("versions", "date")}
        return {"experiment": self.path.stem, **self.about, **known, "rows": rows, "claims": []}


def load(path: Path) -> dict:
    """What an experiment's file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not an experiment's.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"measurements {path} are not there: run the chapter that makes them first")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = found["rows"]
        if not all({"case", "seed", "made_from", "seconds"} <= row.keys() for row in rows):
            raise ValueError("a row lacks its case, seed, made_from or seconds")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an experiment's file ({artefacts.short_reason(error)}): move it away and run its chapter"
        ) from error
    return found


def values(found: Mapping, case: str, measure: str) -> dict[int, float]:
    """One measure of one case, by seed.

    Raises:
        ValueError: no such case or measure in `found`.
    """
    cases = list(dict.fromkeys(row["case"] for row in found["rows"]))
    if case not in cases:
        raise ValueError(f"case {case!r} was not measured: expected one of {', '.join(cases)}")
    rows = [row for row in found["rows"] if row["case"] == case]
    if lacking := [row["seed"] for row in rows if measure not in row]:
        raise ValueError(f"measure {measure!r} of case {case!r} is not there for seeds {lacking}")
    return {row["seed"]: row[measure] for row in sorted(rows, key=lambda row: row["seed"])}


def difference(found: Mapping, measure: str, case: str, than: str | float) -> tuple[float, float, int]:
    """How much more one case measures than another: mean, half of its 95 % interval (Student's t), seeds.

    Paired by the seed. With a single seed the interval is unbounded.
    """
    first = values(found, case, measure)
    second = values(found, than, measure) if isinstance(than, str) else dict.fromkeys(first, than)
    shared = [seed for seed in first if seed in second]
    if not shared:
        raise ValueError(f"cases {case!r} and {than!r} share no seed: expected the same seeds in both")
    apart = np.array([first[seed] - second[seed] for seed in shared], float)
    n = len(apart)
    half = scipy.stats.t.ppf(0.975, n - 1) * apart.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    return float(apart.mean()), float(half), n


def judge(claim: Claim | Mapping, found: Mapping) -> Judgement:
    """Whether the measurements bear a claim out.

    A comparison is borne out where its 95 % interval lies beyond the margin as a whole; for *about the same*, where the
    interval lies within the margin as a whole. A claim holds where all its comparisons are borne out, holds partly
    where some are, and was not seen here where none is: that is not the same as refuted. Where an interval lies wholly
    on the opposite side of zero, the figure says so.
    """
    claim = asdict(claim) if isinstance(claim, Claim) else claim
    borne_out, figures = [], []
    for c in claim["comparisons"]:
        mean, half, n = difference(found, c["measure"], c["case"], c["than"])
        if c["sign"]:
            borne_out.append(bool(c["sign"] * mean - half > c["margin"]))
        else:
            borne_out.append(bool(abs(mean) + half < c["margin"]))
        scale = 100 if c["unit"] == "points" else 1
        opposite = ", the other way round" if c["sign"] * mean + half < 0 else ""
        figures.append(f"{scale * mean:+.2f} ± {scale * half:.2f} {c['unit']}".strip() + f" (n = {n}){opposite}")
    verdict = HOLDS if all(borne_out) else PARTLY if any(borne_out) else NOT_SEEN
    return Judgement(verdict, "; ".join(figures))


def verdict_rows(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of verdicts: claim, source, our figure, verdict."""
    judged = [(claim, judge(claim, found)) for claim in found["claims"]]
    rows = [[claim["text"], claim["source"], found_.figure, f"**{found_.verdict}**"] for claim, found_ in judged]
    return ["claim", "source", "here: mean difference and 95 % interval", "verdict"], rows


def cost(found: Mapping) -> float:
    """Seconds that the measurements took, all together."""
    return float(sum(row["seconds"] for row in found["rows"]))


def _number(case: str, name: str, value: object) -> float:
    value = float(value)
    if not np.isfinite(value):
        raise ValueError(f"measure {name!r} of case {case!r} is {value}: expected a finite number")
    return value
