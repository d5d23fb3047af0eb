"""The training loop: what it computes, that it repeats, goes on where it stopped, and loses nothing."""

import functools
import importlib
import json
import math
import re
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from kdlib import artefacts, build, predict_logits
from kdlib.data import Batch, batches
from kdlib.losses import CrossEntropy, Distillation
from kdlib.soft_labels import LiveTeacher, SoftLabels, generate
from kdlib.train import Recipe, load_or_train, run_fingerprint, train, train_many

training = importlib.import_module("kdlib.train")  # kdlib.train itself is the function
pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.1)  # three steps an epoch on 48 images
quiet_train = functools.partial(train, progress=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def trained(data, recipe=RECIPE, loss_fn=None, **kw) -> dict[str, torch.Tensor]:
    model = build("tiny_cnn", data.classes, data.channels, seed=recipe.seed)
    quiet_train(model, data, loss_fn or CrossEntropy(), recipe, **kw)
    return weights(model)


def soft_labels(teacher, data, views: int = 2) -> SoftLabels:
    logits = torch.from_numpy(generate(teacher, data, views, progress=False))
    return SoftLabels(logits, {"data": f"{data.name} {data.fingerprint}", "views": views})


# --- learning ------------------------------------------------------------------------------------------------------


def test_a_network_learns_a_batch_by_heart(image_set):
    data = image_set(16)
    model = build("tiny_cnn", 4, 1)
    history = quiet_train(model, data, CrossEntropy(), replace(RECIPE, epochs=100, views=1), validation=data)
    assert history.loss[0] > 1
    assert history.loss[-1] < 0.05
    assert history.accuracy[-1] == 1


def test_with_alpha_zero_a_student_learns_the_teachers_answers_and_not_the_labels(image_set, toy_teacher):
    data = image_set(16)
    teacher = toy_teacher(data)
    answers = predict_logits(teacher, data)
    assert (answers.argmax(1) != data.labels).sum() >= 8  # the two can be told apart
    student = build("digits_cnn", 4, 1)
    loss = Distillation(soft_labels(teacher, data, 1), temperature=4, alpha=0)
    history = quiet_train(student, data, loss, replace(RECIPE, epochs=150, views=1, weight_decay=0))
    assert history.loss[-1] < 0.01 * history.loss[0]
    found = predict_logits(student, data)
    assert torch.equal(found.argmax(1), answers.argmax(1))
    torch.testing.assert_close(found.softmax(1), answers.softmax(1), atol=0.1, rtol=0)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_step_is_that_of_sgd_with_nesterov_momentum_weight_decay_and_the_schedule(image_set, momentum):
    # g = gradient + decay * w;  v = momentum * v + g;  w = w - rate * (g + momentum * v)
    data = image_set(48)
    recipe = Recipe(
        epochs=2, batch_size=16, learning_rate=0.05, momentum=momentum, weight_decay=0.1, warmup=0.25, seed=3
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    speed = [torch.zeros_like(p) for p in parameters]
    generator, step, losses = torch.Generator().manual_seed(3), 0, []
    for _ in range(2):
        for batch in batches(data, 16, generator=generator):
            loss = nn.functional.cross_entropy(batch.images.flatten(1) @ parameters[0].T + parameters[1], batch.labels)
            done = (step + 0.5) / 6  # of six steps; the rate rises over the first quarter
            rate = 0.05 * (done / 0.25 if done < 0.25 else (1 + math.cos(math.pi * (done - 0.25) / 0.75)) / 2)
            for p, v, gradient in zip(parameters, speed, torch.autograd.grad(loss, parameters), strict=True):
                g = gradient + 0.1 * p.detach()
                v.mul_(momentum).add_(g)
                p.data -= rate * (g + momentum * v)
            step += 1
            losses.append(loss.item())
    history = quiet_train(model, data, CrossEntropy(), recipe)
    for found, wanted in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert history.loss == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)


def test_the_loss_sees_images_changed_by_cutout_and_mixup_where_the_recipe_asks(image_set):
    data = image_set(48)
    seen = []

    def loss_fn(logits, batch):
        seen.append(batch)
        return nn.functional.cross_entropy(logits, batch.labels)

    for change in ({}, {"cutout": 4}, {"mixup": 1.0}, {"cutout": 4, "mixup": 1.0}):
        trained(data, replace(RECIPE, epochs=1, **change), loss_fn)
    plain, cut, mixed, both = seen[::3]
    assert torch.equal(plain.images, data.batch(plain.indices, plain.views))
    assert (cut.images == 0).sum() > 16 * 4 > (plain.images == 0).sum()
    assert (both.images == 0).any()
    assert (plain.labels.shape, cut.labels.shape) == ((16,), (16,))
    assert (mixed.labels.shape, both.labels.shape) == ((16, 4), (16, 4))
    assert plain.views is not None
    assert cut.views is mixed.views is both.views is None


def test_validation_measures_the_accuracy_after_every_epoch_and_changes_nothing(image_set):
    data, validation = image_set(48), image_set(24, seed=1, name="toy/validation")
    model = build("tiny_cnn", 4, 1)
    history = quiet_train(model, data, CrossEntropy(), RECIPE, validation=validation)
    right = predict_logits(model, validation).argmax(1) == validation.labels
    assert len(history.loss) == len(history.accuracy) == len(history.seconds) == 4
    assert history.accuracy[-1] == right.double().mean().item()
    assert history.seconds == sorted(history.seconds)
    assert same(weights(model), trained(data))


def test_a_network_that_comes_in_eval_mode_is_trained_in_train_mode(image_set):
    data = image_set()
    model, other = build("digits_cnn", 4, 1).eval(), build("digits_cnn", 4, 1)
    for each in (model, other):
        quiet_train(each, data, CrossEntropy(), RECIPE)
    assert same(weights(model), weights(other))  # its running statistics too
    assert weights(model)["features.1.num_batches_tracked"] == 12


def test_without_validation_there_is_no_accuracy(image_set):
    history = quiet_train(build("tiny_cnn", 4, 1), image_set(), CrossEntropy(), RECIPE)
    assert history.accuracy == []
    assert len(history.loss) == 4


# --- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"cutout": 3, "mixup": 0.5}])
def test_the_same_seed_gives_the_same_weights_bit_for_bit_whatever_was_drawn_before(image_set, change):
    data, recipe = image_set(), replace(RECIPE, **change)
    torch.manual_seed(0)
    first = trained(data, recipe)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert same(first, trained(data, recipe))


def test_another_seed_gives_other_weights_even_from_the_same_start(image_set):
    data = image_set()
    assert not same(trained(data), trained(data, replace(RECIPE, seed=1)))
    models = [build("tiny_cnn", 4, 1, seed=0) for _ in range(2)]
    for seed, model in enumerate(models):
        quiet_train(model, data, CrossEntropy(), replace(RECIPE, seed=seed))
    assert not same(*map(weights, models))


@pytest.mark.parametrize("change", [{}, {"cutout": 3, "mixup": 0.5}])
def test_the_teacher_is_bit_identical_after_distillation_its_buffers_included(image_set, toy_teacher, change):
    data = image_set()
    teacher = toy_teacher(data).train()  # even where it comes in train mode
    before = weights(teacher)
    assert any("running_mean" in name for name in before)
    loss = Distillation(LiveTeacher(teacher, {}), temperature=4, alpha=0.1)
    student = trained(data, replace(RECIPE, **change), loss)
    assert same(before, weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert not same(student, trained(data, replace(RECIPE, **change)))


def test_soft_labels_and_the_live_teacher_train_the_same_student(image_set, toy_teacher):
    data, recipe = image_set(flip=True), replace(RECIPE, epochs=1)  # few steps: a rounding grows with each
    teacher = toy_teacher(data)
    students = [
        trained(data, recipe, Distillation(targets, temperature=4, alpha=0.1))
        for targets in (soft_labels(teacher, data, 18), LiveTeacher(teacher, {}))
    ]
    plain = trained(data, recipe)
    for name in plain:
        torch.testing.assert_close(students[0][name], students[1][name], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(students[0]["classifier.weight"], plain["classifier.weight"], atol=0.01)


# --- going on where it stopped ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Interruptible:
    """Cross-entropy that is interrupted at a given call, as a machine that is taken away would."""

    def __init__(self, at: int | None = None):
        self.calls, self.at = 0, at

    def __call__(self, logits, batch):
        if self.calls == self.at:
            raise Interrupted
        self.calls += 1
        return nn.functional.cross_entropy(logits, batch.labels)

    def describe(self):
        return "cross-entropy"


@pytest.mark.parametrize("change", [{}, {"cutout": 3, "mixup": 0.5}])
def test_a_run_that_goes_on_from_its_checkpoint_equals_an_uninterrupted_one_bit_for_bit(
    image_set, tmp_path, monkeypatch, change
):
    data, validation, recipe = image_set(), image_set(24, seed=1), replace(RECIPE, **change)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    whole = build("tiny_cnn", 4, 1)
    wanted = quiet_train(whole, data, Interruptible(), recipe, validation=validation)

    go = functools.partial(quiet_train, validation=validation, checkpoint=tmp_path / "run.partial")
    with pytest.raises(Interrupted):
        go(build("tiny_cnn", 4, 1), data, Interruptible(7), recipe)  # in the middle of the third epoch
    assert (tmp_path / "run.partial").exists()
    model, rest = build("tiny_cnn", 4, 1, seed=99), Interruptible()  # its weights come from the checkpoint
    history = go(model, data, rest, recipe)
    assert rest.calls == 6  # the last two epochs
    assert same(weights(model), weights(whole))
    assert (history.loss, history.accuracy) == (wanted.loss, wanted.accuracy)
    assert len(history.seconds) == 4
    assert history.seconds == sorted(history.seconds)
    assert list(tmp_path.iterdir()) == []  # nothing is left of it


def test_load_or_train_goes_on_as_well_and_leaves_no_checkpoint(image_set, tmp_path, monkeypatch):
    data = image_set()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, progress=False)
    with pytest.raises(Interrupted):
        go(Interruptible(7), RECIPE)
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    rest = Interruptible()
    found = go(rest, RECIPE)
    assert rest.calls == 6
    assert same(weights(found.model), trained(data, loss_fn=Interruptible()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student.pth", "student.pth.json"]


def test_a_checkpoint_is_kept_at_most_once_a_minute(image_set, tmp_path):
    with pytest.raises(Interrupted):
        quiet_train(build("tiny_cnn", 4, 1), image_set(), Interruptible(7), RECIPE, checkpoint=tmp_path / "run.partial")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused_and_kept(image_set, tmp_path, monkeypatch):
    data, path = image_set(), tmp_path / "run.partial"
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(Interrupted):
        quiet_train(build("tiny_cnn", 4, 1), data, Interruptible(7), RECIPE, checkpoint=path)
    before = path.read_bytes()
    others = [
        ("tiny_cnn", data, Interruptible(), replace(RECIPE, seed=1)),
        ("tiny_cnn", image_set(seed=1), Interruptible(), RECIPE),
        ("tiny_cnn", data, CrossEntropy(), RECIPE),
        ("digits_cnn", data, Interruptible(), RECIPE),
    ]
    for network, images, loss_fn, recipe in others:
        message = r"run\.partial is not a checkpoint of this run \(.+\): move it away to start afresh"
        with pytest.raises(ValueError, match=message):
            quiet_train(build(network, 4, 1), images, loss_fn, recipe, checkpoint=path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"half a check", None])
def test_a_damaged_checkpoint_is_refused_and_kept_and_nothing_in_it_is_executed(
    image_set, tmp_path, side_effect, content
):
    path = tmp_path / "run.partial"
    if content is None:
        torch.save({"key": side_effect}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"run\.partial is not a checkpoint of this run \(.+\): move it away"):
        quiet_train(build("tiny_cnn", 4, 1), image_set(), CrossEntropy(), RECIPE, checkpoint=path)
    assert path.read_bytes() == before
    assert not side_effect.folder.exists()


# --- a loss that is not finite ---------------------------------------------------------------------------------------


class Spoilt:
    """Cross-entropy that takes some value at some steps."""

    def __init__(self, **values):
        self.calls, self.values = 0, {int(name[2:]): value for name, value in values.items()}

    def __call__(self, logits, batch):
        loss = nn.functional.cross_entropy(logits, batch.labels) * self.values.get(self.calls, 1)
        self.calls += 1
        return loss

    def describe(self):
        return "spoilt"


@pytest.mark.parametrize(
    ("values", "step", "epoch"),
    [
        ({"at0": math.nan}, 0, 1),
        ({"at4": math.nan}, 4, 2),
        ({"at4": math.inf, "at5": math.nan}, 4, 2),
        ({"at11": -math.inf}, 11, 4),
    ],
)
def test_a_loss_that_is_not_finite_stops_training_with_the_first_bad_step(image_set, values, step, epoch):
    message = (
        rf"stopped being finite at step {step} of 12 \(epoch {epoch}\): lower the learning rate \(0\.1\), "
        r"or lengthen the warm-up \(0\.1\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        quiet_train(build("tiny_cnn", 4, 1), image_set(), Spoilt(**values), RECIPE)


def test_a_learning_rate_far_too_high_is_such_a_case(image_set):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(FloatingPointError, match=r"of 60 .*lower the learning rate \(1e\+30\)"):
        quiet_train(model, image_set(), CrossEntropy(), Recipe(epochs=20, batch_size=16, learning_rate=1e30))


def test_what_was_saved_before_is_unchanged_by_a_run_that_fails(image_set, tmp_path, monkeypatch, contents):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, progress=False)
    go("teacher.pth", "tiny_cnn", data, CrossEntropy(), RECIPE)
    before = contents(tmp_path)
    with pytest.raises(FloatingPointError):
        go("student.pth", "tiny_cnn", data, Spoilt(at4=math.nan), RECIPE)
    assert contents(tmp_path) == before
    # and a checkpoint holds what was still good
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    with pytest.raises(FloatingPointError):
        go("student.pth", "tiny_cnn", data, Spoilt(at4=math.nan), RECIPE)
    (partial,) = tmp_path.glob("*.partial")
    state = torch.load(partial, weights_only=True)
    assert state["step"] == 3
    assert all(torch.isfinite(v).all() for v in state["model"].values())


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0: expected a whole number of at least 1"),
        ({"epochs": 2.5}, r"epochs is 2\.5: expected a whole number of at least 1"),
        ({"batch_size": -1}, "batch_size is -1: expected a whole number of at least 1"),
        ({"cutout": -1}, "cutout is -1: expected a whole number of at least 0"),
        ({"views": 0}, "views is 0: expected a whole number of at least 1, or None for all views"),
        ({"views": 1.5}, r"views is 1\.5: expected a whole number of at least 1, or None for all views"),
        ({"learning_rate": 0}, "learning_rate is 0: expected a number above 0"),
        ({"learning_rate": math.inf}, "learning_rate is inf: expected a number above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan: expected a number above 0"),
        ({"momentum": 1.0}, r"momentum is 1\.0: expected a number from 0 to below 1"),
        ({"momentum": -0.1}, r"momentum is -0\.1: expected a number from 0 to below 1"),
        ({"warmup": 1}, "warmup is 1: expected a number from 0 to below 1"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001: expected a number of at least 0"),
        ({"mixup": -0.2}, r"mixup is -0\.2: expected a number of at least 0"),
        ({"mixup": math.nan}, "mixup is nan: expected a number of at least 0"),
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **change)


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.4, warmup=0.2)
    # after the warm-up, 0.4 and 0.8 are a quarter and three quarters of the way: (1 + cos(pi / 4)) / 2 = 0.853553
    rates = {0: 0, 0.05: 0.1, 0.1: 0.2, 0.2: 0.4, 0.4: 0.4 * 0.853553, 0.6: 0.2, 0.8: 0.4 * 0.146447, 1: 0}
    assert [recipe.learning_rate_at(p) for p in rates] == pytest.approx(list(rates.values()), abs=1e-6)


def test_without_warmup_the_learning_rate_starts_at_its_peak():
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=0.4, warmup=0)
    assert recipe.learning_rate_at(0) == 0.4
    assert recipe.learning_rate_at(0.5) == pytest.approx(0.2)


def test_more_views_than_there_are_are_refused_before_the_first_step(image_set):
    model = build("tiny_cnn", 4, 1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"views is 10: expected at most 9, .* toy/train has with 1 pixels of padding"):
        quiet_train(model, image_set(), CrossEntropy(), replace(RECIPE, views=10))
    assert same(weights(model), before)


@pytest.mark.parametrize("change", [{"mixup": 0.2}, {"cutout": 4}])
def test_cutout_and_mixup_are_refused_with_soft_labels_before_the_first_step(image_set, toy_teacher, change):
    data = image_set()
    loss = Distillation(soft_labels(toy_teacher(data), data, 9), temperature=4, alpha=0.1)
    model = build("tiny_cnn", 4, 1)
    parameters = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"cutout or mixup.*set cutout and mixup to 0 .* or use LiveTeacher"):
        quiet_train(model, data, loss, replace(RECIPE, **change))
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_bar_shows_epoch_loss_validation_accuracy_and_the_time_left(image_set, capsys, monkeypatch):
    data = image_set()
    # shown after every epoch, however short
    monkeypatch.setattr(training, "tqdm", functools.partial(tqdm, mininterval=0, miniters=1, ncols=120))
    history = train(build("tiny_cnn", 4, 1), data, CrossEntropy(), RECIPE, validation=data)
    out, err = capsys.readouterr()
    assert out == ""
    for epoch in range(4):
        figures = f"loss={history.loss[epoch]:.4f}, validation={history.accuracy[epoch]:.2%}"
        assert re.search(rf"{epoch + 1}/4 \[\d+:\d+<[\d:?]+,.*{figures}", err)


