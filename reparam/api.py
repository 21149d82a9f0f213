"""The public verbs. Each checks its input, asks the compiler, and says what went wrong in the user's words."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from passes.blocks.kit.layers import is_block
from passes.collapse import check_model, collapse_model, explain_model
from passes.expand import ALONE
from passes.exported import Program, collapse_program, example_of, explain_program, is_program, module_of
from passes.fold.rules import DEFAULT, rules_of
from passes.graph.errors import said_in
from passes.graph.generators import alone
from passes.graph.inputs import Example, as_example, likely
from passes.graph.outside import kept_outside, kept_statistics
from passes.graph.shards import check_whole
from passes.proof.check import without_hooks_of
from passes.proof.compare import Equivalence
from passes.proof.run import default_device, run, runner_of
from passes.proof.verify import compare
from passes.refusal import ReparamError
from passes.report import Explanation
from passes.restore import collapse_like

__all__ = ["collapse", "collapse_with_report", "explain", "guess_inputs", "verify"]


Network = TypeVar("Network", bound="nn.Module | ExportedProgram")


def collapse(
    model: Network,
    *,
    example_inputs: Any = None,
    like: nn.Module | None = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
    norms: str = "keep",
    cost: str = "numbers",
) -> Network:
    """Fold every region of ``model`` that acts as one convolution or linear layer into that one layer.

    Reads the traced graph, never class names: our own blocks, timm's RepVGG, MobileOne, FastViT and RepViT, DBB, ACB,
    and blocks not yet published fold alike, and so does every batch norm behind a convolution. The result is the
    caller's own class, in eval mode, with the same device, dtype, memory format and ``requires_grad``; names of
    everything untouched stay. Running statistics are folded, also those of a model in training mode.

    Args:
        model: any module with floating-point parameters. Parts that torch.fx cannot trace are compiled inside. Or an
            exported program (``torch.export``), the module that it gives, any ``fx.GraphModule`` of aten calls: the
            result is one of the same kind, its inputs, outputs, constraints and the names of all other values the same;
            ``like`` and ``inplace`` are for modules.
        example_inputs: what to compare the whole network on: a tensor, a tuple of positional arguments,
            ``(args, kwargs)``, a mapping of keyword arguments, or a list where that is the one argument. Optional:
            inputs are made up otherwise. With it layers of unknown rank can be read.
        like: the plain architecture to return instead, its batch norms set to identity, so that the state dict loads
            with ``strict=True`` into stock code. Only its structure counts: it may be on the meta device, where it
            takes no memory. See :func:`passes.restore.restore`.
        verify: ``True``: prove every fold, in float64 and in the shipped dtype within the rounding of its weights, and
            run the result against the original; ``"folds"``: prove the folds only; ``False``: neither.
        strict: raise where a fold does not hold, instead of taking it back alone with a warning.
        inplace: edit ``model`` itself and return it.
        norms: ``"keep"``: a batch norm that cannot be folded stays as it is; ``"affine"``: it becomes one scale and
            shift (:class:`reparam.ScaleShift`), 2C numbers instead of 4C, where that is exact and it holds fewer.
        cost: ``"numbers"``: one layer takes the place of several only if it holds no more numbers and needs no more
            multiply-adds than they. ``"layers:4"``: for devices where calls count more than arithmetic, it may hold and
            need up to 4 times as much (or another factor from 1 on) if there are fewer calls then: a 1x1 before a 3x3,
            branches of different size; the report says what grew. ``"layers"`` is ``"layers:4"``.

    Raises:
        ReparamError: bad input (not a module, no numbers, NaN in a weight, a cast that overflows), naming the layer.
        EquivalenceError: the result differs from the model, or, with ``strict``, a fold from what it replaces, naming
            the layers and by how much.
        After either, the caller's model is as it was, ``inplace=True`` included.

    Source: Ding et al., "Diverse Branch Block" (CVPR 2021), sec. 3.2; "RepVGG" (CVPR 2021), sec. 3.3.
    """
    return collapse_with_report(
        model,
        example_inputs=example_inputs,
        like=like,
        verify=verify,
        strict=strict,
        inplace=inplace,
        norms=norms,
        cost=cost,
    )[0]


def collapse_with_report(
    model: Network,
    *,
    example_inputs: Any = None,
    like: nn.Module | None = None,
    verify: bool | str = True,
    strict: bool = False,
    inplace: bool = False,
    norms: str = "keep",
    cost: str = "numbers",
) -> tuple[Network, Explanation]:
    """As :func:`collapse`, with what was folded, what was refused and why, counts, errors and seconds."""
    if verify not in (True, False, "folds"):
        raise ReparamError(f"verify= is True, 'folds' or False, got {verify!r}")
    if like is not None and not isinstance(like, nn.Module):
        raise ReparamError(f"like= takes the architecture as a torch.nn.Module, got {type(like).__name__}")
    if like is not None and inplace:
        raise ReparamError("like= returns a copy of that architecture, so inplace=True has nothing to edit; drop one")
    rules = rules_of(norms, cost)
    if like is not None and rules != DEFAULT:
        raise ReparamError("like= says which layers there are, norms included: drop norms= and cost=")
    program, module = _read(model)
    if program is not None and (like is not None or inplace):
        raise ReparamError("an exported program is copied, and has no layers to fill: drop like= and inplace=")
    check_model(module, numbers=bool(verify))
    if like is not None:
        check_whole(like)
    found: Any
    if program is None and is_block(module) and not inplace:  # a single layer that was expanded comes back as one
        inside = nn.Sequential(OrderedDict({ALONE: module})).train(module.training)
        stock = None if like is None else nn.Sequential(OrderedDict({ALONE: like}))
        found, explanation = collapse_with_report(
            inside, example_inputs=example_inputs, like=stock, verify=verify, strict=strict
        )
        return found.get_submodule(ALONE), explanation
    with undisturbed(module):
        example = as_example(example_inputs, module)
        if program is not None:
            found = collapse_program(program, example=example, verify=verify, strict=strict, rules=rules)
        elif like is not None:
            found = collapse_like(module, like, example, verify=verify)
        else:
            found = collapse_model(module, example=example, verify=verify, strict=strict, inplace=inplace, rules=rules)
    return found  # type: ignore[no-any-return]


def _read(model: Any) -> tuple[Program | None, nn.Module]:
    """A program, if the model is one, and what it runs."""
    return (model, module_of(model)) if is_program(model) else (None, model)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What the caller has set as default does not reach the compiler, and no run of its reaches what the caller holds.

    Parameters made in inference mode could never be trained, and examples made on another device could not be read. A
    forward may fill containers outside of the model, which are restored. Verbs of several threads wait for each other.
    """
    device, grad = torch.get_default_device(), torch.is_grad_enabled()
    with ExitStack() as stack:
        stack.enter_context(alone())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if device.type != "cpu":
            stack.enter_context(default_device(device))
        if isinstance(model, nn.Module):  # what is none is refused inside
            stack.enter_context(kept_outside(model))
            stack.enter_context(kept_statistics(model))
        yield


