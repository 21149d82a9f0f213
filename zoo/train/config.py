"""The configuration of a training run, the published ones by name, and the published results.

A configuration holds everything that decides about the result and nothing else, so it can be written beside the
weights, and two runs with equal ones are the same run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, get_args, get_origin, get_type_hints

from reparam import ReparamError
from reparam.recipe import parse_blocks
from reparam.sources import near, split_commas
from zoo.networks import find_spec

__all__ = [
    "PLAIN",
    "PUBLISHED",
    "RECIPES",
    "SOURCES",
    "Config",
    "ConfigError",
    "Published",
    "override",
    "recipe",
    "recipe_text",
    "variant",
]

PLAIN = "plain"
"""The variant without blocks."""
CHOICES = {
    "init": ("preserve", "paper"),
    "schedule": ("cosine", "step"),
    "augment": ("none", "shift", "cifar", "imagenet"),
    "precision": ("no", "bf16", "fp16"),
}
"""Fields that are one of a few words."""
POSITIVE = ("size", "epochs", "batch", "rate", "evaluate_every", "drop")
SHARES = ("momentum", "smoothing", "ema")
"""Fields from 0 up to, not including, 1."""
MARKS: dict[str, dict[str, Any]] = {
    "paper": {"init": "paper"},
    "preserve": {"init": "preserve"},
    "online": {"online": True},
}
"""What may follow a variant's block behind an ``@``, and the fields it sets."""


class ConfigError(ReparamError):
    """A value that a configuration cannot have, or a name that is unknown; the message says what is possible."""


@dataclass(frozen=True)
class Config:
    """Everything that decides about the result of one training run.

    Args:
        model: ``source:name`` of :mod:`reparam.sources`.
        block: as for ``reparam expand --block``, such as ``acb:gamma=1/3``; None: the plain network.
        init: ``preserve`` or ``paper``, as for :func:`reparam.expand`.
        online: as for :func:`reparam.expand`; None: as the block says.
        data: a name that :func:`zoo.train.data.load_data` knows, or a folder.
        root: folder of data sets that are downloaded; None: ``~/.cache/reparam``.
        size: pixels of a side; None: the data's own.
        epochs: passes over the training data.
        batch: images per step, over all processes together.
        optimizer: a name of timm's optimizers; ``momentum`` is SGD with it, and timm's ``sgd`` is Nesterov's.
        rate: highest learning rate.
        momentum: of the optimizer.
        weight_decay: of kernels, and of what else decays.
        decay_biases: whether biases, norms and the blocks' vectors decay too.
        schedule: ``cosine``, from ``rate`` to zero, or ``step``.
        milestones: fractions of the run after which the rate falls; ``step`` only.
        drop: factor at each milestone.
        warmup: epochs in which the rate grows linearly from zero.
        smoothing: of the labels.
        gamma: first weight of every batch norm of the network; None leaves it. For the norms of an ACB's three branches
            it is an option of the block.
        ema: decay of the averaged weights; None: none are kept.
        augment: ``none``; ``shift``: padded by an eighth and cropped; ``cifar``: that and mirrored; ``imagenet``: a
            random part, resized, and mirrored.
        precision: of the layers' arithmetic: ``no`` (float32), ``bf16`` or ``fp16``.
        sync_norms: whether several processes share the statistics of batch norms.
        seed: of the weights, the order of the data and its augmentation.
        evaluate_every: epochs.

    Raises :class:`ConfigError` for a value that is not possible.
    """

    model: str = "zoo:cifar_quick"
    block: str | None = None
    init: str = "preserve"
    online: bool | None = None
    data: str = "digits"
    root: str | None = None
    size: int | None = None
    epochs: int = 30
    batch: int = 64
    optimizer: str = "momentum"
    rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_biases: bool = False
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    drop: float = 0.1
    warmup: float = 0.0
    smoothing: float = 0.0
    gamma: float | None = None
    ema: float | None = None
    augment: str = "none"
    precision: str = "no"
    sync_norms: bool = True
    seed: int = 0
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} is one of {', '.join(words)}; got {getattr(self, name)!r}")
        for name, number in _numbers(self):
            if not math.isfinite(number) or (number <= 0 if name in POSITIVE else number < 0):
                raise ConfigError(f"{name} is {'above' if name in POSITIVE else 'at least'} zero, got {number!r}")
            if name in SHARES and number >= 1:
                raise ConfigError(f"{name} is less than 1, got {number!r}")
        if any(not 0 < share < 1 for share in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ConfigError(f"milestones are rising fractions of the run, such as 0.5,0.75; got {self.milestones}")

    def to_json(self) -> str:
        """As JSON text that :meth:`from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Config:
        """The configuration of a text; a field that is not there has its default.

        Raises :class:`ConfigError` for an unknown field or a value of another kind.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"the configuration is a {type(content).__name__}, not a JSON object")
        return _changed(Config(), content)


