"""An update is read while it comes: what is here is right, and who reads is told when it will not come."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from random import Random

import msgspec
import pytest

from bench.transfer_live.node import CLOUD
from protocol.errors import Unavailable
from tests.protocol.exchange.sides import CHUNK, IMPATIENT, PATIENCE_S, Start, Wire, a_file


async def test_what_is_here_is_read_before_the_rest_has_come(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(**IMPATIENT, max_tries=2**60), await start("a1")
    blob, data = agent.have(a_file(tmp_path, 20 * CHUNK + 1)), Random(1).randbytes(20 * CHUNK + 1)
    lost = {7}
    wire.lose = lambda number: wire.passed[number][1] in lost
    cloud.pull("a1", blob)
    waiting = cloud.exchange.pulling.coming("a1", blob.xfer)
    assert waiting is not None
    assert await asyncio.to_thread(waiting.read, 7 * CHUNK, 0) == data[: 7 * CHUNK]
    gap, whole = (
        asyncio.create_task(asyncio.to_thread(waiting.read, 1, 7 * CHUNK)),
        asyncio.create_task(asyncio.to_thread(waiting.settled)),
    )
    later = cloud.exchange.pulling.coming("a1", blob.xfer)
    assert later is not None
    assert await asyncio.to_thread(later.read, CHUNK, 5 * CHUNK) == data[5 * CHUNK : 6 * CHUNK], "who comes later, too"
    assert not gap.done()
    assert not whole.done()
    lost.clear()
    assert await gap == data[7 * CHUNK : 7 * CHUNK + 1]
    await whole
    assert await cloud.pulled(blob.sha256) == data
    assert later.read(len(data), 0) == data


async def test_who_reads_is_told_when_it_is_stopped_or_offered_otherwise(
    start: Start, wire: Wire, tmp_path: Path
) -> None:
    cloud, agent = await start(), await start("a1")
    path = a_file(tmp_path, 12 * CHUNK)
    wire.lose = lambda _: True
    blob = agent.have(path)
    for go_on in (
        lambda: cloud.pull("a1", msgspec.structs.replace(blob, chunk=3 * CHUNK)),
        lambda: cloud.exchange.pulling.stop("a1", blob.xfer),
    ):
        cloud.pull("a1", blob)
        reader = cloud.exchange.pulling.coming("a1", blob.xfer)
        assert reader is not None
        waiting = asyncio.create_task(asyncio.to_thread(reader.read, 1, 0))
        go_on()
        with pytest.raises(Unavailable):
            await waiting
    assert cloud.exchange.pulling.coming("a1", blob.xfer) is None, "nothing is pulled"


async def test_who_reads_is_told_that_it_is_not_what_was_offered(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    path = a_file(tmp_path, 12 * CHUNK)
    blob = agent.have(path)
    path.write_bytes(Random(2).randbytes(12 * CHUNK))
    cloud.pull("a1", blob)
    reader = cloud.exchange.pulling.coming("a1", blob.xfer)
    assert reader is not None
    with pytest.raises(Unavailable, match="digest"):
        await asyncio.to_thread(reader.settled)
    assert not (await cloud.lost()).temporary


async def test_what_has_just_gone_into_the_store_is_read_there(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    blob = agent.have(a_file(tmp_path, 12 * CHUNK))
    async with cloud.exchange.pulling._ending:  # verified, and nobody was told yet
        cloud.pull("a1", blob)
        async with asyncio.timeout(PATIENCE_S):
            while not cloud.blobs.has(blob.sha256):  # noqa: ASYNC110 - a thread moves it
                await asyncio.sleep(0.005)
        assert cloud.exchange.pulling.coming("a1", blob.xfer) is None
    assert await cloud.pulled(blob.sha256)


async def test_a_prefix_is_not_read_while_it_comes(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    model = cloud.have(a_file(tmp_path, 20 * CHUNK))
    agent.pull(
        CLOUD, model, size=6 * CHUNK, sha256=hashlib.sha256(Random(1).randbytes(model.size)[: 6 * CHUNK]).hexdigest()
    )
    assert agent.exchange.pulling.coming(CLOUD, model.xfer) is None
