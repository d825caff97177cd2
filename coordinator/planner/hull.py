"""One nested path of steps along the concave hulls, whose prefixes answer many pairs of limits at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coordinator.planner.problem import F64, ROUNDING, Bools, Ints


@dataclass(frozen=True, eq=False)
class Path:
    """One nested way from the cheapest options up, by value per weighted cost; its prefixes answer any limits at once.

    Shapes: value, memory, time (P + 1,), the sums after 0 to P steps; steps (P, 2) int, the matrix of each step and its new
    option; start (K,) the options before the first.  Each prefix is the best choice for its own weighted cost.
    """

    value: F64
    memory: F64
    time: F64
    steps: Ints
    start: Ints

    def options(self, n_steps: int) -> Ints:
        """(K,) options after so many steps."""
        chosen: Ints = self.prefixes([n_steps])[0]
        return chosen

    def prefixes(self, n_steps: Sequence[int] | Ints) -> Ints:
        """(N, K) options after each of these numbers of steps, ascending."""
        chosen, done, found = self.start.copy(), 0, []
        for upto in n_steps:
            new = self.steps[done:upto]
            chosen[new[:, 0]] = new[:, 1]  # of several steps of one matrix the last one stays
            found.append(chosen.copy())
            done = max(done, int(upto))
        return np.stack(found)

    def within(self, memory_limit: F64 | float, time_limit: F64 | float) -> Ints:
        """How many steps fit each pair of limits, any shape; -1 where not even the start does.  More of a limit never gives fewer."""
        fits = [
            np.searchsorted(np.maximum.accumulate(used), np.asarray(limit) * (1 + ROUNDING), side="right")
            for used, limit in [(self.memory, memory_limit), (self.time, time_limit)]
        ]
        return np.asarray(np.minimum(*fits) - 1, dtype=np.int64)


def path(value: F64, memory: F64, time: F64, weights: tuple[float, float], allowed: Bools | None = None) -> Path:
    """The steps along the concave hulls of all matrices over weights[0] memory + weights[1] time, best ratio first.

    Shapes (K, O).  With the prices of a solution as weights, the prefix for the same limits is near the best choice, and
    the others are near it for limits in about that proportion.  Cost: O(K O^2).
    """
    rows = np.arange(len(value))
    cost = np.where(True if allowed is None else allowed, weights[0] * memory + weights[1] * time, np.inf)
    at = start = np.lexsort((-value, cost), axis=1)[:, 0]
    least = np.full(len(rows), np.inf)
    hull = [np.empty((4, 0))]
    for _ in range(value.shape[1] - 1):
        gain, extra = value - value[rows, at, None], cost - cost[rows, at, None]
        up = (gain > 0) & (extra > 0) & np.isfinite(extra)
        ratio = np.divide(gain, extra, out=np.full_like(gain, -1.0), where=up)
        best = ratio.max(axis=1)
        moves = best > 0
        least = np.minimum(best, least)  # ratios fall along a hull, also where rounding says otherwise
        to = np.where(ratio == best[:, None], cost, -1.0).argmax(axis=1)
        hull.append(np.stack([least, rows, at, to])[:, moves])
        at = np.where(moves, to, at)
    ratios, *columns = np.concatenate(hull, axis=1)
    matrix, before, after = np.array(columns).astype(np.int64)[:, np.argsort(-ratios, kind="stable")]
    sums = [
        np.cumsum(np.concatenate(([part[rows, start].sum()], part[matrix, after] - part[matrix, before])))
        for part in (value, memory, time)
    ]
    return Path(sums[0], sums[1], sums[2], np.stack([matrix, after], axis=1), start)
