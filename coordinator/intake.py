"""From bytes on the bus to facts for the core: who said what, may it be said, is it valid, is it news.

Every byte is untrusted.  The sender is the topic's agent, whatever the payload claims; it pays for every message before that
is decoded (coordinator/gate.py); what does not decode, or belongs to another topic, is a BadMessage; a word about a share in the
name of a session that the agent has not said birth with is a replay, or comes from a process that is no more.  Each refusal is
counted by its kind, and named in the log once per kind and agent a minute with the number held back.  Duplicates and
repetitions are left to the core, which counts them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from msgspec.structs import replace

from coordinator.core import events as ev
from coordinator.core.state import AgentState
from coordinator.gate import Gate
from protocol import codec
from protocol.daemon import OncePer
from protocol.errors import BadMessage
from protocol.messages import (
    Done,
    Envelope,
    Execution,
    Grant,
    Matrix,
    Message,
    Offer,
    Placed,
    Presence,
    Progress,
    Refuse,
    Report,
    Surveyed,
)
from protocol.topics import FromAgent, Topics

EXPECTED: Final[dict[str, tuple[type[Message], ...]]] = {
    "state": (Presence,),
    "report": (Report,),
    "progress": (Progress,),
    "exec": (Execution,),
    "offer": (Offer,),
    "answer": (Grant, Placed, Done, Refuse),
}
SAID_AGAIN: Final = frozenset({"stale_session", "stranger"})
"""Refusals after which an agent is asked for its birth: an honest one then says everything again."""
MAX_NAMED: Final = 64
"""Different complaints a minute: whoever invents agents fills a line each until then, and one line afterwards."""
SHOWN: Final = 120
"""Characters of a topic that the log shows."""

logger = logging.getLogger(__name__)


class Word(NamedTuple):
    """A message of an agent that is valid and was paid for."""

    agent: str
    envelope: Envelope


class Chunk(NamedTuple):
    """A frame of an upload, not looked into yet."""

    agent: str
    xfer: str
    payload: bytes


class Intake:
    """What arrives, sorted.  `known` are the agents that the core knows now, by name."""

    def __init__(self, topics: Topics, max_agents: int, known: Callable[[], Mapping[str, AgentState]]) -> None:
        self.gate = Gate(max_agents, known)
        self._topics, self._known = topics, known
        self._sessions: dict[str, str] = {}
        self._matrices: list[Matrix] = []
        """Of the last survey: the others of a fleet mostly say the same, and each list of 6,000 takes a megabyte."""
        self._complaints = OncePer(max_keys=MAX_NAMED)

    def receive(self, topic: str, payload: bytes, now: float) -> Word | Chunk | None:
        """One publication; None when it says nothing.  Raises BadMessage, whatever the bytes."""
        place = self._topics.parse(topic)
        if not isinstance(place, FromAgent) or not payload:
            return None
        agent = place.agent
        if place.leaf == "d":
            return Chunk(agent, place.xfer, payload)
        kinds = EXPECTED[place.leaf]
        self.gate.enter(agent, place.leaf, min(len(payload), codec.limit_bytes(*kinds)), now)
        envelope = codec.decode(payload, *kinds)
        match envelope.b:
            case Presence(online=True, session=session):
                self.gate.welcome(agent)
                self._sessions[agent] = session
            case Report():
                self.gate.welcome(agent)
            case Execution() | Offer() if envelope.ses != self._session(agent):
                raise BadMessage("a word of a session that this agent has not said birth with", "stale_session")
            case Execution(surveyed=Surveyed() as found) as moved:
                if found.matrices == self._matrices:
                    found = replace(found, matrices=self._matrices)
                    envelope = replace(envelope, b=replace(moved, surveyed=found))
                self._matrices = found.matrices
        return Word(agent, envelope)

    def _session(self, agent: str) -> str:
        """The last that it said birth with, which the core may not have heard yet."""
        known = self._known().get(agent)
        return self._sessions.get(agent) or (known.session if known else "")

    def refuse(self, topic: str, error: BadMessage, now: float) -> None:
        """Count a refusal, and say it unless the same was just said of this agent."""
        self.gate.counts[error.kind] += 1
        agent = "/".join(topic.split("/", 5)[:5])[:SHOWN]  # it may invent any number of topics below its own
        held = self._complaints(f"{error.kind} {agent}", now)
        if held is not None:
            extra = {"action": "bad_message", "kind": error.kind, "topic": topic[:SHOWN], "more": held}
            logger.warning("message ignored: %s", error, extra=extra)


def to_event(agent: str, envelope: Envelope) -> ev.Happened | None:
    """The fact in a message, or None when it holds none for the core (progress, answers of a transfer)."""
    match envelope.b:
        case Presence(online=True) as birth:
            return ev.AgentJoined(
                agent=agent, session=birth.session, software=birth.software, methods=list(birth.methods)
            )
        case Presence() as death:
            return ev.AgentLeft(agent=agent, session=death.session, reason=death.reason)
        case Report() as report:
            return ev.AgentReported(agent=agent, report=report)
        case Execution() as moved:
            return ev.ShareMoved(
                agent=agent,
                job=moved.job,
                round=moved.round,
                attempt=moved.attempt,
                serial=moved.serial,
                state=moved.state,
                reason=moved.reason,
                surveyed=moved.surveyed,
                calibrated=moved.calibrated,
                evaluated=moved.evaluated,
                energy=moved.energy,
            )
        case Offer() as offer:
            return ev.UpdateOffered(agent=agent, offer=offer)
    return None
