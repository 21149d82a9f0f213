"""Edits as data: one list describes what was changed; applied to a fresh network it gives the same one again.

And what an edit must not disturb: who else holds a module, reads its attributes, calls its methods or listens to it.
"""

from __future__ import annotations

import copy
import functools
import io
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from small_networks import WIDTH, Activated, Branches, ConvBN, Parallel, Residual, maps, ready, snapshot, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import passes.edits.text
import reparam
from passes.edits.apply import apply
from passes.edits.carried import made_by, remember
from passes.edits.edit import Add, Block, Clear, Delete, Remove, Replace, Rewrite
from passes.edits.errors import EditError
from passes.edits.layer import Layer
from passes.edits.program import Argument, Operation, Program, Value
from passes.edits.text import from_text, to_text
from passes.refusal import Reason

CONV = (
    ("in_channels", 8), ("out_channels", 8), ("kernel_size", (3, 3)), ("stride", (1, 1)), ("padding", (1, 1)),
    ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros"), ("bias", True),
)  # fmt: skip


def features(count: int = 2) -> Tensor:
    return maps(count=count).double()


def lively(model: nn.Module, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return ready(model, seed).double()


def close(got: Any, wanted: Any) -> bool:
    return bool((got - wanted).abs().max() <= 1e-10 * wanted.abs().max().clamp(min=1))


class TwoBranches(nn.Module):
    """Two kernels that become one; what surrounds them is left to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.b = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.a(x) + self.b(x))


class ConvAndNorm(nn.Module):
    """A convolution and its norm; how they are called is left to subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)).relu()


