"""``reparam study``: training dynamics, images for it, and a finished comparison as a page of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.train.dynamics import dynamics
from zoo.train.idx import convert_json
from zoo.train.report import write_documentation

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What happens in training, and what comparisons say.")
app.command()(dynamics)
app.command("mnist")(convert_json)


@app.command()
def document(
    comparison: Annotated[Path, typer.Argument(help="Folder of `reparam train --compare`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Markdown file; its figures are written beside it.")],
) -> None:
    """Write a finished comparison as documentation, with the published results beside it."""
    write_documentation(comparison, out)
    typer.echo(f"wrote {out}")
