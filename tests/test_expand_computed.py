"""Layers whose weight is computed in each call: parametrizations, hooks of torch.nn.utils, pruning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.edits.apply import apply
from passes.edits.carried import made_by
from passes.edits.text import from_text, to_text
from passes.graph.copies import deep_copy
from passes.training.build import rebuilt
from reparam import Block, Reason, ReparamError

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


class Positive(nn.Module):
    """Takes any weight back but those that are not positive."""

    def forward(self, w: Tensor) -> Tensor:
        return w.exp()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w.log()


class Halved(nn.Module):
    """Linear, and says how it is undone."""

    def forward(self, w: Tensor) -> Tensor:
        return 0.5 * w

    def right_inverse(self, w: Tensor) -> Tensor:
        return 2 * w


class Symmetric(nn.Module):
    """Takes no weight back."""

    def forward(self, w: Tensor) -> Tensor:
        return w + w.flip(-1)


def parametrized(*steps: nn.Module) -> Callable[[nn.Module], Any]:
    def wrap(layer: Any) -> nn.Module:
        with torch.no_grad():
            layer.weight.abs_()
        for step in steps:
            parametrize.register_parametrization(layer, "weight", step)
        return layer

    return wrap


ANY: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over all": lambda layer: parametrizations.weight_norm(layer, dim=None),  # type: ignore[arg-type]
    "old weight_norm": utils.weight_norm,
    "own": parametrized(Halved()),
    "own twice": parametrized(Halved(), Halved()),
}
"""What computes any weight."""

SOME: dict[str, Callable[[nn.Module], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "positive": parametrized(Positive()),
    "symmetric": parametrized(Symmetric()),
}
"""What computes some weights only, so no sum of branches."""

MOVING = ("spectral_norm", "old spectral_norm")
"""What is another weight after each forward in training."""


def net(wrap: Callable[[nn.Module], Any], *, transposed: bool = False) -> Any:
    """A layer with a bias; one without, and a norm behind it, one of whose factors is zero."""
    torch.manual_seed(0)
    second: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [wrap(nn.Conv2d(4, 8, 3, padding=1)), wrap(second(8, 8, 3, padding=1, bias=False))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(model[3].running_var, 0.5, 2)
    nn.init.normal_(model[3].running_mean)
    with torch.no_grad():
        model[3].weight[2] = 0.0
    return model.double().eval()


def x(**options: Any) -> Tensor:
    return torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), **options)


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(x()).square().mean().backward()
        optimizer.step()
    return model.eval()


def assert_same(model: nn.Module, other: nn.Module, allowed: float = 1e-10) -> None:
    wanted, got = model(x()), other(x())
    assert float((wanted - got).detach().abs().max()) <= allowed * float(wanted.detach().abs().max())


@pytest.mark.parametrize("block", ["acb", "dbb"])
@pytest.mark.parametrize("kind", ANY | SOME)
def test_the_layer_is_a_branch_as_it_is(kind: str, block: str) -> None:
    """It computes its weight as before, in both modes; collapse folds what that is."""
    model = net((ANY | SOME)[kind])
    before = copy.deepcopy(model.state_dict())
    plan = reparam.plan(model, block)
    assert [r.layer for r in plan.expanded] == ["0", "2"]
    assert any("in training" in said for said in plan.compared)
    assert all("difference 0" in said for said in plan.compared)
    expanded = plan.apply()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert_same(model, expanded, 0.0)
    once, other = (deep_copy(m).train() for m in (model, expanded))
    for _ in range(2):  # the second call is that of what the first left behind
        torch.testing.assert_close(other(x()), once(x()), rtol=1e-12, atol=1e-12)

    trained(expanded)
    folded: Any = reparam.collapse(expanded)
    assert [type(m) for m in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Identity, nn.ReLU]
    assert_same(expanded, folded)


@pytest.mark.parametrize("block", ["acb", "dbb"])
@pytest.mark.parametrize("kind", ANY)
def test_like_gives_it_numbers_that_make_the_folded_kernel(kind: str, block: str) -> None:
    """Also where a filter of it is zero, which has no direction."""
    wrap = ANY[kind]
    expanded = trained(reparam.expand(net(wrap), block))
    with torch.no_grad():
        for module in expanded[2].modules():  # type: ignore[index]
            if isinstance(module, nn.BatchNorm2d) and module.num_features == 8:
                module.weight[2] = 0.0
    restored = reparam.collapse(expanded, like=net(wrap))
    stock = net(wrap)
    stock.load_state_dict(restored.state_dict(), strict=True)
    assert_same(expanded, stock)
    if kind == "old weight_norm":
        assert_same(expanded, restored)
        torch.testing.assert_close(restored[0].weight, stock[0].weight)  # type: ignore[index]
    assert not reparam.plan(net(wrap), block).notes


@pytest.mark.parametrize("kind", SOME)
def test_like_refuses_what_computes_no_such_kernel(kind: str) -> None:
    """The plan has said so; an architecture without it takes the kernel."""
    wrap = SOME[kind]
    plan = reparam.plan(net(wrap), "acb")
    (note,) = plan.notes
    assert "computes no sum of branches: collapse gives a plain convolution" in note
    assert "0 and 1 more" in note
    expanded = trained(plan.apply())
    with pytest.raises(ReparamError, match=r"\d of like= cannot take the folded kernel, since .* computes its weight"):
        reparam.collapse(expanded, like=net(wrap))
    restored = reparam.collapse(expanded, like=net(lambda layer: layer))
    plain = net(lambda layer: layer)
    plain.load_state_dict(restored.state_dict(), strict=True)
    assert_same(expanded, plain)


@pytest.mark.parametrize("kind", ANY | SOME)
def test_like_leaves_what_has_no_block(kind: str) -> None:
    """A norm behind such a layer stays as it is, since its factor may have no place there."""
    wrap = (ANY | SOME)[kind]
    model = net(wrap)
    expanded = reparam.expand(model, "acb", where="0")
    if kind in SOME:
        expanded = nn.Sequential(model[0], *list(expanded)[1:])  # type: ignore[call-overload]
    restored = reparam.collapse(expanded, like=net(wrap))
    assert_same(expanded, restored)
    assert torch.equal(restored[3].running_mean, model[3].running_mean)  # type: ignore[index]


@pytest.mark.parametrize("kind", MOVING)
def test_with_norms_in_evaluation_mode_it_still_changes_with_each_call(kind: str) -> None:
    """Fine-tuning with frozen norms runs one convolution elsewhere; here that would leave the power iteration out."""
    model = net(SOME[kind])
    both = model, reparam.expand(model, "acb")
    for each in both:
        each.train()
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    for _ in range(3):
        torch.testing.assert_close(both[1](x()), both[0](x()), rtol=1e-12, atol=1e-12)
    vectors = [{name.split(".")[-1]: t for name, t in m.state_dict().items() if name.endswith("_u")} for m in both]
    assert vectors[0].keys() == vectors[1].keys() != set()
    for name, vector in vectors[0].items():
        torch.testing.assert_close(vectors[1][name], vector)


@pytest.mark.parametrize("form", ["sampled", "frozen"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_other_forms(kind: str, form: str) -> None:
    plan = reparam.plan(net((ANY | SOME)[kind]), "acb", form=form)
    assert len(plan.expanded) == (0 if kind in MOVING else 2)
    if plan.expanded:
        expanded = trained(plan.apply())
        assert_same(expanded, reparam.collapse(expanded))


@pytest.mark.parametrize("kind", ANY | SOME)
def test_online(kind: str) -> None:
    """One kernel for both modes: not where training computes another."""
    model = net((ANY | SOME)[kind])
    plan = reparam.plan(model, "acb", form="online")
    if kind in MOVING:
        refusals = [r.refusal for r in plan.rows]
        assert [r.reason for r in refusals if r is not None] == [Reason.COMPUTED] * 2
        assert "another weight in training than in evaluation" in str(refusals[0])
        return
    assert [r.layer for r in plan.expanded] == ["0", "2"]
    expanded = plan.apply()
    assert_same(model, expanded, 1e-12)
    source = next(p for name, p in expanded.named_parameters() if name.startswith("0.square") and "bias" not in name)
    expanded(x()).square().sum().backward()
    assert source.grad is not None
    assert bool(source.grad.any())
    assert_same(trained(expanded), reparam.collapse(expanded))


@pytest.mark.parametrize("block", ["doconv", Block("mobileone", n=2)], ids=["doconv", "mobileone"])
@pytest.mark.parametrize("kind", ["weight_norm", "old spectral_norm"])
def test_a_block_that_starts_from_the_weight_is_refused(kind: str, block: Any) -> None:
    plan = reparam.plan(net((ANY | SOME)[kind]), block, where="all")
    if block != "doconv":
        assert len(plan.expanded) == 2
        return
    refusal = plan.rows[0].refusal
    assert refusal is not None
    assert refusal.reason is Reason.COMPUTED
    assert "doconv starts from a weight that is a parameter" in refusal.message


@pytest.mark.parametrize("block", ["acb", "dbb", "doconv", "lora"])
def test_a_pruned_layer_is_left_to_its_zeros(block: str) -> None:
    """Its mask would not be that of the block's kernel."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 5 * 4, 5))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
        prune.random_unstructured(layer, "weight", 0.2)
    plan = reparam.plan(model, block, where="all")
    assert not plan.expanded
    for row in plan.rows:
        assert row.refusal is not None
        assert row.refusal.reason is Reason.COMPUTED
        assert "torch.nn.utils.prune masks its weight" in row.refusal.message
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    assert reparam.plan(model, block, where="all").expanded


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm"])
def test_edits_are_read_again_and_taken_back(kind: str) -> None:
    wrap = (ANY | SOME)[kind]
    expanded = reparam.expand(net(wrap), "acb")
    again = net(wrap)
    undo = apply(again, from_text(to_text(made_by(expanded))), build_block=rebuilt)
    again.load_state_dict(expanded.state_dict(), strict=True)
    assert_same(expanded, again, 0.0)
    undo()
    plain = net(wrap)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert_same(plain, again, 0.0)


