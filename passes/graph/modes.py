"""Training and evaluation mode, borrowed for a while and given back module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluate", "has_own_modes", "kept_modes"]


@contextmanager
def kept_modes(*models: nn.Module, training: bool | None = False) -> Iterator[None]:
    """Put models into evaluation mode (or training mode), and every module back into its own after.

    Only the flags are set: a model's own ``train`` may do more than that, and would not be undone. With None every
    module stays in its own mode; what is done to the flags meanwhile is undone all the same.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, own in modes:
            module.training = own if training is None else training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def has_own_modes(model: nn.Module) -> bool:
    """Whether some module computes when its mode is set: adapters merge their weights, norms are kept frozen."""
    return any(_overridden(module, name) for module in model.modules() for name in ("train", "eval"))


def _overridden(module: nn.Module, name: str) -> bool:
    return name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name)


def evaluate(model: nn.Module) -> Callable[[], None]:
    """Put a model into evaluation mode by its own ``eval()``; gives a function that takes everything of it back.

    What the model's own code computes then, it computes on the model's tensors: pass a copy, or the model that is to be
    edited itself.
    """
    undo = _remember(model) if has_own_modes(model) else None
    modes = [(module, module.training) for module in model.modules()]
    if undo is not None:
        model.eval()
    else:
        for module, _ in modes:
            module.training = False

    def take_back() -> None:
        for module, mode in modes:
            module.training = mode
        if undo is not None:
            undo()

    return take_back


def _remember(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module its present attributes and numbers back."""
    tables = ("_parameters", "_buffers", "_modules")
    saved = [(m, dict(vars(m)), {name: dict(vars(m)[name]) for name in tables}) for m in model.modules()]
    numbers = [(t, t.detach().clone()) for t in [*model.parameters(), *model.buffers()]]

    def restore() -> None:
        with torch.no_grad():
            for tensor, before in numbers:
                tensor.copy_(before)
        for module, attributes, entries in saved:
            vars(module).clear()
            vars(module).update(attributes)
            for name, table in entries.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)

    return restore
