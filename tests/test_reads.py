"""Ways of writing the same network: keywords for tensors, stacked branches that are summed, norms of another name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ready
from test_layouts import Net, conv, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import reparam
from passes.proof.compare import Verdict
from passes.refusal import Reason

C = 6
IMAGE = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def collapsed(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> tuple[Any, reparam.Explanation]:
    """The network after collapse, which computes what it did; and its report."""
    torch.manual_seed(0)
    model: Any = ready(Net(forward, **layers)).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=IMAGE)
    assert report.checked is not None
    assert report.checked.verdict is Verdict.EQUAL
    assert not report.taken_back
    return folded, report


KEYWORDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "functions": lambda m, x: F.batch_norm(
        input=F.conv2d(input=x, weight=m.a.weight, bias=m.a.bias),
        running_mean=m.n.running_mean, running_var=m.n.running_var, weight=m.n.weight, bias=m.n.bias),
    "layers": lambda m, x: m.n(input=m.a(input=x)).relu(),
    "two operands": lambda m, x: torch.add(input=m.n(m.a(x)), other=m.n.bias[:, None, None]).relu(),
    "a list": lambda m, x: m.n(torch.cat(tensors=[m.a(x)], dim=1)).relu(),
    "of others": lambda m, x: torch.where(x.mean() > 9, input=m.n(m.a(x)), other=m.n.bias[:, None, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_tensors_by_keyword(name: str) -> None:
    _, report = collapsed(KEYWORDS[name], a=conv(), n=norm(2))
    assert len(report.folds) == 1


@pytest.mark.parametrize("form", ["branches", "online"])
def test_a_block_is_called_by_keyword_as_well(form: str) -> None:
    model = ready(Net(lambda m, x: m.n(input=m.a(input=x)).relu(), a=conv(), n=norm(2)))
    plan = reparam.plan(model, "acb", form=form)
    assert [row.layer for row in plan.expanded] == ["a"]
    expanded = reparam.expand(model, "acb", form=form).eval()
    with torch.no_grad():
        assert torch.allclose(expanded(IMAGE.float()), model(IMAGE.float()), rtol=1e-5, atol=1e-5)
    stock: Any = reparam.collapse(expanded, like=model)
    assert stock.state_dict().keys() == model.state_dict().keys()


def branches(count: int = 3) -> dict[str, nn.Module]:
    made = (nn.Sequential(nn.Conv2d(3, C, k, padding=k // 2, bias=False), norm(2)) for k in (1, 3, 3)[:count])
    return {f"b{i}": branch for i, branch in enumerate(made)}


SUMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "method": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).sum(0).relu(),
    "function": lambda m, x: torch.sum(torch.stack([m.b0(x), m.b1(x), m.b2(x)], 1), dim=1).relu(),
    "mean": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)], dim=-1).mean(-1).relu(),
    "kept": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).sum(0, keepdim=True)[0].relu(),
}


@pytest.mark.parametrize("name", SUMS)
def test_stacked_branches(name: str) -> None:
    _, report = collapsed(SUMS[name], **branches())
    assert report.after is not None
    assert (report.after.convs, report.after.norms) == (1, 0)


OTHER_SUMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "over space": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).sum(3).relu(),
    "over all": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).sum(),
    "of both": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).sum((0, 3)).relu(),
    "over the batch": lambda m, x: torch.stack([m.b0(x), m.b1(x), m.b2(x)]).mean(1).relu(),
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_other_sums_leave_the_branches(name: str) -> None:
    _, report = collapsed(OTHER_SUMS[name], **branches())
    assert report.after is not None
    assert (report.after.convs, report.after.norms) == (3, 0)


def test_instance_norm_with_running_statistics() -> None:
    folded, report = collapsed(
        lambda m, x: m.n(m.a(x)).relu(), a=conv(), n=nn.InstanceNorm2d(C, affine=True, track_running_stats=True)
    )
    assert len(report.folds) == 1
    assert not any(isinstance(m, nn.InstanceNorm2d) for m in folded.modules())


def test_instance_norm_of_its_input_says_so() -> None:
    _, report = collapsed(lambda m, x: m.n(m.a(x)).relu(), a=conv(), n=nn.InstanceNorm2d(C, affine=True))
    assert [(r.layer, r.reason) for r in report.refusals] == [("n", Reason.BATCH_STATISTICS)]
    assert "statistics of each input" in report.refusals[0].message


@pytest.mark.filterwarnings("ignore")
def test_a_script_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = ready(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU()))
    for network, path in ((torch.jit.script(model), ""), (nn.Sequential(torch.jit.script(model)), "0")):
        caplog.clear()
        report = reparam.collapse_with_report(network)[1]
        assert [r.layer for r in report.untraced] == [path]
        assert "collapse the model first" in report.untraced[0].message
        assert "collapse the model first" in caplog.text
    with pytest.raises(reparam.ReparamError, match="collapse the model first"):
        reparam.collapse(torch.jit.freeze(torch.jit.script(model)))
    with pytest.raises(reparam.ReparamError, match="expand first"):
        reparam.plan(torch.jit.freeze(torch.jit.script(model)), "acb")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_script_inside_folds_and_trains(caplog: pytest.LogCaptureFixture) -> None:
    """Torch copies its parameters as results of an operation, which no optimizer takes; it warns of their gradients."""
    script = torch.jit.script(ready(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C))))
    model = ready(nn.Sequential(script, nn.ReLU(), nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)))
    expanded = reparam.expand(model, "acb")
    for network in (expanded, reparam.collapse(expanded), reparam.collapse(model)):
        assert all(p.is_leaf and p.requires_grad for p in network.parameters())
        torch.optim.SGD(reparam.param_groups(network, 1e-4), lr=0.1)
        reparam.verify(model, network, torch.randn(2, 3, 8, 8)).raise_if_different()
    assert "taken back" not in caplog.text


@pytest.mark.parametrize("trained", [False, True])
def test_pruning_masks_are_folded_and_told(trained: bool) -> None:
    torch.manual_seed(0)
    model = ready(nn.Sequential(nn.Conv2d(3, C, 3, bias=False), nn.BatchNorm2d(C))).double()
    prune.l1_unstructured(model[0], "weight", 0.5)
    if trained:  # the weight beside the mask is as the last forward left it
        with torch.no_grad():
            model[0].weight_orig.mul_(3)
    folded, report = reparam.collapse_with_report(model, example_inputs=IMAGE)
    assert len(report.folds) == 1
    assert report.notes == ["the pruning mask of 0 is in the folded weights"]
    with torch.no_grad():
        assert torch.allclose(folded(IMAGE), model(IMAGE), rtol=1e-12, atol=1e-12)
    assert float((folded[0].weight == 0).double().mean()) == 0.5
    assert folded.state_dict().keys() == {"0.weight", "0.bias"}
    assert prune.is_pruned(model)
    assert not prune.is_pruned(folded)


def test_the_shape_of_what_vanishes_may_be_asked() -> None:
    def asked(m: Any, x: Tensor) -> Tensor:
        y = m.body(x).mul(0.1)
        z: Tensor = (y + m.shift).relu() * y.shape[1]
        return z

    def behind(m: Any, x: Tensor) -> Tensor:
        y = m.body(x).transpose(1, 3).mul(0.1)
        z: Tensor = (y + m.shift).relu() * y.shape[1]
        return z

    class Shifted(Net):
        def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
            super().__init__(forward, body=nn.Sequential(nn.Sigmoid(), nn.Conv2d(3, C, 3)))
            self.shift = nn.Parameter(torch.tensor(0.3))

    for how in (asked, behind):
        model = ready(Shifted(how)).double()
        folded, report = reparam.collapse_with_report(model, example_inputs=IMAGE)
        assert (len(report.folds), report.refusals) == (1, [])
        assert set(folded.state_dict()) == {"body.1.weight", "body.1.bias"}
        with torch.no_grad():
            assert torch.allclose(folded(IMAGE), model(IMAGE), rtol=1e-12, atol=1e-12)


def test_a_layer_keeps_its_name_where_a_factor_goes() -> None:
    """The factor stands in the code of another module than the convolution."""
    folded, report = collapsed(
        lambda m, x: m.body(x).mul(0.1) + x,
        body=nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU(True), nn.Conv2d(C, 3, 3, padding=1)),
    )
    assert len(report.folds) == 1
    assert set(folded.state_dict()) == {f"body.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


@pytest.mark.parametrize("how", [lambda y: y.transpose(1, 2), lambda y: y.flatten(0, 1)])
def test_a_norm_behind_an_unknown_rank_asks_for_inputs(how: Callable[[Tensor], Tensor]) -> None:
    model = ready(Net(lambda m, x: m.n(how(m.a(x))).relu(), a=nn.Linear(5, C), n=norm(1))).double()
    (refusal,) = reparam.explain(model).refusals
    assert (refusal.layer, refusal.reason) == ("n", Reason.RANK_UNKNOWN)
    assert "example_inputs" in refusal.message
    assert len(reparam.explain(model, torch.randn(2, 7, 5).double()).folds) == 1


class Guarded(nn.Module):
    """Cannot be read as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too bright")
        y: Tensor = self.embed(x).relu()
        return y


