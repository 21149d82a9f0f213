"""Networks of other people's libraries, and which batch norms collapse leaves in them, each with its reason.

Every network is built from its library's own configurations, small, with random numbers, and no weights are loaded. It
needs transformers, MONAI, segmentation-models-pytorch and ultralytics beside the project; half an hour on one core.

    python tests/survey.py --out docs/survey.md
"""

# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reparam
from zoo.measure import relative_error
from zoo.randomise import randomise_

__all__ = ["NETWORKS", "Measured", "Network", "measure", "page"]


@dataclass(frozen=True)
class Network:
    """One network: its library, its name there, how it and an input are built."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


@dataclass(frozen=True)
class Measured:
    """Batch norms before and after, how many folds were proven, the error of the outputs, and what stays by reason.

    ``left`` has the number of norms by reason, ``such`` the name and the sentence of one of them for each reason.
    """

    library: str
    name: str
    norms: tuple[int, int]
    folds: int
    proven: int
    error: float
    left: dict[str, int] = field(default_factory=dict)
    such: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""


# ------------------------------------------------------------------ transformers


def hugging(name: str, inputs: Callable[[], Any], **options: Any) -> Network:
    """A model class of transformers by its name, with the configuration of that class."""

    def build() -> nn.Module:
        made = {key: value() if callable(value) else value for key, value in options.items()}
        library: Any = importlib.import_module("transformers")
        model: nn.Module = getattr(library, name)(getattr(library, name).config_class(**made))
        return model

    return Network("transformers", name, build, inputs)


def config(name: str, **options: Any) -> Callable[[], Any]:
    """A configuration of transformers, made when the network is."""
    return lambda: getattr(importlib.import_module("transformers"), name)(**options)


def image(size: int = 64, key: str = "pixel_values", channels: int = 3) -> Callable[[], Any]:
    return lambda: {key: torch.randn(2, channels, size, size)}


def resnet(**options: Any) -> Callable[[], Any]:
    """The backbone of the detectors, with two stages' worth of blocks."""
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 1, 1, 1]}
    return config("ResNetConfig", **small, out_features=["stage4"], **options)


def detr_resnet() -> Callable[[], Any]:
    small: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
    return config("RTDetrResNetConfig", **small, out_features=["stage2", "stage3", "stage4"])


def speech(frames: int = 60, features: int = 80) -> Callable[[], Any]:
    return lambda: {"input_features": torch.randn(1, frames, features)}


NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DETR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 10,
}  # fmt: skip
RT: dict[str, Any] = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 1,
    "encoder_in_channels": [32, 64, 64], "decoder_in_channels": [32, 32, 32], "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_queries": 10,
}  # fmt: skip
HGNET: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"]}

