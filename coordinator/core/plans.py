"""From state to messages: the plan of one share, the job card, the fold and the record of a round.  Pure functions."""

from __future__ import annotations

import hashlib
import math
from typing import Final, TypeAlias

import msgspec

from coordinator.core.actions import Aggregate
from coordinator.core.choice import Choice
from coordinator.core.state import (
    Cause,
    Contribution,
    FleetState,
    JobState,
    Member,
    Phase,
    Purpose,
    Round,
    RoundRecord,
    Share,
    ShareRecord,
)
from protocol.messages import (
    Base,
    Bits,
    Calibration,
    Evaluation,
    ExecState,
    JobCard,
    Matrix,
    Offer,
    Plan,
    Training,
    UpdateDtype,
)
from protocol.widths import component_bytes

BITS: Final[tuple[Bits, ...]] = ("none", "int8", "nf4")


def update_limit_bytes(job: JobState, choice: Choice) -> int:
    """The largest update that fits this choice: its tensors plus room for names and framing.  Unit: bytes."""
    asked = job.matrices, choice.ranks, _update_dtype(job, choice)
    # Ten shares of one plan ask the same, perhaps of thousands of matrices; what is the very same compares at once.
    _last[:] = [(asked, _last[0][1] if _last and _last[0][0] == asked else _tensor_bytes(*asked))]
    return _last[0][1] + 65_536 + 512 * len(choice.ranks)


_Asked: TypeAlias = tuple[list[Matrix], dict[str, int], UpdateDtype]
_last: Final[list[tuple[_Asked, int]]] = []


def _tensor_bytes(matrices: list[Matrix], ranks: dict[str, int], dtype: UpdateDtype) -> int:
    sides = (component_bytes(m.d_in, dtype) + component_bytes(m.d_out, dtype) for m in matrices)
    return sum(ranks.get(m.name, 0) * side for m, side in zip(matrices, sides, strict=True))


def _update_dtype(job: JobState, choice: Choice) -> UpdateDtype:
    return choice.update_dtype or job.spec.adapter.update_dtype or "bf16"


def seed_of(job: JobState, round_number: int, purpose: str) -> int:
    """A 31-bit seed that depends on (job seed, round, purpose) alone, so that a restart draws the same."""
    text = f"{job.spec.job.seed}/{round_number}/{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def _common(job: JobState, purpose: Purpose, now: float) -> dict[str, object]:
    return {
        "job": job.spec.job.name,
        "purpose": purpose,
        "method": job.spec.job.method,
        "base": Base(source=job.spec.model.source, sha256=job.base_sha256 or job.spec.model.sha256),
        "data": job.spec.job.data,
        "held_out_ratio": job.spec.evaluate.held_out_ratio,
        "data_seed": job.spec.job.seed,
        "issued_at": now,
    }


def survey_plan(job: JobState, member: Member, now: float) -> Plan:
    """Ask an agent to open its base model and its data and to say what it found."""
    assert member.survey is not None
    left_s = max(0.0, member.survey_close_at - now)
    return Plan(
        **_common(job, "survey", now),  # type: ignore[arg-type]
        round=0,
        attempt=member.survey.attempt,
        bits=_bits(job, member.survey.agent),
        calibration=_calibration(job, member.survey.agent),
        stop_after_s=left_s,
        ttl_s=left_s,
    )


def _calibration(job: JobState, agent: str) -> Calibration | None:
    """What a survey shall measure for the planner; nothing where the job file decides it all."""
    spec = job.spec
    if spec.is_pinned(agent):
        return None
    rules, pins, train = spec.plan, spec.pins(agent), spec.train
    return Calibration(
        scorer=rules.scorer,
        probe_rank=rules.probe_rank,
        n_batches=rules.probe_batches,
        warmup_steps=rules.warmup_steps,
        bits=[pins.bits] if pins.bits else list(BITS),
        batches=[pins.batch] if pins.batch else rules.batches,
        learning_rate=train.learning_rate,
        max_tokens=train.max_tokens,
        packing=train.packing,
        seed=spec.job.seed,
        max_s=rules.calibrate_s,
    )


