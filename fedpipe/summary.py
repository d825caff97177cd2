"""From what the coordinator's API says to the demo's report: every figure was measured by an agent or counted by a daemon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.plan_views import PlanView
from coordinator.views import JobView
from fedpipe.alone import Alone
from fedpipe.demo_options import DemoOptions
from fedpipe.outcome import AgentRound, Eval, Note, Participant, Report, RoundOutcome, Sample
from protocol.errors import Unavailable


def summarise(
    options: DemoOptions,
    job: JobView,
    plan: PlanView,
    alone: Sequence[Alone],
    samples: Sequence[Sample],
    notes: Sequence[tuple[float, str]],
    adapter: Path,
    wall_s: float,
) -> Report:
    """The whole run.  Raises Unavailable when no agent measured both the base and the result."""
    base, final = _losses(job, 0), _losses(job, job.version)
    if not base.keys() & final.keys():
        raise Unavailable("no agent measured both the base and the final adapter: see the logs of the agents")
    trained = [record for record in job.history if record.purpose == "train"]
    began_at = trained[0].opened_at if trained else 0.0
    return Report(
        model=job.base,
        method=job.method,
        seed=options.seed,
        broker=options.broker,
        wall_s=wall_s,
        eval=Eval.of(base, final, {one.agent: one.losses for one in alone}),
        agents=_participants(job, plan),
        rounds=[_round(record, began_at, job) for record in trained],
        samples=list(samples),
        events=[Note(at_s=at_s, text=text) for at_s, text in notes],
        adapter=str(adapter),
        plan=plan,
        cost=job.cost,
    )


def _losses(job: JobView, version: int) -> dict[str, float]:
    return {agent: found.loss for agent, found in job.evaluations.get(version, {}).items()}


def _participants(job: JobView, plan: PlanView) -> dict[str, Participant]:
    chosen = {agent: found.choice for agent, found in plan.agents.items()}
    return {
        agent: Participant(
            n_train=member.n_train,
            n_held_out=member.n_eval,
            bits=chosen[agent].bits if agent in chosen else "",
            n_matrices=len(chosen[agent].ranks) if agent in chosen else 0,
            rank=fmean(chosen[agent].ranks.values()) if agent in chosen and chosen[agent].ranks else 0.0,
        )
        for agent, member in job.members.items()
    }


def _round(record: RoundRecord, began_at: float, job: JobView) -> RoundOutcome:
    made = record.version + 1 if record.outcome == "aggregated" else None
    return RoundOutcome(
        round=record.round,
        wall_s=record.wall_s,
        began_s=record.opened_at - began_at,
        loss=record.loss,
        outcome=record.outcome,
        agents={agent: _share(share) for agent, share in record.shares.items()},
        held_out=_losses(job, made) if made is not None else {},
    )


def _share(share: ShareRecord) -> AgentRound:
    return AgentRound(
        state=share.state,
        reason=share.reason,
        samples=share.samples,
        loss=share.loss,
        bytes_up=share.bytes_up,
        bytes_down=share.bytes_down,
        train_s=share.train_s,
        wall_s=share.wall_s,
        planned_samples=share.planned_samples,
    )
