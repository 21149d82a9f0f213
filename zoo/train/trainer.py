"""One run of training: accelerate for devices, processes and precision, timm for optimizer, schedule and averaging.

What an epoch does depends on the state before it and on (seed, epoch) alone: all generators are seeded anew at its
beginning, and the learning rate is a function of the step. So a run that is killed and goes on from the end of an epoch
does on the CPU exactly what it would have done, to the bit (with as many threads and processes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import reparam
from reparam import ReparamError
from reparam.disk import told
from reparam.saving import save_model
from zoo import memory
from zoo.render import provenance
from zoo.train import build
from zoo.train.checkpoint import Folder, held
from zoo.train.config import Config
from zoo.train.result import Epoch, Result
from zoo.train.state import Parts
from zoo.train.sync import SharedNorms

__all__ = ["Epoch", "Result", "Training", "TrainingError", "train"]


class TrainingError(ReparamError):
    """A run that cannot begin or go on; the message says where it stopped and what to change."""


def train(
    config: Config,
    out: Path | None = None,
    *,
    workers: int = 0,
    on_epoch: Callable[[Epoch], None] | None = None,
    stop_after: int | None = None,
) -> Result:
    """Train the network of a configuration, or go on where an earlier call with the same arguments was stopped.

    A run that is finished is not repeated: its result is read.

    Args:
        config: all that decides about the result.
        out: folder of the run (:mod:`zoo.train.checkpoint`); without one nothing is kept.
        workers: processes that load images; they change nothing in the result.
        on_epoch: told each epoch when it is over.
        stop_after: leave after this epoch, as if interrupted there.

    Raises:
        TrainingError: the loss is no longer finite, or the configuration cannot be trained.
        CheckpointError: the folder is in use, or holds no state that this run could go on from.
        ReparamError: from building the network or loading the data.
    """
    with held(out):
        training = Training(config, out, workers=workers)
        for epoch in training.epochs():
            if on_epoch is not None:
                on_epoch(epoch)
            if epoch.epoch == stop_after:
                break
        return training.result()


class Training:
    """A run that is driven epoch by epoch; arguments as :func:`train`, which raises the same errors.

    ``model`` is the network itself, never a wrapper of it, ``log`` holds the epochs that are over.
    """

    def __init__(self, config: Config, out: Path | None = None, *, workers: int = 0) -> None:
        self.config, self.workers = config, workers
        self.folder = None if out is None else Folder(out)
        self.accelerator = _accelerator(config)
        with self.accelerator.main_process_first():  # which downloads
            self.data = build.load(config)
        self.source, self.expansion = build.spec(config, self.data), build.recipe(config)
        self.model = self._build()
        self.averaged = None if config.ema is None else ModelEmaV3(self.model, decay=config.ema)
        self.optimizer = build.make_optimizer(self.model, config)
        self.steps = len(self._batches(train=True))
        if not self.steps:
            raise TrainingError(f"{self.data.name} has fewer images to train on than a batch of {config.batch}")
        self.schedule = build.make_schedule(self.optimizer, config, self.steps)
        self.log: list[Epoch] = []
        self._resume()
        self._network = self._parallel()
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer)  # unscales gradients of scaled losses
        self._board = None
        self._begin()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and reports; there is one."""
        return bool(self.accelerator.is_main_process)

    @property
    def finished(self) -> bool:
        return len(self.log) >= self.config.epochs

    def epochs(self, on_step: Callable[[int], None] | None = None) -> Iterator[Epoch]:
        """Train, yielding each epoch when its state is on the disk; ``on_step`` is told each step's number, from 1."""
        while not self.finished:
            epoch = self._epoch(len(self.log) + 1, on_step)
            self.log.append(epoch)
            self._write(epoch)
            yield epoch

    def result(self) -> Result:
        """Of the epochs that are over."""
        count = sum(p.numel() for p in self.model.parameters())
        averaged = None if self.averaged is None else self.averaged.module
        return Result(tuple(self.log), self.steps * self.config.batch, count, self.model, averaged)

    # --------------------------------------------------------------------------------------------- beginning

    def _build(self) -> nn.Module:
        model = build.build(self.config, self.data).to(self.accelerator.device)
        if self._shares_norms and self.accelerator.device.type != "cpu":
            # After expansion: blocks have ordinary batch norms.
            model = convert_sync_batchnorm(model)
        return model

    def _parallel(self) -> nn.Module:
        """The network, or what averages its gradients over several processes; only steps see that."""
        if self.accelerator.num_processes == 1:
            return self.model
        device = self.accelerator.device
        return DistributedDataParallel(self.model, device_ids=None if device.type == "cpu" else [device])

    @property
    def _parts(self) -> Parts:
        averaged = None if self.averaged is None else self.averaged.module
        return Parts(self.model, averaged, self.optimizer, self.accelerator.scaler)

    @property
    def _shares_norms(self) -> bool:
        return self.config.sync_norms and self.accelerator.num_processes > 1

    def _resume(self) -> None:
        """Take up the state that the folder holds, if any."""
        if self.folder is not None and self.main:
            self.folder.sweep()
        state = None if self.folder is None else self.folder.read_state(self.config, self._parts)
        done = torch.tensor([0 if state is None else len(state.epochs)], device=self.accelerator.device)
        if len(set(self.accelerator.gather(done).tolist())) > 1:
            raise TrainingError("the processes see different folders: --out must be on a disk that all of them share")
        if state is None:
            return
        self._parts.take(state)
        self.log = list(state.epochs)

    def _begin(self) -> None:
        """Say on the disk what this run is, or write the result that a killed one could not write any more."""
        if self.folder is None or not self.main:
            return
        if self.finished:
            self.folder.write_json("result.json", self.result().to_json())
        if self.log:
            return
        about = {
            "config": asdict(self.config),
            "source": self.source,
            "expanded": None if self.expansion is None else str(self.expansion),
            "data": {"name": self.data.name, "shape": self.data.shape, "classes": self.data.classes},
            "written": provenance(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
        }
        self.folder.write_json("run.json", about)

    # --------------------------------------------------------------------------------------------- an epoch

    def _epoch(self, number: int, on_step: Callable[[int], None] | None) -> Epoch:
        config = self.config
        if config.last_form is not None and number > config.epochs - config.last_epochs:
            reparam.set_form(self.model, config.last_form)
        # Processes draw different dropout, but each the same one again.
        seeds = np.random.SeedSequence([config.seed, number, self.accelerator.process_index])
        set_seed(int(seeds.generate_state(1)[0]))
        peak = memory.Peak(self.accelerator.device, self._held())
        started = time.perf_counter()
        loss, accuracy = self._train(number, on_step)
        seconds = time.perf_counter() - started
        peak_bytes = peak.bytes()
        test: tuple[float | None, float | None] = (None, None)
        averaged = None
        if number % config.evaluate_every == 0 or number == config.epochs:
            test = self._evaluate(self.model)
            averaged = None if self.averaged is None else self._evaluate(self.averaged.module)[1]
        return Epoch(number, seconds, self._rate, loss, accuracy, *test, averaged, peak_bytes)

    def _train(self, number: int, on_step: Callable[[int], None] | None) -> tuple[float, float]:
        """All steps of an epoch; mean loss and accuracy of its batches."""
        self.model.train()
        totals = [0.0, 0.0, 0.0]
        for step, (images, labels) in enumerate(self._batches(train=True, epoch=number), 1):
            self.schedule.step_update((number - 1) * self.steps + step - 1)
            counts = self._step(images, labels, f"epoch {number}, step {step} of {self.steps}")
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            if on_step is not None:
                on_step(step)
        loss, right, images_seen = totals
        return loss / images_seen, right / images_seen

    def _step(self, images: Tensor, labels: Tensor, where: str) -> list[float]:
        """One step; summed loss, right answers and images, over all processes."""
        with self._norms(), self.accelerator.autocast():
            logits = self._network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.smoothing)
        right = (logits.argmax(1) == labels).sum()
        counts = torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])
        values: list[float] = self.accelerator.reduce(counts).tolist()
        # All processes have the same sums, so all of them stop here or none does.
        if not math.isfinite(values[0]):
            raise self._lost(images, values[0], where)
        self._stepper.zero_grad()
        self.accelerator.backward(loss)
        self._stepper.step()
        if self.averaged is not None:
            self.averaged.update(self.model)
        return values

    @torch.no_grad()
    def _evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Mean cross-entropy and accuracy on the test images, each counted once, in the precision of training."""
        model.eval()
        loss = right = seen = 0.0
        for images, labels in self._batches(train=False):
            with self.accelerator.autocast():
                logits = model(images)
            logits, labels = self.accelerator.gather_for_metrics((logits.float(), labels))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
            seen += len(labels)
        return loss / seen, right / seen

    def _batches(self, *, train: bool, epoch: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
        """The batches of an epoch, or this process's part of each."""
        config = self.config
        loader = self.data.batches(train=train, batch=config.batch, seed=config.seed, epoch=epoch, workers=self.workers)
        return prepare_data_loader(loader, self.accelerator.device, split_batches=True, put_on_device=True)

    def _norms(self) -> AbstractContextManager[Any]:
        on_cpu = self.accelerator.device.type == "cpu"
        return SharedNorms() if self._shares_norms and on_cpu else nullcontext()

    @property
    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _held(self) -> int:
        """Bytes of weights, averaged weights and the optimizer's state."""
        states = [self.model.state_dict(), *self.optimizer.state.values()]
        states += [] if self.averaged is None else [self.averaged.module.state_dict()]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    # --------------------------------------------------------------------------------------------- a lost run

    @torch.no_grad()
    def _lost(self, images: Tensor, loss: float, where: str) -> TrainingError:
        """What to say of a loss that is not finite: the batch is run again, and every module watched."""
        kept = "" if self.folder is None or not self.log else f"; {self.folder.path} has epoch {len(self.log)}"
        return TrainingError(
            f"the loss is {loss} in {where}, at a learning rate of {self._rate:.3g}: {self._first_infinite(images)}. "
            f"Lower the rate or begin it with a warm-up{kept}"
        )

    def _first_infinite(self, images: Tensor) -> str:
        if not images.isfinite().all():
            return "the images themselves are not finite"
        found: list[str] = []

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not output.isfinite().all():
                    own = [key for key, value in module.named_parameters(recurse=False) if not value.isfinite().all()]
                    why = f", and its {own[0]} is not finite either" if own else ""
                    found.append(f"the first output that is not finite is that of {name or 'the network'!r}{why}")

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in self.model.named_modules()]
        with self._norms(), self.accelerator.autocast():
            self.model(images)
        for handle in handles:
            handle.remove()
        return found[0] if found else "all outputs are finite, the loss of them is not"

    # --------------------------------------------------------------------------------------------- the disk

    def _save(self, model: nn.Module, path: Path) -> None:
        save_model(model, path, source=self.source, expanded=self.expansion, shape=self.data.shape)

    def _write(self, epoch: Epoch) -> None:
        """The epoch's weights, if they are the best, then the state: from that on the epoch is over."""
        if self.folder is None or not self.main:
            return
        result = self.result()
        if epoch.test_accuracy is not None and _is_record(result.evaluations):
            self._save(self.model, self.folder.best)
        if (
            self.averaged is not None
            and epoch.ema_test_accuracy is not None
            and _is_record(result.averaged_evaluations)
        ):
            self._save(self.averaged.module, self.folder.best_ema)
        self.folder.write_state(self._parts.pack(self.log), self.config, self.source, self.expansion)
        if self.finished:
            self.folder.write_json("result.json", result.to_json())
        self._show(epoch)

    def _show(self, epoch: Epoch) -> None:
        """The epoch for TensorBoard, where that is installed; what a killed run showed of later epochs is replaced."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        path = self.folder.path / "tensorboard"
        with told(path):
            if self._board is None:
                self._board = SummaryWriter(str(path), purge_step=epoch.epoch)
            for name, value in asdict(epoch).items():
                if value is not None and name != "epoch":
                    self._board.add_scalar(name, value, epoch.epoch)
            self._board.flush()
            if self.finished:
                self._board.close()


# ------------------------------------------------------------------------------------------------- parts


def _accelerator(config: Config) -> Accelerator:
    """Devices, processes and precision; on the CPU where there is no accelerator."""
    try:
        accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        # One process keeps to what it was first told.
        raise TrainingError(f"precision {config.precision} cannot be had in this process: {error}") from error
    if config.batch % accelerator.num_processes:
        raise TrainingError(f"a batch of {config.batch} cannot be shared by {accelerator.num_processes} processes")
    return accelerator


def _is_record(values: Sequence[float]) -> bool:
    """Whether the last value is above all before it."""
    return all(values[-1] > value for value in values[:-1])
