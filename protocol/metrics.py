"""Figures for Prometheus: kept as plain numbers while a daemon works, put into words when somebody asks.

Nothing is registered anywhere and nothing is global: a daemon counts in numbers of its own, and a scrape turns them into
families of samples (OpenMetrics' and Prometheus' naming: base units, `_total` for what only grows).  So counting costs an
addition, and the prometheus-client package, 1.5 MB, is loaded by the first scrape of a daemon that is scraped at all.

The coordinator answers in its API; an agent has no web server, and `Door` is as much of one as a scrape needs.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prometheus_client import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PATH: Final = "/metrics"
PATIENCE_S: Final = 10.0
MAX_AT_ONCE: Final = 8

Samples = Mapping[Any, float] | float
"""Values by the values of their labels (a tuple of text); one number for a figure without labels."""

logger = logging.getLogger(__name__)


class Histogram:
    """How often values up to each bound were seen.  O(log bounds) per value."""

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts by upper bound, the last one for all."""
        found, so_far = [], 0
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found


def gauge(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    """A figure that goes up and down."""
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def counter(name: str, text: str, samples: Samples, *labels: str) -> Metric:
    """A figure that only grows while the process lives; its name ends in `_total`."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def histogram(name: str, text: str, samples: Mapping[Any, Histogram], *labels: str) -> Metric:
    """Distributions, by the values of their labels."""
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=labels)
    for values, found in samples.items():
        family.add_metric(list(values), found.buckets(), found.sum)
    return family


def _filled(family: Metric, samples: Samples) -> Metric:
    for values, value in (samples if isinstance(samples, Mapping) else {(): samples}).items():
        family.add_metric(list(values), value)  # type: ignore[attr-defined]  # of both kinds that come here
    return family


def exposition(families: Iterable[Metric]) -> bytes:
    """Everything as text, with the process's own figures (memory, processor time, open files)."""
    from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

    found = list(families)

    class Once:
        """The families of this scrape."""

        @staticmethod
        def collect() -> Iterable[Metric]:
            return found

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    ProcessCollector(registry=registry)
    return generate_latest(registry)


# ------------------------------------------------------------------------------------------------------- the small door


def place_of(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:9464` or `[::1]:9464`.  Raises ValueError with the way to write it."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError(f'metrics = "{text}" is no address: write it as "127.0.0.1:9464", or leave it empty')
    return host.strip("[]"), int(port)


class Door:
    """Answers GET /metrics on an address of its own (RFC 9112, one request per connection), and nothing else."""

    def __init__(self, told: Callable[[], Iterable[Metric]]) -> None:
        self._told = told
        self._n_open = 0
        self.port = 0

    async def serve(self, place: str) -> None:
        """Answer until cancelled; return at once for no place.  An address that cannot be had is said, and costs nothing else."""
        if not place:
            return
        host, port = place_of(place)
        try:
            server = await asyncio.start_server(self._answer, host, port, limit=8192)
        except OSError as error:
            text = "metrics cannot listen on %s (%s): stop what uses it, or choose another address"
            logger.error(text, place, error.strerror or error, extra={"action": "metrics_refused"})
            return
        self.port = server.sockets[0].getsockname()[1]
        logger.info("metrics at %s port %d", host, self.port, extra={"action": "metrics_up"})
        async with server:
            await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._n_open += 1
        try:
            if self._n_open <= MAX_AT_ONCE:
                with suppress(TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
                    async with asyncio.timeout(PATIENCE_S):
                        head = await reader.readuntil(b"\r\n\r\n")
                        writer.write(self._response(head))
                        await writer.drain()
        finally:
            self._n_open -= 1
            writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path != PATH.encode():
            status, body = "404 Not Found", b"metrics are at /metrics\n"
        elif method not in {b"GET", b"HEAD"}:
            status, body = "405 Method Not Allowed", b"only GET\n"
        else:
            status, body = "200 OK", exposition(self._told())
        lines = (
            f"HTTP/1.1 {status}",
            f"Content-Type: {CONTENT_TYPE}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if method == b"HEAD" else body)