TRANSFORMERS = (
    hugging("ResNetForImageClassification", image(), depths=[2, 2, 2, 2]),
    hugging("RegNetForImageClassification", image(), depths=[1, 2, 2, 1]),
    hugging("MobileNetV1ForImageClassification", image()),
    hugging("MobileNetV2ForImageClassification", image()),
    hugging("MobileNetV2ForSemanticSegmentation", image()),
    hugging("MobileViTForImageClassification", image()),
    hugging("MobileViTForSemanticSegmentation", image()),
    hugging("MobileViTV2ForImageClassification", image()),
    hugging("LevitForImageClassificationWithTeacher", image(224)),
    hugging("EfficientNetForImageClassification", image()),
    hugging("SwiftFormerForImageClassification", image(), depths=[2, 2, 2, 2]),
    hugging("CvtForImageClassification", image()),
    hugging("HGNetV2ForImageClassification", image()),
    hugging("TextNetForImageClassification", image()),
    hugging("PPLCNetForImageClassification", image()),
    hugging("SegformerForSemanticSegmentation", image()),
    hugging(
        "DetrForObjectDetection", image(), use_timm_backbone=False, backbone=None, backbone_config=resnet(), **DETR,
    ),
    hugging(
        "TableTransformerForObjectDetection", image(), use_timm_backbone=False, backbone=None,
        backbone_config=resnet(), **DETR,
    ),
    hugging("RTDetrForObjectDetection", image(), backbone_config=detr_resnet(), **RT),
    hugging("RTDetrV2ForObjectDetection", image(), backbone_config=detr_resnet(), **RT),
    hugging("DFineForObjectDetection", image(), backbone_config=config("HGNetV2Config", **HGNET), **{
        **RT, "encoder_in_channels": [512, 1024, 2048]}),
    hugging("VitPoseForPoseEstimation", image(64), use_simple_decoder=False, backbone_config=config(
        "VitPoseBackboneConfig", image_size=[64, 64], out_features=["stage2"], **NARROW)),
    hugging("EfficientLoFTRModel", lambda: {"pixel_values": torch.randn(1, 2, 1, 64, 64)}),
    hugging("Wav2Vec2ConformerModel", lambda: {"input_values": torch.randn(1, 4000)}, **NARROW),
    hugging("HubertModel", lambda: {"input_values": torch.randn(1, 4000)}, conv_pos_batch_norm=True, **NARROW),
    hugging("ParakeetForCTC", speech(), **{**NARROW, "vocab_size": 20}),
    hugging("ClapAudioModel", lambda: {"input_features": torch.randn(1, 1, 1001, 64)}, depths=[1, 1, 1, 1]),
    hugging("FastSpeech2ConformerModel", lambda: {"input_ids": torch.randint(1, 70, (1, 12))}, encoder_layers=1,
            decoder_layers=1, hidden_size=32, encoder_linear_units=64, decoder_linear_units=64),
    hugging("SpeechT5HifiGan", lambda: torch.randn(20, 80)),
    hugging("PatchTSTModel", lambda: {"past_values": torch.randn(2, 32, 3)}, context_length=32, num_input_channels=3,
            d_model=32, num_hidden_layers=2),
    hugging("PatchTSMixerModel", lambda: {"past_values": torch.randn(2, 32, 3)}, context_length=32,
            num_input_channels=3, norm_mlp="BatchNorm"),
    hugging("TimmBackbone", image(), backbone="mobilenetv3_small_050", use_pretrained_backbone=False),
)  # fmt: skip


# ------------------------------------------------------------------ MONAI


def monai(name: str, size: tuple[int, ...], *given: Any, **options: Any) -> Network:
    """A network of MONAI by its name, on an input of that size."""

    def build() -> nn.Module:
        library: Any = importlib.import_module("monai.networks.nets")
        model: nn.Module = getattr(library, name)(*given, **options)
        return model

    return Network("MONAI", name, build, lambda: torch.randn(size))


VOLUME = (1, 1, 32, 32, 32)
BATCH = {"norm": "batch"}
MONAI = (
    monai("UNet", VOLUME, 3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, norm="batch"),
    monai("BasicUNet", VOLUME, 3, 1, 2, (4, 4, 8, 8, 16, 4), norm="batch"),
    monai("BasicUNetPlusPlus", VOLUME, 3, 1, 2, (4, 4, 8, 8, 16, 4), norm="batch"),
    monai("AttentionUnet", VOLUME, 3, 1, 2, (4, 8, 16), (2, 2)),
    monai("DynUNet", VOLUME, 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], norm_name="batch"),
    monai("SegResNet", VOLUME, 3, 4, 1, 2, norm="batch"),
    monai("VNet", VOLUME),
    monai("HighResNet", VOLUME, 3, 1, 2),
    monai("DenseNet121", VOLUME, 3, 1, 2),
    monai("SEResNet50", VOLUME, spatial_dims=3, in_channels=1, num_classes=2),
    monai("ResNetFeatures", VOLUME, "resnet18", pretrained=False, in_channels=1),
    monai("EfficientNetBN", (1, 3, 64, 64), "efficientnet-b0", pretrained=False),
    monai("FlexibleUNet", (1, 3, 64, 64), 3, 2, "efficientnet-b0"),
    monai("HoverNet", (1, 3, 256, 256)),
    monai("RegUNet", VOLUME, 3, 1, 4, 2),
    monai("Quicknat", (1, 1, 64, 64), 2, 1, 8),
    monai("AutoEncoder", VOLUME, 3, 1, 1, (4, 8), (2, 2), norm="batch", inter_channels=(8,), num_res_units=1),
    monai("PatchDiscriminator", VOLUME, 3, 4, 1),
    monai("SwinUNETR", (1, 1, 32, 32, 32), 1, 2, feature_size=12, norm_name="batch"),
    monai("UNETR", VOLUME, 1, 2, (32, 32, 32), hidden_size=48, mlp_dim=64, num_heads=4, norm_name="batch"),
)


