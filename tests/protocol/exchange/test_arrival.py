"""Blobs between daemons over a bus: what arrives is right."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from random import Random

import pytest

from bench.transfer_live.node import CLOUD
from protocol.messages import Blob
from protocol.pulling import Pulled
from tests.protocol.exchange.sides import CHUNK, IMPATIENT, Start, Wire, a_file


@pytest.mark.parametrize("n_bytes", [1, CHUNK, 20 * CHUNK, 20 * CHUNK + 1])
async def test_an_update_goes_up(start: Start, wire: Wire, tmp_path: Path, n_bytes: int) -> None:
    cloud, agent = await start(), await start("a1")
    blob = agent.have(a_file(tmp_path, n_bytes))
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(n_bytes)
    assert len(wire.passed) == blob.n_chunks, "nothing is sent twice"
    assert agent.exchange.n_sent_bytes == n_bytes
    assert cloud.unfinished() == []
    assert cloud.exchange.pulling.wake_at is None


async def test_many_blobs_in_both_directions_at_once(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud = await start()
    agents = [await start(f"a{n}") for n in range(4)]
    model = cloud.have(a_file(tmp_path, 30 * CHUNK + 7, seed=99))
    updates = {a.name: a.have(a_file(tmp_path, 15 * CHUNK + n, seed=n)) for n, a in enumerate(agents)}
    for agent in agents:
        agent.pull(CLOUD, model)
        cloud.pull(agent.name, updates[agent.name])
    for agent in agents:
        assert await agent.pulled(model.sha256) == Random(99).randbytes(model.size)
    found = [await cloud.ended() for _ in agents]
    assert {end.peer: end.sha256 for end in found if isinstance(end, Pulled)} == {
        a: b.sha256 for a, b in updates.items()
    }
    assert len(wire.passed) == 4 * model.n_chunks + sum(b.n_chunks for b in updates.values())


async def test_of_many_that_offer_at_once_few_are_begun_and_all_arrive(
    start: Start, wire: Wire, tmp_path: Path
) -> None:
    cloud = await start(budget_bytes=8 * CHUNK)  # so two may be begun, and three are verified at a time
    agents = [await start(f"a{n}") for n in range(12)]
    updates = {a.name: a.have(a_file(tmp_path, 12 * CHUNK, seed=n)) for n, a in enumerate(agents)}
    n_begun: list[int] = []
    wire.at = dict.fromkeys(range(12 * 12), lambda: n_begun.append(len(cloud.unfinished())))
    for agent in agents:
        cloud.pull(agent.name, updates[agent.name])
    found = [await cloud.ended() for _ in agents]
    assert {end.peer: end.sha256 for end in found if isinstance(end, Pulled)} == {
        a: b.sha256 for a, b in updates.items()
    }
    assert max(n_begun) <= 2 + 3
    assert len(wire.passed) == 12 * 12
    assert cloud.exchange.pulling.wake_at is None


async def test_who_is_silent_does_not_keep_others_waiting_for_long(start: Start, tmp_path: Path) -> None:
    cloud = await start(budget_bytes=8 * CHUNK, max_tries=2**60, **IMPATIENT)
    agent = await start("a1")
    blob = agent.have(a_file(tmp_path, 12 * CHUNK))
    for name in ("gone-1", "gone-2"):
        cloud.pull(name, Blob(sha256=name[-1] * 64, size=8 * CHUNK, chunk=CHUNK))
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)


async def test_a_small_agent_pulls_a_prefix(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    model = cloud.have(a_file(tmp_path, 20 * CHUNK))
    size = 6 * CHUNK + 5
    data = Random(1).randbytes(model.size)[:size]
    agent.pull(CLOUD, model, size=size, sha256=hashlib.sha256(data).hexdigest())
    assert await agent.pulled(hashlib.sha256(data).hexdigest()) == data
    assert sorted(wire.passed) == [(model.xfer, index) for index in range(7)]


async def test_asking_twice_is_asking_once(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    blob = agent.have(a_file(tmp_path, 12 * CHUNK))
    for _ in range(3):
        cloud.pull("a1", blob)
    await cloud.pulled(blob.sha256)
    assert cloud.outcomes.empty()
    assert len(wire.passed) == 12


async def test_another_chunk_size_takes_the_place_of_the_first(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    path = a_file(tmp_path, 12 * CHUNK)
    wire.lose = lambda _: True
    stalled = asyncio.Event()
    wire.at[7] = stalled.set
    cloud.pull("a1", agent.have(path))
    await stalled.wait()
    wire.lose = lambda _: False
    blob = agent.have(path, chunk=3 * CHUNK)  # the agent was restarted with another configuration
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == path.read_bytes()
    assert cloud.outcomes.empty()
