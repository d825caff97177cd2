"""What is measured, part by part: rate, fairness, long links, one model to many."""

from __future__ import annotations

import asyncio
import hashlib
import os
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.transfer_live.node import CLOUD
from bench.transfer_live.nodes import Agents, Live
from bench.transfer_live.world import CHUNK_BYTES, added_cpu_s, content
from coordinator.config import Transfer
from protocol.frames import chunk_for
from protocol.messages import Blob

MB: Final = 10**6
PROBED_WITHIN_S: Final = 10.0
AS_CONFIGURED: Final = {"window": Transfer().window, "budget_bytes": Transfer().budget_bytes}
"""The coordinator's receiving side, unless somebody configures it otherwise."""


async def throughput(port: int, folder: Path, n_bytes: int, n_times: int = 7) -> dict[str, Any]:
    """MB/s of a verified, durable upload and of bare publishes, in turn, medians; and the CPU time that they cost."""
    url = f"mqtt://127.0.0.1:{port}"
    bare, ours, last = [], [], []
    spent = {"bare": [0.0, 0.0], "verified": [0.0, 0.0]}
    async with Live(url, folder, CLOUD, **AS_CONFIGURED) as cloud, Agents(url, folder, ["a0"]) as agent:
        pids = {"sender": agent.pid, "receiver": os.getpid()}
        files = [content(folder, n_bytes, seed) for seed in range(n_times)]
        for path, blob in files:
            with added_cpu_s(spent["bare"], pids.values()):
                started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
                agent.do("publish", path, blob)
                await counting
            bare.append(time.monotonic() - started)
            agent.do("offer", [(path, blob)])
            await agent.answer()
            with added_cpu_s(spent["verified"], pids.values()):
                started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
                cloud.pull("a0", blob)
                await counting
                last.append(time.monotonic() - started)
                await cloud.pulled()
            ours.append(time.monotonic() - started)
        await asyncio.sleep(1.5)  # the broker counts each second
        rates = {
            name: n_bytes / MB / statistics.median(times)
            for name, times in (("bare", bare), ("last chunk", last), ("verified", ours))
        }
        return {
            "mb_per_s": {name: round(rate) for name, rate in rates.items()},
            "ratio_last_chunk": round(rates["last chunk"] / rates["bare"], 2),
            "ratio_verified": round(rates["verified"] / rates["bare"], 2),
            "cpu_s_per_gb": {
                side: {how: round(spent[how][n] * 1e9 / n_bytes / n_times, 2) for how in spent}
                for n, side in enumerate(pids)
            },
            "dropped": cloud.n_dropped,
            "sent_again": cloud.exchange.pulling.receiving.counts.n_voided,
        }


async def fairness(port: int, folder: Path, n_bytes: int, n_agents: int = 10) -> dict[str, Any]:
    """Uploads that begin together: when the last is whole (and when it is verified), over when the first is."""
    url = f"mqtt://127.0.0.1:{port}"
    names = [f"a{n}" for n in range(n_agents)]
    files = [content(folder, n_bytes, 100 + n) for n in range(n_agents)]
    async with AsyncExitStack() as stack:
        cloud = await stack.enter_async_context(Live(url, folder, CLOUD, **AS_CONFIGURED))
        for half in (0, 1):
            agents = await stack.enter_async_context(Agents(url, folder, names[half::2]))
            agents.do("offer", files[half::2])
            await agents.answer()
        started, finished = time.monotonic(), []
        for name, (_, blob) in zip(names, files, strict=True):
            cloud.pull(name, blob)
        for _ in names:
            await cloud.pulled()
            finished.append(time.monotonic() - started)
        whole = [cloud.whole_at[blob.xfer] - started for _, blob in files]
        await asyncio.sleep(1.5)
        return {
            "max_over_min_last_chunk": round(max(whole) / min(whole), 2),
            "max_over_min_verified": round(max(finished) / min(finished), 2),
            "mb_per_s": round(n_agents * n_bytes / MB / max(finished)),
            "dropped": cloud.n_dropped,
            "sent_again": cloud.exchange.pulling.receiving.counts.n_voided,
        }


