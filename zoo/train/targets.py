"""The networks and data that the arguments of `reparam evaluate` and `reparam convert` name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from reparam.commands import errors
from reparam.files import AVERAGED, FileError, StateFile, is_file_name, load_state, rebuild
from reparam.networks import Network, UsageError, load
from reparam.recipe import Recipe, parse_blocks, parse_where
from reparam.sources import is_named, name_code, same_place
from zoo.networks import find_spec
from zoo.train.checkpoint import Folder
from zoo.train.config import Config
from zoo.train.data import DATA_SETS, Data, load_data
from zoo.train.state import State, StateError, check_digest

__all__ = [
    "Averaged",
    "Batch",
    "DataName",
    "Model",
    "Root",
    "Size",
    "Subject",
    "check_fit",
    "data_for",
    "describe",
    "expansion",
    "find",
    "tell",
]

Model = Annotated[str | None, typer.Option("--model", help="Network of a file that does not say: timm:resnet18, ...")]
Averaged = Annotated[
    bool | None,
    typer.Option("--ema/--raw", help="The averaged weights, or those trained.", show_default="averaged if there"),
]
DataName = Annotated[str | None, typer.Option("--data", help="Data set or folder; default: the run's own.")]
Root = Annotated[str | None, typer.Option("--root", help="Where downloaded data sets lie.")]
Size = Annotated[int | None, typer.Option("--size", min=1, help="Pixels of a side; default: as in the run.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")]


@dataclass(frozen=True)
class Subject:
    """A network that is asked, and what is known of where it came from.

    Args:
        label: as the person named it.
        network: in eval mode.
        config: of the run that it is from; None elsewhere.
        notes: which of several weights were taken, and why.
    """

    label: str
    network: Network
    config: Config | None = None
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- networks and data


def find(
    target: str,
    *,
    model: str | None = None,
    recipe: Recipe | None = None,
    ema: bool | None = None,
    pretrained: bool = False,
) -> Subject:
    """The network that an argument names.

    Args:
        target: a spec; a file of weights; a training state or the folder of `reparam train`.
        model: the network of a file that does not say which it is of.
        recipe: how that was expanded.
        ema: the averaged weights, or those that were trained; None takes the averaged ones where there are any,
            because a run averages weights in order to deploy them.
        pretrained: the trained weights of a spec's source.

    Raises:
        UsageError: options that do not go with the target.
        ReparamError: as :func:`reparam.networks.load`; a file that does not fit says what would.
    """
    path = Path(target)
    notes: tuple[str, ...] = ()
    for spec in filter(None, (target, model)):
        name_code(spec)
    if path.is_dir():
        path, notes = _best(Folder(path), ema)
        ema = None
    elif not is_file_name(target) and not path.is_file():
        _refuse(target, "is no file", model=model, block=recipe, ema=ema)
        network = load(find_spec(target), pretrained=pretrained)
        return Subject(target, network, notes=network.notes)
    content = load_state(path)
    if not content.source:
        return _foreign(target, content, model, recipe, ema)
    same = model is not None and is_named(content.source) and same_place(model, content.source)
    _refuse(target, "says itself which network it is of", model=None if same else model, block=recipe)
    if "settings" in content.metadata:
        content, notes = _part(target, content, ema)
    else:
        _refuse(target, "holds one set of weights", ema=ema)
    network = Network(rebuild(content, path), content.source, content.recipe, content.collapsed, shape=content.shape)
    return Subject(target, network, _run_of(path), notes)


def _refuse(target: str, why: str, **options: object) -> None:
    """Raise for an option that was given and means nothing here."""
    for name, value in options.items():
        if value is not None:
            word = ("ema" if value else "raw") if name == "ema" else name
            raise UsageError(f"{target} {why}; leave out --{word}")


def _best(folder: Folder, ema: bool | None) -> tuple[Path, tuple[str, ...]]:
    """The weights to take from the folder of a run."""
    if not folder.best.is_file():
        raise FileError(f"{folder.path} holds no {folder.best.name}; is it the folder of a run of `reparam train`?")
    averaged = folder.best_ema.is_file()
    if ema and not averaged:
        raise FileError(f"{folder.path} holds no averaged weights; leave out --ema")
    taken = folder.best_ema if averaged and ema is not False else folder.best
    return taken, _which(str(folder.path), averaged, ema)


def _which(target: str, averaged: bool, ema: bool | None) -> tuple[str, ...]:
    """Say which weights were taken where nobody did."""
    if not averaged or ema is not None:
        return ()
    return (f"{target}: the averaged weights, which a run makes in order to deploy them; --raw takes the others",)


def _part(target: str, content: StateFile, ema: bool | None) -> tuple[StateFile, tuple[str, ...]]:
    """The network's tensors in a training state: ``model.*`` or ``ema.*``."""
    try:
        check_digest(content.tensors, content.metadata)
    except StateError as error:
        raise FileError(f"{target} cannot be used: {error}") from error
    state = State(content.tensors, (), {})
    averaged = state.part("ema")
    if ema and not averaged:
        raise FileError(f"{target} holds no averaged weights; leave out --ema")
    tensors = averaged if averaged and ema is not False else state.part("model")
    return replace(content, tensors=tensors), _which(target, bool(averaged), ema)


