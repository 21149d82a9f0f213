"""A budget: which layers get which block in which form, by what a training step takes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import reparam
from passes.blocks.kit.layers import BranchSum
from passes.budgeted import make_budgeted_plan
from passes.training.budget import ENOUGH, ROUNDS, Limits, Option, Pair, choose, settle, worth
from passes.training.filters import alternatives
from passes.training.step import Step, Use
from passes.training.step import measure as really_measure
from reparam import Block, Form, ReparamError
from reparam.cli import app
from reparam.recipe import Recipe, RecipeError, parse_blocks

INF = float("inf")
HALF_MORE = Limits(1.5)
BRANCHES, SAMPLED = Form("branches"), Form("sampled")


def option(layer: str, price: float, memory: float = 0.0, *, kernel: int = 100, **how: Any) -> Option:
    form = how.get("form", SAMPLED)
    rank = 0 if form == BRANCHES else 1
    return Option(layer, Block(how.get("block", "dbb")), form, kernel, how.get("trained", 200), rank, (price, memory))


# ------------------------------------------------------------------ the rule


def test_worth_is_kernel_numbers_for_what_a_block_adds() -> None:
    assert worth(option("a", 0.25, kernel=100), (0.5, INF)) == pytest.approx(200)
    assert worth(option("a", 0.25, 0.25, kernel=100), (0.5, 0.5)) == pytest.approx(100)


def test_layers_of_more_worth_come_first_and_smaller_ones_fill_what_is_left() -> None:
    options = [option("dear", 0.3, kernel=100), option("large", 0.3, kernel=900), option("small", 0.1, kernel=20)]
    assert [each.layer for each in choose(options, (0.5, INF))] == ["large", "small"]


def test_all_layers_are_reached_before_one_is_given_more() -> None:
    options = [option(layer, 0.1) for layer in "ab"] + [option(layer, 0.3, form=BRANCHES) for layer in "ab"]
    assert [(each.layer, each.form) for each in choose(options, (0.2, INF))] == [("a", SAMPLED), ("b", SAMPLED)]
    assert [(each.layer, each.form) for each in choose(options, (0.4, INF))] == [("a", BRANCHES), ("b", SAMPLED)]


def test_what_is_left_goes_to_most_trained_numbers() -> None:
    options = [option("a", 0.1, trained=110, block="doconv"), option("a", 0.3, trained=300)]
    options.append(option("a", 0.2, trained=200, block="acb"))
    for room, block in ((0.15, "doconv"), (0.25, "acb"), (0.35, "dbb")):
        assert [each.block.name for each in choose(options, (room, INF))] == [block]


def test_both_limits_hold() -> None:
    options = [option("a", 0.1, 0.3), option("b", 0.3, 0.1), option("c", 0.1, 0.1)]
    chosen = choose(options, (0.4, 0.4))
    assert [each.layer for each in chosen] == ["c", "a"]
    assert [each.layer for each in choose(options, (INF, 0.25))] == ["b", "c"]


def test_a_price_below_nothing_buys_nothing() -> None:
    options = [option("noise", -0.4), option("a", 0.3), option("b", 0.3)]
    assert [each.layer for each in choose(options, (0.5, INF))] == ["noise", "a"]


# ------------------------------------------------------------------ correction


def world(prices: Callable[[Sequence[Option]], float], lost: str = "") -> tuple[list[list[str]], Any]:
    """What a step of a choice takes by ``prices``; layers in ``lost`` do not keep their block."""
    asked: list[list[str]] = []

    def tried(chosen: Sequence[Option]) -> tuple[set[str], Callable[[], Pair], Any]:
        asked.append([each.layer for each in chosen])
        kept = [each for each in chosen if each.layer not in lost]
        return {each.layer for each in kept}, lambda: (1 + prices(kept), 1.0), None

    return asked, tried


def test_a_choice_that_was_too_dear_is_made_again_with_truer_prices() -> None:
    options = [option(layer, 0.1) for layer in "abcdefgh"]
    asked, tried = world(lambda chosen: 0.2 * len(chosen))  # twice what the layers say
    best, rounds = settle(options, Limits(1.5), tried)
    assert [len(each) for each in asked] == [5, 2]
    assert best is not None
    assert best.measured[0] == pytest.approx(1.4)
    assert best.predicted[0] == pytest.approx(1.4, rel=0.02)
    assert not rounds[0].holds(Limits(1.5))


def test_room_that_is_left_is_used() -> None:
    options = [option(layer, 0.1) for layer in "abcdefgh"]
    best, _ = settle(options, Limits(1.3), world(lambda chosen: 0.05 * len(chosen))[1])
    assert best is not None
    assert (len(best.chosen), best.measured[0]) == (6, pytest.approx(1.3))


def test_rounds_are_bounded_and_a_choice_over_the_budget_is_never_kept() -> None:
    options = [option(f"{i}", 0.01) for i in range(90)]
    counter = iter(range(1, 100))
    asked, tried = world(lambda chosen: 2.0 + 1 / next(counter))
    best, rounds = settle(options, Limits(1.5), tried)
    assert best is None
    assert 1 < len(rounds) == len(asked) <= ROUNDS


def test_it_stops_where_there_is_nothing_to_add() -> None:
    asked, tried = world(lambda chosen: 0.01 * len(chosen))
    best, _ = settle([option("a", 0.1), option("b", 0.1)], Limits(9), tried)
    assert asked == [["a", "b"]]
    assert best is not None
    assert best.used(Limits(9)) < ENOUGH


def test_what_is_taken_back_is_not_chosen_again() -> None:
    options = [option(layer, 0.2) for layer in "abc"]
    asked, tried = world(lambda chosen: 0.2 * len(chosen), lost="a")
    best, _ = settle(options, Limits(1.45), tried)
    assert asked == [["a", "b"], ["b", "c"]]
    assert best is not None
    assert [each.layer for each in best.chosen] == ["b", "c"]


# ------------------------------------------------------------------ plans


class Net(nn.Sequential):
    """Three layers of different size."""

    def __init__(self) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs) in enumerate([(3, 8), (8, 8), (8, 16)]):
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
        super().__init__(layers)


X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SECONDS = {("dbb", "branches"): 4.0, ("dbb", "sampled"): 1.0, ("acb", "branches"): 2.0, ("acb", "sampled"): 0.5}


class Fake:
    """Measures by a table: ten units for a plain layer of the network, and a block's own on top, times its channels."""

    def __init__(self, beyond: float = 1.0) -> None:
        self.beyond, self.pairs = beyond, 0

    def __call__(self, steps: Sequence[Step]) -> list[Use]:
        self.pairs += len(steps) == 2 and not steps[0].whole
        return [self.use(step) for step in steps]

    def use(self, step: Step) -> Use:
        added = 0.0
        for module in step.model.modules():
            if isinstance(module, BranchSum):
                kind = str(module.reparam_block).partition("(")[0]
                added += SECONDS[kind, module.form] * (self.beyond if step.whole else 1.0)
        return Use(10.0 + added, 100 + 20 * added)


