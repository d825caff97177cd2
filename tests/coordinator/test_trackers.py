"""Trackers with their real libraries, and what happens to a job when one of them fails or hangs: nothing."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import trackers as module
from coordinator.core import actions as act
from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.trackers import Ended, Guest, Points, Tracker, Trackers, TrackersConfig, points_of
from coordinator.trackers.wandb import WandB
from protocol.errors import BadConfig
from protocol.messages import Evaluated

PATIENCE_S = 120.0


def a_record(round_: int = 1, **changed: Any) -> RoundRecord:
    def share(loss: float) -> ShareRecord:
        found = Evaluated(version=round_ - 1, n_samples=int(10 * loss), n_tokens=99, loss=loss)
        return ShareRecord(state="DONE", loss=loss, bytes_up=100, bytes_down=50, train_s=3.0, evaluated=found)

    said: dict[str, Any] = {
        "round": round_,
        "attempt": 0,
        "purpose": "train",
        "version": round_ - 1,
        "outcome": "aggregated",
        "opened_at": 1000.0,
        "wall_s": 30.0,
        "loss": 2.5,
        "shares": {"anna": share(2.0), "berta": share(3.0), "clara": ShareRecord(state="TIMED_OUT")},
    }
    return RoundRecord(**said | changed)


def wishes(job: str, n_rounds: int) -> list[act.Wish]:
    rounds: list[act.Wish] = [act.Record(job=job, record=a_record(number)) for number in range(1, n_rounds + 1)]
    return [*rounds, act.Finish(job=job, phase="completed", reason="")]


def told(config: TrackersConfig, jobs: dict[str, int], folder: Path = Path("unused")) -> None:
    found = Trackers(config, "lab", folder)
    for job, n_rounds in jobs.items():
        found.happened([], wishes(job, n_rounds))
    found.close(PATIENCE_S)


def test_the_figures_of_a_round() -> None:
    trained, measured = points_of("j", a_record(3))
    assert (trained.step, measured.step) == (3, 2), "a held-out loss is of the version that the round began with"
    assert trained.at == 1030.0
    assert trained.values == {
        "round/seconds": 30.0,
        "round/agents_asked": 3.0,
        "round/agents_done": 2.0,
        "round/bytes_up": 200.0,
        "round/bytes_down": 100.0,
        "round/work_seconds": 6.0,
        "loss/train": 2.5,
    }
    assert measured.values == {"loss/held_out": pytest.approx((20 * 2.0 + 30 * 3.0) / 50)}
    by_agent = {name for points in points_of("j", a_record(), 2) for name in points.values if name.startswith("agent/")}
    assert {name.split("/")[1] for name in by_agent} == {"anna", "berta"}
    (last,) = points_of("j", a_record(5, purpose="evaluate", version=4))
    assert (last.step, set(last.values)) == (4, {"loss/held_out"})


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(TrackersConfig(tensorboard=str(tmp_path), per_agent=True), {"j": 3, "k": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "k"]
    found = EventAccumulator(str(tmp_path / "j"))
    found.Reload()
    assert [(e.step, e.value, e.wall_time) for e in found.Scalars("loss/train")] == [
        (n, 2.5, 1030.0) for n in (1, 2, 3)
    ]
    assert [e.step for e in found.Scalars("loss/held_out")] == [0, 1, 2]
    assert "agent/anna/bytes_up" in found.Tags()["scalars"]
    told(TrackersConfig(tensorboard=str(tmp_path)), {"j": 1})
    found.Reload()


def test_mlflow_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = (tmp_path / "runs").as_uri()
    told(TrackersConfig(mlflow=uri), {"j": 2})
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("fedpipe/lab")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("j", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss/train")
    assert sorted((one.step, one.value, one.timestamp) for one in history) == [(1, 2.5, 1030000), (2, 2.5, 1030000)]
    told(TrackersConfig(mlflow=uri), {"j": 1, "k": 1})
    assert len(client.search_runs([experiment.experiment_id])) == 2, "a job has one run, also after a restart"


def wandb_records(folder: Path) -> Iterator[Any]:
    """What W&B's own library finds in the files of its offline runs."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    for path in sorted(folder.rglob("*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            yield Record.FromString(data)


