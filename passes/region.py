"""Single-entry single-exit regions: which of them are one convolution, and which of those to fold.

For every node r the dominators d1 = idom(r), d2 = idom(d1), ... are walked up while all nodes between are affine. Each
(d, r) is a region; its form is evaluated from d alone, on meta tensors while planning. A region is folded when the
single convolution holds no more numbers and needs no more multiply-adds than the nodes that would die with it. A node
that is used from outside stays, and so do all nodes it needs: none of them counts as saved.

Planning is linear in the size of the graph: the walk is bounded, and values are shared by all regions of an entry.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from passes.conv_form import ConvForm
from passes.flow import ENTRY, Constants, Flow
from passes.probe import ProbedForms
from passes.refusal import Reason, Refusal, RefusalError
from passes.signal import Dim, Signal, View
from passes.transfer import METHODS, function_law, module_law

__all__ = ["Region", "Sweep", "find_regions", "origin", "plan_unit"]

MAX_CLIMB = 32
"""Most dominators walked up from one node; regions that matter are far smaller."""


@dataclass(eq=False)
class Region:
    """A part of the graph that acts as one convolution, read from ``entry`` and giving ``result``."""

    flow: Flow
    entry: fx.Node
    result: fx.Node
    view: View
    channels: int
    form: ConvForm
    between: list[fx.Node]
    dying: list[fx.Node]
    constants: list[fx.Node]
    numbers_saved: int
    work_saved: float
    biases: int
    conv_first: bool
    convs: set[fx.Node]
    node: fx.Node | None = None
    placement: Any = None
    inner: list[Region] = field(default_factory=list)

    @property
    def gain(self) -> tuple[bool, float, bool, float, int]:
        """What orders regions: a batch norm between two convolutions belongs to the one before it; then numbers saved,
        biases aside; then multiply-adds; then the fewer nodes touched.
        """
        return (
            self.conv_first or not _is_conv(self.flow, self.entry),
            self.numbers_saved - self.biases - self.form.weight.numel(),
            self.conv_first,
            self.work_saved - self.form.multiply_adds,
            -len(self.dying),
        )

    @property
    def key(self) -> tuple[str, ...]:
        """Names that find this region again in a fresh graph of the same unit."""
        return origin(self.entry).name, *self.layers()

    def numeric(self) -> ConvForm:
        """The form in float64, its block structure found again."""
        sweep = Sweep(self.flow, self.entry, self.view, self.channels, numeric=True)
        value = sweep.value(self.result)
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        form: ConvForm = value.form.narrowed()
        if form.numbers > self.numbers_saved or form.multiply_adds > self.work_saved:
            raise RefusalError(Reason.LARGER, _cost_message(form, self.numbers_saved, self.work_saved))
        return form

    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that vanish, in order of execution."""
        order = sorted([*self.constants, *self.dying], key=lambda n: self.flow.order[n])
        names = (self.flow.unit.name(n) for n in order if not self.flow.shape_only(n))
        return tuple(dict.fromkeys(names))


def origin(node: fx.Node) -> fx.Node:
    """The traced node whose value ``node`` has; a fold stands for the result that it replaced."""
    while isinstance(region := node.meta.get("region"), Region):
        node = region.result
    return node


