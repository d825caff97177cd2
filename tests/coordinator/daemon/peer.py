"""A Peer is an agent as the bus sees it: it says birth, answers plans with real update files and moves them by the real transfer.

What it trains is drawn from its name and the round, so every undisturbed or disturbed run must end in the same adapter.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from protocol import codec
from protocol.adapters import Factors
from protocol.blobs import Blobs
from protocol.bus import Connected, Received
from protocol.exchange import Exchange
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
    Rebirth,
    Refuse,
    Surveyed,
)
from protocol.models import read_model
from protocol.outgoing import Outgoing
from protocol.pulling import Outcome, Pulled
from protocol.spool import Spool
from protocol.topics import FromCoordinator, ToAgent, Topics
from protocol.transfer import Receiving
from protocol.updates import write_update

MATRICES = (Matrix(name="model.k", d_out=24, d_in=32), Matrix(name="model.q", d_out=32, d_in=32))
SURVEYED = Surveyed(base_sha256="b" * 64, matrices=list(MATRICES), n_train=90, n_eval=10)
CHUNK = 1024
PATIENCE_S = 10.0
topics = Topics("main")


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
                            self.exchange.pulling.chunk("coordinator", xfer, payload)
                        case FromCoordinator(leaf="blob", name=xfer):
                            self.exchange.pulling.chunk("coordinator", xfer, payload, heard=True)
                        case ToAgent() | FromCoordinator():
                            self._hear(codec.decode(payload).b)
            self._moved.set()

    async def _tick(self) -> None:
        while True:
            self._moved.clear()
            due = self.exchange.pulling.wake_at
            with suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                    await self._moved.wait()
            self.exchange.pulling.tick()

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
            self.exchange.pulling.pull("coordinator", plan.model, listen=plan.broadcast)
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
