"""The checklist: every mistake that it knows is named, and what is right is passed over."""

import copy
import re
from dataclasses import replace
from functools import partial

import larger
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images
from torch import nn

import kdlib
from kdlib.checks.objective import look_at_loss
from kdlib.data import Data
from kdlib.scale import SeededViews, StreamedImages, compress
from kdlib.scale.stream_cache import cache_images

T, ALPHA = 4.0, 0.1


def right(z, v, y, *, temperature=T, alpha=ALPHA):
    """The distillation loss as a reader may write it."""
    soft = F.kl_div((z / temperature).log_softmax(1), (v.detach() / temperature).softmax(1), reduction="batchmean")
    return alpha * F.cross_entropy(z, y) + (1 - alpha) * temperature**2 * soft


def wrong(change):
    """The same with one mistake, and its keywords bound."""

    def loss(z, v, y, *, temperature, alpha):
        return change(z, v, y, temperature, alpha)

    return partial(loss, temperature=T, alpha=ALPHA)


def soft(z, v, t, reduction="batchmean"):
    return F.kl_div((z / t).log_softmax(1), (v.detach() / t).softmax(1), reduction=reduction)


MISTAKES = {
    "no T²": (lambda z, v, y, t, a: a * F.cross_entropy(z, y) + (1 - a) * soft(z, v, t), "the factor T² is missing"),
    "reduction mean": (
        lambda z, v, y, t, a: a * F.cross_entropy(z, y) + (1 - a) * t**2 * soft(z, v, t, "mean"),
        "its mean is over images and classes",
    ),
    "neither": (lambda z, v, y, t, a: (1 - a) * soft(z, v, t, "mean"), "T² is missing, and its mean is over images"),
    "a sum": (lambda z, v, y, t, a: (1 - a) * t**2 * soft(z, v, t, "sum"), "it is summed over the batch"),
    "the weights exchanged": (lambda z, v, y, t, a: a * t**2 * soft(z, v, t), "0.1 times .* where its weight is 0.9"),
    "the other way round": (
        lambda z, v, y, t, a: t**2 * soft(v, z, t) + 0 * soft(z, v, t),
        "the teacher's logits change nothing",
    ),
    "reversed": (
        lambda z, v, y, t, a: F.kl_div(
            (v / t).log_softmax(1), (z / t).log_softmax(1), reduction="batchmean", log_target=True
        ),
        "it is that of KL\\(student \\|\\| teacher\\), the other way round",
    ),
    "softmax twice": (lambda z, v, y, t, a: t**2 * soft(z, v.softmax(1), t), "softmax applied twice to the teacher"),
    "the student not softened": (
        lambda z, v, y, t, a: F.kl_div(z.log_softmax(1), (v / t).softmax(1), reduction="batchmean"),
        "is T applied to both alike",
    ),
    "the teacher not used": (lambda z, v, y, t, a: F.cross_entropy(z, y), "the teacher's logits change nothing"),
    "no scalar": (lambda z, v, y, t, a: F.cross_entropy(z, y, reduction="none") * v[:, 0], r"it is a tensor \(8,\)"),
    "a gradient for the teacher": (
        lambda z, v, y, t, a: (
            (1 - a) * t**2 * F.kl_div((z / t).log_softmax(1), (v / t).softmax(1), reduction="batchmean")
        ),
        "a gradient flows into the teacher's logits: detach them",
    ),
    "a broken one": (lambda z, v, y, t, a: z @ v, "it fails on"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_loss_is_named(change, message):
    odd = [text for text, is_odd in look_at_loss(wrong(change), 5) if is_odd]
    assert any(re.search(message, text) for text in odd), odd


@pytest.mark.parametrize(
    "loss_fn",
    [
        right,
        partial(right, temperature=2.0, alpha=0.5),
        partial(kdlib.distillation_loss, temperature=20.0, alpha=0.1),
        partial(kdlib.distillation_loss, temperature=1.0, alpha=0.5, beta=2.0),
        partial(kdlib.distillation_loss, temperature=3.0, alpha=0),
        lambda z, v, y: kdlib.distillation_loss(z, v, y, temperature=2.0, alpha=0.1),
        partial(lambda z, v, y, T: kdlib.distillation_loss(z, v, y, temperature=T, alpha=0.3), T=8.0),
    ],
)
def test_a_right_loss_is_passed_over(loss_fn):
    assert [text for text, odd in look_at_loss(loss_fn, 5) if odd] == []


# --- everything else -------------------------------------------------------------------------------------------------


def network(classes=4, width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


class Pair(nn.Module):
    """A network that returns a tuple, which kdlib's loop does not take."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x), None


@pytest.fixture(scope="module")
def parts():
    """A data set, a trained teacher, a student, soft labels, a loss and a recipe that fit together."""
    train, validation, test = (make_images(48, seed=s, name=f"toy/{n}") for s, n in enumerate(Data._fields))
    teacher = network(width=64)
    recipe = kdlib.Recipe(epochs=40, batch_size=12, learning_rate=0.05)
    kdlib.train(teacher, train, F.cross_entropy, recipe, progress=False, device="cpu")
    return {
        "data": Data(train, validation, test),
        "teacher": teacher.eval(),
        "student": network(),
        "targets": kdlib.LiveTeacher(teacher),
        "loss_fn": partial(kdlib.distillation_loss, temperature=T, alpha=ALPHA),
        "recipe": recipe,
    }


def odd(parts, capsys, **changes) -> list[str]:
    given = parts | changes
    before = [weight.clone() for net in (given["teacher"], given["student"]) for weight in net.state_dict().values()]
    modes = given["teacher"].training, given["student"].training
    findings = kdlib.preflight(given.pop("data"), **given)
    after = [weight for net in (given["teacher"], given["student"]) for weight in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (given["teacher"].training, given["student"].training) == modes
    printed = capsys.readouterr().out
    assert all(str(finding) in printed for finding in findings)
    return [f"{finding.about}: {finding.text}" for finding in findings if finding.odd]


def test_what_fits_together_looks_right(parts, capsys):
    assert odd(parts, capsys) == []
    logits = torch.from_numpy(kdlib.generate(parts["teacher"], parts["data"].train, 9, progress=False))
    stored = kdlib.SoftLabels(logits, parts["data"].train.identity)
    assert odd(parts, capsys, targets=stored) == []
    assert odd(parts, capsys, targets=compress(stored, 2)) == []
    (other,) = odd(parts, capsys, targets=compress(replace(stored, data="toy/other 0"), 2))
    assert "the soft labels are of toy/other 0" in other


def test_images_that_stay_on_the_disk_are_looked_at_as_far_as_they_are_known(tmp_path, capsys):
    source = larger.Drawn(40)
    labels, names = torch.from_numpy(source.labels), source.class_names
    shared = {"labels": labels, "class_names": names, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    kept = cache_images(source, tmp_path / "drawn.npy", 32, progress=False)
    data = StreamedImages("drawn/train", kept, **shared, views=SeededViews(larger.VIEW))
    recipe = kdlib.Recipe(epochs=1, batch_size=20, learning_rate=0.01)
    kdlib.preflight(data, student=larger.small(10), loss_fn=F.cross_entropy, recipe=recipe)
    said = capsys.readouterr().out
    assert "the images lie on a disk: not looked at for copies" in said
    assert "in 30 steps on one batch the loss goes from" in said
    assert "there is one view per image" not in said


def test_a_teacher_without_targets_is_a_live_one(parts, capsys):
    assert odd({**parts, "targets": None}, capsys) == []


def test_modes_within_a_teacher_are_noticed_and_left(parts, capsys):
    mixed = nn.Sequential(*copy.deepcopy(parts["teacher"]), nn.Dropout(0.5)).eval()
    mixed[4].train()
    check(parts, capsys, "teacher: it is in train mode", teacher=mixed)
    assert [module.training for module in mixed] == [False] * 4 + [True]


def test_without_labels_nothing_is_said_of_agreement(parts, capsys):
    train, validation, test = parts["data"]
    bare = replace(train, labels=torch.full_like(train.labels, -1))
    findings = kdlib.preflight(bare, teacher=parts["teacher"])
    assert "too few labels" in str(findings)
    assert "agree with" not in str(findings)
    wrong = network(width=64).eval()  # untrained: compared on the validation images, which have labels
    findings = kdlib.preflight(Data(bare, validation, test), teacher=wrong)
    assert any("the teacher agrees with" in finding.text for finding in findings if finding.odd)


def test_it_says_how_many_things_look_odd(parts, capsys):
    findings = kdlib.preflight(**parts)
    assert capsys.readouterr().out.splitlines()[-1] == f"0 of {len(findings)} look odd"


def check(parts, capsys, expected, **changes):
    found = odd(parts, capsys, **changes)
    assert len(found) == 1, found
    assert expected in found[0]


def test_mistakes_of_teacher_and_targets_are_named(parts, capsys):
    data, teacher = parts["data"], parts["teacher"]
    dropped = nn.Sequential(*copy.deepcopy(teacher), nn.Dropout(0.5)).train()
    check(parts, capsys, "teacher: it is in train mode", teacher=dropped)
    check(parts, capsys, "teacher: it is in train mode", teacher=dropped, targets=kdlib.LiveTeacher(dropped))
    swapped = network(width=64)
    swapped.load_state_dict(teacher.state_dict())
    swapped[3].weight.data, swapped[3].bias.data = swapped[3].weight[[1, 0, 2, 3]], swapped[3].bias[[1, 0, 2, 3]]
    check(parts, capsys, "In another order of the classes it would agree", teacher=swapped.eval())
    other = kdlib.SoftLabels(torch.zeros(9, 48, 4).half(), "other images")
    check(parts, capsys, "the soft labels are of other images", targets=other)
    few = kdlib.SoftLabels(
        torch.from_numpy(kdlib.generate(teacher, data.train, 1, progress=False)), data.train.identity
    )
    check(parts, capsys, "the student would see 9 views, the soft labels hold 1", targets=few)
    mixed = replace(parts["recipe"], mixup=0.2)
    many = kdlib.SoftLabels(
        torch.from_numpy(kdlib.generate(teacher, data.train, 9, progress=False)), data.train.identity
    )
    check(parts, capsys, "hold plain views, and the recipe has cutout or mixup", targets=many, recipe=mixed)


def test_mistakes_of_student_and_optimizer_are_named(parts, capsys):
    student, teacher = parts["student"], parts["teacher"]
    check(parts, capsys, "student: the network Sequential returns (1, 10) for one image", student=network(10))
    check(parts, capsys, "the teacher has 4,420", student=network(width=200))
    assert odd(parts, capsys, student=network(width=64)) == []  # self-distillation
    small = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    check(parts, capsys, "student: the network Sequential fails on one image of 8x8", student=small)
    check(parts, capsys, "returns a tuple for one image", student=Pair())
    check(parts, capsys, "lower it", recipe=replace(parts["recipe"], learning_rate=0.4))
    check(parts, capsys, "raise the learning rate", recipe=replace(parts["recipe"], learning_rate=1e-6))
    weights = [*student.parameters(), *teacher.parameters()]
    check(parts, capsys, "it holds 4 tensors of the teacher", optimizer=torch.optim.SGD(weights, lr=0.1))
    some = torch.optim.SGD(student[3].parameters(), lr=0.1)
    check(parts, capsys, "it lacks 1.weight of the student", optimizer=some)
    check(parts, capsys, "3 steps", recipe=replace(parts["recipe"], epochs=1, batch_size=16))
    check(parts, capsys, "first steps", recipe=replace(parts["recipe"], learning_rate=1e6))


def test_odd_data_is_named(parts, capsys):
    train, validation, test = parts["data"]
    leak = replace(test, images=torch.cat([test.images[1:], train.images[:1]]))
    check(parts, capsys, "data: 1 test image is among the training images too", data=Data(train, validation, leak))
    keep = (train.labels != 2) | (torch.arange(48) < 8)
    rare = replace(train, images=train.images[keep], labels=train.labels[keep])
    assert any(
        "'class 2' has fewer than 10 train images" in text
        for text in odd(parts, capsys, data=Data(rare, validation, test))
    )
    blank = replace(test, images=test.images.clone())
    blank.images[3] = 7
    check(parts, capsys, "1 test image is of one colour", data=Data(train, validation, blank))
