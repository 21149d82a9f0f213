"""``reparam train``: one run of training, or a comparison of variants, from the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import distributed

from reparam.commands import Online, form_of
from reparam.networks import UsageError
from reparam.sources import name_code
from zoo.networks import find_spec
from zoo.render import console
from zoo.train.config import LAST, PLAIN, Config, ConfigError, override
from zoo.train.recipes import recipe, recipe_text
from zoo.train.result import Epoch, Result

__all__ = ["train"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
WHAT, HOW, RUN = "What is trained", "How it is trained", "The run"


def train(
    variants: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VARIANT]...", help="With --compare: plain acb dbb@online acb:gamma=1/3@paper ..."),
    ] = None,
    recipe_name: Annotated[
        str | None, typer.Option("--recipe", help="Begin with a published configuration: acnet-cifar10, ...")
    ] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Show every value, train nothing.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="cifar_quick, timm:resnet18, ...", rich_help_panel=WHAT)
    ] = None,
    block: Annotated[
        str | None, typer.Option("--block", "-b", help="acb, acb:gamma=1/3, ...; none: plain.", rich_help_panel=WHAT)
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="preserve or paper.", rich_help_panel=WHAT)] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="branches, sampled, frozen or online.", rich_help_panel=WHAT)
    ] = None,
    online: Online = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="digits, cifar10, cifar100, mnist, synthetic, or a folder of images or IDX files.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Where downloaded data sets lie.", rich_help_panel=WHAT)
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Pixels of an image's side.", rich_help_panel=WHAT)] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes.", rich_help_panel=HOW)] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Images per step, of all processes.", rich_help_panel=HOW)
    ] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Highest learning rate.", rich_help_panel=HOW)] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Of kernels.", rich_help_panel=HOW)
    ] = None,
    ema: Annotated[
        float | None, typer.Option("--ema", help="Decay of averaged weights: 0.999.", rich_help_panel=HOW)
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="no (float32), bf16 or fp16.", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of weights and data; the first of several.", rich_help_panel=HOW)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other value; repeatable.", rich_help_panel=HOW),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the variants that follow alike.", rich_help_panel=RUN)
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="With --compare: runs of each.", rich_help_panel=RUN)
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that load images.", rich_help_panel=RUN)
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the run.", show_default="in runs/", rich_help_panel=RUN),
    ] = None,
) -> None:
    """Train a network, plain or with blocks; the same command again goes on where a run was stopped.

    What is not said is as in the recipe, or has the default that --print-recipe shows. Several processes or machines:
    torchrun --nproc-per-node 2 -m reparam train ...
    """
    fields = {"model": model, "block": block, "init": init, "form": form_of(form, online), "data": data, "size": size}
    fields |= {"epochs": epochs, "batch": batch, "rate": rate, "weight_decay": weight_decay, "ema": ema}
    fields |= {"precision": precision, "seed": seed, "root": None if root is None else str(root)}
    config = _configuration(recipe_name, fields, settings or [])
    if print_recipe:
        if recipe_name is None:
            raise UsageError("name the --recipe to print")
        typer.echo(recipe_text(recipe_name, config))
        return
    if config.block is None and not compare:
        _refuse_without_block(init=init, form=fields["form"], **dict(each.split("=", 1) for each in settings or []))
    if bool(variants) != compare or (seeds is not None and not compare):
        raise UsageError("a comparison is written --compare plain acb dbb --seeds 5")
    try:
        if compare:
            _compare(config, variants or [], seeds or 1, out or Path("runs", _name(config)), workers)
        else:
            _train(config, out or Path("runs", f"{_name(config)}-{_variant(config)}-seed{config.seed}"), workers)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _configuration(recipe_name: str | None, fields: dict[str, Any], settings: list[str]) -> Config:
    """The recipe's configuration with what the command line says."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        if "model" in given:
            given["model"] = find_spec(given["model"])
            name_code(given["model"])  # which may register blocks
        config = Config() if recipe_name is None else recipe(recipe_name, given.get("model"))
        if given.get("block") in (PLAIN, "none"):
            given["block"] = None
        elif recipe_name is not None and config.block and given.get("block") == config.block.partition(":")[0]:
            del given["block"]  # the recipe's own, with the options that were published
        return override(replace(config, **given), settings)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _refuse_without_block(**given: str | None) -> None:
    """What says how a block is put in or trains says nothing of a plain network."""
    names = [name for name in ("init", "form", "where") if given.get(name) is not None]
    if names:
        raise UsageError(f"{' and '.join(names)}: that is of a block, and the network is plain; name one with --block")


def _name(config: Config) -> str:
    """Network and data as a part of a folder's name."""
    return _file_name(f"{config.model.partition(':')[2]}-{Path(config.data).name}")


def _variant(config: Config) -> str:
    """The blocks as a part of a folder's name."""
    forms = [config.form, config.last_form and LAST + config.last_form]
    marks = [form for form in forms if form is not None] + ["paper"] * (config.init == "paper")
    return _file_name("@".join([config.block, *marks])) if config.block else PLAIN


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=@,-]", "-", text)


