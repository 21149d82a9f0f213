"""Configurations: written and read, changed from the command line, the published ones by name."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

import reparam
from reparam import sources

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from zoo.train.config import Config, ConfigError, override, variant
from zoo.train.recipes import PUBLISHED, RECIPES, SOURCES, Published, recipe, recipe_text


@pytest.mark.parametrize("config", [Config(gamma=1 / 3, ema=0.99, milestones=(0.3, 0.6, 0.9)), *RECIPES.values()])
def test_a_configuration_survives_json(config: Config) -> None:
    assert Config.from_json(config.to_json()) == config


def test_fields_that_are_not_written_have_their_defaults() -> None:
    assert Config.from_json('{"rate": 1}') == Config(rate=1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "list"),
        ('{"rat": 1}', "did you mean rate"),
        ('{"epochs": 1.5}', "epochs is of type int"),
        ('{"epochs": true}', "epochs is of type int"),
        ('{"milestones": ["half"]}', "milestones"),
        ('{"rate": NaN}', "rate is above zero"),
        ('{"batch": null}', "batch is of type int"),
    ],
)
def test_a_damaged_configuration_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_json(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": "linear"}, "schedule is one of cosine, step"),
        ({"init": "papr"}, "preserve, paper"),
        ({"precision": "int8"}, "precision"),
        ({"augment": "all"}, "augment"),
        ({"epochs": 0}, "epochs is above zero"),
        ({"size": 0}, "size is above zero"),
        ({"weight_decay": -1e-4}, "weight_decay is at least zero"),
        ({"rate": float("inf")}, "rate"),
        ({"smoothing": 1.0}, "smoothing is less than 1"),
        ({"milestones": (0.5, 1.5)}, "milestones"),
        ({"milestones": (0.75, 0.5)}, "milestones are rising"),
    ],
)
def test_a_value_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**fields)


def test_settings_of_the_command_line_change_fields() -> None:
    texts = ["rate=0.05", "gamma=1/3", "ema=0.999", "epochs=3", "decay_biases=true", "milestones=0.3,2/3", "data=x/y"]
    expected = Config(
        rate=0.05, gamma=1 / 3, ema=0.999, epochs=3, decay_biases=True, milestones=(0.3, 2 / 3), data="x/y"
    )
    assert override(Config(), texts) == expected
    assert override(expected, ["ema=none", "weight_decay=5e-4"]).ema is None
    assert override(Config(form="online"), ["form=branches", "size=64"]) == Config(form="branches", size=64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate", "field=value"),
        ("rate=", "field=value"),
        ("rate=fast", "rate is of type float"),
        ("rate=none", "rate is of type float"),
        ("epochs=2.5", "epochs is of type int"),
        ("sync_norms=1", "sync_norms is of type bool"),
        ("learning=1", "no field 'learning'"),
        ("gamma=1/0", "gamma is of type float or none"),
    ],
)
def test_a_wrong_setting_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override(Config(), [text])


# ------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("plain", {"block": None}),
        ("acb", {"block": "acb"}),
        ("acb:gamma=1/3@paper", {"block": "acb:gamma=1/3", "init": "paper"}),
        ("acb:bn=after", {"block": "acb:bn=after"}),
        ("dbb@online", {"block": "dbb", "form": "online"}),
        ("dbb@paper@online", {"block": "dbb", "init": "paper", "form": "online"}),
    ],
)
def test_a_variant_changes_the_block_alone(text: str, fields: dict[str, object]) -> None:
    config = Config(seed=3, rate=0.05)
    assert variant(config, text) == dataclasses.replace(config, **fields)


def test_a_variant_keeps_what_it_does_not_say() -> None:
    config = Config(block="dbb", init="paper", form="online")
    assert variant(config, "acb") == dataclasses.replace(config, block="acb")
    assert variant(config, "acb@preserve").init == "preserve"
    assert variant(config, "plain") == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("abc", "did you mean|unknown block"),
        ("acb:gama=1", "gama"),
        ("acb@papr", "'papr' is none of the marks"),
        ("plain@paper", "plain network has no blocks"),
        ("", "block"),
    ],
)
def test_a_wrong_variant_is_refused(text: str, words: str) -> None:
    with pytest.raises(reparam.ReparamError, match=words):
        variant(Config(), text)


# ------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "model", "values"),
    [
        ("acnet-cifar10", "cifar_quick", {"block": "acb:gamma=1/3,line=3", "epochs": 150, "rate": 0.1}),
        ("acnet-cifar10", "cifar_vgg16", {"epochs": 400, "rate": 0.1, "weight_decay": 1e-4}),
        ("acnet-cifar10", "resnet56", {"block": "acb:gamma=1/3", "epochs": 400, "rate": 0.2, "warmup": 5.0}),
        ("acnet-cifar10", "zoo:wrn16_8", {"epochs": 400, "rate": 0.1, "weight_decay": 5e-4, "batch": 128}),
        ("acnet-cifar10", "wrn16_8,num_classes=10", {"weight_decay": 5e-4}),
        ("dbb-cifar100", None, {"model": "zoo:cifar_vgg16", "data": "cifar100", "batch": 128}),
        ("dbb-imagenet", "resnet50", {"epochs": 120, "rate": 0.1, "schedule": "cosine", "weight_decay": 1e-4}),
        ("orepa-imagenet", None, {"block": "orepa", "epochs": 120, "batch": 256, "warmup": 5.0}),
        ("doconv-mnist", None, {"block": "doconv", "model": "zoo:mnist_toy", "batch": 32, "rate": 0.01}),
    ],
)
def test_recipes_have_the_published_values(name: str, model: str | None, values: dict[str, object]) -> None:
    config = recipe(name, model)
    assert {field: getattr(config, field) for field in values} == values
    assert config.init == "paper"
    assert config.momentum == 0.9


def test_an_unknown_recipe_or_network_is_an_error_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"did you mean acnet-cifar10.*recipes: digits"):
        recipe("acnet-cifar")
    with pytest.raises(sources.UnknownNameError, match="did you mean resnet56"):
        recipe("acnet-cifar10", "resnet_56")


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_says_every_value_and_can_be_given_back(name: str) -> None:
    source, *lines = recipe_text(name, recipe(name)).splitlines()
    assert source == f"# {name}: {SOURCES[name]}"
    assert [line.partition(" = ")[0] for line in lines] == [field.name for field in dataclasses.fields(Config)]
    other = Config(ema=0.5, gamma=0.5, form="online", size=1, milestones=(0.1,), block="dbb")
    assert override(other, lines) == recipe(name)


# ------------------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.system}-{row.data}-{row.network}")
def test_a_published_row_names_what_exists(row: Published) -> None:
    config = recipe(row.recipe, row.model)
    assert config.block in row.blocks
    assert {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "MNIST": "mnist", "ImageNet": "imagenet"}[
        row.data
    ] == config.data
    source, _, name = row.model.partition(":")
    assert sources.names(source, name) == [name]
    for text, value in row.blocks.items():
        assert variant(config, text).block == text
        assert 0 < value < 2 if row.plain is None else row.plain < value < row.plain + 2
    words = shlex.split(row.command)
    assert words[:6] == ["reparam", "train", "--recipe", row.recipe, "--model", row.model]
    assert words[7 : words.index("--seeds")] == ["plain", *row.blocks]


def test_published_rows_are_different_runs() -> None:
    commands = [row.command for row in PUBLISHED]
    assert len(set(commands)) == len(commands) == 27


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own network, with the published block, for a few steps on generated images."""
    from zoo.train import data
    from zoo.train.trainer import train

    monkeypatch.setitem(data.SYNTHETIC, "train", 24)
    monkeypatch.setitem(data.SYNTHETIC, "test", 8)
    published = recipe(name)
    # The rate goes with the batch.
    config = dataclasses.replace(
        published, data="synthetic", size=32, epochs=1, batch=8, rate=published.rate * 8 / published.batch
    )
    result = train(config)
    assert len(result.epochs) == 1
    assert 0 < result.epochs[0].train_loss < 10
