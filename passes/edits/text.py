"""Edits as JSON, and back: only values of the kinds below, only operations of :mod:`passes.edits.operations`.

    {"version": 1, "edits": [{"Replace": {"path": "conv1", "layer": {"Layer": {...}}}}, {"Remove": {"path": "bn1"}}]}

Numbers, words, true, false, null and lists stand for themselves; anything else is an object with one key that says what
it is: an edit or a part of one, ``tuple``, ``dict``, ``slice``, ``tensor``, ``dtype``, ``float`` (one that is not
finite), ... What is read is checked as it is made, and nothing is imported by a name that stands in the text.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from passes.edits.edit import Add, Block, Clear, Delete, Edit, Fill, Remove, Replace, Rewrite, Settle, Substitute
from passes.edits.errors import EditError
from passes.edits.layer import Layer
from passes.edits.operations import ATTRIBUTES, function_of, is_method
from passes.edits.program import Argument, Operation, Program, Value
from passes.edits.typed import fits
from passes.edits.typed import hints as hints_of

__all__ = ["VERSION", "from_text", "to_text"]

VERSION = 1
MOST = 1000
"""No block has so many branches; a file that asks for more wants the memory."""
_FORMER: dict[type, set[str]] = {Block: {"online"}}
"""Fields of older files."""
_EDITS = (Add, Block, Clear, Delete, Fill, Remove, Replace, Rewrite, Settle, Substitute)
_CLASSES: dict[str, type] = {c.__name__: c for c in (*_EDITS, Layer, Program, Argument, Operation, Value)}
_KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "dtype": (torch.dtype, {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}),
    "layout": (torch.layout, {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}),
    "memory_format": (
        torch.memory_format,
        {str(v): v for v in vars(torch).values() if isinstance(v, torch.memory_format)},
    ),
}
_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")


def to_text(edits: Iterable[Edit]) -> str:
    """The edits as JSON. Raises :class:`EditError` for what no text may hold: a function that is not torch's, say."""
    return json.dumps({"version": VERSION, "edits": [_encoded(edit) for edit in edits]}, separators=(",", ":"))


def from_text(text: str) -> list[Edit]:
    """The edits that :func:`to_text` wrote. Raises :class:`EditError` for anything else."""
    try:
        content = json.loads(text)
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise EditError(f"version {version!r:.20} of the edits is not known here")
        edits = _decoded(content.get("edits"))
        if not isinstance(edits, list) or not all(isinstance(edit, _EDITS) for edit in edits):
            raise EditError("there is no list of edits")
        return edits
    except EditError:
        raise
    except (RecursionError, ValueError) as error:
        raise EditError(f"the edits are no JSON of ours ({type(error).__name__})") from error


# ------------------------------------------------------------------ writing


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (tuple, torch.Size):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, Tensor):
        return {"tensor": _tensor_text(value)}
    if type(value).__name__ in _CLASSES and type(value) is _CLASSES[type(value).__name__]:
        return {type(value).__name__: _fields(value)}
    return _encoded_special(value)


