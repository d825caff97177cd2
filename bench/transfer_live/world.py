"""What the bench runs in: a broker, a link that is long or narrow, files, and who spends how much processor time."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Final

from bench.transfer_live.node import blob_of
from fedpipe.broker import free_port, mosquitto_command
from protocol.files import replacing
from protocol.messages import Blob

CHUNK_BYTES: Final = 256 * 1024
QUEUE_S: Final = 0.05
"""What a link holds back before it, in seconds of its bandwidth: a router has a queue, and our clock is late at times."""


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
    """A file of random bytes, and its blob.  It is on the disk, which has other work while something is measured."""
    path, random = folder / f"content-{seed}", Random(seed)
    with replacing(path) as file:
        file.writelines(random.randbytes(2**20) for _ in range(n_bytes // 2**20))
    return path, blob_of(path, CHUNK_BYTES)
