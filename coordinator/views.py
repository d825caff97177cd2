"""What people and programs see of the coordinator: frozen Structs made from its state by pure functions, encoded as JSON.

The command line, the live view and a web page all read these and nothing else, so the state itself may change its shape.
Every view carries `now`, the coordinator's clock, because the reader's clock is another one.  A new field has a default: an
older server must stay readable.  Nothing in here is secret; a broker's address is given without its user and password.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.activity import Activity
from coordinator.core.plans import phase_text
from coordinator.core.state import (
    AgentState,
    Cause,
    JobState,
    Member,
    Pause,
    Phase,
    Purpose,
    Rollback,
    Round,
    RoundRecord,
    Share,
)
from coordinator.cost import CostView
from coordinator.past import Evaluations, Past, losses_with
from coordinator.presence import Presence
from coordinator.versions import VersionView, version_views
from protocol.bus import parse_url
from protocol.messages import TERMINAL, Evaluated, ExecState, Progress, Report

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator
    from coordinator.store import Version

Remaining = Callable[[str, str], int | None]
"""(agent, transfer) -> chunks still to come, None for a transfer that is not open."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """Something to look at."""


class AgentView(View, frozen=True, kw_only=True, gc=False):  # 10,000 at once set off a search through all objects
    """One agent: whether it is there, what it does or why it is idle, how far it is, what its server has to give."""

    id: str
    online: bool
    since: float
    reason: str = ""
    software: str = ""
    methods: list[str] = []
    task: str = ""
    doing: str = ""
    heard_at: float | None = None
    progress: Progress | None = None
    report: Report | None = None


class _Allowed(Report, frozen=True, kw_only=True, tag="report", omit_defaults=True, gc=False):
    """Of a report only what the server may use; the rest is left out of the JSON."""


_UNTOLD: Final = _Allowed()


class MemberView(View, frozen=True, kw_only=True):
    """An agent as one job's survey found it; `excluded` says why it is out, empty when it may take part.

    calibrated_s is how long its own measurements took, None where there are none; `uncalibrated` then says why.
    """

    survey: str = ""
    excluded: str = ""
    n_train: int = 0
    n_eval: int = 0
    calibrated_s: float | None = None
    uncalibrated: str = ""


class ShareView(View, frozen=True, kw_only=True):
    """One agent's part of the open round.  `bytes_up` of the `size_up` it offered are here; `entered`: state -> since when."""

    state: str
    reason: str = ""
    bits: str = ""
    rank_sum: int = 0
    n_steps: int = 0
    samples: int = 0
    loss: float | None = None
    bytes_up: int = 0
    size_up: int = 0
    bytes_down: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    assigned_at: float = 0.0
    entered: dict[ExecState, float] = {}
    ended_at: float = 0.0
    progress: Progress | None = None
    evaluated: Evaluated | None = None


class RoundView(View, frozen=True, kw_only=True):
    """The open round: agents stop training at `stop_at`, the round closes at `close_at` (seconds since the epoch)."""

    number: int
    attempt: int
    purpose: Purpose
    opened_at: float
    stop_at: float
    close_at: float
    target: int
    quorum: int
    shares: dict[str, ShareView]


class JobShort(View, frozen=True, kw_only=True):
    """A job in one line.  `round` counts finished rounds."""

    name: str
    phase: Phase
    text: str
    round: int
    n_rounds: int
    version: int
    submitted_at: float
    ended_at: float = 0.0
    cause: Cause | None = None
    """Of a failed job."""
    n_agents: int = 0
    n_done: int = 0
    pause: Pause | None = None


class JobView(View, frozen=True, kw_only=True):
    """A whole job.  `text` says in one line where it stands and why; `round` counts finished rounds.

    `history` and `evaluations` are without the first n_skipped rounds that ended, each attempt counted, if the reader asked so.
    """

    now: float
    name: str
    phase: Phase
    reason: str
    text: str
    method: str
    base: str
    base_sha256: str
    data: str
    round: int
    n_rounds: int
    attempt: int
    version: int
    since: float
    submitted_at: float
    ended_at: float = 0.0
    cause: Cause | None = None
    """Of a failed job."""
    pause: Pause | None = None
    rollbacks: list[Rollback] = []
    n_matrices: int = 0
    members: dict[str, MemberView] = {}
    current: RoundView | None = None
    history: list[RoundRecord] = []
    evaluations: Evaluations = {}
    versions: list[VersionView] = []
    has_plan: bool = False
    """Whether there is a plan to be asked for."""
    n_skipped: int = 0
    cost: CostView = CostView()