def planned(block: Any = "dbb", limits: Limits = HALF_MORE, fake: Fake | None = None, **how: Any) -> reparam.Plan:
    return make_budgeted_plan(Net(), block, limits=limits, example_inputs=X, measured_by=fake or Fake(), **how)


def chosen(plan: reparam.Plan) -> dict[str, str]:
    return {row.layer: f"{row.block} {row.form}" for row in plan.expanded}


def test_a_plan_within_a_budget() -> None:
    plan = planned()  # sampled costs 0.1, branches 0.4 of a step
    assert chosen(plan) == {"conv0": "dbb sampled", "conv1": "dbb sampled", "conv2": "dbb sampled"}
    assert [row.price and round(row.price[0], 3) for row in plan.rows] == [0.1, 0.1, 0.1]
    assert chosen(planned(limits=Limits(1.6))) == {**chosen(plan), "conv2": "dbb branches"}  # the largest kernel
    assert chosen(planned(limits=Limits(1.25))) == {"conv1": "dbb sampled", "conv2": "dbb sampled"}


def test_a_plan_prints_what_was_predicted_and_then_what_was_measured() -> None:
    text = str(planned(fake=Fake(beyond=3.0)))
    assert "3 blocks: time predicted 1.300, measured 1.900 times the plain step: over the budget" in text
    assert "budget: 1.5 times the time; the plain step takes 10000 ms on one CPU thread" in text
    assert "1 block: time predicted 1.306, measured 1.300 times the plain step" in text
    assert "2 left alone: the budget went to other layers" in text
    assert "by cost and capacity, not by proven accuracy" in text
    assert "+0.306" in text


