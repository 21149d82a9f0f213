"""The networks that tables, demo and benchmark run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reparam import sources

__all__ = ["BENCH", "DEMO", "FOLDING", "ORDINARY", "ROUND_TRIP", "Baseline", "Network", "Trained"]

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


# ------------------------------------------------------------------------------------------------- networks to train


def _squares(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Mean square of all outputs, those of auxiliary heads included."""
    outputs = [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.square().mean() for t in outputs]).sum()


def _detection_loss(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Sum of a detector's own losses, with two objects in every image."""
    images = inputs[0]
    size = images[0].shape[-1]
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.8]]) * size
    masks = torch.zeros(2, *images[0].shape[-2:], dtype=torch.uint8)
    masks[:, size // 4 : size // 2, size // 3 : size // 2] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in images]
    losses: dict[str, Tensor] = model(images, targets)
    return torch.stack(list(losses.values())).sum()


def _dense_outputs(model: Any, inputs: tuple[Any, ...]) -> Any:
    """Everything in a detector that convolves: its boxes are a selection, and empty in an untrained network."""
    x = torch.stack(inputs[0])
    features = model.backbone(x)
    maps = list(features.values())
    if not hasattr(model, "rpn"):
        return maps, model.head(maps)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.8]], dtype=x.dtype) * x.shape[-1]
    regions, sizes, heads = [boxes] * len(x), [tuple(x.shape[-2:])] * len(x), model.roi_heads
    found = [model.rpn.head(maps), heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, sizes)))]
    if heads.has_mask():
        found.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, regions, sizes))))
    return maps, found


def _flow_outputs(model: Any, inputs: tuple[Any, ...]) -> Any:
    """Everything in RAFT that convolves: the code between works in float32 alone."""
    context = model.context_encoder(inputs[0])
    size = model.update_block.hidden_state_size
    hidden, around = context.split([size, context.shape[1] - size], dim=1)
    correlation = context[:, :1].expand(-1, model.corr_block.out_channels, -1, -1)
    hidden, flow = model.update_block(hidden.tanh(), around.relu(), correlation, context[:, :2])
    return model.feature_encoder(inputs[1]), hidden, flow


@dataclass(frozen=True)
class Trained(Network):
    """A network that is also trained for a few steps.

    Args:
        loss: from the model in training mode and its inputs.
        images: whether it takes a list of images (detection).
        count: how many tensors it takes otherwise.
        build: makes the network where no source knows the spec.
    """

    baseline: Baseline = "fx"
    shape: tuple[int, ...] = (2, 3, 64, 64)
    loss: Callable[[nn.Module, tuple[Any, ...]], Tensor] = _squares
    images: bool = False
    count: int = 1
    build: Callable[[], nn.Module] | None = None

    @property
    def name(self) -> str:
        """The name without its source and options."""
        return self.spec.partition(":")[2].partition(",")[0]

    @property
    def label(self) -> str:
        """How tables call it, without options."""
        return self.spec.partition(",")[0].removeprefix("timm:")

    def create(self) -> nn.Module:
        """A new network of random weights."""
        return sources.create(self.spec) if self.build is None else self.build()

    def inputs(self, seed: int) -> tuple[Any, ...]:
        """The positional arguments, random, float32, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.images:
            return (list(torch.rand(self.shape, generator=generator)),)
        return tuple(torch.randn(self.shape, generator=generator) for _ in range(self.count))


def _trained(specs: str, size: int = 64, **options: Any) -> tuple[Trained, ...]:
    """Networks by spec, timm's without its source, on images of ``size``; ``sized`` tells that to the network too."""
    shape = options.pop("shape", (2, 3, size, size))
    sized = f",{options.pop('sized')}={size}" if "sized" in options else ""
    named = (spec if ":" in spec else f"timm:{spec}" for spec in specs.split())
    return tuple(Trained(spec + sized, shape=shape, **options) for spec in named)


def _detected(names: str, size: int, *options: str) -> tuple[Trained, ...]:
    """Detectors of torchvision, with options for their builder."""
    specs = " ".join(",".join((f"torchvision:{name}", *options)) for name in names.split())
    return _trained(specs, size, outputs=_dense_outputs, loss=_detection_loss, images=True)


