"""What is expanded is the module, not its trace: the kinds of Python around layers that change what a block may do."""

from __future__ import annotations

import copy
import functools
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torchvision
from small_networks import WIDTH, ConvBN, Net, images, maps, ready, snapshot, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from passes.blocks.kit.layers import is_block
from passes.blocks.kit.registry import unregister
from passes.training import discovery
from reparam import EquivalenceError, Reason, ReparamError

BLOCKS = ("acb", "dbb", "doconv", "orepa")


def exact(model: nn.Module) -> Any:
    """In float64, with batch norms that matter, in eval mode."""
    return ready(model).double().eval()


def double(**options: Any) -> Tensor:
    return maps(dtype=torch.float64, **options)


@torch.no_grad()
def computes(model: nn.Module, other: nn.Module, *inputs: Any, modes: tuple[bool, ...] = (False, True)) -> None:
    """Equal in evaluation and in training, to 1e-10, on copies that are put into these modes by their own train()."""
    for training in modes:
        wanted, got = (copy.deepcopy(m).train(training)(*inputs) for m in (model, other))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def blocks(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_block(module)]


# ------------------------------------------------------------------ attributes that other code reads


class Asks(nn.Module):
    """A convolution and its norm; ``also`` reads an attribute of one of them."""

    def __init__(self, also: Callable[[Any, Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv.scale, self.conv.kinds = 3, ("a", 1)  # type: ignore[assignment]
        self.bn = nn.BatchNorm2d(WIDTH, affine=affine)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self, self.bn(self.conv(x)))


ASKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "num_features": lambda m, y: y.view(y.shape[0], m.bn.num_features, -1),
    "eps": lambda m, y: y + m.bn.eps,
    "momentum and affine": lambda m, y: y * m.bn.momentum if m.bn.affine else y,
    "no weight": lambda m, y: y if m.bn.weight is None else y * 2,
    "no bias of the convolution": lambda m, y: y if m.conv.bias is None else y * 2,
    "geometry": lambda m, y: y * m.conv.out_channels * m.conv.stride[0] + m.conv.output_padding[0],
    "its owner's": lambda m, y: y * m.conv.scale * len(m.conv.kinds),
    "dtype of a weight": lambda m, y: y.to(m.bn.weight.dtype) if m.bn.affine else y,
    "statistics": lambda m, y: y + m.bn.running_mean[0],
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("asked", ASKED)
def test_attributes_that_other_code_reads(asked: str, affine: bool) -> None:
    """What stands in a layer's place answers for it; where it cannot, the layer stays."""
    model = exact(Asks(ASKED[asked], affine))
    for block in ("acb", "doconv"):
        expanded = reparam.expand(model, block)
        # A shift that moves in is the block's bias, which libraries that fold ask for: who wants None keeps the norm.
        assert blocks(expanded) == ["conv"]
        assert asked != "no bias of the convolution" or isinstance(expanded.bn, nn.BatchNorm2d)
        computes(model, expanded, double())


# ------------------------------------------------------------------ test inputs, devices


@pytest.mark.parametrize("block", ["dbb", "orepa"])
@pytest.mark.parametrize("kernel", [3, pytest.param(5, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("groups", [1, WIDTH])
def test_maps_smaller_than_the_kernel(kernel: int, groups: int, block: str) -> None:
    """Torch's 3-d pooling refuses them, the convolution does not."""
    conv = nn.Conv3d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups, bias=False)
    model = exact(nn.Sequential(conv, nn.BatchNorm3d(WIDTH)))
    expanded = reparam.expand(model, block, where="all")
    assert blocks(expanded) == ["0"]
    computes(model, expanded, torch.randn(2, WIDTH, 2, 3, 4, dtype=torch.float64))


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "orepa", "ecb"])
def test_default_device(block: str) -> None:
    """Numbers of the compiler's own are made where the model is, not where the caller makes new tensors."""
    model = exact(nn.Sequential(ConvBN(), nn.ReLU()))
    with default_device("meta"):
        expanded = reparam.expand(model, block)
        back = reparam.collapse(expanded, like=model)
        collapsed = reparam.collapse(model)
    assert blocks(expanded) == ["0.conv"]
    for made in (expanded, back, collapsed):
        computes(model, made, double(), modes=(False,))


# ------------------------------------------------------------------ float networks that are made ready to be quantised


class SkipAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBN()
        self.skip = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip.add(x, self.body(x)))


def test_float_functional_is_no_quantised_layer() -> None:
    model = exact(SkipAdd())
    expanded = reparam.expand(model, "acb")
    assert blocks(expanded) == ["body.conv"]
    computes(model, expanded, double())
    collapsed, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    computes(model, collapsed, double(), modes=(False,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_made_to_be_quantised(name: str) -> None:
    model = exact(getattr(torchvision.models.quantization, name)(weights=None, quantize=False))
    x = images(2, 64, dtype=torch.float64)
    collapsed, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    computes(model, collapsed, x, modes=(False,))
    expanded = reparam.expand(model, "acb")
    assert len(blocks(expanded)) == {"resnet18": 16, "mobilenet_v2": 18}[name]
    computes(model, expanded, x, modes=(False,))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["functional", "layer"])
def test_quantised_layers_are_refused(kind: str) -> None:
    quantised = torch.ao.nn.quantized
    layer = quantised.QFunctional() if kind == "functional" else quantised.Dropout()
    model = nn.Sequential(ConvBN(), layer)
    for verb in (reparam.collapse, reparam.explain, lambda m: reparam.plan(m, "acb")):
        with pytest.raises(ReparamError, match="1 is quantised: rewrite the model first"):
            verb(model)


def test_a_package_of_the_callers_own_may_be_called_quantized() -> None:
    kind = type("Mine", (ConvBN,), {"__module__": "my.quantized.nets"})
    assert blocks(reparam.expand(exact(kind()), "acb")) == ["conv"]


# ------------------------------------------------------------------ models whose own train() and eval() compute


class Lora(nn.Conv2d):
    """loralib's: ``train(False)`` merges the adapter into the weight, in place."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        taps = self.weight[0].numel() // self.weight.shape[1]
        self.A = nn.Parameter(torch.randn(2, self.weight.shape[1] * taps))
        self.B = nn.Parameter(torch.randn(self.weight.shape[0], 2))
        self.merged = False

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.B @ self.A).view(self.weight.shape)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        change = 0 if self.merged else (self.B @ self.A).view(self.weight.shape)
        return self._conv_forward(x, self.weight + change, self.bias)


def adapted() -> Any:
    return nn.Sequential(Lora(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), ConvBN())


VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "collapse": reparam.collapse,
    "explain": reparam.explain,
    "plan": lambda m: reparam.plan(m, "acb"),
    "expand": lambda m: reparam.expand(m, "acb"),
    "like": lambda m: reparam.collapse(reparam.expand(m, "acb"), like=m),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_adapters_are_not_merged_into_the_callers_weights(verb: str, training: bool) -> None:
    model = exact(adapted()).train(training)
    before = snapshot(model)
    got = VERBS[verb](model)
    assert unchanged(model, before)
    if verb == "collapse":
        assert not any(isinstance(m, nn.BatchNorm2d) for m in got.modules())
        torch.testing.assert_close(got(double()), copy.deepcopy(model).eval()(double()), rtol=1e-10, atol=1e-10)
    if verb == "expand":
        assert blocks(got) == ["3.conv"]
        computes(model, got, double())


@pytest.mark.parametrize("training", [False, True])
def test_adapters_in_place(training: bool) -> None:
    """The model itself is to be changed: it is merged then, and unmerged if the verb fails."""
    model = exact(adapted()).train(training)
    wanted = copy.deepcopy(model).eval()(double())
    before = snapshot(model)
    with pytest.raises(ReparamError):
        reparam.collapse(model, example_inputs=images(dtype=torch.float64), inplace=True)
    assert unchanged(model, before)
    collapsed = reparam.collapse(model, inplace=True)
    assert collapsed is model
    torch.testing.assert_close(model(double()), wanted, rtol=1e-10, atol=1e-10)


class Merges(Net):
    """Its eval() changes numbers and attributes."""

    def eval(self) -> Merges:
        super().eval()
        self.stem.conv.weight.data.mul_(2)
        self.merged = True
        return self


def test_failure_in_place_takes_the_models_own_eval_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(Net())
    model.__class__ = Merges
    model.train()
    before = snapshot(model)

    def fails(*args: Any) -> None:
        assert model.merged
        raise RuntimeError("half-way")

    monkeypatch.setattr("passes.collapse.compile_model", fails)
    with pytest.raises(RuntimeError, match="half-way"):
        reparam.collapse(model, inplace=True)
    assert unchanged(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_left_in_training_mode_is_not_folded(inplace: bool) -> None:
    """In a model that is being evaluated, it is in that mode on purpose; the others fold."""
    model = exact(nn.Sequential(ConvBN(), nn.ReLU(), ConvBN()))
    model[0].norm.train()
    wanted = copy.deepcopy(model)(double())
    said = {r.layer: r.message for r in reparam.explain(model).refusals}
    assert said == {"0.norm": "batch norm in training mode uses the batch's own statistics"}
    collapsed, report = reparam.collapse_with_report(model, inplace=inplace)
    assert {r.layer: r.message for r in report.refusals} == said
    assert [r.training for r in collapsed.modules() if isinstance(r, nn.BatchNorm2d)] == [True]
    torch.testing.assert_close(collapsed(double()), wanted, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ other ways to call a forward


class TwoNorms(nn.Module):
    """A convolution with two norms; ``choose`` is its forward's way to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.bn, self.bn_aux = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.norms = nn.ModuleDict({"day": nn.BatchNorm2d(WIDTH), "night": nn.BatchNorm2d(WIDTH)})
        self.listed = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(3))


class Flag(TwoNorms):
    def forward(self, x: Tensor, aux: bool = False) -> Tensor:
        y = self.conv(x)
        return self.bn_aux(y) if aux else self.bn(y)


class Optional(TwoNorms):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if mask is None else self.bn_aux(y * mask)


class Keyword(TwoNorms):
    def forward(self, x: Tensor, *, domain: str = "day") -> Tensor:
        return self.norms[domain](self.conv(x))


class Compared(TwoNorms):
    def forward(self, x: Tensor, mode: str = "plain") -> Tensor:
        y = self.conv(x)
        return self.bn_aux(y) if mode == "adversarial" else self.bn(y)


class Index(TwoNorms):
    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.listed[domain](self.conv(x))


class Sources(TwoNorms):
    """The norm also reads what is not the convolution's."""

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        return self.bn(x if skip else self.conv(x))


class Returned(TwoNorms):
    def forward(self, x: Tensor, features: bool = False) -> Any:
        y = self.conv(x)
        return (self.bn(y), y) if features else self.bn(y)


class Together(TwoNorms):
    """Only both flags at once change anything."""

    def forward(self, x: Tensor, one: bool = False, other: bool = False) -> Tensor:
        y = self.conv(x)
        return self.bn_aux(y) if one and other else self.bn(y)


class Passed(nn.Module):
    """The flag goes on to a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Flag()

    def forward(self, x: Tensor, aux: bool | None = None) -> Tensor:
        return F.relu(self.body(x, bool(aux)))


class Depends(TwoNorms):
    """What the other way does cannot be traced."""

    def forward(self, x: Tensor, aux: bool = False) -> Tensor:
        y = self.conv(x)
        if aux:
            return self.bn_aux(y) if float(y.detach().sum()) > 0 else self.bn_aux(-y)
        return self.bn(y)


class InTraining(TwoNorms):
    """Evaluation leaves the convolution out, not the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) if self.training else x)


