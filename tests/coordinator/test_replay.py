"""Replay: what the journal holds is run again by the real core, and every bit that was recorded comes out again."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import msgspec
import pytest

from coordinator.__main__ import main
from coordinator.config import Keep
from coordinator.core import events as ev
from coordinator.core.state import Phase
from coordinator.replay import Replayed, replay
from coordinator.store import Store
from protocol.errors import BadConfig
from tests.coordinator.daemon.stage import PHASES, Stage, job_spec


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Two peers have done a job of three rounds on a coordinator that keeps its updates, and that still runs."""
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, keep=Keep(update_rounds=9)))
        await stage.start()
        await stage.peer("a", "bb")
        await stage.submit(job_spec(n_rounds=3))
        assert (await stage.ended()).phase is Phase.COMPLETED
        await stage.coordinator.post(ev.Tick())  # the last snapshot is saved
        yield stage


def again(stage: Stage, number: int | None = None, job: str = "") -> Replayed:
    folder = stage.folder / "cloud"
    store = Store(folder / "journal.sqlite", read_only=True)
    try:
        return replay(store, folder / "blobs", job=job, number=number)
    finally:
        store.close()


def verdicts(found: Replayed) -> dict[str, str]:
    return {check.what: check.verdict for check in found.checks}


async def test_a_whole_journal_comes_out_equal_beside_the_running_coordinator(stage: Stage) -> None:
    found = again(stage)
    assert found.equal
    names = verdicts(found)
    assert [n for n in names if n.startswith("fold")] == [f"fold of j round {n}" for n in (1, 2, 3)]
    assert [n for n in names if n.startswith("version")] == [f"version {n} of j" for n in (1, 2, 3)]
    assert len([n for n in names if n.startswith("state after")]) == 4
    assert len([n for n in names if n.startswith("record of")]) == 4
    assert set(names.values()) == {"equal"}
    assert (stage.job().phase, stage.coordinator.disk.reason) == (Phase.COMPLETED, "")


async def test_one_round_is_told_from_its_plan_to_its_end(stage: Stage) -> None:
    found = again(stage, 2)
    assert found.equal
    assert set(verdicts(found)) >= {"fold of j round 2", "version 2 of j", "record of j round 2, attempt 0"}
    events = [s.event for s in found.steps]
    assert events[0] == "PlanReady"
    assert events[-1] == "Aggregated"
    assert sorted(s.agent for s in found.steps if s.event == "UpdateStored") == ["a", "bb"]
    assert any(w.startswith("Aggregate") for w in found.steps[-2].wishes)
    assert {s.round for s in found.steps if s.agent} == {2}
    (last,) = [n for n in again(stage, 4).steps if "Finish" in n.wishes]
    assert last.phase == "completed"


async def test_a_copy_of_a_killed_coordinator_replays_anywhere(stage: Stage, tmp_path: Path) -> None:
    await stage.kill()
    copy = tmp_path / "laptop"
    shutil.copytree(stage.folder / "cloud", copy)
    before = {p.name: p.read_bytes() for p in copy.rglob("*") if p.is_file() and "-shm" not in p.name}
    assert main_of("replay", str(copy)) == 0
    assert {p.name: p.read_bytes() for p in copy.rglob("*") if p.is_file() and "-shm" not in p.name} == before


