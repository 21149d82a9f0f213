"""Networks by name: discovery, options, and errors that help."""

from __future__ import annotations

import subprocess
import sys

import pytest

import reparam
from reparam import sources

pytest_plugins = ("toy_package",)


def test_a_source_of_another_package_is_found(toy: str) -> None:
    assert "toy" in sources.sources()
    assert sources.names("toy", "bl*") == ["black", "block"]
    assert sources.create(toy).head.in_features == 4


def test_options_follow_the_name(toy: str) -> None:
    import torch

    assert sources.create(f"{toy},width=6").head.in_features == 6
    name, options = sources.parse("toy:block,size=(96,96),kind=fast,flag=True,none=None")[1:]
    assert name == "block"
    assert options == {"size": (96, 96), "kind": "fast", "flag": True, "none": None}
    assert torch.is_tensor(sources.create(toy).head.weight)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("block", "source:name"),
        ("tyo:block", "did you mean toy"),
        ("toy:blok", "did you mean block"),
        ("toy:block,width", "key=value"),
        ("toy:block,pretrained=True", "argument"),
    ],
)
def test_a_wrong_name_is_a_clear_error(toy: str, spec: str, words: str) -> None:
    with pytest.raises(sources.UnknownNameError, match=words):
        sources.create(spec)


@pytest.mark.parametrize("source", ["missing", "broken"])
def test_a_source_without_its_package_says_what_to_install(toy: str, source: str) -> None:
    with pytest.raises(reparam.ReparamError, match=r"pip install 'reparam\[zoo\]'"):
        sources.create(f"{source}:block")


def test_a_source_that_fails_is_named(toy: str) -> None:
    with pytest.raises(reparam.ReparamError, match="toy could not build 'block' with pretrained weights"):
        sources.create(toy, pretrained=True)
    with pytest.raises(reparam.ReparamError, match="colour"):
        sources.create(f"{toy},colour=1")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("timm:resnet18", True),
        ("timm:hf-hub:timm/resnet18", True),
        ("C:\\model.pt", False),
        ("resnet18", False),
        ("a:", False),
    ],
)
def test_specs_and_paths_are_told_apart(text: str, answer: bool) -> None:
    assert sources.is_spec(text) is answer


def test_timm_and_torchvision_are_sources() -> None:
    pytest.importorskip("timm")
    assert "repvgg_a0" in sources.names("timm", "repvgg*")
    assert sources.names("torchvision", "r3d*") == ["r3d_18"]
    assert not sources.names("torchvision", "quantized*")
    with pytest.raises(sources.UnknownNameError, match="resnet18"):
        sources.create("torchvision:resnet_18")


def test_torchvision_downloads_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    import torch

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    for name in ("lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "googlenet", "shufflenet_v2_x0_5"):
        assert sources.create(f"torchvision:{name}") is not None


def test_listing_sources_imports_none_of_them() -> None:
    code = (
        "import sys, reparam.sources as s; s.sources(); import zoo.sources;"
        "assert not {'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
