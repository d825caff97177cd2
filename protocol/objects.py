"""How a blob is cut into objects of a store: runs of chunks, each as the very frames that the bus would carry.

So an object is checked like a chunk that was published, frame by frame, and what was begun on one road goes on on the other:
the file on disk knows chunks only.  A part that a receiver wants is the head of an object, up to the end of its last chunk.
No I/O here.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from protocol.bitmap import Bitmap
from protocol.frames import OVERHEAD_BYTES, chunk_length
from protocol.messages import Blob

OBJECT_BYTES: Final = 4 * 2**20
"""A request to a store costs some 50 ms whatever its size, and what breaks is begun again: megabytes, not more."""
MAX_RUN: Final = 64
"""Chunks of one object: four of them are what one grant may name."""

Run = tuple[int, int]
"""(first chunk, how many)"""


def in_objects(blob: Blob) -> Blob:
    """The same blob with an object for a chunk."""
    return replace(blob, chunk=_chunks_each(blob) * blob.chunk, levels=[])


def run_of(blob: Blob, index: int) -> Run:
    """The chunks of object `index`."""
    first = index * _chunks_each(blob)
    return first, min(_chunks_each(blob), blob.n_chunks - first)


def object_of(blob: Blob, chunk: int) -> int:
    """The object that holds a chunk."""
    return chunk // _chunks_each(blob)


def run_bytes(blob: Blob, run: Run) -> int:
    """Length of an object that holds these chunks, which exist."""
    first, n = run
    return min(n * blob.chunk, blob.size - first * blob.chunk) + n * OVERHEAD_BYTES


def frame_bytes(blob: Blob, chunk: int) -> int:
    """Length of one frame."""
    return chunk_length(blob, chunk) + OVERHEAD_BYTES


def complete_objects(blob: Blob, have: Bitmap) -> Bitmap:
    """The objects of which every wanted chunk is here; `have` are the chunks of the blob or of its wanted prefix."""
    found = Bitmap(object_of(blob, len(have) - 1) + 1, full=True)
    for first, n in have.missing():
        for index in range(object_of(blob, first), object_of(blob, first + n - 1) + 1):
            found.discard(index)
    return found


def name_of(blob: Blob, run: Run) -> str:
    """Name of an object: the blob by content, its geometry, and which chunks."""
    return f"{blob.xfer}.{blob.chunk}/{run[0]}-{run[1]}"


def _chunks_each(blob: Blob) -> int:
    return max(1, min(MAX_RUN, OBJECT_BYTES // blob.chunk))
