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

import copy
import logging
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.blocks.kit.layers import BranchSum, ChannelScale
from passes.blocks.kit.registry import Block
from passes.graph.modes import kept_modes
from passes.graph.weights import weight_maker
from passes.refusal import Reason, RefusalError, ReparamError
from passes.training.equivalent import KernelProgram
from passes.training.inside import is_steady
from passes.training.outline import Outline, can_record, is_watched
from passes.training.rows import branches_code, statistics_code
from passes.training.statistics import measures, shared, with_rows

__all__ = ["FORMS", "Folded", "Form", "note_on_samples", "scales_for_norms", "train_as"]

log = logging.getLogger("reparam")

FORMS = ("branches", "online", "sampled", "frozen")
ROWS = ("first", "strided")
POSITIONS = 256
"""Positions per channel that a sample has at least: of fewer, a variance is off by a tenth and more."""
READS = 8
"""How often a block is read anew: one that changes with every step runs as it is written."""
FORGOTTEN = 100
"""After so many whole batches the statistics of samples have no part in running ones."""


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

    The code is that of the block as it was read. A block that has changed since is read anew; where that cannot be, or
    where somebody looks at what runs inside, the branches run as they are written.
    """

    def __init__(self, form: Form, block: BranchSum) -> None:
        self.form = form
        self._said = self._earlier = False
        self._reads = 0
        self._read(block)
        self.note_statistics(block)

    def _read(self, block: BranchSum) -> None:
        """All that follows from the block; raises :class:`RefusalError` if its branches are no one convolution."""
        self._outline, self._readable, self._folds = Outline(block), False, True
        # In whole numbers: a third of 9 is 3, however 1/3 is rounded, and torch.compile computes with unknown sizes.
        self._ratio = Fraction(self.form.fraction).limit_denominator(1_000_000).as_integer_ratio()
        self.norms = tuple(path for path, m in block.named_modules() if isinstance(m, _BatchNorm))
        if self.form.name == "branches" and any(weight_maker(m) for m in block.modules()):
            self.norms = ()  # what computes its weight may do so otherwise in training, and change with each call
        self.program: KernelProgram | None = None
        self.dtype: torch.dtype | None = None
        if self.form.name != "branches":
            self._record(block)
        self._read_rows(block)
        self._readable = True

    def _record(self, block: BranchSum) -> None:
        _check_steady(block)
        plain, dtype = _plain(block), next(block.parameters()).dtype
        program = KernelProgram.of(plain, torch.promote_types(dtype, torch.float32))
        if not block.geometry.matches(program.form):
            raise RefusalError(Reason.BLOCK, f"its branches are another convolution than {block.geometry}")
        self._paths = [name.split(".") for name in program.names]
        sampled = self.form.name == "sampled" and self.norms
        self._statistics = statistics_code(plain, self.norms) if sampled else None
        self.dtype, self.program = dtype, program  # at last: another thread may run the block meanwhile

    def _read_rows(self, block: BranchSum) -> None:
        """The branches over a whole batch, as code that spares maps; where there is none they run themselves."""
        self._rows = None
        if self.norms and self.form.name in ("branches", "sampled"):
            try:
                self._rows = branches_code(_plain(block), self.norms)
            # A branch may be of user code, which a trace does not follow.
            except Exception as error:
                log.debug("%s runs as it is written: %s", block.reparam_block, error)

    def follows(self, block: BranchSum, x: Any = None) -> bool:
        """Whether the code is that of the block as it is now; it is read anew if need be, and if it can be."""
        first = next(block.parameters(), None)
        cast = self.dtype is not None and first is not None and first.dtype != self.dtype
        if not cast and self._outline.holds(block):
            return self._readable
        if self._reads >= READS or not can_record(block, x):
            return False
        fresh = copy.copy(self)
        fresh._reads += 0 if cast else 1
        try:
            fresh._read(block)
        # People put any code there, and a trace does not follow all of it.
        except Exception as error:
            log.info("%s was changed and runs as it is written: %s", block.reparam_block, error)
        self.__dict__.update(fresh.__dict__)  # at once: another thread may run the block meanwhile
        return self._readable

    def _written(self, block: BranchSum, x: Tensor) -> Tensor:
        if self.form.name != "frozen":
            return block.summed(x)
        with kept_modes(*(m for m in block.modules() if isinstance(m, _BatchNorm))):
            return block.summed(x)

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
            or is_watched(block, by_anybody=True)
        ):
            return block.summed(x)
        y: Tensor = self._rows(block, x)
        return y

    def __call__(self, block: BranchSum, x: Tensor) -> Tensor:
        if self.form.name == "branches" and not self.norms:
            return block.summed(x)
        traced = torch._C._get_tracing_state() is not None
        # The exporter that traces takes no convolution whose kernel is computed.
        if is_watched(block) or not self.follows(block, x) or (traced and torch.onnx.is_in_onnx_export()):
            return self._written(block, x)
        if self.form.name == "branches" and not self._frozen(block, x):
            return self._whole(block, x)
        norms = [_at(block, path.split(".")) for path in self.norms]
        sampling = self.form.name == "sampled" and block.training
        if not sampling and any(norm.running_mean is None for norm in norms):  # there is nothing to fold with
            return self._written(block, x)
        measured: dict[str, Tensor] = {}
        if self._statistics is not None and any(map(measures, norms)):
            rows = self._rows_of_sample(block, x) if isinstance(x, Tensor) else None
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
        if not self.norms or not self._folds or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return False
        if not block.training and any(p.requires_grad for p in block.parameters()):
            return False
        if any(measures(_at(block, path.split("."))) for path in self.norms):
            return False
        if is_watched(block, by_anybody=True):
            return False
        if self.program is None and can_record(block, x):
            try:
                self._record(block)
            except RefusalError:
                self._folds = False
        return self.program is not None

    def numbers(self, block: BranchSum) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias with running statistics. Raises :class:`ReparamError` if the block was changed."""
        if not self.follows(block):
            told = "was changed since it was built, and cannot be read anew here: call reparam.set_form(model, form)"
            raise ReparamError(f"the block {block.reparam_block} {told}")
        if self.program is None:
            self._record(block)
        return self._kernel(block, {})

    def _kernel(self, block: BranchSum, measured: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        assert self.program is not None
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
        """Complete what comes out of a pickle; a copy is complete."""
        if "_outline" in self.__dict__:
            return
        self._said, self._reads = False, 0
        try:
            self._read(block)
        # It may have been changed before, and a trace does not follow any code.
        except Exception as error:
            log.info("%s runs as it is written: %s", block.reparam_block, error)

    def note_statistics(self, block: BranchSum) -> None:
        """The running statistics are those of whole batches now."""
        self._counted, self._earlier = _batches(block), False

    def succeed(self, before: Folded | None, block: BranchSum) -> None:
        """Take over from another form of the same block what its running statistics are of."""
        self._earlier = before is not None and before.of_samples(block)

    def of_samples(self, block: BranchSum) -> bool:
        """Whether running statistics have moved by samples since, and not by many whole batches."""
        now = _batches(block)
        moved = [abs(now[path] - count) for path, count in self._counted.items() if path in now]
        if self.form.name == "sampled":
            return self._earlier or any(moved)
        return self._earlier and max(moved, default=0) < FORGOTTEN

    def _rows_of_sample(self, block: BranchSum, x: Tensor) -> tuple[int, int] | None:
        """Every how many-th row of a batch the statistics are of, and of how many; None if it has too few."""
        batch, stride = x.shape[0], block.geometry.stride
        if self.form.fraction == 1:
            return (1, batch) if batch else None
        positions = 1
        for size, s in zip(x.shape[2:], stride, strict=False):  # torch.compile follows no generator here
            positions *= -(-size // s)
        above, below = self._ratio
        asked, needed = -(-above * batch // below), -(-POSITIONS // max(positions, 1))
        rows = max(asked, needed)
        # From there on the branches themselves cost less, and measure everything.
        if 2 * rows > batch or (rows > asked and 2 * rows == batch):
            if not self._said and not torch.compiler.is_compiling():
                self._said = True
                log.info("sampled: %d samples of %d positions are few: the whole batch is normalised", batch, positions)
            return None
        return 1 if self.form.rows == "first" else batch // rows, rows

    def __deepcopy__(self, memo: Any) -> Folded:
        return copy.copy(self)

    def __copy__(self) -> Folded:
        copied = Folded.__new__(Folded)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self.form, "_counted": self._counted, "_earlier": self._earlier}


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


def _check_steady(block: BranchSum) -> None:
    """One kernel takes the place of all branches only where it is the same one in training, each time."""
    for path, module in block.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and weight_maker(module) and not is_steady(module):
            told = f"{weight_maker(module)} computes another weight in training than in evaluation"
            raise RefusalError(Reason.COMPUTED, told, path)


def _batches(block: BranchSum) -> dict[str, int]:
    """How many batches each norm has measured."""
    counters = {path: m.num_batches_tracked for path, m in block.named_modules() if isinstance(m, _BatchNorm)}
    return {path: int(counter) for path, counter in counters.items() if counter is not None and not counter.is_meta}


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
