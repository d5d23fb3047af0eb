"""The training loop: what it computes, that it repeats, goes on where it stopped, and loses nothing."""

import functools
import importlib
import json
import math
import re
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from kdlib import build, distillation_loss, models, predict_logits
from kdlib.data import Batch, batches
from kdlib.records import artefacts
from kdlib.records.identity import IdentityError
from kdlib.soft_labels import LiveTeacher, SoftLabels, generate
from kdlib.train import History, Recipe, fingerprint, load_or_train, train

checkpoints = importlib.import_module("kdlib.records.checkpoint")
training = importlib.import_module("kdlib.train")  # kdlib.train itself is the function
pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=4, batch_size=16, learning_rate=0.1)  # three steps per epoch on 48 images
DISTILLATION = partial(distillation_loss, temperature=4.0, alpha=0.1)
quiet_train = functools.partial(train, progress=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def trained(data, recipe=RECIPE, loss_fn=F.cross_entropy, **options) -> dict[str, torch.Tensor]:
    model = build("tiny_cnn", data.classes, data.channels, seed=recipe.seed)
    quiet_train(model, data, loss_fn, recipe, **options)
    return weights(model)


def soft_labels(teacher, data, views: int = 2) -> SoftLabels:
    logits = torch.from_numpy(generate(teacher, data, views, progress=False))
    return SoftLabels(logits, data.identity)


# --- learning ------------------------------------------------------------------------------------------------------


def test_a_network_learns_a_batch_by_heart(image_set):
    data = image_set(16)
    model = build("tiny_cnn", 4, 1)
    history = quiet_train(model, data, F.cross_entropy, replace(RECIPE, epochs=100, views=1), validation=data)
    assert history.loss[0] > 1
    assert history.loss[-1] < 0.05
    assert history.accuracy[-1] == 1


def test_with_alpha_zero_a_student_learns_the_teachers_predictions_and_not_the_labels(image_set, toy_teacher):
    data = image_set(16)
    teacher = toy_teacher(data)
    wanted = predict_logits(teacher, data)
    assert (wanted.argmax(1) != data.labels).sum() >= 8  # the two can be told apart
    student = build("digits_cnn", 4, 1)
    loss_fn, targets = partial(distillation_loss, temperature=4, alpha=0), soft_labels(teacher, data, 1)
    recipe = replace(RECIPE, epochs=150, views=1, weight_decay=0)
    history = quiet_train(student, data, loss_fn, recipe, targets=targets)
    assert history.loss[-1] < 0.01 * history.loss[0]
    found = predict_logits(student, data)
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    torch.testing.assert_close(found.softmax(1), wanted.softmax(1), atol=0.1, rtol=0)


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
    history = quiet_train(model, data, F.cross_entropy, recipe)
    for found, wanted in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert history.loss == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-5)


def test_loss_and_targets_see_images_changed_by_cutout_and_mixup_if_the_recipe_asks(image_set):
    data = image_set(48)
    seen, labels_seen = [], []

    def targets(batch):
        seen.append(batch)
        return torch.zeros(len(batch.images), 4)

    def loss_fn(student_logits, teacher_logits, labels):
        labels_seen.append(labels)
        return F.cross_entropy(student_logits + teacher_logits, labels)

    for change in ({}, {"cutout": 4}, {"mixup": 1.0}, {"cutout": 4, "mixup": 1.0}):
        trained(data, replace(RECIPE, epochs=1, **change), loss_fn, targets=targets)
    plain, cut, mixed, both = seen[::3]
    assert torch.equal(plain.images, data.batch(plain.indices, plain.views))
    assert (cut.images == 0).sum() > 16 * 4 > (plain.images == 0).sum()
    assert (both.images == 0).any()
    assert (plain.labels.shape, cut.labels.shape) == ((16,), (16,))
    assert (mixed.labels.shape, both.labels.shape) == ((16, 4), (16, 4))
    assert plain.views is not None
    assert cut.views is mixed.views is both.views is None
    assert all(labels is batch.labels for labels, batch in zip(labels_seen, seen, strict=True))


