"""One thread or all of them?  The clock decides, again and again.

On idle processors two threads are 1.6 times as fast as one; beside other programs they wait for each other at every small
matrix product, and a step of 0.05 s was seen to take 7 s.  So the rival setting gets a short trial now and then, ever more rarely
while it loses, and a setting that suddenly turns slow is left at once.  Results do not depend on the choice: they were bitwise equal.
"""

from __future__ import annotations

from typing import Final

TRIAL: Final = 3
FIRST_WAIT, LAST_WAIT = 10, 400


class Threads:
    """Says how many threads the next step should use and learns from what steps took.  No clock of its own."""

    def __init__(self, n_cpus: int) -> None:
        self._using, self._rival = 1, n_cpus
        self._usual_s = 0.0
        self._trial: list[float] = []
        self._wait = self._left = FIRST_WAIT

    @property
    def n(self) -> int:
        """Threads for the next step."""
        return self._using if self._left or self._rival == self._using else self._rival

    def took(self, seconds: float) -> None:
        """Learn how long the step with `n` threads took."""
        if self._rival == self._using:
            return
        if not self._left:
            self._try(seconds)
        elif self._using > 1 and seconds > 3 * self._usual_s:
            self._switch(self._usual_s)
        else:
            self._usual_s = 0.8 * self._usual_s + 0.2 * seconds if self._usual_s else seconds
            self._left -= 1

    def _try(self, seconds: float) -> None:
        self._trial.append(seconds)
        if seconds < 1.5 * self._usual_s and len(self._trial) < TRIAL:
            return
        if max(self._trial) < 0.95 * self._usual_s:
            self._switch(max(self._trial))
        else:
            self._wait = self._left = min(2 * self._wait, LAST_WAIT)
        self._trial = []

    def _switch(self, usual_s: float) -> None:
        self._using, self._rival = self._rival, self._using
        self._usual_s = usual_s
        self._wait = self._left = 4 * FIRST_WAIT
