"""Does the host need its device itself?  Looks in, a level out, without flapping.

    run      nothing is needed
    shrink   memory is needed: the child holds less (once; what it holds when that was not enough is all given back)
    pause    computing is needed, the device is too hot or draws too much, or the hour is not ours: the child waits
    stop     memory is needed still: the child hands over what it has and goes

Up at once when `patience` looks in a row agree, down to `run` only after `quiet_s` without any need, and while training gives
way a need counts from a somewhat lower mark on (hysteresis): the child's own heat and power vanish with the pause, and must
not bring it back by themselves.  No clock and no I/O: agent/watch.py looks.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from agent.core.events import Level
from agent.limits import Limits

CALM: Final = 0.9
"""While training gives way, a mark is passed back only below this part of it."""
MIB: Final = 2**20


class Sample(NamedTuple):
    """One look at the device that trains.  None: this device cannot tell.

    Fields: minute of the local day; memory in bytes that is free and that the child holds; share of the device's time that
    other processes take; watts; degrees Celsius.
    """

    minute: int
    is_gpu: bool
    free_bytes: int
    own_bytes: int | None = None
    other_ratio: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


class Verdict(NamedTuple):
    """What training may do now, and why it may not do all."""

    level: Level = "run"
    reason: str = ""


class Host:
    """The policy over time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._streaks: dict[str, int] = {}
        self._quiet_since: float | None = None
        self.verdict = Verdict()

    def renew(self, limits: Limits) -> None:
        """Other limits, from the next look on."""
        self._limits = limits

    def see(self, sample: Sample, now: float) -> Verdict:
        """Take in one look at `now` (seconds) and say what holds from here on.  A verdict keeps its words while it holds."""
        found = needs(sample, self._limits, is_yielding=self.verdict.level != "run")
        self._streaks = {kind: self._streaks.get(kind, 0) + 1 for kind in found}
        lasting = {
            kind: text
            for kind, text in found.items()
            if kind == "hours" or self._streaks[kind] >= self._limits.yield_to.patience
        }
        if found:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        if lasting:
            self._give_way(lasting)
        elif self._quiet_since is not None and now - self._quiet_since >= self._limits.yield_to.quiet_s:
            self.verdict = Verdict()
        return self.verdict

    def _give_way(self, lasting: dict[str, str]) -> None:
        level = self.verdict.level
        if level == "stop":
            return
        if memory := lasting.pop("memory", ""):
            self._streaks.clear()  # what was done now needs as long to show
            self.verdict = Verdict("shrink" if level == "run" and not lasting else "stop", memory)
        elif level != "pause":
            self.verdict = Verdict("pause", next(iter(lasting.values())))


def needs(sample: Sample, limits: Limits, *, is_yielding: bool) -> dict[str, str]:
    """What the host needs at this moment, by kind, in words; while training gives way, also what is only nearly needed."""
    found = {}
    mark = CALM if is_yielding else 1.0
    if not limits.is_open(sample.minute):
        found["hours"] = f"training may run at {', '.join(limits.hours)} only"
    least = limits.yield_to.min_free_bytes / mark
    own = sample.own_bytes or 0
    cap = limits.cap_bytes(sample.free_bytes + own)
    if sample.free_bytes < least:
        found["memory"] = (
            f"{sample.free_bytes // MIB} MiB are free, {limits.yield_to.min_free_bytes // MIB} MiB must be"
        )
    elif own > cap:
        found["memory"] = f"training holds {own // MIB} MiB, {cap // MIB} MiB are allowed"
    limit = limits.yield_to.max_other_gpu if sample.is_gpu else limits.yield_to.max_other_cpu
    if sample.other_ratio is not None and limit < 1 and sample.other_ratio > limit * mark:
        name = "GPU" if sample.is_gpu else "CPU"
        found["computing"] = f"other processes use {sample.other_ratio:.0%} of the {name}"
    if sample.power_w and limits.max_power_w and sample.power_w > limits.max_power_w * mark:
        found["power"] = f"the GPU draws {sample.power_w:.0f} W of {limits.max_power_w:.0f} W"
    if sample.temperature_c and limits.max_temperature_c and sample.temperature_c > limits.max_temperature_c * mark:
        found["temperature"] = f"the GPU is at {sample.temperature_c:.0f} °C of {limits.max_temperature_c:.0f} °C"
    return found