def test_without_progress_nothing_is_printed(image_set, capfd):
    data = image_set()
    quiet_train(build("tiny_cnn", 4, 1), data, CrossEntropy(), RECIPE, validation=data)
    assert capfd.readouterr() == ("", "")


# --- loading what is there -------------------------------------------------------------------------------------------


@pytest.fixture
def never_train(monkeypatch):
    """A function after which training is an error."""

    def fail(*_, **__):
        raise AssertionError("trained again")

    return lambda: monkeypatch.setattr(training, "train", fail)


def test_a_network_that_was_trained_so_before_is_loaded(image_set, tmp_path, never_train):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, CrossEntropy(), RECIPE)
    first = go(validation=data, progress=False)
    never_train()
    again = go(validation=data, progress=False)
    assert same(weights(first.model), weights(again.model))
    assert not first.model.training
    assert not again.model.training
    assert again.history == first.history
    assert again.fingerprint == first.fingerprint
    assert again.path == first.path == tmp_path / "student.pth"


def test_beside_the_weights_lies_what_they_were_made_from_and_how(image_set, tmp_path):
    data = image_set()
    found = load_or_train(tmp_path, "student.pth", "tiny_cnn", data, CrossEntropy(), RECIPE, progress=False)
    known = json.loads((tmp_path / "student.pth.json").read_text())
    assert known["fingerprint"] == found.fingerprint
    assert known["fingerprint"]["network"] == "tiny_cnn"
    assert known["fingerprint"]["data"] == f"toy/train {data.fingerprint}"
    assert known["fingerprint"]["recipe"] == asdict(RECIPE)
    assert known["provenance"].keys() == {"versions", "device", "date", "seconds"}
    assert known["history"] == asdict(found.history)


