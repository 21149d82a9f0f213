"""ACNet's second layout of HDF5 files: tensors by their order, ``kernel0, gamma0, beta0, mu0, sigma0, ...``.

What its code finds ``conv.weight`` in the name of is a kernel, with the norm of the same number behind it; all else
keeps its name. A square kernel with two lines behind it, vertical and horizontal, is a block. The order is that in
which the authors' network registers its modules, so it takes the network to tell what is what: their residual blocks
register the projection first, others do last. The order whose shapes agree one by one is the right one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from reparam.disk import FileError

__all__ = ["is_by_order", "named"]

_PARTS = {"gamma": "weight", "beta": "bias", "mu": "running_mean", "sigma": "running_var"}
_LINES = ("square", "ver", "hor")
_PROJECTION = re.compile(r"(.*\.)?(downsample|shortcut|proj(ection)?)(\.\d+)?")


def is_by_order(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file is of this layout."""
    return {"kernel0", *(f"{word}0" for word in _PARTS)} <= tensors.keys()


def named(tensors: Mapping[str, Tensor], convs: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors under ACNet's names, behind the paths of a network's convolutions.

    Args:
        tensors: of the file.
        convs: shapes of the kernels of convolutions with a norm, in the order in which the network registers them.

    Raises :class:`FileError` if no order agrees, or if several do and mean different things.
    """
    units = list(_units(tensors))
    shapes = [tuple(tensors[f"kernel{first}"].shape) for first, _ in units]
    orders = {tuple(order) for order in (convs, _projections_first(convs))}
    fitting = [order for order in orders if [convs[path] for path in order] == shapes]
    if len(fitting) != 1:
        why = "in more than one order" if fitting else "in no order"
        raise FileError(f"its {len(units)} kernels without names agree with the network's {len(convs)} {why}")
    found = {}
    for path, (first, lines) in zip(fitting[0], units, strict=True):
        for i, line in enumerate(_LINES if lines else ("",)):
            conv, norm = (f"{path}.{line}_{end}" if line else f"{path}.{end}" for end in ("conv", "bn"))
            found[f"{conv}.weight"] = tensors[f"kernel{first + i}"]
            found |= {f"{norm}.{ours}": tensors[f"{word}{first + i}"] for word, ours in _PARTS.items()}
    numbered = re.compile(rf"(kernel|{'|'.join(_PARTS)})\d+|deps|.*\.num_batches_tracked")
    return found | {name: tensor for name, tensor in tensors.items() if not numbered.fullmatch(name)}


def _units(tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, bool]]:
    """The number of each convolution's first kernel, and whether it is a block."""
    count = sum(re.fullmatch(r"kernel\d+", name) is not None for name in tensors)
    lacks = [f"{word}{i}" for i in range(count) for word in ("kernel", *_PARTS) if f"{word}{i}" not in tensors]
    if lacks:
        raise FileError(f"its tensors by order have gaps: {lacks[0]} is missing")
    i = 0
    while i < count:
        sizes = [tuple(tensors[f"kernel{j}"].shape[2:]) for j in range(i, min(i + 3, count))]
        block = len(sizes) == 3 and min(sizes[0]) > 1 and sizes[1][1:] == (1,) and sizes[2][:1] == (1,)
        block = block and sizes[1][0] > 1 and sizes[2][1] > 1
        yield i, block
        i += 3 if block else 1


def _projections_first(convs: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The order in which the projection of each residual block comes before its other convolutions."""
    found: list[str] = []
    for path in convs:
        match = _PROJECTION.fullmatch(path)
        beside = [i for i, other in enumerate(found) if match and other.startswith(match[1] or "")]
        found.insert(beside[0] if beside else len(found), path)
    return found
