"""Experiments: measurements that survive an interruption, and claims that are judged by them.

An experiment is one JSON file with a row for each case and seed. A row is saved as soon as it is measured, and a row
that is there is not measured again, so that an experiment that was stopped goes on where it stopped. The claims lie in
the same file. Tables, figures and verdicts are computed from it and from nothing else.

Most cases are lessons: one way to train a student, repeated with several seeds. :meth:`Experiment.train` trains and
measures them, all with the same code, and :meth:`Experiment.search_rate` gives each a learning rate of its own.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn

from kdlib import artefacts
from kdlib.data import ImageSet
from kdlib.evaluate import agreement, scores
from kdlib.models import build, pick_device, predict_logits
from kdlib.train import Recipe, Trained, run_fingerprint, train, train_many

HOLDS, PARTLY, NOT_SEEN = "holds", "holds partly", "not seen here"


@dataclass(frozen=True)
class Lesson:
    """One way to train a network, whatever the seed."""

    network: str  # a name that kdlib.build knows
    data: ImageSet  # the training images
    objective: Callable[[int], Callable]  # seed -> loss_fn; another one for each seed where each has its own teacher
    recipe: Recipe  # the seed in it is not looked at


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
        found = load(self.path) if self.path.exists() else {"rows": []}
        self._stored, self._claims = found["rows"], found.get("claims", [])
        self._kept_aside = False
        self._said: dict[tuple[str, str], Tensor] = {}  # teachers' answers

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
            run: ``seed -> {measure: value}``; with `at_once`, ``seeds -> [{measure: value}, ...]`` for all the seeds
                that are missing, in their order. A value is a number, or a truth value for each image, (N,): then the
                row has the share of the true ones, and keeps which they are, so that a comparison can tell how far it
                hangs on the choice of the images.
            made_from: all that decides the outcome beside the seed (data, networks, recipes, objective), JSON-able.
                Rows that were made from something else are measured anew; the old file is kept under another name.

        Returns:
            A dict a seed, in the order of `seeds`: case, seed, made_from (a digest), device, seconds, and the measures.

        Raises:
            TypeError: `made_from` is not JSON-able: what stands for an object would change from run to run.
            ValueError: a measure is not a finite number.
        """
        missing = [seed for seed in seeds if self._row(case, seed, made_from) is None]
        for part in [missing] if at_once and missing else [[seed] for seed in missing]:
            start = time.perf_counter()
            found = run(part) if at_once else [run(part[0])]
            seconds = (time.perf_counter() - start) / len(part)
            self._keep([(case, seed, made_from, m, seconds) for seed, m in zip(part, found, strict=True)])
        return [self._asked_for(case, seed, made_from) for seed in seeds]

    def train(
        self,
        lessons: Mapping[str, Lesson],
        seeds: Sequence[int],
        measured_on: Mapping[str, ImageSet],
        *,
        teacher: Trained | None = None,
        side_by_side: bool = False,
    ) -> dict[str, list[dict]]:
        """Train a student for each lesson and seed, and measure it: a row each, those in the file excepted.

        Args:
            lessons: ``case -> lesson``.
            measured_on: ``split -> images``. On ``"test"`` the measures are called accuracy, nll and ece, on any other
                split they bear its name: "validation accuracy".
            teacher: whose agreement with the students is measured too.
            side_by_side: train what is missing as one batched program for each architecture. It changes the time that
                small networks take on a CPU, and nothing else. What cannot be trained so (mixup, cutout) is not.

        Returns:
            ``case -> rows``, a row a seed. A student whose training diverged says the same of every class; it has 1
            for "diverged", the others 0.

        Raises:
            ValueError: a recipe or an objective does not fit the data.
            TypeError: an objective does not describe itself, so that nothing could tell its rows from another's.
        """
        measured = {"measured on": {split: images.fingerprint for split, images in measured_on.items()}}
        measured |= {"agreement with": teacher.fingerprint} if teacher else {}
        wanted = {
            (case, seed): {
                "network": lesson.network,
                **run_fingerprint(lesson.data, lesson.objective(seed), replace(lesson.recipe, seed=seed)),
                **measured,
            }
            for case, lesson in lessons.items()
            for seed in seeds
        }
        missing = [(case, seed) for (case, seed), made_from in wanted.items() if not self._row(case, seed, made_from)]
        for jobs in _programs(missing, lessons) if side_by_side else [[job] for job in missing]:
            start = time.perf_counter()
            trained = _train([lessons[case] for case, _ in jobs], [seed for _, seed in jobs])
            found = [_measured(model, measured_on, self._answers(teacher, measured_on)) for model in trained]
            seconds = (time.perf_counter() - start) / len(jobs)
            self._keep([(*job, wanted[job], measures, seconds) for job, measures in zip(jobs, found, strict=True)])
        return {case: [self._asked_for(case, seed, wanted[case, seed]) for seed in seeds] for case in lessons}

    def search_rate(
        self,
        lessons: Mapping[str, Lesson],
        rates: Sequence[float],
        seeds: Sequence[int],
        validation: ImageSet,
        *,
        beyond: int = 2,
        side_by_side: bool = False,
    ) -> dict[str, dict[float, float]]:
        """Mean validation accuracy of each lesson at each learning rate, in ascending order of the rates.

        All get the same list. Where the best rate is the first or the last of it, the search goes on beyond that end
        by the same factor, up to `beyond` times.

        Args:
            lessons: ``name -> lesson``; the learning rates of their recipes are not looked at.
            rates: tried first, in ascending order.
            seeds: to train with, none of those that are reported.
            validation: the images that judge.
            side_by_side: as for :meth:`train`.

        Returns:
            ``name -> rate -> accuracy``, fractions of 1.
        """
        found: dict[str, dict[float, float]] = {name: {} for name in lessons}
        todo = dict.fromkeys(lessons, tuple(rates))
        for _ in range(beyond + 1):
            trials = {f"search: {name}, rate {rate:g}": (name, rate) for name, more in todo.items() for rate in more}
            rows = self.train(
                {
                    case: replace(lessons[name], recipe=replace(lessons[name].recipe, learning_rate=rate))
                    for case, (name, rate) in trials.items()
                },
                seeds,
                {"validation": validation},
                side_by_side=side_by_side,
            )
            for case, (name, rate) in trials.items():
                found[name][rate] = float(np.mean([row["validation accuracy"] for row in rows[case]]))
            found = {name: dict(sorted(tried.items())) for name, tried in found.items()}
            todo = {name: _next_rate(tried) for name, tried in found.items() if _next_rate(tried)}
        return found

    def finish(self, claims: Sequence[Claim] = ()) -> dict:
        """Write the file with just the rows that were asked for and the claims, and return what it holds.

        Raises:
            ValueError: a claim compares what was not measured.
        """
        asked_for = [asdict(claim) for claim in claims]
        found = json.loads(json.dumps(self._described(self.rows, asked_for)))
        for claim in found["claims"]:
            judge(claim, found)
        if any(row not in self.rows for row in self._stored):
            self._set_aside()
        artefacts.save_json(self.path, found)
        self._claims = asked_for
        return found

    def _answers(self, teacher: Trained | None, measured_on: Mapping[str, ImageSet]) -> dict[str, Tensor]:
        """The teacher's logits on each split, computed once."""
        found = {}
        for split, images in measured_on.items() if teacher else ():
            key = _key(teacher.fingerprint), images.fingerprint
            if key not in self._said:
                self._said[key] = predict_logits(teacher.model, images)
            found[split] = self._said[key]
        return found

    def _row(self, case: str, seed: int, made_from: Mapping) -> dict | None:
        """The row in the file, if it was made from the same."""
        key = _key(made_from)
        same = (row for row in self._stored if (row["case"], row["seed"], row["made_from"]) == (case, seed, key))
        return next(same, None)

    def _asked_for(self, case: str, seed: int, made_from: Mapping) -> dict:
        row = self._row(case, seed, made_from)
        if row not in self.rows:
            self.rows.append(row)
        return row

    def _keep(self, measured: list[tuple[str, int, Mapping, Mapping, float]]) -> None:
        """Save what was measured: case, seed, what it was made from, measures, seconds."""
        device = artefacts.device_name(pick_device())
        rows = [
            {"case": case, "seed": seed, "made_from": _key(made_from), "device": device, "seconds": round(seconds, 3)}
            | _stored(case, measures)
            for case, seed, made_from, measures, seconds in measured
        ]
        replaced = {(row["case"], row["seed"]) for row in rows}
        kept = [row for row in self._stored if (row["case"], row["seed"]) not in replaced]
        if len(kept) < len(self._stored):
            self._set_aside()
        self._stored = kept + rows
        artefacts.save_json(self.path, self._described(self._stored, self._claims))

    def _set_aside(self) -> None:
        """Keep a copy of the file as this run found it."""
        if self.path.exists() and not self._kept_aside:
            aside = self.path.with_name(f"{self.path.stem}.{artefacts.digest(load(self.path)['rows'])}.json")
            shutil.copy(self.path, aside)
            print(f"{self.path} holds measurements that this run does not ask for; kept as {aside.name}")
        self._kept_aside = True

    def _described(self, rows: list[dict], claims: list[dict]) -> dict:
        known = {k: v for k, v in artefacts.provenance("cpu", 0).items() if k in ("versions", "date")}
        return {"experiment": self.path.stem, **self.about, **known, "rows": rows, "claims": claims}


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
    """How much more one case measures than another: mean, half of its 95 % interval, seeds.

    Paired by the seed, and, where the rows know which images were answered rightly, by the image. The interval then
    allows for both kinds of luck: other seeds (Student's t over the seeds' differences) and other images of the same
    kind (normal, over the images' differences, each averaged over the seeds). Their widths add up as squares do, which
    errs on the wide side: the second still holds some of the seeds' luck. Without such rows it is over the seeds alone.
    With a single seed it is unbounded.
    """
    first = values(found, case, measure)
    second = values(found, than, measure) if isinstance(than, str) else dict.fromkeys(first, than)
    shared = [seed for seed in first if seed in second]
    if not shared:
        raise ValueError(f"cases {case!r} and {than!r} share no seed: expected the same seeds in both")
    apart = np.array([first[seed] - second[seed] for seed in shared], float)
    n = len(apart)
    half = scipy.stats.t.ppf(0.975, n - 1) * apart.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    ours = _by_image(found, case, measure, shared)
    theirs = _by_image(found, than, measure, shared) if isinstance(than, str) else than
    if ours is not None and theirs is not None:
        by_image = ours - theirs
        half = np.hypot(half, scipy.stats.norm.ppf(0.975) * by_image.std(ddof=1) / np.sqrt(len(by_image)))
    return float(apart.mean()), float(half), n


