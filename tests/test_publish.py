"""Publishing: pages and their stamps, the records of a run, the pages that tools write, and recomputing figures."""

import base64
import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from workshop import ROOT, change_cell, copy_tree, start, tiny_book, tool, write_notebook

from kdlib import evaluate, lab, load_data, load_student, load_teacher, measured, predict_logits, resolve
from kdlib.records import artefacts, fetch


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A book of three chapters that need no kdlib."""
    return tiny_book(tmp_path)


def publish(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python tools/publish.py --profile quick …`` in `tree`."""
    return start(tree, "tools/publish.py", "--profile", "quick", *arguments)


def verify(tree: Path, *arguments: str) -> subprocess.CompletedProcess:
    """``python tools/verify.py --profile quick …`` in `tree`."""
    return start(tree, "tools/verify.py", "--profile", "quick", *arguments)


def test_publishing(tiny, capsys):
    def status() -> str:
        assert tool(tiny).main(["status"]) == 0
        return capsys.readouterr().out

    path = tiny / "book" / "00_tiny.ipynb"
    change_cell(tiny / "book" / "01_tiny.ipynb", "body", "raise RuntimeError('not this one')")
    failing = (tiny / "book" / "01_tiny.ipynb").read_bytes()
    assert "00 tiny                     never published" in status()

    done = publish(tiny)
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
    assert set(stamp) == {"profile", "device", "versions", "date", "seconds", "commit", "depends_on"}
    assert stamp["profile"] == "quick"
    assert stamp["versions"].keys() >= {"python", "torch"}

    with mock.patch.dict(os.environ):
        assert tool(tiny, "publish").main(["--profile", "quick", "--chapters", "0"]) == 0
    assert "00 Chapter 00: current" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == text

    change_cell(path, "setup", "# another address")  # changes nothing that is measured
    assert "00 tiny                     current" in status()
    change_cell(path, "body", "print('new')")
    assert "00 tiny                     stale: code cells changed" in status()
    assert publish(tiny, "--chapters", "00").returncode == 0
    assert nbformat.read(path, 4).cells[3].outputs[0].text == "new\n"

    notebook = nbformat.read(path, 4)  # as if it came from a GPU
    notebook.metadata["kdlib_published"]["profile"] = "full"
    nbformat.write(notebook, path)
    with mock.patch.dict(os.environ):
        capsys.readouterr()
        assert tool(tiny, "publish").main(["--profile", "quick", "--chapters", "00"]) == 0
    assert "00 Chapter 00: stays as published at profile full" in capsys.readouterr().out


def test_a_page_composed_from_records_names_both_runs(tiny, capsys):
    records = tiny / "book" / "published" / "quick"
    made = {"device": "a GPU", "date": "2026-01-31", "versions": {"torch": "2.0"}, "commit": "abc1234", "seconds": 9}
    tool(tiny, "publish").keep(records / "histories.json", b"{}", {}, made)
    cells = [
        new_markdown_cell("# Composed", id="title"),
        new_code_cell('start_from: str = "scratch"  # or', id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell("start_from", id="body"),
    ]
    write_notebook(tiny / "book" / "00_tiny.ipynb", cells)
    done = publish(tiny, "--chapters", "00", "--composed")
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tiny / "book" / "00_tiny.ipynb", 4)
    assert [cell.id for cell in notebook.cells] == ["title", "parameters", "body"]
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2]
    (output,) = notebook.cells[2].outputs
    assert output.data["text/plain"] == "'published'"
    assert output.execution_count == 2
    stamp = notebook.metadata["kdlib_published"]
    assert {name: stamp[name] for name in ("device", "date", "commit")} == {
        name: made[name] for name in ("device", "date", "commit")
    }
    assert stamp["composed"]["device"].startswith("CPU")
    assert tool(tiny).main(["status"]) == 0
    status = capsys.readouterr().out
    assert re.search(
        r"00 tiny +current · Run at profile quick on a GPU · torch 2.0 · 2026-01-31 \(commit abc1234\)", status
    )
    assert "composed from its records on CPU" in status


# --- pages that tools write ----------------------------------------------------------------------------------------


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
        tool(tiny, "publish").fill_results(results)
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
        tool(tiny, "publish").fill_results({"profile": profile, "dataset": "any", "date": "2026-01-31", "runs": runs})
    assert "50.00 %" in (tiny / "book" / "intro.md").read_text(encoding="utf-8")
    assert (tiny / "book" / "published" / "quick" / "results.json").exists()


# --- records -------------------------------------------------------------------------------------------------------

NAMED = (ROOT / "book" / "published").glob("[!.]*")  # without the locks of campaigns
FOLDERS = sorted(path for path in NAMED if path.is_dir())
PUBLISHED = [path for path in FOLDERS if (path / "histories.json").exists()]
ROWS_ONLY = [path for path in FOLDERS if path not in PUBLISHED]
every_published_profile = pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)


