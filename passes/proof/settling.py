"""Methods that would fold once more what is folded: they have nothing left to do, and return the module as it is.

One that deletes what it folds is known by its code (:func:`passes.fold.methods.folding_again`). Others that may fold
are run, on a copy of the module before it is changed: they do if another module comes of it that computes the same.
Where a training block took a convolution and its norm, there are a convolution and a norm again in that copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from passes.edits.edit import Block, Edit, Settle
from passes.edits.layer import GEOMETRY
from passes.fold.methods import folding_again, making_again
from passes.fold.whole import Whole
from passes.graph.capture import Unit, join
from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators
from passes.graph.inputs import likely
from passes.portable import plain_class
from passes.proof.compare import compared
from passes.proof.run import outputs

__all__ = ["settled"]

ROUNDING = 1e-4
"""Relative difference of a method that makes layers in float32."""
CORNER = 9
"""Pixels along each side of a map on which a method is tried first: modules are tried by the dozen."""


def settled(unit: Unit, edits: Iterable[Edit], whole: Whole, tried: dict[Any, bool]) -> list[Edit]:
    """What settles the methods around the places of ``edits``, which are about to be made to a unit of a model.

    ``tried`` is what came of the methods of modules that were met before, and is filled.
    """
    inside = len(unit.path) + 1 if unit.path else 0
    folded: dict[str, set[str]] = {}
    for edit in edits:
        names = edit.path[inside:].split(".") if edit.path[inside:] else []
        for i, name in enumerate(names):
            folded.setdefault(".".join(names[:i]), set()).add(name)
    found: list[Edit] = []
    known: set[str] = set()
    for owner in sorted(folded, key=lambda path: -path.count(".") - bool(path)):  # the innermost first
        module = unit.root.get_submodule(owner)
        kind = plain_class(module)
        methods = folding_again(kind, folded[owner])
        others = {name: own for name, own in making_again(kind, folded[owner], known).items() if name not in methods}
        if others:
            before = _without_blocks(module, join(unit.path, owner), whole.blocks)
            alike = _kind(before)
            for name, own in others.items():
                if (alike, name, own) not in tried:
                    tried[alike, name, own] = _folds(before, name, own)
            methods += tuple(name for name, own in others.items() if tried[alike, name, own])
        known.update(methods)
        if methods:
            found.append(Settle(join(unit.path, owner), methods))
    return found


def _without_blocks(module: nn.Module, path: str, blocks: Iterable[tuple[str, Block]]) -> nn.Module:
    """The module as it was before it was expanded, with other numbers, where a norm moved into a block inside of it.

    ``blocks`` are those of the model, each with the path of the module that was expanded.
    """
    inside = len(path) + 1 if path else 0
    copied: nn.Module | None = None
    for at, edit in blocks:
        places = join(at, edit.path), join(at, edit.norm)
        if not edit.norm or edit.rest or (path and not all(place.startswith(f"{path}.") for place in places)):
            continue
        conv, norm = (place[inside:] for place in places)
        block: Any = module.get_submodule(conv)
        if getattr(block, "around", block) is not None or not hasattr(block, "kernel_size"):
            continue  # collapsed already, or in the middle of a forward
        copied = deep_copy(module) if copied is None else copied
        for place, layer in zip((conv, norm), _pair(block), strict=True):
            copied.set_submodule(place, layer)
    return module if copied is None else copied.eval()


def _pair(block: Any) -> tuple[nn.Module, nn.Module]:
    """A convolution of the geometry that a block has, and a norm behind it, with random numbers."""
    n, transposed = len(block.kernel_size), block.geometry.transposed
    options = {name: getattr(block, name) for name in GEOMETRY if not name.startswith("_")}
    options |= {"output_padding": block.output_padding} if transposed else {}
    with kept_generators():
        conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{n}d")(**options, bias=block.reparam_biased)
        norm = getattr(nn, f"BatchNorm{n}d")(block.out_channels)
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)
    like = next(block.parameters())
    return conv.to(like), norm.to(like)


def _kind(module: nn.Module) -> Any:
    """What is the same for modules of which one is tried for all: everything that code finds in them but numbers."""
    tables = ("_parameters", "_buffers", "_modules")
    inside = [
        (path, type(m), [(name, repr(value)) for name, value in vars(m).items() if name not in tables])
        for path, m in module.named_modules(remove_duplicate=False)
    ]
    return repr(inside), tuple((name, t.shape, t.dtype) for name, t in module.state_dict().items())


def _folds(module: nn.Module, method: str, own: bool) -> bool:
    """Whether a method returns another module that computes what this one does, or makes this one such a module.

    With ``own``, it names children that are folded: a method that folds whatever it finds inside goes on doing so.
    """
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        return False
    try:
        with torch.no_grad(), kept_generators():
            made = copied = deep_copy(module).double().eval()
            returned = getattr(copied, method)()
        if isinstance(returned, nn.Module) and returned is not copied:
            made = returned
        elif returned not in (None, copied) or not own or copied.state_dict().keys() == module.state_dict().keys():
            return False
    # The method is a person's code, which may fail in any way.
    except Exception:
        return False
    for example in itertools.chain(likely(module, corner=CORNER), likely(module)):
        try:
            wanted = outputs(module, example)
        # So is the module, and the input is made up.
        except Exception:
            continue
        try:
            found = compared(outputs(made.eval(), example, spent=True), wanted, types=False)
        except Exception:
            return False
        return bool(found.numbers) and found.max_rel <= ROUNDING
    return False
