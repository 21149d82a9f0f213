"""Selection is a pure function over an untouched graph; what it weighs; forms that know one law; geometry of layers."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
import torch
from defect_networks import NETWORKS
from small_networks import WIDTH, Branches, Net, Parallel
from small_networks import images as images_of
from small_networks import maps as maps_of
from small_networks import ready as ready_of
from torch import Tensor, nn
from torch.nn import functional as F

import passes.collapse
import passes.compiler
import passes.fold.candidates
import passes.fold.folds
import reparam
from passes.algebra.conv_form import ConvForm
from passes.algebra.geometry import Geometry
from passes.algebra.opaque import OpaqueForm
from passes.edits.apply import apply
from passes.edits.edit import Fill
from passes.edits.errors import EditError
from passes.edits.text import from_text, to_text
from passes.fold.aliasing import Memory
from passes.fold.candidates import Candidate
from passes.fold.placement import Layout, Placement, place
from passes.fold.selection import Selection, select
from passes.fold.whole import Whole
from passes.graph.capture import trace_units
from passes.graph.dataflow import Flow
from passes.laws.regions import Contraction
from passes.refusal import Reason, Refusal, RefusalError
from reparam import collapse_with_report


def ready(model: nn.Module) -> nn.Module:
    return ready_of(model).double()


def maps() -> Tensor:
    return maps_of(dtype=torch.float64)


def images() -> Tensor:
    return images_of(dtype=torch.float64)


def close(got: Tensor, wanted: Tensor) -> bool:
    gap, scale = (got - wanted).detach().abs().max(), wanted.detach().abs().max()
    return got.shape == wanted.shape and bool(gap <= 1e-10 * scale)


def flow_of(model: nn.Module) -> tuple[Flow, Layout]:
    flow = Flow(trace_units(model)[0][0], {})
    return flow, Layout(flow, Whole(model))


# ------------------------------------------------------------------ a pure function


@pytest.mark.parametrize("make", [Net, Branches, Parallel])
def test_selecting_leaves_the_graph_alone_and_gives_the_same_each_time(make: type[nn.Module]) -> None:
    flow, layout = flow_of(ready(make()))
    before = [(n.op, n.name, n.args, dict(n.meta)) for n in flow.unit.graph.nodes]
    first, second = (select(flow, lambda c: place(layout, c)) for _ in range(2))
    assert [(n.op, n.name, n.args, dict(n.meta)) for n in flow.unit.graph.nodes] == before
    assert [c.key for c, _ in first.chosen] == [c.key for c, _ in second.chosen]
    assert first.chosen
    assert is_dataclass(Selection)
    for value in (first, first.chosen[0][0]):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)


def test_what_is_banned_is_not_selected_and_the_rest_is() -> None:
    flow, layout = flow_of(ready(Net()))
    whole = select(flow, lambda c: place(layout, c))
    banned = whole.chosen[0][0]
    rest = select(flow, lambda c: place(layout, c), {banned.key})
    assert banned.key not in {c.key for c, _ in rest.chosen}
    assert {c.key for c, _ in whole.chosen[1:]} <= {c.key for c, _ in rest.chosen}
    without = select(flow, lambda c: place(layout, c), staying=set(banned.dying))
    assert not any(set(banned.dying) & set(c.dying) for c, _ in without.chosen)


def test_a_guard_is_asked_of_each_candidate_once_and_its_reason_is_kept() -> None:
    flow, _ = flow_of(ready(Net()))
    asked: list[Candidate] = []

    def guard(candidate: Candidate) -> Placement | Refusal:
        asked.append(candidate)
        return Refusal(Reason.CODE, "planted")

    selection = select(flow, guard)
    assert selection.chosen == ()
    assert asked
    assert max(Counter(c.key for c in asked).values()) == 1
    assert sum(r.message == "planted" for r in selection.refusals) == len(asked)


def test_dominators_are_those_of_the_definition() -> None:
    """The dominators of a node are the nodes without which it cannot be reached."""
    flow, _ = flow_of(ready(Net()))
    graph = Contraction(flow)
    live = [n for n in flow.nodes if n not in flow.constant and n.op != "output"]

    def reached(without: object) -> set[object]:
        found: set[object] = set()
        for node in live:
            inputs = [s for s in graph.sources(node) if s not in flow.constant]
            if node is not without and (not inputs or any(s in found for s in inputs)):
                found.add(node)
        return found

    above = {node: {other for other in live if other is not node and node not in reached(other)} for node in live}
    found = graph.dominators()
    for node in live:
        chain, at = set(), found[node]
        while at is not None:
            chain.add(at)
            at = found[at]
        assert chain == above[node]


def test_nothing_is_traced_again_for_a_fold_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(
        passes.compiler,
        "trace_units",
        lambda model, inputs: traced.append(model) or trace_units(model, inputs),  # type: ignore[func-returns-value]
    )
    emit, planted = passes.fold.folds.emit, []

    def refuse(form: ConvForm, target: object) -> nn.Module:
        if len(planted) < 3:
            planted.append(form)
            raise RefusalError(Reason.TRANSPOSED, "planted")
        return emit(form, target)  # type: ignore[arg-type]

    monkeypatch.setattr(passes.fold.folds, "emit", refuse)
    model = ready(Net())
    plain, report = collapse_with_report(model)
    assert len(traced) == 1
    assert sum(r.message == "planted" for r in report.refusals) == 3
    assert report.folds
    assert close(plain(images()), model(images()))


def test_folds_that_always_fail_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of selections is bounded, also when every candidate fails."""

    def refuse(form: ConvForm, target: object) -> nn.Module:
        raise RefusalError(Reason.TRANSPOSED, "planted")

    monkeypatch.setattr(passes.fold.folds, "emit", refuse)
    monkeypatch.setattr(passes.compiler, "ROUNDS", 1)
    rounds = []
    monkeypatch.setattr(passes.compiler, "select", lambda *args: rounds.append(args) or select(*args))  # type: ignore[func-returns-value]
    model = ready(Net())
    plain, report = collapse_with_report(model)
    assert not report.folds
    assert {r.message for r in report.refusals} >= {"planted"}
    assert 2 < len(rounds) < 20
    assert close(plain(images()), model(images()))


