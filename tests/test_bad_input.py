"""Bad input: each a clear error that names the layer, and nothing is changed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import WIDTH, ConvBN, Net, images, maps, ready, snapshot
from small_networks import unchanged as is_unchanged
from torch import Tensor, nn

import reparam
from reparam import ReparamError

VERBS: dict[str, Callable[[Any], Any]] = {
    "collapse": reparam.collapse,
    "collapse inplace": lambda model: reparam.collapse(model, inplace=True),
    "collapse unproven": lambda model: reparam.collapse(model, verify=False),
    "explain": reparam.explain,
    "verify": lambda model: reparam.verify(model, model),
}


NEED_NUMBERS = ("collapse", "collapse inplace", "verify")
"""The others decide by shapes."""


def rejected(model: Any, message: str, verbs: Iterable[str] = VERBS) -> None:
    """Every verb raises, and none leaves a trace."""
    before = snapshot(model) if isinstance(model, nn.Module) else None
    for verb in map(VERBS.__getitem__, verbs):
        with pytest.raises(ReparamError, match=message):
            verb(model)
    assert before is None or is_unchanged(model, before)


@pytest.mark.parametrize("thing", [None, 3, "resnet18", {"weight": torch.zeros(1)}, torch.zeros(3), ConvBN, len])
def test_not_a_module(thing: Any) -> None:
    rejected(thing, f"expected a torch.nn.Module, got {type(thing).__name__}")


def test_candidate_is_not_a_module() -> None:
    with pytest.raises(ReparamError, match="got dict"):
        reparam.verify(ConvBN(), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.Module()])
def test_no_parameters(model: nn.Module) -> None:
    rejected(model, f"{type(model).__name__} has no parameters")
    with pytest.raises(ReparamError, match="has no parameters"):
        reparam.guess_inputs(model)


def test_meta_parameters() -> None:
    """Named by their first; a single buffer on the meta device counts as well."""
    with torch.device("meta"):
        model = Net()
    rejected(model, r"stem\.conv\.weight is on the meta device", NEED_NUMBERS)
    model = Net()
    model.whole.identity.running_mean = torch.zeros(WIDTH, device="meta")
    rejected(model, r"whole\.identity\.running_mean is on the meta device", NEED_NUMBERS)


def test_lazy_parameters() -> None:
    rejected(nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d()), r"1\.weight is not initialised yet: run")
    rejected(nn.LazyLinear(3), "weight is not initialised yet")


class Quantised(nn.Module):
    """Like torch's own quantised layers: a module of that package, beside an ordinary one."""

    __module__ = "torch.ao.nn.quantized.modules.linear"