async def distance(port: int, folder: Path, mbit_per_s: float, n_bytes: int) -> dict[str, Any]:
    """An upload over a link with a round trip of 100 ms: share of its bandwidth that is used, from first grant to last chunk."""
    bytes_per_s = mbit_per_s * 1e6 / 8
    async with AsyncExitStack() as stack:
        url = f"mqtt://127.0.0.1:{port}"
        cloud = await stack.enter_async_context(Live(url, folder, CLOUD, **AS_CONFIGURED))
        agent = await stack.enter_async_context(Agents(url, folder, ["a0"], link=(bytes_per_s, 0.05)))
        path, blob = content(folder, n_bytes, int(mbit_per_s))
        started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
        agent.do("publish", path, blob)
        await counting
        bare_s = time.monotonic() - started
        agent.do("offer", [(path, blob)])
        await agent.answer()
        started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
        cloud.pull("a0", blob)
        await counting
        took_s = time.monotonic() - started
        await cloud.pulled()
        return {
            "mbit_per_s": mbit_per_s,
            "used_ratio": round(n_bytes / took_s / bytes_per_s, 2),
            "bare_used_ratio": round(n_bytes / bare_s / bytes_per_s, 2),
            "sent_again": cloud.exchange.pulling.receiving.counts.n_voided,
        }


async def narrow(
    port: int, folder: Path, mbit_per_s: float, n_bytes: int, n_agents: int, n_processes: int = 4
) -> dict[str, Any]:
    """First uploads of many agents, each behind a narrow link of its own: how much of all their bandwidth is used until the last is whole.

    Each probes its link and cuts its update by what it found, as the daemon does.
    """
    url, bytes_per_s = f"mqtt://127.0.0.1:{port}", mbit_per_s * 1e6 / 8
    names = [f"n{n}" for n in range(n_agents)]
    fleet: list[Agents] = []
    async with AsyncExitStack() as stack:
        cloud = await stack.enter_async_context(Live(url, folder, CLOUD, **AS_CONFIGURED))
        for i in range(n_processes):
            there = Agents(url, folder, names[i::n_processes], link=(bytes_per_s, 0.02))
            fleet.append(await stack.enter_async_context(there))
            fleet[i].do("probe", CHUNK_BYTES, PROBED_WITHIN_S)
        files: dict[str, tuple[Path, Blob]] = {}
        for i, agents in enumerate(fleet):
            for name, carried in zip(names[i::n_processes], await agents.answer(), strict=True):
                path, blob = content(folder, n_bytes, 200 + len(files))
                files[name] = path, msgspec.structs.replace(blob, chunk=chunk_for(carried, CHUNK_BYTES))
            agents.do("offer", [files[name] for name in names[i::n_processes]])
            await agents.answer()
        started = time.monotonic()
        for name, (_, blob) in files.items():
            cloud.pull(name, blob)
        for _ in names:
            await cloud.pulled()
        took_s = time.monotonic() - started
        return {
            "agents": n_agents,
            "mbit_per_s_each": mbit_per_s,
            "chunk_bytes": sorted({blob.chunk for _, blob in files.values()}),
            "seconds": round(took_s, 1),
            "used_ratio": round(n_bytes / bytes_per_s / took_s, 2),
            "sent_again": cloud.exchange.pulling.receiving.counts.n_voided,
        }


async def broadcast(
    port: int, folder: Path, n_bytes: int, n_agents: int, lose: float, n_processes: int = 4
) -> dict[str, Any]:
    """One model to many at once."""
    url = f"mqtt://127.0.0.1:{port}"
    path, blob = content(folder, n_bytes, 7)
    half = n_bytes // 2
    sizes = [
        (half, hashlib.sha256(path.read_bytes()[:half]).hexdigest()),
        (n_bytes, blob.sha256),
        (n_bytes, blob.sha256),
    ]
    names = [f"b{n}" for n in range(n_agents)]
    async with AsyncExitStack() as stack:
        cloud = await stack.enter_async_context(Live(url, folder, CLOUD))
        started_all = [Agents(url, folder, names[i::n_processes], lose=lose) for i in range(n_processes)]
        fleet = [await stack.enter_async_context(agents) for agents in started_all]
        blob = cloud.offer(path, blob)
        for name in names:
            cloud.exchange.announced(name, blob)
        started = time.monotonic()
        for i, agents in enumerate(fleet):
            agents.do("pull", blob, [sizes[n % 3] for n in range(len(names[i::n_processes]))])
        ends = [end for agents in fleet for end in await agents.answer()]
        await asyncio.sleep(1.5)
        return {
            "agents": n_agents,
            "complete": len(ends),
            "lost_ratio": round(sum(e[2] for e in ends) / sum(e[1] for e in ends), 3),
            "sent_over_size": round(cloud.exchange.n_sent_bytes / n_bytes, 2),
            "seconds": round(max(e[0] for e in ends) - started, 2),
            "chunks_each": [min(e[1] for e in ends), max(e[1] for e in ends), blob.n_chunks],
            "dropped": cloud.n_dropped,
        }