def test_memory_has_a_limit_of_its_own() -> None:
    plan = planned(limits=Limits(memory=1.45))
    assert chosen(plan) == {"conv1": "dbb sampled", "conv2": "dbb sampled"}
    assert "memory predicted 1.400, measured 1.400" in str(plan)
    assert "time predicted" not in str(plan)
    assert "budget: 1.45 times the memory; the plain step takes 9.5e-05 MiB on one CPU thread" in str(plan)
    assert "budget: 1.00001 times the time" in str(planned(limits=Limits(1.00001)))


def test_blocks_of_which_auto_chooses_have_options() -> None:
    """An option belongs to the block before it."""
    assert alternatives("auto:acb:gamma=1/3,bn=after, dbb") == [Block("acb", gamma=1 / 3, bn="after"), Block("dbb")]
    assert alternatives({"a": "auto:acb,acb:bn=after", "*": "dbb"})[1] == {"a": Block("acb", bn="after"), "*": "dbb"}
    for text, why in {
        "auto:acb:gama=1": "no option 'gama'",
        "auto:bn=after,acb": "no block named 'bn=after'",
        "auto:acb:bn=2": "bn is of type",
        "auto:acb:,dbb": "options are written",
    }.items():
        with pytest.raises(ReparamError, match=why):
            alternatives(text)
        with pytest.raises(RecipeError, match=why):
            parse_blocks([text])


def test_auto_chooses_of_several_blocks() -> None:
    assert chosen(planned("auto:acb,dbb", Limits(1.16))) == dict.fromkeys(["conv0", "conv1", "conv2"], "acb sampled")
    assert chosen(planned("auto:acb,dbb", Limits(1.21)))["conv2"] == "dbb sampled"
    mixed = chosen(planned({"conv0": "acb", "*": "auto:acb,dbb"}, Limits(1.26)))
    assert mixed == {"conv0": "acb sampled", "conv1": "dbb sampled", "conv2": "dbb sampled"}


def test_form_names_the_only_candidate() -> None:
    assert chosen(planned(limits=Limits(1.9), form=BRANCHES)) == {"conv1": "dbb branches", "conv2": "dbb branches"}


def test_layers_that_are_alike_are_measured_once() -> None:
    twice = nn.Sequential(Net(), nn.Conv2d(16, 3, 1), Net())
    fake = Fake()
    make_budgeted_plan(twice, "dbb", limits=Limits(1.5), example_inputs=X, measured_by=fake)
    # The first network's input needs no gradient, so its first layer is a kind of its own; two forms of each.
    assert fake.pairs == 8


def test_a_layer_that_runs_twice_costs_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm0(self.conv0(x))
            return self.conv2(self.conv1(self.conv1(x)))

    plan = make_budgeted_plan(Twice(), "dbb", limits=Limits(9), form=SAMPLED, example_inputs=X, measured_by=Fake())
    prices = {row.layer: row.price for row in plan.expanded}
    assert prices["conv2"] is not None
    assert prices["conv1"] == pytest.approx([2 * p for p in prices["conv2"]])


def test_a_budget_below_what_any_block_costs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plan = planned(limits=Limits(1.05))
    assert not plan.expanded
    said = (
        "no block fits 1.05 times the time: the cheapest, dbb as sampled at conv0, adds 0.100 of the plain step's time"
    )
    assert said in plan.budget
    assert said in caplog.text
    assert plan.reasons() == {"no block fits the budget": 3}
    assert isinstance(plan.apply(), Net)


def test_a_budget_of_one_is_no_block_and_measures_nothing() -> None:
    fake = Fake()
    plan = planned(limits=Limits(1.0, 1.5), fake=fake)
    assert (plan.expanded, fake.pairs) == ((), 0)
    assert "no block: 1 times the time and 1.5 times the memory is what the plain step takes" in plan.budget


@pytest.mark.parametrize("value", [0.5, 0, -1, INF, float("nan"), True, "1.5"])
@pytest.mark.parametrize("name", ["budget", "memory"])
def test_values_that_are_no_factors(name: str, value: Any) -> None:
    with pytest.raises(ReparamError, match=f"{name} is a number from 1 on, times what a plain training step takes"):
        reparam.plan(Net(), "dbb", example_inputs=X, **{name: value})


