"""Deep copies of modules that hold computed tensors.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` keep the computed weight as a plain attribute, and a forward may
cache what it computed. Such tensors carry a graph, and ``copy.deepcopy`` refuses them; in a copy they are values.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["deep_copy"]

Module = TypeVar("Module", bound=nn.Module)


def deep_copy(module: Module) -> Module:
    """A copy that shares nothing with ``module``."""
    held = tree_leaves([m.__dict__ for m in module.modules()])
    computed = [t for t in held if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in computed})
