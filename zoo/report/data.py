"""A run folder as the compact data of its page: what the table needs, and what is read when a model is opened.

``table``: ``{"columns": names, "rows": [values, ...], "kinds": [[kind, its words, ok], ...]}``.
``details``: ``{"strings": [...], "layouts": [...], "models": [MODEL, ...]}`` in the order of the rows; strings and
layouts (:mod:`zoo.report.layout`) stand there once, and S stands for the number of one. A MODEL has only the fields
that are not empty::

    {"sentence", "sizes": [[heading, parameters, bytes, convs, norms, linears, multiply-adds], ...], "facts": [...],
     "notes": [...], "files": [path, ...], "counts": [[reason, layers], ...], "trace": text,
     "regions": [[folds, where one is, DRAWING before, DRAWING after], ...],
     "folds": [[module S, layers S, what they become S, numbers before, after, error], ...],
     "refusals", "left": [[layer S, reason S, message S], ...], "untraced": [[layer, message], ...],
     "more": {field: how many are left out}}

Layers of a fold are names within the module, with spaces between. A DRAWING is null or ``[number of the layout, text S,
path S, text S, path S, ...]``, two for each box.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from zoo.job import one_line
from zoo.journal import Content
from zoo.outcome import KINDS, Converted, Outcome, OutOfMemory, Planned, Size, TimedOut, refuse_constant
from zoo.report.layout import below, common_prefix, lay_out, outline, short_layer, text_lines

__all__ = ["COLUMNS", "Details", "Reason", "Totals", "family", "kind_words", "reasons", "table", "totals"]

COLUMNS = (
    *("name", "source", "family", "kind", "folds", "convs", "convs_after", "norms", "norms_after"),
    *("parameters", "parameters_after", "ms", "ms_after", "error", "noise", "seconds"),
)
MOST_FOLDS = 600
MOST_REFUSALS = 300
"""Lines of one model in the page; the file of its details has all."""
MOST_TEXT = 6000
"""Characters of a traceback, the last ones."""
MOST_MESSAGE = 400


# ------------------------------------------------------------------------------------------------- the table


def table(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the page's table, filters and plots show."""
    kinds = [[kind, kind_words(kind), cls.ok] for kind, cls in KINDS.items()]
    return {"columns": COLUMNS, "rows": [_row(outcome) for outcome in outcomes], "kinds": kinds}


def kind_words(kind: str) -> str:
    """``timed_out`` as it is read."""
    return kind.replace("_", " ")


def _row(outcome: Outcome) -> list[Any]:
    before, after = _size(outcome, "before"), _size(outcome, "after")
    latency = outcome.latency if isinstance(outcome, Converted) else None
    proof = outcome.proof if isinstance(outcome, Converted) else None
    row: list[Any] = [
        outcome.name,
        outcome.source,
        family(outcome.source, outcome.name),
        list(KINDS).index(outcome.kind),
    ]
    row.append(outcome.folds if isinstance(outcome, Converted | Planned) else None)
    for name in ("convs", "norms", "parameters"):
        row += [None if size is None else getattr(size, name) for size in (before, after)]
    row += [None, None] if latency is None else [_short(latency.before, 4), _short(latency.after, 4)]
    row += [_short(proof.error if proof is not None else getattr(outcome, "error", None))]
    row += [_short(proof.noise if proof is not None else None), _short(outcome.seconds.get("all"))]
    return row


def _size(outcome: Outcome, name: str) -> Size | None:
    found = getattr(outcome, name, None)
    return found if isinstance(found, Size) else None