class NormAct(nn.BatchNorm2d):
    """A norm that also activates, as timm's; with a function where ``act`` is None."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__(WIDTH)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        x = self.drop(x)
        return F.hardtanh(x) * 2 if self.act is None else self.act(x)


# ------------------------------------------------------------------ what was done, as data


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "slots": lambda: nn.Sequential(ConvBN(), nn.ReLU(), Residual()),
    "rewritten": Activated,
    "whole": lambda: nn.Sequential(Parallel(), nn.ReLU()),
    "interleaved": Branches,
    "padded": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), ConvBN(padding_mode="zeros"), nn.ReLU()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2), nn.BatchNorm2d(WIDTH)),
    "activation left": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), NormAct(nn.ReLU())),
    "function left": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), NormAct()),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_edits_make_the_same_network_of_a_fresh_one(kind: str) -> None:
    """Written down, read, applied without numbers, filled: the same outputs bit for bit. And taken back."""
    folded, report = reparam.collapse_with_report(lively(NETWORKS[kind]()))
    assert report.edits
    edits = from_text(to_text(report.edits))
    assert edits == report.edits
    fresh = lively(NETWORKS[kind](), seed=1)
    before = snapshot(fresh)
    undo = apply(fresh, edits)
    assert [str(m) for m in fresh.modules()] == [str(m) for m in folded.modules()]
    undo()
    assert unchanged(fresh, before)
    apply(fresh, edits)
    fresh.to_empty(device="cpu").double().load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(fresh(features()), folded(features()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_explain_tells_the_edits(kind: str) -> None:
    model = lively(NETWORKS[kind]())
    assert reparam.explain(model).edits == reparam.collapse_with_report(model)[1].edits


def test_an_edit_is_a_sentence() -> None:
    model = lively(nn.Sequential(OrderedDict(conv=nn.Conv2d(8, 8, 3), norm=NormAct(nn.ReLU()), block=Activated())))
    assert [str(edit) for edit in reparam.explain(model).edits] == [
        "replace conv by Conv2d(8 -> 8, 3x3)",
        "replace block.left by Conv2d(8 -> 8, 3x3)",
        "delete block.right",
        "rewrite the forward of block",
        "remove norm, leaving drop, act",
    ]
    assert str(Clear("block.weight")) == "clear block.weight"
    assert str(Block("conv", "acb", (("gamma", 2),), norm="bn")) == "replace conv by the block acb(gamma=2)"


def test_a_failing_edit_takes_the_others_back() -> None:
    model = lively(Residual())
    before = snapshot(model)
    conv = Layer("Conv2d", CONV)
    for last in (Delete("conv3"), Add("conv1", conv), Replace("conv2.x", conv), Clear("conv1.extra"), Remove("bn9")):
        with pytest.raises(EditError):
            apply(model, [Replace("conv1", conv), Remove("bn1"), Delete("act"), last])
        assert unchanged(model, before)


def test_a_network_carries_its_edits() -> None:
    """Copies and pickles too; what later edits cover is left out, so that they fit the plain source."""
    expanded = reparam.expand(lively(ConvBN()), "acb")
    blocks = made_by(expanded)
    assert blocks is not None
    assert [type(edit) for edit in blocks] == [Block, Remove]
    folded = copy.deepcopy(reparam.collapse(expanded.eval()))
    edits = made_by(folded)
    assert edits is not None
    assert [str(edit) for edit in edits] == ["remove norm", "replace conv by Conv2d(8 -> 8, 3x3)"]
    fresh = lively(ConvBN())
    apply(fresh, edits)
    fresh.to_empty(device="cpu").double().load_state_dict(folded.state_dict())
    assert torch.equal(fresh(features()), folded(features()))
    assert made_by(lively(ConvBN())) is None


def test_an_edit_inside_a_block_that_stays_keeps_the_block() -> None:
    model = nn.Module()
    remember(model, [Block("conv", "acb"), Remove("bn")])
    remember(model, [Remove("conv.square.norm")])
    assert made_by(model) == (Block("conv", "acb"), Remove("bn"), Remove("conv.square.norm"))


# ------------------------------------------------------------------ what a text may say


def a_program(*operations: Operation, **fields: Any) -> str:
    program = Program((Argument("x"),), operations, Value("x"), **fields)
    edits = [Rewrite("", Program((Argument("x"),), (), Value("x")))]
    assert from_text(to_text(edits)) == edits
    written = passes.edits.text._encoded  # what to_text would refuse to write
    parts = {"operations": {"tuple": [{"Operation": _raw(op, written)} for op in program.operations]}}
    rest = {"arguments": written(program.arguments), "output": written(program.output)}
    return _text({"Rewrite": {"path": "", "program": {"Program": {**parts, **rest}}}})


def _raw(op: Operation, written: Any) -> dict[str, Any]:
    return {"name": op.name, "op": op.op, "target": op.target, "args": written(op.args), "kwargs": written(op.kwargs)}


def _text(*edits: Any) -> str:
    import json

    return json.dumps({"version": 1, "edits": list(edits)})


BAD = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "digits": '{"version": ' + "9" * 5000 + "}",
    "another version": '{"version": 2, "edits": []}',
    "no version": "[]",
    "no list": '{"version": 1, "edits": 3}',
    "unknown kind": _text({"Explode": {"path": "conv"}}),
    "unknown field": _text({"Remove": {"path": "conv", "command": "x"}}),
    "field missing": _text({"Replace": {"path": "conv"}}),
    "wrong type": _text({"Remove": {"path": 3}}),
    "not an edit": _text({"Value": {"name": "x"}}),
    "unknown layer": _text({"Replace": {"path": "conv", "layer": {"Layer": {"kind": "Bilinear"}}}}),
    "huge": to_text([Replace("conv", Layer("Conv2d", CONV))]).replace('["in_channels",8]', f'["in_channels",{2**40}]'),
    "negative": to_text([Replace("conv", Layer("Conv2d", CONV))]).replace('["groups",1]', '["groups",-1]'),
    "many branches": to_text([Block("conv", "mobileone", (("n", 9),))]).replace("9", "9000000"),
    "import": a_program(Operation("y", "call_function", "os.system", ("true",))),
    "private": a_program(Operation("y", "call_function", "torch._C._cuda_init", ())),
    "files": a_program(Operation("y", "call_function", "torch.load", ("x",))),
    "memory map": a_program(Operation("y", "call_function", "torch.from_file", ("x",))),
    "attribute": a_program(Operation("y", "call_function", "builtins.getattr", (Value("x"), "__class__"))),
    "attribute by value": a_program(Operation("y", "call_function", "builtins.getattr", (Value("x"), Value("x")))),
    "method": a_program(Operation("y", "call_method", "numpy", (Value("x"),))),
    "dunder": a_program(Operation("y", "call_method", "size", (Value("x"),))).replace('"size"', '"__reduce__"'),
    "of nothing": a_program(Operation("y", "call_method", "relu", ())),
    "code in a name": a_program(Operation("y", "call_method", "relu", (Value("x"),))).replace('"y"', '"y=1;import os"'),
    "code in a keyword": a_program(
        Operation("y", "call_method", "sum", (Value("x"),), (("dim", 1),)),
    ).replace('"dim"', '"dim=1)#"'),
    "code in a parameter": a_program().replace('"Argument": {', '"Argument": {"name": "y):#", "kind": ').replace(
        '"kind": "name": "x"', '"kind": "KEYWORD_ONLY"'
    ),
    "tensor": _text({"Remove": {"path": {"tensor": ["torch.float32", [1000000], "AAAA"]}}}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_text_that_is_none_of_ours_is_refused(case: str) -> None:
    with pytest.raises(EditError) as caught:
        from_text(BAD[case])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "operation",
    [
        Operation("y", "call_module", "nowhere", (Value("x"),)),
        Operation("y", "call_module", 'a"];import os#', (Value("x"),)),
        Operation("y", "get_attr", "__class__", ()),
        Operation("y", "get_attr", "a._parameters", ()),
        Operation("y", "call_function", "torch.relu", (Value("later"),)),
        Operation("x", "call_function", "torch.relu", (Value("x"),)),
    ],
)
def test_a_forward_that_names_what_is_not_there_is_refused(operation: Operation) -> None:
    model = lively(TwoBranches())
    before = snapshot(model)
    (edit,) = from_text(a_program(operation))
    with pytest.raises(EditError):
        apply(model, [edit])
    assert unchanged(model, before)


def test_values_of_all_kinds_come_back() -> None:
    values = (
        None, True, 3, -0.5, float("inf"), "a", [1, (2, [3])], {"k": 1, "l": Value("v")}, slice(None, Value("n"), 2),
        2 + 1j, ..., torch.float16, torch.device("cuda", 1), torch.strided, torch.channels_last, torch.Size((1, 2)),
    )  # fmt: skip
    text = passes.edits.text._encoded(values)
    assert passes.edits.text._decoded(text) == values
    for tensor in (torch.tensor(2.5), torch.arange(6).view(2, 3).t(), torch.empty(0, 3), torch.tensor([True]).bool()):
        back = passes.edits.text._decoded(passes.edits.text._encoded(tensor))
        assert back.dtype == tensor.dtype
        assert torch.equal(back, tensor)
    with pytest.raises(EditError, match="cannot be written"):
        to_text([Rewrite("", Program((Argument("x", default=object()),), (), Value("x")))])


# ------------------------------------------------------------------ constants and arguments


class Constants(TwoBranches):
    """Tensors that the forward makes itself, one of them written into."""

    def forward(self, x: Tensor) -> Any:
        factor = torch.tensor(2.0)
        factor.add_(1)
        return F.relu(self.a(x) + self.b(x)) * factor + torch.arange(WIDTH).view(1, -1, 1, 1)


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["alone", "inside"])
def test_constants_travel_with_the_forward(around: Any) -> None:
    """No buffers, since ``half()`` did not reach them either; in copies, pickles and texts too; new in each call."""
    model = lively(around(Constants()))
    folded, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert all("constant" not in name for name in folded.state_dict())
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    fresh = lively(around(Constants()))
    apply(fresh, from_text(to_text(report.edits)))
    fresh.to_empty(device="cpu").double().load_state_dict(folded.state_dict())
    for other in (folded, copy.deepcopy(folded), torch.load(file, weights_only=False), fresh):
        for _ in range(2):
            assert close(other(features()), model(features()))


class Start(TwoBranches):
    """Gives a constant away, which the caller writes into."""

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.a(x) + self.b(x)), torch.zeros(1)


def test_a_constant_that_is_given_away_is_new_in_each_call() -> None:
    folded, report = reparam.collapse_with_report(lively(Start()))
    assert len(report.folds) == 1
    for _ in range(2):
        _, start = folded(features())
        assert float(start) == 0
        start.add_(1)


class Options(TwoBranches):
    """Parameters of every kind."""

    def forward(  # type: ignore[override]
        self, x: Tensor, /, mask: Any = None, *, scale: float = 2.0, mode: str = "a"
    ) -> Any:
        y = F.relu(self.a(x) + self.b(x)) * scale
        y = y if mask is None else y * mask
        return -y if mode == "b" else y


def test_a_rewritten_forward_takes_what_the_original_took() -> None:
    model = lively(Options())
    folded = reparam.collapse(model)
    x = features()
    assert close(folded(x), model(x))
    for args, options in (((None,), {}), ((), {"scale": 2.0}), ((None,), {"mode": "a", "scale": 2.0})):
        assert close(folded(x, *args, **options), model(x, *args, **options))
    with pytest.raises(TypeError):
        folded(x=x)


@pytest.mark.parametrize(("name", "value"), [("mask", torch.ones(1)), ("scale", 3.0), ("mode", "b"), ("scale", 2)])
def test_another_value_than_the_traced_one_says_so(name: str, value: Any) -> None:
    folded = reparam.collapse(lively(Options()))
    with pytest.raises(ValueError, match=f"was collapsed for {name}="):
        folded(features(), **{name: value})


# ------------------------------------------------------------------ who else holds a module


class InList(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.conv, (self.bn, {"act": nn.functional.relu})]

    def forward(self, x: Tensor) -> Any:
        conv, (norm, table) = self.layers
        return table["act"](norm(conv(x)))  # type: ignore[index, operator]


class InDict(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        self.layers = OrderedDict(conv=self.conv, rest=[self.bn])

    def forward(self, x: Tensor) -> Any:
        return self.layers["rest"][0](self.layers["conv"](x)).relu()  # type: ignore[index]


class InAttribute(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["first"] = self.conv

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.first(x)).relu()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [InList, InDict, InAttribute])
def test_an_edit_reaches_what_else_holds_the_layer(kind: type[nn.Module], inplace: bool) -> None:
    model = lively(kind())
    wanted, before = model(features()), snapshot(model)
    folded, report = reparam.collapse_with_report(model, inplace=inplace)
    assert len(report.folds) == 1
    assert close(folded(features()), wanted)
    if not inplace:
        assert unchanged(model, before)
        undo = apply(model, report.edits)
        undo()
        assert unchanged(model, before)
        assert close(model(features()), wanted)


class Untraced(nn.Module):
    """Calls a layer of somebody else, in code that cannot be read."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        return self.others[0](x) * self.gain if float(x.detach().sum()) < 1e9 else x


