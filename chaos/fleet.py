"""A real fleet whose every link can be broken: a proxy before each process and, where permitted, a network around each agent.

    agent ── TUN wire (chaos/network.py) ── proxy (chaos/proxy.py) ──┐
    agent ── TUN wire ───────────────────── proxy ───────────────────┼── mosquitto
    coordinator ─────────────────────────── proxy ───────────────────┘

Everything runs as processes, with real training of a tiny base on the CPU.  Jobs are pinned, so the model of an undisturbed
one is what every other must have, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx
import psutil
import tomli_w

from chaos.network import Network, NotPermitted, Side
from chaos.proxy import Proxy
from coordinator.core.state import ENDED
from coordinator.views import AgentView, JobView
from fedpipe.broker import free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, Member, port_open
from protocol.errors import Unavailable

CLOUD: Final = "coordinator"
BROKER: Final = "broker"
HEARTBEAT_S: Final = 3.0
KEEPALIVE_S: Final = 5
"""The smallest that there is: a vanished peer is noticed within two of them."""
START_S: Final = 60.0
CLOCKS: Final = os.pathsep.join([str(Path(__file__).with_name("clocks")), os.environ.get("PYTHONPATH", "")])


class _Spaced(Cluster):
    """Members that have a network of their own run in it; each has a wall clock of its own (chaos/clocks/)."""

    def __init__(self, folder: Path, sides: Mapping[str, Side]) -> None:
        super().__init__(folder, restart_s=0.2)
        self._sides = sides

    async def add(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Member:
        side = self._sides.get(name)
        clock = {"PYTHONPATH": CLOCKS, "CLOCK_SHIFT": str(self.folder / name / "clock")}
        return await super().add(name, side.command(command) if side else command, {**clock, **(environment or {})})


class Fleet:
    """Broker, coordinator and one agent per text.  `sides` is empty where no networks are permitted, and `why_not` says why.

    A member that dies is started again after a moment, as systemd would.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        texts: Mapping[str, Path],
        *,
        seed: int = 0,
        mqtt: bool = False,
        state_dir: Path | None = None,
        broker_lines: Sequence[str] = (),
    ) -> None:
        self.folder, self.base, self.texts, self.seed = folder, base, dict(texts), seed
        self.state_dir = state_dir or folder / CLOUD / "state"
        self.broker_lines = list(broker_lines)
        self.sides: dict[str, Side] = {}
        self.proxies: dict[str, Proxy] = {}
        self.why_not = ""
        self._mqtt = mqtt
        self._port, self._broker_port = free_port(), free_port()
        self._stack = AsyncExitStack()

    @property
    def agents(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self.texts)

    @property
    def broker_port(self) -> int:
        """Where the broker itself listens, past every proxy."""
        return self._broker_port

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        host = "127.0.0.1"
        try:
            network = await self._stack.enter_async_context(Network(self.agents, self.seed))
            self.sides, host = network.sides, network.host
        except NotPermitted as error:
            self.why_not = str(error)
        for name in [CLOUD, *self.agents]:
            listen = host if name in self.sides else "127.0.0.1"
            proxy = Proxy("127.0.0.1", self._broker_port, listen=listen, mqtt=self._mqtt, seed=self.seed)
            self.proxies[name] = await self._stack.enter_async_context(proxy)
        self.cluster = _Spaced(self.folder, self.sides)
        self._stack.push_async_callback(self.cluster.stop)
        folder = self.folder / BROKER
        folder.mkdir(parents=True)
        await self.cluster.add(BROKER, mosquitto_command(self._broker_port, folder, self.broker_lines))
        await port_open("127.0.0.1", self._broker_port, START_S, "the broker")
        keep = {"update_rounds": 1000, "replay_rounds": 10_000, "min_free_bytes": 0}  # all of it is checked at the end
        cloud = self._common(CLOUD) | {"web": {"port": self._port}, "keep": keep, "state_dir": str(self.state_dir)}
        await self.cluster.add_daemon("coordinator", CLOUD, cloud)
        for agent in self.agents:
            await self.cluster.add_daemon("agent", agent, self._agent(agent))
        await port_open("127.0.0.1", self._port, START_S, "the coordinator")

    def _common(self, name: str) -> dict[str, Any]:
        proxy = self.proxies[name]
        return {
            "state_dir": str(self.folder / name / "state"),
            "broker": {
                "url": f"mqtt://{proxy.host}:{proxy.port}",
                "reconnect_max_s": 2.0,
                "keepalive_s": KEEPALIVE_S,
                "chunk_bytes": 4096,  # some ten chunks an update
            },
            "heartbeat_s": HEARTBEAT_S,
        }

    def _agent(self, agent: str) -> dict[str, Any]:
        return self._common(agent) | {
            "agent": agent,
            "progress_s": 0.5,
            "probe_bytes": 0,
            "data": {"default": {"path": str(self.texts[agent])}},
            "base": {"model_dirs": [str(self.base.parent)]},
            "child": {"threads": 1},
        }

    # ---------------------------------------------------------------------------------------------------------- jobs

    def job_text(self, name: str, **tables: dict[str, Any]) -> str:
        """A job file; every job of the same tables has the same model, whatever its name."""
        n = len(self.agents)
        job: dict[str, Any] = {
            "job": {"name": name, "seed": 3},
            "model": {"source": str(self.base)},
            "adapter": {"targets": ["all"], "rank": 4, "bits": "nf4", "max_rank": 8, "update_dtype": "int8"},
            "train": {"n_steps": 8, "batch": 4, "learning_rate": 3e-3, "max_tokens": 48},
            "round": {
                "n_rounds": 2,
                "start_agents": n,
                "min_agents": 1,
                "train_s": 90.0,
                "grace_s": 30.0,
                "offline_grace_s": 45.0,
                "survey_s": 240.0,  # four imports of torch on a busy machine
                "start_wait_s": 60.0,
                "wait_s": 240.0,
            },
            "evaluate": {"held_out_ratio": 0.15, "max_samples": 8},
        }
        for table, values in tables.items():
            job[table] = job.get(table, {}) | values
        return tomli_w.dumps(job)

    async def submit(self, text: str, within_s: float = 60.0) -> None:
        """Hand in a job, however often that takes.  Raises Unavailable when the coordinator stays away."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    with self._client() as client:
                        await asyncio.to_thread(client.submit, text)
                except (Unavailable, httpx.HTTPError):
                    await asyncio.sleep(0.5)
                else:
                    return

    async def look(self, name: str) -> JobView | None:
        """The job as the API shows it; None while the coordinator is away."""
        with contextlib.suppress(Unavailable, httpx.HTTPError), self._client() as client:
            return await asyncio.to_thread(client.job, name)
        return None

    async def members(self) -> list[AgentView]:
        """All agents as the API shows them; none while the coordinator is away."""
        with contextlib.suppress(Unavailable, httpx.HTTPError), self._client() as client:
            return await asyncio.to_thread(client.agents)
        return []

    async def until(self, name: str, what: Callable[[JobView], bool], within_s: float) -> JobView:
        """The job as soon as `what` is true of it, or it has ended.  Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                job = await self.look(name)
                if job and (what(job) or job.phase in ENDED):
                    return job
                await asyncio.sleep(0.1)

    async def ended(self, name: str, within_s: float) -> JobView:
        """The job as it ended.  Raises TimeoutError."""
        return await self.until(name, lambda _: False, within_s)

    async def until_missed(self, agent: str, within_s: float) -> None:
        """Until the coordinator knows that an agent is gone.  Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while not any(view.id == agent and not view.online for view in await self.members()):
                await asyncio.sleep(0.1)

    async def until_knocking(self, name: str, within_s: float) -> None:
        """Until a member connects anew, because it has noticed that its connection is dead.  Raises TimeoutError."""
        n = self.proxies[name].n_accepted
        async with asyncio.timeout(within_s):
            while self.proxies[name].n_accepted == n:
                await asyncio.sleep(0.1)

    def _client(self) -> Coordinator:
        return Coordinator(f"http://127.0.0.1:{self._port}")

    # ----------------------------------------------------------------------------------------------------- processes

    def processes(self, name: str) -> list[psutil.Process]:
        """A member's process and those below it; empty while it is down."""
        process = self.cluster.members[name].process
        if process is None or process.returncode is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon = psutil.Process(process.pid)
            return [daemon, *daemon.children(recursive=True)]
        return []

    def signal(self, name: str, number: signal.Signals, *, below: bool = False) -> None:
        """Send a signal to a member, with `below` also to its children."""
        for process in self.processes(name)[: None if below else 1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def shift_clock(self, name: str, shift_s: float) -> None:
        """From now on a member's wall clock is wrong by so much; before the fleet starts, from the beginning."""
        path = self.folder / name / "clock"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(shift_s))

    def heal(self) -> None:
        """Every link is good again."""
        for proxy in self.proxies.values():
            proxy.heal()
        for side in self.sides.values():
            side.heal()

    def logs(self) -> dict[str, str]:
        """What every daemon and training child has said so far, by file name."""
        files = [*self.folder.glob("*/*.log"), *self.folder.glob("*/state/*.log")]
        return {str(file.relative_to(self.folder)): file.read_text(errors="replace") for file in sorted(files)}


def masters(job: JobView) -> list[str]:
    """The digest of every version of a job, oldest first."""
    return [version.sha256 for version in job.versions]


def unfinished(job: JobView, n_agents: int) -> str:
    """Why this job may have another model than an undisturbed one; empty when it must have the same."""
    if job.phase != "completed":
        return job.text
    for record in job.history:
        if record.purpose == "train":
            missing = {a: s.state for a, s in record.shares.items() if s.state != "DONE"}
            if record.outcome != "aggregated" or missing or len(record.shares) < n_agents:
                return f"round {record.round}: {record.outcome}, {len(record.shares)} shares, {missing}"
    return ""
