"""ResNet for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.networks.layers import init_convs

__all__ = ["CifarResNet", "resnet56"]

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, the input added before the last ReLU, projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - in_channels
        if projection and self.more:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.bn = nn.BatchNorm2d(channels)
            self.more = 0

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "shortcut"):
            x = self.bn(self.shortcut(x))
        elif self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of n blocks with 16, 32 and 64 channels, average, linear: 6n + 2 layers.

    The shortcut is option A: every other pixel, and zeros for the new channels. He et al. choose it on CIFAR because a
    residual network then has exactly the parameters of the plain one; ACNet's code projects instead (option B), which
    ``projection`` is for.

    Source: He et al., "Deep Residual Learning" (CVPR 2016), sec. 4.2; 0.85 million parameters for n = 9 (table 6).

    Args:
        n: blocks of a stage.
        num_classes: outputs.
        in_chans: channels of the images.
        projection: whether shortcuts that change the shape are 1x1 convolutions with batch norm.
    """

    def __init__(self, n: int, num_classes: int = 10, in_chans: int = 3, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.stages = nn.Sequential()
        width = WIDTHS[0]
        for channels in WIDTHS:
            blocks = [Block(width, channels, 1 if channels == width else 2, projection)]
            blocks += [Block(channels, channels, 1, projection) for _ in range(n - 1)]
            self.stages.append(nn.Sequential(*blocks))
            width = channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)`` to logits ``(n, num_classes)``."""
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def resnet56(num_classes: int = 10, in_chans: int = 3, projection: bool = False) -> CifarResNet:
    """The network of n = 9."""
    return CifarResNet(9, num_classes, in_chans, projection)
