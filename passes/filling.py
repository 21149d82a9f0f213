"""An architecture's own layers, filled so that they compute what a collapsed network does.

A class that was written for deployment often keeps more than one layer where ours has one: batch norms, layer scales,
sums. It is collapsed as well, with numbers at random, and its graph matched with that of the collapsed network; then
each of its folds is undone by numbers: one convolution carries the folded weight, norms are the identity, scales one,
shifts zero, other convolutions zero beside it and the identity in a row with it.

Every number enters a fold linearly while the others stay, so where the carrier's weight does not enter alone (``x +
conv(x)``, a mean of two heads), two evaluations of the fold tell what it has to be. What comes of it is read again from
the fold, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.algebra.lowering import Target, emit
from passes.compiler import compile_model
from passes.edits.apply import Undo
from passes.fold.candidates import layers_of
from passes.fold.folds import Fold
from passes.fold.rules import Rules
from passes.graph.copies import deep_copy
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, argument
from passes.laws.interpreter import form_of
from passes.matching import renamed
from passes.proof.hold import Exact, Ledger
from passes.refusal import RefusalError, ReparamError
from passes.report import Explanation

__all__ = ["fill", "variance_of_one"]

_KERNELS = (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR)
_AGREEMENT = 1e-9
"""Relative difference allowed between a fold of the filled layers and what it should be, both in float64."""


def fill(collapsed: nn.Module, result: nn.Module, exact: Exact, rules: Rules) -> list[str] | None:
    """Fill ``result``, in eval mode, so that it computes what ``collapsed`` does; None if their graphs differ.

    ``rules`` are those by which ``collapsed`` was folded.

    Returns:
        What a person should know.

    Raises:
        ReparamError: the graphs are the same, but a layer of ``result`` has no place for a number.
    """
    structure, keys = deep_copy(result), dict[int, str]()
    for key, tensor in structure.state_dict(keep_vars=True).items():
        keys[id(tensor)] = key
    _randomise(structure)
    ledger, undos = Ledger(prove=False, rules=rules, made=[]), list[Undo]()
    compile_model(structure, None, Explanation(), undos, ledger)
    have = renamed(collapsed, structure)
    if have is None:
        return None
    filling = _Filling(keys)
    with torch.no_grad():
        filling.take(structure.state_dict(keep_vars=True), have, exact)
        assert ledger.made is not None
        # Behind those of folds, there is one of what was settled when all was folded.
        for undo, (flow, folds) in reversed(list(zip(undos[: len(ledger.made)], ledger.made, strict=True))):
            undo()
            for fold in reversed(folds):
                filling.solve(flow, fold)
        filling.put(result, exact)
    return filling.notes


def variance_of_one(eps: float, like: Tensor) -> Tensor:
    """Running variances to which ``eps`` adds up to exactly 1, in their own dtype."""
    one = torch.ones_like(like)
    var = one - eps
    for _ in range(4):  # the subtraction rounds; step to the neighbour whose sum with eps is exactly one
        off = var + eps
        if bool((off == one).all()):
            break
        var = torch.nextafter(var, torch.where(off < one, one, -one))
    return var


def _randomise(structure: nn.Module) -> None:
    """Numbers without structure: a zero weight would look like the absence of a connection."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in structure.parameters():
            if parameter.is_floating_point():
                numbers = torch.rand(parameter.shape, generator=generator, dtype=torch.float32) + 0.5
                parameter.copy_(numbers / math.prod(parameter.shape[1:]))
        for module in structure.modules():
            for name, buffer in module._buffers.items():
                if buffer is None or not buffer.is_floating_point():
                    continue
                if name in ("running_mean", "running_var"):
                    buffer.fill_(float(name == "running_var"))
                elif not bool(buffer.isfinite().all()):  # it came from the meta device
                    buffer.copy_(torch.rand(buffer.shape, generator=generator))


@dataclass(frozen=True)
class _Roles:
    """What the tensors of a fold do in it, each by its id.

    Args:
        kernels: the weights of convolutions and linear layers, each with its node and its bias.
        scales, shifts: what should be one, and zero, where nothing is to happen.
        variances: of batch norms, with their eps.
        norm_shifts: of the shifts, those of batch norms.
    """

    kernels: list[tuple[Tensor, fx.Node, Tensor | None]] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    shifts: list[Tensor] = field(default_factory=list)
    variances: list[tuple[Tensor, float]] = field(default_factory=list)
    norm_shifts: list[Tensor] = field(default_factory=list)


