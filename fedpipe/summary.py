"""From what the coordinator's API says to the demo's report: every figure was measured by an agent or counted by a daemon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator.core.spec import JobSpec
from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.views import JobView
from fedpipe.alone import Alone
from fedpipe.demo_options import DemoOptions
from fedpipe.outcome import AgentRound, Eval, Note, Participant, Report, RoundOutcome, Sample
from protocol.errors import Unavailable


def summarise(
    options: DemoOptions,
    spec: JobSpec,
    job: JobView,
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
        agents=_participants(spec, job),
        rounds=[_round(record, began_at, job) for record in trained],
        samples=list(samples),
        events=[Note(at_s=at_s, text=text) for at_s, text in notes],
        adapter=str(adapter),
    )


def _losses(job: JobView, version: int) -> dict[str, float]:
    return {agent: found.loss for agent, found in job.evaluations.get(version, {}).items()}


def _participants(spec: JobSpec, job: JobView) -> dict[str, Participant]:
    chosen: Mapping[str, tuple[str, int]] = {
        agent: (
            (own.bits if own else None) or spec.adapter.bits,
            (own.rank if own else None) or spec.adapter.rank,
        )
        for agent in job.members
        for own in [spec.agents.get(agent)]
    }
    return {
        agent: Participant(
            n_train=member.n_train, n_held_out=member.n_eval, bits=chosen[agent][0], rank=chosen[agent][1]
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
    )
