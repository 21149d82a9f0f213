"""One table of the operations that are known by name: what each is, whatever it is called by.

An operation has one id and several names: classes of ``nn.Module`` (which count by their exact class; a subclass only
while its forward is the base's own), functions (by identity), methods of a tensor (by name), aten overloads (by the
text that they print, ``aten.conv2d.default``) and functions of libraries that need not be installed (by full name).
What the operation does to a convolution is a law under the same id, in :mod:`passes.laws`; everything else that is
asked about operations is a field here. What is not in the table is unknown: it may return its input, and change it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from passes.algebra.by_rule import BY_RULE

__all__ = [
    "OPERATIONS", "Kind", "Operation", "Rank", "argument", "base_operation", "is_shape_query", "is_torch", "named",
    "operation_of", "operation_of_function", "operation_of_layer", "pure", "table",
]  # fmt: skip

Name = Any
"""A module class, a function, or a text: a method's name, an aten overload, a full name."""


class Kind(Enum):
    """Families of operations."""

    CONV = "convolution"
    CONV_TRANSPOSE = "transposed convolution"
    LINEAR = "linear layer"
    NORM = "normalisation"
    POOL = "pooling"
    PAD = "padding"
    ARITHMETIC = "arithmetic of two values"
    POINTWISE = "function of each element"
    SOFTMAX = "function along one dimension"
    MOVEMENT = "data movement"
    CAST = "change of dtype or device"
    DROPOUT = "identity in evaluation"
    REDUCTION = "reduction"
    SHAPE = "question about the shape"
    RANDOM = "random numbers"
    LAYER = "any other layer"


class Rank(Enum):
    """How many dimensions the result has."""

    UNKNOWN = "not told by the operation alone"
    SAME = "as many as the first input"
    LARGEST = "as many as the largest input"
    SPATIAL = "batch, channels and the operation's own spatial dimensions"


@dataclass(frozen=True)
class Operation:
    """One operation.

    Args:
        id: what laws and rules call it.
        kind: its family.
        names: what it is called by.
        in_place: names under which it writes its result into its first argument.
        n: number of spatial dimensions, if it is for one number of them.
        rank: how many dimensions its result has.
        keeps_channels: whether dimension 1 is as large as that of the input, if there is one input.
        resizes: whether there may be fewer or more channels afterwards, or in another dimension.
        view: whether its result may be its input's memory, or a part of that.
        random: whether it draws random numbers; a dropout does so in training only.
        affine: whether there is a law for it.
    """

    id: str
    kind: Kind
    names: tuple[Name, ...] = ()
    in_place: tuple[Name, ...] = ()
    n: int | None = None
    rank: Rank = Rank.UNKNOWN
    keeps_channels: bool = False
    resizes: bool = False
    view: bool = False
    random: bool = False
    affine: bool = False


# ------------------------------------------------------------------ entries that are alike


def _with_method(*ids: str) -> Iterator[tuple[str, tuple[Name, ...], tuple[Name, ...]]]:
    """Names that torch forms by rule: ``torch.exp``, ``Tensor.exp``, and in place ``torch.exp_``, ``Tensor.exp_``."""
    for id in ids:
        own, in_place = getattr(torch, id, None), getattr(torch, f"{id}_", None)
        yield id, tuple(x for x in (own, id, f"aten.{id}.default") if x), tuple(x for x in (in_place, f"{id}_") if x)


def _pointwise(id: str, *names: Name, in_place: tuple[Name, ...] = (), keeps_channels: bool = True) -> Operation:
    return Operation(
        id,
        Kind.POINTWISE,
        names,
        in_place,
        rank=Rank.SAME,
        keeps_channels=keeps_channels,
        random=id == "rrelu",
        affine=id in SLOPED,
    )


SLOPED = frozenset(("leaky_relu", "prelu"))
"""Of the activations, those that are nothing where their slope is one."""


