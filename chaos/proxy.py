"""A TCP proxy that misbehaves on command: between one client and its broker, with rules that change while it runs.

    async with Proxy("127.0.0.1", 1883) as proxy:       # clients go to proxy.port
        proxy.up.bytes_per_s = 8_000                    # a 64 kbit/s uplink from here on
        proxy.blackhole()                               # the peer vanished: no data, no FIN, in either direction
        proxy.heal()
        proxy.cut()                                     # RST on every connection

`up` is the way from the client to the broker, `down` the way back.  Every rule holds for bytes that come after it was set.
With `mqtt=True` the stream is cut into MQTT packets, so that PUBLISH packets can be repeated and swapped, which TCP alone
never does but brokers and their bridges may.  Memory: at most READ_BYTES and one packet per connection and direction,
plus what latency holds back, at most HELD_BYTES.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Final, Literal, Self

READ_BYTES: Final = 4096
HELD_BYTES: Final = 4 * 2**20
BUFFER_BYTES: Final = 32 * 1024
"""Of the kernel, per socket: a slow link must be felt by the sender, not hidden in our buffers."""
PUBLISH: Final = 3
LOOK_S: Final = 0.02
RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() a RST."""


@dataclass(eq=False)
class Way:
    """What happens to the bytes of one direction.  Ratios are per packet and need `mqtt=True`."""

    latency_s: float = 0.0
    bytes_per_s: float = inf
    stalled: bool = False
    flip_bits: int = 0
    """So many bits are still to be flipped, one per piece that passes."""
    cut_after_bytes: float = inf
    """The connection is closed in the middle of a packet after so many more bytes."""
    duplicate_ratio: float = 0.0
    swap_ratio: float = 0.0
    n_bytes: int = 0
    n_flipped: int = 0
    n_duplicated: int = 0
    n_swapped: int = 0


class Proxy:
    """One listening port before one server.  `seed` decides which bits and packets are hit."""

    def __init__(self, host: str, port: int, *, listen: str = "127.0.0.1", mqtt: bool = False, seed: int = 0) -> None:
        self.up, self.down = Way(), Way()
        self.accepting: Literal["yes", "refuse", "slow"] = "yes"
        self.accept_delay_s = 0.0
        self.port = 0
        self.n_accepted = self.n_cut = 0
        self.host = listen
        self._upstream, self._mqtt = (host, port), mqtt
        self._random = random.Random(seed)
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    async def __aenter__(self) -> Self:
        listening = socket.create_server((self.host, self.port))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._accepted, sock=listening, limit=READ_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    # ------------------------------------------------------------------------------------------------------- commands

    def blackhole(self) -> None:
        """The peer vanished: nothing passes in either direction, not even the end of a connection."""
        self.up.stalled = self.down.stalled = True

    def heal(self) -> None:
        """Back to a good link; what was held back passes now."""
        for way in (self.up, self.down):
            way.latency_s, way.bytes_per_s, way.stalled = 0.0, inf, False
            way.flip_bits, way.cut_after_bytes = 0, inf
            way.duplicate_ratio = way.swap_ratio = 0.0
        self.accepting = "yes"
        self.accept_delay_s = 0.0

    def cut(self) -> int:
        """RST on both sides of every connection; how many there were."""
        for writers in self._open.values():
            for writer in writers:
                _reset(writer)
        n = len(self._open)
        self.n_cut += n
        return n

    @property
    def n_open(self) -> int:
        """Connections there are now."""
        return len(self._open)

    # ---------------------------------------------------------------------------------------------------- connections

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = [writer]
        self.n_accepted += 1
        try:
            with contextlib.suppress(
                OSError, ExceptionGroup, asyncio.CancelledError
            ):  # either side may go at any moment
                await self._serve(reader, writer, self._open[task])
        finally:
            for side in self._open.pop(task):
                side.close()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sides: list[asyncio.StreamWriter]
    ) -> None:
        if self.accepting == "refuse":
            _reset(writer)
            return
        await asyncio.sleep(self.accept_delay_s if self.accepting == "slow" else 0)
        while self.up.stalled:  # a peer that is not there does not answer
            await asyncio.sleep(LOOK_S)
        there = socket.socket()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        there.setblocking(False)
        await asyncio.get_running_loop().sock_connect(there, self._upstream)
        far_reader, far_writer = await asyncio.open_connection(sock=there, limit=READ_BYTES)
        sides.append(far_writer)
        for side in sides:
            side.transport.set_write_buffer_limits(BUFFER_BYTES)
            side.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.TaskGroup() as pumps:
            for way, source, sink in ((self.up, reader, far_writer), (self.down, far_reader, writer)):
                pipe = _Pipe(way, self._random, mqtt=self._mqtt)
                pumps.create_task(pipe.take(source))
                pumps.create_task(pipe.give(sink))