def test_the_step_reads_like_the_method(image_set):
    """loss_fn gets the network's logits, the targets' logits and the labels of the same images, in this order."""
    data, calls = image_set(16), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    table = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def with_targets(student_logits, teacher_logits, labels):
        calls.append((student_logits.detach(), teacher_logits, labels, labels.new_tensor(indices)))
        return distillation_loss(student_logits, teacher_logits, labels, temperature=4, alpha=0.5)

    def look_up(batch):
        indices[:] = batch.indices.tolist()
        with torch.no_grad():
            logits.append(model(batch.images))
        return table[batch.indices]

    indices, logits = [], []
    quiet_train(model, data, with_targets, replace(RECIPE, epochs=3), targets=look_up)
    for (student, teacher, labels, order), wanted in zip(calls, logits, strict=True):
        torch.testing.assert_close(student, wanted)
        assert torch.equal(teacher, table[order])
        assert torch.equal(labels, data.labels[order])

    def without(student_logits, labels):
        calls.append(labels)
        return F.cross_entropy(student_logits, labels)

    calls.clear()
    quiet_train(model, data, without, replace(RECIPE, epochs=2))
    assert [len(labels) for labels in calls] == [16, 16]


def test_validation_measures_the_accuracy_after_every_epoch_and_changes_nothing(image_set):
    data, validation = image_set(48), image_set(24, seed=1, name="toy/validation")
    model = build("tiny_cnn", 4, 1)
    history = quiet_train(model, data, F.cross_entropy, RECIPE, validation=validation)
    right = predict_logits(model, validation).argmax(1) == validation.labels
    assert len(history.loss) == len(history.accuracy) == len(history.seconds) == 4
    assert history.accuracy[-1] == right.double().mean().item()
    assert history.seconds == sorted(history.seconds)
    assert same(weights(model), trained(data))


def test_a_network_that_comes_in_eval_mode_is_trained_in_train_mode(image_set):
    data = image_set()
    model, other = build("digits_cnn", 4, 1).eval(), build("digits_cnn", 4, 1)
    for each in (model, other):
        quiet_train(each, data, F.cross_entropy, RECIPE)
    assert same(weights(model), weights(other))  # its running statistics too
    assert weights(model)["features.1.num_batches_tracked"] == 12


def test_without_validation_there_is_no_accuracy(image_set):
    history = quiet_train(build("tiny_cnn", 4, 1), image_set(), F.cross_entropy, RECIPE)
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
        quiet_train(model, data, F.cross_entropy, replace(RECIPE, seed=seed))
    assert not same(*map(weights, models))


@pytest.mark.parametrize("change", [{}, {"cutout": 3, "mixup": 0.5}])
def test_the_teacher_is_bit_identical_after_distillation_its_buffers_included(image_set, toy_teacher, change):
    data = image_set()
    teacher = toy_teacher(data).train()  # even where it comes in train mode
    before = weights(teacher)
    assert any("running_mean" in name for name in before)
    student = trained(data, replace(RECIPE, **change), DISTILLATION, targets=LiveTeacher(teacher))
    assert same(before, weights(teacher))
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert not same(student, trained(data, replace(RECIPE, **change)))


