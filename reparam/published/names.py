"""From the names of a published network to those of torchvision, timm and the networks of this package.

A list of renames says what the path of each module in a file is called elsewhere. The first list counts with which all
modules of the file find their place, and none of the network is left over. Where no list fits, the two trees of names
are compared: modules of one shape under one parent need the same names, or names that differ in their numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from reparam.disk import FileError
from reparam.published.units import shortened

__all__ = ["Side", "placed"]

Rename = tuple[str, str | Callable[[re.Match[str]], str]]
Shape = tuple[int, ...]

_MOBILENET = (1, 2, 2, 6, 2)
"""Blocks of each stage of MobileNet, behind the first of 32 channels: 13 in all."""
_VGG16 = (2, 2, 3, 3, 3)


def _in_stages(sizes: tuple[int, ...]) -> Callable[[int], tuple[int, int]]:
    """From a number to its stage and its number there."""
    starts = [0, *accumulate(sizes)]
    return lambda i: next((s, i - starts[s]) for s in reversed(range(len(sizes))) if i >= starts[s])


def _mobilenet(match: re.Match[str]) -> str:
    stage, number = _in_stages(_MOBILENET)(int(match[1]))
    return f"blocks.{stage}.{number}.conv_{'dw' if match[2] == 'depthwise' else 'pw'}"


def _less(template: str, by: int = 1) -> Callable[[re.Match[str]], str]:
    """A template whose first number begins at 0 instead of 1."""
    return lambda match: template.format(int(match[1]) - by, *match.groups()[1:])


def _vgg(match: re.Match[str]) -> str:
    """The networks count their pooling layers as well, one behind each stage."""
    number = int(match[1]) - 1
    return f"features.{number + _in_stages(_VGG16)(number)[0]}.conv"


_LISTS: dict[str, tuple[Rename, ...]] = {
    "as they are": (),
    "ResNet": (
        (r"(?:stage0\.)?conv1", "conv1"),
        (r"stage(\d)\.(?:block)?(\d+)\.conv(\d)", r"layer\1.\2.conv\3"),
        (r"stage(\d)\.(\d+)\.shortcut", r"layer\1.\2.downsample.0"),
        (r"stage(\d)\.projection", r"layer\1.0.downsample.0"),
        (r"linear|fc", "fc"),
    ),
    "MobileNet": (
        (r"conv1", "conv_stem"),
        (r"stem\.(\d+)\.(depthwise|pointwise)", _mobilenet),
        (r"linear", "classifier"),
    ),
    "RepVGG and MobileOne": (
        (r"stage0(\..*)?", r"stem\1"),
        (r"stage(\d)\.(\d+)(.*)\.se\.(?:reduce|down)", _less("stages.{}.{}{}.attn.fc1")),
        (r"stage(\d)\.(\d+)(.*)\.se\.(?:expand|up)", _less("stages.{}.{}{}.attn.fc2")),
        (r"stage(\d)\.(\d+)", _less("stages.{}.{}")),
        (r"linear", "head.fc"),
    ),
    "RepVGG as its authors deploy it": ((r"(stage0|stage\d(?:_first|_second)?(?:\.blocks)?\.\d+)", r"\1.rbr_reparam"),),
    "ResNet for CIFAR": (
        (r"stage1\.conv1", "conv1"),
        (r"stage(\d)\.block(\d+)\.(conv\d)", _less("stages.{}.{}.{}")),
        (r"stage(\d)\.projection", _less("stages.{}.0.shortcut")),
        (r"linear", "fc"),
    ),
    "Wide ResNet for CIFAR": (
        (r"stage(\d)\.block(\d+)\.conv(\d)\.bn", _less("stages.{}.{}.bn{}")),
        (r"stage(\d)\.block(\d+)\.conv(\d)", _less("stages.{}.{}.conv{}")),
        (r"stage(\d)\.block(\d+)\.proj\.bn", _less("stages.{}.{}.bn")),
        (r"stage(\d)\.block(\d+)\.proj\.conv", _less("stages.{}.{}.shortcut")),
        (r"last_bn", "bn"),
        (r"linear", "fc"),
    ),
    "VGG for CIFAR": (
        (r"stem\.conv(\d+)", _vgg),
        (r"linear1", "hidden"),
        (r"linear2", "fc"),
    ),
    "ECBSR": ((r"(.*backbone\.\d+)", r"\1.conv3x3"),),
    "Cifar-quick": ((r"conv(\d)", r"conv\1.conv"),),
    "MNIST toy": ((r"conv(\d)", lambda match: f"layers.{2 * int(match[1]) - 2}"),),
}


@dataclass(frozen=True)
class Side:
    """The modules of a file, or of a network.

    Args:
        shapes: of the kernel, or of the first tensor, by path.
        norms: of a network: the batch norm behind each convolution. Of a file: what brings its own norm along, or needs
            none any more, and an empty text.
    """

    shapes: Mapping[str, Shape]
    norms: Mapping[str, str]


def placed(file: Side, network: Side, *, explain: bool = False) -> tuple[dict[str, str], str]:
    """The path in the network of each module of the file, and how that was told.

    Raises :class:`FileError` if nothing fits, or more than one thing does; the message lists what is left over. To
    ``explain`` is to look for the one thing that keeps them from fitting.
    """
    if (found := _fit(file, network)) is not None:
        return found
    nearest = _nearest(file, network) if explain else ""
    if not nearest:
        every = [{path: _renamed(path, renames) for path in file.shapes} for renames in _LISTS.values()]
        lost, left = min((_differences(paths, file, network) for paths in every), key=lambda two: sum(map(len, two)))
        nearest = _lacks(lost, left)
    raise FileError(f"the names of the file do not map to the network: {nearest}")


def _fit(file: Side, network: Side) -> tuple[dict[str, str], str] | None:
    for name, renames in _LISTS.items():
        paths = {path: _renamed(path, renames) for path in file.shapes}
        if not any(_differences(paths, file, network)):
            return paths, name
    tree = _by_tree(file.shapes, _in_front(file, network))
    if tree is not None and not any(_differences(tree, file, network)):
        return tree, "by shapes, and modules of one shape by their numbers"
    return None


def _in_front(file: Side, network: Side) -> dict[str, Shape]:
    """The modules of a network without the norms that blocks of the file bring along."""
    behind = set(network.norms.values()) if file.norms else set()
    return {path: shape for path, shape in network.shapes.items() if path not in behind}


# ------------------------------------------------------------------ what keeps them from fitting


def _lacks(lost: Iterable[str], left: Iterable[str]) -> str:
    said = [f"no place for {shortened(lost)}"] if lost else []
    return "; ".join([*said, *([f"nothing for its {shortened(left)}"] if left else [])])


def _nearest(file: Side, network: Side) -> str:
    """The one thing, in words, without which they would fit: the number of classes, or a part that one side lacks."""
    theirs = _in_front(file, network)
    more = Counter(file.shapes.values()) - Counter(theirs.values())
    less = Counter(theirs.values()) - Counter(file.shapes.values())
    if len(more) == len(less) == 1:
        return _classes(file, network, next(iter(more)), next(iter(less)))
    for part in _parts(file.shapes) if not less else ():
        rest = {path: shape for path, shape in file.shapes.items() if path not in part}
        if Counter(part.values()) == more and _fits(Side(rest, file.norms), network):
            return _lacks(part, ())
    for part in _parts(theirs) if not more else ():
        gone = {*part, *(network.norms.get(path) for path in part)}
        rest = {path: shape for path, shape in network.shapes.items() if path not in gone}
        if Counter(part.values()) == less and _fits(file, Side(rest, network.norms)):
            return _lacks((), part)
    return ""


def _classes(file: Side, network: Side, held: Shape, own: Shape) -> str:
    if len(held) != 2 or held[1:] != own[1:]:
        return ""
    alike = {path: own if shape == held else shape for path, shape in file.shapes.items()}
    if not _fits(Side(alike, file.norms), network):
        return ""
    heads = shortened(path for path, shape in file.shapes.items() if shape == held)
    return (
        f"it is for {held[0]} classes ({heads}) and the network for {own[0]}; name the network for {held[0]}, "
        f"num_classes={held[0]} where it takes that option"
    )


def _fits(file: Side, network: Side) -> bool:
    try:
        return _fit(file, network) is not None
    except FileError:  # in more than one way
        return False


def _parts(shapes: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Every module by itself, and with what is inside."""
    paths = dict.fromkeys(above for path in shapes for above in accumulate(path.split("."), "{}.{}".format))
    for part in paths:
        yield {path: shape for path, shape in shapes.items() if f"{path}.".startswith(f"{part}.")}


