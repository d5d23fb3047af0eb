"""The networks: torchvision's, adapted to small images, and smaller ones that are written out here."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from kdlib.records.artefacts import did_you_mean


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
        images = F.adaptive_avg_pool2d(images, 8)  # 8x8 stay as they are
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


class MLP(nn.Module):
    """Hidden layers of ReLU units over the raw pixels: the paper's networks for MNIST have two of one width."""

    def __init__(self, hidden: tuple[int, ...], classes: int, channels: int = 1, pixels: int = 28 * 28):
        super().__init__()
        widths = [pixels * channels, *hidden]
        layers = [x for i, o in itertools.pairwise(widths) for x in (nn.Linear(i, o), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.layers(images)


class LeNet(nn.Module):
    """Two 5x5 convolutions with ReLU and max-pooling, and a hidden layer, in the manner of LeCun et al., 1998."""

    def __init__(self, widths: tuple[int, int], classes: int, channels: int = 1, hidden: int = 128):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 5, padding=2)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5, padding=2)
        self.hidden = nn.Linear(49 * widths[1], hidden)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, 28, 28) -> (B, classes)
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.classifier(F.relu(self.hidden(x.flatten(1))))


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
    "cnn": functools.partial(PlainCNN, (64, 128, 224)),  # the student of profile full
    "wide_resnet14": WideResNet14,
    "digits_cnn": functools.partial(PlainCNN, (16, 48)),  # the teacher of profile quick
    "perceptron": Perceptron,  # the student of profile quick
    "tiny_cnn": TinyCNN,
    "lenet": functools.partial(LeNet, (16, 32)),  # the teacher of profile laptop
    "mlp100": functools.partial(MLP, (100,)),  # the student of profile laptop
}


def build(network: str | Callable, classes: int, channels: int = 3, *, seed: int = 0) -> nn.Module:
    """A freshly initialised network; the same `seed` gives the same weights on every device.

    Its input is (B, channels, H, W) float, normalised; its output (B, classes) logits.

    Args:
        network: one of ``NETWORKS``; a callable ``(classes, channels) -> nn.Module``; or the dotted path of one,
            ``package.module:function``, which is imported: give only what you would run.

    Raises:
        ValueError: `network` is none of these, or does not give a network.
    """
    make = find_network(network)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(classes, channels)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"network {network!r} gave a {type(model).__name__} for {classes} classes and {channels} channels: "
            "expected a torch.nn.Module"
        )
    return model


def find_network(network: str | Callable) -> Callable[[int, int], nn.Module]:
    """The function that makes a network, in any of the forms that :func:`build` takes; ValueError if it is none."""
    if callable(network) and not isinstance(network, nn.Module):
        return network
    if isinstance(network, nn.Module):
        raise ValueError(
            f"network is a {type(network).__name__} that exists already: expected a function of (classes, channels) "
            "that makes one, so that every seed starts from its own weights"
        )
    if isinstance(network, str) and network in NETWORKS:
        return NETWORKS[network]
    module, colon, name = str(network).partition(":")
    if not colon:
        raise ValueError(
            f"network {network!r} is unknown: expected one of {', '.join(NETWORKS)}, or the path of your own, "
            f"package.module:function{did_you_mean(network, NETWORKS)}"
        )
    try:
        make = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        if not callable(make):
            raise TypeError(f"{name} is {make!r}, no function")
        return make
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of ".mynets:" or ":small"
        raise ValueError(
            f"network {network!r} cannot be imported ({error}): expected package.module:function, importable from the "
            "working folder or from PYTHONPATH"
        ) from error


def network_name(network: str | Callable) -> str:
    """What a network is called, in file names too: ``cnn``, or ``mynets.small`` for ``mynets:small``."""
    if isinstance(network, str):
        return network.replace(":", ".")
    made_by = network.func if isinstance(network, functools.partial) else network
    made_by = made_by if hasattr(made_by, "__qualname__") else type(made_by)
    return f"{made_by.__module__}.{made_by.__qualname__}"


def count_parameters(model: nn.Module) -> int:
    """How many numbers training adjusts (batch norm's running statistics are not among them)."""
    return sum(p.numel() for p in model.parameters())
