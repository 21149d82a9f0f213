"""Newer blocks and options: their structure as published, their formulas, and adapters of linear layers.

That they fold exactly on every geometry is tested with all others (tests/test_blocks.py).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import reparam
from passes.blocks.kit.layers import ChannelScale, is_block
from passes.refusal import Reason, ReparamError
from reparam import Block, files, sources
from reparam.recipe import Recipe

Shapes = dict[str, tuple[int, ...]]


def expanded(block: Any, conv: nn.Module, norm: int = 0, **options: Any) -> Any:
    """The block in the place of a layer, its numbers as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(conv, nn.BatchNorm2d(norm)) if norm else nn.Sequential(conv)
    found: Any = reparam.expand(model.double(), block, where="all", verify=False, **{"init": "paper", **options})[0]
    return found


def lively(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return module.eval()


def shapes(module: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def folds(block: Any, x: Tensor) -> Any:
    """The one layer that a block becomes, after a check that it is that."""
    layer = reparam.collapse(nn.Sequential(block))[0]  # type: ignore[index]
    with torch.no_grad():
        assert torch.allclose(layer(x), block(x), rtol=1e-10, atol=1e-10)
    assert type(layer) in (nn.Conv2d, nn.Linear)
    return layer


# ------------------------------------------------------------------ three convolutions in a row


def test_conv3xc_is_three_in_a_row_and_a_point_beside_the_kernel() -> None:
    block = lively(expanded("conv3xc", nn.Conv2d(3, 5, 3, padding=1)))
    assert shapes(block) == {
        "square.weight": (5, 3, 3, 3), "square.bias": (5,),
        "sequence.point.weight": (6, 3, 1, 1), "sequence.point.bias": (6,),
        "sequence.square.weight": (10, 6, 3, 3), "sequence.square.bias": (10,),
        "sequence.mixed.weight": (5, 10, 1, 1), "sequence.mixed.bias": (5,),
        "point.weight": (5, 3, 1, 1), "point.bias": (5,),
    }  # fmt: skip
    x, s = torch.randn(2, 3, 8, 7, dtype=torch.float64), block.sequence
    wide = F.conv2d(F.pad(x, (1, 1, 1, 1)), s.point.weight, s.point.bias)
    published = F.conv2d(F.conv2d(wide, s.square.weight, s.square.bias), s.mixed.weight, s.mixed.bias)
    published = published + F.conv2d(x, block.point.weight, block.point.bias)
    with torch.no_grad():
        assert torch.allclose(block(x), published + block.square(x), rtol=1e-12, atol=1e-12)
    folds(block, x)
    assert shapes(expanded(Block("conv3xc", gain=1), nn.Conv2d(3, 5, 3)))["sequence.square.weight"] == (5, 3, 3, 3)
    with pytest.raises(ReparamError, match="gain is at least 1, got 0"):
        expanded(Block("conv3xc", gain=0), nn.Conv2d(3, 5, 3))


# ------------------------------------------------------------------ many scales


def test_repnext_medium_is_what_was_published() -> None:
    block = lively(expanded("repnext", nn.Conv2d(4, 4, 7, padding=3, groups=4)))
    assert shapes(block) == {
        "square.weight": (4, 1, 7, 7), "square.bias": (4,),
        "k5x3.weight": (4, 1, 5, 3), "k5x3.bias": (4,),
        "k3x5.weight": (4, 1, 3, 5), "k3x5.bias": (4,),
        "lines7.line1.weight": (4, 1, 1, 7), "lines7.line0.weight": (4, 1, 7, 1),
        "lines5.line1.weight": (4, 1, 1, 5), "lines5.line0.weight": (4, 1, 5, 1),
    }  # fmt: skip
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    wanted = F.conv2d(x, block.square.weight, block.square.bias, padding=3, groups=4)
    wanted = wanted + F.conv2d(x, block.k5x3.weight, block.k5x3.bias, padding=(2, 1), groups=4)
    wanted = wanted + F.conv2d(x, block.k3x5.weight, block.k3x5.bias, padding=(1, 2), groups=4)
    for lines, pad in ((block.lines7, 3), (block.lines5, 2)):
        row = F.conv2d(x, lines.line1.weight, padding=(0, pad), groups=4)
        wanted = wanted + F.conv2d(row, lines.line0.weight, padding=(pad, 0), groups=4)
    with torch.no_grad():
        assert torch.allclose(block(x), wanted, rtol=1e-12, atol=1e-12)
    assert folds(block, x).kernel_size == (7, 7)


@pytest.mark.parametrize("stride", [1, 2])
def test_repnext_small_is_what_was_published(stride: int) -> None:
    block = lively(expanded("repnext", nn.Conv2d(4, 4, 3, stride, 1, groups=4)))
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    same: dict[str, Any] = {"groups": 4, "stride": stride}
    wanted = F.conv2d(x, block.square.weight, block.square.bias, padding=1, **same)
    assert block.corners.dilation == (2, 2)
    wanted = wanted + F.conv2d(x, block.corners.weight, block.corners.bias, padding=1, dilation=2, **same)
    if stride == 1:
        assert [name for name, _ in block.named_children()] == ["square", "k1x3", "k3x1", "corners"]
        wanted = wanted + F.conv2d(x, block.k1x3.weight, block.k1x3.bias, padding=(0, 1), groups=4)
        wanted = wanted + F.conv2d(x, block.k3x1.weight, block.k3x1.bias, padding=(1, 0), groups=4)
    else:
        assert [name for name, _ in block.named_children()] == ["square", "lines3", "corners"]
        row = F.conv2d(x, block.lines3.line1.weight, stride=(1, 2), padding=(0, 1), groups=4)
        wanted = wanted + F.conv2d(row, block.lines3.line0.weight, stride=(2, 1), padding=(1, 0), groups=4)
        assert block.lines3.line1.bias is None
    with torch.no_grad():
        assert torch.allclose(block(x), wanted, rtol=1e-12, atol=1e-12)
    folds(block, x)


def test_taps_are_spread_only_where_that_goes_evenly() -> None:
    plan = reparam.plan(nn.Sequential(nn.Conv2d(4, 4, (3, 4), groups=4)), "repnext", where="all")
    assert "repnext is for kernels of 3x3 and 7x7" in str(plan)


# ------------------------------------------------------------------ differences


def difference_kernels(block: Any, theta: float) -> dict[str, Tensor]:
    """As published: weights of nine or three taps, and where they go."""
    kernels = {}
    w = block.central.weight.clone()
    w[:, :, 4] = w[:, :, 4] - block.central.weight.sum(2)
    kernels["central"] = w
    w = block.angular.weight
    kernels["angular"] = w - theta * w[:, :, [3, 0, 1, 6, 4, 2, 7, 8, 5]]
    for name, plus, minus in (("horizontal", [0, 3, 6], [2, 5, 8]), ("vertical", [0, 1, 2], [6, 7, 8])):
        w = getattr(block, name).weight
        kernels[name] = w.new_zeros((*w.shape[:2], 9))
        kernels[name][:, :, plus], kernels[name][:, :, minus] = w, -w
    return kernels


@pytest.mark.parametrize("theta", [1.0, 0.7])
def test_difference_is_the_published_sum_of_kernels(theta: float) -> None:
    block = lively(expanded(Block("difference", theta=theta), nn.Conv2d(4, 6, 3, padding=1, groups=2)))
    assert {name: shape for name, shape in shapes(block).items() if name.endswith("weight")} == {
        "square.weight": (6, 2, 3, 3), "central.weight": (6, 2, 9), "angular.weight": (6, 2, 9),
        "horizontal.weight": (6, 2, 3), "vertical.weight": (6, 2, 3),
    }  # fmt: skip
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    layer = folds(block, x)
    with torch.no_grad():
        kernel = block.square.weight + sum(k.unflatten(2, (3, 3)) for k in difference_kernels(block, theta).values())
        bias = sum(branch.bias for branch in block.children())
    assert torch.allclose(layer.weight, kernel, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.bias, bias, rtol=1e-12, atol=1e-12)


def test_difference_trains_as_one_convolution_unless_told_otherwise() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    assert "online" in repr(reparam.expand(model, "difference"))
    assert "online" not in repr(reparam.expand(model, "difference", form="branches"))


def test_a_difference_sees_no_constant() -> None:
    """Central, horizontal and vertical kernels sum to zero, and so does the angular one at theta 1."""
    block = lively(expanded("difference", nn.Conv2d(4, 6, 3)))
    for name in ("central", "angular", "horizontal", "vertical"):
        assert float(getattr(block, name).kernel().detach().sum((2, 3)).abs().max()) < 1e-12


# ------------------------------------------------------------------ options


def branches(block: nn.Module) -> list[str]:
    return [name for name, _ in block.named_children()]


def test_repvgg_without_an_identity_and_with_a_number_before_the_point() -> None:
    assert branches(expanded(Block("repvgg", identity=False), nn.Conv2d(4, 4, 3, padding=1), 4)) == ["square", "point"]
    block = lively(expanded(Block("repvgg", alpha=True), nn.Conv2d(4, 4, 3, padding=1), 4))
    assert branches(block) == ["square", "point", "identity"]
    assert block.point.alpha.weight.numel() == 1
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        point = block.point.conv(x) * block.point.alpha.weight.item()
        assert torch.allclose(block.point(x), point, rtol=1e-12)
    folds(block, x)


def test_mobileone_with_one_scale_and_shift_behind_the_sum() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    block = lively(expanded(Block("mobileone", n=2, affine="scalar"), copy.deepcopy(conv), 4))
    scale = block.affine
    assert isinstance(scale, ChannelScale)
    assert shapes(scale) == {"weight": (1, 1, 1), "bias": (1, 1, 1)}
    assert branches(block) == ["conv0", "conv1", "point", "identity", "affine"]
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        parts = sum(branch(x) for branch in list(block.children())[:-1])
        assert torch.allclose(block(x), parts * scale.weight.item() + scale.bias.item(), rtol=1e-12, atol=1e-12)
    folds(block, x)
    model = nn.Sequential(copy.deepcopy(conv), nn.BatchNorm2d(4)).double()
    for form in ("branches", "online"):
        start = reparam.expand(model, Block("mobileone", affine="scalar"), form=form)
        with torch.no_grad():
            assert torch.allclose(start.eval()(x), model.eval()(x), rtol=1e-13, atol=1e-13)
    without = expanded(Block("mobileone", affine="scalar"), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    assert without.affine.bias is None
    with pytest.raises(ReparamError, match="affine is 'scalar' or None, got 'channel'"):
        expanded(Block("mobileone", affine="channel"), conv)


def test_qarepvgg_with_a_mean_beside_the_identity() -> None:
    block = lively(expanded(Block("qarepvgg", average=True), nn.Conv2d(4, 4, 3, padding=1), 4))
    assert branches(block) == ["square", "point", "identity", "average"]
    x = torch.randn(2, 4, 8, 7, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(block.average(x), F.avg_pool2d(x, 3, 1, 1) * block.average.scale.weight, rtol=1e-12)
    folds(block, x)
    strided = expanded(Block("qarepvgg", average=True), nn.Conv2d(4, 4, 3, 2, 1), 4)
    assert branches(strided) == ["square", "point"]


def test_orepa_is_twice_as_wide_inside_where_that_is_asked_for() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    wide = expanded(Block("orepa", width=2), conv, 8, form="branches")
    assert wide.sequence.point.weight.shape == (16, 1, 1, 1)
    assert wide.sequence.square.weight.shape == (8, 2, 3, 3)
    folds(lively(wide), torch.randn(2, 8, 8, 7, dtype=torch.float64))
    with pytest.raises(ReparamError, match="width is at least 1, got 0"):
        expanded(Block("orepa", width=0), conv)


OVERLOCK = {
    19: "5,1 7,1 9,1 9,2 3,4 3,5 3,7", 17: "5,1 7,1 9,2 3,4 3,5 3,7", 15: "5,1 7,1 7,2 3,3 3,5 3,7",
    13: "5,1 7,1 7,2 3,3 3,4 3,5", 11: "5,1 7,1 5,2 3,3 3,4 3,5", 9: "5,1 7,1 5,2 3,3 3,4", 7: "5,1 3,1 3,2 3,3",
    5: "3,1 3,2",
}  # fmt: skip


@pytest.mark.parametrize("size", OVERLOCK)
def test_largekernel_has_overlock_s_branches(size: int) -> None:
    conv = nn.Conv2d(4, 4, size, padding=size // 2, groups=4)
    block = lively(expanded(Block("largekernel", table="overlock"), conv, 4))
    large, *others = block.children()
    assert large[0].kernel_size == (size, size)
    found = {(branch.conv.kernel_size[0], branch.conv.dilation[0]) for branch in others}
    assert found == {tuple(map(int, pair.split(","))) for pair in OVERLOCK[size].split()}
    folds(block, torch.randn(1, 4, 23, 21, dtype=torch.float64))


def test_largekernel_of_yolov10_is_a_three_beside_a_seven() -> None:
    block = expanded(Block("largekernel", table="yolov10"), nn.Conv2d(4, 4, 7, padding=3, groups=4), 4)
    assert branches(block) == ["large", "k3d1"]
    with pytest.raises(ReparamError, match="table is one of unireplknet, overlock, yolov10; got 'yolo'"):
        expanded(Block("largekernel", table="yolo"), nn.Conv2d(4, 4, 7, groups=4))


@pytest.mark.parametrize("size", [(3, 1), (4, 2)])
@pytest.mark.parametrize("block", ["conv3xc", "lora"])
def test_transposed_convolutions_take_what_folds(block: str, size: tuple[int, int]) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, *size, 1)).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    trained = lively(reparam.expand(model, block, where="all", init="paper", example_inputs=x))
    assert is_block(trained[0])
    folded: Any = reparam.collapse(trained, example_inputs=x)
    assert type(folded[0]) is nn.ConvTranspose2d
    with torch.no_grad():
        assert torch.allclose(folded(x), trained(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", ["repnext", "difference"])
def test_transposed_convolutions_are_left_where_a_structure_is_not_defined(block: str) -> None:
    plan = reparam.plan(nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1)), block, where="all")
    (refused,) = plan.refused
    assert refused.refusal is not None
    assert refused.refusal.message.startswith("a transposed convolution: ")


# ------------------------------------------------------------------ adapters


def linears(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def train(model: nn.Module, *shape: int, steps: int = 2) -> nn.Module:
    """Steps of SGD on whatever is trained: B is 0 at first, so A moves in the second."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(torch.randn(*shape)).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_lora_is_the_published_sum() -> None:
    linear = nn.Linear(6, 5)
    block = expanded(Block("lora", rank=2, alpha=8), linear)
    assert shapes(block) == {
        "main.weight": (5, 6), "main.bias": (5,), "adapter.down.weight": (2, 6), "adapter.up.weight": (5, 2)
    }  # fmt: skip
    assert not block.adapter.up.weight.any()  # as published, in either initialisation
    assert block.adapter.down.weight.any()
    lively(block)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        low = x @ block.adapter.down.weight.T @ block.adapter.up.weight.T
        assert torch.allclose(block(x), block.main(x) + 8 / 2 * low, rtol=1e-12, atol=1e-12)
    layer = reparam.collapse(nn.Sequential(block), example_inputs=x)[0]  # type: ignore[index]
    with torch.no_grad():
        merged = block.main.weight + 8 / 2 * block.adapter.up.weight @ block.adapter.down.weight
    assert type(layer) is nn.Linear
    assert torch.allclose(layer.weight, merged, rtol=1e-12, atol=1e-12)
    with pytest.raises(ReparamError, match="rank is at least 1, got 0"):
        expanded(Block("lora", rank=0), nn.Linear(2, 2))


def test_lora_of_a_convolution_has_its_kernel_in_a_and_a_point_in_b() -> None:
    block = lively(expanded(Block("lora", rank=2), nn.Conv2d(6, 8, 3, 2, 1, groups=2, bias=False)))
    assert block.adapter.down.weight.shape == (4, 3, 3, 3)
    assert block.adapter.up.weight.shape == (8, 2, 1, 1)
    folds(block, torch.randn(2, 6, 9, 8, dtype=torch.float64))


@pytest.mark.parametrize("form", ["branches", "online"])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_vision_transformer_with_adapters_trains_and_merges(freeze: bool, form: str) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=10).eval()
    x = torch.randn(2, 3, 160, 160)
    model = reparam.expand(vit, Block("lora", rank=4, freeze=freeze), form=form)
    adapted = [path for path, module in model.named_modules() if is_block(module)]
    assert adapted == linears(vit)
    with torch.no_grad():
        assert torch.allclose(model(x), vit(x), atol=1e-6) if form == "online" else torch.equal(model(x), vit(x))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, 2, 3, 160, 160)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert {f"{path}.adapter.{part}.weight" for path in adapted for part in ("down", "up")} <= moved
    assert any(name.endswith("main.weight") for name in moved) is not freeze
    merged, report = reparam.collapse_with_report(model)
    assert len(report.folds) == len(adapted)
    assert type(merged) is type(vit)
    assert linears(merged) == linears(vit)
    back = timm.create_model("test_vit", num_classes=10).eval()
    back.load_state_dict(reparam.collapse(model, like=vit).state_dict(), strict=True)
    with torch.no_grad():
        before, after = model(x), [merged(x), back(x)]
        assert not torch.allclose(before, vit(x), atol=1e-3)
    assert all(torch.allclose(before, each, atol=1e-5) for each in after)


def test_a_frozen_network_trains_its_adapters_alone() -> None:
    """As people do it: freeze all, then adapt. The main weights stay frozen, and as they are."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    adapted = reparam.expand(model, Block("lora", rank=2))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.adapter.{part}.weight" for i in (0, 2) for part in ("down", "up")}
    train(adapted, 5, 4)
    assert torch.equal(adapted[0].main.weight, model[0].weight)  # type: ignore[index,union-attr]
    assert not torch.equal(reparam.collapse(adapted)[0].weight, model[0].weight)  # type: ignore[index,union-attr]


def test_freezing_leaves_the_model_that_was_given_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    adapted = reparam.expand(model, Block("lora", freeze=True))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for name, p in adapted.named_parameters() if "main" in name)
    assert reparam.plan(model, Block("lora", freeze=True)).expanded
    assert all(p.requires_grad for p in model.parameters())
    back = reparam.collapse(adapted, like=model)
    assert all(p.requires_grad for p in back.parameters())


def test_a_norm_behind_a_linear_layer_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    adapted = train(reparam.expand(model, Block("lora", rank=2)), 6, 4)
    assert isinstance(adapted[1], _BatchNorm)  # type: ignore[index]
    x = torch.randn(6, 4)
    back = reparam.collapse(adapted, like=model)
    with torch.no_grad():
        assert torch.allclose(back(x), adapted(x), atol=1e-5)
        assert torch.allclose(reparam.collapse(adapted)(x), adapted(x), atol=1e-5)


def test_linear_layers_that_others_read_or_call_are_left_with_a_reason() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.tied, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.encoder(self.attention(x, x, x)[0])
            y: Tensor = self.head(F.linear(self.tied(x), self.tied.weight))
            return y

    model = Attends().eval()
    plan = reparam.plan(model, "lora", example_inputs=torch.randn(2, 5, 8))
    assert [row.layer for row in plan.expanded] == ["head"]
    reasons = {row.layer: row.refusal for row in plan.refused if row.refusal is not None}
    reads = "the code around it reads its weight or bias itself"
    whole = "is read as one call, so it is not seen how that uses it"
    assert reasons["encoder.self_attn.out_proj"].message == reads
    assert reasons["tied"].message == reads
    assert reasons["attention.out_proj"].message == f"attention {whole}"
    assert reasons["encoder.linear1"].message == reasons["encoder.linear2"].message == f"encoder {whole}"
    assert {refusal.reason for refusal in reasons.values()} == {Reason.CODE}


def test_adapters_come_back_from_a_file(tmp_path: Path) -> None:
    source, recipe = "timm:test_vit,num_classes=10", Recipe(Block("lora", rank=2, freeze=True))
    model = train(recipe.expand(sources.create(source)), 2, 3, 160, 160)
    x = torch.randn(2, 3, 160, 160)
    read = files.load_model(files.save_model(model, tmp_path / "adapted.safetensors", source=source, expanded=recipe))
    merged = files.save_model(reparam.collapse(model), tmp_path / "merged.safetensors", source=source, collapsed=True)
    with torch.no_grad():
        assert torch.equal(read.eval()(x), model(x))
        assert torch.allclose(files.load_model(merged)(x), model(x), atol=1e-5)