def test_soft_labels_and_the_live_teacher_train_the_same_student(image_set, toy_teacher):
    data, recipe = image_set(flip=True), replace(RECIPE, epochs=1)  # few steps: a rounding grows with each
    teacher = toy_teacher(data)
    students = [
        trained(data, recipe, DISTILLATION, targets=targets)
        for targets in (soft_labels(teacher, data, 18), LiveTeacher(teacher))
    ]
    plain = trained(data, recipe)
    for name in plain:
        torch.testing.assert_close(students[0][name], students[1][name], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(students[0]["classifier.weight"], plain["classifier.weight"], atol=0.01)


# --- going on where it stopped ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The machine was taken away."""


@pytest.fixture
def steps(monkeypatch):
    """The steps taken, as a list; a step before which training is interrupted can be set as ``steps.last``."""

    class Steps(list):
        last = math.inf

    taken, augment = Steps(), training.augment

    def counted(batch, *rest):
        if len(taken) >= taken.last:
            raise Interrupted
        taken.append(batch)
        return augment(batch, *rest)

    monkeypatch.setattr(training, "augment", counted)
    return taken


@pytest.fixture
def every_epoch(monkeypatch):
    """Checkpoints after every epoch, however short."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("change", [{}, {"cutout": 3, "mixup": 0.5}])
def test_a_run_that_goes_on_from_its_checkpoint_equals_an_uninterrupted_one_bit_for_bit(
    image_set, tmp_path, steps, change
):
    data, validation, recipe = image_set(), image_set(24, seed=1), replace(RECIPE, **change)
    whole = build("tiny_cnn", 4, 1)
    wanted = quiet_train(whole, data, F.cross_entropy, recipe, validation=validation)

    go = functools.partial(quiet_train, validation=validation, checkpoint=tmp_path / "run.partial")
    steps.clear()
    steps.last = 7  # in the middle of the third epoch
    with pytest.raises(Interrupted):
        go(build("tiny_cnn", 4, 1), data, F.cross_entropy, recipe)
    assert (tmp_path / "run.partial").exists()
    steps.clear()
    model = build("tiny_cnn", 4, 1)
    history = go(model, data, F.cross_entropy, recipe)
    assert len(steps) == 6  # the last two epochs
    assert same(weights(model), weights(whole))
    assert (history.loss, history.accuracy) == (wanted.loss, wanted.accuracy)
    assert len(history.seconds) == 4
    assert history.seconds == sorted(history.seconds)
    assert (tmp_path / "run.partial").exists()  # until the network is saved


@pytest.mark.usefixtures("every_epoch")
@pytest.mark.parametrize("kind", [None, "soft labels", "live teacher"])
def test_load_or_train_goes_on_as_well_and_leaves_no_checkpoint(image_set, toy_teacher, tmp_path, steps, kind):
    data, loss_fn, targets = image_set(), F.cross_entropy, None
    if kind:
        loss_fn, teacher = DISTILLATION, toy_teacher(data)
        targets = soft_labels(teacher, data, 9) if kind == "soft labels" else LiveTeacher(teacher)
    go = functools.partial(
        load_or_train, tmp_path, "student.pth", "tiny_cnn", data, loss_fn, RECIPE, targets=targets, progress=False
    )
    steps.last = 7
    with pytest.raises(Interrupted):
        go()
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".partial", ".previous"]
    steps.clear()
    result = go()
    assert len(steps) == 6
    steps.clear()
    steps.last = math.inf
    assert same(weights(result.model), trained(data, loss_fn=loss_fn, targets=targets))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["student.pth", "student.pth.json"]


def with_dropout(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * channels, classes))


@pytest.mark.usefixtures("every_epoch")
def test_dropout_follows_the_seed_resumes_bit_for_bit_and_leaves_the_global_random_state(image_set, tmp_path, steps):
    data, path = image_set(), tmp_path / "run.partial"

    def go(checkpoint=None, recipe=RECIPE):
        model = build(with_dropout, 4, 1)
        torch.manual_seed(len(steps))  # whatever the caller's state is
        before = torch.get_rng_state()
        try:
            quiet_train(model, data, F.cross_entropy, recipe, checkpoint=checkpoint)
        finally:
            assert torch.equal(torch.get_rng_state(), before)
        return weights(model)

    wanted = go()
    assert same(go(), wanted)
    assert not same(go(recipe=replace(RECIPE, seed=1)), wanted)
    steps.clear()
    steps.last = 7  # in the middle of the third epoch
    with pytest.raises(Interrupted):
        go(path)
    steps.last = math.inf
    assert same(go(path), wanted)


@pytest.mark.usefixtures("every_epoch")
def test_a_checkpoint_of_another_device_goes_on_and_says_that_the_random_numbers_do_not(
    image_set, tmp_path, steps, monkeypatch
):
    path = tmp_path / "run.partial"
    go = functools.partial(quiet_train, data=image_set(), loss_fn=F.cross_entropy, recipe=RECIPE, checkpoint=path)
    steps.last = 7
    with monkeypatch.context() as patched:
        save = torch.save
        patched.setattr(torch, "save", lambda state, file: save(state | {"device": "cuda", "generators": [None]}, file))
        with pytest.raises(Interrupted):
            go(build("tiny_cnn", 4, 1))
    steps.clear()
    with pytest.warns(
        UserWarning, match=r"run\.partial was written on cuda, and training goes on on cpu: its random num"
    ):
        go(build("tiny_cnn", 4, 1))
    assert len(steps) == 6  # the last two epochs


def test_a_checkpoint_is_kept_at_most_once_a_minute(image_set, tmp_path, steps):
    steps.last = 7
    with pytest.raises(Interrupted):
        quiet_train(build("tiny_cnn", 4, 1), image_set(), F.cross_entropy, RECIPE, checkpoint=tmp_path / "run.partial")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("every_epoch")
def test_a_checkpoint_of_another_run_is_refused_and_kept(image_set, toy_teacher, tmp_path, steps):
    data, path = image_set(), tmp_path / "run.partial"
    steps.last = 7
    with pytest.raises(Interrupted):
        quiet_train(build("tiny_cnn", 4, 1), data, F.cross_entropy, RECIPE, checkpoint=path)
    before = path.read_bytes()
    run = {"model": build("tiny_cnn", 4, 1), "data": data, "loss_fn": F.cross_entropy, "recipe": RECIPE}
    others = [
        {"recipe": replace(RECIPE, seed=1)},
        {"data": image_set(seed=1)},
        {"loss_fn": partial(F.cross_entropy, label_smoothing=0.1)},
        {"model": build("digits_cnn", 4, 1)},
        {"model": build("tiny_cnn", 4, 1, seed=9)},  # it started from other weights
        {"loss_fn": DISTILLATION, "targets": LiveTeacher(toy_teacher(data))},
    ]
    for other in others:
        message = r"run\.partial is not a checkpoint of this run \(.+\): move it away to start afresh"
        with pytest.raises(ValueError, match=message):
            quiet_train(**run | other, checkpoint=path)
        assert path.read_bytes() == before


def test_a_checkpoint_needs_an_objective_that_can_be_told_from_others(image_set, tmp_path):
    with pytest.raises(IdentityError, match="lambda"):
        quiet_train(
            build("tiny_cnn", 4, 1),
            image_set(),
            lambda student_logits, labels: F.cross_entropy(student_logits, labels),
            RECIPE,
            checkpoint=tmp_path / "run.partial",
        )


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
        quiet_train(build("tiny_cnn", 4, 1), image_set(), F.cross_entropy, RECIPE, checkpoint=path)
    assert path.read_bytes() == before
    assert not side_effect.folder.exists()


# --- a loss that is not finite ---------------------------------------------------------------------------------------


def spoilt(**values):
    """Cross-entropy that is multiplied by a value at some steps."""
    calls = []

    def loss_fn(student_logits, labels):
        calls.append(labels)
        return F.cross_entropy(student_logits, labels) * values.get(f"at{len(calls) - 1}", 1)

    return loss_fn


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
        quiet_train(build("tiny_cnn", 4, 1), image_set(), spoilt(**values), RECIPE)


def test_a_learning_rate_far_too_high_is_such_a_case(image_set):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(FloatingPointError, match=r"of 60 .*lower the learning rate \(1e\+30\)"):
        quiet_train(model, image_set(), F.cross_entropy, Recipe(epochs=20, batch_size=16, learning_rate=1e30))


@pytest.mark.parametrize("fails_in", ["student", "teacher"])
def test_what_was_saved_before_is_unchanged_by_a_run_that_fails(
    image_set, toy_teacher, tmp_path, monkeypatch, contents, fails_in
):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, progress=False)
    go("teacher.pth", "tiny_cnn", data, F.cross_entropy, RECIPE)
    before = contents(tmp_path)
    loss_fn, targets, calls = F.cross_entropy, None, []
    if fails_in == "teacher":
        loss_fn, targets = DISTILLATION, LiveTeacher(toy_teacher(data))

    def spoil(batch, *_):  # from the second epoch on
        calls.append(batch)
        return batch._replace(images=batch.images * math.nan) if len(calls) > 4 else batch

    monkeypatch.setattr(training, "augment", spoil)
    run = functools.partial(go, "student.pth", "tiny_cnn", data, loss_fn, RECIPE, targets=targets)
    with pytest.raises(FloatingPointError, match=r"step 4 of 12 \(epoch 2\)"):
        run()
    assert contents(tmp_path) == before
    # and a checkpoint holds what was still good
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    calls.clear()
    with pytest.raises(FloatingPointError):
        run()
    (partial_run,) = tmp_path.glob("*.partial")
    state = torch.load(partial_run, weights_only=True)
    assert len(state["history"]["loss"]) == 1
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
        ({"epochs": True}, "epochs is True: expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True: expected a whole number of at least 1"),
        ({"cutout": np.True_}, "cutout is True: expected a whole number of at least 0"),
        ({"views": True}, "views is True: expected a whole number of at least 1, or None for all views"),
        ({"seed": False}, "seed is False: expected a whole number from 0 to 4,294,967,295"),
        ({"learning_rate": True}, "learning_rate is True: expected a number above 0"),
        ({"mixup": False}, "mixup is False: expected a number of at least 0"),
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
        quiet_train(model, image_set(), F.cross_entropy, replace(RECIPE, views=10))
    assert same(weights(model), before)


@pytest.mark.parametrize("change", [{"mixup": 0.2}, {"cutout": 4}])
def test_cutout_and_mixup_are_refused_with_soft_labels_before_the_first_step(image_set, toy_teacher, change):
    data = image_set()
    targets = soft_labels(toy_teacher(data), data, 9)
    model = build("tiny_cnn", 4, 1)
    parameters = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"cutout or mixup.*set cutout and mixup to 0 .* or use LiveTeacher"):
        quiet_train(model, data, DISTILLATION, replace(RECIPE, **change), targets=targets)
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_progress_bar_shows_epoch_loss_validation_accuracy_and_the_time_left(image_set, capsys, monkeypatch):
    data = image_set()
    # shown after every epoch, however short
    monkeypatch.setattr(training, "tqdm", functools.partial(tqdm, mininterval=0, miniters=1, ncols=120, disable=False))
    history = train(build("tiny_cnn", 4, 1), data, F.cross_entropy, RECIPE, validation=data)
    out, err = capsys.readouterr()
    assert out == ""
    for epoch in range(4):
        figures = f"loss={history.loss[epoch]:.4f}, validation={history.accuracy[epoch]:.2%}"
        assert re.search(rf"{epoch + 1}/4 \[\d+:\d+<[\d:?]+,.*{figures}", err)


def test_without_progress_nothing_is_printed(image_set, capfd):
    data = image_set()
    quiet_train(build("tiny_cnn", 4, 1), data, F.cross_entropy, RECIPE, validation=data)
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
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, F.cross_entropy, RECIPE)
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
    found = load_or_train(tmp_path, "student.pth", "tiny_cnn", data, F.cross_entropy, RECIPE, progress=False)
    known = json.loads((tmp_path / "student.pth.json").read_text())
    assert known["fingerprint"] == found.fingerprint
    assert known["fingerprint"]["network"]["name"] == "tiny_cnn"
    assert known["fingerprint"]["targets"] is None
    assert known["sha256"] == artefacts.file_digest(found.path)
    assert known["fingerprint"]["data"] == data.identity
    assert known["fingerprint"]["recipe"] == asdict(RECIPE)
    assert known["provenance"].keys() == {"versions", "device", "date", "seconds"}
    assert known["history"] == asdict(found.history)


def test_a_network_that_was_trained_otherwise_is_set_aside_unchanged_with_its_record(
    image_set, tmp_path, capsys, contents
):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, F.cross_entropy, progress=False)
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
    wanted = {"network": "tiny_cnn", "data": data, "loss_fn": F.cross_entropy, "recipe": replace(RECIPE, epochs=1)}
    load_or_train(tmp_path, "student.pth", **wanted, progress=False)
    other = {
        "network": {"network": "digits_cnn"},
        "data": {"data": image_set(seed=1)},
        "loss": {"loss_fn": partial(F.cross_entropy, label_smoothing=0.1)},
        "recipe": {"recipe": replace(RECIPE, epochs=1, momentum=0.8)},
    }[change]
    load_or_train(tmp_path, "student.pth", **{**wanted, **other}, progress=False)
    assert "is not what this run needs" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.pth"))) == 2


def test_of_which_teacher_the_targets_are_must_match(image_set, toy_teacher):
    data = image_set()
    first, again, other = (toy_teacher(data, seed=seed) for seed in (0, 0, 1))

    def made_from(targets):
        return fingerprint("tiny_cnn", data, DISTILLATION, RECIPE, targets)

    assert made_from(LiveTeacher(first)) == made_from(LiveTeacher(again)) != made_from(LiveTeacher(other))
    saved = [made_from(soft_labels(teacher, data, 9)) for teacher in (first, again, other)]
    assert saved[0] == saved[1] != saved[2]
    assert saved[0] != made_from(LiveTeacher(first))


def test_a_run_with_overrides_reads_what_fits_from_the_profiles_own_folder(image_set, tmp_path, never_train, contents):
    data = image_set()
    go = functools.partial(load_or_train, progress=False)
    first = go(tmp_path / "quick", "teacher.pth", "tiny_cnn", data, F.cross_entropy, RECIPE)
    before = contents(tmp_path)
    other = go(tmp_path / "quick-1a2b", "teacher.pth", "tiny_cnn", data, F.cross_entropy, replace(RECIPE, seed=1))
    assert other.path == tmp_path / "quick-1a2b" / "teacher.pth"  # it does not fit, and stays where it is
    assert contents(tmp_path).items() >= before.items()
    never_train()
    found = go(tmp_path / "quick-ffff", "teacher.pth", "tiny_cnn", data, F.cross_entropy, RECIPE)
    assert found.path == first.path
    assert same(weights(found.model), weights(first.model))
    assert not (tmp_path / "quick-ffff").exists()


def test_a_loss_that_cannot_be_identified_trains_but_is_not_saved(image_set, tmp_path):
    scale = [1.0]

    def scaled(student_logits, labels):
        return scale[0] * F.cross_entropy(student_logits, labels)

    with pytest.raises(IdentityError, match=r"scaled closes over scale, which may change: .*functools\.partial"):
        load_or_train(tmp_path, "net.pth", "tiny_cnn", image_set(), scaled, RECIPE, progress=False)
    assert not list(tmp_path.iterdir())
    assert same(trained(image_set(), loss_fn=scaled), trained(image_set()))


class Always:
    """A teacher of one's own, whose logits are the same for every image."""

    def __init__(self, predicted: int):
        self.predicted = predicted

    def __call__(self, batch: Batch) -> torch.Tensor:
        return 20 * F.one_hot(torch.full((len(batch.images),), self.predicted), 8).float()


def teacher_of_class(batch, predicted):
    return 20 * F.one_hot(torch.full((len(batch.images),), predicted), 8).float()


TEACHERS = {
    "an object": Always,
    "a bound method": lambda c: Always(c).__call__,
    "a lambda": lambda c: lambda batch: Always(c)(batch),
    "a closure": lambda c: lambda batch, predicted=c: Always(predicted)(batch),
    "a function with its keyword bound": lambda c: partial(teacher_of_class, predicted=c),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_any_callable_can_be_the_targets_but_nothing_is_saved_under_a_name_that_another_could_have(
    image_set, tmp_path, kind
):
    data = image_set(64, classes=8)
    loss_fn, recipe = partial(distillation_loss, temperature=1.0, alpha=0.0), replace(RECIPE, epochs=5)
    for predicted in (0, 3, 7):
        targets = TEACHERS[kind](predicted)
        model = build("perceptron", 8, 1)
        quiet_train(model, data, loss_fn, recipe, targets=targets)
        assert predict_logits(model, data).argmax(1).unique().tolist() == [predicted]
        with pytest.raises(IdentityError, match=r"are neither SoftLabels nor a LiveTeacher: they train, but cannot be"):
            load_or_train(tmp_path, "s.pth", "perceptron", data, loss_fn, recipe, targets=targets, progress=False)
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_refused_and_kept(image_set, tmp_path):
    data = image_set()
    go = functools.partial(load_or_train, tmp_path, "student.pth", "tiny_cnn", data, F.cross_entropy, progress=False)
    path = go(RECIPE).path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"student\.pth is not a weights file .*delete it and run its chapter again"):
        go(RECIPE)
    assert path.stat().st_size == 1000


def test_a_folder_that_cannot_be_written_shows_itself_before_the_training(image_set, tmp_path, never_train):
    (tmp_path / "file").write_text("in the way")
    never_train()
    with pytest.raises(OSError, match=r"file/outputs cannot be written \(Not a directory\): .* KDLIB_OUTPUTS"):
        load_or_train(tmp_path / "file" / "outputs", "student.pth", "tiny_cnn", image_set(), F.cross_entropy, RECIPE)


def test_the_weights_saved_are_those_that_training_left(image_set, tmp_path):
    found = load_or_train(tmp_path, "student.pth", "tiny_cnn", image_set(), F.cross_entropy, RECIPE, progress=False)
    loaded = artefacts.load_weights(tmp_path / "student.pth", build("tiny_cnn", 4, 1, seed=9))
    assert same(weights(loaded), weights(found.model))


def test_a_record_without_a_history_is_loaded_with_an_empty_one(image_set, tmp_path, never_train):
    data = image_set()
    go = partial(load_or_train, tmp_path, "s.pth", "tiny_cnn", data, F.cross_entropy, RECIPE, progress=False)
    first = go()
    record = json.loads((tmp_path / "s.pth.json").read_text())
    del record["history"], record["provenance"], record["checksum"]  # as those that were written before there was one
    (tmp_path / "s.pth.json").write_text(json.dumps(record))
    never_train()
    again = go()
    assert again.history == History()
    assert same(weights(again.model), weights(first.model))


def test_weights_that_were_changed_under_their_record_are_refused_and_kept(image_set, tmp_path):
    data = image_set()
    go = partial(load_or_train, tmp_path, "s.pth", "tiny_cnn", data, F.cross_entropy, RECIPE, progress=False)
    path = go().path
    torch.save(build("tiny_cnn", 4, 1, seed=5).state_dict(), path)  # of the same shapes, by another hand
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"s\.pth has changed since it was saved: its SHA-256 is \w+, its record says"):
        go()
    assert path.read_bytes() == before


