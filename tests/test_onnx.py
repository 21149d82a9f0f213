"""ONNX files of any exporter: what folds, what stays byte for byte, and what bad files are told."""

from __future__ import annotations

import warnings
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
from small_networks import ready
from test_exported import NETWORKS, build, maps
from torch import nn
from typer.testing import CliRunner

import reparam
import reparam.onnx
from passes.onnx import files, replay
from passes.proof.compare import Verdict
from reparam import EquivalenceError, ReparamError
from reparam.cli import app
from reparam.disk import FileError

C = 4
RNG = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32) * 0.5


def positive(*shape: int) -> Any:
    return np.abs(array(*shape)) + 0.5


def norm(name: str, channels: int = C) -> dict[str, Any]:
    numbers = {f"{name}_{key}": array(channels) for key in ("scale", "shift", "mean")}
    return numbers | {f"{name}_var": positive(channels)}


def value(name: str, rank: int = 4) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(rank)])


def model(
    code: str,
    weights: dict[str, Any],
    *,
    opset: int = 17,
    shape: str = "N,4,12,12",
    constants: bool = False,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A file of one input ``x`` and one output ``y``; its weights are initialisers or ``Constant`` nodes."""
    text = f"""<ir_version: {ir_version}, opset_import: ["" : {opset}, "other" : 1]>
        graph (float[{shape}] x) => (float[] y) {{ {code} }}"""
    made = onnx.parser.parse_model(text)
    made.graph.output[0].CopyFrom(value("y", shape.count(",") + 1))
    tensors = [numpy_helper.from_array(number, name) for name, number in weights.items()]
    if constants:
        nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors]
        rest = list(made.graph.node)
        del made.graph.node[:]
        made.graph.node.extend([*nodes, *rest])
    else:
        made.graph.initializer.extend(tensors)
        if ir_version < 4:
            listed = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
            made.graph.input.extend(listed)
    return made


BN = "BatchNormalization ({0}, {1}_scale, {1}_shift, {1}_mean, {1}_var)"
PADS = "pads=[1,1,1,1]"
CONVS = {"w": array(C, C, 3, 3), "v": array(C, C, 1, 1), "b": array(C)}
ONE = f"a = Conv <{PADS}> (x, w, b)\n y = {BN.format('a', 'n')}"
TWO = f"a = Conv <{PADS}> (x, w)\n c = {BN.format('a', 'n')}\n d = Conv (x, v)\n e = {BN.format('d', 'm')}\n"

Case = tuple[str, dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "convolution and norm": (ONE, {**CONVS, **norm("n")}, {}),
    "two branches": (f"{TWO} y = Add (c, e)", {**CONVS, **norm("n"), **norm("m")}, {}),
    "their difference": (f"{TWO} y = Sub (c, e)", {**CONVS, **norm("n"), **norm("m")}, {}),
    "a sum of three": (f"{TWO} f = {BN.format('x', 'k')}\n y = Sum (c, e, f)",
                       {**CONVS, **norm("n"), **norm("m"), **norm("k")}, {}),
    "scale and shift": (f"a = Conv <{PADS}> (x, w, b)\n c = Mul (a, s)\n d = Add (c, t)\n e = Div (d, u)\n y = Neg (e)",
                        {**CONVS, "s": array(1, C, 1, 1), "t": array(C, 1, 1), "u": np.float32(3).reshape(1)}, {}),
    "one-sided pads": (f"a = Conv <pads=[0,1,2,1], strides=[2,2]> (x, w, b)\n y = {BN.format('a', 'n')}",
                       {**CONVS, **norm("n")}, {}),
    "auto_pad": (f'a = Conv <auto_pad="SAME_LOWER"> (x, k, b)\n y = {BN.format("a", "n")}',
                 {"k": array(C, C, 4, 4), **CONVS, **norm("n")}, {}),
    "groups and dilation": (f"a = Conv <group=2, dilations=[2,2]> (x, g)\n y = {BN.format('a', 'n')}",
                            {"g": array(C, 2, 3, 3), **norm("n")}, {}),
    "transposed": (
        f"a = ConvTranspose <strides=[2,2], {PADS}, output_padding=[1,1]> (x, w, b)\n y = {BN.format('a', 'n')}",
        {**CONVS, **norm("n")}, {}),
    "a pad of its own": (f'p = Pad <mode="constant"> (x, pads)\n a = Conv (p, w, b)\n y = {BN.format("a", "n")}',
                         {"pads": np.array([0, 0, 1, 2, 0, 0, 1, 0]), **CONVS, **norm("n")}, {}),
    "reflection": ('a = Conv (x, v, b)\n p = Pad <mode="reflect"> (a, pads)\n y = Conv (p, w)',
                   {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), **CONVS}, {}),
    "average pooling": (f"a = Conv (x, v)\n p = AveragePool <kernel_shape=[3,3], {PADS}, count_include_pad=1> (a)\n"
                        f" d = Conv <{PADS}> (x, w)\n y = Add (p, d)", CONVS, {}),
    "concatenated": (f"a = Conv <{PADS}> (x, w)\n c = Conv <{PADS}> (x, k)\n d = Concat <axis=1> (a, c)\n"
                     f" y = {BN.format('d', 'n')}", {**CONVS, "k": array(C, C, 3, 3), **norm("n", 2 * C)}, {}),
    "split": (f"l, r = Split <axis=1> (x)\n a = Conv <{PADS}> (l, w)\n c = Conv <{PADS}> (r, v)\n"
              " y = Concat <axis=1> (a, c)", {"w": array(2, 2, 3, 3), "v": array(2, 2, 3, 3)}, {"opset": 13}),
    "slices": ("l = Slice (x, zero, two, one)\n a = Conv (l, w)\n r = Slice (x, two, four, one)\n c = Conv (r, v)\n"
               " y = Add (a, c)",
               {"w": array(C, 2, 3, 3), "v": array(C, 2, 3, 3), "zero": np.array([0]), "one": np.array([1]),
                "two": np.array([2]), "four": np.array([4])}, {}),
    "gathered channels": ("a = Conv (x, w)\n g = Gather <axis=1> (a, i)\n y = Mul (g, s)",
                          {**CONVS, "i": np.array([2, -1, 0, 1]), "s": array(1, C, 1, 1)}, {}),
    "NHWC": (f"t = Transpose <perm=[0,3,1,2]> (x)\n a = Conv <{PADS}> (t, w, b)\n"
             f" c = {BN.format('a', 'n')}\n y = Transpose <perm=[0,2,3,1]> (c)",
             {**CONVS, **norm("n")}, {"shape": "N,12,12,4"}),
    "an affine map in another layout": (
        f"a = Conv <{PADS}> (x, w, b)\n t = Transpose <perm=[0,2,3,1]> (a)\n c = Mul (t, s)\n y = Add (c, b)",
        {**CONVS, "s": array(C)}, {}),
    "and back": (
        f"a = Conv <{PADS}> (x, w, b)\n t = Transpose <perm=[0,2,3,1]> (a)\n c = Mul (t, s)\n"
        " y = Transpose <perm=[0,3,1,2]> (c)", {**CONVS, "s": array(C)}, {}),
    "behind global pooling": (
        f"a = Conv <{PADS}> (x, w, b)\n p = GlobalAveragePool (a)\n y = {BN.format('p', 'n')}",
        {**CONVS, **norm("n")}, {}),
    "behind a shuffle of pixels": (
        f"a = Conv <{PADS}> (x, w)\n p = DepthToSpace <blocksize=2, mode=\"CRD\"> (a)\n y = {BN.format('p', 'n')}",
        {"w": array(4 * C, C, 3, 3), **norm("n")}, {}),
    "Gemm twice": ("a = Gemm <transB=1> (x, w, b)\n y = Gemm <alpha=2.0, beta=0.5> (a, v, c)",
                   {"w": array(8, C), "v": array(8, 3), "b": array(8), "c": array(1, 3)}, {"shape": "N,4"}),
    "MatMul and Add": ("a = MatMul (x, w)\n c = Add (a, b)\n d = MatMul (c, v)\n y = Add (d, e)",
                       {"w": array(C, 16), "b": array(16), "v": array(16, C), "e": array(C)}, {"shape": "N,7,4"}),
    "nothing in between": (f"a = Conv <{PADS}> (x, w, b)\n i = Identity (a)\n k, m = Dropout (i)\n"
                           f" y = {BN.format('k', 'n')}", {**CONVS, **norm("n")}, {}),
    "an old operator set": (f"a = Conv <{PADS}> (x, w, b)\n"
                            " y = BatchNormalization <momentum=0.9, spatial=1> (a, n_scale, n_shift, n_mean, n_var)",
                            {**CONVS, **norm("n")}, {"opset": 7, "ir_version": 3}),
    "the newest one": (ONE, {**CONVS, **norm("n")}, {"opset": onnx.defs.onnx_opset_version(), "ir_version": 10}),
}  # fmt: skip


MOVED = ("NHWC", "reflection", "an affine map in another layout", "and back", "behind global pooling",
         "behind a shuffle of pixels")  # fmt: skip
ZERO = "z = ConstantOfShape (channels)"
CASES |= {
    "a bias that is computed": (f"{ZERO}\n a = Conv <{PADS}> (x, w, z)\n y = {BN.format('a', 'n')}",
                                {**CONVS, "channels": np.array([C]), **norm("n")}, {}),
    "a bias of the kind of its input": (
        f"size = Shape <start=0, end=1> (w)\n c = CastLike (half, x)\n z = Expand (c, size)\n"
        f" a = Conv <{PADS}> (x, w, z)\n c2 = CastLike (half, a)\n z2 = Expand (c2, size)\n"
        " y = Conv (a, v, z2)",
        {**CONVS, "half": np.array(0.5, dtype=np.float16)},
        {"opset": 17}),
    "a kernel that is computed": (
        "p = Reshape (w, rows)\n q = MatMul (p, d)\n r = Reshape (q, kernel)\n k = Transpose <perm=[1,0,2,3]> (r)\n"
        f" a = Conv <{PADS}> (x, k)\n y = {BN.format('a', 'n')}",
        {"w": array(C, C, 3, 3), "d": array(9, 9), "rows": np.array([16, 9]), "kernel": np.array([C, C, 3, 3]),
         **norm("n")}, {}),
    "an einsum of weights": (
        'k = Einsum <equation="oc,cihw->oihw"> (m, w)\n'
        f" a = Conv <{PADS}> (x, k)\n y = {BN.format('a', 'n')}",
        {"w": array(C, C, 3, 3), "m": array(C, C), **norm("n")}, {}),
}  # fmt: skip


TWO = np.array([1, 1, 2, 3], dtype=np.float32)
RESIZED = {
    "nearest": 'Resize <mode="nearest"> (a, , s)',
    "nearest, from the corner": (
        'Resize <mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"> (a, , s)'
    ),
    "linear": 'Resize <mode="linear"> (a, , s)',
    "linear, between corners": 'Resize <mode="linear", coordinate_transformation_mode="align_corners"> (a, , s)',
    "to a size": 'Resize <mode="nearest"> (a, , , z)',
}
UPSIZED = {"s": TWO, "z": np.array([2, C, 24, 36])}
CASES |= {
    f"behind a resize, {name}": (f"a = Conv <{PADS}> (x, w, b)\n u = {code}\n y = {BN.format('u', 'n')}",
                                 {**CONVS, **norm("n"), **UPSIZED}, {"shape": "2,4,12,12"})
    for name, code in RESIZED.items()
}  # fmt: skip
CASES["behind an upsampling of old"] = (
    f"a = Conv <{PADS}> (x, w, b)\n u = Upsample <mode=\"nearest\"> (a, s)\n y = {BN.format('u', 'n')}",
    {**CONVS, **norm("n"), "s": TWO}, {"opset": 9})  # fmt: skip
CASES["behind a resize of operator set 10"] = (
    f"a = Conv <{PADS}> (x, w, b)\n u = Resize <mode=\"nearest\"> (a, s)\n y = {BN.format('u', 'n')}",
    {**CONVS, **norm("n"), "s": TWO}, {"opset": 10})  # fmt: skip
CASES["behind an identity and a resize"] = (
    f"a = Conv <pads=[0,1,2,1]> (x, w)\n i = Identity (a)\n u = Resize <mode=\"nearest\"> (i, , s)\n"
    f" y = {BN.format('u', 'n')}", {**CONVS, **norm("n"), "s": TWO}, {})  # fmt: skip
CASES["a product of rows, transposed"] = (
    f"a = MatMul (x, m)\n t = Transpose <perm=[0,2,1]> (a)\n y = {BN.format('t', 'n')}",
    {"m": array(6, C), **norm("n")}, {"shape": "N,7,6"})  # fmt: skip
OPEN = "N,4,H,W"
RULED = {
    "padded by a rule": ('Conv <auto_pad="SAME_UPPER", strides=[2,2]>', 1, OPEN),
    "padded by a rule, in groups": ('Conv <auto_pad="SAME_LOWER", strides=[2,1], group=2>', 2, OPEN),
    "transposed, uneven": ("ConvTranspose <strides=[2,2], pads=[1,0,0,1], output_padding=[1,0]>", 1, OPEN),
    "transposed by a rule": ('ConvTranspose <strides=[3,3], auto_pad="SAME_LOWER", group=2>', 2, OPEN),
    "transposed to a size": ("ConvTranspose <strides=[2,2], output_shape=[24,23]>", 1, "N,4,12,12"),
    "transposed in groups": ("ConvTranspose <strides=[2,2], group=2>", 2, OPEN),
}
CASES |= {
    name: (f"a = {code} (x, w, b)\n y = {BN.format('a', 'n')}",
           {"w": array(C, C // groups, 3, 3), "b": array(C), **norm("n")}, {"shape": shape})
    for name, (code, groups, shape) in RULED.items()
}  # fmt: skip


def loaded(made: onnx.ModelProto, tmp_path: Path) -> Any:
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    return reparam.onnx.load(path)


def make(name: str, *, constants: bool = False) -> onnx.ModelProto:
    code, weights, options = CASES[name]
    return model(code, weights, constants=constants, **options)


def operators(made: Any) -> list[str]:
    return [node.op_type for node in made.graph if node.op_type != "Constant"]


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_region_becomes_one_operator(name: str, constants: bool, tmp_path: Path) -> None:
    source = loaded(make(name, constants=constants), tmp_path)
    before = onnx.ModelProto.FromString(ir.to_proto(source).SerializeToString())
    result, report = reparam.onnx.collapse_with_report(source)
    assert ir.to_proto(source) == before, "the caller's model was changed"
    assert len(report.folds) == 1, report
    assert not report.taken_back
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    kinds = operators(result)
    movement = (
        {"Transpose", "Pad", "GlobalAveragePool", "DepthToSpace"}
        if name == "a product of rows, transposed" or name in MOVED
        else {"Resize", "Upsample", "Identity"}
    )
    layers = [kind for kind in kinds if kind not in movement]
    assert layers in (["Conv"], ["ConvTranspose"], ["Gemm"], ["MatMul", "Add"]), kinds
    assert [v.name for v in result.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    reparam.onnx.save(result, tmp_path / "out.onnx")
    again, second = reparam.onnx.collapse_with_report(tmp_path / "out.onnx")
    assert second.folds == []
    reparam.onnx.save(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    left = {value.name for value in result.graph.initializers.values()}
    used = {value.name for node in result.graph for value in node.inputs if value is not None}
    unread = {t.name for t in before.graph.initializer} - {name for n in before.graph.node for name in n.input}
    assert left <= used | unread, "weights that nothing reads any more"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("one weight twice", "split", "in place")])
def test_what_torch_exports_folds_as_the_module_does(name: str, tmp_path: Path) -> None:
    network, x = build(name), maps()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, optimize=False, verbose=False)
    assert program is not None
    program.save(tmp_path / "net.onnx")
    report = reparam.onnx.collapse_with_report(tmp_path / "net.onnx")
    assert len(report[1].folds) == len(reparam.explain(network, x).folds)
    assert reparam.onnx.verify(network, report[0]).ok


# ------------------------------------------------------------------ what stays


def test_biases_of_zeros_that_an_exporter_computes(tmp_path: Path) -> None:
    """Unoptimised, torch writes them as four operators for each convolution."""
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)]
    network = ready(nn.Sequential(*layers, nn.BatchNorm2d(8)))
    x = torch.randn(1, 3, 16, 16)
    program = torch.onnx.export(network, (x,), dynamo=True, optimize=False, verbose=False, external_data=False)
    assert program is not None
    program.save(tmp_path / "raw.onnx")
    folded, report = reparam.onnx.collapse_with_report(tmp_path / "raw.onnx")
    assert operators(folded) == ["Conv", "Relu", "Conv"]
    assert report.notes == []
    assert reparam.onnx.verify(network, folded).verdict is Verdict.EQUAL


def test_what_is_computed_stays_where_others_read_it(tmp_path: Path) -> None:
    """The size of a value inside of a region, and a bias that two layers share."""
    code = (
        f"a = Conv <{PADS}> (x, w)\n c = {BN.format('a', 'n')}\n like = CastLike (one, a)\n"
        f" z = Expand (like, channels)\n r = Relu (c)\n d = Conv (r, v, z)\n"
        f" e = {BN.format('d', 'm')}\n f = Conv (e, u, z)\n y = Relu (f)"
    )
    numbers = {"one": np.array([1.0]), "channels": np.array([C]), "u": array(C, C, 1, 1)}
    source = loaded(model(code, {**CONVS, **numbers, **norm("n"), **norm("m")}), tmp_path)
    folded, report = reparam.onnx.collapse_with_report(source)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert len(report.folds) == 1
    assert any("kind or the shape of a is asked for" in str(refusal) for refusal in report.refusals)
    reparam.onnx.save(folded, tmp_path / "folded.onnx")
    assert reparam.onnx.verify(tmp_path / "model.onnx", tmp_path / "folded.onnx").verdict is Verdict.EQUAL


SCALARS = {"root": np.array(2.0**0.5, dtype=np.float32), "one": np.array(1, dtype=np.float32),
           "half": np.array(0.5, dtype=np.float32), "two": np.array(2, dtype=np.float32),
           "eps": np.array(1e-6, dtype=np.float32)}  # fmt: skip
FUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "GELU, half behind": (
        "h = Div (x, root)\n e = Erf (h)\n p = Add (e, one)\n m = Mul (x, p)\n g = Mul (m, half)\n y = Conv (g, v)",
        {"v": array(C, C, 1, 1)}, "Gelu", "N,4,12,12"),
    "GELU, half before": (
        "h = Div (x, root)\n e = Erf (h)\n p = Add (e, one)\n m = Mul (x, half)\n g = Mul (m, p)\n y = Conv (g, v)",
        {"v": array(C, C, 1, 1)}, "Gelu", "N,4,12,12"),
    "layer norm": (
        "u = ReduceMean <axes=[-1]> (x)\n d = Sub (x, u)\n q = Pow (d, two)\n r = ReduceMean <axes=[-1]> (q)\n"
        " s = Add (r, eps)\n t = Sqrt (s)\n n = Div (d, t)\n k = Mul (n, gamma)\n l = Add (k, beta)\n"
        " y = MatMul (l, w)",
        {"gamma": positive(C), "beta": array(C), "w": array(C, 8)}, "LayerNormalization", "N,7,4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_what_runtimes_run_as_one_operator_stays_whole(name: str, tmp_path: Path) -> None:
    """A factor of a GELU is no free gain: without it onnxruntime runs five operators instead of one."""
    code, numbers, kind, shape = FUSED[name]
    source = loaded(model(code, {**numbers, **SCALARS}, shape=shape), tmp_path)
    folded = reparam.onnx.collapse(source)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_run.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(ir.to_proto(folded).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert kind in [node.op_type for node in onnx.load(tmp_path / "as_run.onnx").graph.node]


BOMBS = {
    "Expand": ("z = Expand (s, big)\n r = ReduceSum <keepdims=0> (z)", {"s": array(1), "big": np.array([1 << 40])}),
    "Tile": ("z = Tile (s, big)\n r = ReduceSum <keepdims=0> (z)", {"s": array(1), "big": np.array([1 << 40])}),
    "ConstantOfShape": ("z = ConstantOfShape (big)\n r = ReduceSum <keepdims=0> (z)", {"big": np.array([1 << 40])}),
    "a table": ("z = Mul (s, t)\n r = ReduceSum <keepdims=0> (z)", {"s": array(1 << 20, 1), "t": array(1, 1 << 20)}),
    "a product": ("z = MatMul (s, t)\n r = ReduceSum <keepdims=0> (z)",
                  {"s": array(1 << 20, 1), "t": array(1, 1 << 20)}),
    "an einsum": ('z = Einsum <equation="i,j->ij"> (s, t)\n r = ReduceSum <keepdims=0> (z)',
                  {"s": array(1 << 20), "t": array(1 << 20)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_constants_that_take_all_memory_stay_operators(name: str, tmp_path: Path) -> None:
    code, numbers = BOMBS[name]
    source = loaded(model(f"{code}\n a = Conv <{PADS}> (x, w)\n c = {BN.format('a', 'n')}\n y = Add (c, r)",
                          {**CONVS, **numbers, **norm("n")}), tmp_path)  # fmt: skip
    report = reparam.onnx.explain(source)
    assert len(report.folds) == 1


def test_weights_that_are_kept_small_stay_so(tmp_path: Path) -> None:
    """Numbers of eight bits are no floats that a fold could change: the norm behind them stays, and says why."""
    numbers = {"q": RNG.integers(-9, 9, (C, C, 3, 3)).astype(np.int8), "s": np.array(0.1, dtype=np.float32)}
    code = f"w = DequantizeLinear (q, s)\n a = Conv <{PADS}> (x, w)\n y = {BN.format('a', 'n')}"
    source = loaded(model(code, {**numbers, **norm("n")}), tmp_path)
    folded, report = reparam.onnx.collapse_with_report(source)
    assert not report.folds
    assert operators(folded) == ["DequantizeLinear", "Conv", "BatchNormalization"]
    assert "DequantizeLinear" in " ".join([*report.notes, *map(str, report.refusals)])


def test_everything_else_stays_byte_for_byte(tmp_path: Path) -> None:
    made = make("two branches")
    made.graph.node[-1].output[0] = "s"
    more = onnx.parser.parse_graph(
        "g (float[N,4,12,12] s) => (float[] y) { r = Relu (s)\n q = other.Thing <size=3> (r)\n y = Sigmoid (q) }"
    )
    made.graph.node.extend(more.node)
    made.graph.node[-2].doc_string = "kept"
    made.graph.node[-1].name = "last"
    made.graph.doc_string, made.producer_name, made.producer_version = "a graph", "somebody", "7"
    made.metadata_props.add(key="author", value="me")
    made.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["N", 4, 12, 12]))
    made = ir.to_proto(ir.from_proto(made))  # whose way to write is the reference: it leaves out what is empty
    result, report = reparam.onnx.collapse_with_report(ir.from_proto(made))
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.INCONCLUSIVE  # onnxruntime has no other.Thing
    assert report.notes == ["not read: 1 call of other.Thing"]
    got = ir.to_proto(result)
    assert [n.SerializeToString() for n in got.graph.node[1:]] == [n.SerializeToString() for n in made.graph.node[-3:]]
    assert got.graph.node[0].output[0] == "s"
    for name in ("doc_string", "producer_name", "producer_version", "ir_version", "metadata_props", "opset_import"):
        assert getattr(got, name) == getattr(made, name)
    assert (got.graph.doc_string, got.graph.name) == (made.graph.doc_string, made.graph.name)
    assert got.graph.input == made.graph.input
    assert "r" in {value.name for value in got.graph.value_info}


def test_branches_inside_of_an_operator_are_left_alone_and_see_the_same_values(tmp_path: Path) -> None:
    code = f"""a = Conv <{PADS}> (x, w, b)
        c = {BN.format("a", "n")}
        f = ReduceMax <keepdims=0> (x)
        t = Greater (f, zero)
        y = If (t) <then_branch = g () => (float[] p) {{ p = Relu (a) }},
                    else_branch = h () => (float[] q) {{ q = Add (c, a) }}>"""
    weights = {**CONVS, **norm("n"), "zero": np.float32(0).reshape(())}
    result, report = reparam.onnx.collapse_with_report(loaded(model(code, weights), tmp_path))
    assert report.folds == []  # the norm's input is read inside
    assert operators(result) == ["Conv", "BatchNormalization", "ReduceMax", "Greater", "If"]
    only_result = code.replace("Relu (a)", "Relu (c)").replace("Add (c, a)", "Add (c, c)")
    result, report = reparam.onnx.collapse_with_report(loaded(model(only_result, weights), tmp_path))
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert operators(result) == ["Conv", "ReduceMax", "Greater", "If"]


def test_an_output_of_the_graph_stays_one(tmp_path: Path) -> None:
    made = make("convolution and norm")
    made.graph.output.append(value("a"))
    result, report = reparam.onnx.collapse_with_report(loaded(made, tmp_path))
    assert [v.name for v in result.graph.outputs] == ["y", "a"]
    assert report.folds == []


def test_a_weight_that_a_caller_may_replace_is_none(tmp_path: Path) -> None:
    made = make("convolution and norm")
    made.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [C, C, 3, 3]))
    assert reparam.onnx.explain(loaded(made, tmp_path)).folds == []


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_other_kinds_of_floats(kind: int, tmp_path: Path) -> None:
    made = make("convolution and norm")
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in made.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (made.graph.input[0], made.graph.output[0]):
        value.type.tensor_type.elem_type = kind
    result, report = reparam.onnx.collapse_with_report(ir.from_proto(made))
    assert len(report.folds) == 1
    assert {v.dtype for v in result.graph.initializers.values()} == {ir.DataType(kind)}


def test_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(make("two branches"), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result, report = reparam.onnx.collapse_with_report(path)
    assert len(report.folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    out = tmp_path / "elsewhere"
    out.mkdir()
    reparam.onnx.save(result, out / "small.onnx")
    assert reparam.onnx.verify(out / "small.onnx", path).verdict is Verdict.EQUAL
    assert sorted(p.name for p in out.iterdir()) in (["small.onnx"], ["small.onnx", "small.onnx.data"])


def test_a_model_that_no_message_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Over 2 GB: run and compared by way of files, and saved with its weights beside it."""
    source = loaded(make("two branches"), tmp_path)
    monkeypatch.setattr(files, "LARGEST", 100)
    folded, report = reparam.onnx.collapse_with_report(source)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    reparam.onnx.save(folded, tmp_path / "large.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "large.onnx", "large.onnx.data"}
    assert reparam.onnx.verify(tmp_path / "large.onnx", source).verdict is Verdict.EQUAL


def test_a_model_that_a_person_has_edited_is_saved_as_it_is(tmp_path: Path) -> None:
    source = loaded(make("two branches"), tmp_path)
    source.graph.doc_string = "edited"
    reparam.onnx.save(source, tmp_path / "out.onnx")
    assert reparam.onnx.load(tmp_path / "out.onnx").graph.doc_string == "edited"


# ------------------------------------------------------------------ proof


def test_a_wrong_reading_is_no_wrong_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof replays the operators of the file, and not what they were taken for."""
    from passes.onnx import read

    monkeypatch.setitem(read._RULES, "Sub", read._RULES["Add"])
    result, report = reparam.onnx.collapse_with_report(loaded(make("their difference"), tmp_path))
    assert "Sub" in operators(result)
    assert report.taken_back


def test_a_wrong_edit_is_taken_back_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from passes.onnx import write

    right = write._Writer.conv

    def wrong(self: Any, layer: Any, x: Any, pads: Any) -> Any:
        if layer.groups == C:
            layer.bias = None
        return right(self, layer, x, pads)

    code = f"""a = Conv <{PADS}> (x, w, b)
        c = {BN.format("a", "n")}
        r = Relu (c)
        d = Conv <{PADS}, group=4> (r, k, b)
        y = {BN.format("d", "m")}"""
    source = loaded(model(code, {**CONVS, "k": array(C, 1, 3, 3), **norm("n"), **norm("m")}), tmp_path)
    monkeypatch.setattr(write._Writer, "conv", wrong)
    result, report = reparam.onnx.collapse_with_report(source)
    assert (len(report.folds), len(report.taken_back)) == (1, 1)
    assert operators(result) == ["Conv", "Relu", "Conv", "BatchNormalization"]
    with pytest.raises(EquivalenceError, match="differs"):
        reparam.onnx.collapse(source, strict=True)


def test_without_onnxruntime_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError

    monkeypatch.setattr("passes.onnx.collapse.run_file", missing)
    report = reparam.onnx.collapse_with_report(loaded(make("two branches"), tmp_path))[1]
    assert len(report.folds) == 1
    assert "onnxruntime is not installed" in str(report.checked)
    assert replay.run_file is not missing


def test_inputs_of_the_caller(tmp_path: Path) -> None:
    source = loaded(make("two branches"), tmp_path)
    inputs = {"x": RNG.standard_normal((3, C, 12, 12)).astype(np.float32)}
    report = reparam.onnx.collapse_with_report(source, inputs=inputs)[1]
    assert "inputs 3x4x12x12" in str(report.checked)
    with pytest.raises(ReparamError, match="rejects these inputs"):
        reparam.onnx.collapse(source, inputs={"x": np.zeros((1, 2), np.float32)})


# ------------------------------------------------------------------ bad files


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def text(path: Path) -> None:
    path.write_text("this is no model")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def changed(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        made = onnx.load(path)
        change(made)
        path.write_bytes(made.SerializeToString())

    return damage


@changed
def unknown_opset(made: onnx.ModelProto) -> None:
    made.opset_import[0].version = 999


@changed
def old_opset(made: onnx.ModelProto) -> None:
    made.opset_import[0].version = 5


@changed
def cyclic(made: onnx.ModelProto) -> None:
    made.graph.node[0].input[0] = made.graph.node[-1].output[0]


@changed
def contradictory(made: onnx.ModelProto) -> None:
    made.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 99, 3]))


def external(location: str) -> Callable[[Path], None]:
    @changed
    def damage(made: onnx.ModelProto) -> None:
        tensor = made.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, location=location)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL

    return damage


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "no ONNX file, or a damaged one"),
    "text": (text, "no ONNX file, or a damaged one"),
    "empty": (nothing, "holds no ONNX graph"),
    "unknown operator set": (unknown_opset, r"operator set 999; the installed onnx knows up to \d+: pip install -U"),
    "old operator set": (old_opset, "operator set 5, from before 7: convert it with onnx.version_converter"),
    "cycle": (cyclic, "the graph has a cycle"),
    "contradictory": (contradictory, "contradicts itself"),
    "missing weights": (external("weights.bin"), "the file 'weights.bin' with the weight 'w' is missing"),
    "weights of another folder": (external("../weights.bin"), "from outside of its folder"),
    "weights of the system": (external("/etc/passwd"), "from outside of its folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_line_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    damage, message = BAD[name]
    path = tmp_path / "model.onnx"
    onnx.save(make("convolution and norm"), path)
    damage(path)
    with pytest.raises(FileError, match=message) as caught:
        reparam.onnx.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    done = CliRunner().invoke(app, ["collapse", str(path), "-o", str(tmp_path / "out.onnx")])
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# ------------------------------------------------------------------ command line


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands(tmp_path: Path) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    onnx.save(make("two branches"), path)
    done = run("explain", path)
    assert done.exit_code == 0
    assert "Conv2d(4 -> 4, 3x3)" in done.output
    done = run("collapse", path, "-o", out)
    assert done.exit_code == 0, done.output
    assert "proven: 1 of 1 folds" in done.output
    assert "onnxruntime" in done.output
    done = run("verify", path, out)
    assert (done.exit_code, done.output[:5]) == (0, "equal")
    onnx.save(make("their difference"), path)
    assert run("verify", path, out).exit_code == 1
    assert run("collapse", path, "-o", tmp_path / "out.pt").exit_code == 2
    done = run("collapse", path, "--pretrained")
    assert done.exit_code == 2
    assert "an ONNX file has its weights" in " ".join(done.stderr.split())


def test_inspect(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    quantised = {"q": np.array([1, -2], dtype=np.int8)}
    onnx.save(model(ONE, {**CONVS, **norm("n"), **quantised}), path)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    for text in ("n_scale", "4×4×3×3", "int8", "1 Conv, 1 BatchNormalization", "ai.onnx 17", "x: FLOAT[N,4,12,12]"):
        assert text in result.output, result.output
    assert "--key" in CliRunner().invoke(app, ["inspect", str(path), "--key", "model"]).output


def test_a_network_against_its_file(tmp_path: Path) -> None:
    network = build("two branches")
    result = ir.from_proto(make("two branches"))
    assert not reparam.onnx.verify(network, result).ok
    with pytest.raises(ReparamError, match="one is an ONNX model"):
        reparam.onnx.verify(network, network)


def test_the_verb_for_modules_names_the_right_call() -> None:
    for wrong in ("model.onnx", Path("model.onnx"), make("two branches"), ir.from_proto(make("two branches"))):
        with pytest.raises(ReparamError, match=r"reparam\.onnx"):
            reparam.collapse(wrong)  # type: ignore[type-var]


def test_a_file_tells_of_weights_what_it_told_before_and_no_more(tmp_path: Path) -> None:
    """onnx-ir would tell the shape of every weight twice; new operators say nothing that is so anyway."""
    made = make("two branches")
    made.graph.node[-1].output[0] = "s"
    made.graph.node.extend([helper.make_node("Conv", ["s", "u"], ["y"], name="last"),
                            helper.make_node("Identity", ["s"], ["z"])])  # fmt: skip
    made.graph.node[-2].name, made.graph.node[0].name = "last", "first"
    made.graph.output.append(value("z"))
    for name, shape in (("u", (C, C, 5, 5)), ("k", (3,))):
        made.graph.initializer.append(numpy_helper.from_array(array(*shape), name))
        if name == "u":
            made.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(made, tmp_path / "model.onnx")
    reparam.onnx.save(reparam.onnx.collapse(tmp_path / "model.onnx"), tmp_path / "out.onnx")
    got = onnx.load(tmp_path / "out.onnx")
    assert {v.name for v in got.graph.value_info if v.name in {t.name for t in got.graph.initializer}} == {"u"}
    assert [node.name for node in got.graph.node] == ["first", "last", ""], "a layer keeps the name of the one it was"
    assert {a.name for a in got.graph.node[0].attribute} == {"kernel_shape", "pads"}
    assert got.graph.node[1] == made.graph.node[-2]


SMALL = {"q": np.ones((C, C, 3, 3), dtype=np.int8), "step": np.float32(0.1).reshape(())}
LEFT = {
    "a weight that is kept small": ("k = DequantizeLinear (q, step)\n a = Conv (x, k)", "N,4,12,12", "is no constant"),
    "no weight of a known shape": ("k = other.Kernel (w)\n a = Conv (x, k)", "N,4,12,12", "the shape of its weight"),
    "an operator of another domain": ("a = other.Conv (x, w)", "N,4,12,12", "this other.Conv is not read"),
    "averages by a rule": ('a = AveragePool <kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER"> (x)', OPEN,
                           "depends on the size of its input"),
    "another interpolation": ('c = Conv (x, w)\n a = Resize <mode="cubic"> (c, , s)', OPEN, "places pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_norm_behind_what_was_not_read_says_so(name: str, tmp_path: Path) -> None:
    """That it follows no convolution is what nobody knows."""
    code, shape, why = LEFT[name]
    made = model(f"{code}\n y = {BN.format('a', 'n')}", {**CONVS, **norm("n"), "s": TWO, **SMALL}, shape=shape)
    report = reparam.onnx.explain(loaded(made, tmp_path))
    assert report.folds == []
    (said,) = [refusal for refusal in report.refusals if refusal.layer == "y"]
    assert said.message.startswith("it follows a, which is left alone: ")
    assert why in said.message


def test_a_convolution_that_pads_by_a_rule_keeps_it(tmp_path: Path) -> None:
    result = reparam.onnx.collapse(loaded(make("padded by a rule, in groups"), tmp_path))
    (node,) = result.graph
    assert {name: each.value for name, each in node.attributes.items()} == {
        "auto_pad": "SAME_LOWER", "strides": (2, 1), "group": 2,
    }  # fmt: skip
