"""A norm behind a change of layout, an average over positions, shuffled pixels: it folds where it may act before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small_networks import ready
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.laws import values
from passes.proof.compare import Verdict

C = 6


def norm(n: int, channels: int = C) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1](channels)


class Net(nn.Module):
    """A layer, a norm, and what happens between and behind them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


class Moved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Pooled(nn.Module):
    """All of it in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.norm = conv(), nn.AdaptiveAvgPool2d(1), norm(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.pool(self.conv(x)).squeeze(3).squeeze(2))
        return y


def functional_norm(n: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


@dataclass
class Case:
    """A network and its input."""

    forward: Callable[[Any, Tensor], Any]
    layer: Callable[[], nn.Module]
    norm: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self) -> Any:
        torch.manual_seed(0)
        return ready(Net(self.forward, a=self.layer(), n=self.norm(), b=nn.Conv2d(C, C, 1))).double()

    def input(self) -> Tensor:
        return torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def linear(channels: int = C) -> nn.Module:
    return nn.Linear(5, channels)


def conv(channels: int = C, **options: Any) -> nn.Module:
    return nn.Conv2d(3, channels, 3, **options)


IMAGE, TOKENS = (2, 3, 9, 8), (2, 7, 5)
FOLDS = {
    "transposed": Case(lambda m, x: m.n(m.a(x).transpose(1, 2)).relu(), linear, lambda: norm(1), TOKENS),
    "and back": Case(lambda m, x: m.n(m.a(x).transpose(1, 2)).transpose(1, 2).relu(), linear, lambda: norm(1), TOKENS),
    "permuted": Case(lambda m, x: m.n(m.a(x).permute(0, 3, 1, 2)).relu(), linear, lambda: norm(2), (2, 4, 3, 5)),
    "flat": Case(lambda m, x: m.n(m.a(x).flatten(0, 1)).view(*x.shape[:2], -1), linear, lambda: norm(1), TOKENS),
    "viewed": Case(lambda m, x: m.n(m.a(x).view(x.shape[0] * x.shape[1], -1)).relu(), linear, lambda: norm(1), TOKENS),
    "tokens": Case(lambda m, x: m.n(m.a(x).flatten(2)).relu(), conv, lambda: norm(1), IMAGE),
    "flipped": Case(lambda m, x: m.n(m.a(x).flip(3)).relu(), conv, lambda: norm(2), IMAGE),
    "one pixel": Case(
        lambda m, x: m.n(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)).relu(), conv, lambda: norm(1), IMAGE),
    "mean": Case(lambda m, x: m.n(m.a(x).mean((2, 3))).relu(), conv, lambda: norm(1), IMAGE),
    "mean of tokens": Case(lambda m, x: m.n(m.a(x).mean(1)).relu(), linear, lambda: norm(1), TOKENS),
    "kept": Case(lambda m, x: m.n(m.a(x).mean((2, 3), keepdim=True)).relu(), conv, lambda: norm(2), IMAGE),
    "pooled": Case(lambda m, x: m.n(F.adaptive_avg_pool2d(m.a(x), (2, 3))).relu(), conv, lambda: norm(2), IMAGE),
    "upsampled": Case(lambda m, x: m.n(F.interpolate(m.a(x), scale_factor=2)).relu(), conv, lambda: norm(2), IMAGE),
    "bilinear": Case(
        lambda m, x: m.n(F.interpolate(m.a(x), scale_factor=2, mode="bilinear", align_corners=True)).relu(),
        conv, lambda: norm(2), IMAGE),
    "bicubic": Case(
        lambda m, x: m.n(F.interpolate(m.a(x), size=(5, 5), mode="bicubic", antialias=True)).relu(),
        conv, lambda: norm(2), IMAGE),
    "shuffled pixels": Case(
        lambda m, x: m.n(F.pixel_shuffle(m.a(x), 2)).relu(), lambda: conv(4 * C), lambda: norm(2), IMAGE),
    "unshuffled pixels": Case(
        lambda m, x: m.n(F.pixel_unshuffle(F.pixel_shuffle(m.a(x), 2), 2)).relu(), lambda: conv(4 * C),
        lambda: norm(2, 4 * C), IMAGE),
    "scale and shift": Case(
        lambda m, x: (m.a(x).transpose(1, 2) * m.n.weight[:, None] + m.n.bias[:, None]).relu(),
        linear, lambda: norm(1), TOKENS),
    "functions": Case(
        lambda m, x: functional_norm(m.n, F.linear(x, m.a.weight, m.a.bias).transpose(1, 2)).relu(),
        linear, lambda: norm(1), TOKENS),
    "a function behind a layer": Case(
        lambda m, x: functional_norm(m.n, m.a(x).transpose(1, 2)).relu(), linear, lambda: norm(1), TOKENS),
    "a layer behind a function": Case(
        lambda m, x: m.n(F.linear(x, m.a.weight).transpose(1, 2)).relu(), linear, lambda: norm(1), TOKENS),
    "modules": Case(
        lambda m, x: m.n(m.a(x)).relu(), lambda: nn.Sequential(linear(), Moved()),
        lambda: nn.Sequential(nn.Identity(), norm(1)), TOKENS),
    "inside": Case(lambda m, x: m.a(x).relu(), lambda: Pooled(), lambda: norm(1), IMAGE),
    "size asked": Case(
        lambda m, x: m.n((y := m.a(x)).transpose(1, 2)).relu() * y.shape[1], linear, lambda: norm(1), TOKENS),
    "two averages": Case(
        lambda m, x: m.n((y := m.a(x)).mean(3) + F.adaptive_avg_pool2d(y, (None, 1)).squeeze(3).flip(2)).relu(),
        conv, lambda: norm(1), IMAGE),
}  # fmt: skip
STAYS = {
    "the value is read": Case(
        lambda m, x: m.n((y := m.a(x)).mean((2, 3))) + y.amax((2, 3)), conv, lambda: norm(1), IMAGE),
    "the moved value is read": Case(
        lambda m, x: m.n(y := m.a(x).transpose(1, 2)) + y.tanh(), linear, lambda: norm(1), TOKENS),
    "the moved value is returned": Case(
        lambda m, x: (m.n(y := m.a(x).transpose(1, 2)).relu(), y), linear, lambda: norm(1), TOKENS),
    "mean of channels": Case(
        lambda m, x: m.n(m.a(x).mean(1, keepdim=True).expand(-1, C, -1, -1)).relu(), conv, lambda: norm(2), IMAGE),
    "largest": Case(lambda m, x: m.n(F.max_pool2d(m.a(x), 2)).relu(), conv, lambda: norm(2), IMAGE),
    "sum": Case(lambda m, x: m.n(m.a(x).sum((2, 3))).relu(), conv, lambda: norm(1), IMAGE),
    "activated": Case(lambda m, x: m.n(m.a(x).relu().mean((2, 3))), conv, lambda: norm(1), IMAGE),
    "one number per position": Case(
        lambda m, x: m.n(m.a(x).flatten(1)).relu(), conv, lambda: norm(1, C * 7 * 6), IMAGE),
    "norm of positions": Case(lambda m, x: m.n(m.a(x)).relu(), lambda: nn.Linear(5, 4), lambda: norm(1, 7), TOKENS),
    "wide shuffle": Case(
        lambda m, x: m.n(F.pixel_unshuffle(m.a(x), 3)).relu(), lambda: conv(4, padding=1, stride=(1, 1)),
        lambda: norm(2, 36), (2, 3, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_the_norm_acts_before(name: str) -> None:
    case = FOLDS[name]
    model, x = case.build(), case.input()
    with torch.no_grad():
        wanted = model(x)
    planned = reparam.explain(model, x)
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert len(report.folds) == len(planned.folds) == 1
    assert report.edits == planned.edits
    assert not report.taken_back
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    with torch.no_grad():
        assert torch.allclose(folded(x), wanted, rtol=1e-12, atol=1e-12)
    left = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not left or name in ("scale and shift", "inside")
    again = reparam.collapse_with_report(folded, example_inputs=x)[1]
    assert not again.folds


@pytest.mark.parametrize("name", STAYS)
def test_the_norm_stays(name: str) -> None:
    case = STAYS[name]
    model, x = case.build(), case.input()
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert not report.folds
    assert not report.taken_back
    assert report.refusals
    assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_a_change_in_place_behind_it() -> None:
    case = Case(lambda m, x: m.n(m.a(x).transpose(1, 2)).relu_(), linear, lambda: norm(1), TOKENS)
    model, x = case.build(), case.input()
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert len(report.folds) == 1
    assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_wrong_channel_is_found_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the whole: each fold is proven with what moves its value."""
    case = FOLDS["shuffled pixels"]
    monkeypatch.setattr(values, "_numbers_of_channels", lambda signal, shape: torch.arange(4 * C) % C)
    report = reparam.collapse_with_report(case.build(), example_inputs=case.input(), verify="folds")[1]
    assert not report.folds
    assert "differs from the original layers" in str(report.taken_back[0])


def test_a_norm_of_too_many_channels_is_no_norm_of_these() -> None:
    case = Case(lambda m, x: m.n(m.a(x).repeat(1, 2, 1, 1)).relu(), conv, lambda: norm(2, 2 * C), IMAGE)
    report = reparam.collapse_with_report(case.build(), example_inputs=case.input())[1]
    assert not report.folds


def test_means_over_channels_are_refused_and_not_raised() -> None:
    """ConvNeXt V2 divides by one (global response normalisation)."""
    norm = pytest.importorskip("timm.layers.grn").GlobalResponseNorm
    model = nn.Sequential(nn.Conv2d(4, 8, 3), norm(8, channels_last=False), nn.Conv2d(8, 4, 1)).eval()
    assert reparam.explain(model).folds == []
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), norm(8), nn.Linear(8, 4)).eval()
    assert reparam.explain(model).folds == []
