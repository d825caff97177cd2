"""One knapsack to a wanted gap, from the prices and the choice that a quick solver found.

A choice loses against the bound what its options lie below the best of their matrix, plus the prices of what it leaves unused.
To find one that is better than the known one by more than the wanted gap, or to prove that there is none, only choices
that lose less than the window = bound - value / (1 - gap) matter, and so only options that lose less
by themselves (reduced-cost fixing).  That leaves a few dozen of a thousand options, and mostly few enough
combinations to try all of them; else HiGHS takes what is left.
"""

from __future__ import annotations

from typing import Final

import numpy as np

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

N_STATES: Final = 1_000, 10_000  # combinations that are carried along at most, first and second try
GUESS: Final = 0.02  # the window of the first try, as a share of the bound, where no choice is known


def refined(problem: Problem, draft: Draft, enough: float, time_limit_s: float) -> Solution | Infeasible:
    """A choice whose gap is at most `enough`, the best one if that is 0; time_limit_s is for HiGHS alone."""
    usable = problem.allowed
    for cost, limit in [(problem.memory, problem.memory_limit), (problem.time, problem.time_limit)]:
        least = np.where(problem.allowed, cost, np.inf).min(axis=1, keepdims=True)
        usable = usable & (cost - least <= limit * (1 + ROUNDING) - least.sum())
    if not usable.any(axis=1).all():
        return _infeasible(problem)
    net = np.where(usable, problem.value - draft.prices[0] * problem.memory - draft.prices[1] * problem.time, -np.inf)
    loss = net.max(axis=1, keepdims=True) - net
    best, bound = draft.options, draft.bound
    sought = (1 - GUESS) * draft.bound
    for n_states in (*N_STATES, 0):
        if best is not None:
            sought = _worth(problem, best) / (1 - 0.99 * min(enough, 0.5))
        window = draft.bound * (1 + 1e-9) - sought
        near = usable & (loss <= window)
        if n_states:
            tried, inside = _enumerated(problem, near, loss, window, n_states)
        else:
            tried, inside = _by_milp(problem, near, enough, time_limit_s)
        if tried is not None and (best is None or _worth(problem, tried) > _worth(problem, best)):
            best = tried
        bound = min(draft.bound, max(inside, sought))  # a choice outside the window is worth less than what is sought
        if bound == -np.inf or (best is not None and _worth(problem, best) >= (1 - enough) * bound):
            break
        sought = -np.inf
    return _infeasible(problem) if best is None else settle(problem, draft._replace(bound=bound), best)


def _worth(problem: Problem, options: Ints) -> float:
    return float(problem.value[np.arange(len(options)), options].sum())


def _enumerated(problem: Problem, usable: Bools, loss: F64, window: float, n_states: int) -> tuple[Ints | None, float]:
    """The best choice (K,) of those that fit and lose at most `window`, if there is one, and a bound on those not tried.

    Matrix by matrix; where more than n_states combinations are open, those that lost least so far go on (beam search).  The
    bound is -inf if all were tried, else inf.
    """
    n_left = usable.sum(axis=1)
    chosen = np.asarray(usable.argmax(axis=1))
    rows = np.flatnonzero(n_left > 1)
    nearest = np.where(usable & (loss > 0), loss, np.inf).min(axis=1)
    rows = rows[np.argsort(-nearest[rows])]  # the dearest exchanges first, so that few combinations are open for long
    memory_left, time_left = problem.memory_limit * (1 + ROUNDING), problem.time_limit * (1 + ROUNDING)
    memory_left -= np.where(usable, problem.memory, np.inf).min(axis=1).sum()
    time_left -= np.where(usable, problem.time, np.inf).min(axis=1).sum()
    lost, worth, more_memory, more_time = np.zeros((4, 1))  # (states,)
    trail: list[tuple[Ints, Ints]] = []
    untried = -np.inf
    for row in rows:
        options = np.flatnonzero(usable[row])
        after = lost[:, None] + loss[row, options]
        memory, time = problem.memory[row, options], problem.time[row, options]
        new_memory, new_time = more_memory[:, None] + (memory - memory.min()), more_time[:, None] + (time - time.min())
        state, pick = np.nonzero((after <= window) & (new_memory <= memory_left) & (new_time <= time_left))
        if len(state) > n_states:
            kept = np.argpartition(after[state, pick], n_states)[:n_states]
            state, pick, untried = state[kept], pick[kept], np.inf
        lost, more_memory, more_time = after[state, pick], new_memory[state, pick], new_time[state, pick]
        worth = worth[state] + problem.value[row, options[pick]]
        trail.append((state, options[pick]))
    if len(worth) == 0:
        return None, untried
    at = int(worth.argmax())
    for row, (state, picked) in zip(rows[::-1], trail[::-1], strict=True):
        chosen[row], at = picked[at], int(state[at])
    return (None if feasible(problem, chosen) else chosen), untried


def _by_milp(problem: Problem, usable: Bools, enough: float, time_limit_s: float) -> tuple[Ints | None, float]:
    """HiGHS on what is left: a choice (K,) or None, and an upper bound on any choice of usable options."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows, options = np.nonzero(usable)
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    largest = np.where(usable, problem.value, 0.0).max(axis=1).sum() / 1e4  # HiGHS stops at an absolute gap of 1e-6
    largest = largest if largest > 0 else 1.0
    limits = [(problem.memory, problem.memory_limit), (problem.time, problem.time_limit)]
    used = np.stack([cost[rows, options] / (limit if limit > 0 else 1.0) for cost, limit in limits])
    bound = np.inf
    for room in (1.0, 1 - 3e-6):  # HiGHS lets a row exceed its limit by 1e-6
        found = milp(
            -problem.value[rows, options] / largest,
            integrality=np.ones(len(rows)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(csr_array(used), -np.inf, [room if limit > 0 else 0.0 for _, limit in limits]),
            ],
            options={"mip_rel_gap": enough / 2, "time_limit": time_limit_s},
        )
        if room == 1 and found.status == 2:
            return None, -np.inf
        if room == 1 and found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound):
            bound = float(-found.mip_dual_bound * largest)
        if found.x is None:
            break
        chosen = np.zeros(len(usable), dtype=np.int64)
        taken = found.x > 0.5
        chosen[rows[taken]] = options[taken]
        if not feasible(problem, chosen):
            return chosen, bound
    return None, bound


def _infeasible(problem: Problem) -> Infeasible:
    rows = np.arange(len(problem.value))
    limits = np.array([problem.memory_limit, problem.time_limit])
    costs = np.stack([problem.memory, problem.time], axis=-1)
    scale = np.where(limits > 0, limits, np.maximum(costs.sum(axis=(0, 1)), 1.0))
    excess = []
    for share in np.linspace(0, 1, 65):
        mixed = costs @ (np.array([share, 1 - share]) / scale)
        chosen = np.where(problem.allowed, mixed, np.inf).argmin(axis=1)
        excess.append(np.maximum(costs[rows, chosen].sum(axis=0) - limits, 0.0))
    least = min(excess, key=lambda x: float((x / scale).max()))
    return Infeasible(float(least[0]), float(least[1]))
