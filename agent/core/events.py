"""Facts, in the past tense: everything that can happen to an agent.  Counterpart of actions.py."""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.messages import Calibrated, Energy, Evaluated, Offer, Plan, Surveyed

Level = Literal["run", "shrink", "pause", "stop"]
"""How much room the host leaves: all that was planned, less memory, no computing for now, no memory either."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """Something that happened."""


class BusUp(Event, frozen=True, kw_only=True):
    """The broker is reached and the subscriptions stand."""


class BusDown(Event, frozen=True, kw_only=True):
    """The broker is out of reach; work goes on, words wait."""

    reason: str


class CoordinatorSeen(Event, frozen=True, kw_only=True):
    """The coordinator's birth or death; a new session has forgotten what was not journalled."""

    session: str
    online: bool


class PlanCame(Event, frozen=True, kw_only=True):
    """A plan for this agent, new or again."""

    plan: Plan


class NothingPlanned(Event, frozen=True, kw_only=True):
    """The coordinator cleared the plan of this agent: it has no share."""


class CancelCame(Event, frozen=True, kw_only=True):
    """The coordinator does not want this share any more, or with `keep` not now: the round will be attempted again."""

    job: str
    round: int
    attempt: int
    reason: str
    keep: bool = False


class RebirthAsked(Event, frozen=True, kw_only=True):
    """The coordinator lost track of this agent."""


class ModelFetched(Event, frozen=True, kw_only=True):
    """The global adapter that the work needs is here, verified."""

    sha256: str
    n_bytes: int


class ModelLost(Event, frozen=True, kw_only=True):
    """The global adapter cannot be had."""

    sha256: str
    reason: str


class ChildBegan(Event, frozen=True, kw_only=True):
    """The training child came to this phase of the work."""

    phase: str


class ChildEvaluated(Event, frozen=True, kw_only=True):
    """The received version has been measured on the held-out text."""

    result: Evaluated


class ChildSurveyed(Event, frozen=True, kw_only=True):
    """The base and the data have been looked at."""

    result: Surveyed


class ChildCalibrated(Event, frozen=True, kw_only=True):
    """What training costs and brings here has been measured."""

    result: Calibrated


class ChildFinished(Event, frozen=True, kw_only=True):
    """The child is through; `update` (with its file durable in the outbox) is None when there is nothing to upload."""

    samples: int
    loss: float | None
    train_s: float
    stopped: str
    update: Offer | None
    energy: Energy | None = None


class ChildFailed(Event, frozen=True, kw_only=True):
    """The child gave up or died."""

    reason: str
    energy: Energy | None = None


class UpdateAccepted(Event, frozen=True, kw_only=True):
    """The coordinator holds this update for good."""

    xfer: str


class UpdateDeclined(Event, frozen=True, kw_only=True):
    """The coordinator does not want this update, for good."""

    xfer: str
    reason: str


class HostSpoke(Event, frozen=True, kw_only=True):
    """What the server's own services leave to training has changed (agent/host.py)."""

    level: Level
    reason: str = ""


class StopAsked(Event, frozen=True, kw_only=True):
    """The daemon is going down."""

    reason: str


class Tick(Event, frozen=True, kw_only=True):
    """Time passed: the instant of `wake_at` came."""


Happened = (
    BusUp
    | BusDown
    | CoordinatorSeen
    | PlanCame
    | NothingPlanned
    | CancelCame
    | RebirthAsked
    | ModelFetched
    | ModelLost
    | ChildBegan
    | ChildEvaluated
    | ChildSurveyed
    | ChildCalibrated
    | ChildFinished
    | ChildFailed
    | UpdateAccepted
    | UpdateDeclined
    | HostSpoke
    | StopAsked
    | Tick
)
