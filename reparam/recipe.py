"""How a network was expanded: a value that can be written beside its weights, and read from the command line.

A block is written ``acb``, with options ``acb:gamma=1/3,bn=after``, and for some layers only ``layer1.*=dbb``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import reparam
from passes.training.filters import ALL, alternatives, is_auto
from reparam import Block, Form, Plan, ReparamError

__all__ = ["Recipe", "RecipeError", "block_text", "parse_block", "parse_blocks", "parse_where"]


class RecipeError(ReparamError):
    """A recipe that cannot be read or stored; the message says what to write instead."""


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`reparam.expand` that decide which layers a network has afterwards, and their names.

    Args:
        block: a name, a :class:`reparam.Block`, or a mapping from patterns to either.
        where: as :func:`reparam.expand`; a predicate cannot be stored, so :meth:`to_text` refuses it.
        init: ``"preserve"`` or ``"paper"``.
        form: as :func:`reparam.expand`, as text, or a mapping from patterns to texts; None means as the block says.
    """

    block: str | Block | Mapping[str, str | Block]
    where: Any = None
    init: str = "preserve"
    form: str | Mapping[str, str] | None = None

    @staticmethod
    def of(plan: Plan) -> Recipe:
        """The recipe for just what a plan says, layer by layer."""
        chosen = plan.arguments
        return Recipe(**{**chosen, "form": {layer: str(form) for layer, form in chosen["form"].items()}})

    def plan(self, model: nn.Module, *, example_inputs: Any = None, **limits: float | None) -> Plan:
        """:func:`reparam.plan` with these arguments, and with ``budget`` and ``memory``."""
        how: dict[str, Any] = {"where": self.where, "init": self.init, "form": self.form, **limits}
        return reparam.plan(model, self.block, example_inputs=example_inputs, **how)

    def expand(self, model: nn.Module) -> nn.Module:
        """:func:`reparam.expand` with these arguments: a copy."""
        return self.plan(model).apply()

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by pattern; one block for all layers has the pattern ``*``."""
        table = self.block if isinstance(self.block, Mapping) else {"*": self.block}
        return {pattern: Block.of(block) for pattern, block in table.items()}

    def to_text(self) -> str:
        """The recipe as JSON.

        Raises :class:`RecipeError` for a predicate, and for an option that is not a plain value.
        """
        blocks = [{"layers": p, "name": b.name, "options": dict(b.options)} for p, b in self.blocks.items()]
        single = not isinstance(self.block, Mapping)
        content = {
            "block": {"name": blocks[0]["name"], "options": blocks[0]["options"]} if single else blocks,
            "where": _plain(self.where),
            "init": self.init,
            "form": self.form,
        }
        try:
            text = json.dumps(content)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"this expansion cannot be stored in a file: {error}") from error
        if Recipe.from_text(text) != self._normal():
            raise RecipeError(
                f"an option of {self} cannot be stored in a file: use numbers, words, True, False or None"
            )
        return text

    @staticmethod
    def from_text(text: str) -> Recipe:
        """The recipe that :meth:`to_text` wrote. Raises :class:`RecipeError` if it is damaged."""
        try:
            content = json.loads(text)
            made = content["block"]
            block: Any
            if isinstance(made, dict):
                block = Block(made["name"], **made["options"])
            else:
                block = {each["layers"]: Block(each["name"], **each["options"]) for each in made}
            return Recipe(block, _from_plain(content["where"]), content["init"], _form_of(content))
        except ReparamError as error:
            raise RecipeError(f"{error}; a block of your own is registered by importing its module first") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"the note on the expansion is damaged ({type(error).__name__}: {error})") from error

    def _normal(self) -> Recipe:
        """The same in the form that :meth:`from_text` gives."""
        block = self.blocks if isinstance(self.block, Mapping) else Block.of(self.block)
        return Recipe(block, _from_plain(_plain(self.where)), self.init, self.form)

    def __str__(self) -> str:
        if isinstance(self.form, Mapping):  # one by one these would fill a page
            kinds = Counter(f"{block_text(b)} as {self.form.get(p, 'it says')}" for p, b in self.blocks.items())
            parts = [f"{kind} in {count} layers" for kind, count in kinds.items()]
            return ", ".join(parts + ([] if self.init == "preserve" else [f"init {self.init}"]))
        table = self.block if isinstance(self.block, Mapping) else {"": self.block}
        parts = [f"{p}={_text(b)}" if p else _text(b) for p, b in table.items()]
        if self.form is not None:
            parts.append(self.form)
        if self.init != "preserve":
            parts.append(f"init {self.init}")
        return ", ".join(parts + _where_text(self.where))


def _text(block: str | Block) -> str:
    return str(block) if is_auto(block) else block_text(Block.of(block))


def _form_of(content: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The form in a note on an expansion; older ones say only whether it was online."""
    if "form" not in content:
        return {True: "online", False: "branches", None: None}[content["online"]]
    form = content["form"]
    if isinstance(form, dict):
        return {pattern: str(Form.of(each)) for pattern, each in form.items()}
    return None if form is None else str(Form.of(form))