def test_inputs_tell_the_rank_behind_what_is_not_read() -> None:
    layers = {"g": Guarded(), "a": nn.Linear(5, C), "n": norm(1)}
    model = ready(Net(lambda m, x: m.n(m.a(m.g(x)).transpose(1, 2)).relu(), **layers)).double()
    assert Reason.RANK_UNKNOWN in [r.reason for r in reparam.explain(model).refusals]
    x = torch.randn(2, 7, 5).double()
    folded, report = reparam.collapse_with_report(model, example_inputs=x)
    assert len(report.folds) == 1
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


def apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """A function that cannot be read: what it returns may be what it is given."""
    if float(x.sum()) > 1e9:
        raise ValueError("too bright")
    return x[:, :3], x[:, 3:]


def together(y: Tensor, rest: Tensor) -> Tensor:
    if float(y.sum()) > 1e9:
        raise ValueError("too bright")
    return y + rest


def summed_in_place(m: Any, x: Tensor) -> Tensor:
    y, rest = apart(torch.cat([x, x[:, :1]], 1))
    z = m.a(y)
    z += m.b(y)
    return together(z, rest)


def test_what_unread_code_makes_of_two_tensors_does_not_join_them() -> None:
    """It may be either of them; a change of the one in place is none of the other."""
    _, report = collapsed(summed_in_place, a=nn.Conv2d(3, C, 3, padding=1), b=nn.Conv2d(3, C, 1))
    assert report.after is not None
    assert report.after.convs == 1


