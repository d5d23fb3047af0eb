"""The networks: their sizes, seeds and shapes, and how they are run."""

import pytest
import torch
from torch import nn

from kdlib import artefacts
from kdlib.models import (
    NETWORKS,
    build,
    count_parameters,
    half_precision,
    mixed_precision,
    pick_device,
    predict_logits,
    tuned_convolutions,
)

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
    for size in (8, 32):
        answer = model(torch.zeros(2, channels, size, size))
        assert answer.shape == (2, 7)
        assert torch.isfinite(answer).all()


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
    with pytest.raises(ValueError, match=r"network 'xyz' is unknown: expected one of resnet50, .*tiny_cnn$"):
        build("xyz", 10)


def test_answers_come_in_order_and_do_not_depend_on_the_batch_size(image_set, toy_teacher):
    data = image_set(21)
    model = toy_teacher(data).train()
    whole = predict_logits(model, data)
    assert whole.shape == (21, 4)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert whole.std(0).min() > 0.01  # the images are told apart
    for size in (1, 2, 20):
        torch.testing.assert_close(predict_logits(model, data, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    one = model.eval()(data.batch(torch.tensor([13]), torch.tensor([0])))
    torch.testing.assert_close(one[0], whole[13], rtol=1e-4, atol=1e-5)


def test_a_view_is_answered_as_that_view(image_set, toy_teacher):
    data = image_set(10, flip=True)
    model = toy_teacher(data)
    for view in (1, 17):
        images = data.batch(torch.arange(10), torch.full((10,), view))
        torch.testing.assert_close(predict_logits(model, data, view=view), model(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_asking_for_answers_leaves_the_network_as_it_was(image_set, toy_teacher, mode):
    data = image_set(20)
    model = toy_teacher(data).train(mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    predict_logits(model, data)
    assert model.training is mode
    assert all(m.training is mode for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_mode_is_restored_when_the_network_fails(image_set):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).train()  # of another input size
    with pytest.raises(RuntimeError):
        predict_logits(model, image_set(4))
    assert model.training


def test_the_gpu_is_picked_where_there_is_one_and_the_device_given_comes_first(monkeypatch):
    assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    assert pick_device("cpu").type == "cpu"
    assert pick_device(torch.device("cuda", 1)).index == 1


def test_half_precision_is_bfloat16_where_the_gpu_has_it_and_float16_where_it_would_be_emulated(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert half_precision(gpu) == torch.bfloat16
    assert half_precision(cpu) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert half_precision(gpu) == torch.float16


def test_on_a_cpu_it_is_computed_in_float32():
    with mixed_precision(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cudnn_is_told_to_try_its_algorithms_on_a_gpu_and_is_never_turned_off(device):
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    with tuned_convolutions(torch.device(device)):
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.benchmark == (device == "cuda")
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark) == before
