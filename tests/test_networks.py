"""The networks of other papers: their sizes, shapes and identity, and that they train when asked for by path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlib import Recipe, build, count_parameters, load_or_train
from kdlib.records import identity
from kdlib.scale import networks
from kdlib.train import fingerprint

pytestmark = pytest.mark.usefixtures("isolated")

CONVMIXER = 3 * 256 + 3 * 256 + 8 * (82 * 256 + 257 * 256 + 4 * 256) + 257 * 10  # stem, blocks, classifier
SIZES = {  # the papers' and RepDistiller's: 0.707M, 0.77M, 2.26M, 0.70M
    ("convmixer", 10): CONVMIXER,
    ("densenet_bc", 10): 769_162,
    ("wrn_40_2", 100): 2_255_156,
    ("wrn_16_2", 100): 703_284,
}
NAMES = [name for name, _ in SIZES]


def path(name: str) -> str:
    return f"kdlib.scale.networks:{name}"


@pytest.mark.parametrize(("name", "classes"), SIZES)
def test_a_network_has_the_known_number_of_parameters(name, classes):
    assert count_parameters(build(path(name), classes)) == SIZES[name, classes]


def test_the_convmixer_that_holds_the_record_has_706570():
    assert CONVMIXER == 706_570


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_small_and_large_images_grey_and_in_colour(name):
    for channels, size in ((1, 8), (3, 32)):
        logits = build(path(name), 7, channels).eval()(torch.randn(2, channels, size, size))
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert not logits[0].equal(logits[1])


@pytest.mark.parametrize(
    ("name", "sizes"), [("convmixer", [32]), ("densenet_bc", [32, 16, 8]), ("wrn_40_2", [32, 16, 8])]
)
@torch.no_grad()
def test_the_sizes_of_the_maps_are_the_papers(name, sizes):
    model, seen = build(path(name), 10).eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, given, output: seen.append(output.shape[-1]))
    model(torch.zeros(1, 3, 32, 32))
    assert list(dict.fromkeys(seen)) == sizes


@pytest.mark.parametrize("depth", [16, 40])
def test_a_wide_network_is_as_deep_as_its_name_says(depth):
    kernels = [module for module in build(path(f"wrn_{depth}_2"), 10).modules() if isinstance(module, nn.Conv2d)]
    assert len(kernels) == depth  # its three shortcuts included, as in the paper
    assert sum(kernel.kernel_size == (1, 1) for kernel in kernels) == 3


def test_a_shortcut_that_changes_the_shape_starts_after_the_first_relu():
    block = networks.PreActivationBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), block.shortcut(F.relu(block.norm1(x))))
    plain = networks.PreActivationBlock(4, 4, 1).eval()
    nn.init.zeros_(plain.conv2.weight)
    assert torch.equal(plain(x), x)


def test_a_mixer_block_keeps_each_channel_to_itself_before_it_mixes_them():
    block = networks.MixerBlock(3, 5).eval()
    block.pointwise = nn.Identity()
    x = torch.randn(1, 3, 9, 9)
    other = x.clone()
    other[:, 0] += 1
    changed = (block(x) != block(other)).any(dim=(0, 2, 3))
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_training_from_the_path_is_found_again(name, image_set, tmp_path):
    data, recipe = image_set(8, channels=3), Recipe(1, 8, 0.05, views=1)
    made = load_or_train(tmp_path, "net.pth", path(name), data, F.cross_entropy, recipe, progress=False)
    start = build(path(name), data.classes)
    parameters = dict(made.model.named_parameters())
    moved = [key for key, value in start.named_parameters() if not value.equal(parameters[key])]
    assert {key.partition(".")[0] for key in moved} == {key.partition(".")[0] for key in parameters}
    written = made.path.stat().st_mtime_ns
    again = load_or_train(tmp_path, "net.pth", path(name), data, F.cross_entropy, recipe, progress=False)
    assert again.fingerprint == made.fingerprint == fingerprint(path(name), data, F.cross_entropy, recipe)
    assert made.path.stat().st_mtime_ns == written


def test_the_networks_are_told_apart_by_their_code_and_settings():
    known = {identity.network(build(path(name), 10)) for name in NAMES}
    known |= {identity.network(networks.WideResNet(10, 3, depth=16, factor=1))}
    known |= {identity.network(networks.ConvMixer(10, 3, width=256, depth=8, kernel=7))}
    assert len(known) == len(NAMES) + 2
