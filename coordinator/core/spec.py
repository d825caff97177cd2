"""What a job file may say: one frozen Struct per TOML table, every default with its reason, unknown keys refused.

[job]      name, method, seed, agents that may take part
[model]    which base
[adapter]  which matrices, which ranks, which bits
[train]    one round of local training
[plan]     how the planner decides what the job file leaves open
[round]    how many rounds, who is waited for and how long
[evaluate] what is measured on held-out text
[agents.ID] what differs for one agent

What is not said about targets, rank, bits, batch, accumulation, checkpointing, number of steps and training time is for the
planner to decide, per agent, from what the agent measured (coordinator/planner/).  What is said is a pin: it holds as it
is, and a pin that cannot be kept is refused with the numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.messages import Base, Bits, Id, Name, Rank, Ratio, UpdateDtype, Wire

Positive = Annotated[int, Meta(ge=1, le=10**7)]
"""A count; at most what a plan may say (protocol/messages.py), or no agent could read it."""
Small = Annotated[int, Meta(ge=1, le=4096)]
Duration = Annotated[float, Meta(ge=0.001, le=10**8)]
"""Seconds; at least what a clock that counts from the epoch can tell apart."""


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the job file; a key that is not a field is an error that names it."""


class Adapter(Table, frozen=True, kw_only=True):
    """Where adapters sit.  A target is the last part of a module's name, a whole name, or "all"."""

    targets: Annotated[list[Name], Meta(min_length=1, max_length=20_000)] | None = None
    """Pinned: exactly these matrices are trained."""
    rank: Rank | None = None
    """Pinned: every trained matrix has this rank."""
    alpha: Annotated[float, Meta(gt=0, le=1024)] = 2.0
    """Scale of an update of rank 8; another rank r has alpha sqrt(8 / r), so that one learning rate fits all ranks."""
    max_rank: Rank = 32
    """Rank of the global adapter; what truncation drops is reported."""
    bits: Bits | None = None
    update_dtype: UpdateDtype | None = None
    """Pinned: how updates travel.  Otherwise each agent's measured link decides between bf16, int8 and nf4."""
    kept_energy_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.99
    """Share of the squared norm of a matrix's change that an update holds; weaker components are not sent."""
    model_dtype: Wire = "bf16"
    server_lr: Annotated[float, Meta(gt=0, le=10)] = 1.0


class Train(Table, frozen=True, kw_only=True):
    """One round of local training; every agent does the same unless its own table says otherwise."""

    n_steps: Positive | None = None
    batch: Small | None = None
    accumulation: Small | None = None
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-4
    weight_decay: Ratio = 0.0
    max_gradient_norm: Annotated[float, Meta(ge=0)] = 1.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    max_tokens: Annotated[int, Meta(ge=8, le=2**20)] = 512
    packing: bool = False
    checkpointing: bool | None = None


class Planning(Table, frozen=True, kw_only=True):
    """How the planner decides what is not pinned."""

    scorer: Literal["gradient", "triplet"] = "gradient"
    """How a matrix's importance is measured: both pick the same matrices, the gradient needs no warm-up."""
    probe_rank: Annotated[int, Meta(ge=1, le=64)] = 8
    probe_batches: Annotated[int, Meta(ge=1, le=10_000)] = 8
    warmup_steps: Annotated[int, Meta(ge=0, le=10_000)] = 24
    """Of the probe, for the triplet scorer."""
    calibrate_s: Duration = 120.0
    """An agent's measurements end after this long with what they have."""
    scope: Literal["global", "local", "blend"] = "blend"
    """Whose importance counts: the fleet's, weighted by samples, the agent's own, or both."""
    blend: Ratio = 0.5
    """Share of the agent's own importance in a blend."""
    ranks: Annotated[list[Rank], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32, 64]
    )
    batches: Annotated[list[Small], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32]
    )
    thrift: Annotated[float, Meta(ge=0, lt=1)] = 0.005
    """Progress that may be given up where it saves memory, time and bytes."""
    memory_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Share of an agent's free memory that a plan may fill."""
    time_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.9
    """Share of the training time that a plan may fill: what is planned should be finished."""
    rate_samples: Small = 8
    """train.learning_rate is for steps of this many samples; a planned batch of n has sqrt(n / rate_samples) times that."""
    max_epochs: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """An agent passes over its own text at most this often in a round: beyond, it drifts away from the fleet."""
    drift_steps: Annotated[float, Meta(gt=0, le=10**7)] = 40.0
    """Steps of a round without noise, after which a further one counts for about a third: an agent drifts away."""
    min_train_s: Duration = 5.0
    max_train_s: Duration = 600.0
    """Between these the planner looks for the training time of a round."""
    overhead_s: Annotated[float, Meta(ge=0, le=10**6)] = 5.0
    """What a round costs beside training and transfers until one has been measured."""
    replan_every: Positive = 5
    """Rounds after which a plan is made anew without a reason."""
    drift_ratio: Annotated[float, Meta(gt=0, le=10)] = 0.2
    """A step time or a memory that is off by more than this makes the next round be planned anew."""
    max_gap: Annotated[float, Meta(gt=0, le=1)] = 1e-3
    """A solution that is not certified to be this near the optimum is solved exactly."""


