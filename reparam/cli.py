"""The command line: the commands of :mod:`reparam.commands`, and whatever other packages announce.

Commands of other packages are found through the entry point group ``reparam.commands``; the value is a function
that typer can register, or a ``typer.Typer``. They are loaded when they are asked for.

Exit status: 0 good, 1 different or failed, 2 wrong usage, 3 a comparison that rounding leaves open. An error is one
line; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from typer.core import TyperGroup

import reparam
from reparam import commands
from reparam.commands import console, errors
from reparam.disk import FileError
from reparam.exhausted import WORDS, was_exhausted
from reparam.networks import UsageError
from reparam.own_code import NAMED
from reparam.recipe import RecipeError
from reparam.sources import UnknownNameError
from reparam.untrusted import ALLOWED, CODE, printable

__all__ = ["app"]

COMMANDS = "reparam.commands"
"""Entry point group of further commands."""

WRONG_USAGE = (UnknownNameError, RecipeError, UsageError)
"""Errors whose fix is another command line: exit status 2."""


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
            anything = {"allow_extra_args": True, "ignore_unknown_options": True}
            stand_in = _unavailable(cmd_name, f"{type(error).__name__}: {error}")
            return _as_command(stand_in, cmd_name, context_settings=anything)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; anything but the framework's own exceptions becomes one line and exit status 1 or 2."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the reader of a pipe has seen enough
            raise
        except Exception as error:
            # exit_code marks the framework's usage errors, which it prints itself with status 2.
            if hasattr(error, "exit_code") or ctx.params.get("debug"):
                raise
            ours = isinstance(error, reparam.ReparamError)
            text = str(error) if ours else f"{type(error).__name__}: {error} (--debug before the command shows where)"
            if was_exhausted(error) and not isinstance(error, FileError):  # which names the file that takes it
                text = WORDS
            errors.print(f"[red]error:[/red] {escape(printable(text))}", soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, WRONG_USAGE) else 1) from error


def _as_command(value: Any, name: str, **options: Any) -> Any:
    """Turn what an entry point holds, a function or a ``typer.Typer``, into a command of the group."""
    if not isinstance(value, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command(name, **options)(value)
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
    pretty_exceptions_show_locals=False,
    help="Any network to better training-time blocks, and trained multi-branch networks to plain convolutions, proven.",
    epilog="SPEC is source:name, timm:repvgg_a0 for example, or code of your own, ./net.py:Net or pkg.models:build, "
    "with options after commas: timm:resnet18,num_classes=10.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"reparam {reparam.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="REPARAM_DEBUG")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs.")] = False,
    allow_options: Annotated[
        bool, typer.Option("--allow-options", help="Trust files: they may ask for a network with any options.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Trust files: the network may be code that they name, which is run.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Options before the command."""
    ALLOWED.set(allow_options)
    CODE.set(allow_code)
    NAMED.set(frozenset())
    # Only ours: libraries that download write to the terminal themselves.
    log = logging.getLogger("reparam")
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if not log.handlers:
        log.addHandler(RichHandler(console=errors, show_path=False, show_time=False))


for _command in commands.COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)
