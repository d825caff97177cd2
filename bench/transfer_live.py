"""How fast, how fair and how complete bulk moves over a real broker: make bench-transfer (minutes; one part: --only broadcast).

Everything but the daemons around it is real: protocol/exchange.py on our MQTT bus, files on the disk, digests verified, and a
mosquitto with the configuration that we recommend.  Senders and receivers are processes of their own.  The parts:

- throughput: an update pulled from one agent, beside the same frames published at QoS 0 as fast as the bus takes them;
- fairness:   ten agents that upload at once;
- distance:   an agent behind a link of 100 ms and a given bandwidth (a relay that delays and paces each direction);
- broadcast:  one model to a hundred agents, a third of which want the first half of it; and once more with 5 % of the chunks
              lost, at each receiver on its own.

Ratios are what to look at: the machine is shared by broker, senders and receivers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, Self

from fedpipe.broker import free_port, mosquitto_command
from protocol import codec
from protocol.blobs import Blobs
from protocol.broadcast import EVERYONE
from protocol.bus import BrokerConfig, Connected, Received, mqtt_bus
from protocol.daemon import tune_malloc
from protocol.exchange import Exchange, Outcome, Pulled
from protocol.frames import encode_frame
from protocol.messages import Blob, Done, Grant, Refuse
from protocol.outgoing import Outgoing
from protocol.spool import Spool
from protocol.topics import FromAgent, FromCoordinator, ToAgent, Topics
from protocol.transfer import MAX_WINDOW, Receiving

tune_malloc()  # as the daemons do; in every process of the bench
CLOUD = "coordinator"
CHUNK_BYTES = 256 * 1024
MB = 10**6
Part = Callable[[int, Path], Coroutine[Any, Any, dict[str, Any]]]
QUEUE_S = 0.05
"""What a link holds back before it, in seconds of its bandwidth: a router has a queue, and our clock is late at times."""
TOPICS = Topics("bench")
DROPPED = "$SYS/broker/publish/messages/dropped"


class Node:
    """A daemon as far as bulk goes.  `lose` is the share of chunks that vanish when they are here."""

    def __init__(self, url: str, folder: Path, name: str, *, window: int = 8, lose: float = 0.0) -> None:
        self.name, self._is_cloud = name, name == CLOUD
        self.bus = mqtt_bus(BrokerConfig(url=url), name, lambda: None)
        self.outgoing = Outgoing(time.monotonic)
        self.outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        self.n_chunks, self.n_lost, self.n_dropped = 0, 0, 0
        self.arrived, self.counting, self.connected = asyncio.Event(), 0, asyncio.Event()
        self.whole_at: dict[str, float] = {}
        self._lose, self._random = lose, Random(name)
        self._files: dict[str, Path] = {}
        self.exchange = Exchange(
            bus=self.bus,
            spool=Spool(Blobs(folder / name)),
            receiving=Receiving(window=window, max_window=MAX_WINDOW),
            clock=time.monotonic,
            say=self._say,
            chunk_topic=self._chunk_topic,
            blob_topic=TOPICS.blob,
            source=self._files.get,
            outcome=self.outcomes.put,
        )

    async def __aenter__(self) -> Self:
        self._stack = await AsyncExitStack().__aenter__()
        await self._stack.enter_async_context(self.bus)
        mine = (
            [*TOPICS.coordinator_subscriptions(), DROPPED] if self._is_cloud else TOPICS.agent_subscriptions(self.name)
        )
        await self.bus.subscribe(*mine)
        work = (self._read(), self._tick(), self.exchange.run(), self.outgoing.run(self.bus))
        self._tasks = [asyncio.create_task(one) for one in work]
        await self.connected.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    def offer(self, path: Path, blob: Blob) -> Blob:
        """Have a file ready for whoever asks."""
        self._files[blob.xfer] = path
        return self.exchange.offer(blob)

    async def pulled(self) -> Pulled:
        """The next end of a transfer, which must be a good one."""
        end = await self.outcomes.get()
        assert isinstance(end, Pulled), f"{self.name}: {end.reason}"
        return end

    async def count(self, n: int) -> None:
        """Wait for so many chunks from now on, whatever they are."""
        self.counting, self.n_chunks = n, 0
        self.arrived.clear()
        await self.arrived.wait()

    def _chunk_topic(self, peer: str, xfer: str) -> str:
        if not self._is_cloud:
            return TOPICS.up_chunk(self.name, xfer)
        return TOPICS.blob(xfer) if peer == EVERYONE else TOPICS.down_chunk(peer, xfer)

    def _say(self, peer: str, message: Grant | Done | Refuse) -> None:
        self.outgoing.say(TOPICS.down(peer, "grant") if self._is_cloud else TOPICS.up(self.name, "answer"), message)

    async def _read(self) -> None:
        while True:
            match await self.bus.next():
                case Connected():
                    self.exchange.connected()
                    self.connected.set()
                case Received(topic, payload, _) if topic == DROPPED:
                    self.n_dropped = int(payload)
                case Received(topic, payload, _):
                    self._receive(topic, payload)

    def _receive(self, topic: str, payload: bytes) -> None:
        match TOPICS.parse(topic):
            case FromAgent(agent=agent, leaf="d", xfer=xfer):
                self._chunk(agent, xfer, payload, heard=False)
            case ToAgent(leaf="d", xfer=xfer):
                self._chunk(CLOUD, xfer, payload, heard=False)
            case FromCoordinator(leaf="blob", name=xfer):
                self._chunk(CLOUD, xfer, payload, heard=True)
            case FromAgent(agent=peer) | ToAgent(agent=peer):
                if isinstance(grant := codec.decode(payload).b, Grant):
                    self.exchange.granted(peer if self._is_cloud else CLOUD, grant)

    def _chunk(self, peer: str, xfer: str, payload: bytes, *, heard: bool) -> None:
        self.n_chunks += 1
        if self.n_chunks == self.counting:
            self.arrived.set()
        if self._lose and self._random.random() < self._lose:
            self.n_lost += 1
            return
        self.exchange.chunk(peer, xfer, payload, heard=heard)
        if self.exchange.receiving.remaining(peer, xfer) is None:
            self.whole_at.setdefault(xfer, time.monotonic())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            self.exchange.tick()


# ------------------------------------------------------------------------------------------------------------- processes


class Agents:
    """Agents in a process of their own, told what to do over a pipe."""

    def __init__(self, url: str, folder: Path, names: Sequence[str], **settings: Any) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, url, folder, list(names), settings), daemon=True)
        self._process.start()

    async def __aenter__(self) -> Self:
        await self.answer()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pipe.send(("stop",))
        await asyncio.to_thread(self._process.join, 20)

    @property
    def pid(self) -> int:
        """Of that process."""
        assert self._process.pid is not None
        return self._process.pid

    def do(self, *order: Any) -> None:
        """Give an order; see _live."""
        self._pipe.send(order)

    async def answer(self) -> Any:
        """The answer to it."""
        return await asyncio.to_thread(self._pipe.recv)


def _live(pipe: Connection, url: str, folder: Path, names: list[str], settings: dict[str, Any]) -> None:
    asyncio.run(_obey(pipe, url, folder, names, settings))


async def _obey(pipe: Connection, url: str, folder: Path, names: list[str], settings: dict[str, Any]) -> None:
    async with AsyncExitStack() as stack:
        if (how := settings.pop("link", None)) is not None:
            url = f"mqtt://127.0.0.1:{await stack.enter_async_context(link(int(url.rpartition(':')[2]), *how))}"
        nodes = [await stack.enter_async_context(Node(url, folder, name, **settings)) for name in names]
        pipe.send("ready")
        while True:
            match await asyncio.to_thread(pipe.recv):
                case ("offer", files):
                    for node, (path, blob) in zip(nodes, files, strict=True):
                        node.offer(path, blob)
                    pipe.send("offered")
                case ("publish", path, blob):
                    for node in nodes:
                        await _publish(node, path, blob)
                case ("pull", blob, sizes):
                    pipe.send(await asyncio.gather(*(_pull(*one, blob) for one in zip(nodes, sizes, strict=True))))
                case ("stop",):
                    return


async def _publish(node: Node, path: Path, blob: Blob) -> None:
    """Bare: every frame as soon as the bus took the one before."""
    data = path.read_bytes()
    for index in range(blob.n_chunks):
        frame = encode_frame(index, data[index * blob.chunk : (index + 1) * blob.chunk])
        await node.bus.publish(TOPICS.up_chunk(node.name, blob.xfer), frame, qos=0)


async def _pull(node: Node, wanted: tuple[int, str], blob: Blob) -> tuple[float, int, int]:
    """Until it is verified: when, chunks that came, and those that were lost of them."""
    size, sha256 = wanted
    node.n_chunks = node.n_lost = 0
    node.exchange.pull(CLOUD, blob, size=size if size < blob.size else None, sha256=sha256, listen=True)
    await node.pulled()
    return time.monotonic(), node.n_chunks, node.n_lost


# ----------------------------------------------------------------------------------------------------------------- world


@contextmanager
def mosquitto(folder: Path) -> Iterator[int]:
    """A broker as we recommend it; its port."""
    port = free_port()
    command = mosquitto_command(port, folder, ["sys_interval 1"])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


@asynccontextmanager
async def link(port: int, bytes_per_s: float, one_way_s: float) -> AsyncIterator[int]:
    """A relay to `port` that delays and paces the bytes of each direction; its own port."""

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=4096)
        loop = asyncio.get_running_loop()

        async def deliver() -> None:
            while True:
                due, data = await held.get()
                if (wait_s := due - loop.time()) > 0:
                    await asyncio.sleep(wait_s)
                sink.write(data)
                await sink.drain()

        delivering, free_at = asyncio.create_task(deliver()), 0.0
        try:
            while data := await source.read(16 * 1024):
                free_at = max(free_at, loop.time()) + len(data) / bytes_per_s
                await held.put((free_at + one_way_s, data))
                if (
                    ahead_s := free_at - loop.time()
                ) > 2 * QUEUE_S:  # what the link has no room for stays with the sender
                    await asyncio.sleep(ahead_s - QUEUE_S)
        finally:
            delivering.cancel()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))
        for side in (writer, far_writer):
            side.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@contextmanager
def added_cpu_s(total: list[float], pids: Iterable[int]) -> Iterator[None]:
    """Adds to `total` what each process spends within; the kernel counts in steps of 10 ms."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")

    def spent() -> list[float]:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        return [(int(field[11]) + int(field[12])) * tick_s for field in fields]  # utime, stime: proc(5)

    before = spent()
    yield
    for n, after in enumerate(spent()):
        total[n] += after - before[n]


