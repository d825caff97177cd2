"""Old and damaged state folders: what was written years ago goes on, what a disk spoiled ends in words that help."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import msgspec
import pytest

from coordinator import migrations, wal
from coordinator.config import CoordinatorConfig
from coordinator.core import events as ev
from coordinator.core.fleet import decode_state, encode_state
from coordinator.core.state import Phase
from coordinator.daemon import Coordinator
from coordinator.recovery import recover
from coordinator.store import Store
from protocol.errors import BadConfig, Unavailable
from protocol.memory_bus import MemoryBroker
from tests.coordinator.daemon.stage import GOOD, PHASES, Stage, job_spec, undisturbed

VERSION_1 = Path(__file__).parent / "version1"
T0 = 1_750_000_000.0


def old_folder(folder: Path) -> Path:
    """A state folder of format 1: in the middle of round 2, with one of two updates stored."""
    shutil.copytree(VERSION_1 / "blobs", folder / "blobs")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        db.executescript((VERSION_1 / "journal.sql").read_text())
        db.execute("PRAGMA journal_mode=WAL")
    return folder / "journal.sqlite"


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Stage(tmp_path, stack))


# ------------------------------------------------------------------------------------------------------- old formats


async def test_a_folder_of_format_1_goes_on_with_its_job_and_loses_nothing(stage: Stage, tmp_path: Path) -> None:
    wanted = await undisturbed(tmp_path / "undisturbed", "a", "bb")
    journal = old_folder(stage.folder / "cloud")
    await stage.start()
    assert stage.job().phase is Phase.COLLECTING
    assert stage.job().round_number == 1
    assert Path(f"{journal}.v1").exists(), "what a downgrade would need"
    await stage.peer("a", "bb")
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert stage.job().attempt == 0
    assert not Path(f"{journal}.v1").exists(), "a round has closed since"


def test_rows_and_snapshot_of_format_1_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = Store(old_folder(tmp_path))
    (saved,) = store.snapshots()
    assert (saved.seq, saved.software) == (13, "")
    assert decode_state(saved.state).jobs["j"].version == 1
    found = [type(e.event).__name__ for e in store.replay()]
    assert len(found) == 19
    assert (found[0], found[-3]) == ("JobSubmitted", "UpdateStored")
    assert [r.outcome for r in store.rounds("j")] == ["aggregated"]
    (version,) = store.versions("j")
    assert (version.kept, version.updates) == (True, [])
    (share,) = [s for s in recover(store).fleet.state.jobs["j"].round.shares.values() if s.state == "DONE"]  # type: ignore[union-attr]
    assert share.agent == "a"
    store.close()


def test_a_folder_of_format_2_keeps_its_snapshots_and_goes_on_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = old_folder(tmp_path)
    monkeypatch.setattr(migrations, "NEWEST", 2)
    monkeypatch.setattr(migrations, "STEPS", migrations.STEPS[:2])
    with closing(sqlite3.connect(journal, isolation_level=None)) as db:
        migrations.upgrade(db, str(journal))
        ((before,),) = db.execute("SELECT state FROM snapshots").fetchall()
    monkeypatch.undo()
    store = Store(journal)
    assert [s.state for s in store.snapshots()] == [before]
    assert Path(f"{journal}.v2").exists()
    assert store.detail("j") is None
    found = recover(store)
    store.save_snapshot(found.seq, encode_state(found.fleet.state))
    assert [s.state for s in store.snapshots()] == [encode_state(found.fleet.state), before]
    store.forget([], [], found.seq)
    assert [s.seq for s in store.snapshots()] == [found.seq]
    store.close()


def test_the_copy_before_an_upgrade_opens_as_what_it_was(tmp_path: Path) -> None:
    journal = old_folder(tmp_path)
    Store(journal).close()
    with closing(sqlite3.connect(f"{journal}.v1")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT COUNT(*) FROM journal").fetchone() == (19,)
    Path(f"{journal}.v1").replace(journal)
    again = Store(journal)
    assert len(list(again.replay())) == 19
    again.close()


def test_an_upgrade_that_fails_half_way_leaves_the_old_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = old_folder(tmp_path)
    step = (*migrations.STEPS[1][:3], "INSERT INTO nowhere VALUES (1)")
    monkeypatch.setattr(migrations, "STEPS", (migrations.STEPS[0], step))
    with pytest.raises(Unavailable, match="nowhere"):
        Store(journal)
    monkeypatch.undo()
    with closing(sqlite3.connect(journal)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert [r[0] for r in db.execute("SELECT seq FROM snapshot")] == [13]
    store = Store(journal)
    assert len(list(store.replay())) == 19
    store.close()


def test_a_state_of_a_newer_program_is_refused_and_no_older_snapshot_taken_for_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "journal.sqlite")
    (seq,) = store.append([(T0, ev.Tick())])
    store.save_snapshot(0, msgspec.msgpack.encode({"v": 1}))
    store.save_snapshot(seq, msgspec.msgpack.encode({"v": 99}))
    with pytest.raises(BadConfig, match="newer fedpipe"):
        recover(store)
    store.close()


# ------------------------------------------------------------------------------------------------------ spoiled disks


def open_state(folder: Path) -> Coordinator:
    return Coordinator(CoordinatorConfig(state_dir=str(folder)), MemoryBroker().bus("coordinator"))


def test_a_bit_that_turned_in_a_row_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "journal.sqlite")
    seqs = store.append([(T0, ev.AgentLeft(agent="a", session="1" * 16, reason=f"will {n}")) for n in range(3)])
    turned = "UPDATE journal SET body = CAST(REPLACE(CAST(body AS TEXT), 'will 1', 'will 3') AS BLOB)"
    assert store._db.execute(turned).rowcount == 3
    assert [e.seq for e in store.replay()] == [seqs[0], seqs[2]]
    assert "checksum" in caplog.text
    store.close()


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE snapshots SET pieces = x'' WHERE seq = ?1",
        "UPDATE snapshots SET state = x'c1' WHERE seq = ?1",
        "DELETE FROM pieces WHERE half = (SELECT half FROM snapshots WHERE seq = ?1)",
        """UPDATE pieces SET body = CAST(REPLACE(CAST(body AS TEXT), 'evaluating', 'evaluatinh') AS BLOB)
             WHERE half = (SELECT half FROM snapshots WHERE seq = ?1)""",
    ],
    ids=["empty", "no msgpack", "a piece is gone", "a bit in a piece"],
)
async def test_for_a_snapshot_that_cannot_be_read_the_one_before_serves(
    stage: Stage, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    for peer in stage.peers.values():
        peer.deaf_in = 3
    await stage.submit(job_spec())
    await stage.until(PHASES["evaluating"])
    await stage.coordinator.post(ev.Tick())  # and the snapshot is saved
    await stage.kill()
    before = msgspec.msgpack.encode(stage.coordinator.fleet.state)
    with closing(sqlite3.connect(stage.folder / "cloud" / "journal.sqlite")) as db:
        ((seq,),) = db.execute("SELECT seq FROM snapshots ORDER BY seq DESC LIMIT 1").fetchall()
        assert db.execute("SELECT COUNT(*) FROM snapshots").fetchone() == (2,)
        assert db.execute(spoil, (seq,)).rowcount > 0
        db.commit()
    store = Store(stage.folder / "cloud" / "journal.sqlite")
    assert msgspec.msgpack.encode(recover(store).fleet.state) == before, "not a fact is missing"
    store.close()
    assert "snapshot_lost" in {vars(r).get("action") for r in caplog.records}
    for peer in stage.peers.values():
        peer.deaf_in = None
    await stage.start()
    assert (await stage.ended()).phase is Phase.COMPLETED


def test_without_any_readable_snapshot_a_pruned_journal_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "journal.sqlite")
    seqs = store.append([(T0, ev.Tick()) for _ in range(3)])
    store.save_snapshot(seqs[1], b"\xc1")
    assert recover(store).seq == seqs[2], "the journal reaches back to its beginning"
    store.forget([], [], seqs[1])
    with pytest.raises(BadConfig, match="restore it from a copy"):
        recover(store)
    store.close()


def commits(path: Path, n: int) -> bytes:
    """The write-ahead log of a store that was killed after n commits."""
    store = Store(path)
    for at in range(n):
        store.append([(T0, ev.AgentLeft(agent="a", session="1" * 16, reason=str(at)))])
    data = path.with_name("journal.sqlite-wal").read_bytes()
    copy = path.read_bytes()
    store.close()
    path.write_bytes(copy)
    return data


@pytest.mark.parametrize("where", ["header", "salts", "first", "middle"])
def test_a_damaged_log_with_commits_behind_is_refused_and_can_be_cut(tmp_path: Path, where: str) -> None:
    path, log = tmp_path / "journal.sqlite", tmp_path / "journal.sqlite-wal"
    data = bytearray(commits(path, 10))
    frame = 24 + 4096
    place = {"header": 5, "salts": 17, "first": 32 + 100, "middle": len(data) - 7 * frame + 2000}[where]
    data[place] ^= 4
    log.write_bytes(data)
    with pytest.raises(BadConfig, match="cannot be read: restore") as refused:
        Store(path)
    assert log.read_bytes() == data, "it is left as it was"
    torn = wal.torn(log)
    assert torn is not None
    assert f"truncate --size {torn.offset} " in str(refused.value)
    log.write_bytes(data[: torn.offset])
    store = Store(path)
    assert len(list(store.replay())) == {"middle": 6}.get(where, 0), "a commit is two frames here"
    store.close()


@pytest.mark.parametrize("n_lost", [0, 1, 4000, 4121])
def test_a_log_that_a_power_cut_tore_is_no_damage(tmp_path: Path, n_lost: int) -> None:
    path, log = tmp_path / "journal.sqlite", tmp_path / "journal.sqlite-wal"
    data = commits(path, 10)
    log.write_bytes(data[: len(data) - n_lost])
    store = Store(path)
    assert len(list(store.replay())) == (10 if n_lost == 0 else 9)
    store.close()


@pytest.mark.parametrize("how", ["half", "empty", "gone", "flipped page"])
def test_a_journal_that_is_not_whole_is_refused_with_the_next_step(tmp_path: Path, how: str) -> None:
    path = old_folder(tmp_path)
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        data[4096 * 2 : 4096 * 2 + 16] = b"\xff" * 16 if how == "flipped page" else data[4096 * 2 : 4096 * 2 + 16]
        path.write_bytes(data[: {"half": len(data) // 2 + 100, "empty": 0}.get(how, len(data))])
    blobs = sorted(p.name for p in (tmp_path / "blobs").iterdir() if p.is_file())
    with pytest.raises(BadConfig, match="restore it from a copy, or move the whole folder away"):
        open_state(tmp_path)
    assert sorted(p.name for p in (tmp_path / "blobs").iterdir() if p.is_file()) == blobs, "and nothing is swept away"


def test_a_model_that_is_gone_is_named_and_no_job_given_up(tmp_path: Path) -> None:
    old_folder(tmp_path)
    store = Store(tmp_path / "journal.sqlite")
    (version,) = store.versions("j")
    store.close()
    for sha256 in (version.master, version.model.sha256):
        file = tmp_path / "blobs" / sha256
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(BadConfig, match=f"{sha256} is gone: job 'j' cannot go on without its version 1"):
            open_state(tmp_path)
        file.write_bytes(data)
    one = open_state(tmp_path)
    assert one.fleet.state.jobs["j"].phase is Phase.COLLECTING
    one.store.close()
