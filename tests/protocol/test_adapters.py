"""Canonical form: the same product, one representation, the best part first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.adapters import F64, Factors, canonical, cut_energy, principal, truncate


def factors(rng: np.random.Generator, d_out: int, d_in: int, rank: int) -> Factors:
    a = rng.normal(size=(rank, d_in)).astype(np.float32)
    return Factors(a, rng.normal(size=(d_out, rank)).astype(np.float32))


def dense(f: Factors) -> F64:
    return f.b.astype(np.float64) @ f.a.astype(np.float64)


sizes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 30), st.integers(0, 2**32))


@given(sizes)
def test_the_product_stays_and_the_factors_are_balanced_and_ordered(size: tuple[int, int, int, int]) -> None:
    d_out, d_in, rank, seed = size
    f = factors(np.random.default_rng(seed), d_out, d_in, rank)
    c = canonical(f)
    assert c.shape == f.shape
    assert c.rank <= min(size[:3])
    assert np.allclose(dense(c), dense(f), atol=1e-5 * f.norm(), rtol=0)
    gram_a, gram_b = c.a @ c.a.T, c.b.T @ c.b
    singular = np.linalg.svd(dense(f), compute_uv=False)[: c.rank]
    assert np.allclose(gram_a, np.diag(singular), atol=1e-5 * f.norm(), rtol=0)
    assert np.allclose(gram_b, np.diag(singular), atol=1e-5 * f.norm(), rtol=0)


@given(sizes)
def test_the_first_components_are_the_best_approximation(size: tuple[int, int, int, int]) -> None:
    d_out, d_in, rank, seed = size
    f = factors(np.random.default_rng(seed), d_out, d_in, rank)
    u, s, vt = np.linalg.svd(dense(f), full_matrices=False)
    for kept in (0, 1, 3):
        best = np.linalg.norm(dense(f) - (u[:, :kept] * s[:kept]) @ vt[:kept])
        for cut in (truncate(canonical(f), kept), canonical(f, kept)):
            assert cut.rank <= kept
            assert np.linalg.norm(dense(f) - dense(cut)) == pytest.approx(best, rel=1e-5, abs=1e-5 * f.norm())


def test_the_sign_is_the_same_for_every_representation_of_a_product() -> None:
    rng = np.random.default_rng(3)
    f = factors(rng, 12, 9, 4)
    mix = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    other = Factors((mix.T @ f.a).astype(np.float32), (f.b @ mix).astype(np.float32))
    flipped = Factors(-f.a, -f.b)
    for g in (other, flipped):
        assert np.allclose(canonical(g).a, canonical(f).a, atol=1e-5)
        assert np.allclose(canonical(g).b, canonical(f).b, atol=1e-5)
    peak = np.abs(canonical(f).b).argmax(axis=0)
    assert (canonical(f).b[peak, np.arange(4)] > 0).all()


def test_the_same_input_gives_the_same_bits() -> None:
    f = factors(np.random.default_rng(4), 33, 21, 8)
    assert canonical(f).b.tobytes() == canonical(Factors(f.a.copy(), f.b.copy())).b.tobytes()


def test_components_below_float32_are_dropped() -> None:
    f = factors(np.random.default_rng(5), 16, 16, 3)
    doubled = Factors(np.vstack([f.a, f.a]), np.hstack([f.b, f.b]))
    assert canonical(doubled).rank == 3
    assert canonical(Factors(f.a, np.zeros_like(f.b))).rank == 0


def test_energy_is_split_between_what_is_kept_and_what_is_dropped() -> None:
    f = factors(np.random.default_rng(6), 16, 12, 5)
    cut = principal(f.b.astype(np.float64), f.a.astype(np.float64), 2)
    assert cut.energy == pytest.approx(f.norm() ** 2, rel=1e-6)
    assert cut.energy - cut.dropped_energy == pytest.approx(cut.to_factors().norm() ** 2, rel=1e-6)


def test_norm_needs_no_dense_product() -> None:
    f = factors(np.random.default_rng(7), 14, 11, 6)
    assert f.norm() == pytest.approx(np.linalg.norm(dense(f)), rel=1e-6)
    assert Factors(f.a[:0], f.b[:, :0]).norm() == 0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)),
        (np.zeros(3, np.float32), np.zeros((4, 3), np.float32)),
        (np.zeros((2, 3)), np.zeros((4, 2))),
    ],
)
def test_factors_that_do_not_multiply_or_are_not_float32_cannot_be_made(a: Any, b: Any) -> None:
    with pytest.raises(ValueError, match=r"multiply|float32"):
        Factors(a, b)


@pytest.mark.parametrize("kept_ratio", [0.5, 0.9, 0.99])
def test_a_cut_keeps_the_fewest_components_that_hold_the_energy(kept_ratio: float) -> None:
    rng = np.random.default_rng(1)
    whole = canonical(
        Factors(
            rng.standard_normal((8, 30), dtype=np.float32),
            rng.standard_normal((20, 8), dtype=np.float32) * np.geomspace(1, 0.01, 8, dtype=np.float32),
        )
    )
    cut = cut_energy(whole, kept_ratio)
    assert cut.norm() ** 2 >= kept_ratio * whole.norm() ** 2 * (1 - 1e-5)
    assert truncate(whole, cut.rank - 1).norm() ** 2 < kept_ratio * whole.norm() ** 2
    assert np.allclose(cut.b @ cut.a, truncate(whole, cut.rank).b @ truncate(whole, cut.rank).a, atol=1e-5)


def test_a_cut_at_one_is_none_and_of_nothing_is_nothing() -> None:
    factors = Factors(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    assert cut_energy(factors, 1.0) is factors
    assert cut_energy(Factors(np.ones((2, 3), np.float32), np.zeros((4, 2), np.float32)), 0.9).rank == 0
