"""Data sets: what they hold, batches that can be had again, and errors that say what to do."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import struct
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from reparam import ReparamError
from zoo.train import data as module
from zoo.train.data import Data, DataError, load_data
from zoo.train.idx import PARTS, convert_json, read_idx

# ------------------------------------------------------------------------------------------------- contents


def everything(data: Data, *, train: bool) -> tuple[Tensor, Tensor]:
    """All samples in their order, as they come without an epoch."""
    images, labels = zip(*(data.train[i] if train else data.test[i] for i in range(size(data, train))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def size(data: Data, train: bool) -> int:
    return len(data.train if train else data.test)  # type: ignore[arg-type]


def test_the_digits_are_1500_and_297_others() -> None:
    data = load_data("digits")
    assert (data.shape, len(data.classes)) == ((1, 32, 32), 10)
    (train, labels), (test, _) = everything(data, train=True), everything(data, train=False)
    assert (len(train), len(test)) == (1500, 297)
    assert len(torch.unique(torch.cat([train, test]).flatten(1), dim=0)) == 1797
    assert set(labels.tolist()) == set(range(10))
    assert torch.equal(everything(load_data("digits"), train=False)[0], test)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_gets_the_channels_and_the_size_it_takes(name: str, channels: int) -> None:
    data = load_data(name, size=16, channels=channels)
    assert data.shape == data.train[0][0].shape == (channels, 16, 16)
    assert data.train[0][0].dtype == torch.float32
    assert type(data.train[0][0]) is Tensor
    if (name, channels) == ("digits", 3):
        assert torch.equal(data.train[0][0][0], load_data(name, size=16).train[0][0][0])


def test_synthetic_images_are_always_the_same_and_can_be_learnt() -> None:
    data = load_data("synthetic", size=8)
    torch.rand(3)  # whatever was drawn before
    assert torch.equal(data.train[5][0], load_data("synthetic", size=8).train[5][0])
    assert not torch.equal(data.train[5][0], data.test[5][0])
    model = nn.Linear(3 * 8 * 8, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for epoch in range(2):
        for images, labels in data.batches(train=True, batch=32, epoch=epoch):
            loss = F.cross_entropy(model(images.flatten(1)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    images, labels = everything(data, train=False)
    assert float((model(images.flatten(1)).argmax(1) == labels).float().mean()) > 0.9


# ------------------------------------------------------------------------------------------------- batches


def drawn(data: Data, **options: Any) -> list[Tensor]:
    return [images for images, _ in data.batches(train=True, batch=64, **options)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def shifted() -> Data:
    return load_data("digits", size=8, augment="cifar")


def test_an_epoch_can_be_had_again_whatever_was_drawn_in_between(shifted: Data) -> None:
    first = drawn(shifted, seed=1, epoch=2)
    torch.rand(5)
    assert same(first, drawn(shifted, seed=1, epoch=2))
    assert not same(first, drawn(shifted, seed=1, epoch=3))
    assert not same(first, drawn(shifted, seed=2, epoch=2))
    assert not same(first, drawn(shifted, seed=2, epoch=1))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_change_nothing(shifted: Data) -> None:
    assert same(drawn(shifted, epoch=4), drawn(shifted, epoch=4, workers=2))


def test_loading_leaves_the_generator_of_dropout_as_it_is(shifted: Data) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    drawn(shifted)
    list(shifted.batches(train=False, batch=100))
    assert torch.equal(torch.rand(3), expected)


def test_batches_to_train_on_are_full_and_those_to_test_with_complete(shifted: Data) -> None:
    train = [labels for _, labels in shifted.batches(train=True, batch=64)]
    assert [len(labels) for labels in train] == [64] * 23
    test = torch.cat([labels for _, labels in shifted.batches(train=False, batch=64)])
    assert test.dtype == torch.int64
    assert torch.equal(test, everything(shifted, train=False)[1])


# ------------------------------------------------------------------------------------------------- augmentation


def test_without_augmentation_an_epoch_is_the_images_in_another_order() -> None:
    data = load_data("digits", size=8)
    images = torch.cat(drawn(data, epoch=1)).flatten(1)
    known = {tuple(image.tolist()) for image in everything(data, train=True)[0].flatten(1)}
    assert {tuple(image.tolist()) for image in images} <= known


def test_shift_moves_each_image_by_an_eighth_at_most_and_fills_with_background() -> None:
    plain, shifted = (load_data("digits", size=16, augment=augment) for augment in ("none", "shift"))
    background = float(plain.train[0][0].min())
    places = set()
    for index in range(40):
        wide = F.pad(plain.train[index][0], (2, 2, 2, 2), value=background)
        crops = {(i, j): wide[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)}
        image = shifted.train[index][0]
        found = [place for place, crop in crops.items() if torch.allclose(crop, image)]
        assert found
        places.add(found[0])
    assert len(places) > 5


def test_cifar_also_mirrors() -> None:
    data = load_data("synthetic", size=4, augment="cifar")  # too small to be shifted
    original = load_data("synthetic", size=4).train[0][0]
    seen = [data.train[0][0] for _ in range(20)]
    mirrored = [torch.equal(image, original.flip(-1)) for image in seen]
    assert all(torch.equal(image, original) or flipped for image, flipped in zip(seen, mirrored, strict=True))
    assert 0 < sum(mirrored) < 20


@pytest.mark.parametrize("augment", ["shift", "cifar", "imagenet"])
def test_test_images_are_never_augmented(augment: str) -> None:
    data = load_data("digits", size=16, augment=augment)
    assert torch.equal(data.test[3][0], data.test[3][0])
    assert not all(torch.equal(data.train[0][0], data.train[0][0]) for _ in range(5))
    if augment != "imagenet":
        assert torch.equal(data.test[3][0], load_data("digits", size=16).test[3][0])


# ------------------------------------------------------------------------------------------------- folders


def write(path: Path, width: int = 12, height: int = 10, grey: int = 128) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (grey, grey, grey)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for grey, name in ((40, "cat"), (200, "dog")):
            for number in range(3):
                write(tmp_path / part / name / f"{number}.png", grey=grey)
    return tmp_path


def test_a_folder_has_its_classes_and_its_own_size(folder: Path) -> None:
    data = load_data(str(folder))
    assert (data.name, data.classes, data.shape) == (folder.name, ("cat", "dog"), (3, 10, 12))
    images, labels = next(iter(data.batches(train=False, batch=6)))
    assert images.shape == (6, 3, 10, 12)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    # ImageNet's mean and deviation of red
    assert float(images[0, 0, 0, 0]) == pytest.approx((40 / 255 - 0.485) / 0.229, abs=1e-5)


def test_test_is_as_good_a_name_as_val(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert size(load_data(str(folder)), train=False) == 6


def test_images_of_different_sizes_need_a_size(folder: Path) -> None:
    write(folder / "val" / "dog" / "wide.png", width=20)
    with pytest.raises(DataError, match=r"0\.png is 12x10 and .*wide\.png is 20x10: give a size"):
        load_data(str(folder))
    for augment in ("none", "cifar", "imagenet"):
        data = load_data(str(folder), size=8, augment=augment)
        for train in (True, False):
            images, _ = next(iter(data.batches(train=train, batch=4)))
            assert images.shape == (4, 3, 8, 8)


def test_imagenet_tests_with_the_middle(folder: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (16, 0, 48, 32))
    image.save(folder / "val" / "cat" / "0.png")
    shown = load_data(str(folder), size=28, augment="imagenet").test[0][0]
    assert float(shown[0].min()) == pytest.approx((1 - 0.485) / 0.229, abs=1e-2)


@pytest.mark.parametrize("options", [{}, {"size": 8}])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_image_that_cannot_be_read_is_named(folder: Path, options: dict[str, int], workers: int) -> None:
    (folder / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog.1\.png cannot be read as an image"):
        list(load_data(str(folder), **options).batches(train=True, batch=2, workers=workers))


def test_a_truncated_image_is_named(folder: Path) -> None:
    path = folder / "val" / "cat" / "2.png"
    write(path, 64, 64)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cat.2\.png cannot be read as an image"):
        list(load_data(str(folder), size=8).batches(train=False, batch=6))


def test_classes_must_be_the_same_in_both_parts(folder: Path) -> None:
    write(folder / "train" / "cow" / "0.png")
    with pytest.raises(DataError, match=r"the class 'cow' is in only one of train/ and val/"):
        load_data(str(folder))


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ((), r"no folder train/"),
        (("train/cat/0.png",), r"no folder val/.*val/ or test/"),
        (("train/0.png", "val/cat/0.png"), r"train has no classes"),
        (("train/cat/0.txt", "val/cat/0.png"), r"train.*cat"),
    ],
)
def test_a_folder_that_is_not_a_data_set_says_what_is_missing(
    tmp_path: Path, present: tuple[str, ...], words: str
) -> None:
    for name in present:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(DataError, match=words):
        load_data(str(tmp_path))


@pytest.mark.parametrize(("name", "words"), [("cifar", "did you mean cifar10"), ("no/such", "data sets: digits")])
def test_an_unknown_name_is_neither_folder_nor_data_set(name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_data(name)


# ------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_a_download_that_cannot_be_made_says_what_to_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name} is not in .* fetch http.* into .*'digits' needs no download"):
        load_data(name, root=tmp_path)


@pytest.mark.usefixtures("offline")
def test_mnist_that_is_there_is_not_downloaded(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 4), ("t10k", 2)):
        pixels = bytes([255]) * (count * 28 * 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    data = load_data("mnist", root=tmp_path, channels=3)
    assert (data.shape, len(data.classes), size(data, True), size(data, False)) == ((3, 28, 28), 10, 4, 2)
    image, label = data.train[3]
    assert label == 3
    assert torch.allclose(image, torch.full((3, 28, 28), (1 - 0.1307) / 0.3081), atol=1e-3)


@pytest.mark.usefixtures("offline")
def test_cifar_that_is_there_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = np.full((4, 3072), 255, np.uint8)

    def stored(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": pixels, "labels": [0, 1, 2, 3]}
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, attribute, [[attribute, stored(attribute, batch)]])
    names = {"label_names": [f"class {number}" for number in range(10)]}
    meta = {"filename": "meta", "key": "label_names", "md5": stored("meta", names)}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    data = load_data("cifar10", root=tmp_path, augment="cifar")
    assert (data.shape, data.classes[1]) == ((3, 32, 32), "class 1")
    image, label = data.test[2]
    assert label == 2
    assert float(image[0, 0, 0]) == pytest.approx((1 - 0.4914) / 0.2470, abs=1e-3)


def test_the_default_folder_is_the_persons_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []

    def refuse(name: str, root: Path, view: object) -> Data:
        asked.append(root)
        raise DataError(name)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module, "_downloaded", refuse)
    with pytest.raises(DataError, match="mnist"):
        load_data("mnist")
    assert asked == [tmp_path / ".cache" / "reparam"]


# ------------------------------------------------------------------------------------------------- IDX files


def idx(folder: Path, part: str, labels: list[int], *, packed: bool = False) -> None:
    """Images of 4x6 pixels, each as bright as its label."""
    count = len(labels)
    contents = {
        "images-idx3": struct.pack(">IIII", 2051, count, 4, 6) + b"".join(bytes([20 * label]) * 24 for label in labels),
        "labels-idx1": struct.pack(">II", 2049, count) + bytes(labels),
    }
    for name, content in contents.items():
        path = folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files_is_read(tmp_path: Path, packed: bool) -> None:
    idx(tmp_path, "train", [0, 2, 4], packed=packed)
    idx(tmp_path, "t10k", [1, 3], packed=packed)
    data = load_data(str(tmp_path))
    assert (data.shape, data.classes, size(data, True), size(data, False)) == ((1, 4, 6), tuple("01234"), 3, 2)
    assert [label for _, label in data.test] == [1, 3]
    values = torch.tensor([image.mean() for image, _ in data.train])
    assert torch.allclose(values, torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5, atol=1e-5)


def test_idx_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    idx(tmp_path, "train", [0, 2, 4])
    with pytest.raises(DataError, match="lacks images or labels of 't10k'"):
        load_data(str(tmp_path))
    idx(tmp_path, "t10k", [1, 3])
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(struct.pack(">II", 2049, 1) + bytes([1]))
    with pytest.raises(DataError, match="do not fit"):
        load_data(str(tmp_path))
    labels.write_bytes(struct.pack(">II", 2049, 7) + bytes([1]))
    with pytest.raises(ReparamError, match="t10k-labels-idx1-ubyte is no IDX file of 7 bytes"):
        load_data(str(tmp_path))
    labels.write_bytes(b"\0")
    with pytest.raises(ReparamError, match="cannot be read as an IDX file"):
        load_data(str(tmp_path))


def test_the_json_of_npm_becomes_idx_files(tmp_path: Path) -> None:
    """Every image comes back once, with its label, as bytes of the brightness that the file has in parts of one."""
    digits = tmp_path / "package" / "src" / "digits"
    digits.mkdir(parents=True)
    for digit in range(10):
        (digits / f"{digit}.json").write_text(json.dumps({"data": [digit / 10] * (784 * 3)}))
    convert_json(tmp_path / "package", tmp_path / "idx", test=6)
    found = [
        (int(image), int(label))
        for part in PARTS
        for image, label in zip(
            read_idx(tmp_path / "idx" / f"{part}-images-idx3-ubyte")[:, 0, 0],
            read_idx(tmp_path / "idx" / f"{part}-labels-idx1-ubyte"),
            strict=True,
        )
    ]
    assert sorted(found) == sorted((round(25.5 * digit), digit) for digit in range(10) for _ in range(3))
    data = load_data(str(tmp_path / "idx"))
    assert (size(data, True), size(data, False), data.shape) == (24, 6, (1, 28, 28))
    (digits / "7.json").write_text("{}")
    with pytest.raises(ReparamError, match=r"7\.json: not the digits"):
        convert_json(tmp_path / "package", tmp_path / "idx", test=6)
    (digits / "7.json").write_text((digits / "8.json").read_text())
    with pytest.raises(ReparamError, match="some have to be trained on"):
        convert_json(digits, tmp_path / "other", test=30)
    assert not (tmp_path / "other").exists()
