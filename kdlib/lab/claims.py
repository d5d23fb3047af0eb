"""What the literature says of distillation, as comparisons between measured cases, and the verdicts on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import scipy.stats

from kdlib.lab.rows import paired_differences, share_by_image

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
    """A statement about distillation, and the comparisons that test it."""

    text: str
    source: str  # who says it, as Markdown: usually a link to the paper
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Judgement:
    """What an experiment says about a claim."""

    verdict: str  # HOLDS, PARTLY or NOT_SEEN
    figure: str  # each comparison's difference, with its 95 % interval


def difference(experiment: Mapping, measure: str, case: str, than: str | float) -> tuple[float, float, int]:
    """How much more one case measures than another: mean, half of its 95 % interval, number of seeds.

    Paired by seed and, if the rows hold which images were classified correctly, by image. The interval then allows for
    other seeds (Student's t over the seeds' differences) and for other images of the same kind (normal, over the
    images' differences, each averaged over the seeds). The two half-widths are added as squares, which errs on the wide
    side: the second still holds some of the seeds' luck. Without such rows it is over the seeds alone. With a single
    seed it is unbounded.

    Raises:
        ValueError: no such case or measure, or no seed that both cases have.
    """
    by_seed = paired_differences(experiment, measure, case, than)
    seeds, differences = list(by_seed), np.array(list(by_seed.values()), float)
    n = len(seeds)
    half = scipy.stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
    first = share_by_image(experiment, measure, case, seeds)
    second = share_by_image(experiment, measure, than, seeds) if isinstance(than, str) else than
    if first is not None and second is not None:
        by_image = first - second
        half = np.hypot(half, scipy.stats.norm.ppf(0.975) * by_image.std(ddof=1) / np.sqrt(len(by_image)))
    return float(differences.mean()), float(half), n


def judge(claim: Claim | Mapping, experiment: Mapping) -> Judgement:
    """Whether the measurements support a claim.

    A comparison is supported if its whole 95 % interval lies beyond the margin; for *about the same*, if the whole
    interval lies within the margin. A claim holds if all its comparisons are supported, holds partly if some are, and
    was not seen here if none is: that is not the same as refuted. If the whole interval contradicts the comparison, the
    figure says so.
    """
    claim = asdict(claim) if isinstance(claim, Claim) else claim
    supported, figures = [], []
    for c in claim["comparisons"]:
        mean, half, n = difference(experiment, c["measure"], c["case"], c["than"])
        sign, margin, scale = c["sign"], c["margin"], 100 if c["unit"] == "points" else 1
        if sign:
            supported.append(bool(sign * mean - half > margin))
            contradicted = sign * mean + half < min(0, margin)
            demand = f"{'more' if sign > 0 else 'less'} than {scale * sign * margin:g}" if margin else ""
        else:
            supported.append(bool(abs(mean) + half < margin))
            contradicted = abs(mean) - half > margin
            demand = f"within {scale * margin:g}"
        details = f"n = {n}" + (f"; asked for: {demand}" if demand else "")
        opposite = ", the other way round" if contradicted else ""
        figures.append(f"{scale * mean:+.2f} ± {scale * half:.2f} {c['unit']}".strip() + f" ({details}){opposite}")
    verdict = HOLDS if all(supported) else PARTLY if any(supported) else NOT_SEEN
    return Judgement(verdict, "; ".join(figures))


def verdict_rows(experiment: Mapping) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of verdicts: claim, source, our figure, verdict."""
    no_break = {text: text.replace(" ", "\N{NO-BREAK SPACE}") for text in (" ± ", "n = ")}
    rows = []
    for claim in experiment["claims"]:
        judgement = judge(claim, experiment)
        figure = judgement.figure
        for text, joined in no_break.items():  # a figure is not broken at the end of a line
            figure = figure.replace(text, joined)
        rows.append([claim["text"], claim["source"], figure, f"**{judgement.verdict}**"])
    return ["claim", "source", "here: mean difference and 95 % interval", "verdict"], rows
