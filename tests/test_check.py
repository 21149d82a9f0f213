"""The result is run against the module: each way to differ is planted once, seen, named, and taken back alone."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import WIDTH, Activated, Branches, ConvBN, Net, Parallel, Residual, images, maps, ready, snapshot
from small_networks import unchanged as is_unchanged
from torch import Tensor, nn

import passes.collapse
import passes.compiler
import reparam
from passes.edits.edit import Edit
from passes.graph.inputs import Example, as_call, likely
from passes.proof.check import NoInputError, check, observe
from passes.proof.run import run, runner_of
from reparam import Counts, EquivalenceError, ReparamError, Verdict

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Boxes:
    """What a detector returns."""

    scores: Tensor
    label: str = "cat"


class Tensors:
    """An object of somebody else's, with tensors as attributes."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Returns(ConvBN):
    """A network whose output is wrapped, whose state is changed, or that draws, by a function set from outside."""

    def __init__(self, wrap: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap
        self.register_buffer("seen", torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self, super().forward(x))


def pair(ours: Callable[[Any, Tensor], Any], theirs: Callable[[Any, Tensor], Any]) -> tuple[Any, Any]:
    """Two networks that differ in nothing else."""
    original: Any = ready(Returns(ours))
    result = copy.deepcopy(original)
    result.wrap = theirs
    return original, result


def counted(net: Any, y: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return y


def averaged(net: Any, y: Tensor) -> Tensor:
    net.seen = 0.5 * net.seen + y.mean((2, 3))[:1]
    return y + net.seen[:, :, None, None]


def averaged_once(net: Any, y: Tensor) -> Tensor:
    """The first call is right, and all later ones."""
    y = averaged(net, y)
    net.seen = net.seen.round(decimals=3)
    return y


DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "value": (lambda n, y: y, lambda n, y: y * (1 + 1e-6), "other numbers"),
    "one value": (lambda n, y: y, lambda n, y: y + (torch.arange(WIDTH)[:, None, None] == 3) * 1e-6, "other numbers"),
    "shape": (lambda n, y: y, lambda n, y: y[..., 1:], "returns shape"),
    "nested value": (lambda n, y: {"a": [y, y]}, lambda n, y: {"a": [y, y + 1e-6]}, "other numbers"),
    "complex": (lambda n, y: torch.fft.fft(y), lambda n, y: torch.fft.fft(y).conj(), "other numbers"),
    "integers": (lambda n, y: y.argmax(1), lambda n, y: y.argmin(1), "other numbers"),
    "dataclass": (lambda n, y: Boxes(y), lambda n, y: Boxes(y + 1e-6), "other numbers"),
    "field": (lambda n, y: Boxes(y), lambda n, y: Boxes(y, "dog"), "'dog' instead of 'cat'"),
    "object": (lambda n, y: Tensors(y), lambda n, y: Tensors(y + 1e-6), "other numbers"),
    "float": (lambda n, y: y.mean().item(), lambda n, y: y.mean().item() + 1e-6, "other numbers"),
    "array": (lambda n, y: y.numpy(), lambda n, y: y.numpy() + 1e-6, "other numbers"),
    "OrderedDict": (lambda n, y: OrderedDict(a=y), lambda n, y: {"a": y}, "a dict instead of an OrderedDict"),
    "tuple": (lambda n, y: (y, y), lambda n, y: [y, y], "a list instead of a tuple"),
    "named tuple": (lambda n, y: Pair(y, y), lambda n, y: (y, y), "a tuple instead of a Pair"),
    "key": (lambda n, y: {"a": y}, lambda n, y: {"b": y}, "as keys"),
    "order of keys": (lambda n, y: {"a": y, "b": y}, lambda n, y: {"b": y, "a": y}, "as keys"),
    "count": (lambda n, y: (y, y), lambda n, y: (y,), "1 values instead of 2"),
    "nothing": (lambda n, y: y, lambda n, y: None, "a NoneType instead of a Tensor"),
    "NaN": (lambda n, y: y, lambda n, y: y * float("nan"), "other numbers"),
    "infinity": (lambda n, y: y.log(), lambda n, y: y.log().nan_to_num(), "other numbers"),
    "dtype": (lambda n, y: y.float(), lambda n, y: y.half(), "float16 instead of float32"),
    "dtype of counts": (lambda n, y: y.argmax(1), lambda n, y: y.argmax(1).int(), "int32 instead of int64"),
    "attribute": (counted, lambda n, y: y, "no longer sets calls"),
    "buffer": (averaged, lambda n, y: y + (y.mean((2, 3))[:1])[:, :, None, None], "no longer sets seen"),
    "another attribute": (counted, lambda n, y: (setattr(n, "calls", 7), y)[1], "leaves another calls behind"),
    "new attribute": (lambda n, y: y, lambda n, y: (setattr(n, "seen", y[:1, :, 0, 0]), y)[1], "sets seen"),
    "second call": (averaged, averaged_once, "in call 2|leaves another seen"),
    "torch draws": (lambda n, y: y + torch.rand(()), lambda n, y: y + 0.4962565899, "draws other random numbers"),
    "Python draws": (lambda n, y: y + random.random(), lambda n, y: y + 0.8444218515, "draws other random numbers"),
    "NumPy draws": (lambda n, y: y + np.random.rand(), lambda n, y: y + 0.5488135039, "draws other random numbers"),
    "raises": (lambda n, y: y, lambda n, y: y.no_such_method(), "raises AttributeError"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_every_way_to_differ_is_seen(name: str, dtype: torch.dtype) -> None:
    ours, theirs, said = DIFFERENT[name]
    original, result = (net.to(dtype) for net in pair(ours, theirs))
    before = snapshot(original), snapshot(result)
    found = check(original, result)
    assert found.verdict is Verdict.DIFFERENT
    assert any(part in "; ".join(map(str, found.differences)) for part in said.split("|")), found
    with pytest.raises(EquivalenceError, match="differs from the module that it was made of"):
        found.raise_if_different()
    assert is_unchanged(original, before[0])
    assert is_unchanged(result, before[1])


@pytest.mark.parametrize("name", DIFFERENT)
def test_the_same_is_equal(name: str) -> None:
    """The other half: none of these networks differs from its own copy."""
    original, result = pair(DIFFERENT[name][0], DIFFERENT[name][0])
    found = check(original, result)
    assert found.verdict is Verdict.EQUAL, found
    assert found.error == 0


def test_generators_are_the_callers_own_again() -> None:
    draws: Callable[[Any, Tensor], Any] = lambda n, y: y + torch.rand(()) + random.random() + np.random.rand()  # noqa: E731
    original, result = pair(draws, draws)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert check(original, result).verdict is Verdict.EQUAL
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states[1:]


def test_keyword_that_got_lost() -> None:
    class Renamed(ConvBN):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y)

    original, result = ready(ConvBN()), ready(Renamed())
    result.load_state_dict(original.state_dict())
    assert "raises TypeError" in str(check(original, result).differences[0])
    assert check(original, result, by_name=False).verdict is Verdict.EQUAL


def test_change_of_the_input_that_got_lost() -> None:
    """What a network does to the tensors of its caller is part of what it does, however they are passed."""

    class Doubling(ConvBN):
        def forward(self, x: Tensor, others: Any = ()) -> Tensor:
            return super().forward(self.doubled(x))

        def doubled(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    original: Any = ready(Doubling())
    result = copy.deepcopy(original)
    assert check(original, result).verdict is Verdict.EQUAL
    result.doubled = lambda x: x * 2
    assert [d.what for d in check(original, result, maps()).differences] == ["changes its input to something else"]


def test_hook_that_got_lost() -> None:
    """Hooks of a person are never run, and have to be there afterwards."""
    original = ready(ConvBN())
    seen: list[Tensor] = []
    original.conv.register_forward_hook(lambda module, args, output: seen.append(output))
    found = check(original, copy.deepcopy(original))
    assert found.verdict is Verdict.EQUAL
    result = copy.deepcopy(original)
    result.conv._forward_hooks.clear()
    found = check(original, result)
    assert [str(d) for d in found.differences] == ["conv has lost its hook"]
    assert not seen


def test_nothing_to_compare_is_no_verdict() -> None:
    silent: Callable[[Any, Tensor], Any] = lambda n, y: {}  # noqa: E731
    assert check(*pair(silent, silent)).verdict is Verdict.INCONCLUSIVE


def test_chance_is_no_difference() -> None:
    """A network that no seed reaches cannot be compared with anything, not with itself either."""
    chance: Callable[[Any, Tensor], Any] = lambda n, y: y + int.from_bytes(os.urandom(2), "big")  # noqa: E731
    found = check(*pair(chance, chance))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "does not return the same twice" in found.compared


def test_which_modules_ran() -> None:
    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            y = self.features(x)
            return self.head(y.mean((2, 3))) if not self.training else self.residual.conv1.forward(y)

    model = ready(Auxiliary())
    found = check(model, copy.deepcopy(model))
    assert {"", "stem", "stem.conv", "head"} <= found.ran
    assert check(model, copy.deepcopy(model), training=True).ran >= {"residual.conv1"}, (
        "also when called past its hooks"
    )


def test_statistics_in_training() -> None:
    """Running statistics have to be the same after a step; a norm may have moved."""
    model = ready(nn.Sequential(ConvBN(), nn.ReLU()))
    assert check(model, copy.deepcopy(model), training=True).verdict is Verdict.EQUAL
    other = copy.deepcopy(model)
    other[0].norm.momentum = 0.3
    found = check(model, other, training=True)
    assert {d.what for d in found.differences} >= {"leaves another running_mean behind"}
    assert check(model, other).verdict is Verdict.EQUAL

    class Elsewhere(nn.Module):
        def __init__(self, plain: Any) -> None:
            super().__init__()
            self.conv, self.norm = nn.Sequential(OrderedDict(conv=plain.conv, bn=plain.norm)), nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.norm(self.conv(x))

    plain = ready(ConvBN())
    moved = Elsewhere(copy.deepcopy(plain)).eval()
    assert check(plain, moved, training=True).verdict is Verdict.DIFFERENT
    assert check(plain, moved, training=True, moved={"norm": "conv.bn"}).verdict is Verdict.EQUAL


def test_the_callers_settings_do_not_matter() -> None:
    model = ready(Net())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert check(model, copy.deepcopy(model)).verdict is Verdict.EQUAL
    torch.set_default_device("meta")
    try:
        assert reparam.verify(model, reparam.collapse(model)).ok
    finally:
        torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    try:
        assert check(model, copy.deepcopy(model)).verdict is Verdict.EQUAL
    finally:
        torch.set_default_dtype(torch.float32)


class Insists(nn.Module):
    """Takes its own dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return x


def stubborn() -> Any:
    return ready(nn.Sequential(Insists(), ConvBN()))


def test_a_network_that_refuses_float64_is_run_as_it_is() -> None:
    report = reparam.collapse_with_report(stubborn())[1]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert "refuses float64" in report.checked.compared
    other = copy.deepcopy(model := stubborn())
    other[1].conv.weight.data *= 1.01
    assert check(model, other).verdict is Verdict.DIFFERENT


# ------------------------------------------------------------------ collapse


def plant(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Any, list[Edit]], None]) -> None:
    """Let the compiler damage the model that it has edited."""
    apply = passes.compiler.apply

    def damaged(model: nn.Module, edits: list[Edit], layers: Any, **held: Any) -> Any:
        undo = apply(model, edits, layers, **held)
        before = {id(m): dict(m._modules) for m in model.modules()}
        modules = list(model.modules())
        if edits:
            damage(model, edits)

        def take_back() -> None:
            for module in modules:
                module._modules.clear()
                module._modules.update(before[id(module)])
            undo()

        return take_back

    monkeypatch.setattr(passes.compiler, "apply", damaged)


def norm_forgotten(model: Any, edits: list[Edit]) -> None:
    """The first convolution of the residual block loses what was folded into it."""
    if any(edit.path == "residual.conv1" for edit in edits):
        plain = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        model.residual.conv1 = plain.to(model.head.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_a_fold_that_does_not_hold_is_taken_back_alone(
    inplace: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported first and logged; the rest stands, and the result computes what the model computed."""
    model = ready(Net()).to(dtype)
    wanted, folds = model(images(dtype=dtype)), len(reparam.collapse_with_report(model)[1].folds)
    plant(monkeypatch, norm_forgotten)
    with caplog.at_level(logging.WARNING, logger="reparam"):
        result, report = reparam.collapse_with_report(model, inplace=inplace)
    assert [refusal.layer for refusal in report.taken_back] == ["residual.conv1, residual.bn1"]
    assert report.taken_back[0].reason is reparam.Reason.TAKEN_BACK
    assert str(report).startswith("taken back:")
    assert "residual.conv1, residual.bn1" in caplog.text
    assert len(report.folds) == folds - 1
    assert Counts.of(result).norms == 1
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    torch.testing.assert_close(result(images(dtype=dtype)), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_strict_raises_and_leaves_the_model(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(Net())
    before = snapshot(model)
    plant(monkeypatch, norm_forgotten)
    with pytest.raises(EquivalenceError, match=r"first at residual\.conv1"):
        reparam.collapse(model, strict=True, inplace=inplace)
    assert is_unchanged(model, before)


def test_a_fold_whose_own_proof_fails_is_taken_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prove, seen = passes.compiler.prove, []

    def failing(*args: Any) -> float:
        seen.append(args[-1])
        if args[-1].startswith("stem"):
            raise EquivalenceError(f"{args[-1]}: the fold is off", layer=args[-1])
        return prove(*args)

    monkeypatch.setattr(passes.compiler, "prove", failing)
    result, report = reparam.collapse_with_report(ready(Net()))
    assert [refusal.layer for refusal in report.taken_back] == ["stem.conv, stem.norm"]
    assert "the fold is off" in report.taken_back[0].message
    assert Counts.of(result).norms == 1
    with pytest.raises(EquivalenceError, match="the fold is off"):
        reparam.collapse(ready(Net()), strict=True)


def test_folds_only_and_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``verify="folds"`` runs no network, ``False`` proves nothing; anything else is an error."""
    runs: list[Any] = []
    forward = Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, x: (runs.append(x), forward(self, x))[1])
    for verify in ("folds", False):
        report = reparam.collapse_with_report(ready(Net()), verify=verify)[1]
        assert report.checked is None
        assert all((fold.error is not None) == bool(verify) for fold in report.folds)
    assert not [x for x in runs if isinstance(x, Tensor)]
    with pytest.raises(ReparamError, match="verify= is True, 'folds' or False"):
        reparam.collapse(ready(Net()), verify="everything")


def test_what_was_compared_is_said() -> None:
    said = str(reparam.collapse_with_report(ready(Net()))[1])
    assert "checked: whole network, made-up input 2x3x64x64, float64: largest relative difference" in said
    said = str(reparam.collapse_with_report(ready(Net()), example_inputs=images())[1])
    assert "checked: whole network, example_inputs 2x3x12x12, float64" in said


class Picky(nn.Module):
    """Takes what nobody would make up; its parts take anything."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Activated(), Residual()])
        self.head = ConvBN()

    def forward(self, batch: Any) -> Tensor:
        return self.head(self.parts[1](self.parts[0](batch["pixels"].float())))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_parts_are_replayed_where_the_whole_cannot_be_run(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    report = reparam.collapse_with_report(ready(Picky()), inplace=inplace)[1]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert "not compared as a whole: no input could be made up" in report.checked.compared
    assert "3 of 3 rewritten parts replayed on their own" in report.checked.compared

    def wrong(model: Any, edits: list[Edit]) -> None:
        if any(edit.path.startswith("parts.1") for edit in edits):
            model.parts[1].bn2 = nn.Sequential(model.parts[1].bn2, nn.Tanh())

    plant(monkeypatch, wrong)
    with pytest.raises(EquivalenceError, match=r"parts\.1"):
        reparam.collapse(ready(Picky()), inplace=inplace, strict=True)


def test_a_head_that_evaluation_never_runs_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithHead(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.head = Parallel()

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, self.head(y)) if self.training else y

    for inplace in (False, True):
        report = reparam.collapse_with_report(ready(WithHead()), inplace=inplace)[1]
        assert report.checked is not None
        assert "1 of 1 rewritten parts that it does not run were replayed" in report.checked.compared

    def wrong(model: Any, edits: list[Edit]) -> None:
        if any(edit.path == "head" for edit in edits):
            model.head = nn.Sequential(model.head, nn.ReLU())

    plant(monkeypatch, wrong)
    for inplace in (False, True):
        report = reparam.collapse_with_report(ready(WithHead()), inplace=inplace)[1]
        assert report.taken_back
        assert all("head" in refusal.layer for refusal in report.taken_back)


def test_numbers_enter_as_they_were_before_rounding() -> None:
    """A float32 network is held to float64's tolerance, with ``like=`` as well."""
    for model in (ready(Net()), ready(Branches()), ready(Parallel())):
        report = reparam.collapse_with_report(model)[1]
        assert report.checked is not None
        assert report.checked.error < 1e-12
    plain = ready(Net())
    expanded = ready(reparam.expand(plain, "acb"))
    report = reparam.collapse_with_report(expanded, like=plain)[1]
    assert report.checked is not None
    assert report.checked.error < 1e-12


class Chaos(ConvBN):
    """Doubles every difference, again and again."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).sigmoid()
        for _ in range(self.times):
            y = 3.99 * y * (1 - y)
        return y


@pytest.mark.parametrize(("times", "verdict"), [(2, Verdict.EQUAL), (16, Verdict.EQUAL), (80, Verdict.INCONCLUSIVE)])
def test_a_network_that_amplifies_rounding_keeps_its_folds(times: int, verdict: Verdict) -> None:
    """Nothing can be told of it as a whole, and that is no reason to take back what was proven one by one."""
    report = reparam.collapse_with_report(ready(Chaos(times)))[1]
    assert report.checked is not None
    assert report.checked.verdict is verdict
    assert (len(report.folds), report.taken_back) == (1, [])
    assert ("tells nothing: rounding in float64 alone makes" in str(report.checked)) == (times == 80)


@pytest.mark.parametrize(("noise", "verdict"), [(0.05, Verdict.EQUAL), (1.0, Verdict.INCONCLUSIVE)])
def test_what_a_coarse_dtype_may_explain_has_a_ceiling(
    monkeypatch: pytest.MonkeyPatch, noise: float, verdict: Verdict
) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    off = copy.deepcopy(model)
    for parameter in off.parameters():
        parameter.data *= 1 + 0.08 * noise
    coarse = {torch.float64: 1e-15, torch.float32: noise}
    monkeypatch.setattr(passes.proof.check, "rounding", lambda *_, precision, **__: coarse[precision])
    assert check(model, off).verdict is verdict


def test_like_that_is_filled_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An identity that forgets its eps is off by a hair, in float32 too."""
    import passes.restore

    identity = passes.restore.make_identity

    def sloppy(norm: Any, exact: Any) -> None:
        identity(norm, exact)
        norm.running_var.fill_(1.0)
        exact.put(norm.running_var, torch.ones_like(norm.running_var, dtype=torch.float64))

    monkeypatch.setattr(passes.restore, "make_identity", sloppy)
    monkeypatch.setattr(passes.restore, "check_pair", lambda *_: None)  # which reads the pair back, and sees it too
    plain = ready(Net())
    with pytest.raises(EquivalenceError, match="other numbers"):
        reparam.collapse(ready(reparam.expand(plain, "acb")), like=plain)


def test_like_takes_over_buffers_that_no_state_dict_holds() -> None:
    class Table(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.rand(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.table

    model, stock = ready(Table()), ready(Table())
    result = reparam.collapse(ready(reparam.expand(model, "acb")), like=stock)
    assert torch.equal(result.table, model.table)


def test_a_model_that_cannot_be_copied_is_not_compared() -> None:
    class Unique(ConvBN):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is but one")

    report = reparam.collapse_with_report(ready(Unique()), inplace=True)[1]
    assert report.checked is not None
    assert report.checked.verdict is Verdict.INCONCLUSIVE
    assert "there is but one" in report.checked.compared
    assert len(report.folds) == 1


# ------------------------------------------------------------------ verify


class Detector(nn.Module):
    """Scores so close that rounding decides which of them are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.score, self.box = nn.Conv2d(WIDTH, 1, 1), nn.Conv2d(WIDTH, 4, 1)
        nn.init.normal_(self.score.weight, 0, 1e-5)
        nn.init.constant_(self.score.bias, 30.0)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).relu()
        scores, boxes = self.score(y).flatten(1), self.box(y).flatten(2)
        best = scores.topk(50, 1).indices
        return boxes.gather(2, best[:, None].expand(-1, 4, -1)), scores.gather(1, best)


def test_a_selection_is_no_difference_and_hides_none() -> None:
    """Boxes that reorder leave it open; a box head that is wrong by half is found all the same."""
    model: Any = Detector().eval()
    x = images(count=1, size=32)
    assert reparam.verify(model, copy.deepcopy(model), x).verdict is Verdict.EQUAL
    rounded = copy.deepcopy(model)
    rounded.score.weight.data *= 1 + 1e-2 * torch.randn(rounded.score.weight.shape)
    found = reparam.verify(model, rounded, x)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "topk" in found.reason
    assert str(found).startswith("inconclusive")
    found.raise_if_different()
    wrong = copy.deepcopy(model)
    wrong.box.weight.data *= 1.5
    found = reparam.verify(model, wrong, x)
    assert found.verdict is Verdict.DIFFERENT
    assert found.first_difference == "box"


def test_a_selection_with_another_option_is_a_difference() -> None:
    class Fewer(Detector):
        def forward(self, x: Tensor) -> Any:
            scores = self.score(self.conv(x).relu()).flatten(1)
            return scores.gather(1, scores.topk(20, 1).indices)

    class More(Detector):
        def forward(self, x: Tensor) -> Any:
            scores = self.score(self.conv(x).relu()).flatten(1)
            return scores.gather(1, scores.topk(21, 1).indices)

    model, other = Fewer().eval(), More().eval()
    other.load_state_dict(model.state_dict())
    assert reparam.verify(model, other, images()).verdict is Verdict.DIFFERENT


def test_the_allowance_has_a_ceiling() -> None:
    """In half precision ten times the noise, or 64 units in the last place, would let anything pass."""
    model = ready(nn.Sequential(*(Residual() for _ in range(4)))).to(torch.bfloat16)
    wrong = copy.deepcopy(model)
    wrong[3].conv2.weight.data *= 3
    x = maps(dtype=torch.bfloat16)
    assert reparam.verify(model, copy.deepcopy(model), x).tolerance <= 0.125
    assert not reparam.verify(model, wrong, x).ok


@pytest.mark.parametrize("kind", ["complex", "dataclass", "object", "nested"])
def test_verify_compares_whatever_is_returned(kind: str) -> None:
    ours, theirs, _ = DIFFERENT["nested value" if kind == "nested" else kind]
    original, result = (net.double() for net in pair(ours, theirs))
    assert reparam.verify(original, copy.deepcopy(original)).ok
    assert reparam.verify(original, result).verdict is Verdict.DIFFERENT


def test_verify_of_nothing_is_an_error() -> None:
    silent: Callable[[Any, Tensor], Any] = lambda n, y: "a caption"  # noqa: E731
    with pytest.raises(ReparamError, match="nothing to compare"):
        reparam.verify(*pair(silent, silent))
    broken: Callable[[Any, Tensor], Any] = lambda n, y: y * float("nan")  # noqa: E731
    with pytest.raises(ReparamError, match="nothing to compare"):
        reparam.verify(*pair(broken, broken))


# ------------------------------------------------------------------ inputs


class One(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Listed(nn.Module):
    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return images


class Two(nn.Module):
    def forward(self, x: Any, mask: Any, scale: float = 1.0) -> Any:
        return x


class Any2(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args


class Open(nn.Module):
    def forward(self, x: Any, **more: Any) -> Any:
        return x


X, Y = torch.zeros(2), torch.ones(3)


@pytest.mark.parametrize(
    ("model", "inputs", "args", "kwargs"),
    [
        (One(), X, (X,), {}),
        (One(), (X,), (X,), {}),
        (One(), [X], (X,), {}),
        (One(), [X, Y], ([X, Y],), {}),
        (One(), ([X, Y],), ([X, Y],), {}),
        (One(), [[X, Y]], ([X, Y],), {}),
        (One(), [{"image": X}], ([{"image": X}],), {}),
        (One(), {"x": X}, (), {"x": X}),
        (One(), {"image": X}, ({"image": X},), {}),
        (One(), ({"image": X},), ({"image": X},), {}),
        (One(), ((X,), {}), (X,), {}),
        (One(), (X, {}), (X,), {}),
        (One(), ([X, Y], {}), ([X, Y],), {}),
        (Any2(), (X, {}), (X, {}), {}),
        (Listed(), [X, Y], ([X, Y],), {}),
        (Listed(), [X], ([X],), {}),
        (Listed(), ([X],), ([X],), {}),
        (Listed(), [[X]], ([X],), {}),
        (Two(), (X, Y), (X, Y), {}),
        (Two(), [X, Y], (X, Y), {}),
        (Two(), ((X,), {"mask": Y}), (X,), {"mask": Y}),
        (Two(), (X, {"mask": Y}), (X,), {"mask": Y}),
        (Two(), {"x": X, "mask": Y}, (), {"x": X, "mask": Y}),
        (Two(), (X, {"other": Y}), (X, {"other": Y}), {}),
        (Any2(), (X, Y), (X, Y), {}),
        (Any2(), {"x": X}, (), {"x": X}),
        (Any2(), Pair(X, Y), (Pair(X, Y),), {}),
        (Open(), {"x": X, "labels": Y}, (), {"x": X, "labels": Y}),
        (Open(), {"image": X}, ({"image": X},), {}),
    ],
)
def test_every_form_of_example_inputs(model: nn.Module, inputs: Any, args: Any, kwargs: Any) -> None:
    got = as_call(inputs, model)
    assert repr(got) == repr((args, kwargs))


def test_the_verbs_take_every_form() -> None:
    class Masked(ConvBN):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * mask

    model, x, mask = ready(Masked()), maps(), torch.rand(2, 1, 12, 12)
    for inputs in ((x, mask), [x, mask], ((x,), {"mask": mask}), {"x": x, "mask": mask}, (x, {"mask": mask})):
        result = reparam.collapse(model, example_inputs=inputs)
        assert reparam.verify(model, result, inputs).ok
        assert len(reparam.explain(model, inputs).folds) == 1
        assert reparam.plan(model, "acb", example_inputs=inputs).per_sample


def test_arguments_by_name_only_are_given_and_made_up() -> None:
    class Named(ConvBN):
        def forward(self, *, pixel_values: Tensor, scale: Tensor | None = None) -> Tensor:
            out = super().forward(pixel_values)
            return out if scale is None else out * scale

    class Both(ConvBN):
        def forward(self, x: Tensor, *, other: Tensor) -> Tensor:
            return super().forward(x + other)

    x = maps()
    for model, inputs in ((Named(), {"pixel_values": x}), (Both(), ((x,), {"other": x})), (Both(), None)):
        ready(model)
        for given in (inputs, None):
            collapsed, explanation = reparam.collapse_with_report(model, example_inputs=given)
            assert "whole network" in str(explanation.checked)
            assert reparam.verify(model, collapsed, given).ok
            assert reparam.plan(model, "acb", example_inputs=given).expanded
            with torch.no_grad():
                collapsed.get_submodule("conv").weight.mul_(2)
            assert not reparam.verify(model, collapsed, given).ok
    with pytest.raises(reparam.ReparamError, match=r"has 'pixel_value', and forward takes \(\*, pixel_values: "):
        reparam.verify(ready(Named()), Named(), {"pixel_value": x})
    args, kwargs = reparam.guess_inputs(Both())
    assert [len(args), *kwargs] == [1, "other"]


def test_a_list_of_one_image_is_what_the_model_takes() -> None:
    class Detector(ConvBN):
        def forward(self, images: Any) -> list[Tensor]:
            return [super(Detector, self).forward(image[None]) for image in images]

    model, image = ready(Detector()), maps()[0]
    assert reparam.verify(model, reparam.collapse(model, example_inputs=[image]), [image]).ok
    one = ready(ConvBN())
    assert reparam.verify(one, one, [maps()]).ok
    with pytest.raises(reparam.ReparamError, match="rejects example_inputs"):
        reparam.verify(one, one, [torch.zeros(3)])


def test_made_up_inputs() -> None:
    """As many as the forward asks for, no two alike, of the model's dtype; integers for an embedding."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(11, WIDTH), nn.Conv1d(WIDTH, 4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.table(ids).transpose(1, 2))

    observed = observe(ready(Words()))
    assert not observed.example.args[0].is_floating_point()
    assert str(observed.example) == "made-up input 2x16"

    class Difference(ConvBN):
        def forward(self, before: Tensor, after: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(after - before) * scale

    example = observe(ready(Difference()).double()).example
    assert len(example.args) == 2
    assert not torch.equal(*example.args)
    assert example.args[0].dtype == torch.float64
    assert all(one.made_up for one in likely(ready(Net())))


def test_no_input_says_what_was_tried() -> None:
    with pytest.raises(NoInputError, match=r"no input could be made up .made-up input 2x8x64x64: "):
        observe(ready(Picky()))


def test_inputs_are_copied() -> None:
    """A network that works in place on what it is given works on a copy; aliases stay aliases."""

    class InPlace(ConvBN):
        def forward(self, x: Any) -> Tensor:
            x["a"].mul_(2)
            return super().forward(x["b"])

    x = maps()
    before = x.clone()
    model = ready(InPlace())
    value = run(runner_of(model), Example(({"a": x, "b": x},))).value
    assert torch.equal(x, before)
    wanted = copy.deepcopy(model).double()({"a": torch.zeros(1), "b": 2 * before.double()}).detach()
    torch.testing.assert_close(value, wanted)