def test_a_network_that_was_trained_otherwise_is_set_aside_unchanged_with_its_record(
    image_set, tmp_path, capsys, contents
):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, CrossEntropy(), progress=False)
    go(RECIPE)
    before = contents(tmp_path)
    go(replace(RECIPE, epochs=1, seed=5))
    message = capsys.readouterr().out
    assert "student.pth is not what this run needs (recipe.epochs is 4, not 1; recipe.seed is 0, not 5)" in message
    aside = re.search(r"kept as (student\.\w+\.pth)$", message)[1]
    after = contents(tmp_path)
    assert after[aside] == before["student.pth"]
    assert after[f"{aside}.json"] == before["student.pth.json"]
    assert after["student.pth"] != before["student.pth"]
    assert len(after) == 4


@pytest.mark.parametrize("change", ["network", "data", "loss", "recipe"])
def test_whatever_decides_the_result_is_part_of_what_must_match(image_set, tmp_path, capsys, change):
    data = image_set()
    wanted = {"network": "tiny_cnn", "data": data, "loss_fn": CrossEntropy(), "recipe": replace(RECIPE, epochs=1)}
    load_or_train(tmp_path, "student.pth", **wanted, progress=False)
    other = {
        "network": {"network": "digits_cnn"},
        "data": {"data": image_set(seed=1)},
        "loss": {"loss_fn": CrossEntropy(label_smoothing=0.1)},
        "recipe": {"recipe": replace(RECIPE, epochs=1, momentum=0.8)},
    }[change]
    load_or_train(tmp_path, "student.pth", **{**wanted, **other}, progress=False)
    assert "is not what this run needs" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.pth"))) == 2


