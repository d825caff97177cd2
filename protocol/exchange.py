"""Both directions of the bulk between one daemon and its peers: the transfer machines bound to a bus and to a disk.

The coordinator's peers are its agents, an agent's only peer is "coordinator"; everything else is the same, so it is here
once.  What the state machines decide (protocol/transfer.py, protocol/sending.py) is carried out: credit is published, chunks
are read and published one at a time at the bus's own pace, arriving chunks are written, complete files are verified in a
thread and handed over, a broadcast is subscribed to for as long as it is pulled.  Nothing is decided here, and no byte of a
blob stays in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from protocol.broadcast import EVERYONE, Broadcasts
from protocol.bus import MQTT_MAX_PACKET_BYTES, Bus, BusError, NotConnected
from protocol.errors import BadMessage, Unavailable
from protocol.fetching import Fetching
from protocol.files import read_at
from protocol.frames import carried_checksum, decode_frame, encode_frame
from protocol.http_store import Carrier
from protocol.line import Line
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.pacing import Pace
from protocol.placing import Placing
from protocol.sending import SendChunk, Sending
from protocol.spool import Partial, Spool
from protocol.store_way import Signer, Way
from protocol.transfer import Action as ReceivingAction
from protocol.transfer import Completed, GaveUp, Receiving, SendGrant, StopListening

AROUND_CHUNK_BYTES: Final = 512
"""What a packet holds beside its chunk, at most: the topic (256), MQTT's header and properties, the frame's own 12."""
MIN_CHUNK_BYTES: Final = 1024
N_VERIFYING: Final = 3


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
    partial: Partial | None  # None while there is no file to write to
    listening: bool
    by_store: bool = False
    begun: bool = False

    def lost(self, reason: str, *, temporary: bool = True) -> Lost:
        return Lost(self.peer, self.blob, self.sha256, reason, temporary)


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
        self.receiving = receiving
        self.n_sent_bytes = 0
        self.max_packet_bytes = MQTT_MAX_PACKET_BYTES
        self._bus, self._spool, self._clock = bus, spool, clock
        self._say, self._chunk_topic, self._source, self._outcome = say, chunk_topic, source, outcome
        self._pulls: dict[tuple[str, str], _Pull] = {}
        self._line = Line(receiving.budget_bytes, lambda key: receiving.silent_since(*key))
        self._blob_topic = blob_topic
        self._heard: set[str] = set()
        self._ears = asyncio.Event()
        self._credit = asyncio.Event()
        self._ending = asyncio.Lock()
        self._is_turn_of_all = False
        self._ends: asyncio.Queue[tuple[_Pull, Lost | None]] = asyncio.Queue()
        self.way = Way(carrier or Carrier(), signer, clock)
        self.placing = Placing(self.way, clock=clock, say=say, source=source, pace=self.pace)
        self.fetching = Fetching(
            self.way,
            clock=clock,
            say=say,
            pace=receiving.pace,
            take=self.chunk,
            ended=lambda end: self._perform([end]),
            by_bus=self._by_bus,
        )

    def renew(self, *, reserve_bytes: int) -> None:
        """Another part of the disk to leave free, from the next transfer on."""
        self._spool.reserve_bytes = reserve_bytes

    async def run(self) -> None:
        """Send what has credit and finish what is complete, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(), name="exchange.send")
            for n in range(N_VERIFYING):
                tasks.create_task(self._finish(), name=f"exchange.finish.{n}")
            tasks.create_task(self._listen(), name="exchange.listen")
            tasks.create_task(self.placing.run(), name="exchange.placing")
            tasks.create_task(self.fetching.run(), name="exchange.fetching")
            tasks.create_task(self.way.run(), name="exchange.store")

    # -------------------------------------------------------------------------------------------------------- pulling

    def pull(
        self,
        peer: str,
        blob: Blob,
        *,
        size: int | None = None,
        sha256: str = "",
        listen: bool = False,
        by_store: bool = False,
    ) -> None:
        """Have `blob` (or its prefix of `size` bytes and digest `sha256`) from `peer`; asking twice is asking once.

        `listen`: it may be broadcast, so that most of it need not be sent to us alone.  `by_store`: it can be had from a store.
        """
        known = self._pulls.get((peer, blob.xfer))
        if known is not None and (known.blob, known.size) == (blob, size):
            return
        self.fetching.close(peer, blob.xfer)
        self._line.leave((peer, blob.xfer))
        pull = _Pull(peer, blob, size, sha256 or blob.sha256, None, listen, by_store and self.way.is_open(peer))
        self._pulls[peer, blob.xfer] = pull
        self._start(pull)

    def _start(self, pull: _Pull) -> None:
        if pull.by_store:
            self._begin(pull)
        elif pull.listening and pull.blob.xfer not in self._heard:
            self._ears.set()  # it begins when the broker knows of it, or the first chunks would be missed
        else:
            size = pull.blob.size if pull.size is None else pull.size
            self._line.join((pull.peer, pull.blob.xfer), min(size, self.receiving.window * pull.blob.chunk))
            self._begin_next()

    def _begin_next(self) -> None:
        """Begin those whose turn it is."""
        for key in self._line.begin(self._clock()):
            self._begin(self._pulls[key])

    def _begin(self, pull: _Pull) -> None:
        pull.begun = True
        peer, blob, now = pull.peer, pull.blob, self._clock()
        self._perform(self.receiving.close(peer, blob.xfer, now))  # of another geometry, perhaps
        try:
            pull.partial = self._spool.open(blob, size=pull.size, owner=peer)
            have, listening = pull.partial.have, pull.listening
            if pull.by_store:
                self.fetching.open(peer, blob, pull.size, have)
            else:
                self._perform(self.receiving.open(peer, blob, now, size=pull.size, have=have, listening=listening))
        except (BadMessage, Unavailable) as error:
            self._ends.put_nowait((pull, pull.lost(str(error), temporary=isinstance(error, Unavailable))))

    def _by_bus(self, peer: str, xfer: str) -> None:
        """The store does not have the rest of this one."""
        pull = self._pulls[peer, xfer]
        pull.by_store = False
        self._start(pull)

    async def _listen(self) -> None:
        """Have the subscriptions be those of the pulls that listen."""
        while True:
            await self._ears.wait()
            self._ears.clear()
            listening = {pull.blob.xfer: pull for pull in self._pulls.values() if pull.listening and not pull.by_store}
            for xfer in self._heard - set(listening):
                self._heard.remove(xfer)
                with suppress(BusError):
                    await self._bus.unsubscribe(self._blob_topic(xfer))
            for xfer, pull in listening.items():
                try:
                    if xfer not in self._heard:
                        await self._bus.subscribe(self._blob_topic(xfer))
                        self._heard.add(xfer)
                except BusError:  # a broker that does not let us listen: it is pulled
                    pull.listening = False
                if not pull.begun and self._is_wanted(pull):
                    self._line.leave((pull.peer, xfer))
                    self._begin(pull)

    def stop_pulling(self, peer: str, xfer: str) -> None:
        """Not wanted any more; what is on disk is thrown away."""
        pull = self._pulls.pop((peer, xfer), None)
        self._perform(self.receiving.close(peer, xfer, self._clock()))
        self.fetching.close(peer, xfer)
        self._ears.set()
        if pull and pull.partial:
            pull.partial.discard()
        self._line.leave((peer, xfer))
        self._begin_next()

    def chunk(self, peer: str, xfer: str, payload: bytes, *, heard: bool = False) -> None:
        """A chunk frame arrived, `heard` in a broadcast or sent to us alone.

        Raises BadMessage for a frame that is none; what nobody asked for is ignored.
        """
        pull = self._pulls.get((peer, xfer))
        if pull is None or pull.partial is None:
            self.receiving.counts.n_stray += 1
            return
        index, data = decode_frame(payload)
        try:
            is_new = pull.partial.write(index, data, carried_checksum(payload))
        except Unavailable as error:
            pull.partial = None
            self._perform(self.receiving.close(peer, xfer, self._clock()))
            self.fetching.close(peer, xfer)
            self._ends.put_nowait((pull, pull.lost(str(error))))
            return
        if not pull.by_store:
            self._perform(self.receiving.chunk(peer, xfer, index, len(data), self._clock(), heard=heard))
        elif is_new:
            self.fetching.wrote(peer, xfer, index, pull.partial.have)

    def placed(self, peer: str, placed: Placed) -> None:
        """A peer has put into the store what we asked for.  Raises BadMessage where it does not say where."""
        self.fetching.placed(peer, placed)

    def _perform(self, actions: list[ReceivingAction]) -> None:
        for action in actions:
            match action:
                case SendGrant(peer, grant):
                    self._say(peer, grant)
                case Completed(peer, xfer):
                    self._ends.put_nowait((self._pulls[peer, xfer], None))
                case StopListening(peer, xfer):
                    self._pulls[peer, xfer].listening = False
                    self._ears.set()
                case GaveUp(peer, xfer, reason):
                    pull = self._pulls[peer, xfer]
                    self._ends.put_nowait((pull, pull.lost(reason)))

    async def _finish(self) -> None:
        """One of a few: the disk writes while the next is hashed; what follows upon an end is for one at a time."""
        while True:
            pull, lost = await self._ends.get()
            if self._is_wanted(pull):
                self._line.leave((pull.peer, pull.blob.xfer))
                self._begin_next()
            end = lost or (await self._verified(pull) if self._is_wanted(pull) else None)
            async with self._ending:
                if end and self._is_wanted(pull):
                    del self._pulls[pull.peer, pull.blob.xfer]
                    self._ears.set()
                    await self._outcome(end)

    def remaining(self, peer: str, xfer: str) -> int | None:
        """Chunks still to come, for display; None if it is not being pulled, nor waits for it."""
        pull = self._pulls.get((peer, xfer))
        if pull is None:
            return None
        return len(pull.partial.have) - pull.partial.have.count if pull.partial else pull.blob.n_chunks

    @property
    def received_bytes(self) -> dict[str, int]:
        """By each road, since the start."""
        return {"bus": self.receiving.counts.n_bytes, "store": self.fetching.receiving.counts.n_bytes}

    @property
    def sent_bytes(self) -> dict[str, int]:
        """By each road, since the start."""
        return {"bus": self.n_sent_bytes, "store": self.placing.n_sent_bytes}

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

    # ----------------------------------------------------------------------------------------------------------- time

    def connected(self) -> None:
        """The bus is new: all credit, given and had, is void."""
        self._void()
        self._perform(self.receiving.reset(self._clock()))
        self.fetching.reset()

    def peer_reborn(self, peer: str) -> None:
        """A peer restarted and has forgotten the credit it had."""
        self.peer_left(peer)
        self._perform(self.receiving.reset(self._clock(), peer))
        self.fetching.reset(peer)

    def peer_left(self, peer: str) -> None:
        """A peer is gone: nothing is sent to it, and nobody waits for it."""
        self.sending.drop_peer(peer)
        self.broadcasts.leave(peer)

    def tick(self) -> None:
        """Handle what time alone made due; see `wake_at`."""
        self._perform(self.receiving.tick(self._clock()))
        self.fetching.tick()
        if self._line.wake_at is not None and self._line.wake_at <= self._clock():
            self._begin_next()

    @property
    def wake_at(self) -> float | None:
        """When to tick."""
        all_three = self.receiving.wake_at, self.fetching.receiving.wake_at, self._line.wake_at
        return min((at for at in all_three if at is not None), default=None)
