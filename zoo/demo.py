"""``reparam demo``: collapse eight real networks, prove each, and write a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from zoo.families import DEMO, Network
from zoo.measure import Row, measure
from zoo.render import LEGEND, folding_markdown, folding_table, provenance, write_text

__all__ = ["demo", "measure_all"]


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path("build/demo"),
) -> None:
    """Collapse eight real networks, prove each fold, and print where the report is."""
    console = Console(highlight=False)
    rows = measure_all(DEMO, console)
    console.print(folding_table(rows, "Collapsed into plain convolutions"))
    for row in rows:
        if not row.ok:
            console.print(f"[red]{row.network.spec}: {row.failure}[/red]", soft_wrap=True)
    report = out / "report.md"
    write_text(report, _report(rows))
    held = sum(row.ok for row in rows)
    console.print(f"{held} of {len(rows)} networks collapsed and proven; report: {report.resolve()}", soft_wrap=True)
    if held < len(rows):
        raise typer.Exit(1)


def measure_all(networks: tuple[Network, ...], console: Console) -> list[Row]:
    """Measure one network after the other, saying on the terminal which."""
    rows = []
    for index, network in enumerate(networks, 1):
        with console.status(f"{index}/{len(networks)} {network.spec}"):
            rows.append(measure(network))
    return rows


def _report(rows: list[Row]) -> str:
    proofs = "".join(f"- {row.network.spec}: largest relative error of a region's proof {row.proof:.1e}\n" for row in rows)
    return (
        "# Networks collapsed by reparam\n\n"
        f"{provenance()}\n\n{LEGEND}\n\n{folding_markdown(rows)}\n"
        "Each fold was also proven on its own, on random inputs in float64:\n\n"
        f"{proofs}"
    )


if __name__ == "__main__":
    typer.run(demo)
