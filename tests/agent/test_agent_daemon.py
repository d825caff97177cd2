"""The whole agent on a bus in memory with a real training child, under a coordinator that is played by hand.

The trainer is a third-party one without torch, installed the way a user's would be; it trains until it is told to stop when
the plan has many steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil
import pytest

from agent.bases import BasesConfig
from agent.config import AgentConfig
from agent.core.work import SUSPENDED
from agent.daemon import Agent
from agent.data import DataConfig
from agent.host import Host
from agent.limits import Limits, YieldTo
from agent.supervisor import ChildConfig
from protocol import codec
from protocol.blobs import Blobs
from protocol.bus import BrokerConfig, Connected, Received
from protocol.exchange import Exchange
from protocol.memory_bus import MemoryBroker, MemoryBus
from protocol.messages import (
    Base,
    Blob,
    Body,
    Calibration,
    Cancel,
    CoordinatorState,
    Done,
    ExecState,
    Execution,
    Grant,
    Offer,
    Plan,
    Presence,
    Progress,
    Refuse,
    Report,
    Training,
)
from protocol.outgoing import Outgoing
from protocol.pulling import Outcome, Pulled
from protocol.spool import Spool
from protocol.topics import FromAgent, Topics
from protocol.transfer import Receiving

PATIENCE_S = 30.0
CHUNK = 1024
topics = Topics("main")

PLUG_IN = """
from pathlib import Path
from agent import checkpoints
from agent.child import Calibrated, Evaluated, Finished, Phase, Stepped, Surveyed
from protocol import messages
from protocol.methods import Method

METHOD = Method(name="plugged", trainer="plugged", kind="lora", aggregator="product")

class Plugged:
    produces = "lora"

    def survey(self, task):
        matrix = messages.Matrix(name="m", d_out=1, d_in=1)
        yield Surveyed(result=messages.Surveyed(base_sha256="0" * 64, matrices=[matrix], n_train=1, n_eval=0))
        if task.plan.calibration is not None:
            yield Calibrated(result=messages.Calibrated(device=task.calibrations, probe_rank=1, scores=b"1234"))
        return Finished()

    def train(self, task):
        plan = task.plan
        self.task, self.step = task, 0
        if task.model_file:
            loss = float(Path(task.model_file).stat().st_size)
            yield Evaluated(result=messages.Evaluated(version=plan.version, n_samples=1, n_tokens=1, loss=loss))
        yield Phase(name="training")
        stored = checkpoints.find(Path(task.checkpoint), "k")
        step, stop = stored.header.point.steps if stored else 0, False
        while not stop and step < plan.train.n_steps:
            self.step = step = step + 1
            stop = yield Stepped(step=step, n_steps=plan.train.n_steps, samples=step, loss=1.0, tokens=1, seconds=0.1)
        Path(task.out_file).write_bytes(b"update" * 1000 + b"%d" % plan.round)
        why = "stop" if stop else ""
        return Finished(file=task.out_file, samples=step, steps=step, stopped=why, peak_bytes=7)

    def suspend(self):
        plan = self.task.plan
        if plan.job != "kept":
            return None
        point = checkpoints.Point(self.step, self.step)
        header = checkpoints.Header(key="k", job=plan.job, round=plan.round, point=point)
        checkpoints.write(Path(self.task.checkpoint), header, [])
        Path(self.task.out_file).write_bytes(b"so far")
        return Finished(file=self.task.out_file, samples=self.step, steps=self.step)
