"""Which transfers begin, and which wait in line: begun are so many as can use all the credit twice over.

The idea.  Credit is what bounds a receiver (protocol/transfer.py).  When a thousand peers offer at once and all are begun, each gets
a few chunks in turn: all are half done for the whole time, each holds a file, a bitmap and a place in every queue, and what was
hashed on its way is hashed again at the end, because nobody keeps a thousand files open.  Begun one behind the other they
take as long together, and hold little.

A transfer keeps its place for as long as it moves or waits for credit.  Who has credit and brought nothing for STILL_S goes on, but
keeps nobody waiting any more: it may be on a slow link, or gone.  No I/O and no clock here.  Cost: O(places) when one is
looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

OVERBOOKED: Final = 2
"""How many times over those that are begun could use all the credit: some always wait for a round trip."""
STILL_S: Final = 2.0

Key = tuple[str, str]
"""Peer and transfer."""


class Line:
    """The line of one receiver, which gives credit for `budget_bytes` at a time.

    `silent_since(key)` tells since when a transfer has credit and brings nothing; None when it has none.
    """

    def __init__(self, budget_bytes: int, silent_since: Callable[[Key], float | None]) -> None:
        self.wake_at: float | None = None
        """When to look again, because a place may have come free; None when nobody waits."""
        self._room_bytes = OVERBOOKED * budget_bytes
        self._silent_since = silent_since
        self._waiting: dict[Key, int] = {}
        self._places: dict[Key, int] = {}

    def join(self, key: Key, n_bytes: int) -> None:
        """Stand at the end of the line with a transfer that can use credit for so many bytes at a time."""
        self._waiting[key] = n_bytes

    def leave(self, key: Key) -> None:
        """It has ended, or is not wanted any more."""
        self._waiting.pop(key, None)
        self._places.pop(key, None)

    def begin(self, now: float) -> list[Key]:
        """Those that may begin now, in the order in which they came."""
        self._places = {key: n for key, n in self._places.items() if not self._is_still(key, now)}
        used_bytes, begun = sum(self._places.values()), []
        for key, n_bytes in self._waiting.items():
            if used_bytes and used_bytes + n_bytes > self._room_bytes:
                break
            used_bytes += n_bytes
            begun.append(key)
        for key in begun:
            self._places[key] = self._waiting.pop(key)
        self.wake_at = now + STILL_S if self._waiting else None
        return begun

    def _is_still(self, key: Key, now: float) -> bool:
        since = self._silent_since(key)
        return since is not None and now - since >= STILL_S
