"""One model of a run: build, expand, collapse, prove, measure, save. Runs in a process of its own (:mod:`zoo.run`).

A network with random weights is made a meaningful test first (:mod:`zoo.randomise`): as built, its batch norms are
almost the identity, and the branches of a block that keeps the function are zero. What is saved for training is the
expanded network as it was before that.

No more than two networks of the model's size are held at any time: float64 is reached in place and left again, which is
exact, and the original is gone before its collapse is compared with what the original computed.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import platform
import re
import secrets
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import reparam
from passes.blocks.parts import is_block
from passes.differ import coarsest_dtype, distance, tolerance
from passes.refusal import Reason
from reparam import EquivalenceError, Explanation, Plan, ReparamError, files, sources
from reparam.recipe import Recipe, parse_block
from zoo import memory
from zoo.draw import Drawings, draw, sketch
from zoo.inputs import View, find_view, native_view
from zoo.journal import Folder
from zoo.latency import race
from zoo.measure import size
from zoo.meta import parameters_of
from zoo.outcome import (
    Converted,
    Failed,
    Latency,
    Mismatch,
    NothingToDo,
    Outcome,
    OutOfMemory,
    Proof,
    Refused,
    Size,
    from_json,
)
from zoo.randomise import randomise_
from zoo.weights import fill

__all__ = ["Job", "Settings", "convert", "one_line", "remove_files", "versions"]

SEED = 0
LOOSE = 1e-2
"""Relative error from which an allowance would let a wrong fold pass."""
LARGE = 64 << 20
"""Bytes of a network from which saving memory comes before speed."""
OFFLINE = ("ConnectionError", "ConnectError", "URLError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "gaierror")
"""Errors of download libraries that mean that there is no network, by name: none of the libraries is imported here."""
NO_WEIGHTS = ("No pretrained", "Invalid pretrained config", "no weights")
"""What sources say of an architecture that nobody has trained."""
UNTRAINED = "its source has no trained weights for it"


@dataclass(frozen=True)
class Settings:
    """What decides about the results of a run, the same for all of its models.

    Args:
        block: as for ``reparam expand``: a name, or ``name:option=value``; None collapses what is there.
        pretrained: load the source's trained weights.
        weights: folder of checkpoints.
        save: keep the networks; otherwise only what was found out about them.
        max_parameters: larger networks are refused before they are built.
    """

    block: str | None = None
    pretrained: bool = False
    weights: str | None = None
    save: bool = True
    max_parameters: int | None = None


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


class _Ended(Exception):
    """The conversion ended before its end, with this kind of outcome and these fields."""

    def __init__(self, kind: type[Outcome], **fields: Any) -> None:
        super().__init__(kind.kind)
        self.kind, self.fields = kind, fields


def convert(job: Job, tell: Callable[[str], None] = lambda stage: None) -> Outcome:
    """Convert one model. Never raises an ordinary exception: what goes wrong is the outcome.

    Args:
        job: which model.
        tell: called with the name of each stage as it begins.
    """
    work = _Work(job, tell)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what networks themselves warn of is not the point here
            return work.run()
    except _Ended as end:
        return end.kind(**work.common(), **end.fields)
    except EquivalenceError as error:
        return Mismatch(**work.common(), **_located(str(error)))
    # One network that fails, however it does, is one outcome; the run goes on.
    except Exception as error:
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            return OutOfMemory(**work.common(), stage=work.stage, message="the system gave no more memory")
        if isinstance(error, ReparamError) and work.stage in ("expand", "collapse", "roundtrip"):
            return Refused(**work.common(), reason=one_line(error, named=False))
        text = "" if isinstance(error, ReparamError) else traceback.format_exc()
        named = not isinstance(error, ReparamError)
        return Failed(**work.common(), stage=work.stage, error=one_line(error, named=named), traceback=text)


@dataclass
class _Prepared:
    """A network that is about to be collapsed, and what is known of how it came to be."""

    model: nn.Module
    view: View | None
    remark: str
    stock: Size
    plan: Plan | None
    origin: str
    randomised: bool


@dataclass
class _Reference:
    """What the network computed before: outputs in float64, and how far its own dtype is from them."""

    outputs: list[Tensor]
    noise: float
    allowed: float
    dtype: torch.dtype


@dataclass
class _Work:
    """One conversion: its clock, its notes, and its stages as methods."""

    job: Job
    tell: Callable[[str], None]
    stage: str = "start"
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    large: bool = False

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.held = memory.reset()

    def common(self) -> dict[str, Any]:
        """The fields that every outcome has."""
        seconds = {stage: round(value, 4) for stage, value in self.seconds.items()}
        seconds["all"] = round(time.perf_counter() - self.began, 4)
        return {
            "name": self.job.name,
            "source": self.job.source,
            "started": self.started,
            "seconds": seconds,
            "peak": max(memory.high_water() - self.held, 0),
            "versions": versions(),
            "notes": tuple(self.notes),
        }

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Count the time of a stage; when an error leaves it, ``self.stage`` says where it came from."""
        self.stage = stage
        self.tell(stage)
        memory.return_freed(self.large and stage != "latency")
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    # --------------------------------------------------------------------------------------------- the stages

    def run(self) -> Outcome:
        made = self.prepare()
        model, view = made.model, made.view
        reference = None
        if view is not None:
            with self.clock("reference"):
                reference = _reference(model, view)
        with self.clock("draw"):
            before = sketch(model) if self.job.folder is not None else None
        stock = size_of(model) if made.plan is not None else made.stock
        roundtrip = self.roundtrip(model, view, reference) if made.plan is not None else None
        gc.collect()  # traced graphs are cycles, and hold weights
        with self.clock("collapse"):
            folded, explanation = reparam.collapse_with_report(model)
        if not explanation.folds:
            raise _nothing_folds(explanation, made.stock)
        latency, work = self.latency(model, folded, view)
        del model, made.model
        gc.collect()
        proof = self.compare(folded, made, reference, explanation, roundtrip)
        after = size_of(folded)
        saved = self.save(folded, made.plan)
        drawings = draw(before, explanation.folds) if before is not None else Drawings()
        outcome = Converted(
            **self.common(),
            before=_with_work(stock, work, 0),
            after=_with_work(after, work, 1),
            stock=made.stock if made.plan is not None else None,
            proof=proof,
            latency=latency,
            folds=len(explanation.folds),
            refused=dict(explanation.reasons()),
            expanded=len(made.plan.expanded) if made.plan is not None else 0,
            left=dict(_left(made.plan)),
            details=self._relative(self.job.path(".json")),
            **saved,
        )
        self.write_details(outcome, made, explanation, drawings)
        return outcome

    def prepare(self) -> _Prepared:
        """Build, load, expand and, if the weights are random, randomise. Repeatable: it draws from seeds only."""
        model, origin = self.build()
        with self.clock("inputs"):
            view, remark = find_view(model)
        plan = None
        stock = size_of(model)
        self.large = stock.bytes >= LARGE
        if self.job.settings.block is not None:
            plan = self.expand(model, view, stock)
        if origin == "random":
            with self.clock("randomise"):
                _randomise(model, view)
        return _Prepared(model, view, remark, stock, plan, origin, origin == "random")

    def build(self) -> tuple[nn.Module, str]:
        """The network in eval mode, and where its weights are from."""
        pretrained = self.job.settings.pretrained
        with self.clock("weights" if pretrained else "build"):
            self.check_size()
            torch.manual_seed(SEED)
            try:
                model = sources.create(self.job.spec, pretrained=pretrained).eval()
            except ReparamError as error:
                raise _no_weights(self.job.spec, error) if pretrained else error from error
        if next(model.parameters(), None) is None:
            raise _Ended(NothingToDo, reason="it has no parameters")
        if pretrained and not _is_trained(model):
            raise _Ended(Refused, reason=UNTRAINED)
        if self.job.checkpoint is not None:
            with self.clock("weights"):
                self.notes += fill(model, self.job.checkpoint)
            return model, "file"
        return model, "pretrained" if pretrained else "random"

    def check_size(self) -> None:
        """Raises :class:`_Ended` for an architecture that is larger than this run takes."""
        limit = self.job.settings.max_parameters
        count = parameters_of(self.job.spec) if limit is not None else None
        if limit is not None and count is not None and count > limit:
            raise _Ended(Refused, reason=f"{count / 1e6:.0f} M parameters; this run takes {limit / 1e6:g} M at most")

    def expand(self, model: nn.Module, view: View | None, stock: Size) -> Plan:
        """Put blocks into ``model``, which computes the same afterwards, and save it for training.

        Raises:
            EquivalenceError: it does not.
        """
        block = parse_block(self.job.settings.block or "")
        with self.clock("expand"):
            wanted = view.run(model, view.inputs(2)) if view is not None else []
            plan = reparam.plan(model, block, inplace=True)
            if not plan.expanded:
                raise _nothing_expands(plan, stock)
            plan.apply()
            if view is not None:
                gap = distance(view.run(model, view.inputs(2)), wanted)[1]
                if not gap <= tolerance(0.0, coarsest_dtype(model)):
                    raise _Ended(Mismatch, error=gap, message="the expanded network is not what it was", layer="")
        path = self.job.path(f".{block.name}.safetensors")
        if path is not None and self.job.settings.save:
            with self.clock("save"):
                _make_folder(path)
                files.save_model(model, path, source=self.job.spec, expanded=Recipe(block))
        return plan

    def roundtrip(self, model: nn.Module, view: View | None, reference: _Reference | None) -> bool:
        """Collapse into the stock architecture, load that strictly into a stock network, and compare.

        Raises:
            EquivalenceError: it computes something else.
        """
        with self.clock("roundtrip"):
            fresh = sources.create(self.job.spec).eval()
            # Each fold is proven again only where whole outputs cannot be compared.
            restored = reparam.collapse(model, like=fresh, verify=reference is None)
            fresh.load_state_dict(restored.state_dict(), strict=True)
            del restored
            if view is not None and reference is not None:
                error = distance(_in_double(fresh, view), reference.outputs)[1]
                if not error <= reference.allowed:
                    message = "the stock architecture with the collapsed weights computes something else"
                    raise _Ended(Mismatch, error=error, allowed=reference.allowed, layer="", message=message)
        return True

    def latency(
        self, model: nn.Module, folded: nn.Module, view: View | None
    ) -> tuple[Latency | None, tuple[int, int] | None]:
        if view is None:
            return None, None
        with self.clock("latency"):
            try:
                latency, *work = race(model, folded, native_view(model, view))
            # The usual size is a guess: a network that rejects it is timed at the size of its proof.
            except (RuntimeError, ValueError, AssertionError, TypeError):
                latency, *work = race(model, folded, view)
        return latency, (work[0], work[1])

    def compare(
        self,
        folded: nn.Module,
        made: _Prepared,
        reference: _Reference | None,
        explanation: Explanation,
        roundtrip: bool | None,
    ) -> Proof:
        """Compare whole outputs with those of the network that is gone.

        Raises:
            _Ended: they differ; the network is built again to find out where.
        """
        errors = [fold.error for fold in explanation.folds if fold.error is not None]
        proven = {"folds": len(errors), "fold_error": max(errors, default=0.0), "roundtrip": roundtrip}
        if made.view is None or reference is None:
            return Proof(**proven, remark=made.remark or "its outputs in float32 and float64 cannot be compared")
        with self.clock("compare"):
            error = distance(_in_double(folded, made.view), reference.outputs)[1]
            if not error <= reference.allowed:
                layer = self.locate(folded)
                message = "the collapsed network computes something else"
                raise _Ended(Mismatch, error=error, allowed=reference.allowed, layer=layer, message=message)
        return Proof(
            **proven,
            outputs=made.view.outputs,
            error=error,
            noise=reference.noise,
            allowed=reference.allowed,
            remark=_weakness(reference),
        )

    def locate(self, folded: nn.Module) -> str:
        """The module at which the collapsed network parts from a second one built like the first."""
        try:
            again = self.prepare()
            assert again.view is not None
            found = reparam.verify(again.model, folded, again.view.inputs(2)).first_difference
        # It is only to help: the difference itself is known.
        except Exception as error:
            self.notes.append(f"where it differs could not be found: {one_line(error)}")
            return ""
        return found or ""

    # --------------------------------------------------------------------------------------------- files

    def save(self, folded: nn.Module, plan: Plan | None) -> dict[str, Any]:
        """Write the collapsed network; returns the outcome's fields about files."""
        path = self.job.path(".safetensors")
        if path is None or not self.job.settings.save:
            return {"file": None, "expanded_file": None, "file_bytes": size_of(folded).bytes}
        with self.clock("save"):
            _make_folder(path)
            files.save_model(folded, path, source=self.job.spec, collapsed=True)
        block = parse_block(self.job.settings.block).name if self.job.settings.block else ""
        return {
            "file": self._relative(path),
            "expanded_file": self._relative(self.job.path(f".{block}.safetensors")) if plan is not None else None,
            "file_bytes": path.stat().st_size,
        }

    def write_details(self, outcome: Converted, made: _Prepared, explanation: Explanation, drawn: Drawings) -> None:
        """Write the JSON beside the network, last: a model whose details are there is finished."""
        path = self.job.path(".json")
        if path is None:
            return
        with self.clock("save"):
            folds = zip(explanation.folds, drawn.of_fold, strict=True)
            left = made.plan.refused if made.plan is not None else ()
            details = {
                "outcome": outcome.to_json(),
                "settings": vars(self.job.settings),
                "weights": {
                    "origin": made.origin,
                    "seed": SEED,
                    "randomised": made.randomised,
                    "file": self.job.checkpoint,
                    "notes": self.notes,
                },
                "folds": [_fold(fold, number) for fold, number in folds],
                "refusals": [_refusal(refusal) for refusal in explanation.refusals],
                "left": [_refusal(row.refusal) for row in left],
                "untraced": [{"layer": r.layer, "message": r.message} for r in explanation.untraced],
                "notes": explanation.notes,
                "regions": drawn.regions,
            }
            _make_folder(path)
            _write(path, json.dumps(details, ensure_ascii=False, allow_nan=False))

    def _relative(self, path: Path | None) -> str | None:
        return None if path is None or self.job.folder is None else path.relative_to(self.job.folder).as_posix()


