"""The call that a network is run with: what the caller gave, or inputs made up for it.

Made-up inputs are random numbers of the shape that the first layer asks for, on the model's device; the generator is
one of its own, on the CPU, whatever the caller has set as default.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators
from passes.refusal import ReparamError

__all__ = [
    "SMALL",
    "USUAL",
    "Example",
    "as_call",
    "as_example",
    "copied",
    "declared_shape",
    "input_count",
    "likely",
    "likely_shapes",
    "observed_ranks",
    "tensors_in",
]

SMALL = {0: (), 1: (256,), 2: (64, 64), 3: (8, 64, 64)}
"""Enough for networks that take any size: running them costs a twelfth of that at the usual size."""
USUAL = {0: (), 1: (1024,), 2: (224, 224), 3: (16, 112, 112)}
LEAST = {2: (32, 32)}
BATCH = 2
TOKENS = 16


@dataclass(frozen=True)
class Example:
    """One call of a network.

    Args:
        args, kwargs: what it is called with.
        made_up: whether the numbers were made up here, else they are the caller's.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    made_up: bool = False

    def __str__(self) -> str:
        shapes = [_size(tensor) for tensor in tensors_in((self.args, self.kwargs))]
        shown = ", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else "")
        return " ".join(filter(None, ["made-up input" if self.made_up else "example_inputs", shown]))


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


# ------------------------------------------------------------------ what the caller gave


def as_example(inputs: Any, model: nn.Module) -> Example | None:
    """The caller's ``example_inputs`` as a call; None if there are none."""
    if inputs is None or isinstance(inputs, Example):
        return inputs
    args, kwargs = as_call(inputs, model)
    # A list of one tensor is mostly that tensor, but a detector takes a list of one image: running it tells.
    if type(inputs) is list and args and args[0] is inputs[0] and not _takes(model, args) and _takes(model, (inputs,)):
        args = (inputs,)
    return Example(args, kwargs)