class BrokerView(View, frozen=True, kw_only=True):
    """The broker, and why there is no connection to it when there is none."""

    address: str
    connected: bool
    fault: str = ""


class FleetView(View, frozen=True, kw_only=True):
    """Everything at a glance.  `counts` holds what peers did wrong or twice, by kind; bytes are those of transfers."""

    now: float
    fleet: str
    session: str
    broker: BrokerView
    agents: list[AgentView] = []
    jobs: list[JobShort] = []
    counts: dict[str, int] = {}
    sent_bytes: int = 0
    received_bytes: int = 0
    disk: str = "ok"
    """ok, low or refused; see coordinator/disk.py."""
    disk_reason: str = ""


# ------------------------------------------------------------------------------------------------------------- fleet


def fleet_view(coordinator: Coordinator, *, brief: bool = False) -> FleetView:
    """The whole fleet; `brief` as for agent_views.  Cost: linear in agents and jobs."""
    state, moved = coordinator.fleet.state, coordinator.exchange.pulling.receiving.counts
    wrong = {**coordinator.intake.gate.counts, "stray_chunk": moved.n_stray, "bad_chunk": moved.n_bad}
    return FleetView(
        now=coordinator.clock(),
        fleet=coordinator.config.fleet,
        session=coordinator.outgoing.session,
        broker=BrokerView(
            address=str(parse_url(coordinator.config.broker.url)),
            connected=coordinator.connected,
            fault=coordinator.bus_fault,
        ),
        agents=agent_views(state.agents, coordinator.presence, state.jobs.values(), brief=brief),
        jobs=[job_short(job) for job in state.jobs.values()],
        counts=state.counts | {kind: n for kind, n in wrong.items() if n},
        sent_bytes=sum(coordinator.exchange.sent_bytes.values()),
        received_bytes=sum(coordinator.exchange.pulling.received_bytes.values()),
        disk=coordinator.disk.state,
        disk_reason=coordinator.disk.reason,
    )


def agent_views(
    agents: Mapping[str, AgentState], presence: Presence, jobs: Iterable[JobState] = (), *, brief: bool = False
) -> list[AgentView]:
    """All agents that were ever seen, by name; `brief` leaves out of their reports what a server has, but not what it may use.

    Cost: linear in agents times jobs under way.
    """
    activity = Activity(jobs)
    return [_agent(agents[name], presence, activity, brief=brief) for name in sorted(agents)]


def _agent(agent: AgentState, presence: Presence, activity: Activity, *, brief: bool) -> AgentView:
    progress, report = presence.progress.get(agent.id), agent.report
    if brief and report:
        report = msgspec.structs.replace(_UNTOLD, allowance=report.allowance)  # shares its empty lists
    return AgentView(
        id=agent.id,
        online=agent.online,
        since=agent.since,
        reason=agent.reason,
        software=agent.software,
        methods=agent.methods,
        task=agent.task,
        doing=activity.of(agent, progress),
        heard_at=presence.heard_at(agent.id),
        progress=progress,
        report=report,
    )


# --------------------------------------------------------------------------------------------------------------- job


def job_short(job: JobState) -> JobShort:
    """A job in one line."""
    shares = job.round.shares.values() if job.round else ()
    return JobShort(
        name=job.spec.job.name,
        phase=job.phase,
        text=phase_text(job),
        round=job.round_number,
        n_rounds=job.spec.round.n_rounds,
        version=job.version,
        submitted_at=job.submitted_at,
        ended_at=job.ended_at,
        cause=job.cause,
        n_agents=len(shares),
        n_done=sum(share.state is ExecState.DONE for share in shares),
        pause=job.pause,
    )


