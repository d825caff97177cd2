"""Surveys: what base an agent holds, which matrices it has, how much data, before it takes part in a round.

A survey belongs to one agent and one job and runs whenever that agent is idle, next to any phase of the job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import plans
from coordinator.core.state import Member, Share
from protocol.messages import TERMINAL, ExecState

if TYPE_CHECKING:
    from coordinator.core.job import Job

UNPROVEN: Final = 1.1
"""Memory is planned with a tenth more than the model says until a round has shown it: too low costs a round, too high little."""


def ask(job: Job) -> None:
    """End surveys that took too long; survey every idle agent that is new to the job."""
    members = job.state.members
    for member in members.values():
        if member.survey and member.survey.state not in TERMINAL and job.now >= member.survey_close_at:
            job.end_share(member.survey, 0, ExecState.TIMED_OUT, f"no survey within {job.rules.survey_s:g} s")
            member.excluded = member.survey.reason
    settled = {a for a, m in members.items() if m.surveyed or m.excluded} | job.held_elsewhere()
    for agent in job.fleet.agents.values():
        if agent.task or agent.id in settled or not job.may_join(agent):
            continue
        member = members.get(agent.id) or Member()
        attempt = member.survey.attempt + 1 if member.survey else 0
        member.survey = Share(agent=agent.id, attempt=attempt, assigned_at=job.now)
        member.survey_close_at = job.now + job.rules.survey_s
        members[agent.id] = member
        agent.task = job.name
        job.out.append(act.Assign(agent=agent.id, plan=plans.survey_plan(job.state, member, job.now)))


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
    if event.state is ExecState.DONE and event.surveyed and event.surveyed.n_train > 0:
        member.surveyed, member.calibrated = event.surveyed, event.calibrated
        member.uncalibrated = "" if event.calibrated else event.reason
        member.time_factor = event.calibrated.load_ratio if event.calibrated else 1.0
        member.memory_factor = UNPROVEN
        job.end_share(share, 0, ExecState.DONE, "")
    else:
        member.excluded = event.reason or "the survey brought nothing to train on"
        job.end_share(share, 0, ExecState.FAILED, member.excluded)


def pin_base(job: Job) -> None:
    """The base that most surveyed agents hold (unless the job names one) is the job's; agents with another are out."""
    state = job.state
    surveyed = {a: m.surveyed for a, m in state.members.items() if m.surveyed}
    if not state.base_sha256:
        votes = sorted(s.base_sha256 for s in surveyed.values())
        state.base_sha256 = state.spec.model.sha256 or max(votes, key=votes.count)
    for agent, found in sorted(surveyed.items()):
        if found.base_sha256 != state.base_sha256:
            member = state.members[agent]
            member.excluded = f"bad_base: has {found.base_sha256[:12]}, the job needs {state.base_sha256[:12]}"
            member.surveyed = None
        elif not state.matrices:
            state.matrices = sorted(found.matrices, key=lambda m: m.name)


def return_by(job: Job) -> list[float]:
    """Until when members that have vanished are waited for: the final version is measured by all who may still come."""
    agents = (job.fleet.agents[a] for a, member in job.state.members.items() if member.surveyed)
    by = (agent.since + job.rules.offline_grace_s for agent in agents if not agent.online)
    return [at for at in by if at > job.now]