def as_call(inputs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, from whichever form a person writes them in.

    - a tuple holds positional arguments; one whose last part is a dict of parameters' names ends in keyword arguments,
      also written ``(args, kwargs)`` as ``torch.export`` takes them; a dict without content may stand there as well;
    - a mapping from parameters' names holds keyword arguments, any other is one argument;
    - a list is one argument, unless it has just as many parts as the forward has arguments without a default: a list of
      one tensor or one list is that argument;
    - all else is one argument.
    """
    if isinstance(inputs, Mapping):
        if _names(inputs, model):
            return (), dict(inputs)
        if _signature(model) is not None and not _binds(model, (inputs,), {}):
            raise ReparamError(f"example_inputs has {_odd_names(inputs, model)}, and forward takes {_signature(model)}")
    if isinstance(inputs, tuple) and type(inputs) is tuple:
        *args, last = inputs or (None,)
        if inputs and isinstance(last, Mapping):
            if len(args) == 1 and isinstance(args[0], tuple) and _binds(model, args[0], last):
                return args[0], dict(last)
            names = _names(last, model) if last else not _binds(model, inputs, {})
            if names and _binds(model, args, last):
                return tuple(args), dict(last)
        return inputs, {}
    if type(inputs) is list and _spreads(inputs, model):
        return tuple(inputs), {}
    return (inputs,), {}


def copied(value: Any, cast: Callable[[Tensor], Tensor] | None = None, memo: dict[int, Any] | None = None) -> Any:
    """A copy of what a network is given that shares no tensor with it; what cannot be copied is given as it is.

    Each tensor is ``cast`` once: what is one tensor in two places stays one.
    """
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        clone = value.detach().clone()
        new: Any = (clone if cast is None else cast(clone)).requires_grad_(value.requires_grad)
    elif type(value) in (list, tuple):
        new = type(value)(copied(part, cast, memo) for part in value)
    elif type(value) is dict:
        new = {key: copied(part, cast, memo) for key, part in value.items()}
    else:
        for tensor in list(tensors_in(value)):
            copied(tensor, cast, memo)
        try:
            new = copy.deepcopy(value, memo)
        # deepcopy runs user code, which may fail in any way.
        except Exception:
            new = value
    memo[id(value)] = new
    return new


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, whatever it is nested in: mappings, sequences, dataclasses, objects with attributes."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif not isinstance(value, _PLAIN) and id(value) not in seen:
            seen.add(id(value))
            todo += reversed(_parts(value))


_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, nn.Module, torch.device, torch.dtype)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    return [] if callable(value) else list(getattr(value, "__dict__", {}).values())


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (AttributeError, TypeError, ValueError):  # code that shows none: a compiled extension
        return None


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    signature = _signature(model)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [] if signature is None else [p for p in signature.parameters.values() if p.kind in kinds]


def _keywords(model: nn.Module) -> list[str]:
    """Arguments that a forward asks for by name only."""
    signature = _signature(model)
    every = [] if signature is None else signature.parameters.values()
    return [p.name for p in every if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def _names(inputs: Mapping[Any, Any], model: nn.Module) -> bool:
    """Whether all keys are names of parameters of the forward."""
    signature = _signature(model)
    if signature is None or not inputs or not all(isinstance(key, str) for key in inputs):
        return False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name for p in signature.parameters.values() if p.kind in named}
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    return set(inputs) <= known or (any_name and (not known or bool(known & set(inputs))))


def _odd_names(inputs: Mapping[Any, Any], model: nn.Module) -> str:
    signature = _signature(model)
    known = () if signature is None else signature.parameters
    return ", ".join(repr(name) for name in inputs if name not in known) or "no arguments"


def _binds(model: nn.Module, args: Any, kwargs: Mapping[Any, Any]) -> bool:
    signature = _signature(model)
    if signature is None or not all(isinstance(key, str) for key in kwargs):
        return False
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _takes(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a copy of the model runs on these arguments."""
    # It is user code, which may fail in any way.
    try:
        with torch.no_grad(), kept_generators():
            deep_copy(model).eval()(*copied(args))
    except Exception:
        return False
    return True


def _spreads(inputs: list[Any], model: nn.Module) -> bool:
    parameters = _positional(model)
    wanted = [p for p in parameters if p.default is p.empty]
    if not inputs or len(inputs) != max(len(wanted), 1):
        return False
    if len(inputs) == 1 and isinstance(inputs[0], Tensor):
        told = str(parameters[0].annotation).replace("typing.", "") if parameters else ""
        return not told.lower().startswith(("list", "sequence", "iterable"))
    return len(inputs) > 1 or isinstance(inputs[0], (list, tuple))


# ------------------------------------------------------------------ made up


def likely(model: nn.Module, batch: int = BATCH, corner: int | None = None) -> Iterator[Example]:
    """Calls that ``model`` may take, the cheapest first; whether it does, only running it can tell.

    With ``corner``, maps of at most so many pixels along each side.
    """
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()
    layer = next((m for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear, nn.Embedding))), None)
    generator = torch.Generator(device="cpu").manual_seed(0)
    if isinstance(layer, nn.Embedding):
        ids = torch.randint(layer.num_embeddings, (batch, TOKENS), generator=generator, device="cpu").to(device)
        yield Example((ids,), made_up=True)
    names = _keywords(model)
    positional = [p for p in _positional(model) if p.default is p.empty]
    count = len(positional) if names else input_count(model)
    shapes = ((shape[0], *(min(size, corner or size) for size in shape[1:])) for shape in likely_shapes(model))
    for shape in dict.fromkeys(shapes):
        parts = [
            torch.randn((batch, *shape), generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
            for _ in range(count + len(names))
        ]
        yield Example(tuple(parts[:count]), dict(zip(names, parts[count:], strict=True)), made_up=True)
    some = next(likely_shapes(model), None)
    if count == 1 and not names and some is not None:  # or a list of them
        pair = [torch.randn((batch, *some), generator=generator, dtype=torch.float32, device="cpu") for _ in range(2)]
        yield Example(([part.to(device, dtype) for part in pair],), made_up=True)


def input_count(model: nn.Module) -> int:
    """How many tensors a forward asks for: its positional parameters without a default; ``*inputs`` asks for one."""
    return max(sum(p.default is p.empty for p in _positional(model)), 1)


def likely_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one sample: that which timm declares, or a few that fit the first layer."""
    declared = declared_shape(model)
    if declared is not None:
        small = (declared[0], *SMALL.get(len(declared) - 1, ()))
        if not _config(model).get("fixed_input_size") and math.prod(small) < math.prod(declared):
            yield small
        yield declared
        return
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, _NormBase))]
    conv: Any = next((m for m in model.modules() if _convolves(m)), None)
    linear = next((m for m in layers if isinstance(m, nn.Linear)), None)
    if conv is not None:
        n = len(conv.kernel_size)
        for size in (SMALL[n], USUAL[n], LEAST.get(n, SMALL[n])):
            yield (conv.in_channels, *size)
        for parts in (2, 3, 4):  # its layers share the channels out between them
            yield (parts * conv.in_channels, *SMALL[n])
    if linear is not None:
        flat, tokens = (linear.in_features,), (7, linear.in_features)
        spread = any(p.dim() == 3 and p.shape[-1] == linear.in_features for p in model.parameters())
        yield from [tokens, flat] if spread else [flat, tokens]
    if conv is None and linear is None:
        norm = next((m for m in layers if isinstance(m, _NormBase)), None)
        yield (3 if norm is None else norm.num_features, *SMALL[2])


def _convolves(module: Any) -> bool:
    """A convolution, or a block that stands for one."""
    return isinstance(getattr(module, "in_channels", None), int) and isinstance(
        getattr(module, "kernel_size", None), tuple
    )


def declared_shape(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one sample that timm declares for a network."""
    size = _config(model).get("input_size")
    return tuple(size) if size else None


def _config(model: nn.Module) -> Mapping[str, Any]:
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, Mapping):
            return config
    return {}


def observed_ranks(
    model: nn.Module, paths: Iterable[str], results: Iterable[str], example: Example
) -> tuple[dict[str, list[int | None]], dict[str, list[int | None]]]:
    """How many dimensions the arguments of modules have when a copy of ``model`` is run, and what others return.

    None where calls differ; empty if the model does not run on these inputs.

    Args:
        model: not changed.
        paths: of the modules whose arguments are looked at.
        results: of those whose result is; what is no tensor has no rank.
        example: inputs of the model.
    """
    given: dict[str, list[int | None]] = {}
    returned: dict[str, list[int | None]] = {}

    def note(seen: dict[str, list[int | None]], path: str, values: tuple[Any, ...]) -> None:
        ranks = [x.dim() if isinstance(x, Tensor) else None for x in values]
        before = seen.get(path, ranks)
        seen[path] = [a if a == b else None for a, b in zip(before, ranks, strict=False)]

    # The model is user code: it may fail in any way on these inputs, not be copied, or have no numbers at all.
    try:
        own = deep_copy(model)
        for path in paths:
            own.get_submodule(path).register_forward_pre_hook(lambda _, x, path=path: note(given, path, x))
        for path in results:
            own.get_submodule(path).register_forward_hook(lambda _, x, y, path=path: note(returned, path, (y,)))
        with torch.no_grad(), kept_generators():
            own(*copied(example.args), **copied(dict(example.kwargs)))
    except Exception:
        return {}, {}
    return given, returned
