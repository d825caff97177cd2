"""A lossy network in user space: every client in a network namespace of its own, and between it and us a wire that we hold.

    client's namespace                        this process                              here
    198.18.N.2 -- TUN device -- read -> lose, delay, repeat, reorder, pace -> write -- TUN device -- 198.18.N.1

The idea is netem's (`man tc-netem`), but without its kernel module: whole IP packets pass through this process, so the TCP
stacks of both ends are the real ones and feel real loss.  198.18.0.0/15 is the range set aside for benchmarks (RFC 2544).
Needs the right to make namespaces and TUN devices; `obstacle()` says what is missing.  Cost: some 20 us per packet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Final, Self

TUN: Final = Path("/dev/net/tun")
TUNSETIFF: Final = 0x400454CA
IFF_TUN_NO_PI: Final = 0x1001
PACKET_BYTES: Final = 2048
BACKLOG_BYTES: Final = 64 * 1024
"""What a paced wire holds back before it drops the newest, as a router would."""
LATE_S: Final = 0.03
"""How much later than its successors a reordered packet comes."""
PREFIX: Final = "chaos-"


class NotPermitted(Exception):  # noqa: N818
    """No network can be made here; the text says why."""


@dataclass(eq=False)
class Wire:
    """What happens to the packets of one direction of one client's network."""

    loss_ratio: float = 0.0
    delay_s: float = 0.0
    duplicate_ratio: float = 0.0
    reorder_ratio: float = 0.0
    bytes_per_s: float = inf
    n_packets: int = 0
    n_lost: int = 0
    n_duplicated: int = 0
    n_reordered: int = 0
    free_at: float = 0.0

    def delays_s(self, n_bytes: int, now: float, chance: random.Random) -> list[float]:
        """When each copy of a packet arrives, in seconds from now; none for a packet that is lost."""
        self.n_packets += 1
        self.free_at = max(self.free_at, now)
        backlog_bytes = (self.free_at - now) * self.bytes_per_s if self.bytes_per_s < inf else 0
        if chance.random() < self.loss_ratio or backlog_bytes > BACKLOG_BYTES:
            self.n_lost += 1
            return []
        self.free_at += n_bytes / self.bytes_per_s
        delay_s = self.free_at - now + self.delay_s
        if chance.random() < self.reorder_ratio:
            self.n_reordered += 1
            delay_s += LATE_S
        if chance.random() < self.duplicate_ratio:
            self.n_duplicated += 1
            return [delay_s, delay_s + LATE_S]
        return [delay_s]


class Side:
    """One client's network: both directions, as seen from the client."""

    def __init__(self, name: str, namespace: str, address: str) -> None:
        self.name, self.namespace, self.address = name, namespace, address
        self.up, self.down = Wire(), Wire()

    def set(self, **rules: float) -> None:
        """Set rules of both directions."""
        for wire in (self.up, self.down):
            for rule, value in rules.items():
                setattr(wire, rule, value)

    def partition(self) -> None:
        """Nothing passes."""
        self.set(loss_ratio=1.0)

    def heal(self) -> None:
        """Everything passes."""
        self.set(loss_ratio=0.0, delay_s=0.0, duplicate_ratio=0.0, reorder_ratio=0.0, bytes_per_s=inf)

    def command(self, command: Iterable[str]) -> list[str]:
        """The command line that runs `command` in this network."""
        return ["ip", "netns", "exec", self.namespace, *command]


class Network:
    """Namespaces for `names`; `host` is the address at which each of them reaches us.  Raises NotPermitted."""

    def __init__(self, names: Iterable[str], seed: int = 0) -> None:
        self._random = random.Random(seed)
        third = random.Random(os.getpid()).randrange(256)
        self.host = f"198.18.{third}.1"
        self.sides = {
            name: Side(name, f"{PREFIX}{os.getpid()}-{i}", f"198.18.{third}.{i + 2}") for i, name in enumerate(names)
        }
        self._files: list[int] = []

    async def __aenter__(self) -> Self:
        if reason := obstacle():
            raise NotPermitted(reason)
        _sweep()
        for i, side in enumerate(self.sides.values()):
            near, far = f"ch{os.getpid()}h{i}"[-15:], f"ch{os.getpid()}n{i}"[-15:]
            here, there = _tun(near), _tun(far)
            self._files += [here, there]
            ns = side.namespace
            _ip("netns", "add", ns)
            _ip("link", "set", far, "netns", ns)
            _ip("-n", ns, "addr", "add", side.address, "peer", self.host, "dev", far)
            _ip("-n", ns, "link", "set", far, "up")
            _ip("-n", ns, "link", "set", "lo", "up")
            _ip("addr", "add", self.host, "peer", side.address, "dev", near)
            _ip("link", "set", near, "up")
            loop = asyncio.get_running_loop()
            loop.add_reader(there, self._carry, there, here, side.up)
            loop.add_reader(here, self._carry, here, there, side.down)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            asyncio.get_running_loop().remove_reader(file)
            os.close(file)
        self._files.clear()
        for side in self.sides.values():
            _ip("netns", "del", side.namespace)

    def _carry(self, source: int, sink: int, wire: Wire) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(source, PACKET_BYTES)
                for delay_s in wire.delays_s(len(packet), loop.time(), self._random):
                    if delay_s:
                        loop.call_later(delay_s, self._write, sink, packet)
                    else:
                        self._write(sink, packet)

    def _write(self, sink: int, packet: bytes) -> None:
        if sink in self._files:
            with contextlib.suppress(OSError):  # a full queue loses a packet, as queues do
                os.write(sink, packet)


def obstacle() -> str:
    """Why no network can be made here; empty when it can."""
    if shutil.which("ip") is None:
        return "the command `ip` is missing: install iproute2"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"{TUN} cannot be opened: load the tun module, and run as root"
    name = f"{PREFIX}{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.strip()}; run as root"
    _ip("netns", "del", name)
    return ""


def _sweep() -> None:
    """Remove namespaces of runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        if name.startswith(PREFIX) and not Path(f"/proc/{name.removeprefix(PREFIX).split('-')[0]}").exists():
            _ip("netns", "del", name)


def _tun(name: str) -> int:
    file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN_NO_PI))
    return file


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
