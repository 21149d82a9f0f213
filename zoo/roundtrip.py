"""``reparam bench roundtrip``: expand many networks, train two steps, collapse, load into the stock architecture.

What is eligible is counted without the compiler: hooks and a function mode watch real forward passes in both modes.
"""

from __future__ import annotations

import copy
import fnmatch
import gc
import logging
import math
import string
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import reparam
from passes.blocks.kit.layers import is_block
from passes.expand import PlanRow
from passes.refusal import Reason
from passes.training.filters import ALL
from reparam import Plan
from zoo.census import Census, take_census
from zoo.families import ROUND_TRIP, Trained
from zoo.measure import one_thread, relative_error
from zoo.randomise import randomise_
from zoo.render import console, markdown_table, provenance, write_text

__all__ = ["BLOCKS", "Trip", "document", "round_trips", "roundtrip"]

log = logging.getLogger(__name__)

BLOCKS = ("acb", "dbb", "doconv")
STEPS = 2
RATE = 0.1
"""Learning rate of plain SGD; gradients are clipped to norm 1, so that random networks of any kind stay finite."""
TOLERANCE = 1e-9
"""Largest relative difference, in float64, between the trained network and its collapse."""
NOISE = 100.0
"""A chaotic network may differ by so many times what a change of its input in the last place does to it."""

CONTRAST = 1e-5
"""Training must change the outputs by as much, relatively."""

LEGEND = (
    "Random weights and batch norm statistics, batch 2, small inputs. Each network is expanded, compared in eval mode "
    f"(start: largest absolute difference in float32), trained for {STEPS} steps of SGD, cast to float64, collapsed "
    "with `like=` the original, and its state dict loaded with `strict=True` into a fresh network (error: largest "
    "difference of the outputs relative to the largest output, in float64). Convs: convolution layers; eligible: those "
    "with a kernel of more than one tap that run in training or evaluation, counted by hooks in forward passes; "
    "expanded, left: what became of those, the letters are reasons from the table at the end. "
    "s: seconds of expand and of collapse with proofs."
)
HEADINGS = ("network", "convs", "eligible", "expanded", "left", "start", "error", "s")


