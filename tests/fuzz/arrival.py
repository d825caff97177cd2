"""Target: a script of publications, on any topic and with any payload, as they reach the intakes of both daemons."""

from __future__ import annotations

from agent import intake as edge
from coordinator.core.state import AgentState
from coordinator.intake import EXPECTED, SAID_AGAIN, Chunk, Intake, Word, to_event
from protocol import codec
from protocol.errors import BadMessage
from protocol.messages import Envelope, Message
from protocol.topics import Topics
from tests.fuzz import forged
from tests.fuzz.script import Script

MAX_AGENTS = 4
TOPICS = Topics("main")
LEAVES = [*EXPECTED, *edge.EXPECTED, "d/" + "a" * 32, "d/x", "nonsense", "", "state/x"]
NAMES = ["a", "a", "a", "b", "UP", "x" * 70, "", "+", "#", "a\0b"]
SIDES = ["up", "up", "up", "down", "", "x"]
HUGE = [b"\x81" * (most + 1) for most in (codec.MAX_SMALL_BYTES, codec.MAX_MESSAGE_BYTES)]
KINDS = SAID_AGAIN | {
    *("bad_message", "damaged", "wrong_type", "wrong_version", "oversized", "bad_topic", "flood", "fleet_full"),
    "stranger_flood",
}


def arrival(data: bytes) -> None:
    """What is let through is valid, of a known sender and of its topic; what is remembered of strangers is bounded."""
    script, now = Script(data), 0.0
    agents = {"a": AgentState(id="a", session=forged.SESSIONS[1])}
    intake = Intake(TOPICS, MAX_AGENTS, lambda: agents)
    while script.more:
        now += script.pick([0.0, 0.0, 0.001, 1.0, 100.0])
        topic = _topic(script)
        payload = _payload(script)
        try:
            heard = intake.receive(topic, payload, now)
        except BadMessage as error:
            _is_named(error)
            intake.refuse(topic, error, now)
        else:
            if isinstance(heard, Word):
                assert type(heard.envelope.b) in EXPECTED[topic.rsplit("/", 1)[1]]
                event = to_event(heard.agent, heard.envelope)
                if type(event).__name__ in {"AgentJoined", "AgentReported"} and script.below(4):
                    agents.setdefault(heard.agent, AgentState(id=heard.agent))
            assert heard is None or isinstance(heard, Word | Chunk)
        try:
            told = edge.receive(TOPICS, "a", topic, payload, _opened)
        except BadMessage as error:
            _is_named(error)
        else:
            assert told is None or topic == TOPICS.coordinator_state() or topic.startswith("fed/v1/main/a/a/down/")
        if script.below(8) == 0:
            intake.gate.tidy(now)
        assert len(agents) <= MAX_AGENTS
        intake.gate.check()


def _topic(script: Script) -> str:
    whim = script.below(8)
    if whim == 7:
        return script.pick(["fed/v1/main/c/state", "fed/v1/other/a/a/up/state", "fed/v1/main/c/job/x", "x" * 300])
    name = script.pick(NAMES) if whim else f"s{script.below(256)}"
    return f"fed/v1/main/a/{name}/{script.pick(SIDES)}/{script.pick(LEAVES)}"


def _opened(_topic: str, payload: bytes, *kinds: type[Message]) -> Envelope:
    return codec.decode(payload, *kinds)


def _is_named(error: BadMessage) -> None:
    assert error.kind in KINDS


def _payload(script: Script) -> bytes:
    match script.below(16):
        case 0:
            return script.take(script.below(40))
        case 1:
            return script.pick(HUGE)
    whole = forged.message(script.some(script.pick([4, 16, 32, 64])))
    if script.below(4) == 0:
        at = script.below(len(whole))
        whole = whole[:at] + bytes([whole[at] ^ 1 << script.below(8)]) + whole[at + 1 :]
    return whole[: len(whole) - script.pick([0, 0, 0, 1, 7])]