def _arithmetic(id: str, *names: Name, in_place: tuple[Name, ...] = (), affine: bool = True) -> Operation:
    rank = Rank.LARGEST
    return Operation(id, Kind.ARITHMETIC, names, in_place, rank=rank, keeps_channels=id == "add", affine=affine)


def _pool(id: str, n: int, *names: Name) -> Operation:
    affine = id.startswith(("avg", "adaptive_avg"))
    return Operation(id, Kind.POOL, names, n=n, rank=Rank.SPATIAL, keeps_channels=True, affine=affine)


def _pad(id: str, *names: Name, affine: bool = True) -> Operation:
    return Operation(id, Kind.PAD, names, rank=Rank.SAME, affine=affine)


def _move(
    id: str, *names: Name, rank: Rank = Rank.UNKNOWN, resizes: bool = True, view: bool = True, affine: bool = True
) -> Operation:
    return Operation(id, Kind.MOVEMENT, names, rank=rank, resizes=resizes, view=view, affine=affine)


def _cast(id: str, *names: Name) -> Operation:
    return Operation(id, Kind.CAST, names, rank=Rank.SAME, keeps_channels=True, view=True, affine=True)


def _norm(id: str, *names: Name, n: int | None = None, affine: bool = False) -> Operation:
    return Operation(id, Kind.NORM, names, n=n, rank=Rank.SAME if n is None else Rank.SPATIAL, affine=affine)


def _dropout(id: str, *names: Name, in_place: tuple[Name, ...] = ()) -> Operation:
    return Operation(
        id,
        Kind.DROPOUT,
        names,
        in_place,
        rank=Rank.SAME,
        keeps_channels=True,
        view=True,
        random=True,
        affine=True,
    )


def _reduce(id: str, *names: Name, affine: bool = False) -> Operation:
    return Operation(id, Kind.REDUCTION, (*names, id), resizes=True, affine=affine)


def _conv(n: int, module: type[nn.Module], transposed: type[nn.Module]) -> tuple[Operation, ...]:
    conv, back = f"conv{n}d", f"conv_transpose{n}d"
    overload = f"aten.{back}.{'default' if n == 1 else 'input'}"
    rank = Rank.SPATIAL
    return (
        Operation(
            conv,
            Kind.CONV,
            (module, getattr(F, conv), f"aten.{conv}.default", f"aten.{conv}.padding"),
            n=n,
            rank=rank,
            affine=True,
        ),
        Operation(back, Kind.CONV_TRANSPOSE, (transposed, getattr(F, back), overload), n=n, rank=rank, affine=True),
        Operation(f"{conv}_by_rule", Kind.CONV, (BY_RULE[n, False],), n=n, rank=rank, affine=True),
        Operation(f"{back}_by_rule", Kind.CONV_TRANSPOSE, (BY_RULE[n, True],), n=n, rank=rank, affine=True),
    )


def _pools(n: int) -> Iterator[Operation]:
    for word in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool"):
        id = f"{word}{n}d"
        stem = {"avg_pool": "AvgPool", "max_pool": "MaxPool", "lp_pool": "LPPool"}.get(word)
        stem = stem or ("AdaptiveAvgPool" if "avg" in word else "AdaptiveMaxPool")
        functions = dict.fromkeys(f for f in (getattr(F, id, None), getattr(torch, id, None)) if f is not None)
        overloads = () if word == "lp_pool" else (f"aten.{id}.default",)
        yield _pool(id, n, getattr(nn, f"{stem}{n}d"), *functions, *overloads)


def _pads(n: int) -> Iterator[Operation]:
    for word in ("Reflection", "Replication"):
        id = f"{word.lower()}_pad{n}d"
        yield _pad(id, getattr(nn, f"{word}Pad{n}d"), f"aten.{id}.default")
    yield _pad(f"circular_pad{n}d", getattr(nn, f"CircularPad{n}d"))


