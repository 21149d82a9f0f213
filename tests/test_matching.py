"""`like=` an architecture whose layers have other names: matched by the graph, compared as a whole."""

from __future__ import annotations

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.matching import renamed
from passes.proof.compare import Verdict
from reparam import ReparamError


class Trained(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x))


class Deployed(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.merged, self.act = nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.merged(x))


class Heads(nn.Module):
    """Two alike ways that run in another order; ``swapped`` is how the publisher wrote it."""

    def __init__(self, block: type[nn.Module], *, swapped: bool = False) -> None:
        super().__init__()
        self.swapped = swapped
        names = ("up", "upper", "down", "downer") if swapped else ("a", "b", "c", "d")
        for name in names:
            setattr(self, name, block())
        self.names = names
        self.tail = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        a, b, c, d = (getattr(self, name) for name in self.names)
        if self.swapped:
            right = d(c(x))
            left = b(a(x))
        else:
            left, right = b(a(x)), d(c(x))
        return [self.tail(left + right), left.mean((2, 3))]


def same(result: nn.Module, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        got, wanted = result(x), model(x)
    pairs = zip(got, wanted, strict=True) if isinstance(got, list) else [(got, wanted)]
    return all(torch.allclose(a, b, atol=1e-9) for a, b in pairs)


def test_a_deployed_class_with_other_names_is_filled() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Trained(), Trained()))
    like = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), Deployed(), Deployed()).double()
    result, report = reparam.collapse_with_report(model, like=like)
    assert type(result[2]) is Deployed
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert report.notes == ["like= names its layers otherwise: they were matched by the graph"]
    like.load_state_dict(result.state_dict(), strict=True)
    assert same(like.eval(), model, torch.randn(2, 3, 9, 9, dtype=torch.float64))


def test_alike_ways_are_told_apart_by_what_reads_them() -> None:
    model, like = lively(Heads(Trained)), Heads(Deployed, swapped=True).double()
    result = reparam.collapse(model, like=like)
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


class Twins(nn.Module):
    """Two ways that cannot be told apart: whichever is which, each way's layers must stay together."""

    def __init__(self, block: type[nn.Module], order: str) -> None:
        super().__init__()
        self.order = order
        for name in ("first", "second", "third", "fourth"):
            setattr(self, f"{block.__name__}_{name}", block())
        self.parts = [f"{block.__name__}_{name}" for name in ("first", "second", "third", "fourth")]

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (getattr(self, name) for name in self.parts)
        values = [x, x]
        for way in self.order:  # which of the two goes on next
            i = int(way)
            layer = ((a, b), (c, d))[i][0 if values[i] is x else 1]
            values[i] = layer(values[i])
        return values[0] + values[1]


@pytest.mark.parametrize("order", ["0011", "0101", "0110", "1001", "1100"])
def test_ways_that_are_interchangeable_stay_together(order: str) -> None:
    model, like = lively(Twins(Trained, "0011")), Twins(Deployed, order).double()
    result = reparam.collapse(model, like=like)
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


def test_without_a_check_they_are_matched_alike() -> None:
    model, like = lively(Twins(Trained, "0011")), Twins(Deployed, "0110").double()
    result, report = reparam.collapse_with_report(model, like=like, verify=False)
    assert report.checked is None
    assert same(result, model, torch.randn(2, 8, 9, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    "like",
    [
        nn.Sequential(Deployed(), nn.Sigmoid(), Deployed()),
        nn.Sequential(Deployed()),
        nn.Sequential(Deployed(), nn.Conv2d(8, 8, 3, padding=2, dilation=2)),
    ],
    ids=["another function", "a layer less", "another geometry"],
)
def test_another_architecture_is_refused(like: nn.Module) -> None:
    model = lively(nn.Sequential(Trained(), Trained()))
    assert renamed(reparam.collapse(model), like.double()) is None
    with pytest.raises(ReparamError, match="does not match the architecture given as like=: it lacks"):
        reparam.collapse(model, like=like.double())


class Sloped(nn.Module):
    def __init__(self, block: nn.Module, slope: float) -> None:
        super().__init__()
        self.block, self.slope = block, slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.block(x) - 1.0, self.slope)


def test_what_the_graph_does_not_tell_is_compared() -> None:
    """The same operations with another option: only running them shows it, whatever ``verify`` says of folds."""
    model = lively(Sloped(Trained(), 0.1))
    assert reparam.collapse(model, like=Sloped(Deployed(), 0.1).double(), verify="folds")
    with pytest.raises(reparam.EquivalenceError):
        reparam.collapse(model, like=Sloped(Deployed(), 0.5).double(), verify="folds")