SEEN: list[Any] = []


def see(_: Any, args: Any) -> None:
    SEEN.append(args[0].shape)


@pytest.mark.parametrize("kind", ["old weight_norm", "old spectral_norm", "weight_norm"])
def test_a_persons_hook_goes_on_beside_the_one_that_computes_the_weight(kind: str) -> None:
    model = net((ANY | SOME)[kind])
    handle = model[0].register_forward_pre_hook(see)
    expanded = reparam.expand(model, "acb", inplace=True)
    assert isinstance(expanded[0], BranchSum)  # type: ignore[index]
    SEEN.clear()
    trained(expanded)
    assert len(SEEN) == 3
    handle.remove()
    expanded(x())
    assert len(SEEN) == 3
    assert_same(expanded, reparam.collapse(expanded))


def test_planning_in_training_does_no_power_iteration() -> None:
    model = net(parametrizations.spectral_norm).train()
    before = copy.deepcopy(model.state_dict())
    reparam.plan(model, "acb").apply()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_dtype_and_training_of_what_it_is_computed_from(kind: str) -> None:
    """The tensor that a hook computed last has neither, after the model was cast or frozen."""
    model = net((ANY | SOME)[kind]).float()
    model[0].requires_grad_(False)
    expanded: Any = reparam.expand(model, "acb")
    assert {p.dtype for p in expanded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in expanded[0].parameters())
    assert all(p.requires_grad for p in expanded[2].parameters())


