"""A training state that is damaged in any way is passed over for the one before it, or refused in one line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import KINDS, damaged, outcome, parts, sealed, with_junk
from small_run import CONFIG, fresh, row, step, write_run
from torch import Tensor

from reparam import files
from zoo.train.checkpoint import CheckpointError, Folder
from zoo.train.state import State
from zoo.train.targets import find


def equal(one: State, other: State) -> bool:
    same = one.tensors.keys() == other.tensors.keys() and (one.epochs, one.settings) == (other.epochs, other.settings)
    return same and all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def wholes(folder: Folder) -> list[State]:
    """The last state and the one before it, as they were written."""
    contents = [files.load_state(path) for path in (folder.last, folder.previous)]
    return [State.read(content.tensors, content.metadata) for content in contents]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_state_is_passed_over_for_the_one_before_it(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is read is one of the two states that were written, to the bit."""
    folder, rng, passed = write_run(tmp_path / "run"), random.Random(0), 0
    last, previous = wholes(folder)
    content = folder.last.read_bytes()
    for part in parts(content, ".safetensors").values():
        for _ in range(15):
            changed = KINDS[kind](content, rng.choice(part), rng)
            folder.last.write_bytes(changed)
            caplog.clear()
            state = folder.read_state(CONFIG, fresh())
            assert state is not None
            if not caplog.records:
                assert equal(state, last)
                continue
            passed += 1
            assert changed != content
            assert equal(state, previous)
            (record,) = caplog.records
            assert "last.safetensors" in record.getMessage()
            assert record.getMessage().endswith("Going on from previous.safetensors, after epoch 1")
            assert record.getMessage().isprintable()
    assert passed > 40


def test_where_both_are_damaged_it_is_one_line(tmp_path: Path) -> None:
    folder, rng = write_run(tmp_path), random.Random(1)
    contents = {path: path.read_bytes() for path in (folder.last, folder.previous)}
    found = set()
    for _ in range(60):
        for path, content in contents.items():
            path.write_bytes(damaged(content, rng))
        found.add(outcome(lambda: folder.read_state(CONFIG, fresh())))
    assert found <= {"loaded", "refused"}
    for path in contents:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.safetensors .* and previous\.safetensors cannot be used either"):
        folder.read_state(CONFIG, fresh())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_values_of_other_types_are_refused_though_the_digest_is_right(optimizer: str, tmp_path: Path) -> None:
    folder, rng, refused = write_run(tmp_path, optimizer, epochs=1), random.Random(0), 0
    whole = files.load_state(folder.last)
    for key in ("config", "epochs", "settings"):
        value = json.loads(whole.metadata[key])
        for _ in range(60):
            sealed(folder.last, whole.tensors, whole.metadata | {key: json.dumps(with_junk(value, rng))})
            refused += goes_on(folder, optimizer) == "refused"
    assert refused > 120


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "3", '"x"', "NaN"])
@pytest.mark.parametrize("key", ["config", "epochs", "settings"])
def test_text_that_is_no_such_thing_is_refused(key: str, text: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, epochs=1)
    whole = files.load_state(folder.last)
    sealed(folder.last, whole.tensors, whole.metadata | {key: text})
    with pytest.raises(CheckpointError, match=f"last.safetensors cannot be used: it is damaged: its {key} cannot be"):
        folder.read_state(CONFIG, fresh())


def goes_on(folder: Folder, optimizer: str = "sgd") -> str:
    """What comes of reading the state and making a step from it."""
    run = fresh(optimizer)

    def go() -> None:
        state = folder.read_state(CONFIG, run)
        assert state is not None
        run.take(state)
        step(run)

    found = outcome(go)
    assert found in ("loaded", "refused"), found
    return found


TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "missing": lambda value: None,
    "one row more": lambda value: torch.cat([value[None], value[None]]),
    "another shape": lambda value: value.new_zeros(7, 3),
    "of no dimension": lambda value: value.new_zeros(()),
    "empty": lambda value: value.new_zeros(0),
    "integers": lambda value: value.to(torch.int8),
    "complex": lambda value: value.to(torch.complex64),
}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("how", TENSORS)
def test_tensors_of_another_kind_are_refused_though_the_digest_is_right(
    how: str, optimizer: str, tmp_path: Path
) -> None:
    folder, refused = write_run(tmp_path, optimizer, epochs=1), []
    whole = files.load_state(folder.last)
    for name, value in whole.tensors.items():
        changed = TENSORS[how](value)
        others = {key: other for key, other in whole.tensors.items() if key != name}
        sealed(folder.last, others | ({} if changed is None else {name: changed}), whole.metadata)
        if goes_on(folder, optimizer) == "refused":
            refused.append(name)
    weights = {name for name in whole.tensors if name.startswith(("model.", "ema.")) and "tracked" not in name}
    assert weights <= {*refused}


@pytest.mark.parametrize("key", ["config", "epochs", "settings", "digest"])
def test_a_state_without_a_part_of_its_note_is_refused(key: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, epochs=1)
    whole = files.load_state(folder.last)
    note = {name: text for name, text in whole.metadata.items() if name != key}
    if key == "digest":
        files.safetensors_torch(folder.last).save_file(whole.tensors, folder.last, metadata=note)
    else:
        sealed(folder.last, whole.tensors, note)
    with pytest.raises(CheckpointError, match=f"last.safetensors cannot be used: it is damaged.* no {key}"):
        folder.read_state(CONFIG, fresh())


def test_a_log_that_skips_an_epoch_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    whole = files.load_state(folder.last)
    rows = json.loads(whole.metadata["epochs"])
    sealed(folder.previous, whole.tensors, whole.metadata | {"epochs": json.dumps(rows[1:])})
    folder.last.unlink()
    with pytest.raises(CheckpointError, match="row 1 of its log"):
        folder.read_state(CONFIG, fresh())


def test_a_folder_in_the_place_of_a_state_is_named_before_an_epoch_is_lost(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    folder.last.unlink()
    folder.last.mkdir()
    with pytest.raises(CheckpointError, match=r"last\.safetensors is a folder .*remove it"):
        folder.read_state(CONFIG, fresh())
    folder.last.rmdir()
    state = folder.read_state(CONFIG, fresh())
    assert state is not None
    assert len(state.epochs) == 1


def test_a_run_killed_between_two_renames_goes_on_from_the_newest_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged last state is what became the previous one, so nothing but the next one is whole."""
    folder = write_run(tmp_path)
    folder.last.write_bytes(b"damaged")
    run = fresh()
    state = folder.read_state(CONFIG, run)
    assert state is not None
    run.take(state)
    step(run)
    rename = os.replace

    def killed(source: Any, target: Any) -> None:
        if target == folder.last:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.write_state(run.pack([*state.epochs, row(2)]), CONFIG, "", None)
    again = folder.read_state(CONFIG, fresh())
    assert again is not None
    assert len(again.epochs) == 2


def test_a_damaged_state_is_not_deployed(tmp_path: Path) -> None:
    folder = write_run(tmp_path, epochs=1)
    content = bytearray(folder.last.read_bytes())
    content[-1] ^= 64
    folder.last.write_bytes(content)
    with pytest.raises(files.FileError, match="content is not that of its digest"):
        find(str(folder.last))
