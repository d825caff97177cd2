"""Canonical form: the same product, one representation, the best part first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import adapters
from protocol.adapters import F64, Factors, Stack, Stacks, canonical, cut_energy, principal, truncate


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
    cut = principal(f.b, f.a, 2)
    assert cut.energy == pytest.approx(f.norm() ** 2, rel=1e-6)
    assert cut.energy - cut.dropped_energy == pytest.approx(cut.to_factors().norm() ** 2, rel=1e-6)


@given(st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 6), st.integers(0, 2**32)))
def test_a_tall_side_in_blocks_has_the_same_components(size: tuple[int, int, int, int]) -> None:
    d_out, d_in, rank, seed = size
    f = factors(np.random.default_rng(seed), d_out, d_in, rank)
    whole = canonical(f)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "QR_ROWS", 4)
        blocks = canonical(f)
    assert blocks.rank == whole.rank
    assert np.allclose(dense(blocks), dense(f), atol=1e-6 * f.norm(), rtol=0)
    assert np.allclose(blocks.b.T @ blocks.b, whole.b.T @ whole.b, atol=1e-6 * f.norm(), rtol=0)


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-5, 1e-9, 1e-15, 0.0])
def test_components_are_exact_however_much_columns_depend_on_each_other(ratio: float) -> None:
    rng = np.random.default_rng(10)
    shared, own = rng.normal(size=(300, 4)), rng.normal(size=(300, 20))
    b = shared @ rng.normal(size=(4, 20)) + ratio * own
    a = rng.normal(size=(20, 200)) + rng.normal(size=(20, 1)) * rng.normal(size=200)
    u, s, vt = np.linalg.svd(b @ a)
    found = principal(b, a, 3)
    assert np.allclose(found.singular[:20], s[:20], atol=1e-10 * s[0], rtol=0)
    assert np.allclose(found.b @ found.a, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-9 * s[0], rtol=0)
    assert np.allclose(found.b.T @ found.b, np.diag(s[:3]), atol=1e-9 * s[0], rtol=0)


def test_dependent_columns_are_found_before_they_are_used() -> None:
    b = np.random.default_rng(11).normal(size=(300, 20))
    assert adapters._qr_by_cholesky(b)
    assert adapters._qr_by_cholesky(b.astype(np.float32))
    for dependent in (b[:, :1] + 1e-5 * b[:, 1:2], b[:, :1], 0 * b[:, :1], b[:, :1] + np.inf, b[:, :1] * np.nan):
        with np.errstate(all="ignore"):
            assert not adapters._qr_by_cholesky(np.hstack([b, dependent]))
    assert not adapters._qr_by_cholesky(b.T.copy())


def test_long_columns_hide_no_short_ones() -> None:
    rng = np.random.default_rng(12)
    b, a, lengths = rng.normal(size=(300, 20)), rng.normal(size=(20, 200)), np.logspace(-15, 15, 20)
    even, uneven = principal(b, a, 20), principal(b * lengths, a / lengths[:, None], 20)
    assert np.allclose(uneven.b @ uneven.a, even.b @ even.a, atol=1e-9 * even.singular[0], rtol=0)
    scaled = principal(b, a / lengths[:, None], 20, scale=lengths)
    assert np.allclose(scaled.b @ scaled.a, even.b @ even.a, atol=1e-9 * even.singular[0], rtol=0)


def test_blocks_are_as_exact_where_a_side_is_nearly_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "QR_ROWS", 16)
    f = factors(np.random.default_rng(8), 800, 430, 12)
    near = Factors(np.vstack([f.a, f.a + np.float32(1e-6) * f.a[::-1]]), np.hstack([f.b, f.b]))
    cut = principal(near.b, near.a, 12)
    assert np.allclose(cut.b.T @ cut.b, np.diag(cut.singular[:12]), atol=1e-12 * cut.singular[0], rtol=0)
    assert cut.dropped_energy < 1e-9 * cut.energy
    assert np.allclose(cut.b @ cut.a, dense(near), atol=1e-4)


def test_stacks_are_an_adapter_and_keep_what_is_in_order() -> None:
    rng = np.random.default_rng(9)
    adapter = {name: factors(rng, *size) for name, size in {"c": (4, 3, 2), "a": (4, 3, 2), "b": (5, 3, 1)}.items()}
    found = Stacks.of(adapter)
    assert [list(names) for names, _ in found.runs] == [["a"], ["b"], ["c"]]
    assert (list(found), len(found), found.ranks) == (["a", "b", "c"], 3, {"a": 2, "b": 1, "c": 2})
    assert all(np.array_equal(dense(found[name]), dense(f)) for name, f in adapter.items())
    assert Stacks.of(found) is found
    mixed = Stacks([(["a", "c"], Stack.of([adapter["a"], adapter["c"]])), (["b"], Stack.of([adapter["b"]]))])
    assert list(Stacks.of(mixed)) == ["a", "b", "c"]
    assert all(np.array_equal(dense(Stacks.of(mixed)[name]), dense(f)) for name, f in adapter.items())
    with pytest.raises(KeyError):
        found["d"]


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
