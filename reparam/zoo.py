"""``reparam.convert_zoo``: batch conversion, done by whichever package announces it.

This package knows no model library, so it finds the engine as it finds sources and commands: by an entry point, of the
group ``reparam.verbs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from reparam import ReparamError

__all__ = ["convert_zoo"]

GROUP = "reparam.verbs"
"""Entry point group of verbs that packages above this one provide."""


def convert_zoo(names: Iterable[str], **options: Any) -> Iterator[Any]:
    """Convert many models, each in a process of its own; yields the outcome of each as it ends.

    In a script, call it under ``if __name__ == "__main__":``, as everything that starts processes.

    Args:
        names: names, shell patterns (``"resnet*"``), or specs (``"torchvision:resnet18"``).
        **options: those of :func:`zoo.run.convert_zoo`: ``source``, ``out``, ``block``, ``pretrained``, ``weights``,
            ``save``, ``onnx``, ``max_parameters``, ``latency``, ``plan``, ``jobs``, ``timeout``, ``memory``,
            ``resume``, ``retry``, ``cluster``.

    Returns:
        Outcomes, each of a class of :mod:`zoo.outcome`: ``outcome.kind``, ``outcome.ok``, ``outcome.sentence()``.

    Raises:
        ReparamError: the engine is not installed, or what it raises for bad options.
    """
    found = metadata.entry_points(group=GROUP, name="convert_zoo")
    try:
        engine = next(iter(found)).load()
    except (StopIteration, ImportError) as error:
        why = f" ({error})" if isinstance(error, ImportError) else ""
        raise ReparamError(f"batch conversion is not installed{why}: pip install 'reparam[zoo]'") from error
    outcomes: Iterator[Any] = engine(names, **options)
    return outcomes
