"""Linear layers of maps, as core aten writes them: all positions in one dimension, by sizes that stand in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import ready
from torch import Tensor, nn

import reparam

N, T, C, K = 3, 5, 6, 8


class Tokens(nn.Module):
    """A linear layer, and what is made of its value."""

    def __init__(
        self, behind: Callable[[Any, Tensor], Tensor], bias: bool = True, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.linear, self.behind = nn.Linear(C, K, bias=bias), behind
        self.norm, self.other = norm or nn.BatchNorm1d(K), nn.Linear(K, 4)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.linear(x))


def flattened(net: Any, y: Tensor) -> Tensor:
    return net.norm(y.reshape(-1, K)).reshape(y.shape)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a norm behind": (lambda: Tokens(lambda net, y: net.norm(y.transpose(1, 2))), (N, T, C)),
    "of maps": (lambda: Tokens(lambda net, y: net.norm(y.permute(0, 3, 1, 2)), norm=nn.BatchNorm2d(K)), (N, T, 4, C)),
    "flattened": (lambda: Tokens(flattened), (N, T, C)),
    "without bias": (lambda: Tokens(flattened, bias=False), (N, T, C)),
    "a scale": (lambda: Tokens(lambda net, y: y * net.scale), (N, T, C)),
    "another layer": (lambda: Tokens(lambda net, y: net.other(y)), (N, T, C)),
}


@pytest.mark.parametrize("batch", [None, torch.export.Dim("batch")], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_rows_of_a_linear_layer_fold_as_the_layer_does(name: str, batch: Any) -> None:
    build, shape = NETWORKS[name]
    net, x = ready(build()), torch.randn(shape)
    core = torch.export.export(net, (x,), dynamic_shapes=batch and ({0: batch},)).run_decompositions()
    result, report = reparam.collapse_with_report(core)
    assert len(report.folds) == len(reparam.explain(net, x).folds) == 1
    assert not report.taken_back
    kinds = [str(node.target) for node in result.graph.nodes if node.op == "call_function"]
    assert sum(kind in ("aten.mm.default", "aten.addmm.default") for kind in kinds) == 1
    assert not any("batch_norm" in kind or "linear" in kind for kind in kinds), "no call of another dialect"
    assert reparam.explain(result).folds == [], "a second collapse changes nothing"
    for other in (x, torch.randn(7, *shape[1:])) if batch else (x,):
        assert torch.allclose(result.module()(other), net(other), atol=1e-5)
    result.run_decompositions()


def test_rows_that_another_reads_stay() -> None:
    """What is laid in one dimension is a value of its own where others read it."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(C, K)), nn.BatchNorm1d(K)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.mm(x.reshape(-1, C), self.weight)
            return self.norm(rows.reshape(x.shape[0], -1, K).transpose(1, 2)), rows.relu()

    net, x = ready(Both()), torch.randn(N, T, C)
    core = torch.export.export(net, (x,)).run_decompositions()
    result, report = reparam.collapse_with_report(core)
    assert report.folds == []
    assert all(torch.equal(a, b) for a, b in zip(result.module()(x), net(x), strict=True))


def test_rows_of_another_order_are_no_linear_layer() -> None:
    """As many rows, but not those of the map: the sizes in front tell."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(C, K)), nn.BatchNorm1d(K)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.mm(x.reshape(-1, C), self.weight).reshape(T, N, K).transpose(1, 2))

    net, x = ready(Crossed()), torch.randn(N, T, C)
    core = torch.export.export(net, (x,)).run_decompositions()
    assert reparam.explain(core).folds == []
    result, report = reparam.collapse_with_report(core)
    assert report.folds == []
    assert torch.equal(result.module()(x), net(x))
