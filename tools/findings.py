"""The page of verdicts: every claim of the chapters, what the published rows say of it, and what a second run said.

Everything is computed from the files in book/published; ``tools/publish.py`` writes it into book/what_we_found.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np
import scipy.stats
from notebooks import BOOK, Chapter, chapters

from kdlib import lab
from kdlib.lab import replication

NARROW = 0.0025  # an interval's half-width: half the margin of 0.5 points that "about the same" usually asks for
RUNS = ("first run alone", "second run alone")
PART_TWO = ("07", "12")  # its first and last chapter


@dataclasses.dataclass(frozen=True)
class Finding:
    """The rows of one experiment, and its verdicts."""

    chapter: Chapter
    rows: Mapping
    repeat: Mapping | None  # the rows of the second run
    verdicts: list[lab.Verdict]  # of both runs together
    full: Mapping | None  # the rows at profile full, if `rows` are laptop's

    @property
    def runs(self) -> tuple[Mapping, ...]:
        return (self.rows,) if self.repeat is None else (self.rows, self.repeat)


def findings() -> list[Finding]:
    """The experiments with verdicts, in the book's order: at profile laptop, or else full; quick is too coarse."""
    return [
        finding
        for chapter in chapters()
        for name in experiments(chapter)
        if (finding := found(chapter, name)) is not None
    ]


def experiments(chapter: Chapter) -> list[str]:
    """The experiments of a chapter with published rows, such as ``05_controls``."""
    files = (path for profile in ("laptop", "full") for path in (BOOK / "published" / profile).glob("*.json"))
    return sorted({path.stem for path in files if re.fullmatch(rf"{chapter.number}_\w+", path.stem)})


def rows_of(profile: str, experiment: str) -> dict | None:
    """The published rows of an experiment at a profile; None if there are none."""
    path = BOOK / "published" / profile / f"{experiment}.json"
    return lab.load(path) if path.exists() else None


def found(chapter: Chapter, experiment: str) -> Finding | None:
    """An experiment's verdicts; None if it makes no claim, or if its test set is too small for any."""
    laptop, full = (rows_of(profile, experiment) for profile in ("laptop", "full"))
    rows = laptop or full
    if rows is None or not rows["claims"] or replication.too_coarse(rows):
        return None
    repeat = rows_of("laptop-repeat", experiment) if laptop else None
    repeat = repeat if repeat and replication.fits(repeat, rows) else None
    return Finding(chapter, rows, repeat, lab.verdicts(rows, repeat), full if laptop else None)


# --- counts over all chapters --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the page opens with."""

    claims: int
    by_verdict: dict[str, int]  # of all runs together
    decided_first: int  # claims that the first run decides by itself, and that a second run looked at
    same: int  # of these: the second run gives the same verdict
    inconclusive: int  # it does not decide
    reversed: int  # supported in one, contradicted in the other
    by_chance: float  # the same if the second run's verdicts were dealt to the claims at random
    differences: int  # of the accuracies of two cases
    narrow: int  # of these: 95 % half-width below NARROW
    compared: int  # comparisons that both runs made
    apart: int  # of these: means further apart than the spread over seeds explains

    @property
    def decided(self) -> int:
        return self.claims - self.by_verdict[lab.INCONCLUSIVE]


def counts(found: list[Finding]) -> Counts:
    """The counts over all experiments."""
    every = [one for finding in found for one in finding.verdicts]
    pairs = [(one.alone[0].verdict, one.alone[1].verdict) for one in every if one.alone]
    decided = [pair for pair in pairs if pair[0] != lab.INCONCLUSIVE]
    second = [pair[1] for pair in pairs]
    widths = [
        estimate.half
        for one in every
        for comparison, estimate in zip(one.claim["comparisons"], one.judgement.estimates, strict=True)
        if comparison["measure"] == "accuracy" and sorted(comparison["weights"].values()) == [-1, 1]
    ]
    apart = [is_apart for finding in found for is_apart in discrepancies(finding)]
    return Counts(
        claims=len(every),
        by_verdict={verdict: sum(one.verdict == verdict for one in every) for verdict in lab.VERDICTS},
        decided_first=len(decided),
        same=sum(a == b for a, b in decided),
        inconclusive=sum(b == lab.INCONCLUSIVE for _, b in decided),
        reversed=sum({a, b} == {lab.SUPPORTED, lab.CONTRADICTED} for a, b in decided),
        by_chance=sum(second.count(a) / len(second) for a, _ in decided),
        differences=len(widths),
        narrow=sum(half < NARROW for half in widths),
        compared=len(apart),
        apart=sum(apart),
    )


