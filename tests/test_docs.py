"""The pages are whole: links lead somewhere, tables are rectangular, commands exist, numbers say how they were made."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from reparam import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if ":" not in link and not (page.parent / link).exists()]


@every_page
def test_tables_have_as_many_cells_in_every_row(page: Path) -> None:
    before = 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) if line.startswith("|") else 0
        assert not (cells and before and cells != before), f"line {number}: {line}"
        before = cells


@every_page
def test_commands_have_these_options(page: Path) -> None:
    """Each is parsed, and none is run."""
    for package in ("timm", "torchvision", "accelerate"):
        pytest.importorskip(package)
    found = re.findall(r"^(?:\$ |    )?(reparam [^`\n#]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    for text in found:
        if "..." not in text:
            _parse(shlex.split(text)[1:])


def _parse(words: list[str]) -> None:
    command = typer.main.get_command(cli.app)
    context = command.make_context("reparam", words)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        assert name is not None
        context = command.make_context(name, rest, parent=context)


@every_page
def test_numbers_say_how_they_were_made(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if "Written by the tool" in text:
        assert re.search(r"reparam [a-z]+|python tests/", text.replace(": reparam 0", "")), "no command"