# ------------------------------------------------------------------ what computed weights weigh


class Product(nn.Module):
    """A 7x7 kernel as the product of three 3x3: fewer parameters than the kernel that runs."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        shapes = ((WIDTH, WIDTH, 3, 3),) * 3
        self.parts = nn.ParameterList([nn.Parameter(torch.randn(shape) / 8) for shape in shapes])
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()

    def kernel(self) -> Tensor:
        first, *others = self.parts
        whole = first.transpose(0, 1)
        for part in others:
            whole = F.conv2d(whole, part.flip(2, 3), padding=2)
        return whole.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.kernel(), padding=3)))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.left @ self.right))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "alone"])
def test_a_product_of_kernels_folds_into_the_kernel_that_runs(norm: bool) -> None:
    model = ready(Product(norm))
    plain, report = collapse_with_report(model)
    assert [fold.into for fold in report.folds] == [f"Conv2d({WIDTH} -> {WIDTH}, 7x7)"]
    assert close(plain(maps()), model(maps()))
    # At run time nothing got larger: the kernel was there in full, and so were its multiply-adds.
    (fold,) = report.folds
    assert fold.numbers_after <= fold.numbers_before
    assert fold.multiply_adds_after <= fold.multiply_adds_before
    assert fold.numbers_before <= model.kernel().numel() + 5 * WIDTH
    assert collapse_with_report(plain)[1].folds == []


def test_a_weight_of_low_rank_is_computed_once() -> None:
    model = ready(LowRank())
    plain, report = collapse_with_report(model)
    assert [fold.into for fold in report.folds] == [f"Linear({WIDTH} -> {WIDTH})"]
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    assert close(plain(x), model(x))


class Repeated(nn.Module):
    """One filter for all channels, never there in full."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(1, 1, 3, 3))
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(F.conv2d(x, self.filter.expand(WIDTH, 1, 3, 3), groups=WIDTH)))


