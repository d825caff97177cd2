"""Timers for many things on one clock that is handed in; moving a timer to later, the usual case, costs no heap operation.

The heap may hold an entry that is too early: when it rings it is put back at the time that holds then.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count
from math import inf
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Alarms(Generic[Key]):
    """At most one timer per key.  `set` is O(1) unless the timer moves to earlier, `ring` O(log n) per entry."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._entry: dict[Key, float] = {}  # time of a key's one valid entry in the heap
        self._heap: list[tuple[float, int, Key]] = []
        self._serial = count()

    def set(self, key: Key, at: float) -> None:
        """Ring for `key` at `at`, and not at the time set before."""
        self._due[key] = at
        if at < self._entry.get(key, inf):
            self._entry[key] = at
            heapq.heappush(self._heap, (at, next(self._serial), key))

    def cancel(self, key: Key) -> None:
        """Do not ring for `key`."""
        self._due.pop(key, None)

    def ring(self, now: float) -> list[Key]:
        """The keys whose time has come, in the order of their times; their timers are used up."""
        rung: list[Key] = []
        while self._heap and self._heap[0][0] <= now:
            at, _, key = heapq.heappop(self._heap)
            if self._entry.get(key) != at:
                continue
            del self._entry[key]
            due = self._due.get(key, inf)
            if due <= now:
                del self._due[key]
                rung.append(key)
            elif due < inf:
                self.set(key, due)
        return rung

    @property
    def wake_at(self) -> float | None:
        """Call `ring` at this time at the latest; None when nothing is set.  It may find nothing due and moves this on."""
        return self._heap[0][0] if self._due else None

    def __contains__(self, key: Key) -> bool:
        return key in self._due
