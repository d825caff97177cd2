"""A bus that loses, cuts and forgets: only what is missing is sent again, also after a restart of either side."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from bench.transfer_live.node import CLOUD
from protocol.frames import encode_frame
from protocol.messages import Done
from protocol.pulling import Pulled
from protocol.spool import Spool
from tests.protocol.exchange.sides import CHUNK, IMPATIENT, Side, Start, Wire, a_file, topics

# --------------------------------------------------------------------------------------------------------- a bad network


async def test_a_fifth_of_the_chunks_is_lost(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud = await start(**IMPATIENT)
    agents = [await start(f"a{n}", **IMPATIENT) for n in range(3)]
    random = Random(5)
    wire.lose = lambda _: random.random() < 0.2
    model = cloud.have(a_file(tmp_path, 40 * CHUNK, seed=99))
    updates = {a.name: a.have(a_file(tmp_path, 30 * CHUNK + n, seed=n)) for n, a in enumerate(agents)}
    for agent in agents:
        agent.pull(CLOUD, model)
        cloud.pull(agent.name, updates[agent.name])
    for agent in agents:
        assert await agent.pulled(model.sha256) == Random(99).randbytes(model.size)
    found = [await cloud.ended() for _ in agents]
    assert {end.peer for end in found if isinstance(end, Pulled)} == set(updates)
    needed = 3 * model.n_chunks + sum(b.n_chunks for b in updates.values())
    assert len(wire.passed) > 1.1 * needed, "the loss was real"


async def test_a_receiver_that_was_cut_off_asks_again_at_once(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    wire.at = {n: lambda: wire.broker.cut("a1") for n in (5, 17)}
    model = cloud.have(a_file(tmp_path, 20 * CHUNK))
    agent.pull(CLOUD, model)
    assert await agent.pulled(model.sha256) == Random(1).randbytes(model.size)
    assert len(wire.passed) <= 20 + 2 * agent.exchange.pulling.receiving.window, (
        "at most what was in flight is sent again"
    )


@pytest.mark.parametrize("victim", ["a1", CLOUD])
async def test_a_cut_connection_goes_on_where_it_was(start: Start, wire: Wire, tmp_path: Path, victim: str) -> None:
    cloud, agent = await start(**IMPATIENT), await start("a1", **IMPATIENT)
    wire.at = {n: lambda: wire.broker.cut(victim) for n in (5, 23)}
    blob, model = agent.have(a_file(tmp_path, 20 * CHUNK)), cloud.have(a_file(tmp_path, 20 * CHUNK, seed=2))
    cloud.pull("a1", blob)
    agent.pull(CLOUD, model)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert await agent.pulled(model.sha256) == Random(2).randbytes(model.size)


async def test_a_damaged_frame_is_reported_and_asked_for_again(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(**IMPATIENT), await start("a1")
    blob = agent.have(a_file(tmp_path, 9 * CHUNK))
    wire.lose = lambda number: number == 3
    frame = bytearray(encode_frame(3, bytes(CHUNK)))
    frame[100] ^= 1
    wire.at[3] = lambda: wire.broker.route(topics.up_chunk("a1", blob.xfer), bytes(frame))
    wire.at[5] = lambda: wire.broker.route(topics.up_chunk("a1", blob.xfer), encode_frame(77, bytes(CHUNK)))
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert len(cloud.bad) == 2
    assert "damaged" in cloud.bad[0]
    assert "does not belong" in cloud.bad[1]


async def test_chunks_that_nobody_asked_for_are_ignored(start: Start) -> None:
    cloud, agent = await start(), await start("a1")
    await agent.bus.publish(topics.up_chunk("a1", "f" * 32), encode_frame(0, b"x"), qos=0)
    await agent.bus.publish(topics.up("a1", "answer"), agent.outgoing.encode(Done(xfer="f" * 32)))
    assert await cloud.answered() == Done(xfer="f" * 32)
    assert cloud.exchange.pulling.receiving.counts.n_stray == 1
    assert cloud.unfinished() == []


# -------------------------------------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("n_before", [1, 9, 19])
async def test_a_restarted_receiver_fetches_only_what_is_missing(
    wire: Wire, start: Start, tmp_path: Path, n_before: int
) -> None:
    agent = await start("a1")
    blob = agent.have(a_file(tmp_path, 20 * CHUNK))
    wire.lose = lambda number: number >= n_before
    async with Side(wire.broker, tmp_path) as cloud:
        lost = asyncio.Event()
        wire.at[n_before] = lost.set
        cloud.pull("a1", blob)
        await lost.wait()
    agent.exchange.peer_reborn(CLOUD)
    wire.lose, wire.passed = lambda _: False, []
    again = await start()
    again.pull("a1", blob)
    assert await again.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert len(wire.passed) == 20 - n_before
    assert again.unfinished() == []


async def test_a_receiver_that_was_killed_before_it_verified_fetches_nothing(
    wire: Wire, start: Start, tmp_path: Path
) -> None:
    agent, cloud = await start("a1"), await start()
    blob = agent.have(a_file(tmp_path, 3 * CHUNK))
    partial = Spool(cloud.blobs).open(blob, owner="a1")
    for index in range(3):
        partial.write(index, Random(1).randbytes(blob.size)[index * CHUNK :][:CHUNK])
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert wire.passed == []


async def test_a_restarted_sender_is_asked_again(wire: Wire, start: Start, tmp_path: Path) -> None:
    cloud, path = await start(), a_file(tmp_path, 20 * CHUNK)
    async with Side(wire.broker, tmp_path, "a1") as agent:
        blob = agent.have(path)
        wire.lose, stalled = lambda number: number >= 9, asyncio.Event()
        wire.at[9] = stalled.set
        cloud.pull("a1", blob)
        await stalled.wait()
    wire.lose, wire.passed = lambda _: False, []
    again = await start("a1")
    again.have(path)
    cloud.exchange.peer_reborn("a1")
    assert await cloud.pulled(blob.sha256) == path.read_bytes()
    assert len(wire.passed) == 11
