"""What must not fold: every reason code a user can meet, with the network unchanged in what it computes.

Each case says which reason is given, which layers stay, and that a fold elsewhere in the same network still happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from blocks import Net, add, conv_bn, lively
from test_fold import IMAGE, LINE, TOLERANCE, assert_same, holders, layers, text
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam import Reason


def conv(inp: int = 4, out: int = 4, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **options)


@dataclass(frozen=True)
class Case:
    """A network, its input, the reason that is given, and the layers that are left."""

    name: str
    reason: Reason
    build: Callable[[], nn.Module]
    stays: tuple[str, ...]
    shape: tuple[int, ...] = IMAGE
    example: bool = False


def said(report: reparam.Explanation) -> set[Reason]:
    return {r.reason for r in [*report.refusals, *report.untraced]}


def check(case: Case) -> None:
    """Behind a block that folds and an activation, so that what is refused does not stop the rest."""
    inner = lively(case.build())
    model = nn.Sequential(conv_bn(4, 4, 3, padding=1), nn.Sigmoid(), inner) if case.shape == IMAGE else inner
    model = lively(model)
    x = torch.randn(case.shape, dtype=torch.float64)
    examples = x if case.example else None
    planned = reparam.explain(model, examples)
    result, report = reparam.collapse_with_report(model, example_inputs=examples)
    for explanation in (planned, report):
        assert case.reason in said(explanation), explanation
    found = [r for r in [*report.refusals, *report.untraced] if r.reason is case.reason]
    assert all(r.message and str(r) for r in found)
    left = layers(result)
    if case.shape == IMAGE:
        assert left.pop(0) == "Conv2d 4->4 3x3", "what stands in front folds"
    assert sorted(left) == sorted(case.stays)
    with torch.no_grad():
        assert_same(result(x.clone()), model(x.clone()), exact=False)


def listed(*cases: Case) -> Any:
    assert len({c.name for c in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


C3, C1, BN = "Conv2d 4->4 3x3", "Conv2d 4->4 1x1", "BatchNorm2d"


def pooled(**options: Any) -> nn.Module:
    return add(conv(), nn.AvgPool2d(3, 1, **options))


@listed(
    Case(
        "kxk-zeros-kxk",
        Reason.BORDER,
        lambda: nn.Sequential(conv(4, 1, padding=1), conv(1, 4, padding=1)),
        ("Conv2d 4->1 3x3", "Conv2d 1->4 3x3"),
    ),
    Case(
        "1x1-bias-zeros-3x3",
        Reason.PAD_VALUE,
        lambda: nn.Sequential(conv(4, 4, 1), conv(padding=1)),
        (C1, C3),
    ),
    Case(
        "norm-zeros-conv",
        Reason.PAD_VALUE,
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(padding=1)),
        (BN, C3),
    ),
    Case(
        "wrong-pad-value",
        Reason.PAD_VALUE,
        lambda: nn.Sequential(conv(4, 4, 1, bias=False), nn.ConstantPad2d(1, 0.5), conv()),
        (C1, C3),
    ),
    Case(
        "3x3-reflect-3x3",
        Reason.PAD_MODE,
        lambda: nn.Sequential(conv(4, 1), conv(1, 4, padding=1, padding_mode="reflect")),
        ("Conv2d 4->1 3x3", "Conv2d 1->4 3x3 reflect"),
    ),
    Case(
        "two-modes",
        Reason.PAD_MODE,
        lambda: add(conv(padding=1, padding_mode="reflect"), conv(padding=1, padding_mode="circular")),
        (C3 + " reflect", C3 + " circular"),
    ),
    Case(
        "branches-of-different-size",
        Reason.GEOMETRY,
        lambda: add(conv(kernel=4, stride=2, padding=1), conv(stride=2, padding=1)),
        ("Conv2d 4->4 4x4 s2", "Conv2d 4->4 3x3 s2"),
        (2, 4, 8, 8),
    ),
    Case(
        "transposed-and-conv",
        Reason.TRANSPOSED,
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, stride=2), conv(4, 4)),
        ("ConvTranspose2d 4->4 3x3 s2", C3),
    ),
    Case(
        "norm-of-the-batch",
        Reason.BATCH_STATISTICS,
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        (C3, BN),
    ),
    Case(
        "functional-norm-in-training",
        Reason.BATCH_STATISTICS,
        lambda: Net(lambda m, x: F.batch_norm(m.a(x), None, None, training=True), a=conv()),
        (C3,),
    ),
    Case("ceil-mode", Reason.CEIL_MODE, lambda: pooled(ceil_mode=True), (C3,)),
    Case(
        "pad-not-counted",
        Reason.PAD_NOT_COUNTED,
        lambda: add(conv(padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        (C3,),
    ),
    Case(
        "scale-per-pixel",
        Reason.NOT_PER_CHANNEL,
        lambda: Net(lambda m, x: m.a(x) * m.scale, a=conv(padding=1), scale=nn.Parameter(torch.randn(9, 8))),
        ("Net", C3),
    ),
    Case(
        "option-unknown",
        Reason.ATTRIBUTE,
        lambda: Net(lambda m, x: torch.mul(m.a(x), m.scale, out=None), a=conv(), scale=nn.Parameter(torch.randn(1))),
        ("Net", C3),
    ),
    Case(
        "bottleneck",
        Reason.LARGER,
        lambda: nn.Sequential(conv(4, 2, 1), conv(2, 8, 1)),
        ("Conv2d 4->2 1x1", "Conv2d 2->8 1x1"),
    ),
    Case(
        "inverted-bottleneck",
        Reason.LARGER,
        lambda: nn.Sequential(nn.Conv1d(96, 24, 1), nn.Conv1d(24, 144, 1)),
        ("Conv1d 96->24 1", "Conv1d 24->144 1"),
        (2, 96, 7),
    ),
    Case(
        "pool-behind-1x1",
        Reason.LARGER,
        lambda: nn.Sequential(conv(4, 4, 1), nn.AvgPool2d(2)),
        (C1,),
    ),
    Case(
        "norm-that-someone-else-reads",
        Reason.SHARED,
        lambda: Net(lambda m, x: (lambda y: m.bn(y) * torch.sigmoid(y))(m.a(x)), a=conv(), bn=nn.BatchNorm2d(4)),
        (C3, BN),
    ),
    Case(
        "norm-alone",
        Reason.NO_CONVOLUTION,
        lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)),
        (BN,),
    ),
    Case(
        "norm-behind-activation",
        Reason.NO_CONVOLUTION,
        lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
        (C3, BN),
    ),
    Case(
        "repeated",
        Reason.NO_CONVOLUTION,
        lambda: Net(lambda m, x: m.bn(m.a(x).repeat(1, 1, 1, 2)), a=conv(), bn=nn.BatchNorm2d(4)),
        (C3, BN),
    ),
    Case(
        "flattened-into-features",
        Reason.CHANNELS,
        lambda: nn.Sequential(nn.Conv1d(4, 3, 3), nn.Flatten(), nn.BatchNorm1d(27), nn.ReLU()),
        ("Conv1d 4->3 3", "BatchNorm1d"),
        LINE,
    ),
    Case(
        "fixed-slice",
        Reason.LAYOUT,
        lambda: Net(lambda m, x: m.bn(m.a(x)[:, :, :4]), a=conv(), bn=nn.BatchNorm2d(4)),
        (C3, BN),
    ),
    Case(
        "size-in-arithmetic",
        Reason.NO_CONVOLUTION,
        lambda: Net(lambda m, x: m.bn((lambda y: y / y.shape[2])(m.a(x))), a=conv(), bn=nn.BatchNorm2d(4)),
        (C3, BN),
    ),
)
def test_reason(case: Case) -> None:
    check(case)


# ------------------------------------------------------------------ called twice, hooked, changed in place


def test_module_called_twice() -> None:
    """What ``torch.fx.experimental.optimization.fuse`` gets wrong: one convolution, two norms behind it."""
    model = Net(
        lambda m, x: m.n2(m.a(F.relu(m.n1(m.a(x))))), a=conv(padding=1), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4)
    )
    assert_refused(model, Reason.CODE, Reason.SHARED, Reason.LARGER)


def test_norm_called_twice_folds_into_both() -> None:
    """A norm behind two convolutions is not refused: each takes it, and nothing is lost."""
    model = Net(lambda m, x: m.n(m.b(F.relu(m.n(m.a(x))))), a=conv(padding=1), b=conv(padding=1), n=nn.BatchNorm2d(4))
    model = lively(model)
    result = reparam.collapse(model)
    assert layers(result) == [C3, C3]
    x = torch.randn(IMAGE, dtype=torch.float64)
    with torch.no_grad():
        assert_same(result(x), model(x), exact=False)


def assert_refused(model: nn.Module, *reasons: Reason, shape: tuple[int, ...] = IMAGE) -> reparam.Explanation:
    """Nothing is lost: the same numbers, or fewer, and the same function."""
    model = lively(model)
    result, report = reparam.collapse_with_report(model)
    assert said(report) & set(reasons), report
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert_same(result(x.clone()), model(x.clone()), exact=False)
    numbers = [sum(t.numel() for m in holders(n).values() for t in m.state_dict().values()) for n in (model, result)]
    assert numbers[1] <= numbers[0]
    return report


def test_hook_on_an_inner_module() -> None:
    model = nn.Sequential(conv_bn(4, 4, 3), nn.ReLU(), conv_bn(4, 4, 3))
    seen: list[int] = []
    model[0][0].register_forward_hook(lambda m, args, out: seen.append(1))
    report = assert_refused(model, Reason.HOOK)
    assert len(report.folds) == 1, "the block without a hook folds"
    assert len(seen) == 2, "the hook still runs, in the original and in the result"


@pytest.mark.parametrize("change", ["activation", "method", "operator", "module", "view", "on the input"])
def test_change_in_place_that_is_seen_elsewhere(change: str) -> None:
    """The value read after the change is not the value that the layers in front computed."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.bn(y)
        if change == "activation":
            F.relu(z, inplace=True)
        elif change == "method":
            z.mul_(3)
        elif change == "operator":
            z += 1
        elif change == "module":
            m.relu(z)
        elif change == "view":
            z.view(-1).mul_(2)
        else:
            x.mul_(2)
            return torch.sigmoid(x) + m.b(x)
        return m.b(z) + torch.sigmoid(z) + torch.sigmoid(y)

    model = Net(forward, a=conv(padding=1), bn=nn.BatchNorm2d(4), b=conv(padding=1), relu=nn.ReLU(inplace=True))
    model = lively(model)
    result = reparam.collapse(model)
    x = torch.randn(IMAGE, dtype=torch.float64)
    given, other = x.clone(), x.clone()
    with torch.no_grad():
        assert_same(result(given), model(other), exact=False)
    assert torch.equal(given, other), "what the network does to its input is part of what it does"


