"""How far what two networks return is apart, in values and in kind, and the verdict on it.

Two computations of the same thing in float64 agree to 1e-10. Numbers that were rounded to a coarser dtype are allowed
ten times the noise floor: how far the reference in that dtype is from itself in float64. There is a ceiling to that: a
selection (top-k, a threshold, non-maximum suppression) makes the noise as large as the output, and an allowance of that
size would let any network pass. Beyond the ceiling there is no verdict.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from passes.refusal import ReparamError

__all__ = [
    "FLOAT64_TOLERANCE",
    "Comparison",
    "Difference",
    "Equivalence",
    "EquivalenceError",
    "Verdict",
    "ceiling",
    "coarsest_dtype",
    "compared",
    "distance",
    "judge",
    "tolerance",
]

FLOAT64_TOLERANCE = 1e-10
"""Largest relative difference between two float64 computations of the same thing."""


class EquivalenceError(ReparamError):
    """A rewrite changed what the network computes; the message names where and by how much.

    Args:
        message: for a person.
        layer: path where the difference starts, or the layers that were folded; empty if that is not known.
        error: size of the difference, relative where it has something to be relative to; NaN for other shapes.
    """

    def __init__(self, message: str, *, layer: str = "", error: float = math.nan) -> None:
        super().__init__(message)
        self.layer, self.error = layer, error


class Verdict(Enum):
    """What a comparison found."""

    EQUAL = "equal"
    DIFFERENT = "different"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Difference:
    """One way in which two networks differ.

    Args:
        what: a sentence's end, such as ``"returns a dict instead of an OrderedDict"``.
        layer: path of the module where it is seen; empty for what the network returns.
        error: size, relative to the largest magnitude of that output; infinite for a difference in kind.
        numbers: whether the numbers or their count differ, so that rounding may explain it.
    """

    what: str
    layer: str = ""
    error: float = math.inf
    numbers: bool = False

    def __str__(self) -> str:
        return f"{self.layer or 'the network'} {self.what}"


@dataclass(frozen=True)
class Equivalence:
    """Outcome of a comparison of two networks.

    Args:
        verdict: equal, different, or inconclusive: rounding alone may make as large a difference.
        max_abs: largest absolute difference of any output, computed in float64.
        max_rel: the same relative to the largest magnitude of that output.
        tolerance: what ``max_rel`` may be.
        noise: relative distance of the reference in the candidate's dtype from itself in float64; None for float64.
        first_difference: path of the module where the difference starts; None if there is none.
        reason: what differs other than numbers, or why there is no verdict.
    """

    verdict: Verdict
    max_abs: float
    max_rel: float
    tolerance: float
    noise: float | None = None
    first_difference: str | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the networks are equal, as far as their dtype can tell."""
        return self.verdict is Verdict.EQUAL

    def raise_if_different(self) -> None:
        """Raise :class:`EquivalenceError` if the networks are seen to differ; an inconclusive comparison does not."""
        if self.verdict is Verdict.DIFFERENT:
            raise EquivalenceError(str(self), layer=self.first_difference or "", error=self.max_rel)

    def __str__(self) -> str:
        where = f", first at {self.first_difference}" if self.first_difference is not None else ""
        why = f": {self.reason}" if self.reason else ""
        numbers = f"differ by {self.max_abs:.3g} (relative {self.max_rel:.3g}, allowed {self.tolerance:.3g})"
        if self.verdict is Verdict.INCONCLUSIVE:
            return f"inconclusive: the networks {numbers}{where}{why}"
        return f"the networks {numbers}{where}{why}" if self.verdict is Verdict.DIFFERENT else f"equal: they {numbers}"


# ------------------------------------------------------------------ values


