"""How names are written on the command line, and what is said of one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from passes.blocks.kit.written import literal, split_commas
from reparam import ReparamError

__all__ = ["UnknownNameError", "literal", "near", "split_commas"]

SUGGESTIONS = 5
"""Near names that an error message lists."""


class UnknownNameError(ReparamError):
    """A spec that is not of the form ``source:name``, or that names an unknown source or model."""


def near(name: str, known: Sequence[str]) -> str:
    """``; did you mean a, b?`` with the nearest known names, or nothing."""
    found = difflib.get_close_matches(name, known, n=SUGGESTIONS, cutoff=0.6)
    found += [other for other in known if name and other.startswith(name) and other not in found]
    return f"; did you mean {', '.join(found[:SUGGESTIONS])}?" if found else ""
