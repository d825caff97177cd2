"""From bytes on the bus to facts for the core: who said what, is it valid, is it news.

Every byte is untrusted.  The sender is the topic's agent, whatever the payload claims; what does not decode is a BadMessage;
duplicates and repetitions are left to the core, which counts them.
"""

from __future__ import annotations

from coordinator.core import events as ev
from protocol import codec
from protocol.errors import BadMessage
from protocol.messages import Envelope, Execution, Offer, Presence, Progress, Report

_EXPECTED: dict[str, type] = {
    "state": Presence,
    "report": Report,
    "progress": Progress,
    "exec": Execution,
    "offer": Offer,
}


def decode(leaf: str, payload: bytes) -> Envelope:
    """A control message that fits its topic.  Raises BadMessage."""
    envelope = codec.decode(payload)
    expected = _EXPECTED.get(leaf)
    if expected is not None and not isinstance(envelope.b, expected):
        raise BadMessage(f"a {type(envelope.b).__name__} on topic {leaf!r}")
    return envelope


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
            )
        case Offer() as offer:
            return ev.UpdateOffered(agent=agent, offer=offer)
    return None