class Rounds(Table, frozen=True, kw_only=True):
    """How many rounds, who is waited for and how long.  Every wait of a job is one of these numbers."""

    n_rounds: Positive = 10
    n_agents: Annotated[int, Meta(ge=0)] = 0
    """Updates wanted per round; 0 = from everyone who can."""
    min_agents: Positive = 1
    """Below this the job waits for agents before a round, and a round fails."""
    start_agents: Annotated[int, Meta(ge=0)] = 0
    """The first round waits for this many, 0 = min_agents, but not longer than start_wait_s."""
    start_wait_s: Duration = 60.0
    quorum_ratio: Ratio = 0.5
    """Share of the wanted updates that makes a round count at its deadline."""
    over_select_ratio: Annotated[float, Meta(ge=1, le=10)] = 1.0
    """Ask this many times the wanted agents and close when enough have answered."""
    train_s: Duration | None = None
    """Agents stop training here and upload what they have."""
    grace_s: Duration = 60.0
    """For uploads after train_s; then the round closes."""
    offline_grace_s: Duration = 20.0
    """A vanished agent is waited for this long when everyone else is done."""
    max_attempts: Positive = 3
    """Of one round before the job fails for want of a quorum."""
    survey_s: Duration = 300.0
    """For an agent to open its base model and its data."""
    wait_s: Duration = 3600.0
    """For min_agents to be there; then the job fails with no_agents."""
    late: Literal["drop", "add"] = "add"
    """An update that missed its round: dropped, or added to the next aggregate at a discount."""
    staleness_discount: Ratio = 0.5
    """Weight of a late update per round of lateness."""
    max_staleness: Positive = 2

    def __post_init__(self) -> None:
        """Refuse rounds that can never count: fewer updates wanted than needed."""
        if 0 < self.n_agents < self.min_agents:
            raise ValueError(f"n_agents = {self.n_agents} is below min_agents = {self.min_agents}: raise it or set 0")


class Evaluate(Table, frozen=True, kw_only=True):
    """Held-out measurements on every agent's own text, of each version it receives and of the last one."""

    held_out_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    max_samples: Positive = 256
    metrics: Annotated[list[Name], Meta(max_length=16)] = []
    every: Positive = 1
    """Rounds between evaluations."""


class Override(Table, frozen=True, kw_only=True):
    """What differs for one agent; a missing key means the job's value."""

    targets: Annotated[list[Name], Meta(min_length=1, max_length=20_000)] | None = None
    rank: Rank | None = None
    bits: Bits | None = None
    n_steps: Positive | None = None
    batch: Small | None = None
    accumulation: Small | None = None
    checkpointing: bool | None = None


class Head(Table, frozen=True, kw_only=True):
    """Name, method and who may take part."""

    name: Id
    method: Name = "qlora"
    data: Id = "default"
    """Which of the agents' data sets: the name of a [data.NAME] table in their configuration."""
    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    only: Annotated[list[Id], Meta(max_length=100_000)] = []
    """Agents that may take part; empty = the whole fleet."""
    license: Annotated[str, Meta(max_length=64)] = "other"
    """Licence of the exported adapter, for its model card."""


class JobSpec(Table, frozen=True, kw_only=True):
    """A whole job file."""

    job: Head
    model: Base
    adapter: Adapter = Adapter()
    train: Train = Train()
    plan: Planning = Planning()
    round: Rounds = Rounds()
    evaluate: Evaluate = Evaluate()
    agents: dict[Id, Override] = {}

    def __post_init__(self) -> None:
        """Refuse a survey that ends before the measurements that belong to it."""
        survey_s, calibrate_s = self.round.survey_s, self.plan.calibrate_s
        if survey_s <= calibrate_s and not all(map(self.is_pinned, ["", *self.agents])):
            raise ValueError(
                f"round.survey_s = {survey_s:g} leaves no time for plan.calibrate_s = {calibrate_s:g}: raise the one "
                "or lower the other"
            )

    def pins(self, agent: str) -> Override:
        """What is pinned for one agent: its own table before the job's.  None stands for: the planner decides."""
        own = self.agents.get(agent, Override())
        return Override(
            targets=own.targets or self.adapter.targets,
            rank=own.rank or self.adapter.rank,
            bits=own.bits or self.adapter.bits,
            n_steps=own.n_steps or self.train.n_steps,
            batch=own.batch or self.train.batch,
            accumulation=own.accumulation or self.train.accumulation,
            checkpointing=self.train.checkpointing if own.checkpointing is None else own.checkpointing,
        )

    def is_pinned(self, agent: str) -> bool:
        """Whether nothing that needs a measurement is left to decide for this agent."""
        pins = self.pins(agent)
        return None not in (pins.targets, pins.rank, pins.bits, pins.n_steps, pins.batch)
