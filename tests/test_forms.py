"""Forms of training: what they are called, that they are one function, and what each keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import lively
from test_blocks import gap
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import reparam
from passes.algebra.kernels import times_pointwise
from passes.blocks.kit.layers import BranchSum
from passes.edits.carried import made_by
from passes.edits.edit import Block
from passes.edits.text import from_text
from passes.training import forms
from reparam import Form, ReparamError
from reparam.recipe import Recipe

BLOCKS = ("acb", "dbb", "mobileone", "repvgg")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.b(F.relu(self.an(self.a(x)))))  # type: ignore[no-any-return]


def built(block: str, form: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return reparam.expand(lively(Net()), block, form=form, init="paper", where="all", verify=False, **options).train()


def images(batch: int = 16, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("branches", Form()),
        ("sampled", Form("sampled")),
        ("sampled:fraction=1/4", Form("sampled", fraction=0.25)),
        ("sampled:rows=strided,fraction=0.5", Form("sampled", 0.5, "strided")),
        ("frozen", Form("frozen")),
    ],
)
def test_a_form_is_its_text(text: str, form: Form) -> None:
    assert Form.of(text) == form
    assert Form.of(str(form)) == form
    assert Form.of(form) is form


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "no form 'half'; known: branches, online, sampled, frozen"),
        ("sampled:fraction=0", "above 0 and at most 1"),
        ("sampled:fraction=2", "above 0 and at most 1"),
        ("sampled:fraction=a", "written 1/4 or 0.25"),
        ("sampled:rows=last", "first or strided"),
        ("sampled:part=1", "written as sampled:fraction"),
        ("frozen:fraction=1/4", "takes no options"),
        (3, "a form is one of"),
    ],
)
def test_another_form_is_an_error_that_says_what_there_is(text: Any, message: str) -> None:
    with pytest.raises(ReparamError, match=message):
        reparam.expand(Net(), "acb", form=text)


def test_online_is_the_former_name() -> None:
    with pytest.warns(DeprecationWarning, match="now form='online'"):
        expanded: Any = reparam.expand(Net(), "acb", online=True)
    assert expanded.a.form == "online"
    with pytest.raises(ReparamError, match="former name"):
        reparam.expand(Net(), "acb", online=True, form="online")


def test_recipes_and_edits_of_before_are_read() -> None:
    old = '{"block": {"name": "acb", "options": {}}, "where": null, "init": "preserve", "online": true}'
    assert Recipe.from_text(old) == Recipe(reparam.Block("acb"), where="all", form="online")
    edits = from_text('{"version": 1, "edits": [{"Block": {"path": "a", "block": "acb", "online": true}}]}')
    assert edits == [Block("a", "acb", form="online")]


# ------------------------------------------------------------------ one function


@pytest.mark.parametrize("block", BLOCKS)
def test_forms_share_state_and_are_one_function_in_evaluation(block: str) -> None:
    model = built(block, "branches").eval()
    wanted = model(images())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for form in ("sampled", "frozen", "sampled:fraction=1/2,rows=strided", "branches"):
        assert reparam.set_form(model, form) is model
        assert gap(model(images()), wanted) < 1e-12
        assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    fresh = built(block, "sampled").eval()
    fresh.load_state_dict(state, strict=True)
    assert gap(fresh(images()), wanted) < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_a_sample_is_the_statistics_of_its_rows(block: str) -> None:
    """With two equal halves, one half is a sample of everything."""
    half = images(8)
    x = torch.cat([half, half])
    whole, part = built(block, "branches"), built(block, "sampled:fraction=1/2")
    assert gap(part(x), whole(x)) < 1e-9
    moved = part.state_dict()
    for name, a in whole.state_dict().items():
        if "running" in name:
            assert gap(a, moved[name]) < (1e-3 if "var" in name else 1e-10), name  # n / (n - 1)
        else:
            assert torch.equal(a, moved[name]), name
    strided = built(block, "sampled:fraction=1/2,rows=strided")
    assert (
        gap(strided(torch.stack([half, half], 1).flatten(0, 1)), whole(torch.stack([half, half], 1).flatten(0, 1)))
        < 1e-9
    )


def test_frozen_leaves_statistics_alone_and_trains_what_it_folds() -> None:
    model = built("dbb", "frozen")
    before = {name: value.clone() for name, value in model.a.named_buffers()}
    model(images()).square().mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.a.named_buffers())
    assert all(p.grad is not None for p in model.a.parameters())
    reference = built("dbb", "branches")
    for module in [*reference.a.modules(), *reference.b.modules()]:
        module.eval()
    assert gap(model(images()), reference(images())) < 1e-9


def test_norms_in_evaluation_are_folded_as_they_are() -> None:
    model, reference = built("acb", "sampled"), built("acb", "branches")
    for each in (model, reference):
        for module in each.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    assert gap(model(images()), reference(images())) < 1e-12


def test_a_small_batch_is_normalised_whole_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "reparam")
    model, reference = built("acb", "sampled"), built("acb", "branches")
    caplog.clear()
    for _ in range(2):
        assert torch.equal(model(images(4, 6)), reference(images(4, 6)))
    assert len([record for record in caplog.records if "whole batch" in record.message]) == 2  # one per block


def batches_of_lines(block: Any, x: Tensor) -> list[int]:
    """Of how many images the convolutions of all branches but the main one are."""
    seen: list[int] = []

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (F.conv2d, torch.conv2d) and args[1].shape[2:] != block.square.conv.weight.shape[2:]:
                seen.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Note():
        block(x)
    assert seen
    return seen


@pytest.mark.parametrize(("form", "rows"), [("sampled", 8), ("sampled:fraction=1/2", 4), ("sampled:fraction=1/4", 8)])
def test_a_sample_that_would_have_to_be_half_of_the_batch_is_all_of_it(form: str, rows: int) -> None:
    """Of maps of 8x8 positions four are enough: half of eight images, which nobody asked for, costs more than all."""
    assert set(batches_of_lines(built("acb", form).a, images(8, 8))) == {rows}


def test_fewer_convolutions_run_over_the_whole_batch() -> None:
    assert set(batches_of_lines(built("acb", "sampled").a, images(64))) == {8}


def test_a_lone_branch_is_one_convolution_in_each_form() -> None:
    model = built("doconv", "sampled")
    assert not isinstance(model.a, BranchSum)
    assert gap(reparam.set_form(model, "frozen")(images()), built("doconv", "branches")(images())) == 0


# ------------------------------------------------------------------ switching


def test_online_is_no_form_that_one_can_switch_to() -> None:
    model = built("acb", "branches")
    with pytest.raises(ReparamError, match="a was built as branches and cannot train as online"):
        reparam.set_form(model, "online")
    with pytest.raises(ReparamError, match="a was built as online and cannot train as sampled"):
        reparam.set_form(built("acb", "online"), "sampled")
    with pytest.raises(ReparamError, match="no block in this network"):
        reparam.set_form(Net(), "sampled")
    assert model.a.form == "branches"


def test_the_edits_remember_the_form() -> None:
    model = built("acb", "branches")
    reparam.set_form(model, "sampled:fraction=1/4")
    edits = [edit for edit in made_by(model) or () if isinstance(edit, Block)]
    assert {edit.form for edit in edits} == {"sampled:fraction=0.25"}


def test_copies_pickles_and_casts_train_on() -> None:
    model = built("dbb", "sampled")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert gap(other(images()), copy.deepcopy(model)(images())) == 0
    assert model.float()(images().float()).dtype == torch.float32


@pytest.mark.parametrize("form", ["online", "sampled", "frozen"])
def test_what_comes_out_of_a_pickle_collapses_before_its_first_forward(form: str) -> None:
    """Recording a block's code inside the trace of the network would not end."""
    loaded = pickle.loads(pickle.dumps(built("acb", form).eval()))
    assert gap(reparam.collapse(loaded)(images()), loaded(images())) < 1e-10


