"""What the planner's knapsack costs for a whole fleet, beside HiGHS on a sample of the same problems.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python bench/planner.py [--json FILE]

Both sides in one run; CPU seconds of this process; the solver is warmed up with another fleet first.  HiGHS (scipy's `milp`) is asked
for the same gap, on the whole problem; the ratio is its mean on the sample over our mean on the distinct fleet.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from coordinator.planner.knapsack import Problem, Solution, feasible, solve_many
from coordinator.planner.refinement import _by_milp

N_AGENTS, N_MATRICES, N_CLASSES, N_SAMPLE, MAX_GAP = 5000, 128, 50, 20, 1e-3
RANKS = np.array([0, 1, 2, 4, 8, 16, 32, 64])


def draw(rng: np.random.Generator) -> Problem:
    """Saturating gains; memory and time start with a jump and go on linearly; limits are 5 to 90 % of what all would take."""
    column = (N_MATRICES, 1)
    value = rng.lognormal(size=column) * (1 - np.exp(-RANKS / rng.lognormal(1.5, 0.7, column)))
    width = rng.choice([8192, 9216, 15104, 22016], column) * rng.uniform(0.95, 1.05, column)
    memory = RANKS * width * 16 + (RANKS > 0) * rng.uniform(1e6, 4e6, column)
    seconds = (RANKS > 0) * rng.uniform(1e-3, 3e-3, column) + RANKS * width * rng.uniform(1e-9, 3e-9, column)
    limits = [float(cost[:, -1].sum() * rng.uniform(0.05, 0.9)) for cost in (memory, seconds)]
    return Problem(value, memory, seconds, limits[0], limits[1], np.ones(value.shape, dtype=bool))


def copied(problem: Problem) -> Problem:
    """Equal in content, apart in memory: what two agents of one class send."""
    p = problem
    return Problem(p.value.copy(), p.memory.copy(), p.time.copy(), p.memory_limit, p.time_limit, p.allowed.copy())


def measure(name: str, problems: list[Problem]) -> dict[str, float | str]:
    began = time.process_time()
    solved = solve_many(problems, max_gap=MAX_GAP)
    ours = time.process_time() - began
    answers = [a for a in solved.answers if isinstance(a, Solution)]
    wrong = sum(bool(feasible(p, a.options)) for p, a in zip(problems, answers, strict=True))
    gaps = np.array([a.gap for a in answers])
    return {
        "fleet": name,
        "cpu_s": ours,
        "n_distinct": solved.n_distinct,
        "n_refined": solved.n_refined,
        "n_infeasible": wrong,
        "median_gap": float(np.median(gaps)),
        "largest_gap": float(gaps.max()),
        "n_above_max_gap": int((gaps > MAX_GAP).sum()),
    }


def beside_highs(problems: list[Problem], per_problem_s: float) -> dict[str, float | str]:
    answers = solve_many(problems, max_gap=MAX_GAP).answers
    shortfalls = []
    began = time.process_time()
    for problem, answer in zip(problems, answers, strict=True):
        options, _ = _by_milp(problem, problem.allowed, 2 * MAX_GAP, 20.0)  # it asks HiGHS for half
        if options is not None and isinstance(answer, Solution):
            theirs = float(problem.value[np.arange(N_MATRICES), options].sum())
            shortfalls.append(1 - answer.value / theirs)
    highs = (time.process_time() - began) / len(problems)
    return {
        "fleet": f"HiGHS on {len(problems)}",
        "cpu_s_each": highs,
        "ratio": highs / per_problem_s,
        "largest_shortfall": max(shortfalls),
        "mean_shortfall": float(np.mean(shortfalls)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The planner's knapsack for a fleet, beside HiGHS.")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    file: Path | None = parser.parse_args().json
    rng = np.random.default_rng(0)
    solve_many([draw(rng) for _ in range(64)], max_gap=MAX_GAP)
    distinct = [draw(rng) for _ in range(N_AGENTS)]
    classes = [copied(distinct[i % N_CLASSES]) for i in range(N_AGENTS)]
    rows = [measure(f"{N_AGENTS} distinct", distinct), measure(f"{N_AGENTS} in {N_CLASSES} classes", classes)]
    rows.append(beside_highs(distinct[:N_SAMPLE], float(rows[0]["cpu_s"]) / N_AGENTS))
    for row in rows:
        print(", ".join(f"{key} {v:.3g}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()))
    if file:
        file.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
