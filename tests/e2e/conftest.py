from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tomli_w

from coordinator.core.state import ENDED
from coordinator.plan_views import PlanView
from coordinator.views import JobView
from fedpipe import corpus, pretrain
from fedpipe.broker import embedded_command, free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, Member, port_open
from protocol.errors import Unavailable
from protocol.files import replacing
from tests.bulk.s3 import KEY_ID, S3, SECRET

LIMIT_S = 900.0 if os.environ.get("FEDPIPE_CRASHES") == "all" else 240.0
"""For a job to end; with some eighty deaths on its way it takes longer."""
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


class ArmedCluster(Cluster):
    """Its daemons run in armed.py, and what dies is started again at once."""

    async def add(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Member:
        if command[1] == "-m" and command[2] in {"agent", "coordinator"}:
            armed = Path(__file__).with_name("armed.py")
            command = [command[0], str(armed), str(self.folder / name / "traps"), *command[2:]]
        return await super().add(name, command, environment)


class Fleet:
    """A real fleet of processes: started, watched over the API, hurt on purpose."""

    def __init__(self, folder: Path, base: Path, texts: dict[str, Path]) -> None:
        self.cluster = Cluster(folder)
        self.base, self.texts = base, texts
        self.limits: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.cloud: dict[str, Any] = {}
        self.chunk_bytes = 256 * 1024
        self.broker_lines: list[str] = []
        self.port = free_port()
        self.broker_port = free_port()

    async def start(self, broker: str, absent: str = "", *, has_agents: bool = True) -> None:
        folder = self.cluster.folder / "broker"
        folder.mkdir(parents=True)
        command = (
            mosquitto_command(self.broker_port, folder, self.broker_lines)
            if broker == "mosquitto"
            else embedded_command(self.broker_port)
        )
        await self.cluster.add("broker", command)
        await port_open("127.0.0.1", self.broker_port, 20, "the broker")
        await self.cluster.add_daemon(
            "coordinator",
            "coordinator",
            self.common("coordinator") | {"web": {"port": self.port}} | self.cloud,
        )
        for agent in self.texts.keys() - {absent} if has_agents else ():
            await self.add_agent(agent)
        await port_open("127.0.0.1", self.port, 30, "the coordinator")

    def common(self, name: str) -> dict[str, Any]:
        return {
            "state_dir": str(self.cluster.folder / name / "state"),
            "broker": {
                "url": f"mqtt://127.0.0.1:{self.broker_port}",
                "reconnect_max_s": 2.0,
                "chunk_bytes": self.chunk_bytes,
            },
            "heartbeat_s": 5.0,
        }

    async def add_agent(self, agent: str) -> None:
        config = {
            "agent": agent,
            "limits": {"http_hosts": ["127.0.0.1"]} | self.limits.get(agent, {}),
            "progress_s": 0.5,
            "data": {"default": {"path": str(self.texts[agent])}},
            "base": {"model_dirs": [str(self.base.parent)]},
            "child": {"threads": 1},
        }
        await self.cluster.add_daemon("agent", agent, self.common(agent) | config | self.settings)

    def job_text(self, **tables: dict[str, Any]) -> str:
        job: dict[str, Any] = {
            "job": {"name": "e2e", "seed": 3},
            "model": {"source": str(self.base)},
            # Everything is pinned, the type of updates too: by measured links it would not be the same in every run.
            "adapter": {"targets": ["all"], "rank": 8, "bits": "nf4", "max_rank": 16, "model_dtype": "fp32"}
            | {"update_dtype": "bf16"},
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

    async def until(self, what: Callable[[JobView], object], name: str = "e2e") -> JobView:
        """Poll the API until something is true of the job; the test's time limit is the bound."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                job = await self.look(name)
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

    async def moved(self) -> dict[str, float]:
        """Bytes that the coordinator sent and received, by route."""
        found = {"bus": 0.0, "store": 0.0}
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self.port}/metrics")).text
        for line in text.splitlines():
            if line.startswith(("fedpipe_sent_bytes_total{", "fedpipe_received_bytes_total{")):
                found[line.split('"')[1]] += float(line.rpartition(" ")[2])
        return found

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


class ArmedFleet(Fleet):
    """A fleet whose processes die at points that are armed: see armed.py."""

    def __init__(self, folder: Path, base: Path, texts: dict[str, Path]) -> None:
        super().__init__(folder, base, texts)
        self.cluster = ArmedCluster(folder, restart_s=0.05)
        self.chunk_bytes = 4096

    def arm(self, member: str, *points: str, trap: str = "") -> None:
        """Set the same trap at each of these points of one process."""
        folder = self.cluster.folder / member / "traps"
        folder.mkdir(parents=True, exist_ok=True)
        for point in points:
            with replacing(folder / point) as file:
                file.write(trap.encode())

    def still_armed(self, *kinds: str) -> list[str]:
        """Traps that have not sprung yet, of these kinds of points or of all."""
        points = {path.name for path in self.cluster.folder.glob("*/traps/*")} - {"sprung"}
        return sorted(point for point in points if not kinds or point.partition(".")[0] in kinds)

    def sprung(self, member: str = "*") -> dict[str, list[int]]:
        """Points at which a trap sprang, with the children that the process had."""
        lines = (log.read_text().splitlines() for log in self.cluster.folder.glob(f"{member}/traps/sprung"))
        return {point: [int(pid) for pid in pids] for point, *pids in map(str.split, chain.from_iterable(lines))}

    async def reached(self, member: str, point: str) -> None:
        """Wait until a trap of one process has sprung."""
        await self.until_it_is(lambda: point in self.sprung(member), f"{member} reached {point}")

    def stands_still(self, member: str) -> bool:
        process = self.cluster.members[member].process
        assert process is not None
        return bool(psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)

    def orphans(self) -> list[int]:
        """Children that live on although their daemon died at a trap."""
        found = []
        for pid in chain.from_iterable(self.sprung().values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                parents = {member.process.pid for member in self.cluster.members.values() if member.process}
                if "agent.worker" in process.cmdline() and process.ppid() not in parents:
                    found.append(pid)
        return found

    def log_lines(self) -> list[str]:
        """Every line of every log, behind the name of its file."""
        logs = sorted(self.cluster.folder.rglob("*.log"))
        return [f"{log.name}: {line}" for log in logs for line in log.read_text(errors="replace").splitlines()]

    async def until_it_is(self, what: Callable[[], Any], why: str) -> None:
        """Wait for something outside the API."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not what():  # noqa: ASYNC110 - other processes bring it about
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(f"it never came about that {why}")


@pytest.fixture(scope="session")
def armed_fleet(base: Path, texts: dict[str, Path]) -> Callable[[Path], ArmedFleet]:
    """A fleet of two agents with traps, not started yet; updates go in many chunks."""

    def made(folder: Path) -> ArmedFleet:
        return ArmedFleet(folder, base, dict(sorted(texts.items())[:2]))

    return made


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """An S3 server with a bucket: started by a call, which brings the [bulk] table for it, and itself."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    server = S3(tmp_path / "s3")

    async def start() -> tuple[dict[str, Any], S3]:
        await asyncio.to_thread(server.start)
        return {"url": "s3://bulk/lab", "endpoint": server.endpoint, "min_bytes": 0}, server

    yield start
    server.kill()


@pytest.fixture
def fleet(tmp_path: Path, base: Path, texts: dict[str, Path]) -> Callable[[str], Any]:
    @asynccontextmanager
    async def running(
        broker: str,
        absent: str = "",
        limits: dict[str, dict[str, Any]] | None = None,
        broker_lines: Sequence[str] = (),
        cloud: dict[str, Any] | None = None,
        **settings: Any,
    ) -> AsyncIterator[Fleet]:
        found = Fleet(tmp_path / "fleet", base, texts)
        found.limits, found.broker_lines, found.settings = limits or {}, list(broker_lines), settings
        found.cloud = cloud or {}
        try:
            await found.start(broker, absent)
            yield found
        finally:
            await found.cluster.stop()

    return running
