"""The networks that the command line's arguments name, and what to do when a file does not fit one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import reparam
from passes.training.discovery import Found, find_convs, plain_norm
from passes.training.filters import ALL
from reparam import ReparamError, files, sources
from reparam.fitting import fitted, misfit, other_classes, without_prefix
from reparam.recipe import Recipe, parse_where
from reparam.shards import shard_of

__all__ = ["Network", "UsageError", "advice", "check_not_read", "load"]


class UsageError(ReparamError):
    """Arguments that do not go together."""


@dataclass(frozen=True)
class Network:
    """A network in eval mode and where it came from.

    Args:
        model: the network.
        source: the spec of its architecture; empty if unknown.
        recipe: how it was expanded from that; None if it was not.
        collapsed: whether it is a collapsed network, so no longer of that architecture.
        notes: what the person should know.
        shape: of one sample that it was trained on, as far as its file says.
    """

    model: nn.Module
    source: str
    recipe: Recipe | None = None
    collapsed: bool = False
    notes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def stock(self) -> nn.Module:
        """A new network of the plain architecture, in the dtype of this one."""
        return files.cast_like(sources.create(self.source).eval(), self.model.state_dict())


def load(
    target: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    key: str | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> Network:
    """The network that ``target`` names: a spec, or a file that this package wrote.

    Args:
        target: ``source:name`` or a path.
        pretrained: the source's trained weights; for specs only.
        weights: a state dict for the network, of the plain architecture or expanded by ``recipe``.
        key: where in the checkpoint ``weights`` the state dict is.
        recipe: how to expand a spec's network, or how the one in ``weights`` was expanded.
        seed: of a spec's random weights.

    Raises:
        UsageError: arguments that exclude each other.
        ReparamError: as :mod:`reparam.files` and :mod:`reparam.sources` do; a file that does not fit says what would.
    """
    if key is not None and weights is None:
        raise UsageError("--key says where in the file of --weights the state dict is; name that file")
    if files.is_file_name(target) or Path(target).is_file():
        return _from_file(target, pretrained, weights, key, recipe)
    if pretrained and weights is not None:
        raise UsageError("--pretrained and --weights are both weights; leave one out")
    # A spec without trained weights is to be the same network each time it is named.
    torch.manual_seed(seed)
    if weights is not None:
        return _with_weights(target, weights, key, recipe)
    stock = sources.create(target, pretrained=pretrained).eval()
    notes = () if pretrained else (f"{target} has random weights (seed {seed}); see --pretrained and --weights",)
    return Network(stock if recipe is None else recipe.expand(stock), target, recipe, notes=notes)


def _from_file(target: str, pretrained: bool, weights: Path | None, key: str | None, recipe: Recipe | None) -> Network:
    if pretrained:
        raise UsageError(f"{target} is a file; --pretrained goes with source:name")
    content = files.load_state(target)
    if recipe is not None:
        how = f"was expanded with {content.recipe}" if content.recipe else "says itself what it holds"
        raise UsageError(f"{target} {how}; leave out --block, or name the network as source:name")
    notes: tuple[str, ...] = ()
    if weights is not None:
        if content.recipe is None:
            raise UsageError(
                f"{target} is not a file of `reparam expand`; --weights goes with that, or with source:name"
            )
        trained = files.load_state(weights, key=key)
        notes = _which(trained, weights)
        content = replace(content, tensors=trained.tensors)
    if weights is not None and content.recipe is not None and content.source:
        stock = sources.create(content.source).eval()
        model, said = _filled(content.recipe.expand(stock), content, weights, content.source, content.recipe)
        notes += said
    else:
        model = files.rebuild(content, target)
    return Network(model, content.source, content.recipe, content.collapsed, notes, content.shape)


def _with_weights(target: str, weights: Path, key: str | None, recipe: Recipe | None) -> Network:
    sources.name_code(target)
    content = files.load_state(weights, key=key)
    target = _with_options_of(content, target)
    # A file of `reparam expand`, or of save_model(expanded=), says itself how it was expanded.
    recipe = recipe or content.recipe
    if content.collapsed:
        return _collapsed(target, content, weights, recipe)
    stock = sources.create(target).eval()
    shell = stock if recipe is None else recipe.expand(stock)
    model, said = _filled(shell, content, weights, target, recipe)
    return Network(model, target, recipe, notes=_which(content, weights) + said, shape=content.shape)


def _with_options_of(content: files.StateFile, target: str) -> str:
    """The spec with the options that a file of the very same network says, where the person leaves some out."""
    said = content.metadata.get("source", "")
    if not sources.is_spec(said):
        return target
    given, options = sources.parse(target)[2], sources.parse(said)[2]
    return content.source if sources.same_place(target, said) and given.items() <= options.items() else target


def _collapsed(target: str, content: files.StateFile, weights: Path, recipe: Recipe | None) -> Network:
    """A file of a collapsed network whose source the person names, since the file may not run its code."""
    if recipe is not None:
        raise UsageError(f"{weights} is of a collapsed network; leave out --block")
    named = replace(content, metadata={**content.metadata, "source": target}, allow_options=True)
    return Network(files.rebuild(named, weights), target, collapsed=True, shape=content.shape)


def _which(content: files.StateFile, weights: Path) -> tuple[str, ...]:
    """Say which of several state dicts was read: weights and their average are both there in many checkpoints."""
    if not content.others:
        return ()
    return (f"the weights are {content.key!r} of {weights}; --key takes others: {', '.join(content.others)}",)


def _filled(
    shell: nn.Module, content: files.StateFile, weights: Path, source: str, recipe: Recipe | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with the file's tensors, and what was done to their names."""
    try:
        found = fitted(shell, content.tensors)
    except files.FileError as error:
        raise files.FileError(f"{weights}: {error}") from error
    if found is not None:
        return files.load_into(shell, replace(content, tensors=found.tensors), weights), found.notes
    what = source if recipe is None else f"{source} expanded with {recipe}"
    tensors = without_prefix(shell, content.tensors)
    if (classes := other_classes(shell, tensors)) is not None:
        layer, held, own = classes
        wanted = sources.with_option(source, "num_classes", held)
        raise files.FileError(
            f"{weights} is for {held} classes and {what} for {own} ({layer or 'the network'} has as many outputs); "
            f"name the network for {held}, {wanted} where it takes that option"
        )
    if shell.state_dict().keys() == tensors.keys():
        hint = "It is of this network in other sizes: see its options"
    else:
        hint = advice(sources.create(source).eval(), tensors)
    if index := shard_of(Path(weights)):
        hint = f"It is one of several files: name {index}"
    raise files.FileError(f"{weights} does not fit {what}: {misfit(shell, tensors)}" + (f". {hint}" if hint else ""))