def test_of_which_teacher_the_targets_are_must_match(image_set, toy_teacher):
    data = image_set()
    prints = [
        run_fingerprint(
            data, Distillation(LiveTeacher(toy_teacher(data), {"seed": s}), temperature=4, alpha=0.1), RECIPE
        )
        for s in (0, 1)
    ]
    assert prints[0] != prints[1]


def test_a_run_with_overrides_reads_what_fits_from_the_profiles_own_folder(image_set, tmp_path, never_train, contents):
    data = image_set()
    go = functools.partial(load_or_train, progress=False)
    first = go(tmp_path / "quick", "teacher.pth", "tiny_cnn", data, CrossEntropy(), RECIPE)
    before = contents(tmp_path)
    other = go(tmp_path / "quick-1a2b", "teacher.pth", "tiny_cnn", data, CrossEntropy(), replace(RECIPE, seed=1))
    assert other.path == tmp_path / "quick-1a2b" / "teacher.pth"  # it does not fit, and stays where it is
    assert contents(tmp_path).items() >= before.items()
    never_train()
    found = go(tmp_path / "quick-ffff", "teacher.pth", "tiny_cnn", data, CrossEntropy(), RECIPE)
    assert found.path == first.path
    assert same(weights(found.model), weights(first.model))
    assert not (tmp_path / "quick-ffff").exists()


