"""What a person may choose: left-over norms as a scale and shift, and fewer calls at the price of more numbers."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Net, lively
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import reparam
from passes.edits.errors import EditError
from passes.edits.text import from_text, to_text
from reparam import Explanation, ReparamError, ScaleShift
from reparam.cli import app


def conv(inp: int = 8, out: int = 8, kernel: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, **options)


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) and m.running_var is not None for m in model.modules())


def both(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, Explanation]:
    """The result, once it is seen to compute the same, the model untouched, and the plan to say what was done."""
    model = lively(model)
    wanted, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    planned = reparam.explain(model, x, **options)
    result, report = reparam.collapse_with_report(model, example_inputs=x, **options)
    with torch.no_grad():
        assert torch.allclose(result(x), wanted, atol=1e-10)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [f.layers for f in planned.folds] == [f.layers for f in report.folds]
    assert planned.refusals == report.refusals
    assert all(fold.error is not None and fold.error < 1e-12 for fold in report.folds)
    return result, report


IMAGE, LINE, ROW = (2, 8, 9, 9), (2, 8, 9), (3, 8)


# ------------------------------------------------------------------ norms="affine"


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(x)


class Preactivated(nn.Module):
    """As a dense layer: a norm behind a concatenation, used as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = conv(8, 8, padding=1), Activated(16), conv(16, 8, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([x, self.first(x)], 1)))


class Auxiliary(nn.Module):
    """A norm that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv(), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return (y, self.head(y)) if self.training else y


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.relu()


AFFINE: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("behind an activation", lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()), IMAGE),
    ("before padding", lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), conv(padding=1)), IMAGE),
    ("in one dimension", lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()), LINE),
    ("of features", lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()), ROW),
    ("instance norm", lambda: nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(8, 1e-5, 0.1, True, True)), IMAGE),
    ("with its activation", lambda: nn.Sequential(nn.ReLU(), Activated(8), conv(padding=1)), IMAGE),
    ("behind a concatenation", Preactivated, IMAGE),
    ("of an output that is read twice", lambda: ReadTwice(), IMAGE),
    ("that only training runs", Auxiliary, IMAGE),
]  # fmt: skip


@pytest.mark.parametrize(("build", "shape"), [case[1:] for case in AFFINE], ids=[case[0] for case in AFFINE])
def test_a_left_over_norm_becomes_one_scale_and_shift(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model, x = build().eval(), torch.randn(shape, dtype=torch.float64)
    kept, plain = both(model, x)
    result, report = both(model, x, norms="affine")
    assert norms_in(kept) == norms_in(model) == 1
    assert norms_in(result) == 0
    (made,) = (m for m in result.modules() if isinstance(m, ScaleShift))
    assert report.after is not None
    assert plain.after is not None
    assert (report.after.norms, plain.after.norms) == (0, 1)
    channels = made.channels
    assert sum(t.numel() for t in result.state_dict().values()) < sum(t.numel() for t in kept.state_dict().values())
    assert (report.folds[-1].numbers_before, report.folds[-1].numbers_after) == (4 * channels, 2 * channels)
    assert f"ScaleShift({channels})" in str(report)
    again, second = both(result, x, norms="affine")
    assert not second.folds
    assert torch.equal(again(x), result(x))
    assert torch.equal(pickle.loads(pickle.dumps(result))(x), result(x))


@pytest.mark.parametrize(
    ("build", "shape", "reason"),
    [
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, track_running_stats=False)), IMAGE, "the batch's own"),
        (lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8, affine=False)), IMAGE, "16 numbers instead of 16"),
        (lambda: Net(lambda m, x: m.n(m.n(x.relu()).relu()), n=nn.BatchNorm2d(8)), IMAGE, "used in several places"),
        (lambda: (lambda n: nn.Sequential(nn.ReLU(), n, nn.ReLU(), n))(nn.BatchNorm2d(8)), IMAGE, "several places"),
        (lambda: nn.Sequential(nn.ReLU(), nn.InstanceNorm2d(8, affine=True)), IMAGE, "statistics of each input"),
    ],
    ids=["batch statistics", "no gain", "called twice", "registered twice", "instance norm"],
)
def test_where_that_is_no_gain_or_not_exact_it_stays_with_a_reason(
    build: Callable[[], nn.Module], shape: tuple[int, ...], reason: str
) -> None:
    result, report = both(build(), torch.randn(shape, dtype=torch.float64), norms="affine")
    assert not any(isinstance(m, ScaleShift) for m in result.modules())
    assert any(reason in refusal.message for refusal in report.refusals)


def test_without_the_rank_the_fix_is_named() -> None:
    report = reparam.explain(lively(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU())), norms="affine")
    assert [r.message for r in report.refusals] == ["number of dimensions unknown; pass example_inputs"]


def test_numbers_of_another_dtype_stay_a_norm() -> None:
    """A norm gives its input's dtype, arithmetic would give the wider one."""
    model = nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()).half().eval()
    model[2].float()
    result, report = reparam.collapse_with_report(model, norms="affine")
    assert norms_in(result) == 1
    assert "of another dtype" in {r.layer: r.message for r in report.refusals}["2"]


