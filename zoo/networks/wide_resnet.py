"""Wide residual networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.networks.layers import init_convs

__all__ = ["WideResNet", "wrn16_8"]


class Block(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice; where the shape changes, a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages of pre-activation blocks with 16k, 32k and 64k channels, average, linear.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), table 1; 11.0 million parameters for depth 16
    and k = 8 (table 4). As in their code the projection reads what the first convolution reads.

    Args:
        depth: 6n + 4, n the blocks of a stage.
        k: the factor of the widths.
        num_classes: outputs.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int, k: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        width = 16
        for number, channels in enumerate((16 * k, 32 * k, 64 * k)):
            blocks = [Block(width, channels, stride=1 if number == 0 else 2)]
            blocks += [Block(channels, channels, stride=1) for _ in range((depth - 4) // 6 - 1)]
            self.stages.append(nn.Sequential(*blocks))
            width = channels
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)`` to logits ``(n, num_classes)``."""
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def wrn16_8(num_classes: int = 10, in_chans: int = 3) -> WideResNet:
    """Depth 16, widths times 8."""
    return WideResNet(16, 8, num_classes, in_chans)
