"""The whole coordinator on a bus in memory, with peers that speak the protocol: a job ends with the same bytes whatever happens.

A Peer is an agent as the bus sees it: it says birth, answers plans with real update files and moves them by the real transfer.
What it trains is drawn from its name and the round, so every undisturbed or disturbed run must end in the same adapter.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.config import CoordinatorConfig
from coordinator.config import Transfer as TransferConfig
from coordinator.core import events as ev
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, JobState, Phase
from coordinator.daemon import Coordinator
from protocol import codec
from protocol.adapters import Factors
from protocol.blobs import Blobs
from protocol.bus import BrokerConfig, Connected, Received
from protocol.errors import Unavailable
from protocol.exchange import Exchange, Outcome, Pulled
from protocol.memory_bus import MemoryBroker
from protocol.messages import (
    Blob,
    Cancel,
    CoordinatorState,
    Done,
    Evaluated,
    ExecState,
    Execution,
    Grant,
    Matrix,
    Offer,
    Plan,
    Presence,
    Progress,
    Rebirth,
    Refuse,
    Report,
    Surveyed,
)
from protocol.models import read_model
from protocol.outgoing import Outgoing
from protocol.spool import Spool
from protocol.topics import FromCoordinator, ToAgent, Topics
from protocol.transfer import Receiving
from protocol.updates import write_update

MATRICES = (Matrix(name="model.k", d_out=24, d_in=32), Matrix(name="model.q", d_out=32, d_in=32))
SURVEYED = Surveyed(base_sha256="b" * 64, matrices=list(MATRICES), n_train=90, n_eval=10)
CHUNK = 1024
PATIENCE_S = 10.0
topics = Topics("main")


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


# --------------------------------------------------------------------------------------------------------------- peers


class Peer:
    """An agent as the bus sees it.  `forge` may change what it offers; it ignores the plans of round `deaf_in`."""

    def __init__(self, broker: MemoryBroker, folder: Path, name: str) -> None:
        self.name, self.folder, self.broker = name, folder / name, broker
        self.outgoing = Outgoing(time.monotonic)
        self.bus = broker.bus(name, lambda: self.outgoing.will(topics.up(name, "state"), self.presence(online=False)))
        self.forge: Callable[[Plan, Path, Offer], Offer] = lambda _plan, _path, offer: offer
        self.deaf_in: int | None = None
        self.plans: list[Plan] = []
        self.offers: dict[str, Offer] = {}
        self.accepted: list[str] = []
        self.refused: list[Refuse] = []
        self.was_refused = asyncio.Event()
        self.commands: asyncio.Queue[Cancel | Rebirth] = asyncio.Queue()
        self._files: dict[str, Path] = {}
        self._training: dict[str, Plan] = {}
        self._coordinator = ""
        self._serial = 0
        self._moved = asyncio.Event()
        self.exchange = Exchange(
            bus=self.bus,
            spool=Spool(Blobs(self.folder)),
            receiving=Receiving(timeout_s=0.5),
            clock=time.monotonic,
            say=lambda _, message: self.say("answer", message),
            chunk_topic=lambda _, xfer: topics.up_chunk(name, xfer),
            blob_topic=topics.blob,
            source=self._files.get,
            outcome=self._model_ended,
        )

    async def __aenter__(self) -> Self:
        self._stack = await AsyncExitStack().__aenter__()
        await self._stack.enter_async_context(self.bus)
        await self.bus.subscribe(*topics.agent_subscriptions(self.name))
        work = (self._read(), self._tick(), self.exchange.run(), self.outgoing.run(self.bus))
        self._tasks = [asyncio.create_task(one) for one in work]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
        await self._stack.aclose()

    def say(self, leaf: Any, body: Any, **how: Any) -> None:
        self.outgoing.say(topics.up(self.name, leaf), body, **how)

    def presence(self, *, online: bool) -> Presence:
        return Presence(session=self.outgoing.session, online=online, reason="cut", methods=["qlora"])

    def birth(self) -> None:
        self.say("state", self.presence(online=True), retain=True)
        self.exchange.connected()
        for offer in self.offers.values():
            self.say("offer", offer)

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected():
                    self.birth()
                case Received(topic, payload, _) if payload:
                    match topics.parse(topic):
                        case ToAgent(leaf="d", xfer=xfer):
                            self.exchange.chunk("coordinator", xfer, payload)
                        case FromCoordinator(leaf="blob", name=xfer):
                            self.exchange.chunk("coordinator", xfer, payload, heard=True)
                        case ToAgent() | FromCoordinator():
                            self._hear(codec.decode(payload).b)
            self._moved.set()

    async def _tick(self) -> None:
        while True:
            self._moved.clear()
            due = self.exchange.wake_at
            with suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                    await self._moved.wait()
            self.exchange.tick()

    def _hear(self, body: object) -> None:
        match body:
            case CoordinatorState(session=session, online=True) if session != self._coordinator:
                known, self._coordinator = self._coordinator, session
                if known:
                    self.birth()
            case Plan():
                self.plans.append(body)
                if body.round != self.deaf_in:
                    self._work(body)
            case Grant():
                self.exchange.granted("coordinator", body)
            case Done(xfer=xfer):
                self.accepted.append(xfer)
                self.offers.pop(xfer, None)
            case Refuse():
                self.refused.append(body)
                self.was_refused.set()
                if not body.retry_after_s:
                    self.offers.pop(body.xfer, None)
            case Cancel() | Rebirth():
                self.commands.put_nowait(body)

    # ---------------------------------------------------------------------------------------------------------- work

    def moves(self, plan: Plan, state: ExecState, **found: Any) -> None:
        self._serial += 1
        said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt}
        self.say("exec", Execution(**said, serial=self._serial, state=state, **found))

    def _work(self, plan: Plan) -> None:
        mine = [o for o in self.offers.values() if (o.job, o.round) == (plan.job, plan.round)]
        if mine:
            self.say("offer", mine[0])
        elif plan.purpose == "survey":
            self.moves(plan, ExecState.DONE, surveyed=SURVEYED)
        elif plan.model is not None:
            self._training[plan.model.xfer] = plan
            self.exchange.pull("coordinator", plan.model, listen=plan.broadcast)
        else:
            self._train(plan)

    async def _model_ended(self, end: Outcome) -> None:
        assert isinstance(end, Pulled), end
        plan = self._training.pop(end.blob.xfer)
        assert sum(f.rank for f in read_model(end.path, max_bytes=2**30).values()) > 0
        end.path.unlink()
        self._train(plan)

    def _train(self, plan: Plan) -> None:
        loss = 3.0 - 0.5 * plan.version + 0.1 * len(self.name)
        found = Evaluated(version=plan.version, n_samples=10, n_tokens=99, loss=loss)
        if plan.purpose == "evaluate":
            self.moves(plan, ExecState.DONE, evaluated=found)
            return
        self.moves(plan, ExecState.TRAINING, evaluated=found)
        offer = self.update(plan)
        self.offers[offer.blob.xfer] = offer
        self.exchange.sending.add(offer.blob)
        self.say("offer", offer)

    def update(self, plan: Plan) -> Offer:
        path = self.folder / f"{plan.job}-{plan.round}.update"
        write_update(path, self.factors(plan), job=plan.job, round=plan.round, attempt=plan.attempt, dtype="fp32")
        said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt, "kind": "lora", "blob": blob_of(path)}
        offer = self.forge(plan, path, Offer(**said, samples=4 + len(self.name), loss=2.5, train_s=3.0))
        self._files[offer.blob.xfer] = path
        return offer

    def factors(self, plan: Plan) -> dict[str, Factors]:
        rng = np.random.default_rng(int.from_bytes(f"{self.name}/{plan.round}".encode(), "big"))

        def draw(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        return {
            m.name: Factors(a=draw(plan.ranks[m.name], m.d_in), b=draw(m.d_out, plan.ranks[m.name])) for m in MATRICES
        }


def blob_of(path: Path) -> Blob:
    data = path.read_bytes()
    return Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk=CHUNK)


# ----------------------------------------------------------------------------------------------------------- the stage


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


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Stage(tmp_path, stack))


GOOD = [("train", 1, "aggregated"), ("train", 2, "aggregated"), ("evaluate", 3, "completed")]


async def undisturbed(folder: Path, *peers: str, name: str = "j") -> list[str]:
    """The masters that these peers make when nothing goes wrong."""
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(folder, stack))
        await stage.start()
        await stage.peer(*peers)
        await stage.submit(job_spec(len(peers), name))
        assert (await stage.ended(name)).phase is Phase.COMPLETED
        return stage.masters(name)


# ------------------------------------------------------------------------------------------------------- the good day


async def test_a_job_from_the_first_survey_to_the_exported_adapter(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb", "ccc")
    await stage.submit(job_spec(3))
    job = await stage.ended()
    assert (job.phase, job.version, job.reason) == (Phase.COMPLETED, 2, "")
    assert stage.outcomes() == GOOD
    records = stage.coordinator.store.rounds("j")
    assert [sorted(r.shares) for r in records] == [["a", "bb", "ccc"]] * 3
    assert [r.shares["bb"].samples for r in records] == [6, 6, 0]
    assert [found.loss for r in records if (found := r.shares["bb"].evaluated)] == pytest.approx([3.2, 2.7, 2.2])
    assert all(len(p.accepted) == 2 and not p.refused and not p.offers for p in stage.peers.values())

    found = load_file(stage.export() / "adapter_model.safetensors")
    master = read_model(stage.coordinator.blobs.path(stage.masters()[-1]), max_bytes=2**30)
    assert {m.name for m in MATRICES} == set(master)
    for name, factors in master.items():
        assert np.array_equal(found[f"base_model.model.{name}.lora_A.weight"][: factors.rank], factors.a)
        assert np.array_equal(found[f"base_model.model.{name}.lora_B.weight"][:, : factors.rank], factors.b)
    config = json.loads((stage.export() / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == max(factors.rank for factors in master.values())
    told = json.loads((stage.export() / "fedpipe.json").read_text())["rounds"]
    assert [entry["loss"] for entry in told] == pytest.approx([2.7, 2.2])

    versions = stage.coordinator.store.versions("j")
    assert stage.coordinator.exchange.n_sent_bytes == sum(v.model.size for v in versions), "one copy for all three"
    left = set(stage.coordinator.blobs)
    models = {v.model.sha256 for v in versions}
    assert left == models | set(stage.masters()), "updates are deleted once their aggregate is journalled"
    assert [t for t in stage.broker.retained if t.endswith("/plan")] == []


async def test_the_first_version_is_the_weighted_sum_of_what_was_trained(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(lambda _: stage.job().version == 1)
    master = read_model(stage.coordinator.blobs.path(stage.masters()[0]), max_bytes=2**30)
    plans = [p.plans[1] for p in stage.peers.values()]
    for matrix in MATRICES:
        parts = [p.factors(plan)[matrix.name] for p, plan in zip(stage.peers.values(), plans, strict=True)]
        whole = sum(n / 11 * f.b.astype(np.float64) @ f.a for n, f in zip((5, 6), parts, strict=True))
        u, s, v = np.linalg.svd(whole)
        best = u[:, :6] * s[:6] @ v[:6]
        assert np.allclose(master[matrix.name].b @ master[matrix.name].a, best, atol=1e-4)
    await stage.ended()


async def test_two_jobs_side_by_side_do_not_disturb_each_other(stage: Stage, tmp_path: Path) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await asyncio.gather(stage.submit(job_spec(name="j")), stage.submit(job_spec(name="k")))
    assert (await stage.ended("j")).phase is (await stage.ended("k")).phase is Phase.COMPLETED
    for name in ("j", "k"):
        assert stage.outcomes(name) == GOOD
        assert stage.masters(name) == await undisturbed(tmp_path / name, "a", "bb", name=name)


# ------------------------------------------------------------------------------------------------------------ restarts


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


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The masters of peers a and bb."""
    return asyncio.run(undisturbed(tmp_path_factory.mktemp("undisturbed"), "a", "bb"))


