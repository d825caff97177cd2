"""What each agent would reach without the federation: the same steps, on its own text only, scored on everybody's.

The comparison that a federation has to win.  It runs the agents' own trainer in the agents' own training child, with the
same base and the ranks, bits and batch of the plan that the agent had last, for as many steps as it was given in all rounds;
only the aggregation is missing.  Possible here because the demo's data lie on one machine; a real fleet never could.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from agent.child import Evaluated, Event, Failed, Stepped, TrainTask
from agent.data import DataConfig
from agent.supervisor import ChildConfig, Supervisor
from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from coordinator.core.state import RoundRecord
from coordinator.plan_views import PlanView
from protocol.adapters import canonical
from protocol.errors import Unavailable
from protocol.messages import Base, Evaluation, Plan, Training
from protocol.models import write_model
from protocol.updates import open_update

Step = Callable[[str, int, int], None]
"""Hears (agent, steps done, steps wanted)."""

HOUR_S = 3600.0


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """One agent trained by itself: held-out loss per agent's text."""

    agent: str
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over all agents' held-out text."""
        return sum(self.losses.values()) / len(self.losses)


def shares_of(plan: PlanView, rounds: Sequence[RoundRecord], n_rounds: int) -> dict[str, Choice]:
    """What each agent of a finished job was asked to do, all rounds as one: its last choice, with the steps of them all."""
    trained = [record for record in rounds if record.purpose == "train"]
    return {agent: _share_of(agent, found.choice, trained, n_rounds) for agent, found in plan.agents.items()}


def _share_of(agent: str, choice: Choice, trained: Sequence[RoundRecord], n_rounds: int) -> Choice:
    mine = ((record.round, record.shares[agent]) for record in trained if agent in record.shares)
    planned = {number: share.planned_samples for number, share in mine}  # of a round's attempts the last
    n_steps = round(sum(planned.values()) / (choice.batch * choice.accumulation)) or choice.n_steps * n_rounds
    return msgspec.structs.replace(choice, n_steps=n_steps)


async def train_alone(
    spec: JobSpec,
    shares: Mapping[str, Choice],
    base: Path,
    data: Mapping[str, DataConfig],
    folder: Path,
    heard: Step,
    *,
    n_parallel: int = 2,
) -> list[Alone]:
    """Train every agent that has a share by itself, `n_parallel` at a time.  Raises Unavailable when a training fails."""
    slots = asyncio.Semaphore(n_parallel)

    async def one(agent: str) -> Alone:
        async with slots:
            return await _one(spec, shares[agent], base, data, agent, folder / agent, heard)

    return list(await asyncio.gather(*(one(agent) for agent in data if agent in shares)))


async def _one(
    spec: JobSpec, choice: Choice, base: Path, data: Mapping[str, DataConfig], agent: str, folder: Path, heard: Step
) -> Alone:
    folder.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(ChildConfig(threads=1), log=folder / "training.log")
    update, model = folder / "alone.update", folder / "alone.model"

    async def run(plan: Plan, of: str, model_file: str | None = None) -> list[Event]:
        events: list[Event] = []

        def on_event(event: Event) -> None:
            events.append(event)
            if isinstance(event, Stepped) and plan.purpose == "train":
                heard(agent, event.step, event.n_steps)

        task = TrainTask(plan=plan, base_folder=str(base), data=data[of], model_file=model_file, out_file=str(update))
        ending = await supervisor.run(task, on_event)
        if isinstance(ending, Failed):
            raise Unavailable(
                f"training {agent} alone failed: {ending.reason} {ending.detail}; see {folder}/training.log"
            )
        return events

    try:
        plan = _plan(spec, choice, "train")
        await run(plan, agent)
        found = open_update(update, "lora", job=plan.job, round=plan.round, attempt=0, max_bytes=2**40)
        adapter = {name: canonical(found.factors(name)) for name in found.ranks}
        write_model(model, adapter, version=1, dtype="fp32")
        losses = {}
        for other in data:
            events = await run(_plan(spec, choice, "evaluate"), other, str(model))
            losses[other] = next(e.result.loss for e in events if isinstance(e, Evaluated))
    finally:
        await supervisor.aclose()
    return Alone(agent=agent, losses=losses)


def _plan(spec: JobSpec, choice: Choice, purpose: Literal["train", "evaluate"]) -> Plan:
    """The agent's plan for all rounds at once, or for an evaluation of what came of it."""
    trains, training = purpose == "train", spec.train
    return Plan(
        job="alone",
        round=1,
        attempt=0,
        purpose=purpose,
        method=spec.job.method,
        base=Base(source=spec.model.source),
        held_out_ratio=spec.evaluate.held_out_ratio,
        data_seed=spec.job.seed,
        bits=choice.bits,
        version=0 if trains else 1,
        ranks=choice.ranks if trains else {},
        alpha=spec.adapter.alpha,
        train=Training(
            n_steps=choice.n_steps,
            batch=choice.batch,
            accumulation=choice.accumulation,
            checkpointing=choice.checkpointing,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_gradient_norm=training.max_gradient_norm,
            warmup_steps=training.warmup_steps,
            max_tokens=training.max_tokens,
            packing=training.packing,
            seed=spec.job.seed,
        )
        if trains
        else None,
        evaluate=None if trains else Evaluation(max_samples=spec.evaluate.max_samples, max_tokens=training.max_tokens),
        update_dtype="fp32",
        issued_at=0.0,
        stop_after_s=HOUR_S,
        ttl_s=HOUR_S,
    )
