"""What a caller gets back: their own class, everything else as it was, and a network that the rest of PyTorch takes."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_networks import (
    WIDTH,
    Activated,
    Branches,
    ConvBN,
    Net,
    Parallel,
    Residual,
    images,
    maps,
    ready,
    snapshot,
)
from small_networks import unchanged as is_unchanged
from torch import Tensor, nn

import passes.collapse
import passes.compiler
import passes.fold.folds
import reparam
from reparam import Counts, EquivalenceError, Reason, ReparamError

SURGERIES = {"slot": ConvBN, "whole": lambda: nn.Sequential(Parallel()), "rewritten": Activated}


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Equal up to the rounding of a shallow network."""
    gap, scale = (a.double() - b.double()).abs().max(), b.double().abs().max()
    return bool(gap <= 200 * torch.finfo(dtype).eps * scale)


class Caching(nn.Module):
    """Attention-like: keeps a tensor of its last forward, and fills a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.bias = nn.Parameter(torch.zeros(WIDTH, 1, 1))
        self.cache: dict[str, Any] = {}
        self.last: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.norm(self.conv(x)) + self.bias
        self.cache["last"] = self.last
        return torch.relu(self.last)


class Drawing(nn.Module):
    """Draws random numbers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ConvBN()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block(x)) + 0 * torch.rand(1)


# ------------------------------------------------------------------ the caller's own model


@pytest.mark.parametrize("kind", SURGERIES)
def test_returns_the_callers_class(kind: str) -> None:
    """``isinstance`` holds for every kind of surgery, ``type`` where no forward was rewritten."""
    model = ready(SURGERIES[kind]())
    plain = reparam.collapse(model)
    assert isinstance(plain, type(model))
    assert type(plain).__name__ == type(model).__name__
    assert kind == "rewritten" or type(plain) is type(model)
    assert Counts.of(plain).norms == 0
    assert close(plain(maps()), model(maps()))


def test_every_module_keeps_its_class_or_becomes_a_layer() -> None:
    model = ready(Net())
    plain = reparam.collapse(model)
    assert type(plain) is Net
    assert type(plain.whole) is nn.Conv2d
    assert isinstance(plain.rewritten, Activated)
    assert type(plain.residual) is Residual
    assert type(plain.stem) is ConvBN
    assert (Counts.of(plain).convs, Counts.of(plain).norms) == (5, 0)
    assert close(plain.features(images()), model.features(images()))


def test_training_mode_is_noted_and_ended() -> None:
    """Running statistics are folded whatever the mode; the result is in eval mode, the input stays in training."""
    model = ready(Net())
    wanted = model(images())
    model.train()
    model.residual.eval()
    flags = [m.training for m in model.modules()]
    plain, report = reparam.collapse_with_report(model)
    assert any("training mode" in note for note in report.notes)
    assert flags == [m.training for m in model.modules()]
    assert not any(m.training for m in plain.modules())
    assert close(plain(images()), wanted)
    assert not reparam.collapse_with_report(plain)[1].notes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_stays(dtype: torch.dtype) -> None:
    plain = reparam.collapse(ready(Net()).to(dtype))
    assert {p.dtype for p in plain.parameters()} == {dtype}


