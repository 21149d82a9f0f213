"""What a forward fills on its first call: a network that was called before a verb is treated as one that was not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import lively
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.report import Counts

STORE: dict[Any, Tensor] = {}


class Memo(nn.Module):
    """Adds what :meth:`kept` gives; how that keeps it is up to the class."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.table = nn.Parameter(torch.rand(4, 3))
        self.register_buffer("index", torch.tensor([2]))
        self.clear()

    def clear(self) -> None:
        """What it is before the first call."""
        raise NotImplementedError

    def make(self) -> Tensor:
        return self.table[:, self.index].reshape(1, 4, 1, 1)

    def kept(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.inside(x)) * 2.0) + self.kept(x)


class ByDevice(Memo):
    def clear(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def kept(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.make()
        return self.cache[key]


class ByDeviceInEvaluation(ByDevice):
    """As timm's LeViT: nothing is kept in training, and nothing that was on another device or had another dtype."""

    def train(self, mode: bool = True) -> Any:
        self.cache = {}
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.cache = {}
        return super()._apply(*args, **kwargs)

    def kept(self, x: Tensor) -> Tensor:
        return self.make() if self.training else super().kept(x)


class Attribute(Memo):
    def clear(self) -> None:
        self.value: Tensor | None = None

    def kept(self, x: Tensor) -> Tensor:
        if self.value is None:
            self.value = self.make()
        return self.value * 0.5


class Cleared(Attribute):
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.clear()
        return super()._apply(*args, **kwargs)


class Absent(Attribute):
    def clear(self) -> None:
        vars(self).pop("value", None)

    def kept(self, x: Tensor) -> Tensor:
        if not hasattr(self, "value"):
            self.value = self.make()
        assert self.value is not None
        return self.value


class Row(Memo):
    def clear(self) -> None:
        self.row: list[Tensor] = []

    def kept(self, x: Tensor) -> Tensor:
        if not self.row:
            self.row.append(self.make())
        return self.row[0]


class WithKey(Memo):
    def clear(self) -> None:
        self.key, self.value = "", torch.zeros(0)

    def kept(self, x: Tensor) -> Tensor:
        if self.key != str(x.device):
            self.key, self.value = str(x.device), self.make()
        return self.value


class BySize(Memo):
    def clear(self) -> None:
        self.grids: dict[Any, Tensor] = {}

    def kept(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if (h, w) not in self.grids:
            self.grids[h, w] = torch.linspace(0, 1, w).double() * torch.ones(h, 1)
        return self.grids[h, w]


class OfOneSize(Memo):
    def clear(self) -> None:
        self.grid: Tensor | None = None

    def kept(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[-2:] != x.shape[-2:]:
            self.grid = torch.linspace(0, 1, x.shape[-1]).double() * torch.ones(x.shape[-2], 1)
        return self.grid


class OfTheClass(Memo):
    store: dict[str, Tensor] = {}  # noqa: RUF012

    def clear(self) -> None:
        self.store.clear()

    def kept(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.store:
            self.store[str(x.device)] = torch.linspace(0, 1, 4).double().reshape(1, 4, 1, 1)
        return self.store[str(x.device)]


class OfTheCode(Memo):
    """The key is the device itself, which a trace stands a value of its own for."""

    def clear(self) -> None:
        STORE.clear()

    def kept(self, x: Tensor) -> Tensor:
        if x.device not in STORE:
            STORE[x.device] = torch.linspace(0, 1, 4).double().reshape(1, 4, 1, 1)
        return STORE[x.device]


class Buffer(Memo):
    def clear(self) -> None:
        self.register_buffer("value", None, persistent=False)

    def kept(self, x: Tensor) -> Tensor:
        if self.value is None:
            self.value = self.make()
        return self.value


class Fused(Memo):
    """Folds its layers by itself at the first call; nothing else in that call runs them."""

    def clear(self) -> None:
        self.fused: tuple[Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> Any:
        self.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.inside(x)
        if self.fused is None:
            conv, norm = self.inside
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.fused = (conv.weight * scale.reshape(-1, 1, 1, 1), norm.bias + (conv.bias - norm.running_mean) * scale)
        return self.norm(F.conv2d(x, *self.fused, padding=1))


class Weight(Memo):
    def clear(self) -> None:
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            self.weight = self.conv.weight * self.table.sum()
        return self.norm(F.conv2d(self.inside(x), self.weight, padding=1))


KINDS = [kind for base in Memo.__subclasses__() for kind in (base, *base.__subclasses__())]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def net(kind: type[nn.Module], *, called: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = lively(nn.Sequential(kind()))
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    if called:
        model(x)
    return model, x


def held(model: nn.Module) -> dict[str, Any]:
    """What the first module holds outside of its parameters and children, to be compared by its text."""
    own = vars(model[0])  # type: ignore[index]
    return {name: str(value) for name, value in own.items() if name not in ("_parameters", "_modules")}


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_called_network_collapses_as_a_new_one(kind: type[Memo], called: bool) -> None:
    model, x = net(kind, called=False)
    model[0].clear()  # type: ignore[index, operator]
    _, new = reparam.collapse_with_report(model)
    model, x = net(kind, called=called)
    before = held(model)
    plain, report = reparam.collapse_with_report(model)
    assert held(model) == before == held(plain)
    assert not report.taken_back
    assert list(map(str, report.edits)) == list(map(str, new.edits))
    assert report.after == new.after

    def same() -> bool:
        return all(torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9) for _ in range(2))

    assert same()
    for each in (plain, model):  # where it is kept for a parameter that has changed, both keep what was
        each[0].table.mul_(2)  # type: ignore[index]
    assert same()
    for each in (plain, model):
        each[0].clear()  # type: ignore[index, operator]
    assert same()
    assert held(plain) == held(model)
    for each in (plain, model):
        each.train().eval().float()
        each[0].clear()  # type: ignore[index, operator]
    assert torch.allclose(plain(x.float()), model(x.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("kind", [ByDevice, Attribute, Buffer, Fused])
def test_a_called_network_expands_as_a_new_one(kind: type[Memo], called: bool) -> None:
    new = str(reparam.plan(net(kind, called=False)[0], "dbb", where="all"))
    model, x = net(kind, called=called)
    before = held(model)
    assert str(reparam.plan(model, "dbb", where="all")).split("tried:")[0] == new.split("tried:")[0]
    expanded = reparam.expand(model, "dbb", where="all").eval()
    assert held(model) == before
    assert torch.allclose(expanded(x), model(x), rtol=1e-9, atol=1e-9)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memo, self.conv, self.norm = OfTheClass(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.memo(self.norm(self.conv(x) * 2.0))


def test_what_was_emptied_is_no_effect_of_the_code_that_runs_first() -> None:
    model, x = lively(Around()), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model(x)
    plain, report = reparam.collapse_with_report(model)
    assert report.after.norms == 1  # that of the memo
    assert torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9)


def test_why_a_root_with_a_memo_is_not_read() -> None:
    model = lively(Buffer())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model(x)
    plain, report = reparam.collapse_with_report(model)
    (refusal,) = report.untraced
    assert refusal.message.startswith("its forward sets value")
    assert torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9)


class Scale(nn.Module):
    """Keeps what the module around it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.value = nn.Parameter(torch.rand(4)), None

    def forward(self) -> Tensor:
        if self.value is None:
            self.value = self.table.reshape(1, 4, 1, 1) * 3
        return self.value


class ClearedScale(Scale):
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.value = None
        return super()._apply(*args, **kwargs)


@pytest.mark.parametrize("kind", [Scale, ClearedScale])
def test_a_memo_of_other_weights_is_not_folded(kind: type[Scale]) -> None:
    """The copies that are compared in float64 have no memo any more where the module clears it."""

    class Scaled(Memo):
        def clear(self) -> None:
            self.scale = kind()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.inside(x)) * self.scale())

    for called, norms in ((False, 0), (True, 1)):
        model, x = net(Scaled, called=called)
        model[0].scale.table.mul_(2)  # type: ignore[index, union-attr, operator]
        plain, report = reparam.collapse_with_report(model)
        assert (report.after.norms, report.taken_back) == (norms, [])
        assert torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9)
        for each in filter(lambda m: isinstance(m, kind), (*plain.modules(), *model.modules())):
            each.value = None
        assert torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9)


class Holds(Memo):
    """Tensors that somebody has put there, and an attribute that a forward may set: no first call fills those."""

    def clear(self) -> None:
        self.factors = [torch.tensor(2.0), torch.tensor(3.0)]
        self.mask: Tensor | None = torch.rand(1, 4, 1, 1)
        self.value: Tensor | None = None

    def kept(self, x: Tensor) -> Tensor:
        if self.training:
            self.mask = None
        x = x * self.factors[0] * self.factors[1]
        return x if self.mask is None else x * self.mask


class HoldsAndKeeps(Holds):
    def kept(self, x: Tensor) -> Tensor:
        if self.value is None:
            self.value = self.make()
        return super().kept(x) + self.value


def test_what_a_first_call_does_not_fill_stays() -> None:
    for kind, norms in ((Holds, 0), (HoldsAndKeeps, 1)):
        model, x = net(kind, called=True)
        plain, report = reparam.collapse_with_report(model)
        assert Counts.of(plain).norms == norms
        assert not report.untraced
        assert not report.taken_back
        assert torch.allclose(plain(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["levit_128s", pytest.param("efficientvit_m0", marks=pytest.mark.slow)])
def test_networks_of_timm_that_were_called(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    assert torch.isfinite(model(x)).all()
    plain, report = reparam.collapse_with_report(model)
    assert (report.after.norms, report.taken_back) == (0, [])
    kept = [[str(vars(m)["attention_bias_cache"]) for m in each.modules() if hasattr(m, "attention_bias_cache")]
            for each in (model, plain)]  # fmt: skip
    assert kept[0] == kept[1] != []
    plain, model = copy.deepcopy(plain).double(), model.double()
    assert torch.allclose(plain(x.double()), model(x.double()), rtol=1e-4, atol=1e-4)