def _by_image(found: Mapping, case: str, measure: str, seeds: Sequence[int]) -> np.ndarray | None:
    """How often each image was answered rightly (N,), averaged over the seeds; None where the rows do not tell."""
    rows = [row for row in found["rows"] if row["case"] == case and row["seed"] in seeds]
    if any(measure not in row.get("by image", {}) for row in rows):
        return None
    kept = [row["by image"][measure] for row in rows]
    bits = [np.unpackbits(np.frombuffer(base64.b64decode(k["bits"]), np.uint8), count=k["images"]) for k in kept]
    return np.mean(bits, axis=0)


def judge(claim: Claim | Mapping, found: Mapping) -> Judgement:
    """Whether the measurements bear a claim out.

    A comparison is borne out where its 95 % interval lies beyond the margin as a whole; for *about the same*, where the
    interval lies within the margin as a whole. A claim holds where all its comparisons are borne out, holds partly
    where some are, and was not seen here where none is: that is not the same as refuted. Where the interval as a whole
    contradicts the comparison, the figure says so.
    """
    claim = asdict(claim) if isinstance(claim, Claim) else claim
    borne_out, figures = [], []
    for c in claim["comparisons"]:
        mean, half, n = difference(found, c["measure"], c["case"], c["than"])
        sign, margin, scale = c["sign"], c["margin"], 100 if c["unit"] == "points" else 1
        if sign:
            borne_out.append(bool(sign * mean - half > margin))
            contradicted = sign * mean + half < min(0, margin)
            asked = f"{'more' if sign > 0 else 'less'} than {scale * sign * margin:g}" if margin else ""
        else:
            borne_out.append(bool(abs(mean) + half < margin))
            contradicted = abs(mean) - half > margin
            asked = f"within {scale * margin:g}"
        told = f"n = {n}" + (f"; asked for: {asked}" if asked else "")
        opposite = ", the other way round" if contradicted else ""
        figures.append(f"{scale * mean:+.2f} ± {scale * half:.2f} {c['unit']}".strip() + f" ({told}){opposite}")
    verdict = HOLDS if all(borne_out) else PARTLY if any(borne_out) else NOT_SEEN
    return Judgement(verdict, "; ".join(figures))