@pytest.mark.gpu
def test_device_stays() -> None:
    model = ready(Net()).cuda()
    plain = reparam.collapse(model)
    assert {p.device.type for p in plain.parameters()} == {"cuda"}
    assert close(plain(images().cuda()), model(images().cuda()), torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_format_stays(layout: torch.memory_format) -> None:
    """Kernels larger than 1x1 lie in memory as they did."""
    model = ready(Net()).to(memory_format=layout)
    plain = reparam.collapse(model)
    kernels = [m.weight for m in plain.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert len(kernels) == 5
    assert all(w.is_contiguous(memory_format=layout) for w in kernels)


def test_memory_format_stays_in_three_dimensions() -> None:
    model = ready(nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6))).to(memory_format=torch.channels_last_3d)
    assert reparam.collapse(model)[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_requires_grad_stays() -> None:
    """A frozen block stays frozen, a trainable one can still be trained; the input gets no gradients."""
    model = ready(Net())
    model.stem.requires_grad_(False)
    model.whole.point.requires_grad_(False)
    plain = reparam.collapse(model)
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.conv.weight", "stem.conv.bias"}
    plain(images()).sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in plain.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_works_under_no_grad_and_inference_mode() -> None:
    """Neither context changes what is made: the result can be trained."""
    model = ready(Net())
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            plain = reparam.collapse(model, example_inputs=images())
            assert not torch.is_grad_enabled()
        assert all(p.requires_grad and not p.is_inference() for p in plain.parameters())
        plain(images()).sum().backward()
        assert close(plain(images()), model(images()))


def test_wrapped_models_fold_inside() -> None:
    """Containers that torch brings, at the outside and inside; a compiled model stays one."""
    for wrap in (nn.DataParallel, lambda net: nn.Sequential(nn.DataParallel(net)), lambda net: nn.ModuleList([net])):
        assert Counts.of(reparam.collapse(wrap(ready(Net())))).norms == 0
    torch._dynamo.reset()  # other tests may have compiled this code until torch gave it up
    compiled: Any = torch.compile(ready(Net()), backend="eager")
    plain = reparam.collapse(compiled)
    assert type(plain) is type(compiled)
    assert Counts.of(plain).norms == 0
    assert close(plain(images()), compiled(images()))


@pytest.mark.parametrize("make", [Net, Branches, Caching, Drawing, lambda: nn.Sequential(Caching(), Parallel())])
def test_input_is_untouched(make: Any) -> None:
    """Bit for bit: numbers, flags, attributes of every module, tensors that a forward caches, random state."""
    model = ready(make()).train()
    model(images() if isinstance(model, Net) else maps())  # fills caches
    before, state = snapshot(model), torch.get_rng_state()
    x = images() if isinstance(model, Net) else maps()
    plain = reparam.collapse(model, example_inputs=x)
    assert Counts.of(plain).norms == 0
    reparam.explain(model)
    assert is_unchanged(model, before)
    assert torch.equal(state, torch.get_rng_state())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in plain.parameters()}
    assert not shared


def test_cached_tensors_are_no_proxies() -> None:
    """In place, too: what a forward stored while being traced must not stay."""
    model = ready(Caching())
    model(maps())
    last = model.last
    plain = reparam.collapse(model, inplace=True)
    assert plain is model
    assert plain.last is last
    assert plain.cache == {"last": last}
    assert plain.calls == 1


def test_inplace_returns_the_same_object() -> None:
    model = ready(Net())
    wanted, head, stem = model(images()), model.head, model.stem
    plain = reparam.collapse(model, inplace=True)
    assert plain is model
    assert plain.head is head
    assert plain.stem is stem
    assert Counts.of(plain).norms == 0
    assert close(plain(images()), wanted)


STAGES = ("trace", "plan", "emit", "prove", "edit", "rewrite", "second unit", "compare")


LATE = ("edit", "second unit", "compare")


# In place at each stage; on a copy, which shares tensors with the model while it is made, where something has changed.
@pytest.mark.parametrize(
    ("stage", "inplace"),
    [pytest.param(stage, True, id=f"{stage}-inplace") for stage in STAGES]
    + [
        pytest.param(stage, False, id=f"{stage}-copy", marks=[] if stage in LATE else [pytest.mark.slow])
        for stage in STAGES
    ],
)
def test_failure_midway_leaves_the_model_untouched(stage: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised wherever, the model comes back as it was, and the error itself comes through."""

    class Planted(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Planted

    def fail_on(call: int, function: Any) -> Any:
        calls = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return fail() if len(calls) > call else function(*args, **kwargs)

        return counted

    places: dict[str, tuple[Any, str, int]] = {
        "trace": (passes.compiler, "trace_units", 0),
        "plan": (passes.compiler, "select", 0),
        "emit": (passes.fold.folds, "emit", 3),
        "prove": (passes.compiler, "prove", 3),
        "edit": (passes.edits.apply, "_inherit", 3),
        "rewrite": (passes.edits.apply, "rewrite", 0),
        "second unit": (passes.compiler, "apply", 1),
        "compare": (passes.collapse, "check_against", 0),
    }
    owner, name, call = places[stage]
    model = ready(nn.Sequential(Net(), Untraceable())).train()
    model[1].block.eval()
    before = snapshot(model)
    monkeypatch.setattr(owner, name, fail_on(call, getattr(owner, name)))
    with pytest.raises(Planted):
        reparam.collapse(model, example_inputs=images(), inplace=inplace)
    assert is_unchanged(model, before)
    monkeypatch.undo()
    assert Counts.of(reparam.collapse(model, example_inputs=images(), inplace=inplace)).norms == 0


class Untraceable(nn.Module):
    """A forward that branches on a value; its inside is compiled on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if float(x.detach().sum()) < 1e9 else x


@pytest.mark.parametrize("make", [Net, Branches, Activated, lambda: nn.Sequential(Net(), Untraceable())])
def test_twice_changes_nothing(make: Any) -> None:
    plain = reparam.collapse(ready(make()))
    before = snapshot(plain)
    again, report = reparam.collapse_with_report(plain, inplace=True)
    assert report.folds == []
    assert is_unchanged(again, before)


def test_state_dict_names_of_the_untouched_stay() -> None:
    model = ready(Net())
    names, after = list(model.state_dict()), list(reparam.collapse(model).state_dict())
    assert [n for n in after if n.startswith("head")] == [n for n in names if n.startswith("head")]
    assert "stem.conv.weight" in after
    assert "residual.conv1.weight" in after
    assert set(after) - set(names) <= {
        *(f"{conv}.bias" for conv in ("stem.conv", "residual.conv1", "residual.conv2")),
        "whole.weight",
        "whole.bias",
        *(n for n in after if n.startswith("rewritten.")),
    }
    reparam.collapse(model).load_state_dict(reparam.collapse(model).state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm])
