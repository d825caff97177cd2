"""Bytes as a source of choices, so that every input of a fuzzer is a well-formed story of hostile peers.

An exhausted script gives zeros: a prefix of an input is an input, which lets the fuzzer cut what is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Script:
    """Reads choices off `data`, one or a few bytes each."""

    def __init__(self, data: bytes) -> None:
        self._data, self._n_bytes, self._at = data, len(data), 0

    @property
    def more(self) -> bool:
        """Whether there is anything left."""
        return self._at < self._n_bytes

    def below(self, n: int) -> int:
        """A number of 0..n-1, from as many bytes as n needs."""
        if n > 256:
            return int.from_bytes(self.take(((n - 1).bit_length() + 7) // 8)) % n
        at = self._at
        self._at = at + 1
        return self._data[at] % n if at < self._n_bytes else 0

    def pick(self, items: Sequence[T]) -> T:
        """One of them."""
        return items[self.below(len(items))]

    def take(self, n: int) -> bytes:
        """The next n bytes, filled up with zeros."""
        piece = self._data[self._at : self._at + n]
        self._at += n
        return piece.ljust(n, b"\0")

    def some(self, n: int) -> bytes:
        """The next bytes, at most n."""
        return self.take(max(0, min(n, self._n_bytes - self._at)))

    def rest(self) -> bytes:
        """All that is left."""
        return self.some(self._n_bytes)