def job_view(
    job: JobState,
    past: Past,
    measured: Evaluations,
    versions: Iterable[Version],
    *,
    cost: CostView,
    presence: Presence,
    remaining: Remaining,
    now: float,
    skip: int = 0,
) -> JobView:
    """A whole job, its history left to the caller: that of a large fleet is better told while it is read."""
    return JobView(
        now=now,
        name=job.spec.job.name,
        phase=job.phase,
        reason=job.reason,
        cause=job.cause,
        pause=job.pause,
        rollbacks=job.rollbacks,
        text=phase_text(job),
        method=job.spec.job.method,
        base=job.spec.model.source,
        base_sha256=job.base_sha256 or job.spec.model.sha256,
        data=job.spec.job.data,
        round=job.round_number,
        n_rounds=job.spec.round.n_rounds,
        attempt=job.attempt,
        version=job.version,
        since=job.since,
        submitted_at=job.submitted_at,
        ended_at=job.ended_at,
        n_matrices=len(job.matrices),
        members={agent: _member(member) for agent, member in sorted(job.members.items())},
        current=_round(job, job.round, presence, remaining, now) if job.round else None,
        evaluations=measured,
        versions=version_views(job, versions, losses_with(past, job.round)),
        has_plan=job.plan is not None,
        n_skipped=skip,
        cost=cost,
    )


def with_history(view: JobView, records: Iterable[RoundRecord]) -> Iterator[bytes]:
    """A view that has no history as JSON, with these records for one: each is read when it is sent."""
    # In no string (its quotation marks are escaped) and in no map, whose values are not lists.
    begun = b'"history":['
    head, _, tail = msgspec.json.encode(view).partition(begun)
    yield head + begun
    for n, record in enumerate(records):
        yield b"," * (n > 0) + msgspec.json.encode(record)
    yield tail


def _member(member: Member) -> MemberView:
    found = member.surveyed
    return MemberView(
        survey=str(member.survey.state) if member.survey else "",
        excluded=member.excluded,
        n_train=found.n_train if found else 0,
        n_eval=found.n_eval if found else 0,
        calibrated_s=member.calibrated.seconds if member.calibrated else None,
        uncalibrated=member.uncalibrated,
    )


def _round(job: JobState, round_: Round, presence: Presence, remaining: Remaining, now: float) -> RoundView:
    def progress(agent: str) -> Progress | None:
        said = presence.progress.get(agent)
        return said if said and (said.job, said.round) == (job.spec.job.name, round_.number) else None

    return RoundView(
        number=round_.number,
        attempt=round_.attempt,
        purpose=round_.purpose,
        opened_at=round_.opened_at,
        stop_at=round_.stop_at,
        close_at=round_.close_at,
        target=round_.target,
        quorum=round_.quorum,
        shares={a: _share(s, progress(a), remaining, now) for a, s in sorted(round_.shares.items())},
    )


def _share(share: Share, progress: Progress | None, remaining: Remaining, now: float) -> ShareView:
    offer, choice = share.offer, share.choice
    ended = share.state in TERMINAL
    return ShareView(
        state=str(share.state),
        reason=share.reason or (offer.stopped if offer else ""),
        bits=choice.bits if choice else "",
        rank_sum=sum(choice.ranks.values()) if choice else 0,
        n_steps=choice.n_steps if choice else 0,
        samples=offer.samples if offer else progress.samples if progress else 0,
        loss=offer.loss if offer else progress.loss if progress else None,
        bytes_up=_bytes_up(share, remaining),
        size_up=offer.blob.size if offer else 0,
        bytes_down=offer.bytes_down if offer else 0,
        train_s=offer.train_s if offer else 0.0,
        wall_s=max(0.0, (share.ended_at or now) - share.assigned_at) if share.assigned_at else 0.0,
        assigned_at=share.assigned_at,
        entered=share.entered,
        ended_at=share.ended_at,
        progress=None if ended else progress,
        evaluated=share.evaluated,
    )


def _bytes_up(share: Share, remaining: Remaining) -> int:
    if share.offer is None or (share.state in TERMINAL and share.state is not ExecState.DONE):
        return 0
    blob = share.offer.blob
    # A transfer that is open no more is complete and being verified.
    missing = 0 if share.state is ExecState.DONE else remaining(share.agent, blob.xfer) or 0
    return max(0, blob.size - missing * blob.chunk)
