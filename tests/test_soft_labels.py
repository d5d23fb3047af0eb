"""Soft labels and the live teacher: that both give the same logits for every view, and what is refused."""

import copy
import functools
import importlib
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from kdlib import distillation_loss, predict_logits
from kdlib.data import Batch
from kdlib.records import artefacts
from kdlib.soft_labels import LiveTeacher, SoftLabels, check_array, generate, load_or_generate, load_soft_labels
from kdlib.train import Recipe, Targets, train

training = importlib.import_module("kdlib.train")  # kdlib.train itself is the function
pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=1, batch_size=16, learning_rate=0.1)
DISTILLATION = functools.partial(distillation_loss, temperature=4.0, alpha=0.1)
quiet_generate = functools.partial(generate, progress=False)


def soft_labels(teacher, data, views: int) -> SoftLabels:
    logits = torch.from_numpy(quiet_generate(teacher, data, views))
    return SoftLabels(logits, data.identity)


def batch_of(data, indices, views) -> Batch:
    return Batch(data.batch(indices, views), data.labels[indices], indices, views)


# --- what they are ---------------------------------------------------------------------------------------------------


def test_lookup_and_live_teacher_agree_on_every_view_of_every_image(image_set, toy_teacher):
    data = image_set(20, padding=1, flip=True)
    teacher = toy_teacher(data)
    saved, live = soft_labels(teacher, data, 18), LiveTeacher(teacher)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    every_view = []
    for view in range(18):
        views = (order + view) % 18  # another view for every image
        batch = batch_of(data, order, views)
        looked_up, computed = saved(batch), live(batch)
        assert looked_up.shape == (20, 4)
        assert looked_up.dtype == computed.dtype == torch.float32
        # half precision has 11 bits: it is right to one part in 2,048
        torch.testing.assert_close(looked_up, computed, rtol=2**-11, atol=1e-4)
        every_view.append(looked_up)
    # the views are told apart, so a wrong one would have shown
    assert (torch.stack(every_view).std(0) > 0.01).all()


def test_they_are_half_precision_logits_per_view_image_and_class(image_set, toy_teacher):
    data = image_set(20)
    teacher = toy_teacher(data)
    found = quiet_generate(teacher, data, 9)
    assert found.dtype == np.float16
    assert found.shape == (9, 20, 4)
    for view in (0, 8):
        np.testing.assert_array_equal(found[view], predict_logits(teacher, data, view=view).half().numpy())
    assert np.abs(found.sum(2) - 1).max() > 0.5  # logits, not probabilities


@pytest.mark.parametrize(("weight", "bias"), [(1e5, 0.0), (0.0, 3000.0), (0.0, -1e5)])
def test_logits_too_large_for_half_precision_stay_finite_and_keep_their_probabilities(image_set, weight, bias):
    data = image_set(20)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    nn.init.constant_(teacher[1].weight, weight)
    teacher[1].bias.data = bias + torch.tensor([0.0, 0.7, -0.7, 3.0])
    found = torch.from_numpy(quiet_generate(teacher, data, 1))[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found.float().softmax(1), predict_logits(teacher, data).softmax(1), rtol=2e-3, atol=2e-3)


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
    message = rf"views is {views}: expected at (least 1|most 9).* toy/train has with 1 pixels of padding"
    with pytest.raises(ValueError, match=message):
        quiet_generate(toy_teacher(data), data, views)


def test_generating_shows_a_bar_or_nothing(image_set, toy_teacher, capfd, monkeypatch):
    data = image_set(20)
    monkeypatch.setattr(training, "tqdm", functools.partial(tqdm, disable=False))  # whatever the environment says
    quiet_generate(toy_teacher(data), data, 2)
    assert capfd.readouterr() == ("", "")
    generate(toy_teacher(data), data, 2)
    assert "view" in capfd.readouterr().err


# --- the live teacher ------------------------------------------------------------------------------------------------