# ------------------------------------------------------------------------------------------------- one run


def _train(config: Config, out: Path, workers: int) -> None:
    """Train one network, showing how far it is; draw its curve."""
    from zoo.train.checkpoint import held

    with held(out):
        _train_here(config, out, workers)


def _train_here(config: Config, out: Path, workers: int) -> None:
    from zoo.train.trainer import Training

    terminal = console()
    with terminal.status("preparing"):
        training = Training(config, out, workers=workers)
    if not training.main:
        terminal = Console(quiet=True)
    if training.finished:
        terminal.print(f"{out} is finished; another --out trains again", soft_wrap=True, markup=False)
    elif training.log:
        terminal.print(f"going on after epoch {len(training.log)} in {out}", soft_wrap=True, markup=False)
    with _progress(terminal, config.epochs) as show, _interruptible(terminal, out):
        for epoch in training.epochs(lambda step: show(len(training.log) + step / training.steps, "")):
            show(epoch.epoch, _line(epoch, config.epochs))
    if training.main:
        result = training.result()
        _draw(result, config, out)
        terminal.print(f"{_summary(result)}; in {out}", soft_wrap=True, markup=False)


def _line(epoch: Epoch, epochs: int) -> str:
    """An epoch in words."""
    text = f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  {epoch.seconds:.1f} s  rate {epoch.rate:.2g}"
    text += f"  loss {epoch.train_loss:.4f}  train {100 * epoch.train_accuracy:.2f}%"
    if epoch.test_accuracy is not None:
        text += f"  test {100 * epoch.test_accuracy:.2f}%"
    return text if epoch.ema_test_accuracy is None else f"{text}  averaged {100 * epoch.ema_test_accuracy:.2f}%"


def _summary(result: Result) -> str:
    averaged = result.averaged_evaluations
    text = f"test accuracy: mean of the last ten evaluations {100 * result.mean_of_last:.2f}%, "
    text += f"last {100 * result.last:.2f}%, best {100 * result.best:.2f}%"
    if averaged:
        text += f" (averaged weights: last {100 * averaged[-1]:.2f}%, best {100 * max(averaged):.2f}%)"
    return (
        f"{text}; {result.seconds:.1f} s of training, {result.images_per_second:,.0f} images/s, "
        f"{result.peak_bytes / 2**20:.0f} MiB, {result.parameters / 1e6:.3f} M parameters"
    )


def _draw(result: Result, config: Config, out: Path) -> None:
    from zoo.train.plots import learning_curves

    evaluated = [epoch for epoch in result.epochs if epoch.test_accuracy is not None]
    numbers = [epoch.epoch for epoch in evaluated]
    curves = {_variant(config): (numbers, 100 * np.array([result.evaluations]))}
    if result.averaged_evaluations:
        curves["averaged"] = (numbers, 100 * np.array([result.averaged_evaluations]))
    learning_curves(curves, out / "curves")


# ------------------------------------------------------------------------------------------------- comparison


def _compare(config: Config, variants: list[str], seeds: int, out: Path, workers: int) -> None:
    """Train all variants with all seeds, and print what came of it."""
    from zoo.train.compare import compare

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--compare runs in one process; train each variant on its own with torchrun")
    terminal = console()
    order = [(text, config.seed + turn) for turn in range(seeds) for text in variants]
    with _progress(terminal, len(order) * config.epochs) as show, _interruptible(terminal, out):
        over: dict[tuple[str, int], int] = {}

        def on_epoch(text: str, seed: int, epoch: Epoch) -> None:
            over[text, seed] = epoch.epoch
            show(sum(over.values()), f"{text}, seed {seed}: {_line(epoch, config.epochs)}")

        compare(config, variants, seeds, out, workers=workers, on_epoch=on_epoch)
    terminal.print((out / "table.md").read_text(encoding="utf-8"), soft_wrap=True, markup=False)
    terminal.print(f"report: {out / 'report.md'}", soft_wrap=True, markup=False)


# ------------------------------------------------------------------------------------------------- progress


@contextmanager
def _progress(terminal: Console, epochs: int) -> Iterator[Callable[[float, str], None]]:
    """What shows how many epochs are over: a bar on a terminal, elsewhere a line for each that says something."""
    if not terminal.is_terminal:
        yield lambda over, text: terminal.print(text, soft_wrap=True, markup=False) if text else None
        return
    parts = (
        SpinnerColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        "/",
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*parts, console=terminal) as progress:
        task = progress.add_task("", total=epochs)

        def show(over: float, text: str) -> None:
            progress.update(task, completed=over, **({"description": text} if text else {}))

        yield show


@contextmanager
def _interruptible(terminal: Console, out: Path) -> Iterator[None]:
    """Ctrl-C ends the command with a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        terminal.print(f"stopped; what is finished is in {out}, and the same command goes on", markup=False)
        raise typer.Exit(INTERRUPTED) from None
