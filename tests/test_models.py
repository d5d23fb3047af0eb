"""The networks: their sizes, seeds and shapes, and every form in which one can be asked for."""

import functools
import sys

import pytest
import torch
from torch import nn

from kdlib.models import NETWORKS, build, count_parameters, find_network, network_name
from kdlib.records import artefacts

pytestmark = pytest.mark.usefixtures("isolated")

STUDENTS = ("cnn", "wide_resnet14", "tiny_cnn")


def test_the_resnet50_of_ten_classes_has_its_known_number_of_parameters():
    # torchvision's 25,557,032, less 990 classes of 2,048 weights and a bias, with a 3x3 stem instead of a 7x7 one:
    # 25557032 - 990 * 2049 - 64 * 3 * (49 - 9) = 23520842
    assert count_parameters(build("resnet50", 10)) == 23_520_842


def test_batch_norms_running_statistics_are_not_counted():
    assert count_parameters(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))) == 3 * 2 + 2 + 2 + 2


@pytest.mark.parametrize("network", STUDENTS)
def test_a_student_has_fewer_than_a_million_parameters(network):
    assert 0 < count_parameters(build(network, 10)) < 1_000_000


@pytest.mark.parametrize("network", ["cnn", "wide_resnet14"])
def test_a_students_file_takes_at_most_four_megabytes(network, tmp_path):
    artefacts.save_weights(tmp_path / "student.pth", build(network, 10), fingerprint={})
    assert (tmp_path / "student.pth").stat().st_size <= 4e6


