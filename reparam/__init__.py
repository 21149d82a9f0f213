"""Structural re-parameterisation: any PyTorch model to plain convolutions, proven equal.

    plain = reparam.collapse(model)          # fold every multi-branch block and every batch norm
    print(reparam.explain(model))            # what would fold, and why the rest would not
    reparam.verify(model, plain).raise_if_different()
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
