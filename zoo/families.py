"""The networks that tables, demo and benchmark run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["BENCH", "DEMO", "FOLDING", "ORDINARY", "Baseline", "Network"]

Baseline = Literal["timm", "fx"]
"""Whose fold ours is compared with: timm's ``reparameterize_model``, or ``torch.fx``'s ``fuse``."""


def _call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return model(*inputs)


def _detector(model: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Features and head of a detector: its boxes are a selection, and empty in an untrained network."""
    features = list(model.backbone(*inputs).values())
    return features, model.head(features)


@dataclass(frozen=True)
class Network:
    """One network of a table.

    Args:
        spec: what ``reparam.sources.create`` builds.
        baseline: whose fold is shown beside ours.
        shape: of the random input; two samples, so that one can see the output depend on its input.
        outputs: what is compared, from the model and its inputs.
    """

    spec: str
    baseline: Baseline
    shape: tuple[int, ...] = (2, 3, 224, 224)
    outputs: Callable[[nn.Module, tuple[Tensor, ...]], Any] = _call

    @property
    def name(self) -> str:
        """The name without its source."""
        return self.spec.partition(":")[2]

    @property
    def label(self) -> str:
        """How tables call it: timm's networks by name, others with their source."""
        return self.name if self.spec.startswith("timm:") else self.spec

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        """The random input, float32, the same for the same seed."""
        return (torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)),)


def _timm(names: str, baseline: Baseline, **options: Any) -> tuple[Network, ...]:
    return tuple(Network(f"timm:{name}", baseline, **options) for name in names.split())


def _torchvision(names: str, **options: Any) -> tuple[Network, ...]:
    return tuple(Network(f"torchvision:{name}", "fx", **options) for name in names.split())


SMALL = (2, 3, 128, 128)
"""Enough for networks that take any size: depthwise convolutions in float64 are slow."""

FOLDING: tuple[Network, ...] = (
    *_timm("repvgg_a0 repvgg_b1g4 mobileone_s0 mobileone_s1 fastvit_t8 fastvit_sa12 fastvit_mci0", "timm", shape=SMALL),
    *_timm("repvit_m1 repvit_m0_9 repghostnet_050 repghostnet_100 ghostnetv3_050", "timm", shape=SMALL),
    *_timm("levit_128s levit_256d levit_conv_128s tiny_vit_5m_224 efficientvit_m0 efficientvit_m1", "timm"),
    *_timm("shvit_s1 iformer_t iformer_m_distilled lcnetv2_small lcnetv2_base nextvit_small", "timm"),
    *_timm("efficientvim_m1 efficientvim_m1_dist", "timm"),
)
"""Small members of every timm family with a fold of its own (``fuse``, ``reparameterize``, ``switch_to_deploy``)."""

ORDINARY: tuple[Network, ...] = (
    *_timm("resnet18 resnet18d resnet50d ecaresnet26t efficientnet_b0", "fx", shape=SMALL),
    *_timm("mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv4_conv_small", "fx", shape=SMALL),
    *_timm("mobilenetv4_hybrid_medium", "fx", shape=(2, 3, 256, 256)),
    *_timm("regnetx_002 regnety_002 densenet121 hrnet_w18_small dla34 dla46_c convnext_atto", "fx", shape=SMALL),
    *_timm("inception_v3", "fx", shape=(2, 3, 299, 299)),
    *_timm("vit_tiny_patch16_224 vit_tiny_r_s16_p8_224", "fx"),
    *_torchvision("resnet18 vgg11_bn mobilenet_v2", shape=SMALL),
    *_torchvision("ssdlite320_mobilenet_v3_large", shape=(2, 3, 320, 320), outputs=_detector),
    *_torchvision("deeplabv3_mobilenet_v3_large fcn_resnet50", shape=SMALL),
    *_torchvision("r3d_18", shape=(2, 3, 8, 64, 64)),
)
"""Networks that ship no fold."""


def _pick(*specs: str) -> tuple[Network, ...]:
    known = {network.spec: network for network in FOLDING + ORDINARY}
    return tuple(known[spec] for spec in specs)


DEMO: tuple[Network, ...] = _pick(
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    "timm:fastvit_t8",
    "timm:repvit_m1",
    "timm:levit_128s",
    "timm:repghostnet_050",
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
)

BENCH: tuple[Network, ...] = _pick(
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    "timm:fastvit_t8",
    "timm:repvit_m1",
    "timm:levit_128s",
    "timm:repghostnet_050",
    "timm:shvit_s1",
    "timm:tiny_vit_5m_224",
)
