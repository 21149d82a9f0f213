"""The data sets that networks are trained on and tested with, and the batches of an epoch.

Which images an epoch's batches hold, and how each is augmented, follows from the seed, the epoch and the image alone: a
run that is taken up at the beginning of an epoch sees what it would have seen, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from reparam import ReparamError
from reparam.sources import near
from zoo.train.idx import PARTS, find_idx, read_idx

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DATA_SETS", "Data", "DataError", "Digits", "digits", "load_data"]

DATA_SETS = ("digits", "cifar10", "cifar100", "mnist", "synthetic")
"""Names of data sets; any other name is a folder."""
CACHE = Path("~/.cache/reparam")
TEST_FOLDERS = ("val", "test")
PAD = 8
"""An image is padded by this part of its size before it is cropped: 4 pixels of 32."""
MARGIN = 8 / 7
"""Size to which an image is resized, relative to the crop of its middle that is tested: 256 to 224."""

HELD_OUT = 297
"""Digits that are never trained on."""
DIGITS_SIZE = 32
SYNTHETIC = {"train": 1024, "test": 256}
SYNTHETIC_CLASSES, SYNTHETIC_SIZE = 10, 32
NOISE = 1.0
"""Deviation of the noise in synthetic images; that of a class's own pattern is 1."""

Sample = tuple[Tensor, int]


class DataError(ReparamError):
    """Images that are not there or cannot be used; the message says where and what to do."""


@dataclass(frozen=True)
class Data:
    """Images to train on and to test with.

    Args:
        name: of the data set, or of the folder.
        classes: names; labels are places in it.
        shape: (channels, height, width) of every image.
        train: samples (float32 image of ``shape``, normalised; label), augmented with torch's own random numbers.
        test: the same, never augmented.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: Dataset[Sample]
    test: Dataset[Sample]

    def batches(self, *, train: bool, batch: int, seed: int = 0, epoch: int = 0, workers: int = 0) -> DataLoader[Any]:
        """The batches of one epoch: float32 images ``(n, *shape)`` and int64 labels ``(n,)``.

        In training they are shuffled, augmented, and all of one size: images that do not fill the last batch wait for
        another epoch's order. In testing they are all images in their order.

        Args:
            train: which images.
            batch: n.
            seed: of the order and the augmentation.
            epoch: each has another order and augmentation.
            workers: processes that load images; 0: none but this one.
        """
        chosen = _Repeatable(self.train, seed, epoch) if train else self.test
        order = torch.randperm(_length(chosen), generator=_generator(seed, epoch)).tolist() if train else None
        return DataLoader(
            chosen,
            batch,
            sampler=order,
            drop_last=train,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=_generator(seed, epoch),  # or else it would draw from the generator that dropout uses
        )


def load_data(
    name: str,
    *,
    size: int | None = None,
    augment: str = "none",
    channels: int | None = None,
    root: str | Path | None = None,
) -> Data:
    """A data set by name, or a folder of images.

    - ``digits``: 1,797 handwritten digits that scikit-learn ships, 1,500 to train on; grey, upscaled from 8x8 to 32x32.
    - ``cifar10``, ``cifar100``, ``mnist``: downloaded by torchvision when they are not there.
    - ``synthetic``: noise over one pattern per class, ten classes, 32x32; made anew each time, always the same.
    - a folder with the four IDX files of MNIST or of a data set in its format, packed or not.
    - a folder with ``train/`` and ``val/`` or ``test/``, each with one folder of images per class, as for ImageNet.

    Args:
        name: one of :data:`DATA_SETS`, or the path of a folder.
        size: pixels of a side; default: the data's own.
        augment: as :class:`zoo.train.config.Config` has it.
        channels: 1 (grey) or 3, for networks that take only these; default: the data's own.
        root: folder of the data sets that are downloaded; default: ``~/.cache/reparam``.

    Raises:
        DataError: an unknown name, a folder without train/ or classes, images of several sizes without ``size``, an
            image that cannot be read, a download that cannot be made.
    """
    view = _View(size, augment, channels)
    if name == "digits":
        return _digits_data(view)
    if name == "synthetic":
        return _synthetic(view)
    if name in DATA_SETS:
        return _downloaded(name, Path(root or CACHE).expanduser(), view)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{name!r} is neither a folder nor a data set{near(name, DATA_SETS)}; data sets: {', '.join(DATA_SETS)}"
        )
    if find_idx(folder, PARTS[0], "images") is not None:
        return _idx(folder, view)
    return _folder(folder, view)


# ------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class _Pixels:
    """Mean and deviation of each channel of the images to train on, of pixels from 0 to 1."""

    mean: Sequence[float]
    deviation: Sequence[float]


@dataclass(frozen=True)
class _View:
    """How images are shown: size, augmentation and channels, each as for :func:`load_data`."""

    size: int | None
    augment: str
    channels: int | None

    def data(
        self,
        name: str,
        classes: Sequence[str],
        parts: tuple[Any, Any],
        shape: tuple[int, int, int],
        pixels: _Pixels | float,
    ) -> Data:
        """Raw samples as they are trained on and tested with.

        Args:
            name: of the data set.
            classes: names.
            parts: to train on and to test with; samples are (image, label).
            shape: of the raw images; where a size is asked for, they may have any.
            pixels: how to normalise PIL images; or the value of the background of float32 tensors that are normalised.
        """
        height, width = (self.size, self.size) if self.size else shape[1:]
        if self.augment == "imagenet":
            width = height  # it cuts out squares
        train, test = (
            _Shown(part, self._steps(shape[0], (height, width), pixels, augmented))
            for part, augmented in zip(parts, (True, False), strict=True)
        )
        return Data(name, tuple(classes), (self.channels or shape[0], height, width), train, test)

    def _steps(self, channels: int, size: tuple[int, int], pixels: _Pixels | float, augmented: bool) -> list[Any]:
        """Transforms of torchvision, none that does nothing: they cost more than what they do to a small image."""
        from torchvision.transforms import v2

        raw = isinstance(pixels, _Pixels)
        steps: list[Any] = [v2.ToImage()] if raw else []
        if self.augment == "imagenet" and augmented:
            steps += [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        elif self.augment == "imagenet":
            steps += [v2.Resize(round(size[0] * MARGIN)), v2.CenterCrop(size)]
        elif self.size and raw:
            steps.append(v2.Resize(size))
        if self.augment in ("shift", "cifar") and augmented:
            padding = [size[1] // PAD, size[0] // PAD]
            steps.append(v2.RandomCrop(size, padding, fill=0 if raw else pixels))
        if self.augment == "cifar" and augmented:
            steps.append(v2.RandomHorizontalFlip())
        if isinstance(pixels, _Pixels):
            steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(pixels.mean, pixels.deviation)]
        if self.channels not in (None, channels):
            steps.append(v2.Grayscale(self.channels))
        return [*steps, v2.ToPureTensor()] if raw else steps


class _Shown(Dataset[Sample]):
    """A data set's samples, the images through transforms."""

    def __init__(self, raw: Any, steps: Sequence[Any]) -> None:
        self.raw, self.steps = raw, steps

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.raw[index]
        for step in self.steps:
            image = step(image)
        return image, int(label)


