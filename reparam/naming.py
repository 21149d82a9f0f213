"""How names are written on the command line, and what is said of one that is unknown."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from typing import Any

from reparam import ReparamError

__all__ = ["UnknownNameError", "literal", "near", "split_commas"]

SUGGESTIONS = 5
"""Near names that an error message lists."""


class UnknownNameError(ReparamError):
    """A spec that is not of the form ``source:name``, or that names an unknown source or model."""


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


def near(name: str, known: Sequence[str]) -> str:
    """``; did you mean a, b?`` with the nearest known names, or nothing."""
    found = difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0.6)
    found += [other for other in known if name and other.startswith(name) and other not in found]
    return f"; did you mean {', '.join(found[:SUGGESTIONS])}?" if found else ""
