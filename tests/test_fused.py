"""The operations for a GPU: checked here on a CPU, where Triton's interpreter runs the same kernels, slowly.

Without a GPU, tests/conftest.py turns that interpreter on.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlib.models import build, quicker

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux only")
from kdlib import fused

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """On a GPU, convolutions with all bits of float32: with TF32 two of the same kind differ by more than we allow."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def off(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """How far off, as a share of the reference's length."""
    return ((ours.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(4, 20, 6, 6), (3, 64, 5, 3), (2, 200, 4, 4), (700, 8, 3, 3)])
@pytest.mark.parametrize(("shortcut", "relu", "fork"), [(0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_the_norm_and_its_gradients_are_those_of_pytorch_in_double_precision(
    shape, shortcut, relu, fork, dtype, tolerance
):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).to(DEVICE)
    norm.weight.data.uniform_(-0.5, 1.5)  # negative weights too: they turn the ReLU's side around
    norm.bias.data.normal_()
    reference = copy.deepcopy(norm).double()
    maps = [(2 * torch.randn(shape, device=DEVICE) + 1).to(dtype) for _ in range(2)]
    x, z = (t.clone(memory_format=torch.channels_last).requires_grad_() for t in maps)
    x64, z64 = (t.detach().double().requires_grad_() for t in maps)
    ours = fused.Norm(norm, relu=bool(relu))
    ours.fork = bool(fork)
    answers = ours(x, z if shortcut else None)
    y64 = reference(x64) + (z64 if shortcut else 0)
    y64 = F.relu(y64) if relu else y64
    # not channels last, as a mean's gradient may be
    gradients = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(1 + fork)]
    torch.autograd.backward(answers, gradients if fork else gradients[0])
    y64.backward(sum(gradient.double() for gradient in gradients))
    y = answers[0] if fork else answers
    assert not fork or torch.equal(*answers)
    assert y.dtype == x.grad.dtype == dtype
    assert off(y, y64) < tolerance
    assert off(x.grad, x64.grad) < tolerance
    assert off(norm.weight.grad, reference.weight.grad) < 1e-5
    assert off(norm.bias.grad, reference.bias.grad) < 1e-5
    assert off(norm.running_mean, reference.running_mean) < 1e-5
    assert off(norm.running_var, reference.running_var) < 1e-5
    assert norm.num_batches_tracked == 1
    if shortcut:
        assert not z.grad[y == 0].any()
        assert off(z.grad, z64.grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 20, 6, 4), (3, 224, 2, 8), (40, 8, 16, 16), (2, 3, 5, 7)])
