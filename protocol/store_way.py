"""The way to an object store: who may sign for it, how often a step is tried, and when the store is left alone.

Bulk by a store is the claim check of Hohpe and Woolf (2003), driven by the receiver as everything here is.  The bus carries
who asks for what and where it lies; the machine is that of the chunks (protocol/transfer.py) with an object for a chunk.

    sender (protocol/placing.py)               receiver (protocol/fetching.py)
      | <- Grant {ranges, by_store, urls} -------- |   one run of chunks for each object; a coordinator says where to put them
      | == PUT object ===========> store           |
      | -- Placed {ranges, urls} ----------------> |   a coordinator says where to get them
      |                            store == GET => |   frame by frame into the same file on disk as chunks from the bus

Only the coordinator has an account: its `signer` makes URLs that are good for one object, one verb and some time.  It puts each
object of a model once, when the first agent asks for it, and deletes each object of an update as soon as it is read.

Where that does not work.  A step is tried four times while the store is down, then the transfer goes on over the bus from where it is: the receiver
asks for the rest there, and a sender that cannot put says so in its Placed.  For REST_S nothing more is tried with that peer, or
with anybody if it is the store itself.  A peer that is silent is no fault of the store: that ends as on the bus.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Literal, Protocol

from protocol.http_store import Carrier, StoreFault
from protocol.messages import Blob
from protocol.objects import Run, name_of, run_bytes

RETRY_S: Final = (1.0, 2.0, 4.0)
"""Between tries of one step."""
REST_S: Final = 60.0
EVERYBODY: Final = ""

logger = logging.getLogger(__name__)
Verb = Literal["PUT", "GET", "DELETE"]


class Signer(Protocol):
    """An account at a store.  `url` costs no request; it raises StoreFault without credentials."""

    def url(self, verb: Verb, name: str, n_bytes: int = 0) -> str:
        """Where to do `verb` with the object of this name; a PUT of exactly `n_bytes`."""
        ...


class Way:
    """To one store, for one daemon; `signer` is its account there."""

    def __init__(self, carrier: Carrier, signer: Signer | None, clock: Callable[[], float]) -> None:
        self.carrier, self.signer = carrier, signer
        self._clock = clock
        self._rests: dict[str, float] = {}
        self._fault = ""
        self._unwanted: asyncio.Queue[str] = asyncio.Queue()

    async def run(self) -> None:
        """Delete what is not wanted any more, until cancelled; then let go of all connections."""
        try:
            while True:
                url = await self._unwanted.get()
                try:
                    await self.carrier.delete(url)
                except StoreFault as fault:  # the bucket's own rule for old objects takes it
                    logger.debug("not deleted: %s", fault, extra={"action": "store_kept"})
        finally:
            await self.carrier.aclose()

    @property
    def fault(self) -> str:
        """Why the store is left alone at this moment; empty: it is not."""
        return "" if self.is_open(EVERYBODY) else self._fault

    def is_open(self, peer: str) -> bool:
        """Whether it is worth a try with this peer."""
        return all(self._rests.get(one, 0.0) <= self._clock() for one in (EVERYBODY, peer))

    def rest(self, peer: str, fault: StoreFault) -> None:
        """Leave the store alone for a while, with one peer or with everybody."""
        if self.is_open(peer):
            self._rests[peer], self._fault = self._clock() + REST_S, str(fault)
            extra = {"action": "store_down"} | ({"peer": peer} if peer else {})
            logger.warning("bulk goes over the broker for %.0f s: %s", REST_S, fault, extra=extra)

    async def insist(self, step: Callable[[], Awaitable[None]], peer: str) -> None:
        """Do it; again while the store is down, but not for long.  Raises StoreFault: what was said last."""
        for delay_s in RETRY_S:
            if not self.is_open(peer):
                raise StoreFault(self._fault)
            try:
                return await step()
            except StoreFault as fault:
                if not fault.is_down:
                    raise
                await asyncio.sleep(delay_s)
        return await step()

    def sign(self, verb: Verb, peer: str, blob: Blob, run: Run) -> str:
        """Where to do `verb` with these chunks, of `peer`'s update or, without a peer, of a model."""
        assert self.signer is not None, "who has no account asks for places"
        folder = f"up/{peer}" if peer else "down"
        return self.signer.url(verb, f"{folder}/{name_of(blob, run)}", run_bytes(blob, run) if verb == "PUT" else 0)

    def delete(self, peer: str, blob: Blob, run: Run) -> None:
        """Nobody wants this object any more; does nothing where we have no account."""
        if self.signer and self.is_open(EVERYBODY):
            with suppress(StoreFault):
                self._unwanted.put_nowait(self.sign("DELETE", peer, blob, run))
