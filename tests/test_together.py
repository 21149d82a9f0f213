"""Layers that are called several times, always one right after the other, fold once for all calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam import Reason


class Head(nn.Module):
    """A convolution and a norm for several maps."""

    def __init__(self, code: Callable[[Head, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = (
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
        )
        self.second, self.code = nn.BatchNorm2d(4), code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def in_parts(m: Head, x: Tensor) -> Tensor:
    upper, lower = x.chunk(2, 2)
    return torch.cat([m.norm(m.conv(upper)).relu(), m.norm(m.conv(lower)).relu()], 2)


FOLDS: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "levels": lambda m, x: F.relu(m.norm(m.conv(x))) + F.relu(m.norm(m.conv(x.flip(2)))),
    "parts": in_parts,
    "one behind the other": lambda m, x: m.norm(m.conv(m.norm(m.conv(x)).relu())),
    "two norms in a row": lambda m, x: m.second(m.norm(m.conv(x))).relu() + m.second(m.norm(m.conv(-x))),
    "asked for the shape": lambda m, x: m.norm(m.conv(x)).relu().reshape(x.shape) + m.norm(m.conv(x + 1)),
}

STAY: dict[str, Callable[[Head, Tensor], Tensor]] = {
    "one call without the norm": lambda m, x: m.norm(m.conv(x)).relu() + m.conv(-x).relu(),
    "the value in between is used": lambda m, x: sum(m.norm(y).relu() * y for y in (m.conv(x), m.conv(-x))),  # type: ignore[misc,return-value]
    "the weight is read": lambda m, x: m.norm(m.conv(x)).relu() + m.norm(m.conv(-x)).relu() * m.conv.weight.mean(),
    "something in between once": lambda m, x: m.norm(m.conv(x)).relu() + m.norm(m.conv(-x).relu()),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_always_called_together_folds_once(name: str) -> None:
    model = lively(Head(FOLDS[name]))
    told = reparam.explain(model)
    result, report = reparam.collapse_with_report(model)
    assert len(report.folds) == len(told.folds) == 1
    assert isinstance(result.norm, nn.Identity)
    assert [r for r in report.refusals if r.layer in ("conv", "norm")] == []
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(result(x), model(x), atol=1e-10)
    assert reparam.collapse_with_report(result)[1].folds == []


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_stays(name: str) -> None:
    model = lively(Head(STAY[name]))
    result, report = reparam.collapse_with_report(model)
    assert report.folds == []
    assert any(refusal.layer == "norm" for refusal in report.refusals)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(result(x), model(x))


def test_a_layer_that_another_holds_stays() -> None:
    """Code that was not read may call it past its place."""
    model = lively(Head(FOLDS["levels"]))
    model.held = lambda x, conv=model.conv: conv(x)  # type: ignore[assignment]
    _, report = reparam.collapse_with_report(model, inplace=True)
    assert report.folds == []
    assert Reason.HELD in {refusal.reason for refusal in report.refusals}


def test_a_layer_alone_is_no_refusal() -> None:
    model = lively(Head(lambda m, x: m.conv(x).relu() + m.conv(x.abs()).relu()))
    assert reparam.explain(model).refusals == []
