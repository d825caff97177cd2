"""The embedded broker: amqtt (pure Python, MQTT 3.1.1) with its faults that matter to a fleet put right.

It costs about 10 CPU seconds per GB, fifteen times mosquitto, and never ends a silent client (only a closed connection fires a
will): enough for a demo on one machine, and for nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import UserDict
from collections.abc import Iterator
from typing import Any

from amqtt.adapters import ReaderAdapter
from amqtt.broker import Broker

QUIET = ("amqtt", "transitions")
MQTT_311 = 4
REFUSED_VERSION = bytes([0x20, 3, 0, 132, 0])
"""A CONNACK of MQTT 5 with reason 132 and no properties."""


class EmbeddedBroker(Broker):  # type: ignore[misc]  # amqtt is not typed
    """amqtt's broker on one listener, anonymous, without topic filtering and without $SYS."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(
            {
                "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
            }
        )
        self._subscriptions = _Steady()

    async def _client_connected(self, listener_name: str, reader: Any, writer: Any) -> None:
        # amqtt looks at the version only after it has misread the rest of a newer CONNECT, and may wait for ever in there.
        opening = _Opening(reader)
        try:
            version = await opening.version()
        except (EOFError, ConnectionError):
            version = 0
        if version == MQTT_311:
            await super()._client_connected(listener_name, opening, writer)
            return
        with contextlib.suppress(ConnectionError):
            writer.write(REFUSED_VERSION)
            await writer.close()

    async def _publish_retained_messages_for_subscription(self, subscription: tuple[str, int], session: Any) -> None:
        # amqtt also calls this for every new client with everybody's filters, and so tells each agent about all others.
        if any(own is session for own, _ in self._subscriptions.get(subscription[0], ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)


class _Opening(ReaderAdapter):  # type: ignore[misc]
    """A stream whose first bytes can be looked at before they are read."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._seen = b""

    async def version(self) -> int:
        """The protocol level of the CONNECT packet to come, which stands behind its length and the name "MQTT"."""
        start = await self._reader.read(2)
        while start[-1] & 0x80:
            start += await self._reader.read(1)
        self._seen = start + await self._reader.read(7)
        return self._seen[-1]

    async def read(self, n: int = -1) -> bytes:
        """See ReaderAdapter."""
        seen, self._seen = self._seen[:n], self._seen[n:]
        return seen if len(seen) == n else seen + await self._reader.read(n - len(seen))

    def feed_eof(self) -> None:
        """See ReaderAdapter."""
        self._reader.feed_eof()


class _Steady(UserDict[str, list[Any]]):
    """A dict that may change while somebody walks over it; amqtt awaits in the middle of such walks."""

    def __iter__(self) -> Iterator[str]:
        return iter([*self.data])


async def serve(host: str, port: int) -> None:
    """Run until SIGTERM or SIGINT, then end the process with 0; print "ready" when clients may come."""
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = EmbeddedBroker(host, port)
    await broker.start()
    print("ready", flush=True)
    await stop.wait()
    # amqtt's own shutdown can spin for ever when clients are connected or returning, and there is nothing to save.
    os._exit(0)
