"""Averages of the factors themselves: FedAvg over A and B, and HetLoRA's zero-padding where ranks differ.

Published baselines, here to be compared with.  An update holds the VALUES of an agent's adapter, not a change:

    A  <-  sum p_i pad(A_i),     B  <-  sum p_i pad(B_i),     pad: rows of A and columns of B up to the largest rank are zero

- By samples, p_i ~ n_i: FedAvg (McMahan et al., 2017, arXiv 1602.05629) of LoRA factors, as federated instruction tuning
  does it at equal ranks.  Where ranks differ, this is plain zero-padding.  FFA-LoRA (Sun et al., 2024, arXiv 2403.12313) is
  the same sum with an A that no agent trains, so that only B is averaged and the average is exact in the product.
- By norm, p_i ~ n_i ||B_i A_i||: the sparsity weights of HetLoRA (Cho et al., 2024, arXiv 2401.06432), by which adapters
  that are mostly zero count less.  The factor n_i is ours: late updates and small shares count less too.  HetLoRA's
  pruning of an agent's own rank is not built.

An agent of rank r takes the first r rows and columns, which is HetLoRA's truncation and the prefix of a model file.  The
mean of products is not the product of means: sum p_i B_i times sum p_i A_i has cross terms that nobody trained.

Cost per matrix: O((d_out + d_in) r) per update; norms O((d_out + d_in) r^2).  Memory: the model and one matrix in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from coordinator.aggregators import Aggregate, Weighted
from coordinator.aggregators.product import check_range, in_order
from protocol.adapters import F64, Factors, truncate


@dataclass(frozen=True, slots=True)
class Average:
    """Weighted mean of A and of B, padded with zeros to the largest rank.  See the head of this file."""

    accepts: ClassVar[str] = "lora-values"
    by_norm: bool = False

    def aggregate(
        self, model: Mapping[str, Factors], updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """See Aggregator.aggregate; server_lr moves the model that part of the way to the mean."""
        ordered = in_order(updates)
        squared_norms = {(u.round, u.agent): 0.0 for u in ordered}
        adapter, dropped_ratio = dict(model), {}
        for name in sorted({name for u in ordered for name in u.update.ranks}):
            trained = [u for u in ordered if name in u.update.ranks]
            norms = [u.update.factors(name).norm() for u in trained] if self.by_norm else []
            # Before anything has moved all norms are zero, and then only the samples can decide.
            shares = norms if any(norms) else [1.0] * len(trained)
            weights = [u.weight * share for u, share in zip(trained, shares, strict=True)]
            terms = self._terms(name, model, trained, weights, server_lr, squared_norms)
            ranks = [u.update.ranks[name] for u in trained] + (
                [model[name].rank] if _keeps(name, model, server_lr) else []
            )
            whole = _padded_sum(terms, max(ranks))
            check_range(name, whole, squared_norms)
            adapter[name], dropped_ratio[name] = truncate(whole, max_rank), _dropped(whole, max_rank)
        left = {name: factors for name, factors in adapter.items() if factors.rank}
        return Aggregate(left, dropped_ratio, {key: math.sqrt(square) for key, square in squared_norms.items()})

    @staticmethod
    def _terms(
        name: str,
        model: Mapping[str, Factors],
        trained: Sequence[Weighted],
        weights: Sequence[float],
        server_lr: float,
        squared_norms: dict[tuple[int, str], float],
    ) -> Iterator[tuple[Factors, float]]:
        """What is summed for one matrix, one at a time; adds up the squared norms of the updates on the way."""
        if _keeps(name, model, server_lr):
            yield model[name], 1.0 - server_lr
        total = math.fsum(weights)
        for u, weight in zip(trained, weights, strict=True):
            factors = u.update.factors(name)
            squared_norms[u.round, u.agent] += factors.norm() ** 2
            yield factors, server_lr * (weight / total)


def _keeps(name: str, model: Mapping[str, Factors], server_lr: float) -> bool:
    return name in model and server_lr != 1.0


def _padded_sum(terms: Iterable[tuple[Factors, float]], rank: int) -> Factors:
    a: F64 = np.zeros((0, 0))
    b = a
    for factors, scale in terms:
        if not a.size:
            d_out, d_in = factors.shape
            a, b = np.zeros((rank, d_in)), np.zeros((d_out, rank))
        a[: factors.rank] += scale * factors.a.astype(np.float64)
        b[:, : factors.rank] += scale * factors.b.astype(np.float64)
    with np.errstate(over="ignore"):
        return Factors(a=a.astype(np.float32), b=b.astype(np.float32))


def _dropped(whole: Factors, rank: int) -> float:
    """Share of the squared norms on the cut side, 0 to 1; the two sides need not be orthogonal."""
    kept = truncate(whole, rank).norm() ** 2
    cut = Factors(a=whole.a[rank:], b=whole.b[:, rank:]).norm() ** 2
    return cut / (kept + cut) if cut else 0.0
