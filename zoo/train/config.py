"""The configuration of a training run.

A configuration holds everything that decides about the result and nothing else, so it can be written beside the
weights, and two runs with equal ones are the same run.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, get_args, get_origin, get_type_hints

from passes.training.filters import ALL
from passes.training.forms import FORMS
from reparam import Form, ReparamError
from reparam.recipe import parse_blocks
from reparam.sources import near

__all__ = ["LAST", "PLAIN", "Config", "ConfigError", "field_text", "override", "variant"]

PLAIN = "plain"
"""The variant without blocks."""
CHOICES = {
    "init": ("preserve", "paper"),
    "schedule": ("cosine", "step"),
    "augment": ("none", "shift", "cifar", "imagenet"),
    "precision": ("no", "bf16", "fp16"),
}
"""Fields that are one of a few words."""
POSITIVE = ("size", "epochs", "last_epochs", "batch", "rate", "evaluate_every", "drop")
SHARES = ("momentum", "smoothing", "ema")
"""Fields from 0 up to, not including, 1."""
MARKS: dict[str, dict[str, Any]] = {
    "paper": {"init": "paper"},
    "preserve": {"init": "preserve"},
    "all": {"where": ALL},
}
"""What may follow a variant's block behind an ``@``, and the fields it sets."""
LAST = "last:"
"""What stands before the form of the last epochs behind an ``@``."""


class ConfigError(ReparamError):
    """A value that a configuration cannot have, or a name that is unknown; the message says what is possible."""


@dataclass(frozen=True)
class Config:
    """Everything that decides about the result of one training run.

    Args:
        model: ``source:name`` of :mod:`reparam.sources`.
        block: as for ``reparam expand --block``, such as ``acb:gamma=1/3``; None: the plain network.
        init: ``preserve`` or ``paper``, as for :func:`reparam.expand`.
        form: as for :func:`reparam.expand`, as text; None: as the block says.
        last_form: that of the last epochs, as for :func:`reparam.set_form`; None: the same. ``frozen`` fine-tunes.
        last_epochs: how many those are.
        where: None: the layers that the block is meant for; ``all``: every one that can have it; else a pattern.
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
    form: str | None = None
    last_form: str | None = None
    last_epochs: int = 5
    where: str | None = None
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
        for name in ("form", "last_form"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(Form.of(getattr(self, name))))
        if self.last_form is not None and self.last_epochs >= self.epochs:
            raise ConfigError(f"last_epochs are fewer than all {self.epochs} epochs, got {self.last_epochs}")
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
        if "online" in content:  # written before there were forms
            content["form"] = {True: "online", False: "branches"}.get(content.pop("online"))
        if content.get("block") is not None:
            content.setdefault("where", ALL)  # from before blocks were meant for some kernels only
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

    Behind an ``@`` stand ``paper``, ``preserve``, ``all``, a form (``sampled:fraction=1/4``), or that of the last
    epochs (``last:frozen``); what is not said stays as it is in ``config``. The plain network has no blocks that could
    begin or train in some way, so plain variants of one configuration are equal.

    Raises :class:`reparam.ReparamError` for an unknown block, option or mark.
    """
    block, *marks = (part.strip() for part in text.split("@"))
    forms = [mark.removeprefix(LAST).partition(":")[0] for mark in marks if mark not in MARKS]
    if unknown := [form for form in forms if form not in FORMS]:
        raise ConfigError(f"{text!r}: {unknown[0]!r} is none of the marks {', '.join([*MARKS, *FORMS])}, {LAST}FORM")
    if block == PLAIN:
        if marks:
            raise ConfigError(f"{text!r}: the plain network has no blocks that could be {marks[0]}")
        return replace(config, block=None, init="preserve", form=None, last_form=None, where=None)
    parse_blocks([block])  # raises now, not after the variants before it have been trained
    fields = {key: value for mark in marks for key, value in (MARKS.get(mark) or _form(mark)).items()}
    return replace(config, block=block, **fields)


def _form(mark: str) -> dict[str, Any]:
    """The field that a form behind an ``@`` sets."""
    return {"last_form": mark.removeprefix(LAST)} if mark.startswith(LAST) else {"form": mark}


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


def field_text(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
