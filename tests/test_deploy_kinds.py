"""Kinds of ONNX files and exported programs that are rare, and what is kept of each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_onnx import BN, CONVS, PADS, C, array, loaded, make, model, norm, operators
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import reparam
import reparam.onnx
from passes.onnx import replay
from passes.proof.compare import Verdict
from passes.refusal import Reason
from reparam.disk import FileError

BRANCHES = f"""a = Conv <{PADS}> (x, w)
    c = {BN.format("a", "n")}
    f = ReduceMax <keepdims=0> (x)
    t = Greater (f, zero)
    y = If (t) <then_branch = g () => (float[] p) {{ k = Constant () p = Add (c, k) }},
                else_branch = h () => (float[] q) {{ q = Neg (c) }}>"""


def branching(number: onnx.TensorProto) -> onnx.ModelProto:
    """A file with a constant inside of a branch, and a weight of that branch."""
    made = model(BRANCHES, {**CONVS, **norm("n"), "zero": np.float32(0).reshape(())})
    branch = next(a.g for a in made.graph.node[-1].attribute if a.name == "then_branch")
    branch.node[0].attribute.append(helper.make_attribute("value", number))
    branch.node[1].input[1] = "k2"
    branch.node.insert(1, helper.make_node("Mul", ["k", "v2"], ["k2"]))
    branch.initializer.append(numpy_helper.from_array(array(C, 1, 1), "v2"))
    return made


def outside(name: str, location: str, *shape: int) -> onnx.TensorProto:
    tensor = numpy_helper.from_array(array(*shape), name)
    onnx.external_data_helper.set_external_data(tensor, location=location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor


def beside(made: onnx.ModelProto, path: Path, location: str) -> Path:
    """Write a file whose numbers, those of branches and constants included, are in another one."""
    path.parent.mkdir(exist_ok=True)
    options = {"save_as_external_data": True, "location": location, "size_threshold": 0, "convert_attribute": True}
    onnx.save(made, path, **options)
    return path


def run(path: Path) -> Any:
    x = np.ones((1, C, 12, 12), np.float32)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


# ------------------------------------------------------------------ weights in other files


def test_weights_of_branches_and_constants_go_with_the_file(tmp_path: Path) -> None:
    path = beside(branching(numpy_helper.from_array(array(C, 1, 1), "k")), tmp_path / "in" / "model.onnx", "numbers")
    result, report = reparam.onnx.collapse_with_report(path)
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    (tmp_path / "out").mkdir()
    reparam.onnx.save(result, tmp_path / "out" / "out.onnx")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"out.onnx", "out.onnx.data"}
    assert np.allclose(run(tmp_path / "out" / "out.onnx"), run(path), atol=1e-5)


def test_a_constant_of_a_branch_or_a_function_from_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(branching(outside("k", "../secret", C, 1, 1)), path)
    with pytest.raises(FileError, match=r"the weight 'k' is to come from outside of its folder: '\.\./secret'"):
        reparam.onnx.load(path)
    inner = helper.make_node("Constant", [], ["k"], value=outside("k", "gone", C, 1, 1))
    nodes = [inner, helper.make_node("Mul", ["a", "k"], ["b"])]
    function = helper.make_function("own", "Scale", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    made = model("y = own.Scale (x)", {})
    made.functions.append(function)
    made.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(made, path)
    with pytest.raises(FileError, match="the file 'gone' with the weight 'k' is missing"):
        reparam.onnx.load(path)


def test_weights_that_the_source_reads_are_not_overwritten(tmp_path: Path) -> None:
    made = model(
        f"a = Conv <{PADS}> (x, w)\n c = {BN.format('a', 'n')}\n d = Relu (c)\n y = Conv (d, v)", {**CONVS, **norm("n")}
    )
    path = beside(made, tmp_path / "original.onnx", "model.onnx.data")
    before, wanted = (tmp_path / "model.onnx.data").read_bytes(), run(path)
    for _ in range(2):  # the second time over what the first has written
        reparam.onnx.save(reparam.onnx.collapse(path), tmp_path / "model.onnx")
        assert {p.name for p in tmp_path.iterdir()} == {
            *("original.onnx", "model.onnx", "model.onnx.data", "model.onnx.1.data"),
        }
        assert (tmp_path / "model.onnx.data").read_bytes() == before
        assert np.allclose(run(tmp_path / "model.onnx"), wanted, atol=1e-5)


def test_a_file_in_which_nothing_folds_is_copied_with_its_weights(tmp_path: Path) -> None:
    path = beside(model("a = Conv (x, w)\n y = Relu (a)", CONVS), tmp_path / "in" / "model.onnx", "numbers")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "out.onnx"
    for _ in range(2):
        reparam.onnx.save(reparam.onnx.collapse(path), out)
        assert out.read_bytes() == path.read_bytes()
        assert out.with_name("numbers").read_bytes() == path.with_name("numbers").read_bytes()
        assert len(list(out.parent.iterdir())) == 2
    out.unlink()
    out.with_name("numbers").write_bytes(b"of another model")
    with pytest.raises(FileError, match=r"numbers is there already, with other weights: write out\.onnx into another"):
        reparam.onnx.save(reparam.onnx.collapse(path), out)
    assert not out.exists()


def test_what_is_said_of_a_weight_is_written_once(tmp_path: Path) -> None:
    made = make("convolution and norm")
    made.graph.initializer.append(numpy_helper.from_array(array(3), "unused"))
    made.graph.initializer[-1].metadata_props.add(key="t", value="v")
    reparam.onnx.save(reparam.onnx.collapse(loaded(made, tmp_path)), tmp_path / "out.onnx")
    kept = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}["unused"]
    assert [(p.key, p.value) for p in kept.metadata_props] == [("t", "v")]


# ------------------------------------------------------------------ files that are refused


def twice(made: onnx.ModelProto) -> None:
    made.graph.node.append(helper.make_node("Relu", ["x"], ["a"]))


def reads_nothing(made: onnx.ModelProto) -> None:
    made.graph.node[0].input[1] = "nothing"


def returns_nothing(made: onnx.ModelProto) -> None:
    made.graph.output[0].name = "nothing"


def too_short(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].raw_data = b"123"


def unknown_kind(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].data_type = 99


def sparse() -> onnx.SparseTensorProto:
    numbers = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0])
    return helper.make_sparse_tensor(numbers, helper.make_tensor("i", TensorProto.INT64, [2], [0, 3]), [C])


def sparse_weight(made: onnx.ModelProto) -> None:
    made.graph.sparse_initializer.append(sparse())


def sparse_constant(made: onnx.ModelProto) -> None:
    made.graph.node.insert(0, helper.make_node("Constant", [], ["s"], sparse_value=sparse()))


def trained(made: onnx.ModelProto) -> None:
    made.training_info.add().algorithm.name = "sgd"


@pytest.mark.parametrize(("damage", "message"), [
    (twice, "Output 'a' is redeclared"),
    (reads_nothing, "Conv 'a' reads 'nothing', which nothing in the file gives"),
    (returns_nothing, "nothing in the file gives its output 'nothing'"),
    (too_short, "the weight 'w' is no 4x4x3x3 numbers"),
    (unknown_kind, "99 is not a valid DataType"),
    (sparse_weight, "the tensor 's' is sparse, which onnx-ir drops: write it as a dense one"),
    (sparse_constant, "the tensor 's' is sparse"),
    (trained, r"training_info.* clear that field"),
])  # fmt: skip
def test_what_cannot_be_read_or_kept_gets_one_line(
    damage: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    made = make("convolution and norm")
    damage(made)
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    with pytest.raises(FileError, match=message) as caught:
        reparam.onnx.collapse(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ names


def named(where: str) -> onnx.ModelProto:
    """A convolution without a bias and a norm, where something else is called as its bias would be."""
    weights = {"conv.weight": CONVS["w"], **norm("n")}
    folds = f'a = Conv <{PADS}> (x, "conv.weight")\n c = {BN.format("a", "n")}\n '
    tails = {"a value": "t = Relu (c)\n y = Neg (t)", "an operator": "y = Neg (c)", "an unread weight": "y = Neg (c)",
             "a branch": "y = If (yes) <then_branch = g () => (float[] p) { t = Relu (c) p = Neg (t) }, "
             "else_branch = h () => (float[] q) { q = Neg (c) }>", "an input": "y = Mul (c, t)"}  # fmt: skip
    made = model(folds.replace('"', "").replace("conv.weight", "w") + tails[where], {**weights, "yes": np.array(True)})
    inner = [n for n in made.graph.node if n.op_type == "If"]
    nodes = [*made.graph.node, *(n for node in inner for a in node.attribute for n in a.g.node)]
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [{"w": "conv.weight", "t": "conv.bias"}.get(name, name) for name in names]
    if where == "an operator":
        made.graph.node[-1].name = "conv.bias"
    if where == "an unread weight":
        made.graph.initializer.append(numpy_helper.from_array(array(C), "conv.bias"))
    if where == "an input":
        made.graph.input.append(helper.make_tensor_value_info("conv.bias", TensorProto.FLOAT, [1]))
    return made


@pytest.mark.parametrize("where", ["a value", "an operator", "an unread weight", "a branch", "an input"])
def test_a_new_bias_gets_a_name_that_nothing_has(where: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(named(where), path)
    result, report = reparam.onnx.collapse_with_report(path)
    assert (len(report.folds), report.taken_back) == (1, [])
    assert "BatchNormalization" not in operators(result)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    new = next(node for node in result.graph if node.op_type == "Conv").inputs[2]
    assert new is not None
    assert new.name == "conv.bias_1"


def test_a_weight_of_which_the_shape_is_asked_for_keeps_its_name(tmp_path: Path) -> None:
    code = f"""k = Mul (w, two)
        a = Conv <{PADS}> (x, k)
        c = {BN.format("a", "n")}
        s = Shape (k)
        r = Size (k)
        q = Cast <to=1> (r)
        y = Mul (c, q)"""
    weights = {**CONVS, **norm("n"), "two": np.float32(2).reshape(1)}
    result = reparam.onnx.collapse(loaded(model(code, weights), tmp_path), verify=False)
    reparam.onnx.save(result, tmp_path / "out.onnx")
    assert np.allclose(run(tmp_path / "out.onnx"), run(tmp_path / "model.onnx"), atol=1e-5)


# ------------------------------------------------------------------ operators of several results


@pytest.mark.parametrize("opset", [9, 13])
def test_a_norm_that_names_its_other_results_trains(opset: int, tmp_path: Path) -> None:
    made = model(f"a = Conv <{PADS}> (x, w)\n y = {BN.format('a', 'n')}", {**CONVS, **norm("n")}, opset=opset)
    made.graph.node[-1].output.extend(["m1", "v1", "m2", "v2"])
    result, report = reparam.onnx.collapse_with_report(ir.from_proto(made))
    assert operators(result) == ["Conv", "BatchNormalization"]
    assert [refusal.reason for refusal in report.refusals] == [Reason.BATCH_STATISTICS]


def test_a_norm_in_training_mode_says_so(tmp_path: Path) -> None:
    made = model(f"a = Conv <{PADS}> (x, w)\n y = {BN.format('a', 'n')}", {**CONVS, **norm("n")})
    made.graph.node[-1].attribute.append(helper.make_attribute("training_mode", 1))
    made.graph.node[-1].output.extend(["m1", "v1"])
    report = reparam.onnx.explain(ir.from_proto(made))
    assert [refusal.reason for refusal in report.refusals] == [Reason.BATCH_STATISTICS]


@pytest.mark.parametrize("read", [False, True])
def test_a_dropout_whose_mask_is_read_stays(read: bool, tmp_path: Path) -> None:
    made = model(
        f"a = Conv <{PADS}> (x, w)\n d, mask = Dropout (a)\n y = {BN.format('d', 'n')}", {**CONVS, **norm("n")}
    )
    if read:
        made.graph.node.append(helper.make_node("Not", ["mask"], ["z"]))
    made.graph.output.append(helper.make_tensor_value_info("z" if read else "mask", TensorProto.BOOL, None))
    result, report = reparam.onnx.collapse_with_report(loaded(made, tmp_path))
    assert operators(result)[:3] == ["Conv", "Dropout", "BatchNormalization"]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL


# ------------------------------------------------------------------ regions that cannot be run alone


def test_a_region_that_the_evaluator_does_not_run_is_left_alone_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("planted")

    monkeypatch.setattr(replay._Transposed, "_run", fails)
    code = f"""a = ConvTranspose <strides=[2,2], group=2> (x, g)
        c = {BN.format("a", "n")}
        r = Relu (c)
        d = Conv <{PADS}> (r, w)
        y = {BN.format("d", "m")}"""
    made = model(code, {"g": array(C, 2, 3, 3), **CONVS, **norm("n"), **norm("m")})
    result, report = reparam.onnx.collapse_with_report(loaded(made, tmp_path))
    assert operators(result) == ["ConvTranspose", "BatchNormalization", "Relu", "Conv"]
    told = {refusal.layer: refusal.message for refusal in report.refusals if refusal.reason is Reason.ATTRIBUTE}
    fold = next(layer for layer in told if "g" in layer.split(", "))
    assert told == {"c": "its fold fails: cannot be replayed: planted", fold: "cannot be replayed: planted"}


# ------------------------------------------------------------------ exported programs


def pair() -> nn.Sequential:
    norm = nn.BatchNorm2d(C)
    norm.running_mean, norm.running_var = torch.randn(C), torch.rand(C) + 0.5
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), norm)


class Pairs(nn.Module):
    """Two convolutions with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = pair(), pair()


