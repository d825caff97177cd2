"""What is compared: fedpipe, published baselines, and fedpipe without one of its parts.

Baselines have every server make the same number of steps of the same batch on all matrices.  Each gets the best of what it
leaves open: the learning rate and whether to wait for the slowest are tuned, a server splits the batch as its memory wants and
takes the fastest width of the base that fits beside its rank, and FLoRA's sum costs neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec

from bench.pipeline.world import MAX_RANK, MAX_TOKENS, Server, World
from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from coordinator.core.state import Member
from coordinator.planner import automatic
from coordinator.planner.servers import Ask
from protocol.messages import Allowance, Bits, Report

BATCH: Final = 8
N_STEPS: Final = 20
"""Of a baseline's round."""
LONG: Final = 3
RANKS: Final = (1, 2, 4, 8, 16)
RATES: Final = (3e-3, 6e-3, 12e-3)
REPLAN_EVERY: Final = 5
OVERHEAD_STEPS: Final = 10
"""What a round costs every system beside training and transfers, in steps of the fastest server."""

Mode = Literal["wait", "deadline", "long"]
"""What a round does about slow servers: waits for them, or ends when half of the servers are done; long has three times the steps."""


class System(NamedTuple):
    """One way to run a federation.

    ranks says which the servers get: planned by fedpipe; "uniform", what the smallest bears; "largest", what each bears.
    without, for fedpipe, are the tables of the job file that pin what is then not planned.
    """

    name: str
    method: str
    ranks: Literal["planned", "uniform", "largest"] = "planned"
    without: Mapping[str, Mapping[str, Any]] = {}

    @property
    def is_baseline(self) -> bool:
        """Whether it knows no planner."""
        return self.ranks != "planned"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What a round may do about slow servers; a plan says when it ends."""
        return ("deadline", "long") if self.is_baseline else ("deadline",)


FEDPIPE: Final = System("fedpipe", "qlora")
BASELINES: Final = (
    System("uniform LoRA", "fedavg", "uniform"),
    System("zero-padding", "fedavg", "largest"),
    System("HetLoRA", "hetlora", "largest"),
    System("FlexLoRA", "flexlora", "largest"),
    System("FLoRA", "flora", "largest"),
    System("FFA-LoRA", "ffalora", "uniform"),
)
ABLATIONS: Final = (
    System("fedpipe, all matrices", "qlora", without={"adapter": {"targets": ["all"]}}),
    System("fedpipe, one rank", "qlora", without={"adapter": {"rank": 4}}),
    System("fedpipe, one batch", "qlora", without={"train": {"batch": 1, "accumulation": BATCH}}),
    System("fedpipe, 4 bits", "qlora", without={"adapter": {"bits": "nf4"}}),
    System("fedpipe, factors averaged", "fedavg"),
)
EVERY: Final = {system.name: system for system in (FEDPIPE, *BASELINES, *ABLATIONS)}


class Round(NamedTuple):
    """What the servers are asked to do, until when (None: as long as it takes), and the rank of the adapter they carry."""

    choices: dict[str, Choice]
    train_s: float | None


def baseline_choices(world: World, system: System, mode: Mode = "deadline") -> dict[str, Choice]:
    """The same steps and batch for all, at the ranks of the system."""
    n_steps = N_STEPS * (LONG if mode == "long" else 1)
    names = [m.name for m in world.matrices]
    largest = {agent: max(_bears(server, names)) for agent, server in world.servers.items()}
    if system.ranks == "uniform":
        largest = dict.fromkeys(largest, min(largest.values()))
    return {agent: _fastest(world.servers[agent], names, rank, n_steps) for agent, rank in largest.items()}


def _bears(server: Server, names: list[str]) -> list[int]:
    return [rank for rank in RANKS if rank <= MAX_RANK and _fitting(server, names, rank, 1)]


def _fastest(server: Server, names: list[str], rank: int, n_steps: int) -> Choice:
    return min(_fitting(server, names, rank, n_steps), key=lambda choice: server.step_s(choice, {}))


def _fitting(server: Server, names: list[str], rank: int, n_steps: int) -> list[Choice]:
    """All ways to make a step of BATCH samples at this rank that the server's memory holds."""
    widths: tuple[Bits, ...] = server.cost.bits
    ways = [
        Choice(
            ranks=dict.fromkeys(names, rank),
            bits=bits,
            n_steps=n_steps,
            batch=batch,
            accumulation=BATCH // batch,
            checkpointing=checkpointing,
        )
        for bits in widths
        for batch in (1, 2, 4, 8)
        for checkpointing in (False, True)
    ]
    return [way for way in ways if server.peak_bytes(way, {}) <= server.limit_bytes]


def fedpipe_choices(
    world: World, system: System, *, frozen_rank: int, bits_now: Mapping[str, Bits], budget_s: float
) -> Round:
    """What the real planner makes of this fleet."""
    tables: dict[str, dict[str, Any]] = {
        "job": {"name": "bench", "seed": world.seed, "method": system.method},
        "model": {"source": str(world.base)},
        "adapter": {"max_rank": MAX_RANK},
        "train": {"max_tokens": MAX_TOKENS},
        "plan": {
            "ranks": list(RANKS),
            "memory_ratio": 1.0,
            "min_train_s": budget_s / 100,
            "max_train_s": budget_s / 4,
        },
    }
    for table, pins in system.without.items():
        tables[table] = {**tables.get(table, {}), **pins}
    ask = Ask(
        spec=msgspec.convert(tables, JobSpec),
        matrices=world.matrices,
        frozen_rank=frozen_rank,
        overhead_s=OVERHEAD_STEPS * world.step_s,
        members={a: Member(surveyed=s.surveyed, calibrated=s.calibrated) for a, s in world.servers.items()},
        reports={a: _report(s) for a, s in world.servers.items()},
        bits_now=bits_now,
    )
    found = automatic.plan(ask, list(world.servers))
    for agent, why in found.left_out.items():
        print(f"  {system.name}: {agent} is left out: {why}")
    return Round(found.choices, None if found.train_s is None else found.train_s - ask.overhead_s)


def _report(server: Server) -> Report:
    return Report(
        up_bytes_per_s=server.device.up_bytes_per_s,
        down_bytes_per_s=server.device.down_bytes_per_s,
        bits=["none", "int8", "nf4"],
        allowance=Allowance(memory_bytes=server.limit_bytes),
    )
