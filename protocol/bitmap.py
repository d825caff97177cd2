"""Which chunks: a set of small integers that finds its next member or gap without a Python loop.

One byte per chunk instead of one bit: `bytearray.find` is then a memchr, so a 10 GB blob (40,000 chunks) costs 40 kB and
its worst search a microsecond.  On the wire and on disk it is packed, one bit per chunk, the first chunk in the highest bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from protocol.errors import BadMessage

_OUT, _IN = b"\x00", b"\x01"
_FLIP = bytes.maketrans(_OUT + _IN, _IN + _OUT)


class Bitmap:
    """A mutable subset of 0..n-1.  Membership, add, discard and count are O(1)."""

    __slots__ = ("_flags", "count")

    def __init__(self, n: int, *, full: bool = False) -> None:
        self._flags = bytearray(_IN if full else _OUT) * n
        self.count = n if full else 0

    def __len__(self) -> int:
        """The size n of the universe, not the number of members: that is `count`."""
        return len(self._flags)

    def __contains__(self, index: int) -> bool:
        return 0 <= index < len(self._flags) and self._flags[index] == 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitmap) and self._flags == other._flags

    __hash__ = None  # type: ignore[assignment]

    @property
    def complete(self) -> bool:
        """Whether every index is a member."""
        return self.count == len(self._flags)

    def add(self, index: int) -> bool:
        """Put `index` in; says whether it is new.  Raises IndexError outside 0..n-1 (a negative index is our bug)."""
        assert index >= 0
        if self._flags[index]:
            return False
        self._flags[index] = 1
        self.count += 1
        return True

    def discard(self, index: int) -> bool:
        """Take `index` out; says whether it was in.  An index outside 0..n-1 is never in."""
        if index not in self:
            return False
        self._flags[index] = 0
        self.count -= 1
        return True

    def runs(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """The members from `start` on, as (first, count) runs in ascending order; stop iterating before changing it."""
        return self._runs(_IN, _OUT, start)

    def missing(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """The gaps from `start` on, as (first, count) runs in ascending order; stop iterating before changing it."""
        return self._runs(_OUT, _IN, start)

    def take(self, limit: int, start: int = 0) -> list[tuple[int, int]]:
        """Remove the first `limit` members at or after `start` and return them as (first, count) runs."""
        taken: list[tuple[int, int]] = []
        for first, length in self.runs(start):
            if limit == 0:
                break
            n = min(length, limit)
            taken.append((first, n))
            limit -= n
        for first, n in taken:
            self._flags[first : first + n] = bytes(n)
            self.count -= n
        return taken

    def inverted(self) -> Bitmap:
        """The complement, as a new bitmap."""
        other = Bitmap(0)
        other._flags = self._flags.translate(_FLIP)
        other.count = len(self._flags) - self.count
        return other

    def to_bytes(self) -> bytes:
        """Packed: ceil(n / 8) bytes."""
        return np.packbits(np.frombuffer(bytes(self._flags), np.uint8)).tobytes()

    @classmethod
    def from_bytes(cls, n: int, packed: bytes) -> Bitmap:
        """Unpack a subset of 0..n-1.  Raises BadMessage unless there are exactly ceil(n / 8) bytes with no bit beyond n."""
        if len(packed) != -(-n // 8):
            raise BadMessage(f"bitmap of {len(packed)} bytes cannot describe {n} chunks")
        flags = np.unpackbits(np.frombuffer(packed, np.uint8))
        if flags[n:].any():
            raise BadMessage(f"bitmap names chunks beyond the last of {n}")
        bitmap = cls(0)
        bitmap._flags = bytearray(flags[:n].tobytes())
        bitmap.count = int(flags[:n].sum())
        return bitmap

    def _runs(self, inside: bytes, outside: bytes, start: int) -> Iterator[tuple[int, int]]:
        first = self._flags.find(inside, start)
        while first >= 0:
            end = self._flags.find(outside, first)
            if end < 0:
                end = len(self._flags)
            yield first, end - first
            first = self._flags.find(inside, end)
