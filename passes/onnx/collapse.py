"""Collapse of ONNX models: what folds, and the comparison of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, nn
from torch.nn import functional as F

from passes.compiler import clock
from passes.edits.edit import Substitute
from passes.fold.candidates import Candidate
from passes.fold.rules import DEFAULT, Rules
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example, likely, tensors_in
from passes.onnx.constants import Constants, constant_of, opset_of
from passes.onnx.files import names_of
from passes.onnx.patterns import fused_by_runtimes
from passes.onnx.read import DTYPES, Read, read
from passes.onnx.replay import Region, run_file
from passes.onnx.write import substitute
from passes.programs import Compilation, collapse_graph, counts_of, unit_of
from passes.proof.check import Checked
from passes.proof.compare import Comparison, Difference, Verdict, compared, judge
from passes.proof.hold import Ledger
from passes.proof.run import outputs
from passes.refusal import Reason, Refusal, ReparamError
from passes.report import Counts, Explanation

__all__ = ["collapse_model", "compare_models", "compare_with_module", "explain_model", "made_up"]

BATCHES, SIZES = (2, 1), (64, 224, 32, 640)
"""Sizes that are tried where a file leaves them open."""

Inputs = Mapping[str, Any]


def explain_model(model: ir.Model, rules: Rules = DEFAULT) -> Explanation:
    """Decide as :func:`collapse_model` does, and stop before the edits."""
    return _Compilation(model, Ledger(prove=False, rules=rules)).explanation


def collapse_model(
    model: ir.Model,
    *,
    inputs: Inputs | None = None,
    verify: bool | str = True,
    strict: bool = False,
    rules: Rules = DEFAULT,
) -> tuple[ir.Model, Explanation]:
    """Fold every region of a model that is one convolution.

    Args:
        model: not changed.
        inputs: arrays by name to compare the whole on; made up from the declared shapes otherwise.
        verify: as for a module.
        strict: as for a module.
        rules: what may fold.
    """
    ledger = Ledger(prove=bool(verify), strict=strict, rules=rules)
    return collapse_graph(_Compilation(model, ledger), example=inputs, verify=verify, strict=strict)


class _Compilation(Compilation[ir.Model]):
    """An ONNX model."""

    def __init__(self, model: ir.Model, ledger: Ledger) -> None:
        explanation = Explanation(seconds=dict.fromkeys(("trace", "plan", "fold", "proof"), 0.0))
        with clock(explanation, "trace"):
            self.model = model
            self.values: dict[str, ir.Value] = {str(v.name): v for v in model.graph.inputs}
            self.values |= {str(v.name): v for node in model.graph for v in node.outputs}
            self.constants, found = _read(model)
            self.fused = fused_by_runtimes(model.graph, self.constants)
            unit = unit_of(found.graph, found.numbers, found.told)
        super().__init__(unit, found.names, found.numbers, found.unread, (), ledger, explanation)

    def substituted(self, edits: Iterable[tuple[Substitute, nn.Module]]) -> tuple[ir.Model, Counts]:
        chosen = list(edits)
        matrices = [self.names[fold.candidate.entry] for fold in self.folds if self._is_matrix(fold.candidate)]
        result = substitute(self.model, chosen, matrices) if chosen else self.model
        found = _read(result)[1]
        return result, counts_of(Flow(unit_of(found.graph, found.numbers, {}), {}))

    def guard(self, candidate: Candidate) -> Refusal | None:
        """A product and a sum of more than matrices are two operators, before and after; and who else asks for kinds.

        What is only read for its kind or its shape is not seen in the graph of numbers.
        """
        dying = {self.names[node] for node in candidate.dying if node in self.names}
        for name in dying:
            node = self.values[name].producer()
            if node in self.fused:
                return Refusal(Reason.FUSED, f"{Reason.FUSED.value}: {self.fused[node]}")
        moved = {self.names[node] for node in candidate.moved if node in self.names}
        gone = {*self.gone(self.names[candidate.entry], dying, moved), self.names[candidate.result], *moved}
        for name in (dying | moved) - {self.names[candidate.result]}:
            uses = [use.node for use in self.values[name].uses()]
            if any(all(str(value.name) not in gone for value in node.outputs) for node in uses):
                return Refusal(Reason.SHARED, f"the kind or the shape of {name} is asked for")
        linear = candidate.form.n == 0 and not self._is_matrix(candidate) and candidate.spread is None
        linear = linear and not any(node.target is F.batch_norm for node in candidate.dying)
        if linear and len(candidate.convs) == 1 and len(candidate.dying) <= 1 + (candidate.form.bias is not None):
            return Refusal(Reason.LAYOUT, "it is written in as few operators already")
        return None

    def taken(self) -> set[str]:
        return names_of(self.model)

    def _is_matrix(self, candidate: Candidate) -> bool:
        return self.flow.rank.get(candidate.entry) == 2

    def compared(self, result: ir.Model, example: Any) -> Checked:
        return compare_models(self.model, result, example)

    def gone(self, entry: str, dying: Collection[str], staying: Collection[str] = ()) -> tuple[str, ...]:
        gone = {node for name in dying if (node := self.values[name].producer()) is not None}
        todo = list(gone)
        while todo:
            for source in todo.pop().inputs:
                node = None if source is None or source.name in {entry, *staying} else source.producer()
                if node is None or node in gone or constant_of(source) is not None:
                    continue  # what is written down goes with the last that reads it
                uses = [use.node for value in node.outputs for use in value.uses()]
                if gone.issuperset(uses) and not any(value.is_graph_output() for value in node.outputs):
                    gone.add(node)
                    todo.append(node)
        return tuple(str(node.outputs[0].name) for node in self.model.graph if node in gone)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """``Resize`` and ``Reshape`` may have sizes that stand in the file; the batch's is two where it is open."""
        shape = self.constants.shape(self.values[name])
        if not shape or any(size is None for size in shape[1:]):
            return None
        return (shape[0] or 2, *(size or 0 for size in shape[1:]))

    def replay(self, given: Sequence[Mapping[str, Tensor]], result: str) -> list[tuple[Tensor, float]]:
        region = Region(self.model, self.constants, [self.values[name] for name in given[0]], self.values[result])
        return [region.run(each) for each in given]


