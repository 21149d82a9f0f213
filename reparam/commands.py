"""The commands: plan, expand, blocks for before training; collapse, explain, verify for after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape

import reparam
from reparam import Counts, Form, ReparamError, Verdict, files, sources, tables
from reparam.export import SUFFIXES, inputs_for, parse_dynamic, write_program
from reparam.networks import Network, UsageError, check_not_read, load
from reparam.recipe import Recipe, parse_blocks, parse_where
from reparam.tables import Terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from reparam import Equivalence, Explanation

__all__ = ["COMMANDS", "Cost", "Norms", "console", "errors"]

console = Terminal()
errors = Terminal(stderr=True)

INCONCLUSIVE = 3
"""Exit status of a comparison without a verdict."""
EXPANSION = "How it is expanded"
Target = Annotated[
    str, typer.Argument(metavar="SPEC_OR_FILE", help="source:name, ./net.py:Net, or a file written by reparam.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the source's trained weights (downloads).")]
Weights = Annotated[Path | None, typer.Option("--weights", help="State dict, or a training script's checkpoint.")]
Key = Annotated[str | None, typer.Option("--key", help="Where in that checkpoint it is: state_dict, model_ema, ...")]
Prove = Annotated[bool, typer.Option("--verify/--no-verify", help="Prove each step, and run the result.")]
FoldsOnly = Annotated[bool, typer.Option("--folds-only", help="Prove each fold, but do not run the result.")]
Strict = Annotated[bool, typer.Option("--strict", help="Fail where a fold does not hold, instead of taking it back.")]
Norms = Annotated[str, typer.Option("--norms", help="Batch norms that stay: keep, or affine (one scale and shift).")]
Cost = Annotated[
    str, typer.Option("--cost", help="What may not grow: numbers; or layers:4, for fewer calls up to 4 times as much.")
]
Everything = Annotated[bool, typer.Option("--all", help="List everything.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the random weights.")]
Blocks = Annotated[
    list[str] | None,
    typer.Option(
        "--block", "-b", help="acb, acb:gamma=1/3,bn=after or layer1.*=dbb; may be repeated.", rich_help_panel=EXPANSION
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="PATTERN",
        help="These layers, layer1.* for example; may be repeated. all: wherever it can be, not where it is meant.",
        rich_help_panel=EXPANSION,
    ),
]
Kernels = Annotated[
    list[str] | None,
    typer.Option("--kernel", help="Only kernels of this size, 3 or 3x5; may be repeated.", rich_help_panel=EXPANSION),
]
Depthwise = Annotated[
    bool | None,
    typer.Option(
        "--depthwise/--no-depthwise",
        help="Only depthwise convolutions, or only others.",
        rich_help_panel=EXPANSION,
        show_default=False,
    ),
]
Online = Annotated[
    bool | None,
    typer.Option(
        "--online/--no-online",
        help="Former name of --form online.",
        hidden=True,
    ),
]
FormName = Annotated[
    str | None,
    typer.Option(
        "--form",
        help="How blocks train: branches, sampled, sampled:fraction=1/4, frozen, online.",
        rich_help_panel=EXPANSION,
        show_default="as the block says",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="So many plain training steps may one take; measured here, so give --inputs.",
        rich_help_panel=EXPANSION,
    ),
]
Memory = Annotated[
    float | None, typer.Option("--memory", help="The same for a step's peak memory.", rich_help_panel=EXPANSION)
]
Inputs = Annotated[
    str | None,
    typer.Option("--inputs", metavar="32x3x224x224", help="A batch of training.", rich_help_panel=EXPANSION),
]
Init = Annotated[
    str, typer.Option("--init", help="preserve (same function) or paper (published).", rich_help_panel=EXPANSION)
]


# ------------------------------------------------------------------------------------------------- before training


def plan(
    target: Target,
    block: Blocks = None,
    where: Where = None,
    kernel: Kernels = None,
    depthwise: Depthwise = None,
    init: Init = "preserve",
    form: FormName = None,
    online: Online = None,
    budget: Budget = None,
    memory: Memory = None,
    inputs: Inputs = None,
    everything: Everything = False,
) -> None:
    """Show which convolutions would get a block, what that costs, and why the others do not. Nothing is changed."""
    sources.name_code(target)  # which may register blocks
    recipe = _recipe(block, where, kernel, depthwise, form_of(form, online), init)
    network = _load(target, plain=True, quiet=True)
    batch = _batch(network.model, inputs, budget, memory)
    planned = recipe.plan(network.model, example_inputs=batch, budget=budget, memory=memory)
    size = "" if batch is None else f", multiply-adds for {'x'.join(map(str, batch[0].shape[1:]))}"
    title = f"{escape(target)} with {escape(str(recipe))}{size}"
    tables.show(console, tables.plan_table(planned, title, everything=everything))
    reasons = tables.plan_reasons(planned, everything=everything)
    if reasons is not None:
        tables.show(console, reasons)
    left = f", {len(planned.refused)} are left" if planned.refused else ""
    console.print(f"{len(planned.expanded)} of {len(planned.rows)} {planned.noun} get a block{left}", soft_wrap=True)
    for line in planned.budget:
        console.print(escape(line), soft_wrap=True)


def expand(
    target: Target,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write here (.safetensors, .pt).")],
    block: Blocks = None,
    where: Where = None,
    kernel: Kernels = None,
    depthwise: Depthwise = None,
    init: Init = "preserve",
    form: FormName = None,
    online: Online = None,
    budget: Budget = None,
    memory: Memory = None,
    inputs: Inputs = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    key: Key = None,
    seed: Seed = 0,
    verify: Prove = True,
) -> None:
    """Give a network's convolutions training-time blocks and write the state dict to train from.

    The file says how it was made: collapse, explain and verify rebuild the expanded network from it.
    """
    _check_output(output, target, weights)
    sources.name_code(target)  # which may register blocks
    recipe = _recipe(block, where, kernel, depthwise, form_of(form, online), init)
    network = _load(target, plain=True, pretrained=pretrained, weights=weights, key=key, seed=seed)
    torch.manual_seed(seed)
    limited = budget is not None or memory is not None
    batch = _batch(network.model, inputs, budget, memory) if limited or inputs else None
    planned = recipe.plan(network.model, example_inputs=batch, budget=budget, memory=memory)
    for line in planned.budget:
        console.print(escape(line), soft_wrap=True)
    if not planned.expanded:
        raise ReparamError(f"no convolution of {target} gets a block: {'; '.join(planned.reasons()) or 'it has none'}")
    expanded = planned.apply()
    recipe = Recipe.of(planned) if limited else recipe
    console.print(f"{escape(target)} with {escape(str(recipe))}", style="italic", soft_wrap=True)
    console.print(tables.counts_table({"before": Counts.of(network.model), "in training": Counts.of(expanded)}))
    console.print(f"{len(planned.expanded)} of {len(planned.rows)} {planned.noun} expanded", soft_wrap=True)
    if verify and init == "preserve":
        _check_start(network.model, expanded)
    _write(expanded, output, network, recipe=recipe)


def blocks() -> None:
    """List the blocks with their options."""
    tables.show(console, tables.blocks_table(reparam.blocks().values()))
    console.print("options go after a colon: --block acb:gamma=1/3,bn=after", soft_wrap=True)


# ------------------------------------------------------------------------------------------------- after training


def collapse(
    target: Target,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here (.safetensors, .pt, .pt2, .onnx).")
    ] = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    key: Key = None,
    block: Blocks = None,
    where: Where = None,
    kernel: Kernels = None,
    depthwise: Depthwise = None,
    form: FormName = None,
    online: Online = None,
    verify: Prove = True,
    folds_only: FoldsOnly = False,
    strict: Strict = False,
    norms: Norms = "keep",
    cost: Cost = "numbers",
    dynamic: Annotated[
        str, typer.Option("--dynamic", help="What a .pt2 or .onnx file leaves open: batch,height,width.")
    ] = "",
) -> None:
    """Fold a network into plain convolutions and show what became of it.

    An expanded network, from a file of `reparam expand` or by --block, becomes the plain architecture that it was
    expanded from, batch norms included; collapse that file again to fold those as well. A .pt2 or .onnx file has them
    folded.
    """
    if _is_onnx(target):
        _refuse_for_onnx(pretrained=pretrained, weights=weights, key=key, block=block, where=where, kernel=kernel)
        _keep_norms(norms)
        _collapse_onnx(Path(target), output, "folds" if verify and folds_only else verify, strict, cost)
        return
    left_open = parse_dynamic(dynamic)
    exports = output is not None and output.suffix in SUFFIXES
    if left_open and not exports:
        raise UsageError(f"--dynamic is for files that end in {' or '.join(SUFFIXES)}")
    if output is not None:
        files.check_writable(output) if exports else _check_output(output, target, weights, also=SUFFIXES)
    sources.name_code(target)
    wanted = form_of(form, online)
    recipe = _recipe(block, where, kernel, depthwise, wanted) if block else None
    if recipe is None and (where or kernel or (depthwise, wanted) != (None, None)):
        raise UsageError("--where, --kernel, --depthwise and --form describe an expansion; name its --block as well")
    network = _load(target, pretrained=pretrained, weights=weights, key=key, recipe=recipe)
    # Thousands of small operations: threads that wait for each other on a busy machine cost more than they bring.
    torch.set_num_threads(1)
    started = time.perf_counter()
    # What runs an exported file loads no state dict: there the norms are folded as well.
    like = None if network.recipe is None or exports else network.stock()
    how: bool | str = "folds" if verify and folds_only else verify
    folded, explanation = reparam.collapse_with_report(
        network.model, like=like, verify=how, strict=strict, norms=norms, cost=cost
    )
    seconds = time.perf_counter() - started
    _print_collapsed(target, explanation, seconds)
    if output is not None and exports:
        console.print(write_program(folded, output, inputs_for(folded, network.shape, left_open), left_open))
        _wrote(output)
    elif output is not None:
        _write(folded, output, network, collapsed=like is None)
    if like is not None and output is not None:
        console.print(f"it loads with strict=True into {escape(network.source)}", soft_wrap=True)


def _print_collapsed(target: str, explanation: Explanation, seconds: float) -> None:
    """What a collapse did, and how much of it is proven."""
    for refusal in explanation.taken_back:
        console.print(f"[red]taken back[/red]: {escape(str(refusal))}", soft_wrap=True)
    _print_counts(target, explanation)
    console.print(_proofs(explanation))
    if explanation.checked is not None:
        console.print(f"checked: {escape(str(explanation.checked))}", soft_wrap=True)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in explanation.seconds.items())
    console.print(f"seconds: {seconds:.2f}" + (f" ({parts})" if parts else ""))


def _collapse_onnx(path: Path, output: Path | None, how: bool | str, strict: bool, cost: str) -> None:
    """The same for an ONNX file."""
    from reparam import onnx

    if output is not None:
        if output.suffix != ".onnx":
            raise typer.BadParameter(f"{output} must end in .onnx, as the file that is collapsed")
        check_not_read(output, path)
        files.check_writable(output)
    started = time.perf_counter()
    model, explanation = onnx.collapse_with_report(path, verify=how, strict=strict, cost=cost)
    _print_collapsed(str(path), explanation, time.perf_counter() - started)
    if output is not None:
        onnx.save(model, output)
        _wrote(output)


def explain(
    target: Target,
    pretrained: Pretrained = False,
    norms: Norms = "keep",
    cost: Cost = "numbers",
    everything: Everything = False,
) -> None:
    """Show which layers would fold, into what, and why the others do not. Nothing is changed."""
    if _is_onnx(target):
        from reparam import onnx

        _refuse_for_onnx(pretrained=pretrained)
        _keep_norms(norms)
        explanation = onnx.explain(target, cost=cost)
    else:
        explanation = reparam.explain(_load(target, pretrained=pretrained).model, norms=norms, cost=cost)
    tables.show(console, tables.folds_table(explanation, everything))
    if explanation.refusals and everything:
        title = f"left alone: {len(explanation.refusals)}"
        tables.show(console, tables.layers_table(title, explanation.refusals))
    elif explanation.refusals:
        tables.show(console, tables.reasons_table(explanation))
    if explanation.untraced and everything:
        tables.show(console, tables.layers_table("not traceable as a whole, compiled inside", explanation.untraced))
    _print_counts(target, explanation)


def verify(
    reference: Annotated[str, typer.Argument(help="SPEC or file.")],
    candidate: Annotated[str, typer.Argument(help="SPEC or file.")],
    pretrained: Pretrained = False,
) -> None:
    """Compare two networks on the same random inputs; exit status 1 if they differ, 3 if rounding leaves it open."""
    if _is_onnx(reference) or _is_onnx(candidate):
        _verify_onnx(reference, candidate, pretrained)
        return
    for target in (reference, candidate):
        sources.name_code(target)
    models = [_load(target, pretrained=pretrained).model for target in (reference, candidate)]
    result = reparam.verify(*models)
    _print_difference("equal", result)
    if not result.ok:
        raise typer.Exit(1 if result.verdict is Verdict.DIFFERENT else INCONCLUSIVE)


def _verify_onnx(reference: str, candidate: str, pretrained: bool) -> None:
    """Compare an ONNX file with another one, or with a network."""
    from reparam import onnx

    targets = (reference, candidate)
    first, second = (each if _is_onnx(each) else _load(each, pretrained=pretrained).model for each in targets)
    result = onnx.verify(first, second)
    colour = {Verdict.EQUAL: "green", Verdict.DIFFERENT: "red", Verdict.INCONCLUSIVE: "yellow"}[result.verdict]
    console.print(f"[{colour}]{result.verdict.value}[/{colour}]: {escape(str(result))}", soft_wrap=True)
    if result.verdict is not Verdict.EQUAL:
        raise typer.Exit(1 if result.verdict is Verdict.DIFFERENT else INCONCLUSIVE)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint in the names of a block's authors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write here (.safetensors, .pt).")],
    block: Annotated[
        str | None, typer.Option("--block", "-b", help="Look for this block only; options as ecb:identity=true.")
    ] = None,
    like: Annotated[str | None, typer.Option("--like", metavar="SPEC", help="The plain network that it is of.")] = None,
    collapse: Annotated[bool, typer.Option("--collapse", help="Fold it into that network.")] = False,
    key: Key = None,
) -> None:
    """Read a checkpoint that the authors of a block published: to train on with --like, else folded block by block.

    What it holds is found in the names of its tensors: ACNet, DBB, DO-Conv, RepVGG, MobileOne, OREPA, UniRepLKNet, ECB.
    """
    _check_output(output, file, like)
    imported = reparam.import_checkpoint(file, block=block, like=like, collapse=collapse, key=key)
    console.print(escape(str(imported)), soft_wrap=True)
    if imported.recipe is not None:
        what = f"an expanded network: {imported.source} with {imported.recipe}"
        console.print(escape(what), soft_wrap=True)
    elif imported.model is not None:
        console.print(f"{escape(imported.source)}{', collapsed' if imported.collapsed else ''}", soft_wrap=True)
    else:
        console.print(f"a state dict of {len(imported.tensors)} tensors, every block folded", soft_wrap=True)
    imported.save(output)
    _wrote(output)


COMMANDS: tuple[Callable[..., None], ...] = (plan, expand, blocks, import_, collapse, explain, verify)
"""In the order in which they are listed; an underscore at the end is Python's, not the command's."""


# ------------------------------------------------------------------------------------------------- helpers


def form_of(form: str | None, online: bool | None) -> str | None:
    """The form that --form names, or the former --online."""
    if online is not None:
        wanted = "online" if online else "branches"
        if form is not None:
            raise UsageError("--online is the former name of --form online; leave it out")
        errors.print(f"note: --{'' if online else 'no-'}online is now --form {wanted}", style="dim")
        return wanted
    return None if form is None else str(Form.of(form))


def _recipe(
    block: list[str] | None,
    where: list[str] | None,
    kernel: list[str] | None,
    depthwise: bool | None,
    form: str | None,
    init: str = "preserve",
) -> Recipe:
    """The expansion that the options describe."""
    if init not in ("preserve", "paper"):
        raise UsageError(f"--init is preserve or paper, got {init!r}")
    return Recipe(parse_blocks(block or ()), parse_where(where or (), kernel or (), depthwise), init, form)


def _load(target: str, *, plain: bool = False, quiet: bool = False, **options: object) -> Network:
    """The network that an argument names; what the person should know about it goes to the terminal.

    ``plain`` refuses what is expanded or collapsed already.
    """
    network = load(target, **options)  # type: ignore[arg-type]
    if plain and network.recipe is not None:
        raise UsageError(f"{target} is expanded already, with {network.recipe}; collapse it first")
    if plain and network.collapsed:
        raise UsageError(f"{target} is collapsed: expand the network that it came from, {network.source}")
    for note in () if quiet else network.notes:
        errors.print(f"note: {escape(note)}", style="dim", soft_wrap=True)
    return network


def _is_onnx(target: str) -> bool:
    return target.endswith(".onnx")


def _refuse_for_onnx(**given: object) -> None:
    """An ONNX file has its weights, and was never expanded."""
    options = [f"--{name}" for name, value in given.items() if value]
    if options:
        raise UsageError(f"{', '.join(options)}: an ONNX file has its weights and its network in it; leave that out")


def _keep_norms(norms: str) -> None:
    """In an ONNX file a norm is one operator, and a scale and shift are two."""
    if norms != "keep":
        raise UsageError(
            "--norms: in an ONNX file a batch norm is one operator, a scale and shift would be two: it stays"
        )


def _inputs(model: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Inputs to count multiply-adds with, one sample; None if none can be guessed."""
    try:
        guessed = reparam.guess_inputs(model)
        return tuple(x[:1] for x in guessed) if all(isinstance(x, torch.Tensor) for x in guessed) else None
    except ReparamError:
        return None


