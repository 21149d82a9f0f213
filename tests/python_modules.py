"""Random modules with ordinary Python in their forward, as source code from a seed.

A module is put together from the snippets of :mod:`python_snippets`. Each takes the value ``x`` of shape ``(batch, 4,
height, width)`` and leaves another of that shape, so any of them can be dropped and the program still runs: that is all
that :func:`shrink` does. In a snippet ``@`` behind a name stands for its number (names are unique), ``M`` for the
module it belongs to, and a line ``INNER`` for further snippets. Sections: ``top`` (module scope), ``init``,
``methods``, ``body`` (of the forward), ``after`` (once the network is built, with random statistics and in eval mode).

Snippets stand in the network itself or in a block inside of it; how a forward is defined (``STYLES``), what the network
takes (``ARGUMENTS``) and what it returns (``RETURNS``) are drawn as well. The source is executed under a file name of
its own that ``inspect`` and tracebacks can read; a failure prints it.
"""

from __future__ import annotations

import itertools
import linecache
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

from python_snippets import ARGUMENTS, FEATURES, FOLDS, PREAMBLE, RETURNS, STYLES, Arguments
from small_networks import ready

__all__ = ["AROUND", "Block", "Program", "Snippet", "kinds", "program", "shrink", "single"]

# ------------------------------------------------------------------ a program


@dataclass(frozen=True)
class Snippet:
    """One use of a snippet: its name, its number, and what stands in its ``INNER``."""

    kind: str
    number: int
    inner: tuple[Snippet | Block, ...] = ()


@dataclass(frozen=True)
class Block:
    """A module inside of the network, with a class of its own."""

    number: int
    style: str
    body: tuple[Snippet | Block, ...]


Item = Snippet | Block


@dataclass(frozen=True)
class Program:
    """A network as data; :attr:`source` is its text."""

    seed: int
    body: tuple[Item, ...]
    style: str = "plain"
    arguments: str = "one"
    returns: str = "tensor"

    @property
    def source(self) -> str:
        """The module's source; ``build()`` makes the network, in eval mode, the same each time."""
        return _Writer(self).text()

    def load(self) -> dict[str, Any]:
        """The executed source: its module scope, with ``build``, ``LOG`` and ``STORE``."""
        name = f"python_module_{next(_LOADED)}"
        file = f"<{name}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(keepends=True), file
        module = sys.modules[name] = ModuleType(name)  # classes are looked up here, by dataclasses and by pickle
        module.__dict__["ready"] = ready
        exec(compile(self.source, file, "exec"), module.__dict__)
        return module.__dict__

    def features(self) -> list[str]:
        """Names of all that is in it, folds left out."""
        named = [s.kind for s in _snippets(self.body) if s.kind in FEATURES]
        named += [f"style:{b.style}" for b in _blocks(self.body) if b.style != "plain"]
        named += [f"style:{self.style}"] * (self.style != "plain")
        named += [f"arguments:{self.arguments}"] * (self.arguments != "one")
        named += [f"returns:{self.returns}"] * (self.returns != "tensor")
        return sorted(set(named))


_LOADED = itertools.count()


def _snippets(items: Sequence[Item]) -> Iterator[Snippet]:
    for item in items:
        if isinstance(item, Snippet):
            yield item
        yield from _snippets(item.inner if isinstance(item, Snippet) else item.body)


def _blocks(items: Sequence[Item]) -> Iterator[Block]:
    for item in items:
        if isinstance(item, Block):
            yield item
        yield from _blocks(item.inner if isinstance(item, Snippet) else item.body)


