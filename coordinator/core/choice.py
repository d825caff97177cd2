"""What the planner decides for one agent and one round; the rest of a plan follows from the job."""

from __future__ import annotations

import msgspec

from protocol.messages import Bits


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks per matrix (a matrix that is missing is not trained), base width, and the shape of local training."""

    ranks: dict[str, int]
    bits: Bits
    n_steps: int
    batch: int
    accumulation: int = 1
    checkpointing: bool = False
    why: str = ""
