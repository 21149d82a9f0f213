"""Structural re-parameterisation: any PyTorch model to better training-time blocks and back, proven equal.

:func:`expand` replaces convolutions by blocks without changing the function, :func:`plan` says what it would do.
:func:`collapse` folds every multi-branch block and every batch norm, :func:`explain` says what would fold and why the
rest would not, :func:`verify` compares two networks. :func:`save` and :func:`load` keep networks of any
class, plain, expanded or collapsed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.blocks.kit.builder import Site
    from passes.blocks.kit.registry import Block, BlockInfo, block, blocks
    from passes.expand import Plan
    from passes.portable import ScaleShift
    from passes.proof.compare import Equivalence, EquivalenceError, Verdict
    from passes.refusal import Reason, Refusal, ReparamError
    from passes.report import Counts, Explanation, Fold
    from passes.training.forms import Form
    from reparam.api import collapse, collapse_with_report, explain, guess_inputs, verify
    from reparam.pair import load, save
    from reparam.published import Imported, import_checkpoint
    from reparam.training import equivalent_conv, expand, param_groups, plan, set_form, update_statistics
    from reparam.zoo import convert_zoo

__all__ = [
    "Block",
    "BlockInfo",
    "Counts",
    "Equivalence",
    "EquivalenceError",
    "Explanation",
    "Fold",
    "Form",
    "Imported",
    "Plan",
    "Reason",
    "Refusal",
    "ReparamError",
    "ScaleShift",
    "Site",
    "Verdict",
    "block",
    "blocks",
    "collapse",
    "collapse_with_report",
    "convert_zoo",
    "equivalent_conv",
    "expand",
    "explain",
    "guess_inputs",
    "import_checkpoint",
    "load",
    "param_groups",
    "plan",
    "save",
    "set_form",
    "update_statistics",
    "verify",
]

_HOME = {
    "passes.portable": ("ScaleShift",),
    "passes.blocks": ("Block", "BlockInfo", "Site", "block", "blocks"),
    "passes.proof.compare": ("Equivalence", "EquivalenceError", "Verdict"),
    "passes.refusal": ("Reason", "Refusal", "ReparamError"),
    "passes.report": ("Counts", "Explanation", "Fold"),
    "passes.expand": ("Plan",),
    "passes.training.forms": ("Form",),
    "reparam.published": ("Imported", "import_checkpoint"),
    "reparam.pair": ("load", "save"),
    "reparam.zoo": ("convert_zoo",),
    "reparam.training": ("equivalent_conv", "expand", "param_groups", "plan", "set_form", "update_statistics"),
    "reparam.api": ("collapse", "collapse_with_report", "explain", "guess_inputs", "verify"),
}
"""Where each public name lives. It is loaded when first asked for, so that importing this package costs nothing."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in ("layers", "onnx"):
        return import_module(f"reparam.{name}")
    for home, names in _HOME.items():
        if name in names:
            value = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'reparam' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("reparam")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