@pytest.mark.parametrize("polite", [False, True], ids=["killed", "stopped"])
@pytest.mark.parametrize("phase", PHASES)
async def test_a_restart_in_any_phase_ends_in_the_same_adapter(
    stage: Stage, wanted: list[str], phase: str, *, polite: bool
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = DEAF.get(phase)
    await stage.submit(job_spec())
    await stage.until(PHASES[phase])
    await (stage.stop() if polite else stage.kill())
    before = stage.job()
    stage.peers["bb"].deaf_in = None
    await stage.start()
    assert stage.job().round_number >= before.round_number, "nothing that was handled is forgotten"
    assert stage.job().members.keys() >= before.members.keys()
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert (stage.export() / "adapter_model.safetensors").is_file()
    assert stage.job().attempt == 0, "no round had to be repeated"


@pytest.mark.parametrize("seed", range(3))
async def test_killed_after_one_commit_after_another_it_ends_in_the_same_adapter(
    stage: Stage, wanted: list[str], seed: int
) -> None:
    """Every life of the coordinator ends after a few commits, between the journal and the core."""
    draw = random.Random(seed)
    left = 0

    def die(_: Coordinator) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise Died

    await stage.peer("a", "bb")
    await stage.start()
    await stage.submit(job_spec())
    await stage.kill()
    while stage.job().phase not in ENDED:
        left = draw.randint(1, 6)
        await stage.start(die)
        if not await stage.lives_until(lambda _: stage.job().phase in ENDED):
            await stage.dead()
    await stage.kill()
    await stage.start()
    job = await stage.ended()
    assert job.phase is Phase.COMPLETED, job.reason
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert (stage.export() / "adapter_model.safetensors").is_file()
    assert stage.n_lives > 8


async def test_a_broker_that_dies_and_comes_back_empty_changes_nothing(stage: Stage, wanted: list[str]) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 2
    await stage.submit(job_spec())
    for phase in ("plans are out", "one update of round 2 is here"):
        await stage.until(PHASES[phase])
        stage.broker.stop()
        stage.broker.start()
    stage.peers["bb"].deaf_in = None
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD


async def test_a_plan_that_was_withdrawn_without_a_broker_does_not_wait_there_for_an_agent(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    stage.peers["a"].deaf_in = 1
    await stage.submit(job_spec(1))
    await stage.until(PHASES["plans are out"])
    stage.broker.hold("a")
    await stage.until(lambda one: not one.fleet.state.agents["a"].online)
    stage.broker.hold("coordinator")
    await stage.coordinator.post(ev.JobCancelled(job="j"))
    for _ in range(50):  # its words are lost by now
        await asyncio.sleep(0)
    assert topics.down("a", "plan") in stage.broker.retained
    cleared = asyncio.Event()
    stage.broker.drop = lambda topic, payload: bool(topic == topics.down("a", "plan") and not payload and cleared.set())
    stage.broker.release("coordinator")
    async with asyncio.timeout(PATIENCE_S):
        await cleared.wait()
    assert topics.down("a", "plan") not in stage.broker.retained


# ----------------------------------------------------------------------------------------------------- what is unusable


def rewrite(path: Path, offer: Offer, change: Callable[[bytes], bytes]) -> Offer:
    path.write_bytes(change(path.read_bytes()))
    return msgspec.structs.replace(offer, blob=blob_of(path))


def other_file(plan: Plan, path: Path, offer: Offer, **changes: Any) -> Offer:
    """The update written otherwise than it is offered."""
    ranks, d_in = changes.pop("rank", 4), changes.pop("d_in", 32)
    factors = {
        m.name: Factors(np.ones((ranks, d_in), np.float32), np.ones((m.d_out, ranks), np.float32)) for m in MATRICES
    }
    said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt} | changes
    write_update(path, factors, **said, dtype="fp32")
    return msgspec.structs.replace(offer, blob=blob_of(path))


NAN = np.float32(np.nan).tobytes()
FORGERIES: dict[str, tuple[Callable[[Plan, Path, Offer], Offer], str]] = {
    "wrong shape": (lambda plan, path, offer: other_file(plan, path, offer, d_in=31), "has shape"),
    "rank too high": (lambda plan, path, offer: other_file(plan, path, offer, rank=5), "has rank 5"),
    "not a number": (lambda _, path, offer: rewrite(path, offer, lambda data: data[:-4] + NAN), "not finite"),
    "truncated": (lambda _, path, offer: rewrite(path, offer, lambda data: data[:-9]), "truncated"),
    "no update at all": (lambda _, path, offer: rewrite(path, offer, lambda _: b"\xde\xad" * 2000), "header"),
    "too large": (lambda _, path, offer: rewrite(path, offer, lambda data: data + bytes(10**6)), "the plan allows"),
    "of another round": (lambda plan, path, offer: other_file(plan, path, offer, round=9), "offered as j round 1.0"),
    "of another job": (lambda plan, path, offer: other_file(plan, path, offer, job="k"), "offered as j round"),
    "other bytes than promised": (
        lambda _plan, _path, offer: msgspec.structs.replace(
            offer, blob=msgspec.structs.replace(offer.blob, sha256="a" * 64)
        ),
        "digest",
    ),
    "of another kind": (lambda _p, _f, offer: msgspec.structs.replace(offer, kind="dense"), "'dense'"),
    "trained on nothing": (lambda _p, _f, offer: msgspec.structs.replace(offer, samples=0), "no sample"),
    "trained on too much": (lambda _p, _f, offer: msgspec.structs.replace(offer, samples=17), "17 samples claimed"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_hostile_update_is_declined_and_the_round_goes_on(
    stage: Stage, wanted: list[str], forgery: str
) -> None:
    forge, told = FORGERIES[forgery]
    await stage.start()
    await stage.peer("a", "bb", "mallory")
    mallory = stage.peers["mallory"]
    mallory.forge = lambda plan, path, offer: forge(plan, path, offer) if plan.round == 1 else offer
    await stage.submit(job_spec(3, n_rounds=1, min_agents=2, start_agents=3))
    assert (await stage.ended()).phase is Phase.COMPLETED
    (first, _) = stage.coordinator.store.rounds("j")
    assert {a: s.state for a, s in first.shares.items()} == {"a": "DONE", "bb": "DONE", "mallory": "FAILED"}
    assert first.shares["mallory"].reason.startswith("bad update: ")
    assert told in first.shares["mallory"].reason
    assert [r.reason for r in mallory.refused] == [first.shares["mallory"].reason]
    assert mallory.accepted == []
    assert stage.masters() == wanted[:1], "as if mallory had not been there"
    async with asyncio.timeout(10):  # the adapter and its model; nothing of mallory's
        while len(list(stage.coordinator.blobs)) != 2:  # noqa: ASYNC110 - files have no event
            await asyncio.sleep(0.01)
    assert list(stage.coordinator.blobs.partial.iterdir()) == []


async def test_an_offer_in_the_name_of_a_file_that_others_need_does_not_delete_it(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb", "mallory")

    def steal(plan: Plan, _path: Path, offer: Offer) -> Offer:
        job = stage.coordinator.fleet.state.jobs["j"]
        known = [s.offer.blob.sha256 for s in job.round.shares.values() if s.offer] if job.round else []
        digest = job.master if plan.round == 2 else next(iter(known), "a" * 64)
        return msgspec.structs.replace(offer, blob=Blob(sha256=digest, size=1, chunk=CHUNK))

    stage.peers["mallory"].forge = steal
    await stage.submit(job_spec(3, min_agents=2, start_agents=3))
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert [r.shares["mallory"].state for r in stage.coordinator.store.rounds("j")[:2]] == ["FAILED"] * 2
    assert stage.masters() == wanted, "as if mallory had not been there"


async def test_ever_new_offers_for_one_share_do_not_pile_up(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    plan = bb.plans[-1]
    await bb.__aexit__()  # it has none of these, and would say so
    said = {"job": plan.job, "round": plan.round, "attempt": plan.attempt, "kind": "lora", "samples": 1}
    for number in range(100):
        blob = Blob(sha256=f"{number:064x}", size=9_000, chunk=CHUNK)
        stage.broker.route(topics.up("bb", "offer"), bb.outgoing.encode(Offer(**said, blob=blob)))  # type: ignore[arg-type]
    await stage.until(lambda one: one.traffic.is_fetching("bb", blob))
    assert len(stage.coordinator.exchange.receiving) == 1
    assert len(list(stage.coordinator.blobs.partial.iterdir())) <= 2, "its data and its log"


async def test_an_update_for_a_round_that_is_not_open_is_declined_and_the_share_stays(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    bb = stage.peers["bb"]
    bb.deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    plan = bb.plans[-1]
    for number in (0, 2, 7):
        blob = Blob(sha256=f"{number}" * 64, size=99)
        bb.say("offer", Offer(job="j", round=number, attempt=0, kind="lora", blob=blob, samples=3))
    await stage.until(lambda one: one.fleet.state.counts.get("superseded_update") == 3)
    assert stage.job().round is not None
    assert stage.job().round.shares["bb"].state is ExecState.OFFERED
    bb._work(plan)
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted
    assert len(bb.refused) == 3


async def test_bad_messages_are_counted_and_logged_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await stage.start()
    await stage.peer("a", "bb")
    bad = {
        topics.up("a", "exec"): [b"\xc1", b"", b"\x93", b"x" * 100],
        topics.up("a", "offer"): [stage.peers["a"].outgoing.encode(Rebirth())],
        topics.up("a", "progress"): [b"\x81\xa1v\x02"],
        f"{topics.root}/a/a/up/nonsense": [b"1"],
        f"{topics.root}/a/a/up/d/{'f' * 32}": [b"no frame"],
        topics.up("bb", "state"): [b"\x80"],
    }
    await stage.until(lambda one: len(one.fleet.state.agents) == 2)
    for topic, payloads in bad.items():
        for payload in payloads:
            stage.broker.route(topic, payload)
    await stage.submit(job_spec())
    assert (await stage.ended()).phase is Phase.COMPLETED
    counts = {"bad_message": 4, "wrong_type": 1, "wrong_version": 1, "bad_topic": 1}
    assert stage.coordinator.intake.gate.counts == counts, (
        "an empty payload clears a topic, and nobody waits for that chunk"
    )
    told = [(vars(r)["topic"], vars(r)["kind"]) for r in caplog.records if vars(r).get("action") == "bad_message"]
    assert told == [
        (topics.up("a", "exec"), "bad_message"),
        (topics.up("a", "offer"), "wrong_type"),
        (topics.up("a", "progress"), "wrong_version"),
        (f"{topics.root}/a/a/up/nonsense", "bad_topic"),
        (topics.up("bb", "state"), "bad_message"),
    ], "once per kind and agent"


async def test_a_word_of_another_session_changes_nothing_and_birth_is_asked_for(
    stage: Stage, wanted: list[str]
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    bb = stage.peers["bb"]
    forged = Execution(job="j", round=1, attempt=0, serial=99, state=ExecState.FAILED, reason="forged")
    stage.broker.route(topics.up("bb", "exec"), codec.encode(forged, session="f" * 16, seq=1, now=1.0))
    async with asyncio.timeout(PATIENCE_S):
        assert await bb.commands.get() == Rebirth()
    assert stage.coordinator.intake.gate.counts == {"stale_session": 1}
    bb._work(bb.plans[-1])
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


# ------------------------------------------------------------------------------------------------------------- journal


async def test_a_journal_row_that_cannot_be_read_is_skipped(
    stage: Stage, wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    await stage.until(PHASES["plans are out"])
    await stage.coordinator.post(ev.Tick())
    await stage.kill()
    await stage.start()  # its rows are not in a snapshot
    rows = stage.coordinator.store._db
    (seq,) = rows.execute("SELECT MAX(seq) FROM journal WHERE kind = 'Tick'").fetchone()
    await stage.kill()
    await stage.start()
    stage.coordinator.store._db.execute("UPDATE journal SET body = ? WHERE seq = ?", (b"\xc1", seq))
    await stage.kill()
    caplog.clear()
    await stage.start()
    assert [vars(r)["seq"] for r in caplog.records if vars(r).get("action") == "poison"] == [seq]
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert stage.masters() == wanted


async def test_an_event_that_the_core_cannot_take_is_poison_and_its_neighbours_are_not(
    stage: Stage, wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.coordinator.tell(ev.AgentJoined(agent="c", session="c" * 16, methods=["other"]))
    stage.coordinator.tell(ev.JobCancelled(job=[]))  # type: ignore[arg-type]
    await stage.submit(job_spec())
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert "c" in stage.coordinator.fleet.state.agents
    assert stage.masters() == wanted
    assert stage.outcomes() == GOOD
    assert len([r for r in caplog.records if vars(r).get("action") == "poison"]) == 1
    caplog.clear()
    await stage.kill()
    await stage.start()
    assert stage.job().phase is Phase.COMPLETED
    assert [r for r in caplog.records if vars(r).get("action") == "poison"] == []


@pytest.mark.parametrize("poison_first", [True, False])
async def test_no_wish_of_poisons_neighbours_is_lost(stage: Stage, *, poison_first: bool) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    for peer in stage.peers.values():
        peer.deaf_in = 2
    await stage.submit(job_spec())
    await stage.until(PHASES["plans of round 2 are out"])
    poison, cancel = ev.JobCancelled(job=[]), ev.JobCancelled(job="j")  # type: ignore[arg-type]
    for event in (poison, cancel) if poison_first else (cancel, poison):
        stage.coordinator.tell(event)
    assert (await stage.ended()).phase is Phase.CANCELLED
    assert stage.outcomes() == [GOOD[0], ("train", 2, "cancelled by the operator")]
    assert (stage.export() / "adapter_model.safetensors").is_file()
    for peer in stage.peers.values():
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(await peer.commands.get(), Cancel)


async def test_a_disk_that_refuses_the_journal_is_told_and_waited_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.daemon.DISK_RETRY_S", 0.01)
    full, refused, loop = True, asyncio.Semaphore(0), asyncio.get_running_loop()

    def refuse(_: Coordinator) -> None:
        if full:
            loop.call_soon_threadsafe(refused.release)
            raise Unavailable("no space")

    one = await stage.start(refuse)
    with pytest.raises(Unavailable, match="no space"):
        await one.post(ev.JobSubmitted(spec=job_spec()))
    assert "j" not in one.fleet.state.jobs
    await stage.peer("a", "bb")
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            await refused.acquire()
    full = False
    await stage.submit(job_spec(name="k"))
    assert (await stage.ended("k")).phase is Phase.COMPLETED


# ------------------------------------------------------------------------------------------------------------ presence


async def test_a_heartbeat_of_an_unknown_session_is_answered_by_a_rebirth(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    a = stage.peers["a"]
    await stage.until(lambda one: one.fleet.state.agents.get("a"))
    a.say("progress", Progress())
    a.outgoing.session = "e" * 16
    for _ in range(5):
        a.say("progress", Progress())
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await a.commands.get(), Rebirth)
    a.birth()
    await stage.until(lambda one: one.fleet.state.agents["a"].session == "e" * 16)
    a.say("progress", Progress(step=3))
    await stage.submit(job_spec(1))
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert a.commands.empty(), "it is not asked again and again"


async def test_a_vanished_agent_is_gone_at_once_and_a_silent_one_soon(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.05))
        await stage.start()
        await stage.peer("a", "bb")
        await stage.until(lambda one: len(one.fleet.state.agents) == 2)
        stage.broker.hold("a")
        await stage.until(lambda one: not one.fleet.state.agents["a"].online)
        assert stage.coordinator.fleet.state.agents["a"].reason == "cut", "its will"
        await stage.until(lambda one: not one.fleet.state.agents["bb"].online)
        assert stage.coordinator.fleet.state.agents["bb"].reason == "silent: no heartbeat"
        assert sum(isinstance(e, ev.AgentLeft) for e in stage.seen) == 2
        stage.peers["bb"].say("progress", Progress())
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance(await stage.peers["bb"].commands.get(), Rebirth)
        stage.peers["bb"].birth()
        await stage.until(lambda one: one.fleet.state.agents["bb"].online)


async def beating(stage: Stage, holds: Callable[[], bool]) -> None:
    """The idle heartbeats of peer "a", until something holds; on a busy machine it may be taken for silent meanwhile."""
    a = stage.peers["a"]
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            a.say("progress", Progress())
            await asyncio.sleep(0.01)
            if not a.commands.empty():
                a.commands.get_nowait()
                a.birth()


async def test_the_plan_is_said_again_to_an_agent_that_idles_although_its_share_is_open(tmp_path: Path) -> None:
    lost: list[str] = []

    def drop(topic: str, payload: bytes) -> bool:
        said = codec.decode(payload).b if topic.endswith("/exec") and not lost else None
        if not isinstance(said, Execution) or said.state is not ExecState.DONE:
            return False
        lost.append(topic)
        return True

    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.15))
        await stage.start()
        stage.broker.drop = drop
        await stage.peer("a")
        stage.peers["a"].say("report", Report())
        await stage.until(lambda one: one.fleet.state.agents.get("a") and one.fleet.state.agents["a"].report)
        await stage.submit(job_spec(1))
        await beating(stage, lambda: stage.job().phase in ENDED)
        assert lost, "nothing was lost, so nothing was shown"
        assert stage.job().phase is Phase.COMPLETED
        assert [plan.round for plan in stage.peers["a"].plans].count(0) >= 2
        assert stage.coordinator.meter.n_connects == 1


async def test_a_broker_that_brings_nothing_but_heartbeats_is_left_and_found_again(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, heartbeat_s=0.15))
        await stage.start()
        await stage.peer("a")
        stage.peers["a"].say("report", Report())
        await stage.until(lambda one: one.fleet.state.agents.get("a"))
        stage.broker.drop = lambda topic, _: topic.endswith("/exec") and stage.coordinator.meter.n_connects == 1
        await stage.submit(job_spec(1))
        await beating(stage, lambda: stage.job().phase in ENDED)
        assert stage.job().phase is Phase.COMPLETED
        assert stage.coordinator.meter.n_connects == 2


async def test_a_cancelled_job_tells_its_agents_to_stop(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a")
    stage.peers["a"].deaf_in = 1
    await stage.submit(job_spec(1))
    await stage.until(PHASES["plans are out"])
    await stage.coordinator.post(ev.JobCancelled(job="j"))
    job = await stage.ended()
    assert (job.phase, job.reason) == (Phase.CANCELLED, "cancelled by the operator")
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance(await stage.peers["a"].commands.get(), Cancel)


async def test_a_rollback_that_a_crash_interrupts_is_written_down_by_the_next_life(stage: Stage) -> None:
    armed = False

    def after_commit(_: Coordinator) -> None:
        if armed:
            raise Died

    await stage.start(after_commit)
    await stage.peer("a", "bb")
    for peer in stage.peers.values():
        peer.deaf_in = 2
    await stage.submit(job_spec())
    await stage.until(lambda _: stage.job().version == 1 and stage.job().phase is Phase.COLLECTING)
    (first,) = stage.coordinator.store.versions("j")
    armed = True
    said: dict[str, Any] = {"job": "j", "of": 1, "version": 2, "round": 1, "by": "local", "reason": "worse"}
    stage.coordinator.tell(ev.JobRolledBack(**said, model=first.model, master=first.master))
    await stage.dead()
    armed = False
    for peer in stage.peers.values():
        peer.deaf_in = None
    await stage.start()
    assert (await stage.ended()).phase is Phase.COMPLETED
    masters = stage.masters()
    assert masters[:2] == [first.master] * 2
    assert (len(set(masters)), stage.coordinator.store.versions("j")[1].round) == (2, 1)
    assert [outcome.partition(":")[0] for _, _, outcome in stage.outcomes()] == [
        "aggregated",
        "rolled_back",
        "aggregated",
        "completed",
    ]
    assert json.loads((stage.export() / "fedpipe.json").read_bytes())["adapter_sha256"] == masters[-1]


# ------------------------------------------------------------------------------------------------------------- uploads


async def test_an_upload_that_stalls_is_pulled_again_by_the_next_offer(tmp_path: Path, wanted: list[str]) -> None:
    transfer = TransferConfig(timeout_s=0.005)
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, transfer=transfer))
        stage.broker.drop = lambda topic, _: "/bb/up/d/" in topic
        await stage.start()
        await stage.peer("a", "bb")
        bb = stage.peers["bb"]
        await stage.submit(job_spec())
        async with asyncio.timeout(PATIENCE_S):
            await bb.was_refused.wait()
        assert bb.refused[0].retry_after_s > 0
        assert "sent nothing" in bb.refused[0].reason
        stage.broker.drop = lambda _topic, _payload: False
        bb.birth()
        assert (await stage.ended()).phase is Phase.COMPLETED
        assert stage.masters() == wanted


async def test_without_a_broker_it_rests(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(tmp_path, stack, transfer=TransferConfig(timeout_s=0.02)))
        stage.broker.drop = lambda topic, _: "/bb/up/d/" in topic
        one = await stage.start()
        await stage.peer("a", "bb")
        await stage.submit(job_spec())
        await stage.until(PHASES["one update is here"])
        stage.broker.hold("coordinator")
        due, ticks, tick = one.exchange.wake_at, 0, one._tick
        assert due is not None, "the pull from bb is open"

        def counted() -> None:
            nonlocal ticks
            ticks += 1
            tick()

        one._tick = counted  # type: ignore[method-assign]
        await asyncio.sleep(max(0.0, due - one.clock()))
        for _ in range(300):
            await asyncio.sleep(0)
        assert ticks <= 2, "a chunk is overdue and nobody is there: no reason to spin"
        stage.broker.drop = lambda _topic, _payload: False
        stage.broker.release("coordinator")
        assert (await stage.ended()).phase is Phase.COMPLETED


async def test_an_update_that_its_agent_has_lost_ends_the_share(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].forge = lambda _, path, offer: path.unlink() or offer  # type: ignore[func-returns-value]
    await stage.submit(job_spec(n_rounds=1, min_agents=1, start_agents=2))
    assert (await stage.ended()).phase is Phase.COMPLETED
    (first, _) = stage.coordinator.store.rounds("j")
    assert (first.shares["a"].state, first.shares["bb"].state) == ("DONE", "FAILED")
    assert first.shares["bb"].reason.startswith("withdrawn by the agent")


async def test_an_update_that_vanished_before_its_aggregate_fails_the_job_with_the_reason(stage: Stage) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    stage.peers["bb"].deaf_in = 1
    await stage.submit(job_spec())
    await stage.until(PHASES["one update is here"])
    assert list(stage.coordinator.blobs)
    for gone in stage.coordinator.blobs:
        stage.coordinator.blobs.delete(gone)
    stage.peers["bb"]._work(stage.peers["bb"].plans[-1])
    job = await stage.ended()
    assert job.phase is Phase.FAILED
    assert "gone" in job.reason


# -------------------------------------------------------------------------------------------------------------- export


async def test_an_export_that_failed_is_made_at_the_next_start(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    await stage.start()
    await stage.peer("a", "bb")
    await stage.submit(job_spec())
    obstacle = stage.folder / "cloud" / "exports"
    obstacle.write_text("in the way")
    assert (await stage.ended()).phase is Phase.COMPLETED
    assert "not exported" in caplog.text
    obstacle.unlink()
    await stage.stop()
    await stage.start()
    await stage.ended()
    assert (stage.export() / "adapter_model.safetensors").is_file()
