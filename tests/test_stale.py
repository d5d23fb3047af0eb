"""When a published page is stale: syntax trees, recipes, the canary, and the word that kdlib/gpu asks for."""

import functools
import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell
from workshop import ROOT, change_cell, copy_tree, tool, write_notebook

import kdlib
from kdlib import models

TOPICS = ("data", "datasets", "losses", "train", "models perceptron")  # of the canary, in tests: no ResNet-50
BODY = """\
from functools import partial

from kdlib import data as images, plots

data = kdlib.load_data("digits")
# the objective
objective = partial(kdlib.distillation_loss, temperature=4, alpha=0.1)
plots.curves
"""


@functools.cache
def canary_here(package: Path) -> dict:
    """The canary's figures on that kdlib, in this process: without seconds of imports each time."""

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in ("kdlib", "canary")]

    before = {name: sys.modules.pop(name) for name in ours()}
    try:
        with mock.patch.object(sys, "path", [str(package.parent), str(ROOT / "tools"), *sys.path]):
            return importlib.import_module("canary").figures(*TOPICS)
    finally:
        torch.set_default_dtype(torch.float32)
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> SimpleNamespace:
    """A book of one page, with its tools, as it was stamped when it was run."""
    tree = copy_tree(tmp_path_factory.mktemp("published"))
    cells = [
        new_markdown_cell("# A page", id="title"),
        new_code_cell("%pip install kdlib\nimport kdlib", id="setup", metadata={"tags": ["setup"]}),
        new_code_cell(BODY, id="body"),
        new_code_cell("%matplotlib inline\nkdlib.train(objective)", id="run"),
    ]
    (tree / "book").mkdir()
    write_notebook(tree / "book" / "01_page.ipynb", cells)
    stale = tool(tree, "stale")
    page = stale.Chapter(tree / "book" / "01_page.ipynb")
    canary = stale.run_canary(tree / "kdlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stale, "run_canary", lambda package: {topic: canary[topic] for topic in TOPICS})
        stamp = {"profile": "quick", **stale.stamp(page, "quick")}
    return SimpleNamespace(tree=tree, stale=stale, run_canary=stale.run_canary, canary=canary, stamp=stamp)


@pytest.fixture
def page(published, tmp_path, monkeypatch) -> SimpleNamespace:
    """The same page and its stamp, with a kdlib and a notebook of its own to change."""
    shutil.copytree(published.tree / "kdlib", tmp_path / "kdlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(published.tree / "book", tmp_path / "book")
    stale, path = published.stale, tmp_path / "book" / "01_page.ipynb"
    monkeypatch.setattr(stale.trees, "PACKAGE", tmp_path / "kdlib")
    monkeypatch.setattr(stale, "run_canary", canary_here)
    monkeypatch.setattr(stale, "GPU_UNCHANGED", tmp_path / "gpu_unchanged.json")
    monkeypatch.setattr(stale, "chapters", lambda: [stale.Chapter(path)])
    stamp = json.loads(json.dumps(published.stamp))

    def state(stamp: dict = stamp):
        return stale.state(stale.Chapter(path), stamp)

    return SimpleNamespace(stale=stale, path=path, kdlib=tmp_path / "kdlib", stamp=stamp, state=state)


def change(path: Path, old: str, new: str) -> None:
    """Replace a regular expression in a file."""
    text, count = re.subn(old, new, path.read_text(encoding="utf-8"))
    assert count, f"{old} is not in {path.name} any more"
    path.write_text(text, encoding="utf-8")


# --- the stamp -----------------------------------------------------------------------------------------------------


def test_a_stamp_says_what_a_page_depends_on(published):
    stamp = published.stamp["depends_on"]
    assert stamp["numerics"] == kdlib.NUMERICS
    assert stamp["recipe"]["teacher_recipe.epochs"] == kdlib.resolve("quick").teacher_recipe.epochs
    assert not stamp["recipe"].keys() & {"start_from", "threads", "run"}
    assert {"kdlib.data", "kdlib.losses", "kdlib.train", "kdlib.evaluate"} <= stamp["modules"].keys()
    assert not [name for name in stamp["modules"] if name.startswith(("kdlib.gpu", "kdlib.plots", "kdlib.lab"))]
    assert {"cutout", "perceptron, gradient"} <= stamp["canary"].keys()
    assert len(json.dumps(stamp)) < 10_000
    assert published.stamp["commit"] is None  # the copy is no clone
    assert re.match(r"[0-9a-f]{7,}", commit_of_the_clone() or "0000000")


def commit_of_the_clone() -> str | None:
    return tool(ROOT, "stale").commit()


def test_a_stamp_holds_only_figures_of_what_the_page_uses(page, monkeypatch):
    topics = ("losses", "lab.claims", "models resnet50", "models perceptron", "models cnn")
    monkeypatch.setattr(page.stale, "run_canary", lambda package: {topic: {topic: [1.0]} for topic in topics})

    def figures() -> set:
        return set(page.stale.stamp(page.stale.Chapter(page.path), "quick")["depends_on"]["canary"])

    assert figures() == {"losses", "models perceptron"}  # perceptron is in the recipe
    change_cell(page.path, "run", "from kdlib import lab\nkdlib.train(lab.Claim('cnn'))")
    assert figures() == {"losses", "models perceptron", "models cnn", "lab.claims"}
    for cell in ("body", "run"):
        change_cell(page.path, cell, "print('nothing of it')")
    assert figures() == set()


# --- what changes a page's state -----------------------------------------------------------------------------------


@pytest.fixture
def no_canary(page, monkeypatch):
    """A canary that must not be asked."""

    def asked(package):
        raise AssertionError("the canary was run")

    monkeypatch.setattr(page.stale, "run_canary", asked)


@pytest.mark.usefixtures("no_canary")
def test_what_is_no_change(page):
    assert str(page.state()) == "current"
    change(page.kdlib / "losses.py", r'"""The distillation loss.', '"""The loss of distillation.')
    change(page.kdlib / "train.py", r"    device = gpu.pick_device\(device\)\n", "    # where to\n\n\\g<0>")
    change(page.kdlib / "data.py", r"share \* labels", "(share * labels)")
    change(page.kdlib / "plots.py", r"\Z", "\nFIGURES = 1\n")  # shows figures, computes none
    assert page.state() == page.stale.State("current", (), None)
    change_cell(page.path, "body", BODY.replace("# the objective", "# what is minimised\n").replace("(kd", "( kd"))
    change_cell(page.path, "setup", "%pip install kdlib==2\nimport kdlib")
    change_cell(page.path, "title", "# Another title")
    assert page.state() == page.stale.State("current", (), None)


@pytest.mark.usefixtures("no_canary")
@pytest.mark.parametrize(
    "cell",
    [
        "%matplotlib inline\nkdlib.train(objective, 2)",
        "%matplotlib widget\nkdlib.train(objective)",
        "%matplotlib inline\nkdlib.train(objective);",  # shows no value
        "%matplotlib inline\n'a string'\nkdlib.train(objective)",
        "%matplotlib inline\nkdlib.train(objective",
    ],
)
def test_a_changed_cell_makes_a_page_stale_until_it_is_executed(page, cell):
    change_cell(page.path, "run", cell)
    state = page.state()
    assert (state.kind, state.code_only) == ("stale", True)
    assert "execute it, or compose it again" in str(state)
    again = {"profile": "quick", "depends_on": page.stamp["depends_on"] | {"cells": cells_of(page)}}
    assert page.state(again).kind == "current"


def cells_of(page) -> str:
    return page.stale.trees.cells_digest(page.stale.code_cells(page.stale.Chapter(page.path)))


@pytest.mark.usefixtures("no_canary")
def test_a_changed_recipe_makes_a_page_stale(page):
    recipe = page.stamp["depends_on"]["recipe"]
    epochs, temperature = recipe["student_recipe.epochs"], recipe.pop("temperature")
    recipe |= {"student_recipe.epochs": epochs + 1, "patience": 5}
    del recipe["student_recipe.mixup"], recipe["beta"]  # as if those fields were new: they are at their defaults
    state = page.state()
    assert state.kind == "stale"
    assert not state.code_only
    assert sorted(state.reasons) == [
        "patience was 5, is gone",
        f"student_recipe.epochs is {epochs}, was {epochs + 1}",
        f"temperature is {temperature}, was None",
    ]
    page.stamp["profile"] = "quikc"
    assert "profile 'quikc' is unknown" in str(page.state())


@pytest.mark.usefixtures("no_canary")
def test_pages_that_a_gpu_computed_under_another_number_are_stale(page, monkeypatch):
    monkeypatch.setattr(kdlib, "NUMERICS", kdlib.NUMERICS + 1)
    page.stamp["device"] = "NVIDIA H100 80GB HBM3"
    assert str(page.state()) == f"stale: kdlib.NUMERICS is {kdlib.NUMERICS}, was {kdlib.NUMERICS - 1}"
    page.stamp["device"] = "CPU, 1 thread"  # which a change of what a GPU computes does not concern
    assert page.state().kind == "current"


BROKEN = {
    "the loss": ("losses.py", r"beta \* temperature\*\*2 \* soft", "beta * temperature * soft", "distillation, shares"),
    "the views": ("data.py", r"self\.padding \+ dx", "self.padding - dx", "views, padding 2"),
    "the split": ("sources/splits.py", r"stratified\(labels\[::-1\]", "stratified(labels", "split, digits"),
    "the mixup": ("data.py", r"share \* labels \+ \(1 - share\)", "(1 - share) * labels + share", "mixup 0.2"),
}


@pytest.mark.parametrize(("file", "old", "new", "figure"), BROKEN.values(), ids=BROKEN)
def test_the_canary_notices_what_is_broken(page, file, old, new, figure):
    change(page.kdlib / file, old, new)
    state = page.state()
    assert (state.kind, state.code_only) == ("stale", False)
    assert "figures changed" in state.reasons[0]
    assert figure in state.reasons[0]
    assert state.reasons[1] == f"code of kdlib.{file.removesuffix('.py').replace('/', '.')} changed"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (r'("mnist": Source\(.*)validation=5_000', r"\1validation=2_500", "tidied"),
        (r"validation=1147", "validation=1146", "stale"),  # of the digits, which the page uses
    ],
)
def test_another_split_of_a_data_set_matters_to_the_pages_that_use_it_alone(page, old, new, kind):
    change(page.kdlib / "sources" / "known.py", old, new)
    assert page.state().kind == kind


