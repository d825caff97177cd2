"""Everything the coordinator knows, as plain Structs: a snapshot is this state encoded, a restart is this state decoded."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

import msgspec

from coordinator.core.choice import Choice, Prediction, pack_ranks, unpack_ranks
from coordinator.core.spec import JobSpec
from protocol.messages import Blob, Calibrated, Energy, Evaluated, ExecState, Matrix, Offer, Report, Surveyed

STATE_VERSION: Final = 2

Purpose = Literal["survey", "train", "evaluate"]


class Phase(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    PLANNING = "planning"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Cause(StrEnum):
    """Why a job failed, in one word for programs; its reason says it for people and begins with the same word."""

    NO_AGENTS = "no_agents"
    BAD_BASE = "bad_base"
    QUORUM = "quorum"
    PLAN = "plan"
    AGGREGATE = "aggregate"


MOVES: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.WAITING: frozenset(
        {Phase.PLANNING, Phase.COLLECTING, Phase.EVALUATING, Phase.PAUSED, Phase.FAILED, Phase.CANCELLED}
    ),
    Phase.PLANNING: frozenset({Phase.COLLECTING, Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.COLLECTING: frozenset({Phase.AGGREGATING, Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.AGGREGATING: frozenset({Phase.WAITING, Phase.FAILED, Phase.CANCELLED}),
    Phase.EVALUATING: frozenset({Phase.WAITING, Phase.COMPLETED, Phase.CANCELLED}),
    Phase.PAUSED: frozenset({Phase.WAITING, Phase.CANCELLED}),
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
    entered: dict[ExecState, float] = {}
    """When it first came to a state on its way; the end is ended_at."""
    ended_at: float = 0.0
    offer: Offer | None = None
    evaluated: Evaluated | None = None
    energy: Energy | None = None


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
    calibrated: Calibrated | None = None
    uncalibrated: str = ""
    """Why there are no measurements of this agent; it then takes part with defaults."""
    time_factor: float = 1.0
    memory_factor: float = 1.0
    """Measured / predicted over the rounds so far: what the cost model is corrected by for this agent."""
    learned: dict[str, bytes] = {}
    """Matrix -> the first of its scores as training has moved them since (learning.py), float32, little endian."""
    oom_bytes: int = 0
    """Predicted peak of the smallest share that ran out of memory all the same; the next must stay well below.  0: none."""


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
    energy: Energy | None = None
    bits: str = ""
    rank_sum: int = 0
    planned_samples: int = 0
    step_s: float = 0.0
    """Measured: one optimizer step."""
    peak_bytes: int = 0
    """Measured: the training child's peak memory."""
    predicted: Prediction | None = None
    assigned_at: float = 0.0
    entered: dict[ExecState, float] = {}
    ended_at: float = 0.0


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


class RoundPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the planner decided last, for which round and why; it holds for the next rounds until there is a reason to renew it.

    Fields: train_s is the training time of a round, None where the job's own holds; choices by agent; agents that cannot
    take part, with the reason.
    """

    round: int
    reason: str
    train_s: float | None = None
    choices: dict[str, Choice] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    alike: dict[str, str] = {}
    """On disk: agents whose ranks are those of another one's choice and stand there."""

    def packed(self) -> RoundPlan:
        """The same for the disk."""
        choices, alike = pack_ranks(self.choices)
        return msgspec.structs.replace(self, choices=choices, alike=alike)

    def unpacked(self) -> RoundPlan:
        """As it was before."""
        return msgspec.structs.replace(self, choices=unpack_ranks(self.choices, self.alike), alike={})


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """An operator wants no new round of a job: who said so, when (seconds since the epoch), and why."""

    by: str
    at: float
    reason: str = ""


class Rollback(msgspec.Struct, frozen=True, kw_only=True):
    """Version `version` of a job is version `of` once more: who said so, when, and why."""

    version: int
    of: int
    by: str
    at: float
    reason: str = ""


