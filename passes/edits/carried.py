"""The edits that a network carries, so that its file can say how it was made.

They lie in a plain attribute of the outermost module, which copies and pickles have too. In a pickle they are text, or
a pickle of their own: who reads it needs nothing of this package for them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from passes.edits.edit import Block, Delete, Edit, Replace, Rewrite
from passes.edits.errors import EditError
from passes.edits.text import from_text, to_text

__all__ = ["made_by", "other_network", "remember", "revise"]

_ATTRIBUTE = "reparam_edits"


class _Edits(tuple[Edit, ...]):
    """Edits that are pickled as their text; those that no text may hold (a person's own function) as bytes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Edits:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            return str, (to_text(self),)
        except EditError:
            return bytes, (pickle.dumps(tuple(self)),)


def made_by(model: nn.Module) -> tuple[Edit, ...] | None:
    """The edits that made a network what it is, from the one that its constructor builds; None if there were none."""
    held = vars(model).get(_ATTRIBUTE)
    if isinstance(held, (str, bytes)):
        held = from_text(held) if isinstance(held, str) else pickle.loads(held)
    return None if held is None else tuple(held)


def remember(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Let a network carry the edits that were made to it; those that no longer show are left out."""
    whole = [*(made_by(model) or ()), *edits]
    if whole:
        vars(model)[_ATTRIBUTE] = _Edits(reversed([*_showing(reversed(whole))]))


def revise(model: nn.Module, revised: Callable[[Edit], Edit]) -> None:
    """Let a network remember its edits in another way."""
    if edits := made_by(model):
        vars(model)[_ATTRIBUTE] = _Edits(map(revised, edits))


def other_network(model: nn.Module) -> str:
    """What a person should know who saves an edited network as its own library does; empty where nothing is amiss.

    Hugging Face's ``from_pretrained``, and whatever has a method of that name, builds the plain class, gives it the
    numbers whose names it knows and makes up the others.
    """
    kind = type(model)
    if made_by(model) is None or not (hasattr(kind, "save_pretrained") and hasattr(kind, "from_pretrained")):
        return ""
    return (
        f"what save_pretrained writes of this {kind.__name__} from_pretrained reads as another network, without an "
        "error: keep it with reparam.save and reparam.load, or save_pretrained what collapse(like=) returns"
    )


def _showing(backwards: Iterable[Edit]) -> Iterator[Edit]:
    """The edits of which something is left: no later module took the place of what they changed."""
    replaced, deleted = set[str](), set[str]()
    for edit in backwards:
        names = edit.path.split(".")
        inside = any(".".join(names[:i]) in replaced for i in range(1, len(names)))
        itself = edit.path in replaced and isinstance(edit, (Replace, Block, Rewrite))
        if not (inside or itself or (edit.path in deleted and isinstance(edit, Block))):
            yield edit
        if isinstance(edit, Replace) and "like" not in str(edit.layer.kind):
            replaced.add(edit.path)
        elif isinstance(edit, Delete):
            deleted.add(edit.path)
