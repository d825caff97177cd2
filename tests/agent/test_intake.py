"""An agent listens on its own topics only, and on each only to what belongs there."""

from __future__ import annotations

import pytest

from agent.intake import Chunk, receive
from protocol import codec
from protocol.errors import BadMessage
from protocol.messages import Base, Body, Cancel, CoordinatorState, Done, Envelope, Message, Plan, Rebirth, Refuse
from protocol.topics import Topics

TOPICS = Topics("main")
SHARE = {"job": "j", "round": 1, "attempt": 0}
PLAN = Plan(
    **SHARE,  # type: ignore[arg-type]
    purpose="train",
    method="qlora",
    base=Base(source="toy"),
    issued_at=1.0,
    stop_after_s=1.0,
    ttl_s=1.0,
)
BODIES: list[Body] = [
    PLAN,
    Cancel(**SHARE),  # type: ignore[arg-type]
    Rebirth(),
    Done(xfer="a" * 32),
    Refuse(xfer="a" * 32, reason="x"),
    CoordinatorState(session="1" * 16, online=True),
]
WELCOME = {
    TOPICS.down("a", "plan"): {"Plan"},
    TOPICS.down("a", "cmd"): {"Cancel", "Rebirth"},
    TOPICS.down("a", "grant"): {"Done", "Refuse"},
    TOPICS.coordinator_state(): {"CoordinatorState"},
}


def packed(body: Body) -> bytes:
    return codec.encode(body, session="1" * 16, seq=1, now=1.0)


def plain(_topic: str, payload: bytes, *kinds: type[Message]) -> Envelope:
    return codec.decode(payload, *kinds)


@pytest.mark.parametrize("topic", WELCOME)
@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_every_topic_takes_only_its_own(topic: str, body: Body) -> None:
    if type(body).__name__ in WELCOME[topic]:
        assert receive(TOPICS, "a", topic, packed(body), plain) == body
        return
    with pytest.raises(BadMessage) as refused:
        receive(TOPICS, "a", topic, packed(body), plain)
    assert refused.value.kind == "wrong_type"


def test_what_is_said_to_another_is_nothing() -> None:
    for topic in (TOPICS.down("b", "plan"), TOPICS.down_chunk("b", "a" * 32), TOPICS.up("a", "exec"), TOPICS.job("j")):
        assert receive(TOPICS, "a", topic, packed(PLAN), plain) is None


def test_a_chunk_is_passed_on_unopened_and_bounded_by_the_bus() -> None:
    assert receive(TOPICS, "a", TOPICS.down_chunk("a", "a" * 32), b"x", plain) == Chunk("a" * 32, b"x")
    assert receive(TOPICS, "a", TOPICS.blob("a" * 32), b"x", plain) == Chunk("a" * 32, b"x", heard=True)
    with pytest.raises(BadMessage) as large:
        receive(TOPICS, "a", TOPICS.down("a", "grant"), bytes(codec.MAX_SMALL_BYTES + 1), plain)
    assert large.value.kind == "oversized"