@dataclass(frozen=True)
class Trip:
    """One network with one block. Numbers are NaN where the trip ended before them.

    Args:
        left: eligible convolutions that were left, by reason.
        start: largest absolute difference in eval mode between the network and its expansion, float32.
        error: largest relative difference between the trained network and the stock one that loaded it, float64.
        noise: how far the trained network's outputs move when its input changes in the last place.
        remarks: what is worth saying about the network.
        failure: why this row does not hold; empty if it does.
    """

    network: Trained
    block: str
    convs: int = 0
    eligible: int = 0
    expanded: int = 0
    left: Mapping[str, int] = field(default_factory=dict)
    start: float = math.nan
    error: float = math.nan
    noise: float = math.nan
    seconds: float = math.nan
    remarks: tuple[str, ...] = ()
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether the row holds."""
        return not self.failure


def roundtrip(
    out: Annotated[Path | None, typer.Option("--out", help="Markdown file to write; docs/expansion.md.")] = None,
    only: Annotated[str, typer.Option("--only", help="Shell pattern of names; writes no file but --out.")] = "*",
) -> None:
    """Expand a hundred networks, train them, collapse them into their stock architecture, and compare."""
    terminal = console()
    networks = [network for network in ROUND_TRIP if fnmatch.fnmatch(network.label, only)]
    if not networks:
        raise typer.BadParameter(f"no network of the table is named {only!r}")
    if out is None and only == "*":
        out = Path("docs/expansion.md")
    trips: list[Trip] = []
    with one_thread():
        for index, network in enumerate(networks, 1):
            for trip in round_trips(network):
                trips.append(trip)
                line = f"{index}/{len(networks)} {' | '.join((trip.block, *_cells(trip, {})))} {trip.failure}"
                terminal.print(line, soft_wrap=True, style=None if trip.ok else "red", markup=False)
            if out is not None:  # after every network: a run of an hour may be interrupted
                write_text(out, document(trips))
            gc.collect()
    if out is not None:
        terminal.print(f"wrote {out}", soft_wrap=True)
    failed = sum(not trip.ok for trip in trips)
    terminal.print(f"{len(trips) - failed} of {len(trips)} round trips hold", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------- one network


def round_trips(network: Trained, blocks: tuple[str, ...] = BLOCKS, seed: int = 0) -> list[Trip]:
    """The trips of one network, one per block. Never raises: what goes wrong stands in the row."""
    try:
        torch.manual_seed(seed)
        model = network.create()
        inputs = network.inputs(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the network itself warns of is not the point here
            randomise_(model, seed, inputs)
            # On a copy: code that keeps tensors of a forward in attributes could not be copied afterwards.
            census = take_census(network, copy.deepcopy(model), inputs)
    # One network that fails, however it does, is a row that says so; the table goes on.
    except Exception as error:
        log.debug("%s failed", network.spec, exc_info=True)
        return [Trip(network, block, failure=_one_line(error)) for block in blocks]
    return [_trip(network, block, model, inputs, census, seed) for block in blocks]


def _trip(network: Trained, block: str, model: nn.Module, inputs: Any, census: Census, seed: int) -> Trip:
    trip = Trip(network, block, len(census.convs), len(census.eligible), remarks=_remarks(census))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.perf_counter()
            plan = reparam.plan(model, block, where=ALL)
            trip = _counted(trip, plan, census)
            expanded = plan.apply()
            trip = _and_back(trip, model, expanded, inputs, seed, time.perf_counter() - started)
    # As above.
    except Exception as error:
        log.debug("%s with %s failed", network.spec, block, exc_info=True)
        return replace(trip, failure=_one_line(error))
    return replace(trip, failure=_verdict(trip))


def _counted(trip: Trip, plan: Plan, census: Census) -> Trip:
    """What the plan makes of the convolutions of the census.

    Raises:
        ValueError: an eligible convolution is neither expanded nor left with a reason.
    """
    _check_reasons(plan, census)
    eligible = set(census.eligible)
    left = Counter(_reason(row) for row in plan.rows if row.refusal is not None and row.layer in eligible)
    expanded = sum(row.layer in eligible for row in plan.expanded)
    idle = len(plan.expanded) - expanded
    remarks = (f"{trip.block}: {idle} layers are expanded that do not run here",) if idle else ()
    return replace(trip, expanded=expanded, left=dict(left), remarks=trip.remarks + remarks)


def _and_back(trip: Trip, model: nn.Module, expanded: nn.Module, inputs: Any, seed: int, seconds: float) -> Trip:
    """Compare, train, collapse, load into a fresh network, compare; ``seconds`` were spent on expanding."""
    network = trip.network
    before = _run(network, model, inputs)
    trip = replace(trip, start=_largest_difference(before, _run(network, expanded, inputs)))
    if trip.start:  # what adds branches may have other strides, and matrix products round as those lie
        allowed = _largest_difference(before, _run(network, model, _nudged(inputs)))
        if trip.start > allowed:
            raise ValueError(
                f"starts off by {trip.start:.1e}; a change of the input in the last place does {allowed:.1e}"
            )
        remark = f"{trip.block}: the start is rounding; a change of the input in the last place does {allowed:.1e}"
        trip = replace(trip, remarks=(*trip.remarks, remark))
    dead = _train(network, expanded, inputs, seed)
    if dead:
        remark = f"{trip.block}: no gradient reaches {dead} of the blocks, nor their main branches"
        trip = replace(trip, remarks=(*trip.remarks, remark))
    expanded.double()
    started = time.perf_counter()
    restored = reparam.collapse(expanded, like=_in_double(model))
    trip = replace(trip, seconds=seconds + time.perf_counter() - started)
    if type(restored) is not type(model):
        raise ValueError(f"collapse returned a {type(restored).__name__}, not a {type(model).__name__}")
    fresh = network.create().double().eval()
    fresh.load_state_dict(restored.state_dict(), strict=True)
    doubled = _doubled(inputs)
    wanted = _run(network, expanded, doubled)
    if relative_error(before, wanted) < CONTRAST:
        raise ValueError("training hardly changed the outputs, so comparing them says nothing")
    error = relative_error(wanted, _run(network, fresh, doubled))
    noise = relative_error(wanted, _run(network, expanded, _nudged(doubled)))
    if error > TOLERANCE:
        remark = f"{trip.block}: its own noise, from a change of the input in the last place, is {noise:.0e}"
        trip = replace(trip, remarks=(*trip.remarks, remark))
    return replace(trip, error=error, noise=noise)


def _train(network: Trained, model: nn.Module, inputs: Any, seed: int) -> int:
    """Train for a few steps of SGD; the number of blocks that no gradient reaches at all.

    Raises:
        ValueError: the loss is not finite, or an added branch gets no gradient although the main one does.
    """
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    blocks = {path: _branches(module) for path, module in model.named_modules() if is_block(module)}
    reached: set[str] = set()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = network.loss(model, inputs)
        if not bool(loss.isfinite()):
            raise ValueError("the loss is not finite")
        loss.backward()
        for path, branches in blocks.items():
            reached |= {f"{path}.{name}" for name, branch in branches.items() if _has_gradient(branch)}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
    dead = 0
    for path, branches in blocks.items():
        main, *others = branches
        if f"{path}.{main}" not in reached:
            dead += 1
            continue
        for name, branch in ((other, branches[other]) for other in others):
            if f"{path}.{name}" not in reached and any(p.requires_grad for p in branch.parameters()):
                raise ValueError(f"{path}: no gradient reaches the branch {name!r}")
    return dead


def _branches(block: nn.Module) -> dict[str, nn.Module]:
    """Branches by name, the main one first; a block of one branch is that branch."""
    return dict(block.named_children()) or {"main": block}


def _has_gradient(branch: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in branch.parameters())


# ------------------------------------------------------------------------------------------------- reasons


def _check_reasons(plan: Plan, census: Census) -> None:
    rows = {row.layer: row for row in plan.rows}
    missing = [path for path in census.convs if path not in rows]
    if missing:
        raise ValueError(f"the plan does not mention {missing[0]} (and {len(missing) - 1} more)")
    for path in census.eligible:
        refusal = rows[path].refusal
        if refusal is not None and not refusal.message.strip():
            raise ValueError(f"{path} is left without a reason")
        if refusal is not None and refusal.reason in (Reason.NEVER_CALLED, Reason.KERNEL_OF_ONE, Reason.NOT_SELECTED):
            raise ValueError(f"{path} runs with kernel {census.convs[path]}, but is left: {refusal.message}")


def _remarks(census: Census) -> tuple[str, ...]:
    """What the census saw beside eligible layers."""
    remarks = []
    if census.idle:
        remarks.append(f"{len(census.idle)} layers run neither in training nor in evaluation, {census.idle[0]} first")
    for name, count in Counter(census.functions).items():
        remarks.append(f"{count} times {name} convolves in a function of its own: no layer, so no candidate")
    return tuple(remarks)


def _reason(row: PlanRow) -> str:
    """The reason as tables count it: without the layer's name and the trace's message."""
    refusal = row.refusal
    if refusal.reason is Reason.UNTRACEABLE:
        return "the code around it cannot be traced"
    return str(refusal.message)


# ------------------------------------------------------------------------------------------------- numbers


def _run(network: Trained, model: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return network.outputs(model.eval(), inputs)


def _largest_difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two nested outputs; infinite where either is not finite."""
    pairs = list(zip(_floats(a), _floats(b), strict=True))
    worst = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=math.inf)
    return worst if all(bool((x - y).isfinite().all()) for x, y in pairs) else math.inf


