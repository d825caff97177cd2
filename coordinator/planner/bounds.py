"""What an agent's owner allows it to be given: no plan, pinned, planned or by default, goes beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from coordinator.core.spec import Override
from protocol.errors import BadConfig
from protocol.messages import Bits, Report


class Bounds(NamedTuple):
    """The largest rank and micro-batch, and the widths in which the base may be held."""

    max_rank: int = 1024
    max_batch: int = 4096
    bits: tuple[Bits, ...] = ("nf4", "int8", "none")

    def refuse(self, pins: Override, ranks: Sequence[int] = ()) -> None:
        """Raise BadConfig, with the numbers, for a pin beyond what is allowed, or when none of these ranks is."""
        if pins.rank and pins.rank > self.max_rank:
            raise BadConfig(
                f"rank {pins.rank} is pinned, the agent allows {self.max_rank}: lower the pin or raise limits.max_rank"
            )
        if pins.batch and pins.batch > self.max_batch:
            raise BadConfig(
                f"batch {pins.batch} is pinned, the agent allows {self.max_batch}: lower the pin or raise limits.max_batch"
            )
        if pins.bits and pins.bits not in self.bits:
            raise BadConfig(
                f"{pins.bits} is pinned, the agent allows {', '.join(self.bits)}: change the pin or limits.bits"
            )
        if ranks and min(ranks) > self.max_rank:
            raise BadConfig(
                f"plan.ranks begin at {min(ranks)}, the agent allows {self.max_rank}: add a lower rank or raise limits.max_rank"
            )

    def batches(self, wanted: Sequence[int]) -> list[int]:
        """The allowed ones of these micro-batches, ascending; the largest that is allowed when all are above it."""
        return sorted(batch for batch in wanted if batch <= self.max_batch) or [self.max_batch]


def bounds(report: Report | None) -> Bounds:
    """The agent's, as it last reported them; no bounds before the first report."""
    if report is None:
        return Bounds()
    allowance, free = report.allowance, Bounds()
    return Bounds(
        max_rank=allowance.max_rank if allowance else free.max_rank,
        max_batch=allowance.max_batch if allowance else free.max_batch,
        bits=tuple(bits for bits in free.bits if bits in report.bits) or free.bits,
    )