def explain(model: Network, example_inputs: Any = None, *, norms: str = "keep", cost: str = "numbers") -> Explanation:
    """Which regions would fold, into what, and why the others do not; ``str()`` of it is a table.

    Decides as :func:`collapse` does with the same options and stops before surgery and proof; the model is not changed.
    Raises as :func:`collapse` does for bad input.
    """
    rules = rules_of(norms, cost)
    program, module = _read(model)
    check_model(module, numbers=False)
    with undisturbed(module):
        if program is not None:
            return explain_program(program, rules)
        return explain_model(module, as_example(example_inputs, module), rules)


def verify(
    reference: nn.Module | ExportedProgram, candidate: nn.Module | ExportedProgram, example_inputs: Any = None
) -> Equivalence:
    """Compare two networks in float64 on ``example_inputs`` (made up from the reference's first layer if absent).

    Both are run on copies in eval mode, and all that they return counts: nested, complex, in dataclasses. The tolerance
    is 1e-10 for float64 networks; for others ten times the noise floor, the distance of the reference in its own dtype
    from itself in float64, but a hundredth at most. ``first_difference`` names the module where the difference starts.

    The verdict is inconclusive where rounding alone may make the difference: a network that amplifies it beyond the
    ceiling, or a selection (top-k, non-maximum suppression) that decides otherwise by numbers that agree.

    Raises:
        ReparamError: either network rejects the inputs, or there is nothing to compare.
    """
    program, first = _read(reference)
    second = _read(candidate)[1]
    check_model(first)
    check_model_shape(second)
    try:
        with undisturbed(first):
            example = as_example(example_inputs, first) or (None if program is None else example_of(program))
        example = example or _guess(first)
        with undisturbed(first):
            return compare(first, second, example)
    except ReparamError:
        raise
    # Both models are user code: whatever they raise means that they do not take these inputs.
    except Exception as error:
        given = "example_inputs" if example_inputs is not None else "the inputs made up for the first one"
        hooks = without_hooks_of(first, second)
        raise ReparamError(f"a network rejects {given}: {said_in(error)}{hooks}") from error


def check_model_shape(candidate: Any) -> None:
    """The candidate may hold NaN: that is a difference to report, not bad input."""
    if not isinstance(candidate, nn.Module):
        raise ReparamError(f"expected a torch.nn.Module, got {type(candidate).__name__}")
    check_whole(candidate)


def guess_inputs(model: nn.Module) -> tuple[Any, ...]:
    """Random inputs for a model that does not come with any, of batch size 2, in its dtype and on its device.

    The size is small if the model takes that, else the one in its ``pretrained_cfg`` or ``default_cfg`` (timm), or the
    usual one. A tuple of tensors; ``(args, kwargs)`` for a forward that asks for some by name only. Raises
    :class:`ReparamError` if none is taken.
    """
    example = _guess(model)
    return (example.args, dict(example.kwargs)) if example.kwargs else example.args


def _guess(model: nn.Module) -> Example:
    check_model(model)
    tried = []
    for example in likely(model):
        try:
            with undisturbed(model):
                run(runner_of(model, double=False), example, double=False)
        # Any exception means that the model does not take this shape.
        except Exception as error:
            tried.append(f"{example}: {error}".splitlines()[0])
            continue
        return example
    raise ReparamError("no input shape could be guessed; pass example_inputs. Tried " + "; ".join(tried))
