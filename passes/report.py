"""What a compilation did or would do: folds, refusals, counts and seconds. ``str()`` is a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.algebra.by_rule import ConvByRule
from passes.algebra.conv_form import ConvForm, Form
from passes.algebra.opaque import OpaqueForm
from passes.blocks.kit.kernel_conv import KernelConv
from passes.edits.edit import Edit
from passes.fold.candidates import Candidate, layers_of
from passes.graph.dataflow import Flow
from passes.graph.walk import modules_of
from passes.graph.within import arounds
from passes.portable import Rewritten
from passes.proof.check import Checked
from passes.refusal import Refusal
from passes.table import section

__all__ = ["Counts", "Explanation", "Fold"]


@dataclass(frozen=True)
class Counts:
    """Layers of a model: convolutions (transposed ones too), batch norms, linear layers; numbers in parameters."""

    convs: int
    norms: int
    linears: int
    parameters: int

    @staticmethod
    def of(model: nn.Module) -> Counts:
        modules = modules_of(model)
        return Counts(
            sum(isinstance(m, (_ConvNd, KernelConv)) for m in modules) - len(arounds(modules)),
            sum(_is_norm(m) for m in modules),
            sum(isinstance(m, nn.Linear) for m in modules),
            sum(p.numel() for p in model.parameters()),
        )

    def __str__(self) -> str:
        return (
            f"{self.convs} convs, {self.norms} norms, {self.linears} linears, {self.parameters / 1e6:.2f} M parameters"
        )


def _is_norm(module: nn.Module) -> bool:
    """Whether it normalises: one that was rewritten to do something else holds no statistics any more."""
    if isinstance(module, Rewritten) and isinstance(module, _NormBase):
        return module.running_var is not None
    return isinstance(module, _NormBase) or "BatchNorm" in type(module).__name__


@dataclass(frozen=True)
class Fold:
    """One region that is, or would be, one convolution.

    Args:
        layers: paths of the layers that vanish, in order of execution.
        into: the layer that takes their place, as text.
        where: its path in the model; empty while planning.
        numbers_before, numbers_after: parameters and statistics held.
        multiply_adds_before, multiply_adds_after: per position of the region's input.
        error: largest difference found by the proof, relative to the largest output; None if not proven.
    """

    layers: tuple[str, ...]
    into: str
    where: str
    numbers_before: int
    numbers_after: int
    multiply_adds_before: float
    multiply_adds_after: float
    error: float | None = None

    @staticmethod
    def of(flow: Flow, candidate: Candidate, form: Form, where: str, error: float | None) -> Fold:
        """What is reported of a candidate whose layer, which computes ``form``, stands at ``where``."""
        return Fold(
            layers_of(flow, candidate),
            _described(form),
            where,
            candidate.numbers,
            form.numbers,
            candidate.work,
            form.multiply_adds,
            error,
        )


@dataclass
class Explanation:
    """What :func:`reparam.collapse` does to a model, or what :func:`reparam.explain` says it would do.

    Args:
        folds: regions folded (or to be folded).
        refusals: what stays as it is, each with its reason, one per layer.
        edits: what was changed for that, in order.
        untraced: parts of the model that torch.fx cannot read; what is inside them is compiled on its own.
        before, after: counts of layers; ``after`` is None while planning.
        seconds: time per stage: trace, plan, fold, proof.
        notes: things worth knowing, such as a model that was in training mode.
        apart: modules with another method that uses a folded layer without what was folded into it, by the names of
            both; the notes tell of them.
        taken_back: folds that did not hold; what they would have replaced is as it was.
        checked: what of the result was compared with the original; None while planning, or if not asked for.
    """

    folds: list[Fold] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    untraced: list[Refusal] = field(default_factory=list)
    before: Counts | None = None
    after: Counts | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    apart: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    taken_back: list[Refusal] = field(default_factory=list)
    checked: Checked | None = None

    def reasons(self) -> Counter[str]:
        """How many layers stay for each reason."""
        return Counter(r.reason.value for r in self.refusals)

    def growth(self) -> str | None:
        """What folds cost more than the layers they replace, as ``cost="layers"`` allows; None where none does."""
        grown = [
            f
            for f in self.folds
            if f.numbers_after > f.numbers_before or f.multiply_adds_after > f.multiply_adds_before
        ]
        if not grown:
            return None
        most = max(grown, key=lambda f: f.numbers_after - f.numbers_before)
        return (
            f"{len(grown)} fold{'s cost' if len(grown) > 1 else ' costs'} more than what is replaced, as cost= allows: "
            f"{sum(f.numbers_before for f in grown)} -> {sum(f.numbers_after for f in grown)} numbers, "
            f"{sum(f.multiply_adds_before for f in grown):.0f} -> {sum(f.multiply_adds_after for f in grown):.0f} "
            f"multiply-adds per position; most of all {_short(most.layers)}: {most.numbers_before} -> "
            f"{most.numbers_after} numbers"
        )

    def __str__(self) -> str:
        lines = []
        if self.taken_back:
            taken = [(refusal.layer, refusal.message) for refusal in self.taken_back]
            lines += [*section("taken back:", ("layers", "reason"), taken)[1:], ""]
        lines.append(f"{len(self.folds)} regions fold")
        if self.before is not None:
            lines.append(f"before: {self.before}")
        if self.after is not None:
            lines.append(f"after:  {self.after}")
        if self.checked is not None:
            lines.append(f"checked: {self.checked}")
        folds = [
            (
                _short(fold.layers),
                fold.into,
                f"{fold.numbers_before} -> {fold.numbers_after}",
                "" if fold.error is None else f"{fold.error:.1e}",
            )
            for fold in self.folds
        ]
        lines += section("", ("layers", "becomes", "numbers", "error"), folds)
        lines += section("left as they are:", ("layer", "reason"), [(r.layer, r.message) for r in self.refusals])
        untraced = [(r.layer or "(model)", r.message) for r in self.untraced]
        lines += section("compiled inside only:", ("module", "reason"), untraced)
        return "\n".join(lines + [f"note: {n}" for n in [*filter(None, [self.growth()]), *self.notes]])


def _short(layers: tuple[str, ...]) -> str:
    return ", ".join(layers) if len(layers) <= 3 else f"{layers[0]}, {layers[1]}, ... {layers[-1]} ({len(layers)})"


def _described(form: Form) -> str:
    if isinstance(form, ConvForm) and form.channelwise:
        return f"ScaleShift({form.out_channels})"
    if form.n == 0:
        return f"Linear({form.in_channels} -> {form.out_channels})"
    if isinstance(form, OpaqueForm) and not isinstance(form.layer, ConvByRule):
        kind = type(form.layer).__name__
    elif isinstance(form, OpaqueForm):
        kind = f"Conv{'Transpose' if form.layer.transposed else ''}{form.n}d"
    else:
        kind = f"ConvTranspose{form.n}d" if form.is_transposed else f"Conv{form.n}d"
    grouped = f", groups {form.groups}" if form.groups > 1 else ""
    stride = f", stride {'x'.join(map(str, form.stride))}" if any(s > 1 for s in form.stride) else ""
    kernel = "x".join(map(str, form.kernel))
    return f"{kind}({form.in_channels} -> {form.out_channels}, {kernel}{stride}{grouped})"
