"""The recipes of docs/recipes.md run as they stand, where their packages are installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = [
    (heading, tuple(packages.split()), code)
    for heading, rest in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    for packages, code in re.findall(r"```python (.*?)\n(.*?)```", rest, re.DOTALL)
]


def test_every_tool_has_a_recipe() -> None:
    said = " ".join(f"{heading} {' '.join(packages)}" for heading, packages, _ in RECIPES)
    tools = "timm torchvision transformers Lightning accelerate DDP FSDP2 ultralytics segmentation monai SWA prune"
    for tool in tools.split():
        assert tool in said
    assert TEXT.count("```python") == len(RECIPES)


@pytest.mark.filterwarnings("ignore")  # of other people's libraries
@pytest.mark.parametrize(
    ("packages", "code"), [(p, c) for _, p, c in RECIPES], ids=[f"{h.partition(':')[0]}-{p[0]}" for h, p, _ in RECIPES]
)
def test_a_recipe_runs(packages: tuple[str, ...], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    if "torchrun" in code:
        (tmp_path / "recipe.py").write_text(code, encoding="utf-8")
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "recipe.py"]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(code, "recipes.md", "exec"), names)
