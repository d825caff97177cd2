from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings

from coordinator import web
from coordinator.access import read_token
from coordinator.config import CoordinatorConfig, Web
from coordinator.core import events as ev
from coordinator.core.choice import Choice, Prediction
from coordinator.core.spec import JobSpec
from coordinator.core.state import FleetState, JobState, Member, Phase, RoundPlan, RoundRecord, ShareRecord
from coordinator.cost import FREE, Prices
from coordinator.daemon import Coordinator
from coordinator.past import Past, extended
from coordinator.plan_views import PlanView, past_shares, plan_view
from fedpipe.broker import embedded_command, free_port, mosquitto_command
from protocol import codec
from protocol.adapters import Adapter, Factors
from protocol.memory_bus import MemoryBroker
from protocol.messages import Blob, Body, Calibrated, Evaluated, ExecState, Matrix, Offer, Progress, Report, Surveyed
from protocol.topics import UpLeaf
from protocol.updates import write_update

START_S = 30.0
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


class BrokerProcess:
    """A broker that can die and come back on the same port."""

    def __init__(self, command: Callable[[int], list[str]]) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._command = command(self.port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                if self._process.poll() is not None:
                    pytest.fail(f"broker ended with {self._process.returncode}: {self._errors()}")
                time.sleep(0.01)
            else:
                return
        pytest.fail(f"broker does not listen after {START_S} s")

    def freeze(self) -> None:
        """It is still there but does nothing any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._errors()
            self._process = None

    def terminate(self) -> int:
        """Ask it to end; its exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(START_S)
        self._errors()
        self._process = None
        return status

    def _errors(self) -> str:
        assert self._process is not None
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            return stream.read().decode(errors="replace")


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """A function that starts a mosquitto; its arguments are further lines for mosquitto.conf."""
    started: list[BrokerProcess] = []

    def start(*lines: str) -> BrokerProcess:
        folder = tmp_path / f"mosquitto-{len(started)}"
        folder.mkdir()
        broker = BrokerProcess(lambda port: mosquitto_command(port, folder, lines))
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.kill()


@pytest.fixture
def mosquitto_broker(start_mosquitto: Callable[..., BrokerProcess]) -> BrokerProcess:
    """The reference broker, running: `.url`, `.port`, `.kill()`, `.start()`, `.freeze()`, `.terminate()`."""
    return start_mosquitto()


@pytest.fixture
def embedded_broker() -> Iterator[BrokerProcess]:
    """The embedded broker, running, as `mosquitto_broker`."""
    broker = BrokerProcess(embedded_command)
    broker.start()
    yield broker
    broker.kill()


class Served:
    """A real coordinator on a bus in memory with its API on a real port, in a thread of its own.

    Its agents are played: they say what agents say, and the updates they offer lie in the coordinator's store already.
    """

    matrices = (Matrix(name="model.k", d_out=6, d_in=8), Matrix(name="model.q", d_out=8, d_in=8))

    def __init__(self, folder: Path, prices: Prices = FREE, **settings: object) -> None:
        given = Web(**{"port": 0, **settings})  # type: ignore[arg-type]
        self.config = CoordinatorConfig(state_dir=str(folder), web=given, prices=prices)
        self.token = read_token(self.config.web)
        self._listening = web.listen(self.config.web)
        self.url = web.url_of(self._listening)
        self.folder = folder
        self._serial = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(START_S)

    async def _main(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.broker = MemoryBroker()
        self.coordinator = Coordinator(self.config, self.broker.bus("coordinator"))
        self._ready.set()
        await self.coordinator.run(self._stop, web.serve(self.coordinator, self._listening, self.token))

    def close(self) -> None:
        """Stop, as SIGTERM does; closing twice is closing once."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    def post(self, *events: ev.Happened) -> None:
        for event in events:
            asyncio.run_coroutine_threadsafe(self.coordinator.post(event), self.loop).result(START_S)

    def until(self, predicate: Callable[[FleetState], bool]) -> None:
        """Wait for a state that the events so far must lead to."""
        asyncio.run_coroutine_threadsafe(self._until(predicate), self.loop).result(START_S)

    async def _until(self, predicate: Callable[[FleetState], bool]) -> None:
        there = asyncio.Event()

        def look(*_: object) -> None:
            if predicate(self.coordinator.fleet.state):
                there.set()

        self.coordinator.watchers.add(look)
        look()
        await there.wait()
        self.coordinator.watchers.discard(look)

    def until_listened(self) -> None:
        """Wait until somebody reads the stream of events."""
        asyncio.run_coroutine_threadsafe(self._until_listened(), self.loop).result(START_S)

    async def _until_listened(self) -> None:
        while not self.coordinator.watchers:  # noqa: ASYNC110 - a set has no event
            await asyncio.sleep(0)

    def job(self, name: str = "j") -> JobState:
        return self.coordinator.fleet.state.jobs[name]

    def until_phase(self, *phases: Phase, job: str = "j") -> None:
        self.until(lambda state: state.jobs[job].phase in phases)

    def join(self, *agents: str) -> None:
        self.post(*(ev.AgentJoined(agent=a, session=a[0] * 16, software="t", methods=["qlora"]) for a in agents))

    def move(self, agent: str, state: ExecState, job: str = "j", **found: Any) -> None:
        round_ = self.job(job).round
        share = round_.shares[agent] if round_ else self.job(job).members[agent].survey
        assert share is not None
        number = round_.number if round_ else 0
        self._serial += 1
        moved = ev.ShareMoved(
            agent=agent, job=job, round=number, attempt=share.attempt, serial=self._serial, state=state, **found
        )
        self.post(moved)

    def survey(self, *agents: str, job: str = "j") -> None:
        found = Surveyed(base_sha256="b" * 64, matrices=list(self.matrices), n_train=90, n_eval=10)
        for agent in agents:
            self.move(agent, ExecState.DONE, job, surveyed=found)
        self.until_phase(Phase.COLLECTING, job=job)

    def publish(self, agent: str, leaf: UpLeaf, body: Body) -> None:
        """The agent says something on the bus."""
        payload = codec.encode(body, session=agent[0] * 16, seq=1, now=self.coordinator.clock())
        self.route(self.coordinator.topics.up(agent, leaf), payload)

    def route(self, topic: str, payload: bytes) -> None:
        self.loop.call_soon_threadsafe(lambda: self.broker.route(topic, payload))

    def say(self, agent: str, step: int, loss: float = 2.0, job: str = "j") -> None:
        """The agent publishes its progress, and something journalled behind it, which is waited for."""
        body = Progress(job=job, round=1, phase="training", step=step, n_steps=50, samples=8 * step, loss=loss)
        self.publish(agent, "progress", body)
        self.report(agent, n_cpus=step)

    def report(self, agent: str, n_cpus: int) -> None:
        """The agent reports; everything it said before is known to be read then."""
        self.publish(agent, "report", Report(n_cpus=n_cpus))
        self.until(lambda state: (found := state.agents[agent].report) is not None and found.n_cpus == n_cpus)

    def factors(self, agent: str) -> Adapter:
        """The update that this agent always has."""
        rng = np.random.default_rng(ord(agent[0]))

        def draw(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        return {
            m.name: Factors(a=draw(min(8, m.d_out), m.d_in), b=draw(m.d_out, min(8, m.d_out))) for m in self.matrices
        }

    def offer(self, agent: str, job: str = "j", loss: float = 2.5) -> None:
        """The agent's update is there and offered."""
        round_ = self.job(job).round
        assert round_ is not None
        path = self.folder / f"{agent}.update"
        size = write_update(
            path, self.factors(agent), job=job, round=round_.number, attempt=round_.attempt, dtype="fp32"
        )
        sha256 = self.coordinator.blobs.put_file(path)
        offer = Offer(
            job=job,
            round=round_.number,
            attempt=round_.attempt,
            kind="lora",
            blob=Blob(sha256=sha256, size=size),
            samples=100,
            loss=loss,
            train_s=3.0,
            bytes_down=1000,
        )
        self.post(ev.UpdateOffered(agent=agent, offer=offer))

    def run_round(self, *agents: str, job: str = "j", loss: float = 2.5) -> None:
        """Every agent measures the version it got and hands in its update; the round closes and the next one is open."""
        number = self.job(job).round_number
        for agent in agents:
            version = self.job(job).version
            found = Evaluated(version=version, n_samples=10, n_tokens=99, loss=loss)
            self.move(agent, ExecState.TRAINING, job, evaluated=found)
            self.offer(agent, job, loss)
        self.until(lambda state: state.jobs[job].round_number == number + 1 and state.jobs[job].round is not None)

    def finish(self, *agents: str, job: str = "j", loss: float = 1.5) -> None:
        """Every agent measures the last version."""
        version = self.job(job).version
        for agent in agents:
            self.move(
                agent, ExecState.DONE, job, evaluated=Evaluated(version=version, n_samples=9, n_tokens=9, loss=loss)
            )
        self.until_phase(Phase.COMPLETED, job=job)


@pytest.fixture(scope="session")
def served_kind() -> type[Served]:
    """What `serve` starts, for a fixture that shares one with several tests."""
    return Served


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """A function that starts a served coordinator; its arguments are those of the [web] table."""
    started: list[Served] = []

    def start(**settings: object) -> Served:
        folder = tmp_path / f"coordinator-{len(started)}"
        folder.mkdir()
        started.append(Served(folder, **settings))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A served coordinator: `.url`, and verbs that play its agents."""
    return serve()


@pytest.fixture
def planned() -> Callable[..., PlanView]:
    """A function that makes the plan of a job on a small Llama, for agents anna (much room) and berta (little)."""

    def plan(n_layers: int = 2, job: str = "recipes", **changed: Any) -> PlanView:
        kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
        names = sorted(f"model.layers.{layer}.{kind}" for layer in range(n_layers) for kind in kinds)
        anna = {name: 64 if "q_proj" in name else 8 for name in names}
        berta = {name: 4 for name in names if "q_proj" in name}
        expected = Prediction(
            step_s=0.5,
            train_s=20.0,
            down_s=2.0,
            up_s=3.0,
            peak_bytes=4_000_000_000,
            limit_bytes=5_000_000_000,
            up_bytes=1_200_000,
            progress=1.0,
        )
        shape: dict[str, Any] = {"bits": "nf4", "n_steps": 40, "batch": 8, "predicted": expected, "limit": "memory"}
        choices = {
            "anna": Choice(
                ranks=anna, accumulation=2, importance=0.82, why="nf4 fits", what_if={"1 GiB more": 1.12}, **shape
            ),
            "berta": Choice(ranks=berta, why="only the least", **shape),
        }
        decided = RoundPlan(
            round=2, reason="anna came back", choices=choices, left_out={"clara": "no room: 1.2 GB missing"}
        )
        share = ShareRecord(
            state="DONE",
            samples=600,
            planned_samples=640,
            bits="nf4",
            rank_sum=80,
            step_s=0.6,
            peak_bytes=3_920_000_000,
            predicted=expected,
        )
        record = RoundRecord(
            round=1,
            attempt=0,
            purpose="train",
            version=0,
            outcome="aggregated",
            opened_at=0.0,
            wall_s=30.0,
            loss=2.0,
            shares={"anna": share, "berta": msgspec.structs.replace(share, samples=360)},
        )
        found = Calibrated(device="RTX 3090", probe_rank=8, scores=b"", seconds=50.0)
        state = JobState(
            spec=msgspec.convert({"job": {"name": job}, "model": {"source": "toy"}}, JobSpec),
            submitted_at=0.0,
            matrices=[Matrix(name=name, d_out=64, d_in=64) for name in names],
            members={
                "anna": Member(calibrated=found, time_factor=1.2, oom_bytes=4_500_000_000),
                "berta": Member(uncalibrated="no time left"),
            },
        )
        return msgspec.structs.replace(
            plan_view(state, decided, extended(Past(), [record]), past_shares([record], "anna"), 1000.0), **changed
        )

    return plan