class HeldByUntraced(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Untraced(self.conv)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.reader(x)


class HeldByFunction(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        conv = self.conv
        self.run = lambda x: conv(x)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.run(x)).relu()


class HeldByPartial(ConvAndNorm):
    def __init__(self) -> None:
        super().__init__()
        self.run = functools.partial(lambda layer, x: layer(x), self.conv)

    def forward(self, x: Tensor) -> Any:
        return self.bn(self.run(x)).relu()


@pytest.mark.parametrize(
    ("kind", "holder"), [(HeldByUntraced, "reader.others"), (HeldByFunction, "run"), (HeldByPartial, "run")]
)
def test_what_an_edit_does_not_reach_is_left_alone(kind: type[nn.Module], holder: str) -> None:
    model = lively(kind())
    wanted = model(features())
    folded, report = reparam.collapse_with_report(model, inplace=True)
    assert not report.folds
    assert [(r.reason, f"conv is also held by {holder}") for r in report.refusals if "held" in r.message] == [
        (Reason.HELD, r.message) for r in report.refusals if "held" in r.message
    ]
    assert any(r.reason is Reason.HELD for r in report.refusals)
    assert close(folded(features()), wanted)


def test_a_forward_replaced_on_the_instance_is_rewritten() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return F.relu(self.a(x) + self.b(x)) + 1

    model = lively(TwoBranches())
    model.forward = types.MethodType(forward, model)
    before = snapshot(model)
    folded, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert close(folded(features()), model(features()))
    assert unchanged(model, before)


# ------------------------------------------------------------------ attributes that other code reads


class ReadsNorm(ConvAndNorm):
    """Asks the norm for numbers, and for the tensors behind them."""

    wanted = "num_features"

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        asked: Any = {
            "num_features": lambda: y.view(y.shape[0], self.bn.num_features, -1),
            "eps": lambda: y + self.bn.eps,
            "weight": lambda: y * self.bn.weight.view(1, -1, 1, 1),
            "dtype": lambda: y.to(self.bn.running_mean.dtype),  # type: ignore[union-attr]
            "bias": lambda: y + 1 if self.bn.bias is not None else y,
        }[self.wanted]
        return asked().relu()


@pytest.mark.parametrize("verb", ["collapse", "expand"])
@pytest.mark.parametrize("wanted", ["num_features", "eps", "weight", "dtype", "bias"])
def test_what_stands_in_a_norms_place_answers_for_it(wanted: str, verb: str) -> None:
    model = lively(ReadsNorm())
    model.wanted = wanted
    made = reparam.collapse(model) if verb == "collapse" else reparam.expand(model, "acb").eval()
    assert close(made(features()), model(features()))


class Strided(TwoBranches):
    stride = 1
    residual = True

    def forward(self, x: Tensor) -> Any:
        return self.a(x) + self.b(x)


class ReadsBlock(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.block, self.name = Strided(), name
        self.read = self.by_stride if name == "stride" else self.by_residual

    def by_stride(self, x: Tensor) -> Any:
        return x if self.block.stride == 1 else 0

    def by_residual(self, x: Tensor) -> Any:
        return x if self.block.residual else 0

    def forward(self, x: Tensor) -> Any:
        return self.block(x).relu() + self.read(x)


@pytest.mark.parametrize("name", ["stride", "residual"])
def test_a_block_that_is_asked_answers_as_before(name: str) -> None:
    """A class's attribute too; and where the folded layer's own means something else, the block keeps its class."""
    model = lively(ReadsBlock(name))
    del model.read
    folded, report = reparam.collapse_with_report(_Bound(model))
    assert len(report.folds) == 1
    assert close(folded(features()), _Bound(model)(features()))


class _Bound(nn.Module):
    def __init__(self, inner: ReadsBlock) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        y = self.inner.block(x).relu()
        kept = self.inner.block.stride == 1 if self.inner.name == "stride" else self.inner.block.residual
        return y + x if kept else y


class ReadsWeight(ConvAndNorm):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)).relu() + self.conv.weight.abs().mean()


