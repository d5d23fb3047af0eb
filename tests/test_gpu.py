"""The fused operations for a GPU, checked on a CPU, where Triton's interpreter runs the same kernels, slowly.

Without a GPU, tests/conftest.py turns that interpreter on.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlib.gpu import optimize_for_gpu
from kdlib.models import build

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux only")
from kdlib.gpu import fused

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def single_precision(monkeypatch):
    """On a GPU, convolutions with all bits of float32: with TF32 two of the same kind differ by more than we allow."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The norm of the difference, relative to the reference's."""
    return ((ours.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", [(4, 20, 6, 6), (3, 64, 5, 3), (2, 200, 4, 4), (700, 8, 3, 3)])
@pytest.mark.parametrize(("shortcut", "relu", "fork"), [(0, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_the_norm_and_its_gradients_are_those_of_pytorch_in_double_precision(
    shape, shortcut, relu, fork, dtype, tolerance
):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).to(DEVICE)
    norm.weight.data.uniform_(-0.5, 1.5)  # negative weights too: they swap the sides of the ReLU
    norm.bias.data.normal_()
    reference = copy.deepcopy(norm).double()
    maps = [(2 * torch.randn(shape, device=DEVICE) + 1).to(dtype) for _ in range(2)]
    x, z = (t.clone(memory_format=torch.channels_last).requires_grad_() for t in maps)
    x64, z64 = (t.detach().double().requires_grad_() for t in maps)
    ours = fused.Norm(norm, relu=bool(relu))
    ours.fork = bool(fork)
    outputs = ours(x, z if shortcut else None)
    y64 = reference(x64) + (z64 if shortcut else 0)
    y64 = F.relu(y64) if relu else y64
    # not channels last, as a mean's gradient may be
    gradients = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(1 + fork)]
    torch.autograd.backward(outputs, gradients if fork else gradients[0])
    y64.backward(sum(gradient.double() for gradient in gradients))
    y = outputs[0] if fork else outputs
    assert not fork or torch.equal(*outputs)
    assert y.dtype == x.grad.dtype == dtype
    assert error(y, y64) < tolerance
    assert error(x.grad, x64.grad) < tolerance
    assert error(norm.weight.grad, reference.weight.grad) < 1e-5
    assert error(norm.bias.grad, reference.bias.grad) < 1e-5
    assert error(norm.running_mean, reference.running_mean) < 1e-5
    assert error(norm.running_var, reference.running_var) < 1e-5
    assert norm.num_batches_tracked == 1
    if shortcut:
        assert not z.grad[y == 0].any()
        assert error(z.grad, z64.grad) < tolerance


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


SLOW = [  # minutes in the interpreter: they were tried there, and are tried again on every GPU
    pytest.param(f"kdlib.scale.networks:{name}", norms, marks=pytest.mark.skipif(not GPU, reason="needs a GPU"))
    for name, norms in {"convmixer": 17, "densenet_bc": 99, "wrn_16_2": 13}.items()
]


@pytest.mark.parametrize(
    ("network", "norms"), [("resnet18", 20), ("wide_resnet14", 15), ("cnn", 6), ("tiny_cnn", 0), *SLOW]
)
def test_a_network_trains_as_it_would_without_fused_operations(network, norms):
    torch.manual_seed(0)
    model = build(network, 4, 3).to(DEVICE).train()
    twin = copy.deepcopy(model)
    fast = fused.for_training(model)
    assert sum(isinstance(module, fused.Norm) for module in fast.modules()) == norms
    images = torch.randn(6, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)
    for one in (fast, twin):
        F.cross_entropy(one(images), torch.tensor([0, 1, 2, 3, 0, 1], device=DEVICE)).backward()
    # not closer, since an input near zero may fall on either side of a ReLU
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert error(ours.grad, theirs.grad.double()) < 1e-2, name
    for (name, ours), theirs in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(ours, theirs[1], rtol=1e-4, atol=1e-6), name


def test_in_eval_mode_the_running_statistics_are_used_and_kept():
    model = build("cnn", 4, 3).to(DEVICE)
    fast, before = fused.for_training(model), copy.deepcopy(model.state_dict())
    model.eval()
    images = torch.randn(2, 3, 8, 8, device=DEVICE)
    assert torch.allclose(fast(images), model(images), atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class InPlace(nn.Module):
    """A map with two users, of which the first overwrites it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, images):
        x = self.norm(self.conv(images))
        return self.relu(x) * 2 + x * 3


def test_a_map_that_is_overwritten_keeps_its_gradients():
    torch.manual_seed(0)
    model = InPlace().to(DEVICE)
    twin, images = copy.deepcopy(model), torch.randn(4, 3, 5, 5, device=DEVICE)
    for one in (fused.for_training(model), twin):
        one(images).sum().backward()
    for ours, theirs in zip(model.norm.parameters(), twin.norm.parameters(), strict=True):
        assert error(ours.grad, theirs.grad.double()) < 1e-4


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two operations, written out where there is no GPU; a list of the calls."""
    calls = []

    def relu(x, weight, bias, *settings):
        calls.append("relu")
        return F.relu(F.conv2d(x, weight, bias, *settings))

    def add_relu(x, weight, z, alpha, bias, *settings):
        calls.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, *settings) + alpha * z)

    if not GPU:
        monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.mark.parametrize(
    ("network", "adds", "norms"),
    [
        ("resnet18", 8, 0),
        ("wide_resnet14", 6, 0),
        ("cnn", 0, 0),
        ("mobilenet_v2", 0, 0),
        ("kdlib.scale.networks:wrn_40_2", 0, 18),  # those after an addition
    ],
)
def test_for_inference_batch_norm_is_folded_into_the_convolutions(cudnn, network, adds, norms):
    model = build(network, 4, 3).to(DEVICE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(model.state_dict())
    fast = fused.for_inference(model, torch.float32)
    images = torch.randn(3, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        assert torch.allclose(fast(images), model.eval()(images), rtol=1e-3, atol=1e-3 if GPU else 1e-5)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) == norms
    assert GPU or cudnn.count("add_relu") == adds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_for_inference_logits_have_the_precision_asked_for(cudnn):
    fast = fused.for_inference(build("cnn", 4, 3).to(DEVICE), torch.bfloat16)
    assert fast(torch.randn(2, 3, 8, 8, device=DEVICE)).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in fast.parameters())


class Unusual(nn.Module):
    """A shared convolution, norms without weights or statistics, padding given as text, a shortcut of another shape."""

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
    assert torch.allclose(fused.for_inference(model, torch.float32)(images), twin.eval()(images), atol=1e-3)


class DependsOnValues(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


@pytest.mark.parametrize("make", [fused.for_training, lambda model: fused.for_inference(model, torch.float32)])
def test_a_network_that_cannot_be_traced_is_returned_unchanged(make):
    model = DependsOnValues()
    with pytest.warns(UserWarning, match="DependsOnValues cannot be traced .* it runs as it is, more slowly"):
        assert make(model) is model


def test_on_a_cpu_a_network_stays_as_it_is():
    model = build("cnn", 4, 3)
    assert optimize_for_gpu(model, torch.device("cpu")) is model
    assert optimize_for_gpu(model, torch.device("cpu"), for_inference=True) is model


def test_on_a_gpu_a_network_is_optimised(monkeypatch):
    monkeypatch.setattr("kdlib.gpu.half_precision", lambda device: torch.float16)
    gpu, model = torch.device("cuda"), build("cnn", 4, 3)
    assert optimize_for_gpu(model, gpu) is not model
    assert {p.dtype for p in optimize_for_gpu(model, gpu, for_inference=True).parameters()} == {torch.float16}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert optimize_for_gpu(model, gpu) is model  # no Triton, as on Windows
