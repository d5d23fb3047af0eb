"""The book: its notebooks keep their form, run through papermill, notice a broken kdlib, and render without a warning.

Everything that runs or writes does so in a copy of the book, with folders of its own, as a user would: in a process.
"""

import ast
import base64
import builtins
import copy
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urldefrag

import nbformat
import numpy as np
import papermill
import pytest
import torch
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from kdlib import artefacts, evaluate, experiments, load_data, models, resolve

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
TAGGED = "nbval-check-output"
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name[:2])

SET_UP = """\
# Does nothing where kdlib is installed; in Colab it installs it.
try:
    import kdlib
except ModuleNotFoundError:
    %pip install --quiet git+{address}
    import kdlib"""


# --- copies of the book, and running things in them ----------------------------------------------------------------


def copy_tree(folder: Path) -> Path:
    """The workshop, kdlib and the settings, in `folder`; without the book's pages."""
    for name in ("tools", "kdlib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the book and all that it needs."""
    folder = copy_tree(tmp_path_factory.mktemp("clone"))
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    return folder


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A book of three chapters that need no kdlib, so that they run in a second."""
    folder = copy_tree(tmp_path)
    (folder / "book").mkdir()
    for number in ("00", "01", "02"):
        cells = [
            new_markdown_cell(f"# Chapter {number}\n\nWhat is it?", id="title"),
            new_code_cell("# nothing to do", id="setup", metadata={"tags": ["setup"]}),
            new_code_cell(
                'profile: str = "auto"  # which\nrun: str = None  # folder\nseed: int = None  # the first seed\n'
                + ("temperature: float = None  # T\n" if number != "00" else ""),
                id="parameters",
                metadata={"tags": ["parameters"]},
            ),
            new_code_cell(
                "import sys\n\nprint('before')\nprint('a bar', file=sys.stderr)\nprint('after', seed)", id="body"
            ),
        ]
        write_notebook(folder / "book" / f"{number}_tiny.ipynb", cells)
    return folder


def write_notebook(path: Path, cells: list) -> None:
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


def change_cell(path: Path, cell_id: str, source: str) -> None:
    notebook = nbformat.read(path, 4)
    next(cell for cell in notebook.cells if cell.id == cell_id).source = source
    nbformat.write(notebook, path)


def start(tree: Path, *command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run a Python command in `tree`, with the kdlib and the folders that lie there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KDLIB_", "PYTEST_", "TQDM_"))}
    env |= {"PYTHONPATH": str(tree), "KDLIB_OUTPUTS": str(tree / "outputs"), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd or tree, env=env, capture_output=True, text=True)


def book(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python tools/book.py …`` in `tree`."""
    return start(tree, "tools/book.py", *arguments)


def workshop(tree: Path):
    """tools/book.py of `tree`, as a module: for what neither runs nor renders."""
    spec = importlib.util.spec_from_file_location("workshop", tree / "tools" / "book.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["workshop"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


# --- the form of a chapter -----------------------------------------------------------------------------------------


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_the_contents_name_every_chapter():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [Path(entry["file"]).name for part in contents["parts"] for entry in part["chapters"]]
    assert [name for name in listed if name[:2].isdigit()] == [path.stem for path in CHAPTERS]


@every_chapter
def test_sections(path):
    notebook = nbformat.read(path, 4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source), "the first cell opens with the title"
    assert len(re.findall(r"(?m)^# \S", text)) == 1, "one title"
    for wanted in ("You will learn", "You need", "Run time"):
        assert f"**{wanted}" in text
    assert re.search(r"(?m)^## Recap$", text)
    exercises = re.split(r"(?m)^## Exercises$", text)
    assert len(exercises) == 2
    assert 2 <= exercises[1].count("<details>") <= 4
    assert exercises[1].count("<details>") == exercises[1].count("</details>") == exercises[1].count("<summary>")


def names(code: str) -> tuple[set[str], set[str]]:
    """The names that code binds, anywhere in it, and those that it reads."""
    nodes = list(ast.walk(ast.parse(code.replace("%pip", "pass  # %pip"))))
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {(n.asname or n.name).partition(".")[0] for n in nodes if isinstance(n, ast.alias)}
    return bound, {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


@every_chapter
def test_a_solution_uses_only_what_its_notebook_has(path):
    notebook = nbformat.read(path, 4)
    there = set(dir(builtins))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            there |= names(cell.source)[0]
    solutions = re.findall(r"```python\n(.*?)```", notebook.cells[-1].source, re.DOTALL)
    assert solutions
    for solution in solutions:
        bound, read = names(solution)
        there |= bound  # a later solution may build on an earlier one
        assert read <= there, f"{sorted(read - there)} are nowhere in {path.name}"


@every_chapter
def test_parameters_are_typed_and_explained(path):
    (cell,) = tagged(nbformat.read(path, 4), "parameters")
    for line in filter(None, cell.source.splitlines()):
        assert re.fullmatch(r"\w+: (str|int|float|bool) = \S+  # \S.{5,}", line), line
    names = {line.split(":")[0] for line in cell.source.splitlines()}
    others = [c.source for c in code_cells(nbformat.read(path, 4)) if c is not cell]
    for name in names:
        assert any(re.search(rf"\b{name}\b", source) for source in others), f"{name} is never used"


@every_chapter
def test_set_up_cell(path):
    notebook = nbformat.read(path, 4)
    found = [cell.source for cell in tagged(notebook, "setup")]
    address = workshop(ROOT).project_address()
    if not any("import kdlib" in c.source or "from kdlib" in c.source for c in code_cells(notebook)):
        assert found == []  # chapter 00 needs no kdlib
    else:
        assert found == [SET_UP.format(address=address)]
        assert code_cells(notebook)[0].source == found[0]


@every_chapter
def test_published_outputs(path):
    notebook = nbformat.read(path, 4)
    stamp = notebook.metadata.get("kdlib_published")
    assert stamp, "not published: run `make publish`"
    assert set(stamp) == {"profile", "device", "versions", "date", "seconds", "hash"}
    ran = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    assert ran == list(range(1, len(ran) + 1)), "every cell, once, in order"
    assert not tagged(notebook, "injected-parameters")
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
    assert path.stat().st_size < 700_000


@every_chapter
def test_outputs_are_small_and_tell_nothing_of_the_machine(path):
    for cell in code_cells(nbformat.read(path, 4)):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")):
                assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work|mnt|var)/|\b[A-Z]:\\", text), text
            if "image/png" in data:
                assert len(base64.b64decode(data["image/png"])) < 150_000
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert len(alt) > 20, f"no alt text: {cell.source}"
                assert not re.search(r"\d+\.\d|\d ?%", alt), f"a figure that differs between profiles: {alt}"


@every_chapter
def test_tagged_cells(path):
    found = tagged(nbformat.read(path, 4), TAGGED)
    assert len(found) >= 3
    for cell in found:
        assert cell.outputs, cell.source
        assert all(output.output_type == "stream" for output in cell.outputs), "print, so that nbval compares it"


# --- refusals: before anything runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--params", "temprature=8"], ["'temprature'", "did you mean 'temperature'?"]),
        (["--params", "temperature=8", "--chapters", "00"], ["'temperature' is unknown to the chapters 00", "seed"]),
        (["--params", "temperature"], ["'temperature'", "name=value"]),
        (["--params", "seed=abc"], ["seed is 'abc'", "a whole number"]),
        (["--params", "seed=1.5"], ["seed is '1.5'", "a whole number"]),
        (["--params", "temperature=hot"], ["temperature is 'hot'", "a number"]),
        (["--params", "temperature=-1"], ["temperature is -1.0", "above 0"]),
        (["--params", "profile=full"], ["profile=full", "--profile full"]),
        (["--chapters", "00 13"], ["'13'", "00 01 02"]),
        (["--chapters", "data"], ["'data'", "00 01 02"]),
        (["--profile", "quik"], ["'quik'", "did you mean 'quick'?"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_what_cannot_be_run_is_refused(tiny, capsys, monkeypatch, arguments, expected):
    monkeypatch.delenv("KDLIB_PROFILE", raising=False)
    assert workshop(tiny).main(["run", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (tiny / "runs").exists()


def test_values_are_read_as_papermill_reads_them(tiny):
    tool = workshop(tiny)
    given = tool.read_parameters("temperature=8 seed=3", tool.chapters())
    by_number = {chapter.number: values for chapter, values in given.items()}
    shared = by_number["00"]["run"]
    assert by_number["00"] == {"seed": 3, "run": shared}
    assert by_number["02"] == {"seed": 3, "temperature": 8.0, "run": shared}
    assert re.fullmatch("[0-9a-f]{8}", shared)
    assert tool.read_parameters("", tool.chapters()) == {chapter: {} for chapter in given}
    assert tool.parse("seed", "None", "int") is None
    assert tool.parse("run", "17", "str") == "17"
    assert tool.parse("fast", "False", "bool") is False


@every_chapter
def test_papermill_explains_every_parameter(path):
    for name, found in papermill.inspect_notebook(path).items():
        assert found["help"], name
        assert found["inferred_type_name"] in ("str", "int", "float", "bool"), name


# --- running -------------------------------------------------------------------------------------------------------


def test_a_failing_cell_stops_the_run(tiny):
    change_cell(tiny / "book" / "01_tiny.ipynb", "body", "fine = 1\nraise RuntimeError('no such luck')")
    before = (tiny / "book" / "01_tiny.ipynb").read_bytes()
    done = book(tiny, "run", "--profile", "quick")
    assert done.returncode == 1
    assert "chapter 2 of 3: 01 Chapter 01" in done.stdout
    assert "chapter 3 of 3" not in done.stdout
    for part in ("chapter 01 failed in cell [3]", "    fine = 1", "RuntimeError: no such luck"):
        assert part in done.stderr
    runs = tiny / "runs" / "quick"
    assert sorted(path.name for path in runs.iterdir()) == ["00_tiny.ipynb", "01_tiny.ipynb"]
    assert "no such luck" in (runs / "01_tiny.ipynb").read_text(encoding="utf-8")
    assert (tiny / "book" / "01_tiny.ipynb").read_bytes() == before


def test_publishing(tiny, capsys):
    def status() -> str:
        assert workshop(tiny).main(["status"]) == 0
        return capsys.readouterr().out

    path = tiny / "book" / "00_tiny.ipynb"
    change_cell(tiny / "book" / "01_tiny.ipynb", "body", "raise RuntimeError('not this one')")
    failing = (tiny / "book" / "01_tiny.ipynb").read_bytes()
    assert "00 tiny                     never published" in status()

    done = book(tiny, "publish", "--profile", "quick")
    assert done.returncode == 1  # chapter 01 fails: it stays as it was, and chapter 00 is published
    assert (tiny / "book" / "01_tiny.ipynb").read_bytes() == failing
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert json.loads(text)["nbformat"] == 4
    assert text.splitlines()[1].startswith(' "')  # an indent of one, as Jupyter writes it
    notebook = nbformat.read(path, 4)
    assert [cell.id for cell in notebook.cells] == ["title", "setup", "parameters", "body"]
    (output,) = notebook.cells[3].outputs
    assert output.text == "before\nafter None\n"  # without the bar that stood between the two
    assert notebook.cells[3].metadata == {}
    assert set(notebook.metadata) == {"kernelspec", "kdlib_published"}
    stamp = notebook.metadata["kdlib_published"]
    assert stamp["profile"] == "quick"
    assert stamp["versions"].keys() >= {"python", "torch"}
    assert set(stamp["hash"]) == {"code cells", "recipe", *workshop(tiny).STAMPED_FILES}

    with mock.patch.dict(os.environ):
        assert workshop(tiny).main(["publish", "--profile", "quick", "--chapters", "0"]) == 0
    assert "00 Chapter 00: current" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == text

    change_cell(path, "setup", "# another address")  # changes nothing that is measured
    assert "current" in status()
    change_cell(path, "body", "print('new')")
    with (tiny / "kdlib" / "losses.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert "stale: code cells, losses.py changed" in status()
    assert book(tiny, "publish", "--profile", "quick", "--chapters", "00").returncode == 0
    assert nbformat.read(path, 4).cells[3].outputs[0].text == "new\n"

    notebook = nbformat.read(path, 4)  # as if it came from a GPU
    notebook.metadata["kdlib_published"]["profile"] = "full"
    workshop(tiny).write(notebook, path)
    with mock.patch.dict(os.environ):
        capsys.readouterr()
        assert workshop(tiny).main(["publish", "--profile", "quick", "--chapters", "00"]) == 0
    assert "00 Chapter 00: stays as published at profile full" in capsys.readouterr().out


def test_part_one_as_a_chain_with_parameters(clone):
    arguments = ["--profile", "quick", "--chapters", "02 03 05 06", "--params", "epochs=2 n_seeds=2 temperature=8"]
    done = book(clone, "book", *arguments)
    assert done.returncode == 0, done.stderr
    for count, number in enumerate(("02", "03", "05", "06"), 1):
        assert f"chapter {count} of 4: {number}" in done.stdout
    (folder,) = (clone / "outputs").iterdir()  # one for all the chapters, and none without parameters
    assert re.fullmatch("quick-[0-9a-f]{8}", folder.name)

    results = evaluate.load_results(folder / "results.json")
    assert (results["profile"], results["dataset"]) == ("quick", "digits")
    assert [run["role"] for run in results["runs"]] == ["teacher", "student", "distilled"]
    for run in results["runs"]:
        assert len(run["accuracy"]) == len(run["seeds"]) == (1 if run["role"] == "teacher" else 2)
        assert all(0 <= value <= 1 for key in ("accuracy", "ece", "agreement") for value in run[key])
        assert all(value > 0 for value in run["nll"])
        assert all(set(by_batch) == {"1", "256"} for by_batch in run["latency_ms"].values())
    distilled = results["runs"][2]
    model = models.build(distilled["network"], 10, 1)
    artefacts.load_weights(folder / f"student_{distilled['network']}.pth", model)
    again = evaluate.evaluate(model, load_data("digits").test, device="cpu")
    assert again.accuracy == pytest.approx(distilled["accuracy"][0], abs=1e-9)
    assert again.nll == pytest.approx(distilled["nll"][0], rel=1e-4)

    # the same by the workshop's own command, which must notice a figure that nobody measured
    verified = book(clone, "verify", "--profile", "quick", *arguments[4:])
    assert verified.returncode == 0, verified.stderr
    path = folder / "soft_labels.npy"
    if not path.exists():
        path = artefacts.base_folder(folder) / path.name
    logits, known = artefacts.load_array(path), artefacts.record(path)
    slipped = {"fingerprint": known["fingerprint"], "provenance": known["provenance"]}
    artefacts.save_array(path, np.roll(logits, 1, axis=1), **slipped)  # each image has its neighbour's
    refused = book(clone, "verify", "--profile", "quick", *arguments[4:])
    assert refused.returncode == 1
    assert "soft_labels.npy: the clean view's logits are off by" in refused.stderr
    artefacts.save_array(path, logits, **slipped)
    distilled["accuracy"][1] += 0.01
    artefacts.save_json(folder / "results.json", results)
    refused = book(clone, "verify", "--profile", "quick", *arguments[4:])
    assert refused.returncode == 1
    assert "student_perceptron_seed1.pth: accuracy is" in refused.stderr
    weights = folder / "student_perceptron_seed1.pth"
    weights.write_bytes(weights.read_bytes()[:100])
    damaged = book(clone, "verify", "--profile", "quick", *arguments[4:])
    assert damaged.returncode == 1
    assert "is not a weights file" in damaged.stderr
    assert "Traceback" not in damaged.stderr

    assert re.search(r"distilled student +perceptron +[\d.]+ ± [\d.]+ %", done.stdout)
    address = re.search(r"The book: file://(\S+)", done.stdout)[1]
    pages = Path(unquote(address)).parent / "book"
    assert f"file://{clone}/runs/{folder.name}/" in done.stdout
    assert "profile quick, epochs=2, n_seeds=2, temperature=8.0 on" in page_text(pages / "05_distill_student.html")
    executed = nbformat.read(clone / "runs" / folder.name / "02_train_teacher.ipynb", 4)
    (injected,) = tagged(executed, "injected-parameters")
    assert "temperature" not in injected.source  # the chapter has none
    assert "epochs = 2" in injected.source


def test_without_a_teacher_from_the_published_answers(tmp_path):
    tree = copy_tree(tmp_path)
    shutil.copytree(ROOT / "book", tree / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    arguments = ["--profile", "quick", "--chapters", "03 05", "--params", "start_from=published n_seeds=2 epochs=2"]
    done = book(tree, "run", *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = (tree / "outputs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert "student_perceptron_seed1.pth" in names
    assert not any(name.startswith(("teacher", "soft_labels")) for name in names)
    made = artefacts.record(tree / "book" / "published" / "quick" / "soft_labels.npy")["provenance"]
    for path in (tree / "runs" / folder.name).glob("0*.ipynb"):
        outputs = [o for cell in code_cells(nbformat.read(path, 4)) for o in cell.outputs]
        text = "".join(o.get("data", {}).get("text/markdown", "") + o.get("text", "") for o in outputs)
        assert f"made on {made['device']}, {made['date']}" in text
        assert text.count("needs the teacher itself") == (3 if path.name.startswith("03") else 0)

    # where fewer views are published than there are, the student draws from those
    path = tree / "book" / "published" / "quick" / "soft_labels.npy"
    known = artefacts.record(path)
    workshop(tree).keep(
        path,
        workshop(tree).array_bytes(artefacts.load_array(path)[:3]),
        known["fingerprint"] | {"views": 3},
        known["provenance"],
    )
    fewer = ["--profile", "quick", "--chapters", "05", "--params", "start_from=published n_seeds=1 epochs=1 run=fewer"]
    done = book(tree, "run", *fewer)
    assert done.returncode == 0, done.stderr
    student = artefacts.record(tree / "outputs" / "quick-fewer" / "student_perceptron_alone.pth")["fingerprint"]
    assert student["recipe"]["views"] == 3

    broken = bytearray(path.read_bytes())
    broken[-1] ^= 1
    path.write_bytes(broken)
    done = book(tree, "run", *arguments)
    assert done.returncode == 1
    assert "chapter 03 failed" in done.stderr
    assert re.search(r"soft_labels\.npy is not what was published: its SHA-256 is \w+, expected \w+", done.stderr)


def test_papermill_from_any_folder(clone, tmp_path):
    line = ["-p", "profile", "quick", "-p", "temperature", "8", "-p", "alpha", "0.2", "-p", "epochs", "1"]
    line += ["-p", "n_seeds", "2", "-p", "limit", "200", "--no-progress-bar"]
    notebook = clone / "book" / "05_distill_student.ipynb"

    def papermill_in(name: str, folder: Path, path: Path | str) -> subprocess.CompletedProcess:
        outputs = str(tmp_path / f"outputs-{name}")
        out = tmp_path / f"{name}.ipynb"
        return start(clone, "-m", "papermill", path, out, *line, cwd=folder, KDLIB_OUTPUTS=outputs)

    empty = tmp_path / "empty"
    empty.mkdir()
    places = [
        ("root", clone, "book/05_distill_student.ipynb"),
        ("book", clone / "book", "05_distill_student.ipynb"),
        ("empty", empty, notebook),
    ]
    with ThreadPoolExecutor(2) as pool:
        for (name, _, _), done in zip(places, pool.map(lambda place: papermill_in(*place), places), strict=True):
            assert done.returncode == 0, done.stderr[-3000:]
            (folder,) = (tmp_path / f"outputs-{name}").iterdir()
            recorded = artefacts.record(folder / "student_perceptron.pth")["fingerprint"]
            assert recorded["objective"]["temperature"] == 8
            assert recorded["objective"]["alpha"] == 0.2
            assert recorded["recipe"]["epochs"] == 1
    assert list(empty.iterdir()) == []  # a run leaves nothing but its artefacts and its notebook


# --- a broken kdlib is noticed by the notebooks --------------------------------------------------------------------

BREAKS = {
    "the factor T squared is dropped": (
        "04",
        "losses.py",
        {"beta * temperature**2 * soft": "beta * soft"},
    ),
    "the soft labels are shifted by one": (
        "03",
        "soft_labels.py",
        {"self.logits[views, indices]": "self.logits[views, (indices + 1) % self.logits.shape[1]]"},
    ),
    "another validation split": (
        "01",
        "data.py",
        {"_evenly(train_labels[::-1]": "_evenly(train_labels", "len(train_labels) - 1 - held_out": "held_out"},
    ),
}


def test_tagged_cells_notice_a_broken_kdlib(clone, tmp_path):
    def failing_cells(name: str) -> tuple[Path, set[int]]:
        number, file, edits = BREAKS[name]
        tree = copy_tree(tmp_path / number)
        (path,) = (clone / "book").glob(f"{number}_*.ipynb")
        (tree / "book").mkdir()
        notebook = Path(shutil.copy(path, tree / "book"))
        source = (tree / "kdlib" / file).read_text(encoding="utf-8")
        for old, new in edits.items():
            assert source.count(old) == 1, f"{file} no longer holds {old!r}"
            source = source.replace(old, new)
        (tree / "kdlib" / file).write_text(source, encoding="utf-8")
        done = start(tree, "-m", "pytest", "--nbval-lax", "--nbval-current-env", notebook, KDLIB_PROFILE="quick")
        assert done.returncode == 1, f"{name}: {done.stdout[-3000:]}"
        return path, {int(cell) for cell in re.findall(r"(?m)^FAILED .*::Cell (\d+)", done.stdout)}

    for folder in BREAKS.values():
        (tmp_path / folder[0]).mkdir()
    with ThreadPoolExecutor(2) as pool:
        for name, (path, failing) in zip(BREAKS, pool.map(failing_cells, BREAKS), strict=True):
            cells = code_cells(nbformat.read(path, 4))
            assert any(TAGGED in cells[cell].metadata.get("tags", []) for cell in failing), f"{name}: {failing}"


# --- the rendered book ---------------------------------------------------------------------------------------------


def page(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def page_text(path: Path) -> str:
    return " ".join(page(path).get_text().split())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the rendered book, made without a warning; chapter 02 says it was run with another losses.py."""
    tree = copy_tree(tmp_path_factory.mktemp("site"))
    shutil.copytree(ROOT / "book", tree / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    path = tree / "book" / "02_train_teacher.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.metadata["kdlib_published"]["hash"]["losses.py"] = "00000000"
    nbformat.write(notebook, path)
    done = book(tree, "site")
    assert done.returncode == 0, done.stderr
    return tree / "runs" / "site" / "_build" / "html"


def test_every_page_is_there(site):
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]
    for file in files:
        assert page(site / f"{file}.html").h1.get_text(strip=True)
    rendered = {str(path.relative_to(site).with_suffix("")) for path in (site / "book").glob("*.html")}
    assert rendered == set(files)


def test_every_link_leads_somewhere(site):
    pages = {path: page(path) for path in [*site.glob("*.html"), *(site / "book").glob("*.html")]}
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in pages.items()}
    for path, soup in pages.items():
        for link in soup.find_all("a", href=True):
            target, anchor = urldefrag(link["href"])
            if re.match(r"[a-z]+:", target) or not (target or anchor):
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            assert file.exists(), f"{path.name}: {link['href']}"
            if anchor:
                assert unquote(anchor) in anchors[file], f"{path.name}: {link['href']}"
        for image in soup.find_all("img", src=True):
            assert (path.parent / unquote(image["src"])).exists(), f"{path.name}: {image['src']}"


def test_every_figure_has_a_text(site):
    figures = 0
    for path in (site / "book").glob("*.html"):
        for image in page(path).select(".cell_output img"):
            assert len(image.get("alt", "")) > 20, f"{path.name}: {image}"
            figures += 1
    assert figures >= len(CHAPTERS)


def test_tables_and_solutions_are_rendered(site):
    for path in CHAPTERS:
        soup = page(site / "book" / f"{path.stem}.html")
        assert "| :-" not in soup.get_text(), "a table that was left as text"
        solutions = [tag for tag in soup.find_all("details") if tag.summary and tag.summary.get_text() == "Solution"]
        assert 2 <= len(solutions) <= 4
        assert all(tag.find(["p", "ul", "ol", "div", "pre"]) for tag in solutions), "Markdown left as text"


def test_a_page_says_how_it_was_run_and_whether_that_holds(site):
    stamp = nbformat.read(CHAPTERS[1], 4).metadata["kdlib_published"]
    first = page(site / "book" / f"{CHAPTERS[1].stem}.html").select_one(".stamp").get_text()
    assert f"Run at profile {stamp['profile']} on {stamp['device']}" in first
    assert stamp["date"] in first
    stale = page(site / "book" / "02_train_teacher.html").select_one(".stamp.warning").get_text()
    assert "The code has changed since" in stale
    assert "losses.py" in stale
    assert "make publish" in stale


def test_the_address_is_carried_everywhere(tiny, capsys):
    url = "https://github.com/somebody/a-book"
    change_cell(tiny / "book" / "01_tiny.ipynb", "setup", SET_UP.format(address="https://elsewhere.example/old"))
    (tiny / "README.md").write_text(f"git clone {workshop(tiny).project_address()}\n", encoding="utf-8")
    assert workshop(tiny).main(["address", "github"]) == 2
    assert "'github'" in capsys.readouterr().err
    assert "launch_buttons" not in workshop(tiny).site_settings()
    assert workshop(tiny).main(["address", url]) == 0
    assert f'repository = "{url}"' in (tiny / "pyproject.toml").read_text(encoding="utf-8")
    assert (tiny / "README.md").read_text(encoding="utf-8") == f"git clone {url}\n"
    assert nbformat.read(tiny / "book" / "01_tiny.ipynb", 4).cells[1].source == SET_UP.format(address=url)
    settings = workshop(tiny).site_settings()
    assert settings["repository"]["url"] == url
    assert settings["launch_buttons"]["colab_url"]


def test_the_table_of_results_is_written_where_it_is_shown(tiny):
    marked = "before\n<!-- results: begin -->\n{}<!-- results: end -->\nafter\n"
    (tiny / "README.md").write_text(marked.format(""), encoding="utf-8")
    (tiny / "book" / "intro.md").write_text(marked.format("an older table\n"), encoding="utf-8")
    run = {
        "network": "tiny_cnn",
        "parameters": 1898,
        "size_mb": 0.01,
        "seeds": [0, 1],
        "latency_ms": {"CPU": {}},
        "device": "a CPU",
    }
    runs = [{**run, "role": "student", "accuracy": [0.9, 0.92]}, {**run, "role": "distilled", "accuracy": [0.94, 0.96]}]
    results = {"profile": "quick", "dataset": "digits", "date": "2026-01-31", "runs": runs}
    for _ in range(2):  # a second time changes nothing
        workshop(tiny).fill_results(results)
        for path in (tiny / "README.md", tiny / "book" / "intro.md"):
            text = path.read_text(encoding="utf-8")
            assert re.search(r"\| distilled student +\| tiny_cnn +\| 95.00 ± 1.41 %", text)
            assert "older" not in text
            assert text.startswith("before\n<!-- results: begin -->\n\n![")
            assert text.endswith(" on a CPU, 2026-01-31; written by `make publish`.\n\n<!-- results: end -->\nafter\n")
    assert (tiny / "book" / "published" / "results.png").stat().st_size > 1000
    kept = json.loads((tiny / "book" / "published" / "quick" / "results.json").read_text(encoding="utf-8"))
    assert kept == results


def test_results_of_profile_quick_do_not_hide_those_of_profile_full(tiny):
    (tiny / "book" / "intro.md").write_text("<!-- results: begin -->\n<!-- results: end -->\n", encoding="utf-8")
    run = {"network": "cnn", "parameters": 9, "size_mb": 3.0, "seeds": [0], "role": "student", "latency_ms": {}}
    run["device"] = "a GPU"
    for profile, accuracy in (("full", 0.5), ("quick", 0.75)):
        runs = [{**run, "accuracy": [accuracy]}]
        workshop(tiny).fill_results({"profile": profile, "dataset": "any", "date": "2026-01-31", "runs": runs})
    assert "50.00 %" in (tiny / "book" / "intro.md").read_text(encoding="utf-8")
    assert (tiny / "book" / "published" / "quick" / "results.json").exists()


PUBLISHED = sorted(path for path in (ROOT / "book" / "published").iterdir() if path.is_dir())
every_published_profile = pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)


@every_published_profile
def test_what_is_published_is_small_and_fits_its_records(folder):
    names = {path.name for path in folder.iterdir()}
    measured = {name for name in names if name == "results.json" or re.fullmatch(r"\d\d_\w+\.json", name)}
    recorded = {name.removesuffix(".json") for name in names if re.search(r"\.(npy|pth|json)\.json$", name)}
    assert names == measured | recorded | {f"{name}.json" for name in recorded}
    profile = resolve(folder.name)
    distilled = {profile.file("distilled", network, seed) for network in profile.students for seed in profile.seeds}
    assert recorded == {"soft_labels.npy", "teacher_logits.npy", "histories.json", *distilled}
    for name in recorded:
        known = artefacts.record(folder / name)
        assert set(known) >= {"fingerprint", "sha256", "provenance"}
        assert known["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    soft_labels = artefacts.load_array(folder / "soft_labels.npy")
    assert soft_labels.dtype == artefacts.load_array(folder / "teacher_logits.npy").dtype == "float16"
    assert soft_labels.nbytes <= 8e6 or len(soft_labels) == 1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    for name in distilled:
        weights = torch.load(folder / name, weights_only=True)
        assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
    histories = json.loads((folder / "histories.json").read_text(encoding="utf-8"))
    assert len(histories) == 1 + 2 * len(distilled)
    assert all(len(history["loss"]) == len(history["accuracy"]) > 0 for history in histories.values())


def test_published_accuracies_come_out_of_the_published_weights(tmp_path):
    tree = copy_tree(tmp_path)
    (tree / "book").mkdir()
    shutil.copy(ROOT / "book" / "intro.md", tree / "book")
    missing = book(tree, "verify", "--profile", "quick", "--published")
    assert missing.returncode == 1
    assert "profile quick is not published" in missing.stderr
    shutil.copytree(ROOT / "book" / "published", tree / "book" / "published")
    verified = book(tree, "verify", "--profile", "quick", "--published")
    assert verified.returncode == 0, verified.stderr
    assert "come out again" in verified.stdout
    assert not (tree / "outputs").exists()

    path = tree / "book" / "published" / "quick" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    for run in results["runs"]:
        run["accuracy"][-1] += 0.002
    artefacts.save_json(path, results)
    refused = book(tree, "verify", "--profile", "quick", "--published")
    assert refused.returncode == 1
    for name in ("teacher_logits.npy", "student_perceptron_seed4.pth"):
        assert f"{name}: accuracy is" in refused.stderr
    assert "alone" not in refused.stderr  # those are not published
    assert book(tree, "verify", "--profile", "quick", "--published", "--params", "seed=1").returncode == 2


def test_only_the_views_that_fit_are_published_and_what_is_outdated_goes(tmp_path):
    tool = workshop(ROOT)
    profile = resolve("quick")
    outputs, kept = tmp_path / "outputs" / "quick", tmp_path / "book" / "published" / "quick"
    published = ROOT / "book" / "published" / "quick"
    kept.mkdir(parents=True)
    data = load_data("digits")
    teacher = models.build(profile.teacher, 10, 1)
    history = {"loss": [1.0], "accuracy": [0.5], "seconds": [1.0]}
    known = {"history": history, "provenance": artefacts.provenance("cpu", 1)}
    artefacts.save_weights(outputs / profile.file("teacher"), teacher, fingerprint={"network": "t"}, **known)
    for role in ("student", "distilled"):
        for seed in profile.seeds:
            student = models.build("perceptron", 10, 1, seed=seed)
            path = outputs / profile.file(role, "perceptron", seed)
            artefacts.save_weights(path, student, fingerprint={"seed": seed}, **known)
    array = artefacts.load_array(published / "soft_labels.npy")
    made_from = artefacts.record(published / "soft_labels.npy")["fingerprint"]
    artefacts.save_array(outputs / "soft_labels.npy", array, fingerprint=made_from, provenance=known["provenance"])
    for name in ("student_old.pth", "student_old.pth.json", "07_measured.json"):
        (kept / name).write_text("{}")

    environment = {"KDLIB_OUTPUTS": str(outputs.parent)}
    places = {"ROOT": tmp_path, "BOOK": tmp_path / "book", "PUBLISHED_VIEWS": 3 * array[0].nbytes + 1}
    for _ in range(2):  # a second time replaces
        with mock.patch.dict(os.environ, environment), mock.patch.multiple(tool, **places):
            tool.publish_artefacts(profile)
        names = {path.name for path in kept.iterdir()}
        assert "07_measured.json" in names
        assert "student_old.pth" not in names
        assert len(names) == 1 + 2 * (3 + len(profile.seeds))
    found = artefacts.load_array(kept / "soft_labels.npy")
    assert (found == array[:3]).all()
    assert artefacts.record(kept / "soft_labels.npy")["fingerprint"] == {**made_from, "views": 3}
    logits = artefacts.load_array(kept / "teacher_logits.npy")
    assert logits.shape == (len(data.validation) + len(data.test), 10)
    wanted = models.predict_logits(teacher, data.test).numpy()
    assert abs(logits[len(data.validation) :] - wanted).max() < 0.01


@pytest.mark.parametrize("page", ["README.md", "book/intro.md"])
def test_the_tables_of_results_are_those_of_the_published_files(page):
    published = ROOT / "book" / "published"
    found = next(path for name in ("full", "quick") if (path := published / name / "results.json").exists())
    picture = os.path.relpath(published / "results.png", (ROOT / page).parent)
    shown = workshop(ROOT).shown_results(json.loads(found.read_text(encoding="utf-8")), picture)
    assert f"<!-- results: begin -->\n{shown}<!-- results: end -->" in (ROOT / page).read_text(encoding="utf-8")


def test_every_paper_that_a_page_links_to_is_in_the_references():
    def papers(page: Path) -> set[str]:
        return set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", page.read_text(encoding="utf-8")))

    known = papers(ROOT / "book" / "references.bib")
    for page in (*CHAPTERS, ROOT / "book" / "intro.md"):
        assert papers(page) <= known, f"{page.name} links to {papers(page) - known}"


# --- the page of verdicts ------------------------------------------------------------------------------------------

MEASURED = sorted((ROOT / "book" / "published").glob("*/[0-9][0-9]_*.json"))
every_experiment = pytest.mark.parametrize("path", MEASURED, ids=lambda path: f"{path.parent.name}-{path.name[:2]}")


def test_the_page_of_verdicts_is_that_of_the_published_measurements():
    shown = workshop(ROOT).shown_findings()
    page = (ROOT / "book" / "what_we_found.md").read_text(encoding="utf-8")
    assert f"<!-- findings: begin -->\n{shown}<!-- findings: end -->" in page


@every_experiment
def test_measurements_are_rows_of_at_least_three_seeds(path):
    found = experiments.load(path)
    assert found["experiment"] == path.stem
    assert found["profile"] == path.parent.name
    assert len(found["claims"]) >= 3
    for claim in found["claims"]:
        assert re.search(r"\]\((https?://|\d\d_\w+\.ipynb)", claim["source"]), f"{claim['text']}: no link to its source"
        for compared in claim["comparisons"]:
            for case in (compared["case"], compared["than"]):
                if isinstance(case, str):
                    assert len(experiments.values(found, case, compared["measure"])) >= 3, case


@every_experiment
def test_other_measurements_would_give_other_verdicts(path):
    found = experiments.load(path)
    for claim in found["claims"]:
        verdicts = {experiments.judge(claim, found).verdict}
        for compared in claim["comparisons"]:  # one at a time is made clearly true, and clearly false
            beyond = compared["sign"] * (compared["margin"] + 1)
            for apart in (beyond, -beyond) if beyond else (0, compared["margin"] + 1):
                changed = copy.deepcopy(found)
                other = compared["than"]
                if isinstance(other, str):
                    other = experiments.values(found, other, compared["measure"])
                for row in changed["rows"]:
                    if row["case"] == compared["case"]:
                        than = other.get(row["seed"], 0) if isinstance(other, dict) else other
                        row[compared["measure"]] = than + apart
                        row.pop("by image", None)  # which images it would be right on, nobody knows
                verdicts.add(experiments.judge(claim, changed).verdict)
        assert len(verdicts) > 1, claim["text"]


def test_publishing_measurements_writes_the_page_of_verdicts(tiny):
    (tiny / "book" / "what_we_found.md").write_text("a\n<!-- findings: begin -->\n<!-- findings: end -->\nb\n")
    compared = {"measure": "accuracy", "case": "soft", "than": "hard", "margin": 0, "sign": 1, "unit": "points"}
    claim = {"text": "soft labels help", "source": "[somebody](https://example.org)", "comparisons": [compared]}
    about = {"experiment": "01_tiny", "dataset": "any", "date": "2026-01-31", "claims": [claim]}
    for profile, soft, verdict in (("full", 0.9, "**holds**"), ("quick", 0.1, "**holds**")):  # quick does not hide full
        rows = [
            {
                "case": case,
                "seed": seed,
                "made_from": "0",
                "seconds": 50,
                "device": "CPU",
                "accuracy": value + seed / 100,
            }
            for case, value in {"hard": 0.5, "soft": soft}.items()
            for seed in range(3)
        ]
        workshop(tiny).fill_findings({**about, "profile": profile, "rows": rows})
        text = (tiny / "book" / "what_we_found.md").read_text(encoding="utf-8")
        assert text.startswith("a\n<!-- findings: begin -->\n\nOf 1 claims **1** hold,")
        assert text.endswith("<!-- findings: end -->\nb\n")
        assert (
            f"| soft labels help | [somebody](https://example.org) | +40.00 ± 0.00 points (n = 3) | {verdict} |"
            in text.replace("\N{NO-BREAK SPACE}", " ")
        )
        assert "## [01 Chapter 01](01_tiny.ipynb)" in text
        assert "Profile full (any) on CPU, 2026-01-31: 6 measurements, 5 min in all." in text
    assert (tiny / "book" / "published" / "quick" / "01_tiny.json").exists()
