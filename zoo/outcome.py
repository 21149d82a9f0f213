"""What became of one model of a run: a sum type, and the format in which a run folder keeps it.

A run folder holds ``journal.jsonl``, ``lock`` and ``models/SOURCE/NAME.*``. The journal is JSON lines; each line has
``record``:

``run``, first, and once more for each ``--resume``::

    {"record": "run", "started": "2026-01-31T22:00:00+00:00", "specs": ["timm:resnet18", ...],
     "settings": {"block": "acb" | null, "pretrained": false, "weights": "DIR" | null, "save": true, "onnx": false,
                  "max_parameters": 100000000 | null, "outputs": true, "latency": true, "plan": false},
     "limits": {"jobs": 2, "timeout": 900.0, "memory": 8.0 | null}, "command": ["zoo", "convert", ...],
     "versions": {"reparam": "0.1.0", "torch": ..., "timm": ..., "torchvision": ..., "python": ...},
     "machine": "AMD EPYC, 2 cores", "done_before": 0}

``outcome``, one for each model that ended; a later line about the same ``source`` and ``name`` replaces the earlier::

    {"record": "outcome", "kind": KIND, "name": "resnet18", "source": "timm", "started": ISO time,
     "seconds": {"build": 0.2, "expand": 0.1, "inputs": ..., "reference": ..., "collapse": ..., "roundtrip": ...,
                 "latency": ..., "compare": ..., "onnx": ..., "save": ..., "all": ...},
     "peak": bytes resident at most, "versions": as above, "notes": ["dropped the prefix 'module.'", ...], ...}

``end``, when all models of a run have ended: ``{"record": "end", "finished": ISO time, "seconds": 512.3}``.

Besides, by KIND (a number that is not finite or not known is null):

=============  =====================================================================================================
converted      ``before``, ``after``: sizes, and ``stock`` with a block (``before`` is then the expanded network);
               ``proof``; ``latency`` or null; ``folds`` (count), ``refused`` (reason -> layers that stay),
               ``expanded`` (layers that got a block), ``left`` (reason -> layers that got none), ``file``,
               ``expanded_file`` and ``details``: paths relative to the run folder, null if nothing was saved;
               ``onnx_file``: the same, null if none was asked for or, as a note then says, the network cannot be
               exported; ``file_bytes``: of ``file``
planned        ``before``, ``after``: sizes; ``folds``, ``refused``, ``expanded``, ``left`` as above, of what would be;
               ``others``: what ``timm`` and ``fx``, the folds that others ship, leave: ``{"convs", "norms"}`` or null
nothing_to_do  ``reason``; ``before``: size or null
refused        ``reason``: sentence; ``refused``: reason -> layers; ``before``: size or null
mismatch       ``error``: relative; ``allowed``; ``layer``: where it starts; ``message``
failed         ``stage``; ``error``: one line; ``traceback``: text, or the tail of what a crashed process wrote
timed_out      ``stage``; ``limit``: seconds
out_of_memory  ``stage``; ``limit``: GiB, null if it was the system's; ``message``
=============  =====================================================================================================

Size: ``{"parameters", "bytes", "convs", "norms", "linears", "multiply_adds"}``; the last is of one sample of
``latency.shape``, null if it was not run. Latency, in milliseconds on one thread, runs of both taking turns:
``{"shape": [1, 3, 224, 224], "before": median, "after": median, "before_runs": [...], "after_runs": [...]}``.
Proof: ``{"folds": folds proven, "fold_error": largest relative error of any fold in the shipped dtype, "outputs":
"whole" | "features" | "none", "error": relative difference of the outputs in float64, "noise": the dtype's noise floor,
"allowed": what error may be, "roundtrip": null | true, "remark": why outputs were not compared}``; with a block,
``roundtrip`` says that the stock architecture took the collapsed state dict strictly and computes the same.

``details`` (``models/timm/resnet18.json``) is written last, so that a model whose details exist is finished::

    {"outcome": the outcome's line, "settings": as above,
     "weights": {"origin": "random" | "pretrained" | "file", "seed": 0, "randomised": true, "file": "...", "notes": []},
     "folds": [{"layers": [...], "into": "Conv2d(...)", "where": "path", "numbers": [before, after],
                "multiply_adds": [before, after], "error": 1e-8, "region": index in regions | null}],
     "refusals": [{"layer": "path", "reason": "LARGER", "text": the reason's text, "message": "..."}],
     "left": the same of layers that got no block, "untraced": [{"layer", "message"}], "notes": [...],
     "regions": [REGION, ...]}

REGION draws each distinct shape of a fold once: ``{"count": folds of this shape, "example": layers, "before": GRAPH,
"after": GRAPH}``; GRAPH is ``{"nodes": [{"id": 0, "label": "Conv2d 64→64 3x3", "path": "layer1.0.conv1", "kind":
"input" | "conv" | "norm" | "linear" | "add" | "pool" | "other" | "output"}], "edges": [[0, 1], ...]}``, acyclic, ids in
order of execution.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, ClassVar

from passes.edits.typed import fits, hints

__all__ = [
    "KINDS",
    "Converted",
    "Failed",
    "Latency",
    "Mismatch",
    "NothingToDo",
    "OutOfMemory",
    "Outcome",
    "Planned",
    "Proof",
    "Refused",
    "Size",
    "TimedOut",
    "from_json",
    "refuse_constant",
]


@dataclass(frozen=True)
class Size:
    """How large a network is; ``multiply_adds`` are those of one sample, None if it was not run."""

    parameters: int
    bytes: int
    convs: int
    norms: int
    linears: int
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass on one thread; runs of both networks took turns."""

    shape: tuple[int, ...]
    before: float
    after: float
    before_runs: tuple[float, ...] = ()
    after_runs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Proof:
    """What was proven: each fold, and the whole network where an input could be made for it.

    Args:
        folds: folds proven on their own.
        fold_error: largest relative error of any of them, in the shipped dtype.
        outputs: what was compared as a whole: ``"whole"`` outputs, a detector's ``"features"``, or ``"none"``.
        error: relative difference of those in float64; NaN if none were compared.
        noise: distance of the reference in its own dtype from itself in float64.
        allowed: what ``error`` may be.
        roundtrip: with a block, whether the stock architecture took the state dict strictly and agreed.
        remark: why outputs were not compared.
    """

    folds: int
    fold_error: float
    outputs: str = "none"
    error: float = math.nan
    noise: float = math.nan
    allowed: float = math.nan
    roundtrip: bool | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all outcomes carry.

    Args:
        name: of the model in its source.
        source: for example ``timm``; ``source:name`` is the spec.
        started: ISO time.
        seconds: per stage, and ``all``.
        peak: resident bytes of its process at most.
        versions: of the packages that did it.
        notes: what is worth knowing, such as a prefix that was dropped from the names in a checkpoint.
    """

    kind: ClassVar[str] = ""
    ok: ClassVar[bool] = True
    """Whether this is no reason for exit status 1."""

    name: str
    source: str
    started: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        return f"{self.source}:{self.name}"

    def to_json(self) -> dict[str, Any]:
        """A line of the journal, without ``record``; numbers that are not finite become None."""
        fields: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"kind": self.kind} | fields

    def sentence(self) -> str:
        """What a line of a log says behind the name."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Converted(Outcome):
    """Collapsed, proven and, unless it was only a check, saved; see the module's text for the fields."""

    kind: ClassVar[str] = "converted"

    before: Size
    after: Size
    proof: Proof
    stock: Size | None = None
    latency: Latency | None = None
    folds: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    expanded: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    file: str | None = None
    expanded_file: str | None = None
    onnx_file: str | None = None
    details: str | None = None
    file_bytes: int = 0

    def sentence(self) -> str:
        text = f"{self.folds} folds, convs {self.before.convs} → {self.after.convs}"
        text += f", norms {self.before.norms} → {self.after.norms}"
        if self.latency is not None:
            text += f", {self.latency.before:.1f} → {self.latency.after:.1f} ms"
        shown = self.proof.fold_error if self.proof.outputs == "none" else self.proof.error
        return f"{text}, error {shown:.0e}" if math.isfinite(shown) else text


