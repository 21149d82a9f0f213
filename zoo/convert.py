"""One model of a run: build, expand, collapse, prove, measure, save. Runs in a process of its own (:mod:`zoo.worker`).

A network with random weights is made a meaningful test first (:mod:`zoo.randomise`): as built, its batch norms are
almost the identity, and the branches of a block that keeps the function are zero. What is saved for training is the
expanded network as it was before that.

No more than two networks of the model's size are held at any time: float64 is reached operation by operation, the stock
network of the way back is hollow until it is filled, and the original is gone before its collapse is compared with what
the original computed.
"""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reparam
from passes.blocks.kit.layers import is_block
from passes.proof.compare import coarsest_dtype, distance, tolerance
from passes.refusal import Reason
from reparam import Explanation, Plan, ReparamError, files, sources
from reparam.disk import make_folder
from reparam.recipe import Recipe, parse_block
from zoo.draw import Drawings, draw, sketch
from zoo.inputs import View, find_view, native_view
from zoo.job import Ended, Job, Tell, Work, attempt, one_line, silent
from zoo.latency import race
from zoo.measure import size_of
from zoo.onnx_file import ExportError, write_onnx
from zoo.outcome import (
    Converted,
    Latency,
    Mismatch,
    NothingToDo,
    Outcome,
    Proof,
    Refused,
    Size,
)
from zoo.plan import skeleton
from zoo.randomise import randomise_
from zoo.reference import Reference, in_double, reference_of, weakness
from zoo.render import write_text
from zoo.weights import UNTRAINED, fill, is_trained, no_weights

__all__ = ["Conversion", "convert", "nothing_folds", "too_large", "write_details"]

SEED = 0
LARGE = 32 << 20
"""Bytes of a network from which saving memory comes before speed."""


def convert(job: Job, tell: Tell = silent) -> Outcome:
    """Convert one model. Never raises an ordinary exception: what goes wrong is the outcome."""
    return attempt(Conversion(job, tell))


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


