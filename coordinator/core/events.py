"""Facts, in the past tense: everything that can happen to the coordinator.  Counterpart of actions.py.

Each is journalled before it is handled, so a restart replays them; bytes stay outside, events carry digests.
"""

from __future__ import annotations

import msgspec

from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from protocol.messages import Blob, Calibrated, Energy, Evaluated, ExecState, Offer, Report, Surveyed


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """Something that happened."""


class JobSubmitted(Event, frozen=True, kw_only=True):
    """An operator handed in a job that passed every check of its file."""

    spec: JobSpec


class JobCancelled(Event, frozen=True, kw_only=True):
    """An operator asked for the end of a job."""

    job: str
    reason: str = "cancelled by the operator"


class JobPaused(Event, frozen=True, kw_only=True):
    """An operator wants no new round of a job; with `now`, the one under way is stopped as well."""

    job: str
    by: str
    reason: str = ""
    now: bool = False


class JobResumed(Event, frozen=True, kw_only=True):
    """An operator lets a paused job go on."""

    job: str
    by: str


class JobRolledBack(Event, frozen=True, kw_only=True):
    """An operator went back to version `of`: its content, made in round `round`, is to be version `version`.

    The model and its master are files that are there.
    """

    job: str
    of: int
    version: int
    round: int
    model: Blob
    master: str
    dropped_ratio: float = 0.0
    by: str
    reason: str = ""


class AgentJoined(Event, frozen=True, kw_only=True):
    """A birth: the agent is there, with a new session or again after a silence."""

    agent: str
    session: str
    software: str = ""
    methods: list[str] = []


class AgentLeft(Event, frozen=True, kw_only=True):
    """A goodbye, a will, or a silence that lasted too long."""

    agent: str
    session: str
    reason: str


class AgentRevoked(Event, frozen=True, kw_only=True):
    """An operator took an agent's certificates back: it is gone, and nothing of it is waited for."""

    agent: str
    reason: str = ""


class AgentReported(Event, frozen=True, kw_only=True):
    """New figures of an agent's resources."""

    agent: str
    report: Report


class ShareMoved(Event, frozen=True, kw_only=True):
    """An agent moved on with (or gave up) its share of a round."""

    agent: str
    job: str
    round: int
    attempt: int
    serial: int
    state: ExecState
    reason: str = ""
    surveyed: Surveyed | None = None
    calibrated: Calibrated | None = None
    evaluated: Evaluated | None = None
    energy: Energy | None = None


class UpdateOffered(Event, frozen=True, kw_only=True):
    """An agent has an update to hand over."""

    agent: str
    offer: Offer


class UpdateStored(Event, frozen=True, kw_only=True):
    """An offered update is complete, verified against its digest and its plan, and durable.

    `scores`: what its agent measured on the way about the importance of each trained matrix, by rank-1 triplet, descending.
    """

    agent: str
    offer: Offer
    scores: dict[str, list[float]] = {}


class UpdateSpoiled(Event, frozen=True, kw_only=True):
    """An offered update cannot be had or does not fit its plan."""

    agent: str
    offer: Offer
    reason: str


class PlanReady(Event, frozen=True, kw_only=True):
    """The planner's answer: what each agent shall do."""

    job: str
    round: int
    attempt: int
    choices: dict[str, Choice]
    reason: str = ""
    """Why it was planned anew."""
    train_s: float | None = None
    left_out: dict[str, str] = {}
    """Agents that cannot take part, with the reason."""
    notes: list[str] = []


class PlanFailed(Event, frozen=True, kw_only=True):
    """The planner found no plan."""

    job: str
    round: int
    attempt: int
    reason: str


class Aggregated(Event, frozen=True, kw_only=True):
    """A new version of the global adapter is stored."""

    job: str
    round: int
    attempt: int
    version: int
    model: Blob
    master: str
    dropped_ratio: float = 0.0


class AggregateFailed(Event, frozen=True, kw_only=True):
    """No new version could be made."""

    job: str
    round: int
    attempt: int
    reason: str


class BusLost(Event, frozen=True, kw_only=True):
    """There is no broker any more: nobody can be heard, so no silence says anything.

    `since`: when somebody was last known to be heard, at the start of a coordinator that was down; 0 is now.
    """

    since: float = 0.0


class BusFound(Event, frozen=True, kw_only=True):
    """The broker is there again, and agents come back one by one."""


class Tick(Event, frozen=True, kw_only=True):
    """Time passed: the instant of `wake_at` came."""


Happened = (
    JobSubmitted
    | JobCancelled
    | JobPaused
    | JobResumed
    | JobRolledBack
    | AgentJoined
    | AgentLeft
    | AgentRevoked
    | AgentReported
    | ShareMoved
    | UpdateOffered
    | UpdateStored
    | UpdateSpoiled
    | PlanReady
    | PlanFailed
    | Aggregated
    | AggregateFailed
    | BusLost
    | BusFound
    | Tick
)
