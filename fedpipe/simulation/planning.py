"""What the planner answers: the real one for jobs that decide everything, a modelled one for jobs that leave it open."""

from __future__ import annotations

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice, Prediction
from coordinator.core.state import FleetState, JobState
from coordinator.planner import automatic
from coordinator.planner.servers import Ask
from fedpipe.simulation.clockwork import Clockwork
from fedpipe.simulation.scenario import Faults


def answer(wish: act.MakePlan, fleet: FleetState, clockwork: Clockwork, faults: Faults) -> ev.PlanReady | ev.PlanFailed:
    """Who does what, as of the moment in which the question was put."""
    job, chance = fleet.jobs[wish.job], clockwork.chance("planner")
    if chance.random() < faults.planner_failure_ratio:
        clockwork.fault("planner failed", "coordinator")
        return ev.PlanFailed(job=wish.job, round=wish.round, attempt=wish.attempt, reason="nothing fits")
    if job.spec.is_pinned(""):
        ask = Ask(
            spec=job.spec,
            matrices=list(job.matrices),
            frozen_rank=0,
            overhead_s=job.spec.plan.overhead_s,
            members={agent: job.members[agent] for agent in wish.agents},
            reports={agent: report for agent in wish.agents if (report := fleet.agents[agent].report)},
        )
        found = automatic.plan(ask, wish.agents)
        choices, left_out, train_s, notes = found.choices, found.left_out, found.train_s, found.notes
    else:
        out = [agent for agent in wish.agents if len(wish.agents) > 2 and chance.random() < 0.05]
        choices = {agent: _choice(job, agent, clockwork) for agent in wish.agents if agent not in out}
        left_out, train_s, notes = dict.fromkeys(out, "not enough memory"), chance.choice([60.0, 200.0]), []
    return ev.PlanReady(
        job=wish.job,
        round=wish.round,
        attempt=wish.attempt,
        choices=choices,
        reason=wish.reason,
        train_s=train_s,
        left_out=left_out,
        notes=notes,
    )


def _choice(job: JobState, agent: str, clockwork: Clockwork) -> Choice:
    chance, factor = clockwork.chance("planner"), job.members[agent].time_factor
    predicted = Prediction(
        step_s=2.0 * factor,
        train_s=40.0 * factor,
        down_s=1.0,
        up_s=1.0,
        peak_bytes=2**30,
        limit_bytes=2**31,
        up_bytes=1000,
        progress=1.0,
        time_factor=factor,
    )
    ranks = {matrix.name: chance.choice([2, 4]) for matrix in job.matrices}
    return Choice(ranks=ranks, bits="nf4", n_steps=chance.choice([10, 20]), batch=4, predicted=predicted)