@dataclass(frozen=True, kw_only=True)
class Planned(Outcome):
    """Planned without numbers; see the module's text for the fields."""

    kind: ClassVar[str] = "planned"

    before: Size
    after: Size
    folds: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    expanded: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, counts in self.others.items():
            if counts is not None and not counts.keys() >= {"convs", "norms"}:
                raise ValueError(f"others cannot have {counts!r:.40} of {name}")

    def sentence(self) -> str:
        text = f"{self.folds} folds, convs {self.before.convs} → {self.after.convs}"
        text += f", norms {self.before.norms} → {self.after.norms}"
        return f"{text}, {self.expanded} of {self.expanded + sum(self.left.values())} convs get a block"


@dataclass(frozen=True, kw_only=True)
class NothingToDo(Outcome):
    """There is nothing in the network that could fold, or that a block could replace."""

    kind: ClassVar[str] = "nothing_to_do"

    reason: str
    before: Size | None = None

    def sentence(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Refused(Outcome):
    """There is something, and none of it can be done exactly; ``refused`` counts layers by reason."""

    kind: ClassVar[str] = "refused"

    reason: str
    refused: Mapping[str, int] = field(default_factory=dict)
    before: Size | None = None

    def sentence(self) -> str:
        return self.reason


@dataclass(frozen=True, kw_only=True)
class Mismatch(Outcome):
    """The result computes something else; nothing was saved."""

    kind: ClassVar[str] = "mismatch"
    ok: ClassVar[bool] = False

    error: float
    allowed: float = math.nan
    layer: str = ""
    message: str = ""

    def sentence(self) -> str:
        return f"differs by {self.error:.1e} at {self.layer or 'the output'}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Failed(Outcome):
    """An error, or a process that died, in ``stage``."""

    kind: ClassVar[str] = "failed"
    ok: ClassVar[bool] = False

    stage: str
    error: str
    traceback: str = ""

    def sentence(self) -> str:
        return f"{self.stage}: {self.error}"


@dataclass(frozen=True, kw_only=True)
class TimedOut(Outcome):
    """Ended after ``limit`` seconds."""

    kind: ClassVar[str] = "timed_out"
    ok: ClassVar[bool] = False

    stage: str
    limit: float

    def sentence(self) -> str:
        return f"{self.stage}: ended after {self.limit:g} s"


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Outcome):
    """Ended for its memory: over ``limit`` GiB, or by the system where that is None."""

    kind: ClassVar[str] = "out_of_memory"
    ok: ClassVar[bool] = False

    stage: str
    limit: float | None = None
    message: str = ""

    def sentence(self) -> str:
        return f"{self.stage}: {self.message}"


