"""Rounds of this product: how long each took and where the time went, what each process used, from the coordinator's own records."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from bench.rounds import watching
from bench.rounds.fleet import Fleet, Payload, fleet
from coordinator.core.state import RoundRecord
from coordinator.views import JobView
from protocol.bus import BrokerConfig, Received, mqtt_bus
from protocol.messages import ExecState

SETTLE_S = 3.0


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one round, one behind the other.

    Fields: down from the plan to the last agent that has its model and begins; up until the last update is verified, durable
    and journalled; fold until the next version is; plan until the next round's shares go out.
    """

    down: float
    up: float
    fold: float
    plan: float


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """One job's figures: medians over its rounds, the first left out because it has no model to download.

    Fields: processor seconds of a round by kind of process, all agents (and all children) together: those of the job less
    those of a job of one round, which has the survey, the export and the round without a model; bytes through the broker in
    both directions of a round; idle RSS in bytes, all agents known, and peak RSS of coordinator, broker, the largest agent and its
    child.
    """

    n_agents: int
    n_bytes: int
    n_tensors: int
    method: str
    has_tls: bool
    rounds_s: list[float]
    phases: Phases
    cpu_s: dict[str, float]
    broker_bytes: float
    idle_bytes: dict[str, int]
    peak_bytes: dict[str, int]

    @property
    def round_s(self) -> float:
        """The median round."""
        return median(self.rounds_s)

    @property
    def peak_over_payload(self) -> float:
        """How many payloads the coordinator held at most, beyond what it holds when idle."""
        return (self.peak_bytes["coordinator"] - self.idle_bytes["coordinator"]) / self.n_bytes


async def measured(
    folder: Path,
    payload: Payload,
    *,
    n_agents: int,
    n_rounds: int,
    method: str,
    has_tls: bool = False,
    n_together: int = 1,
    settle_s: float = SETTLE_S,
) -> Own:
    """One job of so many measured rounds on a fleet of its own."""
    async with fleet(folder, payload, n_agents=n_agents, has_tls=has_tls, n_together=n_together) as found:
        await asyncio.sleep(settle_s)
        pids = found.pids()
        idle = {kind: max(watching.resident_bytes(pid) for pid in of) for kind, of in _kinds(pids).items()}
        await found.submit("warm", method, 2)  # children are started, files and code are warm
        await found.ended("warm", every_s=0.2)
        at = [_cpu(pids)]
        await found.submit("short", method, 1)
        await found.ended("short")
        at.append(_cpu(pids))
        for pid in pids.values():
            watching.forget_peak(pid)
        through = await _broker_bytes(found)
        await found.submit("long", method, n_rounds + 1)
        job = await found.ended("long")
        at.append(_cpu(pids))
        moved = await _broker_bytes(found) - through
        peak = {kind: max(watching.peak_bytes(pid) for pid in of) for kind, of in _kinds(pids).items()}
        rounds, ends = _with_model(job)
        phases = [_phases(record, end) for record, end in zip(rounds, ends, strict=True)]
        return Own(
            n_agents=n_agents,
            n_bytes=rounds[-1].shares[found.agents[0]].bytes_up,
            n_tensors=payload.n_tensors,
            method=method,
            has_tls=has_tls,
            rounds_s=[end - record.opened_at for record, end in zip(rounds, ends, strict=True)],
            phases=Phases(**{name: median(getattr(p, name) for p in phases) for name in Phases.__struct_fields__}),
            cpu_s={kind: (at[2][kind] - 2 * at[1][kind] + at[0][kind]) / n_rounds for kind in at[0]},
            broker_bytes=moved / (n_rounds + 1),
            idle_bytes=idle,
            peak_bytes=peak,
        )


async def in_turn(
    folder: Path, payloads: Sequence[Payload], *, n_agents: int, n_turns: int, n_rounds: int, method: str
) -> list[list[float]]:
    """Seconds of each round with each payload, on fleets that take turns: what the machine does meanwhile meets all of them."""
    async with AsyncExitStack() as stack:
        fleets = [
            await stack.enter_async_context(fleet(folder / str(number), payload, n_agents=n_agents))
            for number, payload in enumerate(payloads)
        ]
        found: list[list[float]] = [[] for _ in payloads]
        for turn in range(n_turns + 1):
            for one, rounds_s in zip(fleets, found, strict=True):
                await one.submit(f"turn-{turn}", method, n_rounds + 1)
                rounds, ends = _with_model(await one.ended(f"turn-{turn}"))
                if turn:  # in the first, children are started, files and code are warmed
                    rounds_s += [end - record.opened_at for record, end in zip(rounds, ends, strict=True)]
        return found


def measured_now(folder: Path, payload: Payload, **how: Any) -> dict[str, Any]:
    """The same as plain values, with what follows from them."""
    found = asyncio.run(measured(folder, payload, **how))
    derived = {"round_s": found.round_s, "fold_s": found.phases.fold, "peak_over_payload": found.peak_over_payload}
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain | derived


def _with_model(job: JobView) -> tuple[list[RoundRecord], list[float]]:
    """The rounds of training in which there was a model to download, which is all but the first, and when the next began."""
    rounds = [record for record in job.history if record.purpose == "train"]
    return rounds[1:], [record.opened_at for record in job.history][2:]


def _phases(record: RoundRecord, next_at: float) -> Phases:
    shares = record.shares.values()
    trained = max(share.entered[ExecState.TRAINING] for share in shares)
    stored, ended = max(share.ended_at for share in shares), record.opened_at + record.wall_s
    return Phases(down=trained - record.opened_at, up=stored - trained, fold=ended - stored, plan=next_at - ended)


def _kinds(pids: dict[str, int]) -> dict[str, list[int]]:
    """Processes by kind; a child is there once its agent has trained."""
    agents = [pid for name, pid in pids.items() if name not in {"broker", "coordinator"}]
    children = [process.pid for pid in agents for process in watching.family(pid)[1:]]
    found = {"broker": [pids["broker"]], "coordinator": [pids["coordinator"]], "agent": agents, "child": children}
    return {kind: of for kind, of in found.items() if of}


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    found = {kind: sum(watching.cpu_s(pid) for pid in of) for kind, of in _kinds(pids).items()}
    return found | {"agent": found["agent"] - found.get("child", 0.0)}


async def _broker_bytes(found: Fleet) -> int:
    """What mosquitto has received and sent, by its own count, of which it tells every second."""
    totals: dict[str, int] = {}
    async with mqtt_bus(msgspec.convert(found.broker.config, BrokerConfig), "bench", lambda: None) as bus:
        await bus.subscribe("$SYS/broker/bytes/received", "$SYS/broker/bytes/sent")
        while len(totals) < 2:
            match await bus.next():
                case Received(topic, payload, retained=False):
                    totals[topic] = json.loads(payload)
                case _:
                    pass
    return sum(totals.values())
