"""Expand, train, collapse: the network that comes back, and everything that training code does in between."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import WIDTH, Net, Residual, images, ready, snapshot
from small_networks import unchanged as is_unchanged
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

import passes.edits.apply
import passes.expand
import reparam
from passes.blocks.kit.layers import BranchSum, ChannelScale, is_block
from passes.training.forms import Folded
from reparam import Block, ReparamError

BLOCKS: dict[str, str | Block] = {
    "acb": "acb",
    "acb after": Block("acb", bn="after"),
    "dbb": "dbb",
    "doconv": "doconv",
    "repvgg": "repvgg",
    "mobileone": "mobileone",
    "orepa": "orepa",
    "qarepvgg": "qarepvgg",
    "ecb": "ecb",
}
FORMS = ("branches", "online")

QUICK = ("acb", "dbb", "doconv", "orepa", "qarepvgg")
every_block = pytest.mark.parametrize(
    "block", [b if name in QUICK else pytest.param(b, marks=pytest.mark.slow) for name, b in BLOCKS.items()], ids=BLOCKS
)
few_blocks = pytest.mark.parametrize("block", ["acb", "dbb", "doconv"])
"""Batch norms alone, sequences, a computed kernel."""
every_form = pytest.mark.parametrize("form", FORMS)
each_form = pytest.mark.parametrize("form", [pytest.param("branches", marks=pytest.mark.slow), "online"])
"""Where the two forms take the same way, and a while."""


class Plain(nn.Module):
    """A plain architecture: strided stem, residual block, depthwise layer, a convolution with bias, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )
        self.block = Residual()
        self.depth = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        self.depth_bn = nn.BatchNorm2d(WIDTH, eps=1e-3)
        self.bare = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth_bn(self.depth(self.block(self.stem(x))))
        return self.head(torch.relu(self.bare(y)).mean((2, 3)))


def plain(dtype: torch.dtype = torch.float32) -> Any:
    return ready(Plain()).to(dtype)


@torch.no_grad()
def agrees(candidate: nn.Module, reference: nn.Module, x: Tensor) -> bool:
    """Equal in eval mode: 1e-10 in float64, else ten times the reference's own rounding."""
    exact = copy.deepcopy(reference).double().eval()(x.double())
    gap = (copy.deepcopy(candidate).eval()(x).double() - exact).abs().max() / exact.abs().max()
    if x.dtype == torch.float64:
        return bool(gap < 1e-10)
    floor = (copy.deepcopy(reference).eval()(x).double() - exact).abs().max() / exact.abs().max()
    return bool(gap <= 10 * max(float(floor), torch.finfo(x.dtype).eps))


def is_identity(norm: _NormBase) -> bool:
    """Gamma over sigma is one bit for bit, and nothing is subtracted; the shift may hold the folded bias."""
    one = torch.ones_like(norm.running_var)
    scale = (one if norm.weight is None else norm.weight) / torch.sqrt(norm.running_var + norm.eps)
    return torch.equal(scale, one) and not bool(norm.running_mean.any())