def block_text(block: Block) -> str:
    """A block as one writes it on the command line, floats rounded: ``acb:gamma=0.333,bn=after``."""
    values = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in block.options.items()}
    options = ",".join(f"{key}={value}" for key, value in values.items())
    return f"{block.name}:{options}" if options else block.name


def _where_text(where: Any) -> list[str]:
    """The selection in words."""
    plain = where if callable(where) else _plain(where)
    if plain in (_MEANT, ALL) or callable(plain):
        return ["where a predicate holds"] if callable(plain) else [] if plain == _MEANT else ["wherever it can be"]
    filters = plain if isinstance(plain, dict) else {"name": plain}
    texts = []
    for key, value in filters.items():
        wanted = value if isinstance(value, list) else [value]
        if key == "depthwise":
            texts.append("depthwise only" if value else "no depthwise")
        else:
            texts.append(f"{'in' if key == 'name' else key} {' or '.join(map(str, wanted))}")
    return texts


# ------------------------------------------------------------------------------------------------- where

_MEANT = "meant"
"""What a file says of an expansion that gave each block to the layers that it is meant for."""


def _plain(where: Any) -> Any:
    """``where`` as JSON can hold it: a word, a list of patterns, or filters whose values are lists."""
    if where is None:
        return _MEANT
    if isinstance(where, str):
        return where if where == ALL else [where]
    if isinstance(where, Mapping):
        return {key: _plain_filter(value) for key, value in where.items()}
    if callable(where):
        raise RecipeError("a predicate cannot be stored in a file: name the layers by patterns or filters in where=")
    return list(where)


def _plain_filter(value: Any) -> Any:
    """A filter's value; a shape becomes the text ``3x5``, since JSON has no tuples to tell it from a choice."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, (list, set, frozenset)):
        return [_plain_filter(each) for each in value]
    return value


def _from_plain(where: Any) -> Any:
    if where is None or where == _MEANT:
        return ALL if where is None else None  # null in files from before blocks were meant for some kernels only
    if not isinstance(where, dict):
        return where
    return {key: value if key == "name" else _shapes(value) for key, value in where.items()}


def _shapes(value: Any) -> Any:
    if isinstance(value, list):
        return [_shapes(each) for each in value]
    return tuple(int(part) for part in value.split("x")) if isinstance(value, str) else value


# ------------------------------------------------------------------------------------------------- command line


def parse_where(patterns: Sequence[str], kernels: Sequence[str], depthwise: bool | None) -> Any:
    """The ``where`` of :func:`reparam.expand` from ``--where``, ``--kernel`` (``3`` or ``3x5``) and ``--depthwise``."""
    if list(patterns) == [ALL]:
        if kernels or depthwise is not None:
            raise RecipeError(f"--where {ALL} stands alone: leave out --kernel and --depthwise")
        return ALL
    if not kernels and depthwise is None:
        return list(patterns) or None
    filters: dict[str, Any] = {"name": list(patterns)} if patterns else {}
    if kernels:
        filters["kernel"] = [_kernel(text) for text in kernels]
    if depthwise is not None:
        filters["depthwise"] = depthwise
    return filters


def _kernel(text: str) -> Any:
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RecipeError(f"a kernel is written 3 or 3x5, got {text!r}")
    numbers = tuple(int(part) for part in parts)
    return numbers[0] if len(numbers) == 1 else numbers


def parse_blocks(texts: Iterable[str]) -> Block | str | dict[str, Block | str]:
    """One block, or a mapping from patterns to blocks, from the values of ``--block``.

    A block without a pattern beside some with one is for all layers that those do not match. Raises
    :class:`RecipeError` for anything malformed or unknown.
    """
    table: dict[str, Block | str] = {}
    rest: Block | str | None = None
    for text in texts:
        head = text.partition(":")[0]
        pattern, equals, name = head.partition("=")
        if not equals:
            if rest is not None:
                raise RecipeError(
                    f"two blocks for all layers, {str(rest).partition('(')[0]} and {head}; write one as PATTERN=BLOCK"
                )
            rest = _choice(text)
            continue
        if not pattern or not name:
            raise RecipeError(f"a block for some layers is written PATTERN=BLOCK, such as layer1.*=dbb; got {text!r}")
        if pattern in table:
            raise RecipeError(f"two blocks for the pattern {pattern!r}; the first that matches would win")
        table[pattern] = _choice(text[len(pattern) + 1 :])
    if not table:
        if rest is None:
            raise RecipeError("name a block: --block acb; `reparam blocks` lists them")
        return rest
    return table if rest is None else {**table, "*": rest}


def _choice(text: str) -> Block | str:
    """A block, or ``auto:name,name`` as it is."""
    if not is_auto(text):
        return parse_block(text)
    try:
        alternatives(text)  # raises now, and not after the network was built
    except ReparamError as error:
        raise RecipeError(str(error)) from error
    return text


def parse_block(text: str) -> Block:
    """A block from ``name`` or ``name:option=value,...``. Raises :class:`RecipeError`."""
    try:
        return Block.of(text)
    except RecipeError:
        raise
    except ReparamError as error:
        raise RecipeError(str(error)) from error
