"""A daemon as far as bulk goes: the real exchange on a bus, with files on offer and files pulled.  For benches and for tests."""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, Self

from protocol import codec
from protocol.blobs import Blobs
from protocol.broadcast import EVERYONE
from protocol.bus import Bus, Connected, Received
from protocol.daemon import Timer
from protocol.exchange import Exchange
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.outgoing import Outgoing
from protocol.pulling import Outcome
from protocol.spool import Spool
from protocol.topics import FromAgent, FromCoordinator, ToAgent, Topics
from protocol.transfer import Receiving

CLOUD: Final = "coordinator"


class Node:
    """One side; `name` is CLOUD or an agent's, `rules` are those of Receiving."""

    def __init__(
        self, bus: Bus, topics: Topics, folder: Path, name: str, *, max_bytes: int = 2**30, **rules: Any
    ) -> None:
        self.name, self.bus, self.topics = name, bus, topics
        self.blobs = Blobs(folder / name)
        self.outgoing = Outgoing(time.monotonic)
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.connected = asyncio.Event()
        self.timer = Timer(time.monotonic)
        self._files: dict[str, Path] = {}
        self.exchange = Exchange(
            bus=bus,
            spool=Spool(self.blobs, max_bytes=max_bytes),
            receiving=Receiving(**rules),
            clock=time.monotonic,
            say=self.say,
            chunk_topic=self._chunk_topic,
            blob_topic=topics.blob,
            source=self._files.get,
            outcome=self.outcomes.put,
        )

    @property
    def _is_cloud(self) -> bool:
        return self.name == CLOUD

    async def __aenter__(self) -> Self:
        self._stack = await AsyncExitStack().__aenter__()
        await self._stack.enter_async_context(self.bus)
        topics = self.topics
        mine = topics.coordinator_subscriptions() if self._is_cloud else topics.agent_subscriptions(self.name)
        await self.bus.subscribe(*mine)
        ticking = self.timer.run(lambda: [self.exchange.pulling.wake_at], self.exchange.pulling.tick)
        work = (self._read(), ticking, self.exchange.run(), self.outgoing.run(self.bus))
        self._tasks = [asyncio.create_task(one) for one in work]
        await self.connected.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        """As if killed: whatever is under way stays as it is."""
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended
        await self._stack.aclose()

    def offer(self, path: Path, blob: Blob) -> Blob:
        """Have a file ready for whoever asks."""
        self._files[blob.xfer] = path
        return self.exchange.offer(blob)

    def pull(self, peer: str, blob: Blob, **how: Any) -> None:
        """Have a blob from a peer; see Exchange.pull."""
        self.exchange.pulling.pull(peer, blob, **how)
        self.timer.moved()

    def say(self, peer: str, message: Grant | Placed | Done | Refuse) -> None:
        """Send an answer of a transfer."""
        topic = self.topics.down(peer, "grant") if self._is_cloud else self.topics.up(self.name, "answer")
        self.outgoing.say(topic, message)

    def receive(self, topic: str, payload: bytes) -> None:
        """Take what came.  Raises BadMessage."""
        match self.topics.parse(topic):
            case FromAgent(agent=agent, leaf="d", xfer=xfer):
                self.chunk(agent, xfer, payload, heard=False)
            case ToAgent(leaf="d", xfer=xfer):
                self.chunk(CLOUD, xfer, payload, heard=False)
            case FromCoordinator(leaf="blob", name=xfer):
                self.chunk(CLOUD, xfer, payload, heard=True)
            case FromAgent(agent=peer) | ToAgent(agent=peer):
                match codec.decode(payload).b:
                    case Grant() as grant:
                        self.exchange.granted(peer if self._is_cloud else CLOUD, grant)
                    case Done() | Refuse() as answer:
                        self.hear(answer)

    def chunk(self, peer: str, xfer: str, payload: bytes, *, heard: bool) -> None:
        """A chunk came."""
        self.exchange.pulling.chunk(peer, xfer, payload, heard=heard)

    def hear(self, answer: Done | Refuse) -> None:
        """A peer has it, or does not want it."""

    def _chunk_topic(self, peer: str, xfer: str) -> str:
        if not self._is_cloud:
            return self.topics.up_chunk(self.name, xfer)
        return self.topics.blob(xfer) if peer == EVERYONE else self.topics.down_chunk(peer, xfer)

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected():
                    self.exchange.connected()
                    self.connected.set()
                case Received(topic, payload, _):
                    self.receive(topic, payload)


def blob_of(path: Path, chunk: int) -> Blob:
    """A file as it is offered."""
    data = path.read_bytes()
    return Blob(sha256=hashlib.sha256(data).hexdigest(), size=len(data), chunk=chunk)
