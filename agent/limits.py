"""What this server's owner lets fedpipe take, and when training gives way to the host.

The host comes first.  Two things keep that promise: the allowance, which the coordinator plans with, and the watch
(agent/host.py), which makes a running child give way when the host needs more than was foreseen.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from protocol.errors import BadConfig
from protocol.messages import Bits, Plan

Positive = Annotated[int, Meta(ge=1, le=2**50)]
Bytes = Annotated[int, Meta(ge=0, le=2**50)]
Ratio = Annotated[float, Meta(gt=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=10**15)]
Hours = tuple[int, int]
"""From a minute of the day up to another; over midnight when the second is not the greater."""

_HOURS: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d) *- *([01]?\d|2[0-4]):([0-5]\d)")
MIB: Final = 2**20


class YieldTo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as the host needing the device that trains; for memory training shrinks, then ends, else it pauses."""

    every_s: Annotated[float, Meta(ge=0.05, le=3600)] = 2.0
    """While there is work the device is looked at this often; a look costs some milliseconds."""
    patience: Annotated[int, Meta(ge=1, le=1000)] = 3
    """So many looks in a row must agree before training gives way: a burst of a second is not worth a pause."""
    quiet_s: Annotated[float, Meta(ge=0, le=10**6)] = 30.0
    """Training goes on when nothing was needed for this long: it does not start in every gap of a busy service."""
    min_free_bytes: Bytes = 256 * MIB
    """Less free memory than this: the host needs memory.  The plan leaves reserve_bytes free; this is the alarm below it.

    0 is never."""
    max_other_gpu: Ratio = 0.3
    """More of the GPU's time taken by other processes: a GPU has no priorities, so training pauses.  1 is never."""
    max_other_cpu: Ratio = 1.0
    """The same for training on the CPU.  1 is never: there child.nice gives way already, at every tick of the kernel."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What this server allows fedpipe to take.  Memory is that of the device that trains: the GPU's, or RAM."""

    max_global_rank: Annotated[int, Meta(ge=1, le=1024)] = 1024
    """Components of the global adapter that are downloaded and held; fewer save memory."""
    max_model_bytes: Positive = 8 * 2**30
    """A larger global adapter is refused."""
    memory_ratio: Ratio = 1.0
    """Share of the memory without the host's use that training may hold; the planner keeps a margin of its own."""
    memory_bytes: Bytes = 0
    """Training never holds more than this; 0 is no such cap."""
    reserve_bytes: Bytes = 512 * MIB
    """Always left free for the host."""
    max_rank: Annotated[int, Meta(ge=1, le=1024)] = 1024
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 4096
    """Samples of one micro-batch."""
    bits: Annotated[list[Bits], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["none", "int8", "nf4"]
    )
    """How the base may be held here."""
    hours: Annotated[list[str], Meta(max_length=24)] = []
    """When training may run, local time, as "20:00-06:00"; empty: always."""
    up_bytes_per_s: Rate = 0.0
    """Updates leave no faster; 0 is no such cap.  Control messages are not counted."""
    down_bytes_per_s: Rate = 0.0
    """Models arrive no faster; 0 is no such cap."""
    max_inflight_bytes: Positive = 32 * MIB
    """Of a model, asked for and not here yet: less where the broker keeps little for one client."""
    transfer_hours: Annotated[list[str], Meta(max_length=24)] = []
    """When updates and models may move, written as `hours`; empty: always.  Outside they wait."""
    http_hosts: Annotated[list[str], Meta(max_length=64)] = []
    """Object stores that may be spoken to without TLS, by host name; for one on this machine "127.0.0.1"."""
    max_power_w: Annotated[float, Meta(ge=0, le=10**5)] = 0.0
    """Training pauses when the GPU draws more; 0 is no such limit."""
    max_temperature_c: Annotated[float, Meta(ge=0, le=200)] = 90.0
    """Training pauses when the GPU is hotter: most slow themselves down a little below.  0 is no such limit."""
    yield_to: YieldTo = YieldTo()

    def __post_init__(self) -> None:
        for text in (*self.hours, *self.transfer_hours):
            parse_hours(text)

    def is_open(self, minute: int) -> bool:
        """Whether training may run at this minute of the local day."""
        return _within(minute, self.hours)

    def may_transfer(self, minute: int) -> bool:
        """Whether bulk may flow at this minute of the local day."""
        return _within(minute, self.transfer_hours)

    def kept(self, plan: Plan) -> Plan:
        """The plan as it may be carried out here: what may not be measured is left out.

        Raises BadConfig for training beyond a limit; the coordinator knows them, so only one that is wrong asks for that.
        """
        if plan.train:
            asked = (
                ("rank", max(plan.ranks.values(), default=0), self.max_rank),
                ("batch", plan.train.batch, self.max_batch),
            )
            for name, wanted, most in asked:
                if wanted > most:
                    raise BadConfig(f"the plan asks for {name} {wanted}, this server allows {most} (limits.max_{name})")
            if plan.bits not in self.bits:
                raise BadConfig(
                    f"the plan asks for {plan.bits}, this server allows {', '.join(self.bits)} (limits.bits)"
                )
        if plan.calibration:
            bits = [width for width in plan.calibration.bits if width in self.bits]
            batches = [batch for batch in plan.calibration.batches if batch <= self.max_batch] or [self.max_batch]
            return replace(plan, calibration=replace(plan.calibration, bits=bits, batches=batches) if bits else None)
        return plan

    def allowed_bytes(self, free_bytes: int, own_bytes: int) -> int:
        """Memory that the training child may hold in all, given what is free and what it holds now."""
        room = free_bytes + own_bytes
        return max(0, min(self.cap_bytes(room), room - self.reserve_bytes))

    def cap_bytes(self, room_bytes: int) -> int:
        """The most of `room_bytes` (what the host leaves) that training may hold, the reserve not counted."""
        return min(int(room_bytes * self.memory_ratio), self.memory_bytes or room_bytes)


def _within(minute: int, hours: list[str]) -> bool:
    return not hours or any(
        start <= minute < end if start < end else minute >= start or minute < end
        for start, end in map(parse_hours, hours)
    )


def parse_hours(text: str) -> Hours:
    """Minutes of the day from "20:00-06:00".  Raises ValueError with the way to write it."""
    found = _HOURS.fullmatch(text.strip())
    start, end = (0, 0) if found is None else (int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4]))
    if start == end or end > 24 * 60:
        raise ValueError(f'hours "{text}" are none: write them as "20:00-06:00", or leave the list empty for always')
    return start, end
