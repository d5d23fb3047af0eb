"""Where and how a network is computed: device, precision, memory layout, and a training step recorded as one graph."""

import functools
import importlib
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlib import LiveTeacher, SoftLabels, build, distillation_loss, generate, gpu, train
from kdlib.data import Batch
from kdlib.gpu import (
    CUDAGraphStep,
    Engine,
    device_name,
    half_precision,
    lay_out,
    mixed_precision,
    optimize_for_gpu,
    pick_device,
    place,
    set_learning_rate,
    tuned_convolutions,
)
from kdlib.records.identity import IdentityError, identify
from kdlib.train import Recipe

training = importlib.import_module("kdlib.train")  # kdlib.train itself is the function
pytestmark = pytest.mark.usefixtures("isolated")

CPU = torch.device("cpu")


# --- device and precision --------------------------------------------------------------------------------------------


def test_the_gpu_is_picked_if_there_is_one_and_the_device_given_comes_first(monkeypatch):
    assert pick_device().type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device().type == "cuda"
    assert pick_device("cpu").type == "cpu"
    assert pick_device(torch.device("cuda", 1)).index == 1


def test_a_device_is_named_in_words(monkeypatch):
    assert device_name("cpu") == "CPU, 1 thread"  # so many conftest.py sets
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert device_name(CPU) == "CPU, 4 threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert device_name("cuda") == "NVIDIA H100"


def test_half_precision_is_bfloat16_if_the_gpu_has_it_and_float16_if_it_would_be_emulated(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert half_precision(cuda) == torch.bfloat16
    assert half_precision(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert half_precision(cuda) == torch.float16


def test_on_a_cpu_it_is_computed_in_float32():
    with mixed_precision(CPU):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cudnn_is_told_to_try_its_algorithms_on_a_gpu_and_is_never_turned_off(device):
    before = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    with tuned_convolutions(torch.device(device)):
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.benchmark == (device == "cuda")
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark) == before


def test_off_a_gpu_a_network_is_not_rewritten():
    model = build("tiny_cnn", 4, 1)
    assert optimize_for_gpu(model, CPU) is model
    assert optimize_for_gpu(model, CPU, for_inference=True) is model


# --- memory layout ---------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """Kernels of every kind, and feature maps that are flattened in one way or another."""

    def __init__(self, channels: int = 3, how: str = "view"):
        super().__init__()
        self.how, self.runs = how, 0
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 1, 1)
        )
        self.last = nn.Conv2d(1, 6, 1)  # its weights have both layouts at once
        self.classifier = nn.Linear(6 * 64, 4)

    def forward(self, images):
        self.runs += 1
        x = self.last(self.layers(images)) + self.layers[0](images)
        x = {"view": lambda: x.view(len(x), -1), "reshape": lambda: x.reshape(len(x), -1)}[self.how]()
        return self.classifier(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("how", "layout"), [("view", torch.contiguous_format), ("reshape", torch.channels_last)])