def verdict_rows(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of verdicts: claim, source, our figure, verdict."""
    judged = [(claim, judge(claim, found)) for claim in found["claims"]]
    unbroken = {" ± ": "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", "n = ": "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"}
    rows = []
    for claim, found_ in judged:
        figure = found_.figure
        for apart, together in unbroken.items():  # a figure is not torn apart at the end of a line
            figure = figure.replace(apart, together)
        rows.append([claim["text"], claim["source"], figure, f"**{found_.verdict}**"])
    return ["claim", "source", "here: mean difference and 95 % interval", "verdict"], rows


def cost(found: Mapping) -> float:
    """Seconds that the measurements took, all together."""
    return float(sum(row["seconds"] for row in found["rows"]))


def _programs(jobs: list[tuple[str, int]], lessons: Mapping[str, Lesson]) -> list[list[tuple[str, int]]]:
    """The jobs (case, seed) in groups that `train_many` can train at once."""
    groups: dict[tuple, list[tuple[str, int]]] = {}
    for case, seed in jobs:
        lesson = lessons[case]
        alone = (case, seed) if lesson.recipe.mixup or lesson.recipe.cutout else ()
        shared = replace(lesson.recipe, seed=0, learning_rate=1.0, weight_decay=0.0)
        groups.setdefault((lesson.network, id(lesson.data), shared, *alone), []).append((case, seed))
    return list(groups.values())


def _train(lessons: Sequence[Lesson], seeds: Sequence[int]) -> list[nn.Module | None]:
    """A trained network for each lesson and seed; None for one that diverged."""
    data = lessons[0].data
    models = [build(x.network, data.classes, data.channels, seed=s) for x, s in zip(lessons, seeds, strict=True)]
    objectives = [x.objective(s) for x, s in zip(lessons, seeds, strict=True)]
    recipes = [replace(x.recipe, seed=s) for x, s in zip(lessons, seeds, strict=True)]
    try:
        if len(models) > 1:
            train_many(models, data, objectives, recipes)
        else:
            train(models[0], data, objectives[0], recipes[0])
    except FloatingPointError as error:
        if len(models) == 1:
            print(f"{lessons[0].network}, seed {seeds[0]}: {error}")
            return [None]
        half = len(models) // 2  # who was it?
        return _train(lessons[:half], seeds[:half]) + _train(lessons[half:], seeds[half:])
    return list(models)


def _measured(model: nn.Module | None, measured_on: Mapping[str, ImageSet], teacher_logits: Mapping) -> dict:
    found: dict[str, object] = {"diverged": float(model is None)}
    for split, images in measured_on.items():
        named = "" if split == "test" else f"{split} "
        labels = images.labels.cpu()
        logits = torch.zeros(len(images), images.classes) if model is None else predict_logits(model, images)
        of = scores(logits, labels)
        right = logits.argmax(1) == labels
        found |= {f"{named}accuracy": right, f"{named}nll": of.nll, f"{named}ece": of.ece}
        if split in teacher_logits:
            found[f"{named}agreement"] = agreement(logits, teacher_logits[split])
    return found


def _next_rate(tried: Mapping[float, float]) -> tuple[float, ...]:
    """The rate beyond that end of a list where its best one is; none where the best one is inside."""
    rates = list(tried)  # ascending
    best = max(tried, key=tried.__getitem__)
    if len(rates) > 1 and best == rates[-1]:
        return (rates[-1] ** 2 / rates[-2],)
    if len(rates) > 1 and best == rates[0]:
        return (rates[0] ** 2 / rates[1],)
    return ()


def _key(made_from: Mapping) -> str:
    return artefacts.digest(json.loads(json.dumps(made_from)))


def _stored(case: str, measures: Mapping[str, object]) -> dict:
    """A row's measures as they are saved: numbers, and, of truth values for each image, their bits."""
    numbers, by_image = {}, {}
    for name, value in measures.items():
        if np.ndim(value):
            true = np.asarray(value, bool)
            by_image[name] = {"images": len(true), "bits": base64.b64encode(np.packbits(true)).decode()}
            value = true.mean()
        numbers[name] = float(value)
        if not math.isfinite(numbers[name]):
            raise ValueError(f"measure {name!r} of case {case!r} is {numbers[name]}: expected a finite number")
    return numbers | ({"by image": by_image} if by_image else {})
