"""Students beside the book's own: training that goes on where it stopped, choosing on validation, publishing."""

import dataclasses
import json
import signal
import time

import numpy as np
import pytest
import torch
from workshop import ROOT, copy_tree, tool

import kdlib
from kdlib import published
from kdlib.lab.students import load_students, published_results, published_students, record_rows, student_rows
from kdlib.models import build, count_parameters
from kdlib.records import artefacts, fetch
from kdlib.train import History

pytestmark = pytest.mark.usefixtures("isolated")

LITTLE = ["--profile", "quick", "--miniature"]


@pytest.fixture
def students(monkeypatch):
    """tools/students.py with candidates that train in a blink."""
    module = tool(ROOT, "students")
    return with_candidates(monkeypatch, module)


def with_candidates(monkeypatch, module):
    import candidates

    of = candidates.Candidate
    few = {"plain": of("students", "tiny_cnn", 2), "a": of("record", "perceptron", 2), "b": of("record", "tiny_cnn", 2)}
    give(monkeypatch, module, few)
    monkeypatch.setattr(module.evaluate, "latency", lambda model, shape, batch, device: batch / 4)  # takes its time
    return module


def give(monkeypatch, module, table):
    import candidates

    for holder in (module, candidates):
        monkeypatch.setattr(holder, "CANDIDATES", table)


def train_all(students, names="plain a b"):
    for name in names.split():
        assert students.main(["train", name, *LITTLE]) == 0


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "outputs" / "quick-miniature"


# --- the table of candidates ---------------------------------------------------------------------------------------


def test_candidates_for_the_record_have_fewer_than_a_million_parameters():
    students = tool(ROOT, "students")
    for name, candidate in students.CANDIDATES.items():
        if candidate.kind == "record":
            assert count_parameters(build(candidate.network, 10)) < students.BELOW, name
    kinds = [(name, c.kind, c.n_seeds) for name, c in students.CANDIDATES.items()]
    assert kinds[:2] == [("resnet18", "students", 2), ("mobilenet_v2", "students", 2)]
    assert [(kind, seeds) for _, kind, seeds in kinds[2:]] == [("record", 3)] * 3


def test_the_recipes_at_profile_full():
    students = tool(ROOT, "students")
    settings = kdlib.resolve("full")
    trainings = {one.name: one for name in students.CANDIDATES for one in students.trainings(name, settings)}
    plain = trainings["resnet18"]
    assert plain.recipe == dataclasses.replace(settings.student_recipe, seed=1)
    assert plain.recipe.epochs == 100
    assert plain.weights == {"temperature": 4.0, "alpha": 0.1, "beta": None}
    for name, rate in {"wide_resnet14": 0.4, "convmixer": 0.2, "densenet_bc": 0.4}.items():
        recipe = trainings[name].recipe
        assert (recipe.epochs, recipe.mixup, recipe.learning_rate, recipe.seed) == (300, 1.0, rate, 2)
        assert trainings[name].weights == {"temperature": 2.0, "alpha": 0.0, "beta": None}
    own = {settings.file(role, n, s) for role in ("student", "distilled") for n in settings.students for s in range(3)}
    paths = [one.path for name in students.CANDIDATES for one in students.trainings(name, settings)]
    assert len({path.name for path in paths}) == len(paths) == 2 * 2 * 2 + 3 * 3
    assert not own & {path.name for path in paths}
    assert {path.parent for path in paths} == {settings.folder}


# --- training ------------------------------------------------------------------------------------------------------


def test_students_are_those_that_a_chapter_would_train(students, folder, capsys):
    train_all(students, "plain")
    assert capsys.readouterr().out.count("validation accuracy") == 4
    settings = kdlib.resolve("quick", limit=40, epochs=1, views=2, run="miniature")
    data = kdlib.load_data(settings.dataset, **settings.images)
    teacher = kdlib.load_teacher(settings, data)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    for role in ("student", "distilled"):
        for seed in (0, 1):
            assert kdlib.load_student(settings, data, teacher, role, "tiny_cnn", seed).path in files
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == files  # nothing was trained again


