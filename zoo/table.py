"""``reparam bench table``: measure every network of :mod:`zoo.families` and write the Markdown table."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zoo.families import DEMO, FOLDING, ORDINARY, Network
from zoo.measure import Row, measure, one_thread, warm_up
from zoo.render import LEGEND, console, folding_markdown, folding_table, insert_between_markers, provenance, write_text

__all__ = ["table"]

MARKER = "folding table"
"""The README's part between ``<!-- folding table -->`` and ``<!-- /folding table -->`` is written by this command."""


def table(
    out: Annotated[Path | None, typer.Option("--out", help="Markdown file to write; docs/folding.md.")] = None,
    readme: Annotated[Path | None, typer.Option("--readme", help="File with markers to fill in as well.")] = None,
    only: Annotated[str, typer.Option("--only", help="Shell pattern of names; writes no file but --out.")] = "*",
) -> None:
    """Measure all networks against the folds that ship, and write docs/folding.md."""
    terminal = console()
    parts = []
    for title, networks in (("Networks that ship a fold", FOLDING), ("Ordinary networks", ORDINARY)):
        rows = _measure_all(_matching(networks, only), terminal)
        if rows:
            terminal.print(folding_table(rows, title))
            parts.append((title, rows))
    if not parts:
        raise typer.BadParameter(f"no network of the tables is named {only!r}")
    if out is None and only == "*":
        out = Path("docs/folding.md")
    if out is not None:
        write_text(out, _document(parts))
        terminal.print(f"wrote {out}", soft_wrap=True)
    if readme is not None:
        insert_between_markers(readme, MARKER, _summary(parts))
    failed = [row for _, rows in parts for row in rows if not row.ok]
    for row in failed:
        terminal.print(f"[red]{row.network.spec}: {row.failure}[/red]", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _measure_all(networks: tuple[Network, ...], terminal: Console) -> list[Row]:
    """Measure one network after the other, saying on the terminal which."""
    rows = []
    with one_thread():
        warm_up()
        for index, network in enumerate(networks, 1):
            with terminal.status(f"{index}/{len(networks)} {network.spec}"):
                rows.append(measure(network))
    return rows


def _matching(networks: tuple[Network, ...], pattern: str) -> tuple[Network, ...]:
    return tuple(network for network in networks if fnmatch.fnmatch(network.name, pattern))


def _document(parts: list[tuple[str, list[Row]]]) -> str:
    text = f"# Folding tables\n\n{provenance()} Repeat it with `reparam bench table`.\n\n{LEGEND}\n"
    for title, rows in parts:
        text += f"\n## {title}\n\n{folding_markdown(rows)}"
        reasons = [f"- {row.network.label}: {row.remark}\n" for row in rows if row.theirs is None and row.remark]
        if reasons:
            text += "\nWhere theirs fails:\n\n" + "".join(reasons)
    return text


def _summary(parts: list[tuple[str, list[Row]]]) -> str:
    """Some rows of the first table, for the README."""
    rows = [row for row in parts[0][1] if row.network in DEMO]
    return f"{folding_markdown(rows)}\n{provenance()}"


if __name__ == "__main__":
    typer.run(table)