def test_a_loss_that_does_not_describe_itself_trains_but_is_not_saved(image_set, tmp_path):
    def squared_loss(logits, batch):
        return logits.square().mean()

    with pytest.raises(TypeError, match=r"squared_loss.* has no describe\(\)"):
        load_or_train(tmp_path, "net.pth", "tiny_cnn", image_set(), squared_loss, RECIPE, progress=False)
    assert not list(tmp_path.iterdir())
    assert trained(image_set(), loss_fn=squared_loss)


def test_damaged_weights_are_refused_and_kept(image_set, tmp_path):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, CrossEntropy(), progress=False)
    path = go(RECIPE).path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"student\.pth is not a weights file .*delete it and run its chapter again"):
        go(RECIPE)
    assert path.stat().st_size == 1000


def test_a_folder_that_cannot_be_written_shows_itself_before_the_training(image_set, tmp_path, never_train):
    (tmp_path / "file").write_text("in the way")
    never_train()
    with pytest.raises(OSError, match=r"file/outputs cannot be written \(Not a directory\): .* KDLIB_OUTPUTS"):
        load_or_train(tmp_path / "file" / "outputs", "student.pth", "tiny_cnn", image_set(), CrossEntropy(), RECIPE)


def test_the_weights_saved_are_those_that_training_left(image_set, tmp_path):
    found = load_or_train(tmp_path, "student.pth", "tiny_cnn", image_set(), CrossEntropy(), RECIPE, progress=False)
    loaded = artefacts.load_weights(tmp_path / "student.pth", build("tiny_cnn", 4, 1, seed=9))
    assert same(weights(loaded), weights(found.model))