def test_renamed_variables_and_moved_functions_leave_a_page_current(page):
    change(page.kdlib / "data.py", r"\bdy\b", "row_offset")
    change(page.kdlib / "losses.py", r"\blog_student\b", "log_probabilities")
    change(page.kdlib / "models.py", r"(?s)class TinyCNN.*?\n\n\n", "from kdlib.tiny import TinyCNN\n\n\n")
    tiny = re.search(r"(?s)class TinyCNN.*?\n\n\n", (ROOT / "kdlib" / "models.py").read_text(encoding="utf-8"))
    head = "import torch.nn.functional as F\nfrom torch import Tensor, nn\n\n\n"
    (page.kdlib / "tiny.py").write_text(head + tiny[0], encoding="utf-8")
    state = page.state()
    assert state.kind == "tidied"
    assert str(state) == "current, code tidied since: code of kdlib.data, kdlib.losses, kdlib.models changed"
    # together with a changed cell, composing it again is enough
    change_cell(page.path, "run", "kdlib.train(objective, 3)")
    assert page.state().code_only


def test_a_kdlib_on_which_the_canary_does_not_run(page, published, monkeypatch):
    monkeypatch.setattr(page.stale, "run_canary", published.run_canary)  # in a process of its own
    change(page.kdlib / "losses.py", r"\Z", "\nraise RuntimeError('broken')\n")
    assert "the canary does not run: RuntimeError: broken" in str(page.state())
    with pytest.raises(page.stale.CanaryError, match="broken"):
        page.stale.stamp(page.stale.Chapter(page.path), "quick")


