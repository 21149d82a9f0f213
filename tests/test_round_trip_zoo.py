"""Whole networks there and back: expanded, trained, collapsed into stock code; and what makes a row fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import reparam
from passes.expand import Plan
from passes.refusal import Reason, Refusal
from zoo import roundtrip as trips
from zoo.bench import bench
from zoo.census import take_census
from zoo.families import ROUND_TRIP, Trained
from zoo.roundtrip import BLOCKS, Trip, document, round_trips


def listed(label: str) -> Trained:
    return next(network for network in ROUND_TRIP if network.label == label)


# ------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    ("label", "block"),
    [
        ("mobilenetv3_small_100", "acb"),  # depthwise, norms that activate
        pytest.param("torchvision:shufflenet_v2_x0_5", "dbb", marks=pytest.mark.slow),  # split and shuffled channels
        ("torchvision:squeezenet1_1", "doconv"),  # biases, no batch norm
    ],
)
def test_a_network_comes_back(label: str, block: str) -> None:
    (trip,) = round_trips(listed(label), (block,))
    assert trip.ok, trip.failure
    assert trip.start == 0.0
    assert trip.error < 1e-12
    assert trip.eligible > 0
    assert trip.expanded + sum(trip.left.values()) == trip.eligible


def test_a_network_of_which_nothing_is_expanded_says_why() -> None:
    (trip,) = round_trips(listed("test_nfnet"), ("acb",))
    assert trip.ok, trip.failure
    assert trip.expanded == 0
    (reason,) = trip.left
    assert reason.startswith("ScaledStdConv2d computes the kernel that it convolves with from its weight")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "block"),
    [
        ("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "acb"),
        ("torchvision:lraspp_mobilenet_v3_large", "dbb"),
        ("torchvision:mc3_18", "acb"),
        ("repvgg_a0", "acb"),
        ("regnetx_002", "doconv"),
    ],
)
def test_networks_of_other_kinds_come_back(label: str, block: str) -> None:
    (trip,) = round_trips(listed(label), (block,))
    assert trip.ok, trip.failure


def test_the_list_is_long_and_names_no_network_twice() -> None:
    labels = [network.label for network in ROUND_TRIP]
    assert len(set(labels)) == len(labels) > 60
    assert {network.loss for network in ROUND_TRIP} >= {listed("torchvision:retinanet_resnet50_fpn").loss}


# ------------------------------------------------------------------------------------------------ the census


class Crowd(nn.Module):
    """Convolutions that run in every way there is, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 4, 1)
        self.by_weight = nn.Conv2d(4, 4, 3, padding=1)
        self.auxiliary = nn.Conv2d(4, 4, 3, padding=1)
        self.idle = nn.Conv2d(4, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.1)
        self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.norm(self.stem(x)))
        x = F.conv2d(x, self.by_weight.weight, self.by_weight.bias, padding=1)
        x = F.conv2d(F.conv2d(x, self.blur, groups=4), self.kernel)
        return x + self.auxiliary(x) if self.training else x


def crowd(build: Callable[[], nn.Module] = Crowd) -> Trained:
    return Trained("toy:crowd", shape=(2, 3, 12, 12), build=build)


def test_the_census_sees_what_runs() -> None:
    network = crowd()
    census = take_census(network, network.create(), network.inputs(0))
    assert set(census.convs) == {"stem", "point", "by_weight", "auxiliary", "idle"}
    assert census.eligible == ("stem", "by_weight", "auxiliary")
    assert census.idle == ("idle",)
    assert census.functions == ("Crowd",)


def test_everything_left_has_its_reason() -> None:
    (trip,) = round_trips(crowd(), ("acb",))
    assert trip.ok, trip.failure
    assert (trip.convs, trip.eligible, trip.expanded) == (5, 3, 2)
    assert trip.left == {"the code around it reads its weight or bias itself": 1}
    assert any("function of its own" in remark for remark in trip.remarks)
    assert any(remark.endswith("idle first") for remark in trip.remarks)


# ------------------------------------------------------------------------------------------------ rows that fail


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def small() -> Trip:
    (trip,) = round_trips(crowd(Small), ("acb",))
    return trip


def test_a_row_holds_for_a_right_round_trip() -> None:
    trip = small()
    assert trip.ok, trip.failure
    assert (trip.convs, trip.eligible, trip.expanded, trip.left) == (1, 1, 1, {})


def test_a_row_fails_when_the_collapsed_network_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reparam.collapse

    def wrong(model: nn.Module, **options: Any) -> nn.Module:
        folded = right(model, **options)
        with torch.no_grad():
            next(folded.parameters()).flatten()[0] += 1e-6
        return folded

    monkeypatch.setattr(reparam, "collapse", wrong)
    assert "differs by" in small().failure


def test_a_row_fails_when_the_start_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Plan.apply

    def wrong(plan: Plan) -> nn.Module:
        expanded: Any = right(plan)
        with torch.no_grad():
            expanded.head.bias += 1e-6
        return expanded

    monkeypatch.setattr(Plan, "apply", wrong)
    assert "starts off by" in small().failure