def _read(model: ir.Model) -> tuple[Constants, Read]:
    shapes = {str(v.name): v for node in _with_shapes(model).graph for v in node.outputs}
    shapes = {str(v.name): v for v in model.graph.inputs} | shapes
    overridable = (model.ir_version or 0) >= 4
    constants = Constants(model.graph, opset_of(model.opset_imports), shapes, overridable=overridable)
    return constants, read(model.graph, constants)


def _with_shapes(model: ir.Model) -> ir.Model:
    """A copy in which shapes were inferred; the model as it is where that fails."""
    copy = model.clone()
    try:
        return ShapeInferencePass()(copy).model
    # Inference fails on what it does not know, in many ways; then less is read.
    except Exception:
        return model


# ------------------------------------------------------------------ the whole


def compare_models(reference: ir.Model, candidate: ir.Model, inputs: Inputs | None = None) -> Checked:
    """Run two models by onnxruntime and compare what they return; rounding is allowed what it does to the reference.

    Raises:
        ReparamError: the reference rejects ``inputs``.
    """
    try:
        given, wanted = _observed(reference, inputs)
    except ImportError:
        return Checked(Verdict.INCONCLUSIVE, "not compared: onnxruntime is not installed (pip install 'reparam[onnx]')")
    if given is None:
        return Checked(Verdict.INCONCLUSIVE, f"not compared: {wanted}")
    shapes = ", ".join("x".join(map(str, array.shape)) or "()" for array in given.values())
    what = f"whole file, {'made-up input' if inputs is None else 'inputs'} {shapes}, onnxruntime"
    try:
        got = run_file(candidate, given)
    # Whatever the result raises, the original did not.
    except Exception as error:
        message = f"raises {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return Checked(Verdict.DIFFERENT, what, (Difference(message),))
    found: Comparison = compared(list(got), list(wanted))
    if found.differences:
        return Checked(Verdict.DIFFERENT, what, tuple(found.differences), found.max_rel)
    if not found.numbers:
        return Checked(Verdict.INCONCLUSIVE, f"{what}: it returns no numbers to compare")
    noise = compared(list(run_file(_nudged(reference), given)), list(wanted), types=False).max_rel
    dtypes = [DTYPES[number.dtype] for number in _weights(reference).values()]
    return _judged(found, noise, what, max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32))


def compare_with_module(first: Any, second: Any, inputs: Inputs | None = None) -> Checked:
    """The same where one of the two is a module, which is run in float64; the file by onnxruntime."""
    module, model = (first, second) if isinstance(first, nn.Module) else (second, first)
    if not isinstance(module, nn.Module) or not isinstance(model, ir.Model):
        raise ReparamError("of the two, one is an ONNX model and the other one or a torch.nn.Module")
    names = [str(v.name) for v in model.graph.inputs if not v.is_initializer()]
    if inputs is not None:
        arguments = tuple(torch.as_tensor(inputs[name]) for name in names if name in inputs)
        given = [Example(arguments)]
    else:
        given = [*_as_examples(model), *likely(module)]
    why = "no input could be made up"
    for example in given:
        arrays = dict(zip(names, (tensor.numpy() for tensor in example.args), strict=False))
        try:
            file, exact = run_file(model, arrays), outputs(module, example)
        except ImportError:
            return Checked(Verdict.INCONCLUSIVE, "not compared: onnxruntime is not installed")
        # Neither a module nor onnxruntime says which class of error it is that it does not take an input.
        except Exception as error:
            why = str(error).strip().splitlines()[0][:200]
            continue
        shapes = ", ".join("x".join(map(str, array.shape)) for array in arrays.values())
        wanted = [tensor.numpy() for tensor in tensors_in(exact)]
        found = compared(list(file), wanted, types=False)
        noise = compared([t.numpy() for t in tensors_in(outputs(module, example, None))], wanted, types=False).max_rel
        return _judged(found, noise, f"whole network against the file by onnxruntime, {shapes}")
    raise ReparamError(f"the two take no input in common: {why}")