def test_weights_that_hooks_compute(norm: Any, inplace: bool) -> None:
    """The hooks of torch's own weight_norm are part of the layer, and what they cached does not stop a copy."""
    model = ready(nn.Sequential(norm(nn.Conv2d(WIDTH, WIDTH, 3)), nn.BatchNorm2d(WIDTH), nn.ReLU()))
    wanted = model(maps())
    plain = reparam.collapse(model, inplace=inplace)
    assert Counts.of(plain).norms == 0
    assert not plain[0]._forward_pre_hooks
    assert close(plain(maps()), wanted)


def test_nothing_to_fold_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    before = snapshot(model)
    assert is_unchanged(reparam.collapse(model, inplace=True), before)


# ------------------------------------------------------------------ hooks


def test_hooks_on_outer_modules_keep_firing() -> None:
    model = ready(Net())
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("model"))
    plain = reparam.collapse(model)
    plain(images())
    assert seen == ["model"]
    assert Counts.of(plain).norms == 0


def test_hook_on_a_block_keeps_firing_and_the_block_folds_inside() -> None:
    model = ready(Net())
    seen: list[tuple[int, ...]] = []
    model.residual.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    plain = reparam.collapse(model)
    assert close(plain(images()), model(images()))
    assert len(seen) == 2
    assert Counts.of(plain).norms == 0


@pytest.mark.parametrize("at", ["stem.conv", "stem.norm"])
def test_hook_on_an_inner_module_is_refused(at: str) -> None:
    """A hook sees what its module computes; folding would show it something else."""
    model = ready(Net())
    seen: list[Tensor] = []
    model.get_submodule(at).register_forward_hook(lambda module, args, output: seen.append(output))
    plain, report = reparam.collapse_with_report(model)
    assert Reason.HOOK in {r.reason for r in [*report.refusals, *report.untraced] if r.layer == at}
    assert Counts.of(plain).norms == 1
    assert seen == []  # not run while compiling either
    plain(images())
    model(images())
    assert torch.equal(seen[0], seen[1])


# ------------------------------------------------------------------ the rest of PyTorch


def collapsed(kind: str) -> tuple[nn.Module, Tensor]:
    return reparam.collapse(ready(SURGERIES[kind]())), maps()


@pytest.mark.parametrize("kind", SURGERIES)
def test_deepcopy(kind: str) -> None:
    plain, x = collapsed(kind)
    other = copy.deepcopy(plain)
    wanted = plain(x)
    assert torch.equal(other(x), wanted)
    next(plain.parameters()).data += 1
    assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("kind", SURGERIES)
def test_save_and_load(kind: str) -> None:
    """Pickled whole, by torch.save; and the state dict into another collapsed network."""
    plain, x = collapsed(kind)
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert isinstance(other, type(plain)) or type(other).__name__ == type(plain).__name__
    assert not any(m.training for m in other.modules())
    assert torch.equal(other(x), plain(x))
    assert list(other.state_dict()) == list(plain.state_dict())
    fresh = reparam.collapse(ready(SURGERIES[kind](), seed=1))
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fresh(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*is deprecated. Please switch:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("kind", SURGERIES)
def test_jit(kind: str, how: str) -> None:
    plain, x = collapsed(kind)
    other = torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, x)
    assert close(other(x), plain(x))


