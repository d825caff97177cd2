"""One blob on its way as its receiver keeps it: what is wanted, what is out, how patient to be; and whose turn it is at its sender.

The bookkeeping of protocol/transfer.py without its rules: nothing here knows of budgets, queues or timers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from protocol.bitmap import Bitmap
from protocol.messages import Blob
from protocol.windows import Credit, Window


@dataclass(slots=True, eq=False)
class Sender:
    """One sender: its window, what it owes over all its blobs, and their turn."""

    name: str
    window: Window
    n_out: int = 0
    hungry: bool = False  # stands in the queue
    turn: deque[Pull] = field(default_factory=deque)

    def next(self) -> Pull | None:
        """The first in turn that wants credit; it is brought to the front."""
        for _ in range(len(self.turn)):
            if self.turn[0].wanted.count:
                return self.turn[0]
            self.turn.rotate(-1)
        return None


@dataclass(slots=True, eq=False)
class Pull:
    """One blob from one sender.  A chunk that is neither wanted nor out is here already."""

    peer: Sender
    blob: Blob
    size: int | None
    wanted: Bitmap
    listening: bool
    moved_at: float  # last new chunk, or first credit
    unit_bytes: int  # what a chunk is charged at
    out: dict[int, Credit] = field(default_factory=dict)
    from_index: int = 0  # where to ask on; at the end once more from the first that is wanted
    front: int = 0  # behind the last chunk that the broadcast has come to
    overrun_bytes: int = 0
    tries: int = 0
    pace_s: float = 0.0  # mean gap between chunks

    def take(self, n: int, credit: Credit) -> list[tuple[int, int]]:
        """Ask for the next `n` wanted chunks; their ranges (first, length)."""
        if not self.out:
            self.moved_at = credit.at
        ranges = self.wanted.take(n, self.from_index) or self.wanted.take(n, 0)
        for first, length in ranges:
            self.out.update(dict.fromkeys(range(first, first + length), credit))
            self.from_index = first + length
        return ranges

    def moved(self, now: float) -> None:
        """A new chunk is here."""
        gap_s = now - self.moved_at
        self.pace_s += (gap_s - self.pace_s) / (8 if self.pace_s else 1)
        self.moved_at = now
        self.tries = 0

    def patience_s(self, least_s: float, most_s: float) -> float:
        """How long to wait for the next chunk: four mean gaps, or a slow link is asked for all twice; doubled with each silence."""
        return min(max(least_s, 4 * self.pace_s) * 2.0**self.tries, most_s)

    def passed_over(self, index: int) -> int:
        """The broadcast is at `index`, in front of which nothing comes any more: chunks whose credit that takes back."""
        passed = [] if index == self.front else [out for out in self.out if self.front <= out < index]
        for gap in passed:
            del self.out[gap]
            self.wanted.add(gap)
        self.front = index + 1
        return len(passed)

    def want_again(self) -> None:
        """All that is out is wanted once more; the pool takes the credit back."""
        for index in self.out:
            self.wanted.add(index)
        if self.out:
            self.from_index = min(self.from_index, *self.out)
