"""Updates that stall, are lost at their agent, or vanish at the coordinator."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from coordinator.config import Transfer as TransferConfig
from coordinator.core.state import Phase
from tests.coordinator.daemon.peer import PATIENCE_S
from tests.coordinator.daemon.stage import PHASES, Stage, job_spec


async def test_an_upload_that_stalls_is_pulled_again_by_the_next_offer(tmp_path: Path, wanted: list[str]) -> None:
    transfer = TransferConfig(timeout_s=0.005)
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, transfer=transfer))
        stage.broker.drop = lambda topic, _: "/bb/up/d/" in topic
        await stage.start()
        await stage.peer("a", "bb")
        bb = stage.peers["bb"]
        await stage.submit(job_spec())
        async with asyncio.timeout(PATIENCE_S):
            await bb.was_refused.wait()
        assert bb.refused[0].retry_after_s > 0
        assert "sent nothing" in bb.refused[0].reason
        stage.broker.drop = lambda _topic, _payload: False
        bb.birth()
        assert (await stage.ended()).phase is Phase.COMPLETED
        assert stage.masters() == wanted


async def test_without_a_broker_it_rests(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, transfer=TransferConfig(timeout_s=0.02)))
        stage.broker.drop = lambda topic, _: "/bb/up/d/" in topic
        one = await stage.start()
        await stage.peer("a", "bb")
        await stage.submit(job_spec())
        await stage.until(PHASES["one update is here"])
        stage.broker.hold("coordinator")
        due, ticks, tick = one.exchange.pulling.wake_at, 0, one._tick
        assert due is not None, "the pull from bb is open"

        def counted() -> None:
            nonlocal ticks
            ticks += 1
            tick()

        one._tick = counted  # type: ignore[method-assign]
        await asyncio.sleep(max(0.0, due - one.clock()))
        for _ in range(300):
            await asyncio.sleep(0)
        assert ticks <= 2, "a chunk is overdue and nobody is there: no reason to spin"
        stage.broker.drop = lambda _topic, _payload: False
        stage.broker.release("coordinator")
        assert (await stage.ended()).phase is Phase.COMPLETED


async def test_an_update_that_its_agent_has_lost_ends_the_share(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].forge = lambda _, path, offer: path.unlink() or offer  # type: ignore[func-returns-value]
    await stage.submit(job_spec(n_rounds=1, min_agents=1, start_agents=2))
    assert (await stage.ended()).phase is Phase.COMPLETED
    (first, _) = stage.coordinator.store.rounds("j")
    assert (first.shares["a"].state, first.shares["bb"].state) == ("DONE", "FAILED")
    assert first.shares["bb"].reason.startswith("withdrawn by the agent")


async def test_an_update_that_vanished_before_its_aggregate_fails_the_job_with_the_reason(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    assert list(stage.coordinator.blobs)
    for gone in stage.coordinator.blobs:
        stage.coordinator.blobs.delete(gone)
    stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
    job = await stage.ended()
    assert job.phase is Phase.FAILED
    assert "gone" in job.reason
