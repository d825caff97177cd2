"""Messages <-> bytes: the only place that sees msgpack.  Limits come first, types second, meaning last.

msgpack's own limits bound what a hostile length can allocate, its C stack bounds nesting, msgspec then checks every field.
Whatever goes wrong is one error, BadMessage, with the path of the field in its text.
"""

from __future__ import annotations

from typing import Final

import msgpack
import msgspec

from protocol.errors import BadMessage
from protocol.messages import MAX_MATRICES, VERSION, Body, Envelope

MAX_MESSAGE_BYTES: Final = 2 * 2**20
"""A control message above this is refused before it is parsed; 20,000 matrix names and ranks fit well inside."""


def encode(body: Body, *, session: str, seq: int, now: float) -> bytes:
    """Wrap `body` in an envelope and serialise it as msgpack.  Raises BadMessage when it would be too large to accept."""
    envelope = Envelope(v=VERSION, ts=now, ses=session, seq=seq, b=body)
    payload: bytes = msgpack.packb(msgspec.to_builtins(envelope), use_bin_type=True)
    if len(payload) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"{type(body).__name__} of {len(payload)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return payload


def decode(payload: bytes) -> Envelope:
    """Parse and validate one message.  Raises BadMessage; memory stays within a small multiple of len(payload)."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"message of {len(payload)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        raw = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=4096,
            max_array_len=MAX_MATRICES,
            max_map_len=MAX_MATRICES,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not msgpack within the limits: {type(error).__name__}: {error}") from None
    if not isinstance(raw, dict) or raw.get("v") != VERSION:
        got = raw.get("v") if isinstance(raw, dict) else type(raw).__name__
        raise BadMessage(f"protocol version {str(got)[:40]!r} is not {VERSION}: upgrade the older side")
    try:
        return msgspec.convert(raw, Envelope)
    except (msgspec.ValidationError, OverflowError) as error:
        raise BadMessage(f"invalid message: {error}"[:400]) from None
