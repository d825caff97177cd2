"""A multiple-choice knapsack with two limits as values: the problem, its solution, and a check of any choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

ROUNDING: Final = 1e-12  # a limit holds if the sum is at most limit * (1 + ROUNDING)


@dataclass(frozen=True, eq=False)
class Problem:
    """One server with its bits, batch and depth given; option 0 is rank 0 and normally free.

    Shapes: value, memory, time (K, O), finite and >= 0; allowed (K, O) bool, at least one per matrix.  Units: any, as long
    as each limit has that of its costs.  Raises ValueError for anything else.
    """

    value: F64
    memory: F64
    time: F64
    memory_limit: float
    time_limit: float
    allowed: Bools

    def __post_init__(self) -> None:
        shape = self.value.shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"value has the shape {shape}, not (matrices, options)")
        for name in ("memory", "time", "allowed"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has the shape {getattr(self, name).shape}, value has {shape}")
        for name in ("value", "memory", "time", "memory_limit", "time_limit"):
            given = np.asarray(getattr(self, name), dtype=np.float64)
            if not (np.isfinite(given).all() and given.min() >= 0):
                raise ValueError(f"{name} must be finite and not negative")
        if self.allowed.dtype != np.bool_ or not self.allowed.any(axis=1).all():
            raise ValueError("allowed must be bool with at least one option per matrix")


class Solution(NamedTuple):
    """A choice that fits, and how good it is at least.

    options (K,); value <= best value <= bound; gap = (bound - value) / bound; memory and time are what it takes; the prices
    are what one more unit of each limit is worth near here; limit is the one that is worth more as a whole,
    "none" if the best options of all matrices fit.
    """

    options: Ints
    value: float
    bound: float
    memory: float
    time: float
    memory_price: float
    time_price: float
    limit: Literal["memory", "time", "none"]

    @property
    def gap(self) -> float:
        """How much better, as a share of the bound, the best choice could be."""
        return (self.bound - self.value) / self.bound if self.bound > 0 else 0.0


class Infeasible(NamedTuple):
    """No choice fits, or the time limit was over before one was found.

    By how much a cheap choice exceeds each limit, in its unit: the one of 65 mixes of memory and time whose larger excess, as
    a share of its limit, is the least.
    """

    memory_excess: float
    time_excess: float


class Draft(NamedTuple):
    """What a quick solver found: prices (2,) of the limits, the bound that they give, and a choice (K,) if one fits."""

    prices: F64
    bound: float
    options: Ints | None


def settle(problem: Problem, draft: Draft, options: Ints) -> Solution:
    """The sums of a choice that fits, and which limit is the dearer one."""
    rows = np.arange(len(options))
    value, memory, time = (float(x[rows, options].sum()) for x in (problem.value, problem.memory, problem.time))
    p, q = (float(price) for price in draft.prices)
    whole = p * problem.memory_limit, q * problem.time_limit
    limit: Literal["memory", "time", "none"] = "memory" if whole[0] >= whole[1] else "time"
    if max(whole) <= 0:
        dearest = np.where(problem.allowed, problem.value, -np.inf).argmax(axis=1)
        if problem.value[rows, dearest].sum() <= value * (1 + ROUNDING):
            limit = "none"
        elif problem.memory[rows, dearest].sum() <= problem.memory_limit:
            limit = "time"
    bound = max(value, draft.bound * (1 + ROUNDING))
    return Solution(options, value, bound, memory, time, p, q, limit)


def feasible(problem: Problem, options: Ints) -> str:
    """What is wrong with a choice and by how much; empty if it is allowed and fits.  In plain Python, apart from any solver."""
    n_matrices, n_options = problem.value.shape
    if np.shape(options) != (n_matrices,):
        return f"{np.shape(options)} is not one option for each of {n_matrices} matrices"
    used_memory, used_time = [], []
    for matrix, option in enumerate(int(o) for o in options):
        if not 0 <= option < n_options:
            return f"matrix {matrix} has no option {option}"
        if not problem.allowed[matrix, option]:
            return f"matrix {matrix} may not have option {option}"
        used_memory.append(float(problem.memory[matrix, option]))
        used_time.append(float(problem.time[matrix, option]))
    for name, used, limit in [
        ("memory", math.fsum(used_memory), problem.memory_limit),
        ("time", math.fsum(used_time), problem.time_limit),
    ]:
        if used > limit * (1 + 2e-12):
            return f"{name} {used:g} is above its limit {limit:g} by {used - limit:g}"
    return ""
