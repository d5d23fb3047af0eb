"""The page on how the book is tested, filled from what the campaigns in tests/ measured."""

from __future__ import annotations

from notebooks import BOOK

from kdlib import plots
from kdlib.records.documents import load_document

RECORD = BOOK / "published" / "campaigns.json"
# campaign: what was tried, what came of it; the names in braces are those of its figures
CAMPAIGNS = {
    "kill": (
        "{kills:,.0f} kills at random moments of trainings, sweeps and `make book`, and death at each of "
        "{crash_points:,.0f} file operations",
        "after {kills_survived:,.0f} and {crash_points_survived:,.0f} of them the next run went on, to the same bits",
    ),
    "rot": (
        "{flips:,.0f} flipped bits and {truncations:,.0f} truncations, over {kinds:.0f} kinds of files",
        "{silent:,.0f} unnoticed; {harmless:,.0f} harmless (a bit that makes `1E-05` of `1e-05`, a last line break "
        "cut off); all others refused, renamed to a backup, or replaced by an intact copy",
    ),
    "hostile": (
        "{files:,.0f} hostile or absurd files, each given to the function that reads its kind",
        "{refused:,.0f} refused by name, {harmless:,.0f} read as what they are; {read:,.0f} read as something else, "
        "{executed:,.0f} executed code, {hanging:,.0f} hung, {without_a_message:,.0f} failed without a message; at "
        "most {peak_mb:,.0f} MB of memory",
    ),
    "together": (
        "{pairs:,.0f} pairs of processes that work on the same files at the same moment",
        "{wrong:,.0f} wrong; no row and no weights lost",
    ),
    "larger": (
        "{images_mb:,.0f} MB of images decoded, trained on and predicted in a process that may grow by "
        "{limit_mb:,.0f} MB",
        "it grew by {grown_mb:,.0f} MB",
    ),
}
WAYS = {
    "once more": "the same once more",
    "two threads": "on two threads",
    "AVX2": "on a simulated processor without AVX512",
    "no vectors": "on a simulated one without AVX",
    "float64, AVX2": "in float64, on a simulated one without AVX512",
}


def shown_campaigns() -> str:
    """The table of campaigns, in Markdown; those that were not run say so."""
    known, rows = recorded(), []
    for name, (tried, outcome) in CAMPAIGNS.items():
        command = f"`python -m tests.{name}`"
        if name not in known:
            rows.append([command, "not measured yet", "", ""])
            continue
        figures, one = known[name]["figures"], known[name]
        when = f"{one['date']}, {duration(one['seconds'])}, {one['device']}"
        rows.append([command, tried.format(**figures), outcome.format(**figures), when])
    return f"\n{plots.table(['command', 'tried', 'outcome', 'measured'], rows).data}\n\n"


def shown_determinism() -> str:
    """How far trainings differ, in Markdown."""
    if (one := recorded().get("determinism")) is None:
        return "\nNot measured yet: `python -m tests.determinism` does.\n\n"
    found = one["figures"]
    rows = [
        [
            text,
            f"{found[f'{way}: identical']:.0f} of {found[f'{way}: of']:.0f}",
            f"{found[f'{way}: logits']:.2g}",
            f"{found[f'{way}: predictions']:.2g} %",
            f"{found[f'{way}: accuracy']:.2g}",
        ]
        for way, text in WAYS.items()
    ]
    header = ["trained", "bit-identical", "logits differ by up to", "predictions that differ", "accuracy, points"]
    seeds, rounding = found["spread over seeds"], found["spread over roundings"]
    return (
        f"\n{plots.table(header, rows).data}\n\n"
        f"**One rounding is like another seed.** Over 20 seeds the quick teacher is right on {found['accuracy']:.1f} ± "
        f"{seeds:.2f} % of {found['images']:.0f} test images (mean ± standard deviation). With a single seed, and one "
        f"weight of the first layer moved by one unit in the last place before training, a different one in each of 20 "
        f"trainings, the standard deviation is {rounding:.2f} points.\n\n"
        f"{found['trainings']:.0f} trainings of the quick profile's teacher, {one['date']}, "
        f"{duration(one['seconds'])}, {one['device']}, torch {one['versions']['torch']}; "
        "`python -m tests.determinism`.\n\n"
    )


def recorded() -> dict[str, dict]:
    """What each campaign that was run has measured."""
    return load_document(RECORD, "file of campaigns", "run them again") if RECORD.exists() else {}


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
