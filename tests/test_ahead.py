"""A map per channel that the layers behind it take over: norms before pooling, flattening and linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_networks import collapsed_as_planned, norms_used, ready, snapshot, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
import reparam.onnx
from passes.laws import values
from passes.proof import prove
from passes.refusal import Reason

Code = Callable[..., Any]


class Ahead(nn.Module):
    """Norms that follow no layer, the layers behind them, and code that joins them."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.n, self.m, self.five, self.rows = (
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(5),
            nn.BatchNorm1d(6),
        )
        self.a, self.b, self.wide = nn.Linear(6, 5), nn.Linear(6, 3, bias=False), nn.Linear(12, 5)
        self.flat, self.cells, self.few = nn.Linear(6 * 48, 4), nn.Linear(36, 4), nn.Linear(3, 4)
        self.large = nn.Linear(6, 50, bias=False)
        self.one, self.three, self.padded = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 3), nn.Conv2d(6, 5, 3, padding=1)
        self.both, self.up, self.line = nn.Conv2d(12, 5, 1), nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv1d(6, 5, 3)
        self.deep, self.deeper = nn.Conv2d(6, 30, 3), nn.Conv2d(6, 30, 1)
        self.drop, self.inplace = nn.Dropout(0.3), nn.Dropout(0.3, inplace=True)
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x.relu())