@pytest.mark.parametrize("kind", SURGERIES)
def test_compile(kind: str) -> None:
    plain, x = collapsed(kind)
    torch._dynamo.reset()
    assert close(torch.compile(plain, backend="eager", fullgraph=True)(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", SURGERIES)
def test_export(kind: str) -> None:
    plain, x = collapsed(kind)
    assert close(torch.export.export(plain, (x,)).module()(x), plain(x))


@pytest.mark.parametrize("kind", SURGERIES)
def test_symbolic_trace(kind: str) -> None:
    plain, x = collapsed(kind)
    assert torch.equal(torch.fx.symbolic_trace(plain)(x), plain(x))


@pytest.mark.parametrize("kind", SURGERIES)
def test_moves_and_trains(kind: str) -> None:
    """``to``, ``train`` and an optimiser step reach the folded layers."""
    plain, x = collapsed(kind)
    plain.double().train()
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = [p.detach().clone() for p in plain.parameters()]
    plain(x.double()).square().sum().backward()
    optimiser.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))


# ------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def resnet() -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return ready(timm.create_model("test_resnet", num_classes=7))


def test_methods_beside_forward_still_work(resnet: Any) -> None:
    plain = reparam.collapse(resnet)
    x = images(size=64)
    assert type(plain) is type(resnet)
    assert Counts.of(plain).norms == 0
    assert close(plain.forward_features(x), resnet.forward_features(x))
    assert close(plain.forward_head(plain.forward_features(x), pre_logits=True), resnet.forward_head(
        resnet.forward_features(x), pre_logits=True))  # fmt: skip
    plain.reset_classifier(3)
    assert plain(x).shape == (2, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["levit_128s", pytest.param("efficientvit_m0", marks=pytest.mark.slow)])
def test_tracing_leaves_no_mark_on_attention_caches(name: str) -> None:
    """These keep an attention bias of their last forward; a Proxy left there would break the caller's model."""
    timm = pytest.importorskip("timm")
    model = ready(timm.create_model(name))
    before, state = snapshot(model), torch.get_rng_state()
    plain = reparam.collapse(model)
    assert is_unchanged(model, before)
    assert torch.equal(state, torch.get_rng_state())
    for module in [*model.modules(), *plain.modules()]:
        values = [v for v in vars(module).values() if not isinstance(v, dict)]
        values += [v for table in vars(module).values() if isinstance(table, dict) for v in table.values()]
        assert not any(isinstance(value, torch.fx.Proxy) for value in values)
    copy.deepcopy(plain)


# ------------------------------------------------------------------ like=


