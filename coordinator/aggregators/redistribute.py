"""FlexLoRA: average the products, decompose, and hand every agent as much of the result as its rank can hold.

A published baseline (Bai et al., 2024, arXiv 2402.11505), here to be compared with.  An update holds the VALUES of an
agent's adapter, which continued from the components that it was given:

    dW  <-  sum p_i B_i A_i  =  U S V^T,          an agent of rank r continues from  B = U_r S_r,  A = V_r^T

What an agent was not given it cannot send back: components beyond the ranks of the agents shrink with every round, which is
the difference to coordinator/aggregators/product.py, where updates are changes and the model itself is one of the terms.

The published server forms the d_out x d_in matrix and its full SVD; the same result comes here from thin factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from coordinator.aggregators import Aggregate, Weighted
from coordinator.aggregators.product import check_range, in_order, sum_of_products
from protocol.adapters import Factors


@dataclass(frozen=True, slots=True)
class Redistribute:
    """Weighted mean of the products B_i A_i, cut to `max_rank`, as U S and V^T.  See the head of this file."""

    accepts: ClassVar[str] = "lora-values"
    is_slow: ClassVar[bool] = True

    def aggregate(
        self, model: Mapping[str, Factors], updates: Sequence[Weighted], *, max_rank: int, server_lr: float = 1.0
    ) -> Aggregate:
        """See Aggregator.aggregate; server_lr moves the model that part of the way to the mean."""
        mean = sum_of_products(model, updates, kept=1.0 - server_lr, server_lr=server_lr, max_rank=max_rank)
        ordered = in_order(updates)
        adapter = dict(mean.adapter)
        for name in mean.dropped_ratio.keys() & adapter.keys():
            adapter[name] = _one_sided(adapter[name])
            check_range(name, adapter[name], ordered)
        return replace(mean, adapter=adapter)


def _one_sided(factors: Factors) -> Factors:
    """The same product of canonical factors with all singular values in B, so that the rows of A have norm 1."""
    a, b = factors.a.astype(np.float64), factors.b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)
    with np.errstate(over="ignore"):
        return Factors(a=(a / norms[:, None]).astype(np.float32), b=(b * norms).astype(np.float32))
