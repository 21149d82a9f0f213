"""`like=` an architecture whose classes compute their weights linearly: equalised rates, fixed and learned gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.proof.compare import Verdict
from reparam import ReparamError

Make = Callable[..., nn.Module]


class Equalised(nn.Module):
    """As StyleGAN2's layers: the weight, and the bias, count with a constant of their own."""

    def __init__(self, ins: int, outs: int, kernel: int, padding: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outs, ins, kernel, kernel)), nn.Parameter(torch.zeros(outs))
        self.scale, self.padding = 1 / (ins * kernel**2) ** 0.5, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias * 0.5, padding=self.padding)


class ScaledInput(nn.Module):
    """As in ProGAN's reimplementations: the input is scaled, the bias stands apart."""

    def __init__(self, ins: int, outs: int, kernel: int, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, padding=padding, bias=False)
        self.bias, self.scale = nn.Parameter(torch.zeros(outs)), (2 / ins) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * self.scale) + self.bias.view(1, -1, 1, 1)


class Halved(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Gained(nn.Conv2d):
    """The gain is learned, and is one where the weight holds all."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Times(nn.Module):
    """A parametrization that does not say how to invert it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.3 + 0.1


def parametrized(*args: Any, **options: Any) -> nn.Module:
    conv = nn.Conv2d(*args, **options)
    nn.utils.parametrize.register_parametrization(conv, "weight", Times())
    return conv


class Net(nn.Module):
    def __init__(self, make: Make, *, norm: bool = True) -> None:
        super().__init__()
        self.a, self.n = make(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity()
        self.b = make(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.leaky_relu(self.n(self.a(x)), 0.2))
        return y


X = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SCALED: dict[str, Make] = {
    "equalised": Equalised, "scaled input": ScaledInput, "halved": Halved, "gained": Gained,
    "parametrized": parametrized,
}  # fmt: skip


def filled(model: nn.Module, like: nn.Module) -> reparam.Explanation:
    result, report = reparam.collapse_with_report(model, like=like, example_inputs=X)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    like.eval().load_state_dict(result.state_dict(), strict=True)
    for network in (result, like):
        torch.testing.assert_close(network(X), model(X))
    return report


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("block", [None, "acb"])
def test_a_class_that_scales_its_weight_is_filled(kind: str, block: str | None) -> None:
    model = lively(Net(nn.Conv2d))
    if block is not None:
        model = lively(reparam.expand(model, block))
    like: Any = Net(SCALED[kind]).double()
    report = filled(model, like)
    told = "like= computes its weights otherwise: they were matched by the graph"
    assert (told in report.notes) is (kind in ("equalised", "halved"))  # of others the names tell
    assert kind != "gained" or bool((like.a.gain == 1).all())


@pytest.mark.parametrize("kind", ["equalised", "scaled input", "halved", "gained"])
def test_so_is_one_without_a_norm_and_a_plain_one(kind: str) -> None:
    filled(lively(Net(nn.Conv2d)), Net(SCALED[kind], norm=False).double())
    filled(lively(Net(SCALED[kind])), Net(nn.Conv2d).double())


@pytest.mark.parametrize("verify", [True, "folds"])
def test_names_alone_are_not_believed_where_nothing_runs(verify: bool | str) -> None:
    model = lively(Net(Equalised))  # whose first layer does not say how many channels it reads
    result = reparam.collapse(model, like=Net(nn.Conv2d).double(), verify=verify)
    torch.testing.assert_close(result(X), model(X))


@pytest.mark.parametrize("verify", [True, "folds"])
def test_a_class_that_computes_otherwise_is_named_where_nothing_runs(verify: bool | str) -> None:
    class Squared(Equalised):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight.square(), self.bias, padding=self.padding)

    with pytest.raises(ReparamError, match=r"a is a Squared in like=, and a Equalised in .* pass example_inputs"):
        reparam.collapse(lively(Net(Equalised)), like=Net(Squared).double(), verify=verify)


def test_linear_layers() -> None:
    class Rated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 0.1, self.bias)

    model = lively(nn.Sequential(nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)))
    like = nn.Sequential(nn.Flatten(), Rated(216, 5), nn.BatchNorm1d(5), nn.ReLU(), Rated(5, 2)).double()
    filled(model, like)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_what_a_weight_cannot_be_made_of_is_refused() -> None:
    with pytest.raises(ReparamError, match=r"differs|no numbers were found"):
        reparam.collapse(lively(Net(nn.Conv2d)), like=Net(Standardised).double())
