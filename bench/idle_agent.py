"""Resident memory of an idle agent and an idle coordinator, each a real process connected to a real broker.

    python bench/idle_agent.py

Prints RSS and USS (memory that nobody else shares) in MiB, a few seconds after each has connected.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import psutil

from fedpipe.broker import embedded_command, free_port
from fedpipe.cluster import Cluster, Member, port_open

SETTLE_S = 5.0


async def connected(member: Member) -> None:
    while "connected" not in member.log.read_text():  # noqa: ASYNC110 - a log file wakes nobody
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_S)


def show(name: str, pid: int) -> None:
    memory = psutil.Process(pid).memory_full_info()
    print(f"{name:<12} rss {memory.rss / 2**20:6.1f} MiB   uss {memory.uss / 2**20:6.1f} MiB")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster, port = Cluster(Path(folder)), free_port()
        await cluster.add("broker", embedded_command(port))
        await port_open("127.0.0.1", port, 10, "the broker")
        broker = {"url": f"mqtt://127.0.0.1:{port}"}
        configs = {
            "coordinator": {"state_dir": f"{folder}/coordinator/state", "broker": broker, "web": {"port": 0}},
            "agent": {"agent": "agent", "state_dir": f"{folder}/agent/state", "broker": broker},
        }
        for name, config in configs.items():
            member = await cluster.add_daemon(name, name, config)
            await connected(member)
            assert member.process is not None
            show(name, member.process.pid)
        await cluster.stop()


if __name__ == "__main__":
    asyncio.run(main())
