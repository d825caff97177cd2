"""What people and programs see of a plan: what was decided for whom, why, and how well its predictions held.

Made from a job's state and its records by pure functions, as the views of views.py.  coordinator/plan_text.py draws it for
a terminal, coordinator/plan_svg.py as a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from coordinator.core.choice import Choice, Prediction
from coordinator.core.plans import phase_text
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, JobState, Member, RoundPlan, RoundRecord, ShareRecord
from coordinator.heatmap import grid
from coordinator.past import Past, samples_of
from coordinator.views import View

LOOK_BACK: Final = 10
"""Ended rounds in which a plan's view looks for what each agent measured last: not in all of a long job, each time somebody looks."""


class PastShare(View, frozen=True, kw_only=True):
    """One agent's share of a round that ended, as measured; `predicted` is what was expected of it."""

    round: int
    attempt: int
    state: str
    bits: str = ""
    rank_sum: int = 0
    samples: int = 0
    planned_samples: int = 0
    train_s: float = 0.0
    step_s: float = 0.0
    peak_bytes: int = 0
    predicted: Prediction | None = None


class AgentPlan(View, frozen=True, kw_only=True):
    """What one agent shall do.  `pins` names what the job file fixes; factors are measured / predicted so far.

    calibrated_s is how long the agent's own measurements took, 0 for remembered ones, None where there are none;
    `uncalibrated` then says why.  oom_bytes is the predicted peak of the smallest share that ran out of memory, 0: none did.
    past: its shares of all rounds that ended if it was asked for by name; else the last whose steps were timed, if one of the last
    ten rounds has it.
    """

    choice: Choice
    pins: list[str] = []
    device: str = ""
    calibrated_s: float | None = None
    uncalibrated: str = ""
    calibration_notes: list[str] = []
    time_factor: float = 1.0
    memory_factor: float = 1.0
    oom_bytes: int = 0
    past: list[PastShare] = []

    @property
    def measured(self) -> PastShare | None:
        """The last share whose steps were timed."""
        return next((share for share in reversed(self.past) if share.step_s > 0), None)


class PlanView(View, frozen=True, kw_only=True):
    """The plan that holds now.  `round` is the one it was made for, `reason` says why it was made then.

    Fields: train_s, training time of a round (None: no limit but the job's); transfer_s, slowest download and upload;
    round_s, slowest agent's download, training and upload (each 0 while nothing is predicted); under_training, 1 - processed
    / planned samples of all rounds so far, None where nothing was planned; job_s, how long the job has been running;
    matrices, all of the base model.
    """

    now: float
    job: str
    base: str = ""
    round: int
    reason: str = ""
    pinned: bool = False
    """The job file decides everything, for every agent."""
    train_s: float | None = None
    transfer_s: float = 0.0
    round_s: float = 0.0
    under_training: float | None = None
    job_s: float = 0.0
    left_out: dict[str, str] = {}
    """Agents that cannot take part, with the reason."""
    notes: list[str] = []
    matrices: list[str] = []
    layers: list[int | None] = []
    kinds: list[str] = []
    places: list[tuple[int, int]] = []
    """Of each of the matrices: its row in `layers` (None: outside of them) and its column in `kinds`."""
    agents: dict[str, AgentPlan] = {}


def past_shares(rounds: Iterable[RoundRecord], agent: str = "") -> dict[str, list[PastShare]]:
    """From rounds that ended: every agent's last share whose steps were timed, and all of `agent`.  Holds one record at a time."""
    found: dict[str, list[PastShare]] = {}
    for record in rounds:
        for name, share in record.shares.items() if record.purpose == "train" else ():
            if name == agent:
                found.setdefault(name, []).append(_past_share(record, share))
            elif share.step_s > 0:
                found[name] = [_past_share(record, share)]
    return found


def plan_view(
    job: JobState, plan: RoundPlan, past: Past, shares: Mapping[str, Sequence[PastShare]], now: float
) -> PlanView:
    """The plan of a job beside what came of it so far.  Cost: linear in agents, in matrices and in these shares."""
    expected = [choice.predicted for choice in plan.choices.values() if choice.predicted]
    agents = sorted(plan.choices)
    found = grid(m.name for m in job.matrices)
    places = {
        name: (found.layers.index(at[0]), found.kinds.index(at[1]))
        for at, names in found.names.items()
        for name in names
    }
    return PlanView(
        now=now,
        job=job.spec.job.name,
        base=job.spec.model.source,
        round=plan.round,
        reason=plan.reason,
        pinned=all(job.spec.is_pinned(agent) for agent in agents),
        train_s=plan.train_s if plan.train_s is not None else job.spec.round.train_s,
        transfer_s=max((p.down_s + p.up_s for p in expected), default=0.0),
        round_s=max((p.down_s + p.train_s + p.up_s for p in expected), default=0.0),
        under_training=under_training(past.samples.values()),
        job_s=max(0.0, (job.ended_at or now) - job.submitted_at),
        left_out=plan.left_out,
        notes=plan.notes,
        matrices=[m.name for m in job.matrices],
        layers=found.layers,
        kinds=found.kinds,
        places=[places[m.name] for m in job.matrices],
        agents={
            a: _agent(a, plan.choices[a], job.spec, job.members.get(a, Member()), shares.get(a, ())) for a in agents
        },
    )


def unplanned_text(job: JobState) -> str:
    """Why there is no plan to show, and what to do next."""
    name, where = job.spec.job.name, phase_text(job)
    if job.phase in ENDED:
        return f"job {name!r} ended before it had a plan ({where}): put right what that names, then submit it anew"
    return f"job {name!r} has no plan yet ({where}): fedpipe show {name} says who is awaited; ask again after that"


def under_training(shares: Iterable[tuple[int, int]]) -> float | None:
    """1 - processed / planned, from (processed, planned) samples; None where nothing was planned."""
    counted = [(done, wanted) for done, wanted in shares if wanted > 0]
    planned = sum(wanted for _, wanted in counted)
    return max(0.0, 1.0 - sum(done for done, _ in counted) / planned) if planned else None


def round_under_training(record: RoundRecord) -> float | None:
    """Of one round of training; None where nothing was planned."""
    return under_training([samples_of(record)])


def fleet_under_training(rounds: Iterable[RoundRecord]) -> float | None:
    """Of all rounds of training.  A failed attempt does not count beside the next: that starts with its finished shares."""
    return under_training({r.round: samples_of(r) for r in rounds if r.purpose == "train"}.values())


def _agent(agent: str, choice: Choice, spec: JobSpec, member: Member, past: Sequence[PastShare]) -> AgentPlan:
    pins, found = spec.pins(agent), member.calibrated
    return AgentPlan(
        choice=choice,
        pins=[name for name, value in msgspec.structs.asdict(pins).items() if value is not None],
        device=found.device if found else "",
        calibrated_s=found.seconds if found else None,
        uncalibrated=member.uncalibrated,
        calibration_notes=found.notes if found else [],
        time_factor=member.time_factor,
        memory_factor=member.memory_factor,
        oom_bytes=member.oom_bytes,
        past=list(past),
    )


def _past_share(record: RoundRecord, share: ShareRecord) -> PastShare:
    return PastShare(
        round=record.round,
        attempt=record.attempt,
        state=share.state,
        bits=share.bits,
        rank_sum=share.rank_sum,
        samples=share.samples,
        planned_samples=share.planned_samples,
        train_s=share.train_s,
        step_s=share.step_s,
        peak_bytes=share.peak_bytes,
        predicted=share.predicted,
    )
