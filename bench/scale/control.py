"""The control plane alone: light agents by the thousand on a real broker and a real coordinator, and what both take for them.

The agents come at the rate of servers that all start within the same seconds, stay idle for some heartbeats, are surveyed and
given a share each, say how far they are at the product's own pace, and are told to stop.  Bulk is not moved (bench/rounds does).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import tomli_w

from agent.config import AgentConfig
from bench.rounds import watching
from bench.rounds.fleet import Broker, Fleet, job, start_broker
from bench.scale.light import Crowd
from coordinator.config import CoordinatorConfig
from coordinator.views import JobView
from fedpipe.broker import free_port
from fedpipe.client import Coordinator
from fedpipe.cluster import Cluster, port_open
from protocol.bus import BrokerConfig, Received, mqtt_bus
from protocol.messages import ExecState

METHOD: Final = "qlora"
CONNECTS_PER_S: Final = 1000.0
LIMIT_S: Final = 300.0
JOB: Final = "light"
IDLE: Final = 'fedpipe_agents{state="idle"}'
OPEN: Final = f'fedpipe_job_shares{{name="{JOB}",state="open"}}'
N_VIEWS: Final = 5
POLL_S: Final = 0.5
EVENTS: Final = "fedpipe_events_total"
ACCEPTED: Final = ExecState.ACCEPTED
SYS: Final = "$SYS/broker/"
SAID: Final = "publish/messages"
Figures: TypeAlias = dict[str, float]


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """Processor seconds a second of each process, and messages a second that the broker took and passed on."""

    cores: dict[str, float]
    messages_per_s: dict[str, float]


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """What so many agents took.

    Fields: joined_s from the first connection until the coordinator has all of them; accepted_s from a share's plan to its
    ACCEPTED in the core, of the median and the last agent; survey_s from the job's submission until the last is asked to train,
    cancelled_s until the coordinator has all free again; what is spent while all are idle and while all train; resident memory of idle
    processes and at its peak; seconds and bytes of GET /v1/fleet, full and brief; n_dropped messages that the broker threw away.
    back_s: after a kill -9 of this process amid training, until all agents have said again what they are and do (two facts each at
    least, birth and report) and no more comes.
    """

    n_agents: int
    n_matrices: int
    joined_s: float
    survey_s: float
    accepted_s: tuple[float, float]
    cancelled_s: float
    idle: Spent
    training: Spent
    idle_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    view_s: dict[str, float]
    view_bytes: dict[str, int]
    n_dropped: int
    back_s: dict[str, float]


async def measured(
    folder: Path, *, n_agents: int, n_matrices: int = 64, window_s: float = 45.0, kills: Sequence[str] = ()
) -> Control:
    """The whole story once; `window_s` is how long processor time is counted for each state, `kills` who dies in between."""
    cluster, port = Cluster(folder), free_port()
    try:
        broker = await start_broker(cluster, has_tls=False)
        config = {"state_dir": f"{folder}/coordinator/state", "web": {"port": port}, "broker": broker.config}
        await cluster.add_daemon("coordinator", "coordinator", config)
        await port_open("127.0.0.1", port, 60, "the coordinator")
        found = Fleet(cluster, broker, port, [])
        async with told_by(broker) as told:
            return await _story(found, told, _crowd(broker, n_agents, n_matrices), window_s, kills)
    finally:
        await cluster.stop()


async def _story(found: Fleet, told: Figures, crowd: Crowd, window_s: float, kills: Sequence[str]) -> Control:
    n = crowd.n_agents
    alone_bytes = watching.resident_bytes(found.pids()["coordinator"])
    joined_s = await _took(_gather(found, crowd), _until(found, lambda m: m[IDLE] >= n))
    idle = await _spent(found, told, window_s)
    resident = {name: watching.resident_bytes(pid) for name, pid in found.pids().items()}
    views = {name: await asyncio.to_thread(_views, found, name) for name in ("full", "brief")}
    survey_s = await _took(_submit(found, n), _until(found, lambda m: m.get(OPEN, 0) >= n))
    accepted = await _accepted(found)
    training = await _spent(found, told, window_s)
    n_dropped = int(told[f"{SAID}/dropped"])
    peak = {name: watching.peak_bytes(pid) for name, pid in found.pids().items()}
    back_s = {who: await _took(_killed(found, who, n)) for who in kills}
    cancelled_s = await _took(_cancel(found), _until(found, lambda m: m[IDLE] >= n))
    return Control(
        n_agents=n,
        n_matrices=crowd.n_matrices,
        joined_s=joined_s,
        survey_s=survey_s,
        accepted_s=accepted,
        cancelled_s=cancelled_s,
        idle=idle,
        training=training,
        idle_bytes=resident | {"coordinator, alone": alone_bytes},
        peak_bytes=peak,
        view_s={name: seconds for name, (seconds, _) in views.items()},
        view_bytes={name: size for name, (_, size) in views.items()},
        n_dropped=n_dropped,
        back_s=back_s,
    )


async def _took(*steps: Awaitable[None]) -> float:
    began = time.monotonic()
    for step in steps:
        await step
    return time.monotonic() - began


def _crowd(broker: Broker, n_agents: int, n_matrices: int) -> Crowd:
    return Crowd(
        host="127.0.0.1",
        port=int(broker.config["url"].rpartition(":")[2]),
        fleet=CoordinatorConfig().fleet,
        method=METHOD,
        n_agents=n_agents,
        n_matrices=n_matrices,
        heartbeat_s=CoordinatorConfig().heartbeat_s,
        progress_s=AgentConfig(agent="a").progress_s,
        connects_per_s=CONNECTS_PER_S,
    )


async def _gather(found: Fleet, crowd: Crowd) -> None:
    file = found.cluster.folder / "crowd.json"
    file.write_bytes(msgspec.json.encode(crowd))
    await found.cluster.add("light", [sys.executable, "-m", "bench.scale.light", str(file)])


async def _submit(found: Fleet, n_agents: int) -> None:
    told = dict(job(JOB, METHOD, 1, n_agents, 8))
    told["round"] = dict(told["round"]) | {"train_s": 3600.0}
    with Coordinator(f"http://127.0.0.1:{found.port}") as client:
        await asyncio.to_thread(client.submit, tomli_w.dumps(told))


async def _cancel(found: Fleet) -> None:
    with Coordinator(f"http://127.0.0.1:{found.port}") as client:
        await asyncio.to_thread(client.cancel, JOB)


async def _killed(found: Fleet, who: str, n_agents: int) -> None:
    before = 0.0 if who == "coordinator" else (await asyncio.to_thread(_metrics, found))[EVENTS]
    await found.cluster.down(who, signal.SIGKILL)
    await found.cluster.up(who)
    await port_open("127.0.0.1", found.port, LIMIT_S, "the coordinator")
    heard = [before]

    def is_quiet(now: dict[str, float]) -> bool:
        heard.append(now[EVENTS])
        return heard[-1] == heard[-2] and heard[-1] - before >= 2 * n_agents

    await _until(found, is_quiet)


# ------------------------------------------------------------------------------------------------------------- looking


def _metrics(found: Fleet) -> dict[str, float]:
    text = urllib.request.urlopen(f"http://127.0.0.1:{found.port}/metrics", timeout=60).read().decode()
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def _until(found: Fleet, holds: Callable[[dict[str, float]], bool]) -> None:
    """Wait for something that the coordinator's figures show."""
    async with asyncio.timeout(LIMIT_S):
        while not holds(await asyncio.to_thread(_metrics, found)):  # noqa: ASYNC110 - its figures wake nobody
            await asyncio.sleep(POLL_S)


