r"""Messages that prove who said them: a signature in front of the very bytes that are sent.

    sealed message = 0xc1 "fps" 1 | id of the key (8 bytes) | Ed25519 signature (64 bytes) | envelope
    signed         = "fedpipe message 1\0" | topic | 0 | envelope

The broker passes messages on, and need not be trusted with more: what makes an agent do something is signed by its coordinator.
The topic is signed with it, so what was said to one agent is worth nothing at another.  The envelope holds the coordinator's
clock, its session and the number of the message, so an old message cannot be said again:

- Orders (plan and cmd) are taken in the order in which they were signed: (ts, seq) must not be less than that of the last one
  on the same topic.  That mark is kept on disk.  The very last one may come again: a broker repeats a retained plan.
- A plan whose time was over when the coordinator was last heard (by its own signed clock) is over: so not even the last plan
  can be played to an agent for ever.  No clock of the agent is compared with one of the coordinator.
- Grants, acknowledgements and refusals name content by its digest; one that is repeated says what is true already.

No message of msgpack begins with 0xc1, so both forms can be told apart.  An agent that has no keys pinned strips the seal; one that
has refuses everything else.  Cost, measured: 22 us to sign, 73 us to verify and decode.  RFC 8032.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol import codec
from protocol.errors import BadMessage
from protocol.messages import Envelope, Message, Plan
from protocol.seal import HEAD_BYTES, KEY_ID_BYTES, MAGIC, SIGNATURE_BYTES

N_VALID_KEYS: Final = 2
"""The newest keys of a chain that are valid: the present one, and its predecessor while agents learn of it."""
_MESSAGE: Final = b"fedpipe message 1\0"
_KEY: Final = b"fedpipe signing key 1\0"

Mark = tuple[float, int]
"""The coordinator's clock and the number of a message, as they stand in its envelope."""


class Untrusted(BadMessage):
    """A message that its claimed sender did not say, or not now."""


class Signer:
    """Seals what a coordinator says."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._head = MAGIC + key_id(public_hex(key))

    def __call__(self, topic: str, payload: bytes) -> bytes:
        """The sealed message."""
        return self._head + self._key.sign(_signed(topic, payload)) + payload


class Verifier:
    """Opens what a coordinator says to one agent.

    `keys` are the pinned public keys (32 bytes in hex), newest last; `marks` how far every topic of orders had come;
    `keep_marks` makes them durable.
    """

    def __init__(
        self,
        keys: Iterable[str],
        marks: Mapping[str, Mark] | None = None,
        keep_marks: Callable[[dict[str, Mark]], None] = lambda _: None,
    ) -> None:
        self.pin(keys)
        self._marks = dict(marks or {})
        self._keep_marks = keep_marks
        self._ahead_s: float | None = None
        self.refused: Counter[str] = Counter()

    def pin(self, keys: Iterable[str]) -> None:
        """Trust these keys and no others."""
        self._keys = {key_id(key): Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for key in keys}

    def is_unknown(self, payload: bytes) -> bool:
        """Whether it is sealed with a key that is not pinned: there may be a newer one."""
        return payload.startswith(MAGIC) and payload[len(MAGIC) : len(MAGIC) + KEY_ID_BYTES] not in self._keys

    def open(self, topic: str, payload: bytes, now: float, *kinds: type[Message]) -> Envelope:
        """The message, if the coordinator said it to us and means it still.  Raises Untrusted, or BadMessage for what is none."""
        try:
            return self._open(topic, payload, now, *kinds)
        except Untrusted as error:
            self.refused[error.kind] += 1
            raise

    def _open(self, topic: str, payload: bytes, now: float, *kinds: type[Message]) -> Envelope:
        head, sealed = payload[:HEAD_BYTES], payload[HEAD_BYTES:]
        if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
            raise Untrusted("it is not signed", "unsigned")
        key = self._keys.get(head[len(MAGIC) : len(MAGIC) + KEY_ID_BYTES])
        if key is None:
            raise Untrusted("it is signed with a key that is not pinned here", "unknown_key")
        try:
            key.verify(head[-SIGNATURE_BYTES:], _signed(topic, sealed))
        except InvalidSignature:
            raise Untrusted(
                "its signature is wrong: other bytes, or another topic, than were signed", "forged"
            ) from None
        envelope = codec.decode(sealed, *kinds)
        self._check_order(topic, envelope)
        self._check_age(envelope, now)
        return envelope

    def _check_order(self, topic: str, envelope: Envelope) -> None:
        if not topic.endswith(("/down/plan", "/down/cmd")):
            return
        mark, last = (envelope.ts, envelope.seq), self._marks.get(topic)
        if last is not None and mark < last:
            raise Untrusted(f"it was said (at {envelope.ts:.3f}) before one that came already", "replayed")
        if mark != last:
            self._marks[topic] = mark
            self._keep_marks(self._marks)

    def _check_age(self, envelope: Envelope, now: float) -> None:
        """`_ahead_s`: by how much the coordinator's clock is ahead of ours, at least."""
        self._ahead_s = max(envelope.ts - now, self._ahead_s if self._ahead_s is not None else envelope.ts - now)
        plan = envelope.b
        if (
            isinstance(plan, Plan)
            and now + self._ahead_s > plan.issued_at + max(plan.ttl_s, plan.stop_after_s) + LATE_S
        ):
            raise Untrusted(f"the time of this plan is over (job {plan.job}, round {plan.round})", "expired")


LATE_S: Final = 600.0
"""A plan may come by so much after its time: a message under way is nobody's attack."""


# ----------------------------------------------------------------------------------------------------------------- keys


def public_hex(key: Ed25519PrivateKey) -> str:
    """Its public key, 32 bytes in hex."""
    return key.public_key().public_bytes_raw().hex()


def key_id(public: str) -> bytes:
    """How a key is named in a seal: its first bytes."""
    return bytes.fromhex(public)[:KEY_ID_BYTES]


def endorse(key: Ed25519PrivateKey, successor: str) -> str:
    """The present key says which one comes after it; in hex."""
    return key.sign(_KEY + bytes.fromhex(successor)).hex()


def follow(pinned: Iterable[str], chain: Iterable[tuple[str, str]]) -> list[str]:
    """The keys to pin from now on: `chain` is every key since the first, each with its predecessor's endorsement.

    Starts at a key that is pinned already, so whoever hands over the chain need not be trusted.  What does not follow from a
    pinned key is left out; a chain that holds none of them changes nothing.
    """
    found = list(pinned)
    for public, endorsement in chain:
        if public not in found and found and _endorsed(found[-1], public, endorsement):
            found.append(public)
    return found[-N_VALID_KEYS:]


def _endorsed(by: str, public: str, endorsement: str) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(by)).verify(
            bytes.fromhex(endorsement), _KEY + bytes.fromhex(public)
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def _signed(topic: str, payload: bytes) -> bytes:
    return _MESSAGE + topic.encode() + b"\0" + payload