def evaluation_choice(job: JobState, agent: str) -> Choice:
    """To measure is all there is to do, with the base as the agent holds it for training."""
    return Choice(ranks={}, bits=_bits(job, agent), n_steps=1, batch=1)


def _bits(job: JobState, agent: str) -> Bits:
    """As the agent trains, so that its base stays loaded; before a plan, as pinned or as it fits most likely."""
    planned = job.plan.choices.get(agent) if job.plan else None
    return planned.bits if planned else job.spec.pins(agent).bits or "nf4"


def _evaluation(job: JobState, round_: Round) -> Evaluation | None:
    spec = job.spec.evaluate
    wanted = round_.purpose == "evaluate" or (round_.number - 1) % spec.every == 0
    if not wanted:
        return None
    max_tokens = job.spec.train.max_tokens
    return Evaluation(max_samples=spec.max_samples, metrics=list(spec.metrics), max_tokens=max_tokens)


def _training(job: JobState, round_: Round, share: Share) -> Training | None:
    if round_.purpose != "train" or share.choice is None:
        return None
    spec, choice = job.spec.train, share.choice
    return Training(
        n_steps=choice.n_steps,
        batch=choice.batch,
        accumulation=choice.accumulation,
        checkpointing=choice.checkpointing,
        learning_rate=spec.learning_rate * choice.rate_ratio,
        weight_decay=spec.weight_decay,
        max_gradient_norm=spec.max_gradient_norm,
        warmup_steps=spec.warmup_steps,
        max_tokens=spec.max_tokens,
        packing=spec.packing,
        seed=seed_of(job, round_.number, f"train/{share.agent}"),
    )


def share_plan(job: JobState, round_: Round, share: Share, now: float) -> Plan:
    """The complete plan of one share, with the time that is left of the round."""
    assert share.choice is not None
    trains = round_.purpose == "train"
    return Plan(
        **_common(job, round_.purpose, now),  # type: ignore[arg-type]
        round=round_.number,
        attempt=share.attempt,
        bits=share.choice.bits,
        version=job.version,
        model=job.model,
        ranks=share.choice.ranks if trains else {},
        alpha=job.spec.adapter.alpha,
        predicted_bytes=share.choice.predicted.peak_bytes if share.choice.predicted else 0,
        train=_training(job, round_, share),
        evaluate=_evaluation(job, round_),
        update_dtype=_update_dtype(job, share.choice),
        kept_energy_ratio=job.spec.adapter.kept_energy_ratio,
        max_update_bytes=update_limit_bytes(job, share.choice) if trains else 0,
        stop_after_s=max(0.0, round_.stop_at - now),
        ttl_s=max(0.0, round_.close_at - now),
    )


def contribution(agent: str, offer: Offer) -> Contribution:
    """A stored update as it enters an aggregate: it weighs as many samples as it was trained on."""
    return Contribution(
        agent=agent,
        round=offer.round,
        attempt=offer.attempt,
        sha256=offer.blob.sha256,
        size=offer.blob.size,
        weight=float(offer.samples),
    )


def job_card(job: JobState) -> JobCard:
    """The job as anyone with read access to the bus may see it."""
    return JobCard(
        job=job.spec.job.name,
        method=job.spec.job.method,
        base=Base(source=job.spec.model.source, sha256=job.base_sha256 or job.spec.model.sha256),
        data=job.spec.job.data,
        phase=str(job.phase),
        round=job.round_number,
        n_rounds=job.spec.round.n_rounds,
        reason=job.reason[:2000],
    )


def aggregate(job: JobState, round_: Round) -> Aggregate:
    """The fold of a round, contributions in canonical order: the result does not depend on who came first."""
    fresh = [contribution(s.agent, s.offer) for s in round_.shares.values() if s.state is ExecState.DONE and s.offer]
    discount = job.spec.round.staleness_discount
    late = [msgspec.structs.replace(c, weight=c.weight * discount ** (round_.number - c.round)) for c in round_.late]
    return Aggregate(
        job=job.spec.job.name,
        round=round_.number,
        attempt=round_.attempt,
        version=job.version + 1,
        master=job.master,
        contributions=sorted(fresh + late, key=lambda c: (c.round, c.agent)),
        matrices=job.matrices,
        method=job.spec.job.method,
        max_rank=job.spec.adapter.max_rank,
        server_lr=job.spec.adapter.server_lr,
        model_dtype=job.spec.adapter.model_dtype,
    )


