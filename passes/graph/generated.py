"""The source of generated code, which fx and :mod:`linecache` keep for good, and a server that folds does not want to.

It is there for tracebacks, ``torch.jit`` and ``torch.compile`` for as long as the code is, and goes with it.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch.fx import graph_module

__all__ = ["forget_with"]


def forget_with(function: Callable[..., Any]) -> None:
    """Let the source of a function that a ``GraphModule`` has generated go when its code does."""
    assert isinstance(function, FunctionType)
    code = function.__code__
    weakref.finalize(code, _forget, code.co_filename).atexit = False


def _forget(name: str) -> None:
    graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)
