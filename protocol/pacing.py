"""How fast bulk may flow, and whether at all now: a token bucket on a clock that is handed in.

The idea.  A server's owner may give fedpipe a part of the link, and only at some hours.  Tokens (bytes) come at the configured
rate and at most BURST_S of it pile up.  As long as the bucket is not in debt a chunk may go, whatever its size, and may leave a
debt behind: so the mean is the configured rate for chunks of any size, and a rate below one chunk per second works as well.
Who is closed waits, and looks again every LOOK_S; control messages are none of its business.
"""

from __future__ import annotations

from math import inf
from typing import Final

BURST_S: Final = 0.25
LOOK_S: Final = 1.0
EARLY_S: Final = 1e-3
"""Nobody sleeps for less; the debt is not forgotten."""


class Pace:
    """One direction of one link.  `bytes_per_s` 0 is no cap.  Every call is O(1)."""

    def __init__(self, bytes_per_s: float = 0.0, *, is_open: bool = True) -> None:
        self.is_open = is_open
        self._rate = bytes_per_s or inf
        self._tokens, self._at = 0.0, -inf

    def renew(self, bytes_per_s: float, *, is_open: bool = True) -> None:
        """Another cap, and whether bulk may flow at all, from now on."""
        self._rate, self.is_open = bytes_per_s or inf, is_open

    def wait_s(self, now: float) -> float:
        """Seconds until the next chunk may go; 0: now."""
        if not self.is_open:
            return LOOK_S
        wait_s = 0.0 if self._rate == inf else -self._fill(now) / self._rate
        return wait_s if wait_s > EARLY_S else 0.0

    def most(self, now: float, unit_bytes: int) -> int:
        """Chunks that may go at once; at least one, to be asked when there is nothing to wait for."""
        return 2**32 if self._rate == inf else max(1, int(self._fill(now) // unit_bytes))

    def take(self, n_bytes: int, now: float) -> None:
        """So much goes now."""
        if self._rate < inf:
            self._tokens = self._fill(now) - n_bytes

    def _fill(self, now: float) -> float:
        passed_s = max(0.0, now - self._at)
        self._tokens, self._at = min(BURST_S * self._rate, self._tokens + passed_s * self._rate), now
        return self._tokens
