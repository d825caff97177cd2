"""Surveys: what base an agent holds, which matrices it has, how much data, before it takes part in a round.

A survey belongs to one agent and one job and runs whenever that agent is idle, next to any phase of the job.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import plans
from coordinator.core.packing import share_matrices
from coordinator.core.state import JobState, Member, Share
from protocol.messages import TERMINAL, ExecState, Matrix, Surveyed

if TYPE_CHECKING:
    from coordinator.core.job import Job

OTHER_MATRICES: Final = "bad_base: finds other matrices in the base than the other agents do: upgrade fedpipe there"
UNPROVEN: Final = 1.1
"""Memory is planned with a tenth more than the model says until a round has shown it: too low costs a round, too high little."""


def open_surveys(state: JobState) -> list[Share]:
    """Surveys that have not ended."""
    return [m.survey for m in state.members.values() if m.survey and m.survey.state not in TERMINAL]


def end_late(job: Job) -> None:
    """End surveys that took too long."""
    for agent in job.roll.survey_closes.past(job.now):
        member = job.state.members[agent]
        assert member.survey is not None
        member.excluded = f"no survey within {job.rules.survey_s:g} s"
        job.end_share(member.survey, 0, ExecState.TIMED_OUT, member.excluded)


def ask(job: Job) -> None:
    """Survey every idle agent that is new to the job."""
    members = job.state.members
    for agent in job.roll.unasked.names():
        member = members.setdefault(agent, Member())
        attempt = member.survey.attempt + 1 if member.survey else 0
        member.survey = Share(agent=agent, attempt=attempt, assigned_at=job.now)
        member.survey_close_at = job.now + job.rules.survey_s
        job.fleet.agents[agent].task = job.name
        job.roster.touch(agent)
        job.out.append(act.Assign(agent=agent, plan=plans.survey_plan(job.state, member, job.now)))


def forgive(job: Job, agent: str, *, reborn: bool) -> None:
    """An agent is back: a new session clears any verdict but a wrong base, a mere return the one for silence."""
    member = job.state.members.get(agent)
    if member and member.survey and not member.excluded.startswith("bad_base"):
        silent = member.survey.state is ExecState.TIMED_OUT
        member.excluded = "" if reborn or silent else member.excluded


def moved(job: Job, share: Share, event: ev.ShareMoved) -> None:
    """A survey went on or ended; one without data to train on leaves its agent out, with the reason."""
    if share.state in TERMINAL:
        return
    if event.state not in TERMINAL:
        share.state = event.state
        return
    member = job.state.members[event.agent]
    if event.surveyed and _is_odd(job, event.surveyed):
        member.excluded = OTHER_MATRICES
        job.end_share(share, 0, ExecState.FAILED, member.excluded)
    elif event.state is ExecState.DONE and event.surveyed and event.surveyed.n_train > 0:
        member.surveyed = share_matrices(job.state, event.surveyed)
        member.calibrated, member.learned = event.calibrated, {}
        member.uncalibrated = "" if event.calibrated else event.reason
        member.time_factor = event.calibrated.load_ratio if event.calibrated else 1.0
        member.memory_factor = UNPROVEN
        job.end_share(share, 0, ExecState.DONE, "")
    else:
        member.excluded = event.reason or "the survey brought nothing to train on"
        job.end_share(share, 0, ExecState.FAILED, member.excluded)


def _is_odd(job: Job, found: Surveyed) -> bool:
    """Whether it names a matrix twice, or claims the job's base and finds other matrices in it."""
    known = job.state.matrices
    is_same_base = bool(known) and found.base_sha256 == job.state.base_sha256
    return len({m.name for m in found.matrices}) < len(found.matrices) or (is_same_base and _matrices(found) != known)


def pin_base(job: Job) -> None:
    """The base that most surveyed agents hold (unless the job names one) is the job's; agents with another are out."""
    state, members, surveyed = job.state, job.state.members, job.roll.surveyed
    if surveyed and not state.base_sha256:
        votes = Counter(found.base_sha256 for agent in surveyed if (found := members[agent].surveyed))
        most = max(votes.values())
        state.base_sha256 = state.spec.model.sha256 or min(base for base, n in votes.items() if n == most)
        job.roster.touch(*surveyed)
    for agent in job.roll.stray.names():
        member = members[agent]
        assert member.surveyed is not None
        has = member.surveyed.base_sha256
        member.excluded = f"bad_base: has {has[:12]}, the job needs {state.base_sha256[:12]}"
        member.surveyed = None
        job.roster.touch(agent)
    if surveyed and not state.matrices:
        _pin_matrices(job)


def _pin_matrices(job: Job) -> None:
    """What most agents with the job's base found in it: one that lies about its matrices must not lead the others astray."""
    state = job.state
    found = {agent: _matrices(known) for agent in job.roll.surveyed if (known := state.members[agent].surveyed)}
    said = {agent: msgspec.msgpack.encode(matrices) for agent, matrices in found.items()}
    votes = Counter(said.values())
    most = max(votes.values())
    elected = min(encoded for encoded, n in votes.items() if n == most)
    state.matrices = next(found[agent] for agent, encoded in said.items() if encoded == elected)
    for agent in sorted(agent for agent, matrices in found.items() if matrices != state.matrices):
        state.members[agent].excluded, state.members[agent].surveyed = OTHER_MATRICES, None
        job.roster.touch(agent)


def _matrices(found: Surveyed) -> list[Matrix]:
    return sorted(found.matrices, key=lambda m: m.name)
