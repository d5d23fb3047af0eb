"""A teacher from elsewhere: weights, normalisation, size, classes and outputs; and what is said of one that errs."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib.data import ImageSet
from kdlib.sources.teachers import adapt_teacher
from kdlib.sources.weights import weights_for

NAMES = ("bee", "cat", "dog", "emu")


def brightness(classes: int = 4, channels: int = 3) -> ImageSet:
    """Plain grey images whose brightness tells the class: 40, 90, 140, 190."""
    labels = torch.arange(60) % classes
    images = (40 + 50 * labels)[:, None, None, None].expand(60, 6, 6, channels).to(torch.uint8)
    return ImageSet("own/train", images, labels, NAMES[:classes], (0.3,) * channels, (0.2,) * channels)


class Nearest(nn.Module):
    """Logits for 40, 90, 140, 190 of pixels that were normalised with its own mean and deviation."""

    def __init__(self, mean=0.5, std=0.25, shades=(40, 90, 140, 190)):
        super().__init__()
        self.mean, self.std = mean, std
        self.shades = nn.Parameter(torch.tensor([float(shade) for shade in shades]))

    def forward(self, x):
        shade = 255 * (x * self.std + self.mean).mean((1, 2, 3))
        return -(((shade[:, None] - self.shades) / 20) ** 2)


OWN = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def agreement(teacher, data) -> float:
    return (kdlib.predict_logits(teacher, data).argmax(1) == data.labels).double().mean().item()


# --- adapting --------------------------------------------------------------------------------------------------------


def test_the_students_normalisation_is_undone_before_the_teachers_is_applied():
    data = brightness()
    teacher = adapt_teacher(Nearest(), data, **OWN)
    assert agreement(teacher, data) == 1
    pixels = data.images.permute(0, 3, 1, 2) / 255
    indices = torch.arange(len(data))
    torch.testing.assert_close(teacher(data.batch(indices, 0 * indices)), Nearest()((pixels - 0.5) / 0.25))


def test_grey_images_are_shown_to_a_teacher_of_colour_in_three_channels():
    class Colour(Nearest):
        def forward(self, x):
            assert x.shape[1] == 3
            return super().forward(x)

    data = brightness(channels=1)
    assert agreement(adapt_teacher(Colour(), data, **OWN), data) == 1


def test_the_teacher_gets_images_of_its_size():
    class Large(Nearest):
        def forward(self, x):
            assert x.shape[2:] == (32, 32)
            return super().forward(x)

    assert agreement(adapt_teacher(Large(), brightness(), size=32, **OWN), brightness()) == 1


@pytest.mark.parametrize(
    "classes",
    [("dog", "bee", "fox", "emu", "cat"), {"dog": 0, "bee": 1, "emu": 3, "cat": 4}],
    ids=["names", "numbers"],
)
def test_its_classes_may_have_another_order_and_be_more(classes):
    data, network = brightness(), Nearest(shades=(140, 40, 250, 190, 90))
    assert agreement(adapt_teacher(network, data, classes=classes, **OWN), data) == 1


OUTPUTS = {
    "a tuple": lambda z: (z, torch.zeros(3)),
    "a dict": lambda z: {"loss": None, "logits": z},
    "out": lambda z: {"out": z},
    "an object": lambda z: SimpleNamespace(logits=z),
    "a map of one pixel": lambda z: z[:, :, None, None],
    "half precision": lambda z: z.half(),
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_logits_are_found_in_what_the_network_returns(wrap):
    class Wrapped(Nearest):
        def forward(self, x):
            return wrap(super().forward(x))

    assert agreement(adapt_teacher(Wrapped(), brightness(), **OWN), brightness()) == 1


def test_what_a_plain_teacher_returns_is_unwrapped_too():
    class Wrapped(Nearest):
        def forward(self, x):
            return {"logits": super().forward(x)}

    data = replace(brightness(), mean=(0.5,) * 3, std=(0.25,) * 3)
    made = kdlib.generate(Wrapped(), data, 1, progress=False)
    assert (torch.from_numpy(made[0]).argmax(1) == data.labels).all()


def test_probabilities_become_logits_and_one_logit_is_that_of_the_second_class():
    class Probabilities(Nearest):
        def forward(self, x):
            return super().forward(x).softmax(1)

    data = brightness()
    indices = torch.arange(len(data))
    batch = data.batch(indices, 0 * indices)
    made = adapt_teacher(Probabilities(), data, outputs="probabilities", **OWN)(batch)
    torch.testing.assert_close(made, adapt_teacher(Nearest(), data, **OWN)(batch).log_softmax(1).clamp(min=-18.4207))

    class Single(Nearest):
        def forward(self, x):
            logits = super().forward(x)
            return logits[:, 1] - logits[:, 0]

    two = brightness(classes=2)
    batch = two.batch(indices, 0 * indices)
    expected = Nearest(shades=(40, 90))
    made = adapt_teacher(Single(shades=(40, 90)), two, **OWN)(batch).softmax(1)
    torch.testing.assert_close(made, adapt_teacher(expected, two, **OWN)(batch).softmax(1))


def test_every_setting_is_part_of_what_the_teacher_is():
    data = brightness()
    options = [{}, {"size": 8}, {"classes": ("bee", "dog", "cat", "emu")}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        teachers = [adapt_teacher(Nearest(), data, **{**OWN, **more}) for more in options]
        teachers.append(adapt_teacher(Nearest(), data, mean=(0.4,) * 3, std=(0.25,) * 3))
    identities = [str(kdlib.LiveTeacher(teacher).identity) for teacher in teachers]
    assert len(set(identities)) == len(identities)
    assert str(kdlib.LiveTeacher(adapt_teacher(Nearest(), data, **OWN)).identity) == identities[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"classes": ("bee", "Cat", "dog", "emu")},
            "the teacher has no class 'cat': expected all of bee, cat, dog, emu",
        ),
        ({"classes": ("bee", "cat", "cat", "dog", "emu")}, "classes has 5 names of which 4 differ"),
        ({"classes": (*NAMES, "fox")}, r"outputs are \(\d+, 4\), expected \(\d+, 5\): one column per class"),
        ({"outputs": "scores"}, "outputs is 'scores': expected one of logits, probabilities"),
        (
            {"mean": (124, 116, 104), "std": (58, 57, 57)},
            "mean is .*: expected one number per channel, of pixels from 0",
        ),
        ({"mean": (0.5,) * 3}, "expected mean and std both, or neither"),
        ({"mean": 0.5, "std": 0}, "std is 0: expected one number per channel, of pixels from 0 to 1 and above 0"),
        ({"size": (8, 8)}, r"size is \(8, 8\): expected a whole number of pixels"),
        ({"classes": 4}, "classes is 4: expected the teacher's classes in its order|classes is 4: expected the names"),
        ({"classes": {"bee": 0, "cat": 1, "dog": 1, "emu": 3}}, "classes gives output 1 to cat and dog"),
        ({"classes": {"bee": 0, "cat": 1, "dog": -1, "emu": 3}}, "expected whole numbers from 0, one for each class"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        adapt_teacher(Nearest(), brightness(), **options)


# --- weights ---------------------------------------------------------------------------------------------------------

NETWORK = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
STATE = {name: torch.randn_like(weight) for name, weight in NETWORK.state_dict().items()}


def prefixed(prefix):
    return {prefix + name: weight for name, weight in STATE.items()}


OTHER = {name: weight + 1 for name, weight in STATE.items()}
WRAPPED = {
    "plain": STATE,
    "state_dict": {"epoch": 3, "state_dict": STATE},
    "net": {"net": STATE, "acc": 0.9},
    "model and optimizer": {"model": STATE, "optimizer": {"state": {0: {"momentum": torch.zeros(3)}}, "lr": 0.1}},
    "ema alone": {"ema": STATE},
    "ema after the model": {"ema": OTHER, "model": STATE},
    "data parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": {"model": prefixed("module._orig_mod.")},
    "Lightning": {
        "state_dict": prefixed("model.") | {"criterion.weight": torch.ones(4)},
        "hyper_parameters": {"lr": 1},
    },
    "averaged": prefixed("module.") | {"n_averaged": torch.tensor(3)},
    "deep": {"checkpoint": {"teacher": {"state_dict": STATE}}},
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_whatever_wraps_them(wrapped, tmp_path):
    torch.save(wrapped, tmp_path / "teacher.pth")
    for weights in (wrapped, tmp_path / "teacher.pth", str(tmp_path / "teacher.pth")):
        found = weights_for(NETWORK, weights)
        assert {name: weight.tolist() for name, weight in found.items()} == {n: w.tolist() for n, w in STATE.items()}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"the mapping holds no weights of this Sequential \(nearest: -1 of 2 fit; no tensors at all\)"),
        ({"1.weight": torch.zeros(4, 108)}, r"nearest: 1 of 2 fit; 1\.bias: nothing where \(4,\) is needed"),
        (STATE | {"1.bias": torch.zeros(10)}, r"nearest: 1 of 2 fit; 1\.bias: \(10,\) where \(4,\) is needed"),
        (STATE | {"2.bias": torch.zeros(4)}, r"nearest: 2 of 2 fit; 2\.bias: \(4,\) where nothing is needed"),
    ],
)
def test_weights_of_another_network_are_refused_with_the_nearest(weights, message):
    with pytest.raises(ValueError, match=message):
        weights_for(NETWORK, weights)


def test_counters_and_arrays_are_no_obstacle():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    state = network.state_dict()
    old = {name: weight for name, weight in state.items() if "num_batches" not in name}
    assert weights_for(network, old | {"total_ops": torch.zeros(1)}).keys() == state.keys()
    arrays = {name: weight.numpy() for name, weight in state.items()}
    assert torch.equal(weights_for(network, arrays)["0.weight"], state["0.weight"])


def test_of_two_sets_of_weights_the_reader_chooses():
    both = {"student": STATE, "teacher": {name: 2 * weight for name, weight in STATE.items()}}
    with pytest.raises(ValueError, match=r"2 sets of weights that fit .* 'student' and 'teacher': give the one"):
        weights_for(NETWORK, both)
    averaged = {"state_dict": STATE, "ema_state_dict": both["teacher"]}
    assert torch.equal(weights_for(NETWORK, averaged)["1.bias"], STATE["1.bias"])


def test_a_file_of_weights_never_executes_code(tmp_path, side_effect):
    torch.save({"model": side_effect}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match=r"teacher\.pth cannot be read as weights .*save network\.state_dict\(\)"):
        weights_for(NETWORK, tmp_path / "teacher.pth")
    assert not side_effect.folder.exists()
    (tmp_path / "cut.pth").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as weights"):
        weights_for(NETWORK, tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError):
        weights_for(NETWORK, tmp_path / "none.pth")


# --- what is said of a teacher that errs -----------------------------------------------------------------------------

FITTING = replace(brightness(), mean=(0.5,) * 3, std=(0.25,) * 3)


def ask(way, network, data):
    if way == "generate":
        return kdlib.generate(network, data, 1, progress=False)
    student = nn.Sequential(nn.Flatten(), nn.Linear(data.example.numel(), data.classes))
    return kdlib.train(
        student,
        data,
        lambda z, v, labels: kdlib.distillation_loss(z, v, labels, temperature=4.0, alpha=0.1),
        kdlib.Recipe(epochs=1, batch_size=20, learning_rate=0.01),
        targets=kdlib.LiveTeacher(network),
        progress=False,
    )


@pytest.mark.parametrize("way", ["generate", "live"])
def test_a_teacher_that_numbers_the_classes_otherwise_is_noticed(way):
    with pytest.warns(
        UserWarning, match=r"agrees with 50% of 60 .*other order .* 100%: it predicts cat as dog, dog as cat"
    ):
        ask(way, Nearest(shades=(40, 140, 90, 190)), FITTING)


@pytest.mark.parametrize("way", ["generate", "live"])
def test_a_teacher_that_knows_another_normalisation_is_noticed(way):
    with pytest.warns(
        UserWarning, match=r"agrees with \d+% of 60 training labels\. Usual reasons: another normalisation"
    ):
        ask(way, Nearest(mean=0.9), FITTING)


@pytest.mark.parametrize("way", ["generate", "live"])
def test_probabilities_are_noticed(way):
    class Probabilities(Nearest):
        def forward(self, x):
            return super().forward(x).softmax(1)

    with pytest.warns(UserWarning, match="look like probabilities"):
        ask(way, Probabilities(), FITTING)


@pytest.mark.parametrize("way", ["generate", "live"])
def test_a_good_teacher_is_passed_over_in_silence(way):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(way, Nearest(), FITTING)


@pytest.mark.parametrize("way", ["generate", "live"])
@pytest.mark.parametrize("columns", [1, 3, 1000])
def test_a_teacher_of_other_classes_is_refused(way, columns):
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, columns))
    with pytest.raises(
        ValueError, match=rf"are \(60, {columns}\), expected \(60, 4\): one column for each of bee, cat"
    ):
        ask(way, network, FITTING)


@pytest.mark.parametrize("way", ["generate", "live"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_whose_logits_are_not_finite_is_refused_before_anything_is_saved(way, value, tmp_path):
    network = Nearest()
    network.shades.data[2] = value
    with pytest.raises(ValueError, match=r"not finite for 60 of 60 images of own/train in view 0, first for image 0"):
        ask(way, network, FITTING)
    with pytest.raises(ValueError, match="not finite"):
        kdlib.load_or_generate(tmp_path, network, FITTING, 1, progress=False)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_view_that_is_not_finite_is_found_whichever_it_is(tmp_path):
    class Corner(Nearest):
        def forward(self, x):
            black = (255 * (x * self.std + self.mean))[:, :, 0].amax((1, 2)) < 1  # the first row, in shifted views
            return super().forward(x).masked_fill(black[:, None], torch.nan)

    data = replace(FITTING, padding=1)
    with pytest.raises(ValueError, match=r"not finite for 60 of 60 images of own/train in view \d, first for image 0"):
        kdlib.load_or_generate(tmp_path, Corner(), data, 9, progress=False)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    logits = torch.zeros(9, 60, 4).half()
    logits[4, 2, 1] = torch.nan
    findings = kdlib.preflight(data, targets=kdlib.SoftLabels(logits, data.identity))
    assert any(f.odd and "in view 4, first for image 2" in f.text for f in findings)


@pytest.mark.parametrize("way", ["generate", "live"])
def test_two_exchanged_classes_of_ten_are_noticed(way):
    shades = tuple(range(20, 220, 20))
    labels = torch.arange(60) % 10
    images = (20 + 20 * labels)[:, None, None, None].expand(60, 6, 6, 3).to(torch.uint8)
    data = ImageSet("own/train", images, labels, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3)
    with pytest.warns(UserWarning, match=r"agrees with 80% .*other order .* 100%: it predicts a as b, b as a"):
        ask(way, Nearest(shades=(shades[1], shades[0], *shades[2:])), data)


@pytest.mark.parametrize("way", ["generate", "live"])
def test_a_teacher_that_always_says_the_same_is_noticed(way):
    class Constant(Nearest):
        def forward(self, x):
            return 0 * super().forward(x) + torch.tensor([1.0, -1.0])

    data = replace(brightness(2), mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.warns(UserWarning, match=r"agrees with 50% .* One that always predicts 'bee' would do as well"):
        ask(way, Constant(shades=(40, 90)), data)


class Softmax(Nearest):
    def forward(self, x):
        return super().forward(x).softmax(1)


def test_probabilities_are_noticed_though_some_classes_are_left_out():
    with pytest.warns(UserWarning, match="look like probabilities"):
        adapt_teacher(Softmax(shades=(40, 90, 140, 190, 70)), brightness(), classes=(*NAMES, "fox"), **OWN)


def test_logits_that_are_called_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"outputs is 'probabilities', but they run from -\d\S* to"):
        adapt_teacher(Nearest(), brightness(), outputs="probabilities", **OWN)


def test_a_mapping_need_not_name_all_outputs():
    many = Nearest(shades=(40, 90, 140, 190, *range(300, 900)))
    few = {name: k for k, name in enumerate(NAMES)}
    assert agreement(adapt_teacher(many, brightness(), classes=few, **OWN), brightness()) == 1
    numbered = {k: name for name, k in few.items()} | {k: f"other {k}" for k in range(4, 604)}
    assert agreement(adapt_teacher(many, brightness(), classes=numbered, **OWN), brightness()) == 1


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_scale_may_be_an_array_or_one_number(kind):
    assert agreement(adapt_teacher(Nearest(), brightness(), mean=kind([0.5] * 3), std=0.25), brightness()) == 1


def test_a_teacher_that_does_not_take_the_images_is_refused_with_their_size(tmp_path):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(7, 4))
    with pytest.raises(ValueError, match=r"AdaptedTeacher fails on images of own/train, 6x6 pixels with 3 channels"):
        adapt_teacher(linear, brightness())
    with pytest.raises(ValueError, match=r"call its \.float\(\) first"):
        kdlib.load_or_generate(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).half(), brightness(), 1)


def test_images_without_labels_are_compared_with_none():
    data = replace(FITTING, labels=torch.full((60,), -1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kdlib.generate(Nearest(shades=(190, 140, 90, 40)), data, 1, progress=False)
