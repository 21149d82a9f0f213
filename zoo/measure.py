"""One row of a folding table: collapse a network, compare it with the original and with the fold that ships."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import reparam
from passes.training.step import one_thread
from reparam import Counts, sources
from zoo.families import Baseline, Network
from zoo.outcome import Size
from zoo.randomise import randomise_

__all__ = ["TOLERANCE", "Row", "measure", "one_thread", "relative_error", "shipped_fold", "size", "size_of", "warm_up"]

log = logging.getLogger(__name__)

TOLERANCE = 1e-10
"""Largest relative difference, in float64, between a network and its fold."""

THEIR_TOLERANCE = 1e-3
"""Their folds are done in float32; a difference beyond this is a wrong result rather than rounding."""

FUNCTIONAL_CONVS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}

CONTRAST = 1e-5
"""Two inputs must change the output by this much, relatively; otherwise a comparison of outputs says nothing.

In a deep random network they change it little; a wrong fold by about as much, which is 1e5 times what is allowed.
"""


@dataclass(frozen=True)
class Row:
    """One network's result. ``error`` and ``seconds`` are NaN where the collapse failed.

    Args:
        proof: largest relative error of the folds' own proofs.
        error: largest relative difference of the outputs in float64.
        seconds: of the collapse in float32, with its proofs, after a warm-up.
        theirs: the network after the fold that ships, None where that failed or there is none.
        remark: why ``theirs`` is None, or what is wrong with it.
        failure: why this row does not hold; empty if it does.
    """

    network: Network
    before: Counts | None = None
    ours: Counts | None = None
    theirs: Counts | None = None
    proof: float = math.nan
    error: float = math.nan
    seconds: float = math.nan
    remark: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether the row holds."""
        return not self.failure


def measure(network: Network, seed: int = 0) -> Row:
    """Collapse one network of random but meaningful weights and measure everything a table shows.

    Never raises: what goes wrong stands in the row.
    """
    row = Row(network)
    try:
        torch.manual_seed(seed)
        model = sources.create(network.spec)
        inputs = network.inputs(seed)
        randomise_(model, seed, inputs)
        row = replace(row, before=size(model))
        row, theirs = _theirs(row, model)
        row = _ours(row, model)
        double = _Double(network, model.double(), tuple(x.double() for x in inputs))
        row = _compared(row, double, theirs)
    # One network that fails, however it does, is a row that says so; the table goes on.
    except Exception as error:
        log.debug("%s failed", network.spec, exc_info=True)
        return replace(row, failure=row.failure or _one_line(error))
    return replace(row, failure=_verdict(row))


def warm_up() -> None:
    """Collapse something small, so that the first network of a table does not pay for lazy imports."""
    reparam.collapse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval())


def size(model: nn.Module) -> Counts:
    """Count layers and parameters, convolutions and batch norms that traced code calls as functions included.

    ``torch.fx`` traces into layer classes of other packages and leaves such calls in their place.
    """
    counts = Counts.of(model)
    graphs = [module.graph for module in model.modules() if isinstance(module, fx.GraphModule)]
    called = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    convs = sum(target in FUNCTIONAL_CONVS for target in called)
    norms = sum(target is F.batch_norm for target in called)
    return replace(counts, convs=counts.convs + convs, norms=counts.norms + norms)


def size_of(model: nn.Module) -> Size:
    """Counts of a network, and the bytes of its state, tensors with two names counted once."""
    counts = size(model)
    state = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    held = sum(t.nbytes for t in state.values())
    return Size(counts.parameters, held, counts.convs, counts.norms, counts.linears)


def shipped_fold(baseline: Baseline) -> Callable[[nn.Module], nn.Module]:
    """The other fold: takes a network in eval mode, returns a new one."""
    if baseline == "timm":
        from timm.models import reparameterize_model

        return reparameterize_model
    from torch.fx.experimental.optimization import fuse

    return fuse


def relative_error(reference: Any, candidate: Any) -> float:
    """Largest over the outputs of ``max |a - b| / max |a|``; infinite for NaN and for outputs of other shapes."""
    worst = 0.0
    pairs = list(zip(_tensors(reference), _tensors(candidate), strict=True))
    if not pairs:
        raise ValueError("the network returns no tensor to compare")
    for a, b in pairs:
        if a.shape != b.shape or not bool(b.isfinite().all()):
            return math.inf
        if a.numel():
            scale = float(a.abs().max())
            difference = float((a - b).abs().max())
            worst = max(worst, difference / scale if scale else difference)
    return worst


# ------------------------------------------------------------------------------------------------- steps


def _ours(row: Row, model: nn.Module) -> Row:
    """Collapse in float32, with proofs, timed."""
    started = time.perf_counter()
    folded, explanation = reparam.collapse_with_report(model)
    seconds = time.perf_counter() - started
    proof = max((fold.error for fold in explanation.folds if fold.error is not None), default=math.nan)
    return replace(row, ours=size(folded), seconds=seconds, proof=proof)


def _theirs(row: Row, model: nn.Module) -> tuple[Row, nn.Module | None]:
    """The fold that ships, in float32 (timm's makes float32 layers of any model): its size, or why it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folded = shipped_fold(row.network.baseline)(copy.deepcopy(model)).eval()
    # The fold that ships is somebody else's code; how it fails is what the table reports.
    except Exception as failure:
        return replace(row, remark=_one_line(failure)), None
    return replace(row, theirs=size(folded)), folded


@dataclass(frozen=True)
class _Double:
    """A network in float64 with its inputs."""

    network: Network
    model: nn.Module
    inputs: tuple[Tensor, ...]

    def run(self, model: nn.Module) -> Any:
        with torch.no_grad():
            return self.network.outputs(model, self.inputs)


def _compared(row: Row, double: _Double, theirs: nn.Module | None) -> Row:
    """Collapse again, in float64, and compare the outputs of all three networks."""
    reference = double.run(double.model)
    if _contrast(reference) < CONTRAST:
        raise ValueError("the output hardly depends on the input, so a comparison would say nothing")
    folded = reparam.collapse(double.model, verify=False)
    row = replace(row, error=relative_error(reference, double.run(folded)))
    if theirs is None:
        return row
    try:
        error = relative_error(reference, double.run(theirs.double()))
    # Their result may not run at all; that is reported, not raised.
    except Exception as failure:
        return replace(row, remark=_one_line(failure))
    return replace(row, remark=f"wrong by {error:.0e}" if error > THEIR_TOLERANCE else "")


def _verdict(row: Row) -> str:
    """Why the row does not hold, or an empty string."""
    if not row.error <= TOLERANCE:
        return f"differs by {row.error:.1e}"
    if row.before is not None and row.ours is not None and row.ours.parameters > row.before.parameters:
        return "more parameters than before"
    if row.theirs is not None and row.ours is not None and not row.remark and _exceeds(row.ours, row.theirs):
        return "larger than the fold that ships"
    return ""


def _exceeds(ours: Counts, theirs: Counts) -> bool:
    return ours.convs > theirs.convs or ours.norms > theirs.norms or ours.parameters > theirs.parameters


# ------------------------------------------------------------------------------------------------- helpers


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _contrast(output: Any) -> float:
    """Largest relative difference between the first two samples of any output."""
    batches = [t for t in _tensors(output) if t.ndim and t.shape[0] > 1]
    return max((relative_error(t[0], t[1]) for t in batches), default=0.0)


def _one_line(error: BaseException, width: int = 100) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 1] + "…"
