"""The coordinator's bulk: updates pulled from agents and judged, models handed out to them.

Between an offer that the core wants (Fetch) and its verdict (UpdateStored or UpdateSpoiled) an update is in `_fetching`; its
repeated offers are not news then.  A pull that failed for the moment leaves, so that the agent's next offer begins it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.work import RETRY_S, Work
from protocol.blobs import Blobs
from protocol.bus import Bus
from protocol.exchange import Exchange, Lost, Outcome, Pulled
from protocol.messages import Blob, Done, Grant, Refuse
from protocol.outgoing import Outgoing
from protocol.spool import Spool
from protocol.topics import Topics
from protocol.transfer import Receiving

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
        self._fetching: dict[tuple[str, str], act.Fetch] = {}
        self._served: dict[str, str] = {}
        limits = config.transfer
        self.exchange = Exchange(
            bus=bus,
            spool=Spool(blobs, max_bytes=limits.max_update_bytes),
            receiving=Receiving(window=limits.window, budget_bytes=limits.budget_bytes, timeout_s=limits.timeout_s),
            clock=clock,
            say=self._say,
            chunk_topic=topics.down_chunk,
            source=self._served_file,
            outcome=self._ended,
        )

    def serve(self, blob: Blob) -> None:
        """Hand out a model to agents that ask for it."""
        self._served[blob.xfer] = blob.sha256
        self.exchange.sending.add(blob)

    def is_fetching(self, agent: str, xfer: str) -> bool:
        """Whether this offer is being pulled or judged already."""
        return (agent, xfer) in self._fetching

    def fetch(self, wish: act.Fetch) -> None:
        """Pull an update, or judge at once what is here already."""
        blob = wish.offer.blob
        self._fetching[wish.agent, blob.xfer] = wish
        if self._blobs.has(blob.sha256):
            self._spawn(f"judge/{wish.agent}/{blob.xfer}", self._judge(wish))
        else:
            self.exchange.pull(wish.agent, blob)

    def acknowledge(self, agent: str, xfer: str) -> None:
        """Tell an agent that it may forget an update."""
        self._say(agent, Done(xfer=xfer))

    def decline(self, agent: str, xfer: str, reason: str) -> None:
        """Tell an agent that an update is not wanted, for good."""
        self._fetching.pop((agent, xfer), None)
        self.exchange.stop_pulling(agent, xfer)
        self._say(agent, Refuse(xfer=xfer, reason=reason[:2000]))
        logger.warning("update declined", extra={"action": "declined", "agent": agent, "reason": reason})

    def withdrawn(self, agent: str, xfer: str, reason: str) -> None:
        """The agent does not hold any more what it offered."""
        wish = self._fetching.pop((agent, xfer), None)
        if wish is not None:
            self.exchange.stop_pulling(agent, xfer)
            self._tell(ev.UpdateSpoiled(agent=agent, offer=wish.offer, reason=f"withdrawn by the agent: {reason}"))

    def _say(self, peer: str, message: Grant | Done | Refuse) -> None:
        self._outgoing.say(self._topics.down(peer, "grant"), message)

    def _served_file(self, xfer: str) -> Path | None:
        sha256 = self._served.get(xfer)
        return self._blobs.path(sha256) if sha256 else None

    async def _ended(self, end: Outcome) -> None:
        wish = self._fetching.get((end.peer, end.blob.xfer))
        if wish is None:
            return
        match end:
            case Pulled():
                await self._judge(wish)
            case Lost(temporary=True, reason=reason):
                del self._fetching[end.peer, end.blob.xfer]
                logger.warning("update not here yet: %s", reason, extra={"action": "lost", "agent": end.peer})
                self._say(end.peer, Refuse(xfer=end.blob.xfer, reason=reason[:2000], retry_after_s=RETRY_S))
            case Lost(reason=reason):
                self._tell(ev.UpdateSpoiled(agent=end.peer, offer=wish.offer, reason=f"bad update: {reason}"))

    async def _judge(self, wish: act.Fetch) -> None:
        verdict = await self._work.judge(wish)
        self._fetching.pop((wish.agent, wish.offer.blob.xfer), None)
        self._tell(verdict)
