"""What these networks are made of."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["conv_norm_relu", "init_convs"]


def conv_norm_relu(in_channels: int, channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without a bias that keeps the size at stride 1, batch norm, ReLU."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)))


def init_convs(model: nn.Module) -> None:
    """Normal numbers that keep the gradients' size through ReLUs (He et al., "Delving Deep", ICCV 2015, sec. 2.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