def check_restored(result: nn.Module, like: nn.Module, expanded: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """``result`` is the architecture ``like``, loads into fresh ``stock`` code, and computes what ``expanded`` does."""
    shapes = {key: (t.shape, t.dtype) for key, t in like.state_dict().items()}
    assert type(result) is type(like)
    assert [(n, type(m)) for n, m in result.named_modules()] == [(n, type(m)) for n, m in like.named_modules()]
    assert {key: (t.shape, t.dtype) for key, t in result.state_dict().items()} == shapes
    assert all(is_identity(m) for m in result.modules() if isinstance(m, nn.BatchNorm2d))
    stock.load_state_dict(result.state_dict(), strict=True)
    assert torch.equal(stock.eval()(x), result.eval()(x))
    assert agrees(stock, expanded, x)


def train(model: nn.Module, optimizer: Any = None, steps: int = 2, size: int = 12) -> nn.Module:
    """Real steps on random labels; the gradient must be finite, and every step must move the output."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    first = next(model.parameters())
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, size, size, generator=generator).to(first)
        loss = F.cross_entropy(model(x).float(), torch.arange(4) % 4)
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        optimizer.step()
    return model.eval()


# ------------------------------------------------------------------ there and back


@every_form
@every_block
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_collapse_gives_back_what_was_expanded(block: Any, form: str, dtype: torch.dtype) -> None:
    model, x = plain(dtype), images(dtype=dtype)
    expanded = reparam.expand(model, block, form=form)
    assert any(is_block(m) for m in expanded.modules())
    assert agrees(expanded, model, x)
    assert agrees(reparam.collapse(expanded), model, x)
    check_restored(reparam.collapse(expanded, like=model), model, model, Plain().to(dtype), x)


@every_form
@every_block
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32])
def test_collapse_after_training(block: Any, form: str, dtype: torch.dtype) -> None:
    """Trained from the published initialisation, where every branch weighs in."""
    model, x = plain(dtype), images(dtype=dtype)
    expanded = train(reparam.expand(model, block, form=form, init="paper", verify=False))
    assert not agrees(expanded, model, x)
    assert agrees(reparam.collapse(expanded, verify=False), expanded, x)  # compared here; the way into stock code both
    check_restored(reparam.collapse(expanded, like=Plain().to(dtype)), model, expanded, Plain().to(dtype), x)


@pytest.mark.slow
def test_no_block_is_left_after_collapse() -> None:
    """Plain convolutions stand where blocks were, under the names that they had; not a sum of one branch."""
    model = plain()
    for block in BLOCKS.values():
        for form in FORMS:
            collapsed = reparam.collapse(reparam.expand(model, block, form=form, init="paper"))
            kinds = {name: type(m) for name, m in collapsed.named_modules() if "conv" in name or name == "bare"}
            assert set(kinds.values()) == {nn.Conv2d}, block
            assert kinds.keys() == {name for name, m in model.named_modules() if "conv" in name or name == "bare"}


def timm_network(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=4)  # type: ignore[no-any-return]

    return make


def torchvision_network(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=4, **options)  # type: ignore[no-any-return]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "block", "form"),
    [
        (timm_network("resnet18"), "acb", "branches"),
        (timm_network("mobilenetv3_small_050"), "dbb", "branches"),
        (timm_network("mobilenetv3_small_050"), "acb", "online"),
        (torchvision_network("resnet18"), "doconv", "branches"),
    ],
    ids=["timm resnet18", "timm mobilenetv3", "timm mobilenetv3 online", "torchvision resnet18"],
)
def test_trained_networks_load_into_stock_code(make: Any, block: str, form: str) -> None:
    model, x = ready(make()), images(size=32)
    expanded = train(reparam.expand(model, block, form=form, init="paper"), size=32)
    check_restored(reparam.collapse(expanded, like=model), model, expanded, make(), x)


# ------------------------------------------------------------------ what training code does


@pytest.mark.parametrize(("kind", "form"), [("SGD", "branches"), ("AdamW", "online")])  # neither asks for the other
def test_optimizers_with_param_groups(kind: str, form: str) -> None:
    model, x = plain(), images()
    expanded = reparam.expand(model, "dbb", form=form)
    groups = reparam.param_groups(expanded, 1e-2)
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9) if kind == "SGD" else torch.optim.AdamW(groups, 1e-3)
    train(expanded, optimizer, steps=3)
    assert not agrees(expanded, model, x)
    check_restored(reparam.collapse(expanded, like=model), model, expanded, Plain(), x)


@each_form
@pytest.mark.parametrize("kind", ["deepcopy", "ModelEmaV3", pytest.param("ModelEmaV2", marks=pytest.mark.slow)])
def test_averaged_copies_collapse(kind: str, form: str) -> None:
    """The copy shares nothing with the model in training, and collapses like it."""
    model, x = plain(), images()
    expanded = reparam.expand(model, "dbb", form=form)
    average: Any = copy.deepcopy(expanded) if kind == "deepcopy" else averaged(kind, expanded)
    before = copy.deepcopy(expanded.state_dict())
    train(expanded)
    if kind != "deepcopy":
        average.update(expanded)
        check_restored(reparam.collapse(average, like=model), model, average.module, Plain(), x)
        average = average.module
        assert not torch.equal(average.state_dict()["bare.square.weight"], before["bare.square.weight"])
    assert not agrees(average, expanded, x)
    check_restored(reparam.collapse(average, like=model), model, average, Plain(), x)


def averaged(kind: str, model: nn.Module) -> Any:
    import timm.utils

    return getattr(timm.utils, kind)(model, decay=0.5)


def test_a_copy_of_an_online_model_computes_from_its_own_weights() -> None:
    """Also after the copy, or the original, is changed."""
    expanded, x = reparam.expand(plain(), Block("acb", bn="after"), form="online", init="paper"), images()
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = make(expanded)
        assert torch.equal(other(x), expanded(x))
        with torch.no_grad():
            other.bare.line0.weight.mul_(2.0)
        assert not torch.equal(other(x), expanded(x))
        other.load_state_dict(expanded.state_dict(), strict=True)
        assert torch.equal(other(x), expanded(x))


def test_copying_an_online_model_reads_no_block_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An average of the weights, or collapse, copies the model: the recorded code is the same for every copy."""
    expanded = reparam.expand(plain(), "dbb", form="online")

    again = list[BranchSum]()

    def record(self: Folded, block: BranchSum, own: Any = Folded._record) -> None:
        again.append(block)
        own(self, block)

    monkeypatch.setattr(Folded, "_record", record)
    pickle.loads(pickle.dumps(expanded))(images())
    assert again
    again.clear()
    copied = copy.deepcopy(expanded)
    assert torch.equal(copied(images()), expanded(images()))
    assert not again


@each_form
@pytest.mark.parametrize("when", ["before", "after"])
def test_synchronised_norms(when: str, form: str) -> None:
    """The conversion reaches the norms in branches; a converted network gets synchronised ones in its new branches."""
    model, x = plain(), images()
    if when == "before":
        expanded = reparam.expand(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), "dbb", form=form)
    else:
        expanded = nn.SyncBatchNorm.convert_sync_batchnorm(reparam.expand(model, "dbb", form=form))
    norms = {name: m for name, m in expanded.named_modules() if isinstance(m, _NormBase)}
    if when == "before":  # there is no norm behind this one that could say which kind its branches take
        norms = {name: m for name, m in norms.items() if not name.startswith("bare.")}
    assert len(norms) == 4 if form == "online" else len(norms) > 20
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms.values())
    ready(expanded, seed=1)
    again = reparam.expand(model, "dbb", form=form, verify=False)
    assert expanded.state_dict().keys() == again.state_dict().keys()
    assert agrees(reparam.collapse(expanded, verify=False), expanded, x)
    check_restored(reparam.collapse(expanded, like=model), model, expanded, Plain(), x)


