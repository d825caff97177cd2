"""The laws of aggregation, for every registered aggregator, and what is special about sums in product space."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import aggregators
from coordinator.aggregators import Weighted
from coordinator.aggregators.product import Product
from protocol import methods
from protocol.adapters import FEW_VALUES, Adapter, Factors, canonical
from protocol.errors import BadConfig, BadUpdate
from protocol.updates import LoraUpdate, write_update
from tests.coordinator.sums import (
    SHAPES,
    InMemory,
    assert_same,
    bits,
    dense,
    make_adapter,
    make_factors,
    make_fleet,
    reference,
    seeds,
)

EVERY = pytest.mark.parametrize("name", aggregators.BUILT_IN)
BEST_CUT = pytest.mark.parametrize("name", ["product", "redistribute"])

# ------------------------------------------------------------------------------------- laws, for every aggregator


@EVERY
@settings(max_examples=25)
@given(seed=seeds, order=st.permutations(range(5)))
def test_any_order_of_arrival_gives_the_same_bits(name: str, seed: int, order: list[int]) -> None:
    rng = np.random.default_rng(seed)
    model, fleet = make_adapter(rng), make_fleet(rng, 5)
    aggregate = aggregators.load(name).aggregate
    expected = aggregate(model, fleet, max_rank=6)
    found = aggregate(dict(reversed(model.items())), [fleet[i] for i in order], max_rank=6)
    assert bits(found.adapter) == bits(expected.adapter)
    assert found.dropped_ratio == expected.dropped_ratio


@EVERY
@settings(max_examples=25)
@given(seed=seeds, factor=st.floats(1e-6, 1e6))
def test_a_common_factor_of_the_weights_changes_nothing(name: str, seed: int, factor: float) -> None:
    rng = np.random.default_rng(seed)
    model, fleet = make_adapter(rng), make_fleet(rng, 3)
    aggregate = aggregators.load(name).aggregate
    scaled = [Weighted(u.agent, u.round, u.weight * factor, u.update) for u in fleet]
    expected = aggregate(model, fleet, max_rank=64).adapter
    assert_same(aggregate(model, scaled, max_rank=64).adapter, dense(expected))


@EVERY
@settings(max_examples=25)
@given(seed=seeds, n_agents=st.integers(1, 6))
def test_equal_updates_are_that_update(name: str, seed: int, n_agents: int) -> None:
    rng = np.random.default_rng(seed)
    update = make_adapter(rng)
    fleet = [Weighted(f"a{i}", 1, float(rng.integers(1, 99)), InMemory(update)) for i in range(n_agents)]
    found = aggregators.load(name).aggregate({}, fleet, max_rank=8).adapter
    assert_same(found, dense(update))
    if name in {"average", "hetlora"}:
        assert {k: f.rank for k, f in found.items()} == {k: f.rank for k, f in update.items()}
    else:
        assert {k: f.rank for k, f in found.items()} == {k: min(f.rank, *f.shape) for k, f in update.items()}


@BEST_CUT
@settings(max_examples=25)
@given(seed=seeds, max_rank=st.integers(1, 8))
def test_one_agent_is_the_best_cut_of_that_agent(name: str, seed: int, max_rank: int) -> None:
    update = make_adapter(np.random.default_rng(seed))
    found = aggregators.load(name).aggregate({}, [Weighted("a", 1, 7.0, InMemory(update))], max_rank=max_rank)
    assert_same(found.adapter, dense({k: canonical(f, max_rank) for k, f in update.items()}))


@EVERY
@settings(max_examples=25)
@given(seed=seeds, exponent=st.integers(-37, 17))
def test_finite_in_finite_out(name: str, seed: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="raise"):
        scale = np.float32(10.0**exponent)
        fleet = [
            Weighted(
                u.agent,
                u.round,
                u.weight,
                InMemory({k: Factors(f.a * scale, f.b) for k, f in u.update.adapter.items()}),
            )
            for u in make_fleet(rng, 3)
            if isinstance(u.update, InMemory)
        ]
    found = aggregators.load(name).aggregate(make_adapter(rng), fleet, max_rank=4)
    assert all(np.isfinite(f.a).all() and np.isfinite(f.b).all() for f in found.adapter.values())
    assert name == "stacking" or all(
        found.adapter[k].rank <= 4 for k in found.dropped_ratio.keys() & found.adapter.keys()
    )
    assert all(0 <= ratio < 1 for ratio in found.dropped_ratio.values())


@EVERY
def test_no_updates_leave_the_model_as_it_is(name: str) -> None:
    model = make_adapter(np.random.default_rng(0))
    idle = Weighted("idle", 1, 0.0, InMemory(make_adapter(np.random.default_rng(1))))
    for updates in ([], [idle]):
        found = aggregators.load(name).aggregate(model, updates, max_rank=8)
        assert bits(found.adapter) == bits(model)


@EVERY
def test_the_inputs_are_not_changed(name: str) -> None:
    rng = np.random.default_rng(2)
    model, fleet = make_adapter(rng), make_fleet(rng, 3)
    before = bits(model)
    aggregators.load(name).aggregate(model, fleet, max_rank=3)
    assert bits(model) == before


# ----------------------------------------------------------------------------------------- sums in product space


@given(seed=seeds, n_agents=st.integers(1, 8), max_rank=st.integers(1, 40), server_lr=st.sampled_from([1.0, 0.3, 2.0]))
def test_the_sum_is_the_dense_one_over_mixed_ranks_and_mixed_matrices(
    seed: int, n_agents: int, max_rank: int, server_lr: float
) -> None:
    rng = np.random.default_rng(seed)
    model, fleet = make_adapter(rng), make_fleet(rng, n_agents)
    found = Product().aggregate(model, fleet, max_rank=max_rank, server_lr=server_lr)
    expected = reference(model, fleet, max_rank, server_lr)
    # A cut between two nearly equal singular values may take either: compare the distance to the whole sum instead.
    whole = reference(model, fleet, 64, server_lr)
    for name, matrix in whole.items():
        best = np.linalg.norm(matrix - expected[name])
        ours = np.linalg.norm(matrix - dense(found.adapter).get(name, 0.0))
        assert abs(ours - best) <= 1e-5 * np.linalg.norm(matrix)
        if name in found.dropped_ratio:
            ratio = (best / np.linalg.norm(matrix)) ** 2
            assert found.dropped_ratio[name] == pytest.approx(ratio, rel=1e-4, abs=1e-10)
    if max_rank == 40:
        assert_same(found.adapter, whole)


def test_nothing_is_lost_when_there_are_more_components_than_dimensions() -> None:
    rng = np.random.default_rng(5)
    fleet = [Weighted(f"a{i}", 1, 1.0 + i, InMemory({"tiny": make_factors(rng, "tiny", 9)})) for i in range(30)]
    found = Product().aggregate({}, fleet, max_rank=16)
    assert found.adapter["tiny"].rank == 3
    assert_same(found.adapter, reference({}, fleet, 16, 1.0))


def test_a_matrix_is_not_diluted_by_agents_that_did_not_train_it() -> None:
    one, two = (
        Factors(np.eye(1, 5, dtype=np.float32), np.ones((3, 1), np.float32)),
        make_adapter(np.random.default_rng(1)),
    )
    two.pop("tiny", None)
    fleet = [Weighted("a", 1, 1.0, InMemory({"tiny": one})), Weighted("b", 1, 1e6, InMemory(two))]
    assert_same({"tiny": Product().aggregate({}, fleet, max_rank=8).adapter["tiny"]}, dense({"tiny": one}))


def test_a_matrix_that_nobody_trained_keeps_its_bits() -> None:
    rng = np.random.default_rng(6)
    model = {name: make_factors(rng, name, 4) for name in SHAPES}
    found = Product().aggregate(model, [Weighted("a", 1, 1.0, InMemory({"q": model["q"]}))], max_rank=8)
    assert bits(found.adapter)["up"] == bits(model)["up"]
    assert found.dropped_ratio.keys() == {"q"}


def test_updates_that_cancel_the_model_leave_nothing() -> None:
    rng = np.random.default_rng(7)
    model = {"q": make_factors(rng, "q", 4)}
    opposite = {"q": Factors(model["q"].a, -model["q"].b)}
    found = Product().aggregate(model, [Weighted("a", 1, 1.0, InMemory(opposite))], max_rank=8)
    assert not found.adapter


@pytest.mark.parametrize("stack_width", [24, 80])
def test_a_narrow_stack_is_exact_for_a_sum_of_low_rank(stack_width: int) -> None:
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(6, 16)), rng.normal(size=(24, 6))
    fleet = [
        Weighted(
            f"a{i:02}", 1, 1.0, InMemory({"q": Factors((rng.normal(size=(6, 6)) @ a).astype("f4"), b.astype("f4"))})
        )
        for i in range(40)
    ]
    wide = Product().aggregate({}, fleet, max_rank=6)
    narrow = Product(stack_width=stack_width).aggregate({}, fleet, max_rank=6)
    assert_same(narrow.adapter, dense(wide.adapter))


def test_a_narrow_stack_costs_little_on_updates_that_agree_in_part() -> None:
    rng = np.random.default_rng(9)
    shared = [rng.normal(size=(4, 40)), rng.normal(size=(40, 4))]

    def noisy() -> Factors:
        a, b = shared[0] + 0.5 * rng.normal(size=(4, 40)), shared[1] + 0.5 * rng.normal(size=(40, 4))
        return Factors(a.astype(np.float32), b.astype(np.float32))

    fleet = [Weighted(f"a{i:02}", 1, 1.0, InMemory({"m": noisy()})) for i in range(60)]
    whole = sum(dense({"m": u.update.factors("m")})["m"] for u in fleet) / 60
    errors = [
        np.linalg.norm(dense(Product(stack_width=width).aggregate({}, fleet, max_rank=4).adapter)["m"] - whole)
        for width in (1024, 24)
    ]
    assert errors[0] < errors[1] < 1.05 * errors[0]


def test_a_narrow_stack_keeps_what_grows_strong_later() -> None:
    def spike(i: int, size: float) -> Factors:
        one = np.eye(1, 9, i, dtype=np.float32)
        return Factors(one, np.float32(size) * one.T)

    early = [Weighted(f"a{i}", 1, 1.0, InMemory({"m": spike(i % 2, 1.0 - 0.1 * (i % 2))})) for i in range(8)]
    late = [Weighted("b", 1, 1.0, InMemory({"m": spike(1, 1.0)}))]
    found = Product(stack_width=4).aggregate({}, early + late, max_rank=1)
    assert_same(found.adapter, {"m": np.diag([0, 4.6 / 9, 0, 0, 0, 0, 0, 0, 0])})


def test_a_stack_narrower_than_what_is_kept_is_cut_to_that() -> None:
    rng = np.random.default_rng(12)
    fleet = [Weighted(f"a{i}", 1, 1.0, InMemory({"q": make_factors(rng, "q", 3)})) for i in range(6)]
    found, expected = (Product(stack_width=width).aggregate({}, fleet, max_rank=9) for width in (2, 1024))
    assert found.adapter["q"].rank == 9
    assert_same(found.adapter, dense(expected.adapter), relative=1.0)


def test_a_sum_beyond_float32_names_the_matrix_and_the_agent() -> None:
    huge = Factors(np.full((1, 5), 3e38, np.float32), np.full((3, 1), 3e38, np.float32))
    small = Factors(np.ones((1, 5), np.float32), np.ones((3, 1), np.float32))
    fleet = [Weighted("good", 1, 1.0, InMemory({"tiny": small})), Weighted("bad", 1, 1.0, InMemory({"tiny": huge}))]
    with pytest.raises(BadUpdate, match=r"'tiny' leaves float32's range: drop bad's"):
        Product().aggregate({}, fleet, max_rank=2, server_lr=10)


def test_two_updates_of_one_agent_and_round_and_impossible_weights_are_our_mistake() -> None:
    update = InMemory(make_adapter(np.random.default_rng(0)))
    with pytest.raises(ValueError, match="two updates"):
        Product().aggregate({}, [Weighted("a", 1, 1.0, update), Weighted("a", 1, 2.0, update)], max_rank=2)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            Product().aggregate({}, [Weighted("a", 1, weight, update)], max_rank=2)


def test_updates_are_summed_from_their_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    fleet = make_fleet(rng, 4)
    on_disk = []
    for u in fleet:
        assert isinstance(u.update, InMemory)
        path = tmp_path / f"{u.agent}.{u.round}"
        write_update(path, u.update.adapter, job="j", round=u.round, attempt=0, dtype="fp32")
        on_disk.append(Weighted(u.agent, u.round, u.weight, LoraUpdate.open(path, max_bytes=10**6)))
    model = make_adapter(rng)
    expected = Product().aggregate(model, fleet, max_rank=8)
    assert bits(Product().aggregate(model, on_disk, max_rank=8).adapter) == bits(expected.adapter)


# -------------------------------------------------------------------------------------------- published baselines


def weighted(*adapters: Adapter, weights: Sequence[float] = (1.0, 3.0)) -> list[Weighted]:
    return [Weighted(f"a{i}", 1, weights[i], InMemory(adapter)) for i, adapter in enumerate(adapters)]


def test_factors_are_averaged_apart_and_padded_with_zeros() -> None:
    rng = np.random.default_rng(20)
    small, large = make_factors(rng, "q", 2), make_factors(rng, "q", 5)
    found = aggregators.load("average").aggregate({}, weighted({"q": small}, {"q": large}), max_rank=8).adapter["q"]
    np.testing.assert_allclose(found.a[:2], 0.25 * small.a + 0.75 * large.a[:2], rtol=1e-6)
    np.testing.assert_allclose(found.a[2:], 0.75 * large.a[2:], rtol=1e-6)
    np.testing.assert_allclose(found.b[:, :2], 0.25 * small.b + 0.75 * large.b[:, :2], rtol=1e-5)
    np.testing.assert_allclose(found.b[:, 2:], 0.75 * large.b[:, 2:], rtol=1e-6)


def test_the_sparsity_weights_of_hetlora_are_the_norms() -> None:
    one, three = (
        Factors(np.eye(1, 5, dtype="f4"), np.ones((3, 1), "f4")),
        Factors(np.eye(1, 5, dtype="f4"), 3 * np.ones((3, 1), "f4")),
    )
    fleet = weighted({"tiny": one}, {"tiny": three}, weights=(1.0, 1.0))
    found = aggregators.load("hetlora").aggregate({}, fleet, max_rank=8).adapter["tiny"]
    np.testing.assert_allclose(found.b, np.full((3, 1), 0.25 * 1 + 0.75 * 3), rtol=1e-6)
    still = {"tiny": Factors(one.a, 0 * one.b)}
    found = aggregators.load("hetlora").aggregate({}, weighted(still, still), max_rank=8).adapter["tiny"]
    np.testing.assert_array_equal(found.a, one.a)  # before anything has moved the samples decide


def test_a_shared_a_makes_the_average_exact_in_the_product() -> None:
    rng = np.random.default_rng(21)
    a = rng.normal(size=(4, 16)).astype(np.float32)
    given = [{"q": Factors(a, rng.normal(size=(24, 4)).astype(np.float32))} for _ in range(2)]
    found = aggregators.load("average").aggregate({}, weighted(*given), max_rank=8).adapter
    assert_same(found, reference({}, weighted(*given), 64, 1.0))
    np.testing.assert_array_equal(found["q"].a, a)


@settings(max_examples=25)
@given(seed=seeds, max_rank=st.integers(1, 8))
def test_redistribution_is_the_best_cut_of_the_mean_without_the_model(seed: int, max_rank: int) -> None:
    rng = np.random.default_rng(seed)
    model, fleet = make_adapter(rng, share=1.0), make_fleet(rng, 3)
    found = aggregators.load("redistribute").aggregate(model, fleet, max_rank=max_rank)
    expected = Product().aggregate({}, fleet, max_rank=max_rank)
    assert_same({k: found.adapter[k] for k in expected.adapter}, dense(expected.adapter))
    for name in expected.adapter:
        rows = found.adapter[name].a
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)


@pytest.mark.parametrize("name", ["average", "redistribute"])
def test_values_replace_the_model_and_a_server_rate_goes_part_of_the_way(name: str) -> None:
    rng = np.random.default_rng(22)
    a = rng.normal(size=(2, 16)).astype(np.float32)
    old, new = ({"q": Factors(a, rng.normal(size=(24, 2)).astype(np.float32))} for _ in range(2))
    fleet = weighted(new, weights=[5.0])
    aggregate = aggregators.load(name).aggregate
    assert_same(aggregate(old, fleet, max_rank=8).adapter, dense(new))
    half = aggregate(old, fleet, max_rank=8, server_lr=0.5).adapter
    assert_same(half, {"q": 0.5 * dense(old)["q"] + 0.5 * dense(new)["q"]})


def test_stacking_keeps_all_that_max_rank_would_cut() -> None:
    rng = np.random.default_rng(23)
    model, fleet = make_adapter(rng), make_fleet(rng, 6)
    found = aggregators.load("stacking").aggregate(model, fleet, max_rank=1)
    assert_same(found.adapter, reference(model, fleet, 64, 1.0))
    assert not any(found.dropped_ratio.values())


def test_a_mean_beyond_float32_is_refused() -> None:
    huge = {"tiny": Factors(np.full((1, 5), 3e38, np.float32), np.full((3, 1), 3e38, np.float32))}
    for name in ("average", "redistribute", "stacking"):
        with pytest.raises(BadUpdate, match=r"'tiny' leaves float32's range"):
            aggregators.load(name).aggregate({}, weighted(huge, weights=[1.0]), max_rank=2, server_lr=10)


# ----------------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("method", methods.BUILT_IN)
def test_every_built_in_method_fits_its_aggregator(method: str) -> None:
    found = methods.load(method)
    aggregators.fits(found.kind, aggregators.load(found.aggregator))


def test_another_kind_of_update_is_refused_before_a_job_starts() -> None:
    with pytest.raises(BadConfig, match="Product sums updates of kind 'lora', the trainer sends 'scalars'"):
        aggregators.fits("scalars", Product())


@pytest.mark.parametrize("name", ["no-such", "coordinator.aggregators.product", "os:system", ""])
def test_a_name_is_never_an_import_path(name: str) -> None:
    with pytest.raises(BadConfig, match=r"is not in fedpipe\.aggregators"):
        aggregators.load(name)


def test_an_allowed_entry_point_is_loaded_and_must_be_an_aggregator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outside_sums-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-sums\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[fedpipe.aggregators]\nkeep = outside_sums:Keep\nbad = outside_sums:bad\n"
    )
    (tmp_path / "outside_sums.py").write_text(
        "from coordinator.aggregators import Aggregate\n\n\nclass Keep:\n    accepts = 'lora'\n\n"
        "    def aggregate(self, model, updates, *, max_rank, server_lr=1.0):\n        return Aggregate(model, {})\n"
        "\n\nbad = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = make_adapter(np.random.default_rng(0))
    assert aggregators.load("keep", allowed=["keep"]).aggregate(model, [], max_rank=2).adapter is model
    with pytest.raises(BadConfig, match=r"is not in"):
        aggregators.load("keep")
    with pytest.raises(BadConfig, match="no class"):
        aggregators.load("bad", allowed=["bad"])


def test_a_matrix_that_is_averaged_in_parts_is_averaged_as_a_whole(tmp_path: Path) -> None:
    rng, (d_out, d_in), ranks, weights = np.random.default_rng(5), (9001, 9007), (8, 5, 9), (1.0, 2.0, 4.0)
    assert min(ranks) * (d_out + d_in) < FEW_VALUES < max(ranks) * (d_out + d_in)
    found = [Factors(rng.random((r, d_in), np.float32), rng.random((d_out, r), np.float32)) for r in ranks]
    fleet = []
    for i, (factors, weight) in enumerate(zip(found, weights, strict=True)):
        write_update(tmp_path / f"{i}", {"m": factors}, job="j", round=1, attempt=0, dtype="fp32", kind="lora-values")
        fleet.append(Weighted(f"a{i}", 1, weight, LoraUpdate.open(tmp_path / f"{i}", max_bytes=10**9)))
    a, b = np.zeros((9, d_in)), np.zeros((d_out, 9))
    for factors, weight in zip(found, weights, strict=True):
        a[: factors.rank] += weight / 7 * factors.a.astype(np.float64)
        b[:, : factors.rank] += weight / 7 * factors.b.astype(np.float64)
    mean = aggregators.load("average").aggregate({}, fleet, max_rank=9).adapter["m"]
    assert np.array_equal(mean.a, a.astype(np.float32))
    assert np.array_equal(mean.b, b.astype(np.float32))
