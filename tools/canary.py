"""The canary: figures that stand for everything that the book computes, in a few CPU seconds; see stale.py.

It goes through views, augmentation, splits, every network, the losses, training, soft labels, likelihood and intervals,
on data made here, and prints its figures as JSON by topic: a module of kdlib, or a network. All is in float64, and
nothing in it jumps: no argmax over what a network computed, no calibration bins of it, no half precision. So rounding,
another version of PyTorch or another number of threads changes the figures by far less than the 1e-6 at which they are
compared, and a changed method by far more.

A figure keeps its name only as long as it is computed in the same way: pages carry what it was when they were run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdlib
from kdlib import datasets, evaluate, lab, models
from kdlib.data import Batch, ImageSet, batches, cutout, mixup

Figures = Iterator[tuple[str, list[float]]]
SETTINGS = [(1.0, 0.5, None), (4.0, 0.1, None), (2.0, 0.3, 2.0), (20.0, 0.0, 1.0)]  # temperature, alpha, beta


def sketch(*tensors: Tensor) -> list[float]:
    """Two numbers for tensors: their norm, and their product with fixed weights, by which an element's place counts."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    weights = torch.cos(torch.arange(1.0, 998.0)).repeat(len(flat) // 997 + 1)[: len(flat)]
    return [flat.norm().item(), (flat @ weights).item()]


def made_up(
    count: int, size: int = 8, channels: int = 3, classes: int = 4, padding: int = 1, flip: bool = True
) -> ImageSet:
    """Images of noise, the same everywhere."""
    random = np.random.RandomState(count)
    return ImageSet(
        name="made up",
        images=torch.from_numpy(random.randint(0, 256, (count, size, size, channels)).astype(np.uint8)),
        labels=torch.from_numpy(random.permutation(np.arange(count) % classes)),
        class_names=tuple("abcdefghij"[:classes]),
        mean=(0.3, 0.4, 0.5)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        padding=padding,
        flip=flip,
    )


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same everywhere."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def small_network(data: ImageSet, seed: int = 0) -> nn.Module:
    """A network for what is not about networks: convolution, batch norm and a linear layer."""
    torch.manual_seed(seed)
    size = data.images.shape[1]
    convolution = nn.Conv2d(data.channels, 4, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * size**2, data.classes))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def views() -> Figures:
    """Views of images, the batches of an epoch, and augmentation."""
    for padding, flip in ((2, True), (1, False)):
        data = made_up(3, padding=padding, flip=flip)
        every = torch.arange(len(data.view_table))
        yield f"views, padding {padding}", sketch(*[data.pixels(torch.full_like(every, i), every) for i in range(3)])
        yield f"view table, padding {padding}", sketch(data.view_table)
    data = made_up(20)
    yield "normalised images", sketch(data.batch(torch.arange(20), torch.arange(20) % len(data.view_table)))
    epochs = [batch for views in (1, 5, None) for batch in batches(data, 6, views=views, generator=generator())]
    for part in Batch._fields:
        yield f"batches, {part}", sketch(*[getattr(batch, part) for batch in epochs])
    batch = epochs[0]
    yield "cutout", sketch(cutout(batch.images, 5, generator()))
    for strength in (0.2, 1.0):
        mixed = mixup(batch, strength, data.classes, generator())
        yield f"mixup {strength}", sketch(mixed.images, mixed.labels)


def splits() -> Figures:
    """How data sets are split and viewed: the digits, which scikit-learn has, and files made here for the others."""
    random = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, KDLIB_DATA=folder):
        made_here = {name: 2600 for name in sorted(datasets.DATA_SETS) if name != "digits"}
        # the first is read no more: it is drawn so that the others stay what they are in older stamps
        for name, count in {"made_up": 83, **made_here}.items():
            arrays = {"class_names": np.array(list("abcd"))}
            for part, images in {"train": count, "test": 21}.items():
                arrays[f"{part}_images"] = random.randint(0, 256, (images, 8, 8, 1), np.uint8)
                arrays[f"{part}_labels"] = random.choice(4, images, p=[0.4, 0.3, 0.2, 0.1])
            np.savez(Path(folder) / f"{name}.npz", **arrays)
        cases = {name: kdlib.load_data(name) for name in datasets.DATA_SETS}
        cases["at most 20"] = kdlib.load_data("digits", limit=20)
    for case, data in cases.items():
        yield f"views and scale, {case}", [data.train.padding, data.train.flip, *data.train.mean, *data.train.std]
        yield f"split, {case}", [number for split in data for number in sketch(split.images) + sketch(split.labels)]


