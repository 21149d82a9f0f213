"""Norms inside the rows of a block are taken into the layers behind them: the same function, fewer maps."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_blocks import gap
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.training import rows

GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1}, {"padding": 1, "stride": 2}, {}, {"padding": 2, "dilation": 2}, {"padding": (2, 0)},
    {"padding": 1, "groups": 2}, {"padding": 1, "groups": 8}, {"padding": "same"}, {"kernel_size": 4, "padding": 2},
    {"kernel_size": (3, 2), "padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
]  # fmt: skip


def built(n: int = 2, bias: bool = False, **options: Any) -> nn.Module:
    """A convolution and a norm, the norm and all branches of a dbb block with numbers of their own."""
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](8, 8, **{"kernel_size": 3, **options}, bias=bias)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1](8)
    model = reparam.expand(nn.Sequential(conv, norm), "dbb", init="paper", where="all", verify=False).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def images(n: int = 2) -> Tensor:
    return torch.randn(4, 8, *(9, 10, 7)[:n], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients of input and parameters, and buffers."""
    x = x.clone().requires_grad_()
    y: Tensor = model(x)
    y.pow(3).sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *model.buffers()]


def as_written(model: nn.Module) -> nn.Module:
    """A copy whose branches run as modules: somebody looks at one of them."""
    copied = copy.deepcopy(model)
    for block in copied.modules():
        if isinstance(block, BranchSum):
            next(iter(block.branches().values())).register_forward_hook(lambda *_: None)
    return copied


def check(model: nn.Module, x: Tensor) -> None:
    reference = as_written(model)
    got, wanted = step(model, x), step(reference, x)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-9)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a convolution or a mean has taken a norm from, in order."""
    seen: list[str] = []
    for name in ("convolved", "averaged"):
        original: Callable[..., Tensor] = getattr(rows, name)

        def noted(layer: nn.Module, *given: Any, own: Any = original) -> Tensor:
            seen.append(type(layer).__name__)
            result: Tensor = own(layer, *given)
            return result

        monkeypatch.setattr(rows, name, noted)
    return seen


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_the_same_function_gradients_and_statistics(options: dict[str, Any], applied: list[str]) -> None:
    model = built(**options)
    check(model, images())
    assert "Conv2d" in applied
    del applied[:]
    as_written(model)(images())
    assert not applied


@pytest.mark.parametrize("n", [1, 3])
def test_other_dimensions(n: int, applied: list[str]) -> None:
    check(built(n, padding=1), images(n))
    assert applied


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("form", ["branches", "sampled:fraction=1/2"])
def test_derivatives_forwards_are_those_backwards(form: str) -> None:
    model, x = built(padding=1), torch.randn(8, 8, 16, 16, dtype=torch.float64)
    reparam.set_form(model, form)
    along = torch.randn_like(x)
    with forward_ad.dual_level():
        forwards = forward_ad.unpack_dual(copy.deepcopy(model)(forward_ad.make_dual(x, along))).tangent
    weights = torch.randn_like(forwards)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(model(x), x, weights)
    assert torch.allclose((forwards * weights).sum(), (grad * along).sum(), rtol=1e-9)


@pytest.mark.parametrize("rows", ["first", "strided"])
def test_a_sample_has_the_gradient_of_a_slice(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(padding=1)
    reparam.set_form(model, f"sampled:fraction=1/4,rows={rows}")
    reference, x = copy.deepcopy(model), torch.randn(9, 8, 16, 16, dtype=torch.float64)
    got = step(model, x)
    monkeypatch.setattr("passes.training.forms.with_rows", lambda x, each, rows: (x, x[::each][:rows]))
    for a, b in zip(got, step(reference, x), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12)


@pytest.mark.parametrize(("fraction", "batch", "rows"), [(1 / 3, 9, 3), (0.28, 25, 7), (1 / 4, 10, 3), (1 / 7, 49, 7)])
def test_a_fraction_is_counted_in_whole_images(fraction: float, batch: int, rows: int) -> None:
    model: Any = reparam.set_form(built(padding=1), reparam.Form("sampled", fraction))
    assert model[0].folded._rows_of_sample(model[0], torch.empty(batch, 8, 32, 32)) == (1, rows)


@pytest.mark.parametrize("told", [{"track_running_stats": False}, {"momentum": None, "num_batches_tracked": None}])
def test_running_statistics_stay_where_torch_leaves_them(told: dict[str, Any]) -> None:
    """Set on norms that are there already, as virtual adversarial training does."""
    model = built(padding=1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for name, value in told.items():
            setattr(norm, name, value)
    check(model, images())


@pytest.mark.parametrize("size", [4, 40])
def test_whichever_is_smaller_takes_the_factor(size: int) -> None:
    """The kernel or the map: the same numbers."""
    model, x = built(padding=1), torch.randn(2, 8, size, size, dtype=torch.float64)
    assert (x.numel() < 8 * 8 * 9) == (size == 4)
    check(model, x)


def test_fewer_maps_are_kept_for_the_backward() -> None:
    x = torch.randn(16, 8, 32, 32, dtype=torch.float64)

    def kept(model: nn.Module) -> int:
        found: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.numel() >= x.numel():
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            y = model(x)
        assert y.requires_grad
        return len(found)

    model = built(padding=1)
    assert kept(model) <= kept(as_written(model)) - 2


def pruned(model: Any) -> Any:
    torch.nn.utils.prune.l1_unstructured(model[0].sequence.square, "weight", 0.5)
    return model


def in_evaluation(model: Any) -> Any:
    model[0].sequence.norm.eval()
    return model


def other_forward(model: Any) -> Any:
    norm = model[0].sequence.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    return model


def traced(model: Any) -> Any:
    return torch.jit.trace(model, (images(),), check_trace=False)


@pytest.mark.parametrize("form", ["online", "frozen"])
def test_a_fold_keeps_two_kernels_for_the_backward(form: str) -> None:
    """The one that the convolution has, and the product of a 1x1 and a kernel; a mean's is not kept."""
    model: Any = reparam.expand(
        nn.Sequential(nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32)), "dbb", form=form, verify=False
    ).train()
    if form == "frozen":
        for module in model[0].modules():
            module.eval()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes() == 32 * 32 * 9 * 4:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(torch.randn(2, 32, 5, 5))
    assert y.requires_grad
    assert len(found) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")  # of torch's own norm