class _Filling:
    """Numbers of an architecture's tensors, from those of its collapsed form back to its own."""

    def __init__(self, keys: dict[int, str]) -> None:
        self.keys = keys
        self.numbers: dict[int, Tensor] = {}
        self.shipped: dict[int, Tensor] = {}
        self.notes: list[str] = []

    def take(self, state: dict[str, Tensor], have: dict[str, Tensor], exact: Exact) -> None:
        """The numbers of the collapsed network, at the same places of the collapsed architecture."""
        for key, tensor in state.items():
            value = have.get(key)
            if value is not None and value.numel() != tensor.numel():
                raise ReparamError(f"{key} has shape {tuple(value.shape)}, but {tuple(tensor.shape)} in like=")
            if value is None:
                if not key.endswith("bias"):
                    continue
                value = torch.zeros_like(tensor)
            self.shipped[id(tensor)] = value.reshape(tensor.shape)
            if value.is_floating_point():
                self.numbers[id(tensor)] = exact.get(id(value), value.double()).reshape(tensor.shape)
        for key in have.keys() - state.keys():
            path, _, last = key.rpartition(".")
            lacks = "a bias after folding" if last == "bias" else f"a {last}"
            raise ReparamError(f"{path} has {lacks}, and like= has no layer to take it")

    def put(self, result: nn.Module, exact: Exact) -> None:
        """Copy the numbers into the architecture; raises for a tensor that nothing tells."""
        state = result.state_dict(keep_vars=True)
        for number, key in self.keys.items():
            into = state[key]
            if number in self.shipped:
                into.copy_(self.shipped[number])
            elif number in self.numbers:
                into.copy_(self.numbers[number])
            elif into.is_floating_point():
                raise ReparamError(f"the collapsed network lacks {key} of like=: nothing in it stands there")
            if into.is_floating_point():
                exact.put(into, self.numbers[number])

    # ------------------------------------------------------------------ one fold

    def solve(self, flow: Flow, fold: Fold) -> None:
        """The numbers of a fold's layers, so that it becomes the layer that is known."""
        assert fold.layer is not None  # no map goes into several layers where regions are whole
        wanted = {name: self.numbers[id(p)] for name, p in fold.layer.named_parameters() if id(p) in self.numbers}
        name = ", ".join(layers_of(flow, fold.candidate))
        if len(wanted) != sum(1 for _ in fold.layer.parameters()):
            raise ReparamError(f"the collapsed network lacks {name} of like=: nothing in it stands there")
        roles = _roles(flow, fold)
        tensors = self._tensors(flow, fold)
        size = next(value for key, value in wanted.items() if key.endswith("weight")).numel()
        for kernel in sorted(roles.kernels, key=lambda kernel: -kernel[0].numel()):
            if kernel[0].numel() == size and self._try(flow, fold, roles, kernel, wanted):
                break
        else:
            fits = any(kernel[0].numel() == size for kernel in roles.kernels)
            why = (
                "no numbers were found with which they compute the same"
                if fits
                else f"none of them holds its {size} weights"
            )
            raise ReparamError(f"{name} of like= become one layer in the collapsed network, and {why}")
        for tensor in tensors:
            if not torch.equal(self.numbers.setdefault(id(tensor), tensor.data), tensor.data):
                key = self.keys[id(tensor)]
                raise ReparamError(f"{key} of like= is used in several places, which want other numbers of it")
        for variance, eps in roles.variances:
            like = torch.empty(variance.shape, dtype=next(fold.layer.parameters()).dtype, device=variance.device)
            self.shipped[id(variance)] = variance_of_one(eps, like)
        idle = [self.keys[id(w)] for w, *_ in roles.kernels if not bool(w.any())]
        if idle:
            self.notes.append(f"{', '.join(idle)} of like= hold zeros: what {name} compute is in the others")

    def _tensors(self, flow: Flow, fold: Fold) -> list[Tensor]:
        nodes = [*fold.candidate.dying, *fold.candidate.constants]
        return list({id(t): t for n in nodes for t in flow.tensors.get(n, ()) if id(t) in self.keys}.values())

    def _try(
        self,
        flow: Flow,
        fold: Fold,
        roles: _Roles,
        carrier: tuple[Tensor, fx.Node, Tensor | None],
        wanted: dict[str, Tensor],
    ) -> bool:
        """Set the numbers so that one convolution carries the fold; whether they do what they should."""
        weight, node, bias = carrier
        start = weight.data.double()
        for scale in roles.scales:
            _set(scale, torch.ones_like(scale.data))
        for shift in roles.shifts:
            _set(shift, torch.zeros_like(shift.data))
        for variance, eps in roles.variances:
            _set(variance, torch.ones_like(variance.data).double() - eps)
        for other, at, _ in roles.kernels:
            if other is not weight:
                _set(other, _idle(other, in_a_row=_reaches(at, node) or _reaches(node, at)))
        if not _reach(flow, fold, weight, start, wanted, "weight"):
            return False
        if not any(key.endswith("bias") for key in wanted):
            return _agrees(_now(flow, fold), wanted)
        places = [*([] if bias is None else [bias]), *roles.norm_shifts, *roles.shifts]
        for place in places:
            zero = torch.zeros_like(place.data).double()
            if _reach(flow, fold, place, zero, wanted, "bias") and _agrees(_now(flow, fold), wanted):
                return True
            _set(place, zero)
        return False