class ReadTwice(LowRank):
    """The parameters stay for another use: the product would come on top of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.right).sum() + self.left.sum()


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [(Repeated, (2, WIDTH, 9, 9), Reason.LARGER), (ReadTwice, (3, WIDTH), Reason.SHARED)],
)
def test_what_would_be_larger_at_run_time_stays(make: type[nn.Module], shape: tuple[int, ...], reason: Reason) -> None:
    model = ready(make())
    plain, report = collapse_with_report(model)
    assert report.folds == []
    assert reason in {r.reason for r in report.refusals}
    x = torch.randn(shape, dtype=torch.float64)
    assert close(plain(x), model(x))


# ------------------------------------------------------------------ layers that pad by a rule of their own


class Same(nn.Conv2d):
    """As timm's: what it pads depends on the input's size in a way that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(int(size) // -stride) - 1) * stride + kernel - int(size), 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Around(nn.Module):
    """One operation behind or around such a layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.same, self.other = Same(WIDTH, WIDTH, 3), Same(WIDTH, WIDTH, 3)
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(x)
        match self.kind:
            case "norm":
                y = self.norm(y)
            case "norms":
                y = self.norm(y) * 2.0
            case "negative":
                y = -y
            case "residual":
                y = x + y
            case "residual, other way":
                y = y + x
            case "two":
                y = y + self.other(x)
            case "branch":
                y = self.conv(x) + y
            case "then":
                y = self.conv(y)
            case "before":
                y = self.same(self.conv(x))
            case "pad":
                y = F.pad(y, (1, 1, 1, 1))
            case "crop":
                y = y[:, :, 1:-1]
            case "cat":
                y = torch.cat([y, self.conv(x)], 1)
            case "cat, first":
                y = torch.cat([self.conv(x), y], 1)
            case "slice":
                y = y[:, : WIDTH // 2]
            case "shuffle":
                y = F.channel_shuffle(y, 2)
            case "flatten":
                y = y.flatten(2)
            case "pool":
                y = F.avg_pool2d(y, 2)
        return F.relu(y)


KINDS = [
    "norm", "norms", "negative", "residual", "residual, other way", "two", "branch", "then", "before", "pad", "crop",
    "cat", "cat, first", "slice", "shuffle", "flatten", "pool",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_everything_around_an_opaque_convolution_is_right(kind: str) -> None:
    model = ready(Around(kind))
    plain, report = collapse_with_report(model)
    assert bool(report.folds) == (kind in ("norm", "norms", "negative"))
    assert close(plain(maps()), model(maps()))


def test_what_stands_behind_an_opaque_convolution_is_known_to_be_maps() -> None:
    """A split layer far behind it folds: the channels that it splits are those of the norm between."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same, self.norm = Same(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH)
            self.left, self.right = nn.Conv2d(WIDTH // 2, 4, 1), nn.Conv2d(WIDTH // 2, 4, 1)
            self.behind = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            left, right = F.relu(F.batch_norm(self.same(x), *self.numbers())).split([WIDTH // 2, WIDTH // 2], 1)
            return F.relu(self.behind(torch.cat([self.left(left), self.right(right)], 1)))

        def numbers(self) -> tuple[Tensor | None, ...]:
            return self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias

    model = ready(Split())
    plain, report = collapse_with_report(model)
    assert {fold.into for fold in report.folds} == {
        f"Same({WIDTH} -> {WIDTH}, 3x3)",
        f"Conv2d({WIDTH} -> 8, 1x1, groups 2)",
    }
    assert close(plain(maps()), model(maps()))


def test_an_opaque_convolution_stays_one_layer_of_its_class() -> None:
    plain, report = collapse_with_report(ready(Around("norms")))
    assert type(plain.same) is Same
    assert plain.same.bias is not None
    assert [fold.into for fold in report.folds] == [f"Same({WIDTH} -> {WIDTH}, 3x3)"]


def test_every_law_asked_of_an_opaque_form_is_one_that_holds_or_a_refusal() -> None:
    layer = Same(4, 4, 3).double()
    form, plain = OpaqueForm(layer, layer.weight.detach(), None), ConvForm.identity(4, 2)
    arguments = {
        "affine": (torch.ones(4), None), "then": (plain,), "pad": ((1, 1), (1, 1)),
        "pad_mode": ((1, 1), (1, 1), "reflect"), "rows": ([1, 0],), "narrowed": (), "out_size": ((9, 9),),
        "to": ("cpu",), "same_size": (plain,), "apply": None,
    }  # fmt: skip
    laws = [name for name, _ in inspect.getmembers(ConvForm, inspect.isfunction) if not name.startswith("_")]
    writing = {"conv", "transposed", "identity", "average", "concat", "widen"}  # makes a form, or writes it another way
    assert set(laws) - writing == arguments.keys()
    for name, given in arguments.items():
        if given is None:
            continue
        try:
            getattr(form, name)(*given)
        except RefusalError as error:
            assert error.refusal.reason is Reason.PAD_MODE  # noqa: PT017
    facts = [name for name, value in vars(ConvForm).items() if isinstance(value, property)]
    shared = {"n", "kernel", "out_channels", "in_channels", "rate", "multiply_adds", "numbers", "most_groups"}
    assert shared <= set(facts)
    assert all(getattr(form, name) is not None for name in shared)
    for both in (
        lambda: form + plain,
        lambda: plain + form,
        lambda: plain.then(form),
        lambda: ConvForm.concat([plain, form]),
    ):
        with pytest.raises(RefusalError, match="rule of its own"):
            both()


class StaticSame(nn.Conv2d):
    """As EfficientNet-PyTorch's: a pad module inside of a convolution."""

    def __init__(self, pads: tuple[int, int, int, int], stride: int) -> None:
        super().__init__(3, WIDTH, 3, stride, bias=False)
        self.static_padding = nn.ZeroPad2d(pads)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize(("pads", "stride"), [((1, 1, 1, 1), 1), ((0, 1, 0, 1), 2)])
def test_a_convolution_that_holds_its_pad_becomes_stock_layers(pads: tuple[int, int, int, int], stride: int) -> None:
    model = ready(nn.Sequential(StaticSame(pads, stride), nn.BatchNorm2d(WIDTH), nn.ReLU()))
    plain, report = collapse_with_report(model)
    assert close(plain(images()), model(images()))
    assert all(type(m).__module__.startswith("torch.nn.modules") for m in plain.modules())
    assert report.before.convs == report.after.convs == 1


class NormConv(nn.Conv2d):
    """As detectron2's: a convolution with its norm and its activation."""

    def __init__(self, *args: int, act: nn.Module | None = None) -> None:
        super().__init__(*args, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(self.out_channels), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups))
        return F.relu(y) if self.act is None else self.act(y)


@pytest.mark.parametrize("act", [None, nn.SiLU()], ids=["function", "module"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_convolution_that_normalises_keeps_its_weight_where_it_was(act: nn.Module | None, inplace: bool) -> None:
    model = ready(nn.Sequential(NormConv(3, WIDTH, 3, act=act), NormConv(WIDTH, 4, 3)))
    wanted = model(images())
    plain, report = collapse_with_report(model, inplace=inplace)
    assert list(plain.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert report.before.convs == report.after.convs == 2
    assert report.after.norms == 0
    assert [fold.where for fold in report.folds] == ["0", "1"]
    assert isinstance(plain[0], NormConv)
    assert "BatchNorm" not in repr(plain)
    assert close(plain(images()), wanted)
    assert close(copy.deepcopy(plain)(images()), wanted)
    assert collapse_with_report(plain)[1].folds == []


def test_filling_a_convolution_is_written_and_read_again() -> None:
    model = ready(nn.Sequential(NormConv(3, WIDTH, 3)))
    plain, report = collapse_with_report(model)
    again = copy.deepcopy(model)
    apply(again, from_text(to_text(report.edits)))
    again.load_state_dict(plain.state_dict(), assign=True)
    assert close(again(images()), model(images()))
    with pytest.raises(EditError, match="no such convolution"):
        apply(nn.Sequential(nn.Linear(2, 2)), [edit for edit in report.edits if isinstance(edit, Fill)])


# ------------------------------------------------------------------ what a layer does, not what it said once


def dilated(mode: str = "zeros", padding: object = 1) -> nn.Conv2d:
    conv = nn.Conv2d(
        WIDTH, WIDTH, 3, stride=1 if padding == "same" else 2, padding=padding, padding_mode=mode, bias=False
    )  # type: ignore[arg-type]
    conv.stride, conv.dilation = (1, 1), (2, 2)
    conv.padding = conv.padding if padding == "same" else (2, 2)
    return conv


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_geometry_set_after_construction_is_what_the_forward_uses(mode: str, padding: object) -> None:
    model = ready(nn.Sequential(dilated(mode, padding), nn.BatchNorm2d(WIDTH)))
    wanted = model(maps())
    geometry = Geometry.of(model[0])
    pads = [p for pair in zip(geometry.lead[::-1], geometry.trail[::-1], strict=True) for p in pair]
    x = F.pad(maps(), pads, mode="constant" if mode == "zeros" else mode)
    assert close(F.conv2d(x, model[0].weight, None, geometry.stride, 0, geometry.dilation), model[0](maps()))
    plain, report = collapse_with_report(model)
    assert len(report.folds) == 1
    assert close(plain(maps()), wanted)


def test_a_norm_that_stays_in_training_mode_is_not_folded() -> None:
    class Stubborn(nn.Sequential):
        def train(self, mode: bool = True) -> Stubborn:
            super().train(mode)
            self[1].training = True
            return self

    model = ready(Stubborn(nn.Conv2d(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU()))
    wanted = copy.deepcopy(model)(maps())
    plain, report = collapse_with_report(model)
    assert {r.reason for r in report.refusals} == {Reason.BATCH_STATISTICS}
    assert close(plain(maps()), wanted)


def test_memory_and_placement_are_plain_guards() -> None:
    """What the compiler itself passes as a guard are two functions of values."""
    flow, layout = flow_of(ready(Branches()))
    memory = Memory(flow)
    assert select(flow, lambda c: memory.refusal(c) or place(layout, c)).chosen
    assert reparam.explain(ready(Branches())).folds


def test_halves_that_are_joined_become_groups() -> None:
    model, _ = NETWORKS["equal_halves"]()
    layers = [m for m in reparam.collapse(model).modules() if isinstance(m, nn.Conv2d)]
    assert sorted(layer.groups for layer in layers) == [1, 2]


def test_a_weight_that_stays_is_not_saved() -> None:
    """Two convolutions share a computed weight: with one of them folded there would be two weights."""
    model, _ = NETWORKS["weight_for_two"]()
    result, report = collapse_with_report(model)
    assert not report.folds
    assert sum(p.numel() for p in result.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_fold_that_is_part_of_a_larger_one_is_no_fold_of_its_own() -> None:
    result, report = collapse_with_report(NETWORKS["pools_called"]()[0])
    assert len(report.folds) == 1
    assert [name for name, _ in result.named_children()] == [report.folds[0].where]


def test_a_long_chain_is_searched_only_around_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chain(nn.Module):
        def __init__(self, length: int) -> None:
            super().__init__()
            self.conv, self.length = nn.Conv2d(2, 2, 3), length

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            for _ in range(self.length):
                y = y * 1.01
            return y

    def searched(length: int) -> int:
        asked = []
        with monkeypatch.context() as patch:
            views = passes.fold.candidates.views
            patch.setattr(passes.fold.candidates, "views", lambda *given: asked.append(given) or views(*given))  # type: ignore[func-returns-value]
            assert len(reparam.explain(Chain(length).eval()).folds) == 1
        return len(asked)

    assert searched(400) <= 5 * searched(100)
