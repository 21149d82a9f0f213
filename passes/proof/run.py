"""Running networks on copies, so that nothing of the caller's is disturbed, in float64 or as they are.

A run sees what a caller can see: what comes back, what a forward leaves behind on its modules, how far the generators
of random numbers were moved, and which modules took part. In float64 every operation works in float64, also where the
network asks for float32 by name: what is left of a difference is then not rounding.
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from passes.graph.copies import deep_copy
from passes.graph.generators import kept_generators, states
from passes.graph.inputs import Example, copied, tensors_in
from passes.graph.outside import kept_outside
from passes.graph.walk import modules_of
from passes.graph.weights import makes_weight
from passes.proof.state import Marks, changes

__all__ = [
    "Double",
    "Run",
    "default_device",
    "hooked",
    "in_dtype",
    "nudged",
    "outputs",
    "run",
    "runner_of",
    "surroundings",
]


@dataclass(frozen=True)
class Run:
    """One call of a network.

    Args:
        value: what it returned.
        left: attributes and buffers that the call changed or added, by path and name.
        had: all paths and names that there were before it.
        generators: digest of the random generators' states after the call; empty if none was drawn from.
        ran: paths of the modules that took part.
        counts: how often each of those was called that were called themselves, by path.
        cast: whether a number had to be cast for the call to be in float64 throughout.
        given: the tensors that it was called with, as they were after the call.
    """

    value: Any
    left: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    had: frozenset[tuple[str, str]] = frozenset()
    generators: str = ""
    ran: frozenset[str] = frozenset()
    counts: Mapping[str, int] = field(default_factory=dict)
    cast: bool = False
    given: tuple[Tensor, ...] = ()

    @property
    def called(self) -> frozenset[str]:
        """Paths of the modules that were called themselves."""
        return frozenset(self.counts)


def runner_of(
    model: nn.Module,
    *,
    double: bool = True,
    training: bool | None = False,
    exact: Mapping[int, Tensor] | None = None,
) -> nn.Module:
    """A copy of ``model`` to be run, without the hooks that a person put on it: they may reach anywhere.

    Those of the library that the network is from stay: its forward may need them.

    Args:
        model: is not changed, and not run: a model's own ``train`` and ``eval`` may compute, so they run on the copy.
        double: in float64, else as it is.
        training: the mode; a model that is in evaluation already keeps each module's own. None: as it is.
        exact: float64 numbers to use instead of a tensor of ``model``, by its id.
    """
    return _ready(deep_copy(model), model, double, training, exact)


def _ready(
    runner: nn.Module, model: nn.Module, double: bool, training: bool | None, exact: Mapping[int, Tensor] | None = None
) -> nn.Module:
    own = _libraries(model)
    for module in modules_of(runner):
        for table, hooks in _hooks(module, own):
            for key in hooks:
                del table[key]
    if training is not None and runner.training != training:
        runner.train(training)
    if not double:
        return runner
    if any(p.device.type == "mps" for p in model.parameters()):  # no float64 there
        runner = runner.cpu()
    runner = runner.to(torch.float64)
    if exact:
        for ours, theirs in zip(_tables(runner), _tables(model), strict=True):
            for name, tensor in theirs.items():
                if tensor is not None and id(tensor) in exact and name in ours:
                    number = exact[id(tensor)].to(ours[name].device, torch.float64)
                    ours[name].data = number.reshape(ours[name].shape)
    return runner


def hooked(model: nn.Module) -> dict[str, int]:
    """How many hooks of a person's own each module has."""
    own = _libraries(model)
    counts = {path: sum(len(hooks) for _, hooks in _hooks(module, own)) for path, module in model.named_modules()}
    return {path: count for path, count in counts.items() if count}


