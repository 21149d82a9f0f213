"""What is found once, or seen at a glance, says what looking at each thing says; what is not clear is looked at."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, deque
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from small_networks import WIDTH, ConvBN, Residual, ready
from torch import Tensor, fx, nn
from torch.nn import functional as F

import passes.proof.settling
import reparam
from passes.algebra.changed import replace
from passes.algebra.conv_form import ConvForm
from passes.algebra.sparse_form import SparseForm
from passes.edits.apply import apply
from passes.edits.edit import Add, Delete, Replace
from passes.fold.methods import _DATA, _NOTHING, _OTHER, _returned
from passes.graph.capture import trace_units
from passes.graph.contents import Row
from passes.graph.copies import deep_copy, shadow
from passes.graph.dataflow import Flow
from passes.graph.marks import Snapshot
from passes.graph.memory import Memory
from passes.graph.walk import modules_of, named_of
from passes.laws.movement import averaged
from passes.laws.values import Signal, View, alike, average, per_channel


def test_modules_come_as_torch_tells_them() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Linear(2, 2)), nn.ModuleDict({"a": shared, "b": nn.GELU()}))
    model.register_module("none", None)
    model[1].add_module("around", model[2])
    assert modules_of(model) == [*model.modules()]
    assert named_of(model) == [*model.named_modules()]


# ------------------------------------------------------------------ a row of containers


CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "an item of a list": ([1, "a"], lambda v: operator.setitem(v, 1, "b")),
    "one more": ([1], lambda v: v.append(2)),
    "one less": ([1], lambda v: v.clear()),
    "something in an empty one": ({}, lambda v: v.update(a=1)),
    "a value": ({"a": 1}, lambda v: v.update(a=2)),
    "a key": ({"a": 1}, lambda v: (v.pop("a"), v.update(b=1))),
    "a value in order": (OrderedDict(a=1), lambda v: v.update(a=2)),
    "an empty table of hooks": (OrderedDict(), lambda v: v.update(a=2)),
    "a member": ({1}, lambda v: (v.clear(), v.add(2))),
    "a row's end": (deque([1, 2]), lambda v: (v.pop(), v.append(3))),
    "an equal thing": ([(1, 2)], lambda v: operator.setitem(v, 0, (v[0][0], 2))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_row_sees_every_change(name: str) -> None:
    held, change = CHANGES[name]
    held = copy.copy(held)
    row = Row([[0], held, {}])
    assert row.same()
    change(held)
    assert not row.same()
    row.note()
    assert row.same()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "seen", 2),
        lambda m: setattr(m, "more", 1),
        lambda m: delattr(m, "seen"),
        lambda m: m.cache.update(a=1),
        lambda m: m.order.move_to_end("a"),
        lambda m: m._forward_hooks.update({0: print}),
        lambda m: setattr(m, "__dict__", {**m.__dict__, "seen": 3}),
        lambda m: m._buffers.update(b=torch.ones(1)),
    ],
)
def test_a_snapshot_is_restored_whatever_has_changed(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inner: Any = model[1]
    inner.seen, inner.cache, inner.order = 1, {}, OrderedDict(a=1, b=2)
    was = dict(vars(inner)), {name: copy.copy(value) for name, value in vars(inner).items()}
    snapshot = Snapshot(model)
    assert not [*snapshot.filled()]
    for _ in range(2):
        change(inner)
        snapshot.restore()
        now = vars(inner)
        assert [*now] == [*was[0]]
        assert all(now[name] is was[0][name] for name in now)
        assert all(now[name] == value for name, value in was[1].items())
        assert [*inner.order] == ["a", "b"]


# ------------------------------------------------------------------ values in memory


def test_values_that_share_memory_are_those_whose_places_meet() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(9)]
    memory = Memory()
    held = object()
    places: dict[fx.Node, set[Any]] = {}
    for i, node in enumerate(nodes):
        sources = [nodes[j] for j in range(i) if (i * j) % 4 == 3]
        own = held if i in (0, 6) else None
        memory.put(node, sources, own)
        places[node] = {held if own is held else node}.union(*(places[s] for s in sources))
    memory.written = {nodes[7]: [nodes[3]], nodes[8]: [nodes[6], nodes[1]]}
    for node in nodes:
        assert memory.sharing(node) == [other for other in nodes if places[other] & places[node]]
        changing = [w for w, into in memory.written.items() if any(places[v] & places[node] for v in into)]
        assert memory.changes(node) == changing


# ------------------------------------------------------------------ copies


class Own(nn.Module):
    """Says itself what is copied of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(2, 2), 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "times": self.times + 1}