def _torchvision_trained(names: str, size: int = 64, **options: Any) -> tuple[Trained, ...]:
    return _trained(" ".join(f"torchvision:{name}" for name in names.split()), size, **options)


RESIZED = ("min_size=96", "max_size=96")
FEW = ("rpn_post_nms_top_n_train=50", "rpn_post_nms_top_n_test=50", "box_detections_per_img=10")

ROUND_TRIP: tuple[Trained, ...] = (
    *_trained("mobilenetv3_small_100 test_nfnet regnetx_002 dla46x_c cs3darknet_focus_s cspnext_tiny repghostnet_050"),
    *_torchvision_trained("shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5 lraspp_mobilenet_v3_large"),
    *_torchvision_trained("raft_small", 128, count=2, outputs=_flow_outputs),
    *_torchvision_trained("mc3_18", shape=(2, 3, 4, 32, 32)),
    *_detected("fasterrcnn_mobilenet_v3_large_320_fpn", 96, *RESIZED, *FEW),
    *_detected("ssdlite320_mobilenet_v3_large", 320),
    *_trained("ese_vovnet19b_dw hgnetv2_b0 tf_efficientnet_b0 tf_efficientnet_cc_b0_4e mixnet_s hardcorenas_a"),
    *_trained("ghostnet_100 lcnetv2_small rexnet_100 starnet_s1 fasternet_t0 cpubone_nano repvit_m0_9 shvit_s1"),
    *_trained("convnext_atto inception_next_atto mambaout_femto edgenext_xx_small efficientvit_b0 efficientvim_m1"),
    *_trained("pvt_v2_b0 repvgg_a0 mobileone_s1"),
    *_trained("mobilevit_xxs mobilevitv2_050 fastvit_t8 iformer_t", 128),
    *_trained("swiftformer_xs vit_tiny_patch16_dinov3_qkvb", 96),
    *_trained("vit_tiny_patch16_224 cait_xxs24_224 vit_tiny_r_s16_p8_224 convit_tiny pit_ti_224", sized="img_size"),
    *_trained("levit_128s efficientvit_m0 coat_tiny xcit_nano_12_p16_224 visformer_tiny", sized="img_size"),
    *_trained("coatnet_pico_rw_224 gcvit_xxtiny", sized="img_size"),
    *_trained("efficientformerv2_s0", 224),
    *_torchvision_trained("mobilenet_v2 regnet_x_400mf deeplabv3_mobilenet_v3_large"),
    *_trained("resnet18 densenet121 dpn48b nf_regnet_b0 resnest14d"),
    *_torchvision_trained("googlenet", 96),
    *_torchvision_trained("r2plus1d_18", shape=(2, 3, 4, 32, 32)),
    *_detected("retinanet_resnet50_fpn", 96, *RESIZED),
    *_trained("hrnet_w18_small resnetv2_18 legacy_seresnet18 skresnet18 lowformer_b0 poolformerv2_s12 ghostnetv3_050"),
    *_trained("efficientformer_l1 tiny_vit_5m_224", 224),
    *_trained("crossvit_tiny_240", 240),
    *_trained("halonet26t", 256),
    *_trained("sequencer2d_s convmixer_768_32 res2net50_26w_4s rdnet_tiny selecsls42"),
    *_trained("davit_tiny csatv2 inception_v3 xception41 tresnet_m focalnet_tiny_srf", 96),
    *_trained("volo_d1_224 mixer_s32_224 hiera_tiny_224 swin_tiny_patch4_window7_224", sized="img_size"),
    *_trained("swinv2_cr_tiny_224 mvitv2_tiny tnt_s_legacy_patch16_224", sized="img_size"),
    *_trained("twins_svt_small nest_tiny nextvit_small", 224),
    *_torchvision_trained("fcn_resnet50"),
    *_torchvision_trained("r3d_18", shape=(2, 3, 4, 32, 32)),
    *_torchvision_trained("swin3d_t", shape=(2, 3, 4, 64, 64)),
    *_detected("maskrcnn_resnet50_fpn", 96, *RESIZED, *FEW),
    *_detected("ssd300_vgg16", 300),
)
"""One small member of every family that has convolutions of more than one tap, to be expanded and trained; the light
ones first.
"""