def test_figures_that_are_gone_or_new(page, monkeypatch):
    now = {"losses": {"cross-entropy": [1.0, -2.0], "new": [7.0]}}
    monkeypatch.setattr(page.stale, "run_canary", lambda package: now)
    assert page.stale.changed_figures({"cross-entropy": [1.0, -2.0]}) == []
    assert page.stale.changed_figures({"cross-entropy": [1.0], "old": [1.0]}) == [
        "figures changed: cross-entropy",
        "figures not computed any more: old",
    ]


def test_figures_agree_to_a_millionth():
    agree = tool(ROOT, "stale").agree
    assert agree([3.0, 1e-9], [3.000001, 2e-9])  # the second by cancellation
    assert not agree([3.0, 1.0], [3.0, 1.00001])
    assert not agree([3.0], [3.0, 1.0])
    assert not agree([3.0], [math.nan])
    assert not agree([math.nan], [math.nan])


# --- pages from before, and code that was rewritten ----------------------------------------------------------------


@pytest.mark.usefixtures("no_canary")
def test_pages_stamped_before_are_stale_without_a_proof(page):
    legacy = {"profile": "quick", "hash": {"code cells": "9cd0e66d", "train.py": "560083e3"}}
    assert str(page.state(legacy)) == "stale: stamped before records of this kind"
    tidied = {"tidied": {"commit": "c3b106c", "proof": "same results at quick"}}
    assert page.state(legacy | tidied).kind == "stale"
    state = page.state(page.stamp | tidied)
    assert (state.kind, state.commit) == ("tidied", "c3b106c")
    assert str(state) == "current, code tidied since: same results at quick"
    change_cell(page.path, "run", "kdlib.train()")
    assert page.state(page.stamp | tidied).kind == "stale"


