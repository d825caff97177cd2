"""The coordinator's bulk: updates pulled from agents and judged, models handed out to them.

Between an offer that the core wants (Fetch) and its verdict (UpdateStored or UpdateSpoiled) an update is in `_fetching`; its
repeated offers are not news then.  A pull that failed for the moment leaves, so that the agent's next offer begins it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec

from coordinator.bucket import Bucket
from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.folding import Unchecked
from coordinator.intake import MAX_NAMED
from coordinator.work import RETRY_S, Work
from protocol.blobs import Blobs
from protocol.broadcast import EVERYONE
from protocol.bus import Bus
from protocol.daemon import OncePer
from protocol.exchange import Exchange
from protocol.http_store import Carrier
from protocol.messages import Blob, Done, Grant, Placed, Plan, Refuse
from protocol.outgoing import Outgoing
from protocol.pacing import Pace
from protocol.pulling import Lost, Outcome, Pulled
from protocol.spool import Spool
from protocol.topics import Topics
from protocol.transfer import MAX_WINDOW, Receiving

logger = logging.getLogger(__name__)

Spawn = Callable[[str, Coroutine[Any, Any, None]], None]


class Traffic:
    """All transfers of one coordinator.  `tell` hands a fact to the core, `spawn` starts slow work by name, once."""

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        bus: Bus,
        blobs: Blobs,
        clock: Callable[[], float],
        outgoing: Outgoing,
        topics: Topics,
        work: Work,
        tell: Callable[[ev.Happened], None],
        spawn: Spawn,
    ) -> None:
        self._blobs, self._outgoing, self._topics, self._work = blobs, outgoing, topics, work
        self._tell, self._spawn = tell, spawn
        self._clock, self._complaints = clock, OncePer(max_keys=MAX_NAMED)
        self._fetching: dict[str, dict[str, act.Fetch]] = {}
        self._served: dict[str, str] = {}
        limits = self._limits = config.transfer
        self.bucket = Bucket(config.bulk) if config.bulk.url else None
        self._min_stored_bytes = config.bulk.min_bytes
        self.exchange = Exchange(
            bus=bus,
            spool=Spool(blobs, max_bytes=limits.max_update_bytes, reserve_bytes=config.keep.min_free_bytes),
            receiving=Receiving(
                window=limits.window,
                max_window=MAX_WINDOW,
                budget_bytes=limits.budget_bytes,
                timeout_s=limits.timeout_s,
                pace=Pace(limits.up_bytes_per_s),
            ),
            clock=clock,
            say=self._say,
            chunk_topic=lambda peer, xfer: topics.blob(xfer) if peer == EVERYONE else topics.down_chunk(peer, xfer),
            pace=Pace(limits.down_bytes_per_s),
            source=self._served_file,
            outcome=self._ended,
            carrier=Carrier(self.bucket.plain_hosts if self.bucket else ()),
            signer=self.bucket,
        )

    def renew(self, config: CoordinatorConfig) -> None:
        """Other caps, and another part of the disk to leave free."""
        self.exchange.pulling.renew(reserve_bytes=config.keep.min_free_bytes)
        self.exchange.pace.renew(config.transfer.down_bytes_per_s)
        self.exchange.pulling.receiving.pace.renew(config.transfer.up_bytes_per_s)

    def serve(self, blob: Blob) -> Blob:
        """Hand out a model to agents that ask for it; the model as they are to be told of it."""
        self._served[blob.xfer] = blob.sha256
        return self.exchange.offer(blob)

    def serve_to(self, agent: str, plan: Plan) -> Plan:
        """Hand out the model of a plan to one of those that are told of it now; the plan as that one is told."""
        if plan.model is None:
            return plan
        served, by_store = self.serve(plan.model), self._goes_by_store(plan.model)
        if self._limits.broadcast and not by_store:
            self.exchange.announced(agent, served)
        return msgspec.structs.replace(plan, model=served, broadcast=self._limits.broadcast, by_store=by_store)

    def _goes_by_store(self, blob: Blob) -> bool:
        return self.bucket is not None and blob.size >= self._min_stored_bytes

    def keep_only(self, models: Iterable[Blob | None]) -> None:
        """Other models need not lie in the store any more."""
        self.exchange.placing.keep_only({model.sha256 for model in models if model})

    def is_fetching(self, agent: str, blob: Blob) -> bool:
        """Whether this blob is being pulled or judged already, in chunks of the same size."""
        wish = self._fetching.get(agent, {}).get(blob.xfer)
        return wish is not None and wish.offer.blob == blob

    def unchecked(self, fold: act.Aggregate) -> dict[str, Unchecked] | None:
        """Those of its updates that are pulled or judged, to be read meanwhile, by digest; None if one is neither that nor here."""
        found: dict[str, Unchecked] = {}
        for agent, sha256 in ((c.agent, c.sha256) for c in fold.contributions):
            wishes = self._fetching.get(agent, {}).values()
            wish = next((wish for wish in wishes if wish.offer.blob.sha256 == sha256), None)
            coming = self.exchange.pulling.coming(agent, wish.offer.blob.xfer) if wish else None
            if coming is None and not self._blobs.has(sha256):
                return None
            if wish:
                found[sha256] = Unchecked(coming or self._blobs.path(sha256), wish.ranks)
        return found

    def under_way(self) -> set[str]:
        """Digests of what is being pulled or judged."""
        return {wish.offer.blob.sha256 for wishes in self._fetching.values() for wish in wishes.values()}

    def settled(self, verdict: ev.UpdateStored | ev.UpdateSpoiled) -> None:
        """The core has heard the verdict: from now on its state says whether the file is needed."""
        wish = self._fetching.get(verdict.agent, {}).get(verdict.offer.blob.xfer)
        if wish and wish.offer == verdict.offer:
            self._drop(verdict.agent, verdict.offer.blob.xfer)

    def postpone(self, agent: str, xfer: str, reason: str) -> None:
        """Nothing can be taken in now: the agent keeps its update and offers it again."""
        self._say(agent, Refuse(xfer=xfer, reason=reason[:2000], retry_after_s=RETRY_S))

    def fetch(self, wish: act.Fetch) -> None:
        """Pull an update, or judge at once what is here already."""
        blob = wish.offer.blob
        for xfer in self._replaced_by(wish):
            self._drop(wish.agent, xfer)
            self.exchange.pulling.stop(wish.agent, xfer)
        self._fetching.setdefault(wish.agent, {})[blob.xfer] = wish
        if self._blobs.has(blob.sha256):
            self._spawn(f"judge/{wish.agent}/{blob.xfer}", self._judge(wish))
        else:
            self.exchange.pulling.pull(wish.agent, blob, by_store=wish.offer.by_store and self._goes_by_store(blob))

    def _replaced_by(self, wish: act.Fetch) -> list[str]:
        """Another update that this agent offered for the same work: it has one, or it could fill disk and memory."""
        mine = self._fetching.get(wish.agent, {})
        return [xfer for xfer, other in mine.items() if xfer != wish.offer.blob.xfer and _work(other) == _work(wish)]

    def _drop(self, agent: str, xfer: str) -> act.Fetch | None:
        wishes = self._fetching.get(agent, {})
        wish = wishes.pop(xfer, None)
        if not wishes:
            self._fetching.pop(agent, None)
        return wish

    def acknowledge(self, agent: str, xfer: str) -> None:
        """Tell an agent that it may forget an update."""
        self._say(agent, Done(xfer=xfer))

    def decline(self, agent: str, xfer: str, reason: str) -> None:
        """Tell an agent that an update is not wanted, for good."""
        self._drop(agent, xfer)
        self.exchange.pulling.stop(agent, xfer)
        self._say(agent, Refuse(xfer=xfer, reason=reason[:2000]))
        held = self._complaints(agent, self._clock())
        if held is not None:
            extra = {"action": "declined", "agent": agent, "reason": reason, "more": held}
            logger.warning("update declined", extra=extra)

    def withdrawn(self, agent: str, xfer: str, reason: str) -> None:
        """The agent does not hold any more what it offered."""
        wish = self._drop(agent, xfer)
        if wish is not None:
            self.exchange.pulling.stop(agent, xfer)
            self._tell(ev.UpdateSpoiled(agent=agent, offer=wish.offer, reason=f"withdrawn by the agent: {reason}"))

    def _say(self, peer: str, message: Grant | Placed | Done | Refuse) -> None:
        self._outgoing.say(self._topics.down(peer, "grant"), message)

    def _served_file(self, xfer: str) -> Path | None:
        sha256 = self._served.get(xfer)
        return self._blobs.path(sha256) if sha256 else None

    async def _ended(self, end: Outcome) -> None:
        wish = self._fetching.get(end.peer, {}).get(end.blob.xfer)
        if wish is None:
            return
        match end:
            case Pulled():
                self._spawn(f"judge/{wish.agent}/{end.blob.xfer}", self._judge(wish))  # the next is verified meanwhile
            case Lost(temporary=True, reason=reason):
                self._lost(wish, reason)
            case Lost(reason=reason):
                self._tell(ev.UpdateSpoiled(agent=end.peer, offer=wish.offer, reason=f"bad update: {reason}"))

    async def _judge(self, wish: act.Fetch) -> None:
        try:
            verdict = await self._work.judge(wish)
        except OSError as error:  # our disk's fault, not the agent's
            self._lost(wish, f"it could not be read back here: {error}")
            return
        self._tell(verdict)

    def _lost(self, wish: act.Fetch, reason: str) -> None:
        xfer = wish.offer.blob.xfer
        self._drop(wish.agent, xfer)
        logger.warning("update not here yet: %s", reason, extra={"action": "lost", "agent": wish.agent})
        self.postpone(wish.agent, xfer, reason)


def _work(wish: act.Fetch) -> tuple[str, int, int]:
    return wish.offer.job, wish.offer.round, wish.offer.attempt
