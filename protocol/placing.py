"""The sending half of bulk by an object store: what is asked for is put there once, and whoever asked is told where it lies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from protocol.errors import BadMessage
from protocol.files import read_at
from protocol.frames import chunk_length, encode_frame
from protocol.http_store import StoreFault
from protocol.messages import Blob, Grant, Placed
from protocol.objects import Run, name_of, object_of, run_bytes, run_of
from protocol.pacing import Pace
from protocol.store_way import EVERYBODY, Way

N_PUTTING: Final = 4
KEPT_S: Final = 12 * 3600.0
"""So long a model that was put is believed to lie there; a bucket may delete what is a day old."""
OLD_S: Final = 600.0
"""Whoever wants an object asks for it again in a fifth of that, with a fresh URL: one of the hour before is not tried."""


@dataclass(slots=True, eq=False)
class _Put:
    """An object to be placed, for whoever asked."""

    blob: Blob
    run: Run
    url: str
    asked_at: float
    peers: dict[str, None]


class _There(NamedTuple):
    """An object of a model in the store."""

    blob: Blob
    run: Run
    until: float


class _Gone(Exception):  # noqa: N818
    """The file behind a blob is not there any more; over the bus its receiver is told so."""


class _Old(Exception):  # noqa: N818
    """It was asked for long ago, before the hours of bulk ended."""


class Placing:
    """What one daemon puts into a store.  `say`, `source` and `pace` as in Exchange."""

    def __init__(
        self,
        way: Way,
        *,
        clock: Callable[[], float],
        say: Callable[[str, Placed], None],
        source: Callable[[str], Path | None],
        pace: Pace,
    ) -> None:
        self.n_sent_bytes = 0
        self._way, self._clock, self._say, self._source, self._pace = way, clock, say, source, pace
        self._puts: dict[str, _Put] = {}
        self._there: dict[str, _There] = {}
        self._queue: asyncio.Queue[_Put] = asyncio.Queue()

    async def run(self) -> None:
        """Put what is asked for, until cancelled."""
        room = asyncio.Semaphore(N_PUTTING)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await room.acquire()
                put = await self._queue.get()
                tasks.create_task(self._place(put)).add_done_callback(lambda _: room.release())

    def granted(self, peer: str, blob: Blob, grant: Grant) -> None:
        """A peer asks for these chunks, which exist.  Raises BadMessage unless they are objects and it is clear where to put them."""
        is_ours = self._way.signer is not None
        if len(grant.urls) != (0 if is_ours else len(grant.ranges)):
            raise BadMessage(f"{len(grant.urls)} places for {len(grant.ranges)} objects of {grant.xfer}")
        if any(run != run_of(blob, object_of(blob, run[0])) for run in grant.ranges):
            raise BadMessage(f"{peer} asks for runs of {grant.xfer} that are no objects")  # there is no end of them
        now = self._clock()
        for run, url in zip(grant.ranges, [""] * len(grant.ranges) if is_ours else grant.urls, strict=True):
            name = name_of(blob, run)
            waiting, there = self._puts.get(name), self._there.get(name)
            if there and there.until > now:
                self._tell(peer, blob, run)
            elif waiting:
                waiting.url, waiting.asked_at = url, now
                waiting.peers[peer] = None
            else:
                self._puts[name] = put = _Put(blob, run, url, now, {peer: None})
                self._queue.put_nowait(put)

    def keep_only(self, digests: Collection[str]) -> None:
        """Delete what lies there of any other blob."""
        for name, (blob, run, _) in list(self._there.items()):
            if blob.sha256 not in digests:
                del self._there[name]
                self._way.delete("", blob, run)

    def _tell(self, peer: str, blob: Blob, run: Run, reason: str = "") -> None:
        urls = []
        try:
            urls = [self._way.sign("GET", "", blob, run)] if self._way.signer and not reason else []
        except StoreFault as fault:
            reason = str(fault)
        self._say(peer, Placed(xfer=blob.xfer, ranges=[run], urls=urls, reason=reason[:2000]))

    async def _place(self, put: _Put) -> None:
        name, reason = name_of(put.blob, put.run), ""
        try:
            await self._way.insist(lambda: self._put(put), EVERYBODY)
            if self._way.signer:
                self._there[name] = _There(put.blob, put.run, self._clock() + KEPT_S)
        except _Old:
            put.peers.clear()
        except _Gone:
            reason = "the file is gone here"
        except StoreFault as fault:
            reason = str(fault)
            self._way.rest(EVERYBODY, fault)
        del self._puts[name]
        for peer in put.peers:
            self._tell(peer, put.blob, put.run, reason)

    async def _put(self, put: _Put) -> None:
        await self._room(even_closed=True)
        if put.asked_at < self._clock() - OLD_S:
            raise _Old
        url = self._way.sign("PUT", "", put.blob, put.run) if self._way.signer else put.url
        await self._way.carrier.put(url, self._frames(put), run_bytes(put.blob, put.run))

    async def _frames(self, put: _Put) -> AsyncIterator[bytes]:
        first, n = put.run
        for index in range(first, first + n):
            path, length = self._source(put.blob.xfer), chunk_length(put.blob, index)
            data = read_at(path, index * put.blob.chunk, length) if path else b""
            if len(data) != length:
                raise _Gone
            yield encode_frame(index, data)
            self._pace.take(length, self._clock())
            self.n_sent_bytes += length
            await self._room(even_closed=False)

    async def _room(self, *, even_closed: bool) -> None:
        """Wait for the link's turn; an object that was begun is finished even if the hours of bulk end."""
        while (even_closed or self._pace.is_open) and (wait_s := self._pace.wait_s(self._clock())) > 0:  # noqa: ASYNC110 - hours and caps change
            await asyncio.sleep(wait_s)
