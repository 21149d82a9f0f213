"""From a trained or collapsed network back to the plain architecture it stands for, batch norms included.

A block that stands in a convolution's place is folded, with the norm behind it, into that convolution alone; what is no
convolution is taken over as it is. A network that was built of blocks from the start is collapsed as a whole and
matched by names.

Where the architecture has a batch norm behind a convolution, the folded bias becomes the norm's shift and the norm
becomes the identity otherwise: mean 0, ``var + eps`` exactly 1, gamma 1. The state dict then loads with
``strict=True`` into stock code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.algebra.geometry import Geometry, Layer
from passes.algebra.lowering import Target, emit, target_of
from passes.blocks.kit.layers import is_block
from passes.collapse import collapse_model
from passes.compiler import timed
from passes.edits.edit import Edit, Replace
from passes.edits.layer import described
from passes.filling import fill, variance_of_one
from passes.fold.candidates import layers_of
from passes.fold.rules import Rules
from passes.graph.capture import join, trace_units
from passes.graph.copies import deep_copy
from passes.graph.dataflow import Flow
from passes.graph.inputs import Example
from passes.graph.leaf import inherits_forward
from passes.graph.modes import has_own_modes, kept_modes
from passes.graph.weights import computed_weight, computing, weight_like, weight_maker, weight_sources
from passes.proof.check import check
from passes.proof.compare import EquivalenceError, Verdict
from passes.proof.hold import Exact
from passes.proof.prove import prove
from passes.refusal import RefusalError, ReparamError
from passes.report import Counts, Explanation, Fold
from passes.training.discovery import Found, find_convs, plain_norm
from passes.training.equivalent import Reading
from passes.training.forms import note_on_samples

__all__ = ["collapse_like"]


class MisplacedError(ReparamError):
    """A tensor of the architecture does not hold what was put there: no other way of matching layers mends that."""


def collapse_like(
    model: nn.Module, like: nn.Module, example: Example | None, *, verify: bool | str
) -> tuple[nn.Module, Explanation]:
    """A copy of ``like`` that computes what ``model`` computes, compared with it; see :func:`reparam.collapse`."""
    given = model
    if model.training and has_own_modes(model):  # what its own eval() computes, it computes on a copy
        model = deep_copy(model).eval()
    failed: ReparamError | None = None
    for rules in (None, Rules(whole=True), Rules(whole=True, plain=True)):
        exact, by_name, folded = Exact(keep=verify is True), True, model
        try:
            if rules is None:
                outcome = restore_blocks(model, like, exact, prove_folds=bool(verify))
            else:
                outcome, folded, by_name = _whole(model, like, exact, rules, verify)
        except MisplacedError:
            raise
        except ReparamError as error:
            failed = failed or error
            continue
        if outcome is None:
            continue
        result, explanation = outcome
        doubt = _other_class(folded, result) if by_name else ""
        if verify is True or (verify and not by_name):  # where layers go was told by names, or has to be seen
            with timed(explanation.seconds, "check"):
                explanation.checked = check(given, result, example, exact=exact, effects=False, by_name=by_name)
                if not doubt:
                    explanation.checked.raise_if_different()
        seen = explanation.checked is not None and explanation.checked.verdict is Verdict.EQUAL
        if seen or not doubt or not verify:
            return result, explanation
        failed = failed or _doubtful(doubt, explanation)
    assert failed is not None
    raise failed


def _doubtful(doubt: str, explanation: Explanation) -> ReparamError:
    """What is raised if no other way is found: how the results differ, or that nothing shows whether they do."""
    try:
        if explanation.checked is not None:
            explanation.checked.raise_if_different()
    except EquivalenceError as error:
        return error
    return ReparamError(f"{doubt}: only a run shows whether the two do the same; pass example_inputs")


def _other_class(network: nn.Module, result: nn.Module) -> str:
    """Where a weight went, by its name, into a class that may compute otherwise with it; empty if nowhere."""
    inside = dict(network.named_modules())
    for path, layer in result.named_modules():
        there = inside.get(path)
        weights = [name for name, p in layer._parameters.items() if p is not None and p.dim() > 1]
        if there is None or is_block(there) or not any(name in there._parameters for name in weights):
            continue
        if type(there) is not type(layer) and not (inherits_forward(there) and inherits_forward(layer)):
            return f"{path} is a {type(layer).__name__} in like=, and a {type(there).__name__} in the network"
    return ""


def _whole(
    model: nn.Module, like: nn.Module, exact: Exact, rules: Rules, verify: bool | str
) -> tuple[tuple[nn.Module, Explanation], nn.Module, bool]:
    """The network collapsed and put into a copy of ``like``, the former, and whether names told which is which."""
    folded, explanation = collapse_model(
        model, example=None, verify="folds" if verify else False, exact=exact, rules=rules
    )
    result, told = restore(folded, like, exact, rules)
    explanation.notes += told or ()
    inside = dict(folded.named_modules())
    norms = [path for path, layer in result.named_modules() if isinstance(layer, _NormBase) and path in inside]
    explanation.edits += _put_back(inside, result, norms)
    return (result, explanation), folded, told is None


def restore_blocks(
    model: nn.Module, like: nn.Module, exact: Exact, *, prove_folds: bool
) -> tuple[nn.Module, Explanation] | None:
    """A copy of ``like`` (in eval mode) that computes what ``model`` computes, and what was folded.

    None if ``model`` is not ``like`` with blocks in the places of convolutions.
    """
    match = _Match.of(_unwrapped(model, like), like)
    if match is None:
        return None
    explanation = Explanation(before=Counts.of(match.model), seconds={})
    if note := note_on_samples(match.model):
        explanation.notes.append(note)
    with kept_modes(match.model), torch.no_grad():
        for key in match.rest:
            _copy(match.wanted[key], match.have[key], exact)
        for path in match.folding:
            fold = _restore_one(match, path, exact, prove_folds)
            if fold is None:
                return None
            norm = match.convs[path].norm
            explanation.edits += _put_back(match.inside, match.result, [path, *([] if norm is None else [norm.path])])
            explanation.folds.append(fold)
        for key in match.rest:
            check_copy(key, match.wanted[key], match.have[key])
    explanation.after = Counts.of(match.result)
    return match.result, explanation


@dataclass(frozen=True)
class _Match:
    """A network that is an architecture with blocks in the places of some convolutions.

    Args:
        model: the network.
        result: a copy of the architecture in eval mode, to be filled.
        have, wanted: tensors of the two, by key.
        inside: modules of the network, by path.
        convs: convolutions and linear layers of the architecture, by path.
        folding: paths of those whose numbers are folded.
        rest: keys of what both have, which is taken over.
    """

    model: nn.Module
    result: nn.Module
    have: dict[str, Tensor]
    wanted: dict[str, Tensor]
    inside: dict[str, nn.Module]
    convs: dict[str, Found]
    folding: list[str]
    rest: list[str]

    @staticmethod
    def of(model: nn.Module, like: nn.Module) -> _Match | None:
        result = _copy_with_room(like, model)
        have, wanted = dict(model.state_dict(keep_vars=True)), result.state_dict(keep_vars=True)
        inside = dict(model.named_modules())
        linear = any(is_block(module) and hasattr(module, "in_features") for module in inside.values())
        convs = {found.path: found for found in find_convs(result, linear=linear)}
        changed = {path for path in convs if path in inside and _own(have, path) != _own(wanted, path)}
        # A weight that is computed is put back only where it has to be.
        normed = {path for path in convs if convs[path].norm is not None and weight_maker(convs[path].conv) is None}
        folding = [path for path in convs if path in changed or (path in inside and path in normed)]
        norms = {norm.path for path in folding if (norm := convs[path].norm) is not None}
        names = _names(result)
        taken = {
            key
            for path in norms.union(folding)
            for name in names[id(result.get_submodule(path))]
            for state in (have, wanted)
            for key in _own(state, name)
        }
        rest = [key for key in wanted if key not in taken]
        if set(rest) != have.keys() - taken or any(have[key].shape != wanted[key].shape for key in rest):
            return None
        return _Match(model, result, have, wanted, inside, convs, folding, rest)


def _restore_one(match: _Match, path: str, exact: Exact, prove_folds: bool) -> Fold | None:
    """Fold what stands at ``path``, and the norm behind it, into the layer there; None if that cannot take it."""
    conv, norm = match.convs[path].conv, match.convs[path].norm
    layers = [match.inside[path]]
    if norm is not None and isinstance(behind := match.inside.get(norm.path), _BatchNorm):
        layers.append(plain_norm(behind, weight_like(conv).dim() - 2))
    try:
        reading = Reading(nn.Sequential(*layers))
        candidate, form = reading.candidate(), reading.layer()
        folded: Any = emit(form, target_of(t for layer in layers for t in layer.parameters()))
        numbers: Any = emit(form, Target(torch.float64, form.weight.device, False, False))
        said = ", ".join(layers_of(reading.flow, candidate))
        error = prove(reading.flow, candidate, form, folded, said) if prove_folds else None
    except RefusalError:
        return None
    if not isinstance(folded, (_ConvNd, nn.Linear)) or Geometry.of(folded) != Geometry.of(conv):
        return None
    if type(folded) is not type(conv) and not (inherits_forward(folded) and inherits_forward(conv)):
        return None  # a class with a forward of its own takes the numbers of its own kind only
    _put_weight(path, conv, folded.weight, exact, numbers.weight)
    for name, tensor in _beside(match.wanted, path, conv).items():  # of a class with a forward of its own
        held = match.have.get(join(path, "around", name), match.have.get(join(path, name)))
        if held is None or held.shape != tensor.shape:
            return None
        _copy(tensor, held, exact)
        check_copy(join(path, name), tensor, held)
    behind_it = None if norm is None else match.result.get_submodule(norm.path)
    _put_bias(path, conv, folded.bias, behind_it, exact, numbers.bias)
    check_pair(path, conv, behind_it, folded.weight, folded.bias)
    return Fold.of(reading.flow, candidate, form, path, error)


def _put_back(inside: dict[str, nn.Module], result: nn.Module, paths: list[str]) -> list[Edit]:
    """The edits that put layers of the architecture back where the model has others."""
    layers = {path: result.get_submodule(path) for path in paths}
    return [Replace(p, described(layer)) for p, layer in layers.items() if type(inside.get(p)) is not type(layer)]


def check_pair(path: str, conv: Any, norm: Any, weight: Tensor, bias: Tensor | None) -> None:
    """The convolution at ``path`` and the norm behind it, as they now are, compute what one with these numbers does.

    Read from the tensors that are returned, not from what was meant to be put there. Raises :class:`MisplacedError`.
    """
    if weight_maker(conv) is None:
        check_copy(f"{path}.weight", conv.weight, weight)
    else:
        made, largest = computed_weight(conv, "weight"), weight.abs().max()
        if made is None or not bool(((made - weight).abs() <= 16 * torch.finfo(weight.dtype).eps * largest).all()):
            raise MisplacedError(f"the weight of {path} of like= is not what was folded")
    factor, shift = torch.ones(()), torch.zeros(())
    if norm is not None:
        mean, var = norm.running_mean.double(), norm.running_var.double()
        factor = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.double())
        shift = (0 if norm.bias is None else norm.bias.double()) - mean * factor
    allowed = 4 * torch.finfo(weight.dtype).eps
    got = shift.to(weight) if conv.bias is None else shift + conv.bias.double() * factor.to(conv.bias.device)
    want = torch.zeros_like(got) if bias is None else bias.double()
    gap = (got.double() - want).abs()
    if not bool(((factor - 1).abs() <= allowed).all()) or not bool((gap <= allowed * want.abs().max()).all()):
        raise MisplacedError(f"{path} and the norm behind it in like= do not compute what was folded")


def check_copy(name: str, into: Tensor, value: Tensor) -> None:
    """A tensor that was copied has the numbers that it should have."""
    wanted = value.to(into)
    if not bool(((into == wanted) | ((into != into) & (wanted != wanted))).all()):
        raise MisplacedError(f"{name} of like= does not hold the numbers that it should")


def _unwrapped(model: nn.Module, like: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, torch.compile or an average of weights, unless ``like`` is wrapped.

    A wrapper is known by its only child: it has no layer of its own.
    """
    while (
        list(model._modules) in (["module"], ["_orig_mod"])
        and model._modules.keys() != like._modules.keys()
        and not any(p is not None for p in model._parameters.values())
    ):
        model = next(model.children())
    return model


