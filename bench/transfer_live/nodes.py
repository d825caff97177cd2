"""Nodes of the bench on a real bus, and processes full of them that are told what to do over a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Final, Self

from agent.probe import uplink_seconds
from bench.transfer_live.node import CLOUD, Node
from bench.transfer_live.world import link
from protocol.bus import BrokerConfig, mqtt_bus
from protocol.frames import encode_frame
from protocol.malloc import keep_pages
from protocol.messages import Blob
from protocol.pulling import Pulled
from protocol.topics import Topics
from protocol.transfer import MAX_WINDOW

keep_pages(is_one_arena=True)  # as the daemons do; in every process of the bench
TOPICS: Final = Topics("bench")
DROPPED: Final = "$SYS/broker/publish/messages/dropped"


class Live(Node):
    """A node that counts what it gets.  `lose` is the share of chunks that vanish when they are here."""

    def __init__(self, url: str, folder: Path, name: str, *, lose: float = 0.0, **rules: Any) -> None:
        bus = mqtt_bus(BrokerConfig(url=url), name, lambda: None)
        super().__init__(bus, TOPICS, folder, name, max_window=MAX_WINDOW, **rules)
        self.n_chunks, self.n_lost, self.n_dropped = 0, 0, 0
        self.whole_at: dict[str, float] = {}
        self._arrived, self._counting = asyncio.Event(), 0
        self._lose, self.random = lose, Random(name)

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if self.name == CLOUD:
            await self.bus.subscribe(DROPPED)
        return self

    async def pulled(self) -> Pulled:
        """The next end of a transfer, which must be a good one."""
        end = await self.outcomes.get()
        assert isinstance(end, Pulled), f"{self.name}: {end.reason}"
        return end

    async def count(self, n: int) -> None:
        """Wait for so many chunks from now on, whatever they are."""
        self._counting, self.n_chunks = n, 0
        self._arrived.clear()
        await self._arrived.wait()

    def receive(self, topic: str, payload: bytes) -> None:
        """See Node."""
        if topic == DROPPED:
            self.n_dropped = int(payload)
        else:
            super().receive(topic, payload)

    def chunk(self, peer: str, xfer: str, payload: bytes, *, heard: bool) -> None:
        """See Node."""
        self.n_chunks += 1
        if self.n_chunks == self._counting:
            self._arrived.set()
        if self._lose and self.random.random() < self._lose:
            self.n_lost += 1
            return
        super().chunk(peer, xfer, payload, heard=heard)
        if self.exchange.pulling.receiving.remaining(peer, xfer) is None:
            self.whole_at.setdefault(xfer, time.monotonic())


class Agents:
    """Agents in a process of their own, told what to do over a pipe."""

    def __init__(self, url: str, folder: Path, names: Sequence[str], **settings: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, url, folder, list(names), settings), daemon=True)
        self._process.start()

    async def __aenter__(self) -> Self:
        await self.answer()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pipe.send(("stop",))
        await asyncio.to_thread(self._process.join, 20)

    @property
    def pid(self) -> int:
        """Of that process."""
        assert self._process.pid is not None
        return self._process.pid

    def do(self, *order: Any) -> None:
        """Give an order; see _live."""
        self._pipe.send(order)

    async def answer(self) -> Any:
        """The answer to it."""
        return await asyncio.to_thread(self._pipe.recv)


def _live(pipe: Connection, url: str, folder: Path, names: list[str], settings: dict[str, Any]) -> None:
    asyncio.run(_obey(pipe, url, folder, names, settings))


async def _obey(pipe: Connection, url: str, folder: Path, names: list[str], settings: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        if (how := settings.pop("link", None)) is not None:
            url = f"mqtt://127.0.0.1:{await stack.enter_async_context(link(int(url.rpartition(':')[2]), *how))}"
        nodes = [await stack.enter_async_context(Live(url, folder, name, **settings)) for name in names]
        pipe.send("ready")
        while True:
            match await asyncio.to_thread(pipe.recv):
                case ("offer", files):
                    for node, (path, blob) in zip(nodes, files, strict=True):
                        node.offer(path, blob)
                    pipe.send("offered")
                case ("publish", path, blob):
                    for node in nodes:
                        await _publish(node, path, blob)
                case ("probe", n_bytes, within_s):
                    pipe.send(await asyncio.gather(*(_probe(node, n_bytes, within_s) for node in nodes)))
                case ("pull", blob, sizes):
                    pipe.send(await asyncio.gather(*(_pull(*one, blob) for one in zip(nodes, sizes, strict=True))))
                case ("stop",):
                    return


async def _probe(node: Live, n_bytes: int, within_s: float) -> float:
    """Bytes per second of a node's link, as an agent measures them before its first update."""
    await asyncio.sleep(node.random.uniform(0, within_s))
    seconds = await uplink_seconds(node.bus, TOPICS.up_probe(node.name), n_bytes)
    assert seconds is not None, f"{node.name}: the connection was lost"
    return n_bytes / seconds


async def _publish(node: Live, path: Path, blob: Blob) -> None:
    """Bare: every frame as soon as the bus took the one before."""
    data = path.read_bytes()
    for index in range(blob.n_chunks):
        frame = encode_frame(index, data[index * blob.chunk : (index + 1) * blob.chunk])
        await node.bus.publish(TOPICS.up_chunk(node.name, blob.xfer), frame, qos=0)


async def _pull(node: Live, wanted: tuple[int, str], blob: Blob) -> tuple[float, int, int]:
    """Until it is verified: when, chunks that came, and those that were lost of them."""
    size, sha256 = wanted
    node.n_chunks = node.n_lost = 0
    node.pull(CLOUD, blob, size=size if size < blob.size else None, sha256=sha256, listen=True)
    await node.pulled()
    return time.monotonic(), node.n_chunks, node.n_lost