def _as_examples(model: ir.Model) -> Iterator[Example]:
    for made in made_up(model):
        yield Example(tuple(torch.from_numpy(array) for array in made.values()), made_up=True)


def _judged(found: Comparison, noise: float, what: str, dtype: torch.dtype = torch.float32) -> Checked:
    """The verdict on a difference of which rounding may be the reason."""
    if found.differences:
        return Checked(Verdict.DIFFERENT, what, tuple(found.differences), found.max_rel)
    verdict = judge(found.max_rel, noise, dtype)
    said = f"{what}: largest relative difference {found.max_rel:.1g}, rounding makes {noise:.1g}"
    if verdict is Verdict.INCONCLUSIVE:
        said += ", so much that it tells nothing"
    differences: tuple[Difference, ...] = ()
    if verdict is Verdict.DIFFERENT:
        differences = (Difference(f"returns other numbers: they differ by {found.max_rel:.3g}", error=found.max_rel),)
    return Checked(verdict, said, differences, found.max_rel)


def _observed(model: ir.Model, inputs: Inputs | None) -> tuple[Inputs | None, Any]:
    """Inputs that the model takes and what it returns for them; None and why, if none could be made up."""
    if inputs is not None:
        try:
            return inputs, run_file(model, inputs)
        except ImportError:
            raise
        # onnxruntime's own exceptions have no common class.
        except Exception as error:
            raise ReparamError(f"the file rejects these inputs: {str(error).strip().splitlines()[0][:200]}") from error
    why = "no input could be made up from the shapes that the file declares"
    for made in made_up(model):
        try:
            return made, run_file(model, made)
        except ImportError:
            raise
        # onnxruntime's own exceptions have no common class.
        except Exception as error:
            why = f"no input could be made up: {str(error).strip().splitlines()[0][:200]}"
    return None, why


def made_up(model: ir.Model) -> Iterator[dict[str, Any]]:
    """Inputs of the shapes that a model declares, open sizes filled in one way after the other; may be none."""
    wanted = [v for v in model.graph.inputs if not v.is_initializer()]
    if any(v.shape is None or v.dtype is None for v in wanted):
        return
    for batch, size in itertools.product(BATCHES, SIZES):
        rng = np.random.default_rng(0)
        made = {}
        for value in wanted:
            assert value.shape is not None
            assert value.dtype is not None
            open_sizes = [batch, *[size] * len(value.shape)]
            shape = [d if isinstance(d, int) and d > 0 else open_sizes[i] for i, d in enumerate(value.shape)]
            if value.dtype not in _MADE_UP:
                return
            numbers = rng.integers(0, 2, shape) if value.dtype in _WHOLE else rng.standard_normal(shape)
            made[str(value.name)] = numbers.astype(value.dtype.numpy())
        yield made


_WHOLE = frozenset(
    {ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64}
    | {ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
)
_MADE_UP = _WHOLE | {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
"""Kinds of which numbers can be made up."""


def _nudged(model: ir.Model) -> ir.Model:
    """Move every weight by a unit in the last place, up or down: what rounding does to a file, at least."""
    copy, rng = model.clone(), np.random.default_rng(0)
    for value, number in _weights(copy).items():
        factors = 1 + torch.finfo(DTYPES[number.dtype]).eps * (rng.integers(0, 2, number.numpy().shape) * 2 - 1)
        moved = ir.tensor((number.numpy() * factors).astype(number.dtype.numpy()), dtype=number.dtype, name=value.name)
        node = value.producer()
        if node is None:
            value.const_value = moved
        elif "value" in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", moved)
    return copy


def _weights(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """The numbers that layers weigh with, by the value that holds them."""
    read = [v for node in model.graph if node.op_type in _WEIGHED for v in node.inputs[1:] if v is not None]
    found = {value: number for value in read if (number := constant_of(value)) is not None}
    return {v: number for v, number in found.items() if (dtype := DTYPES.get(number.dtype)) and dtype.is_floating_point}


_WEIGHED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