@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "orthogonal"])
def test_transposed(kind: str) -> None:
    wrap = (ANY | SOME)[kind]
    expanded = trained(reparam.expand(net(wrap, transposed=True), "acb", where="2"))
    assert isinstance(expanded[2], BranchSum)  # type: ignore[index]
    assert_same(expanded, reparam.collapse(expanded))
    if kind in ANY:
        assert_same(expanded, reparam.collapse(expanded, like=net(wrap, transposed=True)))


@pytest.mark.parametrize("kind", ["weight_norm", "old spectral_norm"])
def test_an_adapter_beside_a_linear_layer(kind: str) -> None:
    """What the weight is computed from is frozen, and only in the network that is returned."""
    model = nn.Sequential((ANY | SOME)[kind](nn.Linear(6, 5))).double().eval()
    expanded: Any = reparam.expand(model, Block("lora", freeze=True))
    assert not any(p.requires_grad for p in expanded[0].main.parameters())
    assert all(p.requires_grad for p in model.parameters())
    y = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in expanded.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        torch.testing.assert_close(reparam.collapse(expanded)(y), expanded(y))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def loose() -> nn.Module:
    """Its weight is a tensor that somebody has put there."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight  # type: ignore[assignment]
    return conv


def tied() -> nn.Module:
    """Two layers with one direction."""
    first, second = (parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2))
    second.parametrizations.weight.original1 = first.parametrizations.weight.original1
    return nn.Sequential(first, second)


LEFT: dict[str, tuple[Callable[[], nn.Module], Reason, str]] = {
    "a bias": (
        lambda: parametrize.register_parametrization(nn.Conv2d(4, 4, 3, padding=1), "bias", Halved()),
        Reason.COMPUTED,
        "its bias is computed",
    ),
    "a forward of its own": (
        lambda: parametrizations.weight_norm(Scaled(4, 4, 3, padding=1)), Reason.COMPUTED, "does more in its forward",
    ),
    "nobody knows": (loose, Reason.COMPUTED, "nothing that is known computes it"),
    "tied": (tied, Reason.SHARED, "its weight is that of another layer too"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_left_alone(kind: str) -> None:
    make, reason, words = LEFT[kind]
    made = make()
    model = (made if isinstance(made, nn.Sequential) else nn.Sequential(made)).eval()
    refusal = reparam.plan(model, "acb").rows[0].refusal
    assert refusal is not None
    assert refusal.reason is reason
    assert words in refusal.message


class Equalised:
    """StyleGAN's hook: the weight is made in each call, and is not there before the first."""

    name = "weight"

    def compute_weight(self, layer: Any) -> Tensor:
        weight: Tensor = layer.weight_orig * layer.weight_orig[0].numel() ** -0.5
        return weight

    def __call__(self, layer: Any, inputs: Any) -> None:
        layer.weight = self.compute_weight(layer)

    @staticmethod
    def on(layer: nn.Module) -> nn.Module:
        weight = layer._parameters.pop("weight")
        layer.register_parameter("weight_orig", weight)
        layer.register_forward_pre_hook(Equalised())
        return layer


