"""``reparam convert``: the checkpoint of a training run becomes a file that the stock architecture loads.

The file is compared before anybody can use it: the network that is rebuilt from it answers every test image as the
trained one does, both in float64, or no file is left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import reparam
from reparam import Counts, Explanation
from reparam.commands import Blocks, FormName, Online, Where, form_of
from reparam.disk import FileError, check_writable, move_file, scratch_folder
from reparam.export import SUFFIXES, inputs_for, parse_dynamic, write_program
from reparam.files import check_target, load_model, save_model
from reparam.networks import Network, UsageError, check_not_read
from reparam.tables import counts_table
from zoo.render import console
from zoo.train.checkpoint import Folder
from zoo.train.data import Data
from zoo.train.evaluate import Score, Tally, answers
from zoo.train.targets import (
    Averaged,
    Batch,
    DataName,
    Model,
    Root,
    Size,
    check_fit,
    data_for,
    expansion,
    find,
    tell,
)

__all__ = ["Agreement", "DisagreementError", "agreement", "convert", "deploy"]


class DisagreementError(reparam.ReparamError):
    """A network that does not answer as the one that it was made of."""


@dataclass(frozen=True)
class Agreement:
    """Two networks on the same test images.

    Args:
        before, after: scores, each network in its own dtype.
        different: images with another answer, or with logits that are not finite, both networks in float64.
        largest: largest difference of their logits in float64, relative to the largest logit.
        own_different: the same in their own dtypes.
        own_largest: largest difference there, likewise relative.
        dtype: of the second network.
    """

    before: Score
    after: Score
    different: int
    largest: float
    own_different: int
    own_largest: float
    dtype: torch.dtype


def agreement(before: nn.Module, after: nn.Module, data: Data, *, batch: int = 256) -> Agreement:
    """Ask two networks about every test image, in float64 and in their own dtypes. Both are put into eval mode."""
    models = [copy.deepcopy(before).double(), copy.deepcopy(after).double(), before, after]
    tallies = Tally(len(data.classes)), Tally(len(data.classes))
    different, apart, size = [0, 0], [0.0, 0.0], [0.0, 0.0]
    for logits, labels in answers(models, data, batch=batch):
        for index in (0, 1):
            one, other = logits[2 * index], logits[2 * index + 1]
            gap = (one.double() - other.double()).abs()
            # Logits that are not numbers have an argmax too, and it is the same in both networks.
            different[index] += int(((one.argmax(1) != other.argmax(1)) | ~gap.isfinite().all(1)).sum())
            apart[index], size[index] = max(apart[index], float(gap.max())), max(size[index], float(one.abs().max()))
        for tally, own in zip(tallies, logits[2:], strict=True):
            tally.add(own, labels)
    largest = [gap / scale if scale else gap for gap, scale in zip(apart, size, strict=True)]
    before_score, after_score = (tally.score for tally in tallies)
    return Agreement(
        before=before_score,
        after=after_score,
        different=different[0],
        largest=largest[0],
        own_different=different[1],
        own_largest=largest[1],
        dtype=next(after.parameters()).dtype,
    )


def deploy(network: Network, *, fold_norms: bool = False) -> tuple[nn.Module, Explanation | None]:
    """The network as the plain architecture that it was expanded from; what was folded, None if nothing was to fold.

    Args:
        network: expanded or plain.
        fold_norms: fold the batch norms as well: fewer layers, which stock code does not load any more.

    Raises:
        ReparamError: as :func:`reparam.collapse`.
    """
    if network.recipe is None and not fold_norms:
        return network.model, None
    like = None if fold_norms else network.stock()
    return reparam.collapse_with_report(network.model, like=like)


def convert(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Weights, training state, folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write here (.safetensors, .pt, .pt2, .onnx).")],
    model: Model = None,
    block: Blocks = None,
    where: Where = None,
    form: FormName = None,
    online: Online = None,
    ema: Averaged = None,
    fold_norms: Annotated[
        bool, typer.Option("--deploy", help="Fold the norms as well; reparam loads the file, stock code does not.")
    ] = False,
    data: DataName = None,
    root: Root = None,
    size: Size = None,
    batch: Batch = 256,
    dynamic: Annotated[
        str, typer.Option("--dynamic", help="What a .pt2 or .onnx file leaves open: batch,height,width.")
    ] = "",
) -> None:
    """Turn a training checkpoint into a file that the stock architecture loads, and prove it on the test set.

    Trained and deployed network must give the same answer to every test image in float64; if not, exit status 1, and
    no file is left. A .pt2 or .onnx file has its norms folded and runs without this library. --model, --block, --where
    and --form describe checkpoints that do not say their network.
    """
    left_open, exports = parse_dynamic(dynamic), output.suffix in SUFFIXES
    if left_open and not exports:
        raise UsageError(f"--dynamic is for files that end in {' or '.join(SUFFIXES)}")
    fold_norms = fold_norms or exports
    if not exports:
        check_target(output, SUFFIXES)
    check_not_read(output, checkpoint, *Folder(checkpoint).weights)
    check_writable(output)
    subject = find(checkpoint, model=model, recipe=expansion(block, where, form_of(form, online)), ema=ema)
    network = subject.network
    if network.collapsed:
        raise UsageError(f"{checkpoint} is collapsed already")
    tell([subject])
    chosen = data_for(subject, data, size, root)
    if chosen is not None:
        check_fit(subject, chosen)
    torch.set_num_threads(1)  # thousands of small operations, as in `reparam collapse`
    made, explanation = deploy(network, fold_norms=fold_norms)
    terminal = console()
    terminal.print(counts_table({"in training": Counts.of(network.model), "deployed": Counts.of(made)}))
    if explanation is not None:
        errors = [fold.error for fold in explanation.folds if fold.error is not None]
        error = f", max relative error {max(errors):.1e}" if errors else ""
        terminal.print(f"proven: {len(errors)} of {len(explanation.folds)} folds{error}", soft_wrap=True)
    with scratch_folder(output) as folder:
        shape = network.shape if chosen is None else chosen.shape
        draft = folder / output.name
        rebuilt = made
        try:
            if exports:  # run and compared with the network as it is written
                said = write_program(made, draft, inputs_for(made, shape or (), left_open), left_open)
                terminal.print(said, soft_wrap=True, markup=False)
            else:
                save_model(made, draft, source=network.source, collapsed=fold_norms, shape=shape)
                # What is judged is the file, not the network that was written to it.
                rebuilt = load_model(draft)
        except FileError as error:
            raise FileError(str(error).replace(str(draft), str(output))) from error
        if chosen is None:
            terminal.print("not compared on data; name them with --data", soft_wrap=True)
        else:
            with terminal.status(f"comparing on {chosen.name}"):
                found = agreement(network.model, rebuilt, chosen, batch=batch)
            for line in _verdict(found, checkpoint, chosen):
                terminal.print(line, soft_wrap=True, markup=False)
        move_file(draft, output)
    terminal.print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", soft_wrap=True, markup=False)
    if not fold_norms:
        terminal.print(f"it loads with strict=True into {network.source}", soft_wrap=True, markup=False)


def _verdict(found: Agreement, checkpoint: str, data: Data) -> list[str]:
    """The comparison in words. Raises :class:`DisagreementError` if one answer differs in float64."""
    images = found.before.images
    if found.different:
        raise DisagreementError(
            f"{checkpoint}: the deployed network answers {found.different} of {images} images of {data.name} "
            f"differently in float64 (logits differ by {found.largest:.1e}, relative); no file was written. "
            "Weights in half precision lose that much when they are folded, and weights that are not finite everything"
        )
    agree, dtype = images - found.own_different, str(found.dtype).removeprefix("torch.")
    return [
        f"accuracy on {data.name}: {found.before.top1:.2%} before, {found.after.top1:.2%} after, {images:,} images",
        f"float64: all {images:,} answers agree, largest difference {found.largest:.1e} of the largest logit",
        f"{dtype}: {agree:,} of {images:,} answers agree, largest difference {found.own_largest:.1e}",
    ]