def finished(job: Job) -> Outcome | None:
    """The outcome of a model whose files are whole although no journal says so: the run was killed between the two."""
    path = job.path(".json")
    try:
        details = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        return from_json(details["outcome"]) if details and details["settings"] == vars(job.settings) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_files(job: Job) -> None:
    """Remove what a model that was not converted has written."""
    block = f".{parse_block(job.settings.block).name}" if job.settings.block else ""
    for suffix in (".safetensors", f"{block}.safetensors", ".json"):
        path = job.path(suffix)
        if path is not None:
            path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- ends


def _nothing_folds(explanation: Explanation, before: Size) -> _Ended:
    reasons = explanation.reasons()
    if not reasons:
        norms = "no batch norm" if before.norms == 0 else "no batch norm behind a convolution"
        return _Ended(NothingToDo, reason=f"{norms} and no branches that add up to one convolution", before=before)
    reason, count = reasons.most_common(1)[0]
    text = f"nothing folds: {sum(reasons.values())} layers stay; {count}: {reason}"
    return _Ended(Refused, reason=text, refused=dict(reasons), before=before)


def _nothing_expands(plan: Plan, before: Size) -> _Ended:
    if not plan.rows:
        return _Ended(NothingToDo, reason="no convolution", before=before)
    if not plan.refused:
        text = f"no convolution of more than one tap among {len(plan.rows)}"
        return _Ended(NothingToDo, reason=text, before=before)
    reasons = _left(plan)
    reason, count = reasons.most_common(1)[0]
    text = f"no convolution takes the block: {len(plan.refused)} of more than one tap; {count}: {reason}"
    return _Ended(Refused, reason=text, refused=dict(reasons), before=before)