class Sweep:
    """Values of the nodes behind one entry, each an affine function of it or a refusal."""

    def __init__(self, flow: Flow, entry: fx.Node, view: View, channels: int, *, numeric: bool = False) -> None:
        self.flow = flow
        self.entry = entry
        self.view = view
        self.channels = channels
        self.numeric = numeric
        self.constants = Constants(flow, numeric)
        identity = ConvForm.identity(channels, view.n)
        if not numeric:
            identity = ConvForm.conv(identity.weight.to("meta"), groups=channels)
        else:
            device = next((t.device for t in flow.unit.root.parameters()), None)
            if device is not None and device.type != "mps":
                identity = ConvForm.conv(identity.weight.to(device), groups=channels)
        self._values: dict[fx.Node, Any] = {entry: Signal(identity, view, untouched=True)}

    def value(self, node: fx.Node) -> Any:
        """A signal, a size, a constant or a tuple of them; or the refusal that says why not."""
        if node not in self._values:
            try:
                self._values[node] = self._evaluate(node)
            except RefusalError as error:
                self._values[node] = error.refusal.at(self.flow.unit.name(node))
        return self._values[node]

    def _evaluate(self, node: fx.Node) -> Any:
        flow = self.flow
        if node in flow.constant:
            return self.constants.value(node)
        if flow.order[node] <= flow.order[self.entry] or node.op in ("placeholder", "output"):
            raise RefusalError(Reason.OTHER_INPUT)
        law = self._law(node)
        args, kwargs = fx.map_arg(node.args, self._input), fx.map_arg(node.kwargs, self._input)
        if not _any_signal((args, kwargs)):
            return _plain_call(node, args, kwargs)
        if law is None:
            raise RefusalError(Reason.NOT_AFFINE)
        try:
            return law(*args, **kwargs)
        except RefusalError:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            # The layer would not take the region's example; on the model's own tensors it may mean something else.
            raise RefusalError(Reason.ATTRIBUTE, f"{Reason.ATTRIBUTE.value}: {error}".splitlines()[0]) from error

    def _law(self, node: fx.Node) -> Callable[..., Any] | None:
        region = node.meta.get("region")
        if isinstance(region, Region):
            form = region.numeric() if self.numeric else region.form
            return lambda x: _then_region(x, region, form)
        if node.op == "call_module":
            module = self.flow.modules[node]
            path = str(node.target)
            if path in self.flow.unit.opaque:
                return self._probed(module, self.flow.unit.opaque[path])
            if id(module) in self.flow.unit.pinned:
                raise RefusalError(Reason.SHARED)
            law = module_law(module)
            return None if law is None else lambda *a: law(module, self.constants.read, *a)
        if node.op == "call_method":
            return METHODS.get(str(node.target))
        return function_law(node.target)

    def _probed(self, module: nn.Module, refusal: Refusal) -> Callable[..., Any]:
        if refusal.reason is not Reason.UNTRACEABLE:
            raise RefusalError(refusal.reason, refusal.message)

        return lambda x: ProbedForms.of(self.flow.unit).apply(module, x)

    def _input(self, node: fx.Node) -> Any:
        value = self.value(node)
        if isinstance(value, Refusal):
            raise RefusalError(value.reason, value.message, value.layer)
        return value


def find_regions(flow: Flow, dead: set[fx.Node], changed: set[fx.Node] | None, refusals: list[Refusal]) -> list[Region]:
    """All regions worth folding, best first; with ``changed``, those that contain one of these nodes."""
    dominator = flow.dominators(dead)
    sweeps: dict[fx.Node, list[Sweep]] = {}
    found: list[Region] = []
    near = _reach(flow, changed) if changed is not None else None
    for result in flow.nodes:
        if result not in flow.affine or result not in dominator or (near is not None and result not in near):
            continue
        said: list[Refusal] = []
        for entry in _climb(flow, dominator, result):
            if entry not in sweeps:
                sweeps[entry] = [Sweep(flow, entry, v, c) for v, c in _views(flow, entry)]
            values = [(sweep, sweep.value(result)) for sweep in sweeps[entry]]
            for sweep, value in values:
                if isinstance(value, Signal) and value.ids is None:
                    outcome = _weigh(flow, sweep, result, value.form, dead)
                    if isinstance(outcome, Region):
                        found.append(outcome)
                    elif outcome is not None:
                        said.append(outcome)
                elif isinstance(value, Refusal):
                    said.append(value)
            if values and all(_final(value) for _, value in values):
                break
        if said and not any(r.result is result for r in found[-MAX_CLIMB:]):
            refusals += said
    return sorted(found, key=lambda region: region.gain, reverse=True)


