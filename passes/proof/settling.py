"""Methods that would fold once more what is folded: they have nothing left to do, and return the module as it is.

One that deletes what it folds is known by its code (:func:`passes.fold.methods.folding_again`). Others that may fold
are run, on a copy of the module before it is changed: they do if another module comes of it that computes the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from passes.edits.edit import Edit, Settle
from passes.fold.methods import folding_again, making_again
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


def settled(unit: Unit, edits: Iterable[Edit]) -> list[Edit]:
    """What settles the methods around the places of ``edits``, which are about to be made to a unit."""
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
        others = making_again(kind, folded[owner], known).items()
        methods += tuple(name for name, own in others if name not in methods and _folds(module, name, own))
        known.update(methods)
        if methods:
            found.append(Settle(join(unit.path, owner), methods))
    return found


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
    for example in likely(module):
        try:
            wanted = outputs(module, example)
        # So is the module, and the input is made up.
        except Exception:
            continue
        try:
            found = compared(outputs(made.eval(), example), wanted, types=False)
        except Exception:
            return False
        return bool(found.numbers) and found.max_rel <= ROUNDING
    return False
