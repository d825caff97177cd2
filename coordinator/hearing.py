"""What agents say, sorted: facts for the core, chunks for the transfers, signs of life; and what their silence says.

Only what is worth remembering becomes an event: a heartbeat does not, nor an offer that is being pulled already.

A broker whose queue for us is full throws messages away although it acknowledged them, and its own acknowledgements with them.
So heartbeats are compared with what their agent should be at: one that does something else heartbeat after heartbeat has missed
its plan, or we the end of its share.  Then the plan is said again, which is harmless wherever the agent stands.  A broker that lost
messages to us under way waits for our acknowledgement of them for ever and sends no others: when nobody answers, we connect anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from coordinator import intake
from coordinator.core import events as ev
from coordinator.core.state import AgentState
from coordinator.intake import SAID_AGAIN, Chunk, Word
from protocol.daemon import OncePer
from protocol.errors import BadMessage
from protocol.messages import Envelope, ExecState, Grant, Offer, Placed, Progress, Rebirth, Refuse

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

DOUBT_BEATS: Final = 2
"""So many heartbeats beside the plan make a doubt; after each time that the plan was said again it takes twice as many."""
MAX_DOUBT_S: Final = 900.0

logger = logging.getLogger(__name__)


class _Doubt(NamedTuple):
    """About which share, when to say its plan again, how long that was waited for, and when it was said before."""

    assigned_at: float
    due_at: float
    wait_s: float
    said_at: float | None


class Hearing:
    """Hears for one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._complaints = OncePer()
        self._rebirths = OncePer(coordinator.config.heartbeat_s, coordinator.config.max_agents)
        self._doubts: dict[str, _Doubt] = {}
        self._word_at = 0.0

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
                    self._coordinator.exchange.pulling.chunk(agent, xfer, frame)
                case Word(agent, envelope):
                    self._hear(agent, envelope, now, retained=retained)
        except BadMessage as error:
            self._coordinator.intake.refuse(topic, error, now)
            if error.kind in SAID_AGAIN:
                self._ask_for_birth(topic.split("/")[4], now)

    def _hear(self, agent: str, envelope: Envelope, now: float, *, retained: bool) -> None:
        if not isinstance(envelope.b, Progress | Grant):  # those are said at QoS 0, which does not get stuck
            self._word_at = now
        match envelope.b:
            case Progress() as progress:
                self._heartbeat(agent, envelope.ses, progress, now)
                return
            case Grant() as grant:
                self._coordinator.exchange.granted(agent, grant)
                return
            case Placed() as placed:
                self._coordinator.exchange.pulling.placed(agent, placed)
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
            self._doubts.pop(agent, None)
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
        elif known.report is None or self._is_beside(known, progress):
            self._wonder(known, now)
        else:
            self._doubts.pop(agent, None)

    def _is_beside(self, agent: AgentState, progress: Progress) -> bool:
        """Whether an agent does something else than its share asks for; an update that waits is offered again anyway."""
        share = self._coordinator.fleet.open_share(agent)
        return share is not None and progress.job != agent.task and share.state is not ExecState.UPLOADING

    def _wonder(self, agent: AgentState, now: float) -> None:
        """An agent is not at what it should be: it may be about to begin, or a message was lost."""
        # While its report is missing, another share is no reason to wait anew.
        share = self._coordinator.fleet.open_share(agent) if agent.report else None
        first_s = DOUBT_BEATS * self._coordinator.config.heartbeat_s
        assigned_at, doubt = share.assigned_at if share else 0.0, self._doubts.get(agent.id)
        if doubt is None or doubt.assigned_at != assigned_at:
            doubt = self._doubts[agent.id] = _Doubt(assigned_at, now + first_s, first_s, None)
        if now < doubt.due_at:
            return
        if doubt.said_at is not None and self._word_at < doubt.said_at:
            logger.warning("the broker brings heartbeats alone: connecting anew", extra={"action": "bus_stuck"})
            self._coordinator.connect_anew()
        elif agent.report is None:
            self._ask_for_birth(agent.id, now)
        elif not self._coordinator.remind(agent.id):
            return
        elif (held := self._complaints("reminded", now)) is not None:
            extra = {"action": "reminded", "agent": agent.id, "job": agent.task, "more": held}
            logger.info("its plan is said again", extra=extra)
        wait_s = min(2 * doubt.wait_s, MAX_DOUBT_S)
        self._doubts[agent.id] = _Doubt(assigned_at, now + wait_s, wait_s, now)

    def _ask_for_birth(self, agent: str, now: float) -> None:
        if self._rebirths(agent, now) is not None:
            self._coordinator.outgoing.say(self._coordinator.topics.down(agent, "cmd"), Rebirth())