class _Pipe:
    """One direction of one connection: `take` reads at the pace of the link, `give` writes what latency lets go."""

    def __init__(self, way: Way, chance: random.Random, *, mqtt: bool) -> None:
        self._way, self._chance, self._mqtt = way, chance, mqtt
        self._held: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0
        self._arrived = asyncio.Event()
        self._rest = b""
        self._swapped: list[bytes] = []

    async def take(self, source: asyncio.StreamReader) -> None:
        """Read to the end, which is passed on as an empty piece."""
        data, loop = b"-", asyncio.get_running_loop()
        while data:
            try:
                data = await source.read(int(min(READ_BYTES, max(256, self._way.bytes_per_s / 20))))
            except ConnectionError:
                data = b""
            if self._way.bytes_per_s < inf:
                await asyncio.sleep(len(data) / self._way.bytes_per_s)
            pieces = [out for packet in self._packets(data) for out in self._shuffled(packet)] if self._mqtt else [data]
            self._held.extend((loop.time() + self._way.latency_s, piece) for piece in pieces if piece)
            if not data:
                self._held.append((loop.time(), b""))
            self._held_bytes += sum(map(len, pieces))
            self._arrived.set()
            while self._held_bytes > HELD_BYTES:
                await asyncio.sleep(LOOK_S)

    async def give(self, sink: asyncio.StreamWriter) -> None:
        """Write what is due."""
        way, loop = self._way, asyncio.get_running_loop()
        while True:
            while not self._held:
                self._arrived.clear()
                await self._arrived.wait()
            due, data = self._held.popleft()
            await asyncio.sleep(due - loop.time())
            while way.stalled:
                await asyncio.sleep(LOOK_S)
            if not data:
                sink.write_eof()
                return
            self._held_bytes -= len(data)
            if len(data) > way.cut_after_bytes:
                sink.write(data[: int(way.cut_after_bytes)])
                way.cut_after_bytes = inf
                raise ConnectionResetError("cut in the middle of a packet")
            way.cut_after_bytes -= len(data)
            way.n_bytes += len(data)
            sink.write(self._flipped(data))
            await sink.drain()

    def _flipped(self, data: bytes) -> bytes:
        way = self._way
        if not way.flip_bits:
            return data
        way.flip_bits -= 1
        way.n_flipped += 1
        hit = bytearray(data)
        hit[self._chance.randrange(len(hit))] ^= 1 << self._chance.randrange(8)
        return bytes(hit)

    def _packets(self, data: bytes) -> list[bytes]:
        """Whole MQTT packets; the end of the stream lets the rest out as it is."""
        self._rest += data
        found = []
        while (n := _packet_bytes(self._rest)) and n <= len(self._rest):
            found.append(self._rest[:n])
            self._rest = self._rest[n:]
        if not data:
            found.append(self._rest)
        return found

    def _shuffled(self, packet: bytes) -> list[bytes]:
        """A packet as it passes: once, twice, after its successor, or with its predecessor behind it."""
        way = self._way
        swapped, self._swapped = self._swapped, []
        if swapped:
            way.n_swapped += 1
        elif packet and packet[0] >> 4 == PUBLISH:
            if self._chance.random() < way.duplicate_ratio:
                way.n_duplicated += 1
                return [packet, packet]
            if self._chance.random() < way.swap_ratio:
                self._swapped = [packet]
                return []
        return [packet, *swapped]


def _packet_bytes(data: bytes) -> int:
    """Length of the MQTT packet that `data` begins with; 0 while its head is not whole (MQTT 5, section 1.5.5)."""
    length = 0
    for i, byte in enumerate(data[1:5]):
        length |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return 2 + i + length
    return 0


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST."""
    with contextlib.suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
