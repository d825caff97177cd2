"""One round under way: how it is opened, what closes it, and what an attempt leaves behind that did not bring a version.

A round closes by itself, with an update of everyone, of enough or of too few, or an operator stops it.  In all cases its shares
end first and a record is written.  What an attempt without a version has finished is carried into the next one, and what was
planned for the others is remembered: their updates may still come.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.core import actions as act
from coordinator.core import plans
from coordinator.core.choice import Choice
from coordinator.core.state import Cause, JobState, Phase, Purpose, Round, Share
from protocol.messages import TERMINAL, ExecState

if TYPE_CHECKING:
    from coordinator.core.job import Job

MAX_COMING: Final = 16
"""Updates still on their way at most, when a sum may begin: before, each event of a fleet of thousands would have to be thought about."""
TRAIN_S: Final = 600.0
"""Training time of a round where neither the job file nor the planner says one."""


def begin(job: Job, purpose: Purpose, choices: dict[str, Choice]) -> None:
    """Open the next round: a share for each of these agents, beside those that an earlier attempt left."""
    state, rules, trains = job.state, job.rules, purpose == "train"
    wanted = len(choices) + len(state.carried)
    target = min(rules.n_agents, wanted) if trains and rules.n_agents else wanted
    stop_at = job.now + (_train_s(job) if trains else rules.survey_s)
    state.round = Round(
        number=state.round_number + 1,
        attempt=state.attempt,
        purpose=purpose,
        opened_at=job.now,
        stop_at=stop_at,
        close_at=stop_at + (rules.grace_s if trains else 0.0),
        target=target,
        quorum=max(rules.min_agents, math.ceil(rules.quorum_ratio * target)) if trains else 0,
        shares=dict(state.carried) if trains else {},
    )
    state.carried, state.is_stopped = {}, False
    job.roster.touch(*state.round.shares)
    job.move(Phase.COLLECTING if trains else Phase.EVALUATING)
    for agent, choice in sorted(choices.items()):
        share = Share(agent=agent, attempt=state.attempt, choice=choice, assigned_at=job.now)
        state.round.shares[agent] = share
        job.fleet.agents[agent].task = job.name
        job.roster.touch(agent)
        job.out.append(act.Assign(agent=agent, plan=plans.share_plan(state, state.round, share, job.now)))
    close_if_due(job)


def _train_s(job: Job) -> float:
    """How long the agents of a round may train: pinned, planned, or the default.  Unit: seconds."""
    planned = job.state.plan.train_s if job.state.plan else None
    return job.rules.train_s or planned or TRAIN_S


def open_shares(state: JobState) -> list[Share]:
    """Shares of the open round that have not ended."""
    shares = state.round.shares if state.round else {}
    return [s for s in shares.values() if s.state not in TERMINAL]


def close_if_due(job: Job) -> None:
    """Close the open round if its time is over, enough have answered, or nobody is left to wait for."""
    round_ = job.state.round
    assert round_ is not None
    if job.now >= round_.close_at:
        close(job, f"not in time: the round closed {round_.close_at - round_.opened_at:g} s after it opened")
    elif round_.purpose == "train" and job.rules.n_agents and len(job.roll.done) >= round_.target:
        close(job, "superseded: enough others answered first")
    elif job.roll.shares_vanished(job.now):
        close(job, "the agent vanished and did not come back in time")


def close(job: Job, why: str) -> None:
    """End what is open, and fold what is there, try again, or be done with the job."""
    round_ = job.state.round
    assert round_ is not None
    _end_shares(job, round_, ExecState.SUPERSEDED if why.startswith("superseded") else ExecState.TIMED_OUT, why)
    if round_.purpose == "evaluate":
        job.end(Phase.COMPLETED, "")
        return
    n_done = len(job.roll.done)
    if n_done >= round_.quorum:
        round_.late, job.state.late = job.state.late, []
        job.move(Phase.AGGREGATING)
        job.out.append(plans.aggregate(job.state, round_))
    else:
        _retry(job, round_, f"{n_done} of the {round_.quorum} updates needed")


def look_ahead(job: Job) -> None:
    """Once few updates are missing, and those are on their way: say what will be asked if nothing comes between."""
    state, round_ = job.state, job.state.round
    if state.phase is not Phase.COLLECTING or round_ is None:
        return
    n_open, n_done = len(job.roll.working) + len(job.roll.share_waits), len(job.roll.done)
    if not 0 < n_open <= MAX_COMING or not round_.quorum <= n_done + n_open <= round_.target:
        return
    open_ = open_shares(state)
    if all(share.offer and share.state is ExecState.UPLOADING for share in open_):
        done = {share.agent: msgspec.structs.replace(share, state=ExecState.DONE) for share in open_}
        then = msgspec.structs.replace(round_, shares=round_.shares | done, late=state.late)
        job.out.append(act.AggregateAhead(fold=plans.aggregate(state, then)))


def stop(job: Job, outcome: str, *, keep: bool) -> None:
    """An operator does not want the open round to go on; with `keep`, agents keep what they trained for its next attempt."""
    round_ = job.state.round
    assert round_ is not None
    _end_shares(job, round_, ExecState.CANCELLED, outcome, keep=keep)
    _set_aside(job, round_, outcome)
    job.state.n_stopped += 1
    job.state.is_stopped = True
    job.move(Phase.WAITING, outcome)


def record(job: Job, outcome: str) -> None:
    """Write down how the open round ended."""
    assert job.state.round is not None
    job.out.append(act.Record(job=job.name, record=plans.round_record(job.state, job.state.round, outcome, job.now)))


def _end_shares(job: Job, round_: Round, to: ExecState, why: str, *, keep: bool = False) -> None:
    open_ = open_shares(job.state)
    if round_.purpose == "train":
        _remember(job, round_, open_)
    for share in open_:
        job.end_share(share, round_.number, to, why, keep=keep)


def _remember(job: Job, round_: Round, open_: list[Share]) -> None:
    """What was planned for those without an update: one may still come, also of a share that had failed and began again."""
    for share in round_.shares.values():
        if share.choice and share.state is not ExecState.DONE:
            by_round = job.state.tried.setdefault(share.agent, {})
            by_round.setdefault(round_.number, {})[share.attempt] = share.choice
    if job.rules.late == "add":
        for share in open_:
            if share.choice:
                job.state.missed.setdefault(share.agent, {})[round_.number] = share.choice


def _retry(job: Job, round_: Round, why: str) -> None:
    ends = sorted({f"{s.agent}: {s.reason}" for s in round_.shares.values() if s.reason})
    _set_aside(job, round_, f"{Cause.QUORUM}: {why}")
    n_failed = job.state.attempt - job.state.n_stopped
    if n_failed >= job.rules.max_attempts:
        told = f"{why} in round {round_.number} after {n_failed} attempts; {'; '.join(ends[:5])}"
        job.fail(Cause.QUORUM, told)
    else:
        job.move(Phase.WAITING, f"{Cause.QUORUM}: {why}")


def _set_aside(job: Job, round_: Round, outcome: str) -> None:
    """The attempt is over without a version: what it has finished is carried into the next."""
    record(job, outcome)
    state, trained = job.state, round_.purpose == "train"
    state.carried = {a: s for a, s in round_.shares.items() if s.state is ExecState.DONE} if trained else {}
    state.quorum = round_.quorum
    state.round = None
    job.roster.touch(*round_.shares)
    state.attempt += 1