def test_what_a_budget_needs() -> None:
    with pytest.raises(ReparamError, match="pass example_inputs="):
        reparam.plan(Net(), "dbb", budget=1.5)
    with pytest.raises(ReparamError, match="auto chooses by what a training step costs: pass budget="):
        reparam.plan(Net(), "auto:acb,dbb", example_inputs=X)
    with pytest.raises(ReparamError, match="auto names the blocks"):
        reparam.plan(Net(), "auto", budget=1.5, example_inputs=X)
    with pytest.raises(ReparamError, match="there is no block named 'dbbb'"):
        reparam.plan(Net(), "auto:acb,dbbb", budget=1.5, example_inputs=X)
    with pytest.raises(ReparamError, match="nothing is trained"):
        reparam.plan(Net().requires_grad_(False), "dbb", budget=1.5, example_inputs=X)
    with torch.no_grad(), pytest.raises(ReparamError, match="gradients are switched off"):
        reparam.plan(Net(), "dbb", budget=1.5, example_inputs=X)


def test_a_layer_that_does_not_run_in_a_step_is_left_alone() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.conv1(self.norm0(self.conv0(x))))
            return x if self.training else self.norm2(self.conv2(x))

    plan = make_budgeted_plan(Late(), "dbb", limits=Limits(9), example_inputs=X, measured_by=Fake())
    assert list(chosen(plan)) == ["conv0", "conv1"]
    assert plan.rows[2].refusal is not None


@pytest.mark.parametrize("block", ["auto:acb,lora", "auto:lora,acb"])
def test_blocks_for_linear_layers_stand_beside_those_for_convolutions(block: str) -> None:
    model = nn.Sequential(Net(), nn.Flatten(), nn.Linear(16 * 16 * 16, 4))
    plan = reparam.plan(model, block, budget=9, example_inputs=X)
    assert {row.layer: str(row.block) for row in plan.expanded}["2"] == "lora"
    assert [row.layer for row in plan.expanded] == ["0.conv0", "0.conv1", "0.conv2", "2"]
    assert any(line.startswith("4 blocks") for line in plan.budget)