# --- kdlib/gpu -----------------------------------------------------------------------------------------------------


def test_a_change_of_gpu_asks_for_a_word(page, monkeypatch, capsys):
    monkeypatch.setattr(page.stale, "changed_figures", lambda figures: [])
    notebook = nbformat.read(page.path, 4)
    notebook.metadata["kdlib_published"] = page.stamp
    nbformat.write(notebook, page.path)
    file = page.kdlib / "gpu" / "__init__.py"
    assert page.stale.main(["gpu-unchanged", "nothing happened"]) == 0
    assert "nothing to record" in capsys.readouterr().out
    change(file, r"\Z", "\n# a comment\n")
    assert page.state().kind == "current"
    for step in ("FASTER = 1", "FASTER = 2"):  # one after the other: both were said to change nothing
        change(file, r"\Z", f"\n{step}\n")
        assert page.state().kind == "unconfirmed"
        assert "gpu-unchanged" in str(page.state())
        assert page.stale.main(["gpu-unchanged", f"{step} computes the same"]) == 0
        assert page.state().kind == "current"
    words = json.loads(page.stale.GPU_UNCHANGED.read_text(encoding="utf-8"))
    assert [word["why"] for word in words] == ["FASTER = 1 computes the same", "FASTER = 2 computes the same"]
    change(file, "FASTER = 2", "FASTER = 3")
    assert page.state().kind == "unconfirmed"
    monkeypatch.setattr(page.stale, "changed_figures", lambda figures: ["figures changed: steps"])
    assert page.state().kind == "stale"  # on a CPU already


# --- syntax trees --------------------------------------------------------------------------------------------------


