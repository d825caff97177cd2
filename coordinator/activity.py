"""What an agent does at this moment, or why it does nothing, in one line for people; and what the whole fleet does."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.core.plans import phase_text
from coordinator.core.state import ENDED, AgentState, FleetState, JobState, Phase
from protocol.messages import TERMINAL, ExecState, Progress

NO_JOB = "no job is under way"


class Activity:
    """Tells it for every agent of one fleet.  Cost: linear in the open shares once, then in jobs under way per agent."""

    def __init__(self, jobs: Iterable[JobState]) -> None:
        self._going = {job.spec.job.name: job for job in jobs if job.phase not in ENDED}
        self._n_open = {
            name: sum(share.state not in TERMINAL for share in job.round.shares.values()) if job.round else 0
            for name, job in self._going.items()
        }

    def of(self, agent: AgentState, progress: Progress | None = None) -> str:
        """What this agent does, or why it is idle; empty for one that is away."""
        if not agent.online:
            return ""
        allowance = agent.report.allowance if agent.report else None
        paused = f"paused: {allowance.paused}" if allowance and allowance.paused else ""
        job = self._going.get(agent.task)
        if job is not None:
            return f"{agent.task}, {_work(agent.id, job, progress)}" + (f" ({paused})" if paused else "")
        if paused or not self._going:
            return paused or NO_JOB
        return "; ".join(f"{name}: {self._idle(agent, job)}" for name, job in self._going.items())

    def _idle(self, agent: AgentState, job: JobState) -> str:
        head, member = job.spec.job, job.members.get(agent.id)
        if head.only and agent.id not in head.only:
            return "not among its job.only"
        if head.method not in agent.methods:
            return f"this agent does not have the method {head.method!r}"
        if member and member.excluded:
            return member.excluded
        if job.round is None:
            left_out = job.plan.left_out.get(agent.id) if job.plan else None
            return left_out or f"{job.phase}, round {job.round_number + 1} of {job.spec.round.n_rounds}"
        if share := job.round.shares.get(agent.id):
            if share.state is not ExecState.DONE:
                return f"{share.state}: {share.reason}"
            if job.phase is Phase.AGGREGATING:
                return f"done with round {job.round.number}, which is being aggregated"
            return f"done with round {job.round.number}, waits for {self._n_open[head.name]} more"
        return f"not asked in round {job.round.number}"


def _work(agent: str, job: JobState, progress: Progress | None) -> str:
    said = progress if progress and progress.job == job.spec.job.name else None
    steps = f" {said.step}/{said.n_steps}" if said and said.n_steps else ""
    if job.round and (share := job.round.shares.get(agent)):
        phase = said.phase if said and said.round == job.round.number else str(share.state).lower()
        where = f"round {job.round.number}" if job.round.purpose == "train" else "final measurement"
        return f"{where}: {phase}{steps}"
    return f"survey: {said.phase if said else 'asked'}{steps}"


def fleet_text(state: FleetState) -> str:
    """How many agents are there, and where every job stands."""
    active = [job for job in state.jobs.values() if job.phase not in ENDED]
    online = sum(agent.online for agent in state.agents.values())
    jobs = "; ".join(f"{job.spec.job.name}: {phase_text(job)}" for job in active) or "no active job"
    return f"{online} agents online; {jobs}"