def changed_behind(m: Any, x: Tensor) -> Tensor:
    y, rest = apart(torch.cat([x, x[:, :1]], 1))
    z = m.a(y)
    both = together(z, rest)
    z += m.b(y)
    return both + z


def test_a_change_that_unread_code_may_hand_on_is_seen() -> None:
    _, report = collapsed(changed_behind, a=nn.Conv2d(3, C, 3, padding=1), b=nn.Conv2d(3, C, 1))
    assert report.after is not None
    assert report.after.convs == 2


class SamePadded(nn.Conv2d):
    """Pads by the size of its input, in numbers of Python, as TensorFlow's layers do, and takes no symbols for it."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x.shape[2], int):
            raise RuntimeError("a size that is no number")
        wanted = [math.ceil(int(s) / 2) * 2 + self.kernel_size[0] - int(s) for s in x.shape[2:]]
        return F.conv2d(F.pad(x, (0, wanted[1], 0, wanted[0])), self.weight, self.bias, stride=2)


def test_the_type_of_what_a_layer_returns_is_known() -> None:
    def listed(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        if isinstance(y, (list, tuple)):
            y = y[-1]
        result: Tensor = m.n(m.a(y)).relu()
        return result

    model = ready(Net(listed, stem=SamePadded(3, 3, 3), a=nn.Conv2d(3, C, 3), n=norm(2)))
    plan = reparam.plan(model, "acb")
    assert [row.layer for row in plan.expanded] == ["stem", "a"]
    assert plan.expanded[1].found.norm is not None
