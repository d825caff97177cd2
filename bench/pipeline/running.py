"""One system on one fleet, round by round: real training and aggregation, virtual time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import torch

from agent import loading, trainers
from agent.child import Finished, TrainTask
from agent.data import Example
from agent.evaluation import evaluate
from agent.loading import Loaded
from agent.trainers import Running, Trainer
from agent.trainers.lora import adapted
from bench.pipeline.systems import OVERHEAD_STEPS, REPLAN_EVERY, Mode, Round, System, baseline_choices, fedpipe_choices
from bench.pipeline.world import HELD_OUT_RATIO, MAX_RANK, MAX_TOKENS, World
from coordinator import aggregators
from coordinator.aggregators import Weighted
from coordinator.core.choice import Choice
from protocol import methods
from protocol.adapters import Adapter
from protocol.messages import Base, Bits, Evaluation, Plan, Training
from protocol.models import write_model
from protocol.updates import LoraUpdate, open_update

SCALE: Final = 2.0
WIRE_BYTES: Final = 2
"""bf16 in both directions, for all systems."""
MAX_BYTES: Final = 2**30


class Point(msgspec.Struct, frozen=True):
    """After a round: virtual seconds and uplink bytes since the start, held-out loss, samples of this round."""

    round: int
    time_s: float
    up_bytes: int
    loss: float
    processed: int
    planned: int


class Result(msgspec.Struct, frozen=True):
    """One run; own is the last version's loss on each server's own held-out text."""

    system: str
    mode: str
    rate: float
    seed: int
    budget_s: float
    points: list[Point]
    own: dict[str, float]

    @property
    def under_training(self) -> float:
        """1 - processed / planned samples, over all rounds."""
        planned = sum(p.planned for p in self.points)
        return 1 - sum(p.processed for p in self.points) / planned if planned else 0.0


class Share(NamedTuple):
    """What becomes of one server's share of a round: steps it has time for, when it is done, what it sends."""

    choice: Choice
    n_steps: int
    end_s: float
    up_bytes: int


def run(world: World, system: System, *, rate: float, mode: Mode, budget_s: float, max_rounds: int = 10**6) -> Result:
    """Rounds until the next would end after `budget_s` virtual seconds."""
    method = methods.load(system.method)
    aggregator = aggregators.load(method.aggregator)
    model: Adapter = {}
    points = [Point(0, 0.0, 0, _loss(world, model, world.mixed), 0, 0)]
    asked, sent = Round({}, None), 0
    now, up_bytes = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(1, max_rounds + 1):
            if system.is_baseline:
                asked = Round(baseline_choices(world, system, mode), None)
            elif number <= 2 or number % REPLAN_EVERY == 0:
                bits: dict[str, Bits] = {agent: choice.bits for agent, choice in asked.choices.items()}
                rank = max((f.rank for f in model.values()), default=0) if method.kind == "lora" else 0
                asked = fedpipe_choices(world, system, frozen_rank=rank, bits_now=bits, budget_s=budget_s)
            shares = _shares(world, system, asked, mode, model, number, sent)
            ends = now + max(share.end_s for share in shares.values()) + OVERHEAD_STEPS * world.step_s
            if ends > budget_s:
                break
            updates = _train(world, system, shares, model, rate, number, Path(scratch))
            model = aggregator.aggregate(model, updates, max_rank=MAX_RANK).adapter
            sent = sum(share.up_bytes for share in shares.values())
            now, up_bytes = ends, up_bytes + sent
            processed = sum(int(u.weight) for u in updates)
            planned = sum(_samples(c) * c.n_steps for c in asked.choices.values())
            points.append(Point(number, now, up_bytes, _loss(world, model, world.mixed), processed, planned))
    own = {agent: _loss(world, model, server.held_out) for agent, server in world.servers.items()}
    return Result(system.name, mode, rate, world.seed, budget_s, points, own)


def _samples(choice: Choice) -> int:
    return choice.batch * choice.accumulation


# --------------------------------------------------------------------------------------------------------------- time


def _shares(
    world: World, system: System, asked: Round, mode: Mode, model: Adapter, number: int, sent: int
) -> dict[str, Share]:
    """Each server's download, steps and upload on the virtual clock; at the deadline it uploads what it has."""
    continues = methods.load(system.method).kind == "lora-values"
    # A continued adapter takes the place of the global one; FLoRA's is part of the base.
    frozen = {} if continues or system.method == "flora" else {name: f.rank for name, f in model.items()}
    expected: dict[str, tuple[float, float]] = {}
    for agent, choice in asked.choices.items():
        server = world.servers[agent]
        down_s = _down_bytes(system, model, choice, sent) / server.device.down_bytes_per_s
        step_s = server.step_s(choice, frozen) * world.jitter(agent, number)
        expected[agent] = down_s, step_s
    deadline_s = asked.train_s
    if system.is_baseline and mode != "wait":
        deadline_s = statistics.median(d + s * asked.choices[a].n_steps for a, (d, s) in expected.items())
    shares = {}
    for agent, choice in asked.choices.items():
        down_s, step_s = expected[agent]
        server = world.servers[agent]
        # A share that its server's memory does not hold is lost, whoever planned it.
        n_steps = choice.n_steps if server.peak_bytes(choice, frozen) <= server.limit_bytes else 0
        if deadline_s is not None:
            n_steps = min(n_steps, max(0, int((deadline_s - down_s) / step_s)))
        up_bytes = _up_bytes(world, system, choice) if n_steps else 0
        end_s = down_s + step_s * n_steps + up_bytes / server.device.up_bytes_per_s
        shares[agent] = Share(choice, n_steps, end_s, up_bytes)
    return shares


