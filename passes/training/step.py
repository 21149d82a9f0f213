"""What a training step takes on the device at hand.

A step is forward, backward and SGD with momentum; its rate is zero, so that the numbers stay what they are. On the CPU
its time is the process's own on one thread, in which neighbours on the machine do not count; on a GPU that of the
synchronised clock. Its memory is what it holds as the backward begins: weights, buffers, momentum, and what autograd
has saved. That adds up over layers, temporary values do not; of a whole network on a GPU the allocator's peak is taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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
    """What a step takes: seconds, and bytes at once."""

    seconds: float
    bytes: float


class Step:
    """A training step of ``model``; ``call`` is its forward. ``whole``: a network, not a layer of one."""

    def __init__(self, model: nn.Module, call: Callable[[], Any], whole: bool = False) -> None:
        self.model, self.call, self.whole = model, call, whole
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.0, momentum=0.9) if self.trained else None
        self.device = next(model.parameters()).device

    def __call__(self) -> None:
        loss = self._loss()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
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
        """What one step holds at most, of the kind that the module's docstring says."""
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        for tensor in (*self.model.parameters(), *self.model.buffers()):
            note(tensor)
        own = sum(held.values()) + sum(p.nbytes for p in self.trained)
        if self.whole and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self()
            return own + torch.cuda.max_memory_allocated(self.device) - before
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss()  # what is saved lives as long as this, and no storage takes another one's place
        del loss
        return sum(held.values()) + sum(p.nbytes for p in self.trained)


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
