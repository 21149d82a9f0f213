"""Batch conversion on a cluster: a real one of two workers on this machine, one of which is killed in mid-run."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reparam import ReparamError
from reparam.cli import app
from reparam.networks import UsageError
from zoo.journal import Folder, Journal, read
from zoo.outcome import Converted, Failed, NothingToDo, TimedOut
from zoo.run import Run, convert_zoo

MORE = '''
import multiprocessing

class ClusterSource(Source):
    """Two more networks: one at which the test kills the worker, one that kills its worker each time."""
    def names(self):
        return [*super().names(), "victim", "deadly"]
    def create(self, name, *, pretrained, **options):
        worker = multiprocessing.parent_process().pid
        mark = os.environ["VICTIM"]
        if name == "victim" and not os.path.exists(mark):
            with open(mark + ".new", "w") as file:
                file.write(str(worker))
            os.rename(mark + ".new", mark)
            time.sleep(600)
        if name == "deadly":
            os.kill(worker, 9)
            time.sleep(600)
        return super().create("block" if name == "victim" else name, pretrained=pretrained, **options)

source = ClusterSource()
'''


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line and return all that it printed."""
    result = CliRunner().invoke(app, ["zoo", "convert", "--source", "crowd", *(str(each) for each in arguments)])
    assert result.exit_code == status, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The networks of the other tests of batch conversion and two more, as a package; returns its folder."""
    folder = tmp_path_factory.mktemp("crowd")
    info = folder / "crowd_zoo-1.0.dist-info"
    info.mkdir()
    from troublesome_package import CODE  # which other modules have as a plugin, to be imported by pytest first

    (folder / "crowd_zoo.py").write_text(CODE + MORE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crowd-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[reparam.sources]\ncrowd = crowd_zoo:source\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("TROUBLE_LOG", str(folder / "built.txt"))
        patch.setenv("VICTIM", str(folder / "victim"))
        yield folder


@pytest.fixture(scope="module")
def cluster(crowd: Path) -> Iterator[Any]:
    """Two workers with a thread each."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as started:
        yield started


def pids(cluster: Any) -> set[int]:
    """Of the workers."""
    return {nanny.process.pid for nanny in cluster.workers.values()}


@pytest.mark.slow
def test_a_run_that_is_left_early_ends_what_the_workers_do(cluster: Any, tmp_path: Path) -> None:
    address = cluster.scheduler_address
    iterator = convert_zoo(["hang", "block", "raise"], source="crowd", out=tmp_path, cluster=address)
    assert next(iterator).name == "block"
    with cluster.get_client() as client:
        assert client.run(_children) != dict.fromkeys(client.nthreads(), 0)
        iterator.close()  # type: ignore[attr-defined]
        _wait(lambda: not any(client.run(_children).values()))
    with Journal(tmp_path):
        pass  # the folder is free again


def _children() -> int:
    return len(multiprocessing.active_children())


