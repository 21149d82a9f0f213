"""Which refusals are worth saying: one per layer that stays, and for every batch norm why it is still there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from passes.fold.candidates import Key
from passes.fold.selection import Selection
from passes.graph.dataflow import Flow
from passes.graph.opset import Kind, argument, base_operation
from passes.laws.layouts import is_conv, weight_of
from passes.refusal import Reason, Refusal, RefusalError

__all__ = ["worth_saying"]

_QUIET = {
    Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.RANK_UNKNOWN, Reason.CHANNELS, Reason.LAYOUT, Reason.CAST,
    Reason.NO_LAYER_BEHIND,
}  # fmt: skip
"""Reasons that only say where a region ends; they explain a batch norm that stays, and nothing else."""


_UNTOLD = (Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.NO_LAYER_BEHIND)

FAR = 8
"""Operations that are looked through for what makes a norm's place unknown."""


def worth_saying(flow: Flow, selection: Selection, failed: Mapping[Key, Refusal]) -> list[Refusal]:
    """One refusal per layer that stays: those of the laws, and for every batch norm why it is still there.

    ``failed`` says why folds were not made that had been selected; a norm in one of them stays for that reason.
    """
    dead = {n for candidate, _ in selection.chosen for n in candidate.dying}
    # Two operations of one module may have one name: it is gone when both are.
    gone = {flow.unit.name(n) for n in dead} - {flow.unit.name(n) for n in flow.nodes if n not in dead}
    ahead = {r.layer: r.message for r in selection.refusals if r.reason is Reason.NO_LAYER_BEHIND}
    said = {refusal.layer: refusal for refusal in selection.norms}
    for refusal in selection.refusals:
        if refusal.reason not in _QUIET and refusal.layer not in gone:
            said.setdefault(refusal.layer, refusal)
    known = [refusal for refusal in failed.values() if refusal.reason is not Reason.TAKEN_BACK]
    why = _Why(flow, [*known, *selection.refusals])
    lost = {node: refusal for (_, _, dying), refusal in failed.items() if refusal in known for node in dying}
    for node in flow.nodes:
        if node not in dead and node not in flow.constant and _is_norm(flow, node):
            name = flow.unit.name(node)
            found = why.stays(node)
            fails = node in lost and found.reason in (Reason.NOT_SELECTED, Reason.LAYOUT)
            if found.reason is Reason.BATCH_STATISTICS:
                said[name] = found  # whatever stands before it
            said.setdefault(name, _lost(lost[node], name) if fails else found)
    return [_with(refusal, ahead.get(refusal.layer)) for refusal in said.values()]


def _with(refusal: Refusal, behind: str | None) -> Refusal:
    """With why the layers behind it do not take it over either."""
    return refusal if behind is None else replace(refusal, message=f"{refusal.message}; and behind it: {behind}")


def _lost(failed: Refusal, name: str) -> Refusal:
    return Refusal(failed.reason, f"its fold fails: {failed.message}", name)


def _is_norm(flow: Flow, node: fx.Node) -> bool:
    return node.target is F.batch_norm or isinstance(flow.modules.get(node), _NormBase)


