"""VGG-16 for images of 32x32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.networks.layers import conv_norm_relu, init_convs

__all__ = ["CifarVgg", "cifar_vgg16"]

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each stage: configuration D."""


class CifarVgg(nn.Module):
    """Stages of 3x3 convolutions with batch norm, each halving the image, and one linear layer.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015, table 1); with batch norm, and one
    linear layer instead of three, as is usual on CIFAR. The code of ACNet has a second one, of 512 outputs, before it:
    ``hidden``.

    Args:
        stages: channels and number of convolutions of each.
        num_classes: outputs.
        in_chans: channels of the images.
        hidden: outputs of a linear layer, with a ReLU, before the last; 0 for none.
    """

    def __init__(
        self, stages: Sequence[tuple[int, int]], num_classes: int = 10, in_chans: int = 3, hidden: int = 0
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        width = in_chans
        for channels, depth in stages:
            for _ in range(depth):
                self.features.append(conv_norm_relu(width, channels))
                width = channels
            self.features.append(nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.fc = nn.Linear(hidden or width, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)``, h and w at least 32, to logits ``(n, num_classes)``."""
        x = self.pool(self.features(x)).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        logits: Tensor = self.fc(x)
        return logits


def cifar_vgg16(num_classes: int = 10, in_chans: int = 3, hidden: int = 0) -> CifarVgg:
    """VGG-16: thirteen convolutions and one linear layer, 14.7 million parameters."""
    return CifarVgg(VGG16, num_classes, in_chans, hidden)
