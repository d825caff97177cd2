"""Sums of more columns than are done exactly: nearly the exact components, whatever the noise, and the same bits in any order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from coordinator.aggregators import Weighted, krylov, product
from coordinator.aggregators.product import EXACT_WIDTH, Product
from protocol.adapters import F64, Adapter, Factors, canonical
from protocol.errors import BadUpdate
from tests.coordinator.sums import InMemory, assert_same, bits, dense, reference


def crowd(seed: int, noise: float, n_agents: int = 60) -> tuple[Adapter, list[Weighted]]:
    """Agents that share a signal of 48 components and add as much noise of their own as said, and a small model."""
    rng = np.random.default_rng(seed)
    shared = [np.linalg.qr(rng.normal(size=(d, 48)))[0] for d in (96, 128)]

    def drawn(rank: int) -> Factors:
        mixture = rng.normal(size=(48, rank)) / np.sqrt(rank)
        b, a = shared[0] * 0.9 ** np.arange(48) @ mixture, (shared[1] @ mixture).T
        own = [noise * rng.normal(size=side.shape) / 5 for side in (b, a)]
        return Factors((a + own[1]).astype(np.float32), (b + own[0]).astype(np.float32))

    ranks = [4, 8, 16]
    fleet = [Weighted(f"a{i}", 1, 50.0 + i, InMemory({"m": drawn(ranks[i % 3])})) for i in range(n_agents)]
    assert sum(u.update.ranks["m"] for u in fleet) > EXACT_WIDTH
    old = drawn(8)
    return {"m": Factors(old.a, old.b / np.float32(10))}, fleet


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(2))
def test_the_components_of_a_large_fleet_are_the_exact_ones_to_a_thousandth(seed: int, noise: float) -> None:
    model, fleet = crowd(seed, noise)
    found = Product().aggregate(model, fleet, max_rank=8, server_lr=0.7)
    expected, whole = (reference(model, fleet, rank, 0.7)["m"] for rank in (8, 96))
    assert_same(found.adapter, {"m": expected}, relative=1e-3)
    dropped = (np.linalg.norm(whole - expected) / np.linalg.norm(whole)) ** 2
    assert found.dropped_ratio["m"] == pytest.approx(dropped, rel=0.1)
    assert_same({"m": canonical(found.adapter["m"])}, dense(found.adapter))
    for one, other in zip(
        np.linalg.svd(dense(found.adapter)["m"])[1], np.diag(gram(found.adapter["m"].b)), strict=False
    ):
        assert other == pytest.approx(one, rel=1e-4)


def gram(b: npt.NDArray[np.float32]) -> F64:
    return b.T.astype(np.float64) @ b


def test_noise_alone_is_cut_nearly_as_well_as_it_can_be() -> None:
    rng = np.random.default_rng(3)
    fleet = [
        Weighted(
            f"a{i}", 1, 1.0, InMemory({"m": Factors(*(rng.normal(size=s).astype("f4") for s in [(8, 128), (96, 8)]))})
        )
        for i in range(80)
    ]
    expected, whole = (reference({}, fleet, rank, 1.0)["m"] for rank in (8, 96))
    ours = np.linalg.norm(whole - dense(Product().aggregate({}, fleet, max_rank=8).adapter)["m"])
    assert ours <= np.linalg.norm(whole - expected) + 1e-3 * np.linalg.norm(whole)


def test_a_large_fleet_gives_the_same_bits_in_any_order_beside_anything_and_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, fleet = crowd(4, 0.5)
    two = [
        Weighted(u.agent, 1, u.weight, InMemory({"m": u.update.factors("m"), "n": u.update.factors("m")}))
        for u in fleet
    ]
    expected = Product().aggregate(model, two, max_rank=8)
    order = np.random.default_rng(0).permutation(len(two))
    for n_workers, held_bytes in [(1, krylov.HELD_BYTES), (2, 0), (1, 150_000)]:
        monkeypatch.setattr(product, "_N_WORKERS", n_workers)
        monkeypatch.setattr(product, "_LARGE_VALUES", 0)
        monkeypatch.setattr(krylov, "HELD_BYTES", held_bytes)
        found = Product().aggregate(model, [two[i] for i in order], max_rank=8)
        assert bits(found.adapter) == bits(expected.adapter)
        assert found.dropped_ratio == expected.dropped_ratio


@pytest.mark.parametrize("stack_width", [8, 1024])
def test_a_sum_beyond_the_range_names_who_is_to_blame(stack_width: int) -> None:
    sides = np.full((4, 40), 3e38, np.float32), np.full((30, 4), 3e38, np.float32)
    fleet = [Weighted(f"a{i}", 1, 1.0, InMemory({"m": Factors(*sides)})) for i in range(10)]
    with pytest.raises(BadUpdate, match="leaves float32's range: drop a0's"):
        Product(stack_width=stack_width).aggregate({}, fleet, max_rank=4)
    less = [Weighted(f"a{i}", 1, 1.0, InMemory({"m": Factors(sides[0] / 2, sides[1] / 2)})) for i in range(10)]
    found = Product(stack_width=stack_width).aggregate({}, less, max_rank=4).adapter
    assert found["m"].norm() == pytest.approx(Factors(sides[0] / 2, sides[1] / 2).norm(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("n_agents", [10, 200])
def test_what_cannot_be_decomposed_is_an_update_s_fault(n_agents: int) -> None:
    sides = np.full((4, 128), np.nan, np.float32), np.ones((96, 4), np.float32)
    fleet = [Weighted(f"a{i}", 1, 1.0, InMemory({"m": Factors(*sides)})) for i in range(n_agents)]
    with pytest.raises(BadUpdate, match="'m'"):
        Product().aggregate({}, fleet, max_rank=4)


def test_how_a_fold_is_spread_follows_from_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_LARGE_VALUES", 0)
    _, fleet = crowd(9, 0.5)
    with ThreadPoolExecutor() as workers:
        assert product._ways(fleet, workers) == (workers.map, map)  # the first one's rank is 4
        assert product._ways(fleet[:10], workers) == (map, workers.map)


def test_a_large_fleet_that_agrees_has_no_more_components_than_one_agent() -> None:
    rng = np.random.default_rng(5)
    one = Factors(rng.normal(size=(3, 128)).astype(np.float32), rng.normal(size=(96, 3)).astype(np.float32))
    fleet = [Weighted(f"a{i}", 1, 1.0 + i, InMemory({"m": one})) for i in range(200)]
    found = Product().aggregate({}, fleet, max_rank=8)
    assert_same(found.adapter, dense({"m": one}))
    assert found.adapter["m"].rank == 3
    assert found.dropped_ratio["m"] < 1e-6
    nothing = [Weighted(u.agent, 1, 1.0, InMemory({"m": Factors(0 * one.a, one.b)})) for u in fleet]
    assert not Product().aggregate({}, nothing, max_rank=8).adapter


def test_a_large_fleet_that_cancels_the_model_leaves_nothing() -> None:
    _, fleet = crowd(8, 0.0)
    fleet = [Weighted(u.agent, 1, 1.0, u.update) for u in fleet]
    opposite = [
        Weighted(f"b{u.agent}", 1, 1.0, InMemory({"m": Factors(-f.a, f.b)}))
        for u, f in ((u, u.update.factors("m")) for u in fleet)
    ]
    assert not Product().aggregate({}, fleet + opposite, max_rank=8).adapter


@pytest.mark.parametrize("exponent", [-37, -20, 17, 36])
def test_a_large_fleet_stays_in_range(exponent: int) -> None:
    _, fleet = crowd(6, 0.5)
    scale = np.float32(10.0**exponent)
    extreme = [
        Weighted(u.agent, 1, u.weight, InMemory({"m": Factors(f.a * scale, f.b)}))
        for u, f in ((u, u.update.factors("m")) for u in fleet)
    ]
    found = Product().aggregate({}, extreme, max_rank=8).adapter["m"]
    expected = Product().aggregate({}, fleet, max_rank=8).adapter
    assert_same({"m": Factors(found.a / np.sqrt(scale), found.b / np.sqrt(scale))}, dense(expected), relative=1e-3)


def test_an_update_that_cannot_be_read_ends_the_aggregation() -> None:
    class Damaged(InMemory):
        def factors(self, name: str) -> Factors:
            raise BadUpdate(f"record of matrix {name!r} is damaged")

    _, fleet = crowd(7, 0.5)
    broken = Weighted("b", 1, 1.0, Damaged({"m": fleet[0].update.factors("m")}))
    with pytest.raises(BadUpdate, match="damaged"):
        Product().aggregate({}, [*fleet, broken], max_rank=8)