def test_a_weight_that_other_code_computes_with_keeps_its_numbers() -> None:
    model = lively(ReadsWeight())
    assert close(reparam.collapse(model)(features()), model(features()))


# ------------------------------------------------------------------ methods and hooks


class Features(TwoBranches):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(WIDTH)
        self.scale = nn.Parameter(torch.full((WIDTH, 1, 1), 1.5))
        self.head = nn.Conv2d(WIDTH, 4, 1)

    def forward_features(self, x: Tensor) -> Any:
        return F.relu(self.bn(self.a(x) + self.b(x)) * self.scale)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.forward_features(x))


class Separate(Features):
    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.bn(self.a(x) + self.b(x)) * self.scale))


@pytest.mark.parametrize("kind", [Features, Separate])
@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["alone", "inside"])
def test_other_methods_still_work(kind: type[Features], around: Any) -> None:
    model = lively(around(kind()))
    folded = reparam.collapse(model)
    assert close(folded(features()), model(features()))
    inner, own = (m if isinstance(m, kind) else m[0] for m in (folded, model))
    assert close(inner.forward_features(features()), own.forward_features(features()))


@pytest.mark.parametrize("around", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["alone", "inside"])
def test_the_method_that_holds_the_fold_is_rewritten(around: Any) -> None:
    """The forward that calls it stays, and nothing is kept beside the folded layer."""
    model = lively(around(Features()))
    folded, report = reparam.collapse_with_report(model)
    assert str(report.edits[-1]).startswith("rewrite forward_features of")
    assert reparam.collapse_with_report(folded)[1].edits == []
    inner = folded if isinstance(folded, Features) else folded[0]
    assert sorted(name for name, _ in inner.named_children()) == ["a", "head"]
    assert not report.notes
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for other in (copy.deepcopy(folded), torch.load(file, weights_only=False)):
        assert torch.equal(other(features()), folded(features()))