def _encoded_special(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(key), _encoded(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encoded(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [_encoded(value.real), _encoded(value.imag)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for name, (kind, _) in _KINDS.items():
        if isinstance(value, kind):
            return {name: str(value)}
    raise EditError(f"a {type(value).__name__} cannot be written into a file")


def _fields(value: Any) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    if isinstance(value, Operation):
        _check_operation(value)
    if isinstance(value, Program) and value.functions:
        raise EditError(f"the new forward calls {next(iter(value.functions))}, which is no operation of torch")
    written = {}
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if type(held) is not type(default) or isinstance(held, Tensor) or held != default:
            written[field.name] = _encoded(held)
    return written


def _check_operation(op: Operation) -> None:
    """Raise unless a file may ask for this."""
    if op.op == "call_function" and function_of(op.target) is None:
        raise EditError(f"{op.target!r:.60} is no operation of torch")
    if op.op == "call_function" and op.target == "builtins.getattr":
        asked = op.args[1] if len(op.args) == 2 else None
        if not isinstance(asked, str) or asked not in ATTRIBUTES:
            raise EditError(f"no file may ask for the attribute {asked!r:.60}")
    if op.op == "call_method" and not (is_method(op.target) and op.args):
        raise EditError(f"{op.target!r:.60} is no method of a tensor that a file may call")


# ------------------------------------------------------------------ reading


def _decoded(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise EditError("a value is none that an edit holds")
    ((name, content),) = value.items()
    if name in _CLASSES:
        return _made(_CLASSES[name], content)
    if name in _KINDS and isinstance(content, str) and content in _KINDS[name][1]:
        return _KINDS[name][1][content]
    if name not in _SPECIAL:
        raise EditError(f"{name!r:.40} is no kind of edit or value")
    try:
        return _SPECIAL[name](content)
    except (TypeError, ValueError, OverflowError, RuntimeError, binascii.Error) as error:
        raise EditError(f"a {name} is damaged ({error})".splitlines()[0]) from error


def _made(kind: type, content: Any) -> Any:
    hints = hints_of(kind)
    if (
        not isinstance(content, dict)
        or not content.keys() <= hints.keys() | _FORMER.get(kind, set())
        or "functions" in content
    ):
        raise EditError(f"a {kind.__name__} has other fields")
    values = {name: _decoded(item) for name, item in content.items()}
    if kind is Block and values.pop("online", None) is True:  # files of before there were forms
        values["form"] = "online"
    for name, item in values.items():
        if not fits(item, hints[name]):
            raise EditError(f"a {kind.__name__} cannot have {name}={item!r:.60}")
    try:
        made = kind(**values)
    except TypeError as error:
        raise EditError(f"a {kind.__name__} lacks a field") from error
    if isinstance(made, Operation):
        _check_operation(made)
    if isinstance(made, Block) and any(isinstance(value, int) and value > MOST for _, value in made.options):
        raise EditError(f"no block has an option over {MOST}")
    return made


def _tuple(content: Any) -> tuple[Any, ...]:
    return tuple(_decoded(_list(content)))


def _dict(content: Any) -> dict[Any, Any]:
    return {_decoded(key): _decoded(item) for key, item in _list(content)}


def _slice(content: Any) -> slice:
    start, stop, step = _decoded(_list(content))
    return slice(start, stop, step)


def _device(content: Any) -> torch.device:
    device = torch.device(content)
    if device.type not in _DEVICES:
        raise ValueError(f"no device {content!r:.20}")
    return device


def _list(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise ValueError("no list")
    return content


def _tensor_text(tensor: Tensor) -> list[Any]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [str(tensor.dtype), list(tensor.shape), base64.b64encode(bytes(flat.tolist())).decode()]


def _tensor(content: Any) -> Tensor:
    kind, shape, text = _list(content)
    raw = base64.b64decode(text, validate=True)
    dtype = _KINDS["dtype"][1][kind] if isinstance(kind, str) and kind in _KINDS["dtype"][1] else None
    sizes = [size for size in _list(shape) if type(size) is int and size >= 0]
    if dtype is None or len(sizes) != len(shape) or math.prod(sizes) * dtype.itemsize != len(raw):
        raise ValueError("its size is not that of its numbers")
    flat = torch.tensor(list(raw), dtype=torch.uint8)
    return flat.view(dtype).reshape(sizes) if raw else torch.empty(sizes, dtype=dtype)


_SPECIAL: dict[str, Callable[[Any], Any]] = {
    "tuple": _tuple,
    "dict": _dict,
    "slice": _slice,
    "float": float,
    "complex": lambda content: complex(*_decoded(_list(content))),
    "ellipsis": lambda content: ...,
    "device": _device,
    "tensor": _tensor,
}