def override(config: Config, settings: Iterable[str]) -> Config:
    """The configuration with ``field=value`` texts, of ``--set``, applied: ``rate=0.05``, ``ema=none``, ``gamma=1/3``.

    Raises :class:`ConfigError` for an unknown field or a value of another kind.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not text:
            raise ConfigError(f"a setting is written field=value, such as rate=0.05; got {setting!r}")
        changes[name] = _parsed(name, text)
    return _changed(config, changes)


def variant(config: Config, text: str) -> Config:
    """The configuration with another block: ``plain``, ``acb``, ``acb:gamma=1/3@paper``, ``dbb@online``.

    Behind an ``@`` stand ``paper``, ``preserve`` or ``online``; what is not said stays as it is in ``config``. The
    plain network has no initialisation of blocks, so plain variants of one configuration are equal.

    Raises :class:`reparam.ReparamError` for an unknown block, option or mark.
    """
    block, *marks = (part.strip() for part in text.split("@"))
    unknown = [mark for mark in marks if mark not in MARKS]
    if unknown:
        raise ConfigError(f"{text!r}: {unknown[0]!r} is none of the marks {', '.join(MARKS)}")
    if block == PLAIN:
        if marks:
            raise ConfigError(f"{text!r}: the plain network has no blocks that could be {marks[0]}")
        return replace(config, block=None, init="preserve", online=None)
    parse_blocks([block])  # raises now, not after the variants before it have been trained
    fields = {key: value for mark in marks for key, value in MARKS[mark].items()}
    return replace(config, block=block, **fields)


# ------------------------------------------------------------------------------------------------- fields


def _numbers(config: Config) -> Iterable[tuple[str, float]]:
    """The fields that are numbers, by name."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield field.name, value


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values, each of its field's kind."""
    return replace(config, **{name: _fitting(name, value) for name, value in changes.items()})


def _kinds(name: str) -> tuple[Any, ...]:
    """What a field may hold: ``(float, NoneType)``, or ``(tuple[float, ...],)``."""
    hints = get_type_hints(Config)
    if name not in hints:
        raise ConfigError(f"a configuration has no field {name!r}{near(name, tuple(hints))}; it has {', '.join(hints)}")
    hint = hints[name]
    return (hint,) if get_origin(hint) is tuple else get_args(hint) or (hint,)


