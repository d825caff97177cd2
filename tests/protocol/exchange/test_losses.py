"""What is refused, what is lost for good, and what is only put off."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from random import Random

import pytest

from bench.transfer_live.node import CLOUD
from protocol.bus import Connected
from protocol.messages import Blob, Grant, Refuse
from tests.full_disk import largest_file
from tests.protocol.exchange.sides import CHUNK, Start, Wire, a_file

# -------------------------------------------------------------------------------------------------------------- refusals


async def test_a_blob_that_is_not_offered_is_refused(start: Start) -> None:
    cloud, agent = await start(), await start("a1")
    blob = Blob(sha256="a" * 64, size=5 * CHUNK, chunk=CHUNK)
    agent.pull(CLOUD, blob)
    refuse = await agent.answered()
    assert isinstance(refuse, Refuse)
    assert (refuse.xfer, refuse.retry_after_s) == (blob.xfer, 0.0)
    assert refuse.reason.startswith("superseded")
    agent.exchange.pulling.stop(CLOUD, blob.xfer)
    assert agent.unfinished() == []
    assert agent.outcomes.empty()
    assert len(cloud.exchange.pulling.receiving) == len(agent.exchange.pulling.receiving) == 0


@pytest.mark.parametrize("left", [None, 5 * CHUNK])
async def test_a_blob_whose_file_is_gone_or_cut_is_refused(start: Start, tmp_path: Path, left: int | None) -> None:
    cloud, agent = await start(), await start("a1")
    path = a_file(tmp_path, 20 * CHUNK)
    blob = agent.have(path)
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    cloud.pull("a1", blob)
    refuse = await cloud.answered()
    assert isinstance(refuse, Refuse)
    assert "gone" in refuse.reason
    assert blob.xfer not in agent.exchange.sending


async def test_credit_for_chunks_that_do_not_exist_is_a_bad_message(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    blob = cloud.have(a_file(tmp_path, 3 * CHUNK))
    agent.say(CLOUD, Grant(xfer=blob.xfer, ranges=[(2, 5)]))
    agent.pull(CLOUD, blob)
    await agent.pulled(blob.sha256)
    assert len(cloud.bad) == 1
    assert "beyond" in cloud.bad[0]


async def test_a_broker_that_does_not_take_the_chunks_is_named(start: Start, wire: Wire, tmp_path: Path) -> None:
    wire.broker.welcome = Connected(5, max_packet_bytes=800, receive_maximum=20, session_present=False)
    cloud, agent = await start(), await start("a1")
    cloud.pull("a1", agent.have(a_file(tmp_path, 3 * CHUNK)))
    refuse = await cloud.answered()
    assert isinstance(refuse, Refuse)
    assert "the broker takes 800" in refuse.reason


# ------------------------------------------------------------------------------------------------------------ it is lost


async def test_content_that_is_not_what_its_digest_says_is_lost_for_good(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    honest, forged = a_file(tmp_path, 9 * CHUNK, seed=1), a_file(tmp_path, 9 * CHUNK, seed=2)
    blob = agent.have(forged, sha256=hashlib.sha256(honest.read_bytes()).hexdigest())
    cloud.pull("a1", blob)
    end = await cloud.lost()
    assert (end.peer, end.blob, end.temporary) == ("a1", blob, False)
    assert "digest" in end.reason
    assert cloud.unfinished() == list(cloud.blobs) == []
    agent.have(honest)
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == honest.read_bytes()


async def test_a_blob_above_the_limit_is_lost_for_good_before_a_byte_of_it_came(
    start: Start, wire: Wire, tmp_path: Path
) -> None:
    cloud, agent = await start(max_bytes=5 * CHUNK), await start("a1")
    cloud.pull("a1", agent.have(a_file(tmp_path, 6 * CHUNK)))
    end = await cloud.lost()
    assert not end.temporary
    assert "at most 5120" in end.reason
    assert wire.passed == []


async def test_chunks_above_the_budget_are_lost_for_good(start: Start, tmp_path: Path) -> None:
    cloud, agent = await start(budget_bytes=CHUNK - 1), await start("a1")
    cloud.pull("a1", agent.have(a_file(tmp_path, 6 * CHUNK)))
    end = await cloud.lost()
    assert not end.temporary
    assert "smaller chunks" in end.reason


async def test_a_disk_that_refuses_is_temporary_and_resumes(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    blob = agent.have(a_file(tmp_path, 20 * CHUNK))
    with largest_file(20 * CHUNK + 48 + 5 * 8):  # behind the data its log, which has room for five chunks
        cloud.pull("a1", blob)
        end = await cloud.lost()
    assert end.temporary
    assert "make room" in end.reason
    wire.passed = []
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert {index for _, index in wire.passed} == set(range(5, 20))
    assert cloud.outcomes.empty()


async def test_a_peer_that_falls_silent_is_temporary_and_resumes(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(timeout_s=0.01, max_timeout_s=0.02, max_tries=3), await start("a1")
    blob = agent.have(a_file(tmp_path, 9 * CHUNK))
    wire.lose = lambda number: number >= 4
    cloud.pull("a1", blob)
    end = await cloud.lost()
    assert end.temporary
    assert "a1 sent nothing" in end.reason
    wire.lose, wire.passed = lambda _: False, []
    cloud.pull("a1", blob)
    assert await cloud.pulled(blob.sha256) == Random(1).randbytes(blob.size)
    assert {index for _, index in wire.passed} == set(range(4, 9))


async def test_what_is_not_wanted_any_more_leaves_nothing(start: Start, wire: Wire, tmp_path: Path) -> None:
    cloud, agent = await start(), await start("a1")
    blob, other = agent.have(a_file(tmp_path, 20 * CHUNK)), agent.have(a_file(tmp_path, 9 * CHUNK, seed=2))
    stopped = asyncio.Event()

    def stop() -> None:
        cloud.exchange.pulling.stop("a1", blob.xfer)
        stopped.set()

    wire.at[4] = stop
    cloud.pull("a1", blob)
    await stopped.wait()
    cloud.exchange.pulling.stop("a1", blob.xfer)
    cloud.pull("a1", other)
    assert await cloud.pulled(other.sha256) == Random(2).randbytes(other.size)
    assert cloud.outcomes.empty()
    assert cloud.unfinished() == []
    assert list(cloud.blobs) == [other.sha256]
