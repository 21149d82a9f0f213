"""Running statistics of whole batches are all updated, or none; what is no network or number is told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_forms import images
from torch import Tensor, nn

import reparam
from reparam import layers


class Kept(nn.Sequential):
    """A network whose own ``train`` keeps a norm frozen."""

    def train(self, mode: bool = True) -> Kept:
        super().train(mode)
        self[1].eval()
        return self


def small() -> nn.Sequential:
    """Two norms, with statistics that are none of a fresh one; the second one's counter is missing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=0.3)).double()
    model[3].num_batches_tracked = None
    for norm in (model[1], model[3]):
        norm.running_mean.fill_(0.25)
        norm.running_var.fill_(2)
    return model


def interrupted() -> Iterator[Tensor]:
    yield images()
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error", "said"),
    [
        ([], reparam.ReparamError, "no batch"),
        (iter(()), reparam.ReparamError, "no batch"),
        (None, reparam.ReparamError, "loader gives batches, .* got NoneType"),
        (torch.ones(2, 3, 8, 8), reparam.ReparamError, r"loader gives batches, .*\[batch\].* got Tensor"),
        ("images", reparam.ReparamError, "loader gives batches"),
        ({"input": 1}, reparam.ReparamError, "loader gives batches"),
        ([images(), images().float()], reparam.ReparamError, r"batch 1 of loader, a Tensor, .*\(in 0, Conv2d\)"),
        ([{"image": images()}], reparam.ReparamError, r"batch 0 of loader, a dict, .*begins with it"),
        ([images(), images() * math.nan], reparam.ReparamError, "1: its statistics over 2 batches are not finite"),
        ([images(), images()[:0]], reparam.ReparamError, "batch 1 of loader.* holds no sample"),
        (interrupted(), KeyboardInterrupt, "^$"),
    ],
)
def test_what_stops_an_update_of_statistics_loses_nothing(batches: Any, error: type[BaseException], said: str) -> None:
    model = small().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=said) as raised:
        reparam.update_statistics(model, batches)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model[1].momentum, model[3].momentum, model[3].num_batches_tracked) == (0.1, 0.3, None)
    assert [m.training for m in model] == [True, False, True, True]


def test_updated_statistics_of_norms_without_a_counter_are_means_too() -> None:
    model, batches = small(), [images(), 2 * images()]
    reparam.update_statistics(model, [{"input": batches[0]}, (batches[1], "labels")])
    reference = small().train()
    reference[3].register_buffer("num_batches_tracked", torch.tensor(0))
    torch.optim.swa_utils.update_bn(batches, reference)
    assert torch.allclose(model[3].running_mean, reference[3].running_mean, rtol=1e-12)
    assert torch.allclose(model[3].running_var, reference[3].running_var, rtol=1e-12)
    assert model[3].num_batches_tracked is None


def test_norms_that_no_batch_reaches_keep_their_statistics() -> None:
    """One stays in evaluation by its model's own ``train``, one is not called; both would be as made otherwise."""
    frozen = Kept(*small())
    frozen.unused = nn.BatchNorm2d(2)
    frozen.unused.running_mean.fill_(7)
    frozen.forward = lambda x: nn.Sequential.forward(frozen[:4], x)
    reparam.update_statistics(frozen, [images()])
    assert frozen[1].running_mean.eq(0.25).all()
    assert torch.allclose(frozen[3].running_mean, frozen[:3].eval()(images()).mean([0, 2, 3]), rtol=1e-12)
    assert frozen.unused.running_mean.eq(7).all()


@pytest.mark.parametrize("model", [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3, track_running_stats=False)])
def test_without_running_statistics_there_is_nothing_to_update(model: nn.Module) -> None:
    with pytest.raises(reparam.ReparamError, match="nothing to update"):
        reparam.update_statistics(model, [images()])


@pytest.mark.parametrize("model", [None, {}, "net", iter(())])
def test_what_is_no_network_is_told(model: Any) -> None:
    for verb in (
        reparam.equivalent_conv,
        lambda m: reparam.set_form(m, "sampled"),
        lambda m: reparam.param_groups(m, 1e-4),
        lambda m: reparam.update_statistics(m, [images()]),
        layers.switch_to_deploy,
    ):
        with pytest.raises(reparam.ReparamError, match=f"expected a torch.nn.Module, got {type(model).__name__}"):
            verb(model)


@pytest.mark.parametrize("decay", [-1e-4, math.nan, math.inf, "1e-4", None, True])
def test_a_decay_that_no_optimizer_would_look_at(decay: Any) -> None:
    with pytest.raises(reparam.ReparamError, match="weight_decay is a number from 0 on"):
        reparam.param_groups(small(), decay)
