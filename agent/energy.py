"""How much energy a share of a round takes: counters of the device that trains, or what this server's owner declares.

    GPU    NVML's counter of the device (Volta and later); else what it draws at each look, by the trapezoidal rule
    CPU    RAPL's counters of its packages and their memory (/sys/class/powercap), which wrap and often only root may read
    else   `power_w` of the configuration times the time: declared; without it the energy is unknown, and said to be

A counter is the whole device's: what it draws when idle and what others do on it is in it, the rest of the server is not.  While
training is paused for the host nothing counts, and what a daemon spent before it was restarted is forgotten.
Source: Linux, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

from agent import gpus
from protocol.messages import Energy

POWERCAP: Final = Path("/sys/class/powercap")
LOOK_S: Final = 5.0
"""Far below the quarter of an hour in which RAPL's counter of a busy server wraps."""


class Counter(NamedTuple):
    """Joules since some beginning; after `range_joules` it starts again at 0 (0: never)."""

    joules: float
    range_joules: float = 0.0


Seen = Mapping[str, Counter] | float
"""One look: counters by name, or watts."""


class Meter:
    """Adds up looks.  No clock and no I/O."""

    def __init__(self, declared_w: float = 0.0) -> None:
        self._declared_w = declared_w
        self._joules, self._seconds, self._is_measured = 0.0, 0.0, False
        self._looked_at: float | None = None
        self._last: tuple[Seen, float] | None = None

    def see(self, seen: Seen | None, now: float, *, counts: bool = True) -> None:
        """Take in a look at `now` (seconds), None if nothing could be read; what passed since the one before counts or not."""
        if counts and self._looked_at is not None:
            self._seconds += now - self._looked_at
        if counts and seen is not None and self._last is not None:
            before, at = self._last
            self._joules += spent(before, seen, now - at)
            self._is_measured = True
        self._looked_at = now
        if seen is not None:
            self._last = seen, now
        elif not counts:
            self._last = None

    @property
    def energy(self) -> Energy | None:
        """What was spent so far; None where nobody knows."""
        if self._is_measured:
            return Energy(joules=self._joules, source="measured")
        if self._declared_w and self._seconds:
            return Energy(joules=self._declared_w * self._seconds, source="declared")
        return None


def spent(before: Seen, now: Seen, seconds: float) -> float:
    """Joules between two looks.  A counter that went back has wrapped, or was reset if it never wraps: then it says nothing."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return sum(_passed(before[name], now[name]) for name in before.keys() & now.keys())
    if not isinstance(before, Mapping) and not isinstance(now, Mapping):
        return (before + now) / 2 * seconds
    return 0.0


def _passed(before: Counter, now: Counter) -> float:
    passed = now.joules - before.joules
    return passed if passed >= 0 else max(0.0, passed + now.range_joules)


def rapl(root: Path = POWERCAP) -> dict[str, Counter] | None:
    """The counters of all packages and of the memory beside them; None unless every one of them can be read.

    The other zones are parts of a package, or (psys, mmio) count the same again.
    """
    zones = [*root.glob("intel-rapl:*")]
    wanted = {zone.name: zone for zone in zones if _counts(zone)}
    try:
        return {
            name: Counter(_joules(z / "energy_uj"), _joules(z / "max_energy_range_uj")) for name, z in wanted.items()
        } or None
    except (OSError, ValueError):
        return None


def _counts(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name == "dram" if zone.name.count(":") > 1 else name.startswith("package")


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def look(gpu: int | None, root: Path = POWERCAP) -> Seen | None:
    """Look at a GPU, by its index, or at the processors.  Costs a millisecond or so; never raises."""
    if gpu is None:
        return rapl(root)
    match gpus.energy(gpu):
        case ("joules", joules):
            return {"gpu": Counter(joules)}
        case ("watts", watts):
            return watts
    return None


@asynccontextmanager
async def measured(meter: Meter, look: Callable[[], Seen | None], counts: Callable[[], bool]) -> AsyncIterator[None]:
    """Have `meter` see looks from the beginning of the block to its end; what passes while `counts` denies it is left out."""

    async def see() -> None:
        seen = await asyncio.to_thread(look)
        meter.see(seen, time.monotonic(), counts=counts())

    async def keep_looking() -> None:
        while True:
            await see()
            await asyncio.sleep(LOOK_S)

    meter.see(None, time.monotonic(), counts=False)  # what passed before is not of this block
    watching = asyncio.get_running_loop().create_task(keep_looking(), name="energy")
    try:
        yield
    finally:
        watching.cancel()
    await see()