class _Repeatable(Dataset[Sample]):
    """Samples of one epoch, whose augmentation depends on seed, epoch and index; torch's generator stays as it is."""

    def __init__(self, dataset: Dataset[Sample], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return _length(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(_generator(self.seed, self.epoch, index).get_state())
            return self.dataset[index]
        finally:
            torch.set_rng_state(before)


def _generator(*numbers: int) -> torch.Generator:
    """One that is seeded by all the numbers together."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def _length(dataset: Any) -> int:
    return len(dataset)


# ------------------------------------------------------------------------------------------------- digits


@dataclass(frozen=True)
class Digits:
    """Images ``(n, 3, size, size)`` of mean 0 and deviation 1, float32; labels 0 to 9."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(size: int = DIGITS_SIZE) -> Digits:
    """The digits of :func:`load_data` as tensors, with three equal channels, as networks for photographs take them.

    Raises :class:`DataError` if scikit-learn is not installed.
    """
    data = load_data("digits", size=size, channels=3)
    (train, train_labels), (test, test_labels) = (
        next(iter(DataLoader(dataset, _length(dataset)))) for dataset in (data.train, data.test)
    )
    return Digits(train, train_labels, test, test_labels)


def _digits_data(view: _View) -> Data:
    """Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), the test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits need scikit-learn ({error}): pip install 'reparam[zoo]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    mean, deviation = images.mean(), images.std()
    size = view.size or DIGITS_SIZE
    images = F.interpolate((images - mean) / deviation, size=(size, size), mode="bilinear")
    labels = found.target.tolist()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
    test, train = ([(images[i], labels[i]) for i in chosen] for chosen in (order[:HELD_OUT], order[HELD_OUT:]))
    names = [str(digit) for digit in range(10)]
    return view.data("digits", names, (train, test), (1, size, size), float(-mean / deviation))


# ------------------------------------------------------------------------------------------------- synthetic


class _Synthetic(Dataset[Sample]):
    """Images that are made when they are asked for; the test images come after those to train on."""

    def __init__(self, size: int, first: int, length: int) -> None:
        coarse = torch.randn((SYNTHETIC_CLASSES, 3, 4, 4), generator=_generator(0))
        self.patterns = F.interpolate(coarse, size=(size, size))
        self.first, self.length = first, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(index)
        label = index % SYNTHETIC_CLASSES
        pattern = self.patterns[label]
        noise = torch.randn(pattern.shape, generator=_generator(1, self.first + index))
        return (pattern + NOISE * noise) / (1 + NOISE**2) ** 0.5, label


def _synthetic(view: _View) -> Data:
    size = view.size or SYNTHETIC_SIZE
    train = _Synthetic(size, 0, SYNTHETIC["train"])
    test = _Synthetic(size, SYNTHETIC["train"], SYNTHETIC["test"])
    names = [f"pattern {number}" for number in range(SYNTHETIC_CLASSES)]
    return view.data("synthetic", names, (train, test), (3, size, size), 0.0)


# ------------------------------------------------------------------------------------------------- downloads

_PIXELS = {
    "cifar10": _Pixels((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _Pixels((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": _Pixels((0.1307,), (0.3081,)),
    "imagenet": _Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def _downloaded(name: str, root: Path, view: _View) -> Data:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name} needs torchvision ({error}): pip install 'reparam[zoo]'") from error
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "mnist": datasets.MNIST}[name]
    train, test = (_fetched(kind, name, root, train) for train in (True, False))
    shape = (1, 28, 28) if name == "mnist" else (3, 32, 32)
    return view.data(name, train.classes, (train, test), shape, _PIXELS[name])


def _fetched(kind: Any, name: str, root: Path, train: bool) -> Any:
    """A data set of torchvision, downloaded only if it is not there."""
    try:
        return kind(root, train=train)
    except RuntimeError:  # not there, or damaged
        pass
    try:
        return kind(root, train=train, download=True)
    # A download fails with errors of the system, of HTTP, or torchvision's own for a wrong checksum.
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        where, files = (root / "MNIST" / "raw", kind.mirrors[0]) if name == "mnist" else (root, kind.url)
        raise DataError(
            f"{name} is not in {root} and cannot be downloaded ({reason}); fetch {files} by other means into {where} "
            "(unpacked or not), or name with root a folder that has it; the data set 'digits' needs no download"
        ) from error


# ------------------------------------------------------------------------------------------------- IDX files


def _idx(folder: Path, view: _View) -> Data:
    from PIL import Image

    parts: list[list[tuple[Image.Image, int]]] = []
    arrays: list[Any] = []
    for part in PARTS:
        paths = [find_idx(folder, part, kind) for kind in ("images", "labels")]
        if None in paths:
            raise DataError(f"{folder} lacks images or labels of {part!r}: it takes the four IDX files of a data set")
        images, labels = (read_idx(path) for path in paths if path is not None)
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{folder}: {images.shape} images and {labels.shape} labels of {part!r} do not fit")
        parts.append([(Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)])
        arrays.append(images)
    pixels = _Pixels((float(arrays[0].mean()) / 255,), (float(arrays[0].std()) / 255,))
    classes = [str(label) for label in range(1 + max(label for part in parts for _, label in part))]
    return view.data(folder.resolve().name, classes, (parts[0], parts[1]), (1, *arrays[0].shape[1:]), pixels)


# ------------------------------------------------------------------------------------------------- folders


def _folder(folder: Path, view: _View) -> Data:
    test = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), folder / TEST_FOLDERS[0])
    parts = [_images(part) for part in (folder / "train", test)]
    first, second = (part.classes for part in parts)
    if first != second:
        odd = sorted(set(first) ^ set(second))[0]
        raise DataError(
            f"{folder}: the class {odd!r} is in only one of train/ and {test.name}/; labels would not agree"
        )
    size = (view.size, view.size) if view.size else _one_size(parts, folder)
    return view.data(folder.resolve().name, first, (parts[0], parts[1]), (3, *size), _PIXELS["imagenet"])


def _images(part: Path) -> Any:
    """The images of one part of a folder, as (PIL image in colours, label)."""
    from torchvision.datasets import ImageFolder

    if not part.is_dir():
        names = " or ".join(f"{name}/" for name in TEST_FOLDERS)
        raise DataError(f"{part.parent} has no folder {part.name}/; images lie in train/CLASS/ and {names} of the same")
    if not any(entry.is_dir() for entry in part.iterdir()):
        raise DataError(f"{part} has no classes: put the images of each class into a folder of its own in it")
    try:
        return ImageFolder(str(part), loader=_open)
    except FileNotFoundError as error:
        raise DataError(f"{part}: {error}") from error


def _open(path: str) -> Image.Image:
    with _opened(path) as image:
        return image.convert("RGB")


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image of a file, of which nothing but the size is read before it is asked for."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    # A damaged file fails in whatever way its format's reader does.
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def _one_size(parts: Sequence[Any], folder: Path) -> tuple[int, int]:
    """Height and width that all images have."""
    sizes: dict[tuple[int, int], str] = {}
    for path, _ in (sample for part in parts for sample in part.samples):
        with _opened(path) as image:
            sizes.setdefault(image.size, path)
        if len(sizes) > 1:
            one, other = (f"{path} is {width}x{height}" for (width, height), path in sizes.items())
            raise DataError(f"{folder} has images of different sizes, {one} and {other}: give a size")
    width, height = next(iter(sizes))
    return height, width
