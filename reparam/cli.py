"""The command line: collapse, explain, verify, and whatever other packages announce.

Commands of other packages are found through the entry point group ``reparam.commands``; the value is a function
that typer can register, or a ``typer.Typer``. They are loaded when they are asked for.

Exit status: 0 good, 1 different or failed, 2 wrong usage. An error is one line; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import logging
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import reparam
from reparam import files, sources

if TYPE_CHECKING:
    from torch import nn

    from reparam import Explanation, Refusal

__all__ = ["app"]

COMMANDS = "reparam.commands"
"""Entry point group of further commands."""

SHOWN = 15
"""Rows of a listing without ``--all``."""

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


# ------------------------------------------------------------------------------------------------- framework


class Commands(TyperGroup):
    """The command group: finds commands of other packages, and turns exceptions into one line."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Own commands first, then those of other packages."""
        own = super().list_commands(ctx)
        return own + sorted({point.name for point in metadata.entry_points(group=COMMANDS)} - set(own))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command named ``cmd_name``, loaded now if it is another package's; None if there is none."""
        own = super().get_command(ctx, cmd_name)
        points = metadata.entry_points(group=COMMANDS, name=cmd_name)
        if own is not None or not points:
            return own
        point = next(iter(points))
        try:
            return _as_command(point.load(), cmd_name)
        except Exception as error:
            # One broken package must not take --help down with it.
            return _as_command(_unavailable(cmd_name, f"{type(error).__name__}: {error}"), cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; anything but the framework's own exceptions becomes one line and exit status 1 or 2."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # exit_code marks the framework's usage errors, which it prints itself with status 2.
            if hasattr(error, "exit_code") or ctx.params.get("debug"):
                raise
            ours = isinstance(error, reparam.ReparamError)
            text = str(error) if ours else f"{type(error).__name__}: {error} (--debug before the command shows where)"
            errors.print(f"[red]error:[/red] {escape(' '.join(text.split()))}", soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, sources.UnknownNameError) else 1) from error