def test_a_network_gets_the_layout_that_it_can_run_in(how, layout, channels, training):
    model = Convolutions(channels, how).train(training)
    images = torch.randn(4, 8, 8, channels).permute(0, 3, 1, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert place(model, CPU, images) == layout
    assert model.training is training
    assert model(lay_out(images, layout)).shape == (4, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    laid_out = model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert laid_out == (how == "reshape" or channels == 1)


@pytest.mark.parametrize("how", ["view", "reshape"])
def test_placing_a_network_again_leaves_its_weights_where_they_are_in_memory(how):
    model, images = Convolutions(3, how), torch.randn(4, 3, 8, 8)
    place(model, CPU, images)
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):  # as validation does, between steps that may have been recorded
        place(model, CPU, images)
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_one_image_is_tried_and_nothing_is_trained_by_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).train()
    sizes = []
    model[0].register_forward_pre_hook(lambda module, images: sizes.append(len(images[0])))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    place(model, CPU, torch.randn(8, 3, 8, 8))
    assert sizes == [1]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_of_the_networks_own_is_passed_on_and_its_mode_restored():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).train()  # of another input size
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        place(model, CPU, torch.zeros(2, 3, 8, 8))
    assert model.training


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_are_laid_out_to_their_strides(layout, channels):
    for images in (torch.randn(2, channels, 5, 4), torch.randn(2, 5, 4, channels).permute(0, 3, 1, 2)):
        result = lay_out(images, layout)
        assert torch.equal(result, images)
        assert result.is_contiguous(memory_format=layout)
    if layout == torch.contiguous_format:
        assert result.stride() == (channels * 20, 20, 4, 1)


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_on_a_cpu_the_engine_is_plain_pytorch(fast):
    model, images = build("tiny_cnn", 4, 1), torch.randn(4, 1, 8, 8)
    engine = Engine(model, CPU, images, fast=fast)
    assert engine.network is model
    assert not engine.fast
    assert not engine.scaler.is_enabled()
    assert torch.equal(engine.forward(images), model(images))
    optimizer = engine.sgd(model, 0.1, momentum=0.9, nesterov=True, weight_decay=0.5)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.1, 0.9, True, 0.5)
    assert not group["fused"]

    def step(batch):
        return batch.images.sum()

    assert engine.record(step, optimizer, fail) is step  # not even asked


def fail():
    raise AssertionError("asked")


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_logits_come_in_float32_or_finer(dtype, wanted):
    model, images = build("tiny_cnn", 4, 1).to(dtype), torch.randn(4, 1, 8, 8, dtype=dtype)
    assert Engine(model, CPU, images).forward(images).dtype == wanted


def test_the_learning_rate_is_changed_in_place_if_a_recorded_step_reads_it():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.2
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_learning_rate(optimizer, 0.3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.3)


# --- a recorded step -------------------------------------------------------------------------------------------------


class FakeGraph:
    """What recording needs of CUDA, without a GPU: a graph that, replayed, calls what was recorded."""

    def __init__(self, monkeypatch, fails: bool = False):
        self.recording, self.replays, self.fails = False, 0, fails
        stream = mock.MagicMock()
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *a, **k: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: self)

    def __enter__(self):
        self.recording = True

    def __exit__(self, *_):
        self.recording = False
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

    def replay(self):
        self.replays += 1
        self.on_replay()

    def step(self, seen: list):
        """A step that notes its images, recorded or not."""

        def step(batch):
            if self.recording:
                loss = torch.zeros(())
                self.on_replay = lambda: (seen.append(batch.images.clone()), loss.fill_(float(batch.images.sum())))
                return loss
            seen.append(batch.images.clone())
            return batch.images.sum()

        return step


def batches_of(count: int) -> list[Batch]:
    images = [torch.full((2, 1), float(i)) for i in range(count)]
    return [Batch(x, torch.tensor([i, i]), torch.tensor([0, 1]), None) for i, x in enumerate(images)]


def test_a_recorded_step_is_replayed_on_every_batch(monkeypatch):
    graph, seen, batches = FakeGraph(monkeypatch), [], batches_of(7)
    recorded = CUDAGraphStep(graph.step(seen))
    losses = [recorded(batch).item() for batch in batches]
    assert losses == [batch.images.sum().item() for batch in batches]
    assert all(torch.equal(a, batch.images) for a, batch in zip(seen, batches, strict=True))
    assert graph.replays == 4  # three ordinary steps come first


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(monkeypatch):
    FakeGraph(monkeypatch, fails=True)
    recorded = CUDAGraphStep(lambda batch: batch.images.sum())
    batch = Batch(torch.ones(2, 1), torch.zeros(2), torch.zeros(2), None)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph .operation not permitted"):
        losses = [recorded(batch).item() for _ in range(6)]
    assert losses == [2.0] * 6


def test_a_step_whose_objective_changes_is_not_recorded(monkeypatch):
    graph, seen = FakeGraph(monkeypatch), []
    recorded = CUDAGraphStep(graph.step(seen), lambda: len(seen))
    with pytest.warns(UserWarning, match="the objective changes during training: its steps are not recorded"):
        assert [recorded(batch).item() for batch in batches_of(6)] == [0, 2, 4, 6, 8, 10]
    assert graph.replays == 0
    assert len(seen) == 6