def test_a_hook_keeps_the_norm_and_is_named() -> None:
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()))
    model[1].register_forward_hook(lambda *_: None)
    result, report = reparam.collapse_with_report(model, norms="affine")
    assert norms_in(result) == 1
    assert any("hook" in r.message for r in report.refusals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_the_exact_ones_rounded_once(dtype: torch.dtype) -> None:
    model = lively(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())).to(dtype)
    norm = model[2]
    result = reparam.collapse(model, norms="affine")
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - scale * norm.running_mean.double()
    assert torch.equal(result[2].weight.flatten(), scale.to(dtype))
    assert torch.equal(result[2].bias.flatten(), shift.to(dtype))


def test_memory_layout_and_training_are_kept() -> None:
    model = lively(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8))).to(memory_format=torch.channels_last)
    result = reparam.collapse(model, norms="affine")
    x = torch.randn(IMAGE, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert result(x).is_contiguous(memory_format=torch.channels_last)
    result(x).sum().backward()
    assert result[2].weight.grad is not None


def test_edits_say_it_are_written_and_read_and_undone_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()))
    report = reparam.collapse_with_report(model, norms="affine")[1]
    assert [str(edit) for edit in report.edits] == ["replace 2 by ScaleShift(8)"]
    assert from_text(to_text(report.edits)) == report.edits
    monkeypatch.setattr(ScaleShift, "forward", lambda self, x: x)
    with pytest.raises(reparam.EquivalenceError):
        reparam.collapse(model, norms="affine", strict=True, inplace=True)
    assert type(model[2]) is nn.BatchNorm2d
    kept, taken = reparam.collapse_with_report(model, norms="affine")
    assert norms_in(kept) == 1
    assert taken.taken_back


@pytest.mark.parametrize(
    ("old", "new"), [('"channels",8', '"channels",-8'), ('"dims",2', '"dims",99'), ("dims", "dim")]
)
def test_a_description_of_it_is_checked_when_it_is_read(old: str, new: str) -> None:
    model = lively(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU()))
    text = to_text(reparam.collapse_with_report(model, norms="affine")[1].edits)
    assert old in text
    with pytest.raises(EditError):
        from_text(text.replace(old, new))


@pytest.mark.parametrize("decompose", [False, True])
def test_in_an_exported_program(decompose: bool) -> None:
    model, x = lively(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())), torch.randn(IMAGE).double()
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decompose else program
    result, report = reparam.collapse_with_report(program, norms="affine")
    assert report.after is not None
    assert report.after.norms == 0
    assert torch.allclose(result.module()(x), model(x), atol=1e-12)
    assert result.state_dict["2.weight"].numel() + result.state_dict["2.bias"].numel() == 16
    assert "2.running_mean" not in result.state_dict
    result.run_decompositions()
    assert [f.layers for f in reparam.explain(program, norms="affine").folds] == [f.layers for f in report.folds]


def test_a_file_of_it_is_read_again(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    runner, file = CliRunner(), tmp_path / "affine.safetensors"
    done = runner.invoke(app, ["collapse", "timm:resnetv2_18", "--norms", "affine", "-o", str(file)])
    assert done.exit_code == 0, done.output
    again = runner.invoke(app, ["verify", "timm:resnetv2_18", str(file)])
    assert again.exit_code == 0, again.output


# ------------------------------------------------------------------ cost="layers"


def branches(*layers: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.a(x) + m.b(x), a=layers[0], b=layers[1])


GROWS: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("bottleneck", lambda: nn.Sequential(conv(8, 2, 1), conv(2, 8), nn.BatchNorm2d(8)), 4),
    ("separable", lambda: nn.Sequential(conv(8, 8, groups=8), conv(8, 8, 1), nn.BatchNorm2d(8)), 4),
    ("two 3x3", lambda: nn.Sequential(conv(), conv()), 1.4),
    ("cross", lambda: branches(conv(8, 8, (1, 3), padding=(0, 1)), conv(8, 8, (3, 1), padding=(1, 0))), 1.5),
    ("depthwise beside dense", lambda: branches(conv(8, 8, padding=1, groups=8), conv(8, 8, 1)), 4),
    ("1x1 before pooling", lambda: nn.Sequential(conv(8, 8, 1), nn.AvgPool2d(2)), 4),
]