def _renamed(path: str, renames: tuple[Rename, ...]) -> str:
    path = path.removesuffix(".acb")  # what ACNet's builder calls the block inside of a convolution with an activation
    for pattern, to in renames:
        if match := re.fullmatch(pattern, path):
            return match.expand(to) if isinstance(to, str) else to(match)
    return path


def _differences(paths: Mapping[str, str], file: Side, network: Side) -> tuple[list[str], list[str]]:
    """What has no place of its shape, and what is left over."""
    taken = Counter(paths.values())
    lost = [path for path, to in paths.items() if network.shapes.get(to) != file.shapes[path] or taken[to] > 1]
    brought = {network.norms.get(to) for path, to in paths.items() if path in file.norms}
    return lost, [path for path in network.shapes if path not in taken and path not in brought]


# ------------------------------------------------------------------ trees


@dataclass
class _Node:
    """A module and what is inside; one with a single child is that child."""

    path: str
    shape: Shape | None
    children: dict[str, _Node]

    @staticmethod
    def of(shapes: Mapping[str, Shape], path: str = "") -> _Node:
        inside: dict[str, dict[str, Shape]] = {}
        for key, shape in shapes.items():
            if key != path:
                name = key[len(path) + 1 if path else 0 :].partition(".")[0]
                inside.setdefault(name, {})[key] = shape
        nodes = {name: _Node.of(found, f"{path}.{name}" if path else name) for name, found in inside.items()}
        if len(nodes) == 1 and path not in shapes:
            return next(iter(nodes.values()))
        return _Node(path, shapes.get(path), nodes)

    @cached_property
    def kind(self) -> object:
        """Equal for modules that have the same inside, in whatever order and under whatever names."""
        return self.shape, tuple(sorted(map(repr, (child.kind for child in self.children.values()))))