async def _spent(found: Fleet, told: Figures, window_s: float) -> Spent:
    """Processor seconds a second of each process, and messages a second through the broker, over so long."""
    pids, began = found.pids(), time.monotonic()
    cpu, before = {name: watching.cpu_s(pid) for name, pid in pids.items()}, dict(told)
    await asyncio.sleep(window_s)
    cores = {name: (watching.cpu_s(pid) - cpu[name]) / window_s for name, pid in pids.items()}
    passed_s = time.monotonic() - began
    rates = {way: (told[f"{SAID}/{way}"] - before.get(f"{SAID}/{way}", 0)) / passed_s for way in ("received", "sent")}
    return Spent(cores=cores, messages_per_s=rates)


def _views(found: Fleet, name: str) -> tuple[float, int]:
    """The median time of GET /v1/fleet, and its size."""
    seconds, size = [], 0
    for _ in range(N_VIEWS):
        began = time.monotonic()
        url = f"http://127.0.0.1:{found.port}/v1/fleet{'?brief=1' if name == 'brief' else ''}"
        size = len(urllib.request.urlopen(url, timeout=60).read())
        seconds.append(time.monotonic() - began)
    return sorted(seconds)[N_VIEWS // 2], size


async def _accepted(found: Fleet) -> tuple[float, float]:
    """From the plan of the open round to ACCEPTED, of the median and the last agent."""
    while True:
        view: JobView | None = await found.look(JOB)
        shares = view.current.shares.values() if view and view.current else []
        took = sorted(share.entered[ACCEPTED] - share.assigned_at for share in shares if ACCEPTED in share.entered)
        if took and len(took) == len(shares):
            return took[len(took) // 2], took[-1]
        await asyncio.sleep(1)


@asynccontextmanager
async def told_by(broker: Broker) -> AsyncIterator[Figures]:
    """What mosquitto tells of itself: kept up to date each second for as long as the block lasts."""
    found: Figures = defaultdict(float)  # it says nothing of what is 0

    async def listen() -> None:
        while True:
            if isinstance(said := await bus.next(), Received):
                found[said.topic.removeprefix(SYS)] = float(json.loads(said.payload))

    async with mqtt_bus(msgspec.convert(broker.config, BrokerConfig), "bench", lambda: None) as bus:
        await bus.subscribe(f"{SYS}publish/messages/#")
        listening = asyncio.create_task(listen())
        yield found
        listening.cancel()