@pytest.mark.parametrize("network", [n for n in NETWORKS if n != "resnet50"])
def test_the_same_seed_gives_the_same_weights_and_another_gives_others(network):
    torch.manual_seed(0)
    first = build(network, 10, seed=3).state_dict()
    torch.manual_seed(1)  # the global generator has no part in it
    again, other = build(network, 10, seed=3).state_dict(), build(network, 10, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    kernels = [k for k in first if first[k].ndim > 1]
    assert kernels
    assert not any(torch.equal(first[k], other[k]) for k in kernels)


@pytest.mark.parametrize("network", ["resnet18", "tiny_cnn"])
def test_building_a_network_leaves_the_global_random_state_alone(network):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build(network, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_every_network_takes_small_and_large_images_grey_and_in_colour(network, channels):
    model = build(network, 7, channels).eval()
    for size in (28,) if network in ("lenet", "mlp100") else (8, 32):  # those two are for MNIST alone
        logits = model(torch.zeros(2, channels, size, size))
        assert logits.shape == (2, 7)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("network", ["resnet50", "resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_an_adapted_network_keeps_four_by_four_positions_of_a_small_image_up_to_its_pooling(network):
    # with ImageNet's stem and strides a 32x32 image would be 1x1 there
    model = build(network, 10).eval()
    last = model.features if network == "mobilenet_v2" else model.layer4
    shapes = []
    last.register_forward_hook(lambda module, given, output: shapes.append(output.shape[2:]))
    model(torch.zeros(1, 3, 32, 32))
    assert shapes == [(4, 4)]


def test_the_new_stems_are_initialised_like_the_other_convolutions():
    # He's initialisation by fan-out: standard deviation sqrt(2 / (out_channels * 9))
    for network, stem in (("resnet18", "conv1"), ("mobilenet_v2", "features.0.0")):
        weight = build(network, 10).get_submodule(stem).weight
        assert weight.shape[1:] == (3, 3, 3)
        assert weight.std().item() == pytest.approx((2 / (len(weight) * 9)) ** 0.5, rel=0.1)


def test_an_unknown_network_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match=r"network 'resnet05' is unknown: expected one of resnet50, .*mean 'resnet50'\?"
    ):
        build("resnet05", 10)
    with pytest.raises(ValueError, match=r"'xyz' is unknown: expected one of .*tiny_cnn, lenet, mlp100, or the path"):
        build("xyz", 10)


# --- the forms of a network ------------------------------------------------------------------------------------------

MINE = """
from torch import nn

def small(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))

class Nets:
    small = staticmethod(small)

number = 3
"""


@pytest.fixture
def mynets(tmp_path, monkeypatch):
    """A module of the reader's own in the working folder, as Python finds it there."""
    (tmp_path / "mynets.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("mynets", None)


def small(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


class Flat(nn.Module):
    def __init__(self, classes, channels, hidden=8):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, hidden), nn.Linear(hidden, classes))

    def forward(self, images):
        return self.layers(images)


class Maker:
    def __call__(self, classes, channels):
        return small(classes, channels)


FORMS = {
    "a name": "tiny_cnn",
    "a function": small,
    "a class": Flat,
    "a class with its keywords bound": functools.partial(Flat, hidden=3),
    "a lambda": lambda classes, channels: small(classes, channels),
    "an object": Maker(),
    "a path": "mynets:small",
    "a path into a class": "mynets:Nets.small",
}


@pytest.mark.usefixtures("mynets")
@pytest.mark.parametrize("form", FORMS)
def test_a_network_can_be_a_name_a_callable_or_the_path_of_one(form):
    network = FORMS[form]
    first, again, other = (build(network, 5, 1, seed=seed) for seed in (3, 3, 4))
    assert first(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.usefixtures("mynets")
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            "tiny_cm",
            r"network 'tiny_cm' is unknown: expected one of .*package\.module:function; did you mean 'tiny_cnn'",
        ),
        ("mynets.small", r"network 'mynets\.small' is unknown: expected one of .*, or the path of your own"),
        ("mynets:big", r"network 'mynets:big' cannot be imported \(.*no attribute 'big'\): expected package\.module"),
        ("nonets:small", r"'nonets:small' cannot be imported \(No module named 'nonets'\): .*PYTHONPATH"),
        ("broken:small", r"'broken:small' cannot be imported \(No module named 'no_such_module_at_all'\)"),
        ("mynets:number", r"'mynets:number' cannot be imported \(number is 3, no function\)"),
        ("mynets:", r"network 'mynets:' cannot be imported"),
        (":small", r"network ':small' cannot be imported"),
        (None, "network None is unknown"),
        (3, "network 3 is unknown"),
        (["cnn"], r"network \['cnn'\] is unknown"),
        (nn.Linear(2, 2), "network is a Linear that exists already: expected a function of .*classes, channels"),
        (lambda classes, channels: "cnn", "gave a str for 5 classes and 1 channels: expected a torch.nn.Module"),
    ],
)
def test_what_is_no_network_is_refused_with_what_to_give(network, message):
    with pytest.raises(ValueError, match=message):
        build(network, 5, 1)


@pytest.mark.usefixtures("mynets")
def test_only_what_was_asked_for_is_imported():
    assert "mynets" not in sys.modules
    build("tiny_cnn", 4, 1)
    network_name("mynets:small")  # a name in a file's name imports nothing
    assert "mynets" not in sys.modules
    assert find_network("mynets:small") is sys.modules["mynets"].small


@pytest.mark.usefixtures("mynets")
def test_a_networks_name_can_stand_in_a_files_name():
    names = {form: network_name(network) for form, network in FORMS.items()}
    assert names["a name"] == "tiny_cnn"
    assert names["a path"] == network_name(find_network("mynets:small")) == "mynets.small"
    assert names["a function"].endswith("test_models.small")
    assert names["a class"] == names["a class with its keywords bound"]
    assert names["an object"].endswith("test_models.Maker")
    assert all("0x" not in name and "/" not in name and ":" not in name for name in names.values())


def test_the_perceptron_can_be_traced():
    model, images = build("perceptron", 10, 1), torch.randn(3, 1, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
    assert model(torch.randn(3, 1, 32, 32)).shape == (3, 10)