def _floats(output: Any) -> list[Tensor]:
    """Floating tensors of a nested output."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _doubled(inputs: Any) -> Any:
    return tree_map(lambda v: v.double() if v.is_floating_point() else v, inputs)


def _nudged(inputs: Any) -> Any:
    """Inputs changed by about one unit in the last place."""
    return tree_map(lambda v: v * (1 + torch.finfo(v.dtype).eps) if v.is_floating_point() else v, inputs)


def _verdict(trip: Trip) -> str:
    """Why the row does not hold, or an empty string."""
    if not trip.error <= max(TOLERANCE, NOISE * trip.noise):
        return f"differs by {trip.error:.1e}; its own noise is {trip.noise:.1e}"
    if trip.expanded + sum(trip.left.values()) != trip.eligible:
        return f"{trip.expanded} expanded and {sum(trip.left.values())} left are not {trip.eligible}"
    return ""


# ------------------------------------------------------------------------------------------------- the document


def document(trips: Sequence[Trip]) -> str:
    """The tables as Markdown: one per block, totals first, then the reasons, remarks and failures."""
    letters = _letters(trips)
    parts = [
        f"# Expanded, trained, collapsed\n\n{provenance()} Repeat it with `reparam bench roundtrip`.\n\n{LEGEND}\n",
        _totals(trips),
    ]
    for block in dict.fromkeys(trip.block for trip in trips):
        rows = [_cells(trip, letters) for trip in trips if trip.block == block]
        parts.append(f"## {block}\n\n{markdown_table(HEADINGS, rows)}")
    parts.append(_reasons(trips, letters))
    remarks = dict.fromkeys((trip.network.label, text) for trip in trips for text in trip.remarks)
    if remarks:
        parts.append("## Remarks\n\n" + "".join(f"- {label}: {text}\n" for label, text in remarks))
    failed = [trip for trip in trips if not trip.ok]
    if failed:
        lines = (f"- {trip.network.label}, {trip.block}: {trip.failure}\n" for trip in failed)
        parts.append("## Failed\n\n" + "".join(lines))
    return "\n".join(parts)


def _totals(trips: Sequence[Trip]) -> str:
    networks = len({trip.network for trip in trips})
    rows = []
    for block in dict.fromkeys(trip.block for trip in trips):
        mine = [trip for trip in trips if trip.block == block]
        done = [trip for trip in mine if trip.ok]
        counts = (sum(getattr(trip, name) for trip in mine) for name in ("eligible", "expanded"))
        left = sum(sum(trip.left.values()) for trip in mine)
        start, error = (max((getattr(trip, name) for trip in done), default=math.nan) for name in ("start", "error"))
        rows.append([block, f"{len(done)} of {len(mine)}", *map(str, counts), str(left), f"{start:g}", f"{error:.0e}"])
    headings = ("block", "trips that hold", "eligible", "expanded", "left", "largest start", "largest error")
    return f"{networks} networks.\n\n{markdown_table(headings, rows)}"


def _letters(trips: Sequence[Trip]) -> dict[str, str]:
    """A letter per reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for trip in trips:
        counts.update(trip.left)
    return {reason: string.ascii_letters[i] for i, (reason, _) in enumerate(counts.most_common())}


