"""How many chunks may be out to one sender: a window that follows its link, and no further.

The idea.  Credit that is out fills the link and then the queue in front of it; too little leaves a long link idle, too much only
makes the queue longer.  As in BBR (Cardwell et al., 2016) each chunk gives a sample of the rate and of the time from its credit to
its arrival, and what is of use is twice the largest rate times the shortest time.  While the window is what holds the link back
that is a doubling per round trip; once it is not, the window stays.  It follows a narrow link down to LEAST as well: what lies in the queue
before one is credit that a hundred others could use.  A silence says that something did not take so much: the
window is halved, and from then on grows by one per window that works (additive increase, multiplicative decrease).
"""

from __future__ import annotations

from math import inf
from typing import Final, NamedTuple

GAIN: Final = 2.0
LEAST: Final = 2
"""One chunk on its way and one behind it."""
SLACK_S: Final = 0.1
"""What may lie in queues beside what is on its way: processes that share a machine are that late now and then."""
RATE_KEPT: Final = 0.998
"""Of the largest rate, per chunk: an hour ago the link was another one."""


class Credit(NamedTuple):
    """What one grant was given at: when, and how many chunks of this sender were here then."""

    at: float
    n_here: int


class Window:
    """`size` is in chunks, from 1; `start` is what a link has until it is known, `most` what none exceeds.  Every call is O(1)."""

    __slots__ = ("_known_at", "_n_here", "_rate", "_rtt_s", "_threshold", "most", "size", "start")

    def __init__(self, start: int, most: int) -> None:
        self.start, self.most = start, most
        self._n_here = 0
        self.reset()

    def reset(self) -> None:
        """The link is new."""
        self.size = float(self.start)
        self._known_at = self._n_here + self.start  # before a whole window is here its rate says nothing
        self._rate = 0.0  # chunks per second, the most of late
        self._rtt_s = inf  # the least from credit to chunk
        self._threshold = inf  # what did not work once

    def credit(self, now: float) -> Credit:
        """To be kept with chunks that are asked for now."""
        return Credit(now, self._n_here)

    def arrived(self, credit: Credit | None, now: float, share: float) -> None:
        """A chunk is here, with its credit if it had any; `share` is what this sender may have of all that may be out."""
        self._n_here += 1
        if credit is not None:
            took_s = max(now - credit.at, 1e-6)
            self._rtt_s = min(self._rtt_s, took_s)
            self._rate = max(RATE_KEPT * self._rate, (self._n_here - credit.n_here) / took_s)
        useful = GAIN * self._rate * (self._rtt_s + SLACK_S) if self._rate else 0.0
        step = 1.0 if self.size < self._threshold else 1 / self.size
        least = min(self.start, LEAST) if self._n_here > self._known_at else self.start
        self.size = min(self.size + step, max(least, min(self.most, useful, share)))

    def silent(self) -> None:
        """Nothing of what was out came in time."""
        self.size = self._threshold = max(1.0, self.size / 2)
        self._rate = 0.0