def program(seed: int) -> Program:
    """A random program: one to three features among one to four folds, some of them in blocks."""
    pick = random.Random(seed)
    counter = iter(range(1, 100))
    features = pick.sample(sorted(FEATURES), pick.choice((1, 1, 2, 2, 3)))

    def fold() -> Snippet:
        return Snippet(pick.choice(sorted(FOLDS)), next(counter))

    def feature(kind: str) -> Snippet:
        inner = tuple(fold() for _ in range(pick.choice((1, 1, 2)))) if "INNER" in FEATURES[kind] else ()
        return Snippet(kind, next(counter), inner)

    items: list[Item] = [fold() for _ in range(pick.choice((1, 2, 2, 3)))]
    for kind in features:
        items.insert(pick.randrange(len(items) + 1), feature(kind))
    if pick.random() < 0.5:  # part of it in a block
        start = pick.randrange(len(items))
        stop = pick.randrange(start, len(items)) + 1
        style = pick.choice(["plain", "plain", *STYLES])
        items[start:stop] = [Block(next(counter), style, tuple(items[start:stop]))]
    rarely = pick.random
    return Program(
        seed,
        tuple(items),
        pick.choice(sorted(STYLES)) if rarely() < 0.25 else "plain",
        pick.choice(sorted(ARGUMENTS)) if rarely() < 0.4 else "one",
        pick.choice(sorted(RETURNS)) if rarely() < 0.4 else "tensor",
    )


AROUND = ("between", "before", "in a block")
"""Where :func:`single` puts what is tried: between folds, before a rewritten sum, or in a block with one."""


def single(kind: str, around: str = "between") -> Program:
    """A small program around one snippet, style, way of arguments or returned type, with something to fold."""
    numbers = iter(range(1, 100))

    def fold(name: str) -> Snippet:
        return Snippet(name, next(numbers))

    table, _, name = kind.rpartition(":")
    tried: tuple[Item, ...] = ()
    if not table:
        inner = (fold("two_branches"),) if "INNER" in {**FOLDS, **FEATURES}[name] else ()
        tried = (Snippet(name, next(numbers), inner),)
    body: tuple[Item, ...] = (fold("parallel"), *tried, fold("conv_bn"))
    if around == "before":
        body = (*tried, fold("two_branches"), fold("conv_bn"))
    if around == "in a block" or table == "block":
        body = (
            Block(next(numbers), name if table == "block" else "plain", (*tried, fold("two_branches"))),
            fold("conv_bn"),
        )
    if table in ("style", "arguments", "returns"):
        return replace(Program(0, body), **{table: name})
    return Program(0, body)


def kinds() -> list[str]:
    """Everything that :func:`single` takes."""
    styled = [f"style:{s}" for s in STYLES] + [f"block:{s}" for s in STYLES]
    return [*FOLDS, *FEATURES, *styled, *(f"arguments:{a}" for a in ARGUMENTS), *(f"returns:{r}" for r in RETURNS)]


@cache
def _sections(kind: str) -> dict[str, list[str]]:
    """A snippet's lines by section; ``INNER`` is a line of the body, indented as the line after ``:`` before it."""
    found: dict[str, list[str]] = {"top": [], "init": [], "methods": [], "body": [], "after": []}
    for raw in textwrap.dedent(FOLDS.get(kind) or FEATURES[kind]).strip().splitlines():
        if raw.strip() == "INNER":
            found["body"].append("INNER")
            continue
        section, line = raw.split(":", 1)
        found[section].append(line[1:])
    return found


