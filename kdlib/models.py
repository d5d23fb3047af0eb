"""The networks, and how to run them.

Where torchvision has a network, it is torchvision's, adapted to small images; the others are written out here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


def resnet50(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's ResNet-50 (He et al., arXiv 1512.03385) with the stem for small images."""
    return _small_image_stem(torchvision.models.resnet50(num_classes=classes), channels)


def resnet18(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 (He et al., arXiv 1512.03385) with the stem for small images."""
    return _small_image_stem(torchvision.models.resnet18(num_classes=classes), channels)


def _small_image_stem(net: torchvision.models.ResNet, channels: int) -> nn.Module:
    # ImageNet's stem (7x7 stride 2, then a stride 2 pool) would leave 8x8 of a 32x32 image before the first block.
    net.conv1 = nn.Conv2d(channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def mobilenet_v2(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's MobileNetV2 (Sandler et al., arXiv 1801.04381), its first two strides of 2 taken out."""
    net = torchvision.models.mobilenet_v2(num_classes=classes)
    stem = net.features[0][0]
    net.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features[0][0].weight, mode="fan_out")
    net.features[2].conv[1][0].stride = (1, 1)
    return net


class PlainCNN(nn.Module):
    """Two 3x3 convolutions a width, each with batch norm and ReLU; max-pooling between widths, a mean at the end."""

    def __init__(self, widths: tuple[int, ...], classes: int, channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.classifier(self.features(images).mean(dim=(2, 3)))


class Perceptron(nn.Module):
    """One hidden layer of ReLU units over 8x8 pixels, to which larger images are averaged down.

    The kind of student that the paper's first experiment has (arXiv 1503.02531, section 3). It is told nothing of what
    an image is: that neighbouring pixels belong together, and that a shifted digit is the same digit, it must learn.
    """

    def __init__(self, classes: int, channels: int = 1, hidden: int = 256):
        super().__init__()
        self.hidden = nn.Linear(64 * channels, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        if images.shape[2:] != (8, 8):
            images = F.adaptive_avg_pool2d(images, 8)
        return self.classifier(F.relu(self.hidden(images.flatten(1))))


class TinyCNN(nn.Module):
    """Two 3x3 convolutions with ReLU and max-pooling, 2x2 of what is left, and a linear layer; no batch norm."""

    def __init__(self, classes: int, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.classifier = nn.Linear(16 * 2 * 2, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.classifier(F.adaptive_avg_pool2d(x, 2).flatten(1))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != width:
            projection = nn.Conv2d(channels, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class WideResNet14(nn.Module):
    """Three stages of two residual blocks, widths 32, 64 and 160: fourteen layers, under a million parameters."""

    def __init__(self, classes: int, channels: int = 3, widths: tuple[int, ...] = (32, 64, 160)):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            blocks += [
                ResidualBlock(channels, width, stride=2 if stage else 1),
                ResidualBlock(width, width, 1),
            ]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))


NETWORKS = {
    "resnet50": resnet50,  # the teacher of profile full
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "cnn": lambda classes, channels=3: PlainCNN((64, 128, 224), classes, channels),  # the student of profile full
    "wide_resnet14": WideResNet14,
    "digits_cnn": lambda classes, channels=1: PlainCNN((16, 48), classes, channels),  # the teacher of profile quick
    "perceptron": Perceptron,  # the student of profile quick
    "tiny_cnn": TinyCNN,
}


def build(network: str, classes: int, channels: int = 3, *, seed: int = 0) -> nn.Module:
    """A freshly initialised network; the same `seed` gives the same weights on every device.

    Its input is (B, channels, H, W) float, normalised; its output (B, classes) logits.

    Raises:
        ValueError: `network` is none of ``NETWORKS``.
    """
    check_network(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[network](classes, channels)


def check_network(network: str) -> None:
    """Raise ValueError where `network` is none of ``NETWORKS``."""
    if network not in NETWORKS:
        near = difflib.get_close_matches(network, NETWORKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"network {network!r} is unknown: expected one of {', '.join(NETWORKS)}{hint}")


def count_parameters(model: nn.Module) -> int:
    """How many numbers training adjusts (batch norm's running statistics are not among them)."""
    return sum(p.numel() for p in model.parameters())


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device` where given, otherwise the GPU where there is one, otherwise the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def half_precision(device: torch.device) -> torch.dtype | None:
    """The half precision to compute in: bfloat16 where the GPU has it, else float16; None (float32) on a CPU."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to :func:`half_precision`, or nothing where that is None."""
    dtype = half_precision(device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def quicker(model: nn.Module, device: torch.device, *, answers: bool = False) -> nn.Module:
    """`model` with fewer journeys through memory (see :mod:`kdlib.fused`); off a GPU, or without Triton, as it is.

    Args:
        model: in the memory of `device`.
        answers: whether only its answers in eval mode are wanted; otherwise what comes back trains `model`'s weights.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return model
    from kdlib import fused  # here, since it cannot be imported everywhere

    return fused.for_answers(model, half_precision(device)) if answers else fused.for_training(model)


@contextlib.contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its algorithms on a GPU and keep the quickest for each shape: for many batches of one size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.no_grad()
def predict_logits(
    model: nn.Module, data, *, view: int = 0, batch_size: int = 512, device: str | torch.device | None = None
) -> Tensor:
    """The network's answers to every image of `data`, in order: (N, C) float32 on the CPU.

    The network runs in eval mode, so that an answer does not depend on which images share its batch, and is left in
    the mode in which it came.

    Args:
        model: moved to `device`.
        data: a :class:`kdlib.data.ImageSet`.
        view: which view of the images (see ``ImageSet.view_table``); 0 is the clean image.
        batch_size: images at once; changes the speed only.
    """
    device = pick_device(device)
    was_training = model.training
    model.to(device, memory_format=torch.channels_last).eval()
    data = data.to(device)
    order, answers = torch.arange(len(data), device=device), []
    if device.type == "cuda" and len(data) > batch_size:
        order = F.pad(order, (0, -len(data) % batch_size))  # all batches of one size, so that cuDNN tries only once
    try:
        with tuned_convolutions(device), mixed_precision(device):
            for indices in order.split(batch_size):
                answers.append(model(data.batch(indices, torch.full_like(indices, view))).float())
    finally:
        model.train(was_training)
    return torch.cat(answers)[: len(data)].cpu()