"""


def a_plan(**changes: Any) -> Plan:
    steps = changes.pop("n_steps", 4)
    said = {
        "job": "j",
        "round": 1,
        "attempt": 0,
        "purpose": "train",
        "method": "plugged",
        "base": Base(source="toy"),
        "train": Training(n_steps=steps),
        "issued_at": 0.0,
        "stop_after_s": 1000.0,
        "ttl_s": 2000.0,
    }
    return Plan(**said | changes)


class Cloud:
    """The coordinator as the agent sees it: it gives plans, pulls what is offered, and remembers every word."""

    def __init__(self, broker: MemoryBroker, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self.bus = broker.bus("coordinator")
        self.outgoing = Outgoing(time.monotonic)
        self.heard: list[Body] = []
        self.updates: dict[str, bytes] = {}
        self.takes_updates = True
        self._news = asyncio.Condition()
        self._files: dict[str, Path] = {}
        self._moved = asyncio.Event()
        self.exchange = Exchange(
            bus=self.bus,
            spool=Spool(Blobs(folder)),
            receiving=Receiving(timeout_s=1e6, max_timeout_s=1e6),  # nothing goes on because of a timer
            clock=time.monotonic,
            say=self.say,
            chunk_topic=topics.down_chunk,
            source=self._files.get,
            outcome=self._ended,
        )

    async def __aenter__(self) -> Self:
        self._stack = await AsyncExitStack().__aenter__()
        await self._stack.enter_async_context(self.bus)
        await self.bus.subscribe(*topics.coordinator_subscriptions())
        work = (self._read(), self.exchange.run(), self.outgoing.run(self.bus))
        self._tasks = [asyncio.create_task(one) for one in work]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
        await self._stack.aclose()

    def say(self, _: str, body: Grant | Done | Refuse) -> None:
        self.outgoing.say(topics.down("a1", "grant"), body)

    def give(self, plan: Plan) -> None:
        self.outgoing.say(topics.down("a1", "plan"), plan, retain=True)

    def serve(self, data: bytes) -> Blob:
        blob = Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk=CHUNK)
        path = self._files[blob.xfer] = self.folder / "model"
        path.write_bytes(data)
        self.exchange.sending.add(blob)
        return blob

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected():
                    self.exchange.connected()
                    state = CoordinatorState(session=self.outgoing.session, online=True)
                    self.outgoing.say(topics.coordinator_state(), state, retain=True)
                case Received(topic, payload, _) if payload:
                    place = topics.parse(topic)
                    assert isinstance(place, FromAgent)
                    if place.leaf == "d":
                        self.exchange.pulling.chunk("a1", place.xfer, payload)
                    else:
                        await self._hear(codec.decode(payload).b)

    async def _hear(self, body: Body) -> None:
        match body:
            case Grant():
                self.exchange.granted("a1", body)
            case Presence(online=True):
                self.exchange.peer_reborn("a1")
            case Offer(blob=blob) if blob.xfer in self.updates:
                self.say("a1", Done(xfer=blob.xfer))
            case Offer(blob=blob) if self.takes_updates:
                self.exchange.pulling.pull("a1", blob)
        async with self._news:
            self.heard.append(body)
            self._news.notify_all()

    async def _ended(self, end: Outcome) -> None:
        assert isinstance(end, Pulled), end
        self.updates[end.blob.xfer] = end.path.read_bytes()
        self.say("a1", Done(xfer=end.blob.xfer))

    async def hears(self, kind: type[Any], **fields: object) -> Any:
        """Wait for a message that is not yet accounted for; it and all before it are then."""

        def found() -> int | None:
            fits = (
                i
                for i, body in enumerate(self.heard)
                if isinstance(body, kind) and all(getattr(body, k) == v for k, v in fields.items())
            )
            return next(fits, None)

        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: found() is not None)
        index = found()
        assert index is not None
        body, self.heard = self.heard[index], self.heard[index + 1 :]
        return body

    async def hears_of(self, *states: str, **fields: object) -> Execution:
        for state in states:
            last: Execution = await self.hears(Execution, state=ExecState(state), **fields)
        return last


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AgentConfig:
    site, base = tmp_path / "site", tmp_path / "toy"
    info = site / "plugged_agent-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "plugged_agent.py").write_text(PLUG_IN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-agent\nVersion: 1.0\n")
    entries = "[fedpipe.trainers]\nplugged = plugged_agent:Plugged\n[fedpipe.methods]\nplugged = plugged_agent:METHOD\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"")
    return AgentConfig(
        probe_within_s=0,
        agent="a1",
        state_dir=str(tmp_path / "agent"),
        methods=["plugged"],
        broker=BrokerConfig(chunk_bytes=CHUNK),
        data={"default": DataConfig(path="nowhere")},
        base=BasesConfig(models={"toy": str(base)}),
        child=ChildConfig(threads=1),
        progress_s=0.01,
        power_w=50.0,
    )


class Stage:
    def __init__(self, config: AgentConfig, broker: MemoryBroker) -> None:
        self.config, self.broker = config, broker

    async def start(self) -> Agent:
        self._stop = asyncio.Event()
        self.agent = Agent(self.config, self.broker.bus("a1"))
        self.running = asyncio.create_task(self.agent.run(self._stop))
        return self.agent

    async def stop(self) -> None:
        self._stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.running

    async def kill(self) -> None:
        self.running.cancel()
        with suppress(asyncio.CancelledError):
            await self.running


@pytest.fixture
async def stage(config: AgentConfig) -> AsyncIterator[Stage]:
    one = Stage(config, MemoryBroker())
    yield one
    if not one.running.done():
        await one.stop()


@pytest.fixture
async def cloud(stage: Stage, tmp_path: Path) -> AsyncIterator[Cloud]:
    async with Cloud(stage.broker, tmp_path / "cloud") as one:
        yield one


async def test_a_survey_and_two_rounds(stage: Stage, cloud: Cloud) -> None:
    await stage.start()
    birth = await cloud.hears(Presence, online=True)
    assert birth.methods == ["plugged"]
    await cloud.hears(Report)
    cloud.give(a_plan(round=0, purpose="survey", train=None, calibration=Calibration()))
    done = await cloud.hears_of("ACCEPTED", "DONE", round=0)
    assert done.calibrated is not None
    assert done.calibrated.scores == b"1234"
    assert done.calibrated.device == str(Path(stage.config.state_dir) / "calibrations")
    surveyed = done.surveyed
    assert surveyed is not None
    assert surveyed.n_train == 1

    cloud.give(a_plan())
    await cloud.hears_of("ACCEPTED", "TRAINING", "UPLOADING", "DONE", round=1)
    (first,) = cloud.updates.values()
    assert first == b"update" * 1000 + b"1"
    assert not stage.agent.core.outbox

    model = cloud.serve(bytes(10 * CHUNK + 1))
    cloud.give(a_plan(round=2, version=1, model=model, n_steps=3))
    training = await cloud.hears_of("ACCEPTED", "PREPARING", "TRAINING", round=2)
    assert training.evaluated is not None
    assert (training.evaluated.version, training.evaluated.loss) == (1, model.size), "the child was given the model"
    offer = await cloud.hears(Offer, round=2)
    assert (offer.samples, offer.stopped, offer.bytes_down, offer.blob.chunk) == (3, "", model.size, CHUNK)
    assert (offer.steps, offer.peak_bytes) == (3, 7)
    assert offer.energy is not None
    assert offer.energy.joules > 0
    await cloud.hears_of("DONE", round=2)
    assert len(cloud.updates) == 2
    assert list((stage.agent.folder / "outbox").iterdir()) == []


async def test_at_the_deadline_it_hands_over_what_it_has(stage: Stage, cloud: Cloud) -> None:
    await stage.start()
    cloud.give(a_plan(n_steps=10**6))
    await cloud.hears_of("TRAINING")
    cloud.give(a_plan(n_steps=10**6, stop_after_s=0.0, ttl_s=60.0))
    offer = await cloud.hears(Offer)
    assert offer.stopped == "deadline"
    assert 0 < offer.samples < 10**6
    await cloud.hears_of("DONE")


async def test_a_cancel_throws_the_work_away_and_the_next_plan_is_done(stage: Stage, cloud: Cloud) -> None:
    await stage.start()
    cloud.give(a_plan(n_steps=10**6))
    await cloud.hears_of("TRAINING")
    cancel = Cancel(job="j", round=1, attempt=0, reason="enough others answered")
    cloud.outgoing.say(topics.down("a1", "cmd"), cancel)
    assert (await cloud.hears_of("CANCELLED")).reason == cancel.reason
    cloud.give(a_plan(round=2))
    offer = await cloud.hears(Offer)
    assert offer.round == 2
    await cloud.hears_of("DONE")
    assert list((stage.agent.folder / "outbox").iterdir()) == []


async def test_a_stop_before_the_child_is_there_is_not_lost(stage: Stage, cloud: Cloud) -> None:
    await stage.start()
    await cloud.hears(Presence)
    cloud.give(a_plan(n_steps=10**6))
    cloud.outgoing.say(topics.down("a1", "cmd"), Cancel(job="j", round=1, attempt=0))
    await cloud.hears_of("ACCEPTED", "CANCELLED")
    cloud.give(a_plan(round=2))
    await cloud.hears_of("ACCEPTED", "DONE", round=2)


async def test_what_is_owed_is_offered_after_a_restart_and_not_trained_again(stage: Stage, cloud: Cloud) -> None:
    cloud.takes_updates = False
    await stage.start()
    cloud.give(a_plan())
    first = await cloud.hears(Offer)
    await stage.kill()
    cloud.heard.clear()
    cloud.takes_updates = True
    await stage.start()
    assert (await cloud.hears(Offer)).blob == first.blob
    done = await cloud.hears(Execution, state=ExecState.DONE)
    assert (done.job, done.round) == ("j", 1)
    assert stage.agent.training.supervisor.pid is None, "the retained plan did not start a child"
    assert cloud.updates == {first.blob.xfer: b"update" * 1000 + b"1"}


@pytest.mark.parametrize("listening", [False, True])
async def test_cut_off_while_it_downloads_it_goes_on_at_once(stage: Stage, cloud: Cloud, *, listening: bool) -> None:
    """The coordinator forgets all credit with the agent's birth, so credit must come behind it; no timer helps here."""
    n_chunks = 0

    def cut(topic: str, _: bytes) -> bool:
        nonlocal n_chunks
        if "/down/d/" in topic:
            n_chunks += 1
            if n_chunks in {3, 12}:
                asyncio.get_running_loop().call_soon(stage.broker.cut, "a1")
        return False

    stage.broker.drop = cut
    agent = await stage.start()
    agent.traffic.exchange.pulling.receiving.timeout_s = agent.traffic.exchange.pulling.receiving.max_timeout_s = 1e6
    model = cloud.serve(bytes(range(256)) * 80)
    cloud.give(a_plan(round=2, version=1, model=model, broadcast=listening))
    assert (await cloud.hears(Grant)).until == (model.n_chunks if listening else 0)
    await cloud.hears_of("TRAINING", "DONE", round=2)
    assert n_chunks >= model.n_chunks


