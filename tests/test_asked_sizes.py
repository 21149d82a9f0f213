"""Sizes asked of a value that vanishes: what goes in has the same one, or what comes out, or the value stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(4, 12, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, 3, channels, height * width).unbind(1)
        return F.scaled_dot_product_attention(q, k, v).view(batch, channels, height, width)


class BeforeAttention(nn.Module):
    """As in Visformer: the forward of a norm's reader asks for the norm's size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm2d(4), Attending()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))  # type: ignore[no-any-return]


class Sized(nn.Module):
    """Every size on the way is asked for, in a forward that is rewritten, as the norm is a function of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        norm = self.norm
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
        z = F.conv2d(y, self.conv.weight, stride=2)
        return F.interpolate(z, size=y.shape[2:]), y.shape[1] * z.size(1)


class Between(nn.Module):
    """A row of layers whose middle has a size of its own."""

    def __init__(self, *, inside: bool) -> None:
        super().__init__()
        norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4)
        self.first = nn.Sequential(norm, conv) if inside else conv
        self.second = nn.Conv2d(4, 5, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.interpolate(self.second(y), size=y.shape[2:])


class Handed(nn.Module):
    """The size is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        y = self.norm(x)
        return self.conv(y), tuple(y.shape)


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 1, stride=2)

    def forward(self, y: Tensor) -> Tensor:
        return self.conv(y).relu()  # type: ignore[no-any-return]


class AskingChild(Child):
    def forward(self, y: Tensor) -> Tensor:
        return F.interpolate(self.conv(y).relu(), size=y.shape[2:]) * y.shape[1]


class WithTail(nn.Module):
    """The convolution's module goes on behind it, and it or the one around it asks for the size of what it is given."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.norm, self.child = nn.BatchNorm2d(4), child

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
        return F.interpolate(self.child(y), size=y.shape[2:]) * y.shape[1]


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row, self.child = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)), Child()

    def forward(self, x: Tensor) -> Tensor:
        y = self.row(x)
        return F.interpolate(self.child(y), size=y.shape[2:])


class TwoMaps(nn.Module):
    """A module that asks for a size between two maps that it gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gain, self.child = nn.BatchNorm2d(4), nn.Parameter(torch.rand(4, 1, 1) + 0.5), Child()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        size = y.shape[2:]
        return F.interpolate(self.child(y * self.gain), size=size)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "attention": BeforeAttention,
    "function": Sized,
    "output": Handed,
    "row": lambda: Between(inside=False),
    "inner row": lambda: Between(inside=True),
    "tail": lambda: WithTail(Child()),
    "asking tail": lambda: WithTail(AskingChild()),
    "tail of a row": Row,
    "two maps": TwoMaps,
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("verify", [True, "folds"])
def test_a_size_that_is_asked_for_is_that_of_what_goes_in(kind: str, verify: bool | str) -> None:
    model = lively(MAKE[kind]())
    folded, report = reparam.collapse_with_report(model, verify=verify)
    assert report.after.norms == 0
    assert not report.taken_back
    for size in ((2, 4, 8, 6), (1, 4, 7, 9)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(folded(x), model(x))


class Pooled(nn.Module):
    """Folded in two steps, it would have a size that is neither that of what goes in nor of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.norm, self.conv = nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, groups=4)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        y = self.norm(self.pool(x))
        return self.conv(y), y.shape[1] * y.shape[2]


def test_a_size_between_two_folds_stays() -> None:
    model = lively(Pooled())
    folded, report = reparam.collapse_with_report(model, cost="layers:8")
    assert (report.after.norms, report.taken_back) == (0, [])
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))


def test_a_norm_before_a_linear_layer_asks_for_example_inputs() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    (refusal,) = reparam.collapse_with_report(model)[1].refusals
    assert "1 behind it: number of dimensions unknown; pass example_inputs" in refusal.message
    assert reparam.collapse_with_report(model, example_inputs=torch.randn(2, 4))[1].after.norms == 0
