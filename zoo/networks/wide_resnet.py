"""Wide residual networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.networks.layers import init_convs

__all__ = ["WideResNet", "wrn16_8"]


class Block(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice; where the shape changes, a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int, projection: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=projection)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=projection)
        self.shortcut = None if in_channels == channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        if projection and self.shortcut is not None:
            self.bn = nn.BatchNorm2d(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in_channels, h, w)`` to ``(n, channels, h / stride, w / stride)``."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.shortcut is None:
            return out + x
        projected: Tensor = self.shortcut(F.relu(self.bn(x)) if hasattr(self, "bn") else active)
        return out + projected


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages of pre-activation blocks with 16k, 32k and 64k channels, average, linear.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016), table 1; 11.0 million parameters for depth 16
    and k = 8 (table 4). As in their code the projection reads what the first convolution reads. ACNet's code gives it a
    norm of its own, and its blocks leave a bias in each 3x3 convolution, which ``projection`` is for.

    Args:
        depth: 6n + 4, n the blocks of a stage.
        k: the factor of the widths.
        num_classes: outputs.
        in_chans: channels of the images.
        projection: whether projections have a norm of their own, and 3x3 convolutions a bias.
    """

    def __init__(self, depth: int, k: int, num_classes: int = 10, in_chans: int = 3, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=projection)
        self.stages = nn.Sequential()
        width = 16
        for number, channels in enumerate((16 * k, 32 * k, 64 * k)):
            blocks = [Block(width, channels, 1 if number == 0 else 2, projection)]
            blocks += [Block(channels, channels, 1, projection) for _ in range((depth - 4) // 6 - 1)]
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


def wrn16_8(num_classes: int = 10, in_chans: int = 3, projection: bool = False) -> WideResNet:
    """Depth 16, widths times 8."""
    return WideResNet(16, 8, num_classes, in_chans, projection)
