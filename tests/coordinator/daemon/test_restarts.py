"""The coordinator or the broker dies, at any moment: a job ends with the same bytes whatever happens."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from coordinator.core import events as ev
from coordinator.core.state import ENDED, Phase
from coordinator.daemon import Coordinator
from tests.coordinator.daemon.peer import PATIENCE_S, topics
from tests.coordinator.daemon.stage import DEAF, GOOD, PHASES, Died, Stage, job_spec


@pytest.mark.parametrize("polite", [False, True], ids=["killed", "stopped"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_restart_in_any_phase_ends_in_the_same_adapter(
    stage: Stage, wanted: list[str], phase: str, *, polite: bool
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = DEAF.get(phase)
    await stage.submit(job_spec())
    await stage.until(PHASES[phase])
    await (stage.stop() if polite else stage.kill())
    before = stage.job()
    stage.peers["bb"].deaf_in = None
    await stage.start()
    assert stage.job().round_number >= before.round_number, "nothing that was handled is forgotten"
    assert stage.job().members.keys() >= before.members.keys()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert (stage.export() / "adapter_model.safetensors").is_file()
    assert stage.job().attempt == 0, "no round had to be repeated"


@pytest.mark.parametrize("seed", range(3))
async def test_killed_after_one_commit_after_another_it_ends_in_the_same_adapter(
    stage: Stage, wanted: list[str], seed: int
) -> None:
    """Every life of the coordinator ends after a few commits, between the journal and the core."""
    draw = random.Random(seed)
    left = 0

    def die(_: Coordinator) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Died

    await stage.peer("a", "bb")
    await stage.start()
    await stage.submit(job_spec())
    await stage.kill()
    while stage.job().phase not in ENDED:
        left = draw.randint(1, 6)
        await stage.start(die)
        if not await stage.lives_until(lambda _: stage.job().phase in ENDED):
            await stage.dead()
    await stage.kill()
    await stage.start()
    job = await stage.ended()
    assert job.phase is Phase.COMPLETED, job.reason
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert (stage.export() / "adapter_model.safetensors").is_file()
    assert stage.n_lives > 8


async def test_a_broker_that_dies_and_comes_back_empty_changes_nothing(stage: Stage, wanted: list[str]) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 2
    await stage.submit(job_spec())
    for phase in ("plans are out", "one update of round 2 is here"):
        await stage.until(PHASES[phase])
        stage.broker.stop()
        stage.broker.start()
    stage.peers["bb"].deaf_in = None
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD


async def test_a_plan_that_was_withdrawn_without_a_broker_does_not_wait_there_for_an_agent(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    stage.peers["a"].deaf_in = 1
    await stage.submit(job_spec(1))
    await stage.until(PHASES["plans are out"])
    stage.broker.hold("a")
    await stage.until(lambda one: not one.fleet.state.agents["a"].online)
    stage.broker.hold("coordinator")
    await stage.coordinator.post(ev.JobCancelled(job="j"))
    for _ in range(50):  # its words are lost by now
        await asyncio.sleep(0)
    assert topics.down("a", "plan") in stage.broker.retained
    cleared = asyncio.Event()
    stage.broker.drop = lambda topic, payload: bool(topic == topics.down("a", "plan") and not payload and cleared.set())
    stage.broker.release("coordinator")
    async with asyncio.timeout(PATIENCE_S):
        await cleared.wait()
    assert topics.down("a", "plan") not in stage.broker.retained


async def test_a_rollback_that_a_crash_interrupts_is_written_down_by_the_next_life(stage: Stage) -> None:
    armed = False

    def after_commit(_: Coordinator) -> None:
        if armed:
            raise Died

    await stage.start(after_commit)
    await stage.peer("a", "bb")
    for peer in stage.peers.values():
        peer.deaf_in = 2
    await stage.submit(job_spec())
    await stage.until(lambda _: stage.job().version == 1 and stage.job().phase is Phase.COLLECTING)
    (first,) = stage.coordinator.store.versions("j")
    armed = True
    said: dict[str, Any] = {"job": "j", "of": 1, "version": 2, "round": 1, "by": "local", "reason": "worse"}
    stage.coordinator.tell(ev.JobRolledBack(**said, model=first.model, master=first.master))
    await stage.dead()
    armed = False
    for peer in stage.peers.values():
        peer.deaf_in = None
    await stage.start()
    assert (await stage.ended()).phase is Phase.COMPLETED
    masters = stage.masters()
    assert masters[:2] == [first.master] * 2
    assert (len(set(masters)), stage.coordinator.store.versions("j")[1].round) == (2, 1)
    assert [outcome.partition(":")[0] for _, _, outcome in stage.outcomes()] == [
        "aggregated",
        "rolled_back",
        "aggregated",
        "completed",
    ]
    assert json.loads((stage.export() / "fedpipe.json").read_bytes())["adapter_sha256"] == masters[-1]
