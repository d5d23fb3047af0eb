"""The notebooks: they keep their form, run through papermill, notice a broken kdlib, and render without a warning."""

import ast
import base64
import builtins
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import numpy as np
import papermill
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell
from PIL import Image
from workshop import (
    CHAPTERS,
    ROOT,
    RUN_STAMP,
    change_cell,
    code_cells,
    copy_book,
    copy_tree,
    start,
    tagged,
    tiny_book,
    tool,
    write_notebook,
)

from kdlib import evaluate, load_data, models
from kdlib.records import artefacts

TAGGED = "nbval-check-output"
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name[:2])


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the book and all that it needs."""
    return copy_book(tmp_path_factory.mktemp("clone"))


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A book of three chapters that need no kdlib."""
    return tiny_book(tmp_path)


def book(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python tools/book.py …`` in `tree`."""
    return start(tree, "tools/book.py", *arguments)


def verify(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python tools/verify.py --profile quick …`` in `tree`."""
    return start(tree, "tools/verify.py", "--profile", "quick", *arguments)


# --- the form of a chapter -----------------------------------------------------------------------------------------


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
    first, *lines = cell.source.splitlines()
    assert first.startswith("# @title Parameters")
    names = []
    for help_text, line in zip(lines[::2], lines[1::2], strict=True):  # what Colab shows as a form
        name, kind, value, field = re.fullmatch(r"(\w+): (str|int|float|bool) = (\S+)  # @param (.+)", line).groups()
        assert re.fullmatch(rf"# @markdown `{name}`: .{{6,}}", help_text), help_text
        fields = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
        expected = '{type:"raw"}' if value == "None" else f'{{type:"{fields[kind]}"}}'
        assert field == expected or value.strip('"') in json.loads(field), line
        names.append(name)
    others = [c.source for c in code_cells(nbformat.read(path, 4)) if c is not cell]
    for name in names:
        assert any(re.search(rf"\b{name}\b", source) for source in others), f"{name} is never used"


@every_chapter
def test_set_up_cell(path):
    notebook = nbformat.read(path, 4)
    found = [cell.source for cell in tagged(notebook, "setup")]
    address = tool(ROOT, "render").project_address()
    if not any("import kdlib" in c.source or "from kdlib" in c.source for c in code_cells(notebook)):
        assert found == []  # chapter 00 needs no kdlib
    else:
        assert found == [tool(ROOT, "render").set_up_cell(f"git+{address}")]
        assert code_cells(notebook)[0].source == found[0]


@every_chapter
def test_published_outputs(path):
    notebook = nbformat.read(path, 4)
    stamp = notebook.metadata.get("kdlib_published")
    assert stamp, "not published: run `make publish`"
    assert set(stamp) >= set(RUN_STAMP)
    assert set(stamp) & {"hash", "depends_on"}  # hash: published before stamps said what a page depends on
    ran = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    assert ran == list(range(1, len(ran) + 1)), "every cell, once, in order"
    assert not tagged(notebook, "injected-parameters")
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        if cell.metadata.get("kdlib_pending"):
            assert "tidied" in stamp, "only what was carried over may lack an output"
    assert path.stat().st_size < 1_000_000


@every_chapter
def test_outputs_are_small_and_tell_nothing_of_the_machine(path):
    for cell in code_cells(nbformat.read(path, 4)):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")):
                assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work|mnt|var)/|\b[A-Z]:\\", text), text
            if "image/png" in data or "image/svg+xml" in data:
                png, svg = base64.b64decode(data.get("image/png", "")), data.get("image/svg+xml", "")
                assert len(png) < 250_000  # photographs, at twice the size
                assert len(svg) < 150_000
                alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
                assert len(alt) > 20, f"no alt text: {cell.source}"
                assert not re.search(r"\d+\.\d|\d ?%", alt), f"a figure that differs between profiles: {alt}"


