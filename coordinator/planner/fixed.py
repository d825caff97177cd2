"""The plan that the job file spells out: its ranks, targets, bits and batch, with each agent's overrides.

A target is "all", a whole module name, or a suffix of one that starts at a dot: "q_proj" means every q_proj.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coordinator.core.choice import Choice
from coordinator.core.spec import JobSpec, Override
from protocol.errors import BadConfig
from protocol.messages import Matrix


def select(matrices: Sequence[Matrix], targets: Iterable[str]) -> list[Matrix]:
    """The matrices that the targets name.  Raises BadConfig for a target that names none."""
    chosen: dict[str, Matrix] = {}
    for target in targets:
        found = [m for m in matrices if target in {"all", m.name} or m.name.endswith("." + target)]
        if not found:
            kinds = sorted({m.name.rsplit(".", 1)[-1] for m in matrices})
            raise BadConfig(f"target {target!r} names no matrix of the base; it has {', '.join(kinds)}")
        chosen.update((m.name, m) for m in found)
    return [chosen[name] for name in sorted(chosen)]


def choose(spec: JobSpec, agent: str, matrices: Sequence[Matrix]) -> Choice:
    """One agent's choice.  A rank is never above min(d_in, d_out).  Raises BadConfig for a target that names nothing."""
    own = spec.agents.get(agent, Override())
    rank = own.rank or spec.adapter.rank
    chosen = select(matrices, own.targets or spec.adapter.targets)
    return Choice(
        ranks={m.name: min(rank, m.d_in, m.d_out) for m in chosen},
        bits=own.bits or spec.adapter.bits,
        n_steps=own.n_steps or spec.train.n_steps,
        batch=own.batch or spec.train.batch,
        accumulation=own.accumulation or spec.train.accumulation,
        checkpointing=spec.train.checkpointing if own.checkpointing is None else own.checkpointing,
        why="as the job file says",
    )
