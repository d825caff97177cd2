"""Agents that hang, leave and join late: no round waits longer than it says, and everybody finds the way back."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from coordinator.core.state import Phase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def processes(running: Any, name: str) -> list[psutil.Process]:
    """An agent's daemon and its training child."""
    daemon = psutil.Process(running.cluster.members[name].process.pid)
    return [daemon, *daemon.children(recursive=True)]


def share(job: Any, agent: str) -> str:
    found = job.current.shares.get(agent) if job.current else None
    return found.state if found else ""


async def test_a_hung_agent_and_a_late_one(fleet: Callable[..., Any], texts: Any) -> None:
    hangs, late, stays = sorted(texts)
    async with fleet("mosquitto", late) as running:
        rounds = {"n_rounds": 3, "start_agents": 2, "min_agents": 1, "train_s": 20.0, "grace_s": 3.0}
        await running.submit(running.job_text(round=rounds, train={"n_steps": 15}))
        await running.until(lambda job: share(job, hangs) == "TRAINING")
        frozen = processes(running, hangs)
        for process in frozen:
            process.send_signal(signal.SIGSTOP)
        await running.add_agent(late)
        job = await running.until(lambda job: job.round >= 1)
        first = job.history[0]
        assert first.shares[hangs].state in {"TIMED_OUT", "UPLOADING"}
        assert first.shares[stays].state == "DONE"
        assert late not in first.shares
        assert first.wall_s < 20 + 3 + 10, "the round closed at its deadline"
        for process in frozen:
            process.send_signal(signal.SIGCONT)
        job = await running.ended()
        assert job.phase is Phase.COMPLETED, job.text
        trained = {a for r in job.history[1:] for a, s in r.shares.items() if s.state == "DONE" and s.samples}
        assert late in trained, "the late agent took part as soon as it was there"
        assert job.evaluations[job.version].keys() == set(texts), "all are there at the end"