def content(folder: Path, n_bytes: int, seed: int) -> tuple[Path, Blob]:
    """A file of random bytes, and its blob."""
    path, random = folder / f"content-{seed}", Random(seed)
    data = b"".join(random.randbytes(2**20) for _ in range(n_bytes // 2**20))
    path.write_bytes(data)
    return path, Blob(sha256=hashlib.sha256(data).hexdigest(), size=n_bytes, chunk=CHUNK_BYTES)


# ----------------------------------------------------------------------------------------------------------------- parts


async def throughput(port: int, folder: Path, n_bytes: int, n_times: int = 7) -> dict[str, Any]:
    """MB/s of a verified, durable upload and of bare publishes, in turn, medians; and the CPU time that they cost."""
    url = f"mqtt://127.0.0.1:{port}"
    bare, ours, last = [], [], []
    spent = {"bare": [0.0, 0.0], "verified": [0.0, 0.0]}
    async with Node(url, folder, CLOUD, window=12) as cloud, Agents(url, folder, ["a0"]) as agent:
        pids = {"sender": agent.pid, "receiver": os.getpid()}
        for seed in range(n_times):
            path, blob = content(folder, n_bytes, seed)
            with added_cpu_s(spent["bare"], pids.values()):
                started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
                agent.do("publish", path, blob)
                await counting
            bare.append(time.monotonic() - started)
            agent.do("offer", [(path, blob)])
            await agent.answer()
            with added_cpu_s(spent["verified"], pids.values()):
                started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
                cloud.exchange.pull("a0", blob)
                await counting
                last.append(time.monotonic() - started)
                await cloud.pulled()
            ours.append(time.monotonic() - started)
        await asyncio.sleep(1.5)  # the broker counts each second
        rates = {
            name: n_bytes / MB / statistics.median(times)
            for name, times in (("bare", bare), ("last chunk", last), ("verified", ours))
        }
        return {
            "mb_per_s": {name: round(rate) for name, rate in rates.items()},
            "ratio_last_chunk": round(rates["last chunk"] / rates["bare"], 2),
            "ratio_verified": round(rates["verified"] / rates["bare"], 2),
            "cpu_s_per_gb": {
                side: {how: round(spent[how][n] * 1e9 / n_bytes / n_times, 2) for how in spent}
                for n, side in enumerate(pids)
            },
            "dropped": cloud.n_dropped,
            "sent_again": cloud.exchange.receiving.counts.n_voided,
        }


async def fairness(port: int, folder: Path, n_bytes: int, n_agents: int = 10) -> dict[str, Any]:
    """Uploads that begin together: when the last is whole (and when it is verified), over when the first is."""
    url = f"mqtt://127.0.0.1:{port}"
    names = [f"a{n}" for n in range(n_agents)]
    files = [content(folder, n_bytes, 100 + n) for n in range(n_agents)]
    async with AsyncExitStack() as stack:
        cloud = await stack.enter_async_context(Node(url, folder, CLOUD, window=12))
        for half in (0, 1):
            agents = await stack.enter_async_context(Agents(url, folder, names[half::2]))
            agents.do("offer", files[half::2])
            await agents.answer()
        started, finished = time.monotonic(), []
        for name, (_, blob) in zip(names, files, strict=True):
            cloud.exchange.pull(name, blob)
        for _ in names:
            await cloud.pulled()
            finished.append(time.monotonic() - started)
        whole = [cloud.whole_at[blob.xfer] - started for _, blob in files]
        await asyncio.sleep(1.5)
        return {
            "max_over_min_last_chunk": round(max(whole) / min(whole), 2),
            "max_over_min_verified": round(max(finished) / min(finished), 2),
            "mb_per_s": round(n_agents * n_bytes / MB / max(finished)),
            "dropped": cloud.n_dropped,
            "sent_again": cloud.exchange.receiving.counts.n_voided,
        }


async def distance(port: int, folder: Path, mbit_per_s: float, n_bytes: int) -> dict[str, Any]:
    """An upload over a link with a round trip of 100 ms: share of its bandwidth that is used, from first grant to last chunk."""
    bytes_per_s = mbit_per_s * 1e6 / 8
    async with AsyncExitStack() as stack:
        url = f"mqtt://127.0.0.1:{port}"
        cloud = await stack.enter_async_context(Node(url, folder, CLOUD, window=12))
        agent = await stack.enter_async_context(Agents(url, folder, ["a0"], link=(bytes_per_s, 0.05)))
        path, blob = content(folder, n_bytes, int(mbit_per_s))
        started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
        agent.do("publish", path, blob)
        await counting
        bare_s = time.monotonic() - started
        agent.do("offer", [(path, blob)])
        await agent.answer()
        started, counting = time.monotonic(), asyncio.create_task(cloud.count(blob.n_chunks))
        cloud.exchange.pull("a0", blob)
        await counting
        took_s = time.monotonic() - started
        await cloud.pulled()
        return {
            "mbit_per_s": mbit_per_s,
            "used_ratio": round(n_bytes / took_s / bytes_per_s, 2),
            "bare_used_ratio": round(n_bytes / bare_s / bytes_per_s, 2),
            "sent_again": cloud.exchange.receiving.counts.n_voided,
        }


async def broadcast(
    port: int, folder: Path, n_bytes: int, n_agents: int, lose: float, n_processes: int = 4
) -> dict[str, Any]:
    """One model to many at once."""
    url = f"mqtt://127.0.0.1:{port}"
    path, blob = content(folder, n_bytes, 7)
    half = n_bytes // 2
    sizes = [
        (half, hashlib.sha256(path.read_bytes()[:half]).hexdigest()),
        (n_bytes, blob.sha256),
        (n_bytes, blob.sha256),
    ]
    names = [f"b{n}" for n in range(n_agents)]
    async with AsyncExitStack() as stack:
        cloud = await stack.enter_async_context(Node(url, folder, CLOUD))
        started_all = [Agents(url, folder, names[i::n_processes], lose=lose) for i in range(n_processes)]
        fleet = [await stack.enter_async_context(agents) for agents in started_all]
        blob = cloud.offer(path, blob)
        for name in names:
            cloud.exchange.announced(name, blob)
        started = time.monotonic()
        for i, agents in enumerate(fleet):
            agents.do("pull", blob, [sizes[n % 3] for n in range(len(names[i::n_processes]))])
        ends = [end for agents in fleet for end in await agents.answer()]
        await asyncio.sleep(1.5)
        return {
            "agents": n_agents,
            "complete": len(ends),
            "lost_ratio": round(sum(e[2] for e in ends) / sum(e[1] for e in ends), 3),
            "sent_over_size": round(cloud.exchange.n_sent_bytes / n_bytes, 2),
            "seconds": round(max(e[0] for e in ends) - started, 2),
            "chunks_each": [min(e[1] for e in ends), max(e[1] for e in ends), blob.n_chunks],
            "dropped": cloud.n_dropped,
        }


PARTS = ("throughput", "fairness", "distance", "broadcast")


async def measure(only: Sequence[str], n_agents: int) -> dict[str, Any]:
    """Every part that is asked for, each on a broker of its own."""
    found: dict[str, Any] = {}
    work: dict[str, list[Part]] = {
        "throughput": [lambda port, at: throughput(port, at, 64 * 2**20)],
        "fairness": [lambda port, at: fairness(port, at, 16 * 2**20)],
        "distance": [
            lambda port, at: distance(port, at, 20, 24 * 2**20),
            lambda port, at: distance(port, at, 200, 192 * 2**20),
            lambda port, at: distance(port, at, 1000, 384 * 2**20),
        ],
        "broadcast": [
            lambda port, at: broadcast(port, at, 32 * 2**20, n_agents, 0.0),
            lambda port, at: broadcast(port, at, 32 * 2**20, n_agents, 0.05),
        ],
    }
    for part in only:
        found[part] = []
        for one in work[part]:
            with tempfile.TemporaryDirectory() as folder, mosquitto(Path(folder)) as port:
                found[part].append(await one(port, Path(folder)))
            print(part, found[part][-1], flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.transfer_live")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--agents", type=int, default=100, help="of the broadcast")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.only or PARTS, arguments.agents))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()} | found, indent=1))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
