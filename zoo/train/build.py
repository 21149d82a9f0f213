"""What a run of training is made of: the stock network of its seed, blocks in it, the optimizer and its schedule.

The stock network is built first and blocks come after it, so with the same seed every variant begins with the same
main-branch weights, whatever its blocks draw from the generator. (DO-Conv's published initialisation draws the kernel
itself anew: ``doconv@paper`` has no main branch that could be kept.)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import reparam
from reparam import sources
from reparam.recipe import Recipe, parse_blocks
from zoo.networks import find_spec
from zoo.train.config import Config, ConfigError
from zoo.train.data import Data, load_data

__all__ = ["build", "load", "make_optimizer", "make_schedule", "recipe", "spec", "stock"]

PHOTOGRAPHS = "torchvision:"
"""Networks that take images of three channels only."""


def build(config: Config, data: Data) -> nn.Module:
    """The network of a run, on the CPU and in training mode: :func:`stock`, expanded by the configuration's block.

    Raises :class:`reparam.ReparamError` for an unknown network or block, and where no convolution gets the block.
    """
    model = stock(config, data)
    expansion = recipe(config)
    if expansion is None:
        if config.last_form is not None:
            raise ConfigError(f"the plain network has no blocks that could be {config.last_form} in the last epochs")
        return model
    planned = expansion.plan(model)
    if not planned.expanded:
        reasons = "; ".join(planned.reasons()) or "it has none"
        raise ConfigError(f"no convolution of {config.model} gets the block {config.block}: {reasons}")
    expanded = planned.apply()
    if config.last_form is not None:
        reparam.set_form(copy.deepcopy(expanded), config.last_form)  # raises now, not after hours
    return expanded


def stock(config: Config, data: Data) -> nn.Module:
    """The network without blocks, with the weights of the configuration's seed and its first batch norm weights."""
    torch.manual_seed(config.seed)
    model = sources.create(spec(config, data)).train()
    _check_answer(model, config, data)
    if config.gamma is not None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                nn.init.constant_(module.weight, config.gamma)
    return model


def _check_answer(model: nn.Module, config: Config, data: Data) -> None:
    """Raise :class:`ConfigError` for a network that does not take the images, or has no logit for each class."""
    images = torch.zeros(2, *data.shape)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            logits = model.eval()(images)
    # A network may refuse images in any way.
    except Exception as error:
        raise ConfigError(f"{config.model} does not take the images of {data.name}, {data.shape}: {error}") from error
    finally:
        model.train()
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, len(data.classes)):
        raise ConfigError(
            f"{config.model} answers two images of {data.name}, which has {len(data.classes)} classes, with {shape}; "
            f"it has to be (2, {len(data.classes)}): see its number of classes"
        )


def recipe(config: Config) -> Recipe | None:
    """How the run's network is expanded; None for the plain one."""
    if config.block is None:
        return None
    return Recipe(parse_blocks([config.block]), where=config.where, init=config.init, form=config.form)


def load(config: Config) -> Data:
    """The data of a configuration, in colours for networks that take nothing else. Raises as :func:`load_data` does."""
    name = find_spec(config.model)
    channels = 3 if name.startswith(PHOTOGRAPHS) else None
    if channels is None and not sources.takes(name, "in_chans"):
        first = next((m for m in sources.create(name).modules() if isinstance(m, _ConvNd)), None)
        channels = first.in_channels if first is not None and first.in_channels in (1, 3) else None
    return load_data(config.data, size=config.size, augment=config.augment, channels=channels, root=config.root)


def spec(config: Config, data: Data) -> str:
    """The network as :func:`reparam.sources.create` builds it for these data."""
    name = find_spec(config.model)
    options = {"num_classes": len(data.classes)}
    if not name.startswith(PHOTOGRAPHS):
        options["in_chans"] = data.shape[0]
    given = sources.parse(name)[2]
    wanted = {key: value for key, value in options.items() if key not in given and sources.takes(name, key)}
    return ",".join([name, *(f"{key}={value}" for key, value in wanted.items())])


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of timm of that name; what decays is decided by :func:`reparam.param_groups`.

    Raises :class:`ConfigError` for an unknown name, with near ones.
    """
    known = list_optimizers()
    if config.optimizer not in known:
        raise ConfigError(f"unknown optimizer {config.optimizer!r}{sources.near(config.optimizer, known)}")

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        if config.decay_biases:
            return [{"params": [p for p in network.parameters() if p.requires_grad]}]
        return reparam.param_groups(network, config.weight_decay)

    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        config.optimizer,
        lr=config.rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        param_group_fn=groups,
    )
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> Scheduler:
    """The schedule of timm, counted in steps; the warm-up comes before it and is part of the epochs."""
    warm = round(config.warmup * steps)
    total = config.epochs * steps
    options: dict[str, Any] = {"warmup_t": warm, "warmup_prefix": True, "t_in_epochs": False}
    if config.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=max(total - warm, 1), **options)
    # timm counts the milestones from behind the warm-up, and each holds from the step before it.
    milestones = [round(fraction * total) - warm + 1 for fraction in config.milestones]
    return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=config.drop, **options)
