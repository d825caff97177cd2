from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from coordinator.core.state import ENDED
from coordinator.plan_views import PlanView
from coordinator.views import JobView
from fedpipe import corpus, pretrain
from fedpipe.broker import embedded_command, free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, port_open
from protocol.errors import Unavailable

LIMIT_S = 240.0
HELD_OUT_RATIO = 0.15


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = pretrain.Recipe(hidden=64, intermediate=128, n_layers=2, vocabulary=512, n_steps=120, n_pairs=1500)
    return pretrain.base_model(recipe=recipe, cache=tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for agent, pairs in corpus.shards(3, limit=400).items():
        corpus.write_jsonl(pairs, folder / f"{agent}.jsonl")
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}


class Fleet:
    """A real fleet of processes: started, watched over the API, hurt on purpose."""

    def __init__(self, folder: Path, base: Path, texts: dict[str, Path]) -> None:
        self.cluster = Cluster(folder)
        self.base, self.texts = base, texts
        self.limits: dict[str, dict[str, Any]] = {}
        self.port = free_port()
        self.broker_port = free_port()

    async def start(self, broker: str, absent: str = "") -> None:
        folder = self.cluster.folder / "broker"
        folder.mkdir(parents=True)
        command = (
            mosquitto_command(self.broker_port, folder) if broker == "mosquitto" else embedded_command(self.broker_port)
        )
        await self.cluster.add("broker", command)
        await port_open("127.0.0.1", self.broker_port, 20, "the broker")
        await self.cluster.add_daemon(
            "coordinator",
            "coordinator",
            self.common("coordinator") | {"web": {"port": self.port}},
        )
        for agent in self.texts.keys() - {absent}:
            await self.add_agent(agent)
        await port_open("127.0.0.1", self.port, 30, "the coordinator")

    def common(self, name: str) -> dict[str, Any]:
        return {
            "state_dir": str(self.cluster.folder / name / "state"),
            "broker": {"url": f"mqtt://127.0.0.1:{self.broker_port}", "reconnect_max_s": 2.0},
            "heartbeat_s": 5.0,
        }

    async def add_agent(self, agent: str) -> None:
        config = {
            "agent": agent,
            "limits": self.limits.get(agent, {}),
            "progress_s": 0.5,
            "data": {"default": {"path": str(self.texts[agent])}},
            "base": {"model_dirs": [str(self.base.parent)]},
            "child": {"threads": 1},
        }
        await self.cluster.add_daemon("agent", agent, self.common(agent) | config)

    def job_text(self, **tables: dict[str, Any]) -> str:
        job: dict[str, Any] = {
            "job": {"name": "e2e", "seed": 3},
            "model": {"source": str(self.base)},
            "adapter": {"targets": ["all"], "rank": 8, "bits": "nf4", "max_rank": 16, "model_dtype": "fp32"},
            "train": {"n_steps": 12, "batch": 8, "learning_rate": 3e-3, "max_tokens": 64},
            "round": {"n_rounds": 2, "start_agents": 3, "min_agents": 2, "train_s": 60.0, "grace_s": 20.0},
            "evaluate": {"held_out_ratio": HELD_OUT_RATIO, "max_samples": 64},
        }
        for name, table in tables.items():
            job[name] = job.get(name, {}) | table
        return tomli_w.dumps(job)

    async def submit(self, text: str) -> None:
        with Coordinator(f"http://127.0.0.1:{self.port}") as client:
            await asyncio.to_thread(client.submit, text)

    async def plan(self, job: str = "e2e") -> PlanView:
        with Coordinator(f"http://127.0.0.1:{self.port}") as client:
            return await asyncio.to_thread(client.plan, job)

    async def look(self, name: str = "e2e") -> JobView | None:
        """The job as the API shows it; None while the coordinator is away."""
        try:
            with Coordinator(f"http://127.0.0.1:{self.port}") as client:
                return await asyncio.to_thread(client.job, name)
        except Unavailable:
            return None

    async def until(self, what: Callable[[JobView], bool]) -> JobView:
        """Poll the API until something is true of the job; the test's time limit is the bound."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                job = await self.look()
                if job and what(job):
                    return job
                if job and job.phase in ENDED:
                    pytest.fail(f"the job ended first: {job.text}; notes {self.cluster.notes}")
                await asyncio.sleep(0.1)

    async def ended(self, name: str = "e2e") -> JobView:
        async with asyncio.timeout(LIMIT_S):
            while True:
                job = await self.look(name)
                if job and job.phase in ENDED:
                    return job
                await asyncio.sleep(0.2)

    async def kill(self, name: str) -> None:
        process = self.cluster.members[name].process
        assert process is not None
        process.send_signal(signal.SIGKILL)
        await process.wait()

    async def adapter(self) -> Path:
        from fedpipe.unpacking import unpack

        tar, folder = self.cluster.folder / "adapter.tar", self.cluster.folder / "adapter"
        with Coordinator(f"http://127.0.0.1:{self.port}") as client:
            await asyncio.to_thread(client.adapter, "e2e", None, tar)
        unpack(tar, folder)
        return folder


@pytest.fixture
def fleet(tmp_path: Path, base: Path, texts: dict[str, Path]) -> Callable[[str], Any]:
    @asynccontextmanager
    async def running(
        broker: str, absent: str = "", limits: dict[str, dict[str, Any]] | None = None
    ) -> AsyncIterator[Fleet]:
        found = Fleet(tmp_path / "fleet", base, texts)
        found.limits = limits or {}
        try:
            await found.start(broker, absent)
            yield found
        finally:
            await found.cluster.stop()

    return running