def test_what_a_syntax_tree_says():
    digest = tool(ROOT, "trees").tree_digest
    code = 'def f(x):\n    """Twice x."""\n    return 2 * x  # twice\n'
    assert digest(code) == digest("'''A module.'''\ndef f(\n    x,\n): return (2 * x)\n")
    assert digest(code) != digest(code.replace("2", "3"))
    assert digest("x = None") != digest("x = 'None'") != digest("x = u'none'")
    assert digest("x = 'a'") == digest('x = u"a"')
    assert digest("'shown'\nx = 1", is_cell=True) != digest("x = 1", is_cell=True)
    assert digest("no python") != digest("no python either")
    assert digest("def f(x, /, *, y=1): pass") != digest("def f(x, y=1): pass")


def test_trees_are_the_same_in_every_python():
    code = """
@cache
def f(x: int = None, *args, y=1, **options) -> str:
    g = lambda: [a for a in args if a]
    with open(x) as file, file:
        return f"{x!r:>{y}} {g()[1:]}" 'joined'

class A(B):
    async def h(self): await self; match = {**{}}
"""
    assert tool(ROOT, "trees").tree_digest(code) == "45f98b6eec14b3d2"  # in Python 3.11, 3.12 and 3.13


def test_which_modules_code_uses(tmp_path, monkeypatch):
    files = {
        "__init__.py": "from kdlib.one import first\nNUMERICS = 1\n",
        "one.py": "from kdlib import plots\nfirst = second = 1\n",
        "plots.py": "from .three import third\n",
        "three.py": "third = 3\n",
        "four.py": "def f():\n    import kdlib.gpu.fast as fast\n    return fast.x\n",
        "gpu/__init__.py": "",
        "gpu/fast.py": "from ..three import third as x\n",
        "lab/__init__.py": "from kdlib.lab import rows\nfrom kdlib.lab.rows import Row as Line\n",
        "lab/rows.py": "from kdlib.three import third\nclass Row: pass\n",
        "lab/other.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "kdlib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    trees = tool(ROOT, "trees")
    monkeypatch.setattr(trees, "PACKAGE", tmp_path / "kdlib")

    def used(*cells: str) -> str:
        return " ".join(module.removeprefix("kdlib.") for module in trees.used_modules(list(cells)))

    assert used("print(kdlib.first)") == "one three"  # plots is followed, but not in it
    assert used("from kdlib.one import second") == "one three"
    assert used("from kdlib.four import f") == "four three"
    assert used("from kdlib import lab", "lab.Line().x") == "lab.rows three"
    assert used("import kdlib.lab.rows as r") == "lab.rows three"
    assert used("from kdlib import lab") == ""
    assert used("kdlib.NUMERICS") == "kdlib one three"
    assert used("%timeit x", "!ls", "not python", "import numpy as np\nnp.kdlib.first") == ""
    assert used("%time\nfrom kdlib import three") == "three"


# --- the canary ----------------------------------------------------------------------------------------------------


def test_the_canary_goes_through_every_network_and_agrees_with_two_threads(published):
    every, agree = published.canary, published.stale.agree
    assert {f"models {name}" for name in models.NETWORKS} <= every.keys()
    assert {"lab.batched", "lab.claims", "lab.training", *TOPICS} <= every.keys()
    figures = {name: figure for topic in every.values() for name, figure in topic.items()}
    assert len(figures) == sum(map(len, every.values()))  # every name once
    assert all(math.isfinite(x) for figure in figures.values() for x in figure)
    assert all(max(map(abs, figure)) > 0 for figure in figures.values())
    topics = ("losses", "train", "models digits_cnn")
    two = published.stale.run_canary(published.tree / "kdlib", "--threads", "2", *topics)
    for topic in topics:
        assert two[topic].keys() == every[topic].keys()
        assert all(agree(every[topic][name], figure) for name, figure in two[topic].items())
