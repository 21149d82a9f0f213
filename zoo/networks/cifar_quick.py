"""Cifar-quick with batch norm."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.networks.layers import conv_norm_relu

__all__ = ["CifarQuick"]


class CifarQuick(nn.Module):
    """Three 5x5 convolutions and two linear layers, for images of 32x32.

    Source: the "quick" network of Caffe's CIFAR-10 example (Jia et al., "Caffe", 2014), as Ding et al., "ACNet" (ICCV
    2019, sec. 4.1), train it: a batch norm behind each convolution, and pooling that rounds down, so that 3x3 positions
    are left. For images of another size those nine are averages.

    Args:
        num_classes: outputs.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(in_chans, 32, kernel=5)
        self.pool1 = nn.MaxPool2d(3, 2)
        self.conv2 = conv_norm_relu(32, 32, kernel=5)
        self.pool2 = nn.AvgPool2d(3, 2)
        self.conv3 = conv_norm_relu(32, 64, kernel=5)
        self.pool3 = nn.AvgPool2d(3, 2)
        self.nine = nn.AdaptiveAvgPool2d(3)
        self.fc1 = nn.Linear(64 * 9, 64)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)``, h and w at least 15, to logits ``(n, num_classes)``."""
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        x = self.pool3(self.conv3(x))
        x = self.relu(self.fc1(self.nine(x).flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