WORKER = """
import sys
import torch
from torch import nn
from test_round_trip import Plain, images, ready
import reparam

torch.set_num_threads(1)
torch.manual_seed(0)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = ready(Plain())
net = nn.parallel.DistributedDataParallel(reparam.expand(model, "dbb", form=sys.argv[2]))
optimizer = torch.optim.SGD(reparam.param_groups(net, 1e-4), 0.05)
for step in range(2):
    x = images(count=2) * (rank + 1) + step  # another batch on each rank
    optimizer.zero_grad()
    net(x).square().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is None:
            assert not parameter.requires_grad, name
            continue
        everywhere = [torch.empty_like(parameter.grad) for _ in range(2)]
        torch.distributed.all_gather(everywhere, parameter.grad)
        assert torch.equal(everywhere[0], everywhere[1]), name
    optimizer.step()
wrapped = reparam.collapse(net, like=model)
stock = Plain()
stock.load_state_dict(wrapped.state_dict(), strict=True)
inner = reparam.collapse(net.module, like=model)
assert all(torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), inner.state_dict().values()))
if rank == 0:
    output = net.module.eval()(images()).detach()
    torch.save({"wrapped": net.state_dict(), "plain": inner.state_dict(), "out": output}, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@every_form
def test_distributed_training(form: str, tmp_path: Path) -> None:
    """Two processes: gradients agree, and what was trained folds, from inside the wrapper and through it."""
    (tmp_path / "worker.py").write_text(WORKER)
    with tempfile.TemporaryDirectory() as store:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
        result = Path(store) / "trained.pt"
        workers = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "worker.py"), str(result), form],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [worker.communicate(timeout=200)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
        saved = torch.load(result)
    stock = Plain().eval()
    stock.load_state_dict(saved["plain"], strict=True)
    assert torch.allclose(stock(images()), saved["out"], atol=1e-5, rtol=1e-4)
    expanded = reparam.expand(plain(), "dbb", form=form)
    nn.modules.utils.consume_prefix_in_state_dict_if_present(saved["wrapped"], "module.")
    expanded.load_state_dict(saved["wrapped"], strict=True)
    assert torch.allclose(expanded.eval()(images()), saved["out"])


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@each_form
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("block", ["dbb", pytest.param("doconv", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(block: str, backend: str, form: str) -> None:
    """The compiled model trains like the plain call, forward and gradients; the model inside collapses."""
    model, x = plain(), images(4)
    expanded = reparam.expand(model, block, form=form, where=["stem", "bare"], verify=False).train()
    reference = copy.deepcopy(expanded)
    torch._dynamo.reset()
    compiled = torch.compile(expanded, backend=backend, fullgraph=True)
    outputs = [net(x) for net in (compiled, reference)]
    assert torch.allclose(*outputs, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(expanded.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)
    for trained in (compiled, expanded):
        check_restored(reparam.collapse(trained, like=model, verify=False), model, expanded, Plain(), images())


@few_blocks
@every_form
def test_mixed_precision(block: Any, form: str) -> None:
    """Bfloat16 autocast: finite, parameters and gradients stay float32, and the online kernel is made in float32."""
    model = plain()
    expanded = reparam.expand(model, block, form=form, init="paper").train()
    seen: list[Tensor] = []
    for module in expanded.modules():
        if isinstance(module, BranchSum):
            module.geometry = Spy(module.geometry, seen)  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        y = expanded(images(4))
        loss = F.cross_entropy(y.float(), torch.arange(4))
    loss.backward()
    assert y.dtype == torch.bfloat16
    assert bool(y.isfinite().all())
    assert all(p.dtype == torch.float32 for p in expanded.parameters())
    grads = [p.grad for p in expanded.parameters() if p.grad is not None]
    assert len(grads) > 10
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)
    assert bool(seen) is (form == "online")
    assert {w.dtype for w in seen} <= {torch.float32}


class Spy:
    """Stands for a geometry and notes the kernels it is given."""

    def __init__(self, geometry: Any, seen: list[Tensor]) -> None:
        self.geometry, self.seen = geometry, seen

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.seen.append(weight)
        return self.geometry.convolve(x, weight, bias)  # type: ignore[no-any-return]


@every_form
def test_gradient_checkpointing(form: str) -> None:
    """Blocks run again in the backward pass give the same gradients."""
    direct = reparam.expand(plain(), "dbb", form=form).train()
    again = copy.deepcopy(direct)
    x = images(4)
    direct(x).square().sum().backward()
    y = checkpoint(again.block, again.stem(x), use_reentrant=False)
    y = again.depth_bn(again.depth(y))
    again.head(torch.relu(again.bare(y)).mean((2, 3))).square().sum().backward()
    for ours, theirs in zip(again.parameters(), direct.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
def test_timms_gradient_checkpointing() -> None:
    make = timm_network("mobilenetv3_small_050")
    model, x = ready(make()), images(size=32)
    model.set_grad_checkpointing(True)
    expanded = train(reparam.expand(model, "acb"), size=32)
    check_restored(reparam.collapse(expanded, like=model), model, expanded, make(), x)


@every_form
def test_channels_last(form: str) -> None:
    """New kernels take the layout of the old ones, and it survives training and collapse."""
    model = plain().to(memory_format=torch.channels_last)
    expanded = reparam.expand(model, "dbb", form=form)
    for name, parameter in expanded.named_parameters():
        if parameter.dim() == 4 and not name.startswith("depth."):  # a depthwise kernel does not show a layout
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    train(expanded)
    x = images().contiguous(memory_format=torch.channels_last)
    result = reparam.collapse(expanded, like=model)
    assert result.bare.weight.is_contiguous(memory_format=torch.channels_last)
    assert agrees(result, expanded, x)
    assert reparam.collapse(expanded).bare.weight.is_contiguous(memory_format=torch.channels_last)


@few_blocks
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_online_models_change_their_dtype(block: Any, dtype: torch.dtype) -> None:
    """The kernel follows the parameters: ``double()``, ``bfloat16()`` and ``half()`` after expansion, and back."""
    model, x = plain(), images()
    expanded = reparam.expand(model, block, form="online", init="paper")
    wanted = expanded(x).detach()
    expanded.to(dtype)
    got = expanded(x.to(dtype)).detach()
    assert got.dtype == dtype
    assert all(t.dtype == dtype for t in expanded.state_dict().values() if t.is_floating_point())
    assert torch.allclose(got.float(), wanted, atol=30 * max(torch.finfo(dtype).eps, 1e-7) * float(wanted.abs().max()))
    expanded.float()
    assert expanded(x).dtype == torch.float32
    expanded.train()(images(4)).sum().backward()


RELOAD = """
import sys
import torch
from test_round_trip import Plain, images
import reparam