@pytest.mark.parametrize("when", ["training", "idle"])
async def test_a_stop_hands_over_and_says_goodbye(stage: Stage, cloud: Cloud, when: str) -> None:
    await stage.start()
    await cloud.hears(Presence, online=True)
    if when == "training":
        cloud.takes_updates = False
        cloud.give(a_plan(n_steps=10**6))
        await cloud.hears_of("TRAINING")
        await cloud.hears(Progress, phase="training")
    await stage.stop()
    assert (await cloud.hears(Presence, online=False)).reason == "stopping"
    (owed,) = stage.agent.outbox.load() if when == "training" else [None]
    assert owed is None or owed.stopped == "the agent is stopping"
    assert stage.agent.training.supervisor.pid is None


async def stopped_in_training(stage: Stage, cloud: Cloud) -> int:
    """After how many samples the agent was stopped, with all of them kept."""
    await stage.start()
    cloud.give(a_plan(job="kept", n_steps=10**7))
    await cloud.hears_of("TRAINING")
    await cloud.hears(Progress, phase="training")
    cloud.heard.clear()
    await stage.stop()
    assert (await cloud.hears(Presence, online=False)).reason == "stopping"
    assert not any(isinstance(body, Execution | Offer) for body in cloud.heard), "its share stays open"
    (kept,) = stage.agent.outbox.load()
    assert kept.stopped == SUSPENDED
    return kept.samples