@dataclass
class Comparison:
    """How far two values are apart: the largest gaps, how many finite numbers were compared, what differs in kind."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    numbers: int = 0
    differences: list[Difference] = field(default_factory=list)

    def note(self, what: str, *, numbers: bool = False) -> None:
        """A difference in kind, or in how many numbers there are."""
        self.max_abs = self.max_rel = math.inf
        self.differences.append(Difference(what, numbers=numbers))

    def gap(self, size: float, relative: float) -> None:
        """A difference in numbers."""
        self.max_abs, self.max_rel = max(self.max_abs, size), max(self.max_rel, relative)


def compared(got: Any, wanted: Any, *, types: bool = True) -> Comparison:
    """Compare what two networks return, whatever it is nested in.

    Args:
        got: tensors of any dtype, mappings, sequences, dataclasses, objects with attributes.
        wanted: what it should be.
        types: whether classes and dtypes count, else a list may stand for a tuple and a dict for an ``OrderedDict``.
    """
    comparison = Comparison()
    _walk(got, wanted, "", comparison, types, set())
    return comparison


def distance(got: Any, wanted: Any) -> tuple[float, float]:
    """Largest absolute and relative difference; infinite for other shapes or where one of the two is not finite."""
    comparison = compared(got, wanted, types=False)
    return comparison.max_abs, comparison.max_rel


def _walk(got: Any, wanted: Any, at: str, into: Comparison, types: bool, seen: set[tuple[int, int]]) -> None:
    if got is wanted and isinstance(wanted, (str, bytes, type(None))):
        return
    if (id(got), id(wanted)) in seen:
        return
    seen.add((id(got), id(wanted)))
    if _kind(got) is not _kind(wanted) or (types and type(got) is not type(wanted) and not _same_class(got, wanted)):
        into.note(f"returns {_a(got)} instead of {_a(wanted)}{_at(at)}")
    elif isinstance(wanted, Tensor):
        _tensors(got, wanted, at, into, types)
    elif isinstance(wanted, (bool, int, float, complex)):
        _tensors(_as_tensor(got), _as_tensor(wanted), at, into, types)
    elif _is_array(wanted):
        if wanted.dtype.kind in "biufc" and got.dtype.kind in "biufc":
            _tensors(torch.as_tensor(got), torch.as_tensor(wanted), at, into, types)
    elif isinstance(wanted, Mapping):
        _mappings(got, wanted, at, into, types, seen)
    elif isinstance(wanted, (list, tuple)) or _is_deque(wanted):
        _sequences(got, wanted, at, into, types, seen)
    elif isinstance(wanted, (nn.Module, type)) or callable(wanted):
        return
    elif (theirs := _fields(wanted)) is not None:
        _mappings(_fields(got) or {}, theirs, at, into, types, seen, ".{}")
    elif not _equal(got, wanted):
        into.note(f"returns {_short(got)} instead of {_short(wanted)}{_at(at)}")


def _mappings(
    got: Any, wanted: Any, at: str, into: Comparison, types: bool, seen: set[tuple[int, int]], form: str = "[{!r}]"
) -> None:
    ours, theirs = list(got), list(wanted)
    if (ours != theirs) if types else (set(ours) != set(theirs)):
        into.note(f"returns {_short(ours)} instead of {_short(theirs)} as keys{_at(at)}")
        return
    for key in theirs:
        _walk(got[key], wanted[key], at + form.format(key), into, types, seen)


def _sequences(got: Any, wanted: Any, at: str, into: Comparison, types: bool, seen: set[tuple[int, int]]) -> None:
    if len(got) != len(wanted):
        into.note(f"returns {len(got)} values instead of {len(wanted)}{_at(at)}")
        return
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        _walk(ours, theirs, f"{at}[{i}]", into, types, seen)


def _tensors(got: Tensor, wanted: Tensor, at: str, into: Comparison, types: bool) -> None:
    if types and got.dtype != wanted.dtype:
        into.note(f"returns {_name(got.dtype)} instead of {_name(wanted.dtype)}{_at(at)}")
    elif got.shape != wanted.shape:
        what = f"returns shape {tuple(got.shape)} instead of {tuple(wanted.shape)}{_at(at)}"
        into.note(what, numbers=got.dim() == wanted.dim())
    elif got.is_meta or wanted.is_meta or not wanted.numel():
        return
    else:
        size, relative, numbers = _gap(_plain(got), _plain(wanted))
        into.numbers += numbers
        into.gap(size, relative)


def _gap(got: Tensor, wanted: Tensor) -> tuple[float, float, int]:
    """Absolute and relative gap, and how many finite numbers there are; what is not finite must be so in both."""
    if not (wanted.is_floating_point() or got.is_floating_point()):
        return (0.0, 0.0, wanted.numel()) if torch.equal(got, wanted) else (math.inf, math.inf, wanted.numel())
    got, wanted = got.double(), wanted.double()
    finite = torch.isfinite(wanted)
    if not bool(finite.all()):
        same = (got == wanted) | (torch.isnan(got) & torch.isnan(wanted))
        if not bool((same | finite).all()):
            return math.inf, math.inf, int(finite.sum())
        got, wanted = got[finite], wanted[finite]
        if not wanted.numel():
            return 0.0, 0.0, 0
    gap = float((got - wanted).abs().max())
    if not math.isfinite(gap):
        return math.inf, math.inf, wanted.numel()
    return gap, gap / max(float(wanted.abs().max()), 1e-300), wanted.numel()


def _plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, real and strided."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _as_tensor(value: Any) -> Tensor:
    kind = torch.complex128 if isinstance(value, complex) else torch.float64 if isinstance(value, float) else None
    if kind is None and abs(value) >= 1 << 62:
        kind = torch.float64
    return torch.tensor(value, dtype=kind, device="cpu")


def _kind(value: Any) -> Any:
    """Values of one kind can be compared, whatever their classes."""
    if isinstance(value, (bool, int, float, complex)):
        return float
    if dataclasses.is_dataclass(value) and not isinstance(value, (Mapping, type)):
        return type(value)
    if _is_array(value):
        return "array"
    kinds = (Tensor, Mapping, str, nn.Module)
    found = next((kind for kind in kinds if isinstance(value, kind)), None)
    if found is None and (isinstance(value, (list, tuple)) or _is_deque(value)):
        return Sequence
    return found or type(value)


def _same_class(got: Any, wanted: Any) -> bool:
    """A module that was edited is of a class made on the spot; a copy of a tensor may be a plain one."""
    if isinstance(wanted, nn.Module):
        return True
    return isinstance(wanted, nn.Parameter) and type(got) is Tensor


def _fields(value: Any) -> dict[str, Any] | None:
    """Attributes of an object, unless it compares itself."""
    if not _by_identity(value) and not dataclasses.is_dataclass(value):
        return None
    found = getattr(value, "__dict__", None)
    if found is None and dataclasses.is_dataclass(value):
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(found) if found else None


def _by_identity(value: Any) -> bool:
    equal: Any = type(value).__eq__
    return equal is object.__eq__


def _equal(got: Any, wanted: Any) -> bool:
    if _by_identity(wanted):
        return True  # an object without content that could be compared
    try:
        return bool(got == wanted)
    # Comparing runs user code: what cannot be compared is not known to differ.
    except Exception:
        return True


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_deque(value: Any) -> bool:
    return type(value).__name__ == "deque" and hasattr(value, "rotate")


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"a{'n' if name[:1] in 'AEIOUaeiou' else ''} {name}"


def _at(at: str) -> str:
    return f" at {at}" if at else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------ verdicts


def tolerance(noise: float | None, dtype: torch.dtype) -> float:
    """What a relative difference may be: ten times the noise floor, within limits.

    These are 64 units in the last place and the :func:`ceiling`.
    """
    if noise is None:
        return FLOAT64_TOLERANCE
    least = 64 * torch.finfo(dtype).eps
    wide = max(10 * noise, least) if math.isfinite(noise) else least
    return min(wide, ceiling(dtype))


def ceiling(dtype: torch.dtype) -> float:
    """The largest tolerance that still says something: a hundredth, or what little a coarse dtype can tell."""
    return max(1e-2, 8 * torch.finfo(dtype).eps)


def judge(error: float, noise: float | None, dtype: torch.dtype) -> Verdict:
    """The verdict on a relative difference; there is none where rounding alone makes more than is allowed."""
    if error <= tolerance(noise, dtype):
        return Verdict.EQUAL
    if noise is not None and not 10 * noise <= ceiling(dtype) and error <= 10 * noise:
        return Verdict.INCONCLUSIVE
    return Verdict.DIFFERENT


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype with the fewest digits among the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float64)
