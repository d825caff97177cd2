"""One suite for every bus: in memory, over the embedded broker, over mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import selectors
import socket
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import pytest

from protocol.bus import (
    BrokerConfig,
    Bus,
    Connected,
    Denied,
    Disconnected,
    Happening,
    NotConnected,
    Received,
    TooLarge,
    Will,
    mqtt_bus,
)
from protocol.memory_bus import MemoryBroker

PATIENCE_S = 30.0
CHUNK_BYTES = 256 * 1024

H = TypeVar("H", bound=Happening)


class World(Protocol):
    """A broker and the means to harm it."""

    mqtt_version: int

    def bus(self, client_id: str, will: Callable[[], Will | None] = ...) -> Bus: ...
    def cut(self, bus: Bus) -> None: ...
    def kill(self) -> None: ...
    def start(self) -> None: ...


class MemoryWorld:
    mqtt_version = 5

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.kill, self.start = self.broker.stop, self.broker.start

    def bus(self, client_id: str, will: Callable[[], Will | None] = lambda: None) -> Bus:
        return self.broker.bus(client_id, will)

    def cut(self, bus: Any) -> None:
        self.broker.cut(bus.client_id)


class RealWorld:
    def __init__(self, process: Any, mqtt_version: int) -> None:
        self.process, self.mqtt_version = process, mqtt_version
        self.kill, self.start = process.kill, process.start

    def bus(self, client_id: str, will: Callable[[], Will | None] = lambda: None) -> Bus:
        return mqtt_bus(BrokerConfig(url=self.process.url, reconnect_max_s=0.2), client_id, will)

    def cut(self, bus: Any) -> None:
        bus._link._client.socket().shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=["memory", "amqtt", "mosquitto"])
def world(request: pytest.FixtureRequest) -> World:
    match request.param:
        case "memory":
            return MemoryWorld()
        case "amqtt":
            return RealWorld(request.getfixturevalue("embedded_broker"), 4)
        case _:
            return RealWorld(request.getfixturevalue("mosquitto_broker"), 5)


@pytest.fixture(autouse=True)
async def nothing_unretrieved() -> Any:
    """No test may leave an exception that nobody asked for ("Future exception was never retrieved")."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    yield
    gc.collect()
    assert complaints == []


async def until(bus: Bus, kind: type[H]) -> H:
    """The next happening of this kind; the others are skipped."""
    async with asyncio.timeout(PATIENCE_S):
        while not isinstance(happening := await bus.next(), kind):
            pass
        return happening


async def received(bus: Bus, n: int) -> list[Received]:
    return [await until(bus, Received) for _ in range(n)]


async def connected(stack: contextlib.AsyncExitStack, world: World, name: str, *filters: str, **will: Any) -> Bus:
    bus = world.bus(name, **will)
    await bus.subscribe(*filters)
    await stack.enter_async_context(bus)
    await until(bus, Connected)
    return bus


@pytest.fixture
async def stack() -> Any:
    async with contextlib.AsyncExitStack() as stack:
        yield stack


async def test_welcome_tells_version_and_limits(world: World, stack: contextlib.AsyncExitStack) -> None:
    bus = await stack.enter_async_context(world.bus("one"))
    welcome = await until(bus, Connected)
    assert welcome.mqtt_version == world.mqtt_version
    assert welcome.max_packet_bytes >= 2**20
    assert welcome.receive_maximum >= 1
    assert not welcome.session_present


@pytest.mark.parametrize("qos", [0, 1])
async def test_chunks_arrive_whole_and_in_order(world: World, stack: contextlib.AsyncExitStack, qos: int) -> None:
    reader = await connected(stack, world, "reader", "fed/v1/lab/a/+/up/#")
    writer = await connected(stack, world, "writer")
    chunks = [i.to_bytes(4) + os.urandom(CHUNK_BYTES) for i in range(24)]
    for chunk in chunks:
        await writer.publish("fed/v1/lab/a/writer/up/d/0123", chunk, qos=qos)
    assert await received(reader, len(chunks)) == [Received("fed/v1/lab/a/writer/up/d/0123", c, False) for c in chunks]


