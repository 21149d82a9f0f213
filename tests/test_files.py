"""Networks on disk: what is written comes back, and what is not a state dict is refused without running it."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import reparam
from passes.edits.carried import made_by
from passes.edits.edit import Rewrite
from reparam import Block, files, sources
from reparam.recipe import Recipe, RecipeError, parse_blocks, parse_where

pytest_plugins = ("toy_package",)
SUFFIXES = (".safetensors", ".pt", ".pth")


class Tied(nn.Module):
    """A shared parameter, an overlapping view and a layout that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        memory = torch.arange(12.0)
        self.register_buffer("low", memory[:8])
        self.register_buffer("high", memory[4:])
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def trained(model: nn.Module) -> nn.Module:
    """Any numbers but the initial ones; variances stay positive."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.2, 1.0)
    return model.eval()


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tensors_and_note_come_back(tmp_path: Path, suffix: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    path = files.save_model(model, tmp_path / f"net{suffix}", source="toy:block", collapsed=True)
    content = files.load_state(path)
    assert same(content.tensors, model.state_dict())
    assert content.source == "toy:block"
    assert content.collapsed
    assert content.metadata["torch"] == str(torch.__version__)
    assert content.metadata["reparam"] == reparam.__version__


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shared_tensors_are_stored_once_and_come_back(tmp_path: Path, suffix: str) -> None:
    model = Tied()
    path = files.save_model(model, tmp_path / f"net{suffix}")
    content = files.load_state(path)
    assert same(content.tensors, model.state_dict())
    assert content.tensors["first.weight"].data_ptr() == content.tensors["second.weight"].data_ptr()
    if suffix == ".safetensors":
        assert "second.weight" not in load_file(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_network_is_rebuilt(toy: str, tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    model = trained(sources.create(toy)).to(dtype)
    path = files.save_model(model, tmp_path / f"net{suffix}", source=toy)
    rebuilt = files.load_model(path)
    assert same(rebuilt.state_dict(), model.state_dict())
    assert not rebuilt.training


@pytest.mark.parametrize("start", ["trained", "as created"])
def test_a_collapsed_network_is_rebuilt(toy: str, tmp_path: Path, start: str) -> None:
    model = sources.create(toy).eval()
    folded = reparam.collapse(trained(model) if start == "trained" else model)
    path = files.save_model(folded, tmp_path / "net.safetensors", source=toy, collapsed=True)
    rebuilt = files.load_model(path)
    x = torch.randn(2, 3, 8, 8)
    assert same(rebuilt.state_dict(), folded.state_dict())
    assert torch.equal(rebuilt(x), folded(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "expanded"])
def test_a_collapsed_network_is_read_without_compiling(
    toy: str, tmp_path: Path, suffix: str, dtype: torch.dtype, expanded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that folds otherwise tomorrow reads the file as well: it only makes the edits that the file names."""
    model = sources.create(toy)
    model = trained(reparam.expand(model, "acb") if expanded else model).double()
    folded = reparam.collapse(model).to(dtype)
    path = files.save_model(folded, tmp_path / f"net{suffix}", source=toy, collapsed=True)

    def never(*args: object, **options: object) -> None:
        raise AssertionError("nothing is to be traced or folded")

    for place in (
        "reparam.collapse",
        "reparam.expand",
        "passes.compiler.trace_units",
        "passes.graph.capture.trace_units",
    ):
        monkeypatch.setattr(place, never)
    rebuilt = files.load_model(path)
    monkeypatch.undo()
    assert same(rebuilt.state_dict(), folded.state_dict())
    assert [str(m) for m in rebuilt.modules()] == [str(m) for m in folded.modules()]
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(rebuilt.float()(x), folded.float()(x))
    again = files.save_model(rebuilt, tmp_path / f"again{suffix}", source=toy, collapsed=True)
    assert files.load_state(again).edits == files.load_state(path).edits != ""


def test_a_file_of_before_there_were_edits_is_read(toy: str, tmp_path: Path) -> None:
    folded = reparam.collapse(trained(sources.create(toy)))
    path = files.save_model(folded, tmp_path / "net.safetensors", source=toy, collapsed=True)
    note = {k: v for k, v in files.load_state(path).metadata.items() if k != "edits"}
    save_file(folded.state_dict(), path, metadata=note)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(files.load_model(path)(x), folded(x))