def counting(student_logits, labels, counted):
    counted.append(len(labels))
    return F.cross_entropy(student_logits, labels) / len(counted)


def test_weights_are_not_saved_if_the_loss_changed_while_they_were_trained(image_set, tmp_path):
    loss_fn = partial(counting, counted=[])
    with pytest.raises(IdentityError, match=r"loss_fn changed while s\.pth was trained.*bind what it reads"):
        load_or_train(tmp_path, "s.pth", "tiny_cnn", image_set(), loss_fn, RECIPE, progress=False)
    assert not list(tmp_path.glob("s.pth*"))


# --- networks of one's own -------------------------------------------------------------------------------------------


class Flattening(nn.Module):
    """A network that calls view on its feature maps, as many in tutorials do."""

    def __init__(self, classes: int, channels: int, how: str = "view"):
        super().__init__()
        self.how = how
        self.convolution = nn.Conv2d(channels, 6, 3, padding=1)
        self.classifier = nn.Linear(6 * 64, classes)

    def forward(self, images):
        x = torch.relu(self.convolution(images))
        return self.classifier(x.view(x.size(0), -1) if self.how == "view" else x.reshape(x.size(0), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_calls_view_trains_as_one_that_calls_reshape(image_set, toy_teacher, channels):
    data = image_set(channels=channels)
    for targets in (None, LiveTeacher(toy_teacher(data)), LiveTeacher(Flattening(4, channels).eval())):
        students = {how: Flattening(4, channels, how) for how in ("view", "reshape")}
        students["reshape"].load_state_dict(students["view"].state_dict())
        for student in students.values():
            loss_fn = DISTILLATION if targets else F.cross_entropy
            quiet_train(student, data, loss_fn, RECIPE, targets=targets, validation=data)
        for a, b in zip(*(model.parameters() for model in students.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_on_a_cpu_fast_or_not_is_the_same(image_set):
    data = image_set()
    assert same(trained(data, fast=True), trained(data, fast=False))


@pytest.mark.parametrize("network", [Flattening, partial(Flattening, how="reshape")])
def test_networks_of_ones_own_are_kept_and_found_again(image_set, tmp_path, never_train, network):
    data = image_set()
    go = partial(load_or_train, tmp_path, "s.pth", data=data, loss_fn=F.cross_entropy, recipe=RECIPE, progress=False)
    first = go(network=network)
    never_train()
    assert same(weights(go(network=network).model), weights(first.model))


def scaled_start(classes, channels, scale):
    model = Flattening(classes, channels)
    nn.init.normal_(model.classifier.weight, std=scale)
    return model


def pretrained(classes, channels, path):
    model = Flattening(classes, channels)
    model.load_state_dict(torch.load(path))
    return model


def test_networks_that_start_from_other_weights_are_told_apart(image_set, tmp_path):
    data, prints = image_set(), []
    for seed in (1, 2):  # the weights in the file change, its name does not
        torch.save(build(Flattening, 4, 1, seed=seed).state_dict(), tmp_path / "backbone.pth")
        for _ in range(2):
            network = partial(pretrained, path=str(tmp_path / "backbone.pth"))
            prints.append(fingerprint(network, data, F.cross_entropy, RECIPE))
    assert prints[0] == prints[1] != prints[2] == prints[3]
    small, large = (
        fingerprint(partial(scaled_start, scale=scale), data, F.cross_entropy, RECIPE) for scale in (0.01, 1.0)
    )
    assert small != large


REGISTERED = {
    "another activation": lambda classes, channels: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, classes)
    ),
    "another width": lambda classes, channels: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, classes)
    ),
    "another class": Flattening,
    "other keywords": partial(Flattening, how="reshape"),
}