class _Why:
    """Why norms stay: told by what the laws said of them, else by what stands before them."""

    def __init__(self, flow: Flow, refusals: Iterable[Refusal]) -> None:
        self.flow = flow
        self.said: dict[str, list[Refusal]] = {}
        for refusal in refusals:
            self.said.setdefault(refusal.layer, []).append(refusal)

    def stays(self, node: fx.Node) -> Refusal:
        """Why a norm stays, by its name."""
        name = self.flow.unit.name(node)
        before = [r for n in self._affine_before(node) for r in self.said.get(self.flow.unit.name(n), ())]
        unknown = (r for r in before if r.reason is Reason.RANK_UNKNOWN)
        found = self._own_statistics(node) or next(unknown, None) or self._walked(node)
        told = any(r.reason is Reason.NO_LAYER_BEHIND for r in self.said.get(name, ()))  # which says more
        behind = self._behind(node) if found.reason is Reason.NO_CONVOLUTION and not told else ""
        return Refusal(found.reason, found.message + behind, name)

    def _told(self, node: fx.Node) -> Refusal | None:
        """What a law said of an operation itself."""
        told = self.said.get(self.flow.unit.name(node), ())
        return next((r for r in told if r.reason not in _UNTOLD), None)

    def _affine_before(self, node: fx.Node) -> list[fx.Node]:
        """The affine operations through which a norm is reached, one after the other."""
        found: list[fx.Node] = []
        while len(found) < FAR:
            sources = self._sources(node)
            if len(sources) != 1 or sources[0] not in self.flow.affine:
                break
            node = sources[0]
            found.append(node)
        return found

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The values that an operation computes with; the sizes that one is moved by, or a dtype, are none."""
        operation, given = self.flow.operations.get(node), argument(node, 0, "input")
        moves = operation is not None and operation.kind in (Kind.CAST, Kind.MOVEMENT)
        if moves and isinstance(given, fx.Node):
            return [given]
        return self.flow.inputs(node)

    def _own_statistics(self, node: fx.Node) -> Refusal | None:
        """What is said of a norm whose statistics are its input's own."""
        module = self.flow.modules.get(node)
        if module is not None and self._normalises(node) and isinstance(module, _NormBase):
            told = Reason.BATCH_STATISTICS.value
            if "Instance" in type(module).__name__:
                told = "instance norm uses the statistics of each input"
            elif module.running_var is not None:
                told = "batch norm in training mode uses the batch's own statistics"
            return Refusal(Reason.BATCH_STATISTICS, told)
        return None

    def _normalises(self, node: fx.Node) -> bool:
        """Whether this is a norm whose statistics are its input's own."""
        operation, module = self.flow.operations.get(node), self.flow.modules.get(node)
        if operation is None or operation.kind is not Kind.NORM:
            return False
        if isinstance(module, _NormBase):
            return module.training or module.running_var is None
        return not operation.affine or (
            operation.id == "instance_norm" and bool(argument(node, 5, "use_input_stats", True))
        )

    def _walked(self, node: fx.Node) -> Refusal:
        """What keeps a norm from the layer before it."""
        told, between = self._told(node), list[str]()  # what laws say may be of another layout than there is
        for _ in range(FAR):
            sources = self._sources(node)
            if len(sources) != 1:
                return self._follows(node)
            node, reader = sources[0], node
            if node.op == "placeholder":
                return Refusal(Reason.NO_CONVOLUTION, f"{Reason.NO_CONVOLUTION.value}: it follows the input")
            alone = self._left_alone(node)
            if alone is not None:
                told_of = f"it follows {self._named(node)}, which is left alone: {alone.message}"
                return Refusal(alone.reason, told_of)
            base = self._conv(node)
            if (node not in self.flow.affine and not base) or self._normalises(node):
                return self._follows(node)
            shared = self._read_elsewhere(node, reader)
            if shared is not None:
                return shared
            if base:
                return told or self._stays_beside(node, between)
            if any(r.reason is Reason.NOT_AFFINE for r in self.said.get(self.flow.unit.name(node), ())):
                return self._follows(node)
            if told is None and (found := self._told(node)) is not None:
                told = Refusal(found.reason, f"it follows {self._named(node)}: {found.message}")
            between.append(self._named(node))
        return self._follows(node)

    def _left_alone(self, node: fx.Node) -> Refusal | None:
        """Why something that may well be a convolution is none here: it was not read, or its weight is not known."""
        if "refusal" in node.meta:
            return self.flow.refused[node]
        weight = weight_of(self.flow, node)
        if node.op != "call_function" or not is_conv(self.flow, node) or not isinstance(weight, fx.Node):
            return None
        if weight not in self.flow.constant:
            return Refusal(Reason.COMPUTED, "its weight is no constant")
        try:
            self.flow.planned.value(weight)
        except RefusalError as error:
            return error.refusal
        return None

    def _follows(self, node: fx.Node) -> Refusal:
        if self._normalises(node):
            return Refusal(Reason.BEHIND_NORM, f"{Reason.BEHIND_NORM.value}: it follows {self._named(node)}")
        several = " of several values" if len(self._sources(node)) > 1 else ""
        if node.op == "call_function" and node not in self.flow.operations and self._weighs(node):
            several += ", a function whose weights stay as they are"
        return Refusal(Reason.NO_CONVOLUTION, f"{Reason.NO_CONVOLUTION.value}: it follows {self._named(node)}{several}")

    def _weighs(self, node: fx.Node) -> bool:
        """Whether a call is given weights, as that of a layer."""
        given = (n for n in node.all_input_nodes if n in self.flow.constant)
        return any(t.dim() > 1 for n in given for t in self.flow.tensors.get(n, ()))

    def _read_elsewhere(self, node: fx.Node, reader: fx.Node) -> Refusal | None:
        readers = [user for user in node.users if not self.flow.shape_only(user)]
        if len(readers) < 2:
            return None
        others = [u for u in readers if u is not reader]
        names = dict.fromkeys("the output" if u.op == "output" else self.flow.unit.name(u) for u in others)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        several = ", ".join(list(names)[:3]) + more
        return Refusal(Reason.SHARED, f"the output of {self.flow.unit.name(node)} is used by {several} as well")

    def _conv(self, node: fx.Node) -> bool:
        """Whether this is a convolution or linear layer, of a class of its own perhaps."""
        operation, module = self.flow.operations.get(node), self.flow.modules.get(node)
        operation = operation or (None if module is None else base_operation(module))
        layer = module is not None or (node in self.flow.affine and len(self.flow.inputs(node)) == 1)
        return layer and operation is not None and operation.kind in (Kind.CONV, Kind.CONV_TRANSPOSE, Kind.LINEAR)

    def _stays_beside(self, conv: fx.Node, between: list[str]) -> Refusal:
        """Why a norm does not fold into the convolution that it follows, with nothing but affine maps between."""
        flow, name = self.flow, self._named(conv)
        opaque = flow.unit.opaque.get(str(conv.target)) if conv.op == "call_module" else None
        for found in (opaque, flow.refused.get(conv), self._told(conv)):
            if found is not None:
                return Refusal(found.reason, f"it follows {name}: {found.message}")
        others = {flow.unit.name(n) for n in flow.sharers(conv) if n is not conv and n.op != "get_attr"}
        if others or any(flow.owners.get(id(t), 1) > 1 for t in flow.tensors.get(conv, ())):
            return Refusal(Reason.SHARED, f"the weights of {name}, which it follows, are used in several places")
        if between:
            return Refusal(
                Reason.LAYOUT, f"it follows {', '.join(reversed(between))} behind {name}: not read as one map"
            )
        return Refusal(Reason.NOT_SELECTED, f"it follows {name}, and no fold of the two was found")

    def _behind(self, node: fx.Node) -> str:
        """What a convolution behind a norm was told, which it might have folded into."""
        unknown = None
        if self.flow.rank.get(node) is None:
            unknown = Refusal(Reason.RANK_UNKNOWN, Reason.RANK_UNKNOWN.value)
        for _ in range(FAR):
            readers = [user for user in node.users if not self.flow.shape_only(user)]
            if len(readers) != 1 or readers[0] not in self.flow.affine:
                return ""
            node = readers[0]
            told = self._told(node) or unknown
            if self._conv(node):
                return f"; and {self.flow.unit.name(node)} behind it: {told.message}" if told is not None else ""
        return ""

    def _named(self, node: fx.Node) -> str:
        name, module = self.flow.unit.name(node), self.flow.modules.get(node)
        return f"{name} ({type(module).__name__})" if module is not None else name
