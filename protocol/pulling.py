"""The incoming half of the bulk of one daemon: the receiving machines bound to a bus and to a disk.

What the state machines decide (protocol/transfer.py, protocol/fetching.py) is carried out: credit is published, chunks
that arrive are written, complete files are verified in a thread and handed over, a broadcast is subscribed to for as long as
it is pulled.  No byte of a blob stays in memory.

Of many transfers that are wanted at once those wait in line that would find no credit, and begin in the order in which they came as soon as
those that have begun leave some.  A thousand that are begun together are half done for the whole time, and each holds a file, a bitmap and a
place in every queue; one behind the other they take as long, and hold little.  On narrow links, which use little credit, more are begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from protocol.arriving import Arriving
from protocol.bus import Bus, BusError
from protocol.errors import BadMessage, Unavailable
from protocol.fetching import Fetching
from protocol.frames import carried_checksum, decode_frame
from protocol.messages import Blob, Grant, Placed
from protocol.spool import Partial, Spool
from protocol.store_way import Way
from protocol.transfer import Action as ReceivingAction
from protocol.transfer import Completed, GaveUp, Receiving, SendGrant, StopListening

N_VERIFYING: Final = 3
MAX_UNVERIFIED: Final = 16
"""Complete files that may wait for that; while there are more, none is begun."""


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
    readers: list[Arriving] = field(default_factory=list)

    def show(self) -> None:
        """Let those who read it already have what is there."""
        if self.readers and self.partial:
            for reader in self.readers:
                reader.reached(self.partial.n_ready_bytes, self.partial.path)

    def let_down(self, reason: str) -> None:
        """It does not come: nobody need wait for the rest of it."""
        for reader in self.readers:
            reader.lost(reason)

    def lost(self, reason: str, *, temporary: bool = True) -> Lost:
        return Lost(self.peer, self.blob, self.sha256, reason, temporary)


class Pulling:
    """All that one daemon pulls.

    `say(peer, grant)` publishes credit; `blob_topic(xfer)` is where a broadcast is listened to; `outcome` is called in the event
    loop with each end; `way` is that to an object store.
    """

    def __init__(
        self,
        *,
        bus: Bus,
        spool: Spool,
        receiving: Receiving,
        clock: Callable[[], float],
        say: Callable[[str, Grant], None],
        outcome: Callable[[Outcome], Awaitable[None]],
        blob_topic: Callable[[str], str],
        way: Way,
    ) -> None:
        self.receiving = receiving
        self.fetching = Fetching(
            way,
            clock=clock,
            say=say,
            pace=receiving.pace,
            take=self.chunk,
            ended=lambda end: self._perform([end]),
            by_bus=self._by_bus,
        )
        self._bus, self._spool, self._clock, self._way = bus, spool, clock, way
        self._say, self._outcome, self._blob_topic = say, outcome, blob_topic
        self._pulls: dict[tuple[str, str], _Pull] = {}
        self._waiting: dict[tuple[str, str], int] = {}  # in line: the credit they could use at once, in bytes
        self._heard: set[str] = set()
        self._ears = asyncio.Event()
        self._ending = asyncio.Lock()
        self._ends: asyncio.Queue[tuple[_Pull, Lost | None]] = asyncio.Queue()

    def renew(self, *, reserve_bytes: int) -> None:
        """Another part of the disk to leave free, from the next transfer on."""
        self._spool.reserve_bytes = reserve_bytes

    async def run(self) -> None:
        """Finish what is complete, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for n in range(N_VERIFYING):
                tasks.create_task(self._finish(), name=f"exchange.finish.{n}")
            tasks.create_task(self._listen(), name="exchange.listen")
            tasks.create_task(self.fetching.run(), name="exchange.fetching")

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
        if known:
            known.let_down("it was offered otherwise")
        self.fetching.close(peer, blob.xfer)
        self._waiting.pop((peer, blob.xfer), None)
        pull = _Pull(peer, blob, size, sha256 or blob.sha256, None, listen, by_store and self._way.is_open(peer))
        self._pulls[peer, blob.xfer] = pull
        self._start(pull)

    def _start(self, pull: _Pull) -> None:
        if pull.by_store:
            self._begin(pull)
        elif pull.listening and pull.blob.xfer not in self._heard:
            self._ears.set()  # it begins when the broker knows of it, or the first chunks would be missed
        else:
            size = pull.blob.size if pull.size is None else pull.size
            self._waiting[pull.peer, pull.blob.xfer] = min(size, self.receiving.window * pull.blob.chunk)
            self._begin_next()

    def _begin_next(self) -> None:
        """Begin those whose turn it is."""
        while self._waiting and self._ends.qsize() < MAX_UNVERIFIED:
            key, n_bytes = next(iter(self._waiting.items()))
            if not self.receiving.has_room(n_bytes):
                break
            del self._waiting[key]
            self._begin(self._pulls[key])

    def _begin(self, pull: _Pull) -> None:
        if pull.begun:
            pull.let_down("it was begun anew")
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
                    self._waiting.pop((pull.peer, xfer), None)
                    self._begin(pull)

    def stop(self, peer: str, xfer: str) -> None:
        """Not wanted any more; what is on disk is thrown away."""
        pull = self._pulls.pop((peer, xfer), None)
        self._perform(self.receiving.close(peer, xfer, self._clock()))
        self.fetching.close(peer, xfer)
        self._ears.set()
        if pull:
            pull.let_down("it is not wanted any more")
            if pull.partial:
                pull.partial.discard()
        self._waiting.pop((peer, xfer), None)
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
            if is_new := pull.partial.write(index, data, carried_checksum(payload)):
                pull.show()
        except Unavailable as error:
            pull.partial = None
            self._perform(self.receiving.close(peer, xfer, self._clock()))
            self.fetching.close(peer, xfer)
            self._ends.put_nowait((pull, pull.lost(str(error))))
            return
        if not pull.by_store:
            self._perform(self.receiving.chunk(peer, xfer, index, len(data), self._clock(), heard=heard))
            self._begin_next()
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
            self._begin_next()
            end = lost or (await self._verified(pull) if self._is_wanted(pull) else None)
            async with self._ending:
                if end and self._is_wanted(pull):
                    del self._pulls[pull.peer, pull.blob.xfer]
                    self._ears.set()
                    for reader in pull.readers:
                        reader.arrived() if isinstance(end, Pulled) else reader.lost(end.reason)
                    await self._outcome(end)

    def coming(self, peer: str, xfer: str) -> Arriving | None:
        """To read a blob while it comes; None if it is not being pulled whole, or just has gone into the store.

        What is read is verified when `settled` says so.
        """
        pull = self._pulls.get((peer, xfer))
        if pull is None or pull.size is not None:
            return None
        found = Arriving(pull.blob.size)
        pull.readers = [*(reader for reader in pull.readers if not reader.fault), found]
        pull.show()
        return None if found.fault else found

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

    # ----------------------------------------------------------------------------------------------------------- time

    def reset(self, peer: str | None = None) -> None:
        """All credit (or that of one peer, which was reborn) is void: it is given again."""
        self._perform(self.receiving.reset(self._clock(), peer))
        self.fetching.reset(peer)
        self._begin_next()

    def tick(self) -> None:
        """Handle what time alone made due; see `wake_at`."""
        self._perform(self.receiving.tick(self._clock()))
        self.fetching.tick()
        self._begin_next()

    @property
    def wake_at(self) -> float | None:
        """When to tick."""
        both = self.receiving.wake_at, self.fetching.receiving.wake_at
        return min((at for at in both if at is not None), default=None)