def test_a_row_fails_when_a_branch_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Plan.apply

    def wrong(plan: Plan) -> nn.Module:
        expanded: Any = right(plan)
        expanded.conv.line1.register_forward_hook(lambda module, args, output: output.detach())
        return expanded

    monkeypatch.setattr(Plan, "apply", wrong)
    assert small().failure == "ValueError: conv: no gradient reaches the branch 'line1'"


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (lambda plan: replace(plan, rows=()), "does not mention conv"),
        (
            lambda plan: replace(plan, rows=(replace(plan.rows[0], refusal=Refusal(Reason.NEVER_CALLED, "idle")),)),
            r"runs with kernel \(3, 3\), but is left: idle",
        ),
        (
            lambda plan: replace(plan, rows=(replace(plan.rows[0], refusal=Refusal(Reason.BLOCK, " ")),)),
            "left without a reason",
        ),
    ],
)
def test_a_row_fails_when_the_plan_skips_a_layer(
    change: Callable[[Any], Any], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reparam.plan
    monkeypatch.setattr(reparam, "plan", lambda model, block, **options: change(right(model, block, **options)))
    with pytest.raises(AssertionError, match=failure):
        assert not small().failure, small().failure


def test_a_row_fails_when_the_loss_is_not_finite() -> None:
    network = replace(crowd(Small), loss=lambda model, inputs: model(*inputs).sum() * math.nan)
    (trip,) = round_trips(network, ("acb",))
    assert "not finite" in trip.failure


def test_a_row_fails_when_training_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trips, "_train", lambda network, model, inputs, seed: 0)
    assert "hardly changed" in small().failure


def test_a_network_that_cannot_be_built_is_a_row_for_every_block() -> None:
    rows = round_trips(Trained("timm:no_such_network"))
    assert [row.block for row in rows] == list(BLOCKS)
    assert all("UnknownNameError" in row.failure for row in rows)


# ------------------------------------------------------------------------------------------------ the document


def test_the_document_counts_reasons_and_names_failures() -> None:
    good = Trip(crowd(), "acb", 9, 7, 4, {"too odd": 1, "too long": 2}, 0.0, 1e-15, 1e-16, 1.5, ("a remark",))
    bad = replace(good, network=listed("resnet18"), failure="differs by 1")
    text = document([good, replace(good, block="dbb", left={}), bad])
    assert "| toy:crowd | 9 | 7 | 4 | a 2, b 1 | 0 | 1e-15 | 1.5 |" in text
    assert "| a: too long | 4 | 0 | 2 |" in text
    assert "| acb | 1 of 2 | 14 | 8 | 6 | 0 | 1e-15 |" in text
    assert "- toy:crowd: a remark\n" in text
    assert "| resnet18 (FAILED) |" in text
    assert "- resnet18, acb: differs by 1\n" in text


def test_the_command_writes_its_document(tmp_path: Path) -> None:
    out = tmp_path / "expansion.md"
    result = CliRunner().invoke(bench, ["roundtrip", "--only", "test_nfnet", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "3 of 3 round trips hold" in result.output
    assert "| test_nfnet |" in out.read_text(encoding="utf-8")
    assert CliRunner().invoke(bench, ["roundtrip", "--only", "nothing"]).exit_code == 2


# ------------------------------------------------------------------------------------------------ other libraries


def _transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"num_labels": 3}
    configs = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "MobileNetV2": {"depth_multiplier": 0.25, "min_depth": 8, "tf_padding": False},
        "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    }
    config = getattr(transformers, f"{name}Config")(**configs[name], **small)
    return getattr(transformers, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["ResNet", "ConvNext", "MobileNetV2", "RegNet"])
def test_networks_of_transformers_come_back(name: str, block: str) -> None:
    pytest.importorskip("transformers")
    network = Trained(f"transformers:{name}", build=lambda: _transformers(name))
    (trip,) = round_trips(network, (block,))
    assert trip.ok, trip.failure
    assert trip.expanded > 0


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["Unet", "FPN", "DeepLabV3Plus"])
def test_networks_of_segmentation_models_come_back(name: str, block: str) -> None:
    library = pytest.importorskip("segmentation_models_pytorch")

    def build() -> nn.Module:
        return getattr(library, name)(
            "timm-mobilenetv3_small_100" if name == "Unet" else "resnet18", encoder_weights=None
        )

    (trip,) = round_trips(Trained(f"smp:{name}", build=build), (block,))
    assert trip.ok, trip.failure
    assert trip.expanded > 0


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", ["UNet", "SegResNet", "BasicUNet", "DenseNet121"])
def test_networks_of_monai_come_back(name: str, block: str) -> None:
    library = pytest.importorskip("monai.networks.nets")
    options: dict[str, dict[str, Any]] = {
        "UNet": {"channels": (4, 8, 16), "strides": (2, 2), "norm": "batch", "num_res_units": 2},
        "SegResNet": {"init_filters": 8, "blocks_down": (1, 1), "blocks_up": (1,)},
        "DynUNet": {
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "norm_name": "batch",
        },
        "DenseNet121": {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)},
    }
    network = Trained(
        f"monai:{name}",
        shape=(2, 1, 16, 16, 16),
        build=lambda: getattr(library, name)(spatial_dims=3, in_channels=1, out_channels=2, **options[name]),
    )
    (trip,) = round_trips(network, (block,))
    assert trip.ok, trip.failure
    assert trip.expanded > 0