def _batch(
    model: nn.Module, inputs: str | None, budget: float | None, memory: float | None
) -> tuple[torch.Tensor, ...] | None:
    """The batch that --inputs describes, which a budget needs; else one sample."""
    if inputs is None:
        if budget is not None or memory is not None:
            raise UsageError("--budget and --memory are measured: say on what batch, --inputs 32x3x224x224 for example")
        return _inputs(model)
    sizes = inputs.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UsageError(f"--inputs is the shape of a batch, written 32x3x224x224, got {inputs!r}")
    first = next(model.parameters())
    made = torch.randn(*map(int, sizes), generator=torch.Generator().manual_seed(0))
    return (made.to(first.device, first.dtype),)


def _check_output(path: Path, *read_for_it: str | Path | None, also: Sequence[str] = ()) -> None:
    """Fail before the work, not after it, and where the file is one that is read for it."""
    check_not_read(path, *read_for_it)
    try:
        files.check_target(path, also)
    except files.FileError as error:
        raise typer.BadParameter(str(error)) from error
    files.check_writable(path)


def _write(
    model: nn.Module, path: Path, origin: Network, *, collapsed: bool = False, recipe: Recipe | None = None
) -> None:
    files.save_model(model, path, source=origin.source, collapsed=collapsed, expanded=recipe, shape=origin.shape)
    _wrote(path)


