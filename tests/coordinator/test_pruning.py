"""Pruning: what is needed stays whatever the quota, the rest goes as [keep] says, and a crash in the middle loses nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import pruning
from coordinator.config import Keep
from coordinator.core import events as ev
from coordinator.core.state import Contribution, Phase
from coordinator.pruning import MIN_FRAMES, Cut, Inventory, Need, choose, need_of, prune, sweep, used_files
from coordinator.recovery import recover, references
from coordinator.store import Frame, Store, Version
from coordinator.versions import pick
from protocol.blobs import Blobs
from protocol.errors import BadConfig, Unavailable
from protocol.messages import Blob
from tests.coordinator.daemon.stage import GOOD, PHASES, Stage, job_spec, undisturbed

T0 = 1_750_000_000.0


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def version(job: str, number: int, at: float = T0, n_updates: int = 2, tag: str = "") -> Version:
    model = sha(f"{job}/{number}/model{tag}")
    updates = [
        Contribution(agent=a, round=number, attempt=0, sha256=sha(f"{job}/{number}/{a}"), size=10, weight=1.0)
        for a in "abcdef"[:n_updates]
    ]
    blob = Blob(sha256=model, size=10)
    master = sha(f"{job}/{number}/master{tag}")
    return Version(
        job=job, version=number, round=number, master=master, model=blob, dropped_ratio=0, at=at, updates=updates
    )


# ---------------------------------------------------------------------------------------------------------------- laws


@st.composite
def histories(draw: st.DrawFn) -> tuple[Inventory, Keep, Need, int]:
    """Jobs with versions of any size, some as the core knows them and some newer, snapshots, and a quota."""
    versions, best, settled, running, needed = [], dict[str, int](), dict[str, int](), set[str](), set[str]()
    at = T0
    for job in draw(st.lists(st.sampled_from("jkl"), unique=True)):
        n, first = draw(st.integers(1, 8)), draw(st.integers(1, 3))
        mine = []
        for number in range(first, first + n):
            at += draw(st.floats(0, 100))
            same = "same" if draw(st.booleans()) else ""  # a round that changes nothing gives the same bytes
            one = version(job, 0 if same else number, at, draw(st.integers(0, 3)), same)
            mine.append(msgspec.structs.replace(one, version=number))
        versions += mine
        settled[job] = draw(st.integers(mine[-1].version - 1, mine[-1].version))
        current = [v for v in mine if v.version == settled[job]]
        needed |= {d for v in current for d in (v.master, v.model.sha256)}
        if draw(st.booleans()):
            running.add(job)
            needed |= {sha(f"{job}/open/{n}") for n in range(draw(st.integers(0, 3)))}
        if draw(st.booleans()):
            best[job] = draw(st.sampled_from(mine)).version
    digests = needed | {d for v in versions for d in (v.master, v.model.sha256, *(c.sha256 for c in v.updates))}
    sizes = {d: draw(st.integers(0, 100)) for d in sorted(digests)}
    frames = [Frame(10 * n + 10, T0 + n, draw(st.integers(1, 200))) for n in range(draw(st.integers(0, 6)))]
    keep = Keep(
        versions=draw(st.integers(1, 5)),
        ended_versions=draw(st.integers(1, 5)),
        update_rounds=draw(st.integers(0, 3)),
        replay_rounds=draw(st.integers(2, 5)),
        replay_bytes=draw(st.sampled_from([0, 300, 2**30])),
    )
    there = Inventory(
        sorted(versions, key=lambda v: (v.job, v.version)), sizes, best, frames, draw(st.integers(0, 100))
    )
    return there, keep, Need(needed, settled, running), draw(st.integers(0, 3000))


def left(there: Inventory, need: Need, cut: Cut) -> tuple[set[str], int]:
    """Digests that stay, and the bytes of everything that stays."""
    stay = set(need.digests)
    for v in there.versions:
        key = (v.job, v.version)
        stay |= set() if key in cut.versions else {v.master, v.model.sha256}
        stay |= set() if key in cut.updates or key in cut.versions else {c.sha256 for c in v.updates}
    frames = [f for f in there.frames if f.seq >= cut.before_seq]
    return stay, there.other_bytes + sum(f.n_bytes for f in frames) + sum(there.sizes.get(d, 0) for d in stay)


@given(histories())
def test_nothing_that_is_needed_goes_whatever_the_quota(drawn: tuple[Inventory, Keep, Need, int]) -> None:
    there, keep, need, max_bytes = drawn
    cut = choose(there, keep, need, max_bytes)
    for job in {v.job for v in there.versions}:
        mine = [v for v in there.versions if v.job == job]
        assert (job, mine[-1].version) not in cut.versions, "the newest of a job stays"
        assert not {(job, v.version) for v in mine if v.version > need.settled[job]} & (cut.versions | cut.updates)
    files = {(v.job, v.version): {v.master, v.model.sha256} for v in there.versions}
    assert not set().union(*(files[key] for key in cut.versions)) & need.digests
    kept = [f.seq for f in there.frames if f.seq >= cut.before_seq]
    assert len(kept) >= min(2, len(there.frames))
    assert not cut.before_seq or kept[0] == cut.before_seq, "the journal is cut at a snapshot"
    assert cut.versions <= cut.updates, "updates do not outlive what they made"


@given(histories())
def test_the_total_is_within_the_quota_or_all_that_is_left_is_needed(
    drawn: tuple[Inventory, Keep, Need, int],
) -> None:
    there, keep, need, max_bytes = drawn
    cut = choose(there, keep, need, max_bytes)
    _, total = left(there, need, cut)
    if total > max_bytes:
        assert len([f for f in there.frames if f.seq >= cut.before_seq]) <= 2
        for v in there.versions:
            settled = v.version <= need.settled[v.job]
            newest = v.version == max(w.version for w in there.versions if w.job == v.job)
            current = {v.master, v.model.sha256} & need.digests
            assert (v.job, v.version) in cut.versions or newest or current or not settled
            assert (v.job, v.version) in cut.updates or not v.updates or not settled
    again = choose(there, keep, need, total)
    assert left(there, need, again)[1] <= max(total, max_bytes), "a quota that is kept is kept again"


@given(histories())
def test_without_a_quota_the_counts_hold_and_no_more_goes(drawn: tuple[Inventory, Keep, Need, int]) -> None:
    there, keep, need, _ = drawn
    cut = choose(there, keep, need, 10**9)
    for job in {v.job for v in there.versions}:
        mine = [v.version for v in there.versions if v.job == job]
        n = keep.versions if job in need.running else keep.ended_versions
        assert not {(job, number) for number in mine[-n:]} & cut.versions
        assert (job, there.best.get(job, -1)) not in cut.versions
        assert not {(job, number) for number in mine[len(mine) - keep.update_rounds :]} & cut.updates - cut.versions
    stay = [f for f in there.frames if f.seq >= cut.before_seq]
    assert stay == there.frames[len(there.frames) - len(stay) :]
    assert min(len(there.frames), MIN_FRAMES) <= len(stay) <= keep.replay_rounds
    assert len(stay) <= MIN_FRAMES or sum(f.n_bytes for f in stay) <= keep.replay_bytes
    if len(stay) < min(len(there.frames), keep.replay_rounds):
        assert sum(f.n_bytes for f in there.frames[-len(stay) - 1 :]) > keep.replay_bytes, "one more had been allowed"


def test_the_oldest_goes_first_and_the_best_last() -> None:
    versions = [version("j", n, T0 + n, 0) for n in range(1, 6)]
    sizes = {d: 10 for v in versions for d in (v.master, v.model.sha256)}
    there = Inventory(versions, sizes, {"j": 2}, [], 0)
    need = Need({versions[-1].master}, {"j": 5}, {"j"})
    gone = [choose(there, Keep(), need, quota).versions for quota in (100, 80, 60, 40, 0)]
    assert [{number for _, number in cut} for cut in gone] == [set(), {1}, {1, 3}, {1, 3, 4}, {1, 2, 3, 4}]


def test_where_the_disk_gets_tight_past_rounds_go_and_nothing_else() -> None:
    versions = [version("j", n, T0 + n, 1) for n in range(1, 4)]
    sizes = {d: 10 for v in versions for d in (v.master, v.model.sha256, *(c.sha256 for c in v.updates))}
    there = Inventory(versions, sizes, {}, [Frame(10 * n, T0 - 9 + n, 100) for n in range(1, 6)], 0)
    keep, need = Keep(update_rounds=9), Need(set(), {"j": 3}, {"j"})
    for history_bytes, before_seq in ((500, 0), (499, 20), (250, 40), (0, 40), (-10, 40)):
        assert choose(there, keep, need, 10**9, history_bytes) == (set(), set(), before_seq)


# ------------------------------------------------------------------------------------------------------------- on disk


def fill(folder: Path, n_versions: int = 6) -> tuple[Store, Blobs, Need]:
    """A store with versions, their files, a snapshot and some journal for each."""
    store, blobs = Store(folder / "journal.sqlite"), Blobs(folder / "blobs")
    for number in range(1, n_versions + 1):
        updates = [
            Contribution(
                agent=a, round=number, attempt=0, sha256=blobs.put_bytes(f"{number}{a}".encode()), size=2, weight=1
            )
            for a in "ab"
        ]
        files = [blobs.put_bytes(f"{kind} {number}".encode() * 1000) for kind in ("master", "model")]
        model = Blob(sha256=files[1], size=9)
        store.add_version(
            Version(
                job="j",
                version=number,
                round=number,
                master=files[0],
                model=model,
                dropped_ratio=0,
                at=T0,
                updates=updates,
            )
        )
        gone = ev.AgentLeft(agent="a", session="1" * 16, reason="x" * 1000)
        store.save_snapshot(store.append([(T0 + number, gone)] * 50)[-1], b"state")
    newest = store.versions("j")[-1]
    return store, blobs, Need({newest.master, newest.model.sha256}, {"j": n_versions}, {"j"})


def test_the_folder_shrinks_and_says_what_is_left(tmp_path: Path) -> None:
    store, blobs, need = fill(tmp_path)
    store.shrink()
    before = (tmp_path / "journal.sqlite").stat().st_size
    gone = prune(store, blobs, Keep(versions=2, update_rounds=1, replay_rounds=2), need)
    assert (gone.n_versions, gone.n_update_files, gone.n_events, gone.n_files) == (4, 10, 250, 4 * 2 + 5 * 2)
    assert (tmp_path / "journal.sqlite").stat().st_size < before / 2
    assert not (tmp_path / "journal.sqlite-wal").stat().st_size
    versions = store.versions("j")
    assert [(v.version, v.kept, len(v.updates)) for v in versions] == [
        (1, False, 0), (2, False, 0), (3, False, 0), (4, False, 0), (5, True, 0), (6, True, 2)
    ]  # fmt: skip
    assert set(blobs) == used_files(store, need)
    assert [s.seq for s in store.snapshots()] == [300, 250]
    assert [e.seq for e in store.replay()] == list(range(251, 301))
    assert store.append([(T0, ev.Tick())]) == [301], "a place is never used twice"
    assert prune(store, blobs, Keep(versions=2, update_rounds=1, replay_rounds=2), need) == (0, 0, 0, 0, 0)
    assert pick(versions, 5).version == 5
    assert pick(versions, None).version == 6
    with pytest.raises(BadConfig, match=r"version 2 were pruned \(see \[keep\]\): those of 5, 6 are kept"):
        pick(versions, 2)
    store.close()


def test_a_reader_beside_it_delays_the_shrinking_and_nothing_else(tmp_path: Path) -> None:
    store, blobs, need = fill(tmp_path)
    reader = Store(tmp_path / "journal.sqlite", read_only=True)
    assert len(list(reader.replay())) == 300
    assert prune(store, blobs, Keep(replay_rounds=2), need).n_events == 250
    assert len(list(reader.replay())) == 300, "it sees one moment"
    assert len(list(store.replay())) == 50
    reader.close()
    log = tmp_path / "journal.sqlite-wal"
    assert log.stat().st_size > 0
    store.shrink()
    assert log.stat().st_size == 0
    store.close()


def test_a_disk_that_lacks_room_gets_as_much_as_it_lacks(tmp_path: Path) -> None:
    store, blobs, need = fill(tmp_path)
    before = blobs.total_bytes()
    prune(store, blobs, Keep(), need)
    assert len([v for v in store.versions("j") if v.kept]) == 6, "there is no reason"
    prune(store, blobs, Keep(), need, deficit_bytes=100_000)
    assert before - blobs.total_bytes() >= 40_000
    prune(store, blobs, Keep(), need, deficit_bytes=10**9)
    assert set(blobs) == need.digests
    store.close()


def test_a_folder_that_vanishes_meanwhile_stops_no_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, blobs, need = fill(tmp_path)
    (tmp_path / "exports" / ".j.1.part").mkdir(parents=True)
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("exports"):
            found = scan(path)
            (tmp_path / "exports" / ".j.1.part").rmdir()  # an export is renamed into its place
            return found
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert prune(store, blobs, Keep(replay_rounds=2), need).n_events
    store.close()


def test_a_crash_between_forgetting_and_deleting_leaves_what_the_next_start_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, blobs, need = fill(tmp_path)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pruning, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            prune(store, blobs, Keep(versions=1), need)
    assert len(set(blobs)) == 24, "nothing is deleted"
    assert [v.version for v in store.versions("j") if v.kept] == [6]
    store.close()
    store = Store(tmp_path / "journal.sqlite")
    n_files, _ = sweep(blobs, used_files(store, need))
    assert n_files == 22
    assert set(blobs) == need.digests
    store.close()


def test_a_disk_that_refuses_leaves_everything_and_is_asked_again(tmp_path: Path) -> None:
    store, blobs, need = fill(tmp_path)
    store._db.execute("PRAGMA query_only = 1")
    with pytest.raises(Unavailable, match="make room or check the disk"):
        prune(store, blobs, Keep(versions=1), need)
    assert len(set(blobs)) == 24
    assert all(v.kept for v in store.versions("j"))
    store._db.execute("PRAGMA query_only = 0")
    assert prune(store, blobs, Keep(versions=1), need).n_versions == 5
    store.close()


PRUNER = """
import sys
from pathlib import Path
from coordinator.config import Keep
from coordinator.core import events as ev
from coordinator.core.state import Contribution
from coordinator.pruning import Need, prune
from coordinator.store import Store, Version
from protocol.blobs import Blobs
from protocol.messages import Blob