class Conversion(Work):
    """One conversion: its stages as methods."""

    def run(self) -> Outcome:
        made = self.prepare()
        model, view = made.model, made.view
        reference = None
        if view is not None:
            with self.clock("reference"):
                reference = reference_of(model, view)
        with self.clock("draw"):
            before = sketch(model) if self.job.folder is not None else None
        stock = size_of(model) if made.plan is not None else made.stock
        there_and_back = made.plan is not None and self.job.settings.outputs
        roundtrip = self.roundtrip(model, view, reference) if there_and_back else None
        gc.collect()  # traced graphs are cycles, and hold weights
        with self.clock("collapse"):
            rules = {"norms": self.job.settings.norms, "cost": self.job.settings.cost}
            folded, explanation = reparam.collapse_with_report(model, verify="folds", **rules)
        if not explanation.folds:
            raise nothing_folds(explanation, made.stock)
        latency, work = self.latency(model, folded, view)
        del model, made.model
        gc.collect()
        proof = self.compare(folded, made, reference, explanation, roundtrip)
        after = size_of(folded)
        onnx_file = self.onnx(folded, view, proof)
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
            onnx_file=onnx_file,
            details=self._relative(self.job.path(".json")),
            **saved,
        )
        self.write_details(outcome, made, explanation, drawings)
        return outcome

    def prepare(self) -> _Prepared:
        """Build, load, expand and, if the weights are random, randomise. Repeatable: it draws from seeds only."""
        model, origin = self.build()
        view, remark = None, ""
        if self.job.settings.outputs:
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
                raise no_weights(self.job.spec, error) if pretrained else error from error
        if next(model.parameters(), None) is None:
            raise Ended(NothingToDo, reason="it has no parameters")
        if pretrained and not is_trained(model):
            raise Ended(Refused, reason=UNTRAINED)
        if self.job.checkpoint is not None:
            with self.clock("weights"):
                self.notes += fill(model, self.job.checkpoint)
            return model, "file"
        return model, "pretrained" if pretrained else "random"

    def check_size(self) -> None:
        """Raises :class:`Ended` for an architecture that is larger than this run takes."""
        limit = self.job.settings.max_parameters
        if limit is None:
            return
        try:
            count = sum(parameter.numel() for parameter in skeleton(self.job.spec).parameters())
        # A constructor that needs numbers may fail in any way without them: then the network is built as it is.
        except Exception:
            return
        if count > limit:
            raise too_large(count, limit)

    def expand(self, model: nn.Module, view: View | None, stock: Size) -> Plan:
        """Put blocks into ``model``, which computes the same afterwards, and save it for training.

        Raises:
            EquivalenceError: it does not.
        """
        block = parse_block(self.job.settings.block or "")
        with self.clock("expand"):
            wanted = view.run(model, view.inputs(1)) if view is not None else []
            # The whole network is compared below, without the copies that the compiler's own trial makes.
            plan = reparam.plan(model, block, inplace=True, verify=True if view is None else "folds")
            if not plan.expanded:
                raise _nothing_expands(plan, stock)
            plan.apply()
            if view is not None:
                gap = distance(view.run(model, view.inputs(1)), wanted)[1]
                if not gap <= tolerance(0.0, coarsest_dtype(model)):
                    raise Ended(Mismatch, error=gap, message="the expanded network is not what it was", layer="")
        path = self.job.path(f".{block.name}.safetensors")
        if path is not None and self.job.settings.save:
            with self.clock("save"):
                make_folder(path.parent)
                files.save_model(model, path, source=self.job.spec, expanded=Recipe(block))
        return plan

    def roundtrip(self, model: nn.Module, view: View | None, reference: Reference | None) -> bool:
        """Collapse into the stock architecture, load that strictly into a stock network, and compare.

        Raises:
            EquivalenceError: it computes something else.
        """
        with self.clock("roundtrip"):
            fresh = _hollow(sources.create(self.job.spec).eval())
            # Each fold is proven again only where whole outputs cannot be compared.
            restored = reparam.collapse(model, like=fresh, verify="folds" if reference is None else False)
            fresh.load_state_dict(restored.state_dict(), strict=True, assign=True)
            del restored
            if view is not None and reference is not None:
                error = distance(in_double(fresh, view), reference.outputs)[1]
                if not error <= reference.allowed:
                    message = "the stock architecture with the collapsed weights computes something else"
                    raise Ended(Mismatch, error=error, allowed=reference.allowed, layer="", message=message)
        return True

    def latency(
        self, model: nn.Module, folded: nn.Module, view: View | None
    ) -> tuple[Latency | None, tuple[int, int] | None]:
        if view is None or not self.job.settings.latency:
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
        reference: Reference | None,
        explanation: Explanation,
        roundtrip: bool | None,
    ) -> Proof:
        """Compare whole outputs with those of the network that is gone.

        Raises:
            Ended: they differ; the network is built again to find out where.
        """
        errors = [fold.error for fold in explanation.folds if fold.error is not None]
        proven = {"folds": len(errors), "fold_error": max(errors, default=0.0), "roundtrip": roundtrip}
        if made.view is None or reference is None:
            incomparable = "its outputs in float32 and float64 cannot be compared" if self.job.settings.outputs else ""
            return Proof(**proven, remark=made.remark or incomparable)
        with self.clock("compare"):
            error = distance(in_double(folded, made.view), reference.outputs)[1]
            if not error <= reference.allowed:
                layer = self.locate(folded)
                message = "the collapsed network computes something else"
                raise Ended(Mismatch, error=error, allowed=reference.allowed, layer=layer, message=message)
        return Proof(
            **proven,
            outputs=made.view.outputs,
            error=error,
            noise=reference.noise,
            allowed=reference.allowed,
            remark=weakness(reference),
        )

    def locate(self, folded: nn.Module) -> str:
        """The module at which the collapsed network parts from a second one built like the first."""
        try:
            again = self.prepare()
            assert again.view is not None
            found = reparam.verify(again.model, folded, again.view.inputs(1)).first_difference
        # It is only to help: the difference itself is known.
        except Exception as error:
            self.notes.append(f"where it differs could not be found: {one_line(error)}")
            return ""
        return found or ""

    # --------------------------------------------------------------------------------------------- files

    def onnx(self, folded: nn.Module, view: View | None, proof: Proof) -> str | None:
        """Write the collapsed network as ONNX, too; None, and a note why, if that cannot be done.

        Raises:
            Ended: the file computes something else.
        """
        path = self.job.path(".onnx")
        if path is None or not self.job.settings.onnx:
            return None
        with self.clock("onnx"):
            if view is None or proof.outputs != "whole":
                self.notes.append("no ONNX file: the network's whole outputs could not be compared")
                return None
            make_folder(path.parent)
            try:
                note = write_onnx(folded, view, proof.allowed, path)
            except ExportError as error:
                self.notes.append(f"no ONNX file: {error}")
                return None
        self.notes += [note] if note else []
        return self._relative(path)

    def save(self, folded: nn.Module, plan: Plan | None) -> dict[str, Any]:
        """Write the collapsed network; returns the outcome's fields about files."""
        path = self.job.path(".safetensors")
        if path is None or not self.job.settings.save:
            return {"file": None, "expanded_file": None, "file_bytes": size_of(folded).bytes}
        with self.clock("save"):
            make_folder(path.parent)
            files.save_model(folded, path, source=self.job.spec, collapsed=True)
        block = parse_block(self.job.settings.block).name if self.job.settings.block else ""
        return {
            "file": self._relative(path),
            "expanded_file": self._relative(self.job.path(f".{block}.safetensors")) if plan is not None else None,
            "file_bytes": path.stat().st_size,
        }

    def write_details(self, outcome: Converted, made: _Prepared, explanation: Explanation, drawn: Drawings) -> None:
        """Write the JSON beside the network, last: a model whose details are there is finished."""
        weights = {"origin": made.origin, "seed": SEED, "randomised": made.randomised}
        left = [row.refusal for row in made.plan.refused] if made.plan is not None else []
        write_details(self, outcome, weights, explanation, drawn, left)

    def _relative(self, path: Path | None) -> str | None:
        return None if path is None or self.job.folder is None else path.relative_to(self.job.folder).as_posix()


