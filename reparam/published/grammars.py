"""All grammars, in the order in which they claim tensors."""

from __future__ import annotations

from reparam.published import computed, sums

__all__ = ["GRAMMARS"]

GRAMMARS = (
    sums.ACB,
    sums.DBB,
    computed.OREPA_STEM,
    computed.OREPA_REPVGG,
    computed.OREPA,
    computed.OREPA_1X1,
    sums.REPVGG_NORMED,
    sums.REPVGG,
    sums.MOBILEONE,
    sums.UNIREPLKNET,
    sums.ECB,
    computed.DOCONV,
    computed.DOCONV_TENSORFLOW,
    computed.DOCONV_GLUON,
)
"""A block that has another inside comes first."""