def discrepancies(finding: Finding) -> Iterator[bool]:
    """Of each comparison whether two runs' means lie further apart than their seeds explain (Welch's t test, 5 %).

    The images are left out: they are the same in both runs, so their luck is, too.
    """
    if finding.repeat is None:
        return
    for claim in finding.rows["claims"]:
        for comparison in claim["comparisons"]:
            tables = (lab.weighted(rows, comparison["measure"], comparison["weights"])[1] for rows in finding.runs)
            first, second = (lab.interval(table.mean(1, keepdims=True)) for table in tables)
            squares = np.square([first.error, second.error])
            if 1e-24 < squares.sum() < np.inf:  # otherwise there is no spread to compare with
                freedom = squares.sum() ** 2 / (squares**2 / [first.freedom, second.freedom]).sum()
                reach = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(squares.sum())
                yield bool(abs(first.mean - second.mean) > reach)


# --- the page ------------------------------------------------------------------------------------------------------


def shown_counts(found: list[Finding]) -> str:
    """The counts, in Markdown."""
    if not found:
        return "\nNo chapter is published at profile laptop or full yet, so there are no verdicts.\n\n"
    return "\n" + "\n\n".join([*opening(counts(found)), *missing(found)]) + "\n\n"


def missing(found: list[Finding]) -> Iterator[str]:
    """Which chapters of part two the page says nothing of."""
    there = {finding.chapter.number for finding in found}
    absent = [
        f"[{c.number}]({c.path.name})"
        for c in chapters()
        if c.number not in there and PART_TWO[0] <= c.number <= PART_TWO[1]
    ]
    if absent:
        yield f"**Not there yet.** Chapters without a published run at profile laptop or full: {', '.join(absent)}."


def shown(found: list[Finding]) -> str:
    """Each experiment's table of verdicts, in Markdown."""
    written = "Written by `make publish` from the files in `book/published/`."
    return "\n" + "\n\n".join([*map(section, found), written]) + "\n\n"


def opening(c: Counts) -> Iterator[str]:
    """The counts in words, paragraph by paragraph."""
    words = ", ".join(f"{number} {lab.badge(v)}" for v, number in c.by_verdict.items() if v != lab.INCONCLUSIVE)
    yield (
        f"**{c.claims} claims, {c.decided} of them decided**: {words}. "
        f"The other {c.claims - c.decided} are {lab.badge(lab.INCONCLUSIVE)}."
    )
    if c.decided_first:
        yield (
            f"**Replication.** The first run by itself decides {c.decided_first} claims. On {c.same} of them "
            f"({c.same / c.decided_first:.0%}) the second run gives the same verdict, on {c.inconclusive} it is "
            f"inconclusive, and on {c.reversed} it is reversed (supported against contradicted). If the second run's "
            f"verdicts were dealt to the claims at random, {c.by_chance:.1f} would be the same. Seeds, teachers, "
            "training images and searches differ between the runs; the test images are the same."
        )
    elif not c.compared:
        yield "**Replication.** No second run is published."
    if c.differences:
        yield (
            f"**Width.** Of {c.differences} differences between the accuracies of two cases, {c.narrow} "
            f"({c.narrow / c.differences:.0%}) have a 95 % half-width below {100 * NARROW:g} points."
        )
    if c.compared:
        yield (
            f"**What no interval includes.** In {c.apart} of {c.compared} comparisons ({c.apart / c.compared:.0%}) "
            "the two runs differ by more than their seeds explain (Welch's t test at 5 %, so about "
            f"{0.05 * c.compared:.0f} by chance). The seeds of a run share one set of training images and one "
            "search, and neither is in the interval. The likelier cause is the search, which is made once per run: in "
            "a separate trial (MNIST, profile laptop, CPU, eight seeds each; not among these records), the gain of "
            "distillation had a standard deviation of 0.11 points over seeds with training images of their own, and "
            "of 0.26 over seeds that shared theirs."
        )


