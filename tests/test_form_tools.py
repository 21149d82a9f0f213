"""Every form of training under what people train with: precision, layout, checkpoints, copies, compilers, processes."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from test_blocks import gap
from test_forms import Net, built, images
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

import reparam
from passes.blocks.kit.layers import BranchSum

FORMS = ("branches", "sampled:fraction=1/2", "frozen", "online")
each_form = pytest.mark.parametrize("form", FORMS)
each_block = pytest.mark.parametrize("block", ["acb", "dbb", "repvgg"])


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return loss_of_call(model(x))


def loss_of_call(y: Tensor) -> Tensor:
    return y.pow(3).mean()


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ------------------------------------------------------------------ numbers and layouts


@each_form
@each_block
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(block: str, form: str, dtype: torch.dtype) -> None:
    """Parameters, gradients and statistics stay float32, and the step is that of float32, to the dtype's precision."""
    model = built(block, form).float()
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cpu", dtype):
        loss = model(images().float()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    reference(images().float()).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32
        assert gap(p.grad, q.grad) < 0.3 or float((p.grad - q.grad).abs().max()) < 1e-2, name
    scaler.step(optimizer)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    for (name, a), b in zip(model.named_buffers(), reference.buffers(), strict=True):
        assert a.dtype == b.dtype
        assert bool(torch.isclose(a, b, rtol=0.05, atol=0.05).all()), name


@each_form
@each_block
def test_no_two_parameters_share_a_gradient(block: str, form: str) -> None:
    """Clipping and unscaling change gradients in place."""
    model = built(block, form)
    loss_of(model, images()).backward()
    found = [p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None]
    assert len(set(found)) == len(found) > 4


@each_form
@each_block
def test_channels_last_is_the_same_function(block: str, form: str) -> None:
    model = built(block, form)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images()
    loss_of(model, x).backward()
    y = moved(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.pow(3).mean().backward()
    for a, b in zip(grads(model), grads(moved), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ steps


@each_form
@each_block
def test_checkpoints_give_the_same_gradients(block: str, form: str) -> None:
    model = built(block, form)
    again = copy.deepcopy(model)
    x = images().requires_grad_()
    loss_of(model, x).backward()
    for reentrant in (False, True):
        other = copy.deepcopy(again)
        checkpoint(other, x, use_reentrant=reentrant).pow(3).mean().backward()
        for a, b in zip(grads(model), grads(other), strict=True):
            assert torch.equal(a, b)


@each_form
@each_block
def test_averages_train_resume_and_collapse(block: str, form: str) -> None:
    """An average of weights, a state dict with its optimizer's, and collapse: each as for branches."""
    model = built(block, form)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step(net: nn.Module, by: torch.optim.Optimizer) -> None:
        by.zero_grad()
        loss_of(net, images()).backward()
        by.step()

    step(model, optimizer)
    average.update_parameters(model)
    resumed = built(block, form)
    resumed.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(resumed.parameters(), 1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, by in ((model, optimizer), (resumed, other)):
        step(net, by)
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    average.update_parameters(model)
    for net in (model, average.module):
        net.eval()
        plain = reparam.collapse(net, like=Net().double())
        assert gap(plain(images()), net(images())) < 1e-10


@each_form
@each_block
def test_second_derivatives(block: str, form: str) -> None:
    """Against differences of the first ones, along one direction in weights and input."""
    model, x = built(block, form), images(4, 6)
    weights = [p for p in model.parameters() if p.requires_grad]
    along = [torch.randn_like(p) for p in weights]

    def slopes(net: nn.Module) -> list[Tensor]:
        found = torch.autograd.grad(
            loss_of(net, x), [p for p in net.parameters() if p.requires_grad], create_graph=True
        )
        return list(found)

    product = sum((s * d).sum() for s, d in zip(slopes(model), along, strict=True))
    got = torch.autograd.grad(product, weights)  # type: ignore[arg-type]
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(built(block, form))
        with torch.no_grad():
            for p, d in zip((p for p in moved.parameters() if p.requires_grad), along, strict=True):
                p.add_(sign * 1e-6 * d)
        ends.append(slopes(moved))
    for a, up, down in zip(got, *ends, strict=True):
        wanted = (up - down).detach() / 2e-6
        assert torch.allclose(a, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(wanted.abs().max())))


@each_form
@pytest.mark.parametrize("training", [False, True])
@each_block
def test_ensembles_by_vmap(block: str, form: str, training: bool) -> None:
    """A skeleton on the meta device and stacked weights; running statistics move in each member."""
    members = [built(block, form).train(training) for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 + 0.1 * i)
    base = copy.deepcopy(members[0]).to("meta")
    parameters, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]

    def run(params: Any, bufs: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (params, bufs), (x,))  # type: ignore[no-any-return]

    together = torch.vmap(run, in_dims=(0, 0, None))(parameters, buffers, images())
    for i, member in enumerate(members):
        assert gap(together[i], member(images())) < 1e-9
        for name, buffer in member.named_buffers():
            assert torch.allclose(buffers[name][i], buffer), name


@each_form
@each_block
def test_members_that_differ_in_one_parameter_only(block: str, form: str) -> None:
    """All else is not batched, statistics among it: what is changed in place would have to be."""
    model = torch.func.replace_all_batch_norm_modules_(built(block, form))
    assert isinstance(model, nn.Module)
    held, x = dict(model.named_parameters()), images()

    def run(name: str, value: Tensor) -> Tensor:
        return loss_of_call(torch.func.functional_call(model, {**held, name: value}, (x,)))

    for name, p in held.items():
        stacked = torch.stack([p.detach() + 0.1 * i for i in range(3)])
        for function in (functools.partial(run, name), torch.func.grad(functools.partial(run, name))):
            together = torch.vmap(function)(stacked)
            assert torch.allclose(together, torch.stack([function(each) for each in stacked]), 1e-9, 1e-12), name


@each_block
@pytest.mark.parametrize("training", ["all", "blocks", "none"])
@pytest.mark.parametrize("form", ["branches", "sampled:fraction=1", "frozen"])
def test_norms_that_keep_no_statistics_any_more_measure_their_batch(block: str, form: str, training: str) -> None:
    model: Any = torch.func.replace_all_batch_norm_modules_(built(block, form))
    for each in model.modules():
        each.training = training == "all" or (training == "blocks" and not isinstance(each, _BatchNorm))
    reference = copy.deepcopy(model)
    for each in reference.modules():
        if isinstance(each, BranchSum):
            each.folded = None
    assert gap(model(images()), reference(images())) < 1e-12


@each_form
@each_block
def test_runs_wherever_its_weights_are(block: str, form: str) -> None:
    model = built(block, form).to("meta")
    y = model(images().to("meta"))
    assert (y.device.type, y.shape) == ("meta", (16, 8, 16, 16))
    model.to_empty(device="cpu").load_state_dict(built(block, form).state_dict())
    assert gap(model.eval()(images()), built(block, form).eval()(images())) < 1e-12
    with torch.device("meta"):
        skeleton = reparam.expand(Net(), block, form=form, where="all", init="paper", verify=False).double().eval()
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert gap(skeleton(images()), model(images())) < 1e-12


@each_form
@each_block
def test_compiles_whole_and_once(block: str, form: str) -> None:
    model = built(block, form)
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(net.parameters(), 0.01) for net in (model, reference)]
    for step in range(3):
        for net, optimizer in zip((compiled, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, images() + step).backward()
            optimizer.step()
    assert counter.frame_count == 1
    for (name, a), b in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.allclose(a, b[1], rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("fraction", ["1/3", "1"])
def test_compiles_for_batches_of_any_size(fraction: str) -> None:
    model = built("acb", f"sampled:fraction={fraction}")
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (20, 22, 31):
        assert gap(compiled(images(batch, 18)), reference(images(batch, 18))) < 1e-9
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
@each_form
def test_exports_by_tracing(form: str, tmp_path: Any) -> None:
    """The exporter of before knows no kernel whose shape is computed."""
    runtime = pytest.importorskip("onnxruntime")
    model, x = built("dbb", form).float().eval(), images().float()
    torch.onnx.export(model, (x,), str(tmp_path / "net.onnx"), input_names=["x"], dynamo=False)
    (y,) = runtime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"x": x.numpy()})
    assert gap(torch.from_numpy(y), model(x)) < 1e-4


# ------------------------------------------------------------------ frozen by itself


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def kernels_run(model: nn.Module, x: Tensor) -> int:
    """How many convolutions run on the input of the first block."""
    seen: list[Tensor] = []

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.nn.functional.conv2d, torch.conv2d):
                seen.append(args[1])
            return func(*args, **(kwargs or {}))

    with Note():
        model(x)
    return len(seen)


