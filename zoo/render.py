"""Rows as a terminal table and as Markdown, with the versions and the date they were made with."""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from reparam import Counts
from reparam.disk import make_folder, replace_file
from reparam.tables import Terminal
from zoo.measure import Row

__all__ = [
    "LEGEND",
    "console",
    "folding_markdown",
    "folding_table",
    "insert_between_markers",
    "markdown_table",
    "processor",
    "provenance",
    "rich_table",
    "write_text",
]

LOG_WIDTH = 110
HEADINGS = ("network", "convs", "norms", "M params", "theirs", "error", "s")
LEGEND = (
    "Convolutions, batch norms and million parameters before → after. Theirs: the same three numbers after timm's "
    "`reparameterize_model` for networks that ship a fold, after `torch.fx.experimental.optimization.fuse` for the "
    "others. Error: the largest difference of the outputs relative to the largest output, original and fold both in "
    "float64, with random weights and random batch norm statistics. s: seconds of one collapse in float32 on one "
    "thread of this machine, proofs included."
)


def console() -> Console:
    """The terminal; wide enough for the tables where the output goes to a file or a log."""
    terminal = Terminal()
    return terminal if terminal.is_terminal else Terminal(width=max(terminal.width, LOG_WIDTH))


def folding_table(rows: Sequence[Row], title: str) -> Table:
    """The rows for the terminal; a row that fails is red."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "network" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in _cells(row)), style=None if row.ok else "red")
    return table


def rich_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table: the first column left, the others right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown, without a heading of its own."""
    rule = ["---"] + ["---:"] * (len(headings) - 1)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(headings), rule, *cells]) + "\n"


def folding_markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the list of failures, if any, below it."""
    text = markdown_table(HEADINGS, [_cells(row) for row in rows])
    failed = [row for row in rows if not row.ok]
    if failed:
        text += "\nFailed:\n\n" + "".join(f"- {row.network.spec}: {row.failure}\n" for row in failed)
    return text


def provenance() -> str:
    """One sentence: when, with which versions, on what machine."""
    names = ("reparam", "torch", "timm", "torchvision")
    versions = ", ".join(f"{name} {_version(name)}" for name in names)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    machine = f"{processor()}, {os.cpu_count()} cores"
    return f"Written by the tool on {today}: {versions}, Python {platform.python_version()}; {machine}."


def write_text(path: Path, text: str) -> None:
    """Write a text beside and rename it, making its folder; on failure nothing is left.

    Raises:
        FileError: the file system refuses.
    """
    make_folder(path.parent)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def insert_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a file.

    Raises:
        ValueError: the file has no such pair of markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text(encoding="utf-8")
    head, opened, rest = content.partition(start)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"{path} has no {start} followed by {end}")
    write_text(path, f"{head}{start}\n{text.strip()}\n{end}{tail}")


def _cells(row: Row) -> list[str]:
    """The cells of one row, in the order of ``HEADINGS``."""
    name = row.network.label if row.ok else f"{row.network.label} (FAILED)"
    changes = [_change(row, attribute) for attribute in ("convs", "norms", "parameters")]
    theirs = " / ".join(_number(row.theirs, key) for key in ("convs", "norms", "parameters")) if row.theirs else "fails"
    if row.theirs and row.remark:
        theirs += f" ({row.remark})"
    error = "–" if math.isnan(row.error) else f"{row.error:.0e}"
    seconds = "–" if math.isnan(row.seconds) else f"{row.seconds:.1f}"
    return [name, *changes, theirs, error, seconds]


def _change(row: Row, attribute: str) -> str:
    return f"{_number(row.before, attribute)} → {_number(row.ours, attribute)}"


def _number(counts: Counts | None, attribute: str) -> str:
    if counts is None:
        return "–"
    value: int = getattr(counts, attribute)
    return f"{value / 1e6:.2f}" if attribute == "parameters" else str(value)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
