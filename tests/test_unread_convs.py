"""Convolutions in code that cannot be traced: a block where a run shows one call of each, else the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ConvBN, maps, ready
from test_expand import Calls, conv3, depends, left, row, same
from torch import Tensor, nn

import reparam
from passes.blocks.kit.layers import is_block
from passes.training import trial
from reparam import Reason


class Head(nn.Module):
    """A detector's head in small: convolutions, a norm between them, and control flow."""

    def __init__(self, run: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.first, self.second = conv3(True), conv3()
        self.norm, self.run = nn.BatchNorm2d(8), run

    def forward(self, x: Tensor) -> Any:
        if self.run is not None:
            return self.run(self, x)
        y = self.norm(self.second(self.first(x).relu()))
        return {"boxes": y if float(y.detach().sum()) > -1e9 else -y}


def network(run: Callable[[Any, Tensor], Any] | None = None) -> Any:
    return ready(Calls(lambda m, x: m.head(m.body(x)), body=ConvBN(), head=Head(run)))


PLACES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "the model's own code": (lambda: Calls(depends, conv=conv3()), ["conv"]),
    "inside": (lambda: Calls(lambda m, x: m.head(x), head=Calls(depends, conv=conv3())), ["head.conv"]),
    "in training": (
        lambda: Calls(
            lambda m, x: depends(m, x) if m.training else m.norm(m.conv(x)), conv=conv3(), norm=nn.BatchNorm2d(8)
        ),
        ["conv"],
    ),
    "in evaluation": (
        lambda: Calls(
            lambda m, x: m.norm(m.conv(x)) if m.training else depends(m, x), conv=conv3(), norm=nn.BatchNorm2d(8)
        ),
        ["conv"],
    ),
}


@pytest.mark.parametrize("block", ["acb", "doconv"])
@pytest.mark.parametrize("case", PLACES)
def test_a_run_shows_the_call(case: str, block: str) -> None:
    make, layers = PLACES[case]
    model = ready(make())
    plan = reparam.plan(model, block)
    assert [r.layer for r in plan.expanded] == layers
    assert all(r.found.norm is None for r in plan.expanded)
    expanded = plan.apply()
    same(model, expanded, maps())
    same(model, expanded, -maps())


@pytest.mark.parametrize("block", ["acb", "doconv", "orepa"])
def test_there_and_back(block: str) -> None:
    """The norm stays where it is; collapse folds each block in its place, with ``like=`` into stock code."""
    model = network()
    plan = reparam.plan(model, block)
    assert [r.layer for r in plan.expanded] == ["body.conv", "head.first", "head.second"]
    assert [r.found.norm is None for r in plan.expanded] == [False, True, True]
    expanded: Any = plan.apply()
    assert type(expanded.head.norm) is nn.BatchNorm2d
    same_boxes(model, expanded)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    expanded = expanded.double().eval()
    folded: Any = reparam.collapse(expanded)
    assert [type(m) for m in (folded.head.first, folded.head.second)] == [nn.Conv2d] * 2
    restored = reparam.collapse(expanded, like=model.double())
    fresh = network().double()
    fresh.load_state_dict(restored.state_dict(), strict=True)
    for result in (folded, fresh):
        same_boxes(expanded, result, 1e-12)


def same_boxes(model: Any, other: Any, allowed: float = 0.0) -> None:
    x = maps().to(next(model.parameters()).dtype)
    wanted, got = (each(x)["boxes"] for each in (model, other))
    assert float((wanted - got).detach().abs().max()) <= allowed * float(wanted.detach().abs().max())


def test_called_more_than_once() -> None:
    """Its added branches have no batch norms: several calls would share their statistics."""
    model = network(lambda m, x: m.second(m.first(m.first(x))) if float(x.detach().sum()) > -1e9 else x)
    plan = reparam.plan(model, "acb")
    assert [row(plan, layer).found.norms for layer in ("head.first", "head.second")] == [False, True]
    expanded = plan.apply()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in expanded.get_submodule("head.first").modules())
    same(model, expanded, maps())


def test_called_past_its_hooks_or_not_at_all() -> None:
    for run in (
        lambda m, x: m.first.forward(x) if float(x.sum()) > -1e9 else x,
        lambda m, x: x * 2 if float(x.sum()) > -1e9 else m.first(x),
    ):
        left(network(run), "head.first", Reason.QUESTION, "no call of it is seen: pass example_inputs that lead there")


def test_example_inputs_that_lead_there() -> None:
    model = network(lambda m, x: m.first(x) if x.shape[-1] > 40 and float(x.sum()) > -1e9 else x)
    assert row(reparam.plan(model, "acb"), "head.first").refusal is not None
    plan = reparam.plan(model, "acb", example_inputs=torch.randn(1, 8, 48, 48))
    assert row(plan, "head.first").refusal is None


class Detector(nn.Module):
    """Takes a list of images, and targets in training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Head()

    def forward(self, images: list[Any], targets: Any = None) -> Any:
        if self.training and targets is None:
            raise ValueError("targets are needed")
        return self.head(torch.stack([image["pixels"] for image in images]))


def test_where_nothing_runs_the_reason_names_example_inputs() -> None:
    model = ready(Detector())
    left(model, "head.first", Reason.QUESTION, "pass example_inputs")
    plan = reparam.plan(model, "acb", example_inputs=([{"pixels": maps()[0]}],))
    assert [r.layer for r in plan.expanded] == ["head.first", "head.second"]
    assert any(said.startswith("not run in training") for said in plan.compared), plan.compared
    assert is_block(plan.apply().get_submodule("head.first"))


@pytest.mark.parametrize("verify", ["folds", False])
def test_without_a_trial_it_is_left_alone(verify: Any) -> None:
    plan = reparam.plan(network(), "acb", verify=verify)
    assert [r.layer for r in plan.expanded] == ["body.conv"]
    for name in ("head.first", "head.second"):
        assert "only a run shows how it is used: verify=True" in row(plan, name).refusal.message


def test_code_that_reads_weights_on_a_way_that_does_not_run() -> None:
    """A run shows one way; DO-Conv's ``weight`` is another tensor, and nothing would say so on the other."""
    for read in (
        lambda m, x: m.first(x) * m.first.weight.mean(),
        lambda m, x: x * sum(p.sum() for p in m.parameters()),
    ):
        model = network(lambda m, x, read=read: m.first(x) if float(x.sum()) > -1e9 else read(m, x))
        left(model, "head.first", Reason.CODE, "the code of head, which cannot be traced, speaks of weights", "doconv")


def test_code_that_asks_for_the_class_is_taken_back() -> None:
    def picky(m: Any, x: Tensor) -> Tensor:
        return m.first(x) if float(x.sum()) > -1e9 and type(m.first) is nn.Conv2d else x

    plan = reparam.plan(network(picky), "acb")
    refusal = row(plan, "head.first").refusal
    assert refusal is not None
    assert refusal.reason in (Reason.DIFFERS, Reason.NOT_RUN)
    assert [r.layer for r in plan.expanded] == ["body.conv"]


def test_too_many_that_do_not_hold_are_taken_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs show stands all the same."""
    monkeypatch.setattr(trial, "MAX_CULPRITS", 1)

    def picky(m: Any, x: Tensor) -> Tensor:
        for conv in (m.first, m.second):
            x = conv(x) if float(x.sum()) > -1e9 and type(conv) is nn.Conv2d else conv(x) * 2
        return x

    plan = reparam.plan(network(picky), "acb")
    assert [r.layer for r in plan.expanded] == ["body.conv"]
    assert {r.layer for r in plan.taken_back} == {"head.first", "head.second"}
