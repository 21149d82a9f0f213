"""Blocks for transposed convolutions: the same start, and back to the layer that was there, attributes included."""

from __future__ import annotations

import copy
import math
from itertools import product
from random import Random
from typing import Any

import pytest
import torch
from small_networks import ready
from test_blocks import BLOCKS, NORMS, Cells, Point, gap, layers, refusal, trained
from torch import Tensor, nn

import reparam
from passes.algebra.geometry import TRANSPOSED, Geometry
from passes.blocks.ecb import ScaledFilter
from passes.edits.apply import apply
from passes.edits.carried import made_by
from passes.training.build import rebuilt
from reparam import Reason

ATTRIBUTES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups")


class Spread(Point):
    """A transposed convolution of the grid; ``padding`` is that of torch's layer and what it puts out more."""

    @property
    def possible(self) -> bool:
        padding, extra = map(int, self.padding)
        reach = [self.dilation * (k - 1) for k in self.kernel]
        return extra < max(self.stride, self.dilation) and padding <= min(reach) + 1

    def cell(self) -> nn.Sequential:
        inputs, outputs = (4, 4) if self.groups == "depthwise" or self.kernel[0] % 2 else (4, 6)
        padding, extra = map(int, self.padding)
        groups = {"dense": 1, "grouped": 2, "depthwise": 4}[self.groups]
        conv = nn.ConvTranspose2d(
            inputs, outputs, self.kernel, self.stride, padding, extra, groups, self.bias, self.dilation
        )
        return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if self.norm else nn.Sequential(conv)

    @property
    def overlaps(self) -> list[bool]:
        """For each axis whether two taps meet one output pixel: they have the same phase."""
        return [len({(self.dilation * t) % self.stride for t in range(k)}) < k for k in self.kernel]


POINTS = [
    point
    for values in product(
        ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (3, 5)), (1, 2, 3), (1, 2, 3), ("00", "10", "21", "01"),
        ("dense", "grouped", "depthwise"), (False, True), ("zeros",), (False, True),
    )
    if (point := Spread(*values)).possible
]  # fmt: skip


def applies(block: str, point: Spread) -> bool:
    """Where a block must be used, written down apart from its code; everywhere else it must say why not."""
    if block in ("mobileone", "doconv", "lora"):
        return block != "doconv" or math.prod(point.kernel) > 1
    if block in ("repnext", "difference"):
        return False
    if block == "ecb":
        return point.kernel == (3, 3)
    if block == "largekernel":
        return point.kernel == (5, 5) and point.groups == "depthwise" and point.stride == point.dilation == 1
    if block == "acb":  # where one axis does not overlap, the kernel is a line along the other
        return all(point.overlaps)
    return any(point.overlaps) and (block != "qarepvgg" or point.norm)


def sample(block: str) -> tuple[list[Spread], nn.Module, Tensor]:
    """Points that the block takes and some that it refuses, and a network of them with numbers as after training."""
    shuffled = Random(block).sample(POINTS, len(POINTS))
    some = [p for p in shuffled if applies(block, p)][:24] + [p for p in shuffled if not applies(block, p)][:6]
    return some, trained(Cells(some)), torch.randn(2, 4, 6, 7, dtype=torch.float64)


