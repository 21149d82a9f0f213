"""Checkpoints of training scripts, read without running anything of them.

``torch.load(weights_only=True)`` makes tensors and plain containers and refuses every other name in the file. Training
scripts put their settings beside the weights: a ``Namespace`` of arguments (timm, torchvision), paths, dates, numbers
of numpy, dictionaries of Lightning. For those names, and no others, something stands that takes any value and does
nothing: neither the class in the file nor its module is looked up.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from reparam.disk import FileError
from reparam.untrusted import check_size

__all__ = ["Inert", "load_pickle"]


class Inert:
    """Stands for a plain value of a checkpoint that nobody reads."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _dictionary(*args: Any) -> OrderedDict[Any, Any]:
    """An empty dictionary, whatever it would be made with; its content follows in the file."""
    return OrderedDict()


VALUES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib{m}.{n}Path" for m in ("", "._local") for n in ("", "Posix", "Windows", "PurePosix", "PureWindows")),
    *(f"datetime.{name}" for name in ("date", "time", "datetime", "timedelta", "timezone")),
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "str", "bool", "slice", "range")),
    *(f"numpy.{m}.multiarray.{name}" for m in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy._core.numeric._frombuffer",
    "numpy.core.numeric._frombuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{n}DType" for n in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64", "UInt8", "UInt32")),
)
"""Names for which an :class:`Inert` stands."""
DICTIONARIES = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "easydict.EasyDict",
    "addict.addict.Dict",
)
"""Names for which a dictionary stands."""


def load_pickle(path: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU, its settings as things without content.

    Raises:
        FileError: it is none, is damaged, unpacks to far more than its size, or holds more than plain values.
    """
    plain: list[Any] = [*((Inert, name) for name in VALUES), *((_dictionary, name) for name in DICTIONARIES)]
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                check_size(sum(member.file_size for member in packed.infolist()), path.stat().st_size)
        with warnings.catch_warnings(), torch.serialization.safe_globals(plain):
            # It warns of pickles that torch did not write before it refuses them, which is error enough.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise FileError(f"{path} is not a PyTorch file, or is damaged; write or download it again") from error
        name = re.search(r"GLOBAL (\S+) was not", str(error))
        what = f" (a {name[1]:.80})" if name else ""
        raise FileError(
            f"{path} holds more than tensors{what} and would have to be unpickled, which can run any code. Where you "
            "trust it, load it yourself and store only its weights: torch.save(model.state_dict(), ...)"
        ) from error
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (FileError, MemoryError):
        raise
    # A damaged pickle is a program that goes wrong anywhere.
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(
            f"{path} is truncated or is not a PyTorch file ({first}); write or download it again"
        ) from error
