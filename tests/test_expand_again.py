"""Convolutions that are called more than once, or stand in more than one place: one block, wherever they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ConvBN, ready
from test_expand import Calls, conv3, row
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from passes.edits.apply import apply
from passes.edits.carried import made_by
from passes.edits.text import from_text, to_text
from passes.training.build import rebuilt
from reparam import Reason


def norm2() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8)


class Levels(nn.Module):
    """A detector's head: the same layers on maps of several sizes, a norm of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.norms = conv3(True), nn.ModuleList(norm2() for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        maps = (x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4))
        return torch.cat([norm(self.tower(y)).relu().flatten(1) for norm, y in zip(self.norms, maps, strict=True)], 1)


class Listed(nn.Module):
    """One layer under two names, and in a list that the forward calls it from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = conv3(True)
        self.order = [self.first, nn.ReLU(), self.second]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x


class Stages(nn.Module):
    """A position encoding that the blocks of a stage share, as in CoaT."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(conv3(True))
        self.shared = shared
        self.blocks = nn.ModuleList(nn.ModuleDict({"encoding": shared, "own": conv3()}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for each in self.blocks:
            x = each["own"](x + each["encoding"](x)).relu()  # type: ignore[index]
        return x


def recurrent(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + m.body(x)
    return x


MAKE: dict[str, Callable[[], nn.Module]] = {
    "twice": lambda: Calls(lambda m, x: m.conv(m.conv(x).relu()), conv=conv3(True)),
    "with its norm": lambda: Calls(
        lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())), conv=conv3(), norm=norm2()
    ),
    "once with a norm": lambda: Calls(lambda m, x: m.norm(m.conv(m.conv(x).relu())), conv=conv3(True), norm=norm2()),
    "two norms": lambda: Calls(
        lambda m, x: m.b(m.conv(m.a(m.conv(x)).relu())), conv=conv3(True), a=norm2(), b=norm2()
    ),
    "a norm that reads more": lambda: Calls(
        lambda m, x: m.norm(m.conv(m.norm(m.conv(m.norm(x))))), conv=conv3(True), norm=norm2()
    ),
    "around it": lambda: Calls(recurrent, body=ConvBN()),
    "levels": Levels,
    "two places": Listed,
    "stages": Stages,
}  # fmt: skip

MOVED = {"with its norm": ["conv"], "around it": ["body.conv"], "stages": []}
"""Where the norm goes into the block; nowhere in the others."""

AGAIN = {"around it": "body.conv", "levels": "tower", "two places": "first", "stages": "shared.0"}


def x() -> Tensor:
    return torch.randn(2, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(model: nn.Module, other: nn.Module, allowed: float = 1e-10) -> None:
    wanted, got = (m(x()).detach() for m in (model, other))
    assert float((wanted - got).abs().max()) <= allowed * float(wanted.abs().max())


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "orepa"])
@pytest.mark.parametrize("kind", MAKE)
def test_there_and_back(kind: str, block: str) -> None:
    model = ready(MAKE[kind]()).double()
    plan = reparam.plan(model, block)
    layer = AGAIN.get(kind, "conv")
    found = row(plan, layer).found
    assert row(plan, layer).refusal is None
    assert found.again
    assert [r.layer for r in plan.expanded if r.found.norm is not None] == MOVED.get(kind, [])
    expanded = plan.apply()
    assert is_block(expanded.get_submodule(layer))
    assert_same(model, expanded, 1e-13 if block == "orepa" else 0.0)
    if layer not in MOVED.get(kind, []):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in expanded.get_submodule(layer).modules())

    optimizer = torch.optim.SGD(expanded.train().parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        expanded(x()).square().mean().backward()
        optimizer.step()
    expanded.eval()
    folded = reparam.collapse(expanded)
    assert not any(is_block(m) for m in folded.modules())
    assert_same(expanded, folded)
    stock = ready(MAKE[kind]()).double()
    stock.load_state_dict(reparam.collapse(expanded, like=model).state_dict(), strict=True)
    assert_same(expanded, stock)

    source = ready(MAKE[kind]()).double()
    keys = list(source.state_dict())
    undo = apply(source, from_text(to_text(made_by(expanded))), build_block=rebuilt)
    source.load_state_dict(expanded.state_dict(), strict=True)
    assert_same(expanded, source, 0.0)
    undo()
    assert list(source.state_dict()) == keys


def test_one_block_in_all_places() -> None:
    expanded: Any = reparam.expand(ready(Listed()), "acb")
    assert expanded.first is expanded.second is expanded.order[0] is expanded.order[2]
    assert is_block(expanded.first)


@pytest.mark.parametrize("kind", ["once with a norm", "two norms"])
def test_why_a_norm_stays(kind: str) -> None:
    stays = row(reparam.plan(ready(MAKE[kind]()), "acb"), "conv").norm_stays
    assert stays is not None
    assert stays.reason is Reason.SHARED
    assert "not always read by one norm" in stays.message


def test_a_norm_that_is_called_more_often_stays() -> None:
    stays = row(reparam.plan(ready(MAKE["a norm that reads more"]()), "acb"), "conv").norm_stays
    assert stays is not None
    assert "is called more than once" in stays.message