def test_collapse_tells_of_statistics_of_samples(caplog: pytest.LogCaptureFixture) -> None:
    model = built("acb", "sampled")
    assert not reparam.collapse_with_report(copy.deepcopy(model).eval())[1].notes
    model(images())
    for like in (None, Net().double()):
        caplog.clear()
        _, report = reparam.collapse_with_report(copy.deepcopy(model).eval(), like=like)
        assert any("update_statistics" in note for note in report.notes)
    reparam.update_statistics(model, [images(), images()])
    assert model.training
    assert not any("update_statistics" in note for note in reparam.collapse_with_report(model.eval())[1].notes)


def test_updated_statistics_are_those_of_whole_batches() -> None:
    model, reference = built("dbb", "sampled"), built("dbb", "branches")
    batches = [images(), 2 * images()]
    reparam.update_statistics(model, batches)
    torch.optim.swa_utils.update_bn(batches, reference)
    for (name, a), b in zip(reference.named_buffers(), model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12), name
    assert model.a.form == "sampled"
    assert model.a.folded is not None


def failing(error: Exception) -> Iterator[Tensor]:
    yield images()
    raise error


@pytest.mark.parametrize("form", ["branches", "sampled", "frozen"])
@pytest.mark.parametrize("batches", ["none", "a loader that fails"])
def test_statistics_stay_where_none_are_measured(form: str, batches: str) -> None:
    model = built("dbb", form)
    next(m for m in model.modules() if isinstance(m, _BatchNorm)).eval()
    model.bn.momentum = 0.3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    if batches == "none":
        with pytest.raises(ReparamError, match="gives no batch"):
            reparam.update_statistics(model, iter(()))
    else:
        with pytest.raises(OSError, match="disk"):
            reparam.update_statistics(model, failing(OSError("disk")))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(m.training, getattr(m, "momentum", None)) for m in model.modules()] == told
    assert model.a.folded is not None
    reparam.update_statistics(model, [images()])
    assert [(m.training, getattr(m, "momentum", None)) for m in model.modules()] == told