class Distilled(nn.Module):
    """Two heads whose mean counts, as DeiT's and LeViT's, and a method that replaces them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.reset(4)

    def reset(self, classes: int) -> None:
        self.head, self.head_dist = nn.Linear(6, classes), nn.Linear(6, classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        return x if pre_logits else (self.head(x) + self.head_dist(x)) / 2

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(torch.tanh(self.stem(x)))


def test_heads_that_were_folded_are_not_replaced_in_silence() -> None:
    model = lively(Distilled())
    folded = reparam.collapse(model)
    x = torch.randn(2, 6, dtype=torch.float64)
    assert close(folded(x), model(x))
    assert close(folded.forward_head(x), model.forward_head(x))
    assert [name for name, _ in folded.named_children()] == ["stem", "head"]
    with pytest.raises(ValueError, match="collapsed for pre_logits=False"):
        folded.forward_head(x, pre_logits=True)
    with pytest.raises(reparam.ReparamError, match="head of this Distilled is folded"):
        folded.reset(7)


class Keeps(Features):
    """The method makes one of the branches, the forward the other: the forward is written anew."""

    def forward_features(self, x: Tensor) -> Any:
        return self.a(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.bn(self.forward_features(x) + self.b(x)) * self.scale))


def test_a_fold_across_methods_keeps_what_they_call() -> None:
    model = lively(Keeps())
    folded = reparam.collapse(model)
    assert close(folded(features()), model(features()))
    assert close(folded.forward_features(features()), model.forward_features(features()))


class Published(TwoBranches):
    """A method of re-parameterisation looks at the branches; it needs none of them any more."""

    def kernel(self) -> Any:
        return self.fuse(self.a) + F.pad(self.fuse(self.b), [1] * 4)

    def fuse(self, conv: nn.Conv2d) -> Any:
        return conv.weight


def test_a_method_that_only_looks_at_weights_keeps_nothing() -> None:
    folded = reparam.collapse(lively(Published()))
    assert len(list(folded.children())) == 1


@pytest.mark.parametrize("block", ["acb", "repvgg"])
def test_a_hook_on_a_block_moves_to_the_layer_in_its_place(block: str) -> None:
    model = reparam.expand(lively(nn.Sequential(ConvBN(), nn.ReLU())), block).eval()
    seen: list[Any] = []
    handle = model[0].conv.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model[0].conv.register_forward_pre_hook(lambda *_: seen.append(None))
    wanted = model(features())
    for folded in (reparam.collapse(model), reparam.collapse(model, inplace=True)):
        assert isinstance(folded[0].conv, nn.Conv2d)
        first = list(seen)
        seen.clear()
        assert close(folded(features()), wanted)
        assert [each is None for each in seen] == [True, False]
        assert close(seen[1][1], first[1][1])
    handle.remove()  # of the model that was edited itself
    seen.clear()
    model(features())
    assert seen == [None]


def test_a_hook_on_a_layer_is_a_refusal() -> None:
    model = lively(ConvBN())
    seen: list[int] = []
    model.conv.register_forward_hook(lambda *_: seen.append(1))
    folded, report = reparam.collapse_with_report(model)
    assert not report.folds
    assert {r.reason for r in report.refusals} >= {Reason.HOOK}
    folded(features())
    assert seen == [1]


# ------------------------------------------------------------------ structures


class Named(TwoBranches):
    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x) + self.b(x))
        return {"out": y, "more": (x * 2, [y + 1])}


class Takes(TwoBranches):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, x: Tensor) -> Any:
        made = self.inner(x)
        return F.relu(self.a(made["out"]) + self.b(made["out"])) + made["more"][1][0] - made["more"][0]


def test_a_child_that_returns_a_structure_is_read_in_parts() -> None:
    model = lively(Takes())
    folded, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 2
    assert close(folded(features()), model(features()))


class LooksUp(nn.Module):
    """Fails on a proxy with an error whose message shows an attribute of it, as einops' layers do."""

    table: ClassVar = {3: 2, 4: 3}

    def forward(self, x: Tensor) -> Any:
        return x.flatten(self.table[x.ndim])


