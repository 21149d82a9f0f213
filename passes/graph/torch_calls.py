"""Torch's functions as the traced code calls them: random ones become calls of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from passes.graph.patches import active
from passes.graph.proxies import is_value
from passes.graph.structures import leaves
from passes.refusal import Reason

if TYPE_CHECKING:
    from passes.graph.tracer import Tracer

__all__ = ["TorchCalls"]


class TorchCalls(TorchFunctionMode):
    """Torch's functions as the traced code calls them: random ones become calls of the graph."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if active() is not self.tracer:
            return func(*args, **kwargs)
        values = [v for v in leaves((args, kwargs)) if is_value(v)]
        if values:
            if any(v.tracer is not self.tracer for v in values):  # a cache kept it; torch.fx takes values of one trace
                args, kwargs = tree_map(lambda v: self.tracer.taken_over(v) if is_value(v) else v, (args, kwargs))
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        if func in _RANDOM:
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        if not self.tracer.careful:
            return func(*args, **kwargs)
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        if not torch.equal(before, torch.get_rng_state()):
            self.tracer.stop(Reason.RANDOM, f"draws random numbers: {getattr(func, '__name__', func)}")
        return result


_RANDOM = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like,
    torch.normal, torch.bernoulli, torch.multinomial, torch.poisson,
}  # fmt: skip
