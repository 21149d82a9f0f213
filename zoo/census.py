"""Which convolutions of a network run: counted by hooks in forward passes, without the compiler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from zoo.families import Trained

__all__ = ["Census", "take_census"]

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@dataclass(frozen=True)
class Census:
    """The convolutions of a network.

    Args:
        convs: kernel of every convolution layer, by path.
        ran: paths of the layers that ran, as a module or through their weight, in training or evaluation.
        functions: classes whose code convolves with a trained kernel of more than one tap that belongs to no layer,
            one entry per module.
    """

    convs: dict[str, tuple[int, ...]]
    ran: frozenset[str]
    functions: tuple[str, ...] = ()

    @property
    def eligible(self) -> tuple[str, ...]:
        """Layers with more than one tap that ran."""
        return tuple(path for path in self.convs if self.taps(path) > 1 and path in self.ran)

    @property
    def idle(self) -> tuple[str, ...]:
        """Layers with more than one tap that did not run."""
        return tuple(path for path in self.convs if self.taps(path) > 1 and path not in self.ran)

    def taps(self, path: str) -> int:
        """Pixels that a layer's kernel reads."""
        return math.prod(self.convs[path])


def take_census(network: Trained, model: nn.Module, inputs: tuple[Any, ...]) -> Census:
    """Run ``model`` forward in evaluation and in training, and note what convolves; give it a copy."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, _ConvNd)}
    torch.manual_seed(0)
    with _Watch() as watch:
        model.eval()(*inputs)
        network.loss(model.train(), inputs)
    ran = {path for path, m in layers.items() if id(m) in watch.entered or id(m.weight) in watch.weights}
    owned = {id(m.weight) for m in layers.values()}
    functions = {at: name for at, (name, weight) in watch.functions.items() if weight not in owned}
    return Census({path: tuple(m.kernel_size) for path, m in layers.items()}, frozenset(ran), tuple(functions.values()))


class _Watch(TorchFunctionMode):
    """While active: the modules that are entered, the weights that are convolved with, and outside which layers.

    Attributes:
        functions: for a module that is no convolution layer, but whose own code convolves with a trained kernel of
            more than one tap: the name of its class, and the identity of the weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered: set[int] = set()
        self.weights: set[int] = set()
        self.functions: dict[int, tuple[str, int]] = {}
        self._inside: list[nn.Module] = []

    def __enter__(self) -> _Watch:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.weights.add(id(weight))
            at = self._inside[-1]
            if weight.requires_grad and weight[0, 0].numel() > 1 and not isinstance(at, _ConvNd):
                self.functions[id(at)] = type(at).__name__, id(weight)
        return func(*args, **kwargs)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.entered.add(id(module))
        self._inside.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
