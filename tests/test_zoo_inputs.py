"""Inputs that are made for a network: how many, how large, and what is compared with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.convert import convert
from zoo.inputs import find_view, native_view
from zoo.job import Job, Settings
from zoo.outcome import Converted
from zoo.reference import in_double, reference_of


class Pair(nn.Module):
    """The difference of two images; what has a default is not asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, before: Tensor, after: Tensor, steps: int = 1, *, scale: float = 1.0) -> Tensor:
        return self.conv(after - before) * steps * scale


class Listed(nn.Module):
    """Takes whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, *images: Tensor) -> Tensor:
        return self.conv(images[0])


class Coordinates(nn.Module):
    """Makes float32 tensors of its own, by default and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-1]).float() + torch.zeros(1).to(torch.float32)
        return self.conv(x) @ places[2:] / 7


def test_each_input_that_forward_asks_for_is_another_one() -> None:
    view, _ = find_view(Pair().eval())
    assert view is not None
    before, after = view.inputs(2)
    assert before.shape == after.shape == (2, 3, *view.shape[1:])
    assert not torch.equal(before, after)
    assert torch.equal(view.inputs(2)[1], after)
    assert native_view(Pair(), view).count == 2


def test_a_forward_that_takes_any_number_gets_one() -> None:
    view, _ = find_view(Listed().eval())
    assert view is not None
    assert len(view.inputs(1)) == 1


def test_what_a_network_makes_in_float32_is_float64_in_its_reference() -> None:
    model = Coordinates().eval()
    view, _ = find_view(model)
    assert view is not None
    with pytest.raises(RuntimeError, match=r"dtype|Double|Float"):
        view.run(model.double(), tuple(x.double() for x in view.inputs(1)))
    model.float()
    (exact,) = in_double(model, view)
    assert exact.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    reference = reference_of(model, view)
    assert reference is not None
    assert 0 < reference.noise < 1e-5


@pytest.mark.slow
def test_optical_flow_of_two_images_is_compared_as_a_whole() -> None:
    pytest.importorskip("torchvision")
    outcome = convert(Job("torchvision", "raft_small", Settings(block="acb", save=False, latency=False)))
    assert isinstance(outcome, Converted), outcome
    assert outcome.proof.outputs == "whole"
    assert outcome.proof.roundtrip is True
    assert 0 < outcome.proof.error <= outcome.proof.allowed < 1e-3
