"""Carries the outputs of published chapters over to their rewritten versions, without a run on a GPU.

    python tools/publish.py tidied --before COMMIT --chapters "02 04"

The chapters of that commit are executed at profile quick with the code of that commit, and those that are here with the
code that is here. Where both compute the same output, the rewritten cell gets the output that was published at COMMIT.
No output is typed or edited. A cell whose output matches none keeps none, and its page says so.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import notebooks
import numpy as np
import stale
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from notebooks import BOOK, PENDING, ROOT, STAMP, Chapter, Failed, chapters, choices, execute, one_by_one
from PIL import Image

PROFILE = "quick"  # at which both versions are executed
CHECKED = "nbval-check-output"  # cells that print the same in every profile
TIMES = re.compile(r"\d[\d,.]*")
INJECTED = "tidied-figures"
# the oldest code draws figures as PNG, so all must
DRAW_PNG = """\
def _draw_png():
    from kdlib import plots

    for kind in vars(plots).values():
        if isinstance(kind, type) and "_ipython_display_" in vars(kind):
            del kind._ipython_display_


_draw_png()"""


@dataclasses.dataclass
class Carried:
    """What becomes of one code cell."""

    outputs: list[NotebookNode]
    how: str  # in words, for the report
    matched: int  # outputs of this run at quick that the old version computes as well
    pending: bool = False  # outputs are missing


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the command ``tidied`` to those of tools/publish.py."""
    command = commands.add_parser("tidied", help=__doc__.splitlines()[0])
    command.set_defaults(action=tidied)
    choices(command, "chapters")
    command.add_argument("--before", required=True, metavar="COMMIT", help="at which the chapters were published")
    command.add_argument(
        "--timed", default="", metavar="CELLS", help="ids of cells that show times: figures are ignored"
    )
    command.add_argument("--dry-run", action="store_true", help="only say what would be carried over")


def tidied(options: argparse.Namespace) -> None:
    """Carry the published outputs of a commit over to the chapters that are here."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        commit = check_out(options.before, temporary / "before")
        notebooks.set_environment(PROFILE)
        for say, chapter in one_by_one(chapters(options.chapters)):
            print(say, "…", flush=True)
            old = published_at(commit, temporary / "before", chapter)
            with code_of(temporary / "before", temporary / "outputs-before"):
                before = execute_with_png(old, temporary / "runs-before" / old.path.name, old.path.parent)
            with code_of(ROOT, temporary / "outputs-after"):
                after = execute_with_png(chapter, temporary / "after" / chapter.path.name, BOOK)
            timed = [cell.id for cell in after.cells if cell.id in options.timed.split()]
            carried = carry(code_cells(before), code_cells(old.read()), code_cells(after), timed)
            for cell, fate in zip(code_cells(after), carried, strict=True):
                print(f"  {cell.id:24} {fate.how}", flush=True)
            notebook = filled(chapter, after, carried, old.read().metadata[STAMP], commit, timed)
            if not options.dry_run:
                notebooks.write(notebook, chapter.path)


def check_out(commit: str, folder: Path) -> str:
    """Unpack the files of a commit into `folder`; returns the commit's short name."""

    def git(*command: str) -> bytes:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True)
        if done.returncode:
            raise Failed(f"commit {commit!r}: git says {done.stderr.decode().strip()}")
        return done.stdout

    name = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", name))) as archive:
        archive.extractall(folder, filter="data")
    return name


def published_at(commit: str, tree: Path, chapter: Chapter) -> Chapter:
    """The chapter as it was at that commit; Failed if it was not published there, or was stale already."""
    old = next((Chapter(path) for path in (tree / "book").glob(f"{chapter.number}_*.ipynb")), None)
    if old is None or STAMP not in old.read().metadata:
        raise Failed(
            f"chapter {chapter.number} was not published at {commit}: expected a commit that holds its outputs"
        )
    command = [sys.executable, "tools/book.py", "status"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(f"{chapter.number} ")), done.stderr)
    if " current" not in line:
        raise Failed(f"chapter {chapter.number} did not hold at {commit} already: {line.strip()}")
    return old


