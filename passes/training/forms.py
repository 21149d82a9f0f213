"""How a block is trained: forms of one and the same sum of branches, none of which knows a block.

- ``branches``: every branch runs over the whole batch.
- ``online``: one convolution, its kernel computed in every forward. A batch norm inside a branch would need the
  statistics of a map that is never computed, so it becomes a factor per channel, and one batch norm stands behind the
  sum (Hu et al., "OREPA", CVPR 2022, sec. 3.1).
- ``sampled``: the branches run over a sample of the batch, for the statistics of their norms only. With these the
  algebra folds all branches into one kernel, and one convolution runs over the whole batch. Gradients flow through the
  statistics; with a sample of everything it is ``branches``, to rounding. Nearest publication: Chen et al., "Batch
  Normalization Sampling" (arXiv 1810.10962), which knows no blocks.
- ``frozen``: norms in evaluation mode, as in fine-tuning: folded in every forward, one convolution.

The kernel comes from the algebra that collapse folds with, recorded once as straight-line code.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from passes.blocks.kit.layers import BranchSum, ChannelScale
from passes.blocks.kit.registry import Block
from passes.graph.weights import weight_maker
from passes.refusal import RefusalError, ReparamError
from passes.training.equivalent import KernelProgram
from passes.training.rows import branches_code, statistics_code
from passes.training.statistics import measures, shared, with_rows

__all__ = ["FORMS", "Folded", "Form", "note_on_samples", "scales_for_norms", "train_as"]

log = logging.getLogger("reparam")

FORMS = ("branches", "online", "sampled", "frozen")
ROWS = ("first", "strided")
POSITIONS = 256
"""Positions per channel that a sample has at least: of fewer, a variance is off by a tenth and more."""


@dataclass(frozen=True)
class Form:
    """A form with its options, ``Form("sampled", fraction=1 / 4)``, or as text ``"sampled:fraction=1/4,rows=strided"``.

    Args:
        name: ``branches``, ``online``, ``sampled`` or ``frozen``.
        fraction: of the batch that is the sample, above 0 and at most 1.
        rows: which samples: the ``first`` of a shuffled batch, or ``strided`` over it.

    Raises :class:`ReparamError` for anything else.
    """

    name: str = "branches"
    fraction: float = 1 / 8
    rows: str = "first"

    def __post_init__(self) -> None:
        if self.name not in FORMS:
            raise ReparamError(f"there is no form {self.name!r}; known: {', '.join(FORMS)}")
        number = isinstance(self.fraction, (int, float)) and not isinstance(self.fraction, bool)
        if not number or not 0 < self.fraction <= 1:
            raise ReparamError(f"the fraction of a batch is above 0 and at most 1, got {self.fraction!r}")
        if self.rows not in ROWS:
            raise ReparamError(f"the rows of a sample are {' or '.join(ROWS)}, got {self.rows!r}")
        if self.name != "sampled" and (self.fraction, self.rows) != (1 / 8, "first"):
            raise ReparamError(f"the form {self.name!r} takes no options; only sampled has a fraction and rows")

    @staticmethod
    def of(form: str | Form) -> Form:
        """A form of its text; a :class:`Form` as it is."""
        if isinstance(form, Form):
            return form
        if not isinstance(form, str):
            raise ReparamError(f"a form is one of {', '.join(FORMS)}, got {form!r}")
        name, colon, rest = form.partition(":")
        options: dict[str, Any] = {}
        for pair in rest.split(",") if colon else ():
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in ("fraction", "rows") or key in options or not value:
                raise ReparamError(f"a form is written as sampled:fraction=1/4,rows=strided; got {form!r}")
            options[key] = _fraction(value) if key == "fraction" else value
        return Form(name.strip(), **options)

    @staticmethod
    def meant(block: Block) -> Form:
        """The form that a block is meant to train in."""
        return Form("online" if block.info.online else "branches")

    @property
    def online(self) -> bool:
        """Whether norms of branches are factors."""
        return self.name == "online"

    def __str__(self) -> str:
        options = [] if self.fraction == 1 / 8 else [f"fraction={self.fraction!r}"]
        options += [] if self.rows == "first" else [f"rows={self.rows}"]
        return self.name + (":" + ",".join(options) if options else "")


def _fraction(text: str) -> float:
    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ReparamError(f"a fraction is written 1/4 or 0.25, got {text!r}") from error


def train_as(block: BranchSum, form: Form) -> None:
    """Let a block train in this form.

    Raises :class:`RefusalError` if a branch cannot be read.
    """
    block.folded = Folded(form, block)
    block.form = str(form)


class Folded:
    """What runs in the place of a block's branches: one convolution, its kernel computed in every forward.

    Holds code, no weights; the block gives it those. As ``branches`` it is the branches, but for training steps in
    which all of their norms are in evaluation mode: those are ``frozen``.
    """

    def __init__(self, form: Form, block: BranchSum) -> None:
        self.form = form
        self.norms = tuple(path for path, m in block.named_modules() if isinstance(m, _BatchNorm))
        if form.name == "branches" and any(weight_maker(m) for m in block.modules()):
            self.norms = ()  # what computes its weight may do so otherwise in training, and change with each call
        self._said = False
        if form.name != "branches":
            self._record(block)
        self._read_rows(block)
        self.note_statistics(block)

    def _record(self, block: BranchSum) -> None:
        self.dtype = next(block.parameters()).dtype
        plain = _plain(block)
        self.program = KernelProgram.of(plain, torch.promote_types(self.dtype, torch.float32))
        self._paths = [name.split(".") for name in self.program.names]
        self._statistics = statistics_code(plain, self.norms) if self.form.name == "sampled" and self.norms else None

    def _read_rows(self, block: BranchSum) -> None:
        """The branches over a whole batch, as code that spares maps; where there is none they run themselves."""
        self._rows = None
        if self.norms and self.form.name in ("branches", "sampled"):
            self._kinds = _kinds(block)
            try:
                self._rows = branches_code(_plain(block), self.norms)
            # A branch may be of user code, which a trace does not follow.
            except Exception as error:
                log.debug("%s runs as it is written: %s", block.reparam_block, error)

    def _whole(self, block: BranchSum, x: Tensor) -> Tensor:
        """The branches over all of a batch."""
        norms = [_at(block, path.split(".")) for path in self.norms]
        if (
            self._rows is None
            or type(x) not in (Tensor, nn.Parameter)
            or torch._C._get_tracing_state() is not None
            or x.shape[0] < 2
            or not all(map(measures, norms))
            or shared(norms)
            or _is_watched(block)
            or _kinds(block) != self._kinds
        ):
            return block.summed(x)
        y: Tensor = self._rows(block, x)
        return y

    def __call__(self, block: BranchSum, x: Tensor) -> Tensor:
        if self.form.name == "branches" and not self._frozen(block, x):
            return self._whole(block, x)
        norms = [_at(block, path.split(".")) for path in self.norms]
        sampling = self.form.name == "sampled" and block.training
        if not sampling and any(norm.running_mean is None for norm in norms):  # there is nothing to fold with
            return self._whole(block, x)
        self.made(block)
        measured: dict[str, Tensor] = {}
        if self._statistics is not None and any(map(measures, norms)):
            rows = self._rows_of_sample(block, x)
            if rows is None and not shared(norms):
                return self._whole(block, x)
            # Without enough of them: other processes may have enough, and wait for what is shared.
            x, sample = (x, x) if rows is None else with_rows(x, *rows)
            found = self._statistics(block, sample)
            for path, (mean, var) in zip(self.norms, found, strict=True):
                measured[f"{path}.running_mean"], measured[f"{path}.running_var"] = mean, var
        y: Tensor = block.geometry.convolve(x, *self._kernel(block, measured))
        return y

    def _frozen(self, block: BranchSum, x: Tensor) -> bool:
        """Whether branches are best run as one convolution: in training, without a norm that measures.

        Who looks at what runs inside, by hooks or by tracing, finds the branches.
        """
        if not self.norms or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return False
        if not block.training and any(p.requires_grad for p in block.parameters()):
            return False
        if any(measures(_at(block, path.split("."))) for path in self.norms):
            return False
        if _is_watched(block):
            return False
        if "program" not in self.__dict__ and type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
            try:
                self._record(block)
            except RefusalError:
                self.norms = ()
        return "program" in self.__dict__

    def numbers(self, block: BranchSum) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias with running statistics."""
        self.made(block)
        return self._kernel(block, {})

    def _kernel(self, block: BranchSum, measured: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values = [
            measured[name] if name in measured else _at(block, path)
            for name, path in zip(self.program.names, self._paths, strict=True)
        ]
        # An optimizer's small steps are lost in bfloat16: the kernel is computed in the parameters' own dtype, and not
        # in half precision, in which no statistics are measured either.
        device = values[0].device.type if isinstance(values[0], Tensor) else "cpu"
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            if not half:
                return self.program(values)
            weight, bias = self.program([_wide(value) for value in values])
            return weight.to(values[0].dtype), None if bias is None else bias.to(values[0].dtype)

    def loaded(self, block: BranchSum) -> None:
        """Complete what comes out of a pickle."""
        if self.form.name != "branches":
            self.made(block)
        self._read_rows(block)

    def made(self, block: BranchSum) -> None:
        """Record the code if it is not there yet."""
        if "program" not in self.__dict__:
            self._record(block)

    def follow(self, block: BranchSum) -> None:
        """Go on with a block that was cast."""
        if self.__dict__.get("dtype") not in (None, next(block.parameters()).dtype):
            self._record(block)

    def note_statistics(self, block: BranchSum) -> None:
        """The running statistics are those of whole batches now."""
        self._counted = self._batches(block)

    def of_samples(self, block: BranchSum) -> bool:
        """Whether running statistics have moved by samples since."""
        return self.form.name == "sampled" and self._batches(block) != self._counted

    def _batches(self, block: BranchSum) -> list[int]:
        counters = [_at(block, [*path.split("."), "num_batches_tracked"]) for path in self.norms]
        return [-1 if counter is None or counter.is_meta else int(counter) for counter in counters]

    def _rows_of_sample(self, block: BranchSum, x: Tensor) -> tuple[int, int] | None:
        """Every how many-th row of a batch the statistics are of, and of how many; None if it has too few."""
        batch, stride = x.shape[0], block.geometry.stride
        if self.form.fraction == 1:
            return 1, batch
        positions = 1
        for size, s in zip(x.shape[2:], stride, strict=True):  # torch.compile follows no generator here
            positions *= -(-size // s)
        asked, needed = math.ceil(self.form.fraction * batch), -(-POSITIONS // max(positions, 1))
        rows = max(asked, needed)
        # From there on the branches themselves cost less, and measure everything.
        if 2 * rows > batch or (rows > asked and 2 * rows == batch):
            if not self._said and not torch.compiler.is_compiling():
                self._said = True
                log.info("sampled: %d samples of %d positions are few: the whole batch is normalised", batch, positions)
            return None
        return 1 if self.form.rows == "first" else batch // rows, rows

    def __deepcopy__(self, memo: Any) -> Folded:
        copied = Folded.__new__(Folded)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "norms": self.norms, "_said": False, "_counted": self._counted}


def note_on_samples(model: nn.Module) -> str:
    """What a person should know who collapses a network that trained on samples; empty if there is nothing."""
    blocks = [(path, m, m.folded) for path, m in model.named_modules() if isinstance(m, BranchSum)]
    found = [path for path, block, folded in blocks if isinstance(folded, Folded) and folded.of_samples(block)]
    if not found:
        return ""
    more = f" and {len(found) - 1} more blocks" if len(found) > 1 else ""
    return (
        f"the running statistics of {found[0]}{more} are of samples of batches: "
        "reparam.update_statistics(model, loader) makes them of whole ones"
    )


def _plain(block: BranchSum) -> BranchSum:
    """The sum alone, whatever is around it and however it trains."""
    plain = BranchSum.__new__(BranchSum)
    plain.__dict__.update(block.__dict__)
    plain._modules = {"around": None, **block.branches()}
    plain.folded, plain.inside, plain.form, plain.reparam_layer = None, None, BranchSum.form, None
    return plain


def _is_watched(block: BranchSum) -> bool:
    """Whether somebody sees what runs inside, or has put something else there."""
    inside = [m for m in block.modules() if m is not block]
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in inside):
        return True
    # The compiler follows no hooks of all modules anyway.
    return not torch.compiler.is_compiling() and (_has_any_global_hook() or any("forward" in vars(m) for m in inside))


def _kinds(block: BranchSum) -> list[type]:
    return [type(m) for m in block.modules()]


def _wide(value: Tensor) -> Tensor:
    # The proof of a collapse runs in float64, whatever the block was made in.
    return value if isinstance(value, Tensor) and value.dtype == torch.float64 else value.float()


def _at(module: Any, path: list[str]) -> Any:
    # Attribute by attribute: torch.compile and torch.fx follow getattr, and no attrgetter or get_parameter.
    for name in path:
        module = getattr(module, name)
    return module


# ------------------------------------------------------------------ online


def scales_for_norms(module: nn.Module, n: int) -> nn.Module:
    """The module with a factor per channel in place of every batch norm, at the norm's own weight."""
    if isinstance(module, _BatchNorm):
        scale = ChannelScale(module.num_features, 1.0, n)
        if module.affine:
            scale.weight = nn.Parameter(module.weight.detach().reshape(scale.weight.shape), module.weight.requires_grad)
        return scale
    for name, child in list(module.named_children()):
        setattr(module, name, scales_for_norms(child, n))
    return module
