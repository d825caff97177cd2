"""The outside of a signed message: how it is told from an unsigned one, and what lies inside (see protocol/signing.py)."""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"\xc1fps\x01"
"""No message of msgpack begins with 0xc1."""
KEY_ID_BYTES: Final = 8
SIGNATURE_BYTES: Final = 64
HEAD_BYTES: Final = len(MAGIC) + KEY_ID_BYTES + SIGNATURE_BYTES


def unsealed(payload: bytes) -> bytes:
    """The message, whether it is signed or not; nothing is verified."""
    return payload[HEAD_BYTES:] if payload.startswith(MAGIC) else payload
