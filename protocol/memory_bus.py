"""The bus without a broker: the same contract inside one process, with a switch for everything a network can do to it.

It is a real implementation, not a mock: simulations, tests and embedders run whole fleets on it.  Delivery is immediate and in
order.  A client that lost its connection returns at the loop's next turn unless it is held.  A stopped broker forgets its
retained messages, as one without persistence does.  Of two clients with one id the newer stays and the older never returns.

    broker = MemoryBroker()
    async with broker.bus("coordinator") as bus: ...
    broker.cut("agent-1")            # the broker publishes its will; it sees Disconnected and comes back
    broker.hold("agent-1")           # the same, but it stays away until broker.release("agent-1")
    broker.stop(); broker.start()    # nobody is connected, then everybody is; no wills, nothing retained
    broker.drop = lambda topic, payload: topic.endswith("/d/" + xfer) and random() < 0.02
    broker.deny = lambda client_id, topic: client_id not in topic
"""

# ruff: noqa: SLF001 - broker and bus are two halves of one thing

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from protocol.bus import Connected, Denied, Disconnected, Happening, NotConnected, Received, TooLarge, Will
from protocol.mqtt_reasons import NOT_AUTHORIZED


def matches(wanted: str, topic: str) -> bool:
    """Whether the MQTT filter `wanted` covers `topic`: `+` is any one level, a final `#` any number, none included."""
    levels, given = wanted.split("/"), topic.split("/")
    for i, level in enumerate(levels):
        if level == "#":
            return True
        if i >= len(given) or level not in {"+", given[i]}:
            return False
    return len(levels) == len(given)


class MemoryBroker:
    """The broker and the network around it.  Not thread-safe: one event loop."""

    def __init__(self, *, max_packet_bytes: int = 2**20, receive_maximum: int = 20) -> None:
        self.drop: Callable[[str, bytes], bool] = lambda _topic, _payload: False
        self.deny: Callable[[str, str], bool] = lambda _client_id, _topic: False
        self.welcome = Connected(5, max_packet_bytes, receive_maximum, session_present=False)
        self.retained: dict[str, bytes] = {}
        self._running = True
        self._held: set[str] = set()
        self._clients: dict[str, MemoryBus] = {}

    def bus(self, client_id: str, will: Callable[[], Will | None] = lambda: None) -> MemoryBus:
        """A bus that lives at this broker once it is entered."""
        return MemoryBus(self, client_id, will)

    def stop(self) -> None:
        """The broker dies."""
        self._running = False
        self.retained.clear()
        for client in [*self._clients.values()]:
            client._disconnect("the broker was stopped")

    def start(self) -> None:
        """The broker is back, empty."""
        self._running = True
        for client_id in [*self._clients]:
            self._admit(client_id)

    def cut(self, client_id: str) -> None:
        """One client loses its connection without a goodbye."""
        self._bury(self._clients[client_id], "the connection was cut")
        asyncio.get_running_loop().call_soon(self._admit, client_id)

    def hold(self, client_id: str) -> None:
        """As `cut`, and the client cannot return before `release`; one that is not there yet cannot come."""
        self._held.add(client_id)
        if client_id in self._clients:
            self._bury(self._clients[client_id], "the connection is held")

    def release(self, client_id: str) -> None:
        """The end of `hold`."""
        self._held.discard(client_id)
        self._admit(client_id)

    def route(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish: store or clear what is to be retained, and deliver to everybody who listens."""
        if self.drop(topic, payload):
            return
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for client in [*self._clients.values()]:
            client._receive(Received(topic, payload, retained=False))

    def _join(self, client: MemoryBus) -> None:
        older = self._clients.get(client.client_id)
        self._clients[client.client_id] = client
        if older is not None:
            self._bury(older, "another client connected with the same client id")
        self._admit(client.client_id)
        if not client.connected:
            client._disconnect("the broker does not run, or the connection is held")

    def _leave(self, client: MemoryBus) -> None:
        if self._clients.get(client.client_id) is client:
            del self._clients[client.client_id]

    def _admit(self, client_id: str) -> None:
        client = self._clients.get(client_id)
        if client is not None and self._running and client_id not in self._held and not client.connected:
            client._connect()

    def _bury(self, client: MemoryBus, reason: str) -> None:
        was_connected = client.connected
        client._disconnect(reason)
        if was_connected and (will := client._testament):
            self.route(will.topic, will.payload, retain=will.retain)


class MemoryBus:
    """See protocol.bus.Bus for the contract; made by MemoryBroker.bus."""

    def __init__(self, broker: MemoryBroker, client_id: str, will: Callable[[], Will | None]) -> None:
        self.client_id = client_id
        self.connected = False
        self._broker = broker
        self._will = will
        self._testament: Will | None = None
        self._filters: dict[str, None] = {}
        self._told = ""
        self._happenings: asyncio.Queue[Happening | None] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._broker._join(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._broker._leave(self)
        self.connected = False
        self._happenings.put_nowait(None)

    async def next(self) -> Happening:
        """See Bus.next."""
        happening = await self._happenings.get()
        if happening is not None:
            return happening
        self._happenings.put_nowait(None)
        raise NotConnected("the bus is closed")

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """See Bus.publish."""
        await asyncio.sleep(0)  # as with a real broker, others have their turn
        if not self.connected:
            raise NotConnected(self._told or "not connected yet")
        if len(payload) + len(topic.encode()) + 10 > self._broker.welcome.max_packet_bytes:
            raise TooLarge(
                f"{len(payload)} bytes for {topic}: the broker takes {self._broker.welcome.max_packet_bytes}"
            )
        if not self._broker.deny(self.client_id, topic):
            self._broker.route(topic, bytes(payload), retain=retain)
        elif qos > 0:
            raise Denied(f"the broker denied our message to {topic}: not authorized", NOT_AUTHORIZED)

    async def subscribe(self, *filters: str) -> None:
        """See Bus.subscribe."""
        new = [wanted for wanted in filters if wanted not in self._filters]
        self._filters.update(dict.fromkeys(new))
        if self.connected:
            self._repeat_retained(new)

    async def unsubscribe(self, *filters: str) -> None:
        """See Bus.unsubscribe."""
        for wanted in filters:
            self._filters.pop(wanted, None)

    async def reconnect(self) -> None:
        """See Bus.reconnect."""
        if self.connected:
            self._disconnect("connecting anew, as asked")
            asyncio.get_running_loop().call_soon(self._broker._admit, self.client_id)

    def _connect(self) -> None:
        self.connected, self._told = True, ""
        self._testament = self._will()
        self._happenings.put_nowait(self._broker.welcome)
        self._repeat_retained([*self._filters])

    def _disconnect(self, reason: str) -> None:
        self.connected = False
        if reason != self._told:
            self._told = reason
            self._happenings.put_nowait(Disconnected(reason))

    def _receive(self, received: Received) -> None:
        if self.connected and any(matches(wanted, received.topic) for wanted in self._filters):
            self._happenings.put_nowait(received)

    def _repeat_retained(self, filters: list[str]) -> None:
        for topic, payload in self._broker.retained.items():
            if any(matches(wanted, topic) for wanted in filters):
                self._happenings.put_nowait(Received(topic, payload, retained=True))