MAPS = torch.randn(2, 6, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SPACE = (2, 3)


def built(code: Code) -> Any:
    torch.manual_seed(0)
    return ready(Ahead(code)).double()


def collapsed(code: Code) -> tuple[Any, reparam.Explanation]:
    return collapsed_as_planned(built(code), (MAPS,))


def used(model: nn.Module) -> set[str]:
    return norms_used(model, (MAPS,))


TAKEN: dict[str, tuple[list[str], Code]] = {
    "mean": (["a"], lambda m, x: m.a(m.n(x).mean(SPACE))),
    "pooled and flat": (["a"], lambda m, x: m.a(F.adaptive_avg_pool2d(m.n(x), 1).flatten(1))),
    "dropout": (["a"], lambda m, x: m.a(m.drop(m.n(x).mean(SPACE)))),
    "dropout in place": (["a"], lambda m, x: m.a(m.inplace(m.n(x).mean(SPACE)))),
    "two heads": (["a", "b"], lambda m, x: (lambda h: m.a(h).sum() + m.b(h))(m.n(x).mean(SPACE))),
    "flat": (["flat"], lambda m, x: m.flat(m.n(x).flatten(1))),
    "flat, the channels last": (["flat"], lambda m, x: m.flat(m.n(x).permute(0, 2, 3, 1).flatten(1))),
    "cells": (["cells"], lambda m, x: m.cells(F.adaptive_avg_pool2d(m.n(x), (2, 3)).flatten(1))),
    "cells, turned": (
        ["cells"],
        lambda m, x: m.cells(F.adaptive_avg_pool2d(m.n(x), (2, 3)).transpose(1, 2).flatten(1)),
    ),
    "tokens": (["a"], lambda m, x: m.a(m.n(x).flatten(2).transpose(1, 2))),
    "tokens of a shape": (["a"], lambda m, x: m.a(m.n(x).reshape(*x.shape[:2], -1).transpose(1, 2))),
    "shuffled": (["one"], lambda m, x: m.one(F.channel_shuffle(F.avg_pool2d(m.n(x), 2), 3))),
    "part of it": (["few"], lambda m, x: m.few(m.n(x).mean(SPACE)[:, ::2])),
    "pooled": (["a"], lambda m, x: m.a(F.avg_pool2d(m.n(x), 3, 2, ceil_mode=True).mean(SPACE))),
    "pooled, its padding not counted": (
        ["three"],
        lambda m, x: m.three(F.avg_pool2d(m.n(x), 3, 1, 1, count_include_pad=False)),
    ),
    "pooled in one dimension": (["line"], lambda m, x: m.line(F.avg_pool1d(m.n(x).flatten(2), 2))),
    "enlarged": (["three"], lambda m, x: m.three(F.interpolate(m.n(x), scale_factor=2, mode="bicubic"))),
    "two convolutions": (["one", "three"], lambda m, x: (lambda h: m.one(h).sum() + m.three(h))(m.n(x))),
    "a factor behind it": (["a"], lambda m, x: m.a(m.n(x).mean(SPACE) * m.gain + 1)),
    "a norm behind it": (["a"], lambda m, x: m.a(m.rows(m.n(x).mean(SPACE)))),
    "norms one after the other": (
        ["one", "three", "deeper"],
        lambda m, x: (
            lambda h: (lambda k: m.one(h).sum() + m.three(k).sum() + m.deeper(k))(m.m(F.avg_pool2d(h, 2)))
        )(m.n(x)),
    ),
    "means of parts": (
        ["wide"],
        lambda m, x: (lambda h: m.wide(torch.cat([h.mean(SPACE), h[:, :, ::2].mean(SPACE)], 1)))(m.n(x)),
    ),
    "a sum of means": (
        ["a"],
        lambda m, x: (lambda h: m.a(h.mean(SPACE) + F.adaptive_avg_pool2d(h, 1).flatten(1)))(m.n(x)),
    ),
    "beside what it reads": (["both"], lambda m, x: m.both(torch.cat([m.n(x), x], 1))),
    "what it reads is used": (["a"], lambda m, x: m.a(m.n(x).mean(SPACE)).sum() + x),
    "changed behind": (["a"], lambda m, x: m.a(m.n(x).mean(SPACE)).mul_(2)),
    "what it reads is changed behind": (
        ["a"],
        lambda m, x: (lambda h, y: y.add_(1).sum() + h)(m.a(m.n(x).mean(SPACE)), x),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_the_layers_behind_a_norm_take_it(case: str) -> None:
    layers, code = TAKEN[case]
    folded, report = collapsed(code)
    assert [fold.where for fold in report.folds] == layers
    assert used(folded) == set()


LEFT: dict[str, tuple[str, Code]] = {
    "the output": ("used by the output", lambda m, x: (lambda h: (h, m.a(h.mean(SPACE))))(m.n(x))),
    "an activation": ("used by (model):relu", lambda m, x: (lambda h: m.a(h.mean(SPACE)).sum() + h.relu())(m.n(x))),
    "where rows begin": ("depends on the size", lambda m, x: m.flat(m.n(x).transpose(1, 2).flatten(1))),
    "numbers": ("would hold 350 numbers instead of 324", lambda m, x: m.large(m.n(x).mean(SPACE))),
    "the largest value": ("it follows (model):relu", lambda m, x: m.a(m.n(x).amax(SPACE))),
    "padding that counts": (Reason.PAD_COUNTED.value, lambda m, x: m.a(F.avg_pool2d(m.n(x), 3, 1, 1).mean(SPACE))),
    "another divisor": (Reason.PAD_COUNTED.value, lambda m, x: m.one(F.avg_pool2d(m.n(x), 2, divisor_override=3))),
    "a padded convolution": (
        Reason.PAD_VALUE.value,
        lambda m, x: (lambda h: m.padded(h).sum() + m.one(h))(F.avg_pool2d(m.n(x), 2)),
    ),
    "a transposed convolution": (Reason.TRANSPOSED.value, lambda m, x: m.up(F.avg_pool2d(m.n(x), 2))),
    "a sum with what it reads": ("the sum of that and of what it reads", lambda m, x: m.a((m.n(x) + x).mean(SPACE))),
    "a sum with something else": (
        "used by (model):add",
        lambda m, x: (lambda h: m.b(h) + m.a(h + x.amax(SPACE)).sum())(m.n(x).mean(SPACE)),
    ),
    "over the channels": ("several channels", lambda m, x: m.line(m.five(m.one(x).abs()).mean(1)[:, :6])),
    "changed behind it": (
        "used by (model):sum",
        lambda m, x: (lambda h: m.a(h.mean(SPACE)).sum() + h.mul_(2).sum())(m.n(x)),
    ),
    "changed on the way": ("changes a tensor behind the map", lambda m, x: m.a(m.n(x).mul_(2).mean(SPACE))),
    "what it reads is changed": (
        "changes a tensor behind the map",
        lambda m, x: (lambda h: (x.add_(1), m.a(h.mean(SPACE)))[1])(m.n(x)),
    ),
    "a layer of two uses": ("used in several places", lambda m, x: m.a(m.n(x).mean(SPACE)) + m.a(x.amax(SPACE))),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_the_layers_behind_cannot_take_stays(case: str) -> None:
    why, code = LEFT[case]
    folded, report = collapsed(code)
    assert used(folded) & {"n", "five"}
    told = [str(refusal) for refusal in report.refusals]
    assert any(why in line for line in told), told


def test_what_the_network_keeps_is_what_it_was() -> None:
    model = built(TAKEN["two heads"][1])
    before = snapshot(model)
    folded = reparam.collapse(model, example_inputs=MAPS)
    assert unchanged(model, before)
    assert type(folded) is type(model)
    assert isinstance(folded.n, nn.Identity)
    assert folded.b.bias is not None


def test_a_hook_on_the_norm_keeps_it() -> None:
    model = built(TAKEN["mean"][1])
    model.n.register_forward_hook(lambda *_: None)
    _, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert any(refusal.reason is Reason.HOOK for refusal in report.refusals), report.refusals


class Methods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(x.relu())

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.features(x).mean(SPACE)
        return x if pre_logits else self.head(x)


def test_an_option_that_leaves_the_head_out() -> None:
    model = ready(Methods()).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert any(refusal.reason is Reason.ARGUMENT for refusal in report.refusals), report.refusals
    torch.testing.assert_close(folded(MAPS, pre_logits=True), model(MAPS, pre_logits=True))


def test_an_option_that_changes_what_lies_between() -> None:
    class Largest(Methods):
        def forward(self, x: Tensor, largest: bool = False) -> Tensor:  # type: ignore[override]
            x = self.features(x)
            return self.head(x.amax(SPACE) if largest else x.mean(SPACE))

    model = ready(Largest()).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert any(refusal.reason is Reason.ARGUMENT for refusal in report.refusals), report.refusals
    torch.testing.assert_close(folded(MAPS, largest=True), model(MAPS, largest=True))


def test_an_option_that_acts_behind_the_head() -> None:
    class Doubled(Methods):
        def forward(self, x: Tensor, double: bool = False) -> Tensor:  # type: ignore[override]
            x = self.head(self.features(x).mean(SPACE))
            return 2 * x if double else x

    model = ready(Doubled()).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert used(folded) == set(), report.refusals
    torch.testing.assert_close(folded(MAPS, double=True), model(MAPS, double=True))


def test_a_method_that_gives_what_the_norm_gave_is_told_of() -> None:
    class Plain(Methods):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.features(x).mean(SPACE))

    folded, report = reparam.collapse_with_report(ready(Plain()).double(), example_inputs=MAPS)
    assert used(folded) == set()
    assert [note for note in report.notes if "features of the model, called by itself" in note], report.notes


def test_options_that_a_child_cannot_be_given() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head()

        def forward(self, x: Tensor, wanted: Any = None, **more: Any) -> Any:
            found = self.head(x.relu().mean(SPACE))
            for each in wanted or ():  # which cannot be told
                found = found + each
            return found

    folded, report = reparam.collapse_with_report(ready(Network()).double(), example_inputs=MAPS)
    assert [fold.where for fold in report.folds] == ["head.linear"], report.refusals
    assert used(folded) == set()


# ------------------------------------------------------------------ average pooling between a layer and its norm

POOLED: dict[str, Code] = {
    "plain": lambda m, x: m.n30(F.avg_pool2d(m.deep(x), 2)),
    "stepping": lambda m, x: m.n30(F.avg_pool2d(m.deep(x), 3, 2, ceil_mode=True)),
    "padding that does not count": lambda m, x: m.n30(F.avg_pool2d(m.deep(x), 3, 2, 1, count_include_pad=False)),
    "of a sum": lambda m, x: m.n30(F.avg_pool2d(m.deep(x) + m.deeper(x[:, :, 1:-1, 1:-1]), 2)),
}
COUNTED: dict[str, Code] = {
    "padding that counts": lambda m, x: m.n30(F.avg_pool2d(m.deep(x), 3, 2, 1)),
    "another divisor": lambda m, x: m.n30(F.avg_pool2d(m.deep(x), 2, divisor_override=3)),
}


@pytest.mark.parametrize("case", POOLED)
def test_a_norm_behind_average_pooling_goes_into_the_layers_before_it(case: str) -> None:
    folded, report = _with_norm(POOLED[case])
    assert used(folded) == set(), report.refusals
    assert {fold.where for fold in report.folds} <= {"deep", "deeper"}


@pytest.mark.parametrize("case", COUNTED)
def test_a_shift_does_not_pass_padding_that_counts(case: str) -> None:
    folded, report = _with_norm(COUNTED[case])
    assert used(folded) == {"n30"}
    (told,) = [refusal for refusal in report.refusals if refusal.layer == "n30"]
    assert told.reason is Reason.PAD_COUNTED
    assert "avg_pool2d" in told.message


def _with_norm(code: Code) -> tuple[Any, reparam.Explanation]:
    torch.manual_seed(0)
    model: Any = Ahead(code)
    model.n30 = nn.BatchNorm2d(30)
    model = ready(model).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert not report.taken_back
    torch.testing.assert_close(folded(MAPS), model(MAPS), rtol=1e-10, atol=1e-10)
    return folded, report


# ------------------------------------------------------------------ what would be wrong is seen


def test_a_wrong_share_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = prove.shares_of

    def wrong(*args: Any, **options: Any) -> Any:
        return {head: (scale * 1.001, shift) for head, (scale, shift) in honest(*args, **options).items()}

    monkeypatch.setattr(prove, "shares_of", wrong)
    model = built(TAKEN["two heads"][1])
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert report.taken_back
    torch.testing.assert_close(folded(MAPS), model(MAPS), rtol=0, atol=0)


def test_rows_of_any_length_are_not_taken_for_those_of_an_example() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6 * 26, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x.relu()).transpose(1, 2).flatten(1))

    _, report = reparam.collapse_with_report(
        ready(Rows()).double(), example_inputs=MAPS.repeat(1, 1, 1, 5)[:, :, :2, :13]
    )
    assert report.folds == []
    assert report.taken_back == []  # it was not even tried
    assert "depends on the size" in str(report.refusals[0])


@pytest.mark.parametrize("channels", [3, 4, 5])
def test_a_mean_over_channels_is_no_channel(channels: int) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(channels), nn.Conv2d(1, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x[:, :channels].relu()).mean(1, keepdim=True))

    folded, report = reparam.collapse_with_report(ready(Mean()).double(), example_inputs=MAPS)
    assert used(folded) == {"norm"}
    assert report.taken_back == []  # it was not even tried
    assert "several channels" in str(report.refusals[0])