@every_published_profile
def test_what_is_published_is_small_and_fits_its_records(folder):
    names = {path.name for path in folder.iterdir()}
    rows = {name for name in names if re.fullmatch(r"\d\d_\w+\.json", name)}
    recorded = {name.removesuffix(".json") for name in names if re.search(r"\.(npy|pth|json)\.json$", name)}
    assert names == {"results.json"} | rows | recorded | {f"{name}.json" for name in recorded}
    profile = resolve(folder.name)
    distilled = {profile.file("distilled", network, seed) for network in profile.students for seed in profile.seeds}
    logits = "logits.npy" if "logits.npy" in recorded else "teacher_logits.npy"  # the latter of the teacher alone
    expected = {"soft_labels.npy", logits, "histories.json", *distilled}
    assert recorded - {"measured.json", "results.json"} == expected
    for name in recorded:
        known = artefacts.record(folder / name)
        assert set(known) >= {"fingerprint", "sha256", "provenance"}
        assert known["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    soft_labels = artefacts.load_array(folder / "soft_labels.npy")
    assert soft_labels.dtype == artefacts.load_array(folder / logits).dtype == "float16"
    assert soft_labels.nbytes <= 8e6 or len(soft_labels) == 1
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6
    for name in distilled:
        weights = torch.load(folder / name, weights_only=True)
        assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float16}
    histories = json.loads((folder / "histories.json").read_text(encoding="utf-8"))
    assert len(histories) == 1 + 2 * len(distilled)
    assert all(len(history["loss"]) == len(history["accuracy"]) > 0 for history in histories.values())