def _copy_with_room(like: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of ``like`` in eval mode; what is on the meta device there gets room where ``model`` is, to be filled.

    Raises :class:`ReparamError` for a buffer on the meta device that no state dict would fill, and ``model`` lacks.
    """
    result = deep_copy(like).eval()
    device = next(model.parameters()).device
    saved, buffers = result.state_dict().keys(), dict(model.named_buffers())
    made: dict[int, Tensor] = {}  # a tensor registered twice stays one

    def room(key: str, tensor: Tensor) -> Tensor:
        if key not in saved:
            if key not in buffers or buffers[key].shape != tensor.shape:
                raise ReparamError(f"{key} of like= is in no state dict and on the meta device; build it on the CPU")
            return buffers[key].clone()
        # Counters of batches belong to no fold: they begin at zero.
        new = torch.empty if tensor.is_floating_point() else torch.zeros
        filled = new(tensor.shape, dtype=tensor.dtype, device=device)
        return nn.Parameter(filled, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else filled

    for path, module in result.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        made[id(tensor)] = room(join(path, name), tensor)
                    table[name] = made[id(tensor)]
    for key, buffer in result.named_buffers():
        if key not in saved and key in buffers and buffers[key].shape == buffer.shape:
            buffer.copy_(buffers[key])  # nothing else would fill it, and the model computes with its own
    return result


def _names(model: nn.Module) -> dict[int, list[str]]:
    """All paths of each module; one may be registered in several places."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    return names


def _own(state: dict[str, Tensor], path: str) -> frozenset[str]:
    return frozenset(key for key in state if key.startswith(path + "."))


def _beside(state: dict[str, Tensor], path: str, conv: Layer) -> dict[str, Tensor]:
    """What a convolution holds beside its bias and what its weight is made of, by its name there."""
    if weight_maker(conv) is not None:
        return {}
    named = {key[len(path) + 1 :]: state[key] for key in _own(state, path)}
    return {name: tensor for name, tensor in named.items() if name not in ("weight", "bias")}


def _copy(into: Tensor, value: Tensor, exact: Exact, number: Tensor | None = None) -> None:
    """Copy a tensor, and what it was before it was rounded."""
    into.copy_(value)
    if into.is_floating_point():
        exact.put(into, exact.get(id(value), value.double()) if number is None else number)


def _put_weight(path: str, conv: Layer, weight: Tensor, exact: Exact, number: Tensor) -> None:
    """Give the folded kernel to the layer; to one that computes its weight, what it computes this kernel from."""
    if (maker := weight_maker(conv)) is None:
        _copy(conv.weight, weight, exact, number)
        return
    try:
        made = computing(conv, number)
    except ValueError as error:
        told = f"cannot take the folded kernel, since {maker} computes its weight ({error})"
        raise ReparamError(f"{path} of like= {told}: give an architecture without it") from error
    for own, new in zip(weight_sources(conv), weight_sources(made), strict=True):
        _copy(own, new.to(own), exact, new.detach())
    if "weight" in vars(conv):  # a hook keeps what it has computed last
        vars(conv)["weight"] = computed_weight(conv, "weight")


def _put_bias(path: str, conv: Layer, bias: Tensor | None, norm: Any, exact: Exact, number: Tensor | None) -> None:
    """Give the folded bias to whoever can take it: the convolution, or the norm behind it, else the identity."""
    if norm is not None:
        make_identity(norm, exact)
    if conv.bias is not None:
        _copy(conv.bias, torch.zeros_like(conv.bias) if bias is None else bias, exact, number)
    elif bias is None or number is None:
        return
    elif norm is None:
        raise ReparamError(f"{path} has a bias after folding, and like= has no layer to take it")
    elif norm.bias is not None:
        _copy(norm.bias, bias, exact, number)
    else:
        _copy(norm.running_mean, -bias, exact, -number)


def restore(collapsed: nn.Module, like: nn.Module, exact: Exact, rules: Rules) -> tuple[nn.Module, list[str] | None]:
    """A copy of ``like`` (in eval mode) that computes what ``collapsed`` does, which was folded by ``rules``.

    With notes where names told nothing and the graph did; then it has to be run.

    Raises :class:`ReparamError`, naming the layer, where ``collapsed`` has no layer of the same shape for one of
    ``like``'s, or no place for its bias.
    """
    collapsed = _unwrapped(collapsed, like)
    result = _copy_with_room(like, collapsed)
    have, state, norms = (
        dict(collapsed.state_dict(keep_vars=True)),
        result.state_dict(keep_vars=True),
        _norm_behind(result),
    )
    missing, extra = _unmatched(have, state, norms)
    if missing or extra or rules.plain:  # a class that was written for deployment may name its layers otherwise
        notes = fill(collapsed, result, exact, rules)
        if notes is not None:
            told = "computes its weights" if rules.plain else "names its layers"
            return result, [f"like= {told} otherwise: they were matched by the graph", *notes]
        raise ReparamError(
            f"the collapsed network does not match the architecture given as like=: it lacks "
            f"{', '.join(missing[:3]) or 'nothing'}, it has {', '.join(extra[:3]) or 'nothing'} besides; give the "
            "architecture that the network was expanded from"
        )
    folded = {path for path in norms.values() if not _own(have, path)}
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in have:
                continue
            if have[name].shape != tensor.shape:
                raise ReparamError(f"{name} has shape {tuple(have[name].shape)}, but {tuple(tensor.shape)} in like=")
            _copy(tensor, have[name], exact)
        for path in folded:
            make_identity(result.get_submodule(path), exact)
        for conv, norm in norms.items():
            bias = have.get(join(conv, "bias")) if join(conv, "bias") not in state else None
            if bias is not None:
                module = result.get_submodule(norm)
                if not isinstance(module.bias, Tensor):
                    raise ReparamError(f"{conv} has a bias after folding, and {norm} has no shift to take it")
                _copy(module.bias, bias, exact)
        for conv, norm in norms.items():
            if norm in folded and (weight := have.get(join(conv, "weight"))) is not None:
                pair = result.get_submodule(conv), result.get_submodule(norm)
                check_pair(conv, *pair, weight, have.get(join(conv, "bias")))
        for name in state.keys() & have.keys():
            check_copy(name, state[name], have[name])
    return result, None


def _unmatched(have: dict[str, Tensor], state: dict[str, Tensor], norms: dict[str, str]) -> tuple[list[str], list[str]]:
    """Tensors of the architecture without one of the network, and the other way round.

    A norm that was folded is missing in the network, and its convolution has a bias instead.
    """
    gone = {path for path in norms.values() if not _own(have, path)}
    missing = [name for name in state if name not in have and name.rpartition(".")[0] not in gone]
    biases = {join(conv, "bias") for conv in norms}
    return missing, [name for name in have if name not in state and name not in biases]


def make_identity(norm: nn.Module, exact: Exact) -> None:
    """Set a batch norm so that it returns its input exactly: ``gamma / sqrt(var + eps)`` is 1 in its own dtype."""
    if not isinstance(norm, _NormBase) or norm.running_mean is None or norm.running_var is None:
        raise ReparamError("a batch norm without running statistics cannot be made the identity")
    norm.running_mean.zero_()
    norm.running_var.copy_(variance_of_one(norm.eps, norm.running_var))
    exact.put(norm.running_var, torch.ones_like(norm.running_var, dtype=torch.float64) - norm.eps)
    if norm.weight is not None:
        norm.weight.fill_(1.0)
    if norm.bias is not None:
        norm.bias.zero_()


def _norm_behind(model: nn.Module) -> dict[str, str]:
    """For every convolution or linear layer: the batch norm that alone reads it, by dataflow."""
    found: dict[str, str] = {}
    for unit in trace_units(model)[0]:
        flow = Flow(unit, {})
        for node in flow.nodes:
            norm = _owner(flow, node, _NormBase, "running_var")
            if norm is None or not node.args or not isinstance(node.args[0], fx.Node):
                continue
            source = node.args[0]
            conv = _owner(flow, source, nn.Module, "weight")
            if conv is not None and len(source.users) == 1:
                found[join(unit.path, conv)] = join(unit.path, norm)
    return found


def _owner(flow: Flow, node: fx.Node, kind: type[nn.Module], holds: str) -> str | None:
    """Path of the module whose tensor ``holds`` this operation uses: a leaf, or the module around a function."""
    if node.op == "call_module":
        module = flow.modules[node]
        return (
            str(node.target) if isinstance(module, kind) and isinstance(getattr(module, holds, None), Tensor) else None
        )
    for source in node.all_input_nodes:
        path, _, leaf = str(source.target).rpartition(".")
        if source.op == "get_attr" and leaf == holds and isinstance(flow.unit.root.get_submodule(path), kind):
            return path
    return None
