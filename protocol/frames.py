"""Chunks: how a blob is cut, and the frames that carry the pieces, at 12 bytes each and without msgpack around them.

    magic "fp" | version u8 | 0 | index u32 | bytes ... | crc32c u32 little-endian

The transfer is named by the topic; the checksum (protocol/crc.py) covers everything before it.
"""

from __future__ import annotations

import struct
from typing import Final

from protocol.crc import TRAILER, crc32c, is_whole
from protocol.errors import BadMessage
from protocol.messages import Blob

FRAME_VERSION: Final = 1
MAX_DATA_BYTES: Final = 4 * 2**20
MAX_CHUNKS: Final = 2**20
"""A blob of more chunks is refused: its book-keeping alone would be a megabyte."""
CARRIED_S: Final = 0.1
LEAST_CHUNK_BYTES: Final = 16 * 2**10
"""MAX_CHUNKS of these are the largest update that a coordinator takes."""
OVERHEAD_BYTES: Final = 12
"""What a frame adds to its chunk: a chunk must stay this far, and the topic's length, below the broker's packet limit."""

_MAGIC = b"fp"
_HEADER = struct.Struct(">2sBxI")


def chunk_for(bytes_per_s: float, most: int) -> int:
    """How to cut a blob for a link, 0 if nobody knows it: a power of two that it carries in CARRIED_S, and at most `most` bytes.

    A chunk is what is held at least for each sender, in the broker and as credit, and a thousand of them may have narrow links.
    """
    if not bytes_per_s:
        return most
    carried = max(LEAST_CHUNK_BYTES, int(bytes_per_s * CARRIED_S))
    return min(most, 1 << carried.bit_length() - 1)


def encode_frame(index: int, data: bytes) -> bytes:
    """One chunk as it goes over the bus; one copy of `data`.  `data` is 1 byte to 4 MiB, `index` fits 32 bits."""
    assert 0 < len(data) <= MAX_DATA_BYTES, "a chunk is never empty nor above 4 MiB"
    return b"".join((_header(index), data, TRAILER.pack(checksum(index, data))))


def decode_frame(payload: bytes) -> tuple[int, memoryview]:
    """The chunk's index and a view of its bytes inside `payload`.  Raises BadMessage."""
    if not OVERHEAD_BYTES < len(payload) <= MAX_DATA_BYTES + OVERHEAD_BYTES:
        raise BadMessage(
            f"a chunk frame of {len(payload)} bytes: expected {OVERHEAD_BYTES + 1} bytes to 4 MiB", "bad_frame"
        )
    magic, version, index = _HEADER.unpack_from(payload)
    if magic != _MAGIC:
        raise BadMessage(f"not a chunk frame: it begins with {magic!r}", "bad_frame")
    if version != FRAME_VERSION:
        raise BadMessage(
            f"chunk frame version {version} is not {FRAME_VERSION}: upgrade the older side", "wrong_version"
        )
    if not is_whole(payload):
        raise BadMessage(f"chunk {index} was damaged on its way: checksum mismatch", "bad_frame")
    return index, memoryview(payload)[_HEADER.size : -TRAILER.size]


def checksum(index: int, data: bytes) -> int:
    """The crc32c of a frame: of its header and its bytes."""
    return crc32c(_header(index), data)


def carried_checksum(payload: bytes) -> int:
    """The checksum that a frame carries; `decode_frame` has verified it."""
    (crc,) = TRAILER.unpack_from(payload, len(payload) - TRAILER.size)
    return int(crc)


def _header(index: int) -> bytes:
    return _HEADER.pack(_MAGIC, FRAME_VERSION, index)


def chunk_length(blob: Blob, index: int) -> int:
    """Bytes of chunk `index`: `blob.chunk`, less for the last.  0 or below: there is no such chunk."""
    return min(blob.chunk, blob.size - index * blob.chunk)


def n_prefix_chunks(blob: Blob, size: int | None = None) -> int:
    """Chunks that hold the first `size` bytes (None: all).  Raises BadMessage unless 1 <= size <= blob.size."""
    wanted = blob.size if size is None else size
    if not 1 <= wanted <= blob.size or blob.n_chunks > MAX_CHUNKS:
        raise BadMessage(f"cannot take {wanted} bytes of a blob of {blob.size} in {blob.n_chunks} chunks")
    return -(-wanted // blob.chunk)
