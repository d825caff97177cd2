"""One share of one round under way on an agent: how far it is, until when it may run, and what came of it so far."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from protocol.messages import Calibrated, Energy, Evaluated, ExecState, Plan, Surveyed

CHILD_GRACE_S: Final = 10.0
"""A child that was told to stop gets at least this long for its present step and for writing its update."""

SUSPENDED: Final = "suspended"
"""`stopped` of an update whose training goes on if its plan comes again."""


class Stage(StrEnum):
    """Where the work stands."""

    FETCHING = "fetching"
    HELD = "held"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLED = "killed"


class Work:
    """One share of one round under way."""

    def __init__(self, plan: Plan, now: float) -> None:
        self.plan = plan
        self.key = (plan.job, plan.round, plan.attempt)
        self.stage = Stage.FETCHING
        self.state = ExecState.ACCEPTED
        self.bytes_down = 0
        self.evaluated: Evaluated | None = None
        self.surveyed: Surveyed | None = None
        self.calibrated: Calibrated | None = None
        self.energy: Energy | None = None
        self.unwanted = ""
        self.is_kept = False
        """Not wanted now, but in another attempt of its round: what it trained stays as a checkpoint, or is handed in."""
        self.held = ""
        self.model_sha256 = ""
        self.set_times(plan, now)

    def set_times(self, plan: Plan, now: float) -> None:
        """Take over how much time is left."""
        self.stop_at = now + plan.stop_after_s
        self.close_at = now + max(plan.ttl_s, plan.stop_after_s + CHILD_GRACE_S)

    def lost(self, state: ExecState, reason: str) -> tuple[ExecState, str]:
        """How the work ends without all that was asked for: what was surveyed before that is true all the same."""
        if self.unwanted:
            return ExecState.CANCELLED, self.unwanted
        if self.surveyed is None or self.plan.calibration is None:
            return state, reason
        return ExecState.DONE, "" if self.calibrated else f"not calibrated: {reason or 'nothing was measured'}"