FREEZE: dict[str, Callable[[Any], Any]] = {
    "norms alone": lambda m: [norm.eval() for norm in norms_of(m)],
    "a stage that trains nothing": lambda m: m.eval().requires_grad_(False),
}


@each_block
@pytest.mark.parametrize("how", FREEZE)
@pytest.mark.parametrize("form", ["branches", "sampled"])
def test_norms_in_evaluation_are_frozen_by_themselves(block: str, how: str, form: str) -> None:
    model = built(block, form)
    before = copy.deepcopy(model)
    FREEZE[how](model), FREEZE[how](before)
    for net in before.modules():
        if isinstance(net, BranchSum):
            net.folded = None
    assert kernels_run(model, images()) == 2
    assert kernels_run(before, images()) > 2
    x = images().requires_grad_()
    (got,), (wanted,) = (torch.autograd.grad(loss_of(net, x), x) for net in (model, before))
    assert gap(got, wanted) < 1e-9
    assert "frozen" not in repr(model)  # nothing was switched: norms that train again measure again
    model.train()
    assert kernels_run(model, images()) > 2


def test_who_looks_inside_finds_the_branches() -> None:
    model = built("acb", "branches")
    seen: list[int] = []
    for norm in norms_of(model):
        norm.eval()
    assert kernels_run(model, images()) == 2
    model.a.line0.conv.register_forward_hook(lambda *_: seen.append(1))
    model(images())
    assert seen == [1]
    with torch.no_grad():
        assert kernels_run(built("acb", "branches").eval(), images()) == 6


