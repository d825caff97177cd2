"""A real fleet that trains nothing: broker, coordinator and agents as their packages start them, and one job of some rounds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import tomli_w

from bench.rounds import noop
from coordinator.core.state import ENDED
from coordinator.views import JobView
from fedpipe.broker import free_port, mosquitto_command
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, port_open
from protocol.errors import Unavailable
from protocol.messages import Matrix

T = TypeVar("T")

RANK: Final = 8
ROOT: Final = Path(__file__).parents[2]
LIMIT_S: Final = 600.0
HEARTBEAT_S: Final = 15.0


class Payload(NamedTuple):
    """What goes each way per agent: `n_bytes` of fp32 in `n_tensors`, two factors for each matrix."""

    n_bytes: int = 8 * 2**20
    n_tensors: int = 64

    @property
    def matrices(self) -> list[Matrix]:
        """As square as the bytes allow, all of one shape."""
        n_matrices = max(1, self.n_tensors // 2)
        width = max(2, self.n_bytes // (4 * RANK * n_matrices))
        return [
            Matrix(name=f"layers.{number:05d}.proj", d_out=width // 2, d_in=width - width // 2)
            for number in range(n_matrices)
        ]


def certificates(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What clients and what mosquitto must be told for TLS with a certificate on each side; made by openssl in `folder`."""
    folder.mkdir(parents=True)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=bench-ca", "-days", "2")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    client = {name: str(folder / file) for name, file in CLIENT_FILES.items()}
    server = [f"cafile {folder}/ca.pem", f"certfile {folder}/server.pem", f"keyfile {folder}/server.key"]
    return client, [*server, "require_certificate true"]


CLIENT_FILES: Final = {"ca_file": "ca.pem", "cert_file": "client.pem", "key_file": "client.key"}


class Broker(NamedTuple):
    """Where the broker of a bench is, as a daemon's configuration says it, and its process."""

    config: dict[str, Any]
    pid: int


async def start_broker(cluster: Cluster, *, has_tls: bool) -> Broker:
    """A mosquitto of its own in `cluster`."""
    port, folder = free_port(), cluster.folder / "broker"
    folder.mkdir(parents=True)
    client, lines = certificates(folder / "keys") if has_tls else ({}, [])
    member = await cluster.add("broker", mosquitto_command(port, folder, ["sys_interval 1", *lines]))
    await port_open("127.0.0.1", port, 20, "the broker")
    assert member.process is not None
    scheme = "mqtts" if has_tls else "mqtt"
    return Broker({"url": f"{scheme}://127.0.0.1:{port}", **client}, member.process.pid)


def plugged(folder: Path) -> dict[str, str]:
    """Environment of processes that find the no-op methods; they are in no distribution, so one is made up in `folder`."""
    info = folder / "fedpipe_rounds_bench-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedpipe-rounds-bench\nVersion: 1\n")
    points = [
        "[fedpipe.methods]",
        *(f"{m.name} = bench.rounds.noop:{name}" for m, name in zip(noop.METHODS, ("AVERAGE", "PRODUCT"), strict=True)),
        "[fedpipe.trainers]",
        *(f"{m.trainer} = bench.rounds.noop:{name}" for m, name in zip(noop.METHODS, ("Values", "Delta"), strict=True)),
    ]
    (info / "entry_points.txt").write_text("\n".join(points) + "\n")
    path = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