def plan_unit(
    flow: Flow,
    accept: Callable[[Region, set[fx.Node]], Refusal | None],
    banned: set[tuple[str, ...]],
    refusals: list[Refusal],
) -> list[Region]:
    """Regions to fold, chosen greedily by gain until nothing changes.

    ``accept`` is the driver's guard (sharing, in-place changes, surgery); its refusals are collected.
    ``banned`` are the keys of regions that failed with numbers.
    """
    chosen: list[Region] = []
    dead: set[fx.Node] = set()
    refused = set(banned)
    changed: set[fx.Node] | None = None
    while changed is None or changed:
        candidates = find_regions(flow, dead, changed, refusals)
        changed = set()
        for region in candidates:
            if region.key in refused or dead.intersection(region.dying):
                continue
            kept = [r.entry for r in chosen if r.node not in region.dying and r.entry is not region.result]
            if region.entry in dead or any(entry in region.dying for entry in kept):
                continue  # planned before its neighbour was folded; the next round sees what is left
            inner = [r for r in chosen if r.node in region.dying]
            region.inner = inner
            region.dying = sorted(
                {n for r in inner for n in r.dying} | {n for n in region.dying if "region" not in n.meta},
                key=lambda n: flow.order[n],
            )
            region.convs = region.convs.union(*(r.convs for r in inner))
            region.constants = list(dict.fromkeys([c for r in inner for c in r.constants] + region.constants))
            refusal = _too_dense(region) or accept(region, dead)
            if refusal is not None:
                refusals.append(refusal.at(flow.unit.name(origin(region.result))))
                refused.add(region.key)
                continue
            chosen = [r for r in chosen if r not in inner] + [region]
            dead |= {n for n in region.dying} | {r.node for r in inner if r.node is not None}
            node = _contract(flow, region)
            changed.add(node)
            for neighbour in chosen:
                if neighbour.entry is region.result:
                    neighbour.entry = node
    return chosen


def _too_dense(region: Region) -> Refusal | None:
    """Moved channels were planned in the hope of block structure; whether it is there, only numbers say."""
    if not region.form.widened:
        return None
    try:
        with torch.no_grad():
            form = region.numeric()
    except RefusalError as error:
        return error.refusal
    bias = None if form.bias is None else form.bias.to("meta")
    region.form = replace(form, weight=form.weight.to("meta"), bias=bias)
    return None


def _contract(flow: Flow, region: Region) -> fx.Node:
    graph = flow.unit.graph
    with graph.inserting_after(region.result):
        node = graph.create_node("call_function", _fold_marker, (region.entry,))
    node.meta.update(region=region, call=region.result.meta["call"])
    region.node = node
    region.result.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    flow.add(node, region.result)
    flow.nodes.sort(key=lambda n: flow.order[n])
    return node


def _fold_marker(x: Any) -> Any:
    raise AssertionError("stands for a folded region while planning; never runs")


def _climb(flow: Flow, dominator: dict[Any, Any], result: fx.Node) -> Iterator[fx.Node]:
    entry = dominator[result]
    for _ in range(MAX_CLIMB):
        if entry == ENTRY:
            return
        yield entry
        if entry not in flow.affine:
            return
        entry = dominator[entry]


def _final(value: Any) -> bool:
    """Whether climbing further cannot help: something between is not affine or comes from elsewhere."""
    return isinstance(value, Refusal) and value.reason in _FINAL


_FINAL = {Reason.NOT_AFFINE, Reason.OTHER_INPUT, Reason.NOT_A_CONVOLUTION}


def _reach(flow: Flow, changed: set[fx.Node]) -> set[fx.Node]:
    """Affine nodes that lie behind a changed node with only affine nodes between."""
    reached, todo = set(changed), list(changed)
    while todo:
        for user in todo.pop().users:
            if user in flow.affine and user not in reached:
                reached.add(user)
                todo.append(user)
    return reached


def _weigh(flow: Flow, sweep: Sweep, result: fx.Node, form: ConvForm, dead: set[fx.Node]) -> Region | Refusal | None:
    """The region from the sweep's entry to ``result``, a refusal if it costs more, None if nothing would be gained."""
    between = _between(flow, sweep.entry, result)
    dying = _dying(flow, between, result, form, sweep, dead)
    signals = [s for n in dying if isinstance(s := sweep.value(n), Signal)]
    if not any(s.conv for s in signals) or all("region" in n.meta for n in dying):
        return None
    constants = _dying_constants(flow, dying, dead)
    numbers = _numbers(flow, [*dying, *constants])
    work = sum(s.work * s.form.rate for s in signals)
    best = form.numbers, form.multiply_adds
    if form.widened:  # zeros may turn out to be block structure; decided with numbers
        groups = math.gcd(form.in_channels, form.out_channels) // form.groups
        best = form.weight.numel() // groups + (form.numbers - form.weight.numel()), form.multiply_adds / groups
    if best[0] > numbers or best[1] > work:
        return Refusal(Reason.LARGER, _cost_message(form, numbers, work), flow.unit.name(result))
    if (best[0], best[1]) == (numbers, work):
        return None
    return Region(
        flow, sweep.entry, result, sweep.view, sweep.channels, form, between, dying, constants, numbers, work, sum(s.bias for s in signals), _begins_with_conv(sweep, between), {n for n in dying if isinstance(s := sweep.value(n), Signal) and s.conv}
    )