def _short(value: Any, digits: int = 3) -> float | None:
    """A number as short as a page shows it."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def family(source: str, name: str) -> str:
    """The file in which a source keeps the architecture, such as ``resnet``; without one, the start of the name."""
    try:
        module = _builder(source)(name.partition(",")[0]).__module__
    # A network that the installed version does not have, a checkpoint, or a source that is not installed.
    except Exception:
        head = name.partition(",")[0].partition("_")[0]
        return head.rstrip("0123456789") or head or source
    return str(module).rpartition(".")[2]


@cache
def _builder(source: str) -> Any:
    """What returns the function that builds a network, by its name."""
    if source == "timm":
        import timm

        return lambda name: timm.model_entrypoint(name.partition(".")[0])
    if source == "torchvision":
        from torchvision.models import get_model_builder

        return get_model_builder
    raise LookupError(source)


# ------------------------------------------------------------------------------------------------- the summary


@dataclass
class Totals:
    """Sums over the converted networks; ``stock`` only with a block."""

    models: int = 0
    stock: Counter[str] = field(default_factory=Counter)
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    faster: list[float] = field(default_factory=list)


def totals(outcomes: Iterable[Outcome]) -> Totals:
    """Convs, norms and parameters of what was converted, and by what factor each got faster."""
    result = Totals()
    for outcome in outcomes:
        if not isinstance(outcome, Converted):
            continue
        result.models += 1
        for name, size in (("stock", outcome.stock), ("before", outcome.before), ("after", outcome.after)):
            if size is not None:
                sums = getattr(result, name)
                sums.update({part: getattr(size, part) for part in ("convs", "norms", "parameters")})
        if outcome.latency is not None and outcome.latency.after > 0:
            result.faster.append(outcome.latency.before / outcome.latency.after)
    return result


@dataclass
class Reason:
    """Why layers stay as they are: how many layers, in how many models."""

    text: str
    layers: int = 0
    models: int = 0


def reasons(outcomes: Iterable[Outcome], name: str = "refused") -> list[Reason]:
    """Reasons of ``refused`` folds, or of layers ``left`` without a block, the most frequent first."""
    found: dict[str, Reason] = {}
    for outcome in outcomes:
        for text, count in (getattr(outcome, name, None) or {}).items():
            reason = found.setdefault(text, Reason(text))
            reason.layers += count
            reason.models += 1
    return sorted(found.values(), key=lambda reason: (-reason.layers, reason.text))


# ------------------------------------------------------------------------------------------------- one model


class Details:
    """Models in the order of the table's rows, with strings and drawings that they share.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: list[dict[str, Any]] = []
        self._strings: dict[str, int] = {}
        self._layout_of: dict[str, int | None] = {}
        self._layouts: list[list[Any]] = []

    def to_json(self) -> dict[str, Any]:
        return {"strings": list(self._strings), "layouts": self._layouts, "models": self.models}

    def add(self, outcome: Outcome) -> None:
        """Add a model; details that cannot be read become a note."""
        model: dict[str, Any] = {
            "sentence": outcome.sentence(),
            "sizes": list(_sizes(outcome)),
            "facts": list(_facts(outcome)),
            "notes": list(outcome.notes),
            "counts": list((getattr(outcome, "refused", None) or {}).items()),
            "trace": getattr(outcome, "traceback", "")[-MOST_TEXT:],
            "more": {},
        }
        if isinstance(outcome, Converted):
            files = (outcome.file, outcome.onnx_file, outcome.expanded_file, outcome.details)
            model["files"] = [file for file in files if file]
            if outcome.details:
                try:
                    text = (self.folder / outcome.details).read_text(encoding="utf-8")
                    self._read(model, json.loads(text, parse_constant=refuse_constant))
                # A damaged file may say anything, and drawing it raise anything; what was read before it stands.
                except Exception as error:
                    model["notes"] = [*outcome.notes, f"{outcome.details} cannot be read: {one_line(error)}"]
        self.models.append({key: value for key, value in model.items() if value})

    def _read(self, model: dict[str, Any], details: Mapping[str, Any]) -> None:
        weights = details["weights"]
        words = f"weights: {weights['origin']}" + (f", {weights['file']}" if weights.get("file") else "")
        model["facts"].append(words + (", batch norm statistics randomised" if weights.get("randomised") else ""))
        model["notes"] = list(dict.fromkeys([*model["notes"], *weights.get("notes", []), *details["notes"]]))
        model["regions"] = [self._region(region) for region in details["regions"]]
        model["folds"] = [self._fold(fold) for fold in _most(model, "folds", details["folds"], MOST_FOLDS)]
        for name in ("refusals", "left"):
            kept = _most(model, name, details[name], MOST_REFUSALS)
            model[name] = [self._refusal(each) for each in kept]
        kept = _most(model, "untraced", details["untraced"], MOST_REFUSALS)
        model["untraced"] = [[each["layer"], each["message"][:MOST_MESSAGE]] for each in kept]

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _refusal(self, refusal: Mapping[str, str]) -> list[int]:
        """Layer, reason, and what the message says beyond the reason."""
        message = refusal["message"][:MOST_MESSAGE]
        beyond = "" if message == refusal["text"] else message
        return [self._string(text) for text in (refusal["layer"], refusal["text"], beyond)]

    def _fold(self, fold: Mapping[str, Any]) -> list[Any]:
        prefix = common_prefix(fold["layers"])
        names = " ".join(below(layer, prefix) for layer in fold["layers"])
        numbers = fold["numbers"]
        error = _short(fold["error"], 1)
        texts = (prefix, names, short_layer(fold["into"]))
        return [*(self._string(text) for text in texts), *numbers, error]

    def _region(self, region: Mapping[str, Any]) -> list[Any]:
        prefix = common_prefix(region["example"])
        where = prefix or next(iter(region["example"]), "")
        return [region["count"], where, *(self._drawing(region[side], prefix) for side in ("before", "after"))]

    def _drawing(self, graph: Mapping[str, Any], prefix: str) -> list[int] | None:
        """The layout, and in turn the text and the path of each box; None of a graph that cannot be drawn."""
        key = outline(graph)
        if key not in self._layout_of:
            try:
                self._layouts.append(lay_out(key))
                self._layout_of[key] = len(self._layouts) - 1
            except (ValueError, TypeError):
                self._layout_of[key] = None
        number = self._layout_of[key]
        if number is None:
            return None
        texts = (("\n".join(text_lines(node["label"])), below(node["path"], prefix)) for node in graph["nodes"])
        return [number, *(self._string(text) for pair in texts for text in pair)]


