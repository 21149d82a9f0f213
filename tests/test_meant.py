"""For which layers each block is meant, and what ``where`` makes of it: nothing is left or taken without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import reparam
from passes.blocks.kit.registry import unregister
from passes.refusal import Reason, ReparamError
from reparam.recipe import Recipe, RecipeError, parse_where
from zoo.train import build
from zoo.train.config import Config, variant


class Kernels(nn.Module):
    """One convolution of each kind that a publication speaks of; the name says which."""

    def __init__(self) -> None:
        super().__init__()
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "point": (1, {}),
            "even": (2, {}),
            "three": (3, {"padding": 1}),
            "strided": (3, {"padding": 1, "stride": 2}),
            "line": ((1, 5), {}),
            "five": (5, {"padding": 2}),
            "seven": (7, {"padding": 3}),
            "deep3": (3, {"padding": 1, "groups": 4}),
            "deep7": (7, {"padding": 3, "groups": 4}),
            "deep7_strided": (7, {"padding": 3, "groups": 4, "stride": 2}),
            "deep19": (19, {"padding": 9, "groups": 4}),
        }
        for name, (kernel, options) in kinds.items():
            self.add_module(name, nn.Sequential(nn.Conv2d(4, 4, kernel, **options), nn.BatchNorm2d(4)))
        self.names = tuple(kinds)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.get_submodule(name)(x) for name in self.names]


SQUARE = {"even", "three", "strided", "five", "deep3"}
TAPS = SQUARE | {"line", "seven", "deep7", "deep7_strided", "deep19"}
MEANT: dict[str, set[str]] = {
    "acb": SQUARE,
    "dbb": SQUARE,
    "doconv": TAPS,
    "repvgg": {"three", "strided", "deep3"},
    "mobileone": {"point", "deep3", "deep7", "deep7_strided", "deep19"},
    "orepa": SQUARE,
    "ecb": {"three", "deep3"},
    "largekernel": {"deep7"},
    "qarepvgg": {"three", "strided", "deep3"},
    "conv3xc": {"three", "strided", "deep3"},
    "repnext": {"deep3", "deep7", "deep7_strided"},
    "difference": {"three", "strided", "deep3"},
    "lora": {"point"},
}
"""What each block takes by default, written down apart from its code."""


def taken(plan: reparam.Plan) -> set[str]:
    return {row.layer.partition(".")[0] for row in plan.expanded}


def test_every_block_says_what_it_is_meant_for() -> None:
    assert set(MEANT) == set(reparam.blocks())
    assert reparam.blocks()["acb"].meant_for == "square kernels of 2 to 6"
    assert reparam.blocks()["mobileone"].meant_for == "depthwise kernels, or kernels of one tap"
    assert reparam.blocks()["lora"].meant_for == "linear layers and kernels of one tap"
    assert reparam.blocks()["largekernel"].meant_for.endswith("17 or 19 with stride 1")


@pytest.mark.parametrize("block", MEANT)
def test_the_default_is_what_the_block_is_meant_for(block: str) -> None:
    plan = reparam.plan(Kernels(), block, verify=False)
    tried = {row.layer.partition(".")[0] for row in (*plan.expanded, *plan.refused)}
    refused = {"deep19"} if block == "largekernel" else set()  # in one of its other tables
    assert taken(plan) == MEANT[block]
    assert tried == MEANT[block] | refused
    for row in plan.rows:
        name = row.layer.partition(".")[0]
        if name in MEANT[block] | refused:
            continue
        assert row.refusal is not None
        if name == "point":
            assert row.refusal.reason is Reason.KERNEL_OF_ONE
        else:
            assert row.refusal.reason is Reason.NOT_MEANT
            assert f"{block} is meant for {reparam.blocks()[block].meant_for}" in row.refusal.message
            assert 'where="all"' in row.refusal.message
            assert row.layer in str(plan)


@pytest.mark.parametrize("block", MEANT)
def test_all_takes_whatever_can_have_the_block(block: str) -> None:
    """What is left then is the block's own geometry, or a kernel of one tap that has to be named."""
    plan = reparam.plan(Kernels(), block, where="all", verify=False)
    assert taken(plan) >= MEANT[block]
    for row in plan.rows:
        if row.refusal is not None:
            assert row.refusal.reason in (Reason.BLOCK, Reason.KERNEL_OF_ONE), row
    if block in ("acb", "dbb", "orepa", "repvgg"):
        assert taken(plan) == (TAPS - {"line"} if block == "acb" else TAPS)


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        ("seven", {"seven"}),
        (lambda path, conv: path.startswith("seven"), {"seven"}),
        ({"kernel": 7, "depthwise": False}, {"seven"}),
        ({"kernel": range(5, 8), "depthwise": False}, {"five", "seven"}),
        ({"name": ["seven", "five"]}, {"seven", "five"}),
        ({"depthwise": False}, SQUARE - {"deep3"}),
        ({"stride": 2}, {"strided"}),
        ({}, SQUARE),
        (["seven", "all*"], None),
    ],
)
def test_what_is_asked_for_by_name_or_kernel_is_taken(where: Any, layers: set[str] | None) -> None:
    """Filters that say nothing on either leave them as the block is meant."""
    if layers is None:
        with pytest.raises(ReparamError, match="matches no convolution"):
            reparam.plan(Kernels(), "dbb", where=where, verify=False)
        return
    assert taken(reparam.plan(Kernels(), "dbb", where=where, verify=False)) == layers