class Named(nn.Module):
    """Layers whose names are patterns, one of which matches another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.of = nn.ModuleDict({"a*": nn.Conv2d(3, 8, 3), "ab": nn.Conv2d(8, 16, 3), "3x3[a]": nn.Conv2d(16, 32, 3)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.of.values():
            x = layer(x)
        return x


def test_a_layer_is_named_by_its_path_not_by_what_that_matches() -> None:
    limits = Limits(1.9)  # for one dbb as branches and one or two sampled
    plan = make_budgeted_plan(Named(), "auto:acb,dbb", limits=limits, example_inputs=X, measured_by=Fake())
    assert len(set(chosen(plan).values())) > 1
    assert chosen(reparam.plan(Named(), plan)) == chosen(plan)
    assert chosen(Recipe.from_text(Recipe.of(plan).to_text()).plan(Named())) == chosen(plan)


def test_a_step_that_fails_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    with pytest.raises(ReparamError, match="a training step on example_inputs fails: Expected more than 1 value"):
        reparam.plan(model, "dbb", where="all", budget=2, example_inputs=torch.randn(1, 3, 1, 1))
    with pytest.raises(ReparamError, match="measured on the CPU or a CUDA device, and the model is on meta"):
        reparam.plan(Net().to("meta"), "dbb", budget=2, example_inputs=X.to("meta"))


def test_a_choice_that_does_not_fit_into_memory_says_so() -> None:
    class Small(Fake):
        def use(self, step: Step) -> Use:
            if step.whole and any(isinstance(m, BranchSum) for m in step.model.modules()):
                raise torch.OutOfMemoryError("out of memory")
            return super().use(step)

    with pytest.raises(ReparamError, match="a step with 3 blocks does not fit into memory: pass memory="):
        planned("acb", Limits(9), Small())


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    make_budgeted_plan(model, "dbb", limits=Limits(1.5), example_inputs=X, measured_by=Fake(3.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------ what a plan says is what is done


def mixed() -> reparam.Plan:
    return planned(limits=Limits(1.6))


def test_a_plan_is_expanded_and_collapsed() -> None:
    plan, model = mixed(), Net()
    expanded = reparam.expand(model, plan)
    forms = {path: m.form for path, m in expanded.named_modules() if isinstance(m, BranchSum)}
    assert forms == {"conv0": "sampled", "conv1": "sampled", "conv2": "branches"}
    assert reparam.verify(model, expanded, X).ok
    expanded.train()(X).square().mean().backward()
    back = reparam.collapse(expanded, like=model)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert reparam.verify(expanded, back, X).ok
    with pytest.raises(ReparamError, match="a plan says which layers get what"):
        reparam.expand(model, plan, form="online")
    with pytest.raises(ReparamError, match="matches no convolution"):
        reparam.expand(nn.Sequential(nn.Conv2d(3, 3, 3)), plan)


def test_forms_by_pattern() -> None:
    expanded = reparam.expand(Net(), "dbb", form={"conv1": "sampled", "conv2": Form("online")})
    forms = [m.form for m in expanded.modules() if isinstance(m, BranchSum)]
    assert forms == ["branches", "sampled", "online"]
    with pytest.raises(ReparamError, match="the pattern 'head' matches no convolution"):
        reparam.plan(Net(), "dbb", form={"head": "sampled"})


def test_a_recipe_keeps_a_plan() -> None:
    recipe = Recipe.of(mixed())
    assert str(recipe) == "dbb as sampled in 2 layers, dbb as branches in 1 layers"
    again = Recipe.from_text(recipe.to_text())
    assert chosen(again.plan(Net())) == chosen(mixed())
    assert chosen(Recipe.of(planned(limits=Limits(1.0))).plan(Net())) == {}


# ------------------------------------------------------------------ measured


def test_a_measured_plan_stays_within_its_budget() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5)))
    x = torch.randn(16, 3, 32, 32)
    plan = reparam.plan(model, "acb", budget=1.6, memory=2.0, example_inputs=x)
    assert plan.expanded
    assert len(plan.expanded) < 6 or {row.form.name for row in plan.expanded} != {"branches"}
    expanded = reparam.expand(model, plan)
    steps = [Step(m.train(), lambda m=m: m(x), whole=True, memory=True) for m in (model, expanded)]
    plain, with_blocks = really_measure(steps)
    assert 1.0 < with_blocks.seconds / plain.seconds < 1.6 * 1.3  # on a busy machine
    assert 1.0 < with_blocks.bytes / plain.bytes <= 2.0


def test_memory_of_a_step_is_counted_exactly() -> None:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.randn(1, 1, 512, 512)
    peak = Step(conv, lambda: conv(x), whole=True, memory=True)
    peak()
    assert peak.bytes() == peak.bytes()
    wide = Step(conv, lambda: (torch.zeros(20, 1, 512, 512), conv(x))[1], whole=True, memory=True)
    assert wide.bytes() == pytest.approx(21 * x.nbytes, rel=1e-3)  # the zeros, while the convolution makes its output
    assert 0 < peak.bytes() < 8 * x.nbytes
    layer = Step(conv, lambda: conv(x), memory=True)
    assert layer.bytes() == pytest.approx(2 * x.nbytes, rel=1e-3)  # what convolution and square have saved
    assert Step(conv, lambda: conv(x)).bytes() == 0


def test_a_step_changes_no_weight() -> None:
    conv = nn.Conv2d(1, 1, 3)
    before = conv.weight.detach().clone()
    really_measure([Step(conv, lambda: conv(torch.randn(1, 1, 8, 8)))])
    assert torch.equal(conv.weight, before)


# ------------------------------------------------------------------ command line

SPEC = str(Path(__file__).parent.parent / "docs" / "net.py") + ":Net"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_a_budget_on_the_command_line(tmp_path: Path) -> None:
    limits = ("--block", "auto:acb,dbb", "--budget", "3", "--memory", "4", "--inputs", "16x1x16x16")
    shown = invoke("plan", SPEC, *limits)
    assert shown.exit_code == 0, shown.output
    assert "times the plain step" in shown.output
    assert "not by proven accuracy" in shown.output
    file = tmp_path / "expanded.safetensors"
    written = invoke("expand", SPEC, *limits, "-o", str(file))
    assert written.exit_code == 0, written.output
    assert "same function" in written.output
    folded = invoke("collapse", SPEC, "--weights", str(file), "-o", str(tmp_path / "plain.safetensors"))
    assert folded.exit_code == 0, folded.output
    assert "strict=True" in folded.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "1.5"), "say on what batch, --inputs 32x3x224x224"),
        (("--budget", "1.5", "--inputs", "4xa"), "written 32x3x224x224, got '4xa'"),
        (("--budget", "0.5", "--inputs", "4x1x16x16"), "budget is a number from 1 on"),
    ],
)
def test_options_of_a_budget_that_do_not_go(arguments: tuple[str, ...], said: str) -> None:
    result = invoke("plan", SPEC, "--block", "dbb", *arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.split()) + str(result.exception or "")