async def test_many_publishers_at_once(world: World, stack: contextlib.AsyncExitStack) -> None:
    reader = await connected(stack, world, "reader", "t/#")
    writer = await connected(stack, world, "writer")
    await asyncio.gather(*(writer.publish(f"t/{i}", b"x") for i in range(200)))
    assert {r.topic for r in await received(reader, 200)} == {f"t/{i}" for i in range(200)}


async def test_retained_reaches_a_late_subscriber(world: World, stack: contextlib.AsyncExitStack) -> None:
    writer = await connected(stack, world, "writer")
    await writer.publish("a/one/up/state", b"old", retain=True)
    await writer.publish("a/one/up/state", b"born", retain=True)
    await writer.publish("a/one/up/exec", b"not kept")
    late = await connected(stack, world, "late", "a/+/up/#")
    assert await received(late, 1) == [Received("a/one/up/state", b"born", True)]
    later = await connected(stack, world, "later")
    await later.subscribe("a/one/up/state")
    assert await received(later, 1) == [Received("a/one/up/state", b"born", True)]


async def test_empty_payload_clears_what_was_retained(world: World, stack: contextlib.AsyncExitStack) -> None:
    writer = await connected(stack, world, "writer")
    await writer.publish("a/one/up/state", b"born", retain=True)
    await writer.publish("a/one/up/state", b"", retain=True)
    await writer.publish("a/two/up/state", b"born", retain=True)
    late = await connected(stack, world, "late", "a/+/up/state")
    assert await received(late, 1) == [Received("a/two/up/state", b"born", True)]


async def test_nobody_hears_what_he_did_not_ask_for(world: World, stack: contextlib.AsyncExitStack) -> None:
    coordinator = await connected(stack, world, "coordinator", "f/a/+/up/#")
    one = await connected(stack, world, "one", "f/a/one/down/#", "f/c/state")
    await one.publish("f/a/one/up/state", b"born", retain=True)
    await coordinator.publish("f/c/state", b"here", retain=True)
    await coordinator.publish("f/c/job/x", b"card", retain=True)
    two = await connected(stack, world, "two", "f/a/two/down/#", "f/c/state")
    await coordinator.publish("f/a/one/down/plan", b"for one", retain=True)
    await coordinator.publish("f/a/two/down/plan", b"for two", retain=True)
    assert [r.payload for r in await received(one, 2)] == [b"here", b"for one"]
    assert [r.payload for r in await received(two, 2)] == [b"here", b"for two"]
    assert [r.payload for r in await received(coordinator, 1)] == [b"born"]


async def test_wildcards(world: World, stack: contextlib.AsyncExitStack) -> None:
    plus = await connected(stack, world, "plus", "f/a/+/up/state")
    sharp = await connected(stack, world, "sharp", "f/a/one/#")
    writer = await connected(stack, world, "writer")
    for topic in (
        "f/a/one/up/state",
        "f/a/two/up/state",
        "f/a/one/up/d/x",
        "f/a/one",
        "f/a/one/up",
        "f/a/one/up/state/x",
    ):
        await writer.publish(topic, b"")
    await writer.publish("f/a/one/up/state", b"end")
    assert [r.topic for r in await received(plus, 3)] == ["f/a/one/up/state", "f/a/two/up/state", "f/a/one/up/state"]
    topics = [r.topic for r in await received(sharp, 6)]
    assert topics == [
        "f/a/one/up/state",
        "f/a/one/up/d/x",
        "f/a/one",
        "f/a/one/up",
        "f/a/one/up/state/x",
        "f/a/one/up/state",
    ]


async def test_unsubscribed_filters_are_silent(world: World, stack: contextlib.AsyncExitStack) -> None:
    reader = await connected(stack, world, "reader", "keep", "stop")
    writer = await connected(stack, world, "writer")
    await reader.unsubscribe("stop", "never subscribed")
    await writer.publish("stop", b"1")
    await writer.publish("keep", b"2")
    assert [r.topic for r in await received(reader, 1)] == ["keep"]


