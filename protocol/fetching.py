"""The receiving half of bulk by an object store: what is missing is asked for object by object, and read frame by frame.

Nothing is decided here but which objects those are: when to ask, how often and whom first is the business of the machine that
pulls chunks, to which an object is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from protocol.bitmap import Bitmap
from protocol.errors import BadMessage
from protocol.frames import chunk_length
from protocol.http_store import StoreFault
from protocol.messages import Blob, Grant, Placed
from protocol.objects import complete_objects, frame_bytes, in_objects, object_of, run_bytes, run_of
from protocol.pacing import Pace
from protocol.store_way import EVERYBODY, Way
from protocol.transfer import Action, Completed, GaveUp, Receiving, SendGrant

N_GETTING: Final = 8


@dataclass(slots=True, eq=False)
class _Want:
    """A transfer into here."""

    peer: str
    blob: Blob
    n_chunks: int  # wanted, from the first on
    asked: set[int] = field(default_factory=set)  # objects
    getting: set[int] = field(default_factory=set)  # of these, what is placed


class Fetching:
    """What one daemon gets from a store.

    `take(peer, xfer, frame)` is told every frame, `ended` each end, `by_bus(peer, xfer)` that a transfer is to go on there;
    `pace` caps what is asked for.
    """

    def __init__(
        self,
        way: Way,
        *,
        clock: Callable[[], float],
        say: Callable[[str, Grant], None],
        pace: Pace,
        take: Callable[[str, str, bytes], None],
        ended: Callable[[Completed | GaveUp], None],
        by_bus: Callable[[str, str], None],
    ) -> None:
        self.receiving = Receiving(
            window=2, max_window=4, budget_bytes=2**30, timeout_s=20.0, max_timeout_s=120.0, pace=pace
        )
        """An object may take minutes, and no broker holds it."""
        self._way, self._clock, self._say = way, clock, say
        self._take, self._ended, self._by_bus = take, ended, by_bus
        self._wants: dict[tuple[str, str], _Want] = {}
        self._queue: asyncio.Queue[tuple[_Want, int, str]] = asyncio.Queue()

    async def run(self) -> None:
        """Get what is placed, until cancelled."""
        room = asyncio.Semaphore(N_GETTING)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await room.acquire()
                placed = await self._queue.get()
                tasks.create_task(self._fetch(*placed)).add_done_callback(lambda _: room.release())

    def open(self, peer: str, blob: Blob, size: int | None, have: Bitmap) -> None:
        """Begin, or go on, to have `blob` or its first `size` bytes from `peer`; `have` are the chunks on disk.

        Raises BadMessage for a blob that cannot be pulled at all.
        """
        self._wants[peer, blob.xfer] = _Want(peer, blob, len(have))
        there = complete_objects(blob, have)
        self._perform(self.receiving.open(peer, in_objects(blob), self._clock(), size=size, have=there))

    def close(self, peer: str, xfer: str) -> None:
        """Stop wanting this transfer; nothing happens if it is not open."""
        self._forget(peer, xfer)
        self._perform(self.receiving.close(peer, xfer, self._clock()))

    def wrote(self, peer: str, xfer: str, chunk: int, have: Bitmap) -> None:
        """A chunk is new on disk, whichever way it came."""
        want = self._wants.get((peer, xfer))
        if want is None:
            return
        index = object_of(want.blob, chunk)
        first, n = run_of(want.blob, index)
        if all(one in have for one in range(first, min(first + n, want.n_chunks))):
            n_bytes = chunk_length(in_objects(want.blob), index)
            self._perform(self.receiving.chunk(peer, xfer, index, n_bytes, self._clock()))

    def placed(self, peer: str, placed: Placed) -> None:
        """A sender has put what it was asked for, or cannot.  Raises BadMessage where it does not say where."""
        want = self._wants.get((peer, placed.xfer))
        if want is None:
            return
        if placed.reason:
            self._leave(want, peer, StoreFault(f"{peer} cannot put it into the store: {placed.reason}"))
            return
        is_ours = self._way.signer is not None
        if len(placed.urls) != (0 if is_ours else len(placed.ranges)):
            raise BadMessage(f"{len(placed.urls)} places for {len(placed.ranges)} objects of {placed.xfer}")
        for run, url in zip(placed.ranges, [""] * len(placed.ranges) if is_ours else placed.urls, strict=True):
            index = object_of(want.blob, run[0])
            if index in want.asked - want.getting and run == run_of(want.blob, index):
                want.getting.add(index)
                self._queue.put_nowait((want, index, url))

    def tick(self) -> None:
        """Handle what time alone made due; see `receiving.wake_at`."""
        for (peer, xfer), want in self._wants.items():
            if want.getting:
                self.receiving.alive(peer, xfer, self._clock())
        self._perform(self.receiving.tick(self._clock()))

    def reset(self, peer: str | None = None) -> None:
        """The bus is new, or one peer is: ask again for what is not here."""
        self._perform(self.receiving.reset(self._clock(), peer))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendGrant(peer, grant):
                    self._ask(self._wants[peer, grant.xfer], grant)
                case Completed(peer, xfer) | GaveUp(peer, xfer):
                    self._forget(peer, xfer)
                    self._ended(action)

    def _ask(self, want: _Want, grant: Grant) -> None:
        objects = {index for first, n in grant.ranges for index in range(first, first + n)} - want.getting
        if not objects:
            return
        runs = [run_of(want.blob, index) for index in sorted(objects)]
        try:
            urls = [self._way.sign("PUT", want.peer, want.blob, run) for run in runs] if self._way.signer else []
        except StoreFault as fault:
            asyncio.get_running_loop().call_soon(
                self._leave, want, EVERYBODY, fault
            )  # the machine is in the middle of it
            return
        want.asked |= objects
        self._say(want.peer, Grant(xfer=grant.xfer, ranges=runs, by_store=True, urls=urls))

    async def _fetch(self, want: _Want, index: int, url: str) -> None:
        try:
            await self._way.insist(lambda: self._get(want, index, url), want.peer)
        except StoreFault as fault:
            self._leave(want, EVERYBODY if fault.is_down else want.peer, fault)
        want.asked.discard(index)
        want.getting.discard(index)
        self._way.delete(want.peer, want.blob, run_of(want.blob, index))

    async def _get(self, want: _Want, index: int, url: str) -> None:
        """One object, into the file on disk frame by frame."""
        run = first, n = run_of(want.blob, index)
        frames = _Frames(want.blob, first)

        def take(block: bytes) -> None:
            for frame in frames.cut(block):
                if self._is_wanted(want):
                    self._take(want.peer, want.blob.xfer, frame)

        if self._is_wanted(want):
            url = self._way.sign("GET", want.peer, want.blob, run) if self._way.signer else url
            n_bytes = run_bytes(want.blob, (first, min(n, want.n_chunks - first)))
            try:
                await self._way.carrier.get(url, n_bytes, take)
            except BadMessage as error:
                raise StoreFault(f"what lies in the store is not what was asked for: {error}") from None

    def _is_wanted(self, want: _Want) -> bool:
        return self._wants.get((want.peer, want.blob.xfer)) is want

    def _leave(self, want: _Want, whose: str, fault: StoreFault) -> None:
        """Have the rest of a transfer over the bus."""
        if self._is_wanted(want):
            self._way.rest(whose, fault)
            self.close(want.peer, want.blob.xfer)
            self._by_bus(want.peer, want.blob.xfer)

    def _forget(self, peer: str, xfer: str) -> None:
        want = self._wants.pop((peer, xfer), None)
        if want:
            for index in want.asked - want.getting:
                self._way.delete(peer, want.blob, run_of(want.blob, index))


class _Frames:
    """Frames of consecutive chunks, cut from blocks of any length."""

    def __init__(self, blob: Blob, first: int) -> None:
        self._blob, self._next, self._buffer = blob, first, bytearray()

    def cut(self, block: bytes) -> Iterator[bytes]:
        """The frames that are complete with this block."""
        self._buffer += block
        while self._buffer and len(self._buffer) >= (n := frame_bytes(self._blob, self._next)):
            yield bytes(self._buffer[:n])
            del self._buffer[:n]
            self._next += 1