@pytest.mark.parametrize("change", REGISTERED)
def test_a_network_registered_again_under_its_name_is_not_handed_the_old_ones_weights(
    image_set, tmp_path, monkeypatch, capsys, change
):
    def registered(classes, channels):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, classes))

    data = image_set()
    go = partial(load_or_train, tmp_path, "s.pth", "mine", data, F.cross_entropy, RECIPE, progress=False)
    monkeypatch.setitem(models.NETWORKS, "mine", registered)
    first = go()
    monkeypatch.setitem(models.NETWORKS, "mine", REGISTERED[change])
    second = go()
    assert "s.pth is not what this run needs (network." in capsys.readouterr().out
    alone = build(REGISTERED[change], 4, 1)
    quiet_train(alone, data, F.cross_entropy, RECIPE)
    assert same(weights(second.model), weights(alone))
    monkeypatch.setitem(models.NETWORKS, "mine", registered)
    assert same(weights(go().model), weights(first.model))


def test_weights_that_are_not_finite_are_not_kept(image_set, tmp_path):
    """A loss may be finite in the last step and its gradient infinite."""
    data, recipe = image_set(8), Recipe(epochs=1, batch_size=8, learning_rate=0.1)
    with pytest.raises(FloatingPointError, match="stopped being finite at step 0 of 1"):
        load_or_train(tmp_path, "student.pth", "perceptron", data, infinite_gradient, recipe, progress=False)
    assert not (tmp_path / "student.pth").exists()


def infinite_gradient(student_logits, labels):
    return (student_logits - student_logits.detach()).abs().sum().sqrt()
