"""Facts on their way to the core: whatever waits is made durable in one commit, however long the disk refuses.

Nobody is told that a fact is safe before it is.  While the disk refuses, facts wait here in memory; who can come again (a
request over HTTP) is told so at once, and of each agent's reports only the last one waits.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from coordinator.core import events as ev
from coordinator.disk import Disk
from coordinator.store import Store
from protocol.errors import Unavailable
from protocol.metrics import Histogram

Posted = tuple[ev.Happened, asyncio.Future[None] | None]
"""A fact, and who waits until it is journalled."""


class Inbox:
    """The one queue of the coordinator's one consumer."""

    def __init__(self, store: Store, disk: Disk) -> None:
        self._store, self._disk = store, disk
        self._queue: asyncio.Queue[Posted] = asyncio.Queue()
        self.commit_s = Histogram(0.002, 0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0)

    def __len__(self) -> int:
        """How many facts wait."""
        return self._queue.qsize()

    async def post(self, event: ev.Happened) -> None:
        """Hand in a fact and wait until it is journalled and handled.  Raises Unavailable when the disk refuses it."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((event, done))
        await done

    async def settle(self, event: ev.Happened) -> None:
        """The same, however long the disk refuses: what it is the end of counts as under way until the core knows of it."""
        while True:
            with suppress(Unavailable):
                return await self.post(event)

    def tell(self, event: ev.Happened) -> None:
        """Hand in a fact."""
        self._queue.put_nowait((event, None))

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    async def wait(self) -> list[Posted]:
        """Everything that waits, as soon as there is something."""
        return [await self._queue.get(), *self._drained()]

    async def journal(self, batch: list[Posted], now: float, retry_s: float) -> list[int]:
        """Make a batch durable and return the places in the journal; what is given up or joins meanwhile changes `batch`."""
        while True:
            asked_at = time.monotonic()
            try:
                seqs = await asyncio.to_thread(self._store.append, [(now, event) for event, _ in batch])
            except Unavailable as error:
                self._disk.refused("journal", error)
                for _, done in batch:
                    if done and not done.done():
                        done.set_exception(error)
                await asyncio.sleep(retry_s)
                batch[:] = _newest_reports([posted for posted in batch if posted[1] is None] + self._drained())
            else:
                self.commit_s.observe(time.monotonic() - asked_at)
                self._disk.wrote("journal")
                return seqs

    def _drained(self) -> list[Posted]:
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]


def _newest_reports(batch: list[Posted]) -> list[Posted]:
    newest = {event.agent: at for at, (event, _) in enumerate(batch) if isinstance(event, ev.AgentReported)}
    return [
        posted
        for at, posted in enumerate(batch)
        if not isinstance(posted[0], ev.AgentReported) or newest[posted[0].agent] == at
    ]
