"""Checkpoints as training tools write them are read without running anything, and their prefix is found and said."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import reparam
from reparam import cli, files, sources
from reparam.fitting import fitted
from reparam.pickles import VALUES, Inert, load_pickle

pytest_plugins = ("toy_package",)


class Bomb:
    """What a hostile pickle does on loading."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


SETTINGS = argparse.Namespace(lr=0.1, out=pathlib.Path("runs/x"), betas=(0.9, 0.999))
KINDS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "last.pth.tar": lambda s: {"epoch": 1, "arch": "block", "state_dict": s, "args": SETTINGS, "metric": np.float64(7)},
    "model_9.pth": lambda s: {"model": s, "optimizer": {}, "lr_scheduler": {"gamma": 0.1}, "args": SETTINGS},
    "epoch=1.ckpt": lambda s: {
        "state_dict": behind("net.", s),
        "hyper_parameters": {"a": 1},
        "loops": defaultdict(list),
    },
    "model.ckpt": lambda s: {"state_dict": behind("model.", s) | {"loss.weight": torch.ones(3)}},
    "compiled.ckpt": lambda s: {"state_dict": behind("net._orig_mod.", s)},
    "pytorch_model.bin": lambda s: s,
    "params.pth": lambda s: {"params": s},
    "only.pth": lambda s: {"generator": s, "epoch": 3, "optimizer": {}},
    "when.pth": lambda s: {"model": s, "best": np.arange(3.0), "seed": np.int64(3)},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_of_a_training_tool_collapses(toy: str, tmp_path: Path, name: str, legacy: bool) -> None:
    expanded = reparam.expand(sources.create(toy), "acb", init="paper").eval()
    torch.save(KINDS[name](expanded.state_dict()), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    out = tmp_path / "out.safetensors"
    arguments = ["collapse", toy, "--block", "acb", "--weights", str(tmp_path / name), "-o", str(out)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    collapsed = files.load_model(out)
    reparam.verify(expanded, collapsed, torch.randn(2, 3, 8, 8)).raise_if_different()
    printed = " ".join(done.output.split())
    said = {
        "epoch=1.ckpt": "'net.'",
        "model.ckpt": "'model.', and left out 1 tensors",
        "compiled.ckpt": "'net._orig_mod",
    }
    assert ("dropped the prefix" in printed) is (name in said)
    assert said.get(name, "") in printed


def test_nothing_of_the_settings_is_looked_up(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "args": SETTINGS, "rng": np.random.rand(3)}, tmp_path / "a.pth")
    before = set(torch.serialization.get_safe_globals())
    content = load_pickle(tmp_path / "a.pth")
    assert isinstance(content["args"], Inert)
    assert not isinstance(content["args"], argparse.Namespace)
    assert isinstance(content["rng"], Inert)
    assert torch.equal(content["model"]["w"], torch.ones(2))
    assert set(torch.serialization.get_safe_globals()) == before  # of other people's torch.load nothing is changed


@pytest.mark.parametrize("where", [lambda b: {"args": argparse.Namespace(a=b)}, lambda b: {"args": b}, lambda b: [b]])
def test_code_beside_the_settings_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[[Bomb], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "extra": where(Bomb())}, tmp_path / "a.ckpt")
    with pytest.raises(files.FileError, match=r"a\.ckpt holds more than tensors|a\.ckpt is not a PyTorch file"):
        files.load_state(tmp_path / "a.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_no_function_that_acts_is_on_the_list() -> None:
    assert not [name for name in VALUES if name.partition(".")[0] in ("os", "sys", "subprocess", "torch", "shutil")]
    assert {type(Inert("x", y=3)), type(Inert())} == {Inert}


# ------------------------------------------------------------------------------------------------- prefixes


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))


def test_a_prefix_is_dropped_only_where_all_fits_behind_it() -> None:
    model = net()
    state = dict(model.state_dict())
    assert fitted(model, state) is not None
    found = fitted(model, behind("a.b.", state) | {"other": torch.ones(1)})
    assert found is not None
    assert found.tensors.keys() == state.keys()
    assert found.notes == ("dropped the prefix 'a.b.', and left out 1 tensors of other names, such as 'other'",)
    half = behind("a.", state)
    half.pop("a.conv.bias")
    assert fitted(model, half) is None
    assert fitted(model, behind("a.", state) | {"a.more": torch.ones(1)}) is None
    assert fitted(model, behind("a.", state) | {"a.conv.weight": torch.ones(2, 1, 5, 5)}) is None
    assert fitted(model, state | {"more": torch.ones(1)}) is None


def test_what_is_trained_is_taken_and_its_average_left_out() -> None:
    model = net()
    state = dict(model.state_dict())
    found = fitted(
        model, behind("average.", {name: value * 0 for name, value in state.items()}) | behind("net.", state)
    )
    assert found is not None
    assert found.notes[0].startswith("dropped the prefix 'net.', and left out 7 tensors of other names")
    assert torch.equal(found.tensors["conv.weight"], state["conv.weight"])