# ------------------------------------------------------------------ segmentation-models-pytorch


def segmentation(name: str, encoder: str, size: int = 64, **options: Any) -> Network:
    """An architecture of segmentation-models-pytorch over an encoder."""

    def build() -> nn.Module:
        library: Any = importlib.import_module("segmentation_models_pytorch")
        model: nn.Module = getattr(library, name)(encoder, encoder_weights=None, **options)
        return model

    return Network("smp", f"{name}, {encoder}", build, lambda: torch.randn(2, 3, size, size))


SEGMENTATION = (
    segmentation("Unet", "resnet18"),
    segmentation("Unet", "vgg11_bn"),
    segmentation("Unet", "inceptionv4", 128),
    segmentation("UnetPlusPlus", "mobilenet_v2"),
    segmentation("MAnet", "se_resnet50"),
    segmentation("Linknet", "efficientnet-b0"),
    segmentation("FPN", "densenet121"),
    segmentation("PSPNet", "resnet18", 128),
    segmentation("PAN", "resnet18", 128),
    segmentation("DeepLabV3", "resnet18", 128),
    segmentation("DeepLabV3Plus", "timm-efficientnet-b0", 128),
    segmentation("UPerNet", "mobileone_s0", 128),
    segmentation("Segformer", "mit_b0"),
    segmentation("Unet", "xception", 128),
    segmentation("Unet", "dpn68", 128),
    segmentation("Unet", "timm-skresnet18"),
    segmentation("Unet", "tu-regnety_002"),
)


# ------------------------------------------------------------------ ultralytics


def yolo(name: str, task: str = "DetectionModel") -> Network:
    """A network of ultralytics, from the description of it that the library ships."""

    def build() -> nn.Module:
        library: Any = importlib.import_module("ultralytics.nn.tasks")
        model: nn.Module = getattr(library, task)(f"{name}.yaml", verbose=False)
        return model

    return Network("ultralytics", name, build, lambda: torch.rand(1, 3, 64, 64))


ULTRALYTICS = (
    yolo("yolov3-tiny"),
    yolo("yolov5n"),
    yolo("yolov6n"),
    yolo("yolov8n"),
    yolo("yolov8n-ghost"),
    yolo("yolov8n-seg", "SegmentationModel"),
    yolo("yolov8n-pose", "PoseModel"),
    yolo("yolov8n-obb", "OBBModel"),
    yolo("yolov8n-cls", "ClassificationModel"),
    yolo("yolov8s-worldv2", "WorldModel"),
    yolo("yolov9t"),
    yolo("yolov10n"),
    yolo("yolo11n"),
    yolo("yolo12n"),
    yolo("yolo26n"),
    yolo("yolov8n-rtdetr", "RTDETRDetectionModel"),
)

NETWORKS = (*TRANSFORMERS, *MONAI, *SEGMENTATION, *ULTRALYTICS)


# ------------------------------------------------------------------ what is measured


def measure(network: Network) -> Measured:
    """Collapse one network, its numbers as after training, and compare all its outputs in float64."""
    started = time.perf_counter()
    torch.manual_seed(0)
    try:
        model = network.build().eval()
        inputs = network.inputs()
        randomise_(model, seed=0)
        folded, report = reparam.collapse_with_report(model, example_inputs=inputs)
        error = _error(model, folded, inputs)
    # It is other people's code, which may fail in any way; that it did is told in its row.
    except Exception as failure:
        traceback.print_exc()
        return Measured(network.library, network.name, (0, 0), 0, 0, 0.0, failed=f"{type(failure).__name__}: {failure}")
    said = {refusal.layer: refusal for refusal in report.refusals}
    left, such = Counter[str](), dict[str, str]()
    before, stay = _running(model, inputs), _running(folded, inputs)
    for name in stay:
        reason = said[name].reason.value if name in said else "no reason given"
        left[reason] += 1
        such.setdefault(reason, str(said.get(name, f"{name}: no reason given")))
    return Measured(
        network.library,
        network.name,
        (len(before), len(stay)),
        len(report.folds),
        sum(fold.error is not None for fold in report.folds),
        error,
        dict(left),
        such,
        time.perf_counter() - started,
    )


