"""All bulk of this agent: the model that it fetches, the updates that it owes, and how fast the link proved to be with both.

An update is offered until somebody has it (protocol/sending.py).  A repeated offer tells nothing while the last one still stands
in line for the broker: over a link of seconds, where one message goes per round trip, it would only hold up what is behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from agent.caps import Caps
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.outbox import Outbox
from agent.profiler import Link
from protocol.blobs import Blobs
from protocol.bus import Bus
from protocol.exchange import Exchange
from protocol.http_store import Carrier
from protocol.messages import Body, Done, Grant, Offer, Placed, Refuse
from protocol.outgoing import Saying
from protocol.pulling import Lost, Outcome, Pulled
from protocol.sending import SendOffer, Uploads
from protocol.spool import Spool
from protocol.topics import Topics, UpLeaf
from protocol.transfer import MAX_WINDOW, Receiving

COORDINATOR: Final = "coordinator"


@dataclass(slots=True)
class _Owed:
    n_bytes: int
    said: Saying | None = None
    pulled_since: float | None = None


class Traffic:
    """One exchange with the coordinator.  `say` puts a message in line, `tell` hands facts to the core."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        bus: Bus,
        topics: Topics,
        blobs: Blobs,
        outbox: Outbox,
        link: Link,
        caps: Caps,
        clock: Callable[[], float],
        say: Callable[[UpLeaf, Body], Saying],
        tell: Callable[[ev.Happened], None],
    ) -> None:
        self._blobs, self._outbox, self._link, self._caps = blobs, outbox, link, caps
        self._clock, self._say, self._tell = clock, say, tell
        self.uploads = Uploads()
        self.exchange = Exchange(
            bus=bus,
            spool=Spool(blobs, max_bytes=config.limits.max_model_bytes),
            receiving=Receiving(max_window=MAX_WINDOW, budget_bytes=config.limits.max_inflight_bytes, pace=caps.down),
            clock=clock,
            say=self._answer,
            chunk_topic=lambda _peer, xfer: topics.up_chunk(config.agent, xfer),
            blob_topic=topics.blob,
            source=outbox.path,
            outcome=self._model_ended,
            pace=caps.up,
            carrier=Carrier(config.limits.http_hosts),
        )
        self._fetching_since = 0.0
        self._owed: dict[str, _Owed] = {}

    def _answer(self, _peer: str, message: Grant | Placed | Done | Refuse) -> None:
        self._say("answer", message)

    # ---------------------------------------------------------------------------------------------------------- model

    def fetch(self, wish: act.FetchModel) -> None:
        """Get a model.  It ends in ModelFetched or ModelLost, unless `drop` comes before."""
        if self._blobs.has(wish.sha256):
            self._tell(ev.ModelFetched(sha256=wish.sha256, n_bytes=0))
            return
        self._fetching_since = self._clock()
        size = wish.size if wish.size < wish.blob.size else None
        how = {"listen": wish.listen, "by_store": wish.by_store}
        self.exchange.pulling.pull(COORDINATOR, wish.blob, size=size, sha256=wish.sha256, **how)

    def drop(self, xfer: str) -> None:
        """Nobody wants this model any more."""
        self.exchange.pulling.stop(COORDINATOR, xfer)

    async def _model_ended(self, end: Outcome) -> None:
        match end:
            case Pulled(sha256=sha256, path=path):
                n_bytes = path.stat().st_size
                self._link.down(n_bytes, self._clock() - self._fetching_since)
                for old in list(self._blobs):
                    if old != sha256:
                        self._blobs.delete(old)
                self._tell(ev.ModelFetched(sha256=sha256, n_bytes=n_bytes))
            case Lost(sha256=sha256, reason=reason):
                self._tell(ev.ModelLost(sha256=sha256, reason=reason))

    # -------------------------------------------------------------------------------------------------------- updates

    def offer(self, offer: Offer) -> None:
        """Offer a finished update until `forget`."""
        offer = msgspec.structs.replace(offer, blob=self.exchange.offer(offer.blob), by_store=True)
        self._owed.setdefault(offer.blob.xfer, _Owed(offer.blob.size))
        self._offer(self.uploads.add(offer, self._clock()))

    def offer_all(self) -> None:
        """Offer everything that is owed, now."""
        self._offer(self.uploads.reset(self._clock()))

    def _offer(self, dues: list[SendOffer]) -> None:
        """Say what is due; outside the hours of bulk nobody could be served, and the first minute within says it all."""
        for due in dues if self._caps.is_open else []:
            owed = self._owed[due.offer.blob.xfer]
            if owed.said is None or owed.said.is_over:
                owed.said = self._say("offer", due.offer)

    def born(self) -> None:
        """Our birth stands in line, and with it the coordinator forgets what it heard before: all credit and all offers are void."""
        for owed in self._owed.values():
            owed.said = None
        self.exchange.connected()

    def granted(self, grant: Grant) -> None:
        """The coordinator pulls an update.  Raises BadMessage for impossible credit."""
        owed = self._owed.get(grant.xfer)
        if owed is not None and owed.pulled_since is None:
            owed.pulled_since = self._clock()
        self.uploads.granted(grant.xfer, self._clock())
        self.exchange.granted(COORDINATOR, grant)

    def postponed(self, xfer: str, retry_after_s: float) -> None:
        """The coordinator takes an update, later."""
        self.uploads.postponed(xfer, retry_after_s, self._clock())

    def accepted(self, xfer: str) -> None:
        """The coordinator has an update."""
        owed = self._owed.get(xfer)
        if owed is not None and owed.pulled_since is not None:
            self._link.up(owed.n_bytes, self._clock() - owed.pulled_since)
            owed.pulled_since = None

    def forget(self, xfer: str) -> None:
        """An update is not owed any more."""
        self._owed.pop(xfer, None)
        self.uploads.done(xfer)
        self.exchange.sending.remove(xfer)
        self._outbox.forget(xfer)

    # ----------------------------------------------------------------------------------------------------------- time

    def tick(self) -> None:
        """Do what is due; see `wake_at`.  Only while there is a broker."""
        self.exchange.pulling.tick()
        self._offer(self.uploads.tick(self._clock()))

    @property
    def wake_at(self) -> float | None:
        """When to tick."""
        both = self.exchange.pulling.wake_at, self.uploads.wake_at
        return min((at for at in both if at is not None), default=None)
