"""A broker that takes 128 KB at once, and an S3 server beside it: the road that bulk takes makes no difference to what comes of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.core.state import Phase
from fedpipe.client import Coordinator
from fedpipe.unpacking import unpack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif("FEDPIPE_STORE_TEST" not in os.environ, reason="takes minutes: make test-store"),
]


async def weights(running: Any, job: str) -> str:
    """Digest of what a job brought."""
    tar, folder = running.cluster.folder / f"{job}.tar", running.cluster.folder / job
    with Coordinator(f"http://127.0.0.1:{running.port}") as client:
        await asyncio.to_thread(client.adapter, job, None, tar)
    unpack(tar, folder)
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


async def test_a_job_by_s3_with_a_death_and_the_same_one_without_s3(
    fleet: Callable[..., Any], s3: Callable[[], Any], texts: dict[str, Any]
) -> None:
    bulk, store = await s3()
    first, _, absent = sorted(texts)
    tables = {"round": {"start_agents": 2, "min_agents": 2}, "train": {"n_steps": 2}}
    slow = {first: {"up_bytes_per_s": 20_000}}
    narrow = ["max_packet_size 131072"]
    async with fleet("mosquitto", absent, limits=slow, broker_lines=narrow, cloud={"bulk": bulk}) as running:
        await running.submit(running.job_text(**tables))
        await running.until(lambda job: bool(job.current) and job.current.shares[first].state == "UPLOADING")
        await running.kill(first)
        job = await running.ended()
        assert job.phase is Phase.COMPLETED, job.text
        assert any(f"{first} died (SIGKILL)" in text for _, text in running.cluster.notes)
        by_store = await running.moved()
        assert by_store["bus"] == 0, "all bulk went by the store"
        assert by_store["store"] > 0

        store.kill()
        await running.submit(running.job_text(job={"name": "again"}, **tables))
        job = await running.ended("again")
        assert job.phase is Phase.COMPLETED, job.text
        assert (await running.moved())["store"] == by_store["store"]
        assert (await running.moved())["bus"] >= by_store["store"]
        one, other = [await weights(running, name) for name in ("e2e", "again")]
        assert one == other
        logs = "".join(log.read_text() for log in running.cluster.folder.rglob("*.log"))
        assert "store_down" in logs
        assert "X-Amz-Signature" not in logs, "a signed URL is as good as a password"