def test_a_teacher_in_train_mode_is_refused(image_set, toy_teacher):
    data = image_set(8)
    teacher = toy_teacher(data)
    live = LiveTeacher(teacher)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    with pytest.raises(ValueError, match=r"the teacher is in train mode: .*call teacher\.eval\(\)"):
        live(batch_of(data, torch.arange(8), torch.zeros(8, dtype=torch.int64)))
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
        train(student, data, DISTILLATION, RECIPE, targets=LiveTeacher(student.teacher), progress=False)


def test_a_teacher_in_train_mode_is_taken_to_eval_mode_before_the_first_step(image_set, toy_teacher):
    live = LiveTeacher(toy_teacher(image_set()).train())
    live.check(image_set(), RECIPE)
    assert not any(m.training for m in live.model.modules())


def test_the_live_teachers_logits_carry_no_gradient(image_set, toy_teacher):
    data = image_set(8)
    batch = batch_of(data, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    batch.images.requires_grad_()
    assert not LiveTeacher(toy_teacher(data))(batch).requires_grad


def test_the_live_teacher_takes_images_that_no_view_has(image_set, toy_teacher):
    data = image_set(16)
    student = toy_teacher(data, seed=1)
    live, recipe = LiveTeacher(toy_teacher(data)), replace(RECIPE, cutout=3, mixup=1.0)
    history = train(student, data, DISTILLATION, recipe, targets=live, progress=False)
    assert np.isfinite(history.loss).all()


# --- misuse ----------------------------------------------------------------------------------------------------------


def refused(labels: SoftLabels, data, message: str, recipe: Recipe = RECIPE) -> None:
    """The student is refused before its first step."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, data.classes))
    before = student[1].weight.clone()
    with pytest.raises(ValueError, match=message):
        train(student, data, DISTILLATION, recipe, targets=labels, progress=False)
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


def test_soft_labels_without_a_record_are_refused(image_set, toy_teacher, tmp_path):
    data = image_set()
    np.save(tmp_path / "mine.npy", soft_labels(toy_teacher(data), data, 9).logits.numpy())
    labels = load_soft_labels(tmp_path / "mine.npy", data)
    refused(labels, data, "the soft labels are of images that no record names, the images of toy/train")


def test_soft_labels_of_fewer_views_than_the_student_sees_are_refused(image_set, toy_teacher):
    data = image_set()
    labels = soft_labels(toy_teacher(data), data, 2)
    message = r"the student would see {} views, the soft labels hold 2: generate more .* or set views=2 in the student"
    refused(labels, data, message.format(9))  # all there are
    refused(labels, data, message.format(3), replace(RECIPE, views=3))
    for views in (1, 2):
        recipe = replace(RECIPE, views=views)
        train(toy_teacher(data, seed=1), data, DISTILLATION, recipe, targets=labels, progress=False)


def test_soft_labels_of_another_length_or_number_of_classes_are_refused(image_set, toy_teacher):
    data = image_set()
    whole = soft_labels(toy_teacher(data), data, 9)
    for logits in (whole.logits[:, :-1], whole.logits[:, :, :-1], whole.logits[0]):
        shape = re.escape(str(tuple(logits.shape)))
        message = (
            rf"the soft labels: torch\.float16 {shape}, expected floats \(V, 48, 4\): V views of the 48 .*chapter 03"
        )
        refused(SoftLabels(logits, whole.data), data, message)


def test_integers_are_no_soft_labels(image_set):
    with pytest.raises(ValueError, match=r"some\.npy: torch\.int64 \(2, 48, 4\), expected floats \(V, 48, 4\)"):
        check_array(torch.zeros(2, 48, 4, dtype=torch.int64), image_set(), "some.npy")


def test_images_that_no_view_has_are_refused(image_set, toy_teacher):
    data = image_set()
    with pytest.raises(
        ValueError, match=r"changed by cutout or mixup.*set cutout and mixup to 0 .* or use LiveTeacher"
    ):
        soft_labels(toy_teacher(data), data, 9)(Batch(None, None, torch.arange(4), None))


# --- in a file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(image_set, toy_teacher, tmp_path):
    """A data set, its teacher, and a function that loads or generates the soft labels in a folder of the test."""
    data = image_set()
    teacher = toy_teacher(data)
    return data, teacher, functools.partial(load_or_generate, tmp_path / "quick", teacher, data, progress=False)


@pytest.fixture
def never_run(monkeypatch):
    """A function after which no teacher may be run."""

    def fail(*_, **__):
        raise AssertionError("the teacher was run")

    return lambda: monkeypatch.setattr("kdlib.soft_labels.predict_logits", fail)


def test_they_are_generated_once_and_then_loaded(made, tmp_path, never_run):
    data, teacher, load = made
    first = load(4)
    np.testing.assert_array_equal(np.load(tmp_path / "quick" / "soft_labels.npy"), first.logits)
    np.testing.assert_array_equal(quiet_generate(teacher, data, 4), first.logits)
    never_run()
    again = load(4)
    assert torch.equal(again.logits, first.logits)
    assert again.identity == first.identity
    assert again.data == first.data == data.identity
    assert again.path == first.path == tmp_path / "quick" / "soft_labels.npy"
    first.check(data, replace(RECIPE, views=4))


def test_beside_them_lies_what_they_were_made_from_and_their_sha256(made, tmp_path):
    data, teacher, load = made
    load(None)
    path = tmp_path / "quick" / "soft_labels.npy"
    record = artefacts.record(path)
    assert record["fingerprint"] == {"data": data.identity, "views": 9, "teacher": LiveTeacher(teacher).identity}
    assert record["sha256"] == artefacts.file_digest(path)
    assert record["provenance"].keys() == {"versions", "device", "date", "seconds"}


def retrained(teacher: nn.Module) -> nn.Module:
    """The same network, of the same name, whose weights are others."""
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 0.5
    return other


def with_other_statistics(teacher: nn.Module) -> nn.Module:
    other = copy.deepcopy(teacher)
    next(m for m in other.modules() if isinstance(m, nn.BatchNorm2d)).running_mean += 1
    return other


def with_another_activation(teacher: nn.Module) -> nn.Module:
    other = copy.deepcopy(teacher)
    other.features[2] = nn.Tanh()
    return other


@pytest.mark.parametrize("change", [retrained, with_other_statistics, with_another_activation])
def test_another_teacher_gets_soft_labels_of_its_own_whatever_it_is_called(made, tmp_path, capsys, change):
    data, teacher, load = made
    other = change(teacher)
    first = load(2)
    second = load_or_generate(tmp_path / "quick", other, data, 2, progress=False)
    assert "soft_labels.npy is not what this run needs (teacher." in capsys.readouterr().out
    np.testing.assert_array_equal(second.logits, quiet_generate(other, data, 2))
    assert not torch.equal(first.logits, second.logits)
    assert torch.equal(load(2).logits, first.logits)  # the backup gets its name back


def test_the_same_teacher_loaded_again_is_the_same_teacher(made, tmp_path, toy_teacher, never_run):
    data, _, load = made
    first = load(2)
    never_run()
    again = toy_teacher(data).train()  # its mode is no part of it
    assert torch.equal(load_or_generate(tmp_path / "quick", again, data, 2, progress=False).logits, first.logits)


def test_those_of_another_teacher_or_number_of_views_are_kept_as_backups(made, toy_teacher, tmp_path, capsys):
    data, _, load = made
    path = tmp_path / "quick" / "soft_labels.npy"
    load(2)
    first = path.read_bytes()
    load(4)
    second = path.read_bytes()
    load_or_generate(path.parent, toy_teacher(data, seed=8), data, 4, progress=False)
    printed = capsys.readouterr().out
    assert "soft_labels.npy is not what this run needs (views is 2, not 4); kept as soft_labels." in printed
    assert re.search(r"needs \(teacher\.weights is \w{16}, not \w{16}\)", printed)
    kept = {p.read_bytes() for p in path.parent.glob("soft_labels.*.npy")}
    assert kept == {first, second}


def test_they_are_read_from_the_profiles_own_folder_if_they_fit(made, tmp_path, never_run):
    data, teacher, load = made
    first = load(4)
    never_run()
    again = load_or_generate(tmp_path / "quick-1a2b", teacher, data, 4, progress=False)
    assert torch.equal(again.logits, first.logits)
    assert not (tmp_path / "quick-1a2b").exists()


def test_a_file_that_was_changed_under_its_record_is_refused_and_kept(made, tmp_path):
    _, _, load = made
    load(2)
    path = tmp_path / "quick" / "soft_labels.npy"
    np.save(path, np.load(path) + np.float16(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"soft_labels\.npy has changed since it was saved: its SHA-256 is"):
        load(2)
    assert path.read_bytes() == before


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


def test_a_folder_that_cannot_be_written_shows_itself_before_the_teacher_runs(made, tmp_path, never_run):
    data, teacher, _ = made
    never_run()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/quick cannot be written \(Not a directory\): .* KDLIB_OUTPUTS"):
        load_or_generate(tmp_path / "file" / "quick", teacher, data, 4, progress=False)


def test_a_file_without_its_record_is_kept_as_a_backup(made, tmp_path, capsys):
    load = made[2]
    load(2)
    path = tmp_path / "quick" / "soft_labels.npy"
    before = path.read_bytes()
    artefacts.record_path(path).unlink()
    load(2)
    assert "it has no record of what it was made from" in capsys.readouterr().out
    (backup,) = path.parent.glob("soft_labels.*.npy")
    assert backup.read_bytes() == before


# --- what they are told apart by -------------------------------------------------------------------------------------


def test_soft_labels_are_known_by_their_content(image_set, toy_teacher):
    data = image_set()
    first, again, other = (soft_labels(toy_teacher(data, seed=seed), data, 3) for seed in (7, 7, 8))
    assert first.identity == again.identity == first.to("cpu").identity
    assert first.identity != other.identity
    assert first.identity != SoftLabels(first.logits[:2], data.identity).identity
    assert first.identity != SoftLabels(first.logits.flip(1), data.identity).identity
    changed = first.logits.clone()
    changed[2, 5, 1] *= 1.01
    assert first.identity != SoftLabels(changed, data.identity).identity


def test_both_kinds_of_targets_are_of_one_protocol(image_set, toy_teacher):
    data = image_set()
    for targets in (soft_labels(toy_teacher(data), data, 9), LiveTeacher(toy_teacher(data))):
        assert isinstance(targets, Targets)
        targets.check(data, RECIPE)
        moved = targets.to("cpu")
        assert type(moved) is type(targets)
        assert moved.identity == targets.identity
        batch = batch_of(data, torch.arange(8), torch.arange(8))
        assert torch.equal(moved(batch), targets(batch))


class Flattening(nn.Module):
    """A teacher that calls view on its feature maps."""

    def __init__(self, how: str, channels: int):
        super().__init__()
        self.how, self.convolution, self.classifier = how, nn.Conv2d(channels, 6, 3), nn.Linear(6 * 36, 4)

    def forward(self, images):
        x = self.convolution(images).relu()
        return self.classifier(x.view(len(x), -1) if self.how == "view" else x.reshape(len(x), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_teacher_that_calls_view_gives_what_one_that_calls_reshape_gives(image_set, channels):
    data = image_set(20, channels=channels)
    teachers = [Flattening(how, channels).eval() for how in ("view", "reshape")]
    teachers[1].load_state_dict(teachers[0].state_dict())
    saved = [quiet_generate(teacher, data, 3) for teacher in teachers]
    np.testing.assert_allclose(*saved, rtol=1e-3, atol=1e-3)
    batch = batch_of(data, torch.arange(20), torch.full((20,), 2))
    live = [LiveTeacher(teacher)(batch) for teacher in teachers]
    torch.testing.assert_close(*live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(live[0], torch.from_numpy(saved[0][2]).float(), rtol=1e-2, atol=1e-3)


def test_targets_that_were_changed_in_place_are_others(image_set, toy_teacher):
    data = image_set()
    labels, live = soft_labels(toy_teacher(data), data, 3), LiveTeacher(toy_teacher(data))
    before = labels.identity, live.identity
    assert (labels.identity, live.identity) == before
    labels.logits.mul_(0.5)
    with torch.no_grad():  # as more training would
        next(live.model.parameters()).add_(1)
    assert labels.identity != before[0]
    assert live.identity != before[1]
