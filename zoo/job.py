"""One model of a run: what is asked, the clock and the notes of the work, and what its end means.

:mod:`zoo.convert` and :mod:`zoo.plan` are the two kinds of work.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from reparam import EquivalenceError, ReparamError
from reparam.exhausted import was_exhausted
from reparam.recipe import parse_block
from zoo import memory
from zoo.journal import Folder
from zoo.outcome import Failed, Mismatch, Outcome, OutOfMemory, Refused, from_json

__all__ = [
    "FILES",
    "Ended",
    "Job",
    "Settings",
    "Tell",
    "Work",
    "attempt",
    "finished",
    "one_line",
    "remove_files",
    "silent",
    "versions",
]


PACKAGES = ("reparam", "torch", "timm", "torchvision", "safetensors", "onnx", "onnxscript", "onnxruntime")
"""Those whose versions decide about results."""


FILES = "onnx"
"""The source of jobs whose checkpoint is an ONNX file, and whose name is that of the file."""


class Tell(Protocol):
    """Called with the name of each stage as it begins."""

    def __call__(self, stage: str, /) -> object:
        """Say it."""


def silent(stage: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Settings:
    """What decides about the results of a run, the same for all of its models.

    Args:
        block: as for ``reparam expand``: a name, or ``name:option=value``; None collapses what is there.
        pretrained: load the source's trained weights.
        weights: folder of checkpoints.
        save: keep the networks; otherwise only what was found out about them.
        onnx: keep them as ONNX files, too (:mod:`zoo.onnx_file`).
        max_parameters: larger networks are refused before they are built.
        outputs: compare whole outputs and the way back to the stock architecture; each fold is proven without it.
        latency: time both networks and count their multiply-adds.
        plan: only plan, on the meta device (:mod:`zoo.plan`).
        norms, cost: as for :func:`reparam.collapse`.
    """

    block: str | None = None
    pretrained: bool = False
    weights: str | None = None
    save: bool = True
    onnx: bool = False
    max_parameters: int | None = None
    outputs: bool = True
    latency: bool = True
    plan: bool = False
    norms: str = "keep"
    cost: str = "numbers"

    def are(self, recorded: Any) -> bool:
        """Whether a run was recorded with these; what an older version did not know has its default."""
        return isinstance(recorded, dict) and vars(Settings()) | recorded == vars(self)


@dataclass(frozen=True)
class Job:
    """One model: where it is from, what to do with it, and the run folder that gets the files (None: no files)."""

    source: str
    name: str
    settings: Settings = Settings()
    folder: Path | None = None
    checkpoint: str | None = None

    @property
    def spec(self) -> str:
        return f"{self.source}:{self.name}"

    def path(self, suffix: str) -> Path | None:
        return None if self.folder is None else Folder(self.folder).of(self.source, self.name, suffix)


class Ended(Exception):
    """The conversion ended before its end, with this kind of outcome and these fields."""

    def __init__(self, kind: type[Outcome], **fields: Any) -> None:
        super().__init__(kind.kind)
        self.kind, self.fields = kind, fields


@dataclass
class Work:
    """The clock and the notes of one model's work."""

    job: Job
    tell: Tell
    stage: str = "start"
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    large: bool = False

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.held = memory.reset()
        self.most = 0

    def common(self) -> dict[str, Any]:
        """The fields that every outcome has."""
        seconds = {stage: round(value, 4) for stage, value in self.seconds.items()}
        seconds["all"] = round(time.perf_counter() - self.began, 4)
        return {
            "name": self.job.name,
            "source": self.job.source,
            "started": self.started,
            "seconds": seconds,
            "peak": self.peak(),
            "versions": versions(),
            "notes": tuple(self.notes),
        }

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Count the time of a stage; when an error leaves it, ``self.stage`` says where it came from."""
        self.stage = stage
        self.tell(stage)
        self.peak()
        memory.return_freed(self.large and stage != "latency")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def peak(self) -> int:
        """Bytes held at most, beyond those held at the start; stage by stage, since code is loaded on the way."""
        self.most = max(self.most, memory.high_water() - self.held)
        memory.reset()
        return self.most

    def run(self) -> Outcome:
        """Do it; raises :class:`Ended` to end early."""
        raise NotImplementedError


def attempt(work: Work) -> Outcome:
    """Do the work. Never raises an ordinary exception: what goes wrong is the outcome."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what networks themselves warn of is not the point here
            return work.run()
    except Ended as end:
        return end.kind(**work.common(), **end.fields)
    except EquivalenceError as error:
        message = " ".join(str(error).split())
        return Mismatch(**work.common(), error=error.error, layer=error.layer, message=message)
    # One network that fails, however it does, is one outcome; the run goes on.
    except Exception as error:
        if was_exhausted(error):
            return OutOfMemory(**work.common(), stage=work.stage, message="the system gave no more memory")
        if isinstance(error, ReparamError) and work.stage in ("expand", "collapse", "roundtrip"):
            return Refused(**work.common(), reason=one_line(error, named=False))
        text = "" if isinstance(error, ReparamError) else traceback.format_exc()
        named = not isinstance(error, ReparamError)
        return Failed(**work.common(), stage=work.stage, error=one_line(error, named=named), traceback=text)


def finished(job: Job) -> Outcome | None:
    """The outcome of a model whose files are whole although no journal says so: the run was killed between the two."""
    path = job.path(".json")
    try:
        details = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        return from_json(details["outcome"]) if details and job.settings.are(details["settings"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_files(job: Job) -> None:
    """Remove what a model that was not converted has written."""
    block = f".{parse_block(job.settings.block).name}" if job.settings.block else ""
    for suffix in (".safetensors", f"{block}.safetensors", ".onnx", ".json"):
        path = job.path(suffix)
        if path is not None:
            with suppress(OSError):  # a disk that has become read-only keeps it; without details it does not count
                path.unlink(missing_ok=True)


def one_line(error: BaseException, width: int = 300, *, named: bool = True) -> str:
    """An exception in one line, with its class unless its message was written for a person."""
    text = f"{type(error).__name__}: {error}" if named else str(error)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


@cache
def _versions(names: tuple[str, ...]) -> Mapping[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed, and Python's."""
    return dict(_versions(tuple(names)))