def _wait(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_workers_with_other_versions_are_refused(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.cluster.versions", lambda: {"torch": "0.4.1", "reparam": "0.0.1"})
    with pytest.raises(
        UsageError, match=r"worker tcp.* has .*torch 2\..*this machine .*reparam 0\.0\.1.*torch 0\.4\.1"
    ):
        list(convert_zoo(["block"], source="crowd", out=tmp_path / "run", cluster=cluster.scheduler_address))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_the_workers_do_not_share_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers are elsewhere, so this path is another folder for them
    address = cluster.scheduler_address
    text = run("block", "--out", "/proc/self/cwd/run", "--cluster", address, status=2)
    assert "not on a file system that the workers share" in text
    assert list((tmp_path / "run").iterdir()) == []
    assert [o.kind for o in convert_zoo(["block"], source="crowd", cluster=address)] == ["converted"]


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(cluster: Any, crowd: Path, tmp_path: Path) -> None:
    before, killed, seen = pids(cluster), [], set()

    def watch(run: Run) -> None:
        seen.update((each.job.name, each.stage) for each in run.running)
        if not killed and (crowd / "victim").exists():
            killed.append(int((crowd / "victim").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    names = ["victim", "slow0", "abort", "hang", "slow1", "linear", "slow2"]
    options: dict[str, Any] = {"source": "crowd", "out": tmp_path / "run", "cluster": cluster.scheduler_address}
    outcomes = list(convert_zoo(names, timeout=8, on_tick=watch, **options))
    assert len(killed) == 1
    assert killed[0] in before
    assert len(before & pids(cluster)) == 1, "a crash and a hang of a model leave the other worker as it is"
    assert {"build", "collapse"} <= {stage for _, stage in seen}
    assert {(o.name, type(o)) for o in outcomes} == {
        *((name, Converted) for name in ("victim", "slow0", "slow1", "slow2")),
        ("abort", Failed),
        ("hang", TimedOut),
        ("linear", NothingToDo),
    }
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["record"] == "outcome"] == [o.name for o in outcomes]
    assert len(outcomes) == len(names)
    assert (lines[0]["limits"]["jobs"], lines[-1]["record"]) == (2, "end")
    assert "2 workers" in lines[0]["machine"]
    assert read(tmp_path / "run").outcomes == {o.spec: o for o in outcomes}
    assert not list(Folder(tmp_path / "run").running.iterdir())

    built = (crowd / "built.txt").read_text()
    assert Counter(built.split()).keys() == {"slow0", "slow1", "slow2"}
    again = run(*names, "--out", tmp_path / "run", "--cluster", options["cluster"], "--resume", status=1)
    assert "4 converted, 1 nothing to do, 1 failed, 1 timed out" in again
    assert "7/7" not in again, "nothing was done again"
    assert (crowd / "built.txt").read_text() == built


@pytest.mark.slow
def test_a_model_that_kills_its_workers_is_a_failure_and_no_other_is_blamed(cluster: Any, tmp_path: Path) -> None:
    # Not each death of a worker need be waited for; and what only waited beside the model would be blamed at once.
    cluster.scheduler.allowed_failures = 0
    names = ["deadly", "plain", "block", "batch", "linear"]
    outcomes = convert_zoo(names, source="crowd", out=tmp_path, cluster=cluster.scheduler_address)
    found = {outcome.name: outcome for outcome in outcomes}
    assert [name for name in names if not found[name].ok] == ["deadly"]
    deadly = found["deadly"]
    assert isinstance(deadly, Failed)
    assert "its worker died" in deadly.error
    assert deadly.stage in ("start", "build")  # the last stage heard of: a worker may die before it has told the next
    assert not list(Folder(tmp_path).running.iterdir())


def test_a_cluster_that_is_not_there_is_said_at_once(
    crowd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("zoo.cluster.PATIENCE", 1.0)
    for address in ("tcp://127.0.0.1:1", "nowhere://x", "not an address"):
        assert address in run("block", "--out", tmp_path / "run", "--cluster", address, status=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # where other tests keep both cores busy, distributed may give up on its own thread after 10 s
def test_a_cluster_without_workers_is_said_at_once(
    crowd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("zoo.cluster.PATIENCE", 1.0)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0", protocol="tcp") as empty,
        pytest.raises(UsageError, match="no workers"),
    ):
        list(convert_zoo(["block"], source="crowd", cluster=empty.scheduler_address))


@pytest.mark.slow
def test_a_cluster_that_goes_in_mid_run_is_said(crowd: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=":0", protocol="tcp") as going:
        iterator = convert_zoo(["hang", "linear"], source="crowd", out=tmp_path, cluster=going.scheduler_address)
        assert next(iterator).name == "linear"
        going.close()
        with pytest.raises(ReparamError, match=r"is gone; .*--resume"):
            next(iterator)
    assert list(read(tmp_path).outcomes) == ["crowd:linear"]


def test_jobs_are_for_this_machine_only(crowd: Path, tmp_path: Path) -> None:
    assert "--jobs" in run("block", "--out", tmp_path / "run", "--cluster", "tcp://x:1", "--jobs", "2", status=2)


def test_without_the_engine_the_extra_is_named(crowd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "zoo.cluster", raising=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ReparamError, match=r"distributed.*pip install 'reparam\[cluster\]'"):
        convert_zoo(["block"], source="crowd", cluster="tcp://x:1")