@pytest.fixture
def on_a_gpu(monkeypatch):
    """An engine that believes that it trains on a GPU, and what it does with CUDA graphs."""

    def make() -> tuple[Engine, FakeGraph, torch.optim.Optimizer]:
        graph = FakeGraph(monkeypatch)
        model = build("tiny_cnn", 4, 1)
        engine = Engine(model, CPU, torch.zeros(1, 1, 8, 8))
        engine.fast = True
        return engine, graph, engine.sgd(model, 0.1)

    return make


STATE = [0]
TEMPERATURE = 4.0


def constant(student_logits, teacher_logits, labels, temperature=4.0):
    return distillation_loss(student_logits, teacher_logits, labels, temperature=temperature, alpha=TEMPERATURE / 8)


def stateful(student_logits, labels):
    STATE[0] += 1
    return F.cross_entropy(student_logits / STATE[0], labels)


def counting(student_logits, labels):
    global TEMPERATURE
    TEMPERATURE += 1
    return F.cross_entropy(student_logits / TEMPERATURE, labels)


class Objective(nn.Module):
    def forward(self, student_logits, labels):
        return F.cross_entropy(student_logits, labels)


CONSTANT = {
    "a library's function": F.cross_entropy,
    "keywords bound": partial(F.cross_entropy, label_smoothing=0.1),
    "the distillation loss": partial(distillation_loss, temperature=4.0, alpha=0.1),
    "a function of one's own": constant,
    "a tensor bound": partial(F.cross_entropy, weight=torch.ones(4)),
    "a module": Objective(),
}
CHANGING = {
    "a lambda": lambda student_logits, labels: F.cross_entropy(student_logits, labels),
    "a closure": (lambda state: lambda s, y: F.cross_entropy(s / state[0], y))([4.0]),
    "an object": type("Loss", (), {"__call__": lambda self, s, y: F.cross_entropy(s, y)})(),
    "a bound method": Objective().forward,
    "a global list": stateful,
    "a global that it assigns": counting,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_step_is_recorded_if_its_objective_is_constant(on_a_gpu, name):
    engine, _, optimizer = on_a_gpu()
    recorded = engine.record(fail, optimizer, partial(identify, CONSTANT[name]))
    assert isinstance(recorded, CUDAGraphStep)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("name", CHANGING)
def test_a_step_is_not_recorded_if_its_objective_may_change_and_a_line_says_so(on_a_gpu, name):
    engine, _, optimizer = on_a_gpu()
    with pytest.warns(UserWarning, match="the steps are not recorded as a CUDA graph, and take longer: .+"):
        step = engine.record(fail, optimizer, partial(identify, CHANGING[name]))
    assert step is fail
    assert isinstance(optimizer.param_groups[0]["lr"], float)


def test_with_a_loss_scale_or_fast_false_nothing_is_recorded(on_a_gpu):
    engine, _, optimizer = on_a_gpu()
    engine.scaler = torch.amp.GradScaler("cpu", enabled=True)
    assert engine.record(fail, optimizer, fail) is fail
    engine.scaler, engine.fast = torch.amp.GradScaler("cpu", enabled=False), False
    assert engine.record(fail, optimizer, fail) is fail


def test_targets_of_ones_own_may_change(image_set, toy_teacher):
    data = image_set()
    for targets in (None, LiveTeacher(toy_teacher(data))):
        assert training._identify_objective(F.cross_entropy, targets) == identify(F.cross_entropy)
    with pytest.raises(IdentityError, match="the targets are of your own making, and may change"):
        training._identify_objective(F.cross_entropy, lambda batch: None)


class Warming(nn.Module):
    """A loss whose temperature rises with every step, as a schedule written into the loss does."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, student_logits, labels):
        self.steps += 1
        return F.cross_entropy(student_logits / self.steps, labels)


def bound_state(student_logits, labels, state):
    state[0] += 1
    return F.cross_entropy(student_logits / state[0], labels)


def attribute(student_logits, labels):
    attribute.steps = getattr(attribute, "steps", 0) + 1
    return F.cross_entropy(student_logits / attribute.steps, labels)


@pytest.mark.parametrize("make", [Warming, lambda: partial(bound_state, state=[0]), lambda: attribute])
def test_a_schedule_inside_the_loss_goes_on_while_it_would_have_been_recorded(on_a_gpu, make):
    """The identity of such a loss is known, but its first steps change it: recorded, it would be frozen."""
    loss_fn = make()
    engine, graph, optimizer = on_a_gpu()
    logits, labels = torch.randn(2, 4), torch.tensor([0, 1])
    batch = Batch(torch.zeros(2, 1, 8, 8), labels, labels, labels)
    step = engine.record(lambda batch: loss_fn(logits, batch.labels), optimizer, partial(identify, loss_fn))
    with pytest.warns(UserWarning, match="the objective changes during training"):
        losses = [step(batch).item() for _ in range(8)]
    assert graph.replays == 0
    # the temperatures 1 to 8
    assert losses == pytest.approx([F.cross_entropy(logits / t, labels).item() for t in range(1, 9)], rel=1e-5)
    if loss_fn is attribute:
        del attribute.steps


def test_training_asks_before_it_records(monkeypatch, image_set):
    asked = []
    monkeypatch.setattr(Engine, "record", lambda engine, step, optimizer, objective: asked.append(objective) or step)
    train(build("tiny_cnn", 4, 1), image_set(), F.cross_entropy, Recipe(1, 16, 0.1), progress=False)
    assert asked[0]() == identify(F.cross_entropy)


# --- on a GPU --------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RECIPE = Recipe(epochs=6, batch_size=16, learning_rate=0.02)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.undo()  # the fixture that hides the GPU


@needs_gpu
@pytest.mark.parametrize("network", ["digits_cnn", functools.partial(lambda c, ch: Convolutions(ch, "view"))])
def test_fast_or_not_the_same_student_is_trained(cuda, image_set, toy_teacher, network):
    data = image_set()
    logits = torch.from_numpy(generate(toy_teacher(data), data, 9, progress=False))
    loss_fn, targets = partial(distillation_loss, temperature=4.0, alpha=0.1), SoftLabels(logits, data.identity)
    models = [build(network, 4, 1, seed=1) for _ in range(2)]
    histories = [
        train(model, data, loss_fn, RECIPE, targets=targets, validation=data, device="cuda", progress=False, fast=fast)
        for model, fast in zip(models, (True, False), strict=True)
    ]
    assert histories[0].loss == pytest.approx(histories[1].loss, rel=0.05)
    assert histories[0].loss[-1] < histories[0].loss[0]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02)


@needs_gpu
def test_a_schedule_inside_the_loss_is_not_frozen(cuda, image_set):
    data = image_set()
    loss_fn = Warming()
    with pytest.warns(UserWarning, match="the objective changes during training"):
        train(build("tiny_cnn", 4, 1), data, loss_fn, RECIPE, device="cuda", progress=False)
    assert loss_fn.steps == 18


@needs_gpu
def test_a_loss_that_cannot_be_identified_trains_and_says_so(cuda, image_set):
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph, and take longer: a lambda"):
        history = train(
            build("tiny_cnn", 4, 1),
            image_set(),
            lambda s, y: F.cross_entropy(s, y),
            replace(RECIPE, epochs=2),
            device="cuda",
            progress=False,
        )
    assert all(map(math.isfinite, history.loss))


@pytest.mark.parametrize("for_inference", [False, True])
def test_a_network_that_needs_contiguous_maps_is_not_fused(monkeypatch, for_inference):
    model = build("digits_cnn", 10, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    device = torch.device("cuda")
    assert optimize_for_gpu(model, device, torch.contiguous_format, for_inference=for_inference) is model


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_devices_that_were_not_tried_are_passed_on_to_pytorch(name):
    device = gpu.pick_device(name)
    assert (device.type, gpu.device_name(device), gpu.half_precision(device)) == (name, name, None)
    with gpu.mixed_precision(device), gpu.tuned_convolutions(device):
        network = nn.Linear(2, 2)
        assert gpu.optimize_for_gpu(network, device) is network
