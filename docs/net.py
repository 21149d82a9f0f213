"""A network of one's own in a file: ``reparam plan docs/net.py:Net --block acb``."""

from torch import Tensor, nn


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution, its norm and an activation."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two layers and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(layer(channels, channels), layer(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Net(nn.Sequential):
    """For small grey images; ``width`` and ``num_classes`` are options: ``docs/net.py:Net,width=32``."""

    def __init__(self, width: int = 16, num_classes: int = 10) -> None:
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, num_classes))
        super().__init__(layer(1, width), Residual(width), layer(width, 2 * width, stride=2), *head)