def _running(model: nn.Module, inputs: Any) -> list[str]:
    """Batch norms that a forward runs, by name; some networks hold one that only another of their methods needs."""
    ran: dict[str, None] = {}
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.setdefault(name))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_var", None), Tensor) and "BatchNorm" in str(type(module).__mro__)
    ]
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return list(ran)


def _error(model: nn.Module, folded: nn.Module, inputs: Any) -> float:
    """The largest difference of the outputs, relative to the largest one, both run in float64."""
    doubled = _doubled(inputs)
    outputs = []
    for each in (model, folded):
        with torch.no_grad():
            double = copy.deepcopy(each).double()
            outputs.append(double(**doubled) if isinstance(doubled, dict) else double(doubled))
    return relative_error(*outputs)


def _doubled(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: _doubled(value) for key, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


# ------------------------------------------------------------------ the page


def page(rows: list[Measured]) -> str:
    """The table as Markdown."""
    lines = [
        "# Networks of other libraries\n",
        "Batch norms before and after `reparam.collapse` in networks of transformers, MONAI, ultralytics and",
        "segmentation-models-pytorch (smp), built from their configurations with random numbers. Proven: folds",
        "that were compared with what they replace, of all folds. The error is the largest difference of",
        "the network's outputs relative to the largest one, in float64. Why such norms cannot fold is in",
        "[design.md](design.md#limits).\n",
        "```sh\npython tests/survey.py --out docs/survey.md\n```\n",
        "Versions: " + ", ".join(f"{each} {version(each)}" for each in _LIBRARIES) + ".\n",
        "| library | network | norms | proven | error | left |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        left = "; ".join(f"{count}: {reason}" for reason, count in row.left.items())
        lines.append(
            f"| {row.library} | {row.name} | {row.norms[0]} → {row.norms[1]} | {row.proven} of {row.folds} | "
            f"{row.error:.0e} | {row.failed or left} |"
        )
    total = [sum(row.norms[i] for row in rows) for i in (0, 1)]
    lines.append(f"\n{len(rows)} of the {len(NETWORKS)} networks there: {total[0]:,} batch norms → {total[1]:,}.\n")
    lines.append("## One of each\n")
    lines += ["| reason | norms | network | such as |", "| --- | ---: | --- | --- |"]
    counts = Counter[str]()
    for row in rows:
        counts.update(row.left)
    for reason, count in counts.most_common():
        first = next(row for row in rows if reason in row.left)
        lines.append(f"| {reason} | {count} | {first.name} | {first.such[reason]} |")
    return "\n".join(lines) + "\n"


_LIBRARIES = ("torch", "transformers", "monai", "segmentation-models-pytorch", "ultralytics", "timm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--only", default="", help="networks whose library and name contain this")
    parser.add_argument("--journal", type=Path, help="append each network's line here, and skip those that it has")
    given = parser.parse_args()
    rows: dict[str, Measured] = {}
    if given.journal is not None and given.journal.exists():
        for line in given.journal.read_text(encoding="utf-8").splitlines():
            row = Measured(**json.loads(line))
            rows[f"{row.library} {row.name}"] = row
    for network in NETWORKS:
        key = f"{network.library} {network.name}"
        if given.only not in key or key in rows:
            continue
        rows[key] = row = measure(network)
        told = row.failed or row.left
        print(f"{key}: {row.norms}, {told}, error {row.error:.0e}, {row.seconds:.0f} s", flush=True)
        for said in row.such.values():
            print(f"    {said}", flush=True)
        if given.journal is not None:
            with given.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    text = page([rows[f"{n.library} {n.name}"] for n in NETWORKS if f"{n.library} {n.name}" in rows])
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