def test_positions_of_other_sizes_are_told_apart() -> None:
    form = values.SparseForm.identity(0, 4, 2, like=torch.ones(0), example=(2, 4, 5, 3))
    signal = values.Signal(form, values.View(2))
    rows = values.move(signal, lambda ids: ids.flatten(1))
    assert values.channels_along(rows, values.View(0, last=True)).tolist() == [c for c in range(4) for _ in range(15)]
    turned = values.move(signal, lambda ids: ids.permute(0, 2, 3, 1))
    assert values.channels_along(turned, values.View(0, last=True)).tolist() == [0, 1, 2, 3]
    with pytest.raises(values.RefusalError):
        values.channels_along(signal, values.View(0, last=True))


# ------------------------------------------------------------------ files, programs, networks


def test_files(tmp_path: Path) -> None:
    code = TAKEN["flat"][1]
    model = built(code).float()
    folded = reparam.collapse(model, example_inputs=MAPS.float())
    reparam.save(folded, tmp_path / "folded.safetensors")
    again = reparam.load(tmp_path / "folded.safetensors", built(code).float())
    torch.testing.assert_close(again(MAPS.float()), folded(MAPS.float()), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["mean", "two heads", "flat", "norms one after the other"])
def test_like_gives_a_norm_that_does_nothing(case: str) -> None:
    model, plain = built(TAKEN[case][1]).float(), built(TAKEN[case][1]).float()
    result = reparam.collapse(model, like=plain, example_inputs=MAPS.float())
    assert type(result.n) is nn.BatchNorm2d
    torch.testing.assert_close(result(MAPS.float()), model(MAPS.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["mean", "two heads", "flat", "two convolutions", "what it reads is used", "norms one after the other"]
)
def test_exported_programs_and_onnx_files(case: str, tmp_path: Path) -> None:
    model, given = built(TAKEN[case][1]).float(), MAPS.float()
    program = torch.export.export(model, (given,))
    folded, report = reparam.collapse_with_report(program)
    assert report.after is not None
    assert report.after.norms == 0
    torch.testing.assert_close(folded.module()(given), model(given), rtol=1e-4, atol=1e-4)
    written = torch.onnx.export(model, (given,), dynamo=True, verbose=False, optimize=True)
    assert written is not None
    written.save(tmp_path / "model.onnx")
    result, told = reparam.onnx.collapse_with_report(tmp_path / "model.onnx")
    assert told.after is not None
    assert told.after.norms == 0, told.refusals
    assert reparam.onnx.verify(model, result).ok
    reparam.onnx.save(result, tmp_path / "folded.onnx")
    before, after = (onnx.load(tmp_path / name).graph for name in ("model.onnx", "folded.onnx"))
    for kind in ("input", "output"):
        assert [v.name for v in getattr(before, kind)] == [v.name for v in getattr(after, kind)]


def test_a_file_whose_norm_reads_the_input(tmp_path: Path) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.one(h).relu() + self.two(h).sigmoid()

    model = ready(First())
    written = torch.onnx.export(model, (MAPS.float(),), dynamo=True, verbose=False, optimize=True, input_names=["x"])
    assert written is not None
    written.save(tmp_path / "model.onnx")
    result, told = reparam.onnx.collapse_with_report(tmp_path / "model.onnx")
    assert told.after is not None
    assert told.after.norms == 0, told
    assert [value.name for value in result.graph.inputs] == ["x"]


@pytest.mark.parametrize("name", ["starnet_s1", "swiftformer_xs"])
def test_the_last_norm_of_a_published_network(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = ready(timm.create_model(name, num_classes=7))
    given = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = copy.deepcopy(model)
    folded = reparam.collapse(model, example_inputs=given)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(given), kept(given), rtol=1e-4, atol=1e-4)