@pytest.mark.parametrize("form", ["branches", pytest.param("online", marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", BLOCKS)
def test_folds_into_the_original_layer(block: str, form: str) -> None:
    some, model, x = sample(block)
    planned = reparam.plan(model, block, where=lambda *_: True, init="paper", form=form, verify=False)
    for point, row in zip(some, planned.rows, strict=True):
        assert (row.refusal is None) == applies(block, point), (point, row.refusal)
        assert row.refusal is None or row.refusal.reason is Reason.BLOCK, point
    expanded: Any = trained(planned.apply())
    folded: Any = reparam.collapse(expanded, verify=False)
    restored: Any = reparam.collapse(expanded, like=model, verify=False)
    fresh = Cells(some).double().eval()
    fresh.load_state_dict(restored.state_dict(), strict=True)
    with torch.no_grad():
        for result in (folded, fresh):
            for point, wanted, got in zip(some, expanded(x), result(x), strict=True):
                assert gap(got, wanted) < 1e-10, point
    for point, original, cell in zip(some, model.cells, folded.cells, strict=True):  # type: ignore[arg-type]
        (layer,) = layers(cell)
        assert type(layer) is nn.ConvTranspose2d, point
        assert [getattr(layer, a) for a in ATTRIBUTES] == [getattr(original[0], a) for a in ATTRIBUTES], point
        assert (layer.bias is None) == (not point.bias and not point.norm), point


@pytest.mark.parametrize("block", BLOCKS)
def test_starts_as_the_function_in_evaluation_and_in_training(block: str) -> None:
    some, model, x = sample(block)
    expanded = reparam.plan(model, block, where=lambda *_: True, form="branches", verify=False).apply()
    for training in (False, True):
        with torch.no_grad():
            wanted, got = (copy.deepcopy(each).train(training)(x) for each in (model, expanded))
        for point, a, b in zip(some, got, wanted, strict=True):
            assert gap(a, b) <= (0.0 if block != "qarepvgg" else 1e-3 if training else 1e-13), (point, training)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("block", ["repvgg", "dbb", "doconv"])
def test_one_and_three_dimensions(block: str, n: int) -> None:
    for options in ({"stride": 2, "padding": 1}, {"stride": 2, "output_padding": 1, "groups": 2}, {"dilation": 2}):
        conv = TRANSPOSED[n - 1](4, 4, 4, bias=False, **options)
        model = trained(nn.Sequential(conv, NORMS[n](4)))
        x = torch.randn(2, 4, *(6, 5, 4)[:n], dtype=torch.float64)
        expanded = reparam.expand(model, block)
        assert gap(expanded(x), model(x)) == 0.0
        (left,) = layers(reparam.collapse(trained(expanded)))
        assert Geometry.of(left) == Geometry.of(conv)  # type: ignore[arg-type]


def up4(**options: Any) -> nn.Sequential:
    """DCGAN's and U-Net's doubling of a map."""
    return ready(nn.Sequential(nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False, **options), nn.BatchNorm2d(8), nn.ReLU()))


def test_a_branch_has_a_tap_for_each_output_phase_in_the_middle() -> None:
    """So each output pixel reads its nearest input pixel, whatever its phase."""
    expanded: Any = reparam.expand(up4(), "repvgg", where="all")
    assert expanded[0].point.conv.kernel_size == (2, 2)
    assert [b.kernel_size for b in reparam.expand(up4(), "acb")[0].modules() if isinstance(b, nn.ConvTranspose2d)] == [
        (4, 4), (4, 2), (2, 4),
    ]  # fmt: skip
    with torch.no_grad():
        expanded[0].square.conv.weight.zero_()
        expanded[0].point.norm.weight.fill_(1)
    taps = reparam.collapse(expanded.eval())[0].weight.abs().sum((0, 1)) > 0  # type: ignore[index]
    assert taps.tolist() == [[False, True, True, False] if i in (1, 2) else [False] * 4 for i in range(4)]


@pytest.mark.parametrize("block", ["acb", "repvgg", "dbb", "orepa"])
def test_where_taps_do_not_overlap_there_is_nothing_to_add(block: str) -> None:
    """The 2x2 of stride 2 with which most U-Nets go up."""
    found = refusal(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2)), block)
    assert found.reason is Reason.BLOCK
    assert "no two of its taps reach one output pixel" in found.message


def test_fixed_filters_lie_as_in_the_ordinary_block() -> None:
    """Torch's layer holds a transposed kernel the other way round."""
    for block, filters in (("ecb", ("sobel_x.edge", "sobel_y.edge")), ("orepa", ("prior.filters",))):
        spread, plain = (
            reparam.expand(nn.Sequential(kind(8, 8, 3, padding=1)), block, form="branches")[0]  # type: ignore[index]
            for kind in (nn.ConvTranspose2d, nn.Conv2d)
        )
        for path in filters:
            layers = [each.get_submodule(path) for each in (spread, plain)]
            kernels = [
                layer.filter if isinstance(layer, ScaledFilter) else Geometry.of(layer).laid_out(layer.weight)  # type: ignore[arg-type]
                for layer in layers
            ]
            assert torch.equal(*kernels), path


def test_the_norm_moves_in_and_comes_back() -> None:
    model = up4()
    plan = reparam.plan(model, "acb")
    (row,) = plan.rows
    assert row.found.norm is not None
    assert "8->8 4x4 transposed stride 2" in str(plan)
    assert row.cost is not None
    assert row.cost.multiply_adds == (8 * 8 * 16 / 4 + 8, 8 * 8 * (16 + 8 + 8) / 4 + 5 * 8, 8 * 8 * 16 / 4)
    expanded: Any = plan.apply()
    assert isinstance(expanded[1], nn.Identity)
    assert (expanded[0].stride, expanded[0].output_padding) == ((2, 2), (0, 0))


def test_an_output_size_is_an_argument_that_no_block_takes() -> None:
    class Up(nn.Module):
        def __init__(self, by_name: bool) -> None:
            super().__init__()
            self.up, self.by_name = nn.ConvTranspose2d(4, 4, 3, 2), by_name

        def forward(self, x: Tensor) -> Any:
            return self.up(x, output_size=[9, 9]) if self.by_name else self.up(x, [9, 9])

    for by_name in (False, True):
        (row,) = reparam.plan(Up(by_name).eval(), "acb", example_inputs=torch.randn(1, 4, 4, 4)).rows
        assert row.refusal is not None
        assert row.refusal.reason is Reason.CODE
        assert "more than its input" in row.refusal.message


def test_the_edits_of_a_file_make_the_block_again() -> None:
    expanded = reparam.expand(up4(), "acb").eval()
    again = up4()
    apply(again, made_by(expanded) or (), build_block=rebuilt)
    again.load_state_dict(expanded.state_dict(), strict=True)
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(again.eval()(x), expanded(x))


def test_stride_one_stays_a_transposed_convolution() -> None:
    """An ordinary convolution would do; the layer keeps its class, and its weight the layout that stock code loads."""
    model = trained(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)))
    (left,) = layers(reparam.collapse(model))
    assert isinstance(left, nn.ConvTranspose2d)
    assert left.weight.shape == (4, 6, 3, 3)