@pytest.mark.parametrize("change", [pruned, in_evaluation, other_forward, traced])
def test_what_is_not_as_it_was_read_runs_as_it_is_written(change: Any, applied: list[str]) -> None:
    model = built(padding=1)
    reference = as_written(model)
    assert gap(change(model)(images()), change(reference)(images())) < 1e-12
    assert not applied


def test_hooks_of_all_modules_see_what_runs_inside(applied: list[str]) -> None:
    model, seen = built(padding=1), list[nn.Module]()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(images())
    finally:
        handle.remove()
    assert model.get_submodule("0.sequence.norm") in seen
    assert not applied


def test_one_image_runs_as_it_is_written(applied: list[str]) -> None:
    """Of one position torch says what is wrong."""
    model = built(padding=1)
    model(images()[:1])
    assert not applied
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        built(padding=1)(images()[:1, :, :1, :1])


@pytest.mark.parametrize("form", ["branches", "sampled", "sampled:fraction=1"])
@pytest.mark.parametrize("shape", [(8, 9, 10), (1, 8, 1, 1), (2, 4, 8, 9, 10)])
def test_what_a_norm_refuses_is_refused(shape: tuple[int, ...], form: str) -> None:
    model = reparam.set_form(built(padding=1), form)
    x = torch.randn(shape, dtype=torch.float64)
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        as_written(model)(x)
    with pytest.raises(wanted.type) as got:
        model(x)
    assert str(got.value).split(",")[0] == str(wanted.value).split(",")[0]


