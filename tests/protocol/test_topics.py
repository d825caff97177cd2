"""The topic tree: what is built is parsed, everything else is refused, and it fits the cloud brokers."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from protocol.errors import BadMessage
from protocol.topics import DOWN_LEAVES, UP_LEAVES, FromAgent, FromCoordinator, ToAgent, Topics, is_id, is_xfer

IDS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", fullmatch=True)
XFERS = st.from_regex(r"[0-9a-f]{32}", fullmatch=True)
LONGEST = "a" * 64


@given(IDS, IDS, XFERS)
@example(LONGEST, LONGEST, "f" * 32)
def test_every_topic_is_parsed_back_and_short(fleet: str, name: str, xfer: str) -> None:
    topics = Topics(fleet)
    built = {
        topics.coordinator_state(): FromCoordinator("state"),
        topics.job(name): FromCoordinator("job", name),
        topics.blob(xfer): FromCoordinator("blob", xfer),
        topics.up_chunk(name, xfer): FromAgent(name, "d", xfer),
        topics.down_chunk(name, xfer): ToAgent(name, "d", xfer),
    }
    built |= {topics.up(name, leaf): FromAgent(name, leaf) for leaf in UP_LEAVES}  # type: ignore[arg-type]
    built |= {topics.down(name, leaf): ToAgent(name, leaf) for leaf in DOWN_LEAVES}  # type: ignore[arg-type]
    for topic, place in built.items():
        assert topics.parse(topic) == place
        assert topic.count("/") <= 7
        assert len(topic.encode()) <= 256


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fed/v1",
        "fed/v1/home",
        "fed/v1/home/",
        "fed/v2/home/c/state",
        "fed/v1/other/c/state",
        "fed/v1/homes/c/state",
        "fed/v1/home/c/state/",
        "fed/v1/home/c/state\n",
        "/fed/v1/home/c/state",
        "fed/v1/home/c/job/",
        "fed/v1/home/c/job/A",
        "fed/v1/home/c/blob/00",
        "fed/v1/home/a//up/state",
        "fed/v1/home/a/-x/up/state",
        "fed/v1/home/a/x/up/plan",
        "fed/v1/home/a/x/down/offer",
        "fed/v1/home/a/x/up/d",
        "fed/v1/home/a/x/up/d/" + "g" * 32,
        "fed/v1/home/a/x/up/d/" + "0" * 33,
        "fed/v1/home/a/x/up/d/" + "0" * 31 + "\n",
        "fed/v1/home/a/../up/state",
        "fed/v1/home/a/+/up/#",
        "fed/v1/home/a/" + "x" * 65 + "/up/state",
        "$SYS/broker/version",
        "fed/v1/home/a/\ud800/up/state",
    ],
)
def test_anything_else_is_a_bad_message(topic: str) -> None:
    with pytest.raises(BadMessage):
        Topics("home").parse(topic)


LEVELS = st.sampled_from(["a", "c", "up", "down", "state", "job", "d", "blob", "grant", "x", "0" * 32, "", "+", "X"])


@given(st.lists(LEVELS, max_size=6).map("/".join) | st.text(max_size=80))
def test_what_is_parsed_names_its_topic_exactly(rest: str) -> None:
    topics = Topics("home")
    try:
        place = topics.parse(f"fed/v1/home/{rest}")
    except BadMessage:
        return
    match place:
        case FromAgent():
            parts = ["a", place.agent, "up", place.leaf, place.xfer]
        case ToAgent():
            parts = ["a", place.agent, "down", place.leaf, place.xfer]
        case FromCoordinator():
            parts = ["c", place.leaf, place.name]
    assert "/".join(part for part in parts if part) == rest


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a" * 65, "a/b", "a+", "é", "a\n", "a.b"])
def test_no_id(name: str) -> None:
    assert not is_id(name)
    with pytest.raises(ValueError, match="fleet name"):
        Topics(name)


def test_ids_and_transfer_names() -> None:
    assert all(map(is_id, ["a", "0", "edge-01", LONGEST]))
    assert is_xfer("0123456789abcdef" * 2)
    assert not any(map(is_xfer, ["", "0" * 31, "0" * 33, "A" * 32, "0" * 32 + "\n"]))


def test_a_message_is_received_by_its_side_only() -> None:
    topics = Topics("home")
    assert topics.coordinator_subscriptions() == ["fed/v1/home/a/+/up/+", "fed/v1/home/a/+/up/d/+"]
    assert topics.agent_subscriptions("edge-01") == ["fed/v1/home/a/edge-01/down/#", "fed/v1/home/c/state"]
    said = [*(topics.up("a", leaf) for leaf in ("state", "offer")), topics.up_chunk("a", "0" * 32)]
    assert all(any(topic_matches_sub(each, topic) for each in topics.coordinator_subscriptions()) for topic in said)
    assert not any(topic_matches_sub(each, topics.up_probe("a")) for each in topics.coordinator_subscriptions())
