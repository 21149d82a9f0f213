"""Every block on every geometry: it starts as it must, trains, and folds back into just the convolution it replaced.

The grid is sampled so that every pair of values meets (kernel with stride, dilation with padding mode, ...).
``REPARAM_GRID=500 pytest tests/test_blocks.py`` takes that many points for each block, ``REPARAM_GRID=all`` the lot.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

import reparam
from passes.algebra.geometry import Geometry
from passes.blocks import doconv as doconv_file
from passes.blocks import ecb as ecb_file
from passes.blocks import orepa as orepa_file
from passes.blocks.kit.kernel_conv import KernelConv
from passes.blocks.kit.layers import BranchSum, ChannelScale, IdentityConv, Times, WindowMean, is_block
from passes.blocks.kit.registry import unregister
from passes.edits.apply import Moved
from passes.refusal import Reason, ReparamError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

GRID = os.environ.get("REPARAM_GRID", "")
TOLERANCE = 1e-10
"""Relative to the largest output, in float64."""

BLOCKS = (
    "acb", "dbb", "doconv", "repvgg", "mobileone", "orepa", "ecb", "largekernel", "qarepvgg", "conv3xc", "repnext",
    "difference", "lora",
)  # fmt: skip
ONE_TAP = "a kernel of one tap"

KINDS = ("acb", "dbb", "doconv", "orepa", "qarepvgg", "repnext")
"""One of each kind for the quick tests: norms alone, sequences and pools, a computed kernel, scales, a norm behind the
sum, lines in a row."""

every_kind = pytest.mark.parametrize(
    "block", [block if block in KINDS else pytest.param(block, marks=pytest.mark.slow) for block in BLOCKS]
)

# ------------------------------------------------------------------ the grid


@dataclass(frozen=True)
class Point:
    """One convolution of the grid; its repr is what a failure prints."""

    kernel: tuple[int, int]
    stride: int
    dilation: int
    padding: str
    groups: str
    bias: bool
    mode: str
    norm: bool

    @property
    def possible(self) -> bool:
        """Whether torch has it; the modes of no padding at all are one and the same."""
        return not (self.padding == "same" and self.stride > 1) and (self.padding != "none" or self.mode == "zeros")

    def cell(self) -> nn.Sequential:
        """The convolution and, behind it, the norm; as many channels out as in where that makes an identity branch."""
        inputs, outputs = (4, 4) if self.groups == "depthwise" or self.kernel[0] % 2 else (4, 6)
        pads: dict[str, Any] = {"none": 0, "one": 1, "same": "same"}
        padding = pads.get(self.padding, tuple(k // 2 * self.dilation + 1 for k in self.kernel))
        conv = nn.Conv2d(
            inputs, outputs, self.kernel, self.stride, padding, self.dilation,
            {"dense": 1, "grouped": 2, "depthwise": 4}[self.groups], self.bias, self.mode,
        )  # fmt: skip
        return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if self.norm else nn.Sequential(conv)


POINTS = [
    point
    for values in product(
        ((1, 3), (2, 2), (3, 3), (4, 4), (5, 5), (7, 7), (3, 5)),
        (1, 2, 3),
        (1, 2, 3),
        ("none", "one", "same", "more than half"),
        ("dense", "grouped", "depthwise"),
        (False, True),
        ("zeros", "reflect", "replicate", "circular"),
        (False, True),
    )
    if (point := Point(*values)).possible
]


def applies(block: str, point: Point) -> bool:
    """Where a block must be used, written down apart from its code; everywhere else it must say why not."""
    if block == "acb":
        return point.kernel != (1, 3)
    if block in ("ecb", "difference"):
        return point.kernel == (3, 3)
    if block == "repnext":
        return point.kernel in ((3, 3), (7, 7))
    if block == "largekernel":
        square = point.kernel in ((5, 5), (7, 7))
        return square and point.groups == "depthwise" and point.stride == 1 and point.dilation == 1
    return block != "qarepvgg" or point.norm


WHY_NOT = {
    "acb": "its kernel is a line itself",
    "ecb": "ecb is for 3x3 kernels",
    "largekernel": "largekernel is for",
    "qarepvgg": "with a batch norm behind it",
    "repnext": "repnext is for kernels of 3x3 and 7x7",
    "difference": "difference is for 3x3 kernels",
}


def sample(block: str, seed: int = 0, *, small: bool = False) -> list[Point]:
    """Points in which every pair of values meets that the block allows at all, and a few that it must refuse."""
    shuffled = random.Random(f"{block} {seed}").sample(POINTS, len(POINTS))
    if GRID and not small:
        return POINTS if GRID == "all" else shuffled[: int(GRID)]
    mine = [point for point in shuffled if applies(block, point)]
    others = [point for point in shuffled if not applies(block, point)]
    return _covering(mine[:600], 1 if small else 2) + others[: 2 if small else 6]


def pairs(point: Point, strength: int = 2) -> set[Any]:
    return set(combinations(enumerate(vars(point).values()), strength))


def _covering(points: list[Point], strength: int) -> list[Point]:
    """Few points in which every pair (``strength`` 2) or single (1) value of the points occurs; greedily."""
    new = {point: pairs(point, strength) for point in points}
    chosen, pool = [], points
    while pool:
        best = max(pool[:60], key=lambda point: len(new[point]))
        chosen.append(best)
        met = set(new[best])
        for point in pool:
            new[point] -= met
        pool = [point for point in pool if new[point]]
    return chosen


class Cells(nn.Module):
    """Many points of the grid side by side in one network: tracing it once is what makes the grid affordable."""

    def __init__(self, points: list[Point]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(point.cell() for point in points)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [cell(x) for cell in self.cells]


def batches(points: list[Point], size: int = 20) -> Iterator[tuple[list[Point], Cells, Tensor]]:
    """Points, the network of them with numbers as after training, and an input of odd size."""
    for start in range(0, len(points), size):
        some = points[start : start + size]
        yield some, trained(Cells(some)), torch.randn(2, 4, 23, 21, dtype=torch.float64)


def trained(model: nn.Module) -> nn.Module | Any:
    """Weights and running statistics as after training, in float64: no gamma is 1, no mean is 0, no scale is 0."""
    with torch.no_grad():
        for parameter in model.double().parameters():
            signs = torch.randint(0, 2, parameter.shape) * 2 - 1
            if parameter.squeeze().dim() <= 1:
                parameter.uniform_(0.5, 1.5).mul_(signs)
            elif parameter.requires_grad:
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_()
    return model.eval()


def layers(model: nn.Module) -> list[nn.Module]:
    """What a model runs, containers and identities aside."""
    plain = (nn.Identity, nn.Sequential, nn.ModuleList, Cells)
    return [m for m in model.modules() if not isinstance(m, plain)]


def gap(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def check_folded(some: list[Point], originals: Any, folded: Any) -> None:
    """Each cell is one convolution with the original's geometry, and one that held no bias and no norm holds none."""
    for point, original, cell in zip(some, originals.cells, folded.cells, strict=True):
        left = layers(cell)
        assert [type(m) for m in left] == [nn.Conv2d], (point, cell)
        assert Geometry.of(left[0]) == Geometry.of(original[0]), point
        assert (left[0].bias is None) == (not point.bias and not point.norm), point