def _reasons(trips: Sequence[Trip], letters: Mapping[str, str]) -> str:
    blocks = tuple(dict.fromkeys(trip.block for trip in trips))
    rows = []
    for reason, letter in letters.items():
        counts = [sum(trip.left.get(reason, 0) for trip in trips if trip.block == block) for block in blocks]
        networks = len({trip.network for trip in trips if reason in trip.left})
        rows.append([f"{letter}: {reason}", *map(str, counts), str(networks)])
    return f"## Why convolutions are left\n\n{markdown_table(('reason', *blocks, 'networks'), rows)}"


def _cells(trip: Trip, letters: Mapping[str, str]) -> list[str]:
    """The cells of one row, in the order of ``HEADINGS``."""
    name = trip.network.label if trip.ok else f"{trip.network.label} (FAILED)"
    left = ", ".join(f"{letters.get(reason, reason)} {count}" for reason, count in sorted(trip.left.items()))
    start, seconds = _number(trip.start, "g"), _number(trip.seconds, ".1f")
    return [
        name,
        str(trip.convs),
        str(trip.eligible),
        str(trip.expanded),
        left,
        start,
        _number(trip.error, ".0e"),
        seconds,
    ]


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}}"


def _one_line(error: BaseException, width: int = 200) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    typer.run(roundtrip)