OTHER_CALLS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], str]] = {
    "flag": (Flag, (True,), {}, "with another value of aux the norm bn is not what alone reads it"),
    "tensor": (
        Optional,
        (torch.rand(WIDTH, 1, 1).double(),),
        {},
        "with another value of mask the norm bn",
    ),
    "keyword": (Keyword, (), {"domain": "night"}, ""),
    "compared": (Compared, ("adversarial",), {}, "with another value of mode the norm bn"),
    "index": (Index, (2,), {}, "with domain=1 the norm listed.0 is not what alone reads it"),
    "other source": (Sources, (True,), {}, "with another value of skip the norm bn reads something else"),
    "returned": (Returned, (True,), {}, "with another value of features the norm bn is not what alone reads it"),
    "two flags": (Together, (True, True), {}, "with another value of one and other the norm bn"),
    "passed on": (Passed, (True,), {}, "the norm body.bn is not what alone reads it"),
    "untraceable": (Depends, (True,), {}, "with another value of aux what reads it cannot be traced"),
    "modes": (InTraining, (), {}, "in evaluation the norm bn reads something else"),
}


@pytest.mark.parametrize("block", ["acb", pytest.param("dbb", marks=pytest.mark.slow), "doconv"])
@pytest.mark.parametrize("case", OTHER_CALLS)
def test_a_norm_that_another_call_needs_stays(case: str, block: str) -> None:
    """The convolution gets a block, the norm stays outside, with the reason; both calls compute what they did."""
    kind, more, named, why = OTHER_CALLS[case]
    model = exact(kind())
    plan = reparam.plan(model, block)
    (row,) = plan.expanded
    assert row.found.norm is None
    assert why in str(row.found.norm_stays)
    expanded = plan.apply()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in expanded.get_submodule(row.layer).modules())
    computes(model, expanded, double())
    for training in (False, True):
        wanted, got = (copy.deepcopy(m).train(training)(double(), *more, **named) for m in (model, expanded))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    back = reparam.collapse(expanded, like=model)
    torch.testing.assert_close(back(double(), *more, **named), model(double(), *more, **named), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_folds_hold_for_other_calls(case: str) -> None:
    """What is folded for one call and needed by another is not folded, with the reason."""
    kind, more, named, _ = OTHER_CALLS[case]
    model = exact(kind())
    collapsed, report = reparam.collapse_with_report(model)
    for given, options in (((), {}), (more, named)):
        want = model(double(), *given, **options)
        torch.testing.assert_close(collapsed(double(), *given, **options), want, rtol=1e-10, atol=1e-10)
    if more or named:
        assert not report.folds
        assert {r.reason for r in report.refusals} == {Reason.ARGUMENT}
        assert [str(r) for r in reparam.explain(model).refusals] == [str(r) for r in report.refusals]


class Harmless(nn.Module):
    """Optional arguments that change nothing about who reads what."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBN()
        self.extra = ConvBN()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, extra: bool = False, kind: str = "sum",
        levels: tuple[int, ...] = (), size: int = 3,
    ) -> Any:  # fmt: skip
        y = self.body(x)
        if mask is not None:
            y = y * mask
        y = F.relu(y) * scale + size
        if extra:
            y = F.relu(self.extra(y))
        if kind == "both":
            return y, x
        return y


def test_arguments_that_change_nothing() -> None:
    """Norms go into the blocks; so does that of a convolution that only another call runs."""
    model = exact(Harmless())
    plan = reparam.plan(model, "acb")
    assert [(r.layer, r.found.norm.path) for r in plan.expanded] == [
        ("body.conv", "body.norm"), ("extra.conv", "extra.norm"),
    ]  # fmt: skip
    expanded = plan.apply()
    computes(model, expanded, double())
    computes(model, expanded, double(), None, 2.0, True, "both")
    collapsed, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    computes(model, collapsed, double(), None, 2.0, True, "both", modes=(False,))


class Twice(TwoNorms):
    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        y = self.conv(x)
        return self.conv(y) if again else y


def test_a_convolution_that_another_call_uses_twice() -> None:
    """Each call is the block's; the norm stays, since nothing reads the other calls by it."""
    model = exact(Twice())
    found = reparam.plan(model, "acb").rows[0].found
    assert (found.again, found.norms, found.norm) == (True, False, None)
    expanded = reparam.expand(model, "acb")
    computes(model, expanded, double(), True)


class ReadsWeight(TwoNorms):
    def forward(self, x: Tensor, penalty: bool = False) -> Any:
        y = self.bn(self.conv(x))
        return (y, self.conv.weight.square().sum()) if penalty else y


def test_a_weight_that_another_call_reads() -> None:
    refusal = reparam.plan(exact(ReadsWeight()), "acb").rows[0].refusal
    assert refusal.message == "the code around it reads its weight or bias itself"


class Raises(TwoNorms):
    """Rejects every value but its default."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        if groups != 1:
            raise NotImplementedError("not in this version")
        return self.bn(self.conv(x))


class Repeats(TwoNorms):
    """Does something that nobody can read with every value but its default."""

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        y = self.conv(x)
        for _ in range(times):
            y = self.bn(y)
        return y


def test_a_call_that_is_rejected_is_no_other_way() -> None:
    (row,) = reparam.plan(exact(Raises()), "acb").expanded
    assert row.found.norm_stays is None


def test_a_call_that_cannot_be_looked_into_counts_as_another_way() -> None:
    (row,) = reparam.plan(exact(Repeats()), "acb").expanded
    assert row.found.norm_stays.reason is Reason.ARGUMENT


# ------------------------------------------------------------------ every block that was put in is seen to run


class Held(nn.Module):
    """A convolution and its norm, called through whatever else holds them."""

    def __init__(self, hold: Callable[[Any], Any], run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.last = ConvBN()
        self.held, self.run = hold(self), run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.run(self.held, x)))


def _one_after_another(held: Any, x: Tensor) -> Tensor:
    for layer in held:
        x = layer(x)
    return x


def _closed_over(m: Any) -> Callable[[Tensor], Tensor]:
    conv, bn = m.conv, m.bn
    return lambda x: bn(conv(x))


HELD: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Tensor]]] = {
    "list": (lambda m: [m.conv, m.bn], _one_after_another),
    "tuple": (lambda m: (m.conv, m.bn), _one_after_another),
    "dict": (lambda m: {"a": m.conv, "b": m.bn}, lambda held, x: held["b"](held["a"](x))),
    "nested": (lambda m: {"a": [(m.conv, m.bn)]}, lambda held, x: _one_after_another(held["a"][0], x)),
    "closure": (_closed_over, lambda held, x: held(x)),
    "partial": (lambda m: functools.partial(_one_after_another, (m.conv, m.bn)), lambda held, x: held(x)),
    "bound method": (lambda m: (m.conv.forward, m.bn.forward), _one_after_another),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("block", ["acb", "doconv"])
@pytest.mark.parametrize("case", HELD)
def test_layers_that_other_code_holds(case: str, block: str, inplace: bool) -> None:
    """The block is entered, or is not put in; the other one stands."""
    model = exact(Held(*HELD[case]))
    wanted = model(double()).detach()
    plan = reparam.plan(model, block, inplace=inplace)
    expanded = plan.apply()
    torch.testing.assert_close(expanded(double()), wanted, rtol=1e-10, atol=1e-10)
    assert "last.conv" in blocks(expanded)
    entered: list[str] = []
    for path in blocks(expanded):
        expanded.get_submodule(path).register_forward_hook(lambda *_, path=path: entered.append(path))
    expanded(double())
    assert entered == blocks(expanded)
    assert ("conv" in entered) == (case in ("list", "tuple", "dict", "nested"))
    assert [r.layer for r in plan.taken_back] == (["conv"] if case in ("closure", "partial") else [])


def test_forward_that_was_replaced_on_an_instance() -> None:
    model = exact(nn.Sequential(ConvBN(), ConvBN()))
    model[0].forward = types.MethodType(lambda self, x: F.relu(self.norm(self.conv(x))), model[0])
    expanded = reparam.expand(model, "acb")
    assert blocks(expanded) == ["0.conv", "1.conv"]
    computes(model, expanded, double())


def test_what_is_taken_back_is_said_first(caplog: pytest.LogCaptureFixture) -> None:
    """In the plan and in the log; the reason names the layer."""
    model = exact(Held(*HELD["closure"]))
    plan = reparam.plan(model, "acb")
    assert str(plan).splitlines()[:4] == [
        "1 of 2 convolutions get a block",
        "",
        "1 taken back: its block would never run: other code holds the layer and calls it itself",
        "  conv  8->8 3x3",
    ]
    with caplog.at_level("WARNING", "reparam"):
        plan.apply()
    assert "the block of conv is taken back: its block would never run" in caplog.text


@pytest.mark.parametrize("inplace", [False, True])
def test_strict(inplace: bool) -> None:
    model = exact(Held(*HELD["closure"]))
    before = snapshot(model)
    with pytest.raises(EquivalenceError, match=r"^conv: its block would never run"):
        reparam.expand(model, "acb", strict=True, inplace=inplace)
    assert unchanged(model, before)
    assert blocks(reparam.expand(exact(Net()), "acb", strict=True))


@pytest.mark.parametrize("verify", [True, "folds", False])
@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_a_norm_that_is_not_its_own_is_noticed(verify: Any, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted defect in discovery: the network as a whole tells, and only that norm stays outside."""
    model = exact(Read())
    real = discovery._norm_of

    def wrong(conv: Any, ways: Any) -> Any:
        return discovery.Norm("bn") if conv.weight is model.conv.weight else real(conv, ways)

    monkeypatch.setattr(discovery, "_norm_of", wrong)
    plan = reparam.plan(model, "acb", init=init, verify=verify)
    taken = {r.layer: r.found.norm is not None for r in plan.expanded}
    assert taken == {"conv": verify is not True, "last.conv": True}
    if verify is True:
        assert "computes something else: the network returns other numbers" in str(plan.expanded[0].norm_stays)
        assert "1 without their norm: with its block the network computes" in str(plan)
        if init == "preserve":
            computes(model, plan.apply(), double())


class Read(nn.Module):
    """Something stands between the convolution and the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.last = ConvBN()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(F.relu(self.conv(x))))


def test_a_block_that_is_another_function_in_training() -> None:
    """The folds, made in evaluation, cannot tell."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean() + x * self.gain if self.training else x * self.gain

        def silence(self) -> None:
            pass

    @reparam.block("noisy")
    def noisy(conv: reparam.Site) -> Any:
        """The kernel, and in training the mean."""
        yield "main", conv.main()
        if conv.stride == (1, 1):
            yield "noise", Noisy().to(conv.conv.weight.device, conv.conv.weight.dtype)

    try:
        model = exact(nn.Sequential(ConvBN(stride=2), ConvBN()))
        plan = reparam.plan(model, "noisy")
        assert [r.layer for r in plan.expanded] == ["0.conv"]
        assert "computes something else" in plan.taken_back[0].refusal.message
        assert len(reparam.plan(model, "noisy", verify="folds").expanded) == 2
    finally:
        unregister("noisy")


class KeptInTraining(nn.Module):
    """Its own train() treats one norm by name, or all by their kind."""

    def __init__(self, by_name: bool, mode: bool) -> None:
        super().__init__()
        self.body, self.head = ConvBN(), ConvBN()
        self.by_name, self.mode = by_name, mode

    def train(self, mode: bool = True) -> KeptInTraining:
        super().train(mode)
        norms = [self.body.norm] if self.by_name else [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.train(self.mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_norms_whose_mode_the_models_own_train_sets(by_name: bool, mode: bool) -> None:
    """One that is set by name stays where the code looks for it; one that is found by its kind is found in a block."""
    model = exact(KeptInTraining(by_name, mode))
    plan = reparam.plan(model, "acb")
    assert {r.layer: r.found.norm is None for r in plan.expanded} == {"body.conv": by_name, "head.conv": False}
    expanded = plan.apply()
    for training in (False, True):
        wanted, got = (copy.deepcopy(m).train(training)(double()) for m in (model, expanded))
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_what_could_not_be_tried_is_said() -> None:
    class Odd(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(3, WIDTH, 5, 7))

    class Single(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(5, WIDTH, 4, 24) if self.training else x)

    model = exact(nn.Sequential(ConvBN()))
    assert [text[:13] for text in reparam.plan(model, "acb").compared] == ["whole network"] * 2
    odd = reparam.plan(Odd(), "acb")
    assert [r.layer for r in odd.expanded] == ["conv"]
    assert odd.compared[0].startswith("not run: no input could be made up")
    single = reparam.plan(Single(), "acb", example_inputs=maps(count=2))
    assert [text[:28] for text in single.compared] == ["whole network, example_input", "not run in training: the mod"]
    with torch.device("meta"):
        meta = ConvBN()
    why, *code = reparam.plan(meta, "acb").compared
    assert why == "not run: the model is on the meta device"
    assert [text[:25] for text in code] == ["code of the whole network"] * 2


def test_a_model_that_differs_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps a count where nobody looks: nothing can be told from a difference, and nothing is taken back."""
    monkeypatch.setenv("COUNT", "1")

    class Counts(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            os.environ["COUNT"] = str(int(os.environ["COUNT"]) + 1)
            return super().forward(x) * int(os.environ["COUNT"])

    plan = reparam.plan(exact(Counts()), "acb")
    assert [r.layer for r in plan.expanded] == ["conv"]
    assert plan.compared[0].startswith("not compared: the network itself does not return the same twice")


@pytest.mark.parametrize("runs", [True, False], ids=["runs", "takes no input that can be made up"])
def test_a_train_of_its_own_that_needs_the_convolution(runs: bool) -> None:
    """A block in its place has no such weight: it is taken back, and nothing raises later."""

    class Merges(ConvBN):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.conv.weight.data.mul_(1.0)
            return self

        def forward(self, x: Any) -> Tensor:
            return super().forward(x if runs else x["image"])

    plan = reparam.plan(exact(Merges()), "acb")
    assert [r.layer for r in plan.taken_back] == ["conv"]
    plan.apply().train().eval()


def test_a_model_that_keeps_a_count_outside_of_itself() -> None:
    count = [0]

    class Counts(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            count[0] += 1
            return super().forward(x) * count[0]

    model = exact(Counts())
    plan = reparam.plan(model, "acb")
    (row,) = plan.rows
    assert row.refusal is None  # it is called once, as a run shows
    assert row.found.norm is None  # what else the code does with its norm, no run shows
    expanded = plan.apply().eval()
    assert count == [0]
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    assert torch.allclose(expanded(x), model.eval()(x) / 2)


@pytest.mark.parametrize("verify", ["fold", None, 1.5])
def test_misspelt_verify(verify: Any) -> None:
    with pytest.raises(ReparamError, match="verify is True, 'folds' or False"):
        reparam.expand(ConvBN(), "acb", verify=verify)


def test_a_mask_of_infinities_is_no_broken_weight() -> None:
    class Masked(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.full((1, WIDTH, 1, 1), float("-inf")), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(super().forward(x), self.mask)

    model = exact(Masked())
    nn.init.constant_(model.mask, float("-inf"))
    expanded = reparam.expand(model, "acb")
    assert blocks(expanded) == ["conv"]
    computes(model, expanded, double())


# ------------------------------------------------------------------ geometry that was changed after construction


def _dilated(**options: Any) -> Any:
    """What segmentation encoders do to a finished layer."""
    conv = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False, **options)
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
    return exact(nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU()))


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("block", BLOCKS)
def test_geometry_is_what_the_forward_uses(block: str, mode: str, init: str) -> None:
    """Zeros are padded by the present numbers, other modes by those at construction: the block does as the layer."""
    model = _dilated(padding_mode=mode)
    expanded = reparam.expand(model, block, init=init, strict=True)
    assert blocks(expanded) == ["0"]
    assert expanded(double()).shape == model(double()).shape
    if init == "preserve":
        computes(model, expanded, double())
    reparam.verify(expanded.eval(), reparam.collapse(expanded), double()).raise_if_different()


# ------------------------------------------------------------------ wrappers and hooks


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Wrapper, torch.optim.swa_utils.AveragedModel])
@pytest.mark.parametrize("inner", [ConvBN, Flag])
def test_wrappers_that_pass_everything_on(inner: type[nn.Module], wrap: Any) -> None:
    model = wrap(exact(inner()))
    model.eval()
    expanded = reparam.expand(model, "acb")
    assert len(blocks(expanded)) == 1
    computes(model, expanded, double())
    collapsed = reparam.collapse(model)
    computes(model, collapsed, double(), modes=(False,))
    assert any(isinstance(m, nn.BatchNorm2d) for m in collapsed.modules()) == (inner is Flag)
    if inner is Flag:
        computes(model, expanded, double(), True)
        computes(model, collapsed, double(), True, modes=(False,))


def test_hooks_stay_and_are_not_run() -> None:
    """The hook of a convolution becomes its block's, one of any other module stays, and no trial runs either."""
    model = exact(nn.Sequential(ConvBN(), ConvBN()))
    calls: list[str] = []
    model[0].conv.register_forward_hook(lambda *_: calls.append("conv"))
    model[1].register_forward_hook(lambda *_: calls.append("module"))
    plan = reparam.plan(model, "acb")
    expanded = plan.apply()
    assert blocks(expanded) == ["0.conv", "1.conv"]
    assert calls == []
    expanded(double())
    assert calls == ["conv", "module"]


def test_a_forward_that_marks_itself_for_the_profiler() -> None:
    """DataParallel's does: an operation is given an object that cannot even be compared."""

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.profiler.record_function("marked"):
                return self.body(x)

    model = exact(Marked())
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.expanded] == ["body.conv"]
    assert [text[:13] for text in plan.compared] == ["whole network"] * 2
    computes(model, plan.apply(), double())


class AsksForBias(nn.Module):
    """What is added depends on whether the convolution has a bias."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return y if self.conv.bias is None else y + 1


@pytest.mark.parametrize("form", ["branches", "online", "sampled"])
@pytest.mark.parametrize("block", ["acb", "dbb", "repvgg"])
@pytest.mark.parametrize("norm", [False, True])
def test_a_block_has_no_bias_where_its_convolution_had_none_and_no_norm_moved_in(
    norm: bool, block: str, form: str
) -> None:
    model = ready(AsksForBias(norm))
    plan = reparam.plan(model, block, form=form, init="paper")
    (row,) = plan.expanded
    assert form == "online" or row.found.norm is None  # online blocks leave the norm where it is
    assert "AttributeError" not in str(plan)  # the blocks of the trial are watched, and still tell their weights
    assert ("they differ by" in str(plan)) == (norm and form != "online")
    expanded = plan.apply().eval()
    assert expanded.conv.bias is None
    x = torch.randn(2, 3, 8, 8)
    for collapsed in (reparam.collapse(expanded), reparam.collapse(expanded, like=model)):
        assert torch.allclose(collapsed(x), expanded(x), atol=1e-5)