def test_quantised() -> None:
    model = Net()
    model.head = nn.Sequential(nn.Linear(WIDTH, 4), Quantised())
    rejected(model, r"head\.1 is quantised: rewrite the model first")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantised_buffer() -> None:
    model = ConvBN()
    model.register_buffer("table", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with pytest.raises(ReparamError, match="table is quantised"):
        reparam.collapse(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["stem.conv.weight", "whole.point.norm.bias", "residual.bn2.running_mean", "residual.bn1.running_var"]
)
def test_not_finite(name: str, value: float) -> None:
    """A weight or a running statistic that is broken before any fold is named."""
    model = ready(Net())
    path, _, leaf = name.rpartition(".")
    getattr(model.get_submodule(path), leaf).data.flatten()[-1] = value
    kind = "NaN" if value != value else "an infinite value"
    rejected(model, rf"^{name} holds {kind}".replace(".", r"\."))


def test_infinite_buffers_elsewhere_are_fine() -> None:
    """An attention mask is full of minus infinities; only weights and running statistics must be finite."""

    class Masked(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((3,), float("-inf")))

    assert reparam.Counts.of(reparam.collapse(ready(Masked()))).norms == 0


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize(("what", "value"), [("weight", r"9e\+04"), ("bias", r"9\.997e\+04")])
def test_half_precision_overflow(what: str, value: str, inplace: bool) -> None:
    """Finite in half precision before, not after: the layers and the value are named; in bfloat16 all is well."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight.fill_(300.0 if what == "weight" else 1.0)
        model[1].weight.fill_(300.0 if what == "weight" else 2.0)
        model[1].running_mean.fill_(0.0 if what == "weight" else -50_000.0)
    model.half()
    before = snapshot(model)
    with pytest.raises(ReparamError, match=rf"0, 1: the folded {what} does not fit into torch\.float16.*{value}"):
        reparam.collapse(model, inplace=inplace)
    assert is_unchanged(model, before)
    reparam.collapse(model.to(torch.bfloat16))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("verify", [False, True], ids=["unproven", "proven"])
@pytest.mark.parametrize(
    "inputs",
    [
        images(channels=5),
        (images(), images()),
        (),
        "an image",
        torch.zeros(2, 3, 12, 12, dtype=torch.int64),
        {"image": images()},
    ],
    ids=["channels", "too many", "too few", "text", "integers", "dict"],
)
def test_example_inputs_that_the_model_rejects(inputs: Any, verify: bool, inplace: bool) -> None:
    model = ready(Net()).train()
    before = snapshot(model)
    with pytest.raises(ReparamError, match=r"the model rejects example_inputs: .+"):
        reparam.collapse(model, example_inputs=inputs, verify=verify, inplace=inplace)
    assert is_unchanged(model, before)
    with pytest.raises(ReparamError, match=r"the model rejects example_inputs: .+"):
        reparam.explain(model, inputs)
    with pytest.raises(ReparamError, match=r"a network rejects example_inputs: .+"):
        reparam.verify(model, model, inputs)


NOTED: list[Tensor] = []


class Recorded(ConvBN):
    """Reads what a hook notes, as transformers' backbones do once they were called."""

    def forward(self, x: Tensor) -> Tensor:
        NOTED.clear()
        super().forward(x)
        return NOTED[0] * 2


def note(module: nn.Module, args: Any, output: Tensor) -> None:
    NOTED.append(output)


def test_hooks_of_the_library_that_a_network_is_from_run_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a part of its forward; those that a person put on it reach anywhere, and do not run."""
    library = types.ModuleType("some_library")
    library.__file__ = str(tmp_path / "some_library" / "__init__.py")
    monkeypatch.setitem(sys.modules, "some_library", library)
    monkeypatch.setattr("passes.proof.run._SITES", {tmp_path})
    for thing in (Recorded, note):
        monkeypatch.setattr(thing, "__module__", "some_library.hooks")
    model = ready(Recorded())
    model.conv.register_forward_hook(note)
    ours = []
    model.norm.register_forward_hook(lambda module, args, output: ours.append(output))
    collapsed, explanation = reparam.collapse_with_report(model, example_inputs=maps())
    assert explanation.checked is not None
    assert explanation.checked.ok
    assert not reparam.verify(model, collapsed, maps()).max_abs
    assert not ours


def test_a_network_that_needs_its_own_hooks_is_told_that_they_do_not_run() -> None:
    model = ready(Recorded())
    model.conv.register_forward_hook(note)
    model(maps())
    said = r"rejects example_inputs: list index out of range \(it runs without the hooks at 'conv'; if it needs them"
    with pytest.raises(ReparamError, match=said):
        reparam.collapse(model, example_inputs=maps())
    with pytest.raises(ReparamError, match=said):
        reparam.verify(model, model, maps())
    assert torch.equal(reparam.collapse(model)(maps()), model(maps()))


def test_candidate_that_rejects_the_inputs() -> None:
    with pytest.raises(ReparamError, match="a network rejects example_inputs"):
        reparam.verify(ConvBN(), ConvBN(3), maps())
    with pytest.raises(
        ReparamError, match=r"a network rejects the inputs made up for the first one: .* \(in conv, Conv2d\)"
    ):
        reparam.verify(ConvBN(), ConvBN(3))


def test_no_inputs_can_be_guessed() -> None:
    """The error says what was tried and what to do."""

    class Picky(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 77:
                raise ValueError("77 only")
            return super().forward(x)

    with pytest.raises(ReparamError, match=r"pass example_inputs\. Tried made-up input 2x8x64x64: 77 only"):
        reparam.verify(Picky(), Picky())


def test_mixed_dtypes() -> None:
    """Each fold takes the dtype of the weights it replaces; the rest stays as it was."""
    model = ready(Net())
    model.residual.double()
    plain = reparam.collapse(model)
    dtypes = {name: p.dtype for name, p in plain.named_parameters()}
    assert {t for name, t in dtypes.items() if name.startswith("residual")} == {torch.float64}
    assert {t for name, t in dtypes.items() if not name.startswith("residual")} == {torch.float32}


def test_norm_in_float32_behind_a_half_convolution() -> None:
    """The usual mixed precision: the convolution's dtype ships."""
    model = ready(ConvBN()).to(torch.bfloat16)
    model.norm.float()
    plain = reparam.collapse(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("verb", [reparam.collapse, reparam.collapse_with_report])
def test_unknown_options(verb: Any) -> None:
    """Options are keyword-only, and one that does not exist is not swallowed."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'in_place'"):
        verb(ConvBN(), in_place=True)
    with pytest.raises(TypeError, match="positional"):
        verb(ConvBN(), maps())


def test_like_is_not_a_module() -> None:
    with pytest.raises(ReparamError, match=r"like= .* torch\.nn\.Module, got str"):
        reparam.collapse(ready(ConvBN()), like="resnet18")  # type: ignore[arg-type]


def test_model_that_cannot_be_copied() -> None:
    """Then there is still inplace=True, and the error says so."""

    class Stuck(ConvBN):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("holds a lock")

    model = ready(Stuck())
    before = snapshot(model)
    with pytest.raises(ReparamError, match=r"cannot be copied \(holds a lock\); inplace=True"):
        reparam.collapse(model)
    assert is_unchanged(model, before)
    assert reparam.collapse(model, inplace=True) is model
    assert reparam.Counts.of(model).norms == 0
