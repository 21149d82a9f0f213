"""Training on a GPU: what can be seen of it without one, on tensors without numbers, and what takes one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reparam

BLOCKS = tuple(reparam.blocks())
FORMS = ("branches", "online", "sampled:fraction=1/4", "sampled:fraction=1/4,rows=strided", "frozen")
each_block = pytest.mark.parametrize("block", BLOCKS)
each_form = pytest.mark.parametrize("form", FORMS)
CONVS: tuple[dict[str, Any], ...] = (
    {"padding": 1}, {"padding": 1, "stride": 2}, {"padding": 1, "groups": 8}, {"padding": 1, "groups": 2},
    {"kernel_size": 7, "padding": 3, "groups": 8}, {"padding": "same", "padding_mode": "reflect"},
)  # fmt: skip


def built(block: str, form: str) -> nn.Module:
    """Convolutions of several kinds with norms, those that take the block with it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for options in CONVS:
        conv = nn.Conv2d(8, 8, **{"kernel_size": 3, **options}, bias=False)
        layers += [conv, nn.BatchNorm2d(8), nn.ReLU()]
    model = reparam.expand(nn.Sequential(*layers), block, form=form, init="paper", where="all", verify=False).train()
    blocks = [m for m in model.modules() if hasattr(m, "reparam_block")]
    assert blocks
    for each in blocks if form == "frozen" else ():
        each.eval()
    return model


def images() -> Tensor:
    return torch.randn(16, 8, 24, 24, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ without one


class Crossings(TorchDispatchMode):
    """Notes operations that read or make tensors on both sides, or ask the GPU for a number: each waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)}
        if len(devices) > 1 or func is torch.ops.aten._local_scalar_dense.default:
            self.found.add(str(func))
        return made


@each_form
@each_block
def test_a_step_forwards_stays_on_the_gpu(block: str, form: str) -> None:
    model, x = built(block, form), images()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        there = {name: mode.from_tensor(tensor).to("cuda").detach() for name, tensor in state.items()}
        for name, _ in model.named_parameters():
            there[name].requires_grad_()
        given = mode.from_tensor(x).to("cuda")
        with Crossings() as seen:
            y = torch.func.functional_call(model, there, (given,))
    assert y.device.type == "cuda"
    assert y.requires_grad
    assert not seen.found


# ------------------------------------------------------------------ with one


@pytest.fixture
def exact() -> Iterator[None]:
    """Without the ten bits of TF32, which are the machine's, not the block's."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def loss_of(y: Tensor) -> Tensor:
    return (y.float() - 1).square().mean()


def step(model: nn.Module, x: Tensor) -> Tensor:
    """Loss of a step, whose gradients are left on the parameters."""
    model.zero_grad(set_to_none=True)
    loss = loss_of(model(x))
    loss.backward()
    return loss.detach()


def numbers(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [each.detach().double().cpu() for each in (*grads, *model.buffers())]


def close(found: list[Tensor], wanted: list[Tensor], rounding: float) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(float((a - b).abs().max()) <= rounding * float(b.abs().max().clamp(min=1e-3)) for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@each_form
@each_block
def test_a_step_is_that_of_the_cpu(block: str, form: str) -> None:
    """Loss, gradients and running statistics, in float64."""
    model = built(block, form).double()
    there = copy.deepcopy(model).cuda()
    assert abs(float(step(model, images().double())) - float(step(there, images().double().cuda()))) < 1e-9
    assert close(numbers(there), numbers(model), 1e-7)


@pytest.mark.gpu
@each_form
@each_block
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision_in_channels_last(block: str, form: str, half: torch.dtype) -> None:
    model = built(block, form)
    there = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = images().cuda().to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler("cuda", enabled=half is torch.float16, init_scale=128.0)
    optimizer = torch.optim.SGD(there.parameters(), 0.01)
    with torch.autocast("cuda", half):
        loss = loss_of(there(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert abs(float(loss.detach()) / float(step(model, images())) - 1) < 0.05
    assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in there.parameters())
    scaler.step(optimizer)


@pytest.mark.gpu
@each_form
@each_block
def test_no_step_waits_for_the_gpu(block: str, form: str) -> None:
    model, x = built(block, form).cuda(), images().cuda()
    step(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@each_form
@pytest.mark.parametrize("block", ["acb", "dbb", "orepa", "repvgg"])
def test_a_step_in_a_cuda_graph(block: str, form: str) -> None:
    model, x = built(block, form).cuda(), images().cuda()
    reference = copy.deepcopy(model)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss_of(model(x)).backward()
    graph.replay()
    for _ in range(4):
        step(reference, x)
    assert close(numbers(model), numbers(reference), 1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact")
@each_form
@pytest.mark.parametrize("block", ["acb", "dbb", "repvgg"])
def test_a_compiled_step(block: str, form: str) -> None:
    model, x = built(block, form).cuda(), images().cuda()
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True)
    loss = loss_of(compiled(x))
    loss.backward()
    assert abs(float(loss.detach()) / float(step(reference, x)) - 1) < 1e-3
    assert close(numbers(model), numbers(reference), 1e-2)


@pytest.mark.gpu
@each_form
@pytest.mark.parametrize("block", ["acb", "dbb", "doconv"])
def test_expand_and_collapse_where_the_network_is(block: str, form: str) -> None:
    model = built(block, form).cuda()
    step(model, images().cuda())
    model.eval()
    plain = reparam.collapse(model)
    assert {p.device.type for p in plain.parameters()} == {"cuda"}
    with torch.no_grad():
        wanted, got = model(images().cuda()), plain(images().cuda())
    assert float((got - wanted).abs().max()) < 1e-2 * float(wanted.abs().max())
