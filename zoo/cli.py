"""``reparam zoo``: list, convert, show and report many models."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from reparam import sources
from reparam.commands import Cost, Norms
from zoo.journal import JournalError, read
from zoo.outcome import KINDS, Converted, Outcome, OutOfMemory, Size, TimedOut
from zoo.render import console, write_text
from zoo.report import write_report
from zoo.run import Limits, Run, convert_zoo
from zoo.summary import summary

__all__ = ["app", "follow"]

app = typer.Typer(no_args_is_help=True, help="Convert many models: isolated, resumable, each result proven.")

SHOWN = 12
"""Running models that the live display names."""
COLOURS = {"converted": "green", "nothing_to_do": "dim", "refused": "yellow"}


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*",
    source: Annotated[str, typer.Option("--source", help="timm, torchvision, or another package's source.")] = "timm",
) -> None:
    """List the models of a source."""
    found = sources.names(source, pattern)
    if not found:
        raise sources.UnknownNameError(f"no network of {source!r} is named {pattern!r}")
    typer.echo("\n".join(found))


@app.command()
def convert(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Names, shell patterns, source:name, or ONNX files.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run.")] = None,
    source: Annotated[str, typer.Option("--source", help="Source of names that do not say theirs.")] = "timm",
    block: Annotated[str | None, typer.Option("--block", help="Expand first: a name, or name:option=value.")] = None,
    weights: Annotated[Path | None, typer.Option("--weights", help="Folder of checkpoints named for models.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Load trained weights (downloads).")] = False,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep the networks, or only the results.")] = True,
    onnx: Annotated[bool, typer.Option("--onnx", help="Keep each network as an ONNX file, too.")] = False,
    largest: Annotated[
        float | None, typer.Option("--max-parameters", min=0, help="Millions; larger networks are refused.")
    ] = None,
    outputs: Annotated[
        bool, typer.Option("--outputs/--no-outputs", help="Compare whole outputs, or only prove each fold.")
    ] = True,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time the networks, or only prove.")] = True,
    norms: Norms = "keep",
    cost: Cost = "numbers",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one model.")] = Limits.timeout,
    memory: Annotated[float | None, typer.Option("--memory", help="GiB for one model, libraries aside.")] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", help="Dask scheduler whose workers convert.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: try again what failed.")] = False,
) -> None:
    """Convert models, each in a process of its own; exit status 1 if one failed or differs."""
    if out is None:
        raise typer.BadParameter("name the folder of the run", param_hint="--out")
    if not patterns and weights is None:
        raise typer.BadParameter("name models, or a folder of --weights", param_hint="PATTERN")
    if timeout <= 0 or (memory is not None and memory <= 0):
        raise typer.BadParameter("must be positive", param_hint="--timeout, --memory")
    _run(
        patterns or ["*"],
        out,
        source=source,
        block=block,
        pretrained=pretrained,
        weights=weights,
        save=save,
        onnx=onnx,
        max_parameters=None if largest is None else round(largest * 1e6),
        outputs=outputs,
        latency=latency,
        norms=norms,
        cost=cost,
        jobs=jobs,
        timeout=timeout,
        memory=memory,
        resume=resume,
        retry=retry,
        cluster=cluster,
    )


@app.command()
def plan(
    patterns: Annotated[list[str], typer.Argument(help="Names, shell patterns, or source:name.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    source: Annotated[str, typer.Option("--source", help="Source of names that do not say theirs.")] = "timm",
    block: Annotated[
        str | None, typer.Option("--block", help="Plan to expand, too: a name, or name:option=value.")
    ] = None,
    norms: Norms = "keep",
    cost: Cost = "numbers",
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one model.")] = Limits.timeout,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: try again what failed.")] = False,
) -> None:
    """Plan models of any size without numbers: what would fold, what other folds leave, what would get a block."""
    if timeout <= 0:
        raise typer.BadParameter("must be positive", param_hint="--timeout")
    options = {"source": source, "block": block, "norms": norms, "cost": cost, "jobs": jobs, "timeout": timeout}
    _run(patterns, out, **options, resume=resume, retry=retry, plan=True)


def _run(patterns: list[str], out: Path, **options: Any) -> None:
    """Exit with status 1 if a model failed or differs."""
    if not all(outcome.ok for outcome in follow(patterns, out, **options)):
        raise typer.Exit(1)


def follow(patterns: Iterable[str], out: Path, **options: Any) -> list[Outcome]:
    """Convert models, as :func:`zoo.run.convert_zoo` does, on the terminal: with a display, and a report at the end."""
    terminal = console()
    with _display(terminal) as display:
        for outcome in convert_zoo(patterns, out=out, on_tick=display.tick, **options):
            display.show(outcome)
    run = display.run
    every = list(read(out).outcomes.values()) if run is None else run.done
    page = write_report(out)
    terminal.print(f"{_counts(every)}; report: {page}", soft_wrap=True, markup=False)
    return every


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run, which may go on meanwhile.")]) -> None:
    """Write DIR/report.html: one file with the table, plots and a page for each model."""
    console().print(str(write_report(folder)), soft_wrap=True, markup=False)


@app.command("summary")
def summary_(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs that have come to their end.")],
    out: Annotated[Path, typer.Option("--out", help="Markdown file to write.")],
) -> None:
    """Write what runs show as one Markdown document: totals, tables by family, reasons."""
    write_text(out, summary(folders))
    console().print(str(out), soft_wrap=True, markup=False)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    model: Annotated[str, typer.Argument(help="Name of a model, or source:name.")],
) -> None:
    """Show what became of one model."""
    outcomes = read(folder).outcomes
    found = [o for spec, o in outcomes.items() if model in (spec, o.name)]
    if not found:
        raise sources.UnknownNameError(f"{folder} has no outcome of {model!r}")
    terminal = console()
    for outcome in found:
        _show(terminal, outcome, folder)


# ------------------------------------------------------------------------------------------------- progress


class Display:
    """Lines for a log: one for each model that ends."""

    def __init__(self, terminal: Console) -> None:
        self.terminal = terminal
        self.run: Run | None = None

    def tick(self, run: Run) -> None:
        """Look at the run as it is now."""
        self.run = run

    def show(self, outcome: Outcome) -> None:
        """Say what became of one model."""
        place = f"{len(self.run.done)}/{self.run.total} " if self.run is not None else ""
        style = COLOURS.get(outcome.kind, "red")
        seconds = outcome.seconds.get("all", 0.0)
        kind = outcome.kind.replace("_", " ")
        text = f"{place}[{style}]{kind}[/{style}] {escape(outcome.spec)} ({seconds:.1f} s): "
        self.terminal.print(text + escape(" ".join(outcome.sentence().split())), soft_wrap=True)


class LiveDisplay(Display):
    """The same above a bar with the running models, counts by outcome and the time left."""

    EVERY = 0.2
    """Seconds between two drawings."""

    def __init__(self, terminal: Console, live: Live) -> None:
        super().__init__(terminal)
        self.live, self.last = live, 0.0

    def tick(self, run: Run) -> None:
        super().tick(run)
        if time.monotonic() - self.last > self.EVERY:
            self.last = time.monotonic()
            self.live.update(_picture(run), refresh=True)


@contextmanager
def _display(terminal: Console) -> Iterator[Display]:
    """A live display on a terminal, lines elsewhere."""
    if not terminal.is_terminal:
        yield Display(terminal)
        return
    with Live(console=terminal, auto_refresh=False, transient=True) as live:
        yield LiveDisplay(terminal, live)


def _picture(run: Run) -> Group:
    table = Table.grid(padding=(0, 2))
    for each in run.running[:SHOWN]:
        held = f"{each.peak / 1e9:.1f} GB" if each.base is not None else ""
        table.add_row(f"  {escape(each.job.spec)}", each.stage, f"{each.seconds:.0f} s", held)
    if len(run.running) > SHOWN:
        table.add_row(f"  and {len(run.running) - SHOWN} more", "", "", "")
    left = "" if run.left is None else f", about {_duration(run.left)} left"
    line = f"{len(run.done)}/{run.total}{left}; {_counts(run.done)}"
    bar = Table.grid()  # a bar does not end its line itself
    bar.add_row(ProgressBar(total=max(run.total, 1), completed=len(run.done), width=60))
    return Group(table, bar, line)


def _counts(outcomes: list[Outcome]) -> str:
    counts = Counter(outcome.kind for outcome in outcomes)
    return ", ".join(f"{counts[kind]} {kind.replace('_', ' ')}" for kind in KINDS if counts[kind]) or "nothing yet"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# ------------------------------------------------------------------------------------------------- one model


def _show(terminal: Console, outcome: Outcome, folder: Path) -> None:
    style = COLOURS.get(outcome.kind, "red")
    kind = outcome.kind.replace("_", " ")
    terminal.print(f"{escape(outcome.spec)}: [{style}]{kind}[/{style}]", soft_wrap=True)
    terminal.print(outcome.sentence(), soft_wrap=True, markup=False)
    for note in outcome.notes:
        terminal.print(f"note: {note}", soft_wrap=True, markup=False)
    if isinstance(outcome, Converted):
        _show_converted(terminal, outcome, folder)
    trace = getattr(outcome, "traceback", "")
    if trace:
        terminal.print(trace.rstrip(), soft_wrap=True, markup=False)
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in outcome.seconds.items())
    terminal.print(f"seconds: {stages}", soft_wrap=True, markup=False)
    if outcome.peak:
        word = "taken" if isinstance(outcome, OutOfMemory | TimedOut) else "peak"
        terminal.print(f"memory: {word} {outcome.peak / 1e6:.0f} MB beyond the libraries", soft_wrap=True)


def _show_converted(terminal: Console, outcome: Converted, folder: Path) -> None:
    sizes = {"stock": outcome.stock, "before": outcome.before, "after": outcome.after}
    known: dict[str, Size] = {heading: size for heading, size in sizes.items() if size is not None}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in known:
        table.add_column(heading, justify="right")
    for name in ("convs", "norms", "linears", "parameters", "multiply_adds", "bytes"):
        values = (getattr(size, name) for size in known.values())
        table.add_row(name.replace("_", "-"), *("" if value is None else f"{value:,}" for value in values))
    terminal.print(table)
    for line in _facts(outcome):
        terminal.print(line, soft_wrap=True, markup=False)
    if outcome.details is not None:
        for heading, count in _reasons(folder / outcome.details).items():
            terminal.print(f"left alone: {heading}: {count}", soft_wrap=True, markup=False)


def _facts(outcome: Converted) -> Iterator[str]:
    proof = outcome.proof
    yield f"proof: {proof.folds} folds on their own, largest relative error {proof.fold_error:.1e}"
    if proof.outputs == "none":
        yield f"outputs were not compared: {proof.remark}"
    else:
        noise = f", noise floor {proof.noise:.1e}" if proof.noise == proof.noise else f" ({proof.remark})"
        yield f"{proof.outputs} outputs: error {proof.error:.1e}{noise}"
    if proof.roundtrip:
        yield "round trip: the stock architecture takes the collapsed weights and computes the same"
    if outcome.latency is not None:
        shape = "x".join(map(str, outcome.latency.shape))
        yield f"latency on {shape}: {outcome.latency.before:.2f} → {outcome.latency.after:.2f} ms"
    for file in (outcome.file, outcome.onnx_file, outcome.expanded_file):
        if file is not None:
            yield f"file: {file}"


def _reasons(path: Path) -> dict[str, int]:
    try:
        details: Any = json.loads(path.read_text(encoding="utf-8"))
        return dict(Counter(each["message"] for each in (*details["refusals"], *details["left"])).most_common())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path} cannot be read: {error}") from error