def test_wandb_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    told(TrackersConfig(wandb="team/fedpipe"), {"j": 2, "k": 1}, tmp_path)
    runs: dict[str, list[dict[str, Any]]] = {}
    exits = []
    for record in wandb_records(tmp_path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            shown = record.run
            assert (shown.entity, shown.project, shown.run_group) == ("team", "fedpipe", "lab")
            assert shown.host == "lab"
            points = runs.setdefault(f"{shown.run_id} {shown.display_name}", [])
        elif kind == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            points.append(items)
        elif kind == "exit":
            exits.append(record.exit.exit_code)
        assert kind not in {"environment", "output", "output_raw", "files", "stats"}, (
            "only the points leave the machine"
        )
    assert list(runs) == ["lab-j j", "lab-k k"]
    assert exits == [0, 0]
    trained = [(p["step"], p["loss/train"], p["_timestamp"]) for p in runs["lab-j j"] if "loss/train" in p]
    assert trained == [(1, 2.5, 1030.0), (2, 2.5, 1030.0)]
    assert [p["step"] for p in runs["lab-j j"] if "loss/held_out" in p] == [0, 1]


SILENT_WANDB = """
import logging, sys
from pathlib import Path
from coordinator.trackers import Points, Trackers, TrackersConfig
logging.basicConfig()
found = Trackers(TrackersConfig(wandb="p"), "lab", Path(sys.argv[1]))
found.guests[0].tell(Points("j", 1, {"a": 1.0}, 1000.0))
found.close(0.5)
"""


def test_a_silent_wandb_does_not_keep_the_coordinator_from_ending(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": 40 * "0", "WANDB_MODE": "online"}
        command = [sys.executable, "-c", SILENT_WANDB, str(tmp_path)]
        done = subprocess.run(command, env=env, stderr=subprocess.DEVNULL, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0


def test_a_process_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = WandB("p", "lab", tmp_path)
    tracker.log(Points("j", 1, {"a": 1.0}, 1000.0))
    assert tracker._process
    tracker._process.kill()
    with pytest.raises(EOFError, match="ended with -9"):
        tracker.log(Points("j", 2, {"a": 1.0}, 1000.0))
    tracker.log(Points("j", 3, {"a": 1.0}, 1000.0))
    tracker.close()
    steps = [
        json.loads(item.value_json)
        for record in wandb_records(tmp_path)
        for item in record.history.item
        if "step" in (item.key, *item.nested_key)
    ]
    assert steps[-1] == 3


def test_wandb_without_a_key_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    tracker = WandB("p", "lab", tmp_path)
    with pytest.raises(RuntimeError, match=r"No API key configured"):
        tracker.log(Points("j", 1, {"a": 1.0}, 1000.0))
    tracker.close()


# ------------------------------------------------------------------------------------------------- bad guests


class Bad:
    """A tracker whose library raises, or hangs until it is let go."""

    def __init__(self) -> None:
        self.n_calls, self.free, self.entered = 0, threading.Event(), threading.Event()
        self.raises: list[Exception] = []

    def log(self, points: Points) -> None:  # noqa: ARG002
        self.n_calls += 1
        self.entered.set()
        assert self.free.wait(PATIENCE_S)
        if self.raises:
            raise self.raises.pop(0)

    def end(self, ended: Ended) -> None:
        self.log(Points(ended.job, 0, {}, 0.0))

    def close(self) -> None:
        raise OSError("not even that")


@pytest.fixture
def bad() -> Iterator[Bad]:
    one = Bad()
    yield one
    one.free.set()


def test_a_tracker_that_hangs_is_not_waited_for(bad: Bad, caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest("bad", lambda: bad, max_waiting=2)
    for step in range(10):
        guest.tell(Points("j", step, {}, 0.0))
        if step == 0:
            assert bad.entered.wait(PATIENCE_S)
    assert guest.n_left_out == 7
    assert [r.action for r in caplog.records] == ["tracker_full"]  # type: ignore[attr-defined]
    guest.end()
    guest.wait(0.01)
    assert guest._thread.is_alive(), "it hangs still, and nobody waits for that"
    bad.free.set()
    guest.wait(PATIENCE_S)
    assert not guest._thread.is_alive()
    assert bad.n_calls == 2, "one that waited has made room for the end"


def test_a_tracker_that_fails_is_named_once_until_it_recovers(bad: Bad, caplog: pytest.LogCaptureFixture) -> None:
    bad.free.set()
    bad.raises = [KeyError("a"), KeyError("b"), ValueError("c\nd")]
    guest = Guest("bad", lambda: bad)
    for step in range(3):
        guest.tell(Points("j", step, {}, 0.0))
    guest.tell(Ended("j", "completed"))
    guest.end()
    guest.wait(PATIENCE_S)
    assert [r.error for r in caplog.records] == ["KeyError: 'a'", "OSError: not even that"]  # type: ignore[attr-defined]
    assert bad.n_calls == 4


def test_a_library_that_cannot_be_loaded_is_tried_again(caplog: pytest.LogCaptureFixture, bad: Bad) -> None:
    bad.free.set()
    loads: list[Tracker | Exception] = [ImportError("half installed"), bad]

    def load() -> Tracker:
        if isinstance(found := loads.pop(0), Exception):
            raise found
        return found

    guest = Guest("bad", load)
    for step in range(2):
        guest.tell(Points("j", step, {}, 0.0))
    guest.end()
    guest.wait(PATIENCE_S)
    assert bad.n_calls == 1
    assert "ImportError: half installed" in [getattr(r, "error", "") for r in caplog.records]


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _name: None)
    running = Trackers(TrackersConfig(), "lab", Path("unused"))
    for config in (TrackersConfig(tensorboard="x"), TrackersConfig(mlflow="x"), TrackersConfig(wandb="x")):
        with pytest.raises(BadConfig, match=r"pip install 'fedpipe\[(tensorboard|mlflow|wandb)\]'"):
            Trackers(config, "lab", Path("unused"))
        with pytest.raises(BadConfig, match="pip install"):
            running.renew(config)
    assert running.guests == []


def test_a_reload_exchanges_them(tmp_path: Path) -> None:
    found = Trackers(TrackersConfig(tensorboard=str(tmp_path / "a")), "lab", tmp_path)
    (first,) = found.guests
    found.happened([], wishes("j", 1))
    found.renew(TrackersConfig(tensorboard=str(tmp_path / "b")))
    found.happened([], wishes("j", 1))
    first.wait(PATIENCE_S)
    found.close(PATIENCE_S)
    assert all(list((tmp_path / name / "j").iterdir()) for name in "ab")
    assert logging.getLogger("coordinator.trackers").level == logging.NOTSET
