"""Both directions of the bulk between one daemon and its peers: the transfer machines bound to a bus and to files.

The coordinator's peers are its agents, an agent's only peer is "coordinator"; everything else is the same, so it is here
once.  What comes in is `pulling` (protocol/pulling.py).  What goes out is decided by protocol/sending.py and protocol/broadcast.py and
carried out here: chunks are read and published one at a time, at the bus's own pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from protocol.broadcast import EVERYONE, Broadcasts
from protocol.bus import MQTT_MAX_PACKET_BYTES, Bus, BusError, NotConnected
from protocol.files import read_at
from protocol.frames import encode_frame
from protocol.http_store import Carrier
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.pacing import Pace
from protocol.placing import Placing
from protocol.pulling import Outcome, Pulling
from protocol.sending import SendChunk, Sending
from protocol.spool import Spool
from protocol.store_way import Signer, Way
from protocol.transfer import Receiving

AROUND_CHUNK_BYTES: Final = 512
"""What a packet holds beside its chunk, at most: the topic (256), MQTT's header and properties, the frame's own 12."""
MIN_CHUNK_BYTES: Final = 1024


class Exchange:
    """All transfers of one daemon.

    `say(peer, message)` publishes Grant, Placed, Done or Refuse; `chunk_topic(peer, xfer)` is where chunks for a peer go, or for
    EVERYONE; `blob_topic(xfer)` is where a broadcast is listened to; `source(xfer)` is the file behind an offered blob (None:
    gone); `outcome` is called in the event loop with each end; `pace` caps what is sent; `carrier` and `signer` are the way to
    an object store, and an account there.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        spool: Spool,
        receiving: Receiving,
        clock: Callable[[], float],
        say: Callable[[str, Grant | Placed | Done | Refuse], None],
        chunk_topic: Callable[[str, str], str],
        source: Callable[[str], Path | None],
        outcome: Callable[[Outcome], Awaitable[None]],
        blob_topic: Callable[[str], str] = str,
        pace: Pace | None = None,
        carrier: Carrier | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.sending = Sending()
        self.broadcasts = Broadcasts()
        self.pace = pace or Pace()
        self.n_sent_bytes = 0
        self.max_packet_bytes = MQTT_MAX_PACKET_BYTES
        self._bus, self._clock = bus, clock
        self._say, self._chunk_topic, self._source = say, chunk_topic, source
        self._credit = asyncio.Event()
        self._is_turn_of_all = False
        self.way = Way(carrier or Carrier(), signer, clock)
        self.placing = Placing(self.way, clock=clock, say=say, source=source, pace=self.pace)
        self.pulling = Pulling(
            bus=bus,
            spool=spool,
            receiving=receiving,
            clock=clock,
            say=say,
            outcome=outcome,
            blob_topic=blob_topic,
            way=self.way,
        )

    async def run(self) -> None:
        """Send what has credit and finish what is complete, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(), name="exchange.send")
            tasks.create_task(self.pulling.run(), name="exchange.pulling")
            tasks.create_task(self.placing.run(), name="exchange.placing")
            tasks.create_task(self.way.run(), name="exchange.store")

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
        blob = self.sending.asked_of(peer, grant)
        if blob is None:
            self._say(peer, Refuse(xfer=grant.xfer, reason="superseded: this blob is not offered here any more"))
        elif grant.by_store:
            self.placing.granted(peer, blob, grant)
        elif grant.until:
            self.broadcasts.granted(peer, blob, grant, self._clock())
        else:
            self.broadcasts.leave(peer, grant.xfer)
            self.sending.granted(peer, grant)
        self._credit.set()

    def announced(self, peer: str, blob: Blob) -> None:
        """A peer is being told that it may listen to this blob, which is offered here."""
        self.broadcasts.expect(peer, blob, self._clock())

    async def _send(self) -> None:
        while True:
            self._credit.clear()
            wait_s: float | None = self.pace.wait_s(self._clock())
            if not wait_s:
                if (chunk := self._next_chunk()) is not None:
                    self.pace.take(chunk.length, self._clock())
                    await self._send_chunk(chunk)
                    continue
                at = self.broadcasts.wake_at
                wait_s = None if at is None else max(0.0, at - self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._credit.wait()

    def _next_chunk(self) -> SendChunk | None:
        """Broadcasts and single peers in turn."""
        self._is_turn_of_all = not self._is_turn_of_all
        if self._is_turn_of_all:
            return self.broadcasts.next_chunk(self._clock()) or self.sending.next_chunk()
        return self.sending.next_chunk() or self.broadcasts.next_chunk(self._clock())

    async def _send_chunk(self, chunk: SendChunk) -> None:
        path = self._source(chunk.xfer)
        data = read_at(path, chunk.offset, chunk.length) if path else b""
        if len(data) != chunk.length:
            self._withdraw(chunk, "superseded: the file behind this blob is gone")
            return
        try:
            topic = self._chunk_topic(chunk.peer, chunk.xfer)
            await self._bus.publish(topic, encode_frame(chunk.index, data), qos=0)
            self.n_sent_bytes += len(data)
        except NotConnected:
            self._void()  # the receiver grants again on the new connection
        except BusError as error:
            self._withdraw(chunk, f"the broker does not take its chunks: {error}")

    def _withdraw(self, chunk: SendChunk, reason: str) -> None:
        """Offer a blob no longer; whoever listens is told so when it asks for more."""
        self.sending.remove(chunk.xfer)
        self.broadcasts.remove(chunk.xfer)
        if chunk.peer != EVERYONE:
            self._say(chunk.peer, Refuse(xfer=chunk.xfer, reason=reason))

    def _void(self) -> None:
        self.sending.reset()
        self.broadcasts.reset()

    @property
    def sent_bytes(self) -> dict[str, int]:
        """By each road, since the start."""
        return {"bus": self.n_sent_bytes, "store": self.placing.n_sent_bytes}

    def connected(self) -> None:
        """The bus is new: all credit, given and had, is void."""
        self._void()
        self.pulling.reset()

    def peer_reborn(self, peer: str) -> None:
        """A peer restarted and has forgotten the credit it had."""
        self.peer_left(peer)
        self.pulling.reset(peer)

    def peer_left(self, peer: str) -> None:
        """A peer is gone: nothing is sent to it, and nobody waits for it."""
        self.sending.drop_peer(peer)
        self.broadcasts.leave(peer)
