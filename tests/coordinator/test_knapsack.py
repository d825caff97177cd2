"""The planner's knapsack: against brute force, against the linear relaxation, and the laws that any solver of it keeps."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from coordinator.planner.knapsack import (
    Infeasible,
    Problem,
    Solution,
    exact,
    feasible,
    greedy,
    path,
    solve,
    solve_many,
)
from coordinator.planner.refinement import _by_milp

RANKS = np.array([0, 1, 2, 4, 8, 16, 32, 64])
seeds = st.integers(0, 2**32)


def realistic(seed: int, n_matrices: int = 40, share: tuple[float, float] | None = None) -> Problem:
    """Saturating gains; memory and time that start with a jump and go on linearly."""
    rng = np.random.default_rng(seed)
    column = (n_matrices, 1)
    value = rng.lognormal(size=column) * (1 - np.exp(-RANKS / rng.lognormal(1.5, 0.7, column)))
    width = rng.choice([8192, 15104, 22016], column) * rng.uniform(0.95, 1.05, column)
    memory = RANKS * width * 16 + (RANKS > 0) * rng.uniform(1e6, 4e6, column)
    time = (RANKS > 0) * rng.uniform(1e-3, 3e-3, column) + RANKS * width * rng.uniform(1e-9, 3e-9, column)
    part = share or tuple(rng.uniform(0.05, 0.9, 2))
    limits = memory[:, -1].sum() * part[0], time[:, -1].sum() * part[1]
    return Problem(value, memory, time, *limits, np.ones(value.shape, dtype=bool))


def small(seed: int, *, free: bool = True) -> Problem:
    """Anything: values that are not concave, ties, zeros, whole numbers that fit exactly, masks; without `free` also no way out."""
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(1, 6)), int(rng.integers(1, 5))
    value, memory, time = (
        rng.integers(0, 8, shape).astype(float) if rng.random() < 0.5 else rng.exponential(1.0, shape) for _ in range(3)
    )
    allowed = rng.random(shape) < 0.8
    allowed[:, 0] |= ~allowed.any(axis=1)
    if free:
        allowed[:, 0] = True
        value[:, 0] = memory[:, 0] = time[:, 0] = 0
    limits = [float(np.round(x.max(axis=1).sum() * rng.choice([0, 0.2, 0.5, 0.8, 1.1]))) for x in (memory, time)]
    return Problem(value, memory, time, limits[0], limits[1], allowed)


def best_of_all(problem: Problem) -> float | None:
    """Brute force."""
    n_matrices, n_options = problem.value.shape
    rows = np.arange(n_matrices)
    every = (np.array(x) for x in product(range(n_options), repeat=n_matrices))
    return max((float(problem.value[rows, x].sum()) for x in every if not feasible(problem, x)), default=None)


def solved(answer: Solution | Infeasible) -> Solution:
    assert isinstance(answer, Solution)
    return answer


def limited(problem: Problem, memory: float, time: float) -> Problem:
    return Problem(problem.value, problem.memory, problem.time, memory, time, problem.allowed)


@given(seeds, st.booleans())
@settings(max_examples=150)
def test_brute_force_agrees(seed: int, free: bool) -> None:
    problem = small(seed, free=free)
    best = best_of_all(problem)
    for answer in (exact(problem), solve(problem), greedy(problem)):
        if best is None:
            assert isinstance(answer, Infeasible)
            assert max(answer) > 0
            continue
        assert isinstance(answer, Solution)
        assert not feasible(problem, answer.options)
        assert answer.bound >= best * (1 - 1e-9)
        assert answer.value <= best * (1 + 1e-9)
        assert best - answer.value <= (answer.gap + 1e-9) * answer.bound
    if best is not None:
        assert solved(exact(problem)).value == pytest.approx(best)
        assert solved(solve(problem)).value == pytest.approx(best)


@given(seeds)
@settings(max_examples=60)
def test_highs_agrees_with_brute_force(seed: int) -> None:
    problem = small(seed, free=False)
    best = best_of_all(problem)
    options, bound = _by_milp(problem, problem.allowed, 0.0, 10.0)
    if best is None:
        assert options is None
    else:
        assert options is not None
        assert problem.value[np.arange(len(options)), options].sum() == pytest.approx(best)
        assert bound >= best * (1 - 1e-6)


@example(49821)  # a limit that binds a little: its price is near the axis, not on it
@given(seeds)
@settings(max_examples=25)
def test_the_bound_is_that_of_the_linear_relaxation(seed: int) -> None:
    problem = realistic(seed)
    n_matrices, n_options = problem.value.shape
    relaxed = linprog(
        -problem.value.ravel(),
        A_ub=[problem.memory.ravel() / problem.memory_limit, problem.time.ravel() / problem.time_limit],
        b_ub=[1, 1],
        A_eq=np.kron(np.eye(n_matrices), np.ones(n_options)),
        b_eq=np.ones(n_matrices),
    )
    found = solved(solve(problem, max_gap=1.0))
    assert -relaxed.fun * (1 - 1e-7) <= found.bound <= -relaxed.fun * (1 + 1e-4)


@given(seeds)
@settings(max_examples=40)
def test_forty_matrices_are_within_the_gap_of_the_best(seed: int) -> None:
    problem = realistic(seed)
    found, best = solved(solve(problem)), solved(exact(problem, time_limit_s=20))
    assert not feasible(problem, found.options)
    assert found.gap <= 1e-3
    assert found.value >= best.value * (1 - 1e-3)
    assert found.bound >= best.value * (1 - 1e-9)
    assert best.gap <= 1e-6


def test_what_enumeration_cannot_finish_goes_to_highs() -> None:
    rng = np.random.default_rng(4)
    size = rng.integers(10**6, 2 * 10**6, (40, 1)) * np.array([0.0, 1.0, 3.0])
    noise = rng.uniform(0.98, 1.02, (40, 3))
    problem = Problem(size * noise, size, size[::-1], size.sum() / 7, size.sum() / 6, np.ones(size.shape, dtype=bool))
    found = solved(solve(problem, max_gap=1e-5))
    assert found.gap <= 1e-5
    assert not feasible(problem, found.options)


@given(seeds, st.floats(0, 2), st.floats(0, 2))
@settings(max_examples=100)
def test_more_of_a_limit_never_gives_less(seed: int, memory: float, time: float) -> None:
    problem = small(seed)
    more = limited(problem, problem.memory_limit + memory, problem.time_limit + time)
    assert solved(solve(more)).value >= solved(solve(problem)).value - 1e-9


@given(seeds)
@settings(max_examples=5)
def test_with_the_last_answer_as_a_start_more_never_gives_less_for_many_matrices(seed: int) -> None:
    problem = realistic(seed, share=(0.3, 0.3))
    value, options = 0.0, np.zeros(40, dtype=np.int64)
    for more in np.linspace(0.5, 2, 25):
        wider = limited(problem, problem.memory_limit * more, problem.time_limit * more)
        found = solved(solve(wider, start=options, max_gap=0.01))
        assert found.value >= value
        assert not feasible(wider, found.options)
        value, options = found.value, found.options


def test_a_start_that_does_not_fit_is_not_taken() -> None:
    problem = realistic(0, share=(0.1, 0.1))
    found = solved(solve(problem, start=np.full(40, 7)))
    assert not feasible(problem, found.options)


@given(seeds)
@settings(max_examples=30)
def test_the_order_of_matrices_does_not_matter(seed: int) -> None:
    problem = small(seed)
    order = np.random.default_rng(seed).permutation(len(problem.value))
    turned = Problem(
        problem.value[order],
        problem.memory[order],
        problem.time[order],
        problem.memory_limit,
        problem.time_limit,
        problem.allowed[order],
    )
    assert solved(solve(turned)).value == pytest.approx(solved(solve(problem)).value)


@pytest.mark.parametrize("scales", [(1e-9, 1e11, 1e-3), (1e12, 1e-6, 1e6), (1.0, 1e15, 1e-12)])
def test_units_do_not_matter(scales: tuple[float, float, float]) -> None:
    problem = realistic(3)
    v, m, t = scales
    other = Problem(
        problem.value * v,
        problem.memory * m,
        problem.time * t,
        problem.memory_limit * m,
        problem.time_limit * t,
        problem.allowed,
    )
    found, same = solved(solve(problem)), solved(solve(other))
    assert same.gap <= 1e-3
    assert same.value / v == pytest.approx(found.value, rel=1e-3)
    assert not feasible(other, same.options)


def test_masks_are_kept() -> None:
    problem = realistic(1, share=(0.5, 0.5))
    allowed = np.random.default_rng(0).random(problem.value.shape) < 0.5
    allowed[:, 0] = True
    masked = Problem(problem.value, problem.memory, problem.time, problem.memory_limit, problem.time_limit, allowed)
    found = solved(solve(masked))
    assert allowed[np.arange(40), found.options].all()
    assert found.gap <= 1e-3
    assert found.value < solved(solve(problem)).value


@pytest.mark.parametrize(
    ("share", "limit"), [((1, 1), "none"), ((0.2, 1), "memory"), ((1, 0.2), "time"), ((0, 1), "memory")]
)
def test_the_binding_limit_is_named(share: tuple[float, float], limit: str) -> None:
    found = solved(solve(realistic(2, share=share)))
    assert found.limit == limit
    if 0 not in share:  # what nothing can be bought with has no price
        assert (found.memory_price > 0, found.time_price > 0) == (limit == "memory", limit == "time")


def test_zero_limits_leave_what_is_free() -> None:
    found = solved(solve(realistic(5, share=(0, 0))))
    assert not found.options.any()
    assert (found.value, found.memory, found.time, found.gap) == (0, 0, 0, 0)


def test_equal_matrices_share_what_fits() -> None:
    row = np.tile([0.0, 1.0, 1.5], (30, 1))
    problem = Problem(row, row**2, row, 17.0, 100.0, np.ones(row.shape, dtype=bool))
    found = solved(solve(problem))
    assert found.value == pytest.approx(17.0)
    assert (found.options > 0).sum() == 17


def test_what_cannot_fit_says_by_how_much() -> None:
    one = np.array([[3.0], [4.0]])
    allowed = np.ones((2, 1), dtype=bool)
    assert solve(Problem(one, one, one * 2, 5.0, 20.0, allowed)) == Infeasible(2.0, 0.0)
    assert exact(Problem(one, one, one * 2, 5.0, 10.0, allowed)) == Infeasible(2.0, 4.0)
    apart = Problem(
        np.ones((1, 2)), np.array([[0.0, 3.0]]), np.array([[3.0, 0.0]]), 2.0, 1.0, np.ones((1, 2), dtype=bool)
    )
    assert solve(apart) == Infeasible(1.0, 0.0)


def test_every_corruption_of_a_choice_is_found() -> None:
    problem = realistic(6, share=(0.3, 0.3))
    options = solved(solve(problem)).options
    assert not feasible(problem, options)
    assert "one option for each" in feasible(problem, options[1:])
    for wrong in (-1, 8):
        assert "no option" in feasible(problem, np.r_[wrong, options[1:]])
    masked = np.ones(problem.value.shape, dtype=bool)
    masked[7, options[7]] = False
    barred = Problem(problem.value, problem.memory, problem.time, problem.memory_limit, problem.time_limit, masked)
    assert "matrix 7 may not" in feasible(barred, options)
    rows = np.arange(40)
    memory, time = problem.memory[rows, options].sum(), problem.time[rows, options].sum()
    assert not feasible(limited(problem, memory, time), options)
    assert feasible(limited(problem, memory - 1, time), options).startswith("memory")
    assert feasible(limited(problem, memory, time * (1 - 1e-9)), options).startswith("time")


def test_a_fleet_is_solved_as_its_members_are_and_equal_ones_once() -> None:
    different = [realistic(i, n_matrices=n) for i, n in enumerate([40, 3, 40, 128, 3])]
    copies = [limited(p, p.memory_limit, p.time_limit) for p in different]
    found = solve_many([*different, *copies, limited(different[0], 0.0, 0.0)])
    assert found.n_distinct == 6
    for problem, answer in zip([*different, *copies], found.answers, strict=False):
        assert not feasible(problem, solved(answer).options)
        assert solved(answer).value == pytest.approx(solved(solve(problem)).value, rel=1e-3)
    assert [solved(x).value for x in found.answers[:5]] == [solved(x).value for x in found.answers[5:10]]
    assert solved(found.answers[10]).value == 0
    assert solve_many([]).answers == []


@given(seeds)
@settings(max_examples=50)
def test_each_prefix_of_a_path_is_the_best_for_its_cost(seed: int) -> None:
    problem = small(seed)
    weights = tuple(np.random.default_rng(seed).uniform(0.1, 1, 2))
    way = path(problem.value, problem.memory, problem.time, weights, problem.allowed)
    rows = np.arange(len(problem.value))
    cost = weights[0] * problem.memory + weights[1] * problem.time
    for n_steps in range(len(way.value)):
        options = way.options(n_steps)
        assert problem.allowed[rows, options].all()
        sums = [x[rows, options].sum() for x in (problem.value, problem.memory, problem.time)]
        assert [way.value[n_steps], way.memory[n_steps], way.time[n_steps]] == pytest.approx(sums)
        spent = float(cost[rows, options].sum())
        only = Problem(problem.value, cost, cost * 0, spent * (1 + 1e-9), 0.0, problem.allowed)
        assert best_of_all(only) == pytest.approx(sums[0])


def test_a_path_answers_many_limits() -> None:
    problem = realistic(8)
    way = path(problem.value, problem.memory, problem.time, (1 / problem.memory_limit, 1 / problem.time_limit))
    memory, time = np.meshgrid(np.linspace(0, 2, 20) * problem.memory_limit, np.linspace(0, 2, 20) * problem.time_limit)
    n_steps = way.within(memory, time)
    assert n_steps.shape == memory.shape
    assert (np.diff(n_steps, axis=0) >= 0).all()
    assert (np.diff(n_steps, axis=1) >= 0).all()
    for m, t, n in zip(memory.ravel(), time.ravel(), n_steps.ravel().tolist(), strict=True):
        assert not feasible(limited(problem, m, t), way.options(n))
        assert n + 1 == len(way.value) or feasible(limited(problem, m, t), way.options(n + 1))
    assert path(problem.value, problem.memory + 1, problem.time, (1.0, 1.0)).within(1.0, 1.0) == -1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("value", np.full((2, 2), np.nan)),
        ("value", np.ones(2)),
        ("memory", -np.ones((2, 2))),
        ("time", np.ones((2, 3))),
        ("memory_limit", np.inf),
        ("time_limit", -1.0),
        ("allowed", np.array([[True, True], [False, False]])),
        ("allowed", np.ones((2, 2))),
    ],
)
def test_malformed_problems_are_refused(name: str, wrong: object) -> None:
    good = {x: np.ones((2, 2)) for x in ("value", "memory", "time")}
    fields: dict[str, Any] = {
        **good,
        "memory_limit": 1.0,
        "time_limit": 1.0,
        "allowed": np.ones((2, 2), dtype=bool),
        name: wrong,
    }
    with pytest.raises(ValueError, match=name if name != "value" else "value|memory"):
        Problem(**fields)