def _begins_with_conv(sweep: Sweep, between: list[fx.Node]) -> bool:
    signals = (s for n in between if isinstance(s := sweep.value(n), Signal))
    return next((s.conv for s in signals if s.work), False)


def _is_conv(flow: Flow, node: fx.Node) -> bool:
    region = "region" in node.meta
    return region or _FUNCTIONS[node.target] is not None or isinstance(flow.modules.get(node), (_ConvNd, nn.Linear))


def _cost_message(form: ConvForm, numbers: int, work: float) -> str:
    return (
        f"{Reason.LARGER.value}: {form.numbers} numbers and {form.multiply_adds:.0f} multiply-adds per position "
        f"instead of {numbers} and {work:.0f}"
    )


def _between(flow: Flow, entry: fx.Node, result: fx.Node) -> list[fx.Node]:
    """Nodes from ``entry`` (not included) to ``result``, in order."""
    seen, todo = {result}, [result]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source is not entry and source not in seen and source not in flow.constant:
                seen.add(source)
                todo.append(source)
    return sorted(seen, key=lambda n: flow.order[n])


def _dying(
    flow: Flow, between: list[fx.Node], result: fx.Node, form: ConvForm, sweep: Sweep, dead: set[fx.Node]
) -> list[fx.Node]:
    dying = {result}
    for node in reversed(between):
        if node is result:
            continue
        if all(u in dying or u in dead or _harmless(flow, u, node, form, sweep) for u in node.users):
            dying.add(node)
    return [n for n in between if n in dying]


def _harmless(flow: Flow, user: fx.Node, node: fx.Node, form: ConvForm, sweep: Sweep) -> bool:
    """A question about the shape may be asked of the result instead, if it has the same shape."""
    if not flow.shape_only(user):
        return False
    value = sweep.value(node)
    if not isinstance(value, Signal):
        return True
    own = value.form
    same = (own.stride, own.extent, own.up, own.out_channels) == (form.stride, form.extent, form.up, form.out_channels)
    return same and value.ids is None


def _dying_constants(flow: Flow, dying: list[fx.Node], dead: set[fx.Node]) -> list[fx.Node]:
    """Weight expressions that only dying nodes read."""
    gone = set(dying)
    found: list[fx.Node] = []
    todo = [c for n in dying for c in n.all_input_nodes if c in flow.constant]
    while todo:
        node = todo.pop()
        if node in gone or not all(u in gone or u in dead for u in node.users):
            continue
        gone.add(node)
        found.append(node)
        todo += node.all_input_nodes
    return sorted(found, key=lambda n: flow.order[n])


def _numbers(flow: Flow, nodes: list[fx.Node]) -> int:
    """Numbers held by weights that no other node and no other place of the model uses."""
    gone = set(nodes)
    regions = [n.meta["region"] for n in nodes if "region" in n.meta]
    unique = {id(t): t for n in nodes for t in flow.tensors.get(n, ())}
    own = sum(t.numel() for key, t in unique.items() if flow.holders[key] <= gone and flow.owners.get(key, 1) == 1)
    return own + sum(r.form.numbers for r in regions)


