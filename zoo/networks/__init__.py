"""Networks of the published experiments that neither timm nor torchvision has: the source ``zoo:``.

Ordinary networks without blocks; :func:`reparam.expand` puts those in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from reparam import ReparamError
from reparam.sources import UnknownNameError, is_spec, names, near, split_commas
from zoo.networks.cifar_quick import CifarQuick
from zoo.networks.cifar_resnet import resnet56
from zoo.networks.cifar_vgg import cifar_vgg16
from zoo.networks.mnist_toy import MnistToy
from zoo.networks.plain import plain18
from zoo.networks.wide_resnet import wrn16_8

__all__ = ["NETWORKS", "NetworksSource", "find_spec", "source"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cifar_quick": CifarQuick,
    "cifar_vgg16": cifar_vgg16,
    "mnist_toy": MnistToy,
    "plain18": plain18,
    "resnet56": resnet56,
    "wrn16_8": wrn16_8,
}
"""What builds each; all take ``num_classes`` and ``in_chans``."""

ORDER = ("zoo", "timm", "torchvision")
"""Sources in which a name without a source is looked up."""


class NetworksSource:
    """The networks of this package; none has trained weights."""

    def names(self) -> Sequence[str]:
        return tuple(NETWORKS)

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """Raises :class:`reparam.ReparamError` if trained weights are asked for."""
        if pretrained:
            raise ReparamError(f"zoo:{name} has no trained weights; train it with: reparam train --model {name}")
        return NETWORKS[name](**options)


source = NetworksSource()


def find_spec(name: str) -> str:
    """The spec of a network's name, options kept: ``resnet56`` is ``zoo:resnet56``, ``resnet18`` is ``timm:resnet18``.

    A spec stays as it is. Raises :class:`reparam.sources.UnknownNameError` for a name that none of zoo, timm and
    torchvision has, with near names.
    """
    if is_spec(name):
        return name
    if name.endswith(".py"):
        raise UnknownNameError(f"{name} is code: name the network in it, {name}:Net for example")
    bare = split_commas(name)[0]
    known: list[str] = []
    for place in ORDER:
        found = names(place)
        if bare in found:
            return f"{place}:{name}"
        known += found
    if os.path.exists(name):
        raise UnknownNameError(f"{name} is a file or folder: name a network, timm:resnet18 or ./net.py:Net for example")
    raise UnknownNameError(f"unknown network {bare!r} in {', '.join(ORDER)}{near(bare, known)}")
