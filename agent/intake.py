"""From bytes on the bus to what this agent may act on: its own topics, and on each only the messages that belong there.

Every byte is untrusted: what does not decode, is too large for its topic, or speaks to somebody else is a BadMessage or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from protocol.messages import (
    Body,
    Cancel,
    CoordinatorState,
    Done,
    Envelope,
    Grant,
    Message,
    Placed,
    Plan,
    Rebirth,
    Refuse,
)
from protocol.topics import FromCoordinator, ToAgent, Topics

EXPECTED: Final[dict[str, tuple[type[Message], ...]]] = {
    "plan": (Plan,),
    "cmd": (Cancel, Rebirth),
    "grant": (Grant, Placed, Done, Refuse),
}


class Chunk(NamedTuple):
    """A frame of a download, not looked into yet."""

    xfer: str
    payload: bytes
    heard: bool = False
    """In a broadcast to all."""


def receive(
    topics: Topics, agent: str, topic: str, payload: bytes, opened: Callable[..., Envelope]
) -> Body | Chunk | None:
    """One publication as `agent` takes it; None when it is not for it or says nothing.  Raises BadMessage.

    `opened(topic, payload, *kinds)` is the message, if it is from whom it has to be (protocol/signing.py).
    """
    if not payload:
        return None
    match topics.parse(topic):
        case ToAgent(agent=to, leaf="d", xfer=xfer) if to == agent:
            return Chunk(xfer, payload)
        case ToAgent(agent=to, leaf=leaf) if to == agent:
            return opened(topic, payload, *EXPECTED[leaf]).b
        case FromCoordinator(leaf="blob", name=xfer):
            return Chunk(xfer, payload, heard=True)
        case FromCoordinator(leaf="state"):
            return opened(topic, payload, CoordinatorState).b
    return None
