"""One ONNX file of a run: read, collapse, prove, measure, save. Runs in a process of its own (:mod:`zoo.worker`).

The file stands in the job as its checkpoint; its name is that of the file, and its source :data:`zoo.job.FILES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

import reparam.onnx
from passes.onnx.collapse import made_up
from reparam import Counts, Explanation, Verdict
from reparam.disk import make_folder
from zoo.convert import nothing_folds, too_large, write_details
from zoo.draw import Drawings
from zoo.job import Job, Tell, Work, attempt, one_line, silent
from zoo.latency import in_turns
from zoo.outcome import Converted, Latency, Outcome, Proof, Size

__all__ = ["convert_file"]


def convert_file(job: Job, tell: Tell = silent) -> Outcome:
    """Convert one file. Never raises an ordinary exception: what goes wrong is the outcome."""
    return attempt(_FileConversion(job, tell))


class _FileConversion(Work):
    """One conversion of a file: its stages as methods."""

    def run(self) -> Outcome:
        settings, path = self.job.settings, Path(self.job.checkpoint or "")
        with self.clock("build"):
            model = reparam.onnx.load(path)
        limit, held = settings.max_parameters, _parameters(model)
        if limit is not None and held > limit:
            raise too_large(held, limit)
        with self.clock("collapse"):
            how = settings.outputs or "folds"
            folded, explanation = reparam.onnx.collapse_with_report(model, verify=how, cost=settings.cost)
        self.notes += explanation.notes
        before = _size(explanation.before, path.stat().st_size)
        if not explanation.folds:
            raise nothing_folds(explanation, before)
        latency = self.latency(model, folded)
        saved, written = self.save(folded)
        outcome = Converted(
            **self.common(),
            before=before,
            after=_size(explanation.after or explanation.before, written),
            proof=_proof(explanation, asked=settings.outputs),
            latency=latency,
            folds=len(explanation.folds),
            refused=dict(explanation.reasons()),
            file=saved,
            file_bytes=written,
            details=self.relative(".json"),
        )
        write_details(self, outcome, {"origin": "file", "seed": 0, "randomised": False}, explanation, Drawings())
        return outcome

    def latency(self, before: ir.Model, after: ir.Model) -> Latency | None:
        """By onnxruntime with all of its optimisations; None, and a note, where no input could be made up."""
        if not self.job.settings.latency:
            return None
        with self.clock("latency"):
            sessions = [_session(model) for model in (before, after)]
            why = "the file declares no shapes"
            for fed in made_up(before):
                try:
                    for session in sessions:
                        session.run(None, fed)
                # onnxruntime's errors have no class in common but this one.
                except Exception as error:
                    why = one_line(error)
                    continue
                first, second = sessions
                shape = next(iter(fed.values())).shape
                return in_turns(shape, lambda: first.run(None, fed), lambda: second.run(None, fed))  # noqa: B023
        self.notes.append(f"not timed: {why}")
        return None

    def save(self, folded: ir.Model) -> tuple[str | None, int]:
        """Write the file; its path in the run's folder, and its bytes."""
        path = self.job.path(".onnx")
        if path is None or not self.job.settings.save:
            return None, len(ir.to_proto(folded).SerializeToString())
        with self.clock("save"):
            make_folder(path.parent)
            reparam.onnx.save(folded, path)
        beside = path.with_name(f"{path.name}.data")  # weights of more than one file holds
        return self.relative(".onnx"), path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)

    def relative(self, suffix: str) -> str | None:
        path = self.job.path(suffix)
        return None if path is None or self.job.folder is None else path.relative_to(self.job.folder).as_posix()


def _session(model: ir.Model) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    message = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(message, options, providers=["CPUExecutionProvider"])


def _parameters(model: ir.Model) -> int:
    return sum(v.const_value.size for v in model.graph.initializers.values() if v.const_value is not None)


def _size(counts: Counts, written: int) -> Size:
    return Size(counts.parameters, written, counts.convs, counts.norms, counts.linears)


def _proof(explanation: Explanation, *, asked: bool) -> Proof:
    errors = [fold.error for fold in explanation.folds if fold.error is not None]
    proven = {"folds": len(errors), "fold_error": max(errors, default=0.0)}
    checked = explanation.checked
    if checked is None or checked.verdict is not Verdict.EQUAL:
        return Proof(**proven, remark="" if not asked or checked is None else checked.compared)
    return Proof(**proven, outputs="whole", error=checked.error, remark=checked.compared)