def losses() -> Figures:
    """Values and gradients of the losses."""
    student, teacher = 3 * numbers(6, 4, seed=1), 5 * numbers(6, 4, seed=2)
    classes, shares = torch.tensor([0, 1, 2, 3, 3, 0]), numbers(6, 4, seed=3).softmax(1)

    def value_and_gradient(loss_fn, *targets: Tensor | None, student: Tensor = student) -> list[float]:
        logits = student.clone().requires_grad_()
        loss = loss_fn(logits, *targets)
        return [loss.item(), *sketch(torch.autograd.grad(loss, logits)[0])]

    for kind, labels in (("classes", classes), ("shares", shares)):
        yield f"cross-entropy, {kind}", value_and_gradient(F.cross_entropy, labels)
        smoothed = partial(F.cross_entropy, label_smoothing=0.1)
        yield f"label smoothing, {kind}", value_and_gradient(smoothed, labels)
        for t, alpha, beta in SETTINGS:
            loss_fn = partial(kdlib.distillation_loss, temperature=t, alpha=alpha, beta=beta)
            yield f"distillation, {kind}, T {t:g}", value_and_gradient(loss_fn, teacher, labels)
    without = partial(kdlib.distillation_loss, temperature=3.0, alpha=0.0)
    masked = [logits.masked_fill(torch.arange(4) == 1, -torch.inf) for logits in (student, teacher, shares.log())]
    yield "distillation, the teacher's class masked", value_and_gradient(without, masked[1], classes)
    both = partial(kdlib.distillation_loss, temperature=3.0, alpha=0.5)
    yield "distillation, a class masked", value_and_gradient(both, masked[1], masked[2].softmax(1), student=masked[0])
    yield "distillation without labels", value_and_gradient(without, teacher, None)
    yield "distillation terms", [t.item() for t in kdlib.distillation_terms(student, teacher, classes, temperature=4.0)]


def training() -> Figures:
    """A few steps of training, with every kind of loss, targets and augmentation: how far the weights have come."""
    data = made_up(20)
    recipe = kdlib.Recipe(epochs=2, batch_size=6, learning_rate=0.05, weight_decay=1e-2, warmup=0.3)
    yield "learning rates", [recipe.learning_rate_at(share) for share in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]
    distillation = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.1)
    saved = kdlib.SoftLabels(2 * numbers(len(data.view_table), 20, 4), data.identity)
    live = kdlib.LiveTeacher(small_network(data, seed=1).eval())
    cases = {
        "labels": (F.cross_entropy, recipe, None),
        "plain SGD": (F.cross_entropy, replace(recipe, momentum=0.0, views=1, warmup=0.0, seed=1), None),
        "cutout and mixup": (partial(F.cross_entropy, label_smoothing=0.1), replace(recipe, cutout=4, mixup=0.5), None),
        "soft labels": (distillation, recipe, saved),
        "live teacher": (distillation, replace(recipe, cutout=4), live),
        "a function's targets": (distillation, recipe, lambda batch: batch.images.flatten(1)[:, :4]),
    }
    for case, (loss_fn, own, targets) in cases.items():
        model = small_network(data)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        history = kdlib.train(model, data, loss_fn, own, targets=targets, device="cpu", progress=False)
        yield f"steps, {case}", sketch(*[b - a for a, b in zip(before, model.parameters(), strict=True)])
        yield f"losses, {case}", history.loss


def targets() -> Figures:
    """Soft labels as they are looked up and generated, and a live teacher's."""
    data = made_up(10)
    logits = numbers(len(data.view_table), 10, 4)
    images, views = torch.arange(10), torch.arange(10) % len(data.view_table)
    batch = Batch(data.batch(images, views), data.labels, images, views)
    yield "soft labels, looked up", sketch(kdlib.SoftLabels(logits, data.identity)(batch))
    yield "soft labels, live", sketch(kdlib.LiveTeacher(small_network(data).eval())(batch))

    class Whole(nn.Module):  # logits that are small whole numbers, which half precision holds exactly
        def forward(self, images: Tensor) -> Tensor:
            pixels = images * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
            return (pixels * 255).round().flatten(2)[:, :, ::21].flatten(1)[:, :4]

    generated = kdlib.generate(Whole(), data, 5, device="cpu", progress=False)
    yield "soft labels, generated", sketch(torch.from_numpy(generated))


def measures() -> Figures:
    """Likelihood, intervals and, of logits typed here, which no rounding tips over, what is counted."""
    logits, labels = 2 * numbers(60, 4), torch.from_numpy(np.random.RandomState(1).randint(0, 4, 60))
    temperature = evaluate.fit_temperature(logits, labels)
    yield "likelihood", [evaluate.scores(logits, labels).nll]
    yield "likelihood, temperature fitted", [evaluate.scores(logits / temperature, labels).nll]
    yield "bootstrap interval", list(evaluate.paired_interval(numbers(200).numpy()))
    i = torch.arange(66)
    confidence = ((4 + i % 11 + (2 + 3 * (i % 3)) / 10) / 15)[:, None]  # 0.2, 0.5 or 0.8 into one of fifteen bins
    typed = torch.where(F.one_hot(i % 4, 4) == 1, confidence, (1 - confidence) / 3).log()
    result = evaluate.scores(typed, (i + (i % 7 > 3)) % 4)
    yield "counts", [result.accuracy, result.ece, evaluate.agreement(typed, typed[:, [0, 1, 3, 2]])]
    data = made_up(10)
    yield "predicted logits", sketch(evaluate.predict_logits(small_network(data), data, view=3, device="cpu"))


