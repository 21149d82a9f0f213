"""What planning does not do twice, or at all, and what it has to ask anew all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.algebra.conv_form import ConvForm
from passes.graph.answers import Answers
from passes.graph.tracer import Tracer
from passes.laws.values import Signal, View, _canonical_ids, channels_along
from passes.refusal import Reason, RefusalError
from passes.training import discovery


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """What a method gave, one entry for each call."""
    calls: list[Any] = []
    method = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        calls[-1] = method(*args, **kwargs)
        return calls[-1]

    monkeypatch.setattr(owner, name, noted)
    return calls


# ------------------------------------------------------------------ the truth of an argument


class Layers(nn.Module):
    """As a ViT whose blocks are told whether attention is causal: each of them asks, and hands it on to torch."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth = depth

    def forward(self, x: Tensor, flag: Any = False) -> Tensor:
        x = self.norm(self.conv(x))
        for _ in range(self.depth):
            x = F.dropout(x.abs() * flag, 0.0) if flag else x.relu()
        return x


def test_an_argument_that_torch_only_reads_is_asked_for_its_truth_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = counted(monkeypatch, Tracer, "trace")
    reparam.plan(Layers(1).to("meta").eval(), "acb")
    few = len(traces)
    traces.clear()
    plan = reparam.plan(Layers(12).to("meta").eval(), "acb")
    assert len(traces) == few
    assert plan.expanded[0].found.norm is not None


class Changing(nn.Module):
    """Its norm alone reads the convolution unless the argument is another after it was changed."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.change = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), change

    def forward(self, x: Tensor, flag: Any = None) -> Tensor:
        y = self.conv(x)
        if flag is None:
            return self.norm(y)
        before = bool(flag)
        self.change(flag)
        return y if flag and not before else self.norm(y)


class Unread(nn.Module):
    def forward(self, flag: Any) -> None:
        if float(flag.sum()) >= 0:
            flag.logical_not_()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda flag: flag.logical_not_(),
    "through a view": lambda flag: flag.view(()).logical_not_(),
    "as a function is told": lambda flag: F.relu(flag, inplace=True),
    "by a module that is not read": Unread(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_that_may_have_been_changed_is_asked_again(change: str) -> None:
    (row,) = reparam.plan(Changing(CHANGES[change]).eval(), "acb").rows
    assert row.found.norm is None
    assert row.norm_stays is not None
    assert row.norm_stays.reason is Reason.ARGUMENT


# ------------------------------------------------------------------ what nobody asks about


def test_where_no_layer_may_have_a_block_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).eval()
    traces = counted(monkeypatch, discovery, "trace_units")
    asked: list[str] = []

    def nowhere(path: str, conv: nn.Module) -> bool:
        asked.append(path)
        return False

    for where, reason in ((None, Reason.KERNEL_OF_ONE), (nowhere, Reason.NOT_SELECTED)):
        plan = reparam.plan(model, "acb", where=where)
        assert [row.refusal.reason for row in plan.rows if row.refusal] == [reason, reason]
    assert not traces
    assert asked == ["0", "2"]


def test_of_layers_that_nobody_asks_for_it_is_not_tried_where_they_convolve(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Bypassing(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    tried = counted(monkeypatch, discovery, "inside_of")
    plan = reparam.plan(model, "acb")
    assert not tried
    assert [row.layer for row in plan.expanded] == ["1"]
    assert plan.expanded[0].found.norm is not None


# ------------------------------------------------------------------ what is known without a run


class Hybrid(nn.Module):
    """As a ViT with a convolutional stem: asks whether that gives one map or several."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y[-1] if isinstance(y, (list, tuple)) else y


def test_what_stands_in_the_place_of_a_layer_gives_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hybrid().to("meta").eval()
    asked = counted(monkeypatch, Answers, "ask")
    assert len(reparam.plan(model, "acb").expanded) == 1
    assert not asked


@pytest.mark.parametrize(
    ("lies", "read"),
    [
        (View(2), View(2)),
        (View(1), View(1)),
        (View(0, last=True, rank=3), View(0, last=True, rank=3)),
        (View(2), View(0, last=True, rank=4)),
        (View(2), View(1)),
        (View(0, last=True, rank=3), View(1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 5])
def test_channels_of_a_value_that_lies_as_a_convolution_leaves_it(lies: View, read: View, channels: int) -> None:
    """They are known, and are what its numbers say."""
    signal = Signal(ConvForm.identity(channels, lies.n, like=torch.empty(0, dtype=torch.float64)), lies)
    moved = Signal(signal.form, lies, elements=_canonical_ids(signal))
    found: list[Any] = []
    for each in (signal, moved):
        try:
            found.append(channels_along(each, read).tolist())
        except RefusalError as error:
            found.append((error.refusal.reason, error.refusal.message))
    assert found[0] == found[1]


# ------------------------------------------------------------------ layers that compute their weight


class Bypassing(nn.Conv2d):
    """Doubles its weight, and at times in a way that nobody else can put a weight into."""

    when: Callable[[Any, Tensor], bool] = staticmethod(lambda layer, x: False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2
        if self.when(self, x):
            with torch._C.DisableTorchFunction():
                weight = self.weight * 2
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


TIMES: dict[str, Callable[[Any, Tensor], bool]] = {
    "never": lambda layer, x: False,
    "in training": lambda layer, x: bool(layer.training),
    "in evaluation": lambda layer, x: not layer.training,
    "small and even": lambda layer, x: x.shape[-1] == 6,
    "small and odd": lambda layer, x: x.shape[-1] == 5,
    "large": lambda layer, x: x.shape[-1] > 9,
}


@pytest.mark.parametrize("when", TIMES)
def test_a_layer_takes_another_weight_in_both_modes_and_in_all_sizes(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bypassing, "when", staticmethod(TIMES[when]))
    (row,) = reparam.plan(nn.Sequential(Bypassing(4, 4, 3, padding=1)).eval(), "doconv").rows
    if when == "never":
        assert row.refusal is None
    else:
        assert row.refusal is not None
        assert row.refusal.reason is Reason.OWN_FORWARD


class Clamping(nn.Conv2d):
    """Changes its weight on the way, to what it is from then on."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.weight.clamp_(-0.1, 0.1)
        return F.conv2d(x, weight * 2, self.bias, self.stride, self.padding)


def test_a_layer_that_changes_its_weight_takes_no_other() -> None:
    (row,) = reparam.plan(nn.Sequential(Clamping(4, 4, 3, padding=1)).eval(), "doconv").rows
    assert row.refusal is not None
    assert row.refusal.reason is Reason.OWN_FORWARD
