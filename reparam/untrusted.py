"""What a file may ask for whose writer nobody knows: how much memory, which network, what kinds of tensors.

A file names its network by a spec. Its name comes from a list; but options of constructors open paths, download and
make layers by the thousand, so of those only plain ones are taken, of plain sizes, unless the person allows the rest.
No code of a person's own (:mod:`reparam.own_code`) is run because a file says so: the person names it, or allows that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from reparam import ReparamError
from reparam.disk import FileError
from reparam.sources import is_named, parse, runs_code

__all__ = ["ALLOWED", "CODE", "check_names", "check_size", "check_spec", "odd_kind", "printable"]

ALLOWED: ContextVar[bool] = ContextVar("allow_options", default=False)
"""Whether files may ask for any network, where a call does not say."""
CODE: ContextVar[bool] = ContextVar("allow_code", default=False)
"""Whether files may name code to run, where a call does not say."""
LONGEST_NAME = 1000
"""Characters of a tensor's name or of a spec; those of networks have below two hundred."""
RATIO = 10
"""How much larger a file's content may be than the file; weights hardly shrink when they are compressed."""
SMALL = 64 << 20
"""Bytes that any file may unpack to."""
SIZES: dict[str, int] = {
    "num_classes": 30_000, "in_chans": 1024, "in_channels": 1024, "img_size": 4096, "input_size": 4096,
    "patch_size": 64, "window_size": 64, "output_stride": 32, "min_size": 4096, "max_size": 4096, "image_size": 4096,
    "layers": 40, "depths": 40, "depth": 40, "num_layers": 40, "channels": 2048, "embed_dim": 2048, "dims": 2048,
    "stem_width": 256, "base_width": 256, "cardinality": 64, "num_heads": 64, "groups": 64, "width": 2048,
}  # fmt: skip
"""Options that are sizes, each with the largest one; one number, or a tuple of up to six."""
RATES = (
    "drop_rate",
    "drop_path_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "dropout",
    "width_mult",
    "drop_connect_rate",
)
"""Options that are numbers from 0 to 10."""
SWITCHES = (
    "aux_logits", "aux_loss", "init_weights", "transform_input", "features_only", "qkv_bias", "weights",
    "weights_backbone", "no_embed_class", "dynamic_img_size",
)  # fmt: skip
"""Options that are True, False or None: weights by name would be downloaded."""
WORDS: dict[str, tuple[str, ...]] = {"global_pool": ("", "avg", "max", "avgmax", "catavgmax", "token", "fast", "map")}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_spec(spec: str, *, any_options: bool = False, any_code: bool = False) -> None:
    """Raise :class:`FileError` for a network that a file may only ask for where the person allows it."""
    if len(spec) > LONGEST_NAME:
        raise FileError(f"the file names its network in {len(spec)} characters; at most {LONGEST_NAME} are read")
    try:
        source, name, options = parse(spec)
    except ReparamError as error:
        raise FileError(f"the file does not name a network: {error}") from error
    if runs_code(source) and not (any_code or is_named(spec)):
        raise FileError(
            f"its network is code, {source}:{name}, and none is run because a file says so: name the network as well, "
            f"as in `{source}:{name} --weights FILE` or `--model {source}:{name}`, or trust the file: "
            "`reparam --allow-code ...`, allow_code=True"
        )
    if source.endswith(".py") and not is_named(spec) and not os.path.isfile(source):
        raise FileError(
            f"its network is code, {source}:{name}, and there is no such file in {os.getcwd()}: run it in the folder "
            f"that the file was written from, or name the network, as in `elsewhere/{source}:{name} --weights FILE`"
        )
    if any_options:
        return
    if ":" in name:  # hf-hub:...
        raise FileError(f"the file asks for a network of another place, {name!r}; {_ALLOW}")
    for option, value in options.items():
        if not _is_plain(option, value):
            raise FileError(f"the file asks for a network with {option}={value!r:.40}; {_ALLOW}")


_ALLOW = "where you trust it, pass allow_options=True, or `reparam --allow-options ...` on the command line"


def _is_plain(option: str, value: Any) -> bool:
    if option in SIZES:
        sizes = value if isinstance(value, tuple) and len(value) <= 6 else (value,)
        return value is None or all(type(size) is int and 0 <= size <= SIZES[option] for size in sizes)
    if option in RATES:
        return value is None or (type(value) in (int, float) and 0 <= value <= 10)
    if option in SWITCHES:
        return value is None or type(value) is bool
    return option in WORDS and value in WORDS[option]


def check_names(names: Iterable[Any]) -> None:
    """Raise :class:`FileError` for a name that no tensor has."""
    for name in names:
        text = str(name)
        if len(text) > LONGEST_NAME:
            raise FileError(f"a name in the file has {len(text)} characters; at most {LONGEST_NAME} are read")
        if not text.isprintable():
            raise FileError(f"a name in the file, {text!r:.60}, holds characters that cannot be printed")


def check_size(unpacked: int, packed: int) -> None:
    """Raise :class:`FileError` for a content in bytes that is far larger than the file; before it is unpacked."""
    if unpacked > max(SMALL, RATIO * packed):
        raise FileError(
            f"its {packed / 2**20:.1f} MB unpack to {unpacked / 2**20:,.0f} MB; weights do not shrink like that, and "
            f"at most {RATIO} times the file is read"
        )


def odd_kind(name: str, held: Tensor, wanted: Tensor) -> str:
    """What is wrong with the kind of a tensor of a file, where the network has ``wanted``; else an empty string."""
    if held.layout is not torch.strided or held.is_quantized or held.is_meta:
        kind = "meta" if held.is_meta else "quantised" if held.is_quantized else str(held.layout).removeprefix("torch.")
        return f"{name!r} is a {kind} tensor; store an ordinary one, with .dequantize() or .to_dense()"
    dtype = str(held.dtype).removeprefix("torch.")
    if wanted.is_floating_point() and held.dtype not in FLOATS:
        return f"{name!r} is of dtype {dtype}; float16, bfloat16, float32 or float64 is read: store it with .float()"
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (held, wanted)]
    if kinds[0] != kinds[1]:
        return f"{name!r} is of dtype {dtype} in the file and {str(wanted.dtype).removeprefix('torch.')} in the network"
    return ""


def printable(text: str) -> str:
    """``text`` in one line without what a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))