@pytest.mark.parametrize("folder", ROWS_ONLY, ids=lambda folder: folder.name)
def test_a_folder_without_records_holds_rows_alone(folder):
    assert resolve(folder.name).base == "laptop"
    assert all(re.fullmatch(r"\d\d_\w+\.json", path.name) for path in folder.iterdir())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of profile quick: its settings, and what its chapters would have used."""
    folder, data = tmp_path_factory.mktemp("run"), load_data("digits")
    profile = resolve("quick")
    short = {f"{role}_recipe": replace(getattr(profile, f"{role}_recipe"), epochs=2) for role in ("teacher", "student")}
    settings = replace(profile, n_seeds=2, **short)
    with mock.patch.dict(os.environ, {"KDLIB_OUTPUTS": str(folder / "outputs")}):
        teacher = load_teacher(settings, data)
        students = {
            (role, seed): load_student(settings, data, teacher, role, "perceptron", seed)
            for role in ("student", "distilled")
            for seed in settings.seeds
        }
        measured(settings, "latency_ms", lambda: {"perceptron": (1.5, 2.5)})
        assert len(teacher.soft_labels.logits) == 9
    return folder, settings, data, teacher, students


@pytest.fixture
def published(run, tmp_path, monkeypatch):
    """The records of that run in a clone of their own: the tool that wrote them, and their folder."""
    folder, settings, data, teacher, students = run
    monkeypatch.setenv("KDLIB_OUTPUTS", str(folder / "outputs"))
    publishing, records = tool(ROOT, "publish"), tmp_path / "book" / "published" / "quick"
    records.mkdir(parents=True)
    for name in ("student_old.pth", "student_old.pth.json", "teacher_logits.npy", "07_rows.json"):
        (records / name).write_text("{}")
    views = 3 * teacher.soft_labels.logits[0].nbytes + 1
    for _ in range(2):  # a second time replaces
        with (
            mock.patch.multiple(publishing, ROOT=tmp_path, BOOK=tmp_path / "book"),
            mock.patch.object(sys.modules["records"], "PUBLISHED_VIEWS", views),
        ):
            publishing.keep_run(settings, records)
            publishing.fill_results(results_of(settings, data, {("teacher", 0): teacher} | students))
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setattr(fetch, "clone_folder", lambda: tmp_path)
    return publishing, records


def results_of(settings, data, networks: dict) -> dict:
    """What chapter 06 would have written."""
    runs = []
    for role, network in (("teacher", settings.teacher), ("student", "perceptron"), ("distilled", "perceptron")):
        by_seed = {seed: own for (kind, seed), own in networks.items() if kind == role}
        scores = [evaluate.scores(own.logits["test"], data.test.labels) for own in by_seed.values()]
        figures = {name: [getattr(one, name) for one in scores] for name in ("accuracy", "nll", "ece")}
        about = {"role": role, "network": network, "seeds": list(by_seed), "parameters": 1, "size_mb": 1.0}
        runs.append({**about, **figures, "device": "a CPU", "latency_ms": {}})
    return {"profile": "quick", "dataset": "digits", "date": "2026-01-31", "runs": runs}


def test_only_the_views_that_fit_are_published_and_what_is_outdated_goes(run, published):
    _, settings, data, teacher, _ = run
    _, records = published
    files = {"soft_labels.npy", "logits.npy", "histories.json", "measured.json", "results.json"}
    files |= {settings.file("distilled", "perceptron", seed) for seed in settings.seeds}
    assert {path.name for path in records.iterdir()} == files | {f"{name}.json" for name in files} | {"07_rows.json"}
    array = artefacts.load_array(records / "soft_labels.npy")
    assert (array == teacher.soft_labels.logits[:3].numpy()).all()
    assert artefacts.record(records / "soft_labels.npy")["fingerprint"]["views"] == 3
    assert artefacts.load_array(records / "logits.npy").shape == (5, len(data.validation) + len(data.test), 10)
    for name in files:
        known = artefacts.record(records / name)
        assert known["sha256"] == hashlib.sha256((records / name).read_bytes()).hexdigest()
        assert "commit" in known["provenance"] or name == "results.json"


def test_a_page_starts_from_the_records_of_the_same_settings(run, published, capsys):
    _, settings, data, teacher, students = run
    again = replace(settings, start_from="published")
    recorded = load_teacher(again, data)
    assert recorded.model is None
    assert recorded.path is None
    assert recorded.history == teacher.history
    assert recorded.megabytes == teacher.megabytes
    assert recorded.soft_labels.views == 3
    assert recorded.provenance.items() >= teacher.provenance.items()
    for split in ("train", "validation", "test"):
        assert torch.allclose(recorded.logits[split], teacher.logits[split], atol=0.02)
    for text in ("Composed from published records", "3 views", teacher.provenance["device"], "at commit"):
        assert text in recorded.note

    for (role, seed), student in students.items():
        found = load_student(again, data, recorded, role, "perceptron", seed)
        assert found.history == student.history
        assert found.megabytes == student.megabytes
        assert torch.allclose(found.logits["test"], student.logits["test"], atol=0.02)
        assert "recorded ones, too" in found.note
        assert (found.model is None) == (role == "student")  # only the distilled students' weights are published
        if found.model is None:
            with pytest.raises(KeyError, match="no logits of 'train' are recorded, only of validation, test"):
                found.logits["train"]
        else:
            assert torch.allclose(predict_logits(found.model, data.test), student.logits["test"], atol=0.1)

    assert measured(again, "latency_ms", pytest.fail) == {"perceptron": [1.5, 2.5]}
    assert measured(again, "another", pytest.fail) is None
    assert "another: not recorded at profile quick with these settings" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"'tiny_cnn': the published records are of teacher_digits_cnn\.pth; leave the"
    ):
        load_teacher(replace(again, teacher="tiny_cnn"), data)


def test_with_other_settings_the_students_are_trained_from_the_recorded_soft_labels(run, published):
    _, settings, data, *_ = run
    again = replace(settings, start_from="published", temperature=8.0, run="hot")
    teacher = load_teacher(again, data)
    student = load_student(again, data, teacher, "distilled", "perceptron", 0)
    assert student.path.exists()
    assert "trained here, in 3 views of each image" in student.note
    made_from = artefacts.record(student.path)["fingerprint"]
    assert made_from["recipe"]["views"] == 3
    assert made_from["loss_fn"]["temperature"] == 8.0
    assert measured(again, "latency_ms", pytest.fail) is None


def test_recorded_students_do_not_mix_with_those_that_are_trained_here(run, published):
    """The recorded ones have seen nine views, the others can see three only."""
    _, settings, data, *_ = run
    again = replace(settings, start_from="published", n_seeds=settings.n_seeds + 1, run="more")
    teacher = load_teacher(again, data)
    assert load_student(again, data, teacher, "student", "perceptron", 0).path.exists()
    assert measured(again, "latency_ms", pytest.fail) is None


def test_a_page_says_if_the_recorded_teacher_was_trained_otherwise(run, published):
    _, settings, data, *_ = run
    other = replace(settings, start_from="published", teacher_recipe=replace(settings.teacher_recipe, epochs=7, seed=3))
    assert "It was trained with epochs 2, seed 0, whatever" in load_teacher(other, data).note


def test_an_incomplete_run_is_not_published(run, published, tmp_path, monkeypatch, capsys):
    folder, settings, *_ = run
    publishing, records = published
    before = {path.name: path.read_bytes() for path in records.iterdir()}
    monkeypatch.setenv("KDLIB_OUTPUTS", str(folder / "outputs"))
    with pytest.raises(publishing.Failed, match=r"not complete \(no student_perceptron_alone_seed2\.pth, "):
        publishing.keep_run(replace(settings, n_seeds=3), records)
    assert {path.name: path.read_bytes() for path in records.iterdir()} == before
    with mock.patch.multiple(publishing, ROOT=tmp_path, BOOK=tmp_path / "book"):
        assert publishing.main(["--profile", "quick", "--records"]) == 1  # chapter 06 left no results
    assert "results.json are not there: run chapter 06 first" in capsys.readouterr().err


# --- verify --------------------------------------------------------------------------------------------------------


def test_published_figures_are_recomputed_from_published_logits_and_weights(run, published, capsys):
    _, settings, *_ = run
    verifying, (_, records) = tool(ROOT, "verify"), published
    with mock.patch.object(verifying, "BOOK", records.parent.parent):
        wrong, path = verifying.recompute_published(settings)
        assert wrong == []
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 + 2  # the logits of all, the weights of the distilled students
        results = json.loads(path.read_text(encoding="utf-8"))
        for network in results["runs"]:
            network["accuracy"][-1] += 0.002
        content = json.dumps(results).encode()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"results\.json has changed since it was saved"):
            verifying.recompute_published(settings)
        artefacts.record_path(path).unlink()
        wrong, _ = verifying.recompute_published(settings)
    assert [text.partition(" is ")[0] for text in wrong] == [
        "logits of teacher_digits_cnn.pth: accuracy",
        "logits of student_perceptron_alone_seed1.pth: accuracy",
        "logits of student_perceptron_seed1.pth: accuracy",
        "student_perceptron_seed1.pth: accuracy",
    ]


@pytest.mark.parametrize("network", ["os:getcwd", "../../tiny_cnn"])
def test_a_name_in_a_file_chooses_no_code(run, published, network, monkeypatch):
    _, settings, *_ = run
    verifying, (_, records) = tool(ROOT, "verify"), published
    results = json.loads((records / "results.json").read_text(encoding="utf-8"))
    results["runs"][1]["network"] = network
    artefacts.save_json(records / "results.json", results)
    artefacts.record_path(records / "results.json").unlink()
    monkeypatch.setattr(os, "getcwd", pytest.fail)
    with mock.patch.object(verifying, "BOOK", records.parent.parent):
        with pytest.raises(verifying.Failed, match=r"is not one of kdlib's; if it is yours, name it: --params"):
            verifying.recompute_published(settings)
        if ":" in network:  # the user may type it
            verifying.rows(records / "results.json", replace(settings, students=(network,)))


def test_the_command_recomputes_what_is_published(tmp_path):
    tree = copy_tree(tmp_path)
    (tree / "book").mkdir()
    shutil.copy(ROOT / "book" / "intro.md", tree / "book")
    missing = verify(tree, "--published")
    assert missing.returncode == 1
    assert "profile quick is not published" in missing.stderr
    shutil.copytree(ROOT / "book" / "published", tree / "book" / "published")
    verified = verify(tree, "--published")
    assert verified.returncode == 0, verified.stderr
    assert "are reproduced" in verified.stdout
    assert not (tree / "outputs").exists()
    assert verify(tree, "--published", "--params", "seed=1").returncode == 2


# --- tables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "book/intro.md"])
def test_the_tables_of_results_are_those_of_the_published_files(page):
    published = ROOT / "book" / "published"
    found = next(path for name in ("full", "quick") if (path := published / name / "results.json").exists())
    picture = os.path.relpath(published / "results.png", (ROOT / page).parent)
    shown = tool(ROOT, "publish").shown_results(json.loads(found.read_text(encoding="utf-8")), picture)
    assert f"<!-- results: begin -->\n{shown}<!-- results: end -->" in (ROOT / page).read_text(encoding="utf-8")


# --- the page of verdicts ------------------------------------------------------------------------------------------

MEASURED = [
    path
    for profile in ("laptop", "laptop-repeat", "full")
    for path in sorted((ROOT / "book" / "published" / profile).glob("[0-9][0-9]_*.json"))
]
every_experiment = pytest.mark.parametrize("path", MEASURED, ids=lambda path: f"{path.parent.name}-{path.stem}")


def test_the_pages_are_those_of_the_published_measurements():
    for path, block, shown in tool(ROOT, "publish").written_pages():
        text = path.read_text(encoding="utf-8")
        if block != "controls" or f"<!-- {block}: begin -->" in text:
            assert f"<!-- {block}: begin -->\n{shown}<!-- {block}: end -->" in text, path


@every_experiment
def test_measurements_are_rows_of_at_least_three_seeds(path):
    found = lab.load(path)
    assert found["experiment"] == path.stem
    assert found["profile"] == path.parent.name
    cases = [] if found["claims"] else {row["case"] for row in found["rows"]}  # shown in its chapter alone
    assert found["claims"] or cases
    for case in cases:
        assert len(lab.values(found, case, "accuracy")) >= 3, case
    for claim in found["claims"]:
        linked = re.search(r"\]\((https?://|\d\d_\w+\.ipynb)", claim["source"])
        assert linked or claim["source"].startswith("our own"), f"{claim['text']}: no link to its source"
        for compared in claim["comparisons"]:
            assert lab.estimate(found, compared).n >= 3, compared
    if path.parent.name == "laptop-repeat":
        lab.verdicts(lab.load(path.parent.parent / "laptop" / path.name), found)


@every_experiment
def test_other_measurements_would_give_other_verdicts(path):
    found = lab.load(path)
    for claim in found["claims"]:
        verdicts = {lab.judge(claim, found).verdict}
        for compared in claim["comparisons"]:  # one at a time is made clearly true, and clearly false
            case, weight = next(iter(compared["weights"].items()))
            rest = {other: -w / weight for other, w in compared["weights"].items() if other != case}
            beyond = compared["sign"] * (compared["margin"] + 1)
            for apart in (beyond, -beyond) if beyond else (0, compared["margin"] + 1):
                changed = copy.deepcopy(found)
                others = {other: lab.values(found, other, compared["measure"]) for other in rest}
                for row in changed["rows"]:
                    if row["case"] == case and all(row["seed"] in own for own in others.values()):
                        of_others = sum(w * others[other][row["seed"]] for other, w in rest.items())
                        row[compared["measure"]] = of_others + apart / weight
                        row.pop("by image", None)  # which images it would be right on, nobody knows
                verdicts.add(lab.judge(claim, changed).verdict)
        assert len(verdicts) > 1, claim["text"]


def experiment(profile: str, seeds=range(3), name="01_tiny", images=None, **shares: float) -> dict:
    """The rows of an experiment with a claim: of each case a share of the images is correct, a little more by seed."""
    compared = lab.compare("accuracy", "soft", "hard")
    again = replace(compared, weights={"hard": -1.0, "soft": 1.0})
    claims = [
        {"text": text, "source": "[somebody](https://example.org)", "comparisons": [asdict(c)]}
        for text, c in (("soft labels help", compared), ("they help again", again))
    ]
    rows = [
        {"case": case, "seed": seed, "made_from": "0", "seconds": 50, "device": "CPU", "accuracy": share + seed / 100}
        for case, share in shares.items()
        for seed in seeds
    ]
    for row in rows if images else ():
        row["by image"] = {"accuracy": packed(np.arange(images) < row["accuracy"] * images)}
    about = {"experiment": name, "profile": profile, "dataset": "any", "date": "2026-01-31"}
    return {**about, "rows": rows, "claims": claims}


def packed(correct: np.ndarray) -> dict:
    return {"images": len(correct), "bits": base64.b64encode(np.packbits(correct)).decode()}


@pytest.fixture
def pages(tiny) -> Path:
    """The tiny book with the two pages that are written from the rows."""
    for name, blocks in {"what_we_found": ("counts", "findings"), "which_recipe": ("recipes",)}.items():
        text = "".join(f"a\n<!-- {block}: begin -->\n<!-- {block}: end -->\nb\n" for block in blocks)
        (tiny / "book" / f"{name}.md").write_text(text, encoding="utf-8")
    return tiny


def written(tree: Path) -> str:
    text = (tree / "book" / "what_we_found.md").read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- counts: begin -->\n")
    assert text.endswith("<!-- findings: end -->\nb\n")
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_without_rows_the_page_of_verdicts_says_so(pages):
    tool(pages, "publish").fill_pages()
    assert "No chapter is published at profile laptop or full yet, so there are no verdicts." in written(pages)


def test_rows_without_a_claim_are_not_on_the_page(pages):
    publishing = tool(pages, "publish")
    before = written(pages)
    publishing.fill_findings(experiment("laptop", hard=0.5, soft=0.9) | {"claims": []})
    publishing.fill_pages()
    assert "Chapter 01" not in written(pages)
    assert before != written(pages)  # the page was filled


def test_the_page_of_verdicts_shows_both_runs_and_what_they_took(pages):
    publishing = tool(pages, "publish")
    publishing.fill_findings(experiment("laptop", hard=0.5, soft=0.9))
    text = written(pages)
    assert '**2 claims, 2 of them decided**: 2 <span class="verdict supported">supported</span>, 0 ' in text
    assert "No second run is published." in text
    assert "## [01 Chapter 01](01_tiny.ipynb) (profile laptop)" in text
    supported, contradicted = lab.badge("supported"), lab.badge("contradicted")
    claim = "| soft labels help ([somebody](https://example.org)) "
    assert f"{claim}| {supported} | *soft* − *hard*: +40.00 ± 0.00 points (n = 3; asks for: more than 0) |" in text
    assert "One run on any, CPU, 2026-01-31: 6 measurements in 5 min." in text

    publishing.fill_findings(experiment("laptop-repeat", range(100, 103), hard=0.5, soft=0.4))
    text = written(pages)
    assert "| claim | verdict | difference and 95 % interval | first run alone | second run alone |" in text
    assert f"| {supported} | {contradicted} |\n" in text
    assert "The first run by itself decides 2 claims. On 0 of them (0%) the second" in text
    assert "and on 2 it is reversed (supported against contradicted)" in text
    assert "at random, 0.0 would be the same" in text
    assert "the test images are the same" in text
    assert "Two runs on any, CPU, 2026-01-31: 6 measurements in 5 min and 6 measurements in 5 min." in text

    publishing.fill_findings(experiment("full", hard=0.5, soft=0.3))  # has a column; laptop has the verdict
    text = written(pages)
    assert "second run alone | at profile full |" in text
    assert (
        "At profile full, whose differences are in the chapter: any, CPU, 2026-01-31: 6 measurements in 5 min." in text
    )
    assert f"| {supported} | {contradicted} | {contradicted} |\n" in text
    assert text.count("## [01") == 1


def test_rows_of_profile_quick_and_of_few_images_are_not_on_the_page(pages):
    publishing = tool(pages, "publish")
    publishing.fill_findings(experiment("full", images=500, hard=0.5, soft=0.9))
    assert "so there are no verdicts" in written(pages)
    publishing.fill_findings(experiment("full", images=5000, hard=0.5, soft=0.9))
    assert "(profile full)" in written(pages)


def test_the_counts_of_the_page(pages):
    """Worked out by hand, for four experiments of two claims that say the same: each pair of verdicts counts twice."""
    publishing = tool(pages, "publish")
    spread = {0: 0.3, 1: -0.3, 2: 0.0}  # too wide to decide anything
    runs = {"01_a": (0.9, 0.9), "01_b": (0.9, 0.3), "01_c": (0.9, None), "01_d": (None, 0.9)}
    for name, shares in runs.items():
        for profile, first_seed, share in zip(("laptop", "laptop-repeat"), (0, 100), shares, strict=True):
            rows = experiment(profile, range(first_seed, first_seed + 3), name, hard=0.5, soft=share or 0.5)
            for row in rows["rows"] if share is None else ():
                row["accuracy"] += spread[row["seed"] % 100] * (row["case"] == "soft")
            for row in rows["rows"]:
                row["accuracy"] += row["seed"] % 100 * 1e-4 * (row["case"] == "soft")
            publishing.fill_findings(rows)
    findings = sys.modules["findings"]
    c = findings.counts(findings.findings())
    assert (c.claims, c.decided_first, c.same, c.inconclusive, c.reversed) == (8, 6, 2, 2, 2)
    assert c.by_chance == pytest.approx(6 * 4 / 8)  # four of the second run's eight verdicts are "supported"
    assert (c.compared, c.apart) == (8, 2)  # only 01_b differs by more than the spread over seeds
    assert c.differences == 8
    assert c.narrow == 2  # 01_a


def test_a_piece_of_advice_follows_the_measurement(pages):
    tool(pages, "publish").fill_findings(experiment("laptop", hard=0.5, soft=0.9))
    recipes, found = sys.modules["recipes"], sys.modules["findings"].findings()

    def row(first: str, second: str, experiment="01_tiny", **options) -> list[str]:
        asks = lab.compare("accuracy", first, second, **options)
        line = recipes.Line("labels", "T", experiment, asks, "soft", "hard")
        return recipes.row(line, {"01_tiny": found[0]}.get(experiment))

    supported = row("soft", "hard")
    assert supported[:3] == ["labels", "T", "**soft**"]
    assert supported[3].startswith("*soft* − *hard*: +40.00")
    assert supported[3].endswith("profile laptop, [chapter 01](01_tiny.ipynb)")
    assert row("hard", "soft")[2] == "**hard**"
    assert row("soft", "hard", margin=0.4)[2] == "we do not know"
    assert row("soft", "softest")[2:] == ["not measured yet", "[chapter 01](01_tiny.ipynb)"]
    assert row("soft", "hard", "02_tiny")[2:] == ["not measured yet", "[chapter 02](02_tiny.ipynb)"]
    line = recipes.Line("labels", "T", "01_tiny", lab.compare("accuracy", "soft", "hard"), "soft", "hard")
    assert "| labels | T | **soft** |" in recipes.shown(found, (line,))


def test_every_piece_of_advice_rests_on_a_case_that_is_measured():
    tool(ROOT, "publish")
    recipes, found = sys.modules["recipes"], sys.modules["findings"].findings()
    by_experiment = {finding.rows["experiment"]: finding for finding in found if finding.rows["profile"] == "laptop"}
    for line in recipes.LINES:
        assert line.experiment not in by_experiment or recipes.judged(line, by_experiment[line.experiment]), line


ROWS_OF_A_CHAPTER = """
import kdlib
from kdlib import lab

