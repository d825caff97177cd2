"""Is this daemon getting anywhere?  The watchdog is fed only while it is, so that systemd starts one anew that is not.

A loop that is blocked feeds no watchdog anyway.  Two other ways to be dead while looking alive are seen here: a consumer that
does not come back from one piece of work (a disk call that hangs, a lock), and a loop that runs, but ever later (something
else eats the thread).  A disk that *refuses* is not one of them: the daemon waits for it, and a restart would only forget
what waits.  What the agent's training child does is no concern of this: its supervisor watches over it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from protocol.daemon import notify
from protocol.metrics import Histogram

LOOK_S: Final = 1.0
STUCK_S: Final = 300.0
"""For one piece of work; the slowest honest one is a commit on a disk that is busy with something else."""
LATE_S: Final = 20.0
"""How late the loop may come to itself, in each of the last LOOKS looks, before that counts as an illness."""
LOOKS: Final = 3

logger = logging.getLogger(__name__)


class Health:
    """One daemon's.  `excused` says why it may be waiting, empty when there is no such reason; `clock` is monotonic seconds."""

    def __init__(
        self,
        excused: Callable[[], str] = lambda: "",
        *,
        stuck_s: float = STUCK_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lag_s = Histogram(0.001, 0.005, 0.025, 0.1, 0.5, 2.0, 10.0)
        self._excused, self._stuck_s, self._clock = excused, stuck_s, clock
        self._began_at: float | None = None
        self._late: list[float] = []
        self._told = ""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """The consumer is at one piece of work for as long as this block lasts."""
        self._began_at = self._clock()
        yield
        self._began_at = None

    @property
    def is_busy(self) -> bool:
        """Whether the consumer is at work, or was broken off in the middle of it."""
        return self._began_at is not None

    @property
    def fault(self) -> str:
        """What is wrong, empty when nothing is."""
        now = self._clock()
        if self._began_at is not None and now - self._began_at > self._stuck_s and not self._excused():
            return f"one piece of work has taken {now - self._began_at:.0f} s and is not done"
        if len(self._late) == LOOKS and min(self._late) > LATE_S:
            return f"the event loop comes {self._late[-1]:.0f} s late"
        return ""

    def ok(self) -> bool:
        """Whether the watchdog may be fed; the log and systemd's status line hear of each change once."""
        fault = self.fault
        if bool(fault) != bool(self._told):
            if fault:
                logger.error("not healthy: %s", fault, extra={"action": "unhealthy"})
                notify(STATUS=f"not healthy: {fault}")
            else:
                logger.warning("healthy again", extra={"action": "healthy"})
                notify(STATUS="healthy again")
        self._told = fault
        return not fault

    async def watch(self) -> None:
        """Measure how late the loop comes to itself, until cancelled."""
        while True:
            asked_at = self._clock()
            await asyncio.sleep(LOOK_S)
            late_s = max(0.0, self._clock() - asked_at - LOOK_S)
            self.lag_s.observe(late_s)
            self._late = [*self._late, late_s][-LOOKS:]
            self.ok()  # for the log, also where there is no watchdog
