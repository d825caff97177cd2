"""A client that floods every topic it can reach changes nothing: not the model, not the coordinator's memory, not its log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chaos.hostile import NAME, Hostile, access
from coordinator.core.state import Phase
from coordinator.views import FleetView
from fedpipe.client import Coordinator
from fedpipe.unpacking import read_peft, unpack
from protocol.adapters import Adapter

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

GROWTH_BYTES = 96 * 2**20
"""5,000 invented agents are remembered, at some KB each; a queue of what was flooded would be several times this."""
N_FLOOD = 5000
N_LINES = 400
REFUSED = {
    *("bad_message", "wrong_version", "wrong_type", "oversized", "bad_topic", "stranger", "flood", "stale_session"),
    *("stray_chunk", "unknown_job", "damaged"),
}


def peak_bytes(running: Any) -> int:
    status = Path(f"/proc/{running.cluster.members['coordinator'].process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def adapter(running: Any, job: str) -> Adapter:
    tar, folder = running.cluster.folder / f"{job}.tar", running.cluster.folder / job
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        await asyncio.to_thread(client.adapter, job, None, tar)
    unpack(tar, folder)
    return read_peft(folder)


async def look(running: Any) -> FleetView:
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        return await asyncio.to_thread(client.fleet)


async def test_a_flooding_client_changes_nothing(fleet: Callable[..., Any], texts: Any, tmp_path: Path) -> None:
    absent, *honest = sorted(texts)
    rights = tmp_path / "rights"
    rights.write_text("\n".join(access(tuple(honest))) + "\n")
    async with fleet("mosquitto", absent, broker_lines=[f"acl_file {rights}"]) as running:

        async def run(name: str) -> None:
            rounds = {"n_rounds": 2, "start_agents": 2, "min_agents": 2}
            job = {"name": name, "only": [*honest, NAME]}
            await running.submit(running.job_text(job=job, round=rounds, train={"n_steps": 6}))
            ended = await running.ended(name)
            assert ended.phase is Phase.COMPLETED, ended.text

        await run("calm")
        before = peak_bytes(running)
        with Hostile(running.broker_port, job="stormy", seed=1, victims=tuple(honest)) as hostile:
            await run("stormy")
            async with asyncio.timeout(60):  # a quick job is over before there was a flood
                while sum(hostile.n_sent.values()) <= N_FLOOD:  # noqa: ASYNC110 - a counter has no event
                    await asyncio.sleep(0.05)
        seen, after = await look(running), peak_bytes(running)

        calm, stormy = await adapter(running, "calm"), await adapter(running, "stormy")
        assert calm.keys() == stormy.keys()
        for name, factors in calm.items():
            assert np.array_equal(factors.a, stormy[name].a), name
            assert np.array_equal(factors.b, stormy[name].b), name

        assert after - before < GROWTH_BYTES, f"the coordinator grew by {(after - before) / 2**20:.0f} MiB"
        assert seen.counts.keys() >= REFUSED, seen.counts
        lines = running.cluster.members["coordinator"].log.read_text().splitlines()
        assert len(lines) < N_LINES, f"{len(lines)} lines, {sum(seen.counts.values())} refusals"
        assert all(agent in {v.id for v in seen.agents} for agent in honest)