KINDS: dict[str, type[Outcome]] = {
    cls.kind: cls for cls in (Converted, Planned, NothingToDo, Refused, Mismatch, Failed, TimedOut, OutOfMemory)
}
"""Outcomes by the name that the journal has for them, in the order in which they are counted."""

_NESTED: dict[str, type[Any]] = {"before": Size, "after": Size, "stock": Size, "latency": Latency, "proof": Proof}
_NOT_KNOWN = {"fold_error", "error", "noise", "allowed"}
"""Numbers whose absence is NaN."""
_FILES = {"file", "expanded_file", "onnx_file", "details"}
"""Paths relative to the folder of the run."""


def refuse_constant(text: str) -> Any:
    """For ``json.loads(parse_constant=)``: NaN and infinities are no JSON, and no file of a run has them."""
    raise ValueError(f"{text} is no number")


def from_json(line: Mapping[str, Any]) -> Outcome:
    """The outcome of a journal line. Fields that a later version added are left out.

    Raises:
        ValueError: a kind that is not known, or a field that is missing or of another type, or a file elsewhere.
    """
    kind = line.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of outcome {kind!r}; known: {', '.join(KINDS)}")
    try:
        # A latency has numbers called before and after; an outcome has sizes.
        nested = {key: _built(_NESTED[key], value) for key, value in line.items() if key in _NESTED and value}
        return _built(KINDS[kind], {**line, **nested})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not the line of a {kind} outcome: {error}") from error


def _built(cls: type[Any], values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {key: value for key, value in values.items() if key in known}
    for key, value in arguments.items():
        if value is None and key in _NOT_KNOWN:
            arguments[key] = math.nan
        elif isinstance(value, list):
            arguments[key] = tuple(value)
    for key, value in arguments.items():
        if not fits(value, hints(cls)[key]):
            raise ValueError(f"{key} cannot be {value!r:.40}")
        if key in _FILES and value is not None and not _is_inside(value):
            raise ValueError(f"{key} is {value!r:.60}, which is not in the folder of the run")
    if not all(arguments.get(key, "").isprintable() for key in ("name", "source")):
        raise ValueError("a name holds characters that cannot be printed")
    return cls(**arguments)


def _is_inside(path: str) -> bool:
    """Whether a path of a journal lies in the folder of the run, whatever the system."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    return bool(parts) and ".." not in parts and not parts[0].endswith((":", "/"))


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
