"""A broker that goes on refusing a certificate is believed in the end; one that refuses for a while is not."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from protocol.bus import Bus, Connected, Disconnected, Happening, mqtt_bus

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trust.conftest import World

PATIENCE_S = 60.0


async def next_of(bus: Bus) -> Happening:
    async with asyncio.timeout(PATIENCE_S):
        return await bus.next()


async def refusals(world: World, certificate: Path | None) -> list[Disconnected]:
    """What a daemon hears until the broker insists."""
    heard: list[Disconnected] = []
    async with mqtt_bus(world.broker(certificate), "x", lambda: None) as bus:
        while not heard or not heard[-1].refusal:
            happening = await next_of(bus)
            assert isinstance(happening, Disconnected)
            heard.append(happening)
    return heard


async def test_a_revoked_certificate_and_a_missing_one(world: World) -> None:
    agent = world.agent("a")
    async with mqtt_bus(world.broker(agent), "x", lambda: None) as bus:
        assert isinstance(await next_of(bus), Connected)
    assert [one.refusal for one in await refusals(world, None)] == ["", "credentials"]
    world.office.revoke("a", "", time.time())
    world.reload()
    first, last = await refusals(world, agent)
    assert (first.refusal, last.refusal) == ("", "revoked")
    assert first.reason == last.reason
    assert "our certificate is revoked" in last.reason


async def test_a_broker_that_comes_round_in_time_is_forgiven(world: World) -> None:
    agent = world.agent("a")
    held = agent.read_bytes()
    expired = world.issued("a", world.office.authority, time.time() - 100, 50)
    agent.write_bytes(expired.read_bytes())
    async with mqtt_bus(world.broker(agent), "x", lambda: None) as bus:
        first = await next_of(bus)
        assert isinstance(first, Disconnected)
        assert first.refusal == ""
        agent.write_bytes(held)
        assert isinstance(await next_of(bus), Connected)
