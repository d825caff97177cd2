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
from typing import Final

import msgspec

from protocol.bus import MQTT_MAX_PACKET_BYTES, Bus, BusError, NotConnected
from protocol.errors import BadMessage, Unavailable
from protocol.frames import decode_frame, encode_frame
from protocol.messages import Blob, Done, Grant, Refuse
from protocol.sending import SendChunk, Sending
from protocol.spool import Partial, Spool
from protocol.transfer import Action as ReceivingAction
from protocol.transfer import Completed, GaveUp, Receiving, SendGrant

AROUND_CHUNK_BYTES: Final = 512
"""What a packet holds beside its chunk, at most: the topic (256), MQTT's header and properties, the frame's own 12."""
MIN_CHUNK_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Pulled:
    """A blob (or its wanted prefix) is here: verified, durable, at `path`."""

    peer: str
    blob: Blob
    sha256: str
    path: Path


@dataclass(frozen=True, slots=True)
class Lost:
    """A blob is not here.  `temporary`: our disk or the peer's silence; a new offer may succeed and resumes.

    Otherwise it can never be had as it was offered: too big, impossible, or its bytes are not what its digest says.
    """

    peer: str
    blob: Blob
    sha256: str
    reason: str
    temporary: bool


Outcome = Pulled | Lost


@dataclass(slots=True, eq=False)
class _Pull:
    peer: str
    blob: Blob
    size: int | None
    sha256: str
    partial: Partial | None  # None once there is no file to write to

    def lost(self, reason: str, *, temporary: bool = True) -> Lost:
        return Lost(self.peer, self.blob, self.sha256, reason, temporary)


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
        self.max_packet_bytes = MQTT_MAX_PACKET_BYTES
        self._bus, self._spool, self._clock = bus, spool, clock
        self._say, self._chunk_topic, self._source, self._outcome = say, chunk_topic, source, outcome
        self._pulls: dict[tuple[str, str], _Pull] = {}
        self._credit = asyncio.Event()
        self._ends: asyncio.Queue[tuple[_Pull, Lost | None]] = asyncio.Queue()

    def renew(self, *, reserve_bytes: int) -> None:
        """Another part of the disk to leave free, from the next transfer on."""
        self._spool.reserve_bytes = reserve_bytes

    async def run(self) -> None:
        """Send what has credit and finish what is complete, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(), name="exchange.send")
            tasks.create_task(self._finish(), name="exchange.finish")

    # -------------------------------------------------------------------------------------------------------- pulling

    def pull(self, peer: str, blob: Blob, *, size: int | None = None, sha256: str | None = None) -> None:
        """Have `blob` (or its prefix of `size` bytes and digest `sha256`) from `peer`; asking twice is asking once."""
        known = self._pulls.get((peer, blob.xfer))
        if known is not None and (known.blob, known.size) == (blob, size):
            return
        pull = self._pulls[peer, blob.xfer] = _Pull(peer, blob, size, sha256 or blob.sha256, partial=None)
        try:
            pull.partial = self._spool.open(blob, size=size, owner=peer)
            self._perform(self.receiving.open(peer, blob, self._clock(), size=size, have=pull.partial.have))
        except (BadMessage, Unavailable) as error:
            self._perform(self.receiving.close(peer, blob.xfer, self._clock()))  # of another geometry, perhaps
            self._ends.put_nowait((pull, pull.lost(str(error), temporary=isinstance(error, Unavailable))))

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
            pull.partial = None
            self._perform(self.receiving.close(peer, xfer, self._clock()))
            self._ends.put_nowait((pull, pull.lost(str(error))))
            return
        self._perform(self.receiving.chunk(peer, xfer, index, len(data), self._clock()))

    def _perform(self, actions: list[ReceivingAction]) -> None:
        for action in actions:
            match action:
                case SendGrant(peer, grant):
                    self._say(peer, grant)
                case Completed(peer, xfer):
                    self._ends.put_nowait((self._pulls[peer, xfer], None))
                case GaveUp(peer, xfer, reason):
                    pull = self._pulls[peer, xfer]
                    self._ends.put_nowait((pull, pull.lost(reason)))

    async def _finish(self) -> None:
        """One at a time: verifying reads the whole file, and the disk is one."""
        while True:
            pull, lost = await self._ends.get()
            end = lost or (await self._verified(pull) if self._is_wanted(pull) else None)
            if end and self._is_wanted(pull):
                del self._pulls[pull.peer, pull.blob.xfer]
                await self._outcome(end)

    def _is_wanted(self, pull: _Pull) -> bool:
        """Not stopped, nor replaced by another geometry, since its end was noted."""
        return self._pulls.get((pull.peer, pull.blob.xfer)) is pull

    async def _verified(self, pull: _Pull) -> Outcome:
        assert pull.partial is not None, "only an open file completes"
        try:
            path = await asyncio.to_thread(pull.partial.finish, pull.sha256)
        except (BadMessage, Unavailable) as error:
            return pull.lost(str(error), temporary=isinstance(error, Unavailable))
        return Pulled(pull.peer, pull.blob, pull.sha256, path)

    # -------------------------------------------------------------------------------------------------------- sending

    def offer(self, blob: Blob) -> Blob:
        """Make `blob` available, in chunks that the broker of this connection takes; the blob as it is to be announced."""
        fitting = msgspec.structs.replace(blob, chunk=min(blob.chunk, self.max_chunk_bytes))
        self.sending.add(fitting)
        return fitting

    @property
    def max_chunk_bytes(self) -> int:
        """The largest chunk that the broker of this connection takes."""
        return max(MIN_CHUNK_BYTES, self.max_packet_bytes - AROUND_CHUNK_BYTES)

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
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)
    except OSError:
        return b""
