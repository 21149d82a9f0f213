"""Terminal tables of explanations, plans and blocks."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reparam.recipe import block_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from passes.expand import PlanRow
    from reparam import BlockInfo, Counts, Explanation, Plan, Refusal

__all__ = [
    "WIDTH",
    "Terminal",
    "blocks_table",
    "counts_table",
    "folds_table",
    "layers_table",
    "plan_reasons",
    "plan_table",
    "reasons_table",
    "short",
    "show",
]

SHOWN = 15
"""Rows of a listing without ``--all``."""

WIDTH = 100
"""Columns of a table that goes to a file or a pipe."""


class Terminal(Console):
    """Where a command speaks; who listens may leave (``| head``), and it goes on silently: it has files to write."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Let everything more go nowhere, what Python itself writes at the end included."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def show(console: Console, table: Table) -> None:
    """Print a table, in a file or a pipe as on a terminal of usual width."""
    wide = Terminal(file=console.file, width=max(console.width, WIDTH))
    (console if console.is_terminal else wide).print(table)


def short(number: float) -> str:
    """Three digits and a unit: ``36.9k``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            value = number / size
            digits = max(0, 3 - len(str(int(value + 1e-9))))
            return f"{value:.{digits}f}{unit}"
    return f"{number:.0f}"


def counts_table(columns: dict[str, Counts]) -> Table:
    """Layers and parameters, one column for each state of the network."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in ("convs", "linears", "norms", "parameters"):
        table.add_row(name, *(f"{getattr(counts, name):,}" for counts in columns.values()))
    return table


# ------------------------------------------------------------------------------------------------- expand


def plan_table(plan: Plan, title: str, *, everything: bool = False, limit: int = SHOWN) -> Table:
    """One row per convolution that was asked for, and the totals.

    Args:
        plan: what to show.
        title: above it.
        everything: all rows, those of layers that were not asked for included.
        limit: rows that are shown unless ``everything``.
    """
    unit = "multiply-adds" if plan.per_sample else "multiply-adds a pixel"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_footer=bool(plan.expanded), padding=(0, 1, 0, 0)
    )
    totals = _totals(row for row in plan.rows)
    table.add_column("layer", "total", overflow="fold")
    table.add_column("geometry", overflow="fold")
    table.add_column("block or reason", overflow="fold")
    table.add_column("parameters", totals[0], justify="right", no_wrap=True)
    table.add_column(unit, totals[1] if plan.per_sample else "", justify="right", no_wrap=True)
    prices = plan.prices
    for name, added in prices.items():
        table.add_column(name, added[-1], justify="right", no_wrap=True)
    of_layer = dict(zip([row.layer for row in plan.expanded], zip(*prices.values(), strict=True), strict=False))
    wanted = plan.rows if everything else tuple(row for row in plan.rows if row.refusal is None or row in plan.refused)
    for row in wanted if everything else wanted[:limit]:
        table.add_row(*_plan_cells(row), *of_layer.get(row.layer, ()), style="dim" if row.refusal is not None else None)
    if not everything and len(wanted) > limit:
        table.add_row(f"… {len(wanted) - limit} more, see --all")
    return table


def _plan_cells(row: PlanRow) -> tuple[str, ...]:
    geometry = escape(str(row.geometry).replace("->", "→").replace(" stride ", "/"))
    if row.cost is None or row.block is None:
        assert row.refusal is not None
        return escape(row.layer), geometry, escape(row.refusal.message), "", ""
    form = "" if row.form.name == "branches" else f", {row.form}"
    numbers = (_change(values) for values in (row.cost.parameters, row.cost.multiply_adds))
    return escape(row.layer), geometry, escape(block_text(row.block)) + form, *numbers


def _totals(rows: Iterable[PlanRow]) -> tuple[str, str]:
    costs = [row.cost for row in rows if row.cost is not None]
    parameters = [sum(cost.parameters[i] for cost in costs) for i in range(3)]
    work = [sum(cost.multiply_adds[i] for cost in costs) for i in range(3)]
    return _change(parameters), _change(work)


def _change(values: Iterable[float]) -> str:
    return "→".join(short(value) for value in values)


def plan_reasons(plan: Plan, *, everything: bool = False) -> Table | None:
    """How many convolutions are left alone for each reason, with one as example; None where there are none."""
    left = [row.refusal for row in plan.rows if row.refusal is not None]
    return _by_reason("left alone", left, [refusal.message for refusal in left], everything) if left else None


def blocks_table(blocks: Iterable[BlockInfo]) -> Table:
    """The registered blocks with their options, what they are and what they are meant for."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("block", no_wrap=True)
    table.add_column("options", overflow="fold")
    table.add_column("what it is", overflow="fold")
    table.add_column("meant for", overflow="fold")
    for info in blocks:
        options = ", ".join(f"{key}={value!r}" for key, value in info.options.items())
        summary = info.summary + (" (online by default)" if info.online else "")
        table.add_row(escape(info.name), escape(options), escape(summary), escape(info.meant_for))
    return table


# ------------------------------------------------------------------------------------------------- collapse


def folds_table(explanation: Explanation, everything: bool) -> Table:
    """One row per fold; unless ``everything``, long rows are cut and a last row counts what is not shown."""
    folds = explanation.folds
    table = Table(title=f"folds: {len(folds)}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers", overflow="fold")
    table.add_column("become", overflow="fold")
    table.add_column("numbers", justify="right")
    for fold in folds if everything else folds[:SHOWN]:
        layers = (
            fold.layers if everything or len(fold.layers) <= 3 else (*fold.layers[:2], f"… {len(fold.layers) - 2} more")
        )
        numbers = f"{fold.numbers_before:,} → {fold.numbers_after:,}"
        table.add_row(escape(", ".join(layers)), escape(fold.into), numbers)
    if not everything and len(folds) > SHOWN:
        table.add_row(f"… {len(folds) - SHOWN} more, see --all", "", "")
    return table


def layers_table(title: str, refusals: list[Refusal]) -> Table:
    """One row per layer, with the reason in full."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("why", overflow="fold")
    for refusal in refusals:
        table.add_row(escape(refusal.layer or "(model)"), escape(refusal.message))
    return table


def reasons_table(explanation: Explanation) -> Table:
    """Refusals by reason, the commonest first, with one layer as example."""
    found = explanation.refusals
    return _by_reason("left alone", found, [refusal.reason.value for refusal in found])


def _by_reason(what: str, refusals: list[Refusal], reasons: list[str], listed: bool = False) -> Table:
    first = {reason: refusals[reasons.index(reason)].layer or "(model)" for reason in set(reasons)}
    title = f"{what}: {len(refusals)}" + ("" if listed else " (--all lists them)")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("for example", overflow="fold")
    for reason, count in Counter(reasons).most_common():
        table.add_row(str(count), escape(reason), escape(first[reason]))
    return table
