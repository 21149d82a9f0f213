"""One map behind several layers, and one weight under several calls: what folds in all of them, or in none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import lively
from small_networks import collapsed_as_planned, norms_used, ready, snapshot, unchanged
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
import reparam.onnx
from passes.algebra.sparse_form import SparseForm
from passes.proof import prove
from passes.refusal import Reason

Code = Callable[..., Any]


def conv(kernel: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, kernel, padding=kernel // 2, **options)


class Several(nn.Module):
    """Layers of different inputs and kernels, norms for what they give, and code that joins them."""

    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.a, self.b, self.c = conv(3, bias=False), conv(1), conv(5, groups=2)
        self.l, self.r = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.n, self.n1, self.wide = nn.BatchNorm2d(6), nn.BatchNorm1d(6), nn.BatchNorm2d(12)
        self.gain = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.code(self, x, y)


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


MAPS, ROWS = inputs(2, 4, 8, 6), inputs(5, 8)


def built(code: Code) -> Any:
    torch.manual_seed(0)
    return ready(Several(code)).double()


def collapsed(code: Code, given: tuple[Tensor, Tensor] = MAPS) -> tuple[Any, reparam.Explanation]:
    return collapsed_as_planned(built(code), given)


def used(model: nn.Module, given: tuple[Tensor, Tensor] = MAPS) -> set[str]:
    return norms_used(model, given)


# ------------------------------------------------------------------ one map behind several layers

JOINED: dict[str, tuple[int, Code]] = {
    "concatenation": (2, lambda m, x, y: m.wide(torch.cat([m.a(x), m.b(y)], 1)).relu()),
    "sum": (2, lambda m, x, y: m.n(m.a(x) + m.b(y)).relu()),
    "three": (3, lambda m, x, y: m.n(m.a(x) + m.b(y) - m.c(x)).relu()),
    "difference": (2, lambda m, x, y: m.n(m.a(x) - m.b(y)).relu()),
    "factor": (2, lambda m, x, y: ((m.a(x) + m.b(y)) * m.gain).relu()),
    "a factor and a norm": (2, lambda m, x, y: m.n((m.a(x) + m.b(y)) * m.gain).relu()),
    "a factor of one": (2, lambda m, x, y: m.n(m.a(x) * m.gain + m.b(y)).relu()),
    "shuffle": (2, lambda m, x, y: m.wide(F.channel_shuffle(torch.cat([m.a(x), m.b(y)], 1), 3)).relu()),
    "joined twice": (
        3,
        lambda m, x, y: m.wide(torch.cat([torch.cat([m.a(x)[:, :3], m.b(y)[:, 3:]], 1), m.c(x)], 1)).relu(),
    ),
    "a norm before a norm": (3, lambda m, x, y: m.wide(torch.cat([m.n(m.a(x) + m.b(y)), m.c(x)], 1)).relu()),
    "one layer twice": (2, lambda m, x, y: (lambda h: m.n(h + h + m.b(y)).relu())(m.a(x))),
    "over the batch": (1, lambda m, x, y: (lambda h: m.n(torch.cat([h, h])).relu())(m.a(x))),
    "pooled": (2, lambda m, x, y: m.n(F.adaptive_avg_pool2d(m.a(x) + m.b(y), 1)).relu()),
    "enlarged": (
        2,
        lambda m, x, y: m.n(F.interpolate(m.a(x), scale_factor=2) + F.interpolate(m.b(y), scale_factor=2)).relu(),
    ),
    "one enlarged": (2, lambda m, x, y: m.n(F.interpolate(m.a(x[:, :, :-4, :-3]), scale_factor=2) + m.b(y)).relu()),
    "broadcast": (2, lambda m, x, y: m.n(m.a(x) + m.b(F.adaptive_avg_pool2d(y, 1))).relu()),
    "side by side": (2, lambda m, x, y: m.n(torch.cat([m.a(x), m.b(y)], 3)).relu()),
    "flat": (2, lambda m, x, y: m.n1(torch.cat([m.a(x).flatten(2), m.b(y).flatten(2)], 2)).relu()),
    "in place behind": (2, lambda m, x, y: F.relu(m.n(m.a(x) + m.b(y)), inplace=True)),
    "asked for its size": (2, lambda m, x, y: (lambda h: m.n(h).relu().reshape(h.shape[0], -1))(m.a(x) + m.b(y))),
}


@pytest.mark.parametrize("case", JOINED)
def test_a_map_behind_several_layers_goes_into_each(case: str) -> None:
    count, code = JOINED[case]
    folded, report = collapsed(code)
    assert len(report.folds) == count
    assert used(folded) == set()
    assert "gain" not in dict(folded.named_parameters()) or "gain" not in folded.code.__code__.co_names


def test_layers_of_one_input_that_cannot_be_one() -> None:
    """Their sum as one convolution would cost more; so it stays a sum, without the norm."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                [nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 7, padding=3, groups=4)]
            )
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            halves = torch.split(x, [4, 4], 1)
            return F.relu(self.norm(torch.cat([part(halves[i]) for i, part in enumerate(self.parts)], 1)))

    model, x = ready(Mixed()).double(), torch.randn(2, 8, 9, 9, dtype=torch.float64)
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert report.after is not None
    assert (report.after.convs, report.after.norms) == (2, 0)
    assert [type(part) for part in folded.parts] == [nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(folded(x), model(x))


def test_rows() -> None:
    folded, report = collapsed(lambda m, x, y: m.n1(m.l(x) + m.r(y)).relu(), ROWS)
    assert len(report.folds) == 2
    assert used(folded, ROWS) == set()


def test_a_product_of_matrices_tells_its_rank() -> None:
    """GraphSAGE: what the first layer reads is a product of two inputs."""
    model = built(lambda m, x, y: m.n1(m.l(y @ x) + m.r(x)).relu())
    given = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 5, dtype=torch.float64)
    folded, report = reparam.collapse_with_report(model, example_inputs=given)
    assert len(report.folds) == 2
    torch.testing.assert_close(folded(*given), model(*given))