def many_networks() -> Figures:
    """Networks that are trained as one batched program, with other losses, targets, rates and seeds."""
    data = made_up(20)
    recipe = kdlib.Recipe(epochs=2, batch_size=6, learning_rate=0.05)
    recipes = [recipe, replace(recipe, learning_rate=0.1, weight_decay=1e-2), replace(recipe, seed=1)]
    models = [kdlib.build("perceptron", data.classes, data.channels, seed=seed) for seed in range(3)]
    saved = kdlib.SoftLabels(2 * numbers(len(data.view_table), 20, 4), data.identity)
    distillation = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.1)
    before = [parameter.detach().clone() for model in models for parameter in model.parameters()]
    loss_fns, soft_labels = [F.cross_entropy, distillation, distillation], [None, saved, saved]
    histories = lab.train_many(models, data, loss_fns, recipes, targets=soft_labels, device="cpu", progress=False)
    after = [parameter for model in models for parameter in model.parameters()]
    yield "steps, many networks", sketch(*[b - a for a, b in zip(before, after, strict=True)])
    yield "losses, many networks", [loss for history in histories for loss in history.loss]


def setups() -> Figures:
    """Networks trained and measured over a row store."""
    data, images = made_up(20), made_up(11)
    recipe = kdlib.Recipe(epochs=1, batch_size=6, learning_rate=0.05)
    cases = {"alone": lab.TrainingSetup("perceptron", data, F.cross_entropy, recipe)}
    with tempfile.TemporaryDirectory() as folder:
        store = lab.RowStore(Path(folder) / "made_up.json")
        rows = lab.train_setups(store, cases, (0, 1), {"validation": images, "test": data})["alone"]
    yield "rows", [row[name] for row in rows for name in ("nll", "validation nll")]


def comparisons() -> Figures:
    """Weighted sums of cases over seeds and images, with their intervals, and the verdicts on claims."""
    random = np.random.RandomState(0)
    correct = {(case, seed): random.rand(50) < share for case, share in (("a", 0.9), ("b", 0.6)) for seed in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        store = lab.RowStore(Path(folder) / "made_up.json")
        for case in "ab":
            store.measure(case, range(4), lambda seed, case=case: {"accuracy": correct[case, seed]}, made_from={})
        rows = store.finish()
    for name, weights in {"a - b": {"a": 1, "b": -1}, "a": {"a": 1}, "b - a / 2": {"a": -0.5, "b": 1}}.items():
        found = lab.estimate(rows, ("accuracy", weights))
        yield f"estimate of {name}", [found.mean, found.half, found.n, found.error, found.freedom]
    yield "interval over seeds alone", [lab.interval(numbers(5, 1).numpy()).half]
    wanted = {"more": (1, 0.0), "much more": (1, 0.2), "less": (-1, 0.1), "the same": (0, 0.5), "much alike": (0, 0.1)}
    asked = {name: (lab.compare("accuracy", "a", "b", sign=s, margin=m),) for name, (s, m) in wanted.items()}
    for name, compared in (asked | {"two": asked["more"] + asked["much more"]}).items():
        judgement = lab.judge(lab.Claim(name, "", compared), rows)
        numbers_shown = [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", judgement.figure)]
        yield f"judgement, {name}", [*numbers_shown, lab.VERDICTS.index(judgement.verdict), *judgement.contradicted]


def network(name: str) -> Figures:
    """Logits, the loss's gradient, and two training steps of one of our networks."""
    data = made_up(4, size=28 if name in ("lenet", "mlp100") else 12)  # those two take MNIST's images only
    model = kdlib.build(name, data.classes, data.channels)
    images = data.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    yield f"{name}, logits", sketch(model.eval()(images))
    torch.manual_seed(0)  # for dropout
    gradient = torch.autograd.grad(F.cross_entropy(model.train()(images), data.labels), list(model.parameters()))
    yield f"{name}, gradient", sketch(*gradient)
    recipe = kdlib.Recipe(epochs=2, batch_size=4, learning_rate=0.01)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    kdlib.train(model, data, F.cross_entropy, recipe, device="cpu", progress=False)
    yield f"{name}, two steps", sketch(*[b - a for a, b in zip(before, model.parameters(), strict=True)])


TOPICS = {  # the figures that stand for each module, and for each network
    "data": views,
    "datasets": splits,
    "losses": losses,
    "train": training,
    "soft_labels": targets,
    "evaluate": measures,
    "lab.batched": many_networks,
    "lab.training": setups,
    "lab.claims": comparisons,
    **{f"models {name}": partial(network, name) for name in models.NETWORKS},
}


def figures(*topics: str) -> dict[str, dict[str, list[float]]]:
    """The figures of these topics, or of all, to twelve digits. It leaves PyTorch in float64."""
    torch.set_default_dtype(torch.float64)
    return {
        topic: {name: [float(f"{x:.12g}") for x in figure] for name, figure in TOPICS[topic]()}
        for topic in topics or TOPICS
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topics", nargs="*", default=[], metavar="topic", help="such as data; all if none is given")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(figures(*options.topics)))


if __name__ == "__main__":
    main()
