"""A real mosquitto under the generated configuration: who gets in, who may say and hear what, and what a revocation does."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coordinator.trust.office import create
from coordinator.trust.own import CLIENT_FILE
from protocol.bus import Bus, Connected, Denied, Disconnected, Happening, Received, Will, mqtt_bus
from protocol.topics import Topics

if TYPE_CHECKING:
    from tests.trust.conftest import World

PATIENCE_S = 20.0
topics = Topics("main")
XFER = "0" * 32


async def next_of(bus: Bus) -> Happening:
    async with asyncio.timeout(PATIENCE_S):
        return await bus.next()


def a_bus(world: World, certificate: Path | None, client_id: str = "x", **how: object) -> Bus:
    return mqtt_bus(world.broker(certificate, **how), client_id, lambda: None)  # type: ignore[arg-type]


async def reason(world: World, certificate: Path | None, **how: object) -> str:
    """Why there is no connection."""
    async with a_bus(world, certificate, **how) as bus:
        happening = await next_of(bus)
        assert isinstance(happening, Disconnected), happening
        return happening.reason


async def test_who_does_not_get_in_and_what_it_reads(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = time.time()
    foreign = create(tmp_path / "foreign", "main", now)
    own_authority = world.office.authority
    expired = world.issued("a", own_authority, now - 100, 50)
    assert "asks for a client certificate: `fedpipe enrol`" in await reason(world, None)
    assert "has expired: `fedpipe enrol --again`" in await reason(world, expired)
    stranger = world.issued("a", foreign, now, 1000)
    assert "does not know the authority of our certificate" in await reason(world, stranger)
    assert "not one for clients" in await reason(world, world.files / "server.pem")
    agent = world.agent("a")
    assert "is not trusted" in await reason(world, agent, authority=tmp_path / "foreign" / "ca.pem")
    assert "is not trusted (Hostname mismatch" in await reason(world, agent, host="localhost")
    world.office.revoke("a", "", now)
    world.reload()
    for _ in range(8):  # whether the refusal comes before or after the welcome is asked for is chance
        assert "our certificate is revoked" in await reason(world, agent)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_an_agent_reads_and_writes_its_own_topics_and_no_others(world: World) -> None:
    """Every topic of the protocol, to and from an agent that is not the hostile one."""
    files = {name: world.agent(name) for name in ("a", "b")}
    async with contextlib.AsyncExitStack() as stack:
        a, b, boss = [
            await stack.enter_async_context(a_bus(world, file))
            for file in (files["a"], files["b"], world.office.folder / CLIENT_FILE)
        ]
        for bus in (a, b, boss):
            assert isinstance(await next_of(bus), Connected)
        ups = [topics.up("a", leaf) for leaf in ("state", "report", "progress", "exec", "offer", "answer")]
        ups.append(topics.up_chunk("a", XFER))
        downs = [*(topics.down("a", leaf) for leaf in ("plan", "cmd", "grant")), topics.down_chunk("a", XFER)]
        common = [topics.coordinator_state(), topics.job("j"), topics.blob(XFER)]

        # the hostile one listens to everything there is, and speaks wherever it can
        await b.subscribe("#", "$SYS/#")
        await a.subscribe(topics.agent_subscriptions("a")[0])
        await boss.subscribe(*topics.coordinator_subscriptions())
        for topic in (*ups, *downs, *common, "fed/v1/other/a/b/up/state", "anything", topics.down("b", "plan")):
            with pytest.raises(Denied) as denied:
                await b.publish(topic, b"forged")
            assert denied.value.code == 135, topic
        for topic in downs:
            with pytest.raises(Denied):
                await a.publish(topic, b"forged")
            await boss.publish(topic, b"to a")
        for topic in ups:
            await a.publish(topic, b"from a")
        for topic in common:
            await boss.publish(topic, b"to all")
        with pytest.raises(Denied):
            await boss.publish(topics.up("a", "state"), b"forged")

        assert [await next_of(boss) for _ in ups] == [Received(topic, b"from a", retained=False) for topic in ups]
        assert [await next_of(a) for _ in downs] == [Received(topic, b"to a", retained=False) for topic in downs]
        await boss.publish(topics.down("b", "cmd"), b"last")
        heard = list(itertools.takewhile(lambda h: h.payload != b"last", [await received(b) for _ in range(4)]))
        assert [h.topic for h in heard] == common, "of the others it hears only what is for all"


async def received(bus: Bus) -> Received:
    happening = await next_of(bus)
    assert isinstance(happening, Received)
    return happening


async def test_nobody_is_thrown_out_by_one_that_takes_its_client_id(world: World) -> None:
    will = Will(topics.up("a", "state"), b"gone")
    a = mqtt_bus(world.broker(world.agent("a")), "a", lambda: will)
    boss = a_bus(world, world.coordinator)
    async with boss, a:
        await boss.subscribe(*topics.coordinator_subscriptions())
        assert isinstance(await next_of(boss), Connected)
        assert isinstance(await next_of(a), Connected)
        async with a_bus(world, world.agent("b"), "a") as b:
            assert isinstance(await next_of(b), Connected)
            await b.publish(topics.up("b", "state"), b"here")
        await a.publish(topics.up("a", "state"), b"here")
        assert [(await received(boss)).topic for _ in "ba"] == [topics.up("b", "state"), topics.up("a", "state")]


async def test_a_will_cannot_speak_for_another(world: World) -> None:
    forged = Will(topics.up("a", "state"), b"forged")
    async with a_bus(world, world.coordinator) as boss:
        await boss.subscribe(*topics.coordinator_subscriptions())
        assert isinstance(await next_of(boss), Connected)
        bus = mqtt_bus(world.broker(world.agent("b")), "b", lambda: forged)
        async with bus:
            await next_of(bus)
            link = bus._link  # type: ignore[attr-defined]
            if link is not None:
                link._client._sock_close()
        async with a_bus(world, world.agent("c")) as c:
            await next_of(c)
            await c.publish(topics.up("c", "state"), b"after it")
        assert (await received(boss)).topic == topics.up("c", "state")


async def test_a_revoked_agent_is_silenced_while_it_is_connected_and_the_others_stay(world: World) -> None:
    """Measured with mosquitto 2.0.11: the list of revocations alone would let this connection go on."""
    a, b, boss = a_bus(world, world.agent("a")), a_bus(world, world.agent("b")), a_bus(world, world.coordinator)
    async with a, b, boss:
        for bus in (a, b, boss):
            await next_of(bus)
        await b.subscribe(topics.agent_subscriptions("b")[0])
        await b.publish(topics.up("b", "state"), b"")
        world.office.revoke("b", "stolen", time.time())
        world.reload()
        with pytest.raises(Denied):
            await b.publish(topics.up("b", "state"), b"")
        await boss.publish(topics.down("b", "plan"), b"secret")
        await a.publish(topics.up("a", "state"), b"")
        # it is let in again under a new certificate: nothing of the revocation is left
        again = a_bus(world, world.agent("b"))
        world.reload()
        async with again:
            assert isinstance(await next_of(again), Connected)
            await again.publish(topics.up("b", "state"), b"")


async def test_reconnecting_is_polite_and_takes_the_file_that_is_there_now(world: World) -> None:
    will = Will(topics.up("a", "state"), b"gone")
    file = world.agent("a")
    a, boss = mqtt_bus(world.broker(file), "a", lambda: will), a_bus(world, world.coordinator)
    async with a, boss:
        await boss.subscribe(*topics.coordinator_subscriptions())
        for bus in (a, boss):
            assert isinstance(await next_of(bus), Connected)
        file.write_bytes(world.agent("a").read_bytes())
        world.reload()  # the old certificate is revoked with the second enrolment
        await a.reconnect()
        assert isinstance(await next_of(a), Disconnected)
        assert isinstance(await next_of(a), Connected)
        await a.publish(topics.up("a", "state"), b"here again")
        assert (await received(boss)).payload == b"here again", "no will came before it"
