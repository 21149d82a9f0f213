"""The source of generated code lives as long as the code: a server that folds again and again does not grow by it."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import traceback
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from small_networks import Net, Parallel, images, ready
from torch.fx import graph_module

import reparam
from passes.training import equivalent


def kept() -> tuple[int, int, int]:
    """Sources that fx keeps and that linecache keeps, and classes."""
    gc.collect()
    classes = sum(type(each) is type for each in gc.get_objects())
    return (
        len(graph_module._loader.eval_cache),
        sum(name.startswith(("<eval", "<forward of reparam")) for name in linecache.cache),
        classes,
    )


def collapse_and_drop() -> None:
    model = ready(Parallel())
    reparam.collapse(model)
    reparam.collapse(copy.deepcopy(model), inplace=True)
    reparam.explain(model)


def expand_and_drop() -> None:
    plain = ready(Net())
    expanded = reparam.expand(plain, "acb")
    reparam.collapse(expanded)
    reparam.collapse(expanded, like=plain)


def train_online_and_drop() -> None:
    model: Any = reparam.expand(ready(Net()), "dbb", form="online").train()
    model(images()).sum().backward()


@pytest.mark.parametrize("verbs", [collapse_and_drop, expand_and_drop, train_online_and_drop])
def test_repeated_use_leaves_nothing_behind(verbs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalent, "_PROGRAMS", WeakValueDictionary())  # the tests' own keeps all
    verbs()
    before = kept()
    for _ in range(3):
        verbs()
    assert kept() == before


def test_the_source_is_there_as_long_as_the_network() -> None:
    def rewritten() -> Any:
        return reparam.collapse(ready(Parallel()))

    result = copy.deepcopy(rewritten())
    gc.collect()
    assert "def forward(self" in inspect.getsource(type(result).forward)
    with pytest.raises(RuntimeError) as caught:
        result(torch.zeros(1, 99, 8, 8))
    gc.collect()
    shown = "".join(traceback.format_exception(caught.value))
    assert "self." in shown.partition("<forward of reparam")[2].splitlines()[1]
