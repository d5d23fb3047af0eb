"""Many networks as one batched program: each as it would be alone."""

import functools
import importlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlib import Recipe, SoftLabels, build, distillation_loss, generate, gpu, train
from kdlib.lab import batched, train_many
from kdlib.scale import SeededViews

pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.02)  # sums in another order drift apart in longer training
DISTIL = partial(distillation_loss, temperature=4.0, alpha=0.1)
quiet_train_many = functools.partial(train_many, progress=False)


def soft_labels(teacher, data, views: int = 9) -> SoftLabels:
    return SoftLabels(torch.from_numpy(generate(teacher, data, views, progress=False)), data.identity)


@pytest.mark.parametrize("network", ["tiny_cnn", "digits_cnn"])  # without batch norm and with it
def test_batched_is_as_alone(image_set, toy_teacher, network):
    data = image_set()
    first, again = (soft_labels(toy_teacher(data), data) for _ in range(2))
    other = soft_labels(toy_teacher(data, seed=8), data)
    loss_fns = [F.cross_entropy, DISTIL, partial(F.cross_entropy, label_smoothing=0.1), DISTIL, DISTIL]
    targets = [None, first, None, again, other]
    recipes = [
        replace(RECIPE, seed=5, learning_rate=0.01),
        replace(RECIPE, seed=5),
        replace(RECIPE, seed=6, weight_decay=0.01),
        replace(RECIPE, seed=7),
        replace(RECIPE, seed=7),
    ]
    together = [build(network, 4, 1, seed=recipe.seed) for recipe in recipes]
    histories = quiet_train_many(together, data, loss_fns, recipes, targets=targets)
    for model, loss_fn, recipe, own_targets in zip(together, loss_fns, recipes, targets, strict=True):
        alone = build(network, 4, 1, seed=recipe.seed)
        train(alone, data, loss_fn, recipe, targets=own_targets, progress=False)
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
        assert not model.training
    assert [len(history.loss) for history in histories] == [RECIPE.epochs] * 5
    assert histories[1].loss == histories[3].loss == histories[4].loss  # of one loss, the mean


def test_networks_are_grouped_by_content(image_set, toy_teacher):
    data = image_set()
    first, again, other = (soft_labels(toy_teacher(data, seed=seed), data) for seed in (7, 7, 8))

    def unknown(batch):  # closes over `data`, so it cannot be identified
        return torch.zeros(len(batch.labels), data.classes)

    def grouped(*pairs):
        return batched._same([tuple(map(batched._identity, pair)) for pair in pairs])

    colder = partial(distillation_loss, temperature=1.0, alpha=0.1)
    same = partial(distillation_loss, temperature=4.0, alpha=0.1)
    assert grouped((DISTIL, first), (same, again)) == [[0, 1]]
    assert grouped((DISTIL, first), (DISTIL, other), (colder, first), (DISTIL, again)) == [[0, 3], [1], [2]]
    assert grouped((F.cross_entropy, None), (F.cross_entropy, None), (DISTIL, first)) == [[0, 1], [2]]
    assert grouped((DISTIL, unknown), (DISTIL, unknown), (DISTIL, lambda batch: unknown(batch))) == [[0, 1], [2]]


def test_the_loss_is_called_as_train_calls_it(image_set):
    data, seen = image_set(), []

    def without(student_logits, labels):
        seen.append(("without", student_logits.shape, labels))
        return F.cross_entropy(student_logits, labels)

    def with_targets(student_logits, teacher_logits, labels):
        seen.append(("with", student_logits.shape, labels))
        assert torch.equal(teacher_logits, F.one_hot(labels, 4).float())
        return F.cross_entropy(student_logits, teacher_logits)

    def labels_as_logits(batch):
        assert torch.equal(batch.images, data.batch(batch.indices, batch.views))
        return F.one_hot(data.labels[batch.indices], 4).float()

    models = [build("tiny_cnn", 4, 1, seed=seed) for seed in (0, 1, 2)]
    recipes = [replace(RECIPE, epochs=1, seed=seed) for seed in (0, 1, 2)]
    targets = [None, labels_as_logits, labels_as_logits]
    quiet_train_many(models, data, [without, with_targets, with_targets], recipes, targets=targets)
    own = [seen.pop(2), seen.pop(2)]  # in the first step, each network's own loss is looked at as well
    assert [(kind, tuple(shape)) for kind, shape, _ in own] == [("with", (16, 4))] * 2
    assert [kind for kind, *_ in seen] == ["without", "with"] * 3
    assert {(kind, tuple(shape), len(labels)) for kind, shape, labels in seen} == {
        ("without", (16, 4), 16),
        ("with", (32, 4), 32),  # two networks, a batch each
    }


def between_images(student_logits, labels):
    """A loss that compares each image with the batch's mean."""
    return F.cross_entropy(student_logits - student_logits.mean(0), labels)


