"""What a stranger can cost the window for servers: so many requests, so many connections, so long each.

By address, where an IPv6 address is its network of 64 bits: one machine has all of those.  The address is that of the connection;
what a request says of where it was forwarded from is a stranger's word.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

RATE_PER_S: Final = 2.0
BURST: Final = 120
MAX_ADDRESSES: Final = 10_000
MAX_AT_ONCE: Final = 512
"""Connections."""
MAX_FROM_ONE: Final = 64
"""Of them from one address: a whole site may be behind it."""
PATIENCE_S: Final = 20.0
"""Of one connection, from its beginning to its end; a request takes a fraction of a second, and comes alone."""


def neighbourhood(address: str) -> str:
    """What counts as one address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4 or found.ipv4_mapped:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))


class Rate:
    """Requests per address: a bucket of BURST that fills at RATE_PER_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, address: str) -> float:
        """0 when a request is fine now, else how many seconds to wait."""
        now, place = self._clock(), neighbourhood(address)
        left, at = self._buckets.pop(place, (float(BURST), now))
        left = min(float(BURST), left + (now - at) * RATE_PER_S)
        if len(self._buckets) >= MAX_ADDRESSES:
            del self._buckets[next(iter(self._buckets))]  # who has been quiet longest
        self._buckets[place] = (max(0.0, left - 1), now)
        return 0.0 if left >= 1 else (1 - left) / RATE_PER_S


def _bounded(max_from_one: int, patience_s: float) -> type[H11Protocol]:
    """A protocol for uvicorn that ends connections which are too many from one address, or too old."""
    counts: Counter[str] = Counter()

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._place = neighbourhood(self.client[0] if self.client else "")
            counts[self._place] += 1
            self._over = self.loop.call_later(patience_s, transport.abort)
            if counts[self._place] > max_from_one:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._over.cancel()
            counts[self._place] -= 1
            if not counts[self._place]:
                del counts[self._place]

    return Bounded


def listening(max_from_one: int = MAX_FROM_ONE, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Settings of a listener for strangers (coordinator/https.py)."""
    return {
        "http": _bounded(max_from_one, patience_s),
        "limit_concurrency": MAX_AT_ONCE,
        "proxy_headers": False,
    }
