"""``reparam bench``: what collapse and a training step cost, and the folding table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.bench_onnx import onnx
from zoo.bench_step import step
from zoo.families import BENCH, Network
from zoo.measure import one_thread, shipped_fold
from zoo.render import console, markdown_table, provenance, rich_table, write_text
from zoo.roundtrip import roundtrip
from zoo.table import table

if TYPE_CHECKING:
    from torch import nn

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure what collapse and training cost, and compare results.")
bench.command()(table)
bench.command()(step)
bench.command()(onnx)
bench.command()(roundtrip)

PARTS = ("trace", "plan", "fold", "proof", "check")
BLOCKS = 8
"""Blocks of the stack whose growth is measured, before it is made deeper."""
DEEPER = (1, 2, 4, 8)
IMPORTS = 5
"""Fresh processes over which the import time is a median."""


@dataclass(frozen=True)
class Part:
    """One table of the report."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""


@bench.command()
def collapse(
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of each; the median is shown.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Also write Markdown here.")] = None,
) -> None:
    """Time, growth with depth, memory and import time of collapse, beside timm's own fold."""
    terminal = console()
    parts = []
    with one_thread():
        facts = provenance()
        measures: tuple[Callable[[], Part], ...] = (
            partial(_speed, repeats),
            partial(_growth, repeats),
            _memory,
            _imports,
        )
        for measure in measures:
            with terminal.status("measuring"):
                part = measure()
            parts.append(part)
            terminal.print(rich_table(part.title, part.headings, part.rows), soft_wrap=False)
            terminal.print(part.note, soft_wrap=True)
    terminal.print(facts, soft_wrap=True)
    if out is not None:
        write_text(
            out, _markdown(parts, f"{facts} Repeat it with `reparam bench collapse --repeats {repeats} --out FILE`.")
        )
        terminal.print(f"wrote {out}", soft_wrap=True)


# ------------------------------------------------------------------------------------------------- what is measured


def _speed(repeats: int) -> Part:
    """Ours, split into its parts, beside timm's; runs alternate, so that both see the same machine."""
    rows = []
    for network in BENCH:
        ours, theirs = _race(network, repeats)
        split = {column: statistics.median(run[column] for run in ours) for column in ours[0]}
        folds = split["all"] - split["check"]
        numbers = [*split.values(), folds, folds - split["proof"], theirs]
        rows.append([network.name, *(f"{value:.3f}" for value in numbers)])
    headings = ("network", *PARTS, "rest", "all", 'verify="folds"', "verify=False", "timm")
    note = (
        f"Medians of {repeats} interleaved runs. Proof: of each fold. Check: the whole result against the module. "
        'Rest: the copy of the model, counting. `verify="folds"` is all without the check, `verify=False` without the '
        "proof as well. Both sides work on a copy."
    )
    return Part("Seconds of one collapse, one thread", headings, rows, note)


def _race(network: Network, repeats: int) -> tuple[list[dict[str, float]], float]:
    """Seconds of our parts in each run, and the median of timm's whole fold."""
    import reparam
    from reparam import sources

    model = sources.create(network.spec).eval()
    fold = shipped_fold("timm")
    ours, theirs = [], []
    for run in range(repeats + 1):
        report, wall = _timed(lambda: reparam.collapse_with_report(model)[1].seconds)
        _, other = _timed(lambda: fold(model))
        if run == 0:
            continue  # The first run pays for lazy imports and cold caches, on both sides.
        split = {part: float(report.get(part, 0.0)) for part in PARTS}
        ours.append(split | {"rest": wall - sum(split.values()), "all": wall})
        theirs.append(other)
    return ours, statistics.median(theirs)


def _growth(repeats: int) -> Part:
    """Seconds of a stack of multi-branch blocks, and of stacks 2, 4 and 8 times as deep."""
    import reparam

    stacks = [_stack(BLOCKS * times) for times in DEEPER]
    collapses = (partial(reparam.collapse, verify=False), reparam.collapse)
    # Depths take turns, so that a busy spell of the machine falls on all of them.
    runs = [[[_timed(partial(work, stack))[1] for work in collapses] for stack in stacks] for _ in range(repeats + 1)]
    medians = [[statistics.median(run[i][j] for run in runs[1:]) for j in range(2)] for i in range(len(stacks))]
    rows = []
    for times, now in zip(DEEPER, medians, strict=True):
        cells = [cell for j in range(2) for cell in (f"{now[j]:.3f}", f"{now[j] / medians[0][j]:.1f}x")]
        rows.append([f"{BLOCKS * times} blocks ({times}x)", *cells])
    headings = ("depth", "without proof", "growth", "with proof", "growth")
    note = "Seconds, one thread. Blocks of RepVGG's kind: 3x3, 1x1 and identity, each with batch norm."
    return Part("Growth with depth", headings, rows, note)


def _memory() -> Part:
    """Peak memory above the model itself, each in a process of its own."""
    rows = []
    for network in BENCH:
        with_proof = _child("-m", "zoo.peak", network.spec)
        without = _child("-m", "zoo.peak", network.spec, "--no-verify")
        size = with_proof["model"]
        cells = [f"{value / 1e6:.1f}" for value in (size, without["peak"], with_proof["peak"])]
        rows.append([network.name, *cells, f"{with_proof['peak'] / size:.1f}x"])
    headings = ("network", "model, MB", "peak without proof", "peak with proof", "of the model")
    note = "Memory the process needed beyond what it held before; the result, a copy of the model, is part of it."
    return Part("Peak memory", headings, rows, note)


def _imports() -> Part:
    """Milliseconds of ``import reparam`` in a process that has torch."""
    code = (
        "import json, time, torch; t = time.perf_counter(); import reparam; print(json.dumps(time.perf_counter() - t))"
    )
    seconds = [float(_child("-c", code)) for _ in range(IMPORTS)]
    row = ["import reparam", f"{statistics.median(seconds) * 1e3:.0f}", f"{min(seconds) * 1e3:.0f}"]
    return Part("Import beyond torch's own", ("", "median, ms", "least, ms"), [row], f"{IMPORTS} fresh processes.")


# ------------------------------------------------------------------------------------------------- helpers


def _stack(blocks: int) -> nn.Module:
    """A plain stack of RepVGG's blocks, 16 channels wide: cheap numbers, so that the graph's share shows."""
    import torch
    from torch import nn

    width = 16

    class Block(nn.Module):
        """relu(BN(3x3) + BN(1x1) + BN)."""

        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
            self.identity = nn.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.square(x) + self.point(x) + self.identity(x))

    return nn.Sequential(*(Block() for _ in range(blocks))).eval()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def _child(*arguments: str) -> Any:
    """What a fresh Python process prints, as JSON.

    Raises:
        RuntimeError: it failed; its last line of complaint is the message.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"python {' '.join(arguments[:3])}: {lines[-1]}")
    return json.loads(done.stdout)


def _markdown(parts: list[Part], facts: str) -> str:
    text = f"# What collapse costs\n\n{facts}\n"
    for part in parts:
        text += f"\n## {part.title}\n\n{markdown_table(part.headings, part.rows)}\n{part.note}\n"
    return text


if __name__ == "__main__":
    bench()
