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

whose singular value decomposition costs two thin QR and one small core (protocol.adapters.principal).

That is exact, and its time grows with the square of the columns: up to `EXACT_WIDTH` of them it is done so.  For a larger fleet
the leading components come from products with thin blocks alone (coordinator/aggregators/krylov.py), in time that grows with
the columns, to an error below 1e-3.  Where the matrix is too small for such blocks, the stack is cut to half of `STACK_WIDTH`
whenever it grows wider than that: exact where the sum has lower rank than that.

The two sides of a large matrix are done at a time, and of a large fleet two matrices.  The order of the terms is by (round,
agent), whatever order they arrived in, and no number depends on what else runs, so the result has the same bits.

What truncation drops is reported per matrix.  Cost per matrix: O((d_out + d_in) R^2 + R^3) with R the sum of the ranks where it
is exact, and O((d_out + d_in) R max_rank) beyond.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import ClassVar, Final

import numpy as np

from coordinator.aggregators import Aggregate, Weighted, krylov
from coordinator.aggregators.krylov import Leading, Term
from protocol.adapters import Each, Factors, principal
from protocol.errors import BadUpdate

EXACT_WIDTH: Final = 512
STACK_WIDTH: Final = 1024
_N_WORKERS: Final = min(2, os.cpu_count() or 1)
_LARGE_VALUES: Final = 2**19
"""In one stack; below, the interpreter's lock costs more than a second thread brings."""


@dataclass(frozen=True, slots=True)
class Product:
    """Weighted sum of the products B_i A_i, cut to the best `max_rank` components.  See the head of this file."""

    accepts: ClassVar[str] = "lora"
    is_slow: ClassVar[bool] = True
    stack_width: int = STACK_WIDTH

    def aggregate(
        self, model: Mapping[str, Factors], updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """See Aggregator.aggregate.  A matrix whose sum is zero is not in the result."""
        return sum_of_products(
            model, updates, kept=1.0, server_lr=server_lr, max_rank=max_rank, stack_width=self.stack_width
        )


def sum_of_products(
    model: Mapping[str, Factors],
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
    names = trained_names(ordered)
    adapter = {name: model[name] for name in sorted(model.keys() - set(names))}
    dropped_ratio: dict[str, float] = {}

    def work(name: str) -> Leading:
        terms = _terms(name, model if kept else {}, ordered, (kept, server_lr))
        try:
            return _leading(name, terms, max_rank, stack_width, each_side)
        except np.linalg.LinAlgError as error:
            raise BadUpdate(f"the sum of matrix {name!r} cannot be decomposed: {error}") from error

    workers = ThreadPoolExecutor(_N_WORKERS)
    each, each_side = _ways(ordered, workers)
    try:
        for name, found in zip(names, each(work, names), strict=True):
            adapter[name], dropped_ratio[name] = found.factors, found.dropped_ratio
            check_range(name, adapter[name], ordered)
    finally:
        workers.shutdown(cancel_futures=True)
    left = {name: factors for name, factors in adapter.items() if factors.rank}
    return Aggregate(left, dropped_ratio)


def _ways(ordered: Sequence[Weighted], workers: ThreadPoolExecutor) -> tuple[Each, Each]:
    """How to do the matrices, and the sides of each, by the matrix that is widest in the first update.

    Threads where they have more to compute than to wait for each other: for the sides, so that one matrix is held at a time,
    unless there are too many columns to do them exactly.
    """
    ranks = ordered[0].update.ranks if ordered else {}
    name = max(ranks, key=ranks.__getitem__, default="")
    n_columns = sum(u.update.ranks.get(name, 0) for u in ordered)
    if not n_columns or n_columns * sum(ordered[0].update.shape(name)) < _LARGE_VALUES:
        return map, map
    return (map, workers.map) if n_columns <= EXACT_WIDTH else (workers.map, map)


def check_range(name: str, factors: Factors, ordered: Sequence[Weighted]) -> None:
    """Raises BadUpdate, naming the agent whose update of this matrix is the largest, where a sum of finite numbers is none."""
    if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
        largest = max(_trained(name, ordered), key=lambda u: u.update.factors(name).norm())
        raise BadUpdate(
            f"the sum of matrix {name!r} leaves float32's range: drop {largest.agent}'s, by far the largest"
        )


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


def trained_names(ordered: Sequence[Weighted]) -> list[str]:
    """The matrices that somebody trained, in order; in nearly that order they come, which makes sorting cheap."""
    tables = {id(ranks): ranks for ranks in [u.update.ranks for u in ordered]}  # like updates have one in common
    return sorted(dict.fromkeys(chain.from_iterable(tables.values())))


def _trained(name: str, ordered: Sequence[Weighted]) -> list[Weighted]:
    return [u for u in ordered if name in u.update.ranks]


def _terms(
    name: str, model: Mapping[str, Factors], ordered: Sequence[Weighted], scales: tuple[float, float]
) -> list[Term]:
    """What is summed for one matrix: the model if it holds it, then the updates."""
    kept, server_lr = scales
    trained = _trained(name, ordered)
    total = math.fsum(u.weight for u in trained)
    old = model.get(name)
    return ([Term(old.rank, kept, lambda: old)] if old else []) + [
        Term(u.update.ranks[name], server_lr * (u.weight / total), partial(u.update.factors, name)) for u in trained
    ]


def _leading(name: str, terms: Sequence[Term], max_rank: int, stack_width: int, each_side: Each) -> Leading:
    """The best `max_rank` components of the sum of scale * B A: exactly where few are summed, else nearly."""
    if sum(term.rank for term in terms) > EXACT_WIDTH and krylov.fits(max_rank, terms[0].read().shape):
        return krylov.leading(name, terms, max_rank)
    return _exactly(terms, max_rank, stack_width, each_side)


def _exactly(terms: Sequence[Term], rank: int, width: int, each_side: Each) -> Leading:
    """All terms side by side in one array, of which as much is used as there is; cut whenever it is wider than `width`."""
    n_columns, n, dropped = sum(term.rank for term in terms), 0, 0.0
    d_out, d_in = terms[0].read().shape
    held = min(n_columns, max(rank, width) + max(term.rank for term in terms))
    b, a, scale = np.empty((d_out, held), np.float32), np.empty((held, d_in), np.float32), np.empty(held)
    for term in terms:
        factors, end = term.read(), n + term.rank
        b[:, n:end], a[n:end], scale[n:end], n = factors.b, factors.a, term.scale, end
        if n > width:
            cut = principal(b[:, :n], a[:n], max(rank, width // 2), scale=scale[:n], each=each_side)
            n, dropped = len(cut.a), dropped + cut.dropped_energy
            root = np.sqrt(cut.singular[:n])  # as unit vectors: float32's range is for the end
            b[:, :n], a[:n], scale[:n] = cut.b / root, cut.a / root[:, None], cut.singular[:n]
    whole = principal(b[:, :n], a[:n], rank, scale=scale[:n], each=each_side)
    energy = whole.energy + dropped
    return Leading(whole.to_factors(), (whole.dropped_energy + dropped) / energy if energy else 0.0)
