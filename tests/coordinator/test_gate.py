"""Nobody pays for another's flood, and nothing that is invented is remembered without bound."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator.core.state import AgentState
from coordinator.gate import BURST, BYTES_PER_TOKEN, COST, RATE_PER_S, Gate
from coordinator.intake import MAX_NAMED, Chunk, Intake, Word
from protocol import codec
from protocol.errors import BadMessage
from protocol.messages import (
    Blob,
    Body,
    ExecState,
    Execution,
    Grant,
    Matrix,
    Offer,
    Presence,
    Progress,
    Rebirth,
    Report,
    Surveyed,
)
from protocol.topics import Topics

TOPICS = Topics("main")
SESSION, OTHER = "1" * 16, "2" * 16
WORD = Execution(job="j", round=1, attempt=0, serial=1, state=ExecState.DONE)
OFFER = Offer(job="j", round=1, attempt=0, kind="lora", blob=Blob(sha256="a" * 64, size=1), samples=1)


def kind_of(gate: Gate, agent: str, leaf: str = "exec", n_bytes: int = 0, now: float = 0.0) -> str:
    try:
        gate.enter(agent, leaf, n_bytes, now)
    except BadMessage as error:
        return error.kind
    return ""


# -------------------------------------------------------------------------------------------------------------- budgets


def test_a_flooding_agent_is_left_out_and_its_neighbour_is_not() -> None:
    gate = Gate(10, lambda: {"flood", "calm"})
    said = [kind_of(gate, "flood") for _ in range(1000)]
    assert said.count("") == BURST
    assert set(said[int(BURST) :]) == {"flood"}
    assert kind_of(gate, "calm") == ""
    assert kind_of(gate, "flood", now=1.0) == ""
    assert gate.calm(1.0) == [], "it would flood again"
    assert gate.calm(BURST / RATE_PER_S) == ["flood"], "now it may say everything again"
    assert gate.calm(BURST / RATE_PER_S) == [], "it was asked"


def test_a_whole_fast_upload_of_credit_is_no_flood() -> None:
    gate = Gate(10, lambda: {"a"})
    assert {kind_of(gate, "a", "answer", 40, now=n / 900) for n in range(60_000)} == {""}


@given(st.lists(st.tuples(st.sampled_from(sorted(COST)), st.integers(0, 2**21), st.floats(0, 30)), max_size=80))
def test_no_agent_has_more_than_its_budget(story: list[tuple[str, int, float]]) -> None:
    gate, now, spent = Gate(1, lambda: {"a"}), 0.0, 0.0
    for leaf, n_bytes, pause_s in story:
        now += pause_s
        if kind_of(gate, "a", leaf, n_bytes, now) == "":
            spent += COST[leaf] + n_bytes / BYTES_PER_TOKEN
        if pause_s > 20:
            gate.tidy(now)
        assert spent <= BURST + RATE_PER_S * now + 1e-6
        gate.check()


# ------------------------------------------------------------------------------------------------------------ strangers


def test_strangers_share_one_budget_and_known_agents_do_not_feel_it() -> None:
    gate = Gate(100, lambda: {"known"})
    said = [kind_of(gate, f"s{n}", "state") for n in range(1000)]
    assert said.count("") == 100
    assert set(said[100:]) == {"stranger_flood"}
    assert kind_of(gate, "known") == ""
    assert kind_of(gate, "late", "state", now=60.0) == "", "and they come back"


def test_a_stranger_may_say_who_it_is_and_nothing_else() -> None:
    gate = Gate(100, set)
    said = {leaf: kind_of(gate, "s", leaf) for leaf in COST}
    assert {leaf for leaf, kind in said.items() if not kind} == {"state", "report", "progress"}
    assert {kind for kind in said.values() if kind} == {"stranger"}


def test_a_full_fleet_takes_nobody_in_and_keeps_who_is_there() -> None:
    known = {"a", "b"}
    gate = Gate(3, lambda: known)
    gate.welcome("c")
    gate.welcome("a")
    with pytest.raises(BadMessage, match="raise max_agents") as full:
        gate.welcome("d")
    assert full.value.kind == "fleet_full"
    gate.welcome("c")
    known.remove("b")
    known.add("c")
    gate.welcome("d")


# --------------------------------------------------------------------------------------------------------------- intake


class Desk:
    """An intake of a fleet in which "a" is known."""

    def __init__(self, max_agents: int = 10) -> None:
        self.agents = {"a": AgentState(id="a", session=SESSION)}
        self.intake = Intake(TOPICS, max_agents, lambda: self.agents)

    def hears(self, topic: str, payload: bytes, now: float = 0.0) -> str:
        """The kind of the refusal, or the type of what was taken."""
        try:
            heard = self.intake.receive(topic, payload, now)
        except BadMessage as error:
            self.intake.refuse(topic, error, now)
            return error.kind
        match heard:
            case Word(_, envelope):
                return type(envelope.b).__name__
            case Chunk():
                return "Chunk"
        return "nothing"


def packed(body: Body, session: str = SESSION) -> bytes:
    return codec.encode(body, session=session, seq=1, now=1.0)


UP = f"{TOPICS.root}/a/a/up"
ONE = Surveyed(base_sha256="b" * 64, matrices=[Matrix(name="q", d_out=2, d_in=3)], n_train=1, n_eval=1)
TWO = replace(ONE, matrices=[*ONE.matrices, Matrix(name="v", d_out=2, d_in=3)])
NAN_SHARE = msgspec.msgpack.encode(
    {"v": 1, "ts": 1.0, "ses": SESSION, "seq": 1, "b": {"t": "offer", "train_s": float("nan")}}
)


@pytest.mark.parametrize(
    ("topic", "payload", "kind"),
    [
        (f"{UP}/exec", packed(WORD), "Execution"),
        (f"{UP}/offer", packed(OFFER), "Offer"),
        (f"{UP}/progress", packed(Progress()), "Progress"),
        (f"{UP}/d/{'a' * 32}", b"x" * 300_000, "Chunk"),
        (f"{UP}/exec", b"", "nothing"),
        (f"{TOPICS.root}/c/state", b"x", "nothing"),
        (f"{UP}/exec", packed(WORD, OTHER), "stale_session"),
        (f"{UP}/offer", packed(OFFER, OTHER), "stale_session"),
        (f"{UP}/offer", packed(WORD), "wrong_type"),
        (f"{UP}/offer", packed(Rebirth()), "wrong_type"),
        (f"{UP}/offer", NAN_SHARE, "bad_message"),
        (f"{UP}/exec", b"\x81\xa1v\x02", "wrong_version"),
        (f"{UP}/exec", b"\xdc\x4e\x20" * 2000, "bad_message"),
        (f"{UP}/report", b"x" * (codec.MAX_SMALL_BYTES + 1), "oversized"),
        (f"{UP}/exec", b"x" * (codec.MAX_MESSAGE_BYTES + 1), "oversized"),
        (f"{UP}/nonsense", b"x", "bad_topic"),
        (f"{TOPICS.root}/a/../up/state", b"x", "bad_topic"),
        (f"{TOPICS.root}/a/z/up/exec", packed(WORD), "stranger"),
        (f"{TOPICS.root}/a/z/up/answer", packed(Grant(xfer="a" * 32, ranges=[(0, 1)])), "stranger"),
    ],
)
def test_what_arrives_is_taken_or_refused_by_its_kind(topic: str, payload: bytes, kind: str) -> None:
    desk = Desk()
    assert desk.hears(topic, payload) == kind
    refused = kind == kind.lower() and kind != "nothing"
    assert desk.intake.gate.counts == ({kind: 1} if refused else {})


def test_a_word_of_the_newest_birth_counts_before_the_core_has_heard_of_it() -> None:
    desk = Desk()
    assert desk.hears(f"{UP}/state", packed(Presence(session=OTHER, online=True), OTHER)) == "Presence"
    assert desk.hears(f"{UP}/exec", packed(WORD, OTHER)) == "Execution"
    assert desk.hears(f"{UP}/exec", packed(WORD, SESSION)) == "stale_session"


def test_equal_surveys_share_their_matrices() -> None:
    desk = Desk()
    heard = [desk.intake.receive(f"{UP}/exec", packed(replace(WORD, surveyed=found)), 0.0) for found in (ONE, ONE, TWO)]
    said = [word.envelope.b for word in heard if isinstance(word, Word)]
    lists = [moved.surveyed.matrices for moved in said if isinstance(moved, Execution) and moved.surveyed]
    assert lists == [ONE.matrices, ONE.matrices, TWO.matrices]
    assert lists[0] is lists[1]


def test_invented_agents_are_named_a_few_times_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(max_agents=10)
    for n in range(5000):
        desk.hears(f"{TOPICS.root}/a/s{n}/up/exec", packed(WORD))
        desk.hears(f"{TOPICS.root}/a/s{n}/up/{'x' * n}", b"x")
    desk.hears(f"{TOPICS.root}/a/{'x' * 60_000}/up/exec", b"x")
    assert desk.intake.gate.counts == {"stranger": 5000, "bad_topic": 5001}
    assert len(caplog.records) == MAX_NAMED + 1
    assert max(len(vars(record)["topic"]) for record in caplog.records) <= 120
    assert desk.hears(f"{UP}/report", packed(Report())) == "Report", "who is known is heard all the same"