def test_a_layer_that_looks_something_up_is_no_error() -> None:
    model = lively(nn.Sequential(ConvBN(), LooksUp(), nn.Linear(12, 3)))
    folded, report = reparam.collapse_with_report(model)
    assert len(report.folds) == 1
    assert len(reparam.explain(model).folds) == 1
    assert close(folded(features()), model(features()))


# ------------------------------------------------------------------ like=


def _eps_ignored(restore: Any) -> None:
    original = restore.make_identity

    def wrong(norm: Any, exact: Any) -> None:
        original(norm, exact)
        norm.running_var.fill_(1.5)

    restore.make_identity = wrong


def _mean_kept(restore: Any) -> None:
    original = restore.make_identity

    def wrong(norm: Any, exact: Any) -> None:
        mean = norm.running_mean.clone() + 0.5
        original(norm, exact)
        norm.running_mean.copy_(mean)

    restore.make_identity = wrong


def _not_copied(restore: Any) -> None:
    restore._copy = lambda into, value, exact, number=None: None


def _bias_reversed(restore: Any) -> None:
    original = restore._copy

    def wrong(into: Tensor, value: Tensor, exact: Any, number: Any = None) -> None:
        original(into, value.flip(0) if value.dim() == 1 and value.numel() == WIDTH else value, exact, number)

    restore._copy = wrong


