"""What a person may choose about which regions fold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from passes.refusal import ReparamError

__all__ = ["DEFAULT", "Rules", "rules_of"]

FACTOR = 4.0
"""How much more a fold may cost where only ``cost="layers"`` is said."""


@dataclass(frozen=True)
class Rules:
    """Which regions fold.

    Args:
        factor: how many times the numbers, and the multiply-adds, of the layers that it replaces one layer may cost
            where it saves a call; None where it may not cost more.
        affine: whether batch norms that are left over become one scale and shift.
        whole: whether only what vanishes may be inside of a region: no layer that stays is computed a second time.
        plain: whether code that makes a layer's weight goes even where nothing is saved, so that what is left are stock
            layers.
    """

    factor: float | None = None
    affine: bool = False
    whole: bool = False
    plain: bool = False


DEFAULT = Rules()


def rules_of(norms: str, cost: str) -> Rules:
    """What the options of the verbs say; raises :class:`ReparamError` for what they do not know."""
    if norms not in ("keep", "affine"):
        raise ReparamError(f"norms= is 'keep' or 'affine', got {norms!r:.40}")
    if cost == "numbers":
        return Rules(affine=norms == "affine")
    kind, _, given = str(cost).partition(":")
    try:
        factor = FACTOR if cost == "layers" else float(given)
    except ValueError:
        factor = math.nan
    if kind != "layers" or not 1 <= factor < math.inf:
        raise ReparamError(f"cost= is 'numbers', 'layers' or 'layers:4' with any factor from 1 on, got {cost!r:.40}")
    return Rules(factor=factor, affine=norms == "affine")
