"""What a job file may say: one frozen Struct per TOML table, every default with its reason, unknown keys refused.

[job]      name, method, seed, agents that may take part
[model]    which base
[adapter]  which matrices, which ranks, which bits
[train]    one round of local training
[round]    how many rounds, who is waited for and how long
[evaluate] what is measured on held-out text
[agents.ID] what differs for one agent
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.messages import Base, Bits, Id, Name, Rank, Ratio, Wire

Positive = Annotated[int, Meta(ge=1, le=10**7)]
"""A count; at most what a plan may say (protocol/messages.py), or no agent could read it."""
Small = Annotated[int, Meta(ge=1, le=4096)]
Duration = Annotated[float, Meta(ge=0.001, le=10**8)]
"""Seconds; at least what a clock that counts from the epoch can tell apart."""


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the job file; a key that is not a field is an error that names it."""


class Adapter(Table, frozen=True, kw_only=True):
    """Where adapters sit.  A target is the last part of a module's name, a whole name, or "all"."""

    targets: Annotated[list[Name], Meta(min_length=1, max_length=20_000)] = msgspec.field(
        default_factory=lambda: ["all"]
    )
    """At equal parameters low rank on every matrix matches high rank on a few, so: all."""
    rank: Rank = 8
    alpha: Annotated[float, Meta(gt=0, le=1024)] = 2.0
    """The scale alpha / r of an update, the same for every rank, so that updates of mixed ranks add up."""
    max_rank: Rank = 32
    """Rank of the global adapter; what truncation drops is reported."""
    bits: Bits = "nf4"
    update_dtype: Wire = "bf16"
    """Half the bytes of fp32 at 0.16 % error of the round's update."""
    model_dtype: Wire = "bf16"
    server_lr: Annotated[float, Meta(gt=0, le=10)] = 1.0


class Train(Table, frozen=True, kw_only=True):
    """One round of local training; every agent does the same unless its own table says otherwise."""

    n_steps: Positive = 50
    batch: Small = 8
    accumulation: Small = 1
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-4
    weight_decay: Ratio = 0.0
    max_gradient_norm: Annotated[float, Meta(ge=0)] = 1.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 0
    max_tokens: Annotated[int, Meta(ge=8, le=2**20)] = 512
    packing: bool = False
    checkpointing: bool = False


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
    train_s: Duration = 600.0
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
    round: Rounds = Rounds()
    evaluate: Evaluate = Evaluate()
    agents: dict[Id, Override] = {}
