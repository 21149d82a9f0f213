"""The smallest network of the DO-Conv publication."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MnistToy"]


class MnistToy(nn.Module):
    """Three 3x3 convolutions of stride 2 with 16, 16 and one output per class, a ReLU behind each, average.

    Source: the PyTorch example in the code of Cao et al., "DO-Conv" (IEEE TIP 2022). It has no batch norm, and the
    logits are averages of what the last ReLU lets through, as there.

    Args:
        num_classes: outputs.
        in_chans: channels of the images.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (in_chans, 16, 16, num_classes)
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(n, in_chans, h, w)`` to logits ``(n, num_classes)``."""
        return self.pool(self.layers(x)).flatten(1)  # type: ignore[no-any-return]
