"""Messages <-> bytes: the only place that sees msgpack.  Size first, then the checksum and the version, then every field.

The payload is decoded straight into the frozen Structs, so a hostile length allocates nothing, nesting deeper than a message
has is refused where it begins, and unknown fields are skipped without being built.  (msgpack.unpackb with its limits set
builds the untyped tree first: 5 KB of nested array claims took 80 MB, this takes 0.3.)  Whatever goes wrong is one error,
BadMessage, with the path of the field in its text.

A message ends with a checksum of itself.  One flipped bit in an offer makes a legal offer of another blob, which nobody has, and
the work of a round is refused for it; TCP's own sum of 16 bits lets such a bit pass where a relay or a memory is bad (Stone and
Partridge, 2000).  What is damaged is ignored and said again.
"""

from __future__ import annotations

from typing import Final

import msgspec

from protocol.crc import TRAILER, crc32c, is_whole
from protocol.errors import BadMessage
from protocol.messages import VERSION, Body, Envelope, Execution, Message, Plan

MAX_MESSAGE_BYTES: Final = 2 * 2**20
"""A control message above this is refused before it is parsed; 20,000 matrix names and ranks fit well inside."""
MAX_SMALL_BYTES: Final = 256 * 1024
"""The same for all messages that name no matrices; a report of 64 devices, or an offer of 1,000 levels, takes half of it."""
LARGE: Final[frozenset[type[Message]]] = frozenset({Execution, Plan})
_NO_CRC: Final = bytes(TRAILER.size)
_BEFORE_CRC: Final = msgspec.msgpack.encode({"crc": _NO_CRC})[1 : -TRAILER.size]


def encode(body: Body, *, session: str, seq: int, now: float) -> bytes:
    """Wrap `body` in an envelope and serialise it as msgpack.  Raises BadMessage when it would be too large to accept."""
    envelope = Envelope(v=VERSION, ts=now, ses=session, seq=seq, b=body, crc=_NO_CRC)
    covered = msgspec.msgpack.encode(envelope)[: -TRAILER.size]
    payload = covered + TRAILER.pack(crc32c(covered))
    if len(payload) > (limit := limit_bytes(type(body))):
        raise BadMessage(f"{type(body).__name__} of {len(payload)} bytes exceeds {limit}", "oversized")
    return payload


def limit_bytes(*kinds: type[Message]) -> int:
    """The largest payload that a message of one of these kinds may have; of any kind if none is named."""
    return MAX_MESSAGE_BYTES if not kinds or not LARGE.isdisjoint(kinds) else MAX_SMALL_BYTES


class _Head(msgspec.Struct):
    v: int


_head: Final = msgspec.msgpack.Decoder(_Head)
_envelope: Final = msgspec.msgpack.Decoder(Envelope)


def decode(payload: bytes, *kinds: type[Message]) -> Envelope:
    """Parse and validate one message, of one of these kinds if any are named.

    Raises BadMessage, whatever the bytes; memory stays within a few times their length.
    """
    if len(payload) > (limit := limit_bytes(*kinds)):
        raise BadMessage(f"message of {len(payload)} bytes exceeds {limit}", "oversized")
    if payload.endswith(_BEFORE_CRC, 0, -TRAILER.size) and not is_whole(payload):
        raise BadMessage("the message was damaged on its way: checksum mismatch", "damaged")
    try:
        if (found := _version(payload)) != VERSION:
            kind = "wrong_version" if isinstance(found, int) else "bad_message"
            raise BadMessage(f"protocol version {found} is not {VERSION}: upgrade the older side", kind)
        envelope = _envelope.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise BadMessage(f"invalid message: {error}"[:400]) from None
    if kinds and type(envelope.b) not in kinds:
        raise BadMessage(f"a {type(envelope.b).__name__} where {_names(kinds)} belongs", "wrong_type")
    return envelope


def _names(kinds: tuple[type[Message], ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _version(payload: bytes) -> int | str:
    try:
        return _head.decode(payload).v
    except msgspec.ValidationError as error:
        return f"({error})"
