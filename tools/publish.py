"""Publishes chapters: executes them in place, and keeps what others need to recompute or to start from.

python tools/publish.py --profile quick --chapters "02 05"     # make publish PROFILE=quick CHAPTERS="02 05"
python tools/publish.py --profile full --chapters 03 --composed       # from the published records, without a GPU
python tools/publish.py tidied --before COMMIT --chapters "02 04"     # carry outputs over to rewritten chapters
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import notebooks
import render
import stale
import tidied
from nbformat import NotebookNode
from notebooks import (
    BOOK,
    ROOT,
    RUNS,
    STAMP,
    Chapter,
    Failed,
    Refused,
    chapters,
    choices,
    execute,
    exit_status,
    one_by_one,
)
from records import keep, keep_run

import book
from kdlib import evaluate, lab, plots, profiles
from kdlib.records import artefacts


def publish(options: argparse.Namespace) -> None:
    """Execute chapters in place, one after the other; those that are current at that profile are left alone."""
    profile = book.resolve(options.profile)
    if options.records:
        publish_run(profile)
        return
    selected = chapters(options.chapters)
    if options.composed and not options.force:
        for chapter in selected:
            check_composable(chapter)
    notebooks.set_environment(profile.name)
    for say, chapter in one_by_one(selected):
        if reason := left_alone(chapter, profile.name, options):
            print(f"{say}: {reason}", flush=True)
            continue
        print(say, "…", flush=True)
        notebook = executed(chapter, profile.name, composed=options.composed)
        notebooks.write(notebook, chapter.path)
        print(f"{say}: {notebook.metadata[STAMP]['seconds']:.0f} s", flush=True)
        if options.composed:
            continue
        if chapter.number == "06":
            publish_run(profile)
        rows = profile.folder / f"{chapter.path.stem}.json"
        if rows.exists():
            fill_findings(lab.load(rows))


def publish_run(profile: profiles.Profile) -> None:
    """Publish the results and the records of the run in ``outputs/<profile>``."""
    try:
        results = evaluate.load_results(profile.folder / "results.json")
    except (FileNotFoundError, ValueError) as error:
        raise Failed(str(error)) from error
    keep_run(profile, BOOK / "published" / profile.name)
    fill_results(results)


def left_alone(chapter: Chapter, profile: str, options: argparse.Namespace) -> str:
    """Why a chapter is not executed again; empty if it is."""
    stamp = chapter.read().metadata.get(STAMP)
    if options.force or not stamp:
        return ""
    if (stamp["profile"], profile) == ("full", "quick"):
        return "stays as published at profile full (--force replaces it)"
    current = stamp["profile"] == profile and stale.state(chapter, stamp).kind in render.SETTLED
    return "current (--force executes it again)" if current else ""


def check_composable(chapter: Chapter) -> None:
    """Refused if the records may not be what today's kdlib computes, and the stamp would say that they are."""
    if stamp := chapter.read().metadata.get(STAMP):
        state = stale.state(chapter, stamp)
        if not (state.code_only or state.kind in render.SETTLED):
            raise Refused(
                f"chapter {chapter.number} is {state}: only a page whose cells changed, and nothing else, can be "
                "composed from the records (--force does it nevertheless)"
            )


def executed(chapter: Chapter, profile: str, *, composed: bool) -> NotebookNode:
    """The executed notebook with its whole stamp."""
    parameters = {"start_from": "published"} if composed else {}
    try:
        depends_on = stale.stamp(chapter, profile)
    except stale.CanaryError as error:
        raise Failed(str(error)) from error
    notebook = execute(chapter, RUNS / "publish" / chapter.path.name, parameters, profile)
    stamp = notebook.metadata[STAMP] | depends_on
    del stamp["parameters"]
    if composed:
        measured = artefacts.record(BOOK / "published" / profile / "histories.json")["provenance"]
        here = {name: stamp[name] for name in ("device", "date", "commit")}
        stamp |= {name: measured[name] for name in ("device", "date", "versions")}
        stamp |= {"commit": measured.get("commit"), "composed": here}
        notebooks.without(notebook, "injected-parameters")  # the cell that says start_from="published"
    notebook.metadata[STAMP] = stamp
    return notebook