def _hooks(module: nn.Module, own: frozenset[str]) -> Iterator[tuple[Any, list[int]]]:
    """Tables of hooks, each with the keys of those that are neither torch's nor ``own``, nor compute weights."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        table = vars(module).get(name) or {}
        keys = [
            key
            for key, hook in table.items()
            if not (type(hook).__module__.startswith("torch.") or _package(hook) in own or makes_weight(hook))
        ]
        if keys:
            yield table, keys


def _libraries(model: nn.Module) -> frozenset[str]:
    """The installed packages that define the network's classes, torch aside."""
    return frozenset(filter(_is_installed, {_package(type(module)) for module in modules_of(model)}))


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", None) or "").partition(".")[0]


def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None)
    return package != "torch" and file is not None and any(Path(file).is_relative_to(site) for site in _SITES)


_SITES = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}


def _tables(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers


@torch.no_grad()
def nudged(runner: nn.Module, eps: float) -> nn.Module:
    """Move every weight by ``eps`` of itself, up or down: what rounding does to a network, at least."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    for parameter in runner.parameters():
        if parameter.is_floating_point():
            signs = torch.randint(2, parameter.shape, generator=generator, device="cpu") * 2 - 1
            parameter.mul_(1 + eps * signs.to(parameter.device, parameter.dtype))
    return runner


@torch.no_grad()
def run(runner: nn.Module, example: Example, *, double: bool = True, within: Any = None) -> Run:
    """Call a network, see what it does, and leave the caller's generators and settings as they were.

    Args:
        runner: a copy; it is changed by what its forward writes.
        example: the call; its tensors are copied.
        double: in float64 throughout.
        within: a context to call it in, which may watch the operations.
    """
    args, kwargs = copied((example.args, dict(example.kwargs)), _double if double else None)
    seen = _Seen(runner)
    mode = Double() if double else _Watch()
    before = Marks(runner)
    with surroundings(runner) as generators, kept_outside(runner), seen, mode, within or nullcontext():
        value = runner(*args, **kwargs)
    ran = frozenset(seen.counts) | _owners(runner, mode.used)
    left, had, given = changes(runner, before), frozenset(before.of), tuple(tensors_in((args, kwargs)))
    return Run(value, left, had, generators[0], ran, seen.counts, mode.cast, given)


def outputs(
    model: nn.Module, example: Example, dtype: torch.dtype | None = torch.float64, *, spent: bool = False
) -> Any:
    """What ``model`` returns, run on a copy in eval mode and in ``dtype`` (None: as it is).

    With ``spent`` nobody needs the model any more: in float64 it is run itself.
    """
    if dtype == torch.float64:
        return _returned(_ready(model, model, True, False) if spent else runner_of(model), example, double=True)
    runner = runner_of(model, double=False)
    if dtype is not None:
        runner, example = runner.to(dtype), in_dtype(example, dtype)
    return _returned(runner, example, double=False)


@torch.no_grad()
def _returned(runner: nn.Module, example: Example, *, double: bool) -> Any:
    """What :func:`run` sees returned, for who asks for nothing else."""
    args, kwargs = copied((example.args, dict(example.kwargs)), _double if double else None)
    with surroundings(runner, digest=False), kept_outside(runner), Double() if double else nullcontext():
        return runner(*args, **kwargs)


def in_dtype(example: Example, dtype: torch.dtype) -> Example:
    """The same call with its numbers in ``dtype``."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    args, kwargs = copied((example.args, dict(example.kwargs)), cast)
    return Example(args, kwargs, example.made_up)


# ------------------------------------------------------------------ surroundings


_AMBIENT: ContextVar[torch.device | None] = ContextVar("ambient", default=None)


@contextmanager
def default_device(ambient: torch.device) -> Iterator[None]:
    """Make new tensors on the CPU, except in networks that are run: there ``ambient``, the caller's, is the default."""
    token = _AMBIENT.set(ambient)
    try:
        with torch.device("cpu"):
            yield
    finally:
        _AMBIENT.reset(token)


@contextmanager
def surroundings(model: nn.Module, *, digest: bool = True) -> Iterator[list[str]]:
    """The same surroundings for every run, whatever the caller has set; its generators are restored.

    Yields a list that holds, afterwards, one digest of where the generators ended: empty if that is where they began.
    Without ``digest`` it stays empty.
    """
    devices = {p.device for p in [*model.parameters(), *model.buffers()]} or {torch.device("cpu")}
    kinds = {d.type for d in devices if d.type in ("cpu", "cuda", "xpu")} | {"cpu"}
    ends: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        ambient = _AMBIENT.get()
        if ambient is not None:  # the caller's own default; where that has no numbers, the model's
            stack.enter_context(min(devices, key=str) if ambient.type == "meta" else ambient)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the user's own code warns when the user runs it
        stack.enter_context(_generators(devices, ends if digest else None))
        yield ends


@contextmanager
def _generators(devices: set[torch.device], ends: list[str] | None) -> Iterator[None]:
    """Seed all generators that a forward may draw from: torch's, Python's and NumPy's; restore them after."""
    numpy: Any = sys.modules.get("numpy")
    cuda = sorted({d.index or 0 for d in devices if d.type == "cuda"})
    with kept_generators(devices):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        if numpy is not None:
            numpy.random.seed(0)
        for i in cuda:
            torch.cuda.default_generators[i].manual_seed(0)
        start = "" if ends is None else _digest(cuda)
        try:
            yield
        finally:
            if ends is not None:
                end = _digest(cuda)
                ends.append("" if end == start else end)


def _digest(cuda: list[int]) -> str:
    """Where the generators stand."""
    found = hashlib.sha256(torch.default_generator.get_state().numpy().tobytes())
    found.update(repr(states()).encode())
    for i in cuda:
        found.update(torch.cuda.get_rng_state(i).numpy().tobytes())
    return found.hexdigest()


# ------------------------------------------------------------------ float64


_COARSE = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_IN_PLACE = re.compile(r"(?!__).*(?<!_)_|__(setitem|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor))__")


class _Watch(TorchFunctionMode):
    """Notes which parameters operations read: a module whose forward is called past its hooks is seen as well."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()
        self.cast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(args, kwargs)
        return func(*args, **(kwargs or {}))

    def note(self, args: Any, kwargs: Any) -> None:
        for value in (*args, *(kwargs or {}).values()):
            if isinstance(value, nn.Parameter):
                self.used.add(id(value))


class Double(_Watch):
    """Inside, each function works in float64, also where a network asks for float32.

    A tensor of a coarser dtype is cast where it is used; ``cast`` says whether that happened.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(args, kwargs)
        if func in _CASTS:
            self.cast = True
            return args[0].double()
        # What is changed in place must be the tensor itself.
        kept = args[:1] if _IN_PLACE.fullmatch(getattr(func, "__name__", "")) else ()
        args = (*kept, *tree_map(self._double, args[len(kept) :]))
        result = func(*args, **tree_map(self._double, kwargs or {}))
        return result if kept else tree_map(self._double, result) if _is_coarse(result) else result

    def _double(self, value: Any) -> Any:
        new = _double(value)
        self.cast |= new is not value
        return new


def _is_coarse(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.dtype in _COARSE
    return isinstance(result, (list, tuple)) and any(isinstance(r, Tensor) and r.dtype in _COARSE for r in result)


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.dtype in _COARSE:
            return value.double()
        return value.to(torch.complex128) if value.dtype == torch.complex64 else value
    return torch.float64 if isinstance(value, torch.dtype) and value in _COARSE else value


# ------------------------------------------------------------------ who took part


class _Seen:
    """How often each module is called while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.counts, self._handles = model, Counter[str](), list[Any]()

    def __enter__(self) -> None:
        for path, module in self._model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):

                def note(module: nn.Module, args: Any, path: str = path) -> None:
                    self.counts[path] += 1

                self._handles.append(module.register_forward_pre_hook(note))

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _owners(model: nn.Module, used: set[int]) -> frozenset[str]:
    """Paths of the modules that hold one of the parameters, and of those around them."""
    found = set[str]()
    for path, module in model.named_modules():
        if any(p is not None and id(p) in used for p in module._parameters.values()):
            parts = path.split(".")
            found |= {".".join(parts[:i]) for i in range(len(parts) + 1)}
    return frozenset(found)
