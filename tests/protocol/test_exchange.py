"""Blobs between daemons over a bus that loses, cuts and refuses: what arrives is right, and only what is missing is sent again."""

from __future__ import annotations

import asyncio
import hashlib
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from bench.transfer_live.node import CLOUD, Node, blob_of
from protocol.bus import Connected
from protocol.errors import BadMessage, Unavailable
from protocol.frames import encode_frame
from protocol.memory_bus import MemoryBroker
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.pulling import Lost, Outcome, Pulled
from protocol.spool import Spool
from protocol.topics import Topics

CHUNK = 1024
FOR_EVER = {"timeout_s": 1e6, "max_timeout_s": 1e6}
"""With these a transfer never goes on because of a timer."""
IMPATIENT = {"timeout_s": 0.02, "max_timeout_s": 0.5}
PATIENCE_S = 60.0
topics = Topics("lab")


class Side(Node):
    """One daemon as far as transfers go, on a bus in memory, with what it heard and what it could not take."""

    def __init__(
        self, broker: MemoryBroker, folder: Path, name: str = CLOUD, max_bytes: int = 2**30, **rules: Any
    ) -> None:
        super().__init__(broker.bus(name), topics, folder, name, max_bytes=max_bytes, **{**FOR_EVER, **rules})
        self.heard: asyncio.Queue[Done | Refuse] = asyncio.Queue()
        self.bad: list[str] = []
        self.n_grants = 0
        self.moved = asyncio.Event()

    def say(self, peer: str, message: Grant | Placed | Done | Refuse) -> None:
        self.n_grants += isinstance(message, Grant)
        super().say(peer, message)

    def receive(self, topic: str, payload: bytes) -> None:
        try:
            super().receive(topic, payload)
        except BadMessage as error:
            self.bad.append(str(error))
        self.timer.moved()
        self.moved.set()

    def hear(self, answer: Done | Refuse) -> None:
        self.heard.put_nowait(answer)

    def have(self, path: Path, **changes: Any) -> Blob:
        """Have this file ready for whoever asks, in whatever chunks."""
        blob = msgspec.structs.replace(blob_of(path, CHUNK), **changes)
        self.offer(path, blob)
        self.exchange.sending.add(blob)  # as it is, whatever the broker takes
        return blob

    async def ended(self) -> Outcome:
        async with asyncio.timeout(PATIENCE_S):
            return await self.outcomes.get()

    async def answered(self) -> Done | Refuse:
        async with asyncio.timeout(PATIENCE_S):
            return await self.heard.get()

    async def pulled(self, sha256: str) -> bytes:
        """The next outcome is this content; its bytes."""
        end = await self.ended()
        assert isinstance(end, Pulled), end
        assert end.sha256 == sha256
        assert end.path == self.blobs.path(sha256)
        return end.path.read_bytes()

    async def lost(self) -> Lost:
        end = await self.ended()
        assert isinstance(end, Lost), end
        return end

    def unfinished(self) -> list[Path]:
        return list(self.blobs.partial.iterdir())


Start = Callable[..., Any]


class Wire:
    """A broker whose chunks are counted and, if told, lost."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.broker.drop = self._passes
        self.passed: list[tuple[str, int]] = []
        self.lose: Callable[[int], bool] = lambda _: False
        self.at: dict[int, Callable[[], object]] = {}

    def _passes(self, topic: str, payload: bytes) -> bool:
        if "/d/" not in topic and "/c/blob/" not in topic:
            return False
        number = len(self.passed)
        self.passed.append((topic.rsplit("/", 1)[-1], int.from_bytes(payload[4:8], "big")))
        if number in self.at:
            asyncio.get_running_loop().call_soon(self.at[number])
        return self.lose(number)


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def start(wire: Wire, tmp_path: Path) -> AsyncIterator[Start]:
    """Start a Side: `await start()` is the coordinator, `await start("a1")` an agent."""
    async with AsyncExitStack() as stack:

        async def begin(name: str = CLOUD, **rules: Any) -> Side:
            return await stack.enter_async_context(Side(wire.broker, tmp_path, name, **rules))

        yield begin


def a_file(folder: Path, n_bytes: int, seed: int = 1) -> Path:
    path = folder / f"file-{seed}-{n_bytes}"
    path.write_bytes(Random(seed).randbytes(n_bytes))
    return path


# ---------------------------------------------------------------------------------------------------------- it arrives


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


# ------------------------------------------------------------------------------------------------- read while it comes


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


# -------------------------------------------------------------------------------------------------------- a broadcast


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


# ------------------------------------------------------------------------------------------------------ a bad network


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


# ------------------------------------------------------------------------------------------------------------ restarts


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


# ------------------------------------------------------------------------------------------------------------ refusals


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


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond this, as a full disk would (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
