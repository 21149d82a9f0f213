"""Import each network of :mod:`tests.published_networks` and write the table in docs/checkpoints.md.

Run ``python tests/import_table.py``; it takes a few minutes.
"""

# ruff: noqa: T201 - run by hand, it writes to the terminal

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import reparam
from reparam import sources
from reparam.files import misfit
from tests.published_networks import NETWORKS, Published, lively

PAGE = Path(__file__).parent.parent / "docs" / "checkpoints.md"
HEADINGS = ("grammar", "network", "tensors", "parameters", "into", "found", "strict", "blocks", "expanded", "plain")


def row(network: Published, folder: Path) -> list[str]:
    """Import one network in both ways."""
    torch.manual_seed(0)
    official = lively(network.make())
    torch.save(network.state(official), folder / "x.pth")
    x = torch.randn(1, 3, network.size, network.size, dtype=torch.float64)
    found, gaps = [], [] if network.expands else ["-"]
    with torch.no_grad():
        want = official(x)
        for collapse in (False, True)[not network.expands :]:
            imported = reparam.import_checkpoint(folder / "x.pth", like=network.plain(), collapse=collapse)
            assert imported.model is not None
            got = imported.model.double()(x)
            found.append(imported)
            gaps.append(f"{float((got - want).abs().max() / want.abs().max()):.1e}")
    blocks = "; ".join(f"{number} {said.partition(' (')[0]}" for said, number in found[0].blocks.items())
    count = sum(p.numel() for p in official.parameters())
    into = f"`{network.like}`" if isinstance(network.like, str) else "the same, plain"
    return [
        network.grammar, network.name, str(len(official.state_dict())), f"{count / 1e6:.2f} M", into, blocks,
        strict(network, found), f"{max(each.difference for each in found):.1e}", *gaps,
    ]  # fmt: skip


def strict(network: Published, found: list[reparam.Imported]) -> str:
    """Whether stock code loads one of them: the plain network, or timm's own with blocks in it."""
    plain = network.plain()
    stock = sources.create(plain) if isinstance(plain, str) else plain
    return "yes" if any(not misfit(stock, each.tensors) for each in found) else "no"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="page with the comments around the table")
    page = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(network, Path(folder)) for network in NETWORKS]
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- python tests/import_table.py -->\n", "<!-- end -->"
    table = begin + "\n".join(lines) + "\n" + end
    written = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: table, text, flags=re.DOTALL)
    page.write_text(written, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
