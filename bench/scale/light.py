"""Many light agents in one process: a session on the broker each, the protocol's own messages, and nothing behind them.

    python -m bench.scale.light FILE        a JSON Crowd

They say birth, report and heartbeats as agent/daemon.py does, answer a survey at once, accept a share of a round and say how far
they are, every `progress_s`, until it is cancelled; they hold no model and send no update.  What the coordinator and the broker
take for them is what ten thousand real agents would cost them besides the bytes of a round.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from agent import profiler
from bench.scale import wire
from protocol import SOFTWARE, codec
from protocol.malloc import keep_pages
from protocol.messages import (
    Body,
    Cancel,
    CoordinatorState,
    ExecState,
    Execution,
    Matrix,
    Plan,
    Presence,
    Progress,
    Rebirth,
    Surveyed,
)
from protocol.topics import Topics, UpLeaf

KEEPALIVE_S: Final = 25
HEARD: Final = (Plan, Cancel, Rebirth, CoordinatorState)


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to be.  `connects_per_s`: how fast they come; real ones come as their servers start, or within a broker's jitter."""

    host: str
    port: int
    fleet: str
    method: str
    n_agents: int
    n_matrices: int
    heartbeat_s: float
    progress_s: float
    connects_per_s: float

    @property
    def matrices(self) -> list[Matrix]:
        """Of a base like Llama-7B, where seven matrices make a layer."""
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        names = [f"model.layers.{n // 7}.{kinds[n % 7]}" for n in range(self.n_matrices)]
        return [Matrix(name=name, d_out=4096, d_in=4096) for name in sorted(names)]


class Agent(asyncio.Protocol):
    """One session, from its first connection on; it comes back as real agents do."""

    def __init__(self, crowd: Crowd, number: int, found: Surveyed, report: Body) -> None:
        self.name = f"light-{number:05d}"
        self._crowd, self._found, self._report = crowd, found, report
        self._topics = Topics(crowd.fleet)
        self._session = random.randbytes(8).hex()
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._seq = self._serial = self._number = self._n_failures = 0
        self._coordinator = ""
        self._plan: Plan | None = None
        self._step = 0
        self._beat: asyncio.TimerHandle | None = None
        self._coming: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    # ------------------------------------------------------------------------------------------------ the connection

    async def connect(self) -> None:
        """Until there is a connection; after one that was lost too."""
        while True:
            try:
                await self._loop.create_connection(lambda: self, self._crowd.host, self._crowd.port)
            except OSError:
                await asyncio.sleep(random.uniform(0, min(60.0, 2.0**self._n_failures)))
                self._n_failures += 1
            else:
                return

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport, self._received = transport, bytearray()
        will = self._encoded(Presence(session=self._session, online=False, reason="the connection was lost"))
        topic = self._topics.up(self.name, "state")
        transport.write(wire.connect(self.name, keepalive_s=KEEPALIVE_S, will_topic=topic, will=will))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """See asyncio.Protocol."""
        self._transport = None
        if self._beat:
            self._beat.cancel()
        self._loop.call_later(random.uniform(0, 1), self._come_back)

    def _come_back(self) -> None:
        self._coming = self._loop.create_task(self.connect())

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._received += data
        for packet in wire.packets(self._received):
            if packet.kind == wire.CONNACK:
                self._welcomed()
            elif packet.kind == wire.PUBLISH:
                topic, payload, number = wire.published(packet)
                if number:
                    self._write(wire.acknowledge(number))
                if payload and not topic.endswith("/grant"):
                    self._hear(codec.decode(payload, *HEARD).b)

    def _write(self, packet: bytes) -> None:
        if self._transport:
            self._transport.write(packet)

    # --------------------------------------------------------------------------------------------------- what is said

    def _encoded(self, body: Body) -> bytes:
        self._seq += 1
        return codec.encode(body, session=self._session, seq=self._seq, now=self._loop.time())

    def _say(self, leaf: UpLeaf, body: Body, *, retain: bool = False) -> None:
        self._number = self._number % 65_535 + 1
        number = 0 if isinstance(body, Progress) else self._number
        self._write(wire.publish(self._topics.up(self.name, leaf), self._encoded(body), number=number, retain=retain))

    def _welcomed(self) -> None:
        self._n_failures = 0
        self._write(wire.subscribe(1, *self._topics.agent_subscriptions(self.name)))
        self._birth()
        self._heartbeat()

    def _birth(self) -> None:
        methods = [self._crowd.method]
        born = Presence(session=self._session, online=True, software=SOFTWARE, methods=methods)
        self._say("state", born, retain=True)
        self._say("report", self._report, retain=True)

    def _heartbeat(self) -> None:
        if self._beat:
            self._beat.cancel()
        plan, crowd = self._plan, self._crowd
        self._beat = self._loop.call_later(crowd.progress_s if plan else crowd.heartbeat_s, self._heartbeat)
        if plan is None:
            self._say("progress", Progress())
            return
        self._step += 1
        key = {"job": plan.job, "round": plan.round, "attempt": plan.attempt}
        self._say("progress", Progress(**key, phase="training", step=self._step, n_steps=10_000, loss=2.5))  # type: ignore[arg-type]

    def _move(self, plan: Plan | Cancel, state: ExecState, found: Surveyed | None = None) -> None:
        self._serial += 1
        key = {"job": plan.job, "round": plan.round, "attempt": plan.attempt}
        self._say("exec", Execution(**key, serial=self._serial, state=state, surveyed=found))  # type: ignore[arg-type]

    # --------------------------------------------------------------------------------------------------- what is heard

    def _hear(self, body: Body) -> None:
        match body:
            case Plan(purpose="survey"):
                self._move(body, ExecState.ACCEPTED)
                self._move(body, ExecState.DONE, self._found)
            case Plan():
                is_new, self._plan = self._plan is None, body
                for state in (ExecState.ACCEPTED, ExecState.TRAINING) if is_new else (ExecState.TRAINING,):
                    self._move(body, state)
                if is_new:
                    self._heartbeat()
            case Cancel():
                self._plan = None
                self._move(body, ExecState.CANCELLED)
                self._heartbeat()
            case Rebirth():
                self._birth()
            case CoordinatorState(online=True, session=session):
                if self._coordinator not in {"", session}:
                    self._birth()
                self._coordinator = session


async def main(crowd: Crowd) -> None:
    """Be all of them until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    found = Surveyed(base_sha256="0" * 64, matrices=crowd.matrices, n_train=1000, n_eval=100)
    report = profiler.profile(Path.cwd(), profiler.Link())
    agents = [Agent(crowd, number, found, report) for number in range(crowd.n_agents)]
    for number, agent in enumerate(agents):
        await agent.connect()
        if number % 50 == 49:
            await asyncio.sleep(50 / crowd.connects_per_s)
    print("all are connected", flush=True)
    await stop.wait()


if __name__ == "__main__":
    keep_pages(is_one_arena=True)
    asyncio.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Crowd)))
