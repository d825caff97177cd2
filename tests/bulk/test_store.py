"""Blobs by an object store beside the bus: a real S3 server, the real machines, and a bus that would carry the rest."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from coordinator.bucket import Bucket
from protocol.blobs import Blobs
from protocol.bus import Connected, Received
from protocol.errors import BadMessage
from protocol.exchange import Exchange
from protocol.http_store import Carrier
from protocol.memory_bus import MemoryBroker
from protocol.messages import Blob, Done, Grant, Placed, Refuse
from protocol.pulling import Outcome, Pulled
from protocol.spool import Spool
from protocol.topics import FromAgent, Topics
from protocol.transfer import Receiving

CHUNK = 64 * 1024
CLOUD = "coordinator"
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other sooner."""
    monkeypatch.setattr("protocol.store_way.RETRY_S", (0.1, 0.5, 1.0))


topics = Topics("lab")


class Side:
    """One daemon as far as transfers go; what it says goes to `others` at once, chunks over a bus in memory."""

    def __init__(self, broker: MemoryBroker, folder: Path, name: str, signer: Bucket | None = None) -> None:
        self.name, self.others = name, dict[str, Side]()
        self.bus = broker.bus(name)
        self.blobs = Blobs(folder / name)
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.said: list[Grant | Placed | Done | Refuse] = []
        self.files: dict[str, Path] = {}
        self.rewrite: Callable[[Any], Any] = lambda message: message
        self.moved = asyncio.Event()
        self.n_chunks = 0
        self.exchange = Exchange(
            bus=self.bus,
            spool=Spool(self.blobs),
            receiving=Receiving(timeout_s=0.5, max_timeout_s=0.5),
            clock=time.monotonic,
            say=self._say,
            chunk_topic=lambda peer, xfer: (
                topics.down_chunk(peer, xfer) if name == CLOUD else topics.up_chunk(name, xfer)
            ),
            source=self.files.get,
            outcome=self.outcomes.put,
            carrier=Carrier({"127.0.0.1"}),
            signer=signer,
        )

    def _say(self, peer: str, message: Grant | Placed | Done | Refuse) -> None:
        self.said.append(message)
        other = self.others.get(peer)
        if other is not None:
            asyncio.get_running_loop().call_soon(other.hear, self.name, self.rewrite(message))

    def hear(self, peer: str, message: object) -> None:
        match message:
            case Grant():
                self.exchange.granted(peer, message)
            case Placed():
                self.exchange.pulling.placed(peer, message)
        self.moved.set()

    async def run(self) -> None:
        async with self.bus, asyncio.TaskGroup() as tasks:
            mine = topics.coordinator_subscriptions() if self.name == CLOUD else topics.agent_subscriptions(self.name)
            await self.bus.subscribe(*mine)
            tasks.create_task(self.exchange.run())
            tasks.create_task(self._tick())
            while True:
                match await self.bus.next():
                    case Connected():
                        self.exchange.connected()
                    case Received(topic, payload, _):
                        place = topics.parse(topic)
                        self.n_chunks += 1
                        peer = place.agent if isinstance(place, FromAgent) else CLOUD
                        self.exchange.pulling.chunk(peer, topic.rpartition("/")[2], payload)
                self.moved.set()

    async def _tick(self) -> None:
        while True:
            self.moved.clear()
            due = self.exchange.pulling.wake_at
            with suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                    await self.moved.wait()
            self.exchange.pulling.tick()

    def pull(self, peer: str, blob: Blob, **how: Any) -> None:
        self.exchange.pulling.pull(peer, blob, by_store=True, **how)
        self.moved.set()

    async def ended(self) -> Outcome:
        async with asyncio.timeout(PATIENCE_S):
            return await self.outcomes.get()

    def has(self, path: Path, n_bytes: int = 14 * 2**20 + 5) -> Blob:
        """A file to offer, of several objects unless told."""
        path.write_bytes(Random(str(path.name)).randbytes(n_bytes))
        blob = Blob(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=n_bytes, chunk=CHUNK)
        self.files[blob.xfer] = path
        self.exchange.sending.add(blob)
        return blob


