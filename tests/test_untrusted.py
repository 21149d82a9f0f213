"""A file of a stranger is loaded, or refused in one line; it opens nothing else and takes no memory by surprise."""

from __future__ import annotations

import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from damage import damaged, outcome, write_network
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from reparam import cli, files, sources, untrusted

NOTE = {"source": "zoo:cifar_quick", "collapsed": "no", "reparam": "0.1.0", "torch": "2"}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    state = sources.create("zoo:cifar_quick").eval().state_dict()
    return {name: value.clone() for name, value in state.items()}


def written(folder: Path, tensors: dict[str, Tensor], **note: str) -> Path:
    path = folder / "a.safetensors"
    save_file(tensors, path, metadata={**NOTE, **note})
    return path


def refused(path: Path, match: str) -> None:
    with pytest.raises(files.FileError, match=match) as caught:
        files.load_model(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ which network


@pytest.mark.parametrize(
    "options",
    [
        "checkpoint_path=/etc/passwd", "layers=(100000,3,3,3)", "num_classes=1000000000", "block_args={'a': 1}",
        "weights='IMAGENET1K_V1'", "img_size=(1,2,3,4,5,6,7)", "drop_rate=nan", "global_pool='x'", "num_classes=-1",
        "num_classes=True", "in_chans='3'", "scriptable=True", "num_classes=2.5",
    ],
)  # fmt: skip
def test_an_option_that_is_not_plain_is_only_taken_where_it_is_allowed(
    options: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = written(tmp_path, tensors, source=f"timm:resnet10t,{options}")
    refused(path, rf"asks for a network with {options.partition('=')[0]}=.*allow_options")
    assert files.load_state(path).tensors.keys() == tensors.keys()  # the numbers are not at stake
    trusted = files.load_state(path, allow_options=True)
    assert trusted.source.endswith(options)


def test_plain_options_are_taken(tmp_path: Path) -> None:
    for spec in (
        "timm:resnet10t,num_classes=7,in_chans=1,drop_rate=0.1,global_pool='max'",
        "torchvision:googlenet,num_classes=5,init_weights=False,aux_logits=False",
        "timm:resnet10t,layers=(1,1,1,1)",
        "timm:vit_tiny_patch16_224,img_size=(64,96),num_classes=0",
    ):
        untrusted.check_spec(spec)
    spec = "timm:resnet10t,num_classes=7,in_chans=1"
    model = sources.create(spec)
    path = files.save_model(model, tmp_path / "a.safetensors", source=spec)
    assert files.load_model(path).get_submodule("fc").out_features == 7


def test_a_network_of_another_place_is_not_fetched(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    refused(written(tmp_path, tensors, source="timm:hf-hub:someone/something"), "of another place")


def test_the_command_line_allows_options(tmp_path: Path) -> None:
    spec = "timm:resnet10t,num_classes=7,zero_init_last=False"
    path = files.save_model(sources.create(spec), tmp_path / "a.safetensors", source=spec)
    closed = CliRunner().invoke(cli.app, ["explain", str(path)])
    opened = CliRunner().invoke(cli.app, ["--allow-options", "explain", str(path)])
    again = CliRunner().invoke(cli.app, ["explain", str(path)])
    assert (closed.exit_code, opened.exit_code, again.exit_code) == (1, 0, 1)


@pytest.mark.parametrize(
    ("note", "match"),
    [
        ({"source": "timm:resnet10t,x=" + "-" * 200_000 + "1"}, "characters; at most"),
        ({"source": "no colon"}, "does not name a network"),
        ({"expanded": "[" * 100_000}, "damaged"),
        ({"expanded": '{"block": 3}'}, "damaged"),
        ({"collapsed": "yes", "edits": "[" * 100_000}, "damaged"),
    ],
)
def test_a_damaged_note_is_named(note: dict[str, str], match: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    refused(written(tmp_path, tensors, **note), match)


@pytest.mark.parametrize("shape", ["9" * 5000, "3x-1", "axb", "\uff13x3", "x"])
def test_a_damaged_shape_is_named(shape: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    content = files.load_state(written(tmp_path, tensors, shape=shape))
    with pytest.raises(files.FileError, match="shape of a sample is damaged"):
        _ = content.shape


# ------------------------------------------------------------------ which tensors


KINDS = {
    "int8": lambda v: v.to(torch.int8),
    "bool": lambda v: v.to(torch.bool),
    "float8_e4m3fn": lambda v: v.to(torch.float8_e4m3fn),
    "complex64": lambda v: v.to(torch.complex64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_another_kind_are_named(kind: str, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    cast = {name: KINDS[kind](value) if value.is_floating_point() else value for name, value in tensors.items()}
    refused(written(tmp_path, cast), f"is of dtype {kind}")


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantised tensors
def test_tensors_of_another_layout_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = next(n for n, v in tensors.items() if v.dim() == 4)
    odd = {
        "sparse": tensors[name].to_sparse(),
        "quantised": torch.quantize_per_tensor(tensors[name], 0.1, 0, torch.qint8),
    }
    for kind, value in odd.items():
        path = tmp_path / "a.pt"
        torch.save({"state_dict": {**tensors, name: value}, "metadata": NOTE}, path)
        refused(path, f"is a {kind}.* tensor")


def test_a_counter_that_is_no_integer_is_named(tmp_path: Path) -> None:
    model = sources.create("timm:resnet10t,num_classes=2")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["bn1.num_batches_tracked"] = torch.tensor(1.5)
    refused(written(tmp_path, state, source="timm:resnet10t,num_classes=2"), "float32 in the file and int64")


@pytest.mark.parametrize(("name", "match"), [("x" * 10_000_000, "characters"), ("a\x1b[2Jb", "cannot be printed")])
def test_names_that_no_tensor_has(name: str, match: str, tmp_path: Path) -> None:
    refused(written(tmp_path, {name: torch.zeros(1)}), match)


def test_what_a_terminal_would_obey_is_not_printed(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["explain", str(tmp_path / "\x1b[31mred.safetensors")])
    assert done.exit_code != 0
    assert "\x1b" not in done.output


# ------------------------------------------------------------------ how much memory


def test_a_packed_file_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"w": torch.zeros(25_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member, source.read(member), zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 1 << 20
    with pytest.raises(files.FileError, match="unpack to 95 MB"):
        files.load_state(packed)
    assert files.load_state(plain).tensors.keys() == {"w"}


def test_a_packed_data_set_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("w", data=np.zeros(25_000_000, "f4"), compression="gzip")
    with pytest.raises(files.FileError, match="unpack to 95 MB"):
        files.load_state(path)


# ------------------------------------------------------------------ other files


def _external_link(file: Any, other: Path) -> None:
    file["w"] = h5py.ExternalLink(str(other), "/s")


def _soft_link(file: Any, other: Path) -> None:
    file.create_dataset("v", data=np.arange(2.0))
    file["w"] = h5py.SoftLink("/v")


def _broken_link(file: Any, other: Path) -> None:
    file["w"] = h5py.SoftLink("/nowhere")


def _external_storage(file: Any, other: Path) -> None:
    file.create_dataset("w", (2,), "f8", external=[(str(other), 0, 16)])


def _virtual(file: Any, other: Path) -> None:
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(str(other), "s", (4,))
    file.create_virtual_dataset("w", layout)


@pytest.mark.parametrize("point", [_external_link, _soft_link, _broken_link, _external_storage, _virtual])
def test_a_data_set_elsewhere_is_never_read(point: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_dataset("s", data=np.arange(4.0))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        point(file, tmp_path / "other.h5")
    with pytest.raises(files.FileError, match="'w'"):
        files.load_state(tmp_path / "a.h5")


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".h5"])
def test_damaged_files_are_loaded_or_refused(suffix: str, tmp_path: Path) -> None:
    path = write_network(tmp_path / f"a{suffix}")
    content, rng, found = path.read_bytes(), random.Random(0), Counter[str]()

    def read() -> None:
        state = files.load_state(path)
        if state.source:
            files.rebuild(state, path)

    for _ in range(150):
        path.write_bytes(damaged(content, rng))
        found[outcome(read)] += 1
    assert found["refused"] > 20
    assert found.keys() <= {"loaded", "refused"}
