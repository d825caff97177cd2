"""What agents say, sorted: facts for the core, chunks for the transfers, signs of life; and what their silence says.

Only what is worth remembering becomes an event: a heartbeat does not, nor an offer that is being pulled already.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from coordinator import intake
from coordinator.core import events as ev
from coordinator.intake import SAID_AGAIN, Chunk, Word
from protocol.daemon import OncePer
from protocol.errors import BadMessage
from protocol.messages import Envelope, Grant, Offer, Progress, Rebirth, Refuse

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

logger = logging.getLogger(__name__)


class Hearing:
    """Hears for one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._complaints = OncePer()
        self._rebirths = OncePer(coordinator.config.heartbeat_s, coordinator.config.max_agents)

    async def watch_silence(self) -> None:
        """Say that those have gone who are silent, until cancelled."""
        while True:
            await asyncio.sleep(self._coordinator.config.heartbeat_s)
            if not self._coordinator.connected:
                continue  # nobody can be heard; the silence is ours
            for agent in self._coordinator.intake.gate.calm(self._coordinator.clock()):
                self._ask_for_birth(agent, self._coordinator.clock())
            self._coordinator.intake.gate.tidy(self._coordinator.clock())
            for agent in self._coordinator.presence.silent(self._coordinator.clock()):
                self._coordinator.presence.left(agent)
                known = self._coordinator.fleet.state.agents.get(agent)
                if known and known.online:
                    self._coordinator.tell(
                        ev.AgentLeft(agent=agent, session=known.session, reason="silent: no heartbeat")
                    )

    def receive(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """One message of the bus."""
        if self._coordinator.trust and self._coordinator.trust.bars(topic):
            return
        now = self._coordinator.clock()
        try:
            match self._coordinator.intake.receive(topic, payload, now):
                case Chunk(agent, xfer, frame):
                    self._coordinator.exchange.chunk(agent, xfer, frame)
                case Word(agent, envelope):
                    self._hear(agent, envelope, now, retained=retained)
        except BadMessage as error:
            self._coordinator.intake.refuse(topic, error, now)
            if error.kind in SAID_AGAIN:
                self._ask_for_birth(topic.split("/")[4], now)

    def _hear(self, agent: str, envelope: Envelope, now: float, *, retained: bool) -> None:
        match envelope.b:
            case Progress() as progress:
                self._heartbeat(agent, envelope.ses, progress, now)
                return
            case Grant() as grant:
                self._coordinator.exchange.granted(agent, grant)
                return
            case Refuse(xfer=xfer, reason=reason):
                self._coordinator.traffic.withdrawn(agent, xfer, reason)
                return
            case Offer(blob=blob) if self._coordinator.traffic.is_fetching(agent, blob):
                return  # being pulled already; the journal need not hear of every repetition
            case Offer(blob=blob) if self._coordinator.disk.reason:
                self._coordinator.traffic.postpone(agent, blob.xfer, self._coordinator.disk.reason)
                return
        event = intake.to_event(agent, envelope)
        if isinstance(event, ev.AgentLeft):
            self._coordinator.presence.left(agent)
            self._coordinator.exchange.peer_left(agent)
            if agent not in self._coordinator.fleet.state.agents:
                return  # of one that nobody knows: nothing is worth remembering
        else:
            self._coordinator.presence.heard(agent, now)
        if isinstance(event, ev.AgentJoined):
            self._coordinator.exchange.peer_reborn(agent)
            if (
                not retained
                and self._coordinator.presence.is_twin(agent, event.session)
                and self._complaints(f"twins {agent}", now) is not None
            ):
                text = "two processes speak as agent %s in turn, and throw each other off the broker: give each its own `agent`"
                logger.error(text, agent, extra={"action": "twins", "agent": agent})
        if event is not None:
            self._coordinator.tell(event)

    def _heartbeat(self, agent: str, session: str, progress: Progress, now: float) -> None:
        known = self._coordinator.fleet.state.agents.get(agent)
        if known is not None:
            self._coordinator.presence.heard(agent, now, progress)
        if known is None or not known.online or known.session != session:
            self._ask_for_birth(agent, now)

    def _ask_for_birth(self, agent: str, now: float) -> None:
        if self._rebirths(agent, now) is not None:
            self._coordinator.outgoing.say(self._coordinator.topics.down(agent, "cmd"), Rebirth())