async def test_will_speaks_for_the_dead(world: World, stack: contextlib.AsyncExitStack) -> None:
    lives: list[bytes] = []

    def will() -> Will:
        lives.append(f"death of life {len(lives)}".encode())
        return Will("a/agent/up/state", lives[-1])

    watcher = await connected(stack, world, "watcher", "a/+/up/state")
    agent = await connected(stack, world, "agent", will=will)
    first = lives[-1]
    world.cut(agent)
    assert await received(watcher, 1) == [Received("a/agent/up/state", first, False)]
    await until(agent, Disconnected)
    await until(agent, Connected)
    second = lives[-1]
    late = await connected(stack, world, "late", "a/+/up/state")
    assert await received(late, 1) == [Received("a/agent/up/state", first, True)]
    world.cut(agent)
    assert await received(watcher, 1) == [Received("a/agent/up/state", second, False)]
    assert first != second


async def test_no_will_after_a_goodbye(world: World, stack: contextlib.AsyncExitStack) -> None:
    watcher = await connected(stack, world, "watcher", "a/+/up/state")
    async with contextlib.AsyncExitStack() as life:
        await connected(life, world, "agent", will=lambda: Will("a/agent/up/state", b"dead"))
    again = await connected(stack, world, "agent")
    await again.publish("a/agent/up/state", b"alive")
    assert [r.payload for r in await received(watcher, 1)] == [b"alive"]


async def test_connecting_anew_leaves_politely_and_keeps_the_filters(
    world: World, stack: contextlib.AsyncExitStack
) -> None:
    watcher = await connected(stack, world, "watcher", "a/+/up/state")
    agent = await connected(stack, world, "agent", "a/agent/down/#", will=lambda: Will("a/agent/up/state", b"dead"))
    await agent.reconnect()
    await until(agent, Disconnected)
    await until(agent, Connected)
    await agent.publish("a/agent/up/state", b"alive")
    assert [r.payload for r in await received(watcher, 1)] == [b"alive"]
    await watcher.publish("a/agent/down/cmd", b"hello")
    assert [r.payload for r in await received(agent, 1)] == [b"hello"]


async def test_a_restarted_broker_is_found_again(world: World, stack: contextlib.AsyncExitStack) -> None:
    reader = await connected(stack, world, "reader", "before")
    writer = await connected(stack, world, "writer")
    await writer.publish("gone", b"retained", retain=True)
    world.kill()
    for bus in (reader, writer):
        assert (await until(bus, Disconnected)).reason
        with pytest.raises(NotConnected):
            await bus.publish("before", b"nobody hears")
    await reader.subscribe("meanwhile", "gone")
    world.start()
    for bus in (reader, writer):
        await until(bus, Connected)
    await writer.publish("before", b"1")
    await writer.publish("meanwhile", b"2")
    assert [r.payload for r in await received(reader, 2)] == [b"1", b"2"]


async def test_a_broker_that_comes_late(world: World, stack: contextlib.AsyncExitStack) -> None:
    world.kill()
    bus = world.bus("early")
    await bus.subscribe("t")
    await stack.enter_async_context(bus)
    first = await bus.next()
    assert isinstance(first, Disconnected)
    with pytest.raises(NotConnected):
        await bus.publish("t", b"too early")
    world.start()
    await until(bus, Connected)
    await bus.publish("t", b"now")
    assert [r.payload for r in await received(bus, 1)] == [b"now"]


async def test_a_closed_bus_says_so(world: World) -> None:
    bus = world.bus("short")
    async with bus:
        await until(bus, Connected)
    for _ in range(2):
        with pytest.raises(NotConnected):
            await bus.next()
    with pytest.raises(NotConnected):
        await bus.publish("t", b"")


# --------------------------------------------------------------------------------------- what only a real broker can do