def _as_command(value: Any, name: str) -> Any:
    """Turn what an entry point holds, a function or a ``typer.Typer``, into a command of the group."""
    if not isinstance(value, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(name)(value)
        value = single
    command = typer.main.get_command(value)
    command.name = name
    return command


def _unavailable(name: str, reason: str) -> Any:
    """A command that says why it cannot be loaded."""

    def command() -> None:
        raise reparam.ReparamError(f"the command {name!r} is not available ({reason}); try pip install 'reparam[zoo]'")

    command.__doc__ = f"Not available: {reason}"
    return command


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Fold trained multi-branch networks into plain convolutions, each fold proven.",
    epilog="SPEC is source:name, for example timm:repvgg_a0, with options after commas: timm:resnet18,num_classes=10.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"reparam {reparam.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="REPARAM_DEBUG")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Options before the command."""
    # Only ours: libraries that download write to the terminal themselves.
    log = logging.getLogger("reparam")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if not log.handlers:
        log.addHandler(RichHandler(console=errors, show_path=False, show_time=False))


Target = Annotated[str, typer.Argument(metavar="SPEC_OR_FILE", help="source:name, or a file written by reparam.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the source's trained weights (downloads).")]


# ------------------------------------------------------------------------------------------------- commands


@app.command()
def collapse(
    target: Target,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here (.safetensors, .pt).")] = None,
    pretrained: Pretrained = False,
    weights: Annotated[Path | None, typer.Option("--weights", help="State dict for the network SPEC.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove each fold.")] = True,
) -> None:
    """Fold a network into plain convolutions and show what became of it."""
    if output is not None:
        _check_output(output)
    model, source = _network(target, pretrained, weights)
    # Thousands of small operations: threads that wait for each other on a busy machine cost more than they bring.
    torch.set_num_threads(1)
    started = time.perf_counter()
    folded, explanation = reparam.collapse_with_report(model, verify=verify)
    seconds = time.perf_counter() - started
    _print_counts(target, explanation)
    console.print(_proofs(explanation))
    parts = ", ".join(f"{name} {value:.2f}" for name, value in explanation.seconds.items())
    console.print(f"seconds: {seconds:.2f} ({parts})")
    if output is not None:
        files.save_model(folded, output, source=source, collapsed=True)
        console.print(f"wrote {escape(str(output))} ({output.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


@app.command()
def explain(
    target: Target,
    pretrained: Pretrained = False,
    everything: Annotated[bool, typer.Option("--all", help="Every fold and every refusal.")] = False,
) -> None:
    """Show which layers would fold, into what, and why the others do not. Nothing is changed."""
    model, _ = _network(target, pretrained)
    explanation = reparam.explain(model)
    console.print(_folds_table(explanation, everything))
    if explanation.refusals:
        console.print(_refusals_table(explanation) if everything else _reasons_table(explanation))
    if explanation.untraced and everything:
        console.print(_layers_table("not traceable as a whole, compiled inside", explanation.untraced))
    _print_counts(target, explanation)


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(help="SPEC or file.")],
    candidate: Annotated[str, typer.Argument(help="SPEC or file.")],
    pretrained: Pretrained = False,
) -> None:
    """Compare two networks on the same random inputs; exit status 1 if they differ."""
    models = [_network(target, pretrained)[0] for target in (reference, candidate)]
    result = reparam.verify(*models)
    numbers = f"max difference {result.max_abs:.2e}, relative {result.max_rel:.2e}, tolerance {result.tolerance:.2e}"
    if result.ok:
        console.print(f"[green]equal[/green]: {numbers}", soft_wrap=True)
        return
    first = result.first_difference or "the output"
    console.print(f"[red]different[/red]: {numbers}; first difference at {escape(str(first))}", soft_wrap=True)
    raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------- helpers


def _network(target: str, pretrained: bool, weights: Path | None = None) -> tuple[nn.Module, str]:
    """The network that an argument names, in eval mode, and the spec it came from."""
    if files.is_file_name(target) or Path(target).is_file():
        if weights is not None or pretrained:
            raise sources.UnknownNameError(f"{target} is a file; --weights and --pretrained go with source:name")
        content = files.load_state(target)
        return files.rebuild(content, target), content.source
    # A spec without trained weights is to be the same network each time it is named.
    torch.manual_seed(0)
    model = sources.create(target, pretrained=pretrained).eval()
    if weights is not None:
        model = files.load_into(model, files.load_state(weights), weights)
    elif not pretrained:
        note = f"note: {escape(target)} has random weights (seed 0); see --pretrained"
        errors.print(note, style="dim", soft_wrap=True)
    return model, target


def _check_output(path: Path) -> None:
    """Fail before the work, not after it."""
    if not files.is_file_name(str(path)):
        raise typer.BadParameter(f"{path}: write to .safetensors, .pt or .pth")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: the folder {path.parent} does not exist")


def _proofs(explanation: Explanation) -> str:
    """One line on how much of it is proven."""
    proven = [fold.error for fold in explanation.folds if fold.error is not None]
    if not explanation.folds:
        return "nothing folds"
    if not proven:
        return f"not proven: {len(explanation.folds)} folds"
    return f"proven: {len(proven)} of {len(explanation.folds)} folds, max relative error {max(proven):.1e}"


def _print_counts(title: str, explanation: Explanation) -> None:
    """Layers and parameters before and, where it is known, after; then the notes."""
    columns = {"before": explanation.before, "after": explanation.after}
    known = {heading: counts for heading, counts in columns.items() if counts is not None}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in known:
        table.add_column(heading, justify="right")
    for name in ("convs", "linears", "norms", "parameters"):
        table.add_row(name, *(f"{getattr(counts, name):,}" for counts in known.values()))
    console.print(escape(title), style="italic", soft_wrap=True)
    console.print(table)
    for note in explanation.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _folds_table(explanation: Explanation, everything: bool) -> Table:
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


def _refusals_table(explanation: Explanation) -> Table:
    return _layers_table(f"left alone: {len(explanation.refusals)}", explanation.refusals)


def _layers_table(title: str, refusals: list[Refusal]) -> Table:
    """One row per layer, with the reason in full."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("why", overflow="fold")
    for refusal in refusals:
        table.add_row(escape(refusal.layer or "(model)"), escape(refusal.message))
    return table


def _reasons_table(explanation: Explanation) -> Table:
    """Refusals by reason, the commonest first, with one layer as example."""
    example = {refusal.reason.value: refusal.layer or "(model)" for refusal in reversed(explanation.refusals)}
    title = f"left alone: {len(explanation.refusals)} (--all lists them)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("for example", overflow="fold")
    for reason, count in explanation.reasons().most_common():
        table.add_row(str(count), escape(reason), escape(example[reason]))
    return table