def test_change_in_place_is_refused_by_its_reason() -> None:
    """``y`` is read again after a part of the fold has changed it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = y.add_(m.b(x))
        return m.bn(z) + torch.sigmoid(y)

    assert_refused(Net(forward, a=conv(), b=conv(), bn=nn.BatchNorm2d(4)), Reason.IN_PLACE)


def test_change_of_the_callers_tensor_is_refused() -> None:
    model = Net(lambda m, x: m.bn(m.a(x.mul_(2))), a=conv(), bn=nn.BatchNorm2d(4))
    model = lively(model)
    result = reparam.collapse(model)
    assert layers(result) == [C3], "the norm still folds, the change stays"
    x = torch.randn(IMAGE, dtype=torch.float64)
    given, other = x.clone(), x.clone()
    with torch.no_grad():
        assert_same(result(given), model(other), exact=False)
    assert torch.equal(given, other)


def test_weight_expression_that_works_in_place() -> None:
    """In float64 no cast makes a copy: reading the weight twice must not change it twice."""
    model = lively(Net(lambda m, x: F.conv2d(x, m.w.detach().mul_(2)) * 3, w=nn.Parameter(torch.randn(4, 4, 3, 3))))
    x = torch.randn(IMAGE, dtype=torch.float64)
    result = reparam.collapse(model)
    with torch.no_grad():
        assert_same(result(x), model(x), exact=False)


# ------------------------------------------------------------------ what cannot be traced or rewritten


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.bn(y) if float(y.sum()) > 0 else self.bn(-y)


def test_untraceable_module_is_left_alone() -> None:
    model = nn.Sequential(conv_bn(4, 4, 3, padding=1), nn.Sigmoid(), Branching())
    report = assert_refused(model, Reason.QUESTION)
    assert [r.layer for r in report.untraced] == ["2"]
    assert len(report.folds) == 1


class Variadic(nn.Module):
    """Its forward cannot be written anew, because nobody knows what it will be called with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(padding=1), conv(4, 4, 1)

    def forward(self, *args: Tensor) -> Tensor:
        return torch.sigmoid(self.a(args[0]) + self.b(args[0]))


