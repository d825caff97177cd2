"""Daemons as far as transfers go, on a bus in memory that can lose, cut and refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from bench.transfer_live.node import CLOUD, Node, blob_of
from protocol.errors import BadMessage
from protocol.memory_bus import MemoryBroker
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.pulling import Lost, Outcome, Pulled
from protocol.topics import Topics

CHUNK = 1024
FOR_EVER = {"timeout_s": 1e6, "max_timeout_s": 1e6}
"""With these a transfer never goes on because of a timer."""
IMPATIENT = {"timeout_s": 0.02, "max_timeout_s": 0.5}
PATIENCE_S = 60.0
topics = Topics("lab")


class Side(Node):
    """One daemon as far as transfers go, on a bus in memory, with what it heard and what it could not take."""

    def __init__(
        self, broker: MemoryBroker, folder: Path, name: str = CLOUD, max_bytes: int = 2**30, **rules: Any
    ) -> None:
        super().__init__(broker.bus(name), topics, folder, name, max_bytes=max_bytes, **{**FOR_EVER, **rules})
        self.heard: asyncio.Queue[Done | Refuse] = asyncio.Queue()
        self.bad: list[str] = []
        self.n_grants = 0
        self.moved = asyncio.Event()

    def say(self, peer: str, message: Grant | Placed | Done | Refuse) -> None:
        self.n_grants += isinstance(message, Grant)
        super().say(peer, message)

    def receive(self, topic: str, payload: bytes) -> None:
        try:
            super().receive(topic, payload)
        except BadMessage as error:
            self.bad.append(str(error))
        self.timer.moved()
        self.moved.set()

    def hear(self, answer: Done | Refuse) -> None:
        self.heard.put_nowait(answer)

    def have(self, path: Path, **changes: Any) -> Blob:
        """Have this file ready for whoever asks, in whatever chunks."""
        blob = msgspec.structs.replace(blob_of(path, CHUNK), **changes)
        self.offer(path, blob)
        self.exchange.sending.add(blob)  # as it is, whatever the broker takes
        return blob

    async def ended(self) -> Outcome:
        async with asyncio.timeout(PATIENCE_S):
            return await self.outcomes.get()

    async def answered(self) -> Done | Refuse:
        async with asyncio.timeout(PATIENCE_S):
            return await self.heard.get()

    async def pulled(self, sha256: str) -> bytes:
        """The next outcome is this content; its bytes."""
        end = await self.ended()
        assert isinstance(end, Pulled), end
        assert end.sha256 == sha256
        assert end.path == self.blobs.path(sha256)
        return end.path.read_bytes()

    async def lost(self) -> Lost:
        end = await self.ended()
        assert isinstance(end, Lost), end
        return end

    def unfinished(self) -> list[Path]:
        return list(self.blobs.partial.iterdir())


Start = Callable[..., Any]


class Wire:
    """A broker whose chunks are counted and, if told, lost."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.broker.drop = self._passes
        self.passed: list[tuple[str, int]] = []
        self.lose: Callable[[int], bool] = lambda _: False
        self.at: dict[int, Callable[[], object]] = {}

    def _passes(self, topic: str, payload: bytes) -> bool:
        if "/d/" not in topic and "/c/blob/" not in topic:
            return False
        number = len(self.passed)
        self.passed.append((topic.rsplit("/", 1)[-1], int.from_bytes(payload[4:8], "big")))
        if number in self.at:
            asyncio.get_running_loop().call_soon(self.at[number])
        return self.lose(number)


def a_file(folder: Path, n_bytes: int, seed: int = 1) -> Path:
    path = folder / f"file-{seed}-{n_bytes}"
    path.write_bytes(Random(seed).randbytes(n_bytes))
    return path
