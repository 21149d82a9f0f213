"""Facts about a whole model that each of its units needs: found once for all units between two edits."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from torch import nn

from passes.edits.carried import made_by
from passes.edits.edit import Block
from passes.edits.holders import Holder, holders
from passes.graph.walk import modules_of, named_of

__all__ = ["Whole"]


class Whole:
    """A model as it is; who edits it says so (:meth:`edited`)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def edited(self) -> None:
        """Forget what was found: the model is another one now."""
        model = self.model
        vars(self).clear()
        self.model = model

    @cached_property
    def modules(self) -> dict[int, nn.Module]:
        """All modules by id."""
        return {id(module): module for module in modules_of(self.model)}

    @cached_property
    def registered(self) -> Counter[int]:
        """How many places register the module of an id."""
        return Counter(id(child) for module in self.modules.values() for child in module._modules.values())

    @cached_property
    def owners(self) -> Counter[int]:
        """How many places register the tensor of an id."""
        tables = (table for module in self.modules.values() for table in (module._parameters, module._buffers))
        return Counter(id(tensor) for table in tables for tensor in table.values() if tensor is not None)

    @cached_property
    def holders(self) -> dict[int, list[Holder]]:
        """What holds each module beside its parent; most units have nothing to fold, and do not ask."""
        return holders(self.model)

    @cached_property
    def blocks(self) -> list[tuple[str, Block]]:
        """The training blocks that stand in it, each with the path of the module that was expanded."""
        found = ((path, made_by(module)) for path, module in named_of(self.model))
        return [(path, each) for path, edits in found for each in edits or () if isinstance(each, Block)]