@pytest.mark.parametrize(("build", "factor"), [case[1:] for case in GROWS], ids=[case[0] for case in GROWS])
def test_for_fewer_calls_one_layer_may_cost_more(build: Callable[[], nn.Module], factor: float) -> None:
    model, x = build(), torch.randn(IMAGE, dtype=torch.float64)
    result, report = both(model, x, cost=f"layers:{factor}")
    (fold,) = report.folds
    assert sum(isinstance(m, nn.Conv2d) for m in result.modules()) == 1
    assert 1 < fold.numbers_after / fold.numbers_before <= factor
    assert fold.multiply_adds_after <= factor * fold.multiply_adds_before
    told = f"{fold.numbers_before} -> {fold.numbers_after} numbers"
    assert report.growth() is not None
    assert told in str(report)
    plain = both(model, x)[1]
    assert plain.growth() is None
    assert all(f.numbers_after <= f.numbers_before for f in plain.folds)
    below = max(1.0, fold.numbers_after / fold.numbers_before - 0.01)
    assert both(model, x, cost=f"layers:{below}")[1].growth() is None


def test_the_factor_is_of_the_layers_that_there_were_not_of_folds_of_them() -> None:
    model, x = nn.Sequential(*[conv() for _ in range(4)]), torch.randn(2, 8, 12, 12, dtype=torch.float64)
    for factor, count in ((1.3, 4), (2.0, 2), (2.2, 2), (2.3, 1)):  # a 9x9 is 2.25 times four 3x3
        result, report = both(model, x, cost=f"layers:{factor}")
        assert sum(isinstance(m, nn.Conv2d) for m in result.modules()) == count
        for fold in report.folds:
            assert fold.numbers_before == len(fold.layers) * (8 * 8 * 9 + 8)
            assert fold.numbers_after <= factor * fold.numbers_before


def test_what_is_not_exact_stays_whatever_it_may_cost() -> None:
    model = nn.Sequential(conv(padding=1), conv(padding=1))
    report = both(model, torch.randn(IMAGE, dtype=torch.float64), cost="layers:1000")[1]
    assert not report.folds
    assert "zero padding between two kernels" in str(report)


def test_no_layer_grows_for_nothing() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
    assert not both(model, torch.randn(IMAGE, dtype=torch.float64), cost="layers:100")[1].folds


def test_layers_alone_is_a_factor_of_four() -> None:
    model, x = nn.Sequential(conv(8, 2, 1), conv(2, 8)), torch.randn(IMAGE, dtype=torch.float64)
    reports = [both(model, x, cost=cost)[1] for cost in ("layers", "layers:4")]
    assert [f.numbers_after for f in reports[0].folds] == [f.numbers_after for f in reports[1].folds] == [584]


def test_in_an_exported_program_and_in_a_file(tmp_path: Path) -> None:
    model, x = lively(nn.Sequential(conv(8, 2, 1), conv(2, 8))), torch.randn(IMAGE).double()
    program, report = reparam.collapse_with_report(torch.export.export(model, (x,)), cost="layers")
    assert report.after is not None
    assert report.after.convs == 1
    assert torch.allclose(program.module()(x), model(x), atol=1e-12)
    pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model.float(), (x.float(),), str(path), dynamo=True, verbose=False)
    assert reparam.onnx.explain(path, cost="layers").folds
    assert not reparam.onnx.explain(path).folds
    result, told = reparam.onnx.collapse_with_report(path, cost="layers")
    assert [node.op_type for node in result.graph] == ["Conv"]
    assert told.growth() is not None


def test_the_command_line_takes_both_and_refuses_for_onnx_what_is_none_there(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    runner = CliRunner()
    told = runner.invoke(app, ["explain", "timm:mobilenetv2_050", "--cost", "layers:4"])
    assert told.exit_code == 0, told.output
    assert "as cost= allows" in told.output
    left = runner.invoke(app, ["explain", "timm:resnetv2_18", "--norms", "affine"])
    assert "ScaleShift(64)" in left.output
    refused = runner.invoke(app, ["collapse", str(tmp_path / "x.onnx"), "--norms", "affine"])
    assert refused.exit_code != 0
    assert "a scale and shift would be two" in f"{refused.output}{refused.exception}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norms": "fold"}, "norms= is 'keep' or 'affine', got 'fold'"),
        ({"cost": "layer"}, "cost= is 'numbers', 'layers' or 'layers:4'"),
        ({"cost": "layers:0.5"}, "any factor from 1 on"),
        ({"cost": "layers:nan"}, "any factor from 1 on"),
        ({"norms": "affine", "like": nn.Conv2d(3, 8, 3)}, "drop norms= and cost="),
        ({"cost": "layers", "like": nn.Conv2d(3, 8, 3)}, "drop norms= and cost="),
    ],
)
def test_options_that_say_nothing_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ReparamError) as error:
        reparam.collapse(nn.Sequential(nn.Conv2d(3, 8, 3)), **options)
    assert said in str(error.value)
