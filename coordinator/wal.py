"""What SQLite does not tell: whether a write-ahead log lost commits behind a damaged place.

SQLite reads the log up to the first frame whose checksum is wrong and takes the rest for a write that a power cut tore: right,
for at most one commit, because each is synced before the next begins.  Two or more commits behind that frame were durable and
had been answered for.  To go on without them, silently, is what a coordinator must not do, so it looks before SQLite does.

Format: https://www.sqlite.org/fileformat2.html#walformat.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final, NamedTuple

_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682
_MASK: Final = 0xFFFFFFFF


class Torn(NamedTuple):
    """The log is readable up to `offset` (bytes); `n_commits` behind it are not."""

    offset: int
    n_commits: int


def torn(path: Path) -> Torn | None:
    """Where a write-ahead log is damaged; None when it is whole, torn in its last commit only, or not there.

    Cost: one pass in Python, about 0.03 s per MB; a log has 4 MB unless one commit was larger.
    """
    data = path.read_bytes() if path.exists() else b""
    if len(data) < _HEADER.size + _FRAME.size:
        return None
    magic, _, page, _, salt_1, salt_2, *sums = _HEADER.unpack_from(data)
    endian = ">" if magic & 1 else "<"
    size = _FRAME.size + page
    valid = magic | 1 == _MAGIC | 1 and _checksum(data[:24], (0, 0), endian) == tuple(sums)
    if not valid:  # then nothing of it is read
        n = _commits_of_first(data)
        return Torn(0, n) if n > 1 else None
    running, end, n_behind = (sums[0], sums[1]), 0, 0
    for at in range(_HEADER.size, len(data) - size + 1, size):
        _, commit, one, two, *found = _FRAME.unpack_from(data, at)
        ours = (one, two) == (salt_1, salt_2)
        if not end:
            running = _checksum(data[at : at + 8], running, endian)
            running = _checksum(data[at + _FRAME.size : at + size], running, endian)
            end = 0 if ours and running == tuple(found) else at
        n_behind += bool(end and ours and commit)
    return Torn(end, n_behind) if n_behind > 1 else None


def _commits_of_first(data: bytes) -> int:
    """Commits of the newest log in a file whose header is damaged: frames that carry the salts of the first one."""
    for page in (4096, 1024, 512, 2048, 8192, 16384, 32768, 65536):
        places = range(_HEADER.size, len(data) - _FRAME.size - page + 1, _FRAME.size + page)
        frames = [_FRAME.unpack_from(data, at) for at in places]
        same = [frame for frame in frames if frame[2:4] == frames[0][2:4]]
        if len(same) > 1:
            return sum(frame[1] > 0 for frame in same)
    return 0


def _checksum(data: bytes, sums: tuple[int, int], endian: str) -> tuple[int, int]:
    one, two = sums
    for x, y in struct.iter_unpack(f"{endian}2I", data):
        one = (one + x + two) & _MASK
        two = (two + y + one) & _MASK
    return one, two