def test_the_letters_of_drawings_are_legible_on_a_phone():
    for path in sorted((ROOT / "book" / "_static").glob("*.svg")):
        drawing = path.read_text(encoding="utf-8")
        width = float(re.search(r'viewBox="0 0 ([\d.]+) ', drawing)[1])
        sizes = [float(size) * 340 / width for size in re.findall(r'font-size="([\d.]+)"', drawing)]  # on 390 pixels
        assert min(sizes, default=9) >= 9, path


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
    assert tool(tiny).main(["run", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert not (tiny / "runs").exists()


def test_values_are_read_as_papermill_reads_them(tiny):
    workshop = tool(tiny)
    given = workshop.read_parameters("temperature=8 seed=3", workshop.chapters())
    by_number = {chapter.number: values for chapter, values in given.items()}
    shared = by_number["00"]["run"]
    assert by_number["00"] == {"seed": 3, "run": shared}
    assert by_number["02"] == {"seed": 3, "temperature": 8.0, "run": shared}
    assert re.fullmatch("[0-9a-f]{16}", shared)
    assert workshop.read_parameters("", workshop.chapters()) == {chapter: {} for chapter in given}
    assert workshop.parse("seed", "None", "int") is None
    assert workshop.parse("run", "17", "str") == "17"
    assert workshop.parse("fast", "False", "bool") is False


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
    assert sorted(path.name for path in runs.iterdir()) == ["00_tiny.ipynb", "01_tiny.ipynb", "run.json"]
    assert "no such luck" in (runs / "01_tiny.ipynb").read_text(encoding="utf-8")
    assert (tiny / "book" / "01_tiny.ipynb").read_bytes() == before


def test_a_network_of_ones_own_is_imported_from_the_working_folder(tiny, tmp_path_factory):
    cells = [
        new_markdown_cell("# Own", id="title"),
        new_code_cell("student: str = None  # a network", id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell("import kdlib\n\nsettings = kdlib.notebook_settings(globals())", id="settings"),
        new_code_cell("print(kdlib.build(settings.students[0], 3, 1))", id="body"),
    ]
    write_notebook(tiny / "book" / "00_tiny.ipynb", cells)
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("from torch import nn\n\n\ndef small(c, n):\n    return nn.Linear(n, c)\n")
    command = [tiny / "tools" / "book.py", "run", "--profile", "quick", "--chapters", "00", "--params"]
    done = start(tiny, *command, "student=mine:small", cwd=folder)
    assert done.returncode == 0, done.stderr
    (path,) = tiny.glob("runs/quick-*/00_tiny.ipynb")
    assert code_cells(nbformat.read(path, 4))[-1].outputs[0].text.startswith("Linear(in_features=1, out_features=3")
    missing = start(tiny, *command, "student=mine:large", cwd=folder)
    assert missing.returncode == 2
    assert "'mine:large' cannot be imported" in missing.stderr


def test_part_one_as_a_chain_with_parameters(clone):
    arguments = ["--profile", "quick", "--chapters", "02 03 05 06", "--params", "epochs=2 n_seeds=2 temperature=8"]
    done = book(clone, "book", *arguments)
    assert done.returncode == 0, done.stderr
    for count, number in enumerate(("02", "03", "05", "06"), 1):
        assert f"chapter {count} of 4: {number}" in done.stdout
    (folder,) = (clone / "outputs").iterdir()  # one for all the chapters, and none without parameters
    assert re.fullmatch("quick-[0-9a-f]{16}", folder.name)

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

    # the same by the command for it, which must notice a figure that nobody measured
    verified = verify(clone, *arguments[4:])
    assert verified.returncode == 0, verified.stderr
    path = folder / "soft_labels.npy"
    if not path.exists():
        path = artefacts.base_folder(folder) / path.name
    logits, known = artefacts.load_array(path), artefacts.record(path)
    slipped = {"fingerprint": known["fingerprint"], "provenance": known["provenance"]}
    last = np.roll(logits[-1:], 1, axis=1)  # in the last view, each image has its neighbour's
    artefacts.save_array(path, np.concatenate([logits[:-1], last]), **slipped)
    refused = verify(clone, *arguments[4:])
    assert refused.returncode == 1
    assert f"soft_labels.npy: the logits of view {len(logits) - 1} are off by" in refused.stderr
    artefacts.save_array(path, logits, **slipped)
    distilled["accuracy"][1] += 0.01
    artefacts.save_json(folder / "results.json", results)
    refused = verify(clone, *arguments[4:])
    assert refused.returncode == 1
    assert "student_perceptron_seed1.pth: accuracy is" in refused.stderr
    weights = folder / "student_perceptron_seed1.pth"
    weights.write_bytes(weights.read_bytes()[:100])
    damaged = verify(clone, *arguments[4:])
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


def test_without_a_teacher_from_the_published_records(tmp_path):
    tree = copy_book(tmp_path)
    arguments = ["--profile", "quick", "--chapters", "03 05", "--params", "start_from=published n_seeds=2 epochs=2"]
    done = book(tree, "run", *arguments)
    assert done.returncode == 0, done.stderr
    (folder,) = (tree / "outputs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert "student_perceptron_seed1.pth" in names
    assert not any(name.startswith(("teacher", "soft_labels")) for name in names)
    made = artefacts.record(tree / "book" / "published" / "quick" / "histories.json")["provenance"]
    for path in (tree / "runs" / folder.name).glob("0*.ipynb"):
        outputs = [o for cell in code_cells(nbformat.read(path, 4)) for o in cell.outputs]
        text = "".join(o.get("data", {}).get("text/markdown", "") + o.get("text", "") for o in outputs)
        assert "Composed from published records" in text
        assert f"measured on {made['device']}, {made['date']}" in text

    # if fewer views are published than there are, the student draws from those
    path, records = tree / "book" / "published" / "quick" / "soft_labels.npy", tool(tree, "records")
    array, known = artefacts.load_array(path)[:3], artefacts.record(path)
    records.keep(path, records.array_bytes(array), known["fingerprint"] | {"views": 3}, known["provenance"])
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
            assert recorded["loss_fn"]["temperature"] == 8
            assert recorded["loss_fn"]["alpha"] == 0.2
            assert recorded["recipe"]["epochs"] == 1
    assert list(empty.iterdir()) == []  # a run leaves nothing but its artefacts and its notebook


OWN_STUDENT = """
from torch import nn


def small(classes, channels):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), pooled, nn.Linear(128, classes))
"""


def test_pictures_and_a_student_of_ones_own_go_through_part_one(clone, tmp_path):
    random = np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 6), ("test", 6)):
        for shade, name in enumerate(("cat", "dog", "emu")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for k in range(count):  # of many sizes
                pixels = random.randint(60 * shade, 60 * shade + 120, (*random.randint(14, 30, 2), 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    (tmp_path / "mynets.py").write_text(OWN_STUDENT, encoding="utf-8")
    parameters = "dataset=photos size=12 flip=True student=mynets:small n_seeds=2 epochs=2"
    line = ["run", "--profile", "quick", "--chapters", "01 05 06", "--params", parameters]
    done = start(clone, clone / "tools" / "book.py", *line, cwd=tmp_path, KDLIB_OUTPUTS=str(tmp_path / "outputs"))
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert Path(results["dataset"]) == (tmp_path / "photos").resolve()
    assert {run["network"] for run in results["runs"] if run["role"] != "teacher"} == {"mynets:small"}
    executed = clone / "runs" / folder.name
    cells = code_cells(nbformat.read(executed / "01_data.ipynb", 4))
    (said,) = (o.text for cell in cells for o in cell.outputs if "photos: " in o.get("text", ""))
    assert "60 training images (cat 20, dog 20, emu 20); 18 validation images given; 18 test images" in said
    assert "mynets:small" in json.dumps(nbformat.read(executed / "06_evaluate.ipynb", 4))


def test_papermill_by_itself_refuses_a_parameter_that_the_chapter_does_not_have(clone, tmp_path):
    notebook = clone / "book" / "05_distill_student.ipynb"
    line = ["-p", "profile", "quick", "-p", "temprature", "8", "--no-progress-bar"]
    done = start(clone, "-m", "papermill", notebook, tmp_path / "out.ipynb", *line)
    assert done.returncode != 0
    assert "'temprature' is unknown" in done.stderr
    assert "did you mean 'temperature'?" in done.stderr
    assert not (clone / "outputs" / "quick").exists()


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
        {"batch.views, batch.indices]": "batch.views, (batch.indices + 1) % self.logits.shape[1]]"},
    ),
    "another validation split": (
        "01",
        "sources/splits.py",
        {"np.sort(len(labels) - 1 - stratified(labels[::-1],": "np.sort(stratified(labels,"},
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


def test_every_page_is_there(site):
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]
    for file in files:
        assert page(site / f"{file}.html").h1.get_text(strip=True)
    rendered = {str(path.relative_to(site).with_suffix("")) for path in (site / "book").glob("*.html")}
    assert rendered == set(files)


def test_a_description_ends_with_a_sentence(site):
    seen = set()
    for path in [site / "index.html", *(site / "book").glob("*.html")]:
        texts = [
            tag["content"] for tag in page(path).select('meta[name="description"], meta[property="og:description"]')
        ]
        assert len(texts) == 2
        assert texts[0] == texts[1]
        assert re.fullmatch(r"[A-Z][^\\]{30,299}[^.][.?]", texts[0]), f"{path.name}: {texts[0]}"
        seen.add(texts[0])
    assert len(seen) == len(list((site / "book").glob("*.html")))  # the first page has that of index.html


def test_every_link_leads_somewhere(site):
    pages = {path: page(path) for path in [*site.glob("*.html"), *(site / "book").glob("*.html")]}
    anchors = {path: {tag["id"] for tag in soup.find_all(id=True)} for path, soup in pages.items()}
    for path, soup in pages.items():

        def place(link: str, start: Path = path.parent) -> Path:
            """The file of a link; 404.html, which is shown at any address, counts from the site's."""
            return ((site if link.startswith("/") else start) / unquote(link).lstrip("/")).resolve()

        for link in soup.find_all("a", href=True):
            target, anchor = urldefrag(link["href"])
            if re.match(r"[a-z]+:", target) or not (target or anchor):
                continue
            file = place(target) if target else path
            assert file.exists(), f"{path.name}: {link['href']}"
            if anchor:
                assert unquote(anchor) in anchors[file], f"{path.name}: {link['href']}"
        for image in soup.find_all("img", src=True):
            assert place(image["src"]).exists(), f"{path.name}: {image['src']}"


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


def stamp_of(site: Path, number: str) -> str:
    (path,) = (site / "book").glob(f"{number}_*.html")
    return " ".join(page(path).select_one(".stamp").get_text().split())


def test_a_page_says_how_it_was_run_and_whether_that_holds(site):
    stamp = nbformat.read(CHAPTERS[1], 4).metadata["kdlib_published"]
    assert f"Run at profile {stamp['profile']} on {stamp['device']}" in stamp_of(site, "01")
    assert stamp["date"] in stamp_of(site, "01")
    stale = stamp_of(site, "02")
    assert "It may not hold any more (stale" in stale
    assert "CHAPTERS=02 executes it again" in stale
    (path,) = (site / "book").glob("02_*.html")
    assert "warning" in page(path).select_one(".stamp")["class"]


def test_a_page_says_what_was_carried_over_and_which_outputs_are_to_come(site):
    said = "Outputs of commit abc1234; the code has been rewritten since (same results at quick in 7 of 8 outputs)"
    assert said in stamp_of(site, "04")
    (path,) = (site / "book").glob("04_*.html")
    assert page_text(path).count("The output of this cell comes with the next run at profile") == 1
    assert "composed from its records on CPU, 2 threads, 2026-12-24" in stamp_of(site, "05")
    assert "commit not recorded" in stamp_of(site, "05")


def test_the_address_is_carried_everywhere(tiny, capsys):
    url = "https://github.com/somebody/a-book"
    render = tool(tiny, "render")
    nowhere = render.set_up_cell(f"git+{render.project_address()}")
    assert "%pip install --quiet" not in nowhere  # nothing is installed from an address that leads nowhere
    assert "no public address" in nowhere
    change_cell(tiny / "book" / "01_tiny.ipynb", "setup", nowhere)
    (tiny / "README.md").write_text(f"git clone {tool(tiny, 'render').project_address()}\n", encoding="utf-8")
    assert tool(tiny).main(["address", "github"]) == 2
    assert "'github'" in capsys.readouterr().err
    assert "launch_buttons" not in tool(tiny, "render").site_settings()
    assert tool(tiny).main(["address", url]) == 0
    assert f'repository = "{url}"' in (tiny / "pyproject.toml").read_text(encoding="utf-8")
    assert (tiny / "README.md").read_text(encoding="utf-8") == f"git clone {url}\n"
    assert nbformat.read(tiny / "book" / "01_tiny.ipynb", 4).cells[1].source == render.set_up_cell(f"git+{url}")
    assert f"%pip install --quiet git+{url}" in render.set_up_cell(f"git+{url}")
    settings = tool(tiny, "render").site_settings()
    assert settings["repository"]["url"] == url
    assert settings["html"]["baseurl"] == settings["sphinx"]["config"]["ogp_site_url"]
    assert settings["html"]["baseurl"] == "https://somebody.github.io/a-book/"
    assert settings["launch_buttons"]["colab_url"]


def test_every_paper_that_a_page_links_to_is_in_the_references():
    def papers(page: Path) -> set[str]:
        return set(re.findall(r"arxiv\.org/abs/([\d.]+\d)", page.read_text(encoding="utf-8")))

    known = papers(ROOT / "book" / "references.bib")
    for page in (*CHAPTERS, ROOT / "book" / "intro.md"):
        assert papers(page) <= known, f"{page.name} links to {papers(page) - known}"