def _most(model: dict[str, Any], name: str, lines: Sequence[Any], most: int) -> Sequence[Any]:
    """The first ``most`` lines, and a count of those left out."""
    if len(lines) > most:
        model["more"][name] = len(lines) - most
    return lines[:most]


def _sizes(outcome: Outcome) -> Iterator[list[Any]]:
    for name in ("stock", "before", "after"):
        size = _size(outcome, name)
        if size is not None:
            parts = (size.parameters, size.bytes, size.convs, size.norms, size.linears, size.multiply_adds)
            yield [name, *parts]


def _facts(outcome: Outcome) -> Iterator[str]:
    if isinstance(outcome, Converted):
        yield from _proof_facts(outcome)
        if outcome.latency is not None:
            late = outcome.latency
            yield f"latency on {'x'.join(map(str, late.shape))}: {late.before:.2f} → {late.after:.2f} ms, one thread"
        if outcome.expanded:
            yield f"{outcome.expanded} layers got a block"
    stages = ", ".join(
        f"{name} {value:.1f}" for name, value in outcome.seconds.items() if name != "all" and value >= 0.05
    )
    if "all" in outcome.seconds:
        yield f"{outcome.seconds['all']:.1f} s" + (f" ({stages})" if stages else "")
    if outcome.peak:
        word = "taken" if isinstance(outcome, OutOfMemory | TimedOut) else "at most"
        yield f"memory {word} {outcome.peak / 1e6:,.0f} MB beyond the libraries"


def _proof_facts(outcome: Converted) -> Iterator[str]:
    proof = outcome.proof
    yield f"{proof.folds} folds proven on their own, largest relative error {proof.fold_error:.1e}"
    if proof.outputs == "none":
        yield "outputs were not compared" + (f": {proof.remark}" if proof.remark else "")
    else:
        yield f"{proof.outputs} outputs compared: error {proof.error:.1e}, noise floor {proof.noise:.1e}, " + (
            f"allowed {proof.allowed:.1e}" + (f"; {proof.remark}" if proof.remark else "")
        )
    if proof.roundtrip:
        yield "round trip: the stock architecture takes the collapsed weights and computes the same"


def missing(content: Content) -> list[str]:
    """Models that were asked for and have no outcome yet."""
    asked = dict.fromkeys(spec for run in content.runs for spec in run.get("specs", ()))
    return [spec for spec in asked if spec not in content.outcomes]