torch.set_num_threads(1)
form = sys.argv[1]
saved = torch.load(sys.argv[2])
for block, state in saved["states"].items():
    model = reparam.expand(Plain(), block, form=form, verify=False)
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), saved["outputs"][block]), block
    result = reparam.collapse(model, like=Plain(), verify=False)
    assert torch.allclose(result(images()), saved["outputs"][block], atol=1e-5), block
whole = torch.load(sys.argv[3], weights_only=False)
assert torch.equal(whole(images()), saved["outputs"]["dbb"])
"""


@each_form
def test_reload_in_a_fresh_process(form: str, tmp_path: Path) -> None:
    """Expanded the same way there, the state dict loads strictly and gives the same outputs; the whole module too."""
    saved: dict[str, Any] = {"states": {}, "outputs": {}}
    for block in ("dbb", "doconv"):
        expanded = train(reparam.expand(plain(), block, form=form, init="paper", verify=False), steps=1)
        saved["states"][block] = expanded.state_dict()
        saved["outputs"][block] = expanded(images()).detach()
        if block == "dbb":
            torch.save(expanded, tmp_path / "whole.pt")
    torch.save(saved, tmp_path / "state.pt")
    (tmp_path / "reload.py").write_text(RELOAD)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    arguments = [form, str(tmp_path / "state.pt"), str(tmp_path / "whole.pt")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "reload.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@every_form
@pytest.mark.parametrize("block", ["dbb", "doconv"])
def test_whole_modules_save_and_load(block: str, form: str) -> None:
    expanded, x = train(reparam.expand(plain(), block, form=form), steps=1), images()
    file = io.BytesIO()
    torch.save(expanded, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expanded(x))
    check_restored(reparam.collapse(train(loaded), like=plain()), plain(), loaded, Plain(), x)


@every_form
@pytest.mark.parametrize("block", [pytest.param("dbb", marks=pytest.mark.slow), "doconv"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")  # superseded
@pytest.mark.parametrize("how", ["trace", "export"])
def test_expanded_models_are_exported(how: str, block: str, form: str) -> None:
    expanded, x = reparam.expand(plain(), block, form=form, init="paper").eval(), images()
    if how == "trace":
        exported: Any = torch.jit.trace(expanded, x)
    else:
        exported = torch.export.export(expanded, (x,)).module()
    assert torch.allclose(exported(x), expanded(x), atol=1e-6)


# ------------------------------------------------------------------ parameter groups


def named_groups(model: nn.Module, **options: Any) -> dict[str, float]:
    """Each parameter's name with its weight decay; a parameter in two groups fails."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    for group in reparam.param_groups(model, 0.1, **options):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["weight_decay"]
    return found