class Doubling(Equalised):
    """Says one weight and convolves with another."""

    def __call__(self, layer: Any, inputs: Any) -> None:
        layer.weight = 2 * self.compute_weight(layer)

    @staticmethod
    def on(layer: nn.Module) -> nn.Module:
        layer = Equalised.on(layer)
        layer._forward_pre_hooks[next(iter(layer._forward_pre_hooks))] = Doubling()
        return layer


@pytest.mark.parametrize("given", [None, x()])
def test_a_persons_hook_that_computes_the_weight_runs_where_results_are_compared(given: Any) -> None:
    model = net(Equalised.on)
    folded, report = reparam.collapse_with_report(model, example_inputs=given)
    assert "whole network" in str(report)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_same(model, folded)
    expanded = reparam.expand(model, "acb", example_inputs=given)
    assert_same(model, expanded)
    trained(expanded)
    assert_same(expanded, reparam.collapse(expanded, example_inputs=given))


def test_a_hook_that_says_another_weight_is_seen() -> None:
    model = net(Doubling.on)
    folded, report = reparam.collapse_with_report(model)
    assert report.taken_back
    assert_same(model, folded)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_callers_default_dtype_is_none_of_a_trials(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    model = net(ANY["old weight_norm"])
    torch.set_default_dtype(default)
    try:
        expanded = reparam.expand(model, "acb", form="online", example_inputs=x())
        assert torch.get_default_dtype() is default
    finally:
        torch.set_default_dtype(before)
    assert len([m for m in expanded.modules() if hasattr(m, "reparam_block")]) == 2
    assert_same(model, expanded)


class Quantised(nn.Conv2d):
    """Rounds its weight and its input by scales that it learns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step = nn.Parameter(torch.tensor(0.05))

    def _rounded(self, t: Tensor) -> Tensor:
        return t + ((t / self.step).round() * self.step - t).detach()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self._rounded(x), self._rounded(self.weight), self.bias, self.stride, self.padding)


def test_a_layer_that_is_folded_with_a_number_of_its_own_is_proven() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Quantised(4, 8, 3, padding=1), nn.BatchNorm2d(8)).double().eval()
    expanded = trained(reparam.expand(model, "doconv"))
    assert_same(expanded, reparam.collapse(expanded))