settings = kdlib.resolve()
store = lab.RowStore(settings.folder / "01_own.json", profile=settings.name, dataset="any", title="An experiment")
for case, value in {"hard": 0.5, "soft": 0.9}.items():
    store.measure(case, settings.seeds, lambda seed: {"accuracy": value + seed / 1000}, made_from={"value": value})
claim = lab.Claim("soft labels help", "[somebody](https://example.org)", (lab.compare("accuracy", "soft", "hard"),))
experiment = store.finish([claim])
"""


def test_a_second_run_is_published_as_rows_alone(pages, capsys, monkeypatch):
    monkeypatch.setenv("KDLIB_OUTPUTS", str(pages / "outputs"))
    path = pages / "book" / "01_tiny.ipynb"
    change_cell(path, "body", ROWS_OF_A_CHAPTER)
    before = path.read_bytes()
    (pages / "outputs" / "laptop-repeat").mkdir(parents=True)
    (pages / "outputs" / "laptop-repeat" / "01_older.json").write_text("{}")  # of an earlier run
    os.utime(pages / "outputs" / "laptop-repeat" / "01_older.json", (1, 1))

    def publish_at(profile: str) -> str:
        done = start(pages, "tools/publish.py", "--profile", profile, "--chapters", "01")
        assert done.returncode == 0, done.stderr
        return done.stdout

    rows = pages / "book" / "published"
    assert "the page of 01 shows profile laptop; rows kept of 01_own" in publish_at("laptop-repeat")
    assert path.read_bytes() == before
    assert [p.name for p in (rows / "laptop-repeat").iterdir()] == ["01_own.json"]
    assert tool(pages).main(["status"]) == 0
    assert "01 tiny                     never published" in capsys.readouterr().out

    publish_at("laptop")
    assert nbformat.read(path, 4).metadata["kdlib_published"]["profile"] == "laptop"
    assert "## [01 Chapter 01](01_tiny.ipynb): An experiment (profile laptop)" in written(pages)
    assert "stays as published at profile laptop" in publish_at("quick")

    notebook = nbformat.read(path, 4)
    notebook.metadata["kdlib_published"]["profile"] = "full"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    (rows / "laptop" / "01_own.json").unlink()
    assert "the page of 01 shows profile full; rows kept of 01_own" in publish_at("laptop")
    assert path.read_bytes() == before
    assert (rows / "laptop" / "01_own.json").exists()


# --- outputs carried over to a rewritten chapter -------------------------------------------------------------------

PROFILE = "import os\n\nfull = os.environ['KDLIB_PROFILE'] == 'full'"
FIGURE = "figure = plt.figure(FigureClass={kind}, figsize=(1, 1))\nfigure.subplots().plot([0, 2 if full else 1])\n"
FIGURE = "import matplotlib.pyplot as plt\n" + FIGURE + "plt.close(figure)\nfigure"
BEFORE = {
    "profile": PROFILE,
    "accuracy": "print('accuracy', 90 + full)",
    "both": "from IPython.display import Markdown\n\nprint('first', full)\nMarkdown(f'second *{full}*')",
    "figure": FIGURE.format(kind="plt.Figure"),
    "time": "import time\n\nprint(f'took {time.perf_counter():.6f} s')",
    "one": "print('the same at quick', 1 if full else '')",
    "two": "print('the same at quick', 2 if full else '')",
    "list": "[print(i) for i in range(2 + full)];",
    "words": "print('old words', full)",
}
AFTER = {
    "profile": PROFILE,
    "accuracy": "value = 90 + full  # rewritten\nprint('accuracy', value)",
    "first": "print('first', full)",
    "second": "from IPython.display import Markdown\n\nMarkdown(f'second *{full}*')",
    "figure": "from kdlib.plots import Drawn\n\n" + FIGURE.format(kind="Drawn"),
    "time": "import time\n\nnow = time.perf_counter()\nprint(f'took {now:.6f} s')",
    "one": "print('the same at quick', 1 if full else '')",
    "two": "print('the same at quick', 2 if full else '')",
    "list": "for i in range(2 + full):\n    print(i)",
    "words": "print('new words', full)",
    "checked": "print(6 * 7)",
}
DRAWN = """

