"""The workshop: runs, renders and tests the notebooks in book/. It knows the notebooks, not distillation.

    python tools/book.py book --profile quick --chapters "02 05" --params "temperature=8 seed=1"

``make`` calls it; ``python tools/book.py --help`` lists its commands. Beside it stand ``publish.py`` and ``verify.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import papermill
import render
import stale
import sweep
from nbformat import NotebookNode
from notebooks import (
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
    set_environment,
)

import kdlib
from kdlib import evaluate, plots, profiles
from kdlib.records import artefacts

# --- parameters ----------------------------------------------------------------------------------------------------


def read_parameters(text: str, selected: list[Chapter]) -> dict[Chapter, dict]:
    """What each chapter gets of ``temperature=8 seed=1``: the parameters that it has.

    If there are any, the chapters also get `run`, a hash of all of them, so that they share a folder.
    """
    known = {chapter: papermill.inspect_notebook(chapter.path) for chapter in selected}
    hints = {name: p["inferred_type_name"] for own in known.values() for name, p in own.items()}
    values = {}
    for item in shlex.split(text):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise Refused(f"parameter {item!r}: expected name=value, such as temperature=8")
        if name == "profile":
            raise Refused(f"parameter {item!r}: choose the profile with --profile {value} (make: PROFILE={value})")
        if name not in hints:
            hint = artefacts.did_you_mean(name, hints)
            numbers = " ".join(chapter.number for chapter in selected)
            names = ", ".join(sorted(hints.keys() - {"profile"})) or "none, they have no parameters"
            raise Refused(f"parameter {name!r} is unknown to the chapters {numbers}: expected one of {names}{hint}")
        values[name] = parse(name, value, hints[name])
    if (own := values.get("dataset")) and Path(own).expanduser().exists():  # the kernels' working folder is book/
        values["dataset"] = str(Path(own).expanduser().resolve())
    if values:
        values.setdefault("run", artefacts.digest(values))
    return {chapter: {n: v for n, v in values.items() if n in own} for chapter, own in known.items()}


def parse(name: str, text: str, hint: str) -> object:
    """The value of `text` as papermill reads it; Refused if it is not of the parameter's type."""
    if text == "None" or hint not in ("int", "float", "bool"):
        return None if text == "None" else text
    with contextlib.suppress(ValueError, KeyError):
        return {"int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}[hint](text)
    expected = {"int": "a whole number", "float": "a number", "bool": "True or False"}[hint]
    raise Refused(f"parameter {name} is {text!r}: expected {expected}, or None")


def resolve(profile: str, given: dict[Chapter, dict] | None = None) -> profiles.Profile:
    """The profile with all its parameters; Refused if kdlib finds one of them out of range."""
    values = {name: value for parameters in (given or {}).values() for name, value in parameters.items()}
    values = {name: value for name, value in values.items() if name in (*profiles.PARAMETERS, "run")}
    try:
        return kdlib.resolve(profile, **values)
    except ValueError as error:
        raise Refused(str(error)) from error


# --- commands ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> tuple[profiles.Profile, dict[Chapter, NotebookNode]]:
    """Execute chapters into runs/, stopping at the first cell that fails; everything is checked before any runs."""
    given = read_parameters(options.params, chapters(options.chapters))
    profile = resolve(options.profile, given)
    set_environment(profile.name)
    with artefacts.lock(RUNS / profile.folder.name):
        done, outcome, start = {}, "interrupted", time.perf_counter()
        try:
            for say, chapter in one_by_one(list(given)):
                print(say, "…", flush=True)
                output = RUNS / profile.folder.name / chapter.path.name
                done[chapter] = execute(chapter, output, given[chapter], profile.name)
                print(f"{say}: {done[chapter].metadata[STAMP]['seconds']:.0f} s", flush=True)
            outcome = "done"
        except Failed as error:
            outcome = f"failed: {error}"
            raise
        finally:
            sweep.record(profile, given, outcome, time.perf_counter() - start)
    return profile, done


def book(options: argparse.Namespace) -> None:
    """Run, render what was run, and print the table of results and where the page is."""
    profile, done = run(options)
    with artefacts.lock(RUNS / profile.folder.name):
        page = render_book(RUNS / profile.folder.name, done, strict=False)
    if any(chapter.number == "06" for chapter in done):
        results = evaluate.load_results(profile.folder / "results.json")
        print("\n" + plots.text_table(*evaluate.results_rows(results)))
    else:
        print("\nNo table of results: chapter 06, which measures them, was not among the chapters run.")
    print(f"\nThe book: {page.as_uri()}")


def sweep_grid(options: argparse.Namespace) -> None:
    """Run chapters with every combination of some parameters, side by side, and make a table of what came out."""
    selected = chapters(options.chapters)
    grid = sweep.read_grid(options.grid)
    texts = [" ".join(f"{name}={shlex.quote(value)}" for name, value in values.items()) for values in grid]
    # everything is checked before anything runs
    settings = {text: resolve(options.profile, read_parameters(text, selected)) for text in texts}
    for one in settings.values():
        twins = [other for other in settings if settings[other].folder == one.folder]
        if len(twins) > 1:
            raise Refused(
                f"the runs {' and '.join(map(repr, twins))} are the same: expected each value once in the grid"
            )
    profile = next(iter(settings.values())).name
    runs = sweep.sweep(settings, selected, profile)
    folders = [RUNS / one.folder.name for one in settings.values()]
    made = RUNS / f"sweep-{artefacts.digest([profile, options.chapters, texts])}"
    sweep.save(made, runs, grid, folders)
    print("\n" + plots.text_table(*sweep.table_of(runs, grid)))
    print("\nOn validation images, mean ± standard deviation over the students' seeds; gains in points.")
    print(f"The table, every run with the folder of its notebooks, and a picture: {made}")
    if failed := [text for text, known in runs.items() if known["outcome"] != "done"]:
        raise Failed(
            f"{len(failed)} of {len(runs)} runs did not finish, such as {failed[0]}; run.log in its folder says why"
        )


def runs(options: argparse.Namespace) -> None:
    """List what was run, with which parameters, and what came out."""
    rows = [
        [
            name,
            known["profile"],
            " ".join(known["chapters"]),
            sweep.parameters_of(known),
            known["date"][:16],
            sweep.in_words(known),
        ]
        for name, known in sweep.recorded().items()
    ]
    if not rows:
        raise Refused(f"nothing in {RUNS} has left a record: run some chapters first, such as make book")
    print(plots.text_table(["run", "profile", "chapters", "parameters", "date (UTC)", "what came out"], rows))


def compare(options: argparse.Namespace) -> None:
    """Show two runs side by side: parameters, results, and how each ended."""
    known, names = sweep.recorded(), options.runs.split()
    for name in names:
        if name not in known:
            raise Refused(f"run {name!r} has left no record{artefacts.did_you_mean(name, known)}: see make runs")
    if len(names) != 2:
        raise Refused(f'{len(names)} runs: expected two, such as --runs "quick quick-1a2b3c4d" (make: RUNS=…)')
    print(plots.text_table(["", *names], sweep.side_by_side([known[name] for name in names])))


def site(options: argparse.Namespace) -> None:
    """Render what is committed, without executing it; a warning is an error."""
    print(f"The book: {render_book(RUNS / 'site', {}, strict=True).as_uri()}")


def render_book(folder: Path, executed: dict[Chapter, NotebookNode], *, strict: bool) -> Path:
    """Render the book with those notebooks instead of the committed ones; returns the first page."""
    pages = {}
    for chapter in chapters():
        notebook = executed.get(chapter) or chapter.read()
        stamp = notebook.metadata.get(STAMP)
        state = stale.state(chapter, stamp) if stamp and chapter not in executed else None
        note = render.stamp_note(chapter.number, stamp, state)
        pages[chapter.path.name] = render.page(notebook, chapter.number, note)
    return render.render(folder, pages, strict=strict)


def status(options: argparse.Namespace) -> None:
    """Say of each chapter how it was published, and whether that still holds."""
    for chapter in chapters():
        stamp = chapter.read().metadata.get(STAMP)
        state = f"{stale.state(chapter, stamp)} · {render.describe(stamp)}" if stamp else "never published"
        print(f"{chapter.number} {chapter.path.stem[3:]:24} {state}")


def address(options: argparse.Namespace) -> None:
    """Copy the repository's address from pyproject.toml (set there first if a URL is given) to wherever it stands."""
    if options.url:
        if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", options.url):
            raise Refused(f"address {options.url!r}: expected one such as https://github.com/owner/repository")
        project = ROOT / "pyproject.toml"
        text = project.read_text(encoding="utf-8")
        render.replace_text(project, re.sub(r'(?m)^repository = ".*"$', f'repository = "{options.url}"', text))
    render.copy_address()
    print(f"The repository's address is {render.project_address()}")


def test(options: argparse.Namespace) -> None:
    """Run every check, even after a failure: ruff, the tests, and the notebooks against their outputs."""
    python = [sys.executable, "-m"]
    own = ["kdlib", "tools", "tests", "book"]  # not runs/, whose notebooks are copies
    parallel = ["-n", "2", "--dist", "loadfile"]  # a file's tests share its fixtures, a notebook's cells its kernel
    checks = {
        "ruff check": [*python, "ruff", "check", "--quiet", *own],
        "ruff format": [*python, "ruff", "format", "--check", "--quiet", *own],
        "tests": [*python, "pytest", *parallel],
        "notebooks": [*python, "pytest", *parallel, "--nbval-lax", "--nbval-current-env", "book"],
    }
    failed = []
    with tempfile.TemporaryDirectory() as outputs:  # neither what the user has computed, nor for the user to keep
        os.environ["KDLIB_OUTPUTS"] = outputs
        for name, command in checks.items():
            print(f"== {name}", flush=True)
            if name == "notebooks":
                set_environment("quick")
                # in the kernels too, warnings of our own code are errors
                files = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "kdlib").rglob("[a-z]*.py"))]
                modules = ["__main__", *(".".join(file.parts) for file in files)]
                os.environ["PYTHONWARNINGS"] = ",".join(f"error:::{module}" for module in modules)
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(name)
    if failed:
        raise Failed(f"failed: {', '.join(failed)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for action in (run, book, sweep_grid, runs, compare, site, status, address, test):
        command = commands.add_parser(action.__name__.removesuffix("_grid"), help=action.__doc__.splitlines()[0])
        command.set_defaults(action=action)
        if action in (run, book):
            choices(command, "profile", "chapters", "params")
        if action is sweep_grid:
            choices(command, "profile", "chapters")
            command.add_argument("--grid", default="", help='such as "temperature=1,2,4 seed=0,1,2"')
        if action is compare:
            command.add_argument(
                "--runs", default="", help='two names that the command runs lists, such as "quick quick-2"'
            )
        if action is address:
            command.add_argument("url", nargs="?", help="a new address; without it, the one in pyproject.toml")
    options = parser.parse_args(arguments)
    return exit_status(options.action, options)


if __name__ == "__main__":
    sys.exit(main())
