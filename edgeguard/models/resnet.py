"""The ResNets for 32x32 images, without parameters in their shortcuts.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, shortcut option A. The parameters
are named as in akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), so its published weights load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PadChannels(nn.Module):
    """Zero channels before and after those that are there: (N, C, H, W) to (N, C + 2 * each, H, W)."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.each, self.each))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the stride is 2, it takes every second pixel and pads the channels."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Sequential | None = None
        if stride != 1:
            self.shortcut = nn.Sequential(nn.MaxPool2d(1, stride), PadChannels((planes - inputs) // 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        result: Tensor = self.relu2(out + shortcut)
        return result


def _stage(inputs: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels: 6 * blocks + 2 layers. (N, 3, H, W) float to (N, num_classes) logits."""

    input_size = 32

    def __init__(self, blocks: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(torch.flatten(self.pool(out), 1))
        return logits


def resnet8(num_classes: int = 10) -> ResNet:
    return ResNet(1, num_classes)


def resnet20(num_classes: int = 10) -> ResNet:
    return ResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    return ResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> ResNet:
    return ResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    return ResNet(9, num_classes)