def _foreign(target: str, content: StateFile, model: str | None, recipe: Recipe | None, ema: bool | None) -> Subject:
    """The network in a file of another program, under one of the keys of its checkpoint."""
    if model is None:
        raise UsageError(f"{target} does not say which network it is of: name it with --model, and its --block if any")
    keys = [key for key in (content.key, *content.others) if key]
    averaged = next((key for key in AVERAGED if key in keys), None)
    raw = next((key for key in keys if key not in AVERAGED), None)
    if ema is not None and (averaged if ema else raw) is None:
        held = f" (it has {', '.join(map(repr, keys))})" if keys else ""
        raise FileError(f"{target} holds no {'averaged' if ema else 'raw'} weights{held}; leave out --ema and --raw")
    key = raw if ema is False else averaged or raw
    network = load(find_spec(model), weights=Path(target), key=key, recipe=recipe)
    return Subject(target, network, notes=_which(target, bool(averaged and raw), ema))


def _run_of(path: Path) -> Config | None:
    """The configuration of the run in whose folder a file lies."""
    try:
        about = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileError(f"{path.parent / 'run.json'} cannot be read: {error}") from error
    config = about.get("config") if isinstance(about, dict) else None
    return None if config is None else Config.from_json(json.dumps(config))


def data_for(subject: Subject, name: str | None, size: int | None = None, root: str | None = None) -> Data | None:
    """The data that were asked for, else those of the network's run, shown as in that run; None if neither says.

    Grey images become coloured, and the other way round, for a network that takes these.

    Raises:
        ReparamError: as :func:`zoo.train.data.load_data`.
    """
    config = subject.config
    if name is None and config is None:
        return None
    if config is not None and name in (None, config.data):
        name, size, root, augment = config.data, size or config.size, root or config.root, config.augment
    else:
        # Photographs of a folder are cropped as those of ImageNet are for published accuracies, not squeezed.
        augment = "imagenet" if size is not None and name not in DATA_SETS else "none"
        if size is None and subject.network.shape:
            size = subject.network.shape[-1]
    assert name is not None
    channels = _channels(subject.network)
    return load_data(name, size=size, augment=augment, channels=channels if channels in (1, 3) else None, root=root)


def _channels(network: Network) -> int | None:
    """Of the images that the plain architecture takes; blocks may hide their kernel in layers of their own."""
    convs = (module for module in network.stock().modules() if isinstance(module, _ConvNd))
    first = next(convs, None)
    return None if first is None else first.in_channels


def check_fit(subject: Subject, data: Data) -> None:
    """Refuse data whose images the network does not take, or that have another number of classes than it answers.

    Raises:
        UsageError: names both.
    """
    model = subject.network.model.eval()
    first = next(model.parameters())
    shape = "×".join(map(str, data.shape))
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *data.shape, dtype=first.dtype, device=first.device))
    # Networks refuse images in many ways; any exception means that it does not take these.
    except Exception as error:
        channels = _channels(subject.network)
        takes = f"its first layer takes {channels} channels: " if channels is not None else ""
        raise UsageError(
            f"{subject.label} does not take the images of {data.name}, which are {shape}; {takes}{error}"
        ) from error
    classes = logits.shape[1] if isinstance(logits, Tensor) and logits.ndim == 2 else None
    if classes != len(data.classes):
        answer = "no list of classes" if classes is None else f"{classes} classes"
        source = subject.network.source.partition(",")[0]
        hint = "" if Path(subject.label).exists() else f": {source},num_classes={len(data.classes)}"
        raise UsageError(
            f"{subject.label} answers with {answer}, and {data.name} has {len(data.classes)}; "
            f"name other data, or a network for these{hint}"
        )


# ------------------------------------------------------------------------------------------------- command line


def expansion(block: list[str] | None, where: list[str] | None, form: str | None) -> Recipe | None:
    """The expansion that the options describe, if any."""
    if block:
        return Recipe(parse_blocks(block), parse_where(where or (), (), None), form=form)
    if where or form is not None:
        raise UsageError("--where and --form describe an expansion; name its --block as well")
    return None


def describe(network: Network) -> str:
    """Where a network came from, in words."""
    if network.recipe is not None:
        return f"{network.source} with {network.recipe}"
    return f"{network.source}, collapsed" if network.collapsed else network.source


def tell(subjects: Sequence[Subject]) -> None:
    """Print what the person should know of the networks."""
    for subject in subjects:
        for note in subject.notes:
            errors.print(f"note: {note}", style="dim", soft_wrap=True, markup=False)