def test_a_teacher_and_a_student_are_chosen_by_key(toy: str, tmp_path: Path) -> None:
    state = dict(sources.create(toy).state_dict())
    both = behind("student.", state) | behind("teacher.", {name: value * 0 for name, value in state.items()})
    torch.save({"state_dict": both}, tmp_path / "both.ckpt")
    arguments = ["collapse", toy, "--weights", str(tmp_path / "both.ckpt"), "-o", str(tmp_path / "o.safetensors")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert "behind 'student.' and behind 'teacher.'; choose with --key student." in " ".join(done.output.split())
    done = CliRunner().invoke(cli.app, [*arguments, "--key", "teacher."])
    assert done.exit_code == 0, done.output
    assert not files.load_state(tmp_path / "o.safetensors").tensors["head.weight"].any()
    with pytest.raises(files.FileError, match=r"no tensor's name begins with 'pupil\.'"):
        files.load_state(tmp_path / "both.ckpt", key="pupil.")
    with pytest.raises(files.FileError, match=r"what stands before names ends in a dot: student\.$"):
        files.load_state(tmp_path / "both.ckpt", key="student")


def test_what_else_is_wrong_is_said_behind_the_prefix(toy: str, tmp_path: Path) -> None:
    expanded = reparam.expand(sources.create(toy), "acb")
    torch.save({"state_dict": behind("net.", dict(expanded.state_dict()))}, tmp_path / "a.ckpt")
    done = CliRunner().invoke(cli.app, ["collapse", toy, "--weights", str(tmp_path / "a.ckpt")])
    assert done.exit_code == 1
    assert "It fits with --block acb" in " ".join(done.output.split())


def test_another_number_of_classes_is_told_as_that(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    spec = "timm:test_resnet"
    plain = sources.create(f"{spec},num_classes=7")
    for model, more in ((plain, []), (reparam.expand(plain, "acb"), ["--block", "acb"])):
        torch.save(model.state_dict(), tmp_path / "a.pth")
        done = CliRunner().invoke(cli.app, ["collapse", spec, *more, "--weights", str(tmp_path / "a.pth")])
        printed = " ".join(done.output.split())
        assert done.exit_code == 1
        assert "is for 7 classes and timm:test_resnet" in printed
        assert "timm:test_resnet,num_classes=7" in printed
    wider = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict()
    assert fitted(net(), wider) is None


# ------------------------------------------------------------------------------------------------- several files


def sharded(
    folder: Path, state: dict[str, Tensor], base: str, write: Callable[[dict[str, Tensor], Path], None]
) -> Path:
    """Two files and their index, as Hugging Face writes them."""
    names, (stem, _, suffix) = list(state), base.partition(".")
    places = {name: f"{stem}-0000{1 + (i > len(names) // 2)}-of-00002.{suffix}" for i, name in enumerate(names)}
    for place in set(places.values()):
        write({name: state[name] for name in names if places[name] == place}, folder / place)
    index = folder / f"{base}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("base", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_several_files_are_read_by_their_index(toy: str, tmp_path: Path, base: str, prefix: str) -> None:
    write = torch.save if base.endswith("bin") else pytest.importorskip("safetensors.torch").save_file
    state = behind(prefix, dict(reparam.expand(sources.create(toy), "acb").state_dict()))
    index = sharded(tmp_path, state, base, write)
    arguments = ["collapse", toy, "--block", "acb", "-o", str(tmp_path / "o.safetensors"), "--weights"]
    done = CliRunner().invoke(cli.app, [*arguments, str(index)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli.app, [*arguments, str(next(tmp_path.glob("*-00001-of-00002.*")))])
    assert done.exit_code == 1
    assert f"It is one of several files: name {index}" in done.output.replace("\n", "")
    lacking = json.loads(index.read_text())
    lacking["weight_map"].popitem()
    index.write_text(json.dumps(lacking))
    with pytest.raises(files.FileError, match=r"-of-00002\..* and .*\.index\.json differ in '.*download both again"):
        files.load_state(index)
    next(tmp_path.glob("*-00001-of-00002.*")).unlink()
    with pytest.raises(files.FileError, match="no such file"):
        files.load_state(index)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "only files beside it are read"),
        ('{"weight_map": {"a": "/tmp/secret.pt"}}', "only files beside it are read"),
        ('{"weight_map": {"a": "a.index.json"}}', "only files beside it are read"),
        ('{"weight_map": {"a": 3}}', "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ("[]", "it has no weight_map"),
        ("{", "cannot be read as an index"),
        ("[" * 100_000, "cannot be read as an index"),
    ],
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.index.json").write_text(text)
    with pytest.raises(files.FileError, match=words):
        files.load_state(tmp_path / "a.index.json")
