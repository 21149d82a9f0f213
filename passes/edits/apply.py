"""Edits carried out on a model, and taken back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from passes.algebra.geometry import CONVS
from passes.edits.edit import Add, Block, Clear, Delete, Edit, Fill, Remove, Replace, Rewrite, Settle, Substitute
from passes.edits.errors import EditError
from passes.edits.holders import Holder, holders, substituted
from passes.edits.layer import GEOMETRY
from passes.edits.rewritten import rewrite, settle
from passes.graph.attributes import carry_attributes
from passes.graph.walk import modules_of
from passes.graph.weights import makes_weight
from passes.portable import Remainder

__all__ = ["Moved", "Undo", "apply", "remainder"]


class Moved(nn.Identity):
    """What is left of a batch norm that went into a block. Who asks for its numbers, to fold it, is told where it is.

    Args:
        into: path of the block.
    """

    def __init__(self, into: str) -> None:
        super().__init__()
        self.into = into

    def __getattr__(self, name: str) -> Any:
        if name in _NUMBERS:
            raise AttributeError(
                f"the batch norm that stood here is part of the block at {self.into}: what a library folds or exports "
                "is the collapsed network, reparam.collapse(model, like=plain)"
            )
        return super().__getattr__(name)


_NUMBERS = frozenset(("weight", "bias", "running_mean", "running_var", "eps", "num_features"))


class Undo:
    """What is needed to take edits back: of each module that was touched, everything as it was before."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._saved: list[tuple[nn.Module, type, dict[str, Any], list[tuple[Any, Any]]]] = []

    def touch(self, module: nn.Module) -> None:
        """Remember a module before it is changed for the first time."""
        if id(module) in self._seen:
            return
        self._seen.add(id(module))
        tables = [(t, copy.copy(t) if t else ()) for t in vars(module).values() if isinstance(t, (dict, set))]
        self._saved.append((module, type(module), dict(vars(module)), tables))

    def __call__(self) -> None:
        """Take every edit back; a second call does nothing."""
        while self._saved:
            module, kind, attributes, tables = self._saved.pop()
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)


def apply(
    model: nn.Module,
    edits: Iterable[Edit],
    layers: Mapping[str, nn.Module] | None = None,
    *,
    held: dict[int, list[Holder]] | None = None,
    build_block: Callable[[nn.Module, Block], nn.Module] | None = None,
) -> Undo:
    """Carry out ``edits``, in order. If one fails, those before it are taken back.

    Args:
        model: edited in place.
        edits: in the order in which they were made.
        layers: new layers with their numbers by path; the others are made on the meta device, in eval mode.
        held: what holds each module beside its parent, if that is known already; what it says is true until then.
        build_block: makes the block of a :class:`Block` that is not among the layers.

    Raises :class:`EditError` for a path that is not there or a layer that does not fit.
    """
    edits = list(edits)
    if not edits:  # most units have none, and to find what holds each module is to look at all of them
        return Undo()
    editor = _Editor(model, layers or {}, holders(model) if held is None else held, build_block)
    try:
        for edit in edits:
            editor.apply(edit)
    # Whatever went wrong, the model must come back as it was; the error itself goes on.
    except BaseException:
        editor.undo()
        raise
    return editor.undo


