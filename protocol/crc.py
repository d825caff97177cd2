"""A checksum that comes last: crc32c (RFC 3720), little-endian, of all bytes before it.

Little-endian, because a CRC over data followed by its own CRC is a constant: a receiver checks what it was given in place and copies
nothing.  It guards against a broken relay, disk or memory; against malice there are digests and signatures.
"""

from __future__ import annotations

import struct
from typing import Final

import google_crc32c

TRAILER: Final = struct.Struct("<I")
_RESIDUE: Final = 0x48674BC7  # crc32c(x + little-endian crc32c(x)) for every x


def crc32c(*parts: bytes) -> int:
    """Of the parts, one after the other."""
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return crc


def is_whole(payload: bytes) -> bool:
    """Whether what ends with its checksum is what it was."""
    found: int = google_crc32c.value(payload)
    return found == _RESIDUE