class WithoutGradients(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x)
        return self.b(y).relu()


class InPlaceWithoutGradients(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a[0](x)
        with torch.no_grad():
            y.add_(1)
        return self.b(self.a[1](y))


class Autocast(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return self.b(y.float())


class Branching(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cond(y.sum() > 0, lambda z: self.b(z), lambda z: z * 2, (y,))


INNER = (WithoutGradients, InPlaceWithoutGradients, Autocast, Branching)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.cond asks for
@pytest.mark.parametrize("network", INNER)
@pytest.mark.parametrize("form", ["program", "module"])
def test_what_is_around_an_inner_graph_folds(network: type[nn.Module], form: str) -> None:
    program = torch.export.export(network().eval(), (torch.randn(2, C, 8, 8),))
    given: Any = program if form == "program" else program.module()
    result, report = reparam.collapse_with_report(given)
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert len(reparam.explain(given).folds) == 1
    if form == "program":
        x = torch.randn(2, C, 8, 8)
        assert torch.allclose(result.module()(x), program.module()(x), atol=1e-2 if network is Autocast else 1e-5)


class Counting(nn.Module):
    """A forward that counts its calls, in a buffer that a state dict has and in one that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = pair()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.hidden.add_(1)
        return self.layers(x) + self.calls + self.hidden


def test_a_program_shares_nothing_that_can_be_written_with_its_source() -> None:
    program = torch.export.export(Counting().eval(), (torch.randn(2, C, 8, 8),))
    result = reparam.collapse(program)
    result.module()(torch.randn(2, C, 8, 8))
    for parameter in result.parameters():
        parameter.data.zero_()
    assert (float(program.state_dict["calls"]), float(program.constants["hidden"])) == (0.0, 0.0)
    assert not any(
        result.state_dict[name] is tensor for name, tensor in program.state_dict.items() if name in result.state_dict
    )
    assert all(bool(parameter.abs().sum()) for name, parameter in program.named_parameters() if "bias" not in name)


def test_a_program_that_was_unflattened_folds() -> None:
    program = torch.export.export(pair().eval(), (torch.randn(2, C, 8, 8),))
    torch.export.unflatten(program)
    result, report = reparam.collapse_with_report(program)
    assert len(report.folds) == 1
    assert "unflattened_module" not in result.graph_module.meta


class ChannelsLast(nn.Module):
    """A view that only data in another order than usual has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).permute(0, 2, 3, 1).view(x.shape[0], -1)


def test_made_up_inputs_lie_in_memory_as_the_graph_says() -> None:
    x = torch.randn(2, C, 8, 8).contiguous(memory_format=torch.channels_last)
    module = torch.export.export(ChannelsLast().eval(), (x,)).module()
    report = reparam.collapse_with_report(module)[1]
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL


def test_made_up_inputs_that_a_module_refuses_are_not_the_callers() -> None:
    x = torch.randn(2, C, 8, 8).contiguous(memory_format=torch.channels_last)
    module = torch.export.export(ChannelsLast().eval(), (x,)).module()
    next(n for n in module.graph.nodes if n.name == "x").meta["val"] = torch.empty(2, C, 8, 8)
    checked = reparam.collapse_with_report(module)[1].checked
    assert checked is not None
    assert str(checked).startswith("not compared: it takes no input of the shapes that it says")


def test_results_that_nobody_reads_do_not_keep_a_norm() -> None:
    module = make_fx(pair().eval())(torch.randn(2, C, 8, 8))
    assert any(node.target is operator.getitem and not node.users for node in module.graph.nodes)
    result, report = reparam.collapse_with_report(module)
    assert len(report.folds) == 1
    assert sum(node.target is operator.getitem for node in result.graph.nodes) == 0
    x = torch.randn(2, C, 8, 8)
    assert torch.allclose(result(x), module(x), atol=1e-5)


# ------------------------------------------------------------------ small things


def test_an_input_of_bytes_is_made_up(tmp_path: Path) -> None:
    made = model(f"f = Cast <to=1> (x)\n a = Conv <{PADS}> (f, w)\n y = {BN.format('a', 'n')}", {**CONVS, **norm("n")})
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    checked = reparam.onnx.collapse_with_report(loaded(made, tmp_path))[1].checked
    assert checked is not None
    assert checked.verdict is Verdict.EQUAL


def test_the_long_name_of_the_standard_operators(tmp_path: Path) -> None:
    made = make("two branches")
    made.opset_import[0].domain = "ai.onnx"
    report = reparam.onnx.collapse_with_report(loaded(made, tmp_path))[1]
    assert len(report.folds) == 1
    made.opset_import[0].version = 5
    with pytest.raises(FileError, match="operator set 5"):
        reparam.onnx.collapse(loaded(made, tmp_path))


@pytest.mark.parametrize("rule", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [11, 12])
def test_padding_by_a_rule_where_the_file_fixes_the_size(rule: str, size: int, tmp_path: Path) -> None:
    code = f"""a = Conv <auto_pad="{rule}", strides=[2, 3]> (x, w)
        c = {BN.format("a", "n")}
        r = Relu (c)
        d = Conv <auto_pad="{rule}", strides=[2, 2]> (r, k)
        y = {BN.format("d", "m")}"""
    weights = {**CONVS, "k": array(C, C, 4, 2), **norm("n"), **norm("m")}
    result, report = reparam.onnx.collapse_with_report(
        loaded(model(code, weights, shape=f"N,4,{size},{size}"), tmp_path)
    )
    assert operators(result) == ["Conv", "Relu", "Conv"]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert all("auto_pad" not in node.attributes for node in result.graph), "the pads at these sizes"
    result, report = reparam.onnx.collapse_with_report(loaded(model(code, weights, shape="N,4,H,W"), tmp_path))
    assert operators(result) == ["Conv", "Relu", "Conv"]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    convs = [node for node in result.graph if node.op_type == "Conv"]
    assert [node.attributes["auto_pad"].value for node in convs] == [rule] * 2, "the rule itself, at any"


def test_tokens_of_a_batch_of_any_size(tmp_path: Path) -> None:
    code = f"a = Conv <{PADS}> (x, w)\n t = Reshape (a, s)\n y = {BN.format('t', 'n')}"
    made = model(code, {**CONVS, "s": np.array([0, C, -1]), **norm("n")})
    del made.graph.output[0].type.tensor_type.shape.dim[3:]
    result, report = reparam.onnx.collapse_with_report(loaded(made, tmp_path))
    assert operators(result) == ["Conv", "Reshape"]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL


class NamedAsABias(nn.Module):
    """An input that is called as torch.export would call the bias of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = pair()

    def forward(self, x: Tensor, p_c_bias: Tensor) -> Tensor:
        return self.n(self.c(x)) + p_c_bias


def test_a_new_weight_of_a_program_gets_a_name_that_nothing_has() -> None:
    given = torch.randn(2, C, 8, 8), torch.randn(1)
    program = torch.export.export(NamedAsABias().eval(), given)
    result, report = reparam.collapse_with_report(program)
    assert len(report.folds) == 1
    assert torch.allclose(result.module()(*given), program.module()(*given), atol=1e-5)
    for other in (nn.Parameter(torch.ones(2)), "a text"):
        module = program.module()
        module.c.bias = other  # which no call reads
        kept, report = reparam.collapse_with_report(module, example_inputs=given)
        assert len(report.folds) == 1
        assert torch.equal(kept.c.bias, other) if isinstance(other, Tensor) else kept.c.bias == other
        assert torch.allclose(kept(*given), module(*given), atol=1e-5)