class Stock(nn.Module):
    """A plain architecture: what an expanded network is folded back to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.block = Residual()
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Training(Stock):
    """The same with a branch in the block, which is gone after folding."""

    def __init__(self) -> None:
        super().__init__()
        self.block = BranchedResidual()


class BranchedResidual(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = TwoBranches()
        self.bn1 = nn.Identity()


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main, self.extra = ConvBN(), ConvBN(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.extra(x)


@pytest.mark.parametrize("trained", [Stock, Training])
def test_like_loads_into_the_stock_architecture(trained: type[Stock]) -> None:
    """The state dict loads strictly into stock code and computes the same; its norms are exact identities."""
    model, x = ready(trained()), images()
    result = reparam.collapse(model, like=Stock(), example_inputs=x)
    stock = Stock().eval()
    stock.load_state_dict(result.state_dict(), strict=True)
    assert type(result) is Stock
    assert not result.training
    assert close(stock(x), model(x))
    for norm in (m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)):
        assert bool((norm.weight == 1).all())
        assert bool((norm.running_mean == 0).all())
        assert bool((norm.running_var + norm.eps == 1).all())
    plain = reparam.collapse(model)
    assert torch.equal(plain.head(maps().mean((2, 3))), stock.head(maps().mean((2, 3))))
    assert torch.equal(reparam.collapse(stock).block.conv1.weight, stock.block.conv1.weight)


def test_like_does_not_touch_either_model() -> None:
    model, like = ready(Training()).train(), Stock().train()
    before, architecture = snapshot(model), snapshot(like)
    reparam.collapse(model, like=like)
    assert is_unchanged(model, before)
    assert is_unchanged(like, architecture)


def test_like_timm_resnet(resnet: Any) -> None:
    import timm

    like = timm.create_model("test_resnet", num_classes=7)
    result = reparam.collapse(resnet, like=like)
    like.load_state_dict(result.state_dict(), strict=True)
    assert close(like.eval()(images(size=64)), resnet(images(size=64)))


def test_like_of_another_architecture() -> None:
    """The error names a layer of another shape, one that lacks, and one too many; inplace= makes no sense with it."""
    model = ready(Stock())
    wide = Stock()
    wide.head = nn.Linear(WIDTH, 9)
    with pytest.raises(ReparamError, match=r"head\.weight has shape \(4, 8\)"):
        reparam.collapse(model, like=wide)
    more = Stock()
    more.extra = nn.Linear(2, 2)
    with pytest.raises(ReparamError, match=r"lacks extra\.weight"):
        reparam.collapse(model, like=more)
    less = Stock()
    del less.head
    with pytest.raises(ReparamError, match=r"has head\.weight"):
        reparam.collapse(model, like=less)
    with pytest.raises(ReparamError, match="inplace"):
        reparam.collapse(model, like=Stock(), inplace=True)


def test_like_that_computes_something_else() -> None:
    """Same names and shapes, another stride: caught by comparing on the inputs."""
    like = Stock()
    like.stem[0].stride = (2, 2)
    with pytest.raises(EquivalenceError):
        reparam.collapse(ready(Stock()), like=like, example_inputs=images())


class Positions(Stock):
    """With a buffer that no state dict holds, and one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.rand(4), persistent=False)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(self.stem(x)).mean((2, 3))) + self.shift


class TrainingPositions(Positions):
    def __init__(self) -> None:
        super().__init__()
        self.block = BranchedResidual()


@pytest.mark.parametrize(("trained", "stock"), [(Stock, Stock), (Training, Stock), (TrainingPositions, Positions)])
def test_like_without_numbers_gives_the_same(trained: type[Stock], stock: type[Stock]) -> None:
    """On the meta device the architecture takes no memory; what comes back holds all of its numbers."""
    model = ready(trained())
    with torch.device("meta"):
        like = stock()
    result = reparam.collapse(model, like=like)
    assert all(tensor.is_meta for tensor in like.state_dict().values())
    assert close(result(images()), model(images()))
    wanted = reparam.collapse(model, like=stock()).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in result.state_dict().items())
    if stock is Positions:
        assert result.again.weight is result.head.weight


def test_like_without_numbers_that_nothing_fills() -> None:
    with torch.device("meta"):
        like = Positions()
    with pytest.raises(ReparamError, match="shift of like= is in no state dict and on the meta device"):
        reparam.collapse(ready(Training()), like=like)


def test_like_keeps_the_dtype_it_was_given() -> None:
    """Numbers are cast to the architecture's dtype, where the norms are identities as well."""
    model = ready(Stock()).double()
    result = reparam.collapse(model, like=Stock().double())
    x = images(dtype=torch.float64)
    assert float((result(x) - model(x)).detach().abs().max()) < 1e-12


# ------------------------------------------------------------------ import


QUICK = 0.15
"""Seconds; the least of up to three tries counts."""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What importing the package costs and loads, in a fresh process."""
    code = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import reparam
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""
    runs: list[dict[str, Any]] = []
    while len(runs) < 3 and not any(run["seconds"] < QUICK for run in runs):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    return min(runs, key=lambda run: run["seconds"])


@pytest.mark.parametrize("name", ["timm", "torchvision", "typer", "rich", "networkx", "zoo", "torch._dynamo"])
def test_import_is_lean(name: str, imported: dict[str, Any]) -> None:
    found = imported["modules"] if name in ("torch._dynamo", "networkx") else imported["all"]
    assert name not in found


def test_import_is_quick(imported: dict[str, Any]) -> None:
    """Under 50 ms of its own beyond torch's import; measured in processor time, with room for a slow machine."""
    assert imported["seconds"] < QUICK


def test_all_names_exist() -> None:
    assert sorted(reparam.__all__) == reparam.__all__
    assert all(hasattr(reparam, name) for name in reparam.__all__)