def _set(tensor: Tensor, number: Tensor) -> None:
    tensor.data = number.double()


def _now(flow: Flow, fold: Fold) -> dict[str, Tensor]:
    """The parameters of the layer that the fold is with the numbers that its layers have now; none if it is none."""
    try:
        form = form_of(flow, fold.candidate)
        layer = emit(form, Target(torch.float64, form.weight.device, False, False))
    except RefusalError:
        return {}
    return {name: parameter.data for name, parameter in layer.named_parameters()}


def _agrees(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    if got.keys() != wanted.keys():
        return False
    pairs = ((got[name], number.to(got[name])) for name, number in wanted.items())
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= _AGREEMENT * max(float(b.abs().max()), 1e-300)
        for a, b in pairs
    )


def _reach(flow: Flow, fold: Fold, tensor: Tensor, start: Tensor, wanted: dict[str, Tensor], what: str) -> bool:
    """Set a tensor so that the fold's weight, or bias, is the wanted one; whether it is one that enters linearly."""
    values = []
    for step in (0.0, 1.0):
        _set(tensor, start + step)
        values.append(next((value for name, value in _now(flow, fold).items() if name.endswith(what)), None))
    before, after = values
    aim = next(value for name, value in wanted.items() if name.endswith(what))
    if before is None or after is None or before.shape != aim.shape or before.numel() != start.numel():
        return False
    slope = after - before
    if not bool(slope.all()):
        return False
    _set(tensor, start + ((aim.to(before) - before) / slope).reshape(start.shape))
    return True


def _idle(weight: Tensor, *, in_a_row: bool) -> Tensor:
    """The weight of a convolution that does nothing: zero beside the carrier, in a row with it the identity."""
    zero = torch.zeros_like(weight.data).double()
    if not in_a_row:
        return zero
    out, per_group = weight.shape[:2]
    middle = tuple(size // 2 for size in weight.shape[2:])
    for channel in range(out):
        zero[(channel, channel % per_group, *middle)] = 1.0
    return zero


def _reaches(first: fx.Node, second: fx.Node) -> bool:
    """Whether the second node reads, by others, what the first gives."""
    seen, todo = {second}, [second]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is first:
                return True
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return False


# ------------------------------------------------------------------ what each tensor does


def _roles(flow: Flow, fold: Fold) -> _Roles:
    roles = _Roles()
    for node in fold.candidate.dying:
        operation = flow.operations.get(node)
        if operation is None:
            continue
        read = _reader(flow, node)
        if operation.kind in _KERNELS:
            weight, bias = read(1, "weight"), read(2, "bias")
            for at, name in ((1, "weight"), (2, "bias")):
                roles.scales.extend(_made_of(flow, node, at, name)[1:])
            if weight is not None:
                roles.kernels.append((weight, node, bias))
            roles.shifts.extend([] if bias is None else [bias])
        elif operation.kind is Kind.NORM and (variance := read(2, "running_var")) is not None:
            module = flow.modules.get(node)
            eps: Any = argument(node, 7, "eps", 1e-5) if module is None else module.eps
            roles.variances.append((variance, float(eps)))
            roles.scales.extend(t for t in [read(3, "weight")] if t is not None)
            shifts = [t for t in (read(4, "bias"), read(1, "running_mean")) if t is not None]
            roles.shifts.extend(shifts)
            roles.norm_shifts.extend(shifts)
        else:
            into = roles.scales if operation.id in ("mul", "div") else roles.shifts
            into.extend(t for source in node.all_input_nodes for t in _beneath(flow, source))
    return roles


def _reader(flow: Flow, node: fx.Node) -> Callable[[int, str], Tensor | None]:
    """What a layer, or a call of a function, has as a weight of that name, or computes it of."""
    module = flow.modules.get(node)

    def read(position: int, name: str) -> Tensor | None:
        if module is not None:
            return module._parameters.get(name, module._buffers.get(name))
        given = argument(node, position, name)
        held: Any = flow.held.get(given) if isinstance(given, fx.Node) else None
        if isinstance(held, Tensor):
            return held
        return next(iter(_made_of(flow, node, position, name)), None)

    return read


def _made_of(flow: Flow, node: fx.Node, position: int, name: str) -> list[Tensor]:
    """The parameters that a weight is computed of, the largest first: the others scale it, if it is linear in each."""
    given = argument(node, position, name) if node not in flow.modules else None
    if not isinstance(given, fx.Node) or given in flow.held:
        return []
    tensors = {id(t): t for t in _beneath(flow, given) if isinstance(t, nn.Parameter)}
    return sorted(tensors.values(), key=lambda t: -t.numel())


def _beneath(flow: Flow, node: fx.Node) -> Iterator[Tensor]:
    """The tensors that a constant is made of."""
    if node in flow.constant:
        yield from flow.tensors.get(node, ())
        for source in node.all_input_nodes:
            yield from _beneath(flow, source)
