"""A block that somebody changes after it was built, or looks into, computes what its branches do, in every form."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_blocks import gap
from test_rows import built, images, step
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.training import equivalent, forms
from reparam import ReparamError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm:FutureWarning")

each_form = pytest.mark.parametrize("form", ["branches", "sampled:fraction=1", "frozen"])


def block_of(model: nn.Module) -> Any:
    (block,) = (m for m in model.modules() if isinstance(m, BranchSum))
    return block


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def in_form(form: str) -> tuple[nn.Module, nn.Module]:
    """A block, and a copy whose branches run as modules."""
    model = reparam.set_form(built(padding=1), form)
    if form == "frozen":
        for norm in norms_of(model):
            norm.eval()
    reference = copy.deepcopy(model)
    block_of(reference).folded = None
    return model, reference


def check(model: nn.Module, reference: nn.Module) -> None:
    for i in range(2):  # what is computed once and kept is seen the second time
        got, wanted = step(model, images() + i), step(reference, images() + i)
        for a, b in zip(got, wanted, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-7)


def seeded(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(block: Any) -> None:
        torch.manual_seed(2)
        change(block)

    return changed


def dilated(block: Any) -> None:
    block.square.conv.dilation = block.square.conv.padding = (2, 2)


def other_eps(block: Any) -> None:
    for norm in norms_of(block):
        norm.eps = 0.1


def without_shift(block: Any) -> None:
    for norm in norms_of(block):
        norm.register_parameter("bias", None)


def without_statistics(block: Any) -> None:
    norm: Any = block.sequence.norm
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def other_forward(block: Any) -> None:
    norm = block.sequence.norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def other_class(block: Any) -> None:
    block.sequence.square.__class__ = Doubled


def other_names(block: Any) -> None:
    block.sequence._modules = {f"new_{name}": module for name, module in block.sequence._modules.items()}


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a pruned kernel": lambda b: prune.l1_unstructured(b.sequence.square, "weight", 0.5),
    "a pruned norm": lambda b: prune.l1_unstructured(b.sequence.norm, "weight", 0.5),
    "weight_norm": lambda b: nn.utils.weight_norm(b.sequence.square),
    "weight_norm as a parametrization": lambda b: parametrizations.weight_norm(b.sequence.square),
    "spectral_norm": lambda b: nn.utils.spectral_norm(b.sequence.square),
    "spectral_norm as a parametrization": lambda b: parametrizations.spectral_norm(b.sequence.square),
    "a norm of groups": lambda b: setattr(b.sequence, "norm", nn.GroupNorm(2, 8).double()),
    "no norm": lambda b: setattr(b.sequence, "norm", nn.Identity()),
    "no branch": lambda b: delattr(b, "sequence"),
    "one branch more": lambda b: b.add_module("more", nn.Conv2d(8, 8, 3, padding=1).double()),
    "another kernel": lambda b: setattr(b.sequence, "square", nn.Conv2d(8, 8, 3, bias=False).double()),
    "another kernel with a bias": lambda b: setattr(b.sequence, "square", nn.Conv2d(8, 8, 3).double()),
    "a larger kernel that pads": lambda b: setattr(b.sequence, "square", nn.Conv2d(8, 8, 5, padding=1).double()),
    "another dilation": dilated,
    "another eps": other_eps,
    "no shift": without_shift,
    "no running statistics": without_statistics,
    "a hook that doubles": lambda b: b.sequence.norm.register_forward_hook(lambda *args: 2 * args[2]),
    "a hook before": lambda b: b.sequence.norm.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "another forward": other_forward,
    "other names": other_names,
    "another class": other_class,
}


@each_form
@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_what_runs(name: str, form: str) -> None:
    model, reference = in_form(form)
    for net in (model, reference):
        seeded(CHANGES[name])(block_of(net))
    check(model, reference)


def online() -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    return reparam.expand(plain, "dbb", form="online", init="paper", verify=False).double().train()


@pytest.mark.parametrize("name", [name for name in CHANGES if "norm of" not in name and "statistics" not in name])
def test_online_blocks_run_as_they_were_changed(name: str) -> None:
    model = online()
    reference = copy.deepcopy(model)
    reference[0].folded = None
    for net in (model, reference):
        if name in ("another dilation", "another eps", "no shift"):
            net[0].square.dilation = net[0].square.padding = (2, 2)
        else:
            seeded(CHANGES[name])(net[0])
    check(model, reference)


def test_a_block_that_was_changed_is_read_anew_and_stays_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = in_form("frozen")
    other_eps(block_of(model))
    model(images())
    written = list[Any]()
    monkeypatch.setattr(BranchSum, "summed", lambda *_: written.append(1))
    recorded = block_of(model).folded.program
    model(images())
    assert not written
    assert block_of(model).folded.program is recorded


@pytest.mark.parametrize("name", [name for name in CHANGES if "norm of" not in name and "statistics" not in name])
def test_what_was_changed_collapses(name: str) -> None:
    for form in ("sampled", "online"):
        model = online() if form == "online" else in_form(form)[0]
        if form == "online" and name in ("another dilation", "another eps", "no shift"):
            continue
        seeded(CHANGES[name])(block_of(model))
        wanted = model.eval()(images())
        assert gap(reparam.collapse(model)(images()), wanted) < 1e-9


@each_form
@pytest.mark.parametrize("change", [other_eps, dilated, without_shift])
def test_copies_and_pickles_of_what_was_changed(change: Callable[[Any], Any], form: str) -> None:
    for ran in (False, True):
        model, reference = in_form(form)
        for net in (model, reference):
            change(block_of(net))
            if ran:
                net(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.float().double()):
            check(other, copy.deepcopy(reference).float().double() if other is model else copy.deepcopy(reference))


def test_one_that_changes_all_the_time_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = in_form("sampled:fraction=1")
    read = list[Any]()
    monkeypatch.setattr(forms, "branches_code", lambda *_: read.append(1))
    for i in range(20):
        for net in (model, reference):
            block_of(net).sequence.norm.eps = 1e-5 * (i + 1)
        assert gap(model(images()), reference(images())) < 1e-9
    assert len(read) == forms.READS


@each_form
def test_hooks_that_only_look_see_the_whole_batch(form: str) -> None:
    model, reference = in_form(form)
    seen = list[int]()
    block_of(model).sequence.norm.register_forward_hook(lambda _, args, y: seen.append(y.shape[0]))
    check(model, reference)
    assert seen == [4, 4]
    if form == "frozen":
        for norm in norms_of(model):
            norm.train()
        check(model, reference)
    model.eval()(images())
    assert len(seen) == (5 if form == "frozen" else 3)


@pytest.mark.parametrize("form", ["branches", "sampled:fraction=1"])
def test_norms_that_processes_share_are_those_that_were_there(form: str) -> None:
    """Nothing is read anew: SyncBatchNorm measures what BatchNorm2d did."""
    model, _ = in_form(form)
    folded = block_of(model).folded
    assert folded.follows(block_of(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))))
    assert folded._reads == 0


def test_a_spectral_norm_in_a_block_refuses_another_form() -> None:
    model, _ = in_form("branches")
    parametrizations.spectral_norm(block_of(model).sequence.square)
    with pytest.raises(ReparamError, match="SpectralNorm computes another weight in training"):
        reparam.set_form(model, "frozen")


# ------------------------------------------------------------------ where code is recorded


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalent, "_PROGRAMS", {})


def frozen_by_itself() -> tuple[nn.Module, nn.Module]:
    """A block whose code is recorded in its first step."""
    model, reference = in_form("branches")
    for norm in [*norms_of(model), *norms_of(reference)]:
        norm.eval()
    return model, reference


def test_autocast_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where a form is set nor where a step is the first: other blocks would have the same code."""
    for first in (True, False):
        fresh(monkeypatch)
        model, reference = frozen_by_itself()
        with torch.autocast("cpu", torch.bfloat16):
            if first:
                model.float()(images().float())
            else:
                reparam.set_form(model.float(), "frozen")
        assert gap(model(images().float()).double(), reference(images())) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's own forward derivatives