def test_norms_that_measure_nothing_keep_their_statistics() -> None:
    """Some are kept in evaluation by the network's own train(), some are not called."""

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.BatchNorm2d(8)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.an.eval()
            return self

    model: Any = reparam.expand(lively(Frozen()), "acb", where="b", form="sampled", verify=False).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    reparam.update_statistics(model, [images()])
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]) == name.startswith(("an.", "bn.", "unused.")), name


@pytest.mark.parametrize("then", ["branches", "frozen", "sampled", "sampled:fraction=1/4"])
def test_another_form_does_not_forget_statistics_of_samples(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "FORGOTTEN", 4)

    def is_told(model: nn.Module) -> bool:
        return any("update_statistics" in note for note in reparam.collapse_with_report(model.eval())[1].notes)

    model = built("acb", "sampled:fraction=1/2")
    model(images())
    for form in (then, "frozen"):
        reparam.set_form(model, form)
        assert is_told(copy.deepcopy(model))
        assert is_told(pickle.loads(pickle.dumps(model)))
    reparam.set_form(model, "branches")
    for _ in range(forms.FORGOTTEN):
        assert is_told(copy.deepcopy(model))
        model.a(images(2, 2))
        model.b(torch.randn(2, 8, 2, 2, dtype=torch.float64))
    assert not is_told(copy.deepcopy(model))
    assert not is_told(reparam.set_form(built("acb", "branches"), "sampled"))


# ------------------------------------------------------------------ tools


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("form", ["branches", "sampled", "frozen", "online"])
@pytest.mark.parametrize(
    "block", ["acb", "dbb", "doconv", "ecb", "orepa", "difference", "conv3xc", "repnext", "repvgg"]
)
def test_blocks_are_scripted(block: str, form: str, tmp_path: Path) -> None:
    model = built(block, form).eval()
    scripted = torch.jit.script(model)  # type: ignore[no-untyped-call]
    scripted.save(tmp_path / "net.pt")
    assert gap(torch.jit.load(tmp_path / "net.pt")(images()), model(images())) < 1e-9  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("form", ["branches", "sampled", "frozen", "online"])