def _left(plan: Plan | None) -> Counter[str]:
    """Convolutions that were asked for and got no block, by the reason's own text: messages name layers."""
    rows = plan.refused if plan is not None else ()
    return Counter(row.refusal.reason.value for row in rows if row.refusal is not None)


def _no_weights(spec: str, error: ReparamError) -> Exception:
    """What stands behind trained weights that were not to be had."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if names & set(OFFLINE):
        return ReparamError(
            f"no network access: the trained weights of {spec} are not in the local cache and cannot be downloaded"
        )
    if any(word in str(link) for link in chain for word in NO_WEIGHTS):
        return _Ended(Refused, reason=UNTRAINED)
    return error


def _is_trained(model: nn.Module) -> bool:
    """Whether weights were loaded: timm only warns where it knows of none, and keeps the random ones."""
    config = getattr(model, "pretrained_cfg", None)
    places = ("url", "file", "hf_hub_id", "state_dict")
    return not isinstance(config, Mapping) or any(config.get(place) for place in places)


def _located(message: str) -> dict[str, Any]:
    """The fields of a mismatch from the words of the proof that failed."""
    number = re.search(r"relative ([0-9.e+-]+|inf|nan)", message) or re.search(r"(?:by|off by) ([0-9.e+-]+)", message)
    place = re.search(r"first at (\S+)", message)
    layer = place.group(1) if place else message.partition(": ")[0] if ": " in message else ""
    error = float(number.group(1).rstrip(".")) if number else math.nan
    return {"error": error, "layer": layer, "message": " ".join(message.split())}


def one_line(error: BaseException, width: int = 300, *, named: bool = True) -> str:
    """An exception in one line, with its class unless its message was written for a person."""
    text = f"{type(error).__name__}: {error}" if named else str(error)
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------------- numbers


def size_of(model: nn.Module) -> Size:
    """Counts of a network, and the bytes of its state, tensors with two names counted once."""
    counts = size(model)
    state = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    held = sum(t.nbytes for t in state.values())
    return Size(counts.parameters, held, counts.convs, counts.norms, counts.linears)


def _with_work(of: Size, work: tuple[int, int] | None, which: int) -> Size:
    return of if work is None else Size(**{**vars(of), "multiply_adds": work[which]})


def _randomise(model: nn.Module, view: View | None) -> None:
    """Values that matter everywhere, in branches that a block starts at zero too."""
    generator = torch.Generator().manual_seed(SEED)
    blocks = [module for module in model.modules() if is_block(module)]
    with torch.no_grad():
        for parameter in {id(p): p for block in blocks for p in block.parameters()}.values():
            if parameter.ndim > 1 and not bool(parameter.any()):
                deviation = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    try:
        randomise_(model, SEED, None if view is None else (view.inputs(2),) if view.outputs == "whole" else None)
    # Statistics of a batch are a help: some networks cannot be run in training mode on one this small.
    except (RuntimeError, ValueError):
        randomise_(model, SEED)


def _reference(model: nn.Module, view: View) -> _Reference | None:
    """None where float32 and float64 give other shapes, as a selection of boxes does, or no finite numbers."""
    wanted = _in_double(model, view)
    dtype = coarsest_dtype(model)
    noise = distance(view.run(model, view.inputs(2)), wanted)[1]
    _forget(model)
    if not math.isfinite(noise):
        return None
    return _Reference(wanted, noise, tolerance(noise, dtype), dtype)


def _in_double(model: nn.Module, view: View) -> list[Tensor]:
    """Outputs in float64. The model is cast in place and back, which gives each number back exactly."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtypes = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        return view.run(model, view.inputs(2).double())
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Networks that keep what they computed in eval mode, in the dtype of then, drop it when training begins."""
    model.train()
    model.eval()


def _weakness(reference: _Reference) -> str:
    """Why a comparison with these outputs says little; they are of two different samples."""
    if reference.allowed > LOOSE:
        return f"the network amplifies rounding to {reference.noise:.0e}: the proofs of its folds say more"
    pairs = [(t[:1], t[1:2]) for t in reference.outputs if t.ndim and t.shape[0] == 2 and t.is_floating_point()]
    if pairs and max(distance([a], [b])[1] for a, b in pairs) < 1e-6:
        return "the outputs hardly depend on the input"
    return ""


# ------------------------------------------------------------------------------------------------- JSON


def _fold(fold: reparam.Fold, number: int | None) -> dict[str, Any]:
    return {
        "layers": list(fold.layers),
        "into": fold.into,
        "where": fold.where,
        "numbers": [fold.numbers_before, fold.numbers_after],
        "multiply_adds": [fold.multiply_adds_before, fold.multiply_adds_after],
        "error": fold.error,
        "region": number,
    }


def _refusal(refusal: Any) -> dict[str, str]:
    reason: Reason = refusal.reason
    return {"layer": refusal.layer, "reason": reason.name, "text": reason.value, "message": refusal.message}


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.FileError(f"{path.parent} cannot be made: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    """Write beside and rename, synced; on failure nothing is left."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise files.FileError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _versions(names: tuple[str, ...]) -> Mapping[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"python": platform.python_version()}


def versions(names: Iterable[str] = ("reparam", "torch", "timm", "torchvision", "safetensors")) -> dict[str, str]:
    """Versions of the packages that are installed, and Python's."""
    return dict(_versions(tuple(names)))