@pytest.mark.parametrize("form", ["branches", "sampled", "sampled:fraction=1"])
def test_no_images_at_all(form: str) -> None:
    model = reparam.set_form(built(padding=1), form)
    check(model, images()[:0])


def test_copies_and_pickles_run_alike(applied: list[str]) -> None:
    model = built(padding=1)
    wanted = copy.deepcopy(model)(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del applied[:]
        assert gap(other(images()), wanted) == 0
        assert applied


def test_float16_takes_the_factor_in_its_map() -> None:
    """A factor of 1/5000 on a small kernel is none of float16's normal numbers."""
    model = built(padding=1).float()
    with torch.no_grad():
        model.get_parameter("0.sequence.point.weight").mul_(5e3)
        model.get_buffer("0.sequence.point.identity").zero_()
        model.get_parameter("0.sequence.square.weight").mul_(1e-3)
        for branch in ("square.norm", "point.norm", "average.last_norm"):
            model.get_parameter(f"0.{branch}.weight").zero_()
    reference, x = copy.deepcopy(model), images().float()
    with torch.autocast("cpu", torch.float16):
        low = model(x)
    assert gap(low, reference(x)) < 0.03


ROWS: dict[str, tuple[int, list[nn.Module]]] = {
    "padding behind the norm": (1, [nn.Conv2d(8, 8, 3, padding=1)]),
    "padding of its own behind the norm": (1, [nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)]),
    "a norm behind a mean behind a norm, and padding": (
        1, [nn.AvgPool2d(1), nn.BatchNorm2d(8), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)],
    ),
    "padding of ones": (1, [nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 8, 3)]),
    "padding by reflection": (1, [nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")]),
    "a mean that pads": (1, [nn.AvgPool2d(3, 1, 1)]),
    "a mean that does not count what it pads": (1, [nn.AvgPool2d(3, 1, 1, count_include_pad=False)]),
    "a mean of part of a window": (2, [nn.AvgPool2d(2, 2, ceil_mode=True)]),
    "a mean with another divisor": (1, [nn.AvgPool2d(1, 1, divisor_override=3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_norm_is_applied_where_what_reads_it_cannot_take_it(name: str) -> None:
    stride, layers = ROWS[name]
    model: Any = built(padding=1, stride=stride)
    model[0].add_module("more", nn.Sequential(nn.BatchNorm2d(8), *copy.deepcopy(layers)).double())
    model[0].folded = None
    reparam.set_form(model, "branches")
    check(model, images())


def with_row(row: nn.Module) -> Any:
    """A block with a branch of a user's own."""
    model = built(padding=1)
    (block,) = (m for m in model.modules() if isinstance(m, BranchSum))
    block.add_module("more", row.double())
    block.folded = None
    return reparam.set_form(model, "branches")


def test_own_code_computes_with_its_parameters(applied: list[str]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
            self.gate = nn.Parameter(torch.randn(8))
            self.register_buffer("offset", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.norm(x)) * self.gate.sigmoid().reshape(-1, 1, 1) + self.offset.reshape(8, 1, 1)
            return y

    model = with_row(Gated())
    check(model, images())
    assert applied.count("Conv2d") == 2


def test_while_a_block_is_read_other_threads_run_theirs() -> None:
    """What torch.fx.Tracer replaces it replaces for all of them."""
    other, ran = nn.Sequential(nn.Conv2d(8, 8, 1)), list[Any]()

    class Served(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: ran.append(type(other(torch.ones(1, 8, 2, 2)))))
            thread.start()
            thread.join()
            y: Tensor = self.conv(self.norm(x))
            return y

    with_row(Served().double())
    assert ran
    assert set(ran) == {Tensor}


@pytest.mark.parametrize("layer", ["once", "twice"])
def test_a_norm_that_others_read_too_is_applied(layer: str, applied: list[str]) -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            result: Tensor = self.conv(y) + (y if layer == "twice" else 0)
            return result

    model = with_row(Row())
    check(model, images())
    assert applied.count("Conv2d") == (1 if layer == "twice" else 2)
