"""A whole coordinator that may die and come back, its peers, and the moments of a job at which something may happen to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from coordinator.config import CoordinatorConfig
from coordinator.core import events as ev
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, JobState, Phase
from coordinator.daemon import Coordinator
from protocol.bus import BrokerConfig
from protocol.memory_bus import MemoryBroker
from protocol.messages import ExecState
from tests.coordinator.daemon.peer import CHUNK, PATIENCE_S, Peer, topics

GOOD = [("train", 1, "aggregated"), ("train", 2, "aggregated"), ("evaluate", 3, "completed")]


def job_spec(n_agents: int = 2, name: str = "j", **rules: Any) -> JobSpec:
    """Two rounds with everyone, then an evaluation; nothing happens by time alone."""
    tables = {
        "job": {"name": name, "license": "mit"},
        "model": {"source": "toy"},
        "adapter": {"targets": ["all"], "rank": 4, "bits": "nf4", "max_rank": 6, "update_dtype": "fp32"},
        "train": {"n_steps": 2, "batch": 8},
        "round": {"n_rounds": 2, "min_agents": n_agents, "train_s": 1000.0, "offline_grace_s": 1000.0} | rules,
    }
    return msgspec.convert(tables, JobSpec)


class Died(BaseException):
    """The process is gone."""


class Stage:
    """A broker, a coordinator that may die and come back over the same folder, and peers."""

    def __init__(self, folder: Path, stack: AsyncExitStack, **settings: Any) -> None:
        self.folder, self.stack, self.settings = folder, stack, settings
        self.broker = MemoryBroker()
        self.peers: dict[str, Peer] = {}
        self.n_lives = 0
        self.threads = ThreadPoolExecutor()
        self.seen: list[ev.Happened] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._running.done():
            await self.stop()

    async def start(self, after_commit: Callable[[Coordinator], None] | None = None) -> Coordinator:
        """`after_commit` is called when events are durable and not yet handled; it may raise Died."""
        self._stop = asyncio.Event()
        asyncio.get_running_loop().set_default_executor(self.threads)
        config = CoordinatorConfig(
            **{"state_dir": str(self.folder / "cloud"), "broker": BrokerConfig(chunk_bytes=CHUNK)} | self.settings
        )
        self.coordinator = one = Coordinator(config, self.broker.bus("coordinator"))
        append = one.store.append

        def committed(events: Any) -> list[int]:
            seqs = append(events)
            if after_commit:
                after_commit(one)
            return seqs

        one.store.append = committed  # type: ignore[method-assign]
        one.watchers.add(lambda events, _: self.seen.extend(events))
        self._running = asyncio.create_task(one.run(self._stop))
        self.n_lives += 1
        while not one.connected and not self._running.done():  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        return one

    async def peer(self, *names: str) -> None:
        for name in names:
            self.peers[name] = await self.stack.enter_async_context(Peer(self.broker, self.folder, name))

    async def stop(self) -> None:
        """Politely."""
        self._stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await self._running
        self._end_threads()

    async def kill(self) -> None:
        """As kill -9 would: no goodbye, no snapshot; what is in the journal is all there is."""
        self._running.cancel()
        await self.dead()

    async def dead(self) -> None:
        """It is killed, or has died by itself; of anything else it may not die."""
        try:
            with suppress(asyncio.CancelledError):
                await self._running
        except BaseExceptionGroup as deaths:
            if other := deaths.split(Died)[1]:
                raise other from None
        self._end_threads()
        self.coordinator.store.close()
        self.broker.route(topics.coordinator_state(), b"", retain=True)

    def _end_threads(self) -> None:
        """A process that ends takes its threads along: none may go on beside the next life."""
        old, self.threads = self.threads, ThreadPoolExecutor()
        asyncio.get_running_loop().set_default_executor(self.threads)
        old.shutdown()

    async def submit(self, spec: JobSpec) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.coordinator.post(ev.JobSubmitted(spec=spec))

    async def until(self, predicate: Callable[[Coordinator], object]) -> None:
        """Wait for a state that the coordinator is in after a batch of events."""
        assert await self.lives_until(predicate), f"it did not come to that: {self.coordinator.status()}"

    async def lives_until(self, predicate: Callable[[Coordinator], object]) -> bool:
        """Wait for a state or the coordinator's end; whether it came to that state."""
        there, one = asyncio.Event(), self.coordinator

        def look(*_: object) -> None:
            if predicate(one):
                there.set()

        one.watchers.add(look)
        look()
        waiting = asyncio.create_task(there.wait())
        await asyncio.wait([waiting, self._running], timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        one.watchers.discard(look)
        return there.is_set()

    async def ended(self, job: str = "j") -> JobState:
        """The job has ended and is exported."""
        await self.until(lambda _: self.job(job).phase in ENDED)
        await asyncio.gather(*self.coordinator._slow.values())
        return self.job(job)

    def job(self, name: str = "j") -> JobState:
        return self.coordinator.fleet.state.jobs[name]

    def masters(self, job: str = "j") -> list[str]:
        """Digests of the fp32 adapter, one per version: equal digests are equal bytes."""
        versions = self.coordinator.store.versions(job)
        assert [v.version for v in versions] == list(range(1, len(versions) + 1))
        assert all(
            self.coordinator.blobs.has(v.master) and self.coordinator.blobs.has(v.model.sha256) for v in versions
        )
        return [v.master for v in versions]

    def outcomes(self, job: str = "j") -> list[tuple[str, int, str]]:
        return [(r.purpose, r.round, r.outcome) for r in self.coordinator.store.rounds(job)]

    def export(self, job: str = "j") -> Path:
        return self.folder / "cloud" / "exports" / job


async def undisturbed(folder: Path, *peers: str, name: str = "j") -> list[str]:
    """The masters that these peers make when nothing goes wrong."""
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(folder, stack))
        await stage.start()
        await stage.peer(*peers)
        await stage.submit(job_spec(len(peers), name))
        assert (await stage.ended(name)).phase is Phase.COMPLETED
        return stage.masters(name)


def in_round(number: int, phase: Phase, n_done: int = 0) -> Callable[[Coordinator], bool]:
    """The job is in this phase with exactly so many shares done."""

    def there(one: Coordinator) -> bool:
        job = one.fleet.state.jobs["j"]
        shares = job.round.shares.values() if job.round else []
        done = sum(s.state is ExecState.DONE for s in shares)
        return (job.round_number + 1, job.phase, done) == (number, phase, n_done)

    return there


PHASES = {
    "surveys are out": in_round(1, Phase.WAITING),
    "planning": in_round(1, Phase.PLANNING),
    "plans are out": in_round(1, Phase.COLLECTING),
    "one update is here": in_round(1, Phase.COLLECTING, 1),
    "aggregating": in_round(1, Phase.AGGREGATING, 2),
    "plans of round 2 are out": in_round(2, Phase.COLLECTING),
    "one update of round 2 is here": in_round(2, Phase.COLLECTING, 1),
    "aggregating round 2": in_round(2, Phase.AGGREGATING, 2),
    "evaluating": in_round(3, Phase.EVALUATING),
    "one has evaluated": in_round(3, Phase.EVALUATING, 1),
    "completed": in_round(3, Phase.COMPLETED),
}
DEAF = {"one update is here": 1, "one update of round 2 is here": 2, "one has evaluated": 3}
"""The round whose plan peer bb ignores, so that there is such a moment."""