@contextlib.contextmanager
def code_of(tree: Path, outputs: Path) -> Iterator[None]:
    """Kernels use the kdlib of that tree, and keep artefacts in that folder."""
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(tree), "KDLIB_OUTPUTS": str(outputs)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute_with_png(chapter: Chapter, path: Path, folder: Path) -> NotebookNode:
    """Execute a copy of the chapter in `folder`; its figures are PNG, as those of the oldest code are."""
    notebook = chapter.read()
    notebook.cells.insert(0, new_code_cell(DRAW_PNG, metadata={"tags": [INJECTED]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    notebooks.write(notebook, path)
    executed = execute(Chapter(path), path.with_name(f"executed-{path.name}"), {}, PROFILE, folder=folder)
    return notebooks.without(executed, INJECTED)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# --- matching ------------------------------------------------------------------------------------------------------


def carry(
    before: list[NotebookNode], published: list[NotebookNode], after: list[NotebookNode], timed: list[str]
) -> list[Carried]:
    """What each code cell of the rewritten chapter gets.

    Args:
        before: the code cells of the old chapter, executed at quick.
        published: the same cells with their published outputs.
        after: the code cells of the rewritten chapter, executed at quick.
        timed: ids of cells in `after` whose outputs show times; there, figures are not compared.
    """
    old = {(i,): cell.outputs for i, cell in enumerate(before) if cell.outputs}
    new = {(i,): cell.outputs for i, cell in enumerate(after) if cell.outputs}
    found = match(old, new, lambda place: published[place[0]].outputs, content)
    rest = {place: outputs for place, outputs in old.items() if place not in found.values()}
    slow = {place: outputs for place, outputs in new.items() if place not in found and after[place[0]].id in timed}
    found |= match(rest, slow, lambda place: published[place[0]].outputs, without_figures)

    # cells that were split or joined: output by output, where the published cell has as many
    def alone(cells: dict, used: object) -> dict:
        return {
            (*place, k): [o] for place, outputs in cells.items() if place not in used for k, o in enumerate(outputs)
        }

    whole = {place: o for place, o in old.items() if len(published[place[0]].outputs) == len(o)}
    parts = match(
        alone(whole, found.values()), alone(new, found), lambda place: [published[place[0]].outputs[place[1]]], content
    )
    carried = []
    for i, cell in enumerate(after):
        own = [parts[i, k] for k in range(len(cell.outputs)) if (i, k) in parts]
        if not cell.outputs:
            fate = Carried([], "no output", 0)
        elif (i,) in found:
            (j,) = found[i,]
            fate = Carried(published[j].outputs, f"all, from {before[j].id}", len(cell.outputs))
        elif len(own) < len(cell.outputs) and CHECKED in cell.metadata.get("tags", []):
            fate = Carried(cell.outputs, f"as {PROFILE} prints it: the same in every profile ({CHECKED})", 0)
        elif own:
            outputs = [published[j].outputs[k] for j, k in own]
            missing = len(cell.outputs) - len(own)
            how = f"{len(own)} of {len(cell.outputs)}, from {', '.join(dict.fromkeys(before[j].id for j, _ in own))}"
            fate = Carried(outputs, how, len(own), pending=missing > 0)
        else:
            fate = Carried([], f"NONE matches: {summary(cell.outputs[0])}", 0, pending=True)
        carried.append(fate)
    return carried


def match(old: dict, new: dict, published: Callable, key: Callable[[NotebookNode], Hashable]) -> dict:
    """New places, each with the old place of the same outputs: in order and one to one.

    If several places show the same and there are more on one side, only order could tell which belong together: they
    are matched if what was published is the same in all of them.
    """
    by_key: dict[Hashable, tuple[list, list]] = defaultdict(lambda: ([], []))
    for side, places in enumerate((old, new)):
        for place, outputs in places.items():
            by_key[tuple(map(key, outputs))][side].append(place)
    found = {}
    for olds, news in by_key.values():
        alike = len({json.dumps([content(o) for o in published(place)]) for place in olds}) == 1
        if len(olds) == len(news) or alike:
            found |= dict(zip(news, olds, strict=False))
    return found


def content(output: NotebookNode) -> tuple[str, str]:
    """What a reader sees of an output: its kind and text; of a figure the SHA-256 of its pixels."""
    if output.output_type == "stream":
        return "text", output.text
    data = output.get("data", {})
    if "image/png" in data:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))
        return "image/png", f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
    kind = next(kind for kind in ("text/markdown", "text/html", "image/svg+xml", "text/plain") if kind in data)
    return kind, data[kind]


def without_figures(output: NotebookNode) -> tuple[str, str]:
    """The content of an output that shows times: its text without the numbers."""
    kind, text = content(output)
    return kind, text if kind == "image/png" else TIMES.sub("#", text)


def summary(output: NotebookNode) -> str:
    """The beginning of an output, in one line."""
    return " ".join(content(output)[1].split())[:70]


# --- the new notebook ----------------------------------------------------------------------------------------------


def filled(
    chapter: Chapter, after: NotebookNode, carried: list[Carried], stamp: dict, commit: str, timed: list[str]
) -> NotebookNode:
    """The chapter with the carried outputs, and a stamp that says of which run they are and what proves it."""
    notebook, total = chapter.read(), sum(len(cell.outputs) for cell in code_cells(after))
    for cell, executed, fate in zip(code_cells(notebook), code_cells(after), carried, strict=True):
        cell.execution_count, cell.outputs = executed.execution_count, copy.deepcopy(fate.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
        cell.metadata.pop(PENDING, None)
        if fate.pending or (executed.outputs and not fate.outputs):  # the older page had none to carry either
            cell.metadata[PENDING] = True
    matched = sum(fate.matched for fate in carried)
    stamp = {name: value for name, value in stamp.items() if name not in ("hash", "depends_on")}
    notebook.metadata[STAMP] = stamp | {
        "depends_on": stale.stamp(chapter, stamp["profile"])["depends_on"],
        "tidied": {
            "commit": stamp.get("tidied", {}).get("commit", commit),  # outputs that were carried before are older
            "proof": f"same results at {PROFILE} in {matched} of {total} outputs" + (", times aside" if timed else ""),
            "profile": PROFILE,
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            "carried": matched,
            "of": total,
        },
    }
    print(f"  {matched} of {total} outputs are the same at {PROFILE}")
    return notebook
