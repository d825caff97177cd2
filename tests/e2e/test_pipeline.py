"""A job that leaves everything open, on real processes: measured, planned, trained, corrected, remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from statistics import fmean
from typing import Any

import psutil
import pytest
import tomli_w

from coordinator.core.state import Phase
from fedpipe.client import Coordinator

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def open_job(running: Any, name: str = "e2e", **tables: dict[str, Any]) -> str:
    """What a user has to say: which base, how fast to learn, how many rounds."""
    job: dict[str, Any] = {
        "job": {"name": name, "seed": 3},
        "model": {"source": str(running.base)},
        "adapter": {"max_rank": 16},
        "train": {"learning_rate": 3e-3, "max_tokens": 64},
        "plan": {"calibrate_s": 60.0, "max_train_s": 8.0, "batches": [2, 4, 8], "ranks": [1, 2, 4, 8]},
        "round": {"n_rounds": 3, "start_agents": 3, "min_agents": 2, "grace_s": 20.0, "survey_s": 150.0},
        "evaluate": {"held_out_ratio": 0.15, "max_samples": 64},
    }
    for table, values in tables.items():
        job[table] = job.get(table, {}) | values
    return tomli_w.dumps(job)


async def test_what_is_left_open_is_measured_planned_and_kept_within_each_servers_limits(
    fleet: Callable[..., Any], texts: dict[str, Any]
) -> None:
    free, small, four_bits = sorted(texts)
    limits = {small: {"max_rank": 2, "max_batch": 2}, four_bits: {"bits": ["nf4"]}}
    async with fleet("mosquitto", limits=limits) as running:
        await running.submit(open_job(running))
        job = await running.ended()
        assert job.phase is Phase.COMPLETED, job.text
        plan = await running.plan()
        chosen = {agent: found.choice for agent, found in plan.agents.items()}
        assert chosen.keys() == set(texts)
        assert max(chosen[small].ranks.values()) <= 2
        assert chosen[small].batch <= 2
        assert chosen[four_bits].bits == "nf4"
        assert chosen[free].importance > chosen[small].importance
        assert all(found.calibrated_s and found.choice.why for found in plan.agents.values())

        trained = [record for record in job.history if record.outcome == "aggregated"]
        assert [record.round for record in trained] == [1, 2, 3]
        for share in (share for record in trained for share in record.shares.values()):
            assert share.predicted
            assert share.step_s > 0
            assert share.peak_bytes > 0
            assert share.bytes_up <= share.predicted.up_bytes * 1.05 + 65_536
        before, after = job.evaluations[0], job.evaluations[job.version]
        assert fmean(before[a].loss - after[a].loss for a in before) > 0.1

        await running.submit(open_job(running, "again", round={"n_rounds": 1}))
        again = await running.ended("again")
        assert again.phase is Phase.COMPLETED, again.text
        assert {member.calibrated_s for member in again.members.values()} == {0.0}, "remembered, not measured anew"


async def test_a_child_that_the_kernel_kills_dies_alone_and_the_next_plan_is_smaller(
    fleet: Callable[..., Any], texts: dict[str, Any]
) -> None:
    victim = min(texts)
    async with fleet("embedded") as running:
        # A new child imports torch first, which must fit the round even on a busy machine.
        lengths = {"min_train_s": 40.0, "max_train_s": 50.0}
        await running.submit(open_job(running, plan=lengths, round={"n_rounds": 2}))
        await running.until(lambda job: bool(job.current) and _state(job, victim) == "TRAINING")
        needed = (await running.plan()).agents[victim].choice.predicted
        assert needed
        agent = psutil.Process(running.cluster.members[victim].process.pid)
        (child,) = agent.children()
        child.kill()
        await running.until(lambda job: job.round >= 1 and job.phase is Phase.COLLECTING)
        found = (await running.plan()).agents[victim]
        assert found.oom_bytes == needed.peak_bytes
        assert found.choice.predicted
        assert found.choice.predicted.peak_bytes < needed.peak_bytes
        job = await running.ended()
        assert job.phase is Phase.COMPLETED, job.text
        first, second = job.history[0].shares[victim], job.history[1].shares[victim]
        assert (first.state, second.state) == ("FAILED", "DONE")
        assert "SIGKILL" in first.reason
        assert running.cluster.members[victim].n_starts == 1, "the daemon itself went on"


async def test_a_pin_that_no_agent_can_keep_ends_the_job_with_the_numbers(fleet: Callable[..., Any]) -> None:
    async with fleet("mosquitto") as running:
        await running.submit(open_job(running, train={"n_steps": 1_000_000}, round={"train_s": 5.0}))
        job = await running.ended()
        assert job.phase is Phase.FAILED
        assert "not enough time: 1000000 steps of" in job.text
        with Coordinator(f"http://127.0.0.1:{running.port}") as client:
            left_out = (await asyncio.to_thread(client.plan, "e2e")).left_out
        assert len(left_out) == 3


def _state(job: Any, agent: str) -> str:
    share = job.current.shares.get(agent)
    return share.state if share else ""