def test_a_mapping_gives_each_block_what_it_is_meant_for() -> None:
    plan = reparam.plan(Kernels(), {"deep*": "largekernel", "*": "dbb"}, verify=False)
    assert {row.layer: str(row.block) for row in plan.expanded} == {
        "even.0": "dbb", "three.0": "dbb", "strided.0": "dbb", "five.0": "dbb", "deep7.0": "largekernel",
    }  # fmt: skip


def test_the_stem_of_resnet18_costs_nothing_unasked() -> None:
    model = timm.create_model("resnet18", num_classes=3)
    plan = reparam.plan(model, "dbb", verify=False)
    (left,) = [row for row in plan.rows if row.refusal is not None and row.refusal.reason is Reason.NOT_MEANT]
    assert left.layer == "conv1"
    assert plan.refused == ()
    text = " ".join(str(plan).split())
    assert '1 not considered: dbb is meant for square kernels of 2 to 6: name it, or pass where="all"' in text
    assert "conv1 3->64 7x7" in text
    everything = reparam.plan(model, "dbb", where="all", verify=False)
    assert {row.layer for row in everything.expanded} - {row.layer for row in plan.expanded} == {"conv1"}


@pytest.fixture
def registry() -> Iterator[None]:
    known = set(reparam.blocks())
    yield
    for name in set(reparam.blocks()) - known:
        unregister(name)


@pytest.mark.usefixtures("registry")
def test_blocks_of_ones_own_are_for_everything_unless_they_say() -> None:
    def twice(conv: Any) -> Any:
        """Twice the kernel."""
        yield "one", conv.main()
        yield "two", conv.parallel(conv.kernel)

    reparam.block("twice")(twice)
    reparam.block("twice_large", meant=[{"kernel": 7, "depthwise": True}, {"kernel": (1, 5)}])(twice)
    assert taken(reparam.plan(Kernels(), "twice", verify=False)) == TAPS
    assert taken(reparam.plan(Kernels(), "twice_large", verify=False)) == {"deep7", "deep7_strided", "line"}
    said = reparam.blocks()["twice_large"].meant_for
    assert said == "depthwise square kernels of 7, or kernels of 1x5"
    with pytest.raises(ReparamError, match="there is no filter 'kernal'"):
        reparam.block("misspelt", meant={"kernal": 3})
    with pytest.raises(ReparamError, match="there is no filter 'name'"):
        reparam.block("named", meant={"name": "stem"})


# ------------------------------------------------------------------ where it is written down


@pytest.mark.parametrize("where", [None, "all", ["all*"], {"kernel": [3, (3, 5)]}])
def test_a_recipe_keeps_it(where: Any) -> None:
    recipe = Recipe(reparam.Block("dbb"), where=where)
    assert Recipe.from_text(recipe.to_text()) == recipe
    assert ("wherever it can be" in str(recipe)) == (where == "all")


def test_a_recipe_from_before_took_everything() -> None:
    """Files from before blocks were meant for some kernels have no word there."""
    text = Recipe(reparam.Block("dbb")).to_text().replace('"meant"', "null")
    assert Recipe.from_text(text).where == "all"


def test_a_run_keeps_it_and_one_from_before_took_everything() -> None:
    assert variant(Config(), "dbb@all").where == "all"
    assert variant(Config(where="all", block="dbb"), "plain").where is None
    assert Config.from_json(Config(block="dbb").to_json()).where is None
    assert Config.from_json('{"block": "dbb"}').where == "all"
    assert Config.from_json("{}") == Config()
    assert build.recipe(Config(block="dbb", where="all")) == Recipe(reparam.Block("dbb"), where="all")


def test_all_on_the_command_line() -> None:
    assert parse_where(["all"], [], None) == "all"
    assert parse_where(["all", "stem"], [], None) == ["all", "stem"]
    with pytest.raises(RecipeError, match="stands alone"):
        parse_where(["all"], ["3"], None)


def test_linear_layers_are_touched_only_by_blocks_that_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    assert [row.layer for row in reparam.plan(model, "acb", where="all", verify=False).rows] == ["0"]
    with pytest.raises(ReparamError, match="'2' matches no convolution"):
        reparam.plan(model, "acb", where="2")
    # A layer without dimensions is no kernel of every size.
    by_kernel = {
        size: [row.layer for row in reparam.plan(model, "lora", where={"kernel": size}, verify=False).expanded]
        for size in (1, 3)
    }
    assert by_kernel == {1: ["2"], 3: ["0"]}
    plan = reparam.plan(model, {"2": "lora", "*": "acb"}, where="*", example_inputs=torch.zeros(1, 3, 4, 4))
    assert {row.layer: str(row.block) for row in plan.expanded} == {"0": "acb", "2": "lora"}
    plan = reparam.plan(model, {"0": "lora", "*": "acb"}, where="*")
    (row,) = [row for row in plan.rows if row.layer == "2"]
    assert row.refusal is not None
    assert row.refusal.message == "acb is for convolutions, and this is a linear layer"
