"""Training that is killed or paused in the middle goes on from its checkpoint, and nobody can tell from the adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.checkpoints import steps_at
from coordinator.core.state import Phase
from fedpipe.client import Coordinator
from fedpipe.unpacking import unpack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


async def test_killed_or_paused_in_mid_training_it_hands_over_the_same_update(
    fleet: Callable[..., Any], texts: Any
) -> None:
    """The same job three times in one fleet, once in peace: one seed, so one adapter."""
    absent, hurt, _ = sorted(texts)
    rounds = {"n_rounds": 1, "start_agents": 2, "min_agents": 2, "train_s": 150.0, "grace_s": 20.0}
    async with fleet("mosquitto", absent, checkpoint_s=0.05) as running:
        text = {"round": rounds, "train": {"n_steps": 60}}
        await running.submit(running.job_text(job={"name": "calm"}, **text))
        assert (await running.ended("calm")).phase is Phase.COMPLETED
        calm = await adapter(running, "calm")

        await running.submit(running.job_text(job={"name": "hurt"}, **text))
        folder = running.cluster.folder / hurt
        await kept(folder / "state" / "training.checkpoint", "hurt", at_step=10)
        daemon = psutil.Process(running.cluster.members[hurt].process.pid)
        victims = [daemon, *daemon.children(recursive=True)]
        assert len(victims) == 2, "the daemon and its training child"
        for process in victims:
            process.kill()
        job = await running.ended("hurt")
        assert job.phase is Phase.COMPLETED, job.text
        first = job.history[0]
        assert first.attempt == 0
        assert first.shares[hurt].state == "DONE"
        assert first.shares[hurt].samples == 60 * 8
        (step,) = resumed_at(folder / f"{hurt}.log", "hurt")
        assert 10 <= step < 60
        assert await adapter(running, "hurt") == calm
        assert not (folder / "state" / "training.checkpoint").exists()
        await steered(running, hurt, calm, text)


async def steered(running: Any, agent: str, calm: bytes, text: dict[str, Any]) -> None:
    """An operator pauses the job in mid-round, lets it go on, takes it back in the next round, and it comes to its end."""
    rounds = text["round"] | {"n_rounds": 2, "train_s": 120.0}  # a child that was suspended is another one afterwards
    await running.submit(running.job_text(job={"name": "steered"}, **text | {"round": rounds}))
    folder = running.cluster.folder / agent
    await kept(folder / "state" / "training.checkpoint", "steered", at_step=10)
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        paused = await asyncio.to_thread(client.pause, "steered", "heat", now=True)
        assert (paused.phase, paused.n_agents) == (Phase.PAUSED, 0)
        await asyncio.to_thread(client.resume, "steered")
        job = await running.until(lambda job: job.current and job.current.number == 2, "steered")
        assert [record.outcome for record in job.history] == ["paused: by local: heat", "aggregated"]
        (step,) = resumed_at(folder / f"{agent}.log", "steered")
        assert 10 <= step < 60
        assert await adapter(running, "steered", 1) == calm
        await asyncio.to_thread(client.roll_back, "steered", 1, "worse")
    job = await running.ended("steered")
    assert job.phase is Phase.COMPLETED, job.text
    assert [record.outcome.partition(":")[0] for record in job.history[2:]] == [
        "rolled_back",
        "aggregated",
        "completed",
    ]
    assert [(v.version, v.round, v.of) for v in job.versions] == [(1, 1, 0), (2, 1, 1), (3, 2, 0)]
    assert await adapter(running, "steered", 2) == calm, "the same adapter twice"
    assert set(job.evaluations) >= {0, 2, 3}, "version 1 may be left before anybody has measured it"
    before, after = job.evaluations.get(1, {}), job.evaluations[2]
    assert all(before[agent].loss == after[agent].loss for agent in before.keys() & after.keys())


def resumed_at(log: Path, job: str) -> list[int]:
    """From which steps of 60 an agent went on."""
    lines = [line for line in log.read_text().splitlines() if "action=resumed" in line and f"job={job}" in line]
    assert all("of 60" in line for line in lines)
    return [int(line.partition("resumed at step ")[2].split()[0]) for line in lines]


async def kept(path: Path, job: str, *, at_step: int) -> None:
    async with asyncio.timeout(60):
        while (steps_at(path, job, 1) or 0) < at_step:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)


async def adapter(running: Any, job: str, version: int | None = None) -> bytes:
    tar, folder = running.cluster.folder / f"{job}-{version}.tar", running.cluster.folder / f"{job}-{version}"
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        await asyncio.to_thread(client.adapter, job, version, tar)
    unpack(tar, folder)
    return (folder / "adapter_model.safetensors").read_bytes()
