"""Where a chapter's networks come from: trained in this run, or recorded. What a run leaves is in test_publish."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdlib import evaluate, load_data, load_published, load_student, load_teacher, measured, published, resolve
from kdlib.data import Data
from kdlib.published import Logits, described
from kdlib.records import artefacts


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def quick(**changes):
    """Profile quick with so few epochs that everything is trained in a second."""
    settings = resolve("quick")
    recipes = {name: replace(getattr(settings, name), epochs=1) for name in ("teacher_recipe", "student_recipe")}
    return replace(settings, **recipes, **changes)


# --- from scratch --------------------------------------------------------------------------------------------------


def test_a_teacher_is_trained_once_and_its_soft_labels_are_generated_when_asked_for(isolated, data):
    settings = quick()
    teacher = load_teacher(settings, data)
    assert teacher.path == settings.folder / "teacher_digits_cnn.pth"
    assert [path.name for path in settings.folder.glob("*.npy")] == []
    assert teacher.soft_labels.views == 9
    assert (settings.folder / "soft_labels.npy").exists()
    assert teacher.note == ""
    assert not teacher.model.training
    assert len(teacher.history.loss) == 1
    assert teacher.megabytes == teacher.path.stat().st_size / 1e6
    assert teacher.provenance.keys() >= {"device", "date", "seconds", "versions"}
    written = teacher.path.stat().st_mtime_ns
    again = load_teacher(settings, data)
    assert again.path.stat().st_mtime_ns == written
    assert torch.equal(again.soft_labels.logits, teacher.soft_labels.logits)


def test_logits_are_computed_for_the_split_that_is_asked_for(isolated, data):
    teacher = load_teacher(quick(), data)
    assert dict(teacher.logits) == {}
    logits = teacher.logits["test"]
    assert logits.shape == (len(data.test), 10)
    assert logits.dtype == torch.float32
    assert list(teacher.logits) == ["test"]
    assert teacher.logits["test"] is logits
    assert torch.equal(logits, evaluate.predict_logits(teacher.model, data.test))
    with pytest.raises(KeyError, match="split is 'tset': expected one of train, validation, test"):
        teacher.logits["tset"]


def test_students_differ_in_objective_and_targets_and_in_nothing_else(isolated, data):
    settings = quick(n_seeds=2)
    teacher = load_teacher(settings, data)
    students = {
        (role, seed): load_student(settings, data, teacher, role, "perceptron", seed)
        for role in ("student", "distilled")
        for seed in settings.seeds
    }
    made_from = {key: artefacts.record(student.path)["fingerprint"] for key, student in students.items()}
    for seed in settings.seeds:
        alone, distilled = made_from["student", seed], made_from["distilled", seed]
        assert [key for key in alone if alone[key] != distilled[key]] == ["loss_fn", "targets"]
        assert alone["recipe"]["seed"] == seed
    assert made_from["distilled", 0]["loss_fn"].items() >= {"temperature": 4.0, "alpha": 0.1, "beta": None}.items()
    assert students["distilled", 1].path.name == "student_perceptron_seed1.pth"
    assert students["student", 0].path.name == "student_perceptron_alone.pth"
    with pytest.raises(AttributeError, match=r"a student has no soft labels: ask the network that kdlib\.load_teacher"):
        students["distilled", 0].soft_labels  # noqa: B018


def test_beta_and_fewer_views_reach_the_student(isolated, data):
    settings = quick(beta=0.5).with_views(4)
    teacher = load_teacher(settings, data)
    student = load_student(settings, data, teacher, "distilled", "perceptron", 0)
    made_from = artefacts.record(student.path)["fingerprint"]
    assert teacher.soft_labels.views == made_from["recipe"]["views"] == 4
    assert made_from["loss_fn"]["beta"] == 0.5


def test_a_measured_figure_is_kept_as_json_has_it(isolated):
    settings = quick()
    assert measured(settings, "pairs", lambda: {1: (2, 3)}) == {"1": [2, 3]}
    assert measured(settings, "share", lambda: 0.25) == 0.25
    assert measured(settings, "pairs", lambda: 7) == 7  # computed again
    assert (settings.folder / "measured.json").read_text().startswith('{\n "pairs": 7,\n "share": 0.25,\n "checksum"')


# --- from the records of the repository ----------------------------------------------------------------------------


def test_the_published_logits_are_of_the_images_of_the_data_set(isolated, data):
    settings = resolve("quick", start_from="published")
    soft_labels, clean = load_published(settings, data)
    soft_labels.check(data.train, replace(settings.student_recipe, views=soft_labels.views))
    assert torch.equal(soft_labels.logits[0].float(), clean["train"])
    for images in data:
        logits = clean[images.name.rpartition("/")[2]]
        assert logits.shape == (len(images), images.classes)
        assert logits.dtype == torch.float32
        correct = (logits.argmax(1) == images.labels).double().mean().item()
        assert correct > 0.9, "not the logits of these images"
        assert (logits.argmax(1).roll(1) == images.labels).double().mean().item() < 0.5
    assert not settings.folder.exists()


def test_a_recorded_teacher_says_where_it_comes_from(isolated, data):
    settings = resolve("quick", start_from="published")
    teacher = load_teacher(settings, data)
    made = artefacts.record(published.published_file("quick", "histories.json", settings.folder))["provenance"]
    for part in ("profile quick", f"{teacher.soft_labels.views} views", made["device"], made["date"], "commit"):
        assert part in teacher.note
    assert teacher.model is None
    assert teacher.path is None
    assert len(teacher.history.loss) == settings.teacher_recipe.epochs
    assert evaluate.scores(teacher.logits["validation"], data.validation.labels).accuracy == pytest.approx(
        teacher.history.accuracy[-1], abs=0.002
    )
    assert not settings.folder.exists()


def test_published_logits_of_other_images_are_refused_with_the_reason(isolated, data):
    settings = resolve("quick", start_from="published", limit=50)
    message = r"logits are of digits/train \w+, the images here are digits/train \w+, .*: limit is 50; leave it out, or"
    with pytest.raises(ValueError, match=message):
        load_published(settings, load_data("digits", limit=50))
    changed = replace(data.test, labels=data.test.labels.roll(1))
    message = r"are of digits/test \w+, .*: the data set is another one, or run the earlier"
    with pytest.raises(ValueError, match=message):
        load_published(resolve("quick"), data._replace(test=changed))


def test_nothing_stands_in_for_another_teacher(isolated, data):
    settings = resolve("quick", start_from="published", teacher="tiny_cnn")
    with pytest.raises(
        ValueError, match=r"teacher is 'tiny_cnn': the published records are of teacher_digits_cnn\.pth"
    ):
        load_teacher(settings, data)


@pytest.mark.parametrize("what", ["shape", "teacher"])
def test_published_files_that_do_not_belong_together_are_refused(isolated, data, monkeypatch, tmp_path, what):
    settings, original = resolve("quick"), published.published_file

    def copied(profile, name, folder):
        path = original(profile, name, folder)
        if name.endswith("logits.npy"):
            array, fingerprint = artefacts.load_array(path), artefacts.record(path)["fingerprint"]
            array = array[..., :-1, :] if what == "shape" else array
            fingerprint |= {"teacher": {"seed": 9}} if what == "teacher" else {}
            path = tmp_path / name
            artefacts.save_array(path, np.ascontiguousarray(array), fingerprint=fingerprint)
        return path

    monkeypatch.setattr(published, "published_file", copied)
    with pytest.raises(ValueError, match=r"logits\.npy \(\d+, \d+, 10\) does not belong to soft_labels\.npy: expected"):
        load_published(settings, data)


def test_settings_are_told_apart_by_what_decides_a_network():
    settings = resolve("quick")
    assert described(settings) == described(replace(settings, n_seeds=1, threads=2, start_from="published", run="a"))
    for change in ({"temperature": 8.0}, {"alpha": 0.5}, {"beta": 1.0}, {"views": 4}, {"limit": 9}, {"teacher": "cnn"}):
        assert described(settings) != described(replace(settings, **change))
    assert described(settings) != described(
        replace(settings, student_recipe=replace(settings.student_recipe, epochs=1))
    )


def test_recorded_logits_without_weights_name_what_is_there():
    logits = Logits(None, Data(None, None, None), {"test": torch.zeros(1, 2)})
    assert logits["test"].shape == (1, 2)
    with pytest.raises(KeyError, match="no logits of 'train' are recorded, only of test: use start_from=scratch"):
        logits["train"]
