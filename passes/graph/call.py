"""One call of a module as the trace saw it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from passes.graph.methods import MethodCall

__all__ = ["Call", "context"]


@dataclass(eq=False)
class Call:
    """One call of a module that was traced through: who was called, with what, and what came back."""

    path: str
    module: nn.Module
    parent: Call | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    context: Any = None
    methods: list[MethodCall] = field(default_factory=list)
    after: fx.Node | None = None
    """The last node before it."""

    def chain(self) -> Iterator[Call]:
        """This call and those around it, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


_grad, _autocast, _inference = torch.is_grad_enabled, torch.is_autocast_enabled, torch.is_inference_mode_enabled
"""Torch's own, whoever listens in their places while a model is traced: they are asked for every node."""


def context() -> tuple[Any, ...]:
    """What a context manager of torch may have changed."""
    return _grad(), _autocast("cpu"), _autocast("cuda"), _inference(), torch.get_default_dtype()
