"""When a job's plan has to be renewed, what the planner is asked, and what is made of its answer.

A plan holds for several rounds: agents keep their base model loaded, and rounds stay comparable.  It is renewed when what it
was made of has changed (method.md section 7; our design):

    churn     an agent without a choice wants to take part, or one that was planned for has gone
    drift     a step time or a memory was off by more than drift_ratio, or an agent ran out of memory
    memory    what an agent may use has shrunk below its plan, or grown well beyond it
    version   the first aggregate exists: from now on agents carry the fleet's adapter too
    age       replan_every rounds have passed

A job whose file decides everything is "planned" for every round: that costs nothing and measures nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import plans, rounds
from coordinator.core.choice import Choice, share_ranks
from coordinator.core.state import Cause, Phase, RoundPlan
from protocol.messages import Cancel

if TYPE_CHECKING:
    from coordinator.core.job import Job


def start(job: Job, ready: list[str]) -> None:
    """Open the next round for these agents by the plan that holds, or ask the planner."""
    state, rules = job.state, job.rules
    if rules.n_agents:
        purpose = f"select/{state.attempt}"  # another attempt should not insist on the same stragglers
        draw = random.Random(plans.seed_of(state, state.round_number + 1, purpose))
        ready = sorted(draw.sample(ready, min(max(job.wanted(), 1), len(ready))))
    state.stale = _why_anew(job, ready)
    if not state.stale and state.plan:
        rounds.begin(job, "train", {agent: state.plan.choices[agent] for agent in ready if agent in state.plan.choices})
        return
    state.planned = ready
    state.unreported = [agent for agent in ready if job.fleet.agents[agent].report is None]
    job.move(Phase.PLANNING)
    ask(job)


def ask(job: Job) -> None:
    """Ask the planner for the next round."""
    state = job.state
    number, why = state.round_number + 1, state.stale
    job.out.append(act.MakePlan(job=job.name, round=number, attempt=state.attempt, agents=state.planned, reason=why))


def ready(job: Job, event: ev.PlanReady) -> None:
    """Open the round with those of the planned agents that are still free; with too few, wait."""
    if not job.awaits(Phase.PLANNING, event.round, event.attempt):
        return
    event = msgspec.structs.replace(event, choices=share_ranks(event.choices))
    _adopt(job, event)
    needed, present = max(1, job.needed(first=False)), set(job.ready())
    free = {a: c for a, c in event.choices.items() if a in present}
    if len(event.choices) < needed:  # asking again would bring the same answer
        why = "; ".join([*(f"{a}: {r}" for a, r in sorted(event.left_out.items())), *event.notes][:5])
        job.fail(Cause.PLAN, f"{len(event.choices)} of the {needed} agents needed can take part: {why}")
    elif len(free) < needed:
        job.move(Phase.WAITING, "planned agents left")
    else:
        rounds.begin(job, "train", free)


def failed(job: Job, event: ev.PlanFailed) -> None:
    """No plan, no round: the job ends and says what the planner said."""
    if job.awaits(Phase.PLANNING, event.round, event.attempt):
        job.fail(Cause.PLAN, event.reason)


def _adopt(job: Job, event: ev.PlanReady) -> None:
    """Keep the planner's answer about those it was asked about; one that is free and cannot take part hears why."""
    state, asked = job.state, set(job.state.planned)
    state.stale = ""
    state.plan = RoundPlan(
        round=event.round,
        reason=event.reason,
        train_s=event.train_s,
        choices={agent: choice for agent, choice in event.choices.items() if agent in asked},
        left_out={agent: why for agent, why in event.left_out.items() if agent in asked},
        notes=event.notes,
    )
    for agent, reason in sorted(state.plan.left_out.items()):
        if job.fleet.agents[agent].task:
            continue
        cancel = Cancel(job=job.name, round=event.round, attempt=event.attempt, reason=reason[:2000])
        job.out.append(act.Withdraw(agent=agent, cancel=cancel))


def _why_anew(job: Job, ready: Sequence[str]) -> str:
    """Why the next round needs a new plan; empty when the last one holds for these agents."""
    state, plan = job.state, job.state.plan
    if plan is None:
        return "the first plan"
    if not any(choice.predicted for choice in plan.choices.values()):
        return "nothing was measured"
    if state.stale:
        return state.stale
    kept = [agent for agent in ready if agent in plan.choices]
    if new := [agent for agent in ready if agent not in plan.choices and agent not in plan.left_out]:
        return _named(new, "came")
    if told := [agent for agent in kept if agent in state.unreported and job.fleet.agents[agent].report]:
        return _named(told, "reported for the first time")
    if gone := sorted(a for a in plan.choices if not job.fleet.agents[a].online):
        return _named(gone, "went")
    if state.round_number + 1 >= plan.round + state.spec.plan.replan_every:
        return f"{state.spec.plan.replan_every} rounds have passed"
    if len(kept) < max(1, job.needed(first=False)):
        return "too few of the planned agents are free"
    return next((why for agent in kept if (why := _memory_moved(job, agent, plan.choices[agent]))), "")


def _named(agents: Sequence[str], what: str) -> str:
    return f"{agents[0]} {what}" if len(agents) == 1 else f"{len(agents)} agents {what}"


def _memory_moved(job: Job, agent: str, choice: Choice) -> str:
    report, rules = job.fleet.agents[agent].report, job.state.spec.plan
    allowance = report.allowance if report else None
    if allowance is None or choice.predicted is None or not choice.predicted.limit_bytes:
        return ""
    now, then = allowance.memory_bytes * rules.memory_ratio, choice.predicted.limit_bytes
    is_bound_lower = job.state.members[agent].oom_bytes > 0  # by what did not fit, whatever is free
    if now < choice.predicted.peak_bytes or (now > then * (1 + rules.drift_ratio) and not is_bound_lower):
        return f"{agent} may now use {now / 2**30:.1f} GiB, not {then / 2**30:.1f}"
    return ""