def test_the_first_step_may_be_inside_of_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)
    model, reference = frozen_by_itself()
    along = torch.ones_like(images())
    for net in (model, reference):
        net.requires_grad_(False)
    got, wanted = (torch.func.jvp(net, (images(),), (along,)) for net in (model, reference))
    assert gap(got[0], wanted[0]) < 1e-9
    assert gap(got[1], wanted[1]) < 1e-9
    got, wanted = (torch.vmap(torch.func.grad(lambda x, n=net: n(x[None]).square().sum()))(images())
                   for net in (frozen_by_itself()[0], reference))  # fmt: skip
    assert gap(got, wanted) < 1e-9


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_step_may_be_inside_of_a_checkpoint(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)
    model, reference = frozen_by_itself()
    x = images().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).pow(3).sum().backward()
    wanted = step(reference, images())
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted[1], rtol=1e-8)


def test_threads_may_take_the_first_step_together(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)
    model, reference = frozen_by_itself()
    wanted, meet, found = reference(images()), threading.Barrier(4), list[Any]()

    def run() -> None:
        meet.wait()
        try:
            found.append(gap(model(images()), wanted))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(each, float) and each < 1e-9 for each in found), found
    assert len(found) == 4


def test_while_one_thread_records_another_runs_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)
    model, reference = frozen_by_itself()
    wanted, found, read = reference(images()), list[float](), equivalent.Reading.form

    @torch.no_grad()
    def run() -> None:
        found.append(gap(model(images()), wanted))

    def form(*given: Any) -> Any:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return read(*given)

    monkeypatch.setattr(equivalent.Reading, "form", form)
    model(images())
    assert len(found) == 2
    assert max(found) < 1e-9