def test_the_shift_goes_where_a_bias_is_already() -> None:
    folded, report = collapsed(lambda m, x, y: m.n(m.a(x) + m.b(y)).relu())
    assert folded.a.bias is None
    assert folded.b.bias is not None
    assert all(fold.numbers_after <= fold.numbers_before for fold in report.folds)


def halves(m: Any, x: Tensor, y: Tensor) -> Tensor:
    first, second = torch.split(m.a(x), 3, 1)
    return torch.cat([F.instance_norm(first), m.second(second.contiguous())], 1).relu()


def test_half_of_a_layer_has_a_norm() -> None:
    """IBN: the norm of each image is not touched by what its other half takes over."""
    folded, report = collapsed(halves)
    assert len(report.folds) == 1
    assert used(folded) == set()


def test_both_halves_have_norms_of_their_own() -> None:
    def code(m: Any, x: Tensor, y: Tensor) -> Tensor:
        first, second = torch.split(m.a(x), 3, 1)
        return torch.cat([m.first(first), m.second(second)], 1).relu()

    folded, _ = collapsed(code)
    assert used(folded) == set()


STAYS: dict[str, tuple[Reason, str, Code]] = {
    "an activation": (
        Reason.NO_CONVOLUTION,
        "relu",
        lambda m, x, y: m.wide(torch.cat([m.a(x), m.b(y).relu()], 1)).relu(),
    ),
    "activated together": (
        Reason.NO_CONVOLUTION,
        "relu",
        lambda m, x, y: m.wide(torch.cat([m.a(x), m.b(y)], 1).relu()),
    ),
    "the input itself": (
        Reason.NO_CONVOLUTION,
        "x",
        lambda m, x, y: m.wide(torch.cat([m.a(x), x, y[:, :2]], 1)).relu(),
    ),
    "another reader of a layer": (
        Reason.SHARED,
        "a is used by",
        lambda m, x, y: (lambda h: m.n(h + m.b(y)).relu() + h)(m.a(x)),
    ),
    "another reader of the sum": (
        Reason.SHARED,
        "used by",
        lambda m, x, y: (lambda h: m.n(h).relu() + h.sigmoid())(m.a(x) + m.b(y)),
    ),
    "returned as well": (Reason.SHARED, "the output", lambda m, x, y: (lambda h: (m.n(h).relu(), h))(m.a(x) + m.b(y))),
    "changed in place": (Reason.IN_PLACE, "add_", lambda m, x, y: m.n(m.a(x).add_(m.b(y))).relu()),
    "two numbers for a channel": (
        Reason.NOT_PER_CHANNEL,
        "several numbers",
        lambda m, x, y: (lambda h: m.wide(torch.cat([h, h + m.b(y)], 1)).relu())(m.a(x)),
    ),
    "two factors for a channel": (
        Reason.NOT_PER_CHANNEL,
        "several numbers",
        lambda m, x, y: (lambda h: (torch.cat([h, h + m.b(y)], 1) * m.wide.weight[:, None, None]).relu())(m.a(x)),
    ),
    "statistics of the batch": (
        Reason.BATCH_STATISTICS,
        "own statistics",
        lambda m, x, y: F.batch_norm(m.a(x) + m.b(y), None, None, training=True),
    ),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_one_of_them_cannot_take_stays_for_all(case: str) -> None:
    reason, word, code = STAYS[case]
    _, report = collapsed(code)
    assert report.folds == []
    assert any(refusal.reason is reason and word in refusal.message for refusal in report.refusals), report.refusals


def test_what_the_network_keeps_is_what_it_was() -> None:
    def code(m: Any, x: Tensor, y: Tensor) -> Any:
        m.kept = m.a(x) + m.b(y)
        return m.n(m.kept).relu()

    model = built(code)
    want = model(*MAPS), model.kept.clone()
    folded = reparam.collapse(model, example_inputs=MAPS)
    torch.testing.assert_close((folded(*MAPS), folded.kept), want)


def test_an_option_that_leaves_the_norm_out() -> None:
    class Optional(Several):
        def forward(self, x: Tensor, y: Tensor, raw: bool = False) -> Tensor:
            h = self.a(x) + self.b(y)
            return h if raw else F.relu(self.n(h))

    model = ready(Optional(lambda: None)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert Reason.ARGUMENT in {refusal.reason for refusal in report.refusals}
    torch.testing.assert_close(folded(*MAPS, raw=True), model(*MAPS, raw=True))


@pytest.mark.parametrize("where", ["a", "n"])
def test_a_hook_on_one_of_them(where: str) -> None:
    model, seen = built(JOINED["sum"][1]), list[Tensor]()
    model.get_submodule(where).register_forward_hook(lambda *given: seen.append(given[2]))
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    model(*MAPS), folded(*MAPS)
    torch.testing.assert_close(seen[-1], seen[-2])


# ------------------------------------------------------------------ they hold together, or not at all


def test_one_wrong_share_takes_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the map runs it behind its layers' values, with and without their shares."""
    shares_of = prove.shares_of

    def wrong(*given: Any) -> Any:
        return {head: (scale * 1.01, shift) for head, (scale, shift) in shares_of(*given).items()}

    monkeypatch.setattr(prove, "shares_of", wrong)
    model = built(JOINED["concatenation"][1])
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert report.taken_back
    torch.testing.assert_close(folded(*MAPS), model(*MAPS), rtol=0, atol=0)
    with pytest.raises(reparam.EquivalenceError):
        reparam.collapse(built(JOINED["sum"][1]), example_inputs=MAPS, strict=True)


def test_a_layer_that_differs_takes_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import passes.compiler as compiler

    proven = compiler.prove

    def refuse_b(flow: Any, region: Any, form: Any, layer: Any, name: str) -> float:
        if name.startswith("b"):
            raise reparam.EquivalenceError("planted", layer=name, error=1.0)
        return proven(flow, region, form, layer, name)

    monkeypatch.setattr(compiler, "prove", refuse_b)
    model = built(JOINED["sum"][1])
    before = snapshot(model)
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert unchanged(model, before)
    assert "n" in used(folded)


def test_files(tmp_path: Path) -> None:
    model = built(JOINED["shuffle"][1])
    saved = reparam.collapse(model, example_inputs=MAPS)
    assert [str(edit) for edit in saved.reparam_edits][-1].endswith("wide")
    second = reparam.collapse(copy.deepcopy(model), example_inputs=MAPS, inplace=True)
    torch.testing.assert_close(second(*MAPS), saved(*MAPS), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["sum", "concatenation", "pooled", "factor"])
def test_exported_programs_and_onnx_files(case: str, tmp_path: Path) -> None:
    model = built(JOINED[case][1]).float()
    given = tuple(x.float() for x in MAPS)
    program = torch.export.export(model, given)
    folded, report = reparam.collapse_with_report(program)
    assert report.after is not None
    assert report.after.norms == 0
    torch.testing.assert_close(folded.module()(*given), model(*given), rtol=1e-4, atol=1e-5)
    written = torch.onnx.export(model, given, dynamo=True, verbose=False, optimize=True)
    assert written is not None
    written.save(tmp_path / "model.onnx")
    result, told = reparam.onnx.collapse_with_report(tmp_path / "model.onnx")
    assert told.after is not None
    assert told.after.norms == 0, told.refusals
    assert reparam.onnx.verify(model, result).ok


def test_an_exported_interface_between_them_stays() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    model = built(lambda m, x, y: m.n(m.sum(m.a(x), m.b(y))).relu()).float()
    model.sum = Sum()
    program = torch.export.export(model, tuple(x.float() for x in MAPS), preserve_module_call_signature=("sum",))
    _, report = reparam.collapse_with_report(program)
    assert report.folds == []
    assert any("interface" in refusal.message for refusal in report.refusals)


# ------------------------------------------------------------------ one weight under several calls


class Dilated(nn.Module):
    def __init__(self, code: Code) -> None:
        super().__init__()
        self.code = code
        self.conv, self.w = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Parameter(torch.randn(6, 4, 3, 3))
        self.n, self.norms, self.out = nn.BatchNorm2d(6), nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3)), conv(1)
        self.thin = nn.Parameter(torch.randn(6, 1, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.code(self, x, y)


TIED: dict[str, Code] = {
    "a weight of its own": lambda m, x, y: sum(m.n(F.conv2d(x, m.w, padding=d, dilation=d)).relu() for d in (1, 2, 3)),
    "that of a layer": lambda m, x, y: sum(
        m.n(F.conv2d(x, m.conv.weight, padding=d, dilation=d)).relu() for d in (1, 2)
    ),
    "called, and used": lambda m, x, y: m.n(m.conv(x)).relu() + m.n(F.conv2d(y, m.conv.weight, None, 1, 2, 2)).relu(),
    "strides": lambda m, x, y: m.n(F.conv2d(x, m.w, stride=2)).relu().mean() + m.n(F.conv2d(x, m.w)).relu().mean(),
}


@pytest.mark.parametrize("case", TIED)
def test_one_weight_under_several_calls_folds_once(case: str) -> None:
    torch.manual_seed(0)
    model = ready(Dilated(TIED[case])).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert used(folded) == set()
    assert len({fold.where for fold in report.folds}) == 1
    large = [sum(p.numel() for p in m.parameters() if p.dim() == 4 and p.shape[2] == 3) for m in (model, folded)]
    assert large[0] == large[1]
    torch.testing.assert_close(folded(*MAPS), model(*MAPS))
    assert reparam.collapse_with_report(folded, example_inputs=MAPS)[1].folds == []


def test_another_norm_behind_each_call_is_too_much_for_large_weights() -> None:
    def code(m: Any, x: Tensor, y: Tensor) -> Any:
        return sum(m.norms[d - 1](F.conv2d(x, m.w, padding=d, dilation=d)).relu() for d in (1, 2, 3))

    folded, report = reparam.collapse_with_report(ready(Dilated(code)).double(), example_inputs=MAPS)
    assert report.folds == []
    assert len(used(folded)) == 3
    assert all(
        "its convolution's weight is used by 3 calls" in r.message for r in report.refusals if "norms" in r.layer
    )


def test_another_norm_behind_each_call_of_a_small_weight() -> None:
    def code(m: Any, x: Tensor, y: Tensor) -> Tensor:
        h = m.out(x).relu()
        return (
            m.norms[0](F.conv2d(h, m.thin, groups=6)).relu()
            + m.norms[1](F.conv2d(h, m.thin, stride=1, groups=6)).sigmoid()
        )

    model = ready(Dilated(code)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert len(report.folds) == 2
    assert used(folded) == set()
    torch.testing.assert_close(folded(*MAPS), model(*MAPS))


def test_a_weight_with_another_reader_stays() -> None:
    def code(m: Any, x: Tensor, y: Tensor) -> Tensor:
        calls = sum(m.n(F.conv2d(x, m.w, padding=d, dilation=d)).relu() for d in (1, 2))
        return calls + F.conv2d(y, m.w, padding=1).relu()

    model = ready(Dilated(code)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert used(folded) == {"n"}


def test_what_no_layer_holds_for_all_calls_stays() -> None:
    """Transposed convolutions: the forward would convolve with another's numbers."""

    def code(m: Any, x: Tensor, y: Tensor) -> Tensor:
        h = m.out(x).relu()
        small, large = (m.norms[0](F.conv_transpose2d(h, m.w, stride=stride)) for stride in (1, 2))
        return small.relu().mean() + large.relu().mean()

    model = ready(Dilated(code)).double()
    model.norms[0] = ready(nn.BatchNorm2d(4)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert not report.taken_back
    torch.testing.assert_close(folded(*MAPS), model(*MAPS), rtol=0, atol=0)


# ------------------------------------------------------------------ deformable convolutions


class Deformed(nn.Module):
    def __init__(self, bias: bool, mask: bool, groups: int = 1) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.offset, self.mask = nn.Conv2d(4, 18, 3, stride=2, padding=1), nn.Conv2d(4, 9, 3, stride=2, padding=1)
        self.conv = ops.DeformConv2d(4, 6, 3, stride=2, padding=1, bias=bias, groups=groups)
        self.norm, self.masked = nn.BatchNorm2d(6), mask

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = torch.sigmoid(self.mask(y)) if self.masked else None
        return F.relu(self.norm(self.conv(x, self.offset(y), mask)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_behind_a_deformable_convolution(bias: bool, mask: bool, groups: int) -> None:
    model = ready(Deformed(bias, mask, groups)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert [fold.where for fold in report.folds] == ["conv"]
    assert used(folded) == set()
    assert type(folded.conv) is type(model.conv)
    assert not report.taken_back
    torch.testing.assert_close(folded(*MAPS), model(*MAPS))
    torch.testing.assert_close(folded.offset.weight, model.offset.weight, rtol=0, atol=0)


class DeformedByCall(nn.Module):
    """As the packs of DCNv2: a module holds the weight and calls the function, by its name or as the operator."""

    def __init__(self, how: str) -> None:
        super().__init__()
        pytest.importorskip("torchvision.ops")
        groups = 2 if how == "groups" else 1
        self.how, self.offset = how, nn.Conv2d(4, 27, 3, stride=2, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4 // groups, 3, 3)), nn.Parameter(torch.randn(6))
        self.norm, self.other = nn.BatchNorm2d(6), nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ops, (along, across, mask) = __import__("torchvision").ops, self.offset(x).chunk(3, 1)
        offset, mask = torch.cat([along, across], 1), mask.sigmoid()
        if self.how == "the operator":
            numbers = (2, 2, 1, 1, 1, 1, 1, 1, True)
            y = torch.ops.torchvision.deform_conv2d(x, self.weight, offset, mask, self.bias, *numbers)
        elif self.how == "of another layer":
            y = ops.deform_conv2d(input=x, offset=offset, weight=self.other.weight, mask=mask, stride=2, padding=1)
        elif self.how == "no mask":
            y = ops.deform_conv2d(x, offset, self.weight, self.bias, 2, 1)
        elif self.how == "weight by offset":
            y = ops.deform_conv2d(x, offset, self.weight * offset.mean(), self.bias, 2, 1)
        else:
            y = ops.deform_conv2d(x, offset, self.weight, self.bias, (2, 2), (1, 1), (1, 1), mask)
        return F.relu(self.norm(y))


@pytest.mark.parametrize("how", ["the function", "the operator", "of another layer", "no mask", "groups"])
@pytest.mark.parametrize("around", [False, True])
def test_a_norm_behind_a_deformable_convolution_that_is_called(how: str, around: bool, tmp_path: Path) -> None:
    model: Any = ready(DeformedByCall(how)).double()
    if around:  # the norm stands outside of the pack
        norm, model.norm = model.norm, nn.Identity()
        model = nn.Sequential(model, nn.Conv2d(6, 6, 1, groups=6), norm).double().eval()
    x, y = MAPS
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not report.taken_back
    for given in (x, y[:1, :, :5]):
        torch.testing.assert_close(folded(given), model(given))
    torch.testing.assert_close(copy.deepcopy(folded)(x), model(x))
    reparam.save(folded, tmp_path / "net.pt")


def test_a_pack_that_is_nothing_but_functions_keeps_its_offsets() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Pack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.offset = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Parameter(torch.randn(18, 4, 3, 3))

        def forward(self, x: Tensor) -> Any:
            return ops.deform_conv2d(x, F.conv2d(x, self.offset, padding=1), self.weight, padding=1)

    model = ready(nn.Sequential(Pack(), nn.BatchNorm2d(6), nn.ReLU())).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS[0])
    assert (report.after.norms, report.taken_back) == (0, [])
    torch.testing.assert_close(folded(MAPS[1]), model(MAPS[1]))


def test_a_deformable_convolution_whose_weight_depends_on_the_input_keeps_the_norm() -> None:
    model = ready(DeformedByCall("weight by offset")).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS[0])
    assert report.folds == []
    torch.testing.assert_close(folded(MAPS[0]), model(MAPS[0]), rtol=0, atol=0)


# ------------------------------------------------------------------ other ways to write the same

WRITTEN: dict[str, Code] = {
    "einsum": lambda m, x, y: m.n(torch.einsum("bchw,oc->bohw", x, m.b.weight[:, :, 0, 0])).relu(),
    "einsum, the weight first": lambda m, x, y: m.n(torch.einsum("oc, nchw -> nohw", m.b.weight.flatten(1), x)).relu(),
    "einsum, turned": lambda m, x, y: m.n(torch.einsum("nchw,co->nohw", x, m.b.weight.flatten(1).t())).relu(),
    "einsum, open": lambda m, x, y: m.n(torch.einsum("oc,bc...->bo...", m.b.weight.flatten(1), x)).relu(),
    "einsum of rows": lambda m, x, y: m.n1(torch.einsum("bc,oc->bo", x.mean((2, 3)), m.b.weight.flatten(1))).relu(),
    "einsum of two matrices": lambda m, x, y: m.n1(
        torch.einsum("nd,de->ne", x.mean((2, 3)), m.b.weight.flatten(1).t())
    ).relu(),
    "a product": lambda m, x, y: m.n1(x.mean((2, 3)) @ m.b.weight.flatten(1).t()).relu(),
    "a product, mm": lambda m, x, y: m.n1(torch.mm(x.mean((2, 3)), m.b.weight.flatten(1).t())).relu(),
    "a product of tokens": lambda m, x, y: m.n1(
        (x.flatten(2).transpose(1, 2) @ m.b.weight.flatten(1).t()).transpose(1, 2)
    ).relu(),
    "a product and a bias": lambda m, x, y: m.n1(
        torch.addmm(m.b.bias, x.mean((2, 3)), m.b.weight.flatten(1).t())
    ).relu(),
    "a product, the weight first": lambda m, x, y: m.n1(torch.matmul(m.b.weight.flatten(1), x.flatten(2))).relu(),
    "type_as": lambda m, x, y: m.n(m.a(x).type_as(x)).relu(),
    "to the dtype of a weight": lambda m, x, y: m.n(m.a(x).to(m.a.weight.dtype)).relu(),
    "to the dtype of the input": lambda m, x, y: m.n(m.a(x).to(x.dtype)).relu(),
    "a slope of one": lambda m, x, y: m.n(F.leaky_relu(m.a(x), 1.0)).relu(),
    "a slope of one, by keyword": lambda m, x, y: m.n(F.leaky_relu(m.a(x), negative_slope=1)).relu(),
    "slopes of one": lambda m, x, y: m.n(F.prelu(m.a(x), m.one)).relu(),
    "a layer with slopes of one": lambda m, x, y: m.n(m.prelu(m.a(x))).relu(),
}


def with_slopes(code: Code) -> Any:
    model = built(code)
    model.prelu, model.one = nn.PReLU(6, init=1.0).double(), nn.Parameter(torch.ones(6, dtype=torch.float64))
    return model


@pytest.mark.parametrize("case", WRITTEN)
def test_other_ways_to_write_a_layer_and_its_norm(case: str) -> None:
    model = with_slopes(WRITTEN[case])
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert len(report.folds) == 1
    assert used(folded) == set()
    torch.testing.assert_close(folded(*MAPS), model(*MAPS))


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x, y: m.n(F.leaky_relu(m.a(x), 0.99)).relu(),
        lambda m, x, y: m.n(F.leaky_relu(m.a(x))).relu(),
        lambda m, x, y: m.n(F.prelu(m.a(x), m.one * 0.5)).relu(),
        lambda m, x, y: m.n(torch.einsum("bchw,bohw->bo", x, m.a(x))[:, :, None, None].relu()).relu(),
        lambda m, x, y: m.n(torch.einsum("bchw,ow->bohc", x, m.thin)).relu(),
        lambda m, x, y: m.n(m.a(x).to(torch.float32).to(x.dtype)).relu(),
        lambda m, x, y: m.n1(torch.einsum("nd,de->ne", x.mean((2, 3)), y[0, :, :, 0].mean(1, True).tile(6))).relu(),
        lambda m, x, y: m.n1(torch.mm(m.thin, y[0, 0, :6, :6])).relu(),
    ],
)
def test_what_only_looks_so_stays(code: Code) -> None:
    model = with_slopes(code)
    model.thin = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    model.n = ready(nn.BatchNorm2d(6)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=MAPS)
    assert report.folds == []
    assert not report.taken_back
    torch.testing.assert_close(folded(*MAPS), model(*MAPS), rtol=0, atol=0)


class Pooled(nn.Module):
    """As PoolFormer's and EfficientFormer's blocks: what is added is a mean of the value, less the value."""

    def __init__(self, blocks: int, *, kept: bool = True) -> None:
        super().__init__()
        self.conv, self.norm, self.kept = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), kept
        self.scales = nn.ParameterList(nn.Parameter(torch.rand(4, 1, 1) + 0.5) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for scale in self.scales:
            mixed = scale * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
            x = x + mixed if self.kept else mixed
        return self.norm(x).relu()


def test_a_row_of_blocks_that_add_means_has_one_term_of_each_channel() -> None:
    """Else each block would have three times as many as the one before it."""
    form = SparseForm.identity(0, 4, 2, like=torch.ones(1))
    row = form
    for _ in range(9):
        row = row + (row + -form)
    assert row.sources.shape == (1, 4)
    model = lively(Pooled(9))
    folded, report = reparam.collapse_with_report(model)
    assert report.after.norms == 0
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))


def test_means_less_the_value_take_no_shift() -> None:
    """Their factors cancel, and yet they are no zeros."""
    model = lively(Pooled(1, kept=False))
    folded, report = reparam.collapse_with_report(model)
    assert not report.taken_back
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x))
    assert report.after.norms == 1


def test_sums_of_terms_are_merged_per_channel() -> None:
    like = torch.ones(1, dtype=torch.float64)
    parts = [SparseForm.identity(start, 2, 2, like=like) for start in (0, 2, 4)]
    a = SparseForm.concat([parts[0] + parts[1], parts[2]])
    b = SparseForm.concat([parts[1], -parts[2]])
    both = a + b
    found = [
        {int(s): float(f) for s, f in zip(both.sources[:, o], both.factors[:, o], strict=True) if s >= 0}
        for o in range(4)
    ]
    assert found == [{0: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0}, {4: 0.0}, {5: 0.0}]
