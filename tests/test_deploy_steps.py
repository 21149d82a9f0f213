"""The steps of docs/deploy.md, each where its package is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quantised_counts
import torch
from blocks import lively
from torch import Tensor, nn

import reparam
from reparam import export

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def needs(name: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    timm = pytest.importorskip("timm")
    return lively(timm.create_model("test_byobnet")).float().eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def wanted(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def onnx_file(network: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deploy") / "deployed.onnx"
    said = export.write_program(reparam.collapse(network), path, (images,), ("batch",))
    assert said.startswith("onnxruntime gives the same for")
    return path


@pytest.fixture
def no_recompile() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(got: Any, wanted: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(got), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_onnxruntime(onnx_file: Path, images: Tensor, wanted: Tensor) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    assert close(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0], wanted)


@needs("openvino")
def test_openvino(onnx_file: Path, images: Tensor, wanted: Tensor) -> None:
    import openvino

    assert close(openvino.compile_model(str(onnx_file), "CPU")(images.numpy())[0], wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="inductor needs a compiler")
def test_torch_compile(network: nn.Module, images: Tensor, wanted: Tensor, no_recompile: None) -> None:
    with torch.no_grad():
        assert close(torch.compile(reparam.collapse(network), fullgraph=True)(images), wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="inductor needs a compiler")
def test_aot_inductor(network: nn.Module, images: Tensor, wanted: Tensor, tmp_path: Path) -> None:
    export.write_program(reparam.collapse(network), tmp_path / "deployed.pt2", (images,))
    program = torch.export.load(tmp_path / "deployed.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(tmp_path / "deployed.aot.pt2"))
    assert close(torch._inductor.aoti_load_package(package)(images), wanted)


@needs("torchao")
def test_pt2e() -> None:
    torch.manual_seed(0)
    timm = pytest.importorskip("timm")
    network, images = timm.create_model("repvgg_a0").eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(network, (images,))
        before, after = (quantised_counts.quantised(each, images) for each in (program, reparam.collapse(program)))
    page = Path(__file__).parents[1].joinpath("docs", "deploy.md").read_text(encoding="utf-8")
    found = [*quantised_counts.counts(before).values(), *quantised_counts.counts(after).values()]
    assert "{} convolutions, leaves {} batch norms and puts in {} quantise".format(*found[:3]) in page
    assert "it finds {}, {} and {}.".format(*found[3:]) in page.replace("\n", " ")