def _by_tree(theirs: Mapping[str, Shape], network: Mapping[str, Shape]) -> dict[str, str] | None:
    """Places by the structure of both; None if it differs. Raises :class:`FileError` if several would do."""
    first, second = _Node.of(theirs), _Node.of(network)
    found: dict[str, str] = {}
    if first.kind != second.kind:
        return None
    _match(first, second, found)
    return found


def _match(a: _Node, b: _Node, found: dict[str, str]) -> None:
    if a.shape is not None:
        found[a.path] = b.path
    for kind in {repr(child.kind) for child in a.children.values()}:
        mine, others = ({n: c for n, c in x.children.items() if repr(c.kind) == kind} for x in (a, b))
        for left, right in _pairs(mine, others):
            _match(left, right, found)


def _pairs(mine: dict[str, _Node], others: dict[str, _Node]) -> list[tuple[_Node, _Node]]:
    """Children of one kind, told apart by equal names, or by the numbers in them."""
    if len(mine) == 1:
        return list(zip(mine.values(), others.values(), strict=True))
    if mine.keys() == others.keys():
        return [(child, others[name]) for name, child in mine.items()]
    ordered = []
    for side in (mine, others):
        numbers = {name: [int(n) for n in re.findall(r"\d+", name)] for name in side}
        if len({re.sub(r"\d+", "#", name) for name in side}) > 1 or not all(numbers.values()):
            places = shortened(child.path for child in others.values())
            every = shortened(child.path for child in mine.values())
            raise FileError(f"ambiguous: {every} of the file could each be any of {places} of the network")
        ordered.append([side[name] for name in sorted(side, key=lambda name: numbers[name])])
    return list(zip(*ordered, strict=True))
