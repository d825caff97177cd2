"""An agent takes what its coordinator said, to it, now: nothing else, whoever publishes it."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec
from protocol.messages import Base, Body, Cancel, CoordinatorState, Done, Plan
from protocol.seal import MAGIC, unsealed
from protocol.signing import Mark, Signer, Untrusted, Verifier, endorse, follow, public_hex
from protocol.topics import Topics

topics = Topics("main")
PLAN, CMD, GRANT, STATE = (
    topics.down("a", "plan"),
    topics.down("a", "cmd"),
    topics.down("a", "grant"),
    topics.coordinator_state(),
)
KEY = Ed25519PrivateKey.generate()


def plan(**changes: object) -> Plan:
    said = {"job": "j", "round": 1, "attempt": 0, "purpose": "survey", "method": "qlora", "base": Base(source="x")}
    times = {"issued_at": 100.0, "stop_after_s": 50.0, "ttl_s": 60.0}
    return Plan(**said | times | changes)  # type: ignore[arg-type]


def envelope(body: Body, at: float = 100.0, seq: int = 1) -> bytes:
    return codec.encode(body, session="0" * 16, seq=seq, now=at)


def sealed(topic: str, body: Body, at: float = 100.0, seq: int = 1, key: Ed25519PrivateKey = KEY) -> bytes:
    return Signer(key)(topic, envelope(body, at, seq))


def verifier(**how: object) -> Verifier:
    return Verifier([public_hex(KEY)], **how)  # type: ignore[arg-type]


def refused(one: Verifier, topic: str, payload: bytes, now: float = 0.0) -> str:
    with pytest.raises(Untrusted) as error:
        one.open(topic, payload, now)
    return error.value.kind


def test_what_the_coordinator_said_is_taken() -> None:
    assert verifier().open(PLAN, sealed(PLAN, plan()), 0.0, Plan).b == plan()


def test_an_agent_without_keys_reads_the_same_bytes() -> None:
    assert unsealed(sealed(PLAN, plan())) == envelope(plan())
    assert unsealed(envelope(plan())) == envelope(plan())


def test_a_message_to_another_agent_or_of_another_leaf_or_fleet_is_refused() -> None:
    said = sealed(PLAN, plan())
    for elsewhere in (topics.down("b", "plan"), CMD, Topics("other").down("a", "plan")):
        assert refused(verifier(), elsewhere, said) == "forged"


def test_unsigned_unknown_and_short_messages_are_refused() -> None:
    assert refused(verifier(), PLAN, envelope(plan())) == "unsigned"
    assert refused(verifier(), PLAN, MAGIC) == "unsigned"
    stranger = sealed(PLAN, plan(), key=Ed25519PrivateKey.generate())
    assert refused(verifier(), PLAN, stranger) == "unknown_key"
    assert verifier().is_unknown(stranger)
    assert not verifier().is_unknown(sealed(PLAN, plan()))


@settings(max_examples=150)
@given(st.data())
def test_no_changed_byte_passes(data: st.DataObject) -> None:
    said = bytearray(sealed(PLAN, plan()))
    at = data.draw(st.integers(0, len(said) - 1))
    said[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Untrusted):
        verifier().open(PLAN, bytes(said), 0.0)


@pytest.mark.parametrize("topic", [PLAN, CMD])
def test_an_older_order_is_refused_and_the_last_one_may_come_again(topic: str) -> None:
    body: Body = plan() if topic == PLAN else Cancel(job="j", round=1, attempt=0)
    one, old, new = verifier(), sealed(topic, body, seq=1), sealed(topic, body, seq=2)
    one.open(topic, old, 0.0)
    one.open(topic, new, 0.0)
    one.open(topic, new, 0.0)
    assert refused(one, topic, old) == "replayed"
    one.open(topic, sealed(topic, body, at=100.1, seq=1), 0.0)  # a coordinator that was started again counts anew


def test_how_far_orders_came_outlives_the_process() -> None:
    kept: dict[str, Mark] = {}
    old = sealed(CMD, Cancel(job="j", round=1, attempt=0))
    verifier(keep_marks=kept.update).open(CMD, sealed(CMD, Cancel(job="j", round=2, attempt=0), at=200.0), 0.0)
    assert refused(verifier(marks=kept), CMD, old) == "replayed"


def test_topics_do_not_disturb_each_other() -> None:
    one = verifier()
    one.open(PLAN, sealed(PLAN, plan(), at=200.0), 0.0)
    one.open(CMD, sealed(CMD, Cancel(job="j", round=1, attempt=0), at=100.0), 0.0)
    one.open(GRANT, sealed(GRANT, Done(xfer="0" * 32), at=90.0), 0.0)


def test_a_plan_is_over_by_the_clock_of_the_coordinator_alone() -> None:
    """The agent's own clock is years off, and does not matter."""
    one, said = verifier(), sealed(PLAN, plan())
    one.open(PLAN, said, 9e9)
    one.open(PLAN, said, 9e9 + 600.0)
    assert refused(one, PLAN, said, 9e9 + 700.0) == "expired"
    other = verifier()
    other.open(STATE, sealed(STATE, CoordinatorState(session="1" * 16, online=True), at=1e6), 5.0)
    assert refused(other, PLAN, said, 6.0) == "expired"


def test_keys_follow_their_chain_and_nothing_else() -> None:
    ring = [Ed25519PrivateKey.generate() for _ in range(4)]
    names = [public_hex(key) for key in ring]
    chain = [(names[0], "")] + [(names[i + 1], endorse(ring[i], names[i + 1])) for i in range(3)]
    assert follow(names[:1], chain[:2]) == names[:2]
    assert follow(names[:1], chain) == names[2:], "the newest two are valid"
    assert follow(names[1:2], chain) == names[2:]
    stranger = Ed25519PrivateKey.generate()
    name = public_hex(stranger)
    assert follow(names[:1], [(name, "")]) == names[:1]
    assert follow(names[:1], [*chain[:1], (name, endorse(stranger, name))]) == names[:1]
    assert follow(names[:1], [*chain[:1], (name, "xx")]) == names[:1]
