"""What product-space aggregation of one matrix costs, beside forming the dense sum and its SVD.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/aggregation.py

Both sides in one run; CPU seconds of this process.  The dense side is done once, at 1024 x 1024: at 4096 it takes minutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coordinator.aggregators import Weighted
from coordinator.aggregators.product import Product
from protocol.adapters import Factors

RANK = 16


@dataclass(frozen=True)
class Held:
    """An update in memory."""

    ranks: dict[str, int]
    held: Factors

    def factors(self, _name: str) -> Factors:
        """The same for every matrix."""
        return self.held


def updates(d_out: int, d_in: int, n: int) -> list[Weighted]:
    rng = np.random.default_rng(0)
    drawn = (
        Factors(
            rng.standard_normal((RANK, d_in), dtype=np.float32), rng.standard_normal((d_out, RANK), dtype=np.float32)
        )
        for _ in range(n)
    )
    return [Weighted(f"agent-{i}", 1, 1.0, Held({"k": RANK}, f)) for i, f in enumerate(drawn)]


def cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def dense(given: list[Weighted]) -> None:
    total = sum(w.update.factors("k").b @ w.update.factors("k").a / len(given) for w in given)
    np.linalg.svd(total, full_matrices=False)


def main() -> None:
    for d_out, d_in, n in [(1024, 1024, 8), (4096, 4096, 8), (4096, 4096, 32), (11008, 4096, 32)]:
        given = updates(d_out, d_in, n)
        ours = cpu_s(lambda given=given: Product().aggregate({}, given, max_rank=RANK))
        line = f"{d_out:>5} x {d_in:<5} {n:>3} x rank {RANK}: {ours:6.3f} CPU s"
        if d_in == 1024:
            theirs = cpu_s(lambda given=given: dense(given))
            line += f", dense {theirs:6.3f} CPU s, ratio {theirs / ours:.0f}"
        print(line)


if __name__ == "__main__":
    main()
