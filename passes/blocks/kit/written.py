"""How a block and its options are written: ``acb:gamma=1/3,bn=after``."""

from __future__ import annotations

import ast
from typing import Any

from passes.refusal import ReparamError

__all__ = ["literal", "options_of", "split_blocks", "split_commas"]


def options_of(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``name`` or ``name:option=value,...``. Raises :class:`ReparamError`."""
    name, colon, rest = text.partition(":")
    options: dict[str, Any] = {}
    for pair in split_commas(rest) if colon else []:
        option, equals, value = pair.partition("=")
        if not equals or not option.strip().isidentifier() or not value.strip():
            raise ReparamError(f"options are written NAME:option=value,option=value; got {pair!r} in {text!r}")
        options[option.strip()] = _value(value.strip())
    return name.strip(), options


def split_blocks(text: str) -> list[str]:
    """The blocks of ``acb:gamma=1/3,bn=after,dbb``: an option belongs to the block before it."""
    found: list[str] = []
    for part in filter(str.strip, split_commas(text)):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part.strip())
    return found


def _value(text: str) -> Any:
    """A Python literal, ``true`` or ``false`` in any case, a fraction such as ``1/3``, else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    above, slash, below = text.partition("/")
    if slash:
        try:
            return float(above) / float(below)
        except (ValueError, ZeroDivisionError):
            return text
    return literal(text)


def split_commas(text: str) -> list[str]:
    """Split at the commas that stand outside brackets, so that ``img_size=(96,96)`` stays whole."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def literal(text: str) -> Any:
    """A Python literal (number, tuple, True, None, quoted string), or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # nested beyond what Python's parser takes
        return text