class _Writer:
    """Writes the classes of a program, innermost first."""

    def __init__(self, of: Program) -> None:
        self.of = of
        self.top: list[str] = []
        self.classes: list[str] = []
        self.after: list[str] = []

    def text(self) -> str:
        arguments = ARGUMENTS[self.of.arguments]
        wrapped = self.of.style == "wrapped"
        at = "net.module" if wrapped else "net"
        self.write("Net", at, self.of.body, self.of.style, arguments, RETURNS[self.of.returns])
        build = [
            f"torch.manual_seed({self.of.seed})",
            f"net = ready({'Wrapper(Net())' if wrapped else 'Net()'}.double(), {self.of.seed})",
            *self.after,
            "return net",
        ]
        parts = [PREAMBLE.strip(), "\n".join(self.top), *self.classes, "def build():\n" + _indent(build)]
        return "\n\n\n".join(part for part in parts if part) + "\n"

    def write(self, name: str, at: str, items: Sequence[Item], style: str, arguments: Arguments, returned: str) -> None:
        init, methods, body = ["super().__init__()"], [], []
        self.items(items, at, init, methods, body)
        first = arguments.before.splitlines() + (["given = x"] if "given" in returned else [])
        body = [*first, *body, *arguments.after.splitlines(), f"return {returned}"]
        text = textwrap.dedent(STYLES[style]).strip()
        text = text.replace("SIGNATURE", arguments.signature).replace("PASSED", arguments.passed)
        text = text.replace("    BODY", _indent(body))
        bases = "nn.Module"
        if style == "inherited":  # the base class has the forward, the layers come from the derived one
            bases = f"{name}Base"
            forward = _indent([f"def forward(self, {arguments.signature}):", *_indent(body).splitlines()])
            self.classes.append(f"class {bases}(nn.Module):\n{forward}")
        if style == "overridden":
            bases = f"{name}Base"
            self.classes.append(f"class {bases}(nn.Module):\n    def forward(self, x):\n        return x")
        if style == "on_the_instance":
            self.classes.append(f"def forward_of_{name}(self, {arguments.signature}):\n{_indent(body)}")
            self.after.append(f"{at}.forward = types.MethodType(forward_of_{name}, {at})")
        init_text = "def __init__(self):\n" + _indent(init)
        members = [init_text, "\n".join(methods), text]
        self.classes.append(f"class {name}({bases}):\n" + _indent("\n\n".join(m for m in members if m).splitlines()))

    def items(self, items: Sequence[Item], at: str, init: list[str], methods: list[str], body: list[str]) -> None:
        for item in items:
            if isinstance(item, Block):
                name = f"block{item.number}"
                kind = f"Block{item.number}"
                wrapped = item.style == "wrapped"
                path = f"{at}.{name}.module" if wrapped else f"{at}.{name}"
                self.write(kind, path, item.body, item.style, Arguments(), "x")
                init.append(f"self.{name} = {f'Wrapper({kind}())' if wrapped else f'{kind}()'}")
                body.append(f"x = self.{name}(x)")
                continue
            number, sections = str(item.number), {}
            for section, lines in _sections(item.kind).items():
                sections[section] = [re.sub(r"(?<=\w)@", number, line) for line in lines]
            sections["after"] = [re.sub(r"\bM\.", f"{at}.", line) for line in sections["after"]]
            self.top += sections["top"]
            self.after += sections["after"]
            init += sections["init"]
            methods += sections["methods"]
            for line in sections["body"]:
                if line != "INNER":
                    body.append(line)
                    continue
                inner: list[str] = []
                self.items(item.inner, at, init, methods, inner)
                body += [" " * 4 * opened(body) + each for each in inner or ["pass"]]


def opened(body: Sequence[str]) -> int:
    """How deep the next line stands: in the suite that the last lines opened, or after plain statements at the top."""
    last = body[-1] if body else ""
    depth = (len(last) - len(last.lstrip())) // 4
    return depth + last.rstrip().endswith(":")


def _indent(lines: Sequence[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


# ------------------------------------------------------------------ making it smaller


def shrink(failing: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program found that still fails, by dropping one thing at a time."""
    while True:
        smaller = next((p for p in _smaller(failing) if fails(p)), None)
        if smaller is None:
            return failing
        failing = smaller


def _smaller(of: Program) -> Iterator[Program]:
    for name, plain in (("style", "plain"), ("arguments", "one"), ("returns", "tensor")):
        if getattr(of, name) != plain:
            yield replace(of, **{name: plain})
    for body in _fewer(of.body):
        yield replace(of, body=body)


def _fewer(items: tuple[Item, ...]) -> Iterator[tuple[Item, ...]]:
    """The same items with one dropped, opened or made smaller."""
    for i, item in enumerate(items):
        before, after = items[:i], items[i + 1 :]
        yield before + after
        inside = item.body if isinstance(item, Block) else item.inner
        if inside:
            yield before + inside + after
        if isinstance(item, Block) and item.style != "plain":
            yield (*before, replace(item, style="plain"), *after)
        for fewer in _fewer(inside):
            smaller = replace(item, body=fewer) if isinstance(item, Block) else replace(item, inner=fewer)
            yield (*before, smaller, *after)
