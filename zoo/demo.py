"""``reparam demo``: collapse eight real networks, prove each, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zoo.families import DEMO, Network
from zoo.measure import Row, measure, one_thread, warm_up
from zoo.render import LEGEND, console, folding_markdown, folding_table, provenance, write_text

__all__ = ["demo", "measure_all"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("build/demo"),
) -> None:
    """Collapse eight real networks, prove each fold, and print where the report is."""
    terminal = console()
    rows = measure_all(DEMO, terminal)
    terminal.print(folding_table(rows, "Collapsed into plain convolutions"))
    for row in rows:
        if not row.ok:
            terminal.print(f"[red]{row.network.spec}: {row.failure}[/red]", soft_wrap=True)
    report = out / "report.md"
    write_text(report, _report(rows))
    held = sum(row.ok for row in rows)
    terminal.print(f"{held} of {len(rows)} networks collapsed and proven; report: {report.resolve()}", soft_wrap=True)
    if held < len(rows):
        raise typer.Exit(1)


def measure_all(networks: tuple[Network, ...], terminal: Console) -> list[Row]:
    """Measure one network after the other, saying on the terminal which."""
    rows = []
    with one_thread():
        warm_up()
        for index, network in enumerate(networks, 1):
            with terminal.status(f"{index}/{len(networks)} {network.spec}"):
                rows.append(measure(network))
    return rows


def _report(rows: list[Row]) -> str:
    proofs = "".join(f"- {row.network.spec}: {row.failure or f'{row.proof:.1e}'}\n" for row in rows)
    return (
        "# Networks collapsed by reparam\n\n"
        f"{provenance()}\n\n{LEGEND}\n\n{folding_markdown(rows)}\n"
        "Each fold was also proven on its own: the original layers in float64 against the new float32 layer, on\n"
        "random inputs of several sizes. The largest relative error of any fold, which is the rounding of its\n"
        "weights:\n\n"
        f"{proofs}"
    )


if __name__ == "__main__":
    typer.run(demo)
