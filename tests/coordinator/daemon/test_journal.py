"""Events that cannot be read, cannot be taken or cannot be written down."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.core import events as ev
from coordinator.core.state import Phase
from coordinator.daemon import Coordinator
from protocol.errors import Unavailable
from protocol.messages import Cancel
from tests.coordinator.daemon.peer import PATIENCE_S
from tests.coordinator.daemon.stage import GOOD, PHASES, Stage, job_spec


async def test_a_journal_row_that_cannot_be_read_is_skipped(
    stage: Stage, wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["plans are out"])
    await stage.coordinator.post(ev.Tick())
    await stage.kill()
    await stage.start()  # its rows are not in a snapshot
    rows = stage.coordinator.store._db
    (seq,) = rows.execute("SELECT MAX(seq) FROM journal WHERE kind = 'Tick'").fetchone()
    await stage.kill()
    await stage.start()
    stage.coordinator.store._db.execute("UPDATE journal SET body = ? WHERE seq = ?", (b"\xc1", seq))
    await stage.kill()
    caplog.clear()
    await stage.start()
    assert [vars(r)["seq"] for r in caplog.records if vars(r).get("action") == "poison"] == [seq]
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


async def test_an_event_that_the_core_cannot_take_is_poison_and_its_neighbours_are_not(
    stage: Stage, wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.coordinator.tell(ev.AgentJoined(agent="c", session="c" * 16, methods=["other"]))
    stage.coordinator.tell(ev.JobCancelled(job=[]))  # type: ignore[arg-type]
    await stage.submit(job_spec())
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert "c" in stage.coordinator.fleet.state.agents
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert len([r for r in caplog.records if vars(r).get("action") == "poison"]) == 1
    caplog.clear()
    await stage.kill()
    await stage.start()
    assert stage.job().phase is Phase.COMPLETED
    assert [r for r in caplog.records if vars(r).get("action") == "poison"] == []


@pytest.mark.parametrize("poison_first", [True, False])
async def test_no_wish_of_poisons_neighbours_is_lost(stage: Stage, *, poison_first: bool) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    for peer in stage.peers.values():
        peer.deaf_in = 2
    await stage.submit(job_spec())
    await stage.until(PHASES["plans of round 2 are out"])
    poison, cancel = ev.JobCancelled(job=[]), ev.JobCancelled(job="j")  # type: ignore[arg-type]
    for event in (poison, cancel) if poison_first else (cancel, poison):
        stage.coordinator.tell(event)
    assert (await stage.ended()).phase is Phase.CANCELLED
    assert stage.outcomes() == [GOOD[0], ("train", 2, "cancelled by the operator")]
    assert (stage.export() / "adapter_model.safetensors").is_file()
    for peer in stage.peers.values():
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(await peer.commands.get(), Cancel)


async def test_a_disk_that_refuses_the_journal_is_told_and_waited_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.daemon.DISK_RETRY_S", 0.01)
    full, refused, loop = True, asyncio.Semaphore(0), asyncio.get_running_loop()

    def refuse(_: Coordinator) -> None:
        if full:
            loop.call_soon_threadsafe(refused.release)
            raise Unavailable("no space")

    one = await stage.start(refuse)
    with pytest.raises(Unavailable, match="no space"):
        await one.post(ev.JobSubmitted(spec=job_spec()))
    assert "j" not in one.fleet.state.jobs
    await stage.peer("a", "bb")
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            await refused.acquire()
    full = False
    await stage.submit(job_spec(name="k"))
    assert (await stage.ended("k")).phase is Phase.COMPLETED
