"""Structural re-parameterisation: any PyTorch model to plain convolutions, proven equal.

:func:`collapse` folds every multi-branch block and every batch norm, :func:`explain` says what would fold and why the
rest would not, :func:`verify` compares two networks.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from passes.equivalence import Equivalence, EquivalenceError
from passes.refusal import Reason, Refusal, ReparamError
from passes.report import Counts, Explanation, Fold
from reparam.api import collapse, collapse_with_report, explain, guess_inputs, verify

__all__ = [
    "Counts",
    "Equivalence",
    "EquivalenceError",
    "Explanation",
    "Fold",
    "Reason",
    "Refusal",
    "ReparamError",
    "collapse",
    "collapse_with_report",
    "explain",
    "guess_inputs",
    "verify",
]

try:
    __version__ = version("reparam")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