class Fleet:
    """A running fleet: `run` does one job of some rounds on it."""

    def __init__(self, cluster: Cluster, broker: Broker, port: int, agents: Sequence[str]) -> None:
        self.cluster, self.broker, self.port, self.agents = cluster, broker, port, agents

    def pids(self) -> dict[str, int]:
        """Process of every member by its name."""
        return {name: m.process.pid for name, m in self.cluster.members.items() if m.process is not None}

    async def known(self) -> None:
        """Wait until the coordinator has the broker, and every agent's report."""
        async with asyncio.timeout(LIMIT_S):
            while not await asyncio.to_thread(self._are_known):  # noqa: ASYNC110 - nothing tells us
                await asyncio.sleep(0.2)

    def _are_known(self) -> bool:
        with Coordinator(f"http://127.0.0.1:{self.port}") as client:
            fleet = client.fleet(brief=True)
        n_known = sum(agent.online and agent.report is not None for agent in fleet.agents)
        return fleet.broker.connected and n_known == len(self.agents)

    async def submit(self, name: str, method: str, n_rounds: int, *, max_rank: int = RANK) -> None:
        """Hand in a job that leaves the planner nothing to decide."""
        text = tomli_w.dumps(job(name, method, n_rounds, len(self.agents), max_rank))
        with Coordinator(f"http://127.0.0.1:{self.port}") as client:
            await asyncio.to_thread(client.submit, text)

    async def look(self, name: str) -> JobView | None:
        """The job as the API shows it; None while nobody answers."""
        return await self._ask(lambda client: client.job(name))

    async def ended(self, name: str, *, every_s: float = 1.0) -> JobView:
        """Wait for the end of a job, asking seldom and for little: an answer costs the coordinator time that would be counted.

        Raises Unavailable when the job or a process of the fleet failed: what was measured then is something else.
        """
        async with asyncio.timeout(LIMIT_S):
            while True:
                if self.cluster.fault or self.cluster.notes:
                    raise self.cluster.fault or Unavailable("; ".join(text for _, text in self.cluster.notes))
                for known in await self._ask(Coordinator.jobs) or []:
                    if known.name == name and known.phase in ENDED:
                        if known.phase != "completed":
                            raise Unavailable(f"job {name}: {known.text}")
                        if (job := await self.look(name)) is not None:
                            return job
                await asyncio.sleep(every_s)

    async def _ask(self, question: Callable[[Coordinator], T]) -> T | None:
        try:
            with Coordinator(f"http://127.0.0.1:{self.port}") as client:
                return await asyncio.to_thread(question, client)
        except Unavailable:
            return None


def job(name: str, method: str, n_rounds: int, n_agents: int, max_rank: int) -> Mapping[str, Any]:
    """A job file."""
    return {
        "job": {"name": name, "method": method, "seed": 1},
        "model": {"source": "toy"},
        "adapter": {
            "targets": ["all"],
            "rank": RANK,
            "max_rank": max_rank,
            "bits": "none",
            "update_dtype": "fp32",
            "model_dtype": "fp32",
        },
        "train": {"n_steps": 1, "batch": 1},
        "round": {
            "n_rounds": n_rounds,
            "min_agents": n_agents,
            "start_agents": n_agents,
            "quorum_ratio": 1.0,
            "train_s": 600.0,
            "grace_s": 60.0,
            "wait_s": 60.0,
        },
        "evaluate": {"every": 1000},
    }


def base(folder: Path, payload: Payload) -> Path:
    """The folder of a base model without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / noop.MATRICES_FILE).write_bytes(msgspec.json.encode(payload.matrices))
    return folder


@asynccontextmanager
async def fleet(
    folder: Path, payload: Payload, *, n_agents: int = 10, has_tls: bool = False, n_together: int = 1
) -> AsyncIterator[Fleet]:
    """Start a fleet in `folder` and end it; the agents as `n_together` in each process (1: as they are deployed)."""
    os.environ |= plugged(folder / "site")  # the members' environment is this process's
    toy, cluster = base(folder / "toy", payload), Cluster(folder)
    names = [m.name for m in noop.METHODS]
    agents, port = [f"agent-{number}" for number in range(n_agents)], free_port()
    try:
        broker = await start_broker(cluster, has_tls=has_tls)
        common = {"broker": broker.config, "heartbeat_s": HEARTBEAT_S}
        own = {"state_dir": f"{folder}/coordinator/state", "web": {"port": port}, "allow_methods": names}
        await cluster.add_daemon("coordinator", "coordinator", common | own)
        configs = [common | agent_config(folder, agent, toy) for agent in agents]
        if n_together == 1:
            for agent, config in zip(agents, configs, strict=True):
                await cluster.add_daemon("agent", agent, config)
        for number, first in enumerate(range(0, n_agents, n_together) if n_together > 1 else ()):
            file = folder / f"together-{number}.json"
            file.write_bytes(msgspec.json.encode(configs[first : first + n_together]))
            await cluster.add(file.stem, [sys.executable, "-m", "bench.rounds.many", str(file)])
        await port_open("127.0.0.1", port, 60, "the coordinator")
        found = Fleet(cluster, broker, port, agents)
        await found.known()
        yield found
    finally:
        await cluster.stop()


def agent_config(folder: Path, agent: str, toy: Path) -> dict[str, Any]:
    """What differs from an agent's defaults."""
    return {
        "agent": agent,
        "state_dir": f"{folder}/{agent}/state",
        "methods": [m.name for m in noop.METHODS],
        "base": {"models": {"toy": str(toy)}},
        "data": {"default": {"path": "nowhere"}},
        "child": {"threads": 1},
    }
