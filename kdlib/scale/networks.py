"""Networks of other papers, for images of 32x32 pixels, which are built by path: ``kdlib.scale.networks:convmixer``.

convmixer    the best published under a million parameters on CIFAR-10 without distillation that this book knows of
densenet_bc  the next best
wrn_40_2, wrn_16_2  a pair of teacher and student that many papers on distillation report on, RepDistiller's among them
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet


def convmixer(classes: int, channels: int = 3) -> nn.Module:
    """ConvMixer-256/8 with patches of 1 pixel and kernels of 9 (Trockman & Kolter, arXiv 2201.09792)."""
    return ConvMixer(classes, channels, width=256, depth=8, kernel=9)


def densenet_bc(classes: int, channels: int = 3) -> nn.Module:
    """torchvision's DenseNet-BC, 100 layers, growth 12 (Huang et al., arXiv 1608.06993), the stem for small images."""
    net = DenseNet(growth_rate=12, block_config=(16, 16, 16), num_init_features=24, num_classes=classes)
    net.features.conv0 = nn.Conv2d(channels, 24, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)
    # ImageNet's stem would leave 8x8 of 32x32 pixels; on small images the first block has a norm of its own
    net.features.norm0 = net.features.relu0 = net.features.pool0 = nn.Identity()
    return net


def wrn_40_2(classes: int, channels: int = 3) -> nn.Module:
    """WRN-40-2 (Zagoruyko & Komodakis, arXiv 1605.07146, section 3), without dropout, as RepDistiller has it."""
    return WideResNet(classes, channels, depth=40, factor=2)


def wrn_16_2(classes: int, channels: int = 3) -> nn.Module:
    """WRN-16-2 (Zagoruyko & Komodakis, arXiv 1605.07146, section 3), likewise."""
    return WideResNet(classes, channels, depth=16, factor=2)


class MixerBlock(nn.Module):
    """A convolution of each channel by itself around a shortcut, then one across channels; GELU before each norm."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm1 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.gelu(self.depthwise(x))) + x
        return self.norm2(F.gelu(self.pointwise(x)))


class ConvMixer(nn.Module):
    """One width and one size from the first layer to the last; the patches are single pixels."""

    def __init__(self, classes: int, channels: int, *, width: int, depth: int, kernel: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(MixerBlock(width, kernel) for _ in range(depth)))
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.classifier(self.blocks(self.norm(F.gelu(self.stem(images)))).mean(dim=(2, 3)))


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, each after batch norm and ReLU (He et al., arXiv 1603.05027).

    A shortcut that changes the shape is a convolution, and starts after the first ReLU.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != width:
            self.shortcut = nn.Conv2d(channels, width, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(F.relu(self.norm2(self.conv1(y)))) + shortcut


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks, their widths `factor` times 16, 32 and 64."""

    def __init__(self, classes: int, channels: int, *, depth: int, factor: int):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, channels = [], 16
        for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor)):
            for block in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(channels, width, stride=2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.classifier(F.relu(self.norm(self.blocks(self.stem(images)))).mean(dim=(2, 3)))