def write_details(
    work: Work,
    outcome: Converted,
    weights: dict[str, Any],
    explanation: Explanation,
    drawn: Drawings,
    left: Iterable[Any] = (),
) -> None:
    """Write the JSON beside a network, last: see :mod:`zoo.outcome` for what it holds."""
    path = work.job.path(".json")
    if path is None:
        return
    with work.clock("save"):
        make_folder(path.parent)
        numbers = drawn.of_fold or [None] * len(explanation.folds)
        details = {
            "outcome": outcome.to_json(),
            "settings": vars(work.job.settings),
            "weights": weights | {"file": work.job.checkpoint, "notes": work.notes},
            "folds": [_fold(fold, number) for fold, number in zip(explanation.folds, numbers, strict=True)],
            "refusals": [_refusal(refusal) for refusal in explanation.refusals],
            "left": [_refusal(refusal) for refusal in left],
            "untraced": [{"layer": r.layer, "message": r.message} for r in explanation.untraced],
            "notes": explanation.notes,
            "regions": drawn.regions,
        }
        write_text(path, json.dumps(details, ensure_ascii=False, allow_nan=False))


# ------------------------------------------------------------------------------------------------- ends


def too_large(count: int, limit: int) -> Ended:
    """The end of a network with more parameters than a run takes."""
    return Ended(Refused, reason=f"{count / 1e6:.0f} M parameters; this run takes {limit / 1e6:g} M at most")


def nothing_folds(explanation: Explanation, before: Size) -> Ended:
    """The end of a network of which no region folds."""
    reasons = explanation.reasons()
    if not reasons:
        norms = "no batch norm" if before.norms == 0 else "no batch norm behind a convolution"
        return Ended(NothingToDo, reason=f"{norms} and no branches that add up to one convolution", before=before)
    reason, count = reasons.most_common(1)[0]
    text = f"nothing folds: {sum(reasons.values())} layers stay; {count}: {reason}"
    return Ended(Refused, reason=text, refused=dict(reasons), before=before)


def _nothing_expands(plan: Plan, before: Size) -> Ended:
    if not plan.rows:
        return Ended(NothingToDo, reason="no convolution", before=before)
    if not plan.refused:
        text = f"no convolution of more than one tap among {len(plan.rows)}"
        return Ended(NothingToDo, reason=text, before=before)
    reasons = _left(plan)
    reason, count = reasons.most_common(1)[0]
    text = f"no convolution takes the block: {len(plan.refused)} of more than one tap; {count}: {reason}"
    return Ended(Refused, reason=text, refused=dict(reasons), before=before)


def _left(plan: Plan | None) -> Counter[str]:
    """Convolutions that were asked for and got no block, by the reason's own text: messages name layers."""
    rows = plan.refused if plan is not None else ()
    return Counter(row.refusal.reason.value for row in rows if row.refusal is not None)


# ------------------------------------------------------------------------------------------------- numbers


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
        randomise_(model, SEED, None if view is None else view.inputs(2) if view.outputs == "whole" else None)
    # Statistics of a batch are a help: some networks cannot be run in training mode on one this small.
    except (RuntimeError, ValueError):
        randomise_(model, SEED)


def _hollow(model: nn.Module) -> nn.Module:
    """Move to the meta device what is in the state dict: a network that is only to be filled holds no numbers."""
    with torch.no_grad():
        empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        files.fill(model, empty, assign=True)
    return model


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
