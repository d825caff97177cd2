"""Wishes, in the imperative: everything the core can ask of the world.  Counterpart of events.py.

All are idempotent: after a restart `resume()` asks again for whatever is under way.  Slow work comes back as an event that
carries its job, round and attempt.
"""

from __future__ import annotations

import msgspec

from coordinator.core.state import Cause, Contribution, JobDetail, RoundRecord
from protocol.messages import Blob, Cancel, JobCard, Matrix, Offer, Plan


class Action(msgspec.Struct, frozen=True, kw_only=True, tag_field="action"):
    """Something to do."""


class MakePlan(Action, frozen=True, kw_only=True):
    """Ask the planner; comes back as PlanReady or PlanFailed.  `reason`: why the last plan does not hold."""

    job: str
    round: int
    attempt: int
    agents: list[str]
    reason: str = ""


class Assign(Action, frozen=True, kw_only=True):
    """Publish an agent's plan, retained."""

    agent: str
    plan: Plan


class Withdraw(Action, frozen=True, kw_only=True):
    """Clear an agent's retained plan; with `cancel`, also tell an agent at work to stop."""

    agent: str
    cancel: Cancel | None = None


class Announce(Action, frozen=True, kw_only=True):
    """Publish the job card, retained."""

    card: JobCard


class Fetch(Action, frozen=True, kw_only=True):
    """Pull an offered update; comes back as UpdateStored or UpdateSpoiled."""

    agent: str
    offer: Offer
    method: str
    matrices: list[Matrix]
    ranks: dict[str, int]


class Acknowledge(Action, frozen=True, kw_only=True):
    """Tell an agent that its update is safe here: it may forget it."""

    agent: str
    xfer: str


class Decline(Action, frozen=True, kw_only=True):
    """Tell an agent that its update is not wanted, for good; stop pulling it if that had begun."""

    agent: str
    xfer: str
    reason: str


class Aggregate(Action, frozen=True, kw_only=True):
    """Fold updates into the model; comes back as Aggregated or AggregateFailed."""

    job: str
    round: int
    attempt: int
    version: int
    master: str
    contributions: list[Contribution]
    matrices: list[Matrix]
    method: str
    max_rank: int
    server_lr: float
    model_dtype: str


class AggregateAhead(Action, frozen=True, kw_only=True):
    """What will be asked of these updates, some of which are still coming, if they all do: it may begin.  Comes back as nothing."""

    fold: Aggregate


class Restore(Action, frozen=True, kw_only=True):
    """Write down that version `version` is version `of` once more, the same files; `at` in seconds since the epoch."""

    job: str
    version: int
    of: int
    round: int
    model: Blob
    master: str
    dropped_ratio: float
    at: float


class Serve(Action, frozen=True, kw_only=True):
    """Hand out this blob to agents that ask for it."""

    job: str
    blob: Blob


class Record(Action, frozen=True, kw_only=True):
    """Write down how a round ended."""

    job: str
    record: RoundRecord


class Finish(Action, frozen=True, kw_only=True):
    """A job reached a named end: export what there is and clean up; write down the detail that its state sheds."""

    job: str
    phase: str
    reason: str
    cause: Cause | None = None
    detail: JobDetail | None = None


Written = Record | Finish | Restore
"""What is on disk before a snapshot forgets that it was wished for."""
Wish = (
    MakePlan
    | Assign
    | Withdraw
    | Announce
    | Fetch
    | Acknowledge
    | Decline
    | Aggregate
    | AggregateAhead
    | Restore
    | Serve
    | Record
    | Finish
)
