"""The verdicts on an experiment's claims: of one run, of its second run with other seeds, and of both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from IPython.display import Markdown

from kdlib import plots
from kdlib.lab.claims import Judgement, judge, pooled
from kdlib.lab.rows import load, weighted
from kdlib.profiles import Profile
from kdlib.records.fetch import clone_folder

SECOND_RUN = {"laptop": ("laptop-repeat", "second run"), "laptop-repeat": ("laptop", "first run")}
ENOUGH_IMAGES = 5000  # in a test set, for verdicts: a difference of half a point is then 25 images


@dataclass(frozen=True)
class Verdict:
    """What is said of one claim."""

    claim: Mapping
    judgement: Judgement  # of all rows there are
    alone: tuple[Judgement, ...]  # of each run by itself; empty if there is only one

    @property
    def verdict(self) -> str:
        return self.judgement.verdict


def verdicts(experiment: Mapping, repeat: Mapping | None = None) -> list[Verdict]:
    """The verdicts on an experiment's claims; with a second run, those of both together and of each alone.

    Raises:
        ValueError: the second run shares seeds with the first, or lacks what a claim compares.
    """
    runs = (experiment,) if repeat is None else (experiment, repeat)
    together = pooled(*runs)
    return [
        Verdict(claim, judge(claim, together), tuple(judge(claim, run) for run in runs) if len(runs) > 1 else ())
        for claim in experiment["claims"]
    ]


def images_tested(experiment: Mapping) -> int | None:
    """How many test images decide the claims; None if the rows do not say."""
    measures = {c["measure"] for claim in experiment["claims"] for c in claim["comparisons"]}
    held = (
        own["images"] for row in experiment["rows"] for name, own in row.get("by image", {}).items() if name in measures
    )
    return max(held, default=None)


def too_coarse(experiment: Mapping) -> bool:
    """Whether the test set is too small for verdicts."""
    images = images_tested(experiment)
    return images is not None and images < ENOUGH_IMAGES


def published_rows(profile: str, experiment: str) -> dict | None:
    """The rows of an experiment that the clone publishes at a profile; None if there are none."""
    clone = clone_folder()
    path = clone and clone / "book" / "published" / profile / f"{experiment}.json"
    return load(path) if path and path.exists() else None


def second_run(profile: str, experiment: Mapping) -> dict | None:
    """The published second run of an experiment, if it holds all that the claims compare and its seeds are others."""
    repeat = published_rows(SECOND_RUN[profile][0], experiment["experiment"]) if profile in SECOND_RUN else None
    return repeat if repeat and fits(repeat, experiment) else None


def fits(repeat: Mapping, experiment: Mapping) -> bool:
    try:
        pooled(experiment, repeat)
        for claim in experiment["claims"]:
            for c in claim["comparisons"]:
                weighted(repeat, c["measure"], c["weights"])
    except ValueError:
        return False
    return True


# --- shown ---------------------------------------------------------------------------------------------------------


def badge(verdict: str) -> str:
    """A verdict as the pages show it: its word in a coloured field."""
    kind, _, rest = verdict.partition(" ")
    return f'<span class="verdict {kind}">{kind}{" " if rest else ""}{rest}</span>'


def table(
    found: Sequence[Verdict], runs: Sequence[str] = (), more: Mapping[str, Mapping[str, str]] | None = None
) -> Markdown:
    """The table of verdicts: claim with source, verdict, figures, and the verdicts of each run alone.

    Args:
        runs: the columns' headings of the runs alone, if there are two.
        more: further columns: heading -> claim's text -> verdict.
    """
    header = ["claim", "verdict", "difference and 95 % interval", *runs, *(more or {})]
    rows = []
    for one in found:
        claim, figures = _claim_and_figures(one)
        alone = [badge(own.verdict) for own in one.alone] if runs else []
        others = [column.get(one.claim["text"]) for column in (more or {}).values()]
        rows.append([claim, badge(one.verdict), figures, *alone, *(badge(own) if own else "" for own in others)])
    return plots.table(header, rows)


def verdict_table(settings: Profile, experiment: Mapping) -> Markdown:
    """A chapter's claims, their figures and verdicts, with those of the published second run beside them.

    With fewer than 5,000 test images it shows figures and no verdicts; at profile full it shows the verdicts at profile
    laptop, too, if they are published.
    """
    if too_coarse(experiment):
        rows = [_claim_and_figures(one, verdict=False) for one in verdicts(experiment)]
        shown = plots.table(["claim", "difference and 95 % interval"], rows)
        note = f"Too coarse for a verdict: {images_tested(experiment):,} images (profile laptop tests on 10,000)."
        return Markdown(f"{shown.data}\n\n{note}")
    repeat = None if settings.run else second_run(settings.name, experiment)
    found = verdicts(experiment, repeat)
    if repeat:
        shown = table(found, ("this run alone", f"{SECOND_RUN[settings.name][1]} alone"))
        note = (
            "Verdicts and figures are those of both runs together: other seeds, teachers and training images, and the "
        )
        note += "same test images."
        return Markdown(f"{shown.data}\n\n{note}")
    if settings.base == "laptop":
        note = "No second run was at hand: these are the verdicts of this run alone."
        return Markdown(f"{table(found).data}\n\n{note}")
    at_laptop = verdicts_at_laptop(experiment["experiment"]) if settings.base == "full" else {}
    return table(found, more={"at profile laptop": at_laptop} if at_laptop else {})


def verdicts_at_laptop(experiment: str) -> dict[str, str]:
    """The published verdicts at profile laptop, of all runs together, by the claim's text; empty if there are none."""
    rows = published_rows("laptop", experiment)
    return {one.claim["text"]: one.verdict for one in verdicts(rows, second_run("laptop", rows))} if rows else {}


def _claim_and_figures(found: Verdict, *, verdict: bool = True) -> tuple[str, str]:
    text, source = (found.claim[name].replace("|", "\\|") for name in ("text", "source"))
    figures = found.judgement.figures if verdict else found.judgement.measured
    labelled = zip(found.claim["comparisons"], figures, strict=True)
    return f"{text} ({source})", "<br>".join(f"{described(c['weights'])}: {figure}" for c, figure in labelled)


def described(weights: Mapping[str, float]) -> str:
    """``*soft* − 0.5 × *hard*``: what a comparison adds up, in Markdown."""
    words = ""
    for case, weight in weights.items():
        words += (" − " if weight < 0 else " + ") if words else ("−" if weight < 0 else "")
        words += ("" if abs(weight) == 1 else f"{abs(weight):.3g} × ") + f"*{case}*".replace("|", "\\|")
    return words