def test_a_loss_that_is_no_mean_over_images_is_refused(image_set):
    data, recipes = image_set(), [replace(RECIPE, seed=seed) for seed in (0, 1)]
    models = [build("perceptron", 4, 1, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"the loss of 2 networks together is .* if the loss compares the images"):
        quiet_train_many(models, data, [between_images] * 2, recipes)
    quiet_train_many(models[:1], data, [between_images], recipes[:1])


def test_views_that_are_blends_are_refused(image_set):
    data = image_set()
    data.__dict__["views"] = SeededViews(8, mixup=True)
    models = [build("perceptron", 4, 1, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="toy/train has mixup among its views, whose labels are blends"):
        quiet_train_many(models, data, [F.cross_entropy] * 2, [RECIPE] * 2)


def test_without_bfloat16_it_trains_in_float32(image_set, monkeypatch):
    data = image_set()

    def trained() -> dict:
        models = [build("digits_cnn", 4, 1, seed=seed) for seed in (0, 1)]
        tiny = partial(scaled_cross_entropy, scale=1e-9)  # gradients below the smallest number of float16
        recipes = [replace(RECIPE, weight_decay=0.0, learning_rate=1e7, seed=seed) for seed in (0, 1)]
        quiet_train_many(models, data, [tiny, tiny], recipes)
        return models[1].state_dict()

    wanted = trained()
    assert not torch.equal(wanted["classifier.weight"], build("digits_cnn", 4, 1, seed=1).classifier.weight)
    monkeypatch.setattr(gpu, "half_precision", lambda device: torch.float16)
    monkeypatch.setattr(gpu, "mixed_precision", lambda device: torch.autocast(device.type, torch.float16))
    found = trained()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


class Double(nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(64, 4))
        self.double()

    def forward(self, images):
        return super().forward(images.double())


def test_float64_stays_float64(image_set):
    data, recipes = image_set(), [replace(RECIPE, seed=seed) for seed in (0, 1)]
    together = [Double(seed) for seed in (0, 1)]
    quiet_train_many(together, data, [F.cross_entropy] * 2, recipes)
    for model, recipe in zip(together, recipes, strict=True):
        alone = Double(recipe.seed)
        train(alone, data, F.cross_entropy, recipe, progress=False)
        torch.testing.assert_close(model[1].weight, alone[1].weight, rtol=1e-12, atol=1e-14)


def scaled_cross_entropy(student_logits, labels, *, scale):
    return scale * F.cross_entropy(student_logits, labels)


def test_the_network_that_diverged_is_named(image_set):
    models = [build("tiny_cnn", 4, 1, seed=seed) for seed in (0, 1)]
    recipes = [replace(RECIPE, epochs=1), replace(RECIPE, epochs=1, learning_rate=1e30)]
    with pytest.raises(FloatingPointError, match=r"networks \[1\] stopped being finite in epoch 1: .*1e\+30"):
        quiet_train_many(models, image_set(), [F.cross_entropy] * 2, recipes)


def test_a_checkpoint_of_another_program_is_refused_and_one_of_this_is_where_it_goes_on(
    image_set, toy_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.import_module("kdlib.records.checkpoint"), "CHECKPOINT_SECONDS", 0)
    data, path = image_set(), tmp_path / "program.partial"
    targets = [None, soft_labels(toy_teacher(data), data), None]
    loss_fns = [F.cross_entropy, DISTIL, F.cross_entropy]
    recipes = [replace(RECIPE, epochs=4, seed=seed) for seed in (0, 1, 1)]

    def go(seed=0, **more):
        models = [build("digits_cnn", 4, 1, seed=recipe.seed + seed) for recipe in recipes]
        histories = quiet_train_many(models, data, loss_fns, recipes, targets=targets, **more)
        return [model.state_dict() for model in models], [history.loss for history in histories]

    drawn, draw = [], batched.draw_epoch

    def stop(*args, **more):
        drawn.append(more["generator"])
        if len(drawn) > 2 * 2:  # of two seeds each, in the third epoch
            raise KeyboardInterrupt
        return draw(*args, **more)

    wanted, losses = go()
    with monkeypatch.context() as patched:
        patched.setattr(batched, "draw_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            go(checkpoint=path)
    with pytest.raises(ValueError, match=r"program\.partial is not a checkpoint of this run \(.*other first weights"):
        go(checkpoint=path, seed=1)
    found, found_losses = go(checkpoint=path)
    assert found_losses == losses
    for own, whole in zip(found, wanted, strict=True):
        assert all(torch.equal(own[name], tensor) for name, tensor in whole.items())


class Tanh(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 4), nn.Tanh())


class ReLU(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 4), nn.ReLU())


@pytest.mark.parametrize(
    ("models", "recipes", "message"),
    [
        (["tiny_cnn"], [RECIPE, RECIPE], "1 models, 2 loss_fns, 2 recipes"),
        ([], [], "0 models"),
        (["tiny_cnn", "digits_cnn"], [RECIPE, RECIPE], r"models \[1\] are of another architecture"),
        ([Tanh, ReLU], [RECIPE, RECIPE], r"models \[1\] are of another architecture"),  # of equal shapes
        (["tiny_cnn"] * 2, [RECIPE, replace(RECIPE, epochs=9)], r"recipes \[1\] differ from the first in more than"),
        (["tiny_cnn"], [replace(RECIPE, cutout=2)], "cutout is 2"),
        (["tiny_cnn"], [replace(RECIPE, mixup=1.0)], "mixup is 1.0"),
        (["tiny_cnn"], [replace(RECIPE, views=400)], "views is 400: expected at most"),
    ],
)
def test_what_does_not_fit_is_refused(image_set, models, recipes, message):
    models = [build(network, 4, 1) if isinstance(network, str) else network() for network in models]
    with pytest.raises(ValueError, match=message):
        quiet_train_many(models, image_set(), [F.cross_entropy] * len(recipes), recipes)


def test_targets_are_one_per_model(image_set):
    models = [build("tiny_cnn", 4, 1) for _ in range(2)]
    with pytest.raises(ValueError, match="2 models, 2 loss_fns, 2 recipes, 1 targets"):
        quiet_train_many(models, image_set(), [F.cross_entropy] * 2, [RECIPE] * 2, targets=[None])


def test_soft_labels_are_checked_first(image_set, toy_teacher):
    other = image_set(seed=1)
    foreign = soft_labels(toy_teacher(other), other)
    with pytest.raises(ValueError, match="the soft labels are of"):
        quiet_train_many([build("tiny_cnn", 4, 1)], image_set(), [DISTIL], [RECIPE], targets=[foreign])
