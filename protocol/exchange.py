"""Both directions of the bulk between one daemon and its peers: the transfer machines bound to a bus and to a disk.

The coordinator's peers are its agents, an agent's only peer is "coordinator"; everything else is the same, so it is here
once.  What the state machines decide (protocol/transfer.py, protocol/sending.py) is carried out: credit is published, chunks
are read and published one at a time at the bus's own pace, arriving chunks are written, complete files are verified in a
thread and handed over.  Nothing is decided here, and no byte of a blob stays in memory.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.bus import Bus, BusError, NotConnected
from protocol.errors import BadMessage, Unavailable
from protocol.frames import decode_frame, encode_frame
from protocol.messages import Blob, Done, Grant, Refuse
from protocol.sending import SendChunk, Sending
from protocol.spool import Partial, Spool
from protocol.transfer import Action as ReceivingAction
from protocol.transfer import Completed, GaveUp, Receiving, SendGrant


@dataclass(frozen=True, slots=True)
class Pulled:
    """A blob (or its wanted prefix) is here: verified, durable, at `path`."""

    peer: str
    blob: Blob
    sha256: str
    path: Path


@dataclass(frozen=True, slots=True)
class Lost:
    """A blob is not here.  `temporary`: our disk or the peer's silence; a new offer may succeed and resumes."""

    peer: str
    blob: Blob
    sha256: str
    reason: str
    temporary: bool


Outcome = Pulled | Lost


@dataclass(slots=True)
class _Pull:
    blob: Blob
    size: int | None
    sha256: str
    partial: Partial | None