async def until(what: Callable[[], bool]) -> None:
    """Wait for something that has no event: it is another process, or inside a machine."""
    async with asyncio.timeout(PATIENCE_S):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def sides(folder: Path, signer: Bucket, n_agents: int = 1) -> AsyncIterator[tuple[Side, ...]]:
    broker = MemoryBroker()
    cloud = Side(broker, folder, CLOUD, signer)
    agents = [Side(broker, folder, f"a{number}") for number in range(n_agents)]
    cloud.others = {agent.name: agent for agent in agents}
    for agent in agents:
        agent.others = {CLOUD: cloud}
    tasks = [asyncio.create_task(side.run()) for side in (cloud, *agents)]
    try:
        yield (cloud, *agents)
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended


async def test_an_update_goes_by_the_store_and_leaves_nothing_there(tmp_path: Path, s3: Any, bucket: Any) -> None:
    async with sides(tmp_path, bucket()) as (cloud, agent):
        blob = agent.has(tmp_path / "update")
        cloud.pull("a0", blob)
        end = await cloud.ended()
        assert isinstance(end, Pulled)
        assert end.path.read_bytes() == (tmp_path / "update").read_bytes()
        assert (cloud.n_chunks, agent.exchange.n_sent_bytes) == (0, 0), "nothing went over the bus"
        assert agent.exchange.placing.n_sent_bytes == blob.size
        await until(lambda: not s3.names())


async def test_a_model_is_put_once_for_all_and_a_prefix_takes_no_more(tmp_path: Path, s3: Any, bucket: Any) -> None:
    async with sides(tmp_path, bucket(), n_agents=3) as (cloud, *agents):
        model = cloud.has(tmp_path / "model")
        size = 5 * 2**20 + 1
        part = hashlib.sha256((tmp_path / "model").read_bytes()[:size]).hexdigest()
        agents[0].pull(CLOUD, model, size=size, sha256=part)
        for agent in agents[1:]:
            agent.pull(CLOUD, model)
        ends = [await agent.ended() for agent in agents]
        assert [isinstance(end, Pulled) and end.path.stat().st_size for end in ends] == [size, model.size, model.size]
        assert cloud.exchange.placing.n_sent_bytes == model.size
        assert not sum(agent.n_chunks for agent in agents)
        assert len(s3.names()) == 4
        cloud.exchange.placing.keep_only({model.sha256})
        cloud.exchange.placing.keep_only(set())
        await until(lambda: not s3.names())


async def test_whoever_was_killed_in_mid_upload_puts_the_rest_only(tmp_path: Path, bucket: Any) -> None:
    heard = itertools.count()
    async with sides(tmp_path, bucket()) as (cloud, agent):
        blob = agent.has(tmp_path / "update", 24 * 2**20)
        agent.rewrite = lambda message: message if next(heard) < 4 else None
        cloud.pull("a0", blob)
        await until(lambda: cloud.exchange.pulling.fetching.receiving.counts.n_chunks >= 3)
    async with sides(tmp_path, bucket()) as (cloud, agent):
        agent.has(tmp_path / "update", 24 * 2**20)
        cloud.pull("a0", blob)
        assert isinstance(await cloud.ended(), Pulled)
        assert agent.exchange.placing.n_sent_bytes <= blob.size - 3 * 4 * 2**20


