"""Soft labels and the live teacher: that both say the same of every view, and what is refused."""

import functools
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import artefacts, load_data, predict_logits, resolve
from kdlib.losses import Distillation
from kdlib.soft_labels import (
    LiveTeacher,
    SoftLabels,
    check_array,
    generate,
    load_or_generate,
    load_published,
    load_soft_labels,
    published_note,
)
from kdlib.train import History, Recipe, Trained, train

pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=0.1)
quiet_generate = functools.partial(generate, progress=False)


def soft_labels(teacher, data, views: int) -> SoftLabels:
    logits = torch.from_numpy(quiet_generate(teacher, data, views))
    return SoftLabels(logits, {"data": f"{data.name} {data.fingerprint}", "views": views})


# --- what they say ---------------------------------------------------------------------------------------------------


def test_lookup_and_live_teacher_agree_on_every_view_of_every_image(image_set, toy_teacher):
    data = image_set(20, padding=1, flip=True)
    teacher = toy_teacher(data)
    saved, live = soft_labels(teacher, data, 18), LiveTeacher(teacher, {})
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    answers = []
    for view in range(18):
        views = (order + view) % 18  # another view for every image
        images = data.batch(order, views)
        looked_up, computed = saved(images, order, views), live(images, order, views)
        assert looked_up.shape == (20, 4)
        assert looked_up.dtype == computed.dtype == torch.float32
        # half precision has 11 bits: it is right to one part in 2,048
        torch.testing.assert_close(looked_up, computed, rtol=2**-11, atol=1e-4)
        answers.append(looked_up)
    # the views are told apart, so a wrong one would have shown
    assert (torch.stack(answers).std(0) > 0.01).all()


def test_they_are_half_precision_logits_a_view_an_image_a_class(image_set, toy_teacher):
    data = image_set(20)
    teacher = toy_teacher(data)
    found = quiet_generate(teacher, data, 9)
    assert found.dtype == np.float16
    assert found.shape == (9, 20, 4)
    for view in (0, 8):
        np.testing.assert_array_equal(found[view], predict_logits(teacher, data, view=view).half().numpy())
    assert np.abs(found.sum(2) - 1).max() > 0.5  # logits, not probabilities


def test_a_logit_too_large_for_half_precision_stays_finite(image_set):
    data = image_set(20)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.constant_(teacher[1].weight, 1e5)
    found = quiet_generate(teacher, data, 1)
    assert np.isfinite(found).all()
    assert (np.sign(found[0]) == predict_logits(teacher, data).sign().numpy()).all()


def test_fewer_views_are_the_first_of_more(image_set, toy_teacher):
    data = image_set(20)
    teacher = toy_teacher(data)
    np.testing.assert_array_equal(quiet_generate(teacher, data, 2), quiet_generate(teacher, data, 9)[:2])