def test_a_candidate_for_the_record_learns_from_the_live_teacher_over_mixed_images(students, folder):
    assert students.main(["train", "a", *LITTLE, "--seeds", "1"]) == 0
    assert not (folder / "record_a_seed0.pth").exists()
    made_from = artefacts.record(folder / "record_a_seed1.pth")["fingerprint"]
    assert made_from["targets"].keys() == {"live_teacher", "weights"}
    assert made_from["loss_fn"].items() >= {"temperature": 2.0, "alpha": 0.0}.items()
    assert (made_from["recipe"]["epochs"], made_from["recipe"]["mixup"]) == (3, 1.0)
    assert not (folder / "soft_labels.npy").exists()


def test_what_was_stopped_goes_on_at_its_checkpoint(students, folder, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def last(history: History) -> dict:
        """What is asked for after each epoch; in the second, SIGTERM comes as when the time is over."""
        if len(history.loss) == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    with monkeypatch.context() as patched:
        patched.setattr(History, "last", last)
        assert students.main(["train", "a", *LITTLE, "--seeds", "0"]) == 1
    said = capsys.readouterr()
    assert "stopping after this epoch, with a checkpoint" in said.out
    assert "the same command goes on from there" in said.err
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(folder.glob("record_a_seed0.*.partial"))
    assert not (folder / "record_a_seed0.pth").exists()
    assert students.main(["status", *LITTLE]) == 0
    assert "unfinished" in capsys.readouterr().out
    assert students.main(["train", "a", *LITTLE, "--seeds", "0"]) == 0
    assert not list(folder.glob("record_a_seed0.*.partial"))
    path = folder / "record_a_seed0.pth"
    continued = torch.load(path, weights_only=True)
    path.unlink()
    assert students.main(["train", "a", *LITTLE, "--seeds", "0"]) == 0
    whole = torch.load(path, weights_only=True)
    assert all(value.equal(whole[name]) for name, value in continued.items())


def test_a_seed_that_is_not_the_candidates_is_refused(students, folder, capsys):
    assert students.main(["train", "a", *LITTLE, "--seeds", "0", "2"]) == 2
    assert "--seeds has 2: expected some of 0, 1" in capsys.readouterr().err
    assert not folder.exists()


def test_the_time_is_over_after_so_many_minutes(students):
    with pytest.raises(students.Failed, match="stopped before all was trained"), students.stopping_after(0):
        time.sleep(30)


def test_status_tells_what_is_trained_and_trains_nothing(students, folder, capsys, monkeypatch):
    assert students.main(["status", *LITTLE]) == 0
    assert capsys.readouterr().out.count("not begun") == 8
    assert not folder.exists()
    train_all(students, "a")
    capsys.readouterr()
    assert students.main(["status", *LITTLE]) == 0
    said = capsys.readouterr().out
    assert said.count("  trained  ") == 2
    assert said.count("not begun") == 6
    candidate = dataclasses.replace(students.CANDIDATES["a"], rate=0.5)
    monkeypatch.setitem(students.CANDIDATES, "a", candidate)
    assert students.main(["status", *LITTLE]) == 0
    assert capsys.readouterr().out.count("trained with another recipe") == 2


def test_learning_rates_are_searched_on_validation(students, folder, capsys):
    assert students.main(["search", "a", *LITTLE, "--rates", "0.1", "0.05"]) == 0
    said = capsys.readouterr().out
    assert "validation accuracy after 3 epochs" in said
    rows = json.loads((folder / "students_search.json").read_text())["rows"]
    assert {"0.05", "0.1"} <= {row["case"].rpartition(" ")[2] for row in rows}
    assert {row["seed"] for row in rows} == {1000}
    assert not any("accuracy" in row for row in rows)  # of the test images


# --- publishing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The networks that were asked about the test images, one by one."""
    models, predict = [], published.predict_logits

    def spy(model, images):
        if images.name.endswith("/test"):
            models.append(model)
        return predict(model, images)

    monkeypatch.setattr(published, "predict_logits", spy)
    return models


def test_the_candidate_is_chosen_on_validation_and_the_test_set_read_for_no_other(students, folder, asked, capsys):
    train_all(students)
    assert students.main(["publish", *LITTLE]) == 0
    document = load_students(folder / "students.json")
    runs = {(run["candidate"], run["role"]): run for run in document["runs"]}
    assert list(runs) == [("plain", "student"), ("plain", "distilled"), ("a", "distilled"), ("b", "distilled")]
    record = document["record"]
    means = {name: np.mean(runs[name, "distilled"]["validation_accuracy"]) for name in "ab"}
    assert record["chosen"] == max(means, key=means.get)
    assert record["tried"] == ["a", "b"]
    assert record["to_beat"] is None  # it is of CIFAR-10
    other = runs["b" if record["chosen"] == "a" else "a", "distilled"]
    tested = {"accuracy", "nll", "ece", "agreement"}
    assert not tested & other.keys()
    for run in runs.values():
        assert run is other or tested <= run.keys()
        assert run["seeds"] == [0, 1]
        assert all(len(run[name]) == 2 for name in (*tested & run.keys(), "validation_accuracy", "seconds"))
        assert "seed" not in run["recipe"]
        assert run["device"].startswith("CPU")
        assert list(run["latency_ms"].values()) == [{"1": 0.25, "2": 0.5}]
    assert len(asked) == 4 + 2 + 1  # the students, the chosen candidate's seeds, and the teacher
    assert runs["a", "distilled"]["recipe"]["targets"] == "live teacher"
    assert runs["plain", "distilled"]["recipe"]["targets"] == "soft labels in 2 views"
    assert "targets" not in runs["plain", "student"]["recipe"]
    data = kdlib.load_data("digits", limit=40)
    path = folder / f"record_{record['chosen']}_seed0.pth"
    network = {"a": "perceptron", "b": "tiny_cnn"}[record["chosen"]]
    model = artefacts.load_weights(path, build(network, 10, 1))
    chosen = runs[record["chosen"], "distilled"]
    for split, name in ((data.validation, "validation_accuracy"), (data.test, "accuracy")):
        assert chosen[name][0] == kdlib.evaluate.evaluate(model, split).accuracy
    assert "kept in" in capsys.readouterr().out


def test_what_is_not_all_trained_is_not_measured_and_what_was_published_stays(students, folder, capsys):
    assert students.main(["publish", *LITTLE]) == 1
    assert "no candidate is trained in" in capsys.readouterr().err
    train_all(students, "a")
    assert students.main(["train", "b", *LITTLE, "--seeds", "0"]) == 0
    assert students.main(["publish", *LITTLE]) == 0
    assert "b: not measured, since it lacks record_b_seed1.pth" in capsys.readouterr().out
    first = load_students(folder / "students.json")
    assert first["record"]["chosen"] == "a"
    assert [run["candidate"] for run in first["runs"]] == ["a"]
    for path in folder.glob("record_a*"):  # as on another machine
        path.unlink()
    assert students.main(["train", "b", *LITTLE]) == 0
    assert students.main(["publish", *LITTLE]) == 0
    second = load_students(folder / "students.json")
    assert second["runs"][0] == first["runs"][0]
    assert second["record"]["tried"] == ["a", "b"]


def test_what_was_tested_once_is_shown_for_ever(students, folder, monkeypatch):
    train_all(students, "a b")
    for chosen in "ab":
        monkeypatch.setattr(students, "choose", lambda runs, chosen=chosen: chosen)
        assert students.main(["publish", *LITTLE]) == 0
    document = load_students(folder / "students.json")
    assert document["record"]["chosen"] == "b"
    assert all("accuracy" in run for run in document["runs"])


def test_a_choice_whose_networks_are_elsewhere_is_an_error(students, folder, monkeypatch, capsys):
    train_all(students, "a b")
    monkeypatch.setattr(students, "choose", lambda runs: "a")
    assert students.main(["publish", *LITTLE]) == 0
    for path in folder.glob("record_b*"):
        path.unlink()
    monkeypatch.setattr(students, "choose", lambda runs: "b")
    assert students.main(["publish", *LITTLE]) == 1
    assert "b is the best on validation, and its networks are not in" in capsys.readouterr().err


def test_nothing_is_trained_for_a_measurement(students, folder, capsys):
    train_all(students, "a")
    for path in folder.glob("teacher_*"):
        path.unlink()
    assert students.main(["publish", *LITTLE]) == 1
    assert "teacher_digits_cnn.pth is not what would be trained now" in capsys.readouterr().err
    path = folder / "record_a_seed0.pth"
    train_all(students, "a")  # and its teacher again
    known = artefacts.record(path)
    known["fingerprint"]["targets"]["weights"] = "0" * 16
    artefacts.save_document(artefacts.record_path(path), known)
    assert students.main(["publish", *LITTLE]) == 1
    said = capsys.readouterr()
    assert "a: not measured, since" in said.out
    assert "targets.weights is 0000000000000000" in said.out
    assert "no candidate in" in said.err


def test_one_outdated_candidate_does_not_stop_the_others(students, folder, capsys):
    train_all(students, "a b")
    path = folder / "record_a_seed0.pth"
    known = artefacts.record(path)
    known["fingerprint"]["targets"]["weights"] = "0" * 16
    artefacts.save_document(artefacts.record_path(path), known)
    assert students.main(["publish", *LITTLE]) == 0
    assert "a: not measured, since" in capsys.readouterr().out
    document = load_students(folder / "students.json")
    assert {run["candidate"] for run in document["runs"]} == {"b"}


def test_a_recipe_that_changes_after_the_test_is_another_candidate(students, monkeypatch, folder, capsys):
    train_all(students, "a")
    assert students.main(["publish", *LITTLE]) == 0
    before = load_students(folder / "students.json")
    changed = {**students.CANDIDATES, "a": dataclasses.replace(students.CANDIDATES["a"], rate=0.5)}
    give(monkeypatch, students, changed)
    train_all(students, "a")
    assert students.main(["publish", *LITTLE]) == 1
    assert "a was tested with another recipe" in capsys.readouterr().err
    assert load_students(folder / "students.json") == before
    renamed = {"c" if name == "a" else name: one for name, one in changed.items()}  # as the message advises
    give(monkeypatch, students, renamed)
    train_all(students, "c")
    assert students.main(["publish", *LITTLE]) == 0
    assert {run["candidate"] for run in load_students(folder / "students.json")["runs"]} == {"a", "c"}


def test_students_of_two_teachers_are_not_published_together(students, folder, capsys):
    train_all(students, "a")
    assert students.main(["publish", *LITTLE]) == 0
    path = folder / "students.json"
    document = load_students(path)
    for run in document["runs"]:
        run["teacher"], run["candidate"] = "0" * 16, "earlier"
    artefacts.save_document(path, document)
    assert students.main(["publish", *LITTLE]) == 1
    assert "the students have 2 teachers, expected one" in capsys.readouterr().err


def test_a_search_says_what_to_do_with_its_rate(students, capsys):
    assert students.main(["search", "a", *LITTLE, "--rates", "0.1", "0.05", "0.1", "--epochs", "1"]) == 0
    assert "give a rate=" in capsys.readouterr().out


def test_a_network_that_is_too_large_is_no_candidate(students, monkeypatch, capsys):
    train_all(students, "a")
    monkeypatch.setattr(students, "BELOW", 100)
    assert students.main(["publish", *LITTLE]) == 1
    assert "parameters: expected fewer than 100 for the record" in capsys.readouterr().err


def test_the_document_is_published_with_its_record_and_its_pin(monkeypatch, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    students = with_candidates(monkeypatch, tool(tree, "students"))
    settings = dataclasses.replace(kdlib.resolve("quick", limit=40, epochs=1, views=2), run=None)
    monkeypatch.setattr(students, "resolved", lambda options: settings)
    monkeypatch.setattr(fetch, "clone_folder", lambda: tree)
    assert published_students("quick") is None
    train_all(students, "plain a")
    assert students.main(["publish"]) == 0
    path = tree / "book" / "published" / "quick" / "students.json"
    assert artefacts.record(path)["sha256"] == artefacts.file_digest(path)
    pins = json.loads((tree / "kdlib" / "records" / "published.json").read_text())
    assert pins == {"quick/students.json.json": artefacts.file_digest(artefacts.record_path(path))}
    assert published_students("quick") == load_students(path) == load_students(settings.folder / "students.json")
    text = path.read_text()
    path.write_text(text.replace('"profile": "quick"', '"profile": "queck"'))
    with pytest.raises(ValueError, match=r"students\.json is not what was published"):
        published_students("quick")
    with pytest.raises(ValueError, match=r"students\.json is not a file of students \(it was changed since"):
        load_students(path)


# --- what a chapter shows ------------------------------------------------------------------------------------------


def run(candidate, kind, role, validation, **more):
    about = {"candidate": candidate, "kind": kind, "role": role, "parameters": 1_234_567, "size_mb": 4.9876}
    return about | {"seeds": list(range(len(validation))), "validation_accuracy": validation, **more}


def test_the_rows_of_students():
    document = {
        "runs": [
            run("one", "students", "student", [0.9, 0.9], accuracy=[0.90, 0.91]),
            run("one", "students", "distilled", [0.9, 0.9], accuracy=[0.92, 0.915]),
            run("two", "record", "distilled", [0.7]),
        ]
    }
    header, rows = student_rows(document)
    assert header == ["network", "parameters", "file, MB", "alone", "distilled", "gain, points", "seeds"]
    assert rows == [["one", "1,234,567", "4.99", "90.50 ± 0.71 %", "91.75 ± 0.35 %", "+1.25", "2"]]
    about = {"parameters": 1000, "size_mb": 0.25, "seeds": [0], "network": "own"}
    own = [about | {"role": role, "accuracy": [share]} for role, share in (("student", 0.5), ("distilled", 0.6))]
    teacher = about | {"role": "teacher", "network": "large", "accuracy": [0.9]}
    lacking = about | {"role": "student", "network": "other", "accuracy": [0.9]}
    _, together = student_rows(document, {"runs": [teacher, *own, lacking]})
    assert together == [["own", "1,000", "0.25", "50.00 %", "60.00 %", "+10.00", "1"], *rows]


def test_the_published_results_are_those_of_the_clone(monkeypatch, tmp_path):
    _, rows = student_rows(None, published_results())
    assert [row[0] for row in rows][:2] == ["cnn", "wide_resnet14"]
    monkeypatch.setattr("kdlib.lab.students.clone_folder", lambda: tmp_path)
    assert published_results() is None


def test_the_rows_of_the_record_begin_with_the_best_on_validation():
    document = {
        "runs": [
            run("worse", "record", "distilled", [0.9, 0.8]),
            run("better", "record", "distilled", [0.91], accuracy=[0.89]),
            run("one", "students", "distilled", [1.0], accuracy=[1.0]),
        ]
    }
    header, rows = record_rows(document)
    assert header == ["network", "parameters", "file, MB", "validation accuracy", "test accuracy", "seeds"]
    assert rows == [
        ["better", "1,234,567", "4.99", "91.00 %", "89.00 %", "1"],
        ["worse", "1,234,567", "4.99", "85.00 ± 7.07 %", "–", "2"],
    ]


def test_without_a_document_there_are_no_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "clone_folder", lambda: tmp_path)
    assert published_students() is None
    for table in (student_rows, record_rows):
        header, rows = table(published_students())
        assert header
        assert rows == []


def test_a_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "students.json"
    path.write_text('{"profile": "quick", "dataset": "digits", "runs": [{}], "record": {}}')
    with pytest.raises(ValueError, match=r"is not a file of students \(it\.runs\[0\] has no candidate"):
        load_students(path)