def _down_bytes(system: System, model: Adapter, choice: Choice, sent: int) -> int:
    """FLoRA's agents get all updates of the round before, others the model, up to their rank where they continue it."""
    match methods.load(system.method).trainer:
        case "fresh":
            return sent
        case "continued" | "frozen-a":
            held = {name: min(f.rank, choice.ranks.get(name, f.rank)) for name, f in model.items()}
        case _:
            held = {name: f.rank for name, f in model.items()}
    only_b = system.method == "ffalora"
    return sum(WIRE_BYTES * rank * (model[k].shape[0] if only_b else sum(model[k].shape)) for k, rank in held.items())


def _up_bytes(world: World, system: System, choice: Choice) -> int:
    """FFA-LoRA sends B alone, as published."""
    only_b = system.method == "ffalora"
    return sum(
        WIRE_BYTES * choice.ranks[m.name] * (m.d_out if only_b else m.d_out + m.d_in)
        for m in world.matrices
        if m.name in choice.ranks
    )


# ----------------------------------------------------------------------------------------------------------- training


def _train(
    world: World,
    system: System,
    shares: Mapping[str, Share],
    model: Adapter,
    rate: float,
    number: int,
    scratch: Path,
) -> list[Weighted]:
    model_file = scratch / "model"
    if model:
        write_model(model_file, model, version=number - 1, dtype="bf16")
    updates = []
    for agent, share in shares.items():
        if share.n_steps:
            task = _task(world, system, agent, share, rate, number, scratch / agent, model_file if model else None)
            finished = _drain(_trainer(system.method, share.choice.bits).train(task))
            updates.append(Weighted(agent, number, finished.samples, _sent(task)))
    return updates


def _task(
    world: World,
    system: System,
    agent: str,
    share: Share,
    rate: float,
    number: int,
    out: Path,
    model_file: Path | None,
) -> TrainTask:
    # Micro-batches cost memory and time, both virtual; their sum is the same in one piece, and quicker.
    training = Training(
        n_steps=share.n_steps,
        batch=_samples(share.choice),
        learning_rate=rate * share.choice.rate_ratio,
        max_tokens=MAX_TOKENS,
        seed=world.seed * 1000 + list(world.servers).index(agent),
    )
    plan = Plan(
        job="bench",
        round=number,
        attempt=0,
        purpose="train",
        method=system.method,
        base=Base(source=str(world.base)),
        held_out_ratio=HELD_OUT_RATIO,
        data_seed=world.seed,
        bits=share.choice.bits,
        version=number - 1,
        ranks=share.choice.ranks,
        alpha=SCALE,
        train=training,
        issued_at=0.0,
        stop_after_s=3600.0,
        ttl_s=3600.0,
    )
    return TrainTask(
        plan=plan,
        base_folder=str(world.base),
        data=world.servers[agent].data,
        model_file=str(model_file) if model_file else None,
        out_file=str(out),
        digest_cache=str(out.with_name("digests.json")),
        device="cpu",
    )


def _sent(task: TrainTask) -> LoraUpdate:
    plan = task.plan
    kind = methods.load(plan.method).kind
    return open_update(Path(task.out_file), kind, job=plan.job, round=plan.round, attempt=0, max_bytes=MAX_BYTES)


@cache
def _trainer(method: str, bits: Bits) -> Trainer:  # noqa: ARG001 - one per width, so that each keeps its base loaded
    return trainers.load(methods.load(method).trainer)()


def _drain(running: Running) -> Finished:
    try:
        while True:
            next(running)
    except StopIteration as end:
        finished: Finished = end.value
        return finished


# ---------------------------------------------------------------------------------------------------------- measuring


@cache
def _base(folder: Path) -> Loaded:
    return loading.load(folder, "none", torch.device("cpu"))


def _loss(world: World, model: Adapter, examples: Sequence[Example]) -> float:
    """Of base plus global adapter, per token of the completions; on the unquantized base for all systems."""
    base = _base(world.base)
    wanted = Evaluation(max_samples=max(1, len(examples)))
    with adapted(base.model, model, {}, SCALE, 0) as whole:
        running = evaluate(whole.model, base.tokenizer, examples, wanted, batch=16, max_tokens=MAX_TOKENS)
        try:
            while True:
                next(running)
        except StopIteration as end:
            loss: float = end.value.loss
            return loss