folder = Path(sys.argv[1])
store, blobs = Store(folder / "journal.sqlite"), Blobs(folder / "blobs")
n = max((v.version for v in store.versions("j")), default=0)
gone = ev.AgentLeft(agent="a", session="1" * 16, reason="x" * 1500)
while True:
    n += 1
    made = [blobs.put_bytes(f"{n}{a}".encode() * 500) for a in "abcd"]
    updates = [Contribution(agent=a, round=n, attempt=0, sha256=d, size=2, weight=1) for a, d in zip("abcd", made)]
    master, model = (blobs.put_bytes(f"{kind}{n}".encode() * 1000) for kind in "mk")
    said = {"master": master, "model": Blob(sha256=model, size=1), "updates": updates, "dropped_ratio": 0, "at": n}
    store.add_version(Version(job="j", version=n, round=n, **said))
    store.save_snapshot(store.append([(n, gone)] * 200)[-1], b"state")
    print(n, flush=True)
    prune(store, blobs, Keep(versions=2, update_rounds=1, replay_rounds=2), Need({master, model}, {"j": n}, {"j"}))
"""


def test_killed_at_any_moment_of_pruning_nothing_that_is_kept_is_lost(tmp_path: Path) -> None:
    for n_rounds in (1, 2, 4):
        process = subprocess.Popen([sys.executable, "-c", PRUNER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(n_rounds)]
        process.kill()
        told += [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        store, blobs = Store(tmp_path / "journal.sqlite"), Blobs(tmp_path / "blobs")
        versions = store.versions("j")
        assert len(versions) >= told[-1]
        assert versions[-1].kept
        kept = [v for v in versions if v.kept]
        assert all(blobs.has(d) for v in kept for d in (v.master, v.model.sha256, *(c.sha256 for c in v.updates)))
        seqs = [e.seq for e in store.replay()]
        assert seqs == list(range(store.first_seq(), store.first_seq() + len(seqs))), "the journal has no hole"
        assert [s.seq for s in store.snapshots()][-1] >= seqs[0] - 1
        need = Need({versions[-1].master, versions[-1].model.sha256}, {"j": versions[-1].version}, {"j"})
        sweep(blobs, used_files(store, need))
        assert set(blobs) == used_files(store, need)
        store.close()


def test_a_file_of_a_fact_under_way_is_no_orphan(tmp_path: Path) -> None:
    store, blobs, need = fill(tmp_path, 1)
    fresh, old, pulled = (blobs.put_bytes(name.encode()) for name in ("fresh", "old", "pulled"))
    for sha256 in (old, pulled):
        os.utime(blobs.path(sha256), (T0, T0))
    prune(store, blobs, Keep(), need._replace(digests=need.digests | {pulled}))
    assert blobs.has(fresh)
    assert blobs.has(pulled)
    assert not blobs.has(old)
    store.close()


# ------------------------------------------------------------------------------------------------------- a coordinator


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(
            Stage(tmp_path, stack, keep=Keep(versions=1, ended_versions=1, update_rounds=1, replay_rounds=2))
        )


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return asyncio.run(undisturbed(tmp_path_factory.mktemp("undisturbed"), "a", "bb"))


async def test_a_job_that_keeps_little_ends_in_the_same_adapter(stage: Stage, wanted: list[str]) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec(n_rounds=4))
    assert (await stage.ended()).phase is Phase.COMPLETED
    async with asyncio.timeout(10):  # what goes goes after the end; the peers' loss falls with each version
        while [v.kept for v in stage.coordinator.store.versions("j")] != [False, False, False, True]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    versions = stage.coordinator.store.versions("j")
    assert [v.master for v in versions][:2] == wanted
    assert len(stage.outcomes()) == 5, "what happened stays known"
    newest = versions[-1]
    left = {newest.master, newest.model.sha256, *(c.sha256 for c in newest.updates)}
    async with asyncio.timeout(10):  # files go after the database forgot them
        while set(stage.coordinator.blobs) != left:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(newest.updates) == 2
    assert stage.coordinator.store.first_seq() > 1
    assert (stage.export() / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("phase", ["aggregating", "one update of round 2 is here", "aggregating round 2"])
async def test_killed_in_any_phase_a_start_sweeps_only_orphans(stage: Stage, wanted: list[str], phase: str) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = {"one update of round 2 is here": 2}.get(phase)
    await stage.submit(job_spec())
    await stage.until(PHASES[phase])
    await stage.kill()
    orphan = stage.coordinator.blobs.put_bytes(b"written, and never journalled")
    stage.peers["bb"].deaf_in = None
    one = await stage.start()
    assert not one.blobs.has(orphan)
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.coordinator.store.versions("j")[-1].master == wanted[-1]
    assert stage.outcomes() == GOOD


async def test_the_state_names_every_file_that_it_needs(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 2
    await stage.submit(job_spec())
    await stage.until(PHASES["one update of round 2 is here"])
    store = stage.coordinator.store
    (first,) = store.versions("j")
    found = references(recover(store).fleet.state)
    assert {first.master, first.model.sha256} < found
    assert len(found) == 3
    assert found == need_of(stage.coordinator.fleet.state).digests
    stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
    await stage.ended()
