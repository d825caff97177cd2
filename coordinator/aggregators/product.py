"""Aggregation in product space: sum what the agents' adapters do to a weight, not the factors they are made of.

Our design, compatible with FedPipe's published description (arXiv 2404.06448).  Over the agents S_k that trained matrix k,

    dW_k  <-  truncate_{R_max}( dW_k + eta * sum_{i in S_k} p_i B_i A_i ),        p_i = n_i / sum of n_j over S_k

with n_i the samples that agent i really processed and the LoRA scale folded into B_i.

Why not average A and B by themselves, like FedAvg would?  (sum p_i B_i)(sum p_i A_i) has cross terms that nobody trained,
and it needs equal ranks.  In product space the sum is exact; ranks and sets of matrices mix freely; what an agent did not
train does not pull it towards zero, because p_i is over S_k; and components that only a large agent carries survive, because
the model itself is one of the terms and an update is a change to it.

The d_out x d_in sum is never formed.  Side by side, the terms are again one product of thin matrices,

    dW + eta sum p_i B_i A_i  =  [B, eta p_1 B_1, eta p_2 B_2, ...] [A; A_1; A_2; ...],

whose singular value decomposition costs two thin QR and one small core (protocol.adapters.principal).  QR and not the Gram
matrices: those square the condition number, and the weak directions are what later rounds build on.  One matrix is done
at a time, so memory is the model and one stack, in float64.

A stack that grows wider than `stack_width` is cut to half of that on the way, which bounds time and memory per update
however many agents there are; where d is small or the sum has lower rank than that, this too is exact.  The order of the
terms is by (round, agent), whatever order they arrived in, so the result has the same bits.

What truncation drops is reported per matrix.  Cost per matrix: O((d_out + d_in) R^2 + R^3) with R the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Final

import numpy as np

from coordinator.aggregators import Aggregate, Weighted
from protocol.adapters import Adapter, Factors, Principal, principal
from protocol.errors import BadUpdate

STACK_WIDTH: Final = 1024


@dataclass(frozen=True, slots=True)
class Product:
    """Weighted sum of the products B_i A_i, cut to the best `max_rank` components.  See the head of this file."""

    accepts: ClassVar[str] = "lora"
    stack_width: int = STACK_WIDTH

    def aggregate(
        self, model: Adapter, updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """See Aggregator.aggregate.  A matrix whose sum is zero is not in the result."""
        return sum_of_products(
            model, updates, kept=1.0, server_lr=server_lr, max_rank=max_rank, stack_width=self.stack_width
        )


def sum_of_products(
    model: Adapter,
    updates: Sequence[Weighted],
    *,
    kept: float,
    server_lr: float,
    max_rank: int,
    stack_width: int = STACK_WIDTH,
) -> Aggregate:
    """The sum kept * model + server_lr * weighted mean of the updates, matrix by matrix, in canonical form.

    `kept` is 1 where updates are changes to the model, and 1 - server_lr where they are models themselves.  Raises as
    Aggregator.aggregate.
    """
    ordered = in_order(updates)
    squared_norms = {(u.round, u.agent): 0.0 for u in ordered}
    adapter, dropped_ratio = dict(model), {}
    for name in sorted({name for u in ordered for name in u.update.ranks}):
        terms = _terms(name, model if kept else {}, ordered, (kept, server_lr), squared_norms)
        result, dropped_ratio[name] = _sum(terms, max_rank, stack_width)
        adapter[name] = result.to_factors()
        check_range(name, adapter[name], squared_norms)
    left = {name: factors for name, factors in adapter.items() if factors.rank}
    return Aggregate(left, dropped_ratio, {key: math.sqrt(square) for key, square in squared_norms.items()})


def check_range(name: str, factors: Factors, squared_norms: Mapping[tuple[int, str], float]) -> None:
    """Raises BadUpdate, naming the largest update's agent, where a sum of finite numbers is none."""
    if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
        _, agent = max(squared_norms, key=squared_norms.__getitem__)
        raise BadUpdate(f"the sum of matrix {name!r} leaves float32's range: drop {agent}'s, by far the largest")


def in_order(updates: Sequence[Weighted]) -> list[Weighted]:
    """Those that count, by (round, agent).  Raises ValueError for two of one agent and round, and for an impossible weight."""
    ordered = sorted((u for u in updates if u.weight), key=lambda u: (u.round, u.agent))
    for before, after in pairwise(ordered):
        if (before.round, before.agent) == (after.round, after.agent):
            raise ValueError(f"agent {after.agent} has two updates of round {after.round}")
    for u in ordered:
        if not 0 < u.weight < math.inf:
            raise ValueError(f"agent {u.agent} has the weight {u.weight}")
    return ordered


def _terms(
    name: str,
    model: Adapter,
    ordered: Sequence[Weighted],
    scales: tuple[float, float],
    squared_norms: dict[tuple[int, str], float],
) -> Iterator[tuple[Factors, float]]:
    """What is summed for one matrix, with scales, one at a time; adds up the squared norms of the updates on the way."""
    kept, server_lr = scales
    if name in model:
        yield model[name], kept
    trained = [u for u in ordered if name in u.update.ranks]
    total = math.fsum(u.weight for u in trained)
    for u in trained:
        factors = u.update.factors(name)
        squared_norms[u.round, u.agent] += factors.norm() ** 2
        yield factors, server_lr * (u.weight / total)


def _sum(terms: Iterable[tuple[Factors, float]], rank: int, width: int) -> tuple[Principal, float]:
    """The best `rank` components of the sum of scale * B A, and the share of its squared norm that they leave out."""
    columns, rows, dropped = [], [], 0.0
    for factors, scale in terms:
        columns.append(factors.b * np.float64(scale))
        rows.append(factors.a.astype(np.float64))
        if sum(len(a) for a in rows) > width:
            cut = principal(np.hstack(columns), np.vstack(rows), max(rank, width // 2))
            columns, rows, dropped = [cut.b], [cut.a], dropped + cut.dropped_energy
    whole = principal(np.hstack(columns), np.vstack(rows), rank)
    energy = whole.energy + dropped
    return whole, (whole.dropped_energy + dropped) / energy if energy else 0.0
