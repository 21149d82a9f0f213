"""Weights that are computed in each call: parametrizations, and hooks of :mod:`torch.nn.utils` that do the same.

Such a layer convolves as torch's does, with a tensor that is none of its parameters. To read that tensor may change
what it is made of (the power iteration of ``spectral_norm`` in training), so what can be told otherwise is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from passes.graph.copies import deep_copy

__all__ = [
    "computed_weight", "computing", "is_pruned", "makes_weight", "weight_like", "weight_maker", "weight_sources",
]  # fmt: skip


def makes_weight(hook: Any) -> bool:
    """Whether this is a hook by which torch.nn.utils computes a weight, or keeps its numbers in the state dict."""
    hook = getattr(hook, "hook", hook)  # torch wraps those of a state dict
    return hasattr(hook, "compute_weight") or str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def is_pruned(module: nn.Module) -> bool:
    """Whether weights of a module are multiplied by a mask of torch.nn.utils.prune."""
    return any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def weight_maker(layer: nn.Module) -> str | None:
    """What computes a layer's weight in each call, in a word; None where it is a parameter, or nobody can tell."""
    if "weight" in layer._parameters:
        return None
    chain: Any = getattr(layer, "parametrizations", {})
    if "weight" in chain:
        return " of ".join(type(each).__name__.lstrip("_") for each in reversed(chain["weight"]))
    for hook in layer._forward_pre_hooks.values():
        if makes_weight(hook) and "weight" in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return type(hook).__name__
    return None


def weight_sources(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters that a convolution's or linear layer's weight is, or is computed from."""
    own = layer._parameters.get("weight")
    return [own] if own is not None else [p for p in layer.parameters() if p is not layer._parameters.get("bias")]


def weight_like(layer: Any) -> Tensor:
    """A convolution's or linear layer's weight, to be asked for all but its numbers: it has none if it is computed."""
    if weight_maker(layer) is None:
        return layer.weight  # type: ignore[no-any-return]
    sizes: tuple[int, ...]
    if isinstance(layer, nn.Linear):
        sizes = layer.out_features, layer.in_features
    else:
        outer, inner = layer.out_channels, layer.in_channels
        outer, inner = (inner, outer) if isinstance(layer, _ConvTransposeNd) else (outer, inner)
        sizes = outer, inner // layer.groups, *layer.kernel_size
    sources = weight_sources(layer)
    like = sources[0].detach().new_full((), float("nan")).expand(sizes)
    return like.requires_grad_(any(p.requires_grad for p in sources))


def computed_weight(module: nn.Module, name: str) -> Tensor | None:
    """A weight behind torch.nn.utils' weight_norm, spectral_norm or prune, or behind a parametrization."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(module)  # type: ignore[no-any-return]
        if getattr(hook, "name", None) == name and hasattr(hook, "compute_weight"):
            extra = {"do_power_iteration": False} if "n_power_iterations" in vars(hook) else {}
            return hook.compute_weight(module, **extra)  # type: ignore[no-any-return]
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def computing(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A copy in float64 of a layer that computes its weight, with numbers from which it computes this one.

    A parametrization says which (``right_inverse``); so do weight normalisation, ``w = g v / |v|`` with ``v = w`` and
    ``g = |w|``, and hooks that have one tensor of the same shape. Where such a tensor enters linearly, two evaluations
    say it as well. Raises :class:`ValueError` if that is not what comes of it.
    """
    weight, why = weight.detach().double(), ""
    for give in (_give, _give_linearly):
        made = deep_copy(layer).double()
        try:
            with torch.no_grad():
                give(made, weight.clone())  # which a parametrization may keep
                got = computed_weight(made, "weight")
        # What inverts a parametrization is user code, which may refuse in any way.
        except Exception as error:
            why = why or str(error).partition("\n")[0] or type(error).__name__
            continue
        if got is not None and bool(((got - weight).abs() <= 1e-12 * weight.abs().max()).all()):
            return made
        why = why or "it computes another one from this"
    raise ValueError(why)


def _give_linearly(layer: nn.Module, weight: Tensor) -> None:
    (source,) = (source for source in weight_sources(layer) if source.shape == weight.shape)
    values: list[Tensor] = []
    for number in (0.0, 1.0):
        source.fill_(number)
        made = computed_weight(layer, "weight")
        assert made is not None
        values.append(made.clone())
    source.copy_((weight - values[0]) / (values[1] - values[0]))


def _give(layer: nn.Module, weight: Tensor) -> None:
    hook: Any = next((h for h in layer._forward_pre_hooks.values() if isinstance(h, WeightNorm)), None)
    if "weight" in getattr(layer, "parametrizations", ()):
        layer.weight = weight
    else:
        layer.get_parameter("weight_orig" if hook is None else "weight_v").copy_(weight)
        if hook is not None:
            layer.get_parameter("weight_g").copy_(torch.norm_except_dim(weight, 2, hook.dim))
    made = computed_weight(layer, "weight")
    if made is not None and (lost := made.isnan()).any():  # a filter of zeros has no direction: g = 0, and any v
        for source in weight_sources(layer):
            if source.shape == weight.shape:
                source[lost] = 1.0