@pytest.mark.parametrize("block", BLOCKS)
def test_published_start_on_every_geometry_folds_into_the_original_convolution(block: str) -> None:
    counts: Counter[str] = Counter()
    for some, model, x in batches(sample(block)):
        before = copy.deepcopy(model.state_dict())
        planned = reparam.plan(
            model, block, where="all", init="paper", form="branches", verify=False
        )  # compared here as well
        for point, row in zip(some, planned.rows, strict=True):
            assert (row.refusal is None) == applies(block, point), (point, row.refusal)
            if row.refusal is not None:
                assert row.refusal.reason is Reason.BLOCK, point
                assert WHY_NOT[block] in row.refusal.message, point
            counts["expanded" if row.refusal is None else "refused"] += 1
        expanded = trained(planned.apply())
        folded = reparam.collapse(expanded, verify=False)  # compared here, all at once
        with torch.no_grad():
            for point, wanted, got in zip(some, expanded(x), folded(x), strict=True):
                assert gap(got, wanted) < TOLERANCE, point
        check_folded(some, model, folded)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert counts["expanded"] > 2 * counts["refused"] or GRID


# The branches' geometry is that of the published start, where every pair of values meets: here every value is enough.
@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["values", "pairs"])
@pytest.mark.parametrize("block", BLOCKS)
def test_preserving_start_changes_nothing_in_evaluation_and_in_training(block: str, small: bool) -> None:
    """Exactly; QARepVGG has a norm behind a norm: up to rounding in evaluation, and up to eps in training."""
    for some, model, x in batches(sample(block, seed=1, small=small)):
        planned = reparam.plan(model, block, where="all", form="branches")
        assert all((row.refusal is None) == applies(block, p) for p, row in zip(some, planned.rows, strict=True))
        expanded: Any = planned.apply()
        for training in (False, True):
            reference = copy.deepcopy(model).train(training)
            candidate = copy.deepcopy(expanded).train(training)
            with torch.no_grad():
                outputs = zip(some, reference(x), candidate(x), strict=True)
            for point, wanted, got in outputs:
                allowed = 0.0 if block != "qarepvgg" else 1e-3 if training else 1e-14
                assert gap(got, wanted) <= allowed, (point, training)
        assert all(cell.training == expanded.training for cell in expanded.modules())


def test_the_grid_meets_every_pair_of_values_and_is_mostly_expanded() -> None:
    """How many of the grid's points each block takes; the rest are refused for the one reason in WHY_NOT."""
    shares = {block: sum(applies(block, p) for p in POINTS) for block in BLOCKS}
    assert len(POINTS) == 7812
    assert shares == {
        "acb": 6696, "dbb": 7812, "doconv": 7812, "repvgg": 7812, "mobileone": 7812, "orepa": 7812,
        "ecb": 1116, "largekernel": 104, "qarepvgg": 3906, "conv3xc": 7812, "repnext": 2232, "difference": 1116,
        "lora": 7812,
    }  # fmt: skip
    every_pair = set().union(*map(pairs, POINTS))
    for block in ("dbb", "doconv", "repvgg", "mobileone", "orepa", "conv3xc", "lora"):
        chosen = sample(block)
        assert len(chosen) < 60 or GRID
        assert set().union(*map(pairs, chosen)) == every_pair or GRID


# ------------------------------------------------------------------ online


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def convolutions(model: nn.Module, x: Tensor) -> int:
    with Convolutions() as mode:
        model(x)
    return mode.count


def test_counting_convolutions_counts_branches() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert convolutions(reparam.expand(model, "acb"), torch.randn(1, 4, 9, 9)) == 3


@every_kind
def test_online_runs_one_convolution_and_is_the_sum_of_its_branches(block: str) -> None:
    for some, model, x in batches(sample(block, seed=2, small=True)):
        planned = reparam.plan(model, block, where="all", init="paper", form="online", verify=False)
        assert [row.refusal is None for row in planned.rows] == [applies(block, p) for p in some]
        expanded: Any = trained(planned.apply())
        assert convolutions(expanded.train(), x) == len(some)
        expanded.eval()
        with torch.no_grad():
            for point, cell in zip(some, expanded.cells, strict=True):
                if is_block(cell[0]):
                    assert not any(isinstance(m, _BatchNorm) for m in cell[0].modules())
                    assert gap(cell[0](x), cell[0].summed(x)) < TOLERANCE, point
            folded = reparam.collapse(expanded, verify=False)
            for point, wanted, got in zip(some, expanded(x), folded(x), strict=True):
                assert gap(got, wanted) < TOLERANCE, point
        check_folded(some, model, folded)