def _wrote(path: Path) -> None:
    console.print(f"wrote {escape(str(path))} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


def _check_start(model: nn.Module, expanded: nn.Module) -> None:
    """Fail if an expansion does not begin as the network that it was made of."""
    inputs = _inputs(model)
    if inputs is None:
        console.print("not compared with the network that it was made of: no input could be guessed", soft_wrap=True)
    else:
        result = reparam.verify(model, expanded, inputs)
        _print_difference("same function", result)
        result.raise_if_different()


def _print_difference(equal: str, result: Equivalence) -> None:
    """Print the outcome of a comparison."""
    numbers = f"max difference {result.max_abs:.2e}, relative {result.max_rel:.2e}, tolerance {result.tolerance:.2e}"
    if result.ok:
        console.print(f"[green]{equal}[/green]: {numbers}", soft_wrap=True)
        return
    why = f"; {escape(result.reason)}" if result.reason else ""
    if result.verdict is Verdict.INCONCLUSIVE:
        console.print(f"[yellow]inconclusive[/yellow]: {numbers}{why}", soft_wrap=True)
        return
    first = result.first_difference or "the output"
    console.print(f"[red]different[/red]: {numbers}; first difference at {escape(str(first))}{why}", soft_wrap=True)


def _proofs(explanation: Explanation) -> str:
    """One line on how much of it is proven."""
    proven = [fold.error for fold in explanation.folds if fold.error is not None]
    if not explanation.folds:
        return "nothing folds"
    if not proven:
        return f"not proven: {len(explanation.folds)} folds"
    return f"proven: {len(proven)} of {len(explanation.folds)} folds, max relative error {max(proven):.1e}"


def _print_counts(title: str, explanation: Explanation) -> None:
    """Layers and parameters before and, where it is known, after; then the notes."""
    states = {"before": explanation.before, "after": explanation.after}
    columns = {heading: counts for heading, counts in states.items() if counts is not None}
    console.print(escape(title), style="italic", soft_wrap=True)
    console.print(tables.counts_table(columns))
    for note in [*filter(None, [explanation.growth()]), *explanation.notes]:
        console.print(f"note: {escape(note)}", soft_wrap=True)
