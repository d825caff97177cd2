"""The plan that the job file spells out: its ranks, targets, bits and batch, with each agent's overrides.

A target is "all", a whole module name, or a suffix of one that starts at a dot: "q_proj" means every q_proj.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec
from coordinator.planner.bounds import Bounds
from protocol.errors import BadConfig
from protocol.messages import Matrix

RANK: Final = 8
BATCH: Final = 8
N_STEPS: Final = 50


def select(matrices: Sequence[Matrix], targets: Iterable[str]) -> list[Matrix]:
    """The matrices that the targets name.  Raises BadConfig for a target that names none."""
    chosen: dict[str, Matrix] = {}
    for target in targets:
        all_of_them = target == "all"
        found = [m for m in matrices if all_of_them or m.name == target or m.name.endswith("." + target)]
        if not found:
            kinds = sorted({m.name.rsplit(".", 1)[-1] for m in matrices})
            raise BadConfig(f"target {target!r} names no matrix of the base; it has {', '.join(kinds)}")
        chosen.update((m.name, m) for m in found)
    return [chosen[name] for name in sorted(chosen)]


Known: TypeAlias = dict[tuple[tuple[str, ...], int], dict[str, int]]
"""Ranks by matrix for targets and a rank: of thousands of matrices, found once for all agents that are asked for the same."""


def choose(
    spec: JobSpec, agent: str, matrices: Sequence[Matrix], may: Bounds, known: Known, why: str = "by default"
) -> Choice:
    """One agent's choice, with plain defaults, as far as they are allowed, for what the job file leaves open.

    A rank is never above min(d_in, d_out).  `known` is of the same matrices, and is added to.  Raises BadConfig for a target
    that names nothing and for a pin that is not allowed.
    """
    pins = spec.pins(agent)
    may.refuse(pins)
    asked = tuple(pins.targets or ["all"]), pins.rank or min(RANK, may.max_rank)
    if asked not in known:
        targets, rank = asked
        known[asked] = {m.name: min(rank, m.d_in, m.d_out) for m in select(matrices, targets)}
    return Choice(
        ranks=known[asked],
        bits=pins.bits or may.bits[0],
        n_steps=pins.n_steps or N_STEPS,
        batch=pins.batch or min(BATCH, may.max_batch),
        accumulation=pins.accumulation or 1,
        checkpointing=bool(pins.checkpointing),
        why="as the job file says" if spec.is_pinned(agent) else why,
    )