def main_of(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fedpipe-coordinator", *arguments])
        return main()


def edit(stage: Stage, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(stage.folder / "cloud" / "journal.sqlite")) as db:
        assert db.execute(statement, values).rowcount > 0
        db.commit()


async def test_whatever_was_not_so_is_found(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    await stage.stop()
    cloud = stage.folder / "cloud"
    with closing(sqlite3.connect(cloud / "journal.sqlite")) as db:
        stored = db.execute("SELECT seq FROM journal WHERE kind = 'UpdateStored'").fetchall()
    edit(stage, "UPDATE journal SET poison = 1 WHERE seq = ?", stored[2][0])
    assert main_of("replay", str(cloud), "--round", "2") == 1
    assert "different" in capsys.readouterr().out
    edit(stage, "UPDATE journal SET poison = 0")
    assert again(stage, 2).equal

    edit(stage, "UPDATE versions SET master = ? WHERE version = 3", "f" * 64)
    found = again(stage)
    assert not found.equal
    assert {n for n, v in verdicts(found).items() if v == "different"} == {"version 3 of j", "fold of j round 3"}


async def test_a_record_or_a_state_that_differs_is_named_with_the_place(stage: Stage) -> None:
    await stage.stop()
    (first, *_) = (store := Store(stage.folder / "cloud" / "journal.sqlite")).rounds("j")
    store.record("j", msgspec.structs.replace(first, wall_s=first.wall_s + 1))
    newest = next(store.snapshots())
    store.save_snapshot(newest.seq, newest.state.replace(b"\xa5phase\xa9completed", b"\xa5phase\xa9cancelled"))
    store.close()
    found = {c.what: c for c in again(stage).checks if c.verdict == "different"}
    assert list(found) == ["record of j round 1, attempt 0", f"state after row {newest.seq}"]
    assert "wall_s" in found["record of j round 1, attempt 0"].detail
    assert "jobs.j.phase: cancelled was recorded, completed came out" in found[f"state after row {newest.seq}"].detail


async def test_a_record_that_is_not_written_down_is_a_difference(stage: Stage) -> None:
    edit(stage, "DELETE FROM rounds WHERE round = 2")
    found = {c.what: c for c in again(stage).checks if c.verdict == "different"}
    assert list(found) == ["record of j round 2, attempt 0"]
    assert "None was recorded" in found["record of j round 2, attempt 0"].detail


async def test_an_update_that_changed_on_the_disk_folds_otherwise_or_not_at_all(stage: Stage) -> None:
    (first, *_) = stage.coordinator.store.versions("j")
    path = stage.coordinator.blobs.path(first.updates[0].sha256)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert verdicts(again(stage))["fold of j round 1"] == "different"
    path.unlink()
    found = again(stage, 1)
    assert found.equal
    assert verdicts(found)["fold of j round 1"] == "unknown"


async def test_what_is_pruned_is_said_and_what_can_be_replayed(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = stage.coordinator.store.frames()
    stage.coordinator.store.forget([], [("j", 1)], frames[1].seq)
    with pytest.raises(BadConfig, match="those of j that can be run again are 3, 4"):
        again(stage, 1)
    with pytest.raises(BadConfig, match="round 9"):
        again(stage, 9)
    with pytest.raises(BadConfig, match="round 3 of 'k'"):
        again(stage, 3, "k")
    assert again(stage, 3).equal
    found = again(stage)
    assert found.equal
    assert found.since == frames[1].seq
    assert main_of("replay", str(stage.folder / "cloud"), "--round", "1") == 78
    assert "can be run again are 3, 4" in capsys.readouterr().err


async def test_as_json_and_as_a_table(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    cloud = str(stage.folder / "cloud")
    assert main_of("replay", cloud, "--round", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is True
    assert told["steps"][0]["event"] == "JobSubmitted"
    assert main_of("replay", cloud, "--round", "1") == 0
    out = capsys.readouterr().out
    assert "what the core wished" in out
    assert "equal" in out
    assert main_of("replay", "/nowhere") == 78
    assert "/nowhere/journal.sqlite" in capsys.readouterr().err


async def test_two_jobs_are_told_apart(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack))
        await stage.start()
        await stage.peer("a", "bb")
        await stage.submit(job_spec(name="j"))
        await stage.submit(job_spec(name="k"))
        await stage.ended("j")
        await stage.ended("k")
        await stage.coordinator.post(ev.Tick())
        with pytest.raises(BadConfig, match="which job: j, k"):
            again(stage, 1)
        found = again(stage, 1, "k")
        assert found.equal
        assert {s.job for s in found.steps} <= {"", "k"}
        assert verdicts(found)["fold of k round 1"] == "unknown", "its updates are not kept"
        await stage.stop()


async def test_a_round_under_way_is_in_the_whole_story(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack))
        await stage.start()
        await stage.peer("a", "bb")
        stage.peers["bb"].deaf_in = 2
        await stage.submit(job_spec())
        await stage.until(PHASES["one update of round 2 is here"])
        await stage.kill()
        found = again(stage)
        assert found.equal
        assert found.steps[-1].event == "UpdateStored"
        with pytest.raises(BadConfig, match="round 2 of 'j' has not closed"):
            again(stage, 2)