def check_not_read(output: Path, *read: str | Path | None) -> None:
    """Raise :class:`UsageError` where a file that is to be written is one of those that are read for it."""
    for each in read:
        if each is not None and output.exists() and Path(each).exists() and output.samefile(each):
            raise UsageError(f"{output} is the file that is read, which would be lost; write to another one with -o")


# ------------------------------------------------------------------------------------------------- advice


def advice(stock: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Which options would make a file fit the architecture ``stock``; empty if it is of another architecture.

    Every registered block is tried, with its default options, at the first convolution that the file has a block for;
    what is then said to fit was tried on the whole network.
    """
    if not misfit(stock, dict(tensors)):
        return "It holds the plain network: leave out --block"
    convs = find_convs(stock, linear=True)
    replaced = [each for each in convs if _children(tensors, each.path) and f"{each.path}.weight" not in tensors]
    if not replaced:
        most = len(stock.state_dict().keys() & tensors.keys()) > len(stock.state_dict()) // 2
        return (
            "Most names agree: it is incomplete, or of a variant, see its options"
            if most
            else "It is of another network"
        )
    looks = ""
    for name, form in _alike(stock, replaced[0], tensors):
        words = f"--block {name}" + ("" if form is None else f" --form {form}")
        tops = list(dict.fromkeys(each.path.partition(".")[0] for each in replaced))
        for where in ([], [ALL], tops, [each.path for each in replaced]):
            fitting = Recipe(name, where=parse_where(where, (), None), form=form)
            if not misfit(fitting.expand(stock), dict(tensors)):
                return f"It fits with {words}" + "".join(f" --where {pattern!r}" for pattern in where)
        looks = (
            looks or f"{replaced[0].path} looks expanded with {words}, but others do not: see --where, PATTERN=BLOCK"
        )
    names = ", ".join(sorted(_children(tensors, replaced[0].path))[:3])
    return looks or f"In it {replaced[0].path} is no block with default options: it holds {names}; see `reparam blocks`"


def _alike(stock: nn.Module, found: Found, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None]]:
    """Blocks that have, at one convolution, the names and shapes that the file has there."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=copy.deepcopy(found.conv))
    if found.norm is not None:
        norm = stock.get_submodule(found.norm.path)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        layers["norm"] = plain_norm(copy.deepcopy(norm), found.conv.weight.dim() - 2)
    wanted = _children(tensors, found.path)
    for name, info in reparam.blocks().items():
        for form in (None, "branches" if info.online else "online"):
            try:
                planned = Recipe(name, where="*", form=form).plan(nn.Sequential(layers))
                made = planned.apply().state_dict() if planned.expanded else {}
            except ReparamError:
                continue
            if _children(made, "conv") == wanted:
                yield name, form


def _children(state: Mapping[str, Tensor], path: str) -> dict[str, torch.Size]:
    """Names and shapes of the tensors at and below a path."""
    return {name[len(path) + 1 :]: value.shape for name, value in state.items() if name.startswith(path + ".")}