def test_forward_that_cannot_be_rewritten() -> None:
    report = assert_refused(Net(lambda m, x: m.block(x) + x, block=Variadic()), Reason.CODE)
    assert not report.folds


def test_probed_module_that_is_not_a_convolution() -> None:
    """Item assignment, then an activation: close to a convolution, and not one."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x, (1, 1, 1, 1))
            x[:, :, 0] = 0.5
            return F.relu(F.conv2d(x, self.weight))

    model = nn.Sequential(Padded(), nn.BatchNorm2d(4))
    report = assert_refused(model, Reason.UNTRACEABLE)
    assert {r.reason for r in report.refusals} <= {Reason.NO_CONVOLUTION, Reason.NOT_A_CONVOLUTION}


@pytest.mark.parametrize("limit", [1.0, 100.0, 1e5])
def test_probed_module_that_clamps_far_away(limit: float) -> None:
    """Linear on all ordinary inputs: only large ones tell."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight, padding=1)
            y[:, :, :] = y.clamp(-limit, limit)
            return y

    assert_refused(nn.Sequential(Clamped(), nn.BatchNorm2d(4)), Reason.UNTRACEABLE)


@pytest.mark.parametrize("look", ["branch", "item", "list", "array"])
def test_probed_module_that_looks_at_values(look: str) -> None:
    """A branch on data that no probe happens to take: the question itself is what counts."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = conv(padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            peak = {
                "branch": lambda: 2e6 if (x > 1e7).any() else 0,
                "item": lambda: x.max().item(),
                "list": lambda: max(x.flatten().tolist()),
                "array": lambda: x.detach().numpy().max(),
            }[look]()
            return self.bn(self.conv(x)) if peak < 1e6 else x

    model = lively(nn.Sequential(Looking()))
    result = reparam.collapse(model)
    x = torch.randn(IMAGE, dtype=torch.float64)
    x[0, 0, 0, 0] = 1e9
    with torch.no_grad():
        assert_same(result(x), model(x), exact=False)


def test_probed_module_with_a_border_of_its_own() -> None:
    """Linear, and a convolution everywhere but in one row of pixels: the border decides."""

    class Bordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight, padding=1)
            y[:, :, 0] = 0
            return y

    assert_refused(nn.Sequential(Bordered(), nn.BatchNorm2d(4)), Reason.UNTRACEABLE)


# ------------------------------------------------------------------ what the graph does not say


def test_number_of_channels_that_nobody_knows() -> None:
    """Both layers read the first two channels of an input that may have more: the slice must stay."""
    model = Net(
        lambda m, x: m.bn(m.a(x[:, :2]) + m.b(x[:, :2])),
        a=conv(2, 4, padding=1),
        b=conv(2, 4, 1),
        bn=nn.BatchNorm2d(4),
    )
    model = lively(model)
    result = reparam.collapse(model)
    for channels in (2, 4, 5):
        x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
        with torch.no_grad():
            assert_same(result(x), model(x), exact=False)


def test_number_of_dimensions_that_nobody_knows() -> None:
    """Batch norm over tokens needs to know which dimension it normalises; example inputs say so."""
    model = lively(Net(lambda m, x: m.bn(m.a(x)), a=nn.Linear(4, 6), bn=nn.BatchNorm1d(6)))
    alone = torch.randn(5, 4, dtype=torch.float64)
    assert layers(reparam.collapse(model, example_inputs=alone)) == ["Linear 4->6"]
    result, report = reparam.collapse_with_report(model)
    assert [r.reason for r in report.refusals] == [Reason.RANK_UNKNOWN]
    square = torch.randn(3, 6, 4, dtype=torch.float64)  # six tokens: the norm is not about features here either
    for x in (alone, square):
        with torch.no_grad():
            assert_same(result(x), model(x), exact=False)
    wide = lively(Net(lambda m, x: m.bn(m.a(x)), a=nn.Linear(4, 6), bn=nn.BatchNorm1d(3)))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    result = reparam.collapse(wide)
    with torch.no_grad():
        assert_same(result(x), wide(x), exact=False)


def test_number_of_dimensions_inside_code_that_cannot_be_traced() -> None:
    """Example inputs show what every part is given, on a copy: the model does not run a second time."""
    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    runs: list[int] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        runs.append(1)
        return m.inner(x) if float(x.sum()) < 1e9 else x

    model = lively(Net(forward, inner=inner))
    for shape, left in (((5, 4), ["Linear 4->6"]), ((5, 6, 4), ["Linear 4->6", "BatchNorm1d"])):
        x = torch.randn(shape, dtype=torch.float64)
        result = reparam.collapse(model, example_inputs=x)
        assert [n for n in layers(result) if n != "Net"] == left
        with torch.no_grad():
            assert_same(result(x), model(x), exact=False)


@pytest.mark.parametrize("parts", [2, 5])
def test_a_batch_that_is_taken_apart(parts: int) -> None:
    """What is moved from one sample to another is not a channel permutation, however small the batch is."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        b, c, h, w = y.shape
        return m.bn(y.view(parts, b // parts, c, h, w).transpose(0, 1).reshape(b, c, h, w))

    model = lively(Net(forward, a=conv(padding=1), bn=nn.BatchNorm2d(4)))
    result = reparam.collapse(model)
    x = torch.randn(parts * parts, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_same(result(x), model(x), exact=False)


def test_reasons_have_distinct_texts() -> None:
    assert len({r.value for r in Reason}) == len(Reason)
    assert TOLERANCE < 1e-10
    assert text(nn.Linear(2, 3)) == "Linear 2->3"