async def test_a_stop_keeps_the_share_open_and_the_next_start_goes_on(stage: Stage, cloud: Cloud) -> None:
    samples = await stopped_in_training(stage, cloud)
    await stage.start()
    await cloud.hears_of("ACCEPTED", "TRAINING")
    cloud.give(a_plan(job="kept", stop_after_s=0.0))
    offer = await cloud.hears(Offer)
    assert offer.stopped == "deadline"
    assert offer.samples > samples
    await cloud.hears_of("DONE")
    assert len(cloud.updates) == 1, "what it had at the stop was not handed in beside it"


async def test_what_was_suspended_is_handed_in_late_when_its_round_is_over(stage: Stage, cloud: Cloud) -> None:
    samples = await stopped_in_training(stage, cloud)
    stage.broker.route(topics.down("a1", "plan"), b"", retain=True)
    await stage.start()
    await cloud.hears(Presence, online=True)
    cloud.outgoing.clear(topics.down("a1", "plan"))  # what the coordinator answers to a birth without a share
    offer = await cloud.hears(Offer)
    assert (offer.stopped, offer.samples) == (SUSPENDED, samples)
    assert (await cloud.hears_of("DONE")).job == "kept"
    assert list(cloud.updates.values()) == [b"so far"]
    assert stage.agent.training.supervisor.pid is None