class _Editor:
    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        held: dict[int, list[Holder]],
        build_block: Callable[[nn.Module, Block], nn.Module] | None,
    ) -> None:
        self.model, self.layers, self.build_block = model, layers, build_block
        self.undo = Undo()
        self.holders = held
        self.places: dict[int, list[tuple[nn.Module, str]]] | None = None

    def apply(self, edit: Edit) -> None:
        match edit:
            case Replace() | Block():  # one layer, wherever it is registered
                old = self._module(edit.path)
                self._replace(old, self._layer(edit), self._places(old))
            case Remove():
                old = self._module(edit.path)  # which may be part of a block by now
                self._replace(old, remainder(old, edit), [self._owner(edit.path)])
            case Add():
                owner, name = self._owner(edit.path)
                if hasattr(owner, name):
                    raise EditError(f"{edit}: the name is taken")
                self.undo.touch(owner)
                layer = owner._modules[name] = self._layer(edit)
                self._note(layer, [(owner, name)])
            case Fill():
                self._fill(edit)
            case Delete():
                owner, name = self._owner(edit.path)
                child = self._module(edit.path)
                self.undo.touch(owner)
                del owner._modules[name]
                if self.places is not None:
                    self.places[id(child)] = [at for at in self.places[id(child)] if at != (owner, name)]
            case Clear():
                self._clear(edit)
            case Rewrite():
                module = self._module(edit.path)
                _check_targets(module, edit)
                self.undo.touch(module)
                rewrite(module, edit.program, edit.method, edit.folded)
            case Settle():
                module = self._module(edit.path)
                missing = [name for name in edit.methods if name == "forward" or not hasattr(module, name)]
                if missing:
                    raise EditError(f"{edit}: there is no such method")
                self.undo.touch(module)
                settle(module, edit.methods)
            case Substitute():
                raise EditError(f"{edit}: this is an edit of a graph of calls, and no module's")

    def _layer(self, edit: Replace | Add | Fill | Block) -> nn.Module:
        given = self.layers.get(edit.path)
        if given is not None:
            return given
        if not isinstance(edit, Block):
            return edit.layer.build(self.model)
        if self.build_block is None:
            raise EditError(f"{edit}: nothing here builds blocks")
        return self.build_block(self.model, edit)

    def _replace(self, old: nn.Module, new: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
        for owner, name in places:
            self.undo.touch(owner)
            owner._modules[name] = new
        if self.places is not None:
            self.places[id(old)] = [place for place in self.places[id(old)] if place not in places]
        self._note(new, places)
        self.undo.touch(old)
        _inherit(old, new)
        for holder in self.holders.get(id(old), ()):
            self.undo.touch(holder.owner)
            value = vars(holder.owner)[holder.name]
            vars(holder.owner)[holder.name] = substituted(value, old, new)
            self.holders.setdefault(id(new), []).append(holder)

    def _places(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where a module is registered; to look through the whole network for every edit takes long."""
        if self.places is None:
            self.places = {}
            _note_places(self.model, self.places)
        return self.places[id(module)]

    def _note(self, new: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
        """Enter a module that has come to these places."""
        if self.places is not None:
            self.places.setdefault(id(new), []).extend(places)
            _note_places(new, self.places)

    def _fill(self, edit: Fill) -> None:
        module, layer = self._module(edit.path), self._layer(edit)
        if type(layer) not in CONVS or not isinstance(module, type(layer)):
            raise EditError(f"{edit}: it is no such convolution")
        self.undo.touch(module)
        vars(module).update({name: value for name, value in vars(layer).items() if name in GEOMETRY})
        module._parameters.update(layer._parameters)

    def _clear(self, edit: Clear) -> None:
        owner, name = self._owner(edit.path)
        table = owner._parameters if name in owner._parameters else owner._buffers
        if table.get(name) is None:
            raise EditError(f"{edit}: there is no such tensor")
        self.undo.touch(owner)
        table[name] = None

    def _owner(self, path: str) -> tuple[nn.Module, str]:
        parent, _, name = path.rpartition(".")
        return self._module(parent), name

    def _module(self, path: str) -> nn.Module:
        module = self.model
        for name in path.split(".") if path else ():
            child = module._modules.get(name)
            if child is None:
                raise EditError(f"there is no {path} in this network")
            module = child
        return module


def _note_places(module: nn.Module, places: dict[int, list[tuple[nn.Module, str]]]) -> None:
    """Enter where all that is in a module is registered."""
    for owner in modules_of(module):
        for name, child in owner._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((owner, name))


def remainder(old: nn.Module, edit: Remove) -> nn.Module:
    """What stays in the place of a module that is removed."""
    left: nn.Module
    if edit.program is not None:
        left = Remainder()
        for op in edit.program.operations:
            name = op.target.partition(".")[0]
            for table in ("_modules", "_parameters", "_buffers"):
                if op.op in ("call_module", "get_attr") and name in getattr(old, table):
                    getattr(left, table)[name] = getattr(old, table)[name]
        _check_targets(left, edit)
        rewrite(left, edit.program)
    else:
        kept: OrderedDict[str, nn.Module] = OrderedDict()
        for name in edit.leaving:
            child = old._modules.get(name)
            if child is None:
                raise EditError(f"{edit}: there is no {edit.path}.{name}")
            if type(child) is not nn.Identity:
                kept[name] = child
        left = nn.Sequential(kept) if kept else Moved(edit.into) if edit.into else nn.Identity()
    for name in edit.keeping:
        table = "_parameters" if name in old._parameters else "_buffers"
        if name not in getattr(old, table) or hasattr(left, name):
            raise EditError(f"{edit}: there is no such tensor")
        getattr(left, table)[name] = getattr(old, table)[name]
    if edit.answering and isinstance(old, _BatchNorm) and old.running_var is not None:
        _answer(left, old, old.running_var)
    left.training = old.training
    return left


def _answer(left: nn.Module, old: _BatchNorm, like: Tensor) -> None:
    """Let what is left of a batch norm answer as one that changes nothing, exactly, in no state dict."""
    left.eps = 0.0  # type: ignore[assignment]
    for name, value in (("running_mean", 0.0), ("running_var", 1.0), ("weight", 1.0), ("bias", 0.0)):
        if getattr(old, name) is not None:
            left.register_buffer(name, like.new_full(like.shape, value), persistent=False)


def _inherit(old: nn.Module, new: nn.Module) -> None:
    """What other code may ask the module for that stood here, and the hooks that people put on it.

    The layer that takes a module's place sees the same input and returns the same value; a handle still removes its
    hook, since the table is the very same.
    """
    carry_attributes(old, new)
    for name, table in vars(old).items():
        hooks = name.startswith(("_forward_", "_backward_")) and name.endswith("_hooks") and bool(table)
        making = [key for key, hook in table.items() if makes_weight(hook)] if hooks else []
        if hooks and len(making) < len(table):
            new.__dict__[name] = table
            for key in making:  # what computes the old one's weight is no hook of the new one
                del table[key]
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        if vars(old).get(name):
            new.__dict__[name] = vars(old)[name]
    if vars(old).get("_backward_hooks"):
        new._is_full_backward_hook = old._is_full_backward_hook


def _check_targets(module: nn.Module, edit: Rewrite | Remove) -> None:
    """Everything that a new forward names must be there: a file may say anything."""
    assert edit.program is not None
    for op in edit.program.operations:
        if op.op not in ("call_module", "get_attr") or op.target in edit.program.constants:
            continue
        *path, last = op.target.split(".")
        owner: Any = module
        for name in path:
            owner = owner._modules.get(name) if isinstance(owner, nn.Module) else None
        if not isinstance(owner, nn.Module) or not _has(owner, last, op.op == "call_module"):
            raise EditError(f"{edit}: it uses {op.target}, which is not there")


def _has(owner: nn.Module, name: str, child: bool) -> bool:
    if child or owner._modules.get(name) is not None:  # a layer may also be read, to be given to a function
        return owner._modules.get(name) is not None
    return any(isinstance(table.get(name), Tensor) for table in (owner._parameters, owner._buffers, vars(owner)))
