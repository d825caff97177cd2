"""FLoRA: stack the agents' adapters, so that the sum is exact, and let every round begin anew on top of it.

A published baseline (Wang et al., 2024, arXiv 2409.05976), here to be compared with:

    dW  <-  dW + sum p_i B_i A_i  =  dW + [p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...]

Published, every agent downloads all the stacks and merges them into its base.  Here the base is quantized and never merged
into, so the sum stays beside it, frozen: the same function, written with as few components as it has (at most min(d_out,
d_in)) in canonical form.  Nothing is cut at `max_rank`, because the method knows no such limit; only what a model file
cannot hold (1024 components) is, and is reported.  Agents start fresh, with a random A and B = 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from coordinator.aggregators import Aggregate, Weighted
from coordinator.aggregators.product import STACK_WIDTH, sum_of_products
from protocol.adapters import Factors


@dataclass(frozen=True, slots=True)
class Stacking:
    """The exact sum of all updates so far, whatever rank it takes.  See the head of this file."""

    accepts: ClassVar[str] = "lora"
    is_slow: ClassVar[bool] = True

    def aggregate(
        self,
        model: Mapping[str, Factors],
        updates: Sequence[Weighted],
        *,
        max_rank: int,  # noqa: ARG002 - the method has no such limit
        server_lr: float = 1.0,
    ) -> Aggregate:
        """See Aggregator.aggregate, except that `max_rank` does not bind."""
        return sum_of_products(model, updates, kept=1.0, server_lr=server_lr, max_rank=STACK_WIDTH)
