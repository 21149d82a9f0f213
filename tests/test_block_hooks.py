"""Hooks on a convolution that gets a block: the block's where they see the same values, else a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ConvBN
from test_expand import left, row
from torch import Tensor, nn

import reparam
from passes.blocks.kit.layers import is_block
from passes.edits import apply
from reparam import Reason

SEEN: list[Any] = []


def double(model: nn.Module) -> Any:
    """In evaluation and float64, norms with numbers of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return model.double().eval()


def network() -> Any:
    return double(nn.Sequential(ConvBN(), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))


def step(model: nn.Module) -> tuple[Tensor, list[Any]]:
    """A forward and a backward pass on the same input; what comes out, and what the hooks saw."""
    SEEN.clear()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), list(SEEN)


def keep(module: Any, args: Any, output: Any) -> None:
    SEEN.append((module.kernel_size, args[0].detach(), output.detach()))


def keep_gradient(_: Any, inputs: Any, outputs: Any) -> None:
    SEEN.append((inputs[0], outputs[0]))


def shift(_: Any, args: Any) -> Any:
    SEEN.append(args[0].detach())
    return (args[0] + 1,)


def keep_keywords(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
    SEEN.append((args[0].detach(), len(kwargs)))
    return output * 2


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(keep),
    "forward that changes": lambda m: m.register_forward_hook(lambda *a: a[2] * 2),
    "with keywords": lambda m: m.register_forward_hook(keep_keywords, with_kwargs=True),
    "pre-hook": lambda m: m.register_forward_pre_hook(shift),
    "backward": lambda m: m.register_full_backward_hook(keep_gradient),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda _, g: (g[0] * 2,)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("block", ["acb", "doconv", "orepa"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_sees_the_same_in_the_block_and_in_what_becomes_of_it(kind: str, block: str, inplace: bool) -> None:
    model = network()
    handles = [HOOKS[kind](model[0].conv), HOOKS[kind](model[2])]
    wanted, seen = step(model)
    expanded = reparam.expand(model, block, inplace=inplace).eval()
    assert is_block(expanded[0].conv)
    assert is_block(expanded[2])
    folded = reparam.collapse(expanded)
    for result in (expanded, folded):
        got, saw = step(result)
        assert same(got, wanted)
        assert same(saw, seen)
    if inplace:
        for handle in handles:
            handle.remove()
        assert not step(expanded)[1]
        assert type(folded[2]) is nn.Conv2d


def test_planning_and_expanding_runs_no_hook() -> None:
    model = network()
    model[0].conv.register_forward_hook(keep)
    SEEN.clear()
    reparam.expand(model, "acb", inplace=True)
    assert SEEN == []


def test_the_norm_stays_where_a_hook_sees_what_it_reads() -> None:
    """A pre-hook sees the input alone, which is the same with the norm inside."""
    for kind in HOOKS:
        model = network()
        HOOKS[kind](model[0].conv)
        found = row(reparam.plan(model, "acb"), "0.conv").found
        assert (found.norm is None) == (kind != "pre-hook"), kind
        assert found.norm is not None or found.norm_stays.reason is Reason.HOOK
    model = network()
    model[0].norm.register_forward_hook(keep)
    assert row(reparam.plan(model, "acb"), "0.conv").norm_stays.message == "its norm has a hook"


def test_a_failure_in_place_gives_the_hooks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    handle = model[0].conv.register_forward_hook(keep)
    plan = reparam.plan(model, "acb", inplace=True)
    conv, seen = model[0].conv, step(model)[1]
    whole = apply._inherit
    monkeypatch.setattr(apply, "_inherit", lambda old, new: whole(old, new) if old is conv else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.apply()
    assert model[0].conv is conv
    assert len(seen) == 1
    assert same(step(model)[1], seen)
    handle.remove()
    assert not step(model)[1]


class Tool:
    """What people write: an object that keeps activations, and knows the model."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def save(self, module: Any, args: Any, output: Any) -> None:
        self.kept["y"] = output

    def save_named(self, name: str, *args: Any) -> None:
        self.kept[name] = args[-1]

    def save_all(self, name: str, *args: Any) -> None:
        self.kept[name] = args

    def helped(self, module: Any, args: Any, output: Any) -> None:
        normalise(self)

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.kept["called"] = output


def normalise(holder: Any) -> None:
    holder.layer.weight.data /= 2


def mark(module: Any, args: Any, output: Any) -> None:
    module.feature = output.detach()


@torch.no_grad()
def undecorated(module: Any, args: Any, output: Any) -> None:
    SEEN.append(output)


def by_class(module: Any, args: Any, output: Any) -> None:
    if isinstance(module, nn.Conv2d):
        SEEN.append(output)


def standardise(module: Any, args: Any) -> None:
    module.weight.data -= module.weight.data.mean()


def by_name(module: Any, args: Any, output: Any) -> None:
    SEEN.append(getattr(module, "stride"))  # noqa: B009


def captured(module: Any, args: Any, output: Any) -> None:
    SEEN.append(lambda: module)


MOVES = {
    "method": Tool().save, "object": Tool(), "partial": functools.partial(Tool().save_named, "name"),
    "marks the layer": mark, "decorated": undecorated,
}  # fmt: skip
STAYS = {
    "all arguments": (functools.partial(Tool().save_all, "name"), "looks at the layer itself"),
    "class of the layer": (by_class, "looks at the layer itself"),
    "attribute by name": (by_name, "looks at the layer itself"),
    "captures it": (captured, "looks at the layer itself"),
    "as a key": (lambda m, a, y: {m: y}[m], "looks at the layer itself"),
    "shape of the weight": (lambda m, a, y: SEEN.append(m.weight.shape), "speaks of weights"),
    "writes a weight by another way": (Tool().helped, "speaks of weights"),
    "no Python": (print, "cannot be read"),
}


@pytest.mark.parametrize("case", MOVES)
def test_hooks_that_any_layer_will_do_for(case: str) -> None:
    model = network()
    model[2].register_forward_hook(MOVES[case])
    assert is_block(reparam.expand(model, "acb")[2])  # type: ignore[index]


@pytest.mark.parametrize("case", STAYS)
def test_hooks_that_need_the_layer_itself_keep_it(case: str) -> None:
    hook, why = STAYS[case]
    model = network()
    model[2].register_forward_hook(hook)
    left(model, "2", Reason.HOOK, f"{why}: register it after expand")


def test_hooks_that_make_weights_keep_the_layer() -> None:
    model = network()
    model[2].register_forward_pre_hook(standardise)
    left(model, "2", Reason.HOOK, "its hook standardise speaks of weights")


def test_hooks_on_a_state_dict_and_of_the_old_kind_keep_the_layer() -> None:
    for register, why in (
        ("register_state_dict_post_hook", "state dict"),
        ("register_load_state_dict_post_hook", "state dict"),
        ("register_backward_hook", "of the old kind"),
    ):
        model = network()
        getattr(model[2], register)(lambda *_: None)
        left(model, "2", Reason.HOOK, why)
        model = network()
        getattr(model[0].norm, register)(lambda *_: None)
        assert row(reparam.plan(model, "acb"), "0.conv").norm_stays.reason is Reason.HOOK


def test_without_inputs_the_code_is_the_same_with_the_hook_on_the_block() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: Any) -> Any:
            return self.conv(x["image"])

    model = Odd().eval()
    model.conv.register_forward_hook(keep)
    plan = reparam.plan(model, "acb")
    assert [r.layer for r in plan.expanded] == ["conv"]
    assert any("the same operations" in said for said in plan.compared)
