"""One copy of a model for all who listen, and what each of them missed."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from random import Random

import pytest

from bench.transfer_live.node import CLOUD
from protocol.frames import encode_frame
from protocol.messages import Done
from tests.protocol.exchange.sides import CHUNK, IMPATIENT, PATIENCE_S, Start, Wire, a_file, topics


async def test_one_copy_goes_to_all_who_listen(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agents = await start(), [await start(f"a{n}") for n in range(4)]
    model, data = cloud.have(a_file(tmp_path, 20 * CHUNK)), Random(1).randbytes(20 * CHUNK)
    part = hashlib.sha256(data[: 6 * CHUNK]).hexdigest()
    for agent in agents:
        cloud.exchange.announced(agent.name, model)
    agents[0].pull(CLOUD, model, size=6 * CHUNK, sha256=part, listen=True)
    for agent in agents[1:]:
        agent.pull(CLOUD, model, listen=True)
    assert await agents[0].pulled(part) == data[: 6 * CHUNK]
    for agent in agents[1:]:
        assert await agent.pulled(model.sha256) == data
    assert wire.passed == [(model.xfer, index) for index in range(20)]
    assert cloud.exchange.n_sent_bytes == model.size
    n_heard = [agent.exchange.pulling.receiving.counts for agent in agents]
    await cloud.bus.publish(topics.blob(model.xfer), encode_frame(0, bytes(CHUNK)), qos=0)
    await cloud.bus.publish(topics.down("a0", "grant"), cloud.outgoing.encode(Done(xfer=model.xfer)))
    await agents[0].answered()
    assert agents[0].exchange.pulling.receiving.counts == n_heard[0], "it listens no longer"


async def test_who_cannot_hear_the_broadcast_pulls(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agents = await start(), [await start(f"a{n}", **IMPATIENT) for n in range(2)]
    model = cloud.have(a_file(tmp_path, 20 * CHUNK))
    wire.broker.drop = lambda topic, payload: "/c/blob/" in topic or wire._passes(topic, payload)
    for agent in agents:
        cloud.exchange.announced(agent.name, model)
        agent.pull(CLOUD, model, listen=True)
    for agent in agents:
        assert await agent.pulled(model.sha256) == Random(1).randbytes(model.size)
    assert len(wire.passed) >= 40


async def test_a_download_that_is_begun_anew_before_the_broker_has_answered_begins(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud, agent = await start(), await start("a1")
    model = cloud.have(a_file(tmp_path, 5 * CHUNK))
    asked, answered, subscribe = asyncio.Event(), asyncio.Event(), agent.bus.subscribe

    async def slowly(*filters: str) -> None:
        asked.set()
        await answered.wait()
        await subscribe(*filters)

    monkeypatch.setattr(agent.bus, "subscribe", slowly)
    agent.pull(CLOUD, model, listen=True)
    await asked.wait()
    agent.exchange.pulling.stop(CLOUD, model.xfer)
    agent.pull(CLOUD, model, listen=True)
    answered.set()
    assert await agent.pulled(model.sha256) == Random(1).randbytes(model.size)


async def test_a_broadcast_goes_on_after_the_coordinator_was_cut_off(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agents = await start(), [await start(f"a{n}", **IMPATIENT) for n in range(3)]
    wire.at = {n: lambda: wire.broker.cut(CLOUD) for n in (3, 11)}
    model = cloud.have(a_file(tmp_path, 20 * CHUNK))
    for agent in agents:
        cloud.exchange.announced(agent.name, model)
        agent.pull(CLOUD, model, listen=True)
    for agent in agents:
        assert await agent.pulled(model.sha256) == Random(1).randbytes(model.size)


async def test_while_closed_nothing_is_sent(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    agent.exchange.pace.renew(0, is_open=False)
    blob = agent.have(a_file(tmp_path, 20 * CHUNK))
    cloud.pull("a1", blob)
    async with asyncio.timeout(PATIENCE_S):
        while not agent.exchange.sending.n_pending:
            agent.moved.clear()
            await agent.moved.wait()
    assert wire.passed == []
    agent.exchange.pace.renew(1000 * CHUNK)
    await cloud.pulled(blob.sha256)
