"""The laws by operation: how each acts on a signal that is affine in the region's entry.

A law has the signature of the torch function that it stands for, and is registered here under the id that the table of
operations (:mod:`passes.graph.opset`) gives it. For layers, a second table says what they pass to that function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.graph.opset import OPERATIONS, Operation
from passes.laws.channelwise import (
    add,
    addcmul,
    batch_norm,
    batch_norm_arguments,
    div,
    instance_norm,
    instance_norm_arguments,
    mul,
    neg,
    rsub,
    sub,
)
from passes.laws.conv import (
    addmm,
    by_rule,
    conv,
    conv_arguments,
    conv_transpose,
    conv_transpose_arguments,
    einsum,
    linear,
    matmul,
)
from passes.laws.movement import (
    along,
    as_other,
    attribute,
    averaged,
    cat,
    dropout,
    getitem,
    identity,
    mean,
    moved,
    size,
    stack,
    stochastic_depth,
    total,
)  # fmt: skip
from passes.laws.pool import avg_pool, avg_pool_arguments, pad, pad_arguments

__all__ = ["ARGUMENTS", "LAWS", "Weights", "law_of"]

Law = Callable[..., Any]
Weights = Callable[[nn.Module, str], "Tensor | None"]

LAWS: dict[str, Law] = {
    **{f"conv{n}d": conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": conv_transpose(n) for n in (1, 2, 3)},
    **{f"conv{n}d_by_rule": by_rule(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d_by_rule": by_rule(n) for n in (1, 2, 3)},
    "linear": linear,
    "einsum": einsum,
    "matmul": matmul,
    "addmm": addmm,
    **dict.fromkeys(("batch_norm", "batch_norm2d", "batch_norm3d"), batch_norm),
    "add": add,
    "sub": sub,
    "rsub": rsub,
    "mul": mul,
    "div": div,
    "neg": neg,
    "addcmul": addcmul,
    **{f"avg_pool{n}d": avg_pool(n) for n in (1, 2, 3)},
    "pad": pad,
    **{f"{mode}_pad{n}d": pad for mode in ("reflection", "replication", "circular") for n in (1, 2, 3)},
    **dict.fromkeys(("leaky_relu", "prelu"), identity),  # with a slope of one; others are not affine
    **dict.fromkeys(("identity", "clone", "to", "float", "double", "half", "bfloat16", "type_as"), identity),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), dropout),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), dropout),
    "stochastic_depth": stochastic_depth,
    "cat": cat,
    "stack": stack,
    "getitem": getitem,
    **{id: along(getattr(torch, id)) for id in ("chunk", "split", "tensor_split", "narrow", "select", "index_select")},
    **{
        id: moved(getattr(Tensor, id))
        for id in (
            *("reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims"),
            *("squeeze", "unsqueeze", "flip", "roll", "unbind"),
        )
    },
    "view": moved(Tensor.reshape),  # strides are the model's own matter: it runs
    "channel_shuffle": moved(F.channel_shuffle),
    "pixel_shuffle": moved(F.pixel_shuffle),
    "pixel_unshuffle": moved(F.pixel_unshuffle),
    **{f"adaptive_avg_pool{n}d": averaged(getattr(F, f"adaptive_avg_pool{n}d")) for n in (1, 2, 3)},
    "interpolate": averaged(F.interpolate),
    "mean": mean,
    "sum": total,
    "instance_norm": instance_norm,
    "view_as": as_other,
    "getattr": attribute,
    "size": size,
    "dim": lambda x: len(size(x)),
}

ARGUMENTS: dict[str, Callable[[Any, Weights], tuple[Any, ...]]] = {
    **{f"conv{n}d": conv_arguments for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": conv_transpose_arguments for n in (1, 2, 3)},
    "linear": lambda m, weights: (weights(m, "weight"), weights(m, "bias")),
    **dict.fromkeys(("batch_norm", "batch_norm2d", "batch_norm3d"), batch_norm_arguments),
    "instance_norm": instance_norm_arguments,
    **{f"avg_pool{n}d": avg_pool_arguments for n in (1, 2, 3)},
    "pad": pad_arguments,
    **{f"{mode}_pad{n}d": pad_arguments for mode in ("reflection", "replication", "circular") for n in (1, 2, 3)},
    **dict.fromkeys(("identity", "leaky_relu", "prelu"), lambda m, weights: ()),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d"), lambda m, weights: (m.p, m.training)),
    **dict.fromkeys(("alpha_dropout", "feature_alpha_dropout"), lambda m, weights: (m.p, m.training)),
    "flatten": lambda m, weights: (m.start_dim, m.end_dim),
    "unflatten": lambda m, weights: (m.dim, m.unflattened_size),
    "channel_shuffle": lambda m, weights: (m.groups,),
    "pixel_shuffle": lambda m, weights: (m.upscale_factor,),
    "pixel_unshuffle": lambda m, weights: (m.downscale_factor,),
    **{f"adaptive_avg_pool{n}d": lambda m, weights: (m.output_size,) for n in (1, 2, 3)},
    "interpolate": lambda m, weights: (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor),
}


def _check() -> None:
    """The table of operations says which have a law; each of its layers must say what it passes to that."""
    affine = {op.id for op in OPERATIONS if op.affine}
    if affine != LAWS.keys():
        raise ValueError(f"laws and table of operations differ: {', '.join(sorted(affine ^ LAWS.keys()))}")
    layers = {op.id for op in OPERATIONS if op.affine and any(isinstance(name, type) for name in op.names)}
    if layers != ARGUMENTS.keys():
        raise ValueError(f"the arguments of layers are not complete: {', '.join(sorted(layers ^ ARGUMENTS.keys()))}")


_check()


def law_of(operation: Operation | None, module: nn.Module | None, weights: Weights) -> Law | None:
    """The law of an operation, None if there is none; that of a layer reads its weights when it is called."""
    if operation is None or not operation.affine:
        return None
    law = LAWS[operation.id]
    if module is None:
        return law
    arguments = ARGUMENTS[operation.id]
    return lambda x: law(x, *arguments(module, weights))