def _loss(share: Share) -> float | None:
    """The training loss that came with a share's update; one that is not a number says nothing."""
    loss = share.offer.loss if share.offer else None
    return loss if loss is not None and math.isfinite(loss) else None


def _share_record(share: Share) -> ShareRecord:
    offer, choice = share.offer, share.choice
    return ShareRecord(
        state=str(share.state),
        reason=share.reason or (offer.stopped if offer else ""),
        samples=offer.samples if offer else 0,
        loss=_loss(share),
        bytes_up=offer.blob.size if offer and share.state is ExecState.DONE else 0,
        bytes_down=offer.bytes_down if offer else 0,
        train_s=offer.train_s if offer else 0.0,
        wall_s=max(0.0, share.ended_at - share.assigned_at) if share.ended_at else 0.0,
        evaluated=share.evaluated,
        energy=(offer.energy if offer else None) or share.energy,
        bits=choice.bits if choice else "",
        rank_sum=sum(choice.ranks.values()) if choice else 0,
        planned_samples=choice.n_samples if choice else 0,
        step_s=offer.train_s / offer.steps if offer and offer.steps else 0.0,
        peak_bytes=offer.peak_bytes if offer else 0,
        predicted=choice.predicted if choice else None,
        assigned_at=share.assigned_at,
        entered=share.entered,
        ended_at=share.ended_at,
    )


def round_record(job: JobState, round_: Round, outcome: str, now: float) -> RoundRecord:
    """How a round ended, with every share's end."""
    done = [s for s in round_.shares.values() if s.state is ExecState.DONE and s.offer]
    weighted = [(s.offer.samples, loss) for s in done if s.offer and (loss := _loss(s)) is not None]
    total = sum(n for n, _ in weighted)
    return RoundRecord(
        round=round_.number,
        attempt=round_.attempt,
        purpose=round_.purpose,
        version=job.version,
        outcome=outcome,
        opened_at=round_.opened_at,
        wall_s=now - round_.opened_at,
        loss=sum(n * loss for n, loss in weighted) / total if total else None,
        shares={agent: _share_record(s) for agent, s in sorted(round_.shares.items())},
    )


def no_agents(job: JobState, fleet: FleetState) -> tuple[Cause, str]:
    """Why there were not enough agents, for people who can do something about it."""
    rules = job.spec.round
    out = [f"{a}: {m.excluded}" for a, m in sorted(job.members.items()) if m.excluded]
    agents = [a for a in fleet.agents.values() if a.online]
    busy = sum(a.task not in {"", job.spec.job.name} for a in agents)
    known = f"{len(fleet.agents)} agents known, {len(agents)} online, {busy} at work for other jobs"
    why = "; ".join(out[:5]) or "start agents, or lower round.min_agents"
    verdicts = [m.excluded for m in job.members.values()]
    cause = Cause.BAD_BASE if verdicts and all(v.startswith(Cause.BAD_BASE) for v in verdicts) else Cause.NO_AGENTS
    return cause, f"{rules.min_agents} needed for {rules.wait_s:g} s; {known}; {why}"


def phase_text(job: JobState) -> str:
    """One line for people: where the job stands and why."""
    is_final = job.round_number >= job.spec.round.n_rounds
    where = "the final version" if is_final else f"round {job.round_number + 1} of {job.spec.round.n_rounds}"
    if job.phase in {Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED}:
        return f"{job.phase}: {job.reason}" if job.reason else str(job.phase)
    attempt = f" (attempt {job.attempt + 1})" if job.attempt else ""
    if job.phase is Phase.PAUSED and job.pause:
        return f"paused before {where}{attempt}, {said_by(job.pause.by, job.pause.reason)}"
    pending = f"; then paused, {said_by(job.pause.by, job.pause.reason)}" if job.pause else ""
    return f"{job.phase}, {where}{attempt}{pending}"


def said_by(who: str, reason: str) -> str:
    """By whom, and why if they said so."""
    return f"by {who}" + (f": {reason}" if reason else "")