@pytest.fixture(params=["embedded_broker", "mosquitto_broker"])
def real(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_pending_publish_ends_with_its_connection(
    real: Any, stack: contextlib.AsyncExitStack, qos: int
) -> None:
    bus = await connected(stack, RealWorld(real, 0), "writer")
    real.freeze()

    async def flood() -> None:
        while True:
            await bus.publish("t", bytes(CHUNK_BYTES), qos=qos)

    writing = asyncio.create_task(flood())
    for _ in range(100):  # long enough for QoS 0 to fill the socket; QoS 1 waits from the first on
        await asyncio.sleep(0)
    assert not writing.done()
    real.kill()
    with pytest.raises(NotConnected):
        async with asyncio.timeout(PATIENCE_S):
            await writing


async def test_embedded_broker_ends_while_clients_return(
    embedded_broker: Any, stack: contextlib.AsyncExitStack
) -> None:
    world = RealWorld(embedded_broker, 4)
    buses = [await connected(stack, world, f"agent-{i}", "t/#") for i in range(5)]
    for bus in buses:
        await bus.publish("t/x", os.urandom(CHUNK_BYTES), qos=0)
    assert await asyncio.to_thread(embedded_broker.terminate) == 0


async def test_too_large_is_not_sent(mosquitto_broker: Any, stack: contextlib.AsyncExitStack) -> None:
    bus = await stack.enter_async_context(RealWorld(mosquitto_broker, 5).bus("writer"))
    assert (await until(bus, Connected)).max_packet_bytes == 2**20
    await bus.subscribe("t")
    with pytest.raises(TooLarge):
        await bus.publish("t", bytes(2**20), qos=0)
    await bus.publish("t", bytes(2**20 - 100))
    assert len((await received(bus, 1))[0].payload) == 2**20 - 100


async def test_access_control_denies(start_mosquitto: Any, stack: contextlib.AsyncExitStack, tmp_path: Any) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    bus = await connected(stack, RealWorld(start_mosquitto(f"acl_file {rules}"), 5), "writer", "open/#")
    with pytest.raises(Denied) as denied:
        await bus.publish("closed/t", b"")
    assert denied.value.code == 135
    await bus.publish("open/t", b"fine")
    assert [r.payload for r in await received(bus, 1)] == [b"fine"]


async def test_the_same_client_id_twice_is_named(mosquitto_broker: Any, stack: contextlib.AsyncExitStack) -> None:
    world = RealWorld(mosquitto_broker, 5)
    older = await connected(stack, world, "twin")
    await connected(stack, world, "twin")
    assert (await until(older, Disconnected)).reason


async def test_wrong_password_is_explained(start_mosquitto: Any, stack: contextlib.AsyncExitStack) -> None:
    broker = start_mosquitto("allow_anonymous false")
    for protocol in ("5", "3.1.1"):
        config = BrokerConfig(url=broker.url, protocol=protocol, username="nobody")  # type: ignore[arg-type]
        bus = await stack.enter_async_context(mqtt_bus(config, "writer", lambda: None))
        assert "user name" in (await until(bus, Disconnected)).reason


async def test_a_connection_that_ends_while_it_is_full_leaves_nothing_behind() -> None:
    """A socket that the loop still watched would be in the way of whatever gets its number next."""
    full = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"\x20\x02\x00\x00")  # CONNACK
        await full.wait()
        writer.transport.abort()

    async with await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1000) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with mqtt_bus(BrokerConfig(url=url, protocol="3.1.1"), "one", lambda: None) as bus:
            await until(bus, Connected)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while True:
                        await bus.publish("t", bytes(2**20), qos=0)
            assert watched_for_writing() == 1
            full.set()
            await until(bus, Disconnected)
            assert watched_for_writing() == 0


def watched_for_writing() -> int:
    loop: Any = asyncio.get_running_loop()
    return sum(bool(key.events & selectors.EVENT_WRITE) for key in loop._selector.get_map().values())


async def test_leaving_a_mute_broker_leaves_nothing_behind() -> None:
    goodbye = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await reader.read()  # until the client has closed
        writer.close()
        goodbye.set()

    arrived = asyncio.Event()
    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with (
            mqtt_bus(BrokerConfig(url=f"mqtt://127.0.0.1:{port}"), "writer", lambda: None),
            asyncio.timeout(PATIENCE_S),
        ):
            await arrived.wait()
        async with asyncio.timeout(PATIENCE_S):
            await goodbye.wait()