# ------------------------------------------------------------------ processes

STEM = """
import torch, reparam
from torch import nn

torch.manual_seed(0)
stem = nn.Sequential(nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64))
model = reparam.expand(stem, "BLOCK", init="paper", verify=False).train()
compiled = torch.compile(model, fullgraph=True)
for _ in range(3):
    compiled(torch.randn(32, 3, 128, 128)).square().mean().backward()
assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
print("held")
"""


@pytest.mark.slow
@pytest.mark.parametrize("block", ["dbb", "repvgg"])
def test_a_compiled_strided_stem_leaves_the_process_alive(block: str) -> None:
    """Torch 2.14's compiled backward of a strided 1x1 over three channels corrupts the heap."""
    done = subprocess.run(
        [sys.executable, "-c", STEM.replace("BLOCK", block)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.rstrip() == "held"


FRESH = """
import sys, torch
assert "torch._dynamo" not in sys.modules
import reparam
from torch import nn

model = reparam.expand(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)), "dbb").train()
torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 8, 9, 9))
torch.compile(nn.Sequential(nn.Conv2d(8, 8, 3)), backend="eager", fullgraph=True)(torch.randn(2, 8, 9, 9))
print("held")
"""


def test_a_network_compiles_that_was_expanded_before_the_compiler_was_imported() -> None:
    """It looks up Python's functions by identity: it must not meet those that stand in their place during a trace."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=400, check=False)
    assert done.stdout.rstrip() == "held", done.stderr[-2000:]


SHARED = """
import sys, torch, reparam
from torch import nn
sys.path[:0] = sys.argv[3:]
from test_forms import built, images

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
calls = []
own = torch.distributed.all_reduce
torch.distributed.all_reduce = lambda *a, **k: (calls.append(a[0].numel()), own(*a, **k))[1]
whole = torch.randn(12, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
for cut, block, levels in ((4, "acb", 1), (4, "dbb", 2), (4, "repvgg", 1), (12, "dbb", 2)):
    mine = whole[:cut] if rank == 0 else whole[cut:]  # as many as the other has not, or none at all
    alone = built(block, "branches")
    wanted = alone(whole)
    (wanted[:cut].square().sum() + wanted[cut:].square().sum()).backward()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(built(block, "sampled:fraction=1"))
    calls.clear()
    y = model(mine)
    assert len(calls) == 2 * levels, (block, calls)
    y.square().sum().backward()
    assert torch.allclose(y, wanted[:cut] if rank == 0 else wanted[cut:], atol=1e-9), block
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        own(p.grad)
        assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-7), (block, name)
    for (name, a), b in zip(model.state_dict().items(), alone.state_dict().values()):
        assert torch.allclose(a, b), (block, name)
    wrapped = nn.parallel.DistributedDataParallel(built(block, "sampled:fraction=1/2"))
    wrapped(images()).square().mean().backward()
    each = built(block, "sampled:fraction=1/2")
    each(images()).square().mean().backward()
    for (name, p), q in zip(wrapped.module.named_parameters(), each.parameters()):
        assert torch.allclose(p.grad, q.grad), (block, name)
torch.distributed.destroy_process_group()
print("held")
"""


def test_processes_share_what_a_sample_measures(tmp_path: Any) -> None:
    """Two processes with batches of unequal size are one with both, in outputs, gradients and running statistics."""
    tests = str(__file__).rpartition("/")[0]
    command = [sys.executable, "-c", SHARED]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet"), tests], stdout=-1, stderr=-2, text=True)
        for rank in (0, 1)
    ]
    for process in started:
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0 and said.rstrip().endswith("held"), said[-3000:]  # noqa: PT018
