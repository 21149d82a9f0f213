"""Exported programs and graphs of aten calls: the same folds as through the module, in a program of the same kind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import test_layouts
import torch
from blocks import lively
from small_networks import Net, Parallel, images, ready
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

import reparam
from passes.edits import program_graph
from passes.edits.edit import Substitute
from passes.edits.program_graph import ProgramGraph, substitute
from passes.edits.text import from_text, to_text
from passes.exported import is_program
from passes.proof.compare import Verdict
from reparam import EquivalenceError, ReparamError

C = 4


def conv(kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(C, C, kernel, **{"padding": kernel // 2, **options})


class Code(nn.Module):
    """Layers by name, and what is done with them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.code = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def bn(channels: int = C) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolution and norm": lambda: Code(lambda m, x: m.b(m.a(x)), a=conv(), b=bn()),
    "two branches": lambda: Code(lambda m, x: m.b(m.a(x)) + m.d(m.c(x)), a=conv(), b=bn(), c=conv(1), d=bn()),
    "the difference of two": lambda: Code(lambda m, x: m.a(x) - m.c(x), a=conv(), c=conv(1)),
    "in place": lambda: Code(lambda m, x: m.b(m.a(x)).add_(m.c(x)).mul_(2), a=conv(), b=bn(), c=conv(1)),
    "a sequence": lambda: Code(lambda m, x: m.b(m.c(m.a(x))), a=conv(1, bias=False), c=conv(padding=0), b=bn()),
    "strides and groups": lambda: Code(lambda m, x: m.b(m.a(x)), a=conv(stride=2, groups=2, dilation=2), b=bn()),
    "same padding": lambda: Code(lambda m, x: m.b(m.a(x)), a=conv(4, padding="same"), b=bn()),
    "reflection": lambda: Code(lambda m, x: m.b(m.a(x)), a=conv(padding_mode="reflect"), b=bn()),
    "average pooling": lambda: Code(
        lambda m, x: m.p(m.b(m.a(x))) + m.c(x), a=conv(1), b=bn(), c=conv(), p=nn.AvgPool2d(3, 1, 1)
    ),
    "a pad before": lambda: Code(lambda m, x: m.b(m.a(F.pad(x, (1, 0, 2, 1)))), a=conv(padding=0), b=bn()),
    "a crop": lambda: Code(lambda m, x: m.a(x)[..., 1:-1, 1:-1] + m.c(x), a=conv(5), c=conv(padding=0)),
    "transposed": lambda: Code(
        lambda m, x: m.b(m.a(x)), a=nn.ConvTranspose2d(C, C, 3, stride=2, padding=1, output_padding=1), b=bn()
    ),
    "concatenated": lambda: Code(
        lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)), a=conv(), c=conv(1), b=bn(2 * C)
    ),
    "split": lambda: Code(
        lambda m, x: torch.cat([m.a(x.chunk(2, 1)[0]), m.c(x.chunk(2, 1)[1])], 1),
        a=nn.Conv2d(C // 2, 2, 3, padding=1), c=nn.Conv2d(C // 2, 2, 3, padding=1),
    ),
    "linear": lambda: Code(lambda m, x: m.d(m.c(x.mean((2, 3)))), c=nn.Linear(C, 3 * C), d=nn.Linear(3 * C, C)),
    "linear and norm": lambda: Code(
        lambda m, x: m.d(m.c(x.mean((2, 3)))), c=nn.Linear(C, C), d=nn.BatchNorm1d(C)
    ),
    "a scale": lambda: Code(lambda m, x: 2 - 3 * m.a(x) / 4, a=conv()),
    "one weight twice": lambda: Code(lambda m, x: m.b(m.a(x)) + m.d(m.a(x.relu())), a=conv(), b=bn(), d=bn()),
    "nothing to fold": lambda: Code(lambda m, x: m.c(m.a(x).relu()), a=conv(), c=conv()),
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(NETWORKS[name]()).float().eval()


def maps(batch: int = 2) -> Tensor:
    return torch.randn(batch, C, 12, 12, generator=torch.Generator().manual_seed(1))


def calls(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dialect", ["training", pytest.param("core", marks=pytest.mark.slow)])
def test_a_program_folds_as_its_module_does(name: str, dialect: str) -> None:
    model, x = build(name), maps()
    program = export(model, (x,), dynamic_shapes={"x": {0: Dim("batch")}})
    if dialect == "core":
        program = program.run_decompositions()
    before = calls(program)
    wanted = reparam.explain(model, x)
    result, report = reparam.collapse_with_report(program)
    assert isinstance(result, ExportedProgram)
    assert len(report.folds) == len(wanted.folds) + (name == "split")  # an export knows how many channels there are
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert report.checked.error < 1e-13
    assert calls(program) == before, "the caller's program was changed"
    for count in (2,) if name == "same padding" else (2, 3):  # whose decomposition fixes the batch
        assert torch.allclose(result.module()(maps(count)), model(maps(count)), atol=1e-5)
    assert len(reparam.explain(program).folds) == len(report.folds)
    again, second = reparam.collapse_with_report(result)
    assert second.folds == []
    assert str(again.graph) == str(result.graph)
    if not report.folds:
        assert str(result.graph) == str(program.graph)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", ["two branches", "same padding", "reflection", "linear and norm", "transposed"])
def test_the_module_of_a_program_folds_alike(name: str) -> None:
    model, x = build(name), maps()
    module = export(model, (x,)).module()
    assert is_program(module)
    result, report = reparam.collapse_with_report(module)
    assert isinstance(result, fx.GraphModule)
    assert len(report.folds) == len(reparam.explain(model, x).folds) == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert torch.allclose(result(x), model(x), atol=1e-5)
    names = {name for name, _ in result.named_parameters()}
    assert names <= {n for n, _ in module.named_parameters()} | {f"{n.rpartition('.')[0]}.bias" for n in names}


@pytest.mark.parametrize("name", ["two branches", "transposed", "linear and norm", "average pooling"])
def test_core_aten_folds_alike(name: str) -> None:
    test_a_program_folds_as_its_module_does(name, "core")


def test_the_result_is_a_program_that_other_tools_take() -> None:
    model, x = build("two branches"), maps()
    program = export(model, (x,), dynamic_shapes={"x": {0: Dim("batch", min=2, max=64)}})
    result = reparam.collapse(program)
    assert [node.name for node in result.graph.nodes if node.op == "output"] == ["output"]
    assert result.range_constraints == program.range_constraints
    assert result.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert result.graph_signature.user_outputs == program.graph_signature.user_outputs
    assert list(result.state_dict) == ["a.weight", "a.bias"]
    lowered = result.run_decompositions()
    assert calls(lowered) == ["aten.convolution.default"]
    file = io.BytesIO()
    torch.export.save(result, file)
    file.seek(0)
    assert torch.allclose(torch.export.load(file).module()(x), model(x), atol=1e-5)
    unflattened = torch.export.unflatten(result)
    assert torch.allclose(unflattened(x), model(x), atol=1e-5)
    for each in (program, result):
        with pytest.raises(AssertionError, match=r"Guard failed: x\.size"):
            each.module()(maps(65))


def test_every_other_value_keeps_its_name_and_what_is_said_of_it() -> None:
    program = export(ready(Net()), (images(),))
    result, report = reparam.collapse_with_report(program)
    kept = {node.name: node for node in result.graph.nodes}
    gone = {name for edit in report.edits if isinstance(edit, Substitute) for name in edit.gone}
    for node in program.graph.nodes:
        if node.op != "placeholder" and node.name not in gone:
            assert kept[node.name].meta.keys() >= node.meta.keys() - {"from_node", "source_fn_stack"}
            assert str(kept[node.name].meta.get("val")) == str(node.meta.get("val"))


def test_edits_are_data_and_do_the_same_to_another_copy() -> None:
    program = export(build("two branches"), (maps(),))
    result, report = reparam.collapse_with_report(program)
    edits = from_text(to_text(report.edits))
    assert edits == report.edits
    assert [str(edit) for edit in edits] == ["compute add from x by Conv2d(4 -> 4, 3x3)"]
    made = []
    for edit in edits:
        assert isinstance(edit, Substitute)
        layer = edit.layer.build(nn.Module()).to_empty(device="cpu")
        layer.load_state_dict({"weight": result.state_dict[edit.weight], "bias": result.state_dict[edit.bias]})
        made.append((edit, layer))
    again = substitute(ProgramGraph(program), made)
    assert isinstance(again, ExportedProgram)
    assert torch.equal(again.module()(maps()), result.module()(maps()))


def test_several_inputs_and_outputs_and_nested_ones() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Parallel()

        def forward(self, given: dict[str, Tensor], *, scale: Tensor) -> dict[str, Any]:
            y = self.body(given["image"])
            return {"maps": [y, y * scale], "mean": y.mean()}

    model, x = ready(Nested()), torch.randn(2, 8, 12, 12)
    program = export(model, ({"image": x},), {"scale": torch.ones(1)})
    result, report = reparam.collapse_with_report(program)
    assert len(report.folds) == 1
    got, wanted = (m({"image": x}, scale=torch.ones(1)) for m in (result.module(), model))
    assert torch.allclose(got["maps"][1], wanted["maps"][1], atol=1e-5)


class Builtins(nn.Module):
    """Inputs with names that torch.fx changes in a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = conv(bias=False), bn(), conv(1), bn(), conv()

    def forward(self, input: Tensor, filter: Tensor, *, next: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(input)) + self.c(input), self.d(self.e(filter)) + next


@pytest.mark.parametrize("form", [lambda p: p, lambda p: p.module()], ids=["program", "module"])
def test_inputs_may_be_called_as_builtins_are(form: Callable[[ExportedProgram], Any]) -> None:
    model = ready(Builtins())
    program = export(model, (maps(), maps()), {"next": maps()})
    given = form(program)
    result, report = reparam.collapse_with_report(given)
    assert len(report.folds) == 2
    assert reparam.explain(result).folds == []
    if isinstance(result, ExportedProgram):
        assert result.graph_signature.user_inputs == program.graph_signature.user_inputs
        torch.export.save(result, file := io.BytesIO())
        file.seek(0)
        result = torch.export.load(file).module()
    x, y, z = maps(), maps(), maps()
    assert torch.allclose(torch.stack(result(x, y, next=z)), torch.stack(model(x, y, next=z)), atol=1e-5)


def test_what_is_not_read_is_counted_and_named() -> None:
    model = build("nothing to fold")
    model.code = lambda m, x: torch.special.bessel_j0(m.c(torch.special.bessel_j0(m.a(x))))
    report = reparam.explain(export(model, (maps(),)))
    assert report.folds == []
    assert report.notes == ["not read: 2 calls of aten.special_bessel_j0.default"]


def test_a_norm_in_training_mode_stays_and_says_why() -> None:
    model = build("convolution and norm").train()
    report = reparam.explain(export(model, (maps(),)))
    assert report.folds == []
    assert any("batch" in refusal.message and "b" in refusal.layer for refusal in report.refusals)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own, of its own
def test_an_interface_that_the_export_has_kept_stays() -> None:
    model = build("two branches")
    program = export(model, (maps(),), preserve_module_call_signature=("a", "c"))
    result, report = reparam.collapse_with_report(program)
    assert report.folds == []
    assert any("interface" in refusal.message for refusal in report.refusals)
    assert torch.allclose(torch.export.unflatten(result)(maps()), model(maps()), atol=1e-5)


def test_modules_that_were_unflattened_fold_inside() -> None:
    model, x = ready(Parallel()), torch.randn(2, 8, 12, 12)
    program = export(nn.Sequential(model), (x,))
    result, report = reparam.collapse_with_report(torch.export.unflatten(program))
    assert len(report.folds) == 1
    assert torch.allclose(result(x), model(x), atol=1e-5)


class Counting(nn.Module):
    """A buffer that every call changes is no shift of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = self.norm(self.conv(x)) + self.calls
        return y


@pytest.mark.parametrize("core", [False, True])
def test_a_buffer_that_a_program_writes_is_no_constant(core: bool) -> None:
    model, x = ready(Counting()), maps()
    program = export(model, (x,))
    program = program.run_decompositions() if core else program
    result, report = reparam.collapse_with_report(program, verify="folds")
    assert len(report.folds) == 1
    before, after = program.module(), result.module()
    for _ in range(3):
        assert torch.allclose(after(x), before(x), atol=1e-5)


class Masked(nn.Module):
    """Its kernel is seen through a mask that is made in each call; in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.weight, self.norm, self.in_place = nn.Parameter(torch.randn(C, C, 3, 3)), nn.BatchNorm2d(C), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            mask = torch.zeros(1, C, C, 1, 1)
            mask[0][0].fill_(1)
            mask = mask[0] > 0.5
        else:
            mask = (torch.arange(C) >= torch.arange(C).unsqueeze(-1)).view(C, C, 1, 1)
        y: Tensor = self.norm(F.conv2d(x, torch.where(mask, self.weight, 0.0)))
        return y


@pytest.mark.parametrize("dialect", ["training", "core"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_mask_that_is_made_in_each_call(in_place: bool, dialect: str) -> None:
    model, x = ready(Masked(in_place)), maps()
    program = export(model, (x,))
    program = program.run_decompositions() if dialect == "core" else program
    result, report = reparam.collapse_with_report(program, verify="folds")
    assert torch.allclose(result.module()(x), model(x), atol=1e-5)
    if not in_place:
        assert len(report.folds) == 1
        assert not any("arange" in call for call in calls(result))


def test_what_was_unflattened_and_folded_stays_as_it_is() -> None:
    model, x = build("two branches"), maps()
    inner = nn.Sequential(model, nn.ReLU()).eval()
    result = reparam.collapse(torch.export.unflatten(export(inner, (x,))), example_inputs=x)
    again, report = reparam.collapse_with_report(result, example_inputs=x)
    assert report.folds == []
    assert torch.equal(again(x), result(x))


class Scaled(nn.Module):
    """A convolution that is no layer: only a new forward can fold it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(C, C, 3, 3)), nn.Parameter(torch.rand(C, 1, 1))
        self.act, self.last = nn.ReLU(), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.last(nn.functional.conv2d(x, self.weight) * self.scale))
        return y


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), reparam.collapse])
@pytest.mark.parametrize("inside", [False, True])
def test_a_traced_module_with_a_new_forward_is_still_one(again: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    """Its graph says what it computes, and copies, files and another collapse keep that."""
    traced, x = fx.symbolic_trace(Scaled().eval()), maps()
    model = nn.Sequential(traced, nn.Identity()).eval() if inside else traced
    result, report = reparam.collapse_with_report(model, example_inputs=x)
    assert len(report.folds) == 1
    kept = again(result)
    assert torch.allclose(kept(x), model(x), atol=1e-4)
    graph = kept[0].graph if inside else kept.graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_module"] == ["last", "act"]
    assert reparam.explain(kept).folds == []


def test_bad_input_gets_one_line() -> None:
    program = export(build("two branches"), (maps(),))
    with pytest.raises(ReparamError, match="expand the module, then export"):
        reparam.expand(program, "acb")  # type: ignore[arg-type]
    with pytest.raises(ReparamError, match="drop like= and inplace="):
        reparam.collapse(program, inplace=True)
    with pytest.raises(ReparamError, match="drop like= and inplace="):
        reparam.collapse(program, like=build("two branches"))
    broken = export(build("two branches"), (maps(),))
    broken.state_dict["a.weight"].data[0] = float("nan")
    with pytest.raises(ReparamError, match=r"a\.weight holds NaN"):
        reparam.collapse(broken)


def test_verify_takes_programs_too() -> None:
    model, x = build("two branches"), maps()
    program = export(model, (x,))
    assert reparam.verify(program, reparam.collapse(program)).ok
    assert reparam.verify(model, reparam.collapse(program), x).ok
    wrong = copy.deepcopy(model)
    wrong.a.weight.data *= 1.01
    assert not reparam.verify(program, wrong).ok


def test_a_wrong_translation_is_no_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof replays the calls of the graph, and not what they were taken for."""
    from passes.graph import aten

    monkeypatch.setitem(aten._RULES, "aten.sub.Tensor", aten._RULES["aten.add.Tensor"])
    model = build("the difference of two")
    result, report = reparam.collapse_with_report(export(model, (maps(),)))
    assert report.folds == []
    assert len(report.taken_back) == 1
    assert torch.equal(result.module()(maps()), export(model, (maps(),)).module()(maps()))


def test_a_wrong_edit_is_taken_back_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    right = program_graph._Writer.conv

    def wrong(self: Any, layer: Any, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        return right(self, layer, x, weight, None if layer.groups == C else bias)

    model = Code(lambda m, x: m.d(m.c(m.b(m.a(x)).relu())), a=conv(), b=bn(), c=conv(groups=C), d=bn())
    program = export(lively(model).float().eval(), (maps(),))
    monkeypatch.setattr(program_graph._Writer, "conv", wrong)
    result, report = reparam.collapse_with_report(program)
    assert [fold.layers for fold in report.folds] == [("a", "b")]
    assert [refusal.layer for refusal in report.taken_back] == ["c, d"]
    assert "taken back" in caplog.text
    assert torch.allclose(result.module()(maps()), program.module()(maps()), atol=1e-5)
    with pytest.raises(EquivalenceError, match="differs"):
        reparam.collapse(program, strict=True)


AVERAGED = ("transposed", "flat", "flipped", "one pixel", "mean", "pooled", "upsampled", "bilinear", "shuffled pixels")


@pytest.mark.parametrize("name", AVERAGED)
def test_a_norm_behind_what_moves_or_averages(name: str) -> None:
    case = test_layouts.FOLDS[name]
    model, x = case.build(), case.input()
    program = torch.export.export(model, (x,))
    folded, report = reparam.collapse_with_report(program)
    assert report.after is not None
    assert (len(report.folds), report.after.norms) == (1, 0)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert torch.allclose(folded.module()(x), model(x), rtol=1e-12, atol=1e-12)
    folded.run_decompositions()
    with io.BytesIO() as file:
        torch.export.save(folded, file)
        file.seek(0)
        assert torch.allclose(torch.export.load(file).module()(x), model(x), rtol=1e-12, atol=1e-12)