def section(finding: Finding) -> str:
    """An experiment's heading, table, and what it took."""
    chapter, rows = finding.chapter, finding.rows
    name = "" if rows["experiment"] == chapter.path.stem else f": {rows.get('title') or rows['experiment'][3:]}"
    full = finding.full
    more = {"at profile full": {one.claim["text"]: one.verdict for one in lab.verdicts(full)}} if full else {}
    table = replication.table(finding.verdicts, RUNS if finding.repeat else (), more).data
    halves = [
        100 * estimate.half
        for one in finding.verdicts
        for comparison, estimate in zip(one.claim["comparisons"], one.judgement.estimates, strict=True)
        if comparison["unit"] == "points" and np.isfinite(estimate.half)
    ]
    width = f" Half-widths: {min(halves):.2f} to {max(halves):.2f} points." if halves else ""
    count = {1: "One run", 2: "Two runs"}[len(finding.runs)]
    return (
        f"## [{chapter.number} {chapter.title}]({chapter.path.name}){name} (profile {rows['profile']})\n\n{table}\n\n"
        f"{count} on {conditions(*finding.runs)}.{width}"
        + (f" At profile full, whose differences are in the chapter: {conditions(full)}." if full else "")
    )


def conditions(*runs: Mapping) -> str:
    """What runs of one experiment were measured on, and how much of it; the data set and date are the first run's."""
    devices = " and ".join(dict.fromkeys(row["device"] for run in runs for row in run["rows"]))
    measured = " and ".join(f"{len(run['rows'])} measurements in {duration(lab.cost(run))}" for run in runs)
    return f"{runs[0]['dataset']}, {devices}, {runs[0]['date']}: {measured}"


def shown_controls() -> str:
    """What is left of distillation's gain after chapter 05's controls, in Markdown; from the published rows alone."""
    runs = [rows for name in ("laptop", "laptop-repeat") if (rows := rows_of(name, "05_controls"))]
    if not runs:
        return "\nThey have not been measured yet.\n\n"
    rows = lab.pooled(*runs)
    seeds = len(lab.values(rows, "alone", "accuracy"))
    pairs = (
        ("distilled, tuned", "alone, tuned"),
        ("distilled, tuned", "alone, everything"),
        ("distilled, twice the epochs", "alone, everything"),
    )
    found = [lab.estimate(rows, ("accuracy", {case: 1, than: -1})) for case, than in pairs]
    gain, left, longer = (f"**{100 * one.mean:+.2f} ± {100 * one.half:.2f} points**" for one in found)
    clear = {1: "the distilled student is ahead", -1: "the student alone is ahead", 0: "neither is clearly ahead"}
    ahead = [clear[(one.mean > one.half) - (one.mean < -one.half)] for one in found[1:]]
    counted = f"{seeds} seeds in {len(runs)} run{'s' if len(runs) > 1 else ''}"
    return (
        f"\nOn MNIST (profile laptop, {counted}, each with its own teacher) the gain in test accuracy is {gain} if "
        "both students are tuned alike. If the student alone is offered everything, twice the epochs included, it is "
        f"{left}: {ahead[0]}. If the distilled student, too, may train for twice the epochs, it is {longer}: "
        f"{ahead[1]}.\n\n"
    )


def duration(seconds: float) -> str:
    """Seconds, or minutes if that is easier to read."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
