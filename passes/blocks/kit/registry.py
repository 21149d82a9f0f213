"""The registry of blocks, and :class:`Block`: a block's name with its options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from torch import nn

from passes.algebra.geometry import Geometry
from passes.blocks.kit.builder import Site
from passes.blocks.kit.filters import Filters, check_filters, fits, in_words
from passes.blocks.kit.written import options_of
from passes.refusal import ReparamError

__all__ = ["Block", "BlockInfo", "block", "blocks", "unregister"]

Branches = Iterator[tuple[str, nn.Module]]
Declaration = Callable[..., Branches]


@dataclass(frozen=True)
class BlockInfo:
    """A registered block.

    Args:
        name: what :func:`reparam.expand` calls it.
        declare: generator function ``(conv, **options)`` that yields ``(branch name, module)``; the main branch first.
        summary: first line of the declaration's docstring.
        options: options and their defaults.
        online: whether it is meant to be trained with one convolution per layer.
        exact_in_training: whether it starts as the same function in training too, statistics included.
        meant: what its publication uses it for, as filters of which one is enough; none: every kernel of more than one
            tap. What a caller asks for by name or kernel size it may take all the same.
        linear: whether it takes linear layers too.
        adapter: whether its branches are trained beside a layer that is frozen; those of others are frozen with it.
        published: what its publication calls the layer, without a number of dimensions (:mod:`reparam.layers`).
    """

    name: str
    declare: Declaration
    summary: str
    options: Mapping[str, Any]
    online: bool = False
    exact_in_training: bool = True
    meant: tuple[Filters, ...] = ()
    linear: bool = False
    adapter: bool = False
    published: tuple[str, ...] = ()

    def suits(self, geometry: Geometry) -> bool:
        """Whether it is meant for a layer of this geometry."""
        if not self.meant:
            return any(k > 1 for k in geometry.kernel)
        return any(fits(filters, geometry) for filters in self.meant)

    @property
    def meant_for(self) -> str:
        """What it is meant for, in words."""
        kernels = in_words(self.meant) if self.meant else "kernels of more than one tap"
        return f"linear layers and {kernels}" if self.linear else kernels

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options}): {self.summary}"


_BLOCKS: dict[str, BlockInfo] = {}


def block(
    name: str,
    *,
    online: bool = False,
    exact_in_training: bool = True,
    meant: Filters | Sequence[Filters] = (),
    linear: bool = False,
    adapter: bool = False,
    published: tuple[str, ...] = (),
) -> Callable[[Declaration], Declaration]:
    """Register a block under ``name``.

    The decorated generator is given a :class:`Site`, which makes its layers, and yields ``(branch name, module)``, the
    main branch first; the branches are summed. Keyword-only arguments with defaults are its options. No folding code:
    :func:`reparam.collapse` reads the block from the traced graph.

    Args:
        name: a new name; one that is taken raises :class:`ReparamError`.
        online: train with one convolution per layer unless :func:`reparam.expand` is told otherwise.
        exact_in_training: whether it starts as the same function in training too; if not, it is tried in evaluation.
        meant: which layers :func:`reparam.expand` gives it to unless told otherwise, as filters such as
            ``{"kernel": [3, 5], "depthwise": True}``, or several of which one is enough; by default every convolution
            with a kernel of more than one tap.
        linear: whether linear layers can have it as well; their :class:`Site` has no dimensions.
        adapter: train its branches also where the layer itself is frozen.
        published: names under which :mod:`reparam.layers` has it besides its own: those of its publication.
    """
    if not isinstance(name, str) or not name:
        raise ReparamError(f'a block is registered with @block("name"), got {name!r}')
    choices = (meant,) if isinstance(meant, Mapping) else tuple(meant)
    for filters in choices:
        check_filters(filters)

    def register(declare: Declaration) -> Declaration:
        known = _BLOCKS.get(name)
        if known is not None and _origin(known.declare) != _origin(declare):
            raise ReparamError(f"there is a block named {name!r} already; choose another name")
        options = {}
        for parameter in list(inspect.signature(declare).parameters.values())[1:]:
            if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
                raise ReparamError(f"block {name!r}: option {parameter.name!r} must be keyword-only, with a default")
            options[parameter.name] = parameter.default
        summary = (inspect.getdoc(declare) or "").partition("\n")[0]
        info = BlockInfo(
            name, declare, summary, options, online, exact_in_training, choices, linear, adapter, published
        )
        _BLOCKS[name] = info
        return declare

    return register


def blocks() -> dict[str, BlockInfo]:
    """All registered blocks by name, in the order of registration; ``str`` of one shows its options."""
    return dict(_BLOCKS)


def unregister(name: str) -> None:
    """Forget a block; models that were expanded with it keep theirs. An unknown name raises :class:`ReparamError`."""
    del _BLOCKS[Block(name).name]


@dataclass(frozen=True)
class Block:
    """A block with options, ``Block("acb", gamma=1 / 3, bn="after")``; its name alone means all defaults.

    Raises :class:`ReparamError` for a name or an option that does not exist, and says which do.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, name: str, **options: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", options)
        known = self.info.options
        for option in options:
            if option not in known:
                have = ", ".join(known) or "none"
                raise ReparamError(f"block {name!r} has no option {option!r}; it has: {have}")

    @staticmethod
    def of(block: str | Block) -> Block:
        """A name, or a name with options (``acb:gamma=1/3``), as a block; a :class:`Block` as it is."""
        if not isinstance(block, str):
            return block
        name, options = options_of(block)
        made = Block(name, **options)
        for option, value in options.items():
            _check_type(made, option, value)
        return made

    @property
    def info(self) -> BlockInfo:
        """The registered declaration."""
        if self.name not in _BLOCKS:
            near = difflib.get_close_matches(str(self.name).lower(), _BLOCKS, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ReparamError(f"there is no block named {self.name!r}{hint}; known: {', '.join(_BLOCKS)}")
        return _BLOCKS[self.name]

    def branches(self, site: Site) -> dict[str, nn.Module]:
        """The modules of all branches at ``site``, the main branch first.

        Raises :class:`RefusalError` if the block does not apply there.
        """
        found: dict[str, nn.Module] = {}
        for branch in self.info.declare(site, **self.options):
            pair = branch if isinstance(branch, tuple) and len(branch) == 2 else (None, branch)
            name, module = pair
            if not isinstance(name, str) or not isinstance(module, nn.Module):
                kinds = ", ".join(type(each).__name__ for each in pair if each is not None)
                raise ReparamError(f"block {self.name!r} yields a name and a module for each branch, got {kinds}")
            if name in found:
                raise ReparamError(f"block {self.name!r} has two branches named {name!r}")
            found[name] = module
        if not found:
            raise ReparamError(f"block {self.name!r} has no branches; site.refuse(why) leaves a convolution alone")
        return found

    def __hash__(self) -> int:
        return hash((self.name, repr(sorted(self.options.items()))))

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def _check_type(block: Block, option: str, value: Any) -> None:
    """A value of another kind than the option's annotation would fail somewhere inside, in other words."""
    hint = get_type_hints(block.info.declare).get(option, object)
    kinds = tuple(kind for kind in get_args(hint) or (hint,) if isinstance(kind, type))
    if not kinds or object in kinds or type(value) in kinds or (float in kinds and type(value) is int):
        return
    words = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ReparamError(f"block {block.name!r}: {option} is of type {words}, got {value!r}")


def _origin(declare: Declaration) -> tuple[str, str]:
    """Where a declaration was written; running a notebook cell twice is no conflict."""
    return declare.__module__, declare.__qualname__
