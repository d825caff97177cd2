"""What the coordinator must not forget: one contract in memory and on disk, and what only a disk can do to it."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.core import events as ev
from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.past import Past, extended
from coordinator.store import SCHEMA_VERSION, Entry, Store, Version
from protocol import SOFTWARE
from protocol.errors import BadConfig, Unavailable
from protocol.messages import Blob, Evaluated, ExecState, Level, Offer, Report
from tests.full_disk import largest_file

T0 = 1_750_000_000.0


def joined(number: int) -> ev.AgentJoined:
    return ev.AgentJoined(agent=f"a{number}", session=f"{number:016x}", methods=["qlora"])


def entries(store: Store, after: int = 0, **limits: int) -> list[Entry]:
    return list(store.replay(after, **limits))


def record(number: int, *, attempt: int = 0, outcome: str = "aggregated", purpose: str = "train") -> RoundRecord:
    found = Evaluated(version=number, n_samples=3, n_tokens=99, loss=1.5, metrics={"rouge": 0.5})
    shares = {"a": ShareRecord(state="DONE", samples=7, loss=2.5, bytes_up=100, evaluated=found)}
    return RoundRecord(
        round=number,
        attempt=attempt,
        purpose=purpose,  # type: ignore[arg-type]
        version=number - 1,
        outcome=outcome,
        opened_at=T0,
        wall_s=3.5,
        loss=2.5,
        shares=shares,
    )


def version(number: int, job: str = "j", master: str = "m") -> Version:
    blob = Blob(sha256="b" * 64, size=9, levels=[Level(rank=0, size=9, sha256="b" * 64)])
    return Version(job=job, version=number, round=number, master=master * 64, model=blob, dropped_ratio=0.25, at=T0)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    one = Store(":memory:" if request.param == "memory" else tmp_path / "journal.sqlite")
    yield one
    one.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


# ------------------------------------------------------------------------------------------------------- the contract


def test_an_empty_store_knows_nothing(store: Store) -> None:
    assert entries(store) == []
    assert store.last_at() == 0.0
    assert store.load_snapshot() is None
    assert list(store.rounds("j")) == []
    assert store.versions("j") == []


def test_events_come_back_in_order_and_from_any_place(store: Store) -> None:
    first = store.append([(T0, joined(1)), (T0, ev.Tick())])
    second = store.append([(T0 + 5, joined(2))])
    seqs = first + second
    assert seqs == sorted(set(seqs))
    assert [(e.seq, e.at, e.event) for e in entries(store)] == [
        (seqs[0], T0, joined(1)),
        (seqs[1], T0, ev.Tick()),
        (seqs[2], T0 + 5, joined(2)),
    ]
    assert [e.seq for e in entries(store, seqs[0])] == seqs[1:]
    assert [e.seq for e in entries(store, seqs[0], before=seqs[2])] == [seqs[1]]
    assert store.last_at() == T0 + 5
    assert store.append([]) == []


def test_every_kind_of_fact_survives_the_journal(store: Store) -> None:
    offer = Offer(job="j", round=1, attempt=0, kind="lora", blob=Blob(sha256="a" * 64, size=9), samples=3)
    facts: list[ev.Happened] = [
        joined(1),
        ev.AgentLeft(agent="a1", session="1" * 16, reason="will"),
        ev.AgentReported(agent="a1", report=Report(n_cpus=4, notes=["no GPU: naïve"])),
        ev.ShareMoved(agent="a1", job="j", round=1, attempt=0, serial=3, state=ExecState.TRAINING),
        ev.UpdateOffered(agent="a1", offer=offer),
        ev.UpdateStored(agent="a1", offer=offer),
        ev.UpdateSpoiled(agent="a1", offer=offer, reason="bad update"),
        ev.PlanFailed(job="j", round=1, attempt=0, reason="no target"),
        ev.Aggregated(job="j", round=1, attempt=0, version=1, model=offer.blob, master="c" * 64, dropped_ratio=0.5),
        ev.JobCancelled(job="j"),
        ev.Tick(),
    ]
    store.append([(T0, fact) for fact in facts])
    assert [e.event for e in entries(store)] == facts


def test_a_group_of_events_is_one_commit(store: Store) -> None:
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    store.append([(T0, joined(n)) for n in range(100)])
    assert sum(s.startswith("INSERT") for s in statements) == 100
    assert [s for s in statements if s.split()[0] in {"BEGIN", "COMMIT", "ROLLBACK"}] == ["BEGIN IMMEDIATE", "COMMIT"]


def test_a_group_is_journalled_whole_or_not_at_all(store: Store) -> None:
    def events() -> Iterator[tuple[float, ev.Happened]]:
        yield T0, joined(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.append(events())
    assert entries(store) == []
    store.append([(T0, joined(2))])
    assert [e.event for e in entries(store)] == [joined(2)]


def test_poison_is_never_replayed(store: Store) -> None:
    seqs = store.append([(T0, joined(n)) for n in range(3)])
    store.poison(seqs[1])
    store.poison(seqs[1])
    assert [e.seq for e in entries(store)] == [seqs[0], seqs[2]]
    assert store.append([(T0, joined(3))])[0] > seqs[2]


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa5event\xa4Nope", msgspec.msgpack.encode([1, 2])])
def test_a_row_that_cannot_be_read_becomes_poison(store: Store, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    seqs = store.append([(T0, joined(n)) for n in range(3)])
    store._db.execute("UPDATE journal SET body = ? WHERE seq = ?", (body, seqs[1]))
    for _ in range(2):
        assert [e.seq for e in entries(store)] == [seqs[0], seqs[2]]
    assert [vars(r)["seq"] for r in caplog.records] == [seqs[1]], "it is complained about once"


def test_the_last_snapshot_counts(store: Store) -> None:
    for seq, state in [(3, b"three"), (9, b"nine" * 1000), (9, b"again")]:
        store.save_snapshot(seq, state)
        assert store.load_snapshot() == (seq, state)
    assert [(s.seq, s.state, s.software) for s in store.snapshots()] == [
        (9, b"again", SOFTWARE),
        (3, b"three", SOFTWARE),
    ]
    assert [s.seq for s in store.snapshots(before=9)] == [3]


def test_rounds_are_written_once_and_failed_attempts_stay(store: Store) -> None:
    said = [
        record(2),
        record(1, attempt=1),
        record(1, outcome="quorum: 0 of 1"),
        record(2),
        record(3, purpose="evaluate"),
    ]
    for one in said:
        store.record("j", one)
    store.record("k", record(1))
    rounds = list(store.rounds("j"))
    assert [(r.round, r.attempt, r.purpose) for r in rounds] == [
        (1, 0, "train"),
        (1, 1, "train"),
        (2, 0, "train"),
        (3, 0, "evaluate"),
    ]
    assert rounds[0] == said[2]
    assert len(list(store.rounds("k"))) == 1


def test_any_stretch_of_a_long_history_can_be_read(store: Store) -> None:
    said = [record(number) for number in range(1, 12)]
    for one in said:
        store.record("j", one)
    for skip, end in itertools.product(range(13), range(13)):
        assert list(store.rounds("j", skip, end)) == said[skip:end]
    assert list(store.rounds("j", 3)) == said[3:]
    assert [store.round("j", r.round, r.attempt, r.purpose) for r in said] == said
    assert store.round("j", 99, 0, "train") is None


def test_the_past_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    rounds = Store.rounds

    def watched(self: Store, job: str, skip: int = 0, end: int = 2**62) -> Iterator[RoundRecord]:
        for one in rounds(self, job, skip, end):
            read.append((job, one.round))
            yield one

    monkeypatch.setattr(Store, "rounds", watched)
    said = [record(number) for number in range(1, 7)]
    for one in said[:5]:
        store.record("j", one)
    for name in ("j", "j", "k", "j"):
        assert store.past(name) == extended(Past(), said[:5] if name == "j" else [])
    store.record("j", said[5])
    assert store.past("j") == extended(Past(), said)
    assert read == [("j", number) for number in range(1, 7)]
    for other in "klmn":
        store.past(other)
    assert store.past("j") == extended(Past(), said)
    assert len(read) == 12, "no more than a few jobs are held"


def test_versions_are_written_once(store: Store) -> None:
    for one in [version(2), version(1), version(1, master="n"), version(1, job="k")]:
        store.add_version(one)
    assert store.versions("j") == [version(1, master="n"), version(2)]
    assert store.versions("k") == [version(1, job="k")]


@settings(max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.lists(st.integers(0, 99), max_size=5),
            st.sampled_from(["fail", "poison", "snapshot"]),
        ),
        max_size=12,
    )
)
def test_it_does_what_a_list_would(steps: list[list[int] | str]) -> None:
    store, model, snapshot = Store(":memory:"), dict[int, int](), None
    for step in steps:
        if isinstance(step, list):
            model |= dict(zip(store.append([(T0 + n, joined(n)) for n in step]), step, strict=True))
        elif step == "fail":
            with pytest.raises(KeyError):
                store.append((T0, {0: joined(0)}[n]) for n in range(2))
        elif step == "poison" and model:
            store.poison(max(model))
            del model[max(model)]
        elif step == "snapshot":
            snapshot = (max(model, default=0) if not snapshot else max([*model, snapshot[0]]), str(model).encode())
            store.save_snapshot(*snapshot)
        assert {e.seq: e.event for e in store.replay()} == {seq: joined(n) for seq, n in model.items()}
        assert store.load_snapshot() == snapshot
    store.close()


def test_many_threads_lose_nothing(store: Store) -> None:
    def work(worker: int) -> list[int]:
        seqs = []
        for n in range(10):
            seqs += store.append([(T0, joined(100 * worker + n)), (T0, ev.Tick())])
            store.record(f"w{worker}", record(n))
            store.save_snapshot(seqs[-1], b"state")
        return seqs

    with ThreadPoolExecutor(4) as pool:
        seqs = sorted(seq for found in pool.map(work, range(4)) for seq in found)
    assert [e.seq for e in entries(store)] == seqs
    assert len(set(seqs)) == 80
    assert all(len(list(store.rounds(f"w{worker}"))) == 10 for worker in range(4))


# ------------------------------------------------------------------------------------------------------------ on disk


def test_everything_is_there_after_reopening(path: Path) -> None:
    store = Store(path)
    seqs = store.append([(T0, joined(n)) for n in range(3)])
    store.poison(seqs[0])
    store.save_snapshot(seqs[1], b"state")
    store.record("j", record(1))
    store.add_version(version(1))
    store.close()
    for _ in range(2):
        again = Store(path)
        assert [e.seq for e in entries(again)] == seqs[1:]
        assert again.load_snapshot() == (seqs[1], b"state")
        assert list(again.rounds("j")) == [record(1)]
        assert again.versions("j") == [version(1)]
        assert again.last_at() == T0
        again.close()


def test_a_place_is_never_used_twice(path: Path) -> None:
    store = Store(path)
    seqs = store.append([(T0, joined(n)) for n in range(3)])
    store._db.execute("DELETE FROM journal")
    store.close()
    assert Store(path).append([(T0, joined(1))])[0] > seqs[-1]


def test_poison_is_left_out_even_where_the_disk_does_not_let_it_be_marked(path: Path) -> None:
    store = Store(path)
    seqs = store.append([(T0, joined(n)) for n in range(2)])
    with largest_file(path.with_name("journal.sqlite-wal").stat().st_size):
        store.poison(seqs[0])
        assert [e.seq for e in entries(store)] == [seqs[1]]


def test_a_newer_format_is_refused_and_left_alone(path: Path) -> None:
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(BadConfig, match="newer fedpipe"):
        Store(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"not a database " * 1000)
    with pytest.raises(BadConfig, match="not a database"):
        Store(path)
    assert path.read_bytes() == b"not a database " * 1000


def test_a_folder_that_is_not_there_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="nowhere"):
        Store(tmp_path / "nowhere" / "journal.sqlite")


WRITES: dict[str, Callable[[Store], object]] = {
    "one event": lambda store: store.append([(T0, joined(7))]),
    "more than fits into memory": lambda store: store.append(
        (T0, ev.AgentLeft(agent="a", session="1" * 16, reason="x" * 50_000)) for _ in range(100)
    ),
    "a snapshot": lambda store: store.save_snapshot(1, b"x" * 100_000),
    "a round": lambda store: store.record("j", record(1)),
    "a version": lambda store: store.add_version(version(1)),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_said_clearly_and_the_store_goes_on_afterwards(path: Path, what: str) -> None:
    store = Store(path)
    kept = store.append([(T0, joined(1))])
    with largest_file(max(p.stat().st_size for p in path.parent.iterdir()) + 100):
        for _ in range(3):
            with pytest.raises(Unavailable, match="make room"):
                WRITES[what](store)
    assert [e.seq for e in entries(store)] == kept, "nothing is half written"
    assert store.load_snapshot() is None
    assert list(store.rounds("j")) == store.versions("j") == []
    kept += store.append([(T0, joined(2))])
    WRITES[what](store)
    store.close()
    assert {2} <= {int(e.event.agent[1:] or 0) for e in entries(Store(path)) if isinstance(e.event, ev.AgentJoined)}


# ------------------------------------------------------------------------------------------------------------ kill -9

WRITER = """
import os, signal, sys
from coordinator.core import events as ev
from coordinator.store import Store
store, last = Store(sys.argv[1]), 0
def event(n): return ev.AgentJoined(agent=f"a{n}", session=f"{n:016x}", methods=["qlora"])
"""
FOR_EVER = """
while True:
    seqs = store.append([(1e9 + last + i, event(last + i)) for i in range(1, 4)])
    store.save_snapshot(seqs[-1], b"%d" % seqs[-1])
    last = seqs[-1]
    print(last, flush=True)