@pytest.mark.parametrize("block", ["acb", None], ids=["block by block", "by names"])
@pytest.mark.parametrize("plant", [_eps_ignored, _mean_kept, _not_copied, _bias_reversed])
def test_numbers_for_like_are_read_back(plant: Any, block: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is put wrongly into the architecture is found without running the network."""
    import passes.restore

    plain = lively(nn.Sequential(ConvBN(), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1)))
    trained = reparam.expand(plain, block).eval() if block else plain
    randomised = lively(trained, seed=2)
    for name in ("make_identity", "_copy"):
        monkeypatch.setattr(passes.restore, name, getattr(passes.restore, name))
    if block is None:
        monkeypatch.setattr(passes.restore, "restore_blocks", lambda *_, **__: None)
    assert close(reparam.collapse(randomised, like=plain, verify=False)(features()), randomised(features()))
    plant(passes.restore)
    with pytest.raises(reparam.ReparamError, match="like="):
        reparam.collapse(randomised, like=plain, verify=False)


def test_a_norm_without_weights_becomes_the_identity_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.restore

    plain = lively(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, bias=True), nn.BatchNorm2d(WIDTH, affine=False), nn.ReLU()))
    monkeypatch.setattr(passes.restore, "restore_blocks", lambda *_, **__: None)
    assert close(reparam.collapse(plain, like=plain)(features()), plain(features()))


LIKE: dict[str, Callable[[], nn.Module]] = {
    "stock": lambda: nn.Sequential(ConvBN(), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 1)),
    "no norm": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), nn.ReLU()),
    "norm and activation": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), NormAct(nn.ReLU())),
}


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("how", ["block by block", "by names"])
def test_like_tells_its_edits(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written down, read, applied to the trained network: the architecture that was given; and taken back."""
    import passes.restore

    plain = lively(LIKE[kind]())
    trained = lively(reparam.expand(plain, "acb").eval(), seed=2)
    if how == "by names":
        monkeypatch.setattr(passes.restore, "restore_blocks", lambda *_, **__: None)
    result, report = reparam.collapse_with_report(trained, like=plain)
    assert report.folds
    assert report.edits
    edits = from_text(to_text(report.edits))
    assert edits == report.edits
    given = {edit.path: result.get_submodule(edit.path) for edit in edits if isinstance(edit, Replace)}
    before = snapshot(trained)
    undo = apply(trained, edits, given)
    assert [str(m) for m in trained.modules()] == [str(m) for m in result.modules()]
    trained.load_state_dict(result.state_dict(), strict=True)
    assert torch.equal(trained(features()), result(features()))
    undo()
    assert unchanged(trained, before)


def test_a_layer_of_ones_own_class_is_named_and_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.restore

    plain = lively(LIKE["norm and activation"]())
    trained = reparam.expand(plain, "acb").eval()
    monkeypatch.setattr(passes.restore, "restore_blocks", lambda *_, **__: None)
    edits = reparam.collapse_with_report(trained, like=plain)[1].edits
    assert "replace 1 by the NormAct of like=" in [str(edit) for edit in edits]
    with pytest.raises(EditError, match="NormAct of like= is not known here"):
        apply(trained, [edit for edit in edits if "NormAct" in str(edit)])