def test_a_block_that_tells_its_weight_is_scripted(form: str) -> None:
    """One in whose place a norm stood answers libraries that fold; TorchScript has no word for that."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)).double()
    model = reparam.expand(plain.eval(), "repvgg", form=form)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    scripted = torch.jit.script(model)  # type: ignore[no-untyped-call]
    assert gap(scripted(x), model(x)) < 1e-9


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_frozen_block_does_not_measure_in_a_script() -> None:
    model = built("acb", "frozen")
    scripted = torch.jit.script(model)  # type: ignore[no-untyped-call]
    with pytest.raises(Exception, match="norms would measure"):
        scripted(images())
    assert gap(scripted.eval()(images()), model.eval()(images())) < 1e-9


@pytest.mark.parametrize("form", ["sampled:fraction=1/2", "frozen", "online"])
def test_a_skeleton_on_the_meta_device_runs_with_other_weights(form: str) -> None:
    model = built("acb", form)
    base = copy.deepcopy(model).to("meta")
    state = {**dict(model.named_parameters()), **{name: b.clone() for name, b in model.named_buffers()}}
    got = torch.func.functional_call(base, state, (images(),))
    assert gap(got, model(images())) < 1e-12
    with torch.device("meta"):
        skeleton = reparam.expand(Net(), "acb", form=form, init="paper").double()
    loaded = skeleton.to_empty(device="cpu").eval()
    loaded.load_state_dict(model.state_dict())
    assert gap(loaded(images()), model.eval()(images())) < 1e-12


def test_mixed_precision_measures_and_folds_in_float32() -> None:
    model = built("dbb", "sampled:fraction=1").float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images().float())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(
        p.grad is None or (p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())) for p in model.parameters()
    )
    assert all(b.dtype in (torch.float32, torch.int64) for b in model.buffers())


@pytest.mark.parametrize("form", ["sampled:fraction=1", "sampled:fraction=1/2", "frozen", "branches"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_precision_trains_in_each_form(form: str, dtype: torch.dtype) -> None:
    model = built("dbb", form)
    wanted = copy.deepcopy(model)(images())
    low = model.to(dtype)
    y = low(images().to(dtype))
    assert y.dtype == dtype
    assert gap(y.double(), wanted) < 0.05
    y.float().square().mean().backward()
    assert reparam.verify(low.eval(), reparam.collapse(low), images().to(dtype)).ok
    assert all(p.grad is None or (p.grad.dtype == dtype and bool(p.grad.isfinite().all())) for p in low.parameters())


def test_second_derivatives_and_checkpoints() -> None:
    block = built("acb", "sampled:fraction=1").a
    x = images(2, 5).requires_grad_()
    (first,) = torch.autograd.grad(block(x).pow(3).sum(), x, create_graph=True)
    reference = built("acb", "branches").a
    (wanted,) = torch.autograd.grad(reference(x).pow(3).sum(), x, create_graph=True)
    assert gap(first, wanted) < 1e-7
    (second,) = torch.autograd.grad(first.square().sum(), x)
    (wanted,) = torch.autograd.grad(wanted.square().sum(), x)
    assert gap(second, wanted) < 1e-5 * float(wanted.abs().max())


def test_a_norm_called_twice_cannot_be_sampled() -> None:
    model = built("acb", "branches")
    norm = model.a.square.norm
    model.a.line0.norm = norm
    with pytest.raises(ReparamError, match="cannot train as sampled"):
        reparam.set_form(model, "sampled")
    assert model.a.form == "branches"


def test_forms_are_listed() -> None:
    assert forms.FORMS == ("branches", "online", "sampled", "frozen")


@pytest.mark.parametrize("form", ["online", "frozen", "sampled"])
def test_the_recorded_code_is_followed_by_a_tracer_of_others(form: str) -> None:
    block = reparam.expand(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)), "dbb", form=form).eval()
    x = torch.randn(4, 6, 8, 8)
    traced = torch.fx.symbolic_trace(block)
    torch.testing.assert_close(traced(x), block(x))
    assert not [node for node in traced.graph.nodes if node.target is torch.conv1d]


@pytest.mark.parametrize("form", ["branches", "sampled", "sampled:fraction=1", "frozen", "online"])
def test_a_tracer_of_others_may_come_in_training(form: str) -> None:
    """It finds the branches where norms measure, as libraries that cut a network at its nodes trace both modes."""
    model = built("acb", form)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    if form == "sampled":
        reparam.set_form(model, "branches")
    assert gap(traced(images()), model(images())) < 1e-9


def test_products_of_kernels_are_recorded_as_such() -> None:
    """In float32 on the CPU they run as convolutions, elsewhere as products of matrices, with the same numbers."""
    block: Any = reparam.expand(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1)), "dbb", form="online")[0]
    program = block.folded.program
    code = program._run.__func__.__code__
    assert "passes_algebra_kernels_times_pointwise" in code.co_names
    assert "convolution" not in code.co_names
    b, a = torch.randn(5, 6, 9, dtype=torch.float64), torch.randn(6, 4, 1, dtype=torch.float64)
    wanted = torch.einsum("omt,mi->oit", b, a[:, :, 0])
    torch.testing.assert_close(times_pointwise(b, a), wanted)
    torch.testing.assert_close(times_pointwise(b.float(), a.float()), wanted.float())
    assert times_pointwise(b, a).shape == times_pointwise(b.float(), a.float()).shape == (5, 4, 9)
