"""Heartbeats, silence, and what is said again to an agent that is beside its share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from coordinator.core import events as ev
from coordinator.core.state import ENDED, Phase
from coordinator.hearing import DOUBT_BEATS
from protocol import codec
from protocol.messages import ExecState, Execution, Progress, Rebirth, Report
from tests.coordinator.daemon.peer import PATIENCE_S, topics
from tests.coordinator.daemon.stage import PHASES, Stage, job_spec


async def test_a_heartbeat_of_an_unknown_session_is_answered_by_a_rebirth(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    a = stage.peers["a"]
    await stage.until(lambda one: one.fleet.state.agents.get("a"))
    a.say("progress", Progress())
    a.outgoing.session = "e" * 16
    for _ in range(5):
        a.say("progress", Progress())
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await a.commands.get(), Rebirth)
    a.birth()
    await stage.until(lambda one: one.fleet.state.agents["a"].session == "e" * 16)
    a.say("progress", Progress(step=3))
    await stage.submit(job_spec(1))
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert a.commands.empty(), "it is not asked again and again"


async def test_a_vanished_agent_is_gone_at_once_and_a_silent_one_soon(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.05))
        await stage.start()
        await stage.peer("a", "bb")
        await stage.until(lambda one: len(one.fleet.state.agents) == 2)
        stage.broker.hold("a")
        await stage.until(lambda one: not one.fleet.state.agents["a"].online)
        assert stage.coordinator.fleet.state.agents["a"].reason == "cut", "its will"
        await stage.until(lambda one: not one.fleet.state.agents["bb"].online)
        assert stage.coordinator.fleet.state.agents["bb"].reason == "silent: no heartbeat"
        assert sum(isinstance(e, ev.AgentLeft) for e in stage.seen) == 2
        stage.peers["bb"].say("progress", Progress())
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(await stage.peers["bb"].commands.get(), Rebirth)
        stage.peers["bb"].birth()
        await stage.until(lambda one: one.fleet.state.agents["bb"].online)


async def beating(stage: Stage, holds: Callable[[], bool]) -> None:
    """The idle heartbeats of peer "a", until something holds; on a busy machine it may be taken for silent meanwhile."""
    a = stage.peers["a"]
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            a.say("progress", Progress())
            await asyncio.sleep(0.01)
            if not a.commands.empty():
                a.commands.get_nowait()
                a.birth()


async def test_the_plan_is_said_again_to_an_agent_that_idles_although_its_share_is_open(tmp_path: Path) -> None:
    lost: list[str] = []

    def drop(topic: str, payload: bytes) -> bool:
        said = codec.decode(payload).b if topic.endswith("/exec") and not lost else None
        if not isinstance(said, Execution) or said.state is not ExecState.DONE:
            return False
        lost.append(topic)
        return True

    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.15))
        await stage.start()
        stage.broker.drop = drop
        await stage.peer("a")
        stage.peers["a"].say("report", Report())
        await stage.until(lambda one: one.fleet.state.agents.get("a") and one.fleet.state.agents["a"].report)
        await stage.submit(job_spec(1))
        await beating(stage, lambda: stage.job().phase in ENDED)
        assert lost, "nothing was lost, so nothing was shown"
        assert stage.job().phase is Phase.COMPLETED
        assert [plan.round for plan in stage.peers["a"].plans].count(0) >= 2
        assert stage.coordinator.meter.n_connects == 1


async def test_a_broker_that_brings_nothing_but_heartbeats_is_left_and_found_again(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.15))
        await stage.start()
        await stage.peer("a")
        stage.peers["a"].say("report", Report())
        await stage.until(lambda one: one.fleet.state.agents.get("a"))
        stage.broker.drop = lambda topic, _: topic.endswith("/exec") and stage.coordinator.meter.n_connects == 1
        await stage.submit(job_spec(1))
        await beating(stage, lambda: stage.job().phase in ENDED)
        assert stage.job().phase is Phase.COMPLETED
        assert stage.coordinator.meter.n_connects == 2


async def test_a_report_that_was_lost_is_asked_for_although_one_share_follows_another(stage: Stage) -> None:
    one = await stage.start()
    await stage.peer("a")
    a = stage.peers["a"]

    def beats(at: float) -> None:
        one.clock = lambda: at  # type: ignore[assignment, method-assign]
        one.hearing.receive(topics.up("a", "progress"), a.outgoing.encode(Progress()), retained=False)

    a.deaf_in = 1
    await stage.submit(job_spec(1))
    await stage.until(PHASES["plans are out"])
    began = one.clock()
    beats(began)
    a.deaf_in = 2
    a._work(a.plans[-1])
    await stage.until(PHASES["plans of round 2 are out"])
    beats(began + DOUBT_BEATS * one.config.heartbeat_s)
    async with asyncio.timeout(PATIENCE_S):
        assert await a.commands.get() == Rebirth()