async def test_without_the_store_the_rest_goes_over_the_bus(tmp_path: Path, s3: Any, bucket: Any) -> None:
    async with sides(tmp_path, bucket()) as (cloud, agent):
        blob, model = agent.has(tmp_path / "update", 24 * 2**20), cloud.has(tmp_path / "model")
        cloud.pull("a0", blob)
        await until(lambda: cloud.exchange.pulling.fetching.receiving.counts.n_chunks > 0)
        s3.kill()
        try:
            end = await cloud.ended()
            assert isinstance(end, Pulled)
            assert 0 < cloud.n_chunks <= 20 * 2**20 // CHUNK, "what had come was not sent again"
            assert not cloud.exchange.way.is_open("a0"), "whichever side met it"
            agent.pull(CLOUD, model)
            assert isinstance(await agent.ended(), Pulled)
            assert agent.n_chunks == model.n_chunks
        finally:
            s3.start()


async def test_a_store_that_comes_back_in_time_is_waited_for(
    tmp_path: Path, s3: Any, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.store_way.RETRY_S", (0.1,) * 600)
    s3.kill()
    async with sides(tmp_path, bucket()) as (cloud, agent):
        cloud.pull("a0", agent.has(tmp_path / "update"))
        await asyncio.to_thread(s3.start)
        assert isinstance(await cloud.ended(), Pulled)
        assert cloud.n_chunks == 0


@pytest.mark.parametrize("change", ["nothing", "other"])
async def test_what_an_agent_did_not_put_is_not_taken(tmp_path: Path, s3: Any, bucket: Any, change: str) -> None:
    async with sides(tmp_path, bucket()) as (cloud, agent):
        blob = agent.has(tmp_path / "update", 6 * 2**20)

        def forged(_peer: str, _blob: Blob, grant: Grant) -> None:
            for run, url in zip(grant.ranges, grant.urls, strict=True):
                name = url.partition("?")[0].partition("/bulk/")[2]
                if change != "nothing":
                    s3.overwrite(name, bytes(5_000_000))
                cloud.hear("a0", Placed(xfer=grant.xfer, ranges=[run]))

        agent.exchange.placing.granted = forged  # type: ignore[assignment,method-assign]
        cloud.pull("a0", blob)
        assert isinstance(await cloud.ended(), Pulled), "over the bus, in the end"
        assert cloud.n_chunks == blob.n_chunks
        assert not cloud.exchange.way.fault, "the others go on with the store"


async def test_a_forged_url_is_not_followed(tmp_path: Path, bucket: Any) -> None:
    async with sides(tmp_path, bucket()) as (cloud, agent):
        model, update = cloud.has(tmp_path / "model", 2**20), agent.has(tmp_path / "update", 2**20)
        cloud.rewrite = lambda message: _with_urls(message, "file:///etc/passwd")
        agent.pull(CLOUD, model)
        cloud.pull("a0", update)
        assert isinstance(await agent.ended(), Pulled), "over the bus"
        assert isinstance(await cloud.ended(), Pulled), "over the bus"
        assert agent.n_chunks == model.n_chunks
        assert "not followed" in agent.exchange.way.fault


async def test_an_agent_cannot_have_objects_without_end_put_for_it(tmp_path: Path, s3: Any, bucket: Any) -> None:
    async with sides(tmp_path, bucket()) as (cloud, agent):
        model = cloud.has(tmp_path / "model")
        for runs in ([(1, 64)], [(0, 63)], [(64, 1)], [(0, 64), (0, 1)]):
            with pytest.raises(BadMessage, match="no objects"):
                cloud.exchange.granted("a0", Grant(xfer=model.xfer, ranges=runs, by_store=True))
        with pytest.raises(BadMessage, match="places"):
            cloud.exchange.granted("a0", Grant(xfer=model.xfer, ranges=[(0, 64)], by_store=True, urls=["https://x"]))
        with pytest.raises(BadMessage, match="places"):
            agent.exchange.granted(CLOUD, Grant(xfer=agent.has(tmp_path / "u").xfer, ranges=[(0, 64)], by_store=True))
        assert s3.names() == []


def _with_urls(message: Any, url: str) -> Any:
    urls = getattr(message, "urls", None)
    return msgspec.structs.replace(message, urls=[url] * len(urls)) if urls else message
