"""Which transfers begin, and which wait in line: begun are so many as can use all the credit twice over.

The idea.  Credit is what bounds a receiver (protocol/transfer.py).  When a thousand peers offer at once and all are begun, each gets
a few chunks in turn: all are half done for the whole time, each holds a file, a bitmap and a place in every queue, and what was
hashed on its way is hashed again at the end, because nobody keeps a thousand files open.  Begun one behind the other they
take as long together, and hold little.

A transfer has its place for as long as it moves.  Who brought nothing for STILL_S goes on, but keeps nobody waiting any more:
it may be on a slow link, or gone.  No I/O and no clock here.  Cost: O(places) when one is looked for, O(1) for a chunk.
"""

from __future__ import annotations

from typing import Final, NamedTuple

OVERBOOKED: Final = 2
"""How many times over those that are begun could use all the credit: some always wait for a round trip."""
STILL_S: Final = 2.0

Key = tuple[str, str]
"""Peer and transfer."""


class _Place(NamedTuple):
    n_bytes: int
    moved_at: float


class Line:
    """The line of one receiver, which gives credit for `budget_bytes` at a time."""

    def __init__(self, budget_bytes: int) -> None:
        self.wake_at: float | None = None
        """When to look again, because a place may have come free; None when nobody waits."""
        self._room_bytes = OVERBOOKED * budget_bytes
        self._waiting: dict[Key, int] = {}
        self._places: dict[Key, _Place] = {}

    def join(self, key: Key, n_bytes: int) -> None:
        """Stand at the end of the line with a transfer that can use credit for so many bytes at a time."""
        self._waiting[key] = n_bytes

    def leave(self, key: Key) -> None:
        """It has ended, or is not wanted any more."""
        self._waiting.pop(key, None)
        self._places.pop(key, None)

    def moved(self, key: Key, now: float) -> None:
        """It brought a chunk."""
        if (place := self._places.get(key)) is not None:
            self._places[key] = _Place(place.n_bytes, now)

    def begin(self, now: float) -> list[Key]:
        """Those that may begin now, in the order in which they came."""
        self._places = {key: place for key, place in self._places.items() if now - place.moved_at < STILL_S}
        used_bytes, begun = sum(place.n_bytes for place in self._places.values()), []
        for key, n_bytes in self._waiting.items():
            if used_bytes and used_bytes + n_bytes > self._room_bytes:
                break
            used_bytes += n_bytes
            begun.append(key)
        for key in begun:
            self._places[key] = _Place(self._waiting.pop(key), now)
        self.wake_at = now + STILL_S if self._waiting else None
        return begun
