"""What can be done to a fleet, and a seeded sequence of it: each fault has a kind, a victim, a duration and an end.

A kind is a generator: it does the harm up to its `yield`, and heals what it did behind it.  What a killed process needs for
its recovery is not healing: the keeper of the fleet starts it again, as systemd would.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from chaos.fleet import BROKER, CLOUD, Fleet

Pace = Iterator[float | None]
"""What a fault yields: how long it waits there in seconds, None for as long as it lasts."""
Harm = Callable[[Fleet, str, random.Random], Pace]
BALLAST: Final = "ballast"


class Fault(NamedTuple):
    """One thing that happens to `victim`: it begins after `gap_s` and is healed `lasts_s` later."""

    kind: str
    victim: str
    gap_s: float
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.kind} {self.victim} {self.lasts_s:.1f} s"


def killed(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """SIGKILL."""
    fleet.signal(victim, signal.SIGKILL)
    yield None


def asked_to_stop(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """SIGTERM, as in an upgrade."""
    fleet.signal(victim, signal.SIGTERM)
    yield None


def child_killed(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """SIGKILL of the training child alone, as the kernel does when memory runs out."""
    for process in fleet.processes(victim)[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    yield None


def everything_killed(fleet: Fleet, _: str, chance: random.Random) -> Pace:
    """A power cut of the whole site."""
    names = list(fleet.cluster.members)
    chance.shuffle(names)
    for name in names:
        fleet.signal(name, signal.SIGKILL, below=True)
    yield None


def paused(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """SIGSTOP: it is there and does nothing."""
    processes = fleet.processes(victim)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    yield None
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def cut_off(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """The link is dead and nobody says so: packets vanish, or, for who has no wire, bytes do."""
    side, proxy = fleet.sides.get(victim), fleet.proxies[victim]
    if side:
        side.partition()
    else:
        proxy.blackhole()
    yield None
    if side:
        side.heal()
    else:
        proxy.heal()


def half_open(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """One direction hears nothing more."""
    proxy = fleet.proxies[victim]
    proxy.down.stalled = True
    yield None
    proxy.down.stalled = False


def reset(fleet: Fleet, victim: str, chance: random.Random) -> Pace:
    """A storm of RST: connections are cut again and again."""
    for _ in range(chance.randint(2, 12)):
        fleet.proxies[victim].cut()
        yield 0.5


def damaged(fleet: Fleet, victim: str, chance: random.Random) -> Pace:
    """Bits flip in both directions, below every checksum of TCP."""
    proxy = fleet.proxies[victim]
    proxy.up.flip_bits = proxy.down.flip_bits = chance.randint(1, 5)
    yield None
    proxy.up.flip_bits = proxy.down.flip_bits = 0


def torn(fleet: Fleet, victim: str, chance: random.Random) -> Pace:
    """The connection ends in the middle of a packet."""
    fleet.proxies[victim].up.cut_after_bytes = chance.randint(1, 8000)
    yield None


def lossy(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """30 % of all packets are lost."""
    return _wire(fleet, victim, loss_ratio=0.3)


def delayed(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """Two seconds in each direction, as over no satellite that flies."""
    return _wire(fleet, victim, delay_s=2.0)


def slow(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """64 kbit/s."""
    return _wire(fleet, victim, bytes_per_s=8000.0)


def shuffled(fleet: Fleet, victim: str, _: random.Random) -> Pace:
    """Packets come twice and in another order."""
    return _wire(fleet, victim, duplicate_ratio=0.3, reorder_ratio=0.3)


def _wire(fleet: Fleet, victim: str, **rules: float) -> Pace:
    side = fleet.sides[victim]
    side.set(**rules)
    yield None
    side.heal()


def disk_full(fleet: Fleet, _: str, __: random.Random) -> Pace:
    """Not one byte is left on the coordinator's disk."""
    ballast = fleet.state_dir / BALLAST
    with ballast.open("wb") as file:
        free_bytes = os.statvfs(fleet.state_dir).f_bavail * os.statvfs(fleet.state_dir).f_frsize
        with contextlib.suppress(OSError):  # somebody took of it meanwhile: then it is full all the same
            os.posix_fallocate(file.fileno(), 0, max(1, free_bytes))
    yield None
    ballast.unlink()


ALL: Final[dict[str, Harm]] = {
    "kill": killed,
    "stop": asked_to_stop,
    "kill child": child_killed,
    "power cut": everything_killed,
    "pause": paused,
    "partition": cut_off,
    "half-open": half_open,
    "resets": reset,
    "flipped bits": damaged,
    "torn packet": torn,
    "30 % loss": lossy,
    "2 s delay": delayed,
    "64 kbit/s": slow,
    "shuffled": shuffled,
    "disk full": disk_full,
}
NEEDS_WIRE: Final = frozenset({"30 % loss", "2 s delay", "64 kbit/s", "shuffled"})
OF_AGENTS: Final = frozenset({"kill child", *NEEDS_WIRE})
OF_PROCESSES: Final = frozenset({"kill", "stop", "pause"})


def sequence(fleet: Fleet, chance: random.Random, *, own_disk: bool, mean_gap_s: float) -> Iterator[Fault]:
    """Faults without end.  `own_disk`: whether the coordinator's disk may be filled without harm to anybody else."""
    kinds = [k for k in ALL if (fleet.sides or k not in NEEDS_WIRE) and (own_disk or k != "disk full")]
    while True:
        kind = chance.choice(kinds)
        victims = [CLOUD] if kind == "disk full" else fleet.agents if kind in OF_AGENTS else [*fleet.agents, CLOUD]
        victims = ["site"] if kind == "power cut" else victims + [BROKER] * (kind in OF_PROCESSES)
        lasts_s = min(20.0, 1.0 + chance.expovariate(1 / 5.0))
        yield Fault(kind, chance.choice(victims), min(30.0, chance.expovariate(1 / mean_gap_s)), lasts_s)


def free_disk(state_dir: Path) -> None:
    """Whatever was going on, there is room again."""
    (state_dir / BALLAST).unlink(missing_ok=True)
