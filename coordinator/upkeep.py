"""The state folder looked after while the coordinator runs: how its disk is, what goes when, which file nobody wants."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final

from coordinator.config import Keep
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.disk import Disk
from coordinator.pruning import Need, delete, prune, sweep, used_files
from coordinator.store import Store
from protocol.blobs import Blobs
from protocol.daemon import OncePer
from protocol.errors import Unavailable

LOOK_S = 5.0
PARTIAL_KEPT_S: Final = 7 * 86_400.0
"""For unfinished uploads that nobody goes on with."""

logger = logging.getLogger(__name__)


class Upkeep:
    """`need` says what the core needs now, `spawn` starts slow work by name, once."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        keep: Keep,
        disk: Disk,
        *,
        need: Callable[[], Need],
        clock: Callable[[], float],
        spawn: Callable[[str, Coroutine[Any, Any, None]], None],
    ) -> None:
        self._store, self._blobs, self._keep, self._disk = store, blobs, keep, disk
        self._need, self._clock, self._spawn = need, clock, spawn
        self.still = asyncio.Lock()
        """While somebody holds it nothing is pruned."""
        self._wanted = False
        self._complaints = OncePer()

    def renew(self, keep: Keep) -> None:
        """Other rules, from the next pruning on."""
        self._keep = keep

    def sweep(self) -> None:
        """At a start, when nothing is under way: delete what a crash left behind."""
        self._blobs.sweep(PARTIAL_KEPT_S)
        with suppress(OSError):
            sweep(self._blobs, used_files(self._store, self._need()))

    async def watch(self) -> None:
        """Look at the disk from time to time, until cancelled; where there is little room, prune first."""
        while True:
            self._disk.look()
            if self._disk.deficit_bytes:
                self.prune()
            await asyncio.sleep(LOOK_S)

    def prune(self) -> None:
        """Delete what is beyond [keep], beside everything else that goes on."""
        self._wanted = True
        self._spawn("prune", self._prune())

    async def _prune(self) -> None:
        while self._wanted:  # asked for again while it ran: there may be more by now
            self._wanted = False
            try:
                lacking = self._disk.deficit_bytes, self._disk.tight_bytes
                async with self.still:
                    gone = await asyncio.to_thread(prune, self._store, self._blobs, self._keep, self._need(), *lacking)
                self._blobs.sweep(PARTIAL_KEPT_S)
            except (Unavailable, OSError) as error:
                if self._complaints("prune", self._clock()) is not None:
                    logger.warning("not pruned: %s", error, extra={"action": "prune_refused"})
                return
            if any(gone):
                logger.info("pruned", extra={"action": "pruned"} | gone._asdict())

    def round_closed(self) -> None:
        """The time to prune; and since a round has closed after an upgrade, going back would lose it."""
        self.prune()
        with suppress(OSError):
            self._store.drop_copies()

    def drop_declined(self, judged: Sequence[ev.UpdateStored | ev.UpdateSpoiled], wishes: Sequence[act.Wish]) -> None:
        """Delete updates that were judged and are not wanted, unless their agent offered a file that others need."""
        declined = {wish.xfer for wish in wishes if isinstance(wish, act.Decline)}
        files = {e.offer.blob.sha256 for e in judged if e.offer.blob.xfer in declined}
        if files:
            with suppress(OSError, Unavailable):  # it is an orphan then, and swept later
                delete(self._blobs, files - used_files(self._store, self._need()))
