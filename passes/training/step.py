"""What a training step takes on the device at hand.

A step is forward, backward and SGD with momentum; its rate is zero, so that the numbers stay what they are. On the CPU
its time is the process's own on one thread, in which neighbours on the machine do not count; on a GPU that of the
synchronised clock. The memory of a network's step is its peak. That of a layer's is what adds up over layers: weights,
buffers, momentum, gradients of weights, and what autograd has saved; temporary values do not.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from passes.graph.inputs import tensors_in
from passes.refusal import ReparamError

__all__ = ["Measure", "Step", "Use", "measure", "one_thread"]

ROUNDS = (5, 30)
"""Runs of a step, at least and at most."""
SECONDS = 0.3
"""So long the steps are run, between these."""
ON_GPU = 10
"""Steps between two synchronisations of a GPU, which are too short to be timed one by one."""


class Use(NamedTuple):
    """What a step takes: seconds, and bytes."""

    seconds: float
    bytes: float


class Step:
    """A training step.

    Args:
        model: what is trained.
        call: its forward.
        whole: whether it is a network, not a layer of one.
        memory: whether its memory is asked for; else it counts as none.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any], *, whole: bool = False, memory: bool = False) -> None:
        self.model, self.call, self.whole, self.memory = model, call, whole, memory
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.0, momentum=0.9) if self.trained else None
        self.device = next(model.parameters()).device

    def __call__(self) -> None:
        loss = self._loss()
        if loss.requires_grad:
            loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _loss(self) -> Tensor:
        given = [t for t in tensors_in(self.call()) if t.is_floating_point() and (t.requires_grad or not self.whole)]
        if not given:
            raise ReparamError("nothing is trained: no output of a step depends on a parameter that requires_grad")
        return torch.stack([t.float().square().mean() for t in given]).sum()

    def run(self) -> float:
        """Seconds of one step."""
        if self.device.type != "cuda":
            started = time.process_time()
            self()
            return time.process_time() - started
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(ON_GPU):
            self()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - started) / ON_GPU

    def bytes(self) -> float:
        """Memory, of the kind that the module's docstring says."""
        if not self.memory:
            return 0.0
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        for tensor in (*self.model.parameters(), *self.model.buffers()):
            note(tensor)
        trained = sum(p.nbytes for p in self.trained)
        if self.whole:
            return sum(held.values()) + trained + self._peak(set(held))
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss()  # what is saved lives as long as this, and no storage takes another one's place
        del loss
        return sum(held.values()) + 2 * trained

    def _peak(self, before: set[int]) -> int:
        """Bytes that a step adds at most: of tensors, or on a GPU as its allocator counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            self()
            return int(torch.cuda.max_memory_allocated(self.device) - allocated)
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        momentum = {t.untyped_storage().data_ptr() for t in tensors_in(list(states))}
        alive = _Alive(before | momentum)
        with alive:
            self()
        return alive.most


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, but for those of storages that were there before."""

    def __init__(self, before: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.now, self.most = before, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self._count(storage.nbytes())
                weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def _gone(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self._count(-size)


Measure = Callable[[Sequence[Step]], Sequence[Use]]


def measure(steps: Sequence[Step]) -> list[Use]:
    """Medians of the steps' times, which take turns, and their memory."""
    with one_thread() if steps[0].device.type == "cpu" else nullcontext():
        for step in steps:
            step()  # the first one allocates, and makes the momentum
        taken = [[step.run()] for step in steps]
        rounds = int(SECONDS / max(sum(map(sum, taken)), 1e-6))
        for _ in range(min(max(rounds, ROUNDS[0]), ROUNDS[1]) - 1):
            for step, seconds in zip(steps, taken, strict=True):
                seconds.append(step.run())
    return [Use(statistics.median(seconds), step.bytes()) for step, seconds in zip(steps, taken, strict=True)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside: times compare, and thousands of small operations do not wait for threads to meet."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
