"""What the tests of aggregation share: updates in memory, random fleets, and the dense sum to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from coordinator.aggregators import Weighted
from protocol.adapters import ALL, F64, Adapter, Factors, Rows, Stack

SHAPES = {"q": (24, 16), "up": (40, 16), "down": (16, 40), "tiny": (3, 5)}
seeds = st.integers(0, 2**32)


@dataclass(frozen=True)
class InMemory:
    """An update that was never written to a file."""

    adapter: Adapter

    @property
    def ranks(self) -> Mapping[str, int]:
        return {name: factors.rank for name, factors in self.adapter.items()}

    def shape(self, name: str) -> tuple[int, int]:
        return self.adapter[name].shape

    def factors(self, name: str) -> Factors:
        return self.adapter[name]

    def stack(self, names: Sequence[str], rows: Rows = ALL) -> Stack:
        return Stack.of([self.adapter[name] for name in names]).rows(rows)


def make_factors(rng: np.random.Generator, name: str, rank: int) -> Factors:
    d_out, d_in = SHAPES[name]
    scale = 10.0 ** rng.uniform(-4, 2)
    a = rng.normal(size=(rank, d_in)).astype(np.float32)
    return Factors(a, (scale * rng.normal(size=(d_out, rank))).astype(np.float32))


def make_adapter(rng: np.random.Generator, max_rank: int = 8, share: float = 0.7) -> dict[str, Factors]:
    chosen = [name for name in SHAPES if rng.random() < share] or ["q"]
    return {name: make_factors(rng, name, int(rng.integers(1, max_rank + 1))) for name in chosen}


def make_fleet(rng: np.random.Generator, n_agents: int) -> list[Weighted]:
    return [
        Weighted(f"a{i // 2}", 3 + i % 2, float(rng.integers(1, 500)), InMemory(make_adapter(rng)))
        for i in range(n_agents)
    ]


def dense(adapter: Adapter) -> dict[str, F64]:
    return {name: f.b.astype(np.float64) @ f.a.astype(np.float64) for name, f in adapter.items()}


def reference(model: Adapter, updates: Sequence[Weighted], max_rank: int, server_lr: float) -> dict[str, F64]:
    """The formula as it stands, with dense matrices in float64 and a full SVD."""
    result = dense(model)
    deltas = [
        (u.weight, {name: dense({name: u.update.factors(name)})[name] for name in u.update.ranks}) for u in updates
    ]
    for name in {name for _, delta in deltas for name in delta}:
        trained = [(weight, delta[name]) for weight, delta in deltas if name in delta]
        mean = sum(weight * delta for weight, delta in trained) / sum(weight for weight, _ in trained)
        u, s, vt = np.linalg.svd(result.get(name, 0.0) + server_lr * mean, full_matrices=False)
        result[name] = (u[:, :max_rank] * s[:max_rank]) @ vt[:max_rank]
    return result


def assert_same(adapter: Adapter, expected: Mapping[str, F64], relative: float = 1e-5) -> None:
    found = dense(adapter)
    for name, matrix in expected.items():
        error = np.linalg.norm(found.get(name, 0.0) - matrix)
        assert error <= relative * np.linalg.norm(matrix), name
    assert found.keys() <= expected.keys()


def bits(adapter: Adapter) -> dict[str, tuple[bytes, bytes]]:
    return {name: (factors.a.tobytes(), factors.b.tobytes()) for name, factors in adapter.items()}
