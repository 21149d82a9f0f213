"""How many output positions each convolution has for one sample of example inputs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from passes.graph.copies import deep_copy
from passes.graph.errors import said_in
from passes.graph.inputs import Example, copied
from passes.graph.modes import kept_modes
from passes.graph.weights import weight_like
from passes.refusal import ReparamError
from passes.training.discovery import Found

__all__ = ["positions_of"]

log = logging.getLogger("reparam")


def positions_of(model: nn.Module, convs: list[Found], example: Example) -> dict[str, float]:
    """Output positions of every convolution for one sample of ``example``, in evaluation."""
    args, kwargs = copied((example.args, dict(example.kwargs)))
    try:
        model = deep_copy(model)  # a forward may leave marks
    # Whatever a copy that fails raises: one that edits in place needs none.
    except Exception as error:
        log.debug("the model is run itself, it cannot be copied: %s", error)
    found: dict[str, float] = {}
    hooks = []
    single = False
    for each in convs:

        def note(module: nn.Module, args: Any, output: Tensor, path: str = each.path) -> None:
            nonlocal single
            weight: Any = weight_like(module)
            single |= output.dim() == weight.dim() - 1
            found[path] = found.get(path, 0) + output.numel() / weight.shape[0]

        hooks.append(model.get_submodule(each.path).register_forward_hook(note))
    try:
        with kept_modes(model), torch.no_grad():
            model(*args, **kwargs)
    # The model is user code: whatever it raises means that it does not take these inputs.
    except Exception as error:
        raise ReparamError(f"the model rejects example_inputs: {said_in(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    samples = 1 if single else _samples((*args, *kwargs.values()))
    if not samples:
        raise ReparamError(f"{example} holds no sample: pass a batch with one or more")
    return {path: count / samples for path, count in found.items()}


def _samples(inputs: Any) -> int:
    """Size of the batch: that of the first tensor, or the number of images in a list."""
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else 1
    values = list(inputs.values()) if isinstance(inputs, dict) else inputs
    first = values[0] if isinstance(values, (list, tuple)) and values else None
    if isinstance(values, list) and isinstance(first, Tensor):
        return len(values)
    return 1 if first is None else _samples(first)