class Same(nn.Module):
    """Is its own copy."""

    def __deepcopy__(self, memo: Any) -> Same:
        return self


class Holding(nn.Module):
    """Holds modules and tensors in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.own, self.same = nn.Conv2d(2, 2, 1), Own(), Same()
        self.rows = {"first": [self.layer, self.own.layer], "none": {}}
        self.alias = self.rows["none"]
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.own.layer.weight
        self.register_buffer("mean", torch.ones(2))
        self.scale = torch.ones(1)
        self.register_forward_hook(lambda *_: None)


def test_a_copy_is_what_deepcopy_makes() -> None:
    model: Any = Holding()
    wanted, copied = copy.deepcopy(model), deep_copy(model)
    assert [(n, type(m)) for n, m in copied.named_modules()] == [(n, type(m)) for n, m in wanted.named_modules()]
    assert copied.own.times == wanted.own.times == 1
    assert copied.same is model.same
    assert copied.rows["first"] == [copied.layer, copied.own.layer]
    assert copied.alias is copied.rows["none"]
    assert copied.tied.weight is copied.own.layer.weight is not model.tied.weight
    assert [*map(len, map(vars, copied.modules()))] == [*map(len, map(vars, wanted.modules()))]
    assert len(copied._forward_hooks) == 1
    assert copied._forward_hooks is not model._forward_hooks
    assert copied.scale is not model.scale
    assert torch.equal(copied.scale, model.scale)
    assert shadow(model).layer.weight is model.layer.weight
    assert shadow(model).layer is not model.layer


# ------------------------------------------------------------------ edits


def test_a_layer_is_replaced_where_others_were_added_and_deleted_in_between() -> None:
    inner = ready(ConvBN(WIDTH, WIDTH, 1))
    model = nn.Module()
    model.first, model.second, model.other = inner, nn.Sequential(inner, nn.ReLU()), nn.ReLU()
    layers: dict[str, nn.Module] = {"first": nn.GELU(), "other": nn.Tanh(), "added": inner, "second.1": nn.SiLU()}
    kind: Any = None
    apply(model, [Replace("other", kind), Add("added", kind), Delete("second.0"), Replace("first", kind)], layers)
    assert model.first is layers["first"] is model.added
    assert "0" not in model.second._modules
    assert model.other is layers["other"]


# ------------------------------------------------------------------ frozen values


def test_a_changed_form_is_that_of_dataclasses() -> None:
    form = ConvForm.identity(3, 2)
    changed = replace(form, groups=1, widened=True)
    assert type(changed) is ConvForm
    assert vars(changed) == {**vars(form), "groups": 1, "widened": True}
    assert not form.widened


# ------------------------------------------------------------------ averages


OPERATIONS: dict[str, Callable[[Any], Signal]] = {
    "pooling": lambda x: averaged(F.avg_pool2d)(x, 3, 1, 1, False, False),
    "to one pixel": lambda x: averaged(F.adaptive_avg_pool2d)(x, 1),
    "a mean": lambda x: averaged(torch.mean)(x, (2, 3), True),
    "a mean without its dimensions": lambda x: averaged(torch.mean)(x, (2, 3)),
    "a mean over the batch": lambda x: averaged(torch.mean)(x, 0, True),
    "a larger one": lambda x: averaged(F.interpolate)(x, scale_factor=2.0, mode="nearest"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_average_lies_as_it_says_itself(name: str) -> None:
    entry = Signal(SparseForm.identity(0, 5, 2, like=torch.empty(0, dtype=torch.float64)), View(2))
    quick = OPERATIONS[name](entry)
    assert quick.elements is not None
    plain = average(entry, lambda ids: _run(name, ids))
    assert torch.equal(quick.ids, plain.ids)
    twice, slowly = OPERATIONS["pooling"](quick), average(plain, lambda ids: _run("pooling", ids))
    if quick.ids.dim() == 4:
        assert torch.equal(twice.ids, slowly.ids)
        assert alike(twice, quick) == alike(slowly, plain)
        assert alike(entry, quick) == alike(entry, plain)
        value = torch.arange(5.0, dtype=torch.float64).reshape(5, 1, 1)
        (first,), (second,) = per_channel(quick, value), per_channel(plain, value)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def _run(name: str, ids: Tensor) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "pooling": lambda x: F.avg_pool2d(x, 3, 1, 1, False, False),
        "to one pixel": lambda x: F.adaptive_avg_pool2d(x, 1),
        "a mean": lambda x: x.mean((2, 3), True),
        "a mean without its dimensions": lambda x: x.mean((2, 3)),
        "a mean over the batch": lambda x: x.mean(0, True),
        "a larger one": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    }
    return functions[name](ids)


# ------------------------------------------------------------------ methods that may fold


def _decorated(function: Any) -> Any:
    def again(self: Any) -> Any:
        return function(self)

    again.__wrapped__ = function  # type: ignore[attr-defined]
    return again


class Methods:
    """Methods by what they return."""

    def data(self) -> Any:
        return 1, self

    def number(self) -> Any:
        return 3

    def nothing(self) -> None:
        del self

    def itself(self) -> Any:
        return self

    @torch.no_grad()
    def itself_or_nothing(self, deep: bool = True) -> Any:
        return self if deep else None

    def another(self) -> Any:
        return nn.ReLU()

    def either(self) -> Any:
        if self:
            return 1, 2
        return nn.ReLU()

    def chosen(self) -> Any:
        return self or nn.ReLU()

    def renamed(self) -> Any:
        self = nn.ReLU()
        return self

    def later(self) -> Any:
        yield self

    @_decorated
    def decorated(self) -> Any:
        return 1, 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("data", {_DATA}),
        ("number", {_DATA}),
        ("nothing", {_NOTHING}),
        ("itself", {_NOTHING}),
        ("another", {_OTHER}),
        ("either", {_DATA, _OTHER}),
        ("renamed", {_OTHER}),
        ("later", {_OTHER}),
        ("decorated", {_OTHER}),
    ],
)
def test_what_a_method_returns_is_read_from_its_code(name: str, told: set[str]) -> None:
    function = vars(Methods)[name]
    assert isinstance(function, FunctionType)
    assert _returned(function) == told


@pytest.mark.parametrize("name", ["chosen", "itself_or_nothing"])
def test_what_is_not_clear_may_be_anything(name: str) -> None:
    assert _returned(vars(Methods)[name]) <= {_DATA, _NOTHING, _OTHER}
    assert name != "chosen" or _returned(vars(Methods)[name]) <= {_DATA, _OTHER}


# ------------------------------------------------------------------ once for all units


class Fusing(ConvBN):
    """Folds itself, as libraries do."""

    def fuse(self) -> nn.Module:
        with torch.no_grad():
            scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
            made = nn.Conv2d(WIDTH, WIDTH, 3, padding=1).to(scale.dtype)
            made.weight.copy_(self.conv.weight * scale.reshape(-1, 1, 1, 1))
            made.bias.copy_(self.norm.bias - self.norm.running_mean * scale)
        return made


class Apart(nn.Module):
    """Code that cannot be read, around blocks that are units of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Fusing(WIDTH, WIDTH, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.sum() > 0:
                x = x + 1
        return x


def test_modules_that_are_alike_are_tried_once_for_all_units(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    folds = passes.proof.settling._folds

    def counting(module: nn.Module, method: str, own: bool) -> bool:
        tried.append(method)
        return folds(module, method, own)

    monkeypatch.setattr(passes.proof.settling, "_folds", counting)
    model = ready(Apart())
    result = reparam.collapse(model, verify=False)
    assert tried == ["fuse"]
    assert all(block.fuse() is block for block in result.blocks)


def test_units_know_the_model_as_the_edits_before_them_have_left_it() -> None:
    model = ready(Apart())
    model.rows = [model.blocks[1].conv, model.blocks[2].conv]
    result: Any = reparam.collapse(model, verify=False)
    assert result.rows[0] is result.blocks[1].conv
    assert result.rows[1] is result.blocks[2].conv


def test_flow_knows_sources_and_questions() -> None:
    unit = trace_units(ready(Residual()))[0][0]
    flow = Flow(unit, {})
    assert all(flow.sources[node] == node.all_input_nodes for node in unit.graph.nodes)