def pure(*values: Any) -> Any:
    """A call of which only that is known: it has no effect. It stands in graphs that are read, and is never run."""
    raise NotImplementedError("an operation that is not read")


# ------------------------------------------------------------------ the table

OPERATIONS: tuple[Operation, ...] = (
    # Convolutions and linear layers.
    *_conv(1, nn.Conv1d, nn.ConvTranspose1d),
    *_conv(2, nn.Conv2d, nn.ConvTranspose2d),
    *_conv(3, nn.Conv3d, nn.ConvTranspose3d),
    Operation("convolution", Kind.CONV, (torch.convolution, "aten.convolution.default")),
    Operation(
        "deform_conv2d",
        Kind.CONV,
        ("torchvision.ops.deform_conv.DeformConv2d", "torchvision.deform_conv2d"),
        n=2,
        rank=Rank.SPATIAL,
    ),
    Operation("linear", Kind.LINEAR, (nn.Linear, F.linear, "aten.linear.default"), rank=Rank.SAME, affine=True),
    Operation(
        "matmul",
        Kind.LINEAR,
        (torch.matmul, operator.matmul, torch.mm, "matmul", "mm", "aten.matmul.default", "aten.mm.default"),
        affine=True,
    ),
    Operation("addmm", Kind.LINEAR, (torch.addmm, "aten.addmm.default"), affine=True),
    Operation("bmm", Kind.LINEAR, (torch.bmm, "bmm", "aten.bmm.default"), rank=Rank.SAME),
    Operation("einsum", Kind.LINEAR, (torch.einsum, "aten.einsum.default"), view=True, affine=True),
    # Normalisation.
    _norm("batch_norm", nn.BatchNorm1d, nn.SyncBatchNorm, F.batch_norm, affine=True),
    _norm("batch_norm2d", nn.BatchNorm2d, n=2, affine=True),
    _norm("batch_norm3d", nn.BatchNorm3d, n=3, affine=True),
    _norm(
        "aten_batch_norm",  # the statistics stand behind weight and bias there
        torch.batch_norm,
        "aten.batch_norm.default",
        "aten._native_batch_norm_legit_no_training.default",
        "aten.native_batch_norm.default",
        "aten.cudnn_batch_norm.default",
    ),
    _norm("layer_norm", nn.LayerNorm, F.layer_norm, torch.layer_norm, "aten.layer_norm.default"),
    _norm("rms_norm", nn.RMSNorm, F.rms_norm, torch.rms_norm, "aten.rms_norm.default"),
    _norm("group_norm", nn.GroupNorm, F.group_norm, torch.group_norm, "aten.group_norm.default"),
    _norm(
        "instance_norm",
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        F.instance_norm,
        torch.instance_norm,
        "aten.instance_norm.default",
        affine=True,
    ),
    _norm("local_response_norm", nn.LocalResponseNorm, nn.CrossMapLRN2d, F.local_response_norm),
    _norm("normalize", F.normalize),
    # Pooling and padding.
    *_pools(1),
    *_pools(2),
    *_pools(3),
    _pool("fractional_max_pool2d", 2, nn.FractionalMaxPool2d, F.fractional_max_pool2d),
    _pool("fractional_max_pool3d", 3, nn.FractionalMaxPool3d, F.fractional_max_pool3d),
    _pad(
        "pad",
        nn.ZeroPad1d,
        nn.ZeroPad2d,
        nn.ZeroPad3d,
        nn.ConstantPad1d,
        nn.ConstantPad2d,
        nn.ConstantPad3d,
        F.pad,
        "aten.pad.default",
    ),
    _pad("constant_pad_nd", torch.constant_pad_nd, "aten.constant_pad_nd.default", affine=False),
    *_pads(1),
    *_pads(2),
    *_pads(3),
    # Arithmetic.
    _arithmetic("add", operator.add, torch.add, "add", "aten.add.Tensor", in_place=(operator.iadd, "add_")),
    _arithmetic(
        "sub",
        operator.sub,
        torch.sub,
        torch.subtract,
        "sub",
        "subtract",
        "aten.sub.Tensor",
        in_place=(operator.isub, "sub_", "subtract_"),
    ),
    _arithmetic("rsub", torch.rsub, "__rsub__", "aten.rsub.Scalar", "aten.rsub.Tensor"),
    _arithmetic(
        "mul",
        operator.mul,
        torch.mul,
        torch.multiply,
        "mul",
        "multiply",
        "aten.mul.Tensor",
        "aten.mul.Scalar",
        in_place=(operator.imul, "mul_", "multiply_"),
    ),
    _arithmetic(
        "div",
        operator.truediv,
        torch.div,
        torch.divide,
        torch.true_divide,
        "div",
        "divide",
        "true_divide",
        "aten.div.Tensor",
        "aten.div.Scalar",
        in_place=(operator.itruediv, "div_", "divide_", "true_divide_"),
    ),
    _arithmetic(
        "neg",
        operator.neg,
        torch.neg,
        torch.negative,
        "neg",
        "negative",
        "aten.neg.default",
        in_place=(torch.neg_, torch.negative_, "neg_", "negative_"),
    ),
    _arithmetic("addcmul", torch.addcmul, "addcmul", "aten.addcmul.default", in_place=("addcmul_",)),
    _arithmetic("addcdiv", torch.addcdiv, "addcdiv", "aten.addcdiv.default", in_place=("addcdiv_",), affine=False),
    _arithmetic("maximum", torch.maximum, torch.fmax, "maximum", "fmax", "aten.maximum.default", affine=False),
    _arithmetic("minimum", torch.minimum, torch.fmin, "minimum", "fmin", "aten.minimum.default", affine=False),
    _arithmetic(
        "pow",
        operator.pow,
        torch.pow,
        "pow",
        "aten.pow.Tensor_Scalar",
        "aten.pow.Tensor_Tensor",
        in_place=(operator.ipow, "pow_"),
        affine=False,
    ),
    _arithmetic(
        "floor_divide",
        operator.floordiv,
        torch.floor_divide,
        "floor_divide",
        "aten.floor_divide.default",
        in_place=(operator.ifloordiv, "floor_divide_"),
        affine=False,
    ),
    _arithmetic(
        "remainder",
        operator.mod,
        torch.remainder,
        torch.fmod,
        "remainder",
        "fmod",
        "aten.remainder.Scalar",
        in_place=(operator.imod, "remainder_", "fmod_"),
        affine=False,
    ),
    _arithmetic("where", torch.where, "where", "aten.where.self", affine=False),
    _arithmetic("lerp", torch.lerp, "lerp", "aten.lerp.Scalar", in_place=("lerp_",), affine=False),
    _arithmetic("bitwise_and", operator.and_, torch.bitwise_and, in_place=(operator.iand, "__iand__"), affine=False),
    _arithmetic("bitwise_or", operator.or_, torch.bitwise_or, in_place=(operator.ior, "__ior__"), affine=False),
    _arithmetic("bitwise_xor", operator.xor, torch.bitwise_xor, in_place=(operator.ixor, "__ixor__"), affine=False),
    _arithmetic("lt", operator.lt, torch.lt, "lt", affine=False),
    _arithmetic("le", operator.le, torch.le, "le", affine=False),
    _arithmetic("gt", operator.gt, torch.gt, "gt", affine=False),
    _arithmetic("ge", operator.ge, torch.ge, "ge", affine=False),
    _arithmetic("eq", operator.eq, torch.eq, "eq", affine=False),
    _arithmetic("ne", operator.ne, torch.ne, "ne", affine=False),
    # Activations and other functions of each element.
    _pointwise("relu", nn.ReLU, F.relu, torch.relu, "relu", "aten.relu.default", in_place=(torch.relu_, "relu_")),
    _pointwise("relu6", nn.ReLU6, F.relu6, "aten.relu6.default"),
    _pointwise("leaky_relu", nn.LeakyReLU, F.leaky_relu, "aten.leaky_relu.default", in_place=(F.leaky_relu_,)),
    _pointwise("elu", nn.ELU, F.elu, "aten.elu.default", in_place=(F.elu_,)),
    _pointwise("selu", nn.SELU, F.selu, torch.selu, in_place=(torch.selu_,)),
    _pointwise("celu", nn.CELU, F.celu, torch.celu, in_place=(torch.celu_,)),
    _pointwise("rrelu", nn.RReLU, F.rrelu, torch.rrelu, in_place=(torch.rrelu_,)),
    _pointwise("prelu", nn.PReLU, F.prelu, "prelu", "aten.prelu.default"),
    _pointwise("gelu", nn.GELU, F.gelu, "aten.gelu.default"),
    _pointwise("silu", nn.SiLU, F.silu, "aten.silu.default"),
    _pointwise("mish", nn.Mish, F.mish, "aten.mish.default"),
    _pointwise("hardswish", nn.Hardswish, F.hardswish, "aten.hardswish.default"),
    _pointwise("hardsigmoid", nn.Hardsigmoid, F.hardsigmoid, "aten.hardsigmoid.default"),
    _pointwise("hardtanh", nn.Hardtanh, F.hardtanh, "aten.hardtanh.default", in_place=(F.hardtanh_,)),
    _pointwise("softplus", nn.Softplus, F.softplus, "aten.softplus.default"),
    _pointwise("softsign", nn.Softsign, F.softsign),
    _pointwise("logsigmoid", nn.LogSigmoid, F.logsigmoid, "aten.log_sigmoid.default"),
    _pointwise("threshold", nn.Threshold, F.threshold, torch.threshold, in_place=(torch.threshold_,)),
    _pointwise("hardshrink", nn.Hardshrink, F.hardshrink, "hardshrink"),
    _pointwise("softshrink", nn.Softshrink, F.softshrink),
    _pointwise("tanhshrink", nn.Tanhshrink, F.tanhshrink),
    _pointwise("glu", nn.GLU, F.glu, "aten.glu.default", keeps_channels=False),
    _pointwise(
        "sigmoid",
        nn.Sigmoid,
        F.sigmoid,
        torch.sigmoid,
        "sigmoid",
        "aten.sigmoid.default",
        in_place=(torch.sigmoid_, "sigmoid_"),
    ),
    _pointwise("tanh", nn.Tanh, F.tanh, torch.tanh, "tanh", "aten.tanh.default", in_place=(torch.tanh_, "tanh_")),
    _pointwise(
        "clamp",
        torch.clamp,
        torch.clip,
        "clamp",
        "clip",
        "aten.clamp.default",
        in_place=(torch.clamp_, torch.clip_, "clamp_", "clip_"),
    ),
    *(
        _pointwise(id, *names, in_place=in_place)
        for id, names, in_place in _with_method(
            *("abs", "exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "square", "reciprocal", "sin"),
            *("cos", "erf", "sign", "floor", "ceil", "round", "trunc", "frac", "nan_to_num", "logit"),
        )
    ),
    Operation(
        "softmax",
        Kind.SOFTMAX,
        (nn.Softmax, nn.Softmax2d, F.softmax, torch.softmax, "softmax", "aten.softmax.int", "aten._softmax.default"),
        rank=Rank.SAME,
        keeps_channels=True,
    ),
    Operation(
        "log_softmax",
        Kind.SOFTMAX,
        (nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax", "aten.log_softmax.int"),
        rank=Rank.SAME,
        keeps_channels=True,
    ),
    Operation("softmin", Kind.SOFTMAX, (nn.Softmin, F.softmin), rank=Rank.SAME, keeps_channels=True),
    # Nothing, in evaluation.
    Operation(
        "identity",
        Kind.MOVEMENT,
        (
            nn.Identity,
            operator.pos,
            torch.positive,
            "contiguous",
            "aten.alias.default",
            "aten.contiguous.default",
        ),
        rank=Rank.SAME,
        keeps_channels=True,
        view=True,
        affine=True,
    ),
    Operation(
        "clone",
        Kind.MOVEMENT,
        (torch.clone, "clone", "aten.clone.default"),
        rank=Rank.SAME,
        keeps_channels=True,
        affine=True,
    ),
    Operation(
        "detach",  # the same value, but not the same gradient
        Kind.MOVEMENT,
        (torch.detach, "detach", "aten.detach.default"),
        rank=Rank.SAME,
        keeps_channels=True,
        view=True,
    ),
    _dropout("dropout", nn.Dropout, F.dropout, torch.dropout, "aten.dropout.default", in_place=(torch.dropout_,)),
    _dropout("dropout1d", nn.Dropout1d, F.dropout1d),
    _dropout("dropout2d", nn.Dropout2d, F.dropout2d),
    _dropout("dropout3d", nn.Dropout3d, F.dropout3d),
    _dropout("alpha_dropout", nn.AlphaDropout, F.alpha_dropout, torch.alpha_dropout),
    _dropout("feature_alpha_dropout", nn.FeatureAlphaDropout, F.feature_alpha_dropout, torch.feature_alpha_dropout),
    _dropout("stochastic_depth", "torchvision.ops.stochastic_depth.stochastic_depth"),
    _cast("to", "to", "aten.to.dtype", "aten._to_copy.default"),
    _cast("float", "float"),
    _cast("double", "double"),
    _cast("half", "half"),
    _cast("bfloat16", "bfloat16"),
    _cast("type_as", "type_as"),
    Operation("type", Kind.CAST, ("type", "cpu", "cuda", "pin_memory"), rank=Rank.SAME, view=True),
    # Data movement.
    _move("view", "view", "aten.view.default", "aten._unsafe_view.default"),
    _move("reshape", torch.reshape, "reshape", "aten.reshape.default"),
    _move("flatten", nn.Flatten, torch.flatten, "flatten", "aten.flatten.using_ints"),
    _move("unflatten", nn.Unflatten, torch.unflatten, "unflatten"),
    _move("view_as", "view_as", "reshape_as"),
    _move("transpose", torch.transpose, "transpose", "aten.transpose.int", rank=Rank.SAME, resizes=False),
    _move("permute", torch.permute, "permute", "aten.permute.default", rank=Rank.SAME, resizes=False),
    _move("movedim", torch.movedim, "movedim", "aten.movedim.int", rank=Rank.SAME, resizes=False),
    _move("moveaxis", torch.moveaxis, "moveaxis", rank=Rank.SAME, resizes=False),
    _move("swapaxes", torch.swapaxes, "swapaxes", rank=Rank.SAME, resizes=False),
    _move("swapdims", torch.swapdims, "swapdims", rank=Rank.SAME, resizes=False),
    _move("t", torch.t, "t", "aten.t.default", rank=Rank.SAME, affine=False),
    _move("squeeze", torch.squeeze, "squeeze", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"),
    _move("unsqueeze", torch.unsqueeze, "unsqueeze", "aten.unsqueeze.default"),
    _move("flip", torch.flip, "flip", "aten.flip.default", rank=Rank.SAME, resizes=False, view=False),
    _move("roll", torch.roll, "roll", "aten.roll.default", rank=Rank.SAME, resizes=False, view=False),
    _move("unbind", torch.unbind, "unbind", "aten.unbind.int"),
    _move("channel_shuffle", nn.ChannelShuffle, F.channel_shuffle, resizes=False, rank=Rank.SAME),
    _move("pixel_shuffle", nn.PixelShuffle, F.pixel_shuffle, rank=Rank.SAME),
    _move("pixel_unshuffle", nn.PixelUnshuffle, F.pixel_unshuffle, rank=Rank.SAME),
    _move("chunk", torch.chunk, "chunk", "aten.chunk.default", rank=Rank.SAME),
    _move("split", torch.split, "split", "aten.split.Tensor", "aten.split_with_sizes.default"),
    _move("tensor_split", torch.tensor_split, "tensor_split"),
    _move("narrow", torch.narrow, "narrow", "aten.narrow.default"),
    _move("select", torch.select, "select", "aten.select.int"),
    _move("index_select", torch.index_select, "index_select", "aten.index_select.default", view=False),
    _move("getitem", operator.getitem),
    _move("slice", "aten.slice.Tensor", affine=False),
    _move(
        "cat",
        torch.cat,
        torch.concat,
        torch.concatenate,
        "aten.cat.default",
        view=False,
    ),
    _move("stack", torch.stack, "aten.stack.default", view=False),
    _move("expand", "expand", "expand_as", torch.broadcast_to, "broadcast_to", "aten.expand.default", affine=False),
    _move("repeat", "repeat", torch.tile, "tile", "aten.repeat.default", view=False, affine=False),
    _move("broadcast_tensors", torch.broadcast_tensors, torch.meshgrid, torch.atleast_1d, affine=False),
    _move("unfold", "unfold", "diagonal", torch.diagonal, "as_strided", torch.as_strided, affine=False),
    _move(
        "interpolate",
        nn.Upsample,
        F.interpolate,
        *(f"aten.upsample_{mode}.vec" for mode in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d")),
        rank=Rank.SAME,
        resizes=False,
        view=False,
    ),
    Operation("setitem", Kind.MOVEMENT, in_place=(operator.setitem,), resizes=True),
    # Reductions.
    _reduce("mean", torch.mean, "aten.mean.dim", "aten.mean.default", affine=True),
    _reduce("sum", torch.sum, "aten.sum.dim_IntList", "aten.sum.default", affine=True),
    _reduce("amax", torch.amax, "aten.amax.default"),
    _reduce("amin", torch.amin, "aten.amin.default"),
    *(_reduce(id, getattr(torch, id)) for id in ("max", "min", "prod", "std", "var", "norm", "argmax", "argmin")),
    # Questions about the shape.
    Operation("size", Kind.SHAPE, ("size",), affine=True),
    Operation("dim", Kind.SHAPE, ("dim", "ndimension"), affine=True),
    Operation("facts", Kind.SHAPE, ("numel", "nelement", "is_contiguous", "get_device", "is_floating_point")),
    Operation("sym_size", Kind.SHAPE, ("aten.sym_size.int", "aten.sym_numel.default")),
    Operation("getattr", Kind.MOVEMENT, (getattr,), view=True, affine=True),  # x.shape, but also x.T and x.data
    # Random numbers.
    Operation(
        "random",
        Kind.RANDOM,
        (
            *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like),
            *(torch.randint_like, torch.bernoulli, torch.normal, torch.multinomial, torch.poisson, torch.binomial),
            *("bernoulli", "multinomial", "aten.rand.default", "aten.randn.default", "aten.bernoulli.default"),
            *("aten.rand_like.default", "aten.randn_like.default", "aten.randint.low", "aten.normal.float_float"),
        ),
        in_place=(
            *("bernoulli_", "normal_", "uniform_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_"),
            *(nn.init.uniform_, nn.init.normal_),
        ),
        random=True,
    ),
    # Layers of which only that is known: their results are new, and their inputs are left as they are.
    Operation("embedding", Kind.LAYER, (nn.Embedding, nn.EmbeddingBag, F.embedding, "aten.embedding.default")),
    Operation("bilinear", Kind.LAYER, (nn.Bilinear, F.bilinear)),
    Operation("attention", Kind.LAYER, (nn.MultiheadAttention, F.scaled_dot_product_attention)),
    Operation("recurrent", Kind.LAYER, (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)),
    Operation("fold", Kind.LAYER, (nn.Fold, nn.Unfold, F.fold, F.unfold)),
    Operation("pure", Kind.LAYER, (pure,)),
    Operation("distance", Kind.LAYER, (nn.CosineSimilarity, nn.PairwiseDistance, F.cosine_similarity)),
)


def table(operations: Iterable[Operation]) -> dict[Name, Operation]:
    """Operations by name. Raises ``ValueError`` for an id or a name that stands there twice."""
    by_name: dict[Name, Operation] = {}
    ids: set[str] = set()
    for operation in operations:
        if operation.id in ids:
            raise ValueError(f"the operation {operation.id!r} stands in the table twice")
        ids.add(operation.id)
        for name in (*operation.names, *operation.in_place):
            if name in by_name:
                raise ValueError(f"{name!r} is a name of {by_name[name].id!r} and of {operation.id!r}")
            by_name[name] = operation
    return by_name


_BY_NAME = table(OPERATIONS)
_BY_ID = {operation.id: operation for operation in OPERATIONS}


def named(id: str) -> Operation:
    """The operation of an id; an unknown one raises and lists those that there are."""
    if id not in _BY_ID:
        raise ValueError(f"there is no operation {id!r}; known: {', '.join(_BY_ID)}")
    return _BY_ID[id]


# ------------------------------------------------------------------ looking up


def operation_of(node: fx.Node, module: nn.Module | None = None) -> Operation | None:
    """The operation that a node calls, ``module`` being the one that a ``call_module`` node calls."""
    if node.op == "call_module":
        return None if module is None else operation_of_layer(module)
    if node.op == "call_method":
        return _BY_NAME.get(node.target)
    return operation_of_function(node.target) if node.op == "call_function" else None


def operation_of_layer(module: nn.Module) -> Operation | None:
    """The operation that a layer computes: by its exact class, or a base's whose forward it has."""
    if "forward" in module.__dict__:  # replaced on the instance
        return None
    kind = type(module)
    for base in kind.__mro__:
        if (found := _operation_of_class(base)) is not None:
            whole = all(getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
            return found if whole else None
    return None


def _operation_of_class(kind: type) -> Operation | None:
    """By the class itself, or by its name where its library need not be there."""
    return _BY_NAME.get(kind) or _BY_NAME.get(_full_name(kind))


def base_operation(module: nn.Module) -> Operation | None:
    """The operation of the nearest base class in the table, whatever the module's own forward does with it."""
    return next((found for base in type(module).__mro__ if (found := _operation_of_class(base)) is not None), None)


def operation_of_function(target: Any) -> Operation | None:
    """The operation of a function, by identity, as an aten overload or by full name."""
    try:
        found = _BY_NAME.get(target)
    except TypeError:  # unhashable callables exist
        return None
    if found is None and not isinstance(target, str):
        if isinstance(target, torch._ops.OpOverload):
            text = str(target)
            return _BY_NAME.get(text) or (_BY_NAME.get(text.replace("_.", ".")) if target._schema.is_mutable else None)
        packet = isinstance(target, torch._ops.OpOverloadPacket)
        return _BY_NAME.get(str(target) if packet else _full_name(target))
    return found


def _full_name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def is_torch(node: fx.Node) -> bool:
    """Whether a node calls torch's or Python's own code, which is known to be pure unless its name says otherwise."""
    if node.op == "call_function":
        home = str(getattr(node.target, "__module__", None) or "torch")  # builtins of torch have none
        return home.partition(".")[0] in ("torch", "_operator", "operator", "math", "builtins")
    return node.op != "call_module"


_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}


def is_shape_query(op: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a node asks only for shape, number of dimensions, dtype or device of its input."""
    if op == "call_function" and target is getattr:
        return len(args) > 1 and args[1] in _SHAPE_ATTRIBUTES
    found = _BY_NAME.get(target) if op == "call_method" else None
    return found is not None and found.kind is Kind.SHAPE


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a node is given as an argument, by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)