def _views(flow: Flow, entry: fx.Node) -> list[tuple[View, int]]:
    """How the layers behind ``entry`` read its tensor: spatial dimensions and channels.

    A layer behind a slice, a split or a reshape does not say how many channels the entry has: that must be known from
    what made the entry, or the entry is not read that way.
    """
    found: dict[View, int] = {}
    todo: list[tuple[fx.Node, tuple[fx.Node, ...], int]] = [(entry, (), 0)]
    seen = {(entry, False)}
    known, rank = flow.channels.get(entry), flow.rank.get(entry)
    while todo:
        node, path, depth = todo.pop(0)
        for user in node.users:
            if (user, bool(path)) in seen or user not in flow.affine or flow.shape_only(user):
                continue
            seen.add((user, bool(path)))
            demand = _demand(flow, user, entry)
            if demand is None:
                if depth < 6:
                    todo.append((user, (*path, user) if _reshapes(flow, user) else path, depth + 1))
                continue
            view, count = demand
            if not view.last and rank not in (None, view.n + 2):
                continue
            if any(_drops_channels(step, view) for step in path):
                count = known if known is not None and not view.last and rank is not None else 0
            elif known is not None and not view.last:
                count = known
            if count:
                found.setdefault(view, count)
    return list(found.items())


_RESHAPES = {
    "getitem", "chunk", "split", "tensor_split", "narrow", "select", "index_select", "unbind", "cat", "concat",
    "concatenate", "stack", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
}  # fmt: skip


def _reshapes(flow: Flow, node: fx.Node) -> bool:
    """Whether an operation may change how many channels there are, or which dimension holds them."""
    if node.op == "call_module":
        return isinstance(flow.modules[node], (nn.Flatten, nn.Unflatten))
    return (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in _RESHAPES


def _drops_channels(node: fx.Node, view: View) -> bool:
    """Whether the layers behind may see fewer channels than there are; a crop along space leaves them all."""
    if node.target is not operator.getitem or view.last:
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if None in index:
        return True
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *(slice(None),) * (view.n + 3 - len(index)), *index[at + 1 :])
    return any(item != slice(None) for item in index[:2])


def _demand(flow: Flow, node: fx.Node, entry: fx.Node) -> tuple[View, int] | None:
    region = node.meta.get("region")
    if isinstance(region, Region):
        return region.view, region.channels
    module = flow.modules.get(node)
    if isinstance(module, nn.Linear):
        return View(0, last=True, rank=flow.rank.get(entry)), module.in_features
    if module is not None:
        n = next((i for i, kind in enumerate(_CONVS, start=1) if isinstance(module, kind)), None)
        if n is not None:
            return View(n), int(module.in_channels)  # type: ignore[arg-type]
        return ProbedForms.of(flow.unit).demand(module) if str(node.target) in flow.unit.opaque else None
    n_function = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if n_function is None or not isinstance(weight, fx.Node) or weight not in flow.constant:
        return None
    try:
        shape = Constants(flow, numeric=False).value(weight).shape
    except RefusalError:
        return None
    if n_function == 0:
        return View(0, last=True, rank=flow.rank.get(entry)), int(shape[1])
    if n_function < 0:
        return View(-n_function), int(shape[0])
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return View(n_function), int(shape[1]) * (groups if isinstance(groups, int) else 1)


_CONVS = (
    (nn.Conv1d, nn.ConvTranspose1d),
    (nn.Conv2d, nn.ConvTranspose2d),
    (nn.Conv3d, nn.ConvTranspose3d),
)
_FUNCTIONS: dict[Any, int] = defaultdict(
    lambda: None,  # type: ignore[arg-type]
    {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.linear: 0, F.conv_transpose1d: -1, F.conv_transpose2d: -2,
     F.conv_transpose3d: -3},
)  # fmt: skip


def _then_region(x: Signal, region: Region, form: ConvForm) -> Signal:
    if (x.view.last, x.view.n) != (region.view.last, region.view.n) or x.ids is not None:
        raise RefusalError(Reason.LAYOUT)
    return x.with_form(x.form.then(form), work=form.weight.numel(), conv=True)


def _any_signal(value: Any) -> bool:
    if isinstance(value, Signal):
        return True
    if isinstance(value, dict):
        return any(_any_signal(v) for v in value.values())
    return isinstance(value, (tuple, list)) and any(_any_signal(v) for v in value)


def _plain_call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Arithmetic on sizes."""
    if node.op == "call_function" and any(isinstance(a, (Dim, int, tuple, list)) for a in args):
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (TypeError, AttributeError, IndexError) as error:
            raise RefusalError(Reason.NOT_AFFINE) from error
    raise RefusalError(Reason.OTHER_INPUT if not isinstance(args, Tensor) else Reason.NOT_AFFINE)
