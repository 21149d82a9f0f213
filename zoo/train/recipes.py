"""Published configurations by name, where their values come from, and the rows that were published with them."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from reparam.sources import near, split_commas
from zoo.networks import find_spec
from zoo.train.config import PLAIN, Config, ConfigError, field_text

__all__ = ["PUBLISHED", "RECIPES", "SOURCES", "Published", "recipe", "recipe_text"]

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
        schedule="step",
        drop=1.0,  # at no milestone does the rate fall
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
    "comment and 1 as its value. There 50,000 of the 60,000 images train and the other 10,000 test, and pixels are "
    "from 0 to 1",
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
    lines = [f"{field.name} = {field_text(getattr(config, field.name))}" for field in dataclasses.fields(config)]
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