def test_edits_that_no_file_can_hold_are_said(toy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A forward that calls a function of some library: the network is found again by collapsing its source."""
    model = reparam.collapse(trained(sources.create(toy)))
    edits = list(made_by(model) or ())
    rewrite = edits.pop()
    assert isinstance(rewrite, Rewrite)
    program = replace(rewrite.program, functions={"somewhere.function": len})
    model.reparam_edits = (*edits, replace(rewrite, program=program))
    path = files.save_model(model, tmp_path / "net.safetensors", source=toy, collapsed=True)
    assert "somewhere.function" in caplog.text
    assert "somewhere.function" in files.load_state(path).metadata["edits"]
    assert files.load_state(path).edits == ""
    assert same(files.load_model(path).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: "[" * 100_000,
        lambda text: text.replace('"version":1', '"version":7'),
        lambda text: text.replace("square", "round"),
        lambda text: text.replace("torch.relu", "os.system"),
        lambda text: text.replace('["out_channels",4]', '["out_channels",1073741824]'),
        lambda text: text.replace('["out_channels",4]', '["out_channels",8]'),
        lambda text: text.replace('"Delete"', '"Execute"'),
    ],
)
def test_a_damaged_note_on_edits_is_one_line(toy: str, tmp_path: Path, damage: Any) -> None:
    folded = reparam.collapse(trained(sources.create(toy)))
    path = files.save_model(folded, tmp_path / "net.safetensors", source=toy, collapsed=True)
    content = files.load_state(path)
    damaged = damage(content.edits)
    assert damaged != content.edits
    save_file(folded.state_dict(), path, metadata={**content.metadata, "edits": damaged})
    with pytest.raises(files.FileError) as caught:
        files.load_model(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("dbb"),
        Recipe("acb", form="online"),
        Recipe(Block("acb", bn="after", gamma=1 / 3), where=["square"], init="paper"),
        Recipe({"square": Block("mobileone", n=2)}, where={"kernel": (3, 3), "depthwise": False}),
    ],
    ids=str,
)
def test_an_expanded_network_is_rebuilt(
    toy: str, tmp_path: Path, suffix: str, dtype: torch.dtype, recipe: Recipe
) -> None:
    model = trained(recipe.expand(sources.create(toy)).to(dtype))
    assert model.state_dict().keys() != sources.create(toy).state_dict().keys()
    path = files.save_model(model, tmp_path / f"net{suffix}", source=toy, expanded=recipe)
    rebuilt = files.load_model(path)
    assert same(rebuilt.state_dict(), model.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    assert torch.equal(rebuilt(x), model(x))
    assert not files.load_state(path).collapsed


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("acb"),
        Recipe(Block("acb", gamma=1 / 3, bn="after"), form="branches"),
        Recipe({"layer1.*": "dbb", "*": Block("mobileone", n=2)}, init="paper"),
        Recipe("acb", where="layer1"),
        Recipe("acb", where=["layer1", "layer2.*"], form="online"),
        Recipe("acb", where={"kernel": 3, "name": ["conv3x5"]}),
        Recipe("acb", where={"kernel": [3, (3, 5)], "depthwise": True}),
        Recipe("acb", where={"stride": (1, 2)}),
    ],
    ids=str,
)
def test_a_recipe_comes_back_from_its_text(recipe: Recipe) -> None:
    back = Recipe.from_text(recipe.to_text())
    assert back == recipe._normal()
    assert back.blocks == recipe.blocks
    assert str(back) == str(recipe)


def test_a_choice_of_kernels_is_not_mistaken_for_a_shape() -> None:
    for kernel in ([3, 5], (3, 5), [(3, 5)]):
        assert Recipe.from_text(Recipe("acb", where={"kernel": kernel}).to_text()).where == {"kernel": kernel}


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="predicate"):
        files.save_model(
            nn.Linear(2, 2), tmp_path / "net.pt", expanded=Recipe("acb", where=lambda path, conv: path == "stem")
        )
    assert list(tmp_path.iterdir()) == []
    for option in (object(), (1, 2)):
        with pytest.raises(RecipeError, match="stored"):
            Recipe(Block("acb", line=option)).to_text()


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ("not json", "damaged"),
        ("[]", "damaged"),
        ('{"block": {"name": "acb", "options": {}}}', "damaged"),
        ('{"block": {"name": "mine", "options": {}}, "where": null, "init": "preserve", "online": null}', "import"),
    ],
)
def test_a_damaged_note_is_an_error_that_names_it(tmp_path: Path, note: str, words: str) -> None:
    save_file(
        {"weight": torch.zeros(2)}, tmp_path / "net.safetensors", metadata={"source": "toy:block", "expanded": note}
    )
    with pytest.raises(files.FileError, match=words):
        _ = files.load_state(tmp_path / "net.safetensors").recipe


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["acb"], Block("acb")),
        (["acb:gamma=1/3,bn=after"], Block("acb", gamma=1 / 3, bn="after")),
        (["acb:gamma=1"], Block("acb", gamma=1)),
        (["dbb:single=true"], Block("dbb", single=True)),
        (["doconv:depth=None"], Block("doconv", depth=None)),
        (["layer1.*=dbb"], {"layer1.*": Block("dbb")}),
        (["acb", "layer1.*=dbb:single=True"], {"layer1.*": Block("dbb", single=True), "*": Block("acb")}),
    ],
)
def test_blocks_as_one_writes_them(texts: list[str], expected: object) -> None:
    assert parse_blocks(texts) == expected


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], "name a block"),
        (["abc"], "did you mean 'acb'"),
        (["acb:gama=1"], "no option 'gama'"),
        (["acb:gamma=x"], "of type float"),
        (["acb:gamma=1/0"], "of type float"),
        (["acb:line=3.5"], "of type int or None"),
        (["mobileone:n=True"], "of type int"),
        (["dbb:single=1"], "of type bool"),
        (["acb:gamma"], "option=value"),
        (["acb:"], "option=value"),
        (["=acb"], "PATTERN=BLOCK"),
        (["a="], "PATTERN=BLOCK"),
        (["a=acb", "a=dbb"], "two blocks for the pattern"),
        (["acb", "dbb"], "two blocks for all"),
    ],
)
def test_a_malformed_block_says_how_to_write_it(texts: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_blocks(texts)


def test_filters_as_one_writes_them() -> None:
    assert parse_where([], [], None) is None
    assert parse_where(["a", "b"], [], None) == ["a", "b"]
    assert parse_where(["a"], ["3", "3x5"], False) == {"name": ["a"], "kernel": [3, (3, 5)], "depthwise": False}
    for kernel in ("3y", "x", "0", "-3", "3x"):
        with pytest.raises(RecipeError, match="3x5"):
            parse_where([], [kernel], None)


# ------------------------------------------------------------------------------------------------ atomic writing


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.save_model(nn.Linear(2, 2), tmp_path / "net.pt")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.FileError, match="No space left"):
        files.save_model(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for suffix in SUFFIXES:
        path = files.save_model(nn.Linear(2, 2), tmp_path / f"net{suffix}")
        assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["net.bin", "net", "no_such_folder/net.pt"])
def test_a_wrong_target_is_a_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(files.FileError, match="net"):
        files.save_model(nn.Linear(2, 2), tmp_path / name)


def test_a_state_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(files.FileError, match="'weight'"):
        files.save_model(nn.Linear(2, 2, device="meta"), tmp_path / "net.pt")


# ------------------------------------------------------------------------------------------------ bad files


class Bomb:
    """What a hostile pickle does on loading."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_file_that_needs_unpickling_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    if protocol == "torch":
        torch.save({"state_dict": {}, "extra": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(files.FileError, match=r"hostile\.pt"):
        files.load_state(path)
    assert not (tmp_path / "exploded").exists()


def test_a_whole_pickled_model_says_what_to_store(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(files.FileError, match=r"state_dict\(\)"):
        files.load_state(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, keep: int) -> None:
    path = files.save_model(nn.Linear(20, 20), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(files.FileError, match="cut"):
        files.load_state(path)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"epoch": 3}, {}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(files.FileError, match=r"state dict; |state dict: "):
        files.load_state(tmp_path / "other.pt")


def test_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"text{suffix}"
        with pytest.raises(files.FileError, match="no such file"):
            files.load_state(path)
        path.write_text("not a network at all, only some words")
        with pytest.raises(files.FileError, match="text"):
            files.load_state(path)


def test_checkpoints_of_training_scripts_are_understood(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    wrapped = {"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": {f"module.{name}": v for name, v in state.items()}}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    content = files.load_state(tmp_path / "checkpoint.pth")
    assert same(content.tensors, state)
    assert content.source == ""


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_leave_no_trace_in_the_names(tmp_path: Path, prefix: str) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "wrapped.pt")
    assert same(files.load_state(tmp_path / "wrapped.pt").tensors, state)


def test_an_averaged_model_is_understood(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "average.pt")
    assert same(files.load_state(tmp_path / "average.pt").tensors, model.state_dict())


def test_a_model_whose_only_child_is_called_module_keeps_its_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    path = files.save_model(model, tmp_path / "net.pt")
    assert same(files.load_state(path).tensors, model.state_dict())


def test_a_checkpoint_with_several_state_dicts_says_which_is_read(tmp_path: Path) -> None:
    states = {key: nn.Linear(2, 2).state_dict() for key in ("model", "ema")}
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 1, **states, "mine": states["ema"]}, path)
    content = files.load_state(path)
    assert (content.key, content.others) == ("model", ("ema", "mine"))
    assert same(content.tensors, states["model"])
    for key in ("ema", "mine"):
        assert same(files.load_state(path, key=key).tensors, states["ema"])
    with pytest.raises(files.FileError, match="'model', 'ema', 'mine'"):
        files.load_state(path, key="swa")
    with pytest.raises(files.FileError, match="no key"):
        files.load_state(files.save_model(nn.Linear(2, 2), tmp_path / "net.safetensors"), key="model")


def test_a_foreign_file_loads_but_does_not_say_its_network(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    assert list(files.load_state(tmp_path / "foreign.safetensors").tensors) == ["weight"]
    with pytest.raises(files.FileError, match="--weights"):
        files.load_model(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    ("model", "words"),
    [(nn.Linear(4, 2), "missing"), (nn.Identity(), "missing")],
)
def test_tensors_of_another_network_do_not_fit(toy: str, tmp_path: Path, model: nn.Module, words: str) -> None:
    path = files.save_model(model, tmp_path / "net.safetensors", source=toy)
    with pytest.raises(files.FileError, match=words):
        files.load_model(path)


def test_misfits_name_the_first_difference() -> None:
    model = nn.Linear(4, 2)
    state = dict(model.state_dict())
    assert files.misfit(model, state) == ""
    assert "'more'" in files.misfit(model, state | {"more": torch.zeros(1)})
    assert "(2, 5)" in files.misfit(model, state | {"weight": torch.zeros(2, 5)})
    assert "'bias'" in files.misfit(model, {"weight": state["weight"]})
    both = files.misfit(model, {"weight": state["weight"], "more": torch.zeros(1)})
    assert "'bias'" in both
    assert "'more'" in both


class Versioned(nn.Module):
    """As torchvision's MNASNet: it wants to know which version of itself wrote the state dict."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_state_dict_of_a_version_loads_from_a_file_without_one() -> None:
    model, other = Versioned(), Versioned()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="version"):
        other.load_state_dict(tensors)
    files.fill(other, tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    del tensors["norm.num_batches_tracked"]  # as files of before torch 0.4.1 are, which its norms still read
    files.fill(other, tensors)


@pytest.mark.slow
def test_torchvisions_mnasnet_there_and_back(tmp_path: Path) -> None:
    model = sources.create("torchvision:mnasnet0_5").eval()
    path = files.save_model(model, tmp_path / "x.safetensors", source="torchvision:mnasnet0_5")
    assert all(torch.equal(a, b) for a, b in zip(files.load_model(path).parameters(), model.parameters(), strict=True))
