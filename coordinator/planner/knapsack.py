"""Which option for each matrix: the multiple-choice knapsack with two limits, solved with a certificate, for one server or for a fleet.

    max  sum_k value[k, o_k]     s.t.     sum_k memory[k, o_k] <= memory_limit,     sum_k time[k, o_k] <= time_limit

Put a price on each limit (p for memory, q for time, both >= 0) and the matrices no longer know of each other: each takes
the option with the largest value - p memory - q time.  For any prices

    g(p, q) = p memory_limit + q time_limit + sum_k max_o (value - p memory - q time)[k, o]

is an upper bound on every choice that fits (the Lagrangian dual, which for this problem is the bound of the linear
relaxation: Geoffrion, 1974).  It sees the options of a matrix only through their concave hull, so values need not be concave.
Three steps, the first two over many problems at once:

1. **Prices** (coordinator/planner/prices.py).  g is convex in two variables, and one evaluation gives its slope: what is left of each limit.  The slope says
   on which side of a line through the query the best prices lie, so a polygon around them is cut through its centroid again
   and again, which takes away at least 1/e of its area (Levin, 1965; Newman, 1965).  It starts as
   the triangle p memory_limit + q time_limit <= g(0, 0).  Where the polygon still touches an axis and is near it, the query
   is put on the axis, because a limit that does not bind has the price 0 and not a small one.
2. **Core.**  A choice loses against the bound what its options lie below the best of their matrix at these prices, plus
   the prices of what it leaves unused.  So good choices differ from the priced one in few matrices, those whose second option
   is nearly as good (the core of Balas and Zemel, 1980; Pisinger, 1995, for multiple choice).  All subsets of the
   N_CORE cheapest exchanges are tried; the best one that fits is the answer.
3. **Refinement** (coordinator/planner/refinement.py), one by one, only where the certificate (bound - value) / bound is not good
   enough.  An option that loses more than the gap cannot be part of a better choice and is left out (reduced-cost
   fixing).  If few combinations are left they are all tried, else scipy's `milp` (HiGHS) takes over.

A limit holds if the sum is at most limit * (1 + 1e-12): the rounding of sums.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from coordinator.planner.hull import Path, path
from coordinator.planner.prices import best_prices
from coordinator.planner.problem import (
    F64,
    ROUNDING,
    Bools,
    Draft,
    Infeasible,
    Ints,
    Problem,
    Solution,
    feasible,
    settle,
)
from coordinator.planner.refinement import refined

__all__ = [
    "Infeasible",
    "Path",
    "Problem",
    "Solution",
    "Solved",
    "exact",
    "feasible",
    "greedy",
    "path",
    "solve",
    "solve_many",
]

NUMBERS: Final = ("value", "memory", "time")
N_CORE: Final = 12
N_CHUNK: Final = 128  # problems that are solved side by side: their arrays fit into a processor's cache
NOTHING: Final = 1e-200  # a limit below this is no unit to count in
SMALL: Final = 8  # matrices up to which the answer is always the best one


class Solved(NamedTuple):
    """The answers in the order of the problems, how many problems were distinct, and how many of those were refined one by one."""

    answers: list[Solution | Infeasible]
    n_distinct: int
    n_refined: int


def solve(
    problem: Problem, *, max_gap: float = 1e-3, start: Ints | None = None, time_limit_s: float = 10.0
) -> Solution | Infeasible:
    """The best choice to within max_gap; for up to SMALL matrices, the best one.

    Only where time_limit_s stops the exact solver is the gap larger; the solution says it.  With more of a limit the value
    is never less for up to SMALL matrices, and never less than 1 - max_gap of what it was above.  Who needs strict
    monotony there hands in the answer for the smaller limits as `start` (K,): if it fits, the answer is not worse.
    """
    found = solve_many([problem], max_gap=max_gap, time_limit_s=time_limit_s).answers[0]
    if start is None or isinstance(found, Infeasible) or feasible(problem, start):
        return found
    floor = settle(problem, Draft(np.array([found.memory_price, found.time_price]), found.bound, start), start)
    return floor if floor.value > found.value else found


def greedy(problem: Problem) -> Solution | Infeasible:
    """Steps 1 and 2 alone, however large the gap.  What they cannot fit, if an option 0 is not free or not allowed, is refined."""
    return solve_many([problem], max_gap=1.0).answers[0]


def exact(problem: Problem, *, time_limit_s: float = 60.0) -> Solution | Infeasible:
    """The best choice, or after time_limit_s the best one found, with the bound known by then."""
    return refined(problem, _drafts([problem])[0], 0.0, time_limit_s)


def solve_many(problems: Sequence[Problem], *, max_gap: float = 1e-3, time_limit_s: float = 10.0) -> Solved:
    """`solve` for a fleet: equal problems once, those of one shape side by side.  time_limit_s is for each that is refined.

    Cost: about 0.3 ms for 128 matrices with 8 options, and milliseconds for each that is refined.
    """
    places = _places(problems)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i in dict.fromkeys(places):
        shapes.setdefault(problems[i].value.shape, []).append(i)
    answers: dict[int, Solution | Infeasible] = {}
    n_refined = 0
    for (n_matrices, _), members in shapes.items():
        enough = 0.0 if n_matrices <= SMALL and max_gap < 1 else max_gap
        for at in range(0, len(members), N_CHUNK):
            chunk = members[at : at + N_CHUNK]
            for i, draft in zip(chunk, _drafts([problems[i] for i in chunk]), strict=True):
                found = None if draft.options is None else settle(problems[i], draft, draft.options)
                if found is None or found.gap > enough + 4 * ROUNDING:
                    n_refined += 1
                    answers[i] = refined(problems[i], draft, enough, time_limit_s)
                else:
                    answers[i] = found
    return Solved([answers[i] for i in places], len(answers), n_refined)


def _places(problems: Sequence[Problem]) -> list[int]:
    """For each problem the first one that equals it.  Contents are compared only where limits and a few numbers agree."""

    def glance(p: Problem) -> tuple[Any, ...]:
        return p.value.shape, p.memory_limit, p.time_limit, *(float(x[-1, -1]) for x in (p.value, p.memory, p.time))

    glances = [glance(p) for p in problems]
    seen = Counter(glances)
    first: dict[Any, int] = {}
    places = []
    for i, (p, key) in enumerate(zip(problems, glances, strict=True)):
        content: tuple[Any, ...] = key
        if seen[key] > 1:
            digest = hashlib.sha256()
            for part in (p.value, p.memory, p.time, p.allowed):
                digest.update(np.ascontiguousarray(part).data)
            content = (*key, digest.digest())
        places.append(first.setdefault(content, i))
    return places


def _drafts(problems: Sequence[Problem]) -> list[Draft]:
    """Steps 1 and 2 for problems of one shape, side by side."""
    value, memory, time = (np.stack([getattr(p, x) for p in problems], dtype=np.float64) for x in NUMBERS)
    limits = np.array([(p.memory_limit, p.time_limit) for p in problems], dtype=np.float64)
    usable = np.stack([p.allowed for p in problems])  # (n, K, O)
    fits = usable
    scales = np.empty_like(limits)
    beyond = []  # what an option costs beyond the cheapest one of its matrix
    for i, cost in enumerate((memory, time)):
        least = np.where(usable, cost, np.inf).min(axis=2, keepdims=True)
        room = limits[:, i] * (1 + ROUNDING) - least.sum(axis=(1, 2))
        scales[:, i] = np.where(room > NOTHING, room, 1.0)
        beyond.append(cost - least)
        fits = fits & (beyond[i] <= room[:, None, None])
    usable = np.where(fits.any(axis=2, keepdims=True), fits, usable)
    value = np.where(usable, value, -np.inf)
    worth = value.max(axis=2).sum(axis=1)
    worth[worth == 0] = 1.0
    shares = (np.where(fits, x, 0.0) / scales[:, i, None, None] for i, x in enumerate(beyond))
    value32, memory32, time32 = (x.astype(np.float32) for x in (value / worth[:, None, None], *shares))
    prices = best_prices(value32, memory32, time32) * worth[:, None] / scales
    bounds, options, ok = _core(value, memory, time, limits, prices)
    return [
        Draft(price, float(bound), chosen if fit else None)
        for price, bound, chosen, fit in zip(prices, bounds, options, ok, strict=True)
    ]


def _core(value: F64, memory: F64, time: F64, limits: F64, prices: F64) -> tuple[F64, Ints, Bools]:
    """Step 2: bounds (n,), options (n, K) and whether they fit.  value is -inf where an option may not be used."""
    n, n_matrices, _ = value.shape
    net = value - prices[:, 0, None, None] * memory - prices[:, 1, None, None] * time
    best = net.argmax(axis=2)[..., None]
    top = np.take_along_axis(net, best, axis=2)
    bounds = (prices * limits).sum(axis=1) + top.sum(axis=(1, 2))
    np.put_along_axis(net, best, -np.inf, axis=2)
    second = net.argmax(axis=2)[..., None]
    loss = (top - np.take_along_axis(net, second, axis=2))[..., 0]
    n_core = min(N_CORE, n_matrices)
    core = np.argpartition(loss, n_core - 1, axis=1)[:, :n_core]  # (n, C)
    sums = []
    for part in (value, memory, time):
        kept = np.take_along_axis(part, best, axis=2)[..., 0]
        change = np.take_along_axis(np.take_along_axis(part, second, axis=2)[..., 0] - kept, core, axis=1)
        total = kept.sum(axis=1, keepdims=True)
        for c in range(n_core):
            total = np.concatenate([total, total + change[:, c, None]], axis=1)
        sums.append(total)  # (n, 2^C); bit c of the place says that exchange c is made
    fits = (sums[1] <= limits[:, :1] * (1 + ROUNDING)) & (sums[2] <= limits[:, 1:] * (1 + ROUNDING))
    chosen = np.where(fits, sums[0], -np.inf).argmax(axis=1)
    options = best[..., 0]
    made = (chosen[:, None] >> np.arange(n_core)) & 1 == 1
    swapped = np.where(
        made, np.take_along_axis(second[..., 0], core, axis=1), np.take_along_axis(options, core, axis=1)
    )
    np.put_along_axis(options, core, swapped, axis=1)
    return bounds, options, fits[np.arange(n), chosen] & np.isfinite(sums[0][np.arange(n), chosen])