class Exchange:
    """All transfers of one daemon.

    `say(peer, message)` publishes Grant, Done or Refuse; `chunk_topic(peer, xfer)` is where chunks for a peer go;
    `source(xfer)` is the file behind an offered blob (None: gone); `outcome` is called in the event loop with each end.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        spool: Spool,
        receiving: Receiving,
        clock: Callable[[], float],
        say: Callable[[str, Grant | Done | Refuse], None],
        chunk_topic: Callable[[str, str], str],
        source: Callable[[str], Path | None],
        outcome: Callable[[Outcome], Awaitable[None]],
    ) -> None:
        self.sending = Sending()
        self.receiving = receiving
        self.n_sent_bytes = 0
        self._bus, self._spool, self._clock = bus, spool, clock
        self._say, self._chunk_topic, self._source, self._outcome = say, chunk_topic, source, outcome
        self._pulls: dict[tuple[str, str], _Pull] = {}
        self._credit = asyncio.Event()
        self._ends: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()

    async def run(self) -> None:
        """Send what has credit and finish what is complete, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(), name="exchange.send")
            tasks.create_task(self._finish(), name="exchange.finish")

    # -------------------------------------------------------------------------------------------------------- pulling

    def pull(self, peer: str, blob: Blob, *, size: int | None = None, sha256: str | None = None) -> None:
        """Have `blob` (or its prefix of `size` bytes and digest `sha256`) from `peer`; asking twice is asking once."""
        key = (peer, blob.xfer)
        if key in self._pulls and self._pulls[key].size == size:
            return
        try:
            partial = self._spool.open(blob, size=size, owner=peer)
            self._pulls[key] = _Pull(blob, size, sha256 or blob.sha256, partial)
            self._perform(self.receiving.open(peer, blob, self._clock(), size=size, have=partial.have))
        except (BadMessage, Unavailable) as error:
            digest = sha256 or blob.sha256
            self._pulls[key] = _Pull(blob, size, digest, partial=None)
            self._ends.put_nowait((peer, blob.xfer, str(error)))

    def stop_pulling(self, peer: str, xfer: str) -> None:
        """Not wanted any more; what is on disk is thrown away."""
        pull = self._pulls.pop((peer, xfer), None)
        self._perform(self.receiving.close(peer, xfer, self._clock()))
        if pull and pull.partial:
            pull.partial.discard()

    def chunk(self, peer: str, xfer: str, payload: bytes) -> None:
        """A chunk frame arrived.  Raises BadMessage for a frame that is none; what nobody asked for is ignored."""
        pull = self._pulls.get((peer, xfer))
        if pull is None or pull.partial is None:
            self.receiving.counts.n_stray += 1
            return
        index, data = decode_frame(payload)
        try:
            pull.partial.write(index, data)
        except Unavailable as error:
            self._perform(self.receiving.close(peer, xfer, self._clock()))
            self._ends.put_nowait((peer, xfer, str(error)))
            return
        self._perform(self.receiving.chunk(peer, xfer, index, len(data), self._clock()))

    def _perform(self, actions: list[ReceivingAction]) -> None:
        for action in actions:
            match action:
                case SendGrant(peer, grant):
                    self._say(peer, grant)
                case Completed(peer, xfer):
                    self._ends.put_nowait((peer, xfer, ""))
                case GaveUp(peer, xfer, reason):
                    self._ends.put_nowait((peer, xfer, reason))

    async def _finish(self) -> None:
        """One at a time: verifying reads the whole file, and the disk is one."""
        while True:
            peer, xfer, fault = await self._ends.get()
            pull = self._pulls.get((peer, xfer))
            if pull is None:
                continue
            end: Outcome
            if fault:
                end = Lost(peer, pull.blob, pull.sha256, fault, temporary=True)
            else:
                end = await self._verified(peer, pull)
            self._pulls.pop((peer, xfer), None)
            await self._outcome(end)

    async def _verified(self, peer: str, pull: _Pull) -> Outcome:
        assert pull.partial is not None, "only an open file completes"
        try:
            path = await asyncio.to_thread(pull.partial.finish, pull.sha256)
        except BadMessage as error:
            return Lost(peer, pull.blob, pull.sha256, str(error), temporary=False)
        except Unavailable as error:
            return Lost(peer, pull.blob, pull.sha256, str(error), temporary=True)
        return Pulled(peer, pull.blob, pull.sha256, path)

    # -------------------------------------------------------------------------------------------------------- sending

    def granted(self, peer: str, grant: Grant) -> None:
        """A peer gave credit: send, or say that this blob is not here.  Raises BadMessage for impossible credit."""
        if not self.sending.granted(peer, grant):
            self._say(peer, Refuse(xfer=grant.xfer, reason="superseded: this blob is not offered here any more"))
        self._credit.set()

    async def _send(self) -> None:
        while True:
            await self._credit.wait()
            self._credit.clear()
            while chunk := self.sending.next_chunk():
                await self._send_chunk(chunk)

    async def _send_chunk(self, chunk: SendChunk) -> None:
        path = self._source(chunk.xfer)
        data = _read(path, chunk.offset, chunk.length) if path else b""
        if len(data) != chunk.length:
            self.sending.remove(chunk.xfer)
            self._say(chunk.peer, Refuse(xfer=chunk.xfer, reason="superseded: the file behind this blob is gone"))
            return
        try:
            topic = self._chunk_topic(chunk.peer, chunk.xfer)
            await self._bus.publish(topic, encode_frame(chunk.index, data), qos=0)
            self.n_sent_bytes += len(data)
        except NotConnected:
            self.sending.reset()  # all credit is void; the receiver grants again on the new connection
        except BusError as error:
            self.sending.remove(chunk.xfer)
            self._say(chunk.peer, Refuse(xfer=chunk.xfer, reason=f"the broker does not take its chunks: {error}"))

    # ----------------------------------------------------------------------------------------------------------- time

    def connected(self) -> None:
        """The bus is new: all credit, given and had, is void."""
        self.sending.reset()
        self._perform(self.receiving.reset(self._clock()))

    def peer_reborn(self, peer: str) -> None:
        """A peer restarted and has forgotten the credit it had."""
        self.sending.drop_peer(peer)
        self._perform(self.receiving.reset(self._clock(), peer))

    def tick(self) -> None:
        """Handle what time alone made due; see `wake_at`."""
        self._perform(self.receiving.tick(self._clock()))

    @property
    def wake_at(self) -> float | None:
        """When to tick."""
        return self.receiving.wake_at


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