@every_block
def test_param_groups_hold_every_trained_parameter_once(block: Any) -> None:
    expanded = reparam.expand(plain(), block)
    expanded.head.weight.requires_grad_(False)
    trained = {name for name, p in expanded.named_parameters() if p.requires_grad}
    for options in ({}, {"decay_biases": True}):
        groups = named_groups(expanded, **options)
        assert groups.keys() == trained
        for name, decay in groups.items():
            owner = expanded.get_submodule(name.rpartition(".")[0])
            scale = isinstance(owner, (_NormBase, ChannelScale))
            bias = name.endswith(".bias") and not options
            assert decay == (0.0 if scale or bias else 0.1), name


def test_param_groups_fit_timms_factory() -> None:
    from timm.optim import create_optimizer_v2

    expanded = reparam.expand(plain(), "orepa")
    optimizer = create_optimizer_v2(
        expanded, opt="sgd", lr=0.01, momentum=0.9, param_group_fn=lambda m: reparam.param_groups(m, 1e-4)
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
    given = sum(len(g["params"]) for g in optimizer.param_groups)
    assert given == sum(p.requires_grad for p in expanded.parameters())
    train(expanded, optimizer)


# ------------------------------------------------------------------ the caller's model


ORIGINAL = ("block.conv1.weight", "block.bn1.weight", "block.bn1.bias", "bare.weight", "bare.bias", "head.weight")
"""Where ``Plain`` keeps a kernel, a norm's factors, and the kernel and bias of a convolution without norm."""


@pytest.mark.parametrize(
    ("block", "form"),
    [(name, "branches") for name in ("acb", "dbb", "repvgg", "mobileone", "orepa", "qarepvgg", "ecb", "doconv")]
    + [("acb", "online"), ("doconv", "online")],
)
def test_an_optimizer_made_before_inplace_expansion_keeps_its_parameters(block: str, form: str) -> None:
    """The very same Parameter objects are trained; only doconv, whose W is larger, has another kernel."""
    model = plain()
    originals = {name: model.get_parameter(name) for name in ORIGINAL}
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    assert reparam.expand(model, block, form=form, inplace=True) is model
    held = {id(p) for p in model.parameters()}
    for name, parameter in originals.items():
        replaced = block == "doconv" and name in ("block.conv1.weight", "bare.weight")
        assert (id(parameter) in held) is not replaced, name
    before = {name: p.detach().clone() for name, p in originals.items()}
    train(model, optimizer, steps=1)
    for name, parameter in originals.items():
        replaced = block == "doconv" and name in ("block.conv1.weight", "bare.weight")
        assert torch.equal(parameter, before[name]) is replaced, name


@pytest.mark.parametrize(
    ("stage", "init", "form"),
    [
        ("build", "preserve", "branches"),
        ("build", "preserve", "online"),
        ("build", "paper", "branches"),
        ("build", "paper", "online"),
        ("check_preserved", "preserve", "branches"),
        ("check_preserved", "preserve", "online"),
        ("remainder", "preserve", "branches"),
        ("remainder", "paper", "branches"),
    ],
)
def test_failure_midway_leaves_the_model_as_it_was(
    stage: str, init: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, training flags and modules: also those of the layer at which it failed."""
    model = Net().train()
    model.stem.conv.eval()  # a layer alone in the other mode
    ready_statistics(model)
    before, calls = snapshot(model), []
    owner = passes.edits.apply if stage == "remainder" else passes.expand
    original = getattr(owner, stage)

    def fail(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        real = [t for a in args for t in tensors_of(a)]
        calls.extend(1 for _ in [0] if not any(t.is_meta for t in real))
        if len(calls) > 1:
            raise RuntimeError("midway")
        return result

    monkeypatch.setattr(owner, stage, fail)
    block = Block("acb", gamma=1 / 3)
    with pytest.raises(RuntimeError, match="midway"):
        reparam.expand(model, block, init=init, form=form, inplace=True)
    assert is_unchanged(model, before)


@pytest.mark.parametrize("block", ["acb", "dbb"])
def test_online_models_change_their_layout(block: Any) -> None:
    """The recorded code does not depend on the strides that the weights had when it was recorded."""
    model, x = plain(), images()
    expanded = reparam.expand(model, block, form="online", init="paper")
    moved = copy.deepcopy(expanded).to(memory_format=torch.channels_last)
    assert any(p.dim() == 4 and p.stride(1) == 1 and p.shape[2] > 1 for p in moved.bare.parameters())
    assert agrees(moved, expanded, x)
    assert agrees(reparam.collapse(moved, like=model), expanded, x)


def ready_statistics(model: nn.Module) -> None:
    flags = [(m, m.training) for m in model.modules()]
    ready(model)
    for module, flag in flags:
        module.training = flag


def tensors_of(value: Any) -> list[Tensor]:
    module = getattr(value, "conv", value)
    return list(module.parameters()) if isinstance(module, nn.Module) else []


# Every pair of values.
@pytest.mark.parametrize(
    ("init", "block", "form"),
    [
        (init, block, "online" if (init == "paper") is (number % 2 == 0) else "branches")
        for number, block in enumerate(("acb", "dbb", "doconv"))
        for init in ("preserve", "paper")
    ],
)
def test_the_callers_model_is_untouched(block: Any, form: str, init: str) -> None:
    """Bit for bit, with the training flag of every module; the copy has the flags as well."""
    model = ready(Net()).train()
    model.residual.bn1.eval()  # a frozen norm
    model.whole.eval()
    before = snapshot(model)
    expanded = reparam.expand(model, block, form=form, init=init)
    assert is_unchanged(model, before)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in expanded.parameters())
    flags = dict(expanded.named_modules())
    for name, module in model.named_modules():
        if type(flags[name]) is type(module):
            assert flags[name].training is module.training, name
    for module in expanded.whole.modules():
        assert module.training is False


# ------------------------------------------------------------------ like=


def test_another_architecture_is_an_error_that_names_a_layer() -> None:
    expanded = reparam.expand(plain(), "acb")
    with pytest.raises(ReparamError, match=r"(stem|depth|bare|block|whole|rewritten|residual)[.\w]*"):
        reparam.collapse(expanded, like=Net())
    wide = Plain()
    wide.bare = nn.Conv2d(WIDTH, WIDTH, 5, padding=2)
    with pytest.raises(ReparamError, match=r"bare"):
        reparam.collapse(expanded, like=wide)


def test_layers_that_were_not_expanded_keep_their_norms() -> None:
    """They are stock layers: those outside of blocks are collapsed as well, and their norms are identities too."""
    model, x = plain(), images()
    expanded = train(reparam.expand(model, "dbb", where="block.*", init="paper"))
    result = reparam.collapse(expanded, like=model)
    check_restored(result, model, expanded, Plain(), x)
    assert torch.equal(result.head.weight, expanded.head.weight)


class Auxiliary(Plain):
    """A second head that only training runs, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.Flatten(2))

    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        out = self.head(torch.relu(self.bare(self.depth_bn(self.depth(self.block(features))))).mean((2, 3)))
        return (out, self.aux(features).mean(2)) if self.training else out


@each_form
def test_heads_that_only_run_in_training(form: str) -> None:
    """They come back too: in training mode, the returned network computes them from the folded kernels."""
    model, x = ready(Auxiliary()), images()
    expanded = reparam.expand(model, "dbb", form=form, init="paper", verify=False).train()
    assert is_block(expanded.aux[0])
    y, aux = expanded(images(4))
    (y.square().sum() + aux.square().sum()).backward()
    torch.optim.SGD(expanded.parameters(), 0.01).step()
    expanded.eval()
    result = reparam.collapse(expanded, like=model)
    check_restored(result, model, expanded, Auxiliary(), x)
    features = images(2, 6, WIDTH)
    assert torch.allclose(result.aux(features), expanded.aux(features), atol=1e-5)
    assert torch.allclose(reparam.collapse(expanded, verify=False).aux(features), expanded.aux(features), atol=1e-5)


@pytest.mark.slow
def test_googlenet_with_its_auxiliary_heads() -> None:
    make = torchvision_network("googlenet", aux_logits=True, init_weights=False)
    model, x = ready(make()), images(size=64)
    expanded = ready(reparam.expand(model, "acb"), seed=1)
    check_restored(reparam.collapse(expanded, like=model), model, expanded, make(), x)


class Mixed(nn.Module):
    """Norms of all kinds behind convolutions: none, without factors, frozen, activating; one behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import BatchNormAct2d
        from torchvision.ops import FrozenBatchNorm2d

        self.bare = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.fixed = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.fixed_bn = nn.BatchNorm2d(WIDTH, affine=False)
        self.frozen = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.frozen_bn = FrozenBatchNorm2d(WIDTH)
        self.acting = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.acting_bn = BatchNormAct2d(WIDTH)
        self.bias_and_norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bias_and_norm_bn = nn.BatchNorm2d(WIDTH)
        self.linear = nn.Linear(WIDTH, 4, bias=False)
        self.linear_bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bare(x))
        x = torch.relu(self.fixed_bn(self.fixed(x)))
        x = torch.relu(self.frozen_bn(self.frozen(x)))
        x = self.acting_bn(self.acting(x))
        x = torch.relu(self.bias_and_norm_bn(self.bias_and_norm(x)))
        return self.linear_bn(self.linear(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("block", "form"),
    [("acb", "branches"), ("dbb", "online"), ("doconv", "online")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("acb", "online"), ("dbb", "branches"), ("doconv", "branches"))
    ],
)
def test_norms_of_every_kind_come_back(block: str, form: str) -> None:
    """Among them one without a shift, which takes the folded bias into its mean."""
    model, x = ready(Mixed()), images()
    expanded = train(reparam.expand(model, block, form=form, init="paper", verify=False))
    assert all(is_block(m) for m in (expanded.bare, expanded.fixed, expanded.acting))
    assert agrees(reparam.collapse(expanded, verify=False), expanded, x)
    result = reparam.collapse(expanded, like=model)
    shapes = {key: t.shape for key, t in model.state_dict().items()}
    assert {key: t.shape for key, t in result.state_dict().items()} == shapes
    stock = Mixed().eval()
    stock.load_state_dict(result.state_dict(), strict=True)
    assert agrees(stock, expanded, x)
    assert is_identity(result.acting_bn)
    assert is_identity(result.bias_and_norm_bn)
    assert torch.equal(result.fixed_bn.running_var + result.fixed_bn.eps, torch.ones(WIDTH))
