"""Publishes chapters: executes them in place, and keeps what others need to recompute or to start from.

python tools/publish.py --profile quick --chapters "02 05"     # make publish PROFILE=quick CHAPTERS="02 05"
python tools/publish.py --profile full --chapters 03 --composed       # from the published records, without a GPU
python tools/publish.py --profile full --chapters 15 --measured-here  # the published students, timed on this machine
python tools/publish.py tidied --before COMMIT --chapters "02 04"     # carry outputs over to rewritten chapters
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import findings
import notebooks
import recipes
import render
import stale
import tested
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
from records import keep, keep_run, pin

import book
from kdlib import evaluate, lab, plots, profiles
from kdlib.records import artefacts
from kdlib.records.documents import save_document


def publish(options: argparse.Namespace) -> None:
    """Execute chapters in place, one after the other; those that are current at that profile are left alone.

    A second run, and laptop's run of a chapter whose page is at profile full, leave the page alone: only their rows are
    kept. A second run comes first: the page of the first run shows it.
    """
    profile = book.resolve(options.profile)
    if options.records:
        publish_run(profile)
        return
    if options.pages:
        fill_pages()
        return
    selected = chapters(options.chapters)
    if options.composed and not options.force:
        for chapter in selected:
            check_composable(chapter)
    notebooks.set_environment(profile.name)
    for say, chapter in one_by_one(selected):
        page = keeps_page(chapter, profile)
        if not page and (reason := left_alone(chapter, profile.name, options)):
            print(f"{say}: {reason}", flush=True)
            continue
        print(say, "…", flush=True)
        start = time.time()
        if page:
            notebook = execute(chapter, RUNS / "publish" / profile.name / chapter.path.name, {}, profile.name)
        else:
            notebook = executed(chapter, profile.name, composed=options.composed, measured_here=options.measured_here)
            notebooks.write(notebook, chapter.path)
        print(f"{say}: {notebook.metadata[STAMP]['seconds']:.0f} s", flush=True)
        if options.composed:
            continue
        if chapter.number == "06" and not page:
            publish_run(profile)
        written = publish_rows(chapter, profile, start)
        if page:
            print(f"{page}; rows kept of {', '.join(written) or 'nothing: it measures none'}", flush=True)


def keeps_page(chapter: Chapter, profile: profiles.Profile) -> str:
    """Why a chapter's page stays as it is, and only its rows are published; empty if it is replaced."""
    stamp = chapter.read().metadata.get(STAMP, {})
    if profile.name != profile.base:
        return f"the page of {chapter.number} shows profile {profile.base}"
    if profile.base == "laptop" and stamp.get("profile") == "full":
        return f"the page of {chapter.number} shows profile full"
    return ""


def publish_rows(chapter: Chapter, profile: profiles.Profile, start: float) -> list[str]:
    """Publish the rows that a chapter has written since `start`, and return their experiments' names.

    Those of profile quick are not: its test set is too small for verdicts.
    """
    written = []
    for path in sorted(profile.folder.glob(f"{chapter.number}_*.json")):
        if profile.base == "quick" or "." in path.stem or path.stat().st_mtime < start - 1:
            continue  # of quick, a backup, or of an earlier run
        rows = lab.load(path)
        if rows["claims"]:
            fill_findings(rows)
            written.append(rows["experiment"])
    return written


def publish_run(profile: profiles.Profile) -> None:
    """Publish the results and the records of the run in ``outputs/<profile>``."""
    try:
        results = evaluate.load_results(profile.folder / "results.json")
    except (FileNotFoundError, ValueError) as error:
        raise Failed(str(error)) from error
    keep_run(profile, BOOK / "published" / profile.name)
    fill_results(results)
    pin()


def left_alone(chapter: Chapter, profile: str, options: argparse.Namespace) -> str:
    """Why a chapter is not executed again; empty if it is."""
    stamp = chapter.read().metadata.get(STAMP)
    if options.force or not stamp:
        return ""
    if stamp["profile"] in ("full", "laptop") and profile == "quick":
        return f"stays as published at profile {stamp['profile']} (--force replaces it)"
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


def executed(chapter: Chapter, profile: str, *, composed: bool, measured_here: bool = False) -> NotebookNode:
    """The executed notebook with its whole stamp."""
    parameters = {"start_from": "published"} if composed or measured_here else {}
    try:
        depends_on = stale.stamp(chapter, profile)
    except stale.CanaryError as error:
        raise Failed(str(error)) from error
    notebook = execute(chapter, RUNS / "publish" / chapter.path.name, parameters, profile)
    stamp = notebook.metadata[STAMP] | depends_on
    if not measured_here:
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
    """Keep a chapter's rows in book/published, and write the pages of verdicts and of advice anew from all of them."""
    save_document(BOOK / "published" / rows["profile"] / f"{rows['experiment']}.json", rows)
    fill_pages()


def fill_pages() -> None:
    """Write what is computed from what is published: verdicts, advice, what 05's controls leave, and the campaigns."""
    for path, block, text in written_pages():
        render.replace_marked(path, block, text)


def written_pages() -> Iterator[tuple[Path, str, str]]:
    """The marked blocks that are computed from what is published: page, name of the block, text."""
    found = findings.findings()
    yield BOOK / "what_we_found.md", "counts", findings.shown_counts(found)
    yield BOOK / "what_we_found.md", "findings", findings.shown(found)
    yield BOOK / "which_recipe.md", "recipes", recipes.shown(found)
    for path in (ROOT / "README.md", BOOK / "intro.md"):
        yield path, "controls", findings.shown_controls()
    yield BOOK / "how_tested.md", "campaigns", tested.shown_campaigns()
    yield BOOK / "how_tested.md", "determinism", tested.shown_determinism()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(action=publish)
    choices(parser, "profile", "chapters")
    parser.add_argument(
        "--force", action="store_true", help="also chapters that are current, and at quick those of full"
    )
    parser.add_argument("--records", action="store_true", help="no chapter, only the records of the run in outputs/")
    parser.add_argument(
        "--pages", action="store_true", help="no chapter, only the pages written from what is published"
    )
    parser.add_argument("--composed", action="store_true", help="from the published records, on any machine")
    parser.add_argument(
        "--measured-here", action="store_true", help="from the published students, of which this machine is measured"
    )
    tidied.add_command(parser.add_subparsers(metavar="tidied"))
    options = parser.parse_args(arguments)
    return exit_status(options.action, options)


if __name__ == "__main__":
    sys.exit(main())