def _fitting(name: str, value: Any) -> Any:
    """The value as the field holds it; JSON has lists for tuples, and whole numbers may stand for others."""
    kinds = _kinds(name)
    if isinstance(value, list | tuple) and get_origin(kinds[0]) is tuple:
        if all(type(each) in (int, float) for each in value):
            return tuple(float(each) for each in value)
    elif type(value) is int and float in kinds:
        return float(value)
    elif type(value) in kinds:
        return value
    words = " or ".join("none" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ConfigError(f"{name} is of type {words}, got {value!r}")


def _parsed(name: str, text: str) -> Any:
    """The text as the first kind that the field has and that it can be read as; else the text itself."""
    kinds = _kinds(name)
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if get_origin(kinds[0]) is tuple:
            return [float(Fraction(part)) for part in text.split(",")]
        if int in kinds:
            return int(text)
        return float(Fraction(text)) if float in kinds else text
    except (ValueError, ZeroDivisionError):
        return text


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------- recipes

_THIRD = "acb:gamma=1/3"
_QUICK = f"{_THIRD},line=3"
"""The published Cifar-quick has lines of three on its 5x5 kernels."""
_ACNET = Config(
    block=_THIRD,
    data="cifar10",
    init="paper",
    epochs=400,
    batch=128,
    warmup=5.0,
    decay_biases=True,
    augment="cifar",
    evaluate_every=2,
)
_DBB = replace(_ACNET, model="zoo:cifar_vgg16", block="dbb", warmup=0.0, evaluate_every=1)
_IMAGENET = Config(
    model="timm:resnet18",
    data="imagenet",
    init="paper",
    size=224,
    epochs=120,
    batch=256,
    decay_biases=True,
    augment="imagenet",
)

RECIPES: dict[str, Config] = {
    "digits": Config(rate=0.05, augment="shift"),
    "acnet-cifar10": _ACNET,
    "dbb-cifar10": _DBB,
    "dbb-cifar100": replace(_DBB, data="cifar100"),
    "doconv-mnist": Config(
        model="zoo:mnist_toy",
        block="doconv",
        data="mnist",
        init="paper",
        epochs=15,
        batch=32,
        rate=0.01,
        weight_decay=0.0,
    ),
    "acnet-imagenet": replace(_IMAGENET, block="acb", epochs=100),
    "dbb-imagenet": replace(_IMAGENET, block="dbb"),
    "doconv-imagenet": replace(
        _IMAGENET, model="zoo:plain18", block="doconv", batch=1024, rate=0.4, warmup=5.0, optimizer="sgd"
    ),
    "orepa-imagenet": replace(_IMAGENET, block="orepa", warmup=5.0, decay_biases=False),
}
"""Configurations by name. Published ones have the published block and its initialisation. ``imagenet`` is a folder with
train/ and val/ in the working directory, unless another one is given."""

_OVERRIDES: dict[str, dict[str, dict[str, Any]]] = {
    "acnet-cifar10": {
        "zoo:cifar_quick": {"block": _QUICK, "epochs": 150},
        "zoo:resnet56": {"rate": 0.2},
        "zoo:wrn16_8": {"weight_decay": 5e-4},
    },
}
"""What a recipe changes for one network."""

SOURCES: dict[str, str] = {
    "digits": "no publication: chosen so that Cifar-quick learns the digits within minutes on a CPU",
    "acnet-cifar10": "Ding et al., ACNet (ICCV 2019), and its code. Batch, rates, epochs, the cosine and gamma 1/3 (an "
    "option of the block) are those of the code's latest version; five epochs of warm-up and evaluations every two are "
    "those of the version before it, which made the published table with staircase rates. Weight decay on biases is "
    "optional there",
    "dbb-cifar10": "Ding et al., Diverse Branch Block (CVPR 2021), sec. 4; its code has nothing for CIFAR, so all "
    "values are those of ACNet's code",
    "dbb-cifar100": "as dbb-cifar10",
    "doconv-mnist": "the PyTorch example in the code of Cao et al., DO-Conv (IEEE TIP 2022), which has 15 epochs as a "
    "comment and 1 as its value. There 50,000 of the 60,000 images train and the other 10,000 test, pixels are from 0 "
    "to 1, and the rate is constant",
    "acnet-imagenet": "Ding et al., ACNet (ICCV 2019), and its code",
    "dbb-imagenet": "Ding et al., Diverse Branch Block (CVPR 2021), sec. 4.1, and its code, which also varies the "
    "colours for ResNets and doubles the rate of biases",
    "doconv-imagenet": "Cao et al., DO-Conv (IEEE TIP 2022), sec. 4.1: the settings of GluonCV's model zoo, which "
    "differ from network to network; these are those of its resnet18_v1",
    "orepa-imagenet": "Hu et al., Online Convolutional Re-parameterization (CVPR 2022), sec. 4.1, and its code",
}
"""Where a recipe's values come from, and what is not as there."""


def recipe(name: str, model: str | None = None) -> Config:
    """The configuration of a name, with what it changes for ``model``; by default the recipe's own network.

    Raises :class:`reparam.ReparamError` for an unknown recipe or network, with near names.
    """
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{near(name, tuple(RECIPES))}; recipes: {', '.join(RECIPES)}")
    config = RECIPES[name]
    spec = config.model if model is None else find_spec(model)
    return replace(config, model=spec, **_OVERRIDES.get(name, {}).get(split_commas(spec)[0], {}))


def recipe_text(name: str, config: Config) -> str:
    """Every value of a recipe's configuration, one a line as ``--set`` takes it, and where it is from."""
    lines = [f"{field.name} = {_text(getattr(config, field.name))}" for field in dataclasses.fields(config)]
    return "\n".join([f"# {name}: {SOURCES[name]}", *lines])


# ------------------------------------------------------------------------------------------------- published


@dataclass(frozen=True)
class Published:
    """A published result.

    Args:
        system: the publication.
        data: as printed there.
        network: as printed there.
        plain: top-1 accuracy in percent without blocks; None where only gains are known.
        blocks: accuracy in percent by variant; points gained where ``plain`` is None.
        recipe: the configuration that reproduces it.
        model: the network here.
        seeds: runs that the numbers are means of, where that is said.
    """

    system: str
    data: str
    network: str
    plain: float | None
    blocks: Mapping[str, float]
    recipe: str
    model: str
    seeds: int = 1

    @property
    def command(self) -> str:
        """What reproduces the row, in a folder that has the data (CIFAR and MNIST are downloaded)."""
        texts = " ".join(shlex.quote(text) for text in (PLAIN, *self.blocks))
        name = split_commas(self.model)[0].rpartition(":")[2]
        return (
            f"reparam train --recipe {self.recipe} --model {self.model} --compare {texts} --seeds {self.seeds} "
            f"--out runs/{self.recipe}-{name}"
        )


def _published() -> Iterable[Published]:
    """ACNet: the means of the last ten evaluations, from its code; DO-Conv: its code's table; the rest: the papers."""
    for network, model, block, plain, accuracy in (
        ("Cifar-quick", "cifar_quick", _QUICK, 86.25, 87.10),
        ("VGG", "cifar_vgg16", _THIRD, 94.25, 94.86),
        ("ResNet-56", "resnet56", _THIRD, 94.57, 94.86),
        ("WRN-16-8", "wrn16_8", _THIRD, 95.58, 95.92),
    ):
        yield Published("ACNet", "CIFAR-10", network, plain, {block: accuracy}, "acnet-cifar10", f"zoo:{model}")
    for network, model, gain in (
        ("AlexNet", "torchvision:alexnet", 1.5),
        ("ResNet-18", "timm:resnet18", 0.8),
        ("DenseNet-121", "timm:densenet121", 0.7),
    ):
        yield Published("ACNet", "ImageNet", network, None, {"acb": gain}, "acnet-imagenet", model)
    for data, name, network, model, plain, acb, dbb in (
        ("CIFAR-10", "dbb-cifar10", "VGG-16", "zoo:cifar_vgg16", 93.95, 94.43, 94.62),
        ("CIFAR-100", "dbb-cifar100", "VGG-16", "zoo:cifar_vgg16", 74.05, 75.30, 75.72),
        ("ImageNet", "dbb-imagenet", "AlexNet", "torchvision:alexnet", 57.23, 58.43, 59.19),
        ("ImageNet", "dbb-imagenet", "MobileNet", "timm:mobilenetv1_100", 71.89, 72.14, 72.88),
        ("ImageNet", "dbb-imagenet", "ResNet-18", "timm:resnet18", 69.54, 70.53, 70.99),
        ("ImageNet", "dbb-imagenet", "ResNet-50", "timm:resnet50", 76.14, 76.46, 76.71),
    ):
        yield Published("DBB", data, network, plain, {"acb": acb, "dbb": dbb}, name, model)
    yield Published("DO-Conv", "MNIST", "toy, 16-16-10", 95.156, {"doconv": 95.674}, "doconv-mnist", "zoo:mnist_toy", 5)
    for network, model, plain, gain in (
        ("Plain-18", "zoo:plain18", 69.97, 1.01),
        ("ResNet-18", "timm:resnet18", 70.87, 0.82),
        ("ResNet-34", "timm:resnet34", 74.49, 0.49),
        ("ResNet-50", "timm:resnet50", 77.32, 0.08),
        ("ResNet-101", "timm:resnet101", 78.16, 0.46),
        ("ResNet-152", "timm:resnet152", 79.34, 0.07),
        ("ResNet-18 v2", "timm:resnetv2_18", 70.80, 0.64),
        ("ResNeXt-50", "timm:resnext50_32x4d", 79.21, 0.40),
        ("MobileNet v1", "timm:mobilenetv1_100", 73.30, 0.03),
        ("MobileNet v2", "timm:mobilenetv2_100", 71.89, 0.16),
        ("MobileNet v3", "timm:mobilenetv3_large_100", 75.16, 0.14),
    ):
        accuracy = round(plain + gain, 2)
        yield Published("DO-Conv", "ImageNet", network, plain, {"doconv": accuracy}, "doconv-imagenet", model)
    for network, model, plain, dbb, orepa in (
        ("ResNet-18", "timm:resnet18", 71.21, 71.77, 72.13),
        ("ResNet-50", "timm:resnet50", 76.70, 76.89, 77.31),
    ):
        yield Published("OREPA", "ImageNet", network, plain, {"dbb": dbb, "orepa": orepa}, "orepa-imagenet", model)


PUBLISHED: tuple[Published, ...] = tuple(_published())
