"""ResNet-18 without shortcuts."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.networks.layers import conv_norm_relu, init_convs

__all__ = ["Plain", "plain18"]


class Plain(nn.Module):
    """The convolutions of an ImageNet ResNet of two-layer blocks, one after the other, each with batch norm and ReLU.

    Source: He et al., "Deep Residual Learning" (CVPR 2016), sec. 3.3 and table 1; Plain-18 is a baseline of Cao et al.,
    "DO-Conv" (IEEE TIP 2022), table 1. Its parameters are those of ResNet-18 without the three projections.

    Args:
        blocks: pairs of convolutions in each of the four stages.
        num_classes: outputs.
        in_chans: channels of the images.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = conv_norm_relu(in_chans, 64, kernel=7, stride=2)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.stages = nn.Sequential()
        width = 64
        for channels, pairs in zip((64, 128, 256, 512), blocks, strict=True):
            layers = [conv_norm_relu(width, channels, stride=1 if channels == width else 2)]
            layers += [conv_norm_relu(channels, channels) for _ in range(2 * pairs - 1)]
            self.stages.append(nn.Sequential(*layers))
            width = channels
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)`` to logits ``(n, num_classes)``."""
        x = self.stages(self.pool(self.stem(x)))
        logits: Tensor = self.fc(self.average(x).flatten(1))
        return logits


def plain18(num_classes: int = 1000, in_chans: int = 3) -> Plain:
    """Seventeen convolutions and a linear layer."""
    return Plain((2, 2, 2, 2), num_classes, in_chans)
