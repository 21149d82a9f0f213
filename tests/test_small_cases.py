"""Small things that people meet: one layer as the model, a file written over itself, sharded weights, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import reparam
from reparam import cli
from tests.published_blocks import ACB
from tests.published_networks import lively

pytest_plugins = ("toy_package",)
X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "repvgg"])
@pytest.mark.parametrize("online", [False, True])
def test_a_single_layer_is_expanded_and_comes_back(block: str, online: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    expanded = reparam.expand(conv, block, form="online" if online else "branches")
    assert type(expanded) is not nn.Conv2d
    assert torch.allclose(expanded(X), conv(X), atol=1e-6)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expanded.eval()
    for back in (reparam.collapse(expanded), reparam.collapse(expanded, like=conv)):
        assert type(back) is nn.Conv2d
        assert torch.allclose(back(X), expanded(X), atol=1e-4)
    assert isinstance(reparam.collapse(conv), nn.Conv2d)
    with pytest.raises(reparam.ReparamError, match="one layer, which cannot be replaced in place"):
        reparam.expand(conv, block, inplace=True)


def test_a_file_is_not_written_over_itself(toy: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    run = CliRunner().invoke
    assert run(cli.app, ["expand", toy, "--block", "acb", "-o", str(path)]).exit_code == 0
    published = tmp_path / "acnet.pth"
    torch.save(lively(ACB(3, 4, 3)).state_dict(), published)
    before = path.read_bytes(), published.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    for words in (["collapse", str(path), "-o", str(path)], ["collapse", str(path), "-o", str(link)],
                  ["collapse", toy, "--weights", str(path), "-o", str(path)],
                  ["expand", toy, "--block", "acb", "--weights", str(path), "-o", str(path)],
                  ["import", str(published), "-o", str(published)],
                  ["convert", str(path), "-o", str(link)]):  # fmt: skip
        done = run(cli.app, words)
        assert done.exit_code == 2
        assert "is the file that is read, which would be lost" in " ".join(done.output.split())
    assert (path.read_bytes(), published.read_bytes()) == before
    assert run(cli.app, ["collapse", str(path), "-o", str(tmp_path / "other.safetensors")]).exit_code == 0


SHARDED = """
import torch, reparam
from torch import nn, distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
distribute_module(model, init_device_mesh("cpu", (1,)))
for verb in (reparam.collapse, reparam.explain, lambda m: reparam.expand(m, "acb"), lambda m: reparam.verify(m, m)):
    try:
        verb(model)
    except reparam.ReparamError as error:
        print(error)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_sharded_weights_are_refused_at_once(tmp_path: Path) -> None:
    code = SHARDED.format(file=tmp_path / "rendezvous")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("0.weight is a part of what several processes hold" in line for line in lines)
    assert all("full_state_dict=True" in line for line in lines)


RANKS = """
import copy, sys, torch, reparam
from torch import nn, distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + folder + "/ranks", rank=rank, world_size=2)
torch.manual_seed(0)
plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
expanded = reparam.expand(plain, "acb").eval()
model = fully_shard(copy.deepcopy(expanded), mesh=init_device_mesh("cpu", (2,)))
verbs = {
    "collapse": reparam.collapse, "like": lambda m: reparam.collapse(m, like=plain),
    "in place": lambda m: reparam.collapse(m, inplace=True), "into": lambda m: reparam.collapse(expanded, like=m),
    "explain": reparam.explain, "expand": lambda m: reparam.expand(m, "dbb"), "plan": lambda m: reparam.plan(m, "dbb"),
    "verify": lambda m: reparam.verify(m, plain), "with": lambda m: reparam.verify(plain, m),
    "save": lambda m: reparam.save(m, f"{folder}/{rank}.safetensors"),
    "kernel": lambda m: reparam.equivalent_conv(next(m.children())),
}
for when in ("sharded", "whole for a while"):  # the second: after a forward in evaluation the root keeps its weights
    for name, verb in verbs.items():
        if when == "sharded" or name != "kernel":
            try:
                verb(model)
                print("silent", name, when)
            except reparam.ReparamError as error:
                print("refused" if "full_state_dict=True" in str(error) else error)
    with torch.no_grad():
        model(torch.ones(1, 3, 9, 9))
expanded.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
x = torch.ones(1, 3, 9, 9)
print(torch.allclose(reparam.collapse(expanded, like=plain)(x), plain(x), atol=1e-5))
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_on_two_ranks_every_verb_says_at_once_that_a_network_is_sharded(tmp_path: Path) -> None:
    words = [[sys.executable, "-c", RANKS, str(rank), str(tmp_path)] for rank in (0, 1)]
    ranks = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in words]
    for rank in ranks:
        out, error = rank.communicate(timeout=120)  # a verb that waits for the other rank would hang
        assert rank.returncode == 0, error
        assert out.split("\n") == ["refused"] * 21 + ["True", ""]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("reparam col", "collapse"),
        ("reparam tr", "train"),
        ("reparam zoo co", "convert"),
        ("reparam collapse --wei", "--weights"),
    ],
)
def test_the_shell_completes_commands_and_their_options(words: str, answer: str) -> None:
    pytest.importorskip("timm")
    asked = {"_REPARAM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv = ['reparam']; from reparam.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert answer in done.stdout.split()


def test_completion_is_installed_by_an_option() -> None:
    printed = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--install-completion" in printed