def test_what_cannot_be_one_convolution_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = frozen_by_itself()
    for net in (model, reference):
        seeded(CHANGES["a norm of groups"])(block_of(net))
    tried, record = list[Any](), forms.KernelProgram.of
    monkeypatch.setattr(forms.KernelProgram, "of", lambda *given: (tried.append(1), record(*given))[1])
    check(model, reference)
    assert tried == [1]


def replica(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for another device."""
    modules = list(model.modules())
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in modules}  # type: ignore[no-untyped-call]
    for module, copied in copies.items():
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[child]
        for name, p in module._parameters.items():
            copied._parameters[name] = None
            if p is not None:
                del copied._parameters[name]
                setattr(copied, name, p * 1)
    return copies[model]


@pytest.mark.parametrize("form", ["branches", "sampled:fraction=1", "frozen", "online"])
def test_copies_for_several_devices(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(monkeypatch)
    for training in (True, False):
        model = online() if form == "online" else in_form(form)[0]
        for norm in norms_of(model):
            norm.train(training and form != "frozen")
        reference = copy.deepcopy(model)
        block_of(reference).folded = None
        copied = replica(model)
        assert gap(copied(images()), reference(images())) < 1e-9
        assert block_of(copied).folded.follows(block_of(copied))
        assert gap(model(images()), reference(images())) < 1e-9


@pytest.mark.parametrize("form", ["branches", "sampled:fraction=1", "frozen", "online"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_be_cast_one_by_one(form: str, dtype: torch.dtype) -> None:
    """As CLIP does, or an assignment of a state dict: no module is told."""
    model = (online() if form == "online" else in_form(form)[0]).float()
    reference = copy.deepcopy(model).double()
    block_of(reference).folded = None
    x = images().to(dtype)
    model(images().float()), reference(images())
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert gap(y.double(), reference(x.double())) < {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 1e-5)
    if dtype is torch.float64:
        reference.load_state_dict(model.state_dict())
        assert gap(model(x), reference(x)) < 1e-9
