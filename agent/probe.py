"""How fast is the uplink, before anything was uploaded?

The broker acknowledges a QoS 1 message when it has all of it, so the time to the acknowledgement of one chunk, less that of
a message of one byte, is the time of the chunk's bytes on the way.  Nobody subscribes to where it goes, so the broker forgets it at
once: a fleet that comes back probes all its links within half a minute, and handing that on would be a quarter of a gigabyte for a
thousand agents, which waits in the broker for a coordinator that throws it away.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from agent.profiler import Link
from protocol.bus import Bus, BusError

MIN_S: Final = 1e-3
"""Nothing shorter is believed: the two acknowledgements alone differ by as much."""
AGAIN_S: Final = 3600.0


class Probe:
    """Measures at most once an hour, and only while no update has told `link` how fast it is.  `measured` is called behind it."""

    def __init__(
        self, bus: Bus, topic: str, link: Link, clock: Callable[[], float], measured: Callable[[], Awaitable[None]]
    ) -> None:
        self._bus, self._topic, self._link, self._clock, self._measured = bus, topic, link, clock, measured
        self._asked_at = -AGAIN_S
        self._asked: asyncio.Queue[tuple[int, float]] = asyncio.Queue()

    def ask(self, n_bytes: int, within_s: float) -> None:
        """There is a connection: measure with so many bytes (0: not at all), at a random instant of the next `within_s`."""
        now = self._clock()
        if n_bytes and not self._link.up_bytes_per_s and now - self._asked_at >= AGAIN_S:
            self._asked_at = now
            self._asked.put_nowait((n_bytes, within_s))

    async def run(self) -> None:
        """Measure when asked, until cancelled."""
        while True:
            n_bytes, within_s = await self._asked.get()
            await asyncio.sleep(random.uniform(0, within_s))
            seconds = None if self._link.up_bytes_per_s else await uplink_seconds(self._bus, self._topic, n_bytes)
            if seconds is not None and not self._link.up_bytes_per_s:
                self._link.up(n_bytes, seconds)
                await self._measured()


async def uplink_seconds(bus: Bus, topic: str, n_bytes: int) -> float | None:
    """Seconds that `n_bytes` take to the broker, None when they did not get there.  It waits, so give it a task of its own."""
    try:
        took = [await _publish(bus, topic, size) for size in (1, n_bytes)]
    except BusError:
        return None
    return max(MIN_S, took[1] - took[0])


async def _publish(bus: Bus, topic: str, size: int) -> float:
    payload = os.urandom(size)  # a link that compresses must not look faster than it is for updates
    started = time.monotonic()
    await bus.publish(topic, payload, qos=1)
    return time.monotonic() - started