def test_the_statistics_of_a_batch_have_no_part_in_them_and_stay_as_they_were(image_set, toy_teacher):
    data = image_set(20)
    teacher = toy_teacher(data)
    wanted = quiet_generate(teacher, data, 2)
    teacher.train()  # in train mode batch norm would normalise with the batch
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = quiet_generate(teacher, data, 2)
    np.testing.assert_array_equal(found, wanted)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    part = replace(data, images=data.images[:3], labels=data.labels[:3])
    np.testing.assert_allclose(quiet_generate(teacher, part, 2), wanted[:, :3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("views", [0, 10])
def test_more_views_than_there_are_are_refused(image_set, toy_teacher, views):
    data = image_set(20)
    message = rf"views is {views}: expected 1 \(the clean image\) to 9, .* toy/train has with 1 pixels of padding"
    with pytest.raises(ValueError, match=message):
        quiet_generate(toy_teacher(data), data, views)


def test_generating_shows_a_bar_or_nothing(image_set, toy_teacher, capfd):
    data = image_set(20)
    quiet_generate(toy_teacher(data), data, 2)
    assert capfd.readouterr() == ("", "")
    generate(toy_teacher(data), data, 2)
    assert "view" in capfd.readouterr().err


# --- the live teacher ------------------------------------------------------------------------------------------------


def test_a_teacher_in_train_mode_is_refused(image_set, toy_teacher):
    data = image_set(8)
    teacher = toy_teacher(data)
    live = LiveTeacher(teacher, {})
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    with pytest.raises(ValueError, match=r"the teacher is in train mode: .*call teacher\.eval\(\)"):
        live(data.batch(torch.arange(8), torch.zeros(8, dtype=torch.int64)), None, None)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_a_student_that_holds_its_teacher_and_takes_it_to_train_mode_is_noticed(image_set, toy_teacher):
    data = image_set(16)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = toy_teacher(data)  # the mistake: train() of the student reaches it
            self.layer = nn.Linear(64, 4)

        def forward(self, images):
            return self.layer(images.flatten(1))

    student = Student()
    with pytest.raises(ValueError, match="keep the teacher out of any module whose train"):
        train(student, data, Distillation(LiveTeacher(student.teacher, {}), 4, 0.1), RECIPE, progress=False)


def test_a_teacher_in_train_mode_is_taken_to_eval_mode_before_the_first_step(image_set, toy_teacher):
    live = LiveTeacher(toy_teacher(image_set()).train(), {})
    live.check(image_set(), RECIPE)
    assert not any(m.training for m in live.model.modules())


def test_the_live_teachers_answers_carry_no_gradient(image_set, toy_teacher):
    data = image_set(8)
    images = data.batch(torch.arange(8), torch.zeros(8, dtype=torch.int64)).requires_grad_()
    assert not LiveTeacher(toy_teacher(data), {})(images, None, None).requires_grad


def test_the_live_teacher_takes_images_that_no_view_has(image_set, toy_teacher):
    data = image_set(16)
    student = toy_teacher(data, seed=1)
    loss = Distillation(LiveTeacher(toy_teacher(data), {}), temperature=4, alpha=0.1)
    recipe = replace(RECIPE, cutout=3, mixup=1.0)
    assert np.isfinite(train(student, data, loss, recipe, progress=False).loss).all()


# --- misuse ----------------------------------------------------------------------------------------------------------


def refused(labels: SoftLabels, data, message: str, recipe: Recipe = RECIPE) -> None:
    """The student is refused before its first step."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, data.classes))
    before = student[1].weight.clone()
    with pytest.raises(ValueError, match=message):
        train(student, data, Distillation(labels, temperature=4, alpha=0.1), recipe, progress=False)
    assert torch.equal(student[1].weight, before)


def test_soft_labels_of_another_data_set_are_refused(image_set, toy_teacher):
    data, other = image_set(), image_set(seed=1, name="other/train")
    labels = soft_labels(toy_teacher(data), other, 9)
    refused(
        labels, data, rf"of other/train {other.fingerprint}, the images of toy/train {data.fingerprint}: .*chapter 03"
    )


def test_soft_labels_of_another_split_are_refused(image_set, toy_teacher):
    data, validation = image_set(), image_set(seed=1, name="toy/validation")
    labels = soft_labels(toy_teacher(data), validation, 9)
    refused(labels, data, r"the soft labels are of toy/validation \w+, the images of toy/train \w+: expected the same")


def test_soft_labels_of_the_same_images_in_another_order_are_refused(image_set, toy_teacher):
    data = image_set()
    shuffled = replace(data, images=data.images.flip(0), labels=data.labels.flip(0))
    refused(
        soft_labels(toy_teacher(data), shuffled, 9), data, "expected the same images in the same order; generate them"
    )


def test_soft_labels_without_a_record_are_refused(image_set, toy_teacher):
    data = image_set()
    labels = SoftLabels(soft_labels(toy_teacher(data), data, 9).logits, {})
    refused(labels, data, "the soft labels are of None, the images of toy/train")


def test_soft_labels_of_fewer_views_than_the_student_sees_are_refused(image_set, toy_teacher):
    data = image_set()
    labels = soft_labels(toy_teacher(data), data, 2)
    message = r"the student would see {} views, the soft labels hold 2: generate more .* or set views=2 in the student"
    refused(labels, data, message.format(9))  # all there are
    refused(labels, data, message.format(3), replace(RECIPE, views=3))
    loss = Distillation(labels, temperature=4, alpha=0.1)
    for views in (1, 2):
        train(toy_teacher(data, seed=1), data, loss, replace(RECIPE, views=views), progress=False)


def test_soft_labels_of_another_length_or_number_of_classes_are_refused(image_set, toy_teacher):
    data = image_set()
    whole = soft_labels(toy_teacher(data), data, 9)
    for logits in (whole.logits[:, :-1], whole.logits[:, :, :-1], whole.logits[0]):
        shape = re.escape(str(tuple(logits.shape)))
        message = (
            rf"the soft labels: torch\.float16 {shape}, expected floats \(V, 48, 4\): V views of the 48 .*chapter 03"
        )
        refused(SoftLabels(logits, whole.fingerprint), data, message)


def test_integers_are_no_soft_labels(image_set):
    with pytest.raises(ValueError, match=r"some\.npy: torch\.int64 \(2, 48, 4\), expected floats \(V, 48, 4\)"):
        check_array(torch.zeros(2, 48, 4, dtype=torch.int64), image_set(), "some.npy")


def test_images_that_no_view_has_are_refused(image_set, toy_teacher):
    data = image_set()
    with pytest.raises(
        ValueError, match=r"changed by cutout or mixup.*set cutout and mixup to 0 .* or use LiveTeacher"
    ):
        soft_labels(toy_teacher(data), data, 9)(None, torch.arange(4), None)


# --- in a file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(image_set, toy_teacher, tmp_path):
    """A data set, its teacher, and a function that loads or generates the soft labels in a folder of the test."""
    data = image_set()
    teacher = Trained(toy_teacher(data), History(), {"network": "tiny_cnn", "seed": 7}, tmp_path / "teacher.pth")
    return data, teacher, functools.partial(load_or_generate, tmp_path / "quick", teacher, data, progress=False)


class Never(nn.Module):
    """A teacher that must not be asked."""

    def forward(self, images):
        raise AssertionError("the teacher was asked")


def test_they_are_generated_once_and_then_loaded(made, tmp_path):
    data, teacher, load = made
    first = load(4)
    np.testing.assert_array_equal(np.load(tmp_path / "quick" / "soft_labels.npy"), first.logits)
    np.testing.assert_array_equal(quiet_generate(teacher.model, data, 4), first.logits)
    again = load_or_generate(tmp_path / "quick", teacher._replace(model=Never()), data, 4, progress=False)
    assert torch.equal(again.logits, first.logits)
    assert again.fingerprint == first.fingerprint == first.describe()
    first.check(data, replace(RECIPE, views=4))


def test_those_of_another_teacher_or_number_of_views_are_set_aside_unchanged(made, tmp_path, capsys):
    data, teacher, load = made
    path = tmp_path / "quick" / "soft_labels.npy"
    load(2)
    first = path.read_bytes()
    load(4)
    second = path.read_bytes()
    load_or_generate(path.parent, teacher._replace(fingerprint={"seed": 8}), data, 4, progress=False)
    printed = capsys.readouterr().out
    assert "soft_labels.npy is not what this run needs (views is 2, not 4); kept as soft_labels." in printed
    assert "teacher.seed is 7, not 8" in printed
    kept = {p.read_bytes() for p in path.parent.glob("soft_labels.*.npy")}
    assert kept == {first, second}


def test_they_are_read_from_the_profiles_own_folder_where_they_fit(made, tmp_path):
    data, teacher, load = made
    first = load(4)
    found = load_or_generate(tmp_path / "quick-1a2b", teacher._replace(model=Never()), data, 4, progress=False)
    assert torch.equal(found.logits, first.logits)
    assert not (tmp_path / "quick-1a2b").exists()


@pytest.mark.parametrize("kept", [0, 20, 200, -1])
def test_a_damaged_file_is_refused_and_kept(made, tmp_path, kept):
    load = made[2]
    load(4)
    path = tmp_path / "quick" / "soft_labels.npy"
    path.write_bytes(path.read_bytes()[:kept])
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"soft_labels\.npy is not an array file \(.+\): expected \.npy .*delete it and run"
    ):
        load(4)
    assert path.read_bytes() == before


@pytest.mark.parametrize("as_array", [True, False])
def test_python_objects_in_a_file_are_refused_and_not_executed(image_set, tmp_path, side_effect, as_array):
    path = tmp_path / "soft_labels.npy"
    if as_array:
        np.save(path, np.array([side_effect], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(side_effect))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"soft_labels\.npy is not an array file \(.+\): expected .*without Python objects"
    ):
        load_soft_labels(path, image_set())
    assert path.read_bytes() == before
    assert not side_effect.folder.exists()


def test_a_file_that_does_not_fit_the_images_is_refused_by_name(image_set, tmp_path):
    np.save(tmp_path / "mine.npy", np.zeros((2, 47, 4), np.float16))
    with pytest.raises(ValueError, match=r"mine\.npy: torch\.float16 \(2, 47, 4\), expected floats \(V, 48, 4\)"):
        load_soft_labels(tmp_path / "mine.npy", image_set())


def test_a_file_that_is_not_there_is_named(image_set, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"array .*soft_labels\.npy is not there: run the chapter"):
        load_soft_labels(tmp_path / "soft_labels.npy", image_set())


def test_a_folder_that_cannot_be_written_shows_itself_before_the_teacher_is_asked(made, tmp_path):
    data, teacher, _ = made
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/quick cannot be written \(Not a directory\): .* KDLIB_OUTPUTS"):
        load_or_generate(tmp_path / "file" / "quick", teacher._replace(model=Never()), data, 4, progress=False)


def test_a_file_without_its_record_is_set_aside(made, tmp_path, capsys):
    load = made[2]
    load(2)
    path = tmp_path / "quick" / "soft_labels.npy"
    before = path.read_bytes()
    artefacts._record_path(path).unlink()
    load(2)
    assert "nothing tells what it was made from" in capsys.readouterr().out
    (aside,) = path.parent.glob("soft_labels.*.npy")
    assert aside.read_bytes() == before


# --- published -------------------------------------------------------------------------------------------------------


def test_the_published_answers_are_to_the_images_of_the_data_set():
    profile, data = resolve("quick", start_from="published"), load_data("digits")
    found, clean = load_published(profile, data)
    found.check(data.train, replace(profile.student_recipe, views=found.views))
    assert torch.equal(found.logits[0].float(), clean["train"])
    for images in data:
        logits = clean[images.name.rpartition("/")[2]]
        assert logits.shape == (len(images), images.classes)
        assert logits.dtype == torch.float32
        right = (logits.argmax(1) == images.labels).double().mean().item()
        assert right > 0.9, "not the answers to these images"
        assert (logits.argmax(1).roll(1) == images.labels).double().mean().item() < 0.5
    note = published_note(profile, found)
    made = artefacts.record(artefacts.published("quick", "soft_labels.npy", profile.folder))["provenance"]
    for part in ("profile quick", f"{found.views} views", made["device"], made["date"]):
        assert part in note
    assert not profile.folder.exists()


def test_published_answers_to_other_images_are_refused_with_the_reason():
    profile = resolve("quick", start_from="published", limit=50)
    message = (
        r"answers are to digits/train \w+, the images here are digits/train \w+, .*: limit is 50; leave it out, or"
    )
    with pytest.raises(ValueError, match=message):
        load_published(profile, load_data("digits", limit=50))
    data = load_data("digits")
    changed = replace(data.test, labels=data.test.labels.roll(1))
    with pytest.raises(
        ValueError, match=r"are to digits/test \w+, .*: the data set is another one, or run the earlier"
    ):
        load_published(resolve("quick"), data._replace(test=changed))


@pytest.mark.parametrize("what", ["shape", "teacher"])
def test_published_files_that_do_not_belong_together_are_refused(monkeypatch, tmp_path, what):
    profile, data = resolve("quick"), load_data("digits")

    def copied(profile_name, name, folder):  # without looking at the SHA-256
        return tmp_path / name

    for name in ("soft_labels.npy", "teacher_logits.npy"):
        path = artefacts.published("quick", name, profile.folder)
        array, fingerprint = artefacts.load_array(path), artefacts.record(path)["fingerprint"]
        if name == "teacher_logits.npy":
            array = array[:-1] if what == "shape" else array
            fingerprint |= {"teacher": {"seed": 9}} if what == "teacher" else {}
        artefacts.save_array(tmp_path / name, array, fingerprint=fingerprint)
    monkeypatch.setattr(artefacts, "published", copied)
    with pytest.raises(
        ValueError, match=r"teacher_logits\.npy \(\d+, 10\) does not belong to soft_labels\.npy: expected"
    ):
        load_published(profile, data)