async def test_an_offer_is_repeated_only_when_the_broker_has_the_last_one(
    stage: Stage, cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message per round trip, of seconds: repeated offers would stand in the line before everything else."""
    offered, acknowledged, published = 0, asyncio.Event(), MemoryBus.publish

    async def publish(bus: MemoryBus, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        nonlocal offered
        await published(bus, topic, payload, qos=qos, retain=retain)
        if topic == topics.up("a1", "offer"):
            offered += 1
            await acknowledged.wait()

    monkeypatch.setattr(MemoryBus, "publish", publish)
    cloud.takes_updates = False
    agent = await stage.start()
    cloud.give(a_plan())
    await cloud.hears(Offer)
    for _ in range(100):
        agent.traffic.offer_all()
        await asyncio.sleep(0)
    assert offered == 1
    stage.broker.cut("a1")
    await cloud.hears(Presence, online=True)
    await cloud.hears(Offer)
    assert offered == 2, "a birth voids what was offered before it, wherever that is"
    acknowledged.set()
    await asyncio.sleep(0)
    cloud.takes_updates = True
    agent.traffic.offer_all()
    await cloud.hears_of("DONE")


async def test_without_a_broker_it_rests(stage: Stage, cloud: Cloud) -> None:
    cloud.takes_updates = False
    agent = await stage.start()
    cloud.give(a_plan())
    await cloud.hears(Offer)
    stage.broker.hold("a1")
    agent.traffic.uploads.repeat_s = 0.0
    agent.traffic.offer_all()
    ticks = 0
    tick = agent._tick

    def counted() -> None:
        nonlocal ticks
        ticks += 1
        tick()

    agent._tick = counted  # type: ignore[method-assign]
    for _ in range(300):
        await asyncio.sleep(0)
    assert ticks <= 1, "an offer is due and nobody is there: no reason to spin"
    stage.broker.release("a1")
    await cloud.hears(Presence, online=True)
    await cloud.hears(Offer)


@pytest.mark.parametrize(
    ("changes", "state", "told"),
    [
        ({"method": "qlora"}, "REJECTED", "'qlora' is not allowed here"),
        ({"data": "other"}, "FAILED", "add [data.other]"),
        ({"base": Base(source="strange")}, "FAILED", 'no base model "strange"'),
    ],
)
async def test_what_it_cannot_do_it_says_with_the_remedy(
    stage: Stage, cloud: Cloud, changes: dict[str, Any], state: str, told: str
) -> None:
    await stage.start()
    cloud.give(a_plan(**changes))
    assert told in (await cloud.hears_of(state)).reason
    cloud.give(a_plan(round=2))
    await cloud.hears_of("DONE", round=2)


async def test_bad_messages_are_logged_once_and_change_nothing(
    stage: Stage, cloud: Cloud, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await stage.start()
    await cloud.hears(Presence)
    for payload in (b"\xc1", b"", b"\x93", b"x" * 99):
        stage.broker.route(topics.down("a1", "plan"), payload)
    cloud.give(a_plan())
    await cloud.hears_of("DONE")
    bad: list[Callable[[], None]] = [r for r in caplog.records if vars(r).get("action") == "bad_message"]  # type: ignore[misc]
    assert len(bad) == 1


# ----------------------------------------------------------------------------------------------------------- the host


def watchful(*, hours: tuple[str, ...] = (), **yield_to: float) -> Limits:
    """Looks at the device so often that a test need not wait, and never goes back."""
    return Limits(hours=list(hours), yield_to=YieldTo(**{"every_s": 0.05, "patience": 2, "quiet_s": 1e5} | yield_to))


def limited(stage: Stage, *hours: str) -> None:
    stage.config = msgspec.structs.replace(stage.config, limits=watchful(hours=hours))


@contextmanager
def hog(code: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


async def test_outside_its_hours_it_says_so_and_holds_its_plan(stage: Stage, cloud: Cloud) -> None:
    hour = (time.localtime().tm_hour + 6) % 24
    limited(stage, f"{hour:02}:00-{hour:02}:59")
    await stage.start()
    allowance = (await cloud.hears(Report)).allowance
    assert "may run at" in allowance.paused
    assert allowance.memory_bytes > 0
    cloud.give(a_plan())
    assert "paused for the host: training may run at" in (await cloud.hears_of("ACCEPTED", "PREPARING")).reason
    assert stage.agent.training.supervisor.pid is None
    cloud.give(a_plan(stop_after_s=0.0, ttl_s=10.0))
    assert "paused for the host" in (await cloud.hears_of("TIMED_OUT")).reason


async def test_outside_the_hours_of_bulk_it_trains_and_keeps_its_update(stage: Stage, cloud: Cloud) -> None:
    hour = (time.localtime().tm_hour + 6) % 24
    closed = Limits(transfer_hours=[f"{hour:02}:00-{hour:02}:59"])
    stage.config = msgspec.structs.replace(stage.config, limits=closed)
    agent = await stage.start()
    assert "updates and models move at" in (await cloud.hears(Report)).notes[0]
    cloud.give(a_plan())
    await cloud.hears_of("TRAINING", "UPLOADING")
    assert cloud.updates == {}
    assert not [body for body in cloud.heard if isinstance(body, Offer)]
    agent.renew(msgspec.structs.replace(stage.config, limits=Limits()))
    await cloud.hears_of("DONE")
    assert len(cloud.updates) == 1


async def test_a_service_that_computes_gets_the_processor_and_the_round_still_ends(stage: Stage, cloud: Cloud) -> None:
    limited(stage)
    agent = await stage.start()
    cloud.give(a_plan(n_steps=10**6))
    await cloud.hears_of("TRAINING")
    await cloud.hears(Progress, phase="training")
    agent.resources.host = Host(watchful(max_other_cpu=0.2 / (os.cpu_count() or 1)))
    with hog("print('ready', flush=True)\nwhile True: pass"):
        assert "of the CPU" in (await cloud.hears_of("TRAINING")).reason
        await cloud.hears(Progress, phase="paused")
    cloud.give(a_plan(n_steps=10**6, stop_after_s=0.0, ttl_s=60.0))
    offer = await cloud.hears(Offer)
    assert offer.stopped == "deadline"
    assert 0 < offer.samples < 10**6
    await cloud.hears_of("DONE")


async def test_a_service_that_needs_memory_gets_all_that_the_child_holds(stage: Stage, cloud: Cloud) -> None:
    limited(stage)
    agent = await stage.start()
    cloud.give(a_plan(n_steps=10**6))
    await cloud.hears(Progress, phase="training")
    available = psutil.virtual_memory().available
    taken = min(3 * 2**30, available // 4)
    agent.resources.host = Host(watchful(min_free_bytes=available - taken // 2))
    with hog(f"import time\nx = b'x' * {taken}\nprint('ready', flush=True)\ntime.sleep(600)"):
        offer = await cloud.hears(Offer)
        await cloud.hears_of("DONE")
    assert offer.stopped.startswith("the host needs its memory: ")
    assert offer.samples > 0
    assert agent.core.host == "stop"
    leaving = agent.training.supervisor._farewell
    if leaving is not None:
        await leaving
    assert agent.training.supervisor.pid is None, "its memory is free long before it would have been let go"


async def test_the_uplink_is_measured_once_before_anything_was_uploaded(stage: Stage, cloud: Cloud) -> None:
    probes: list[int] = []

    def count(topic: str, payload: bytes) -> bool:
        if topic == topics.up_probe("a1"):
            probes.append(len(payload))
        return False

    stage.broker.drop = count
    agent = await stage.start()
    while not (await cloud.hears(Report)).up_bytes_per_s:
        pass
    assert probes == [1, CHUNK]
    assert cloud.exchange.pulling.receiving.counts.n_stray == 0, "nobody listens to it"
    stage.broker.cut("a1")
    await cloud.hears(Presence, online=True)
    cloud.give(a_plan())
    await cloud.hears_of("DONE")
    assert probes == [1, CHUNK], "not at every connection"
    assert agent.resources.link.up_bytes_per_s > 0


async def test_an_update_is_cut_as_its_link_can_carry_it(stage: Stage, cloud: Cloud) -> None:
    limits = Limits(up_bytes_per_s=300_000)
    stage.config = msgspec.structs.replace(stage.config, limits=limits, broker=BrokerConfig(chunk_bytes=120 * 1024))
    await stage.start()
    cloud.give(a_plan())
    offer = await cloud.hears(Offer, round=1)
    assert offer.blob.chunk == 16 * 1024, "a power of two, and not above a tenth of a second"
    await cloud.hears_of("DONE", round=1)


async def test_the_first_update_is_cut_as_the_probe_found_its_link(stage: Stage, cloud: Cloud) -> None:
    stage.config = msgspec.structs.replace(stage.config, broker=BrokerConfig(chunk_bytes=120 * 1024), probe_bytes=0)
    agent = await stage.start()
    agent.resources.link.up(256 * 1024, 0.5)
    cloud.give(a_plan())
    assert (await cloud.hears(Offer, round=1)).blob.chunk == 32 * 1024


async def test_an_agent_that_has_yet_to_measure_its_uplink_stops_at_once(stage: Stage, cloud: Cloud) -> None:
    stage.config = msgspec.structs.replace(stage.config, probe_within_s=10**6)
    agent = await stage.start()
    await cloud.hears(Presence, online=True)
    await stage.stop()
    assert agent.resources.link.up_bytes_per_s == 0


async def test_an_uplink_that_is_not_to_be_measured_is_not(stage: Stage, cloud: Cloud) -> None:
    stage.config = msgspec.structs.replace(stage.config, probe_bytes=0)
    agent = await stage.start()
    cloud.give(a_plan(n_steps=10**6))
    await cloud.hears_of("TRAINING")
    assert agent.resources.link.up_bytes_per_s == 0