class Drawn(matplotlib.figure.Figure):
    def _ipython_display_(self):
        print("an SVG")
"""


def write_chapter(path: Path, sources: dict[str, str]) -> None:
    tags = {"checked": {"tags": ["nbval-check-output"]}}
    cells = [new_code_cell(source, id=name, metadata=tags.get(name, {})) for name, source in sources.items()]
    write_notebook(path, [new_markdown_cell("# Rewritten", id="title"), *cells])


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory) -> Path:
    """A repository whose one chapter was published at profile full, committed, and then rewritten."""
    tree = tiny_book(tmp_path_factory.mktemp("rewritten"))
    path = tree / "book" / "00_tiny.ipynb"
    for name in ("01_tiny", "02_tiny"):
        (tree / "book" / f"{name}.ipynb").unlink()
    write_chapter(path, BEFORE)
    done = start(tree, "tools/publish.py", "--profile", "full")
    assert done.returncode == 0, done.stderr
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "--quiet"], ["add", "book", "kdlib", "tools", "pyproject.toml"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "--message", "published"], cwd=tree, check=True)
    stamp = nbformat.read(path, 4).metadata
    write_chapter(path, AFTER)
    notebook = nbformat.read(path, 4)
    notebook.metadata = stamp
    nbformat.write(notebook, path)
    with (tree / "kdlib" / "plots.py").open("a", encoding="utf-8") as file:
        file.write(DRAWN)
    return tree


def test_published_outputs_are_carried_over_to_a_rewritten_chapter(rewritten):
    path = rewritten / "book" / "00_tiny.ipynb"
    before, old = path.read_bytes(), subprocess.check_output(["git", "show", "HEAD:book/00_tiny.ipynb"], cwd=rewritten)
    published = {cell.id: cell.get("outputs") for cell in nbformat.reads(old.decode(), 4).cells}
    command = ["tools/publish.py", "tidied", "--before", "HEAD", "--chapters", "0", "--timed", "time"]

    planned = start(rewritten, *command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"(?m)^  words +NONE matches: new words False$", planned.stdout)
    assert re.search(r"(?m)^  accuracy +all, from accuracy$", planned.stdout)
    assert path.read_bytes() == before

    done = start(rewritten, *command)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(path, 4)
    cells = {cell.id: cell for cell in notebook.cells[1:]}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(AFTER) + 1))
    assert {name: cell.source for name, cell in cells.items()} == AFTER
    found = {name: cell.outputs for name, cell in cells.items()}
    for name in ("accuracy", "figure", "time", "one", "two"):
        kept = [{**output, "execution_count": None} for output in found[name]]
        assert kept == [{**output, "execution_count": None} for output in published[name]], name
    assert found["accuracy"][0].text == "accuracy 91\n"
    assert [found["one"][0].text, found["two"][0].text] == ["the same at quick 1\n", "the same at quick 2\n"]
    assert found["figure"][0].execution_count == cells["figure"].execution_count
    assert "image/png" in found["figure"][0].data
    assert [found["first"][0].text, found["second"][0].data["text/markdown"]] == ["first True\n", "second *True*"]
    assert found["list"][0].text == "0\n1\n2\n"
    assert found["words"] == []
    assert found["checked"][0].text == "42\n"
    assert [name for name, cell in cells.items() if cell.metadata.get("kdlib_pending")] == ["words"]

    stamp, run = notebook.metadata["kdlib_published"], nbformat.reads(old.decode(), 4).metadata["kdlib_published"]
    for name in ("profile", "device", "date", "seconds", "versions"):
        assert stamp[name] == run[name]
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=rewritten, text=True).strip()
    assert stamp["tidied"]["commit"] == head
    assert (stamp["tidied"]["carried"], stamp["tidied"]["of"]) == (8, 10)
    assert stamp["tidied"]["proof"].startswith("same results at quick in 8 of 10 outputs")
    status = start(rewritten, "tools/book.py", "status")
    assert re.search(r"00 tiny +current, code tidied since", status.stdout), status.stdout + status.stderr


def test_nothing_is_carried_over_from_a_commit_that_does_not_hold(rewritten):
    missing = start(rewritten, "tools/publish.py", "tidied", "--before", "HEAD~7")
    assert missing.returncode == 1
    assert "commit 'HEAD~7': git says" in missing.stderr


def output(text: str):
    return new_output("stream", text=text)


@pytest.mark.parametrize(
    ("before", "after", "published", "expected"),
    [
        (["a", "b"], ["b", "a"], ["A", "B"], ["B", "A"]),  # moved cells
        (["a", "a"], ["a", "a"], ["A1", "A2"], ["A1", "A2"]),  # two that only order tells apart
        (["a", "a"], ["a"], ["A1", "A2"], [None]),  # one is gone, and nothing tells which
        (["a", "a"], ["a"], ["A", "A"], ["A"]),  # nor does it matter here
        (["a"], ["a", "a"], ["A"], ["A", None]),  # one output is carried once
    ],
)
def test_outputs_are_matched_one_to_one(before, after, published, expected):
    tidied = tool(ROOT, "tidied")

    def cells(texts: list[str]) -> list:
        return [new_code_cell("pass", outputs=[output(text)]) for text in texts]

    carried = tidied.carry(cells(before), cells(published), cells(after), [])
    assert [fate.outputs[0].text if fate.outputs else None for fate in carried] == expected
    assert [fate.pending for fate in carried] == [text is None for text in expected]