# --- results and verdicts ------------------------------------------------------------------------------------------


def fill_results(results: dict) -> None:
    """Keep results in book/published, and show them in the README and the introduction, so that nobody types a figure.

    Those of profile quick are kept, but not shown if there are some of profile full.
    """
    folder = BOOK / "published"
    made = {"device": results["runs"][0]["device"], "date": results["date"], "versions": results.get("versions")}
    content = (json.dumps(results, indent=1) + "\n").encode()
    keep(folder / results["profile"] / "results.json", content, {"profile": results["profile"]}, made)
    if results["profile"] != "full" and (folder / "full" / "results.json").exists():
        return
    with artefacts.atomic_write(folder / "results.png") as partial:
        plots.results(results).savefig(partial)
    for path in (ROOT / "README.md", BOOK / "intro.md"):
        picture = os.path.relpath(folder / "results.png", path.parent)
        render.replace_marked(path, "results", shown_results(results, picture))


def shown_results(results: dict, picture: str) -> str:
    """The figure and the table of results, in Markdown."""
    alt = "The test accuracy of the teacher, the student alone and the distilled student, a dot for each seed"
    measured = (
        f"Profile {results['profile']} ({results['dataset']}) on {results['runs'][0]['device']}, {results['date']}"
    )
    table = plots.table(*evaluate.results_rows(results, latency=False)).data
    return f"\n![{alt}]({picture})\n\n{table}\n\n{measured}; written by `make publish`.\n\n"


def fill_findings(rows: dict) -> None:
    """Keep a chapter's rows in book/published, and write the page of verdicts anew from all of them."""
    artefacts.save_json(BOOK / "published" / rows["profile"] / f"{rows['experiment']}.json", rows)
    render.replace_marked(BOOK / "what_we_found.md", "findings", shown_findings())


def shown_findings() -> str:
    """Of each chapter with rows its claims and verdicts, in Markdown: at profile full if there are any.

    Everything is computed from the files in book/published.
    """
    sections, verdicts = [], []
    for chapter in chapters():
        files = (BOOK / "published" / profile / f"{chapter.path.stem}.json" for profile in ("full", "quick"))
        path = next((path for path in files if path.exists()), None)
        if path is None:
            continue
        rows = lab.load(path)
        verdicts += [lab.judge(claim, rows).verdict for claim in rows["claims"]]
        devices = ", ".join(dict.fromkeys(row["device"] for row in rows["rows"]))
        table = plots.table(*lab.verdict_rows(rows)).data
        sections.append(
            f"## [{chapter.number} {chapter.title}]({chapter.path.name})\n\n{table}\n\n"
            f"Profile {rows['profile']} ({rows['dataset']}) on {devices}, {rows['date']}: {len(rows['rows'])} "
            f"measurements, {duration(lab.cost(rows))} in all.\n"
        )
    plural = {lab.HOLDS: "hold", lab.PARTLY: "hold partly", lab.NOT_SEEN: "were not seen here"}
    counted = ", ".join(f"**{verdicts.count(verdict)}** {words}" for verdict, words in plural.items())
    total = f"Of {len(verdicts)} claims {counted}. Written by `make publish` from the files in `book/published/`."
    return "\n" + "\n".join([total + "\n", *sections]) + "\n"


def duration(seconds: float) -> str:
    """Seconds, or minutes if that is easier to read."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(action=publish)
    choices(parser, "profile", "chapters")
    parser.add_argument(
        "--force", action="store_true", help="also chapters that are current, and at quick those of full"
    )
    parser.add_argument("--records", action="store_true", help="no chapter, only the records of the run in outputs/")
    parser.add_argument("--composed", action="store_true", help="from the published records, on any machine")
    tidied.add_command(parser.add_subparsers(metavar="tidied"))
    options = parser.parse_args(arguments)
    return exit_status(options.action, options)


if __name__ == "__main__":
    sys.exit(main())