def test_side_by_side_is_as_alone(image_set, toy_teacher):
    data, gentle = image_set(), replace(RECIPE, learning_rate=0.02)  # sums in another order drift apart otherwise
    soft, again = (Distillation(soft_labels(toy_teacher(data), data, 9), 4.0, 0.1) for _ in range(2))
    for network in ("tiny_cnn", "digits_cnn"):  # without batch norm and with it
        loss_fns = [CrossEntropy(), soft, CrossEntropy(0.1), again]
        recipes = [
            replace(gentle, seed=5, learning_rate=0.01),
            replace(gentle, seed=5),
            replace(gentle, seed=6, weight_decay=0.01),
            replace(gentle, seed=7),
        ]
        together = [build(network, 4, 1, seed=recipe.seed) for recipe in recipes]
        histories = train_many(together, data, loss_fns, recipes, progress=False)
        for model, loss_fn, recipe in zip(together, loss_fns, recipes, strict=True):
            alone = build(network, 4, 1, seed=recipe.seed)
            quiet_train(alone, data, loss_fn, recipe)
            for name, tensor in alone.state_dict().items():
                torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
            assert not model.training
        assert [len(history.loss) for history in histories] == [RECIPE.epochs] * 4
        assert histories[1].loss == histories[3].loss  # of equal losses, the mean


