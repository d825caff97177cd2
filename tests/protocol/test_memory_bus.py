"""What only the in-memory broker can do; the contract it shares with real ones is in tests/contract/test_bus.py."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from protocol.bus import Bus, Connected, Denied, Disconnected, Happening, NotConnected, Received, TooLarge, Will
from protocol.memory_bus import MemoryBroker, matches

H = TypeVar("H", bound=Happening)
LEVELS = st.lists(st.sampled_from(["a", "b", "", "+"]), min_size=1, max_size=5)


async def until(bus: Bus, kind: type[H]) -> H:
    async with asyncio.timeout(10):
        while not isinstance(happening := await bus.next(), kind):
            pass
        return happening


async def received(bus: Bus, n: int) -> list[Received]:
    return [await until(bus, Received) for _ in range(n)]


@given(LEVELS, st.booleans(), LEVELS)
def test_filters_match_as_paho_matches(wanted: list[str], sharp: bool, topic: list[str]) -> None:
    filter_ = "/".join([*wanted, "#"] if sharp else wanted)
    name = "/".join(topic).replace("+", "c")
    assert matches(filter_, name) == topic_matches_sub(filter_, name)


async def test_memory_bus_knows_a_limit() -> None:
    broker = MemoryBroker(max_packet_bytes=1000)
    async with broker.bus("writer") as bus:
        with pytest.raises(TooLarge):
            await bus.publish("t", bytes(1000))


async def test_memory_broker_denies_drops_and_holds() -> None:
    broker = MemoryBroker()
    broker.deny = lambda client_id, topic: client_id not in topic
    broker.drop = lambda _, payload: payload == b"lost"
    async with broker.bus("one", lambda: Will("one/state", b"dead")) as one, broker.bus("two") as two:
        await two.subscribe("one/#")
        with pytest.raises(Denied):
            await two.publish("one/t", b"")
        await one.publish("one/t", b"lost")
        await one.publish("one/t", b"found")
        broker.hold("one")
        assert [r.payload for r in await received(two, 2)] == [b"found", b"dead"]
        await until(one, Disconnected)
        with pytest.raises(NotConnected):
            await one.publish("one/t", b"")
        broker.release("one")
        await until(one, Connected)
        async with broker.bus("one") as usurper:
            await until(usurper, Connected)
            assert "same client id" in (await until(one, Disconnected)).reason
            await usurper.publish("one/t", b"me")
            assert [r.payload for r in await received(two, 2)] == [b"dead", b"me"]
