"""An agent that is killed in the middle of its training goes on from its checkpoint, and nobody can tell from the adapter."""

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


async def test_killed_in_mid_training_it_hands_over_the_same_update(fleet: Callable[..., Any], texts: Any) -> None:
    """The same job twice in one fleet, once in peace: one seed, so one adapter."""
    absent, hurt, _ = sorted(texts)
    rounds = {"n_rounds": 1, "start_agents": 2, "min_agents": 2, "train_s": 60.0, "grace_s": 20.0}
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
        resumed = [line for line in (folder / f"{hurt}.log").read_text().splitlines() if "action=resumed" in line]
        assert len(resumed) == 1
        assert 10 <= int(resumed[0].partition("resumed at step ")[2].split()[0]) < 60
        assert "of 60" in resumed[0]
        assert await adapter(running, "hurt") == calm
        assert not (folder / "state" / "training.checkpoint").exists()


async def kept(path: Path, job: str, *, at_step: int) -> None:
    async with asyncio.timeout(60):
        while (steps_at(path, job, 1) or 0) < at_step:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)


async def adapter(running: Any, job: str) -> bytes:
    tar, folder = running.cluster.folder / f"{job}.tar", running.cluster.folder / f"{job}-adapter"
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        await asyncio.to_thread(client.adapter, job, None, tar)
    unpack(tar, folder)
    return (folder / "adapter_model.safetensors").read_bytes()