def test_side_by_side_names_the_network_that_diverged(image_set):
    models = [build("tiny_cnn", 4, 1, seed=seed) for seed in (0, 1)]
    recipes = [replace(RECIPE, epochs=1), replace(RECIPE, epochs=1, learning_rate=1e30)]
    with pytest.raises(FloatingPointError, match=r"networks \[1\] stopped being finite in epoch 1: .*1e\+30"):
        train_many(models, image_set(), [CrossEntropy()] * 2, recipes, progress=False)


@pytest.mark.parametrize(
    ("models", "recipes", "message"),
    [
        (["tiny_cnn"], [RECIPE, RECIPE], "1 models, 2 loss_fns, 2 recipes"),
        ([], [], "0 models"),
        (["tiny_cnn", "digits_cnn"], [RECIPE, RECIPE], r"models \[1\] are of another architecture"),
        (["tiny_cnn"] * 2, [RECIPE, replace(RECIPE, epochs=9)], r"recipes \[1\] differ from the first in more than"),
        (["tiny_cnn"], [replace(RECIPE, cutout=2)], "cutout is 2"),
        (["tiny_cnn"], [replace(RECIPE, mixup=1.0)], "mixup is 1.0"),
        (["tiny_cnn"], [replace(RECIPE, views=400)], "views is 400: expected at most"),
    ],
)
def test_side_by_side_refuses_what_does_not_fit(image_set, models, recipes, message):
    models = [build(network, 4, 1) for network in models]
    with pytest.raises(ValueError, match=message):
        train_many(models, image_set(), [CrossEntropy()] * len(recipes), recipes, progress=False)


def test_side_by_side_checks_the_soft_labels_first(image_set, toy_teacher):
    other = image_set(seed=1)
    foreign = Distillation(soft_labels(toy_teacher(other), other, 9), 4.0, 0.1)
    with pytest.raises(ValueError, match="the soft labels are of"):
        train_many([build("tiny_cnn", 4, 1)], image_set(), [foreign], [RECIPE], progress=False)


# --- on a GPU ------------------------------------------------------------------------------------------------------


class FakeGraph:
    """What recording needs of CUDA, without a GPU: a graph that, replayed, calls what was recorded."""

    def __init__(self, monkeypatch, fails: bool = False):
        self.recording, self.replays, self.fails = False, 0, fails
        stream = mock.MagicMock()
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *a, **k: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self)

    def __enter__(self):
        self.recording = True

    def __exit__(self, *_):
        self.recording = False
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        self.replays += 1
        self.on_replay()


def test_a_recorded_step_is_replayed_on_every_batch(monkeypatch):
    graph, seen = FakeGraph(monkeypatch), []

    def step(batch):
        if graph.recording:
            loss = torch.zeros(())
            graph.on_replay = lambda: (seen.append(batch.images.clone()), loss.fill_(float(batch.images.sum())))
            return loss
        seen.append(batch.images.clone())
        return batch.images.sum()

    recorded = training._Recorded(step)
    wanted = [torch.full((2, 1), float(i)) for i in range(7)]
    batches_ = [Batch(images, torch.tensor([i, i]), torch.tensor([0, 1]), None) for i, images in enumerate(wanted)]
    losses = [recorded(batch).item() for batch in batches_]
    assert losses == [images.sum().item() for images in wanted]
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert graph.replays == 4  # three ordinary steps come first


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(monkeypatch):
    FakeGraph(monkeypatch, fails=True)
    recorded = training._Recorded(lambda batch: batch.images.sum())
    batch = Batch(torch.ones(2, 1), torch.zeros(2), torch.zeros(2), None)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph .operation not permitted"):
        losses = [recorded(batch).item() for _ in range(6)]
    assert losses == [2.0] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_student_comes_out(monkeypatch, image_set, toy_teacher):
    monkeypatch.undo()  # the fixture that hides the GPU
    data = image_set()
    loss_fn = Distillation(soft_labels(toy_teacher(data), data, 9), 4.0, 0.1)
    recipe = replace(RECIPE, learning_rate=0.02, epochs=6)
    models = [build("digits_cnn", 4, 1, seed=1) for _ in range(2)]
    history = quiet_train(models[0], data, loss_fn, recipe, device="cuda")
    monkeypatch.setattr(training, "_Recorded", lambda step: step)
    plain = quiet_train(models[1], data, loss_fn, recipe, device="cuda")
    assert history.loss == pytest.approx(plain.loss, rel=0.05)
    assert history.loss[-1] < history.loss[0]
