"""The model sources ``timm:`` and ``torchvision:``; neither package is imported before a source is asked."""

from __future__ import annotations

import inspect
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

__all__ = ["TimmSource", "TorchvisionSource", "timm_source", "torchvision_source"]


class TimmSource:
    """Every network of timm's registry, and ``hf-hub:`` names, which timm resolves itself."""

    @cache  # noqa: B019 (one instance per process)
    def names(self) -> Sequence[str]:
        """Architecture names, without the tags of trained weights."""
        import timm

        return tuple(timm.list_models())

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """``timm.create_model``; deprecated names are resolved silently."""
        import timm

        with warnings.catch_warnings(), _from_cache_without_network() if pretrained else nullcontext():
            warnings.simplefilter("ignore")
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        return model


@contextmanager
def _from_cache_without_network() -> Iterator[None]:
    """Where no network is, let the hub's client look into its cache alone: it would try again for a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        if not getproxies():
            socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


class TorchvisionSource:
    """Every network of torchvision: classification, detection, segmentation, video and optical flow."""

    @cache  # noqa: B019 (one instance per process)
    def names(self) -> Sequence[str]:
        """Names of torchvision's registry, without the ones that are already quantised."""
        from torchvision import models

        return tuple(name for name in models.list_models() if not name.startswith("quantized_"))

    def create(self, name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        """``torchvision.models.get_model`` with the default weights or with none, the backbone's included."""
        from torchvision import models

        options.setdefault("weights", "DEFAULT" if pretrained else None)
        builder = models.get_model_builder(name)
        if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
            # Detection and segmentation download a trained backbone unless told not to.
            options.setdefault("weights_backbone", None)
        with warnings.catch_warnings():
            # GoogLeNet and Inception announce that their initialisation will change.
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = builder(**options)
        return model


timm_source = TimmSource()
torchvision_source = TorchvisionSource()
