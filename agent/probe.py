"""How fast is the uplink, before anything was uploaded?

The broker acknowledges a QoS 1 message when it has all of it, so the time to the acknowledgement of one chunk, less that of
a message of one byte, is the time of the chunk's bytes on the way.  It goes where chunks go, as a transfer that nobody asked
for: the coordinator drops such a chunk unread, and no access rule is needed beyond those for uploads.
"""

from __future__ import annotations

import os
import time
from typing import Final

from protocol.bus import Bus, BusError

PROBE: Final = "0" * 32
"""The transfer's name."""
MIN_S: Final = 1e-3
"""Nothing shorter is believed: the two acknowledgements alone differ by as much."""


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