def test_max_pooling_and_its_gradient_are_those_of_pytorch(shape, dtype):
    torch.manual_seed(0)
    images = torch.randn(shape, device=DEVICE).relu().round(decimals=1).to(dtype)  # many zeros, and other equals
    ours, theirs = (images.clone(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    pool = nn.MaxPool2d(2)
    y, reference = fused.MaxPool(pool)(ours), pool(theirs)
    assert torch.equal(y, reference)
    gradient = torch.randn_like(reference)
    y.backward(gradient)
    reference.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_only_pooling_over_two_by_two_pixels_is_replaced():
    others = (dict(kernel_size=3, stride=2), dict(kernel_size=2, stride=1), dict(kernel_size=2, padding=1))
    model = nn.Sequential(nn.MaxPool2d(2), nn.MaxPool2d((2, 2), (2, 2)), *(nn.MaxPool2d(**other) for other in others))
    assert sum(isinstance(module, fused.MaxPool) for module in fused.for_training(model).children()) == 2


@pytest.mark.parametrize(("network", "places"), [("resnet18", 20), ("wide_resnet14", 15), ("cnn", 6), ("tiny_cnn", 0)])
def test_a_network_trains_as_it_would_by_itself(network, places):
    torch.manual_seed(0)
    model = build(network, 4, 3).to(DEVICE).train()
    twin = copy.deepcopy(model)
    quick = fused.for_training(model)
    assert sum(isinstance(module, fused.Norm) for module in quick.modules()) == places
    images = torch.randn(6, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for one in (quick, twin):
        F.cross_entropy(one(images), torch.tensor([0, 1, 2, 3, 0, 1], device=DEVICE)).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert off(ours.grad, theirs.grad.double()) < 1e-2, name  # a ReLU at the edge may fall on either side
    for (name, ours), theirs in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs[1], rtol=1e-4, atol=1e-6), name


def test_in_eval_mode_the_running_statistics_are_used_and_kept():
    model = build("cnn", 4, 3).to(DEVICE)
    quick, before = fused.for_training(model), copy.deepcopy(model.state_dict())
    model.eval()
    images = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert torch.allclose(quick(images), model(images), atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class InPlace(nn.Module):
    """A map with two users, of which the first writes over it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, images):
        x = self.norm(self.conv(images))
        return self.relu(x) * 2 + x * 3


def test_a_map_that_is_written_over_keeps_its_gradients():
    torch.manual_seed(0)
    model = InPlace().to(DEVICE)
    twin, images = copy.deepcopy(model), torch.randn(4, 3, 5, 5, device=DEVICE)
    for one in (fused.for_training(model), twin):
        one(images).sum().backward()
    for ours, theirs in zip(model.norm.parameters(), twin.norm.parameters(), strict=True):
        assert off(ours.grad, theirs.grad.double()) < 1e-4


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two operations, written out where there is no GPU; a list of the calls."""
    calls = []

    def relu(x, weight, bias, *how):
        calls.append("relu")
        return F.relu(F.conv2d(x, weight, bias, *how))

    def add_relu(x, weight, z, alpha, bias, *how):
        calls.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, *how) + alpha * z)

    if not GPU:
        monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.mark.parametrize(("network", "adds"), [("resnet18", 8), ("wide_resnet14", 6), ("cnn", 0), ("mobilenet_v2", 0)])
def test_for_answers_batch_norm_is_folded_into_the_convolutions(cudnn, network, adds):
    model = build(network, 4, 3).to(DEVICE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    quick = fused.for_answers(model, torch.float32)
    images = torch.randn(3, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        assert torch.allclose(quick(images), model.eval()(images), rtol=1e-3, atol=1e-3 if GPU else 1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    assert GPU or cudnn.count("add_relu") == adds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_answers_are_computed_in_the_precision_asked_for(cudnn):
    quick = fused.for_answers(build("cnn", 4, 3).to(DEVICE), torch.bfloat16)
    assert quick(torch.randn(2, 3, 8, 8, device=DEVICE)).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in quick.parameters())


class Unusual(nn.Module):
    """A shared convolution, norms without weights or statistics, text for a padding, a shortcut of another shape."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bare = nn.BatchNorm2d(3, affine=False)
        self.forgetful = nn.BatchNorm2d(3, track_running_stats=False)
        self.same = nn.Conv2d(3, 3, 3, padding="same", padding_mode="reflect")
        self.last, self.strided = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.offset = nn.Parameter(torch.randn(1, 3, 1, 1))

    def forward(self, images):
        x = F.relu(self.second(self.shared(F.relu(self.first(self.shared(images))))))
        x = F.relu(self.forgetful(F.relu(self.bare(x))) + 1)
        x = F.relu(self.same(x))
        x = F.relu(self.last(x) + x.mean((2, 3), keepdim=True))
        x = F.relu(self.strided(x) + x.mean((2, 3), keepdim=True))
        return F.relu(self.shared(x) + self.offset)


def test_what_is_unusual_is_left_as_it_is(cudnn):
    torch.manual_seed(0)
    model = Unusual().to(DEVICE)
    images = torch.randn(4, 3, 8, 8, device=DEVICE)
    twin = copy.deepcopy(model)
    assert torch.allclose(fused.for_training(model)(images), twin(images), atol=1e-4)
    assert torch.allclose(fused.for_answers(model, torch.float32)(images), twin.eval()(images), atol=1e-3)


class LooksAtValues(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


@pytest.mark.parametrize("make", [fused.for_training, lambda model: fused.for_answers(model, torch.float32)])
def test_a_network_that_cannot_be_traced_comes_back_as_it_is(make):
    model = LooksAtValues()
    with pytest.warns(UserWarning, match="LooksAtValues cannot be traced .* it runs as it is, more slowly"):
        assert make(model) is model


def test_on_a_cpu_a_network_stays_as_it_is():
    model = build("cnn", 4, 3)
    assert quicker(model, torch.device("cpu")) is model
    assert quicker(model, torch.device("cpu"), answers=True) is model


def test_on_a_gpu_a_network_is_made_quicker(monkeypatch):
    monkeypatch.setattr("kdlib.models.half_precision", lambda device: torch.float16)
    gpu, model = torch.device("cuda"), build("cnn", 4, 3)
    assert quicker(model, gpu) is not model
    assert {p.dtype for p in quicker(model, gpu, answers=True).parameters()} == {torch.float16}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quicker(model, gpu) is model  # no Triton, as on Windows