class JobState(msgspec.Struct, kw_only=True):
    """One job: its specification, where it stands, and what it has learned so far."""

    spec: JobSpec
    submitted_at: float
    phase: Phase = Phase.WAITING
    reason: str = ""
    cause: Cause | None = None
    """Of a failed job."""
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
    alike: dict[str, str] = {}
    """In a snapshot: agents whose matrices are those of another one's survey and stand there; see packing.py."""
    round: Round | None = None
    planned: list[str] = []
    """Agents that the planner was last asked about."""
    unreported: list[str] = []
    """Those of them that had not said what their servers have: their report was lost on the way, or is slower than the survey."""
    plan: RoundPlan | None = None
    overhead_s: float = 0.0
    """What the last rounds cost beside training; 0 until one has ended."""
    stale: str = ""
    """Why the plan does not hold any more; empty while it does."""
    carried: dict[str, Share] = {}
    """Finished shares of a failed attempt: the next attempt of the round starts with them."""
    quorum: int = 0
    """Updates that the failed attempt would have needed: once so many are carried, nobody need be asked again."""
    missed: dict[str, dict[int, Choice]] = {}
    """agent -> round -> what was planned for a share that missed its round and may still arrive late."""
    tried: dict[str, dict[int, dict[int, Choice]]] = {}
    """agent -> round -> attempt -> the same for each attempt: an update is held against the plan it was made by."""
    late: list[Contribution] = []
    """Late updates that wait for the next aggregate; their weight is not yet discounted."""
    seen: dict[str, dict[int, str]] = {}
    """agent -> round -> digest of the stored update: nothing is counted twice."""
    pause: Pause | None = None
    """No round begins while there is one; the round under way may still end."""
    n_stopped: int = 0
    """Attempts of the next round that an operator stopped: they are no failures."""
    is_stopped: bool = False
    """The last attempt was stopped: whoever is there of those that lack is asked again, although the carried may be a quorum."""
    first_attempt: int = 0
    """Of the next round: updates of earlier attempts were made from a version that the job has gone back from."""
    rollbacks: list[Rollback] = []


class JobDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What people may still ask of a job that has ended, and no decision needs: it is kept beside the state."""

    matrices: list[Matrix] = []
    members: dict[str, Member] = {}
    plan: RoundPlan | None = None


def shed(job: JobState) -> JobDetail:
    """Take from a job that has ended whatever its late messages are not answered by, and hand it over; measurements go."""
    detail = JobDetail(
        matrices=job.matrices, members={name: _brief(member) for name, member in job.members.items()}, plan=job.plan
    )
    job.matrices, job.members, job.plan = [], {}, None
    job.planned, job.unreported, job.carried, job.missed, job.tried, job.late = [], [], {}, {}, {}, []
    return detail


def with_detail(job: JobState, detail: JobDetail | None) -> JobState:
    """A job for people to look at, with what it has shed."""
    if detail is None:
        return job
    return msgspec.structs.replace(job, matrices=detail.matrices, members=detail.members, plan=detail.plan)


def _brief(member: Member) -> Member:
    found, measured = member.surveyed, member.calibrated
    return msgspec.structs.replace(
        member,
        learned={},
        surveyed=found and msgspec.structs.replace(found, matrices=found.matrices[:1]),  # one at least: Surveyed
        calibrated=measured and msgspec.structs.replace(measured, scores=b"", shapes=[], points=[]),
    )


class FleetState(msgspec.Struct, kw_only=True):
    """The whole snapshot."""

    v: int = STATE_VERSION
    agents: dict[str, AgentState] = {}
    jobs: dict[str, JobState] = {}
    counts: dict[str, int] = {}
    """What peers did wrong or twice, by kind."""
    deaf_since: float = 0.0
    """Since when there is no broker, so that nobody can be heard; 0 while there is one."""
    heard_from: float = 0.0
    """No agent's absence counts from an earlier instant: after the broker was away they need time to come back."""