@every_kind
def test_sampled_from_the_whole_batch_is_the_sum_of_its_branches(block: str) -> None:
    """Outputs, gradients and running statistics, in training; then the result in evaluation."""
    for some, model, x in batches(sample(block, seed=3, small=True)):
        planned = reparam.plan(model, block, where="all", init="paper", form="branches", verify=False)
        expanded: Any = trained(planned.apply()).train()
        if not any(is_block(module) for module in expanded.modules()):
            continue
        sampled = reparam.set_form(copy.deepcopy(expanded), "sampled:fraction=1")
        for way in (expanded, sampled):
            sum((y.square() * (y > 0.1)).sum() for y in way(x)).backward()
        for point, wanted, got in zip(some, expanded(x), sampled(x), strict=True):
            assert gap(got, wanted) < 1e-9, point
        for (name, parameter), other in zip(expanded.named_parameters(), sampled.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if parameter.grad is not None:
                most = max(float(parameter.grad.abs().max()), 1)
                assert float((parameter.grad - other.grad).abs().max()) <= 1e-7 * most, name
        for (name, wanted), got in zip(expanded.named_buffers(), sampled.buffers(), strict=True):
            assert gap(got.double(), wanted.double()) < 1e-10, name
        for point, wanted, got in zip(some, expanded.eval()(x), sampled.eval()(x), strict=True):
            assert gap(got, wanted) < TOLERANCE, point


@every_kind
def test_online_preserving_start_is_the_function_up_to_rounding(block: str) -> None:
    for some, model, x in batches(sample(block, seed=3, small=True)):
        expanded: Any = reparam.expand(
            model, block, where="all", form="online", verify=False
        )  # compared here, point by point
        for training in (False, True):
            reference = copy.deepcopy(model).train(training)
            with torch.no_grad():
                outputs = zip(some, reference(x), copy.deepcopy(expanded).train(training)(x), strict=True)
            for point, wanted, got in outputs:
                assert gap(got, wanted) < 1e-13, point


# ------------------------------------------------------------------ one and three dimensions

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def conv_bn(n: int, inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(CONVS[n](inputs, outputs, kernel, bias=False, **options), NORMS[n](outputs))


GEOMETRIES: tuple[tuple[int, int, Any, dict[str, Any]], ...] = (
    (4, 4, 3, {"padding": 1}),
    (4, 4, 3, {"padding": 2, "groups": 4, "dilation": 2}),
    (4, 6, 4, {"padding": 1, "groups": 2, "stride": 2, "padding_mode": "circular"}),
    (4, 4, 2, {"padding": "same", "padding_mode": "replicate"}),
)


ANY_NUMBER = ("acb", "dbb", "doconv", "repvgg", "mobileone", "orepa", "conv3xc", "lora")


@pytest.mark.parametrize(
    ("block", "n", "form"),
    [
        # Every block with each number of dimensions and in each form; the form has nothing to do with the dimensions.
        pytest.param(
            block, n, form, marks=[] if (n == 3) is ((form == "online") is not (number % 2 == 0)) else pytest.mark.slow
        )
        for number, block in enumerate(ANY_NUMBER)
        for n in (1, 3)
        for form in ("branches", "online")
    ],
)
def test_blocks_carry_over_to_one_and_three_dimensions(block: str, n: int, form: str) -> None:
    x = torch.randn(2, 4, *(11, 9, 7)[:n], dtype=torch.float64)
    for inputs, outputs, kernel, options in GEOMETRIES:
        model = trained(conv_bn(n, inputs, outputs, kernel, **options))
        planned = reparam.plan(model, block, where="all", form=form)
        if block == "acb" and n == 1:
            assert [row.refusal.message for row in planned.refused if row.refusal] == [
                "its kernel is a line itself: acb has nothing to add"
            ]
            continue
        expanded = planned.apply()
        with torch.no_grad():
            assert gap(expanded(x), model(x)) <= (1e-13 if form == "online" else 0.0)
            folded = reparam.collapse(trained(expanded), verify=False)
            assert gap(folded(x), expanded(x)) < TOLERANCE
        (left,) = layers(folded)
        assert isinstance(left, CONVS[n])
        assert Geometry.of(left) == Geometry.of(model[0])


def test_acb_in_three_dimensions_has_one_line_for_each_axis() -> None:
    block: Any = reparam.expand(conv_bn(3, 4, 4, (3, 5, 7)), "acb", where="all")[0]  # type: ignore[index]
    assert {name: only(b, nn.Conv3d).kernel_size for name, b in block.named_children()} == {
        "square": (3, 5, 7), "line0": (3, 1, 1), "line1": (1, 5, 1), "line2": (1, 1, 7),
    }  # fmt: skip


# ------------------------------------------------------------------ refusals


def refusal(model: nn.Module, block: Any, **options: Any) -> reparam.Refusal:
    """The one refusal of a plan for a model with one convolution; nothing may be touched."""
    before = copy.deepcopy(model.state_dict())
    planned = reparam.plan(model, block, where="0", **options)
    (row,) = planned.rows
    assert row.refusal is not None, row
    assert row.refusal.message in str(planned)
    unchanged: Any = planned.apply()
    assert list(unchanged.state_dict()) == list(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return row.refusal


@pytest.mark.parametrize(
    ("block", "model", "fragment"),
    [
        ("acb", conv_bn(2, 4, 4, 1), "its kernel is a line itself"),
        ("acb", conv_bn(2, 4, 4, (1, 5)), "its kernel is a line itself"),
        ("acb", conv_bn(1, 4, 4, 5), "its kernel is a line itself"),
        (reparam.Block("acb", line=5), conv_bn(2, 4, 4, 3), "lines of 5 are longer than its kernel"),
        ("dbb", conv_bn(2, 4, 4, 1), ONE_TAP),
        ("doconv", conv_bn(2, 4, 4, 1), ONE_TAP),
        (reparam.Block("doconv", depth=8), conv_bn(2, 4, 4, 3), "a depth of 8 is less than its 9 taps"),
        ("repvgg", conv_bn(2, 4, 4, 1), ONE_TAP),
        ("orepa", conv_bn(2, 4, 4, 1), ONE_TAP),
        ("ecb", conv_bn(2, 4, 4, 5), "ecb is for 3x3 kernels"),
        ("ecb", conv_bn(1, 4, 4, 3), "ecb is for 3x3 kernels"),
        ("ecb", conv_bn(3, 4, 4, 3), "ecb is for 3x3 kernels"),
        ("largekernel", conv_bn(2, 4, 4, 7), "depthwise convolutions with a square kernel of 5, 7, 9"),
        ("largekernel", conv_bn(2, 4, 4, 3, groups=4), "depthwise convolutions with a square kernel of 5, 7, 9"),
        ("largekernel", conv_bn(2, 4, 4, (5, 7), groups=4), "depthwise convolutions with a square kernel of 5, 7, 9"),
        ("largekernel", conv_bn(2, 4, 8, 7, groups=4), "depthwise convolutions with a square kernel of 5, 7, 9"),
        ("largekernel", conv_bn(2, 4, 4, 7, groups=4, stride=2), "stride 1 and dilation 1"),
        ("largekernel", conv_bn(2, 4, 4, 7, groups=4, dilation=2), "stride 1 and dilation 1"),
        ("qarepvgg", conv_bn(2, 4, 4, 1), "more than one tap with a batch norm behind it"),
        ("qarepvgg", nn.Sequential(nn.Conv2d(4, 4, 3)), "more than one tap with a batch norm behind it"),
        ("dbb", nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2)), "no two of its taps reach one output pixel"),
    ],
)
def test_each_refusal_says_why(block: Any, model: nn.Module, fragment: str) -> None:
    found = refusal(model, block)
    assert found.reason is Reason.BLOCK
    assert fragment in found.message
    assert found.layer == "0"


def test_mobileone_takes_a_pointwise_convolution() -> None:
    block: Any = reparam.expand(conv_bn(2, 4, 4, 1), "mobileone", where="0")[0]  # type: ignore[index]
    assert list(dict(block.named_children())) == ["conv0", "conv1", "conv2", "conv3", "identity"]


# ------------------------------------------------------------------ a place for the bias

WITH_NORMS = ("acb", "dbb", "repvgg", "mobileone", "largekernel")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("block", [b for b in BLOCKS if b != "qarepvgg"])
@pytest.mark.parametrize("form", ["branches", pytest.param("online", marks=pytest.mark.slow)])  # no norms
def test_without_a_norm_branches_have_one_only_if_the_bias_has_a_place(block: str, bias: bool, form: str) -> None:
    kernel = 5 if block == "largekernel" else 3
    for groups in (4,) if block == "largekernel" else (1, 2, 4):
        model = nn.Sequential(nn.Conv2d(4, 4, kernel, padding=1, groups=groups, bias=bias)).double()
        expanded: Any = reparam.expand(model, block, where="all", form=form, verify=False)  # compared here
        assert is_block(expanded[0])
        norms = [m for m in expanded.modules() if isinstance(m, _BatchNorm)]
        assert bool(norms) == (bias and block in WITH_NORMS and form == "branches")
        x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
        with torch.no_grad():
            assert gap(expanded.eval()(x), model(x)) <= (1e-13 if form == "online" else 0.0)
            folded = reparam.collapse(trained(expanded), verify=False)
            assert gap(folded(x), expanded(x)) < TOLERANCE
        (conv,) = [m for m in layers(folded) if isinstance(m, nn.Conv2d)]
        assert (conv.bias is not None) == bias


# ------------------------------------------------------------------ training


class SmallNet(nn.Module):
    """Convolutions that every block has one of: a 3x3, a large depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(2, 3, 8, 3, padding=1)
        self.wide = conv_bn(2, 8, 8, 7, padding=3, groups=8)
        self.body = conv_bn(2, 8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.wide(F.relu(self.stem(x))))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize("form", ["branches", "online"])
@pytest.mark.parametrize(
    "block",
    [
        *BLOCKS,
        reparam.Block("ecb", identity=True),
        reparam.Block("acb", bn="after"),
        reparam.Block("repvgg", alpha=True),
        reparam.Block("mobileone", affine="scalar"),
        reparam.Block("qarepvgg", average=True),
        reparam.Block("orepa", width=2),
        reparam.Block("largekernel", table="overlock"),
    ],
    ids=str,
)
def test_every_parameter_has_a_gradient_within_two_steps(block: Any, form: str) -> None:
    model = reparam.expand(SmallNet().double().train(), block, where="all", form=form, verify=False)
    added = [m for m in model.modules() if is_block(m)]
    assert added
    # Without momentum or decay: what moves has its own gradient. AdamW's step does not depend on the gradient's size.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    touched: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        x, y = torch.randn(8, 3, 12, 12, dtype=torch.float64), torch.randint(0, 5, (8,))
        F.cross_entropy(model(x), y).backward()
        touched |= {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
        optimizer.step()
    missing = {name for name, p in model.named_parameters() if p.requires_grad} - touched
    # Edge filters sum to zero, so that a constant in front of them is nothing behind: published, and without effect.
    # So is a shift in front of a norm that takes the mean away.
    without = ("sobel_x.point.bias", "sobel_y.point.bias", "laplacian.point.bias", "average.norm.bias")
    assert not {name for name in missing if not name.endswith(without)}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------ structure and initialisation, as published


def expand_one(block: Any, model: nn.Sequential, **options: Any) -> Any:
    """The block in the place of a model's first convolution."""
    expanded: Any = reparam.expand(model, block, **{"where": "all", **options})
    return expanded[0]


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


def only(module: Any, kind: Any) -> Any:
    """The one layer of this kind in a branch."""
    (found,) = [m for m in module.modules() if isinstance(m, kind)]
    return found


def gammas(block: nn.Module) -> list[float]:
    """The value of each batch norm's weight, which must be one value."""
    found = [m.weight for m in block.modules() if isinstance(m, _BatchNorm)]
    assert all(bool((w == w[0]).all()) for w in found)
    return [float(w[0].detach()) for w in found]


def test_acb_is_a_square_and_two_lines_each_with_its_norm() -> None:
    block = expand_one("acb", conv_bn(2, 4, 6, (3, 5)), init="paper")
    assert {name: only(b, nn.Conv2d).kernel_size for name, b in block.named_children()} == {
        "square": (3, 5), "line0": (3, 1), "line1": (1, 5),
    }  # fmt: skip
    assert gammas(block) == [1.0, 1.0, 1.0]


def test_acb_on_cifar_starts_every_gamma_at_a_third_but_only_when_it_need_not_preserve() -> None:
    third = reparam.Block("acb", gamma=1 / 3)
    assert gammas(expand_one(third, conv_bn(2, 4, 6), init="paper")) == pytest.approx([1 / 3] * 3)
    assert gammas(expand_one(third, conv_bn(2, 4, 6))) == [1.0, 0.0, 0.0]


def test_acb_with_the_norm_after_the_sum_leaves_it_in_its_place() -> None:
    model = trained(conv_bn(2, 4, 6))
    expanded: Any = reparam.expand(model, reparam.Block("acb", bn="after"), init="paper")
    assert gammas(expanded[0]) == []
    assert torch.equal(expanded[1].weight, model[1].weight)
    assert isinstance(reparam.collapse(expanded)[0], nn.Conv2d)  # type: ignore[index]


def test_acb_has_short_lines_on_a_larger_kernel() -> None:
    block = expand_one(reparam.Block("acb", line=3), trained(conv_bn(2, 4, 6, 5, padding=2)), init="paper")
    assert {name: only(b, nn.Conv2d).kernel_size for name, b in block.named_children()} == {
        "square": (5, 5), "line0": (3, 1), "line1": (1, 3),
    }  # fmt: skip
    kernel, _ = reparam.equivalent_conv(block)
    square, _ = reparam.equivalent_conv(block.square)
    outside = torch.ones(5, 5, dtype=torch.bool)
    outside[1:4, 2] = outside[2, 1:4] = False
    assert torch.equal(kernel[..., outside], square[..., outside])
    assert not torch.isclose(kernel[..., ~outside], square[..., ~outside]).any()


def test_dbb_on_a_dense_convolution() -> None:
    block = expand_one("dbb", conv_bn(2, 4, 6, padding=1, stride=2), init="paper")
    assert names(block) == ["square", "point", "average", "sequence"]
    assert names(block.point) == ["every", "conv", "norm"]
    assert block.point.every.stride == [2, 2]
    assert (block.point.conv.kernel_size, block.point.conv.stride) == ((1, 1), (1, 1))
    assert names(block.average) == ["point", "pad", "norm", "pool", "last_norm"]
    assert (block.average.pool.kernel_size, block.average.pool.stride) == ((3, 3), (2, 2))
    assert names(block.sequence) == ["point", "pad", "norm", "square", "last_norm"]
    assert block.sequence.norm.num_features == 4  # as many as go in
    assert isinstance(block.sequence.point, IdentityConv)
    assert not block.sequence.point.weight.any()
    assert torch.equal(block.sequence.point.kernel().flatten(1), torch.eye(4))
    assert gammas(block) == [1.0] * 6


def test_dbb_on_a_depthwise_convolution() -> None:
    block = expand_one("dbb", conv_bn(2, 4, 4, padding=1, groups=4), init="paper")
    assert names(block) == ["square", "average", "sequence"]
    assert names(block.average) == ["pool", "last_norm"]
    assert type(block.sequence.point) is nn.Conv2d
    assert block.sequence.norm.num_features == 8  # twice as many as go in


def test_dbb_identity_in_groups_passes_every_channel_on() -> None:
    block = expand_one("dbb", conv_bn(2, 4, 6, padding=1, groups=2).double(), init="paper")
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(block.sequence.point(x), x)


@pytest.mark.parametrize("switches", list(product((False, True), repeat=3)))
def test_dbb_branches_can_each_be_switched_off(switches: tuple[bool, bool, bool]) -> None:
    options = dict(zip(("pointwise", "average", "sequence"), switches, strict=True))
    block = expand_one(reparam.Block("dbb", **options), conv_bn(2, 4, 6))
    kept = [name for name, on in zip(("point", "average", "sequence"), switches, strict=True) if on]
    assert names(block) == (["square", *kept] if kept else ["conv", "norm"])  # one branch alone needs no sum


def test_dbb_single_starts_the_last_gamma_of_added_branches_at_zero() -> None:
    block = expand_one(reparam.Block("dbb", single=True), conv_bn(2, 4, 6), init="paper")
    last = [block.point.norm, block.average.last_norm, block.sequence.last_norm]
    assert all(not norm.weight.any() for norm in last)
    assert sorted(gammas(block)) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def by_hand(module: doconv_file.DOConv, groups: int, kernel: tuple[int, int]) -> Tensor:
    """``kernel[o, i, t] = sum_s (I + D)[c, t, s] W[o, i, s]`` with c the input channel that (o, i) reads."""
    out, per_group, depth = module.weight.shape
    taps = math.prod(kernel)
    identity = torch.eye(taps, dtype=module.weight.dtype).repeat(1, depth // taps)
    identity = F.pad(identity, [0, depth - identity.shape[1]])
    found = torch.empty(out, per_group, taps, dtype=module.weight.dtype)
    for o, i in product(range(out), range(per_group)):
        channel = o * groups // out * per_group + i
        found[o, i] = (identity + module.D[channel]) @ module.weight[o, i]
    return found.reshape(out, per_group, *kernel)


@pytest.mark.parametrize("depth", [None, 12, 18, 30])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_doconv_is_its_published_product_for_every_depth_and_starts_exact(depth: int | None, groups: int) -> None:
    model = conv_bn(2, 4, 8, 3, padding=1, groups=groups).double()
    chosen = "doconv" if depth is None else reparam.Block("doconv", depth=depth)
    block = expand_one(chosen, model)
    assert block.weight.shape == (8, 4 // groups, depth or 9)
    assert block.D.shape == (4, 9, depth or 9)
    assert not block.D.any()
    assert torch.equal(block.kernel(), model[0].weight)
    assert {name for name, _ in block.named_parameters()} == {"weight", "D"}
    with torch.no_grad():
        block.D.normal_()
        block.weight.normal_()
        assert torch.allclose(block.kernel(), by_hand(block, groups, (3, 3)), rtol=1e-12, atol=1e-12)


def test_doconv_as_published_starts_from_kaiming_uniform_and_d_at_zero() -> None:
    block = expand_one(reparam.Block("doconv", depth=18), conv_bn(2, 16, 64), init="paper")
    assert not block.D.any()
    bound = 1 / math.sqrt(16 * 18)  # uniform, a = sqrt 5, fan-in: inputs times depth
    assert 0.95 * bound < float(block.weight.detach().abs().max()) <= bound
    assert float(block.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_repvgg_has_an_identity_only_where_shapes_allow() -> None:
    assert names(expand_one("repvgg", conv_bn(2, 4, 4))) == ["square", "point", "identity"]
    assert names(expand_one("repvgg", conv_bn(2, 4, 6))) == ["square", "point"]
    assert names(expand_one("repvgg", conv_bn(2, 4, 4, stride=2))) == ["square", "point"]
    assert gammas(expand_one("repvgg", conv_bn(2, 4, 4), init="paper")) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_mobileone_has_n_kernels_a_point_and_an_identity(n: int) -> None:
    block = expand_one(reparam.Block("mobileone", n=n), conv_bn(2, 4, 4, padding=1, groups=4), init="paper")
    assert names(block) == [*(f"conv{i}" for i in range(n)), "point", "identity"]
    assert [only(b, nn.Conv2d).kernel_size for b in list(block.children())[:-1]] == [(3, 3)] * n + [(1, 1)]
    assert gammas(block) == [1.0] * (n + 2)


def test_mobileone_needs_at_least_one_kernel() -> None:
    with pytest.raises(ReparamError, match="n is at least 1, got 0"):
        reparam.expand(conv_bn(2, 4, 4), reparam.Block("mobileone", n=0), where="all")


def test_acb_knows_two_places_for_its_norm() -> None:
    with pytest.raises(ReparamError, match="bn is 'branch' or 'after', got 'before'"):
        reparam.expand(conv_bn(2, 4, 4), reparam.Block("acb", bn="before"))


def test_orepa_has_six_branches_each_times_its_published_vector() -> None:
    model = conv_bn(2, 4, 6, 5, padding=2)
    block = expand_one("orepa", model, init="paper")
    vectors = {name: only(branch, ChannelScale).weight for name, branch in block.named_children()}
    assert all(bool((v == v.flatten()[0]).all()) and v.shape == (6, 1, 1) for v in vectors.values())
    assert {name: float(v.detach().flatten()[0]) for name, v in vectors.items()} == {
        "square": 0.25, "average": 0.25, "prior": 0.0, "sequence": 0.5, "point": 1.0, "separable": 0.5,
    }  # fmt: skip
    assert not any(isinstance(m, _BatchNorm) for m in block.modules())  # the one norm stays behind the sum
    assert not block.sequence.point.weight.any()
    assert block.separable.depth.out_channels == 8 * 4
    assert block.form == "online"  # as published, without being asked
    start = expand_one("orepa", model)
    assert {name: float(only(b, ChannelScale).weight.detach().abs().max()) for name, b in start.named_children()} == {
        "square": 1.0, "average": 0.0, "prior": 0.0, "sequence": 0.0, "point": 0.0, "separable": 0.0,
    }  # fmt: skip


def test_orepa_prior_is_filled_for_every_kernel_size() -> None:
    prior = orepa_file.frequency_prior(6, (3, 5))
    assert prior.shape == (6, 3, 5)
    for channel in range(3):  # first half: along the height
        wanted = [math.cos(math.pi / 3 * (channel + 1) * (row + 0.5)) for row in range(3)]
        assert prior[channel, :, 0].tolist() == pytest.approx(wanted, abs=1e-6)
        assert bool((prior[channel] == prior[channel, :, :1]).all())
    for channel in range(3):  # second half: along the width
        wanted = [math.cos(math.pi / 5 * (channel + 1) * (column + 0.5)) for column in range(5)]
        assert prior[3 + channel, 0].tolist() == pytest.approx(wanted, abs=1e-6)
        assert bool((prior[3 + channel] == prior[3 + channel, :1]).all())
    block = expand_one("orepa", conv_bn(2, 4, 6, 5), init="paper")
    stored = only(block.prior.filters, nn.Conv2d).weight
    assert not stored.requires_grad
    assert torch.equal(stored[:, 0], orepa_file.frequency_prior(6, (5, 5)))


def test_ecb_has_its_edge_filters_and_starts_them_small() -> None:
    block = expand_one("ecb", nn.Sequential(nn.Conv2d(64, 128, 3, padding=1)), init="paper")
    assert names(block) == ["square", "sequence", "sobel_x", "sobel_y", "laplacian"]
    assert block.sequence.point.out_channels == 256
    assert block.sequence.point.bias is not None
    assert block.sequence.square.bias is not None
    filters = {
        "sobel_x": [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
        "sobel_y": [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
        "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    }
    for name, taps in filters.items():
        edge = only(block.get_submodule(name), ecb_file.ScaledFilter)
        assert edge.filter.shape == (128, 1, 3, 3)
        assert edge.filter[17, 0].tolist() == taps
        assert "filter" not in dict(edge.named_parameters())
        assert float(edge.scale.detach().std()) == pytest.approx(1e-3, rel=0.3)
        assert float(edge.bias.detach().std()) == pytest.approx(1e-3, rel=0.3)
        assert torch.equal(edge.kernel(), edge.scale * edge.filter)
    assert not any(isinstance(m, _BatchNorm) for m in block.modules())
    wide = expand_one(reparam.Block("ecb", multiplier=1.5, identity=True), conv_bn(2, 8, 8, padding=1))
    assert wide.sequence.point.out_channels == 12
    assert names(wide)[-1] == "identity"
    assert "identity" not in names(expand_one(reparam.Block("ecb", identity=True), conv_bn(2, 8, 4)))


LARGE = {
    5: [(3, 1), (3, 2)],
    7: [(5, 1), (3, 2), (3, 3)],
    9: [(5, 1), (5, 2), (3, 3), (3, 4)],
    11: [(5, 1), (5, 2), (3, 3), (3, 4), (3, 5)],
    13: [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)],
    15: [(5, 1), (7, 2), (3, 3), (3, 5), (3, 7)],
    17: [(5, 1), (9, 2), (3, 4), (3, 5), (3, 7)],
}


@pytest.mark.parametrize("size", LARGE)
def test_largekernel_has_the_published_dilated_branches(size: int) -> None:
    model = trained(conv_bn(2, 4, 4, size, padding=size // 2, groups=4))
    block = expand_one("largekernel", model, init="paper")
    convs = [only(branch, nn.Conv2d) for branch in block.children()]
    assert names(block)[0] == "large"
    assert [(c.kernel_size[0], c.dilation[0]) for c in convs] == [(size, 1), *LARGE[size]]
    assert all(c.groups == 4 for c in convs)
    assert gammas(expand_one("largekernel", conv_bn(2, 4, 4, size, groups=4), init="paper")) == [1.0] * len(convs)
    x = torch.randn(1, 4, size + 2, size + 2, dtype=torch.float64)
    with torch.no_grad():
        folded = reparam.collapse(trained(nn.Sequential(block)), verify=False)
        assert gap(folded(x), block.eval()(x)) < TOLERANCE


def test_qarepvgg_has_one_norm_in_the_square_and_one_behind_the_sum() -> None:
    model = conv_bn(2, 4, 4, padding=1)
    expanded: Any = reparam.expand(model, "qarepvgg", init="paper")
    block = expanded[0]
    assert names(block) == ["square", "point", "identity"]
    assert names(block.square) == ["conv", "norm"]
    assert type(block.point) is nn.Conv2d
    assert block.point.bias is not None
    assert float(only(block.identity, ChannelScale).weight.detach().mean()) == 1.0
    assert isinstance(expanded[1], nn.BatchNorm2d)
    assert gammas(expanded) == [1.0, 1.0]
    assert names(expand_one("qarepvgg", conv_bn(2, 4, 6))) == ["square", "point"]


# ------------------------------------------------------------------ registry


def test_blocks_lists_all_in_order_of_registration_with_their_options() -> None:
    assert tuple(reparam.blocks()) == (
        "acb", "conv3xc", "dbb", "difference", "doconv", "ecb", "largekernel", "lora", "mobileone", "orepa", "qarepvgg",
        "repnext", "repvgg",
    )  # fmt: skip
    shown = {name: str(info) for name, info in reparam.blocks().items()}
    assert shown["acb"].startswith("acb(gamma=1.0, bn='branch', line=None): Asymmetric convolution block")
    assert shown["repvgg"].startswith("repvgg(identity=True, alpha=False): RepVGG")
    assert all("\n" not in line for line in shown.values())
    assert {name for name, info in reparam.blocks().items() if info.online} == {"orepa", "difference"}
    reparam.blocks().clear()  # a copy
    assert reparam.blocks()


def test_a_block_with_options_prints_as_it_is_written() -> None:
    assert str(reparam.Block("acb", bn="after")) == "acb(bn='after')"
    assert str(reparam.Block("acb")) == "acb"
    assert len({reparam.Block("acb", line=3), reparam.Block("acb", line=3), reparam.Block("acb")}) == 2


@pytest.mark.usefixtures("registry")
def test_a_name_that_is_taken_raises_but_the_same_declaration_again_does_not() -> None:
    def widened(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()

    with pytest.raises(ReparamError, match="there is a block named 'acb' already; choose another name"):
        reparam.block("acb")(widened)
    reparam.block("widened")(widened)
    reparam.block("widened")(widened)
    assert list(reparam.blocks())[-1] == "widened"


@pytest.mark.usefixtures("registry")
def test_an_option_without_default_or_by_position_raises() -> None:
    def needs(conv: reparam.Site, *, width: int) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()

    def by_position(conv: reparam.Site, width: int = 2) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()

    for declare in (needs, by_position):
        with pytest.raises(ReparamError, match="option 'width' must be keyword-only, with a default"):
            reparam.block("wide")(declare)
    assert "wide" not in reparam.blocks()


def test_a_decorator_without_a_name_says_how_it_is_written() -> None:
    with pytest.raises(ReparamError, match=r'registered with @block\("name"\)'):
        reparam.block(lambda conv: iter(()))  # type: ignore[arg-type]


def test_unknown_names_and_options_list_what_there_is() -> None:
    with pytest.raises(ReparamError, match=r"no block named 'repvg' \(did you mean 'repvgg'\?\); known: acb, conv3xc"):
        reparam.expand(conv_bn(2, 4, 4), "repvg")
    with pytest.raises(ReparamError, match="no block named 'zzz'; known: acb"):
        reparam.Block("zzz")
    with pytest.raises(ReparamError, match="block 'acb' has no option 'gama'; it has: gamma, bn, line"):
        reparam.Block("acb", gama=1.0)
    with pytest.raises(ReparamError, match="block 'repnext' has no option 'n'; it has: none"):
        reparam.Block("repnext", n=1)
    with pytest.raises(ReparamError, match="no block named 'nothing'"):
        unregister("nothing")


@pytest.mark.usefixtures("registry")
def test_a_block_of_ones_own_needs_no_folding_code() -> None:
    @reparam.block("ladder")
    def ladder(conv: reparam.Site, *, steps: int = 2) -> Iterator[tuple[str, nn.Module]]:
        """Every smaller odd kernel beside the main one, and a 1x1 in front of one more."""
        if conv.taps == 1:
            conv.refuse("a kernel of one tap has nothing smaller")
        yield "main", conv.main()
        for size in range(1, min(conv.kernel), steps):
            yield f"k{size}", conv.parallel(size)
        middle = 2 * conv.in_channels
        yield "deep", conv.row(point=conv.pointwise(middle), norm=conv.new_norm(middle), last=conv.windowed(middle))

    assert str(reparam.blocks()["ladder"]) == (
        "ladder(steps=2): Every smaller odd kernel beside the main one, and a 1x1 in front of one more."
    )
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model = trained(SmallNet())
    for form in ("branches", "online"):
        expanded = reparam.expand(model, "ladder", form=form)
        assert gap(expanded(x), model(x)) <= (1e-13 if form == "online" else 0.0)
        expanded = trained(reparam.expand(model, reparam.Block("ladder", steps=1), init="paper", form=form))
        folded = reparam.collapse(expanded)
        reparam.verify(expanded, folded, x).raise_if_different()
        assert [type(m) for m in layers(folded) if isinstance(m, (_ConvNd, BranchSum))] == [nn.Conv2d] * 3
        restored = reparam.collapse(expanded, like=model)
        SmallNet().double().load_state_dict(restored.state_dict(), strict=True)
    assert "nothing smaller" in refusal(conv_bn(2, 4, 4, 1), "ladder").message


def test_the_mean_of_a_dilated_window_is_a_mean() -> None:
    """Pooling has no dilation, so a convolution that is not trained stands for it."""
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(4))
    means = [p for p in reparam.expand(plain, "dbb").parameters() if not p.requires_grad]
    assert [p.shape for p in means] == [(4, 1, 3, 3)]
    assert torch.equal(means[0], torch.full((4, 1, 3, 3), 1 / 9))


# ------------------------------------------------------------------ the checks are shown to fail


@pytest.mark.usefixtures("registry")
def test_a_branch_that_is_not_affine_is_refused_before_anything_is_touched() -> None:
    @reparam.block("bent")
    def bent(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "bent", nn.Sequential(conv.parallel(1), nn.ReLU())

    for init in ("preserve", "paper"):
        assert refusal(conv_bn(2, 4, 4), "bent", init=init).reason is Reason.NOT_AFFINE


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("kind", ["larger kernel", "other stride", "shifted"])
def test_a_block_that_does_not_fold_into_the_geometry_is_refused(kind: str) -> None:
    made = {
        "larger kernel": lambda: nn.Conv2d(4, 4, 5, padding=2),
        "other stride": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2)),
        "shifted": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 2, 0)), nn.Conv2d(4, 4, 3)),
    }

    @reparam.block("misfit")
    def misfit(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "odd", made[kind]().to(conv.conv.weight.device)

    found = refusal(conv_bn(2, 4, 4, padding=1), "misfit", init="paper")
    if kind != "other stride":
        assert found.reason is Reason.BLOCK
        assert "misfit folds into another geometry than 4->4 3x3" in found.message


@pytest.mark.usefixtures("registry")
def test_a_block_that_would_leave_a_bias_where_none_has_a_place_is_refused() -> None:
    @reparam.block("biased")
    def biased(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "biased", nn.Conv2d(4, 4, 1, device=conv.conv.weight.device)

    found = refusal(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)), "biased")
    assert found.reason is Reason.BLOCK
    assert "would leave a bias, and no layer here can take it" in found.message


@pytest.mark.usefixtures("registry")
def test_a_branch_that_cannot_start_at_zero_says_what_to_do() -> None:
    class Doubled(nn.Module):
        def __init__(self, **placed: Any) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1, 4, 1, 1, **placed))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    @reparam.block("stubborn")
    def stubborn(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "doubled", conv.row(x=conv.parallel(1), factor=Doubled(device=conv.conv.weight.device))

    with pytest.raises(ReparamError, match=r"ends in Doubled, and init='preserve' does not know .* silence\(\)"):
        reparam.plan(conv_bn(2, 4, 4, padding=1), "stubborn")
    assert len(reparam.plan(conv_bn(2, 4, 4, padding=1), "stubborn", init="paper").expanded) == 1


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_start_that_is_off_is_found_and_the_model_is_as_it_was(inplace: bool) -> None:
    @reparam.block("off")
    def off(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.row(main=conv.main(), scale=conv.scale(1.01))
        yield "point", conv.parallel(1)

    model = nn.Sequential(conv_bn(2, 4, 4, 3, padding=1), conv_bn(2, 4, 4, 3, padding=1)).eval()
    before, printed = copy.deepcopy(model.state_dict()), str(model)
    blocks = {"0.0": "acb", "1.0": "off"}
    with pytest.raises(ReparamError, match=r"^1\.0: with its block the network computes something else"):
        reparam.expand(model, blocks, inplace=inplace, strict=True)
    with pytest.raises(ReparamError, match=r"^1\.0: off does not start as the function that it replaces"):
        reparam.expand(model, blocks, inplace=inplace, verify="folds")
    assert str(model) == printed
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plan = reparam.plan(model, blocks)  # taken back alone, the other stands
    assert [row.layer for row in plan.expanded] == ["0.0"]
    assert [row.layer for row in plan.refused] == ["1.0"]


@pytest.mark.usefixtures("registry")
def test_badly_named_or_missing_branches_are_errors() -> None:
    @reparam.block("twice")
    def twice(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "main", conv.parallel(1)

    @reparam.block("empty")
    def empty(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield from ()

    @reparam.block("taken")
    def taken(conv: reparam.Site) -> Iterator[tuple[str, nn.Module]]:
        yield "main", conv.main()
        yield "stride", conv.parallel(1)

    @reparam.block("unnamed")
    def unnamed(conv: reparam.Site) -> Iterator[nn.Module]:
        yield conv.main()

    @reparam.block("turned")
    def turned(conv: reparam.Site) -> Iterator[tuple[nn.Module, str]]:
        yield conv.main(), "main"

    for name, fragment in (
        ("unnamed", "yields a name and a module for each branch, got Sequential"),
        ("turned", "yields a name and a module for each branch, got Sequential, str"),
        ("twice", "two branches named 'main'"),
        ("empty", "has no branches"),
        ("taken", "cannot be named 'stride'"),
    ):
        with pytest.raises(ReparamError, match=fragment):
            reparam.plan(conv_bn(2, 4, 4), name)


# ------------------------------------------------------------------ dtype, layout, what is frozen, names


@every_kind
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16])
def test_added_layers_have_the_dtype_the_mode_and_the_layout_of_the_original(block: str, dtype: torch.dtype) -> None:
    model = SmallNet().to(dtype).to(memory_format=torch.channels_last)
    model.train()
    expanded = reparam.expand(model, block, where="all", form="branches")
    tensors = [*expanded.parameters(), *(b for b in expanded.buffers() if b.is_floating_point())]
    assert {t.dtype for t in tensors} == {dtype}
    assert all(m.training for m in expanded.modules())
    # A kernel with one input channel lies the same way in both layouts: those of `wide` do not say which is meant.
    kernels = [p for name, p in expanded.named_parameters() if p.dim() == 4 and not name.startswith("wide")]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    folded = reparam.collapse(expanded, like=model)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in folded.parameters() if p.dim() == 4)
    x = torch.randn(2, 3, 12, 12, dtype=dtype).to(memory_format=torch.channels_last)
    assert expanded(x).dtype is dtype
    expanded.zero_grad()
    assert not any(m.training for m in reparam.expand(model.eval(), block, where="all").modules())


@pytest.mark.parametrize("form", ["branches", "online"])
@every_kind
def test_a_frozen_convolution_gets_frozen_branches(block: str, form: str) -> None:
    model = SmallNet()
    for part in (model.stem, model.wide):
        part.requires_grad_(False)
    expanded: Any = reparam.expand(model, block, where="all", form=form, verify=False)
    for name, module in expanded.named_modules():
        if is_block(module):
            trains = any(p.requires_grad for p in module.parameters())
            # An adapter is there to be trained beside what is frozen.
            assert trains == (name.startswith("body") or block == "lora"), name
    assert any(is_block(m) for m in (*expanded.stem, *expanded.wide))


@pytest.mark.parametrize("form", ["branches", "online"])
@every_kind
def test_state_dict_names_are_the_same_every_time_and_load_into_another_expansion(block: str, form: str) -> None:
    size, groups = (5, 4) if block == "largekernel" else (3, 1)
    model = conv_bn(2, 4, 4, size, padding=1, groups=groups)
    first = trained(reparam.expand(model, block, where="all", form=form, verify=False))
    other = conv_bn(2, 4, 4, size, padding=1, groups=groups).double()
    second = reparam.expand(other, block, where="all", form=form, verify=False).eval()
    assert list(first.state_dict()) == list(second.state_dict())
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))  # and nothing that counts is kept outside of it


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_are_made_of_stock_modules_and_the_few_of_parts(block: str) -> None:
    for module in reparam.expand(SmallNet(), block, where="all", form="branches", verify=False).modules():
        own = (SmallNet, BranchSum, ChannelScale, KernelConv, Moved, Times, WindowMean)
        assert type(module).__module__.startswith("torch.nn") or isinstance(module, own)