"""
IN_THE_MIDDLE = """
def some():
    for n in (4, 5, 6):
        yield 1e9, event(n)
    os.kill(os.getpid(), signal.SIGKILL)
print(store.append([(1e9 + n, event(n)) for n in (1, 2, 3)])[-1], flush=True)
store.append(some())
"""


def writer(path: Path, script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER + script, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("n_groups", [1, 20])
def test_killed_at_any_moment_nothing_acknowledged_is_lost(path: Path, n_groups: int) -> None:
    process = writer(path, FOR_EVER)
    assert process.stdout is not None
    promised = [int(process.stdout.readline()) for _ in range(n_groups)]
    process.kill()
    promised += [int(line) for line in process.stdout.read().split()]
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    for _ in range(2):
        store = Store(path)
        found = entries(store)
        assert [e.seq for e in found] == list(range(1, len(found) + 1))
        assert [e.event for e in found] == [joined(e.seq) for e in found]
        assert len(found) >= promised[-1]
        assert len(found) % 3 == 0, "a group is there whole or not at all"
        snapshot = store.load_snapshot()
        assert snapshot is not None
        assert snapshot[0] >= promised[-1]
        assert snapshot[1] == str(snapshot[0]).encode()
        store.close()
    assert Store(path).append([(T0, joined(1))]) == [len(found) + 1]


def test_killed_in_the_middle_of_a_group_the_group_is_not_there(path: Path) -> None:
    process = writer(path, IN_THE_MIDDLE)
    out, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert int(out) == 3
    for _ in range(2):
        store = Store(path)
        assert [e.event for e in entries(store)] == [joined(n) for n in (1, 2, 3)]
        store.close()
