"""Everything the coordinator knows, as plain Structs: a snapshot is this state encoded, a restart is this state decoded."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

import msgspec

from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from protocol.messages import Blob, Evaluated, ExecState, Matrix, Offer, Report, Surveyed

STATE_VERSION: Final = 1

Purpose = Literal["survey", "train", "evaluate"]


class Phase(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    PLANNING = "planning"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOVES: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.WAITING: frozenset({Phase.PLANNING, Phase.COLLECTING, Phase.EVALUATING, Phase.FAILED, Phase.CANCELLED}),
    Phase.PLANNING: frozenset({Phase.COLLECTING, Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.COLLECTING: frozenset({Phase.AGGREGATING, Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.AGGREGATING: frozenset({Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.EVALUATING: frozenset({Phase.COMPLETED, Phase.CANCELLED}),
    Phase.COMPLETED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.CANCELLED: frozenset(),
}
"""Which phase may follow which; docs/rounds.md draws this table."""

ENDED: Final = frozenset({Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED})


class AgentState(msgspec.Struct, kw_only=True):
    """What is known of one agent.  `task` is the job it works for; one at a time."""

    id: str
    session: str = ""
    online: bool = False
    since: float = 0.0
    reason: str = ""
    software: str = ""
    methods: list[str] = []
    report: Report | None = None
    task: str = ""


class Share(msgspec.Struct, kw_only=True):
    """One agent's part of one round, from the offer of a plan to its end."""

    agent: str
    attempt: int
    choice: Choice | None = None
    state: ExecState = ExecState.OFFERED
    serial: int = 0
    reason: str = ""
    assigned_at: float = 0.0
    ended_at: float = 0.0
    offer: Offer | None = None
    evaluated: Evaluated | None = None


class Round(msgspec.Struct, kw_only=True):
    """One round under way: who has which share, and until when."""

    number: int
    attempt: int
    purpose: Purpose
    opened_at: float
    stop_at: float
    close_at: float
    target: int
    quorum: int
    shares: dict[str, Share] = {}
    late: list[Contribution] = []


class Member(msgspec.Struct, kw_only=True):
    """An agent as one job sees it: what its survey found, or why it is out."""

    survey: Share | None = None
    survey_close_at: float = 0.0
    surveyed: Surveyed | None = None
    excluded: str = ""


class Contribution(msgspec.Struct, frozen=True, kw_only=True):
    """One stored update as it enters an aggregate: who, of which round, how much it weighs."""

    agent: str
    round: int
    attempt: int
    sha256: str
    size: int
    weight: float


class ShareRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How one agent's share of a round ended, for people and reports."""

    state: str
    reason: str = ""
    samples: int = 0
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    evaluated: Evaluated | None = None
    bits: str = ""
    rank_sum: int = 0


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a round ended.  `version` is the model it started from; `loss` the samples-weighted training loss."""

    round: int
    attempt: int
    purpose: Purpose
    version: int
    outcome: str
    opened_at: float
    wall_s: float
    loss: float | None
    shares: dict[str, ShareRecord]


class JobState(msgspec.Struct, kw_only=True):
    """One job: its specification, where it stands, and what it has learned so far."""

    spec: JobSpec
    submitted_at: float
    phase: Phase = Phase.WAITING
    reason: str = ""
    since: float = 0.0
    waiting_since: float = 0.0
    """When the job last began to want a round; a plan that came to nothing does not make it wait anew."""
    ended_at: float = 0.0
    round_number: int = 0
    attempt: int = 0
    version: int = 0
    master: str = ""
    model: Blob | None = None
    base_sha256: str = ""
    matrices: list[Matrix] = []
    members: dict[str, Member] = {}
    round: Round | None = None
    planned: list[str] = []
    """Agents that the planner was last asked about."""
    carried: dict[str, Share] = {}
    """Finished shares of a failed attempt: the next attempt of the round starts with them."""
    quorum: int = 0
    """Updates that the failed attempt would have needed: once so many are carried, nobody need be asked again."""
    missed: dict[str, dict[int, Choice]] = {}
    """agent -> round -> what was planned for a share that missed its round and may still arrive late."""
    late: list[Contribution] = []
    """Late updates that wait for the next aggregate; their weight is not yet discounted."""
    seen: dict[str, dict[int, str]] = {}
    """agent -> round -> digest of the stored update: nothing is counted twice."""


class FleetState(msgspec.Struct, kw_only=True):
    """The whole snapshot."""

    v: int = STATE_VERSION
    agents: dict[str, AgentState] = {}
    jobs: dict[str, JobState] = {}
    counts: dict[str, int] = {}
    """What peers did wrong or twice, by kind."""
