"""The cost model: recovers what made the points, bears noise, is affine where the knapsack needs it, and grows with work."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planner.cost import CostModel, Setting, Width, fit, shape_of
from protocol.messages import Calibrated, Dimensions, Matrix, Point, Shape, Surveyed

L, H, F, KV, V = 4, 256, 704, 64, 1000
SHAPES = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (KV, H),
    "self_attn.v_proj": (KV, H),
    "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (F, H),
    "mlp.up_proj": (F, H),
    "mlp.down_proj": (H, F),
}
SURVEYED = Surveyed(
    base_sha256="0" * 64,
    matrices=[
        Matrix(name=f"model.layers.{layer}.{name}", d_out=d_out, d_in=d_in)
        for layer in range(L)
        for name, (d_out, d_in) in SHAPES.items()
    ],
    n_train=100,
    n_eval=10,
    dimensions=Dimensions(hidden=H, mlp=F, key_value=KV, vocabulary=V, n_layers=L, n_other=2 * V * H),
)
NAMES = [m.name for m in SURVEYED.matrices]
WIDTH = Width(
    time=np.array([2e-3, 3e-11, 4e-11, 6e-5, 1.5e-9, 1e-10, 3e-9]),
    memory=np.array([0.8, 1.3, 1.6, 1.1, 1.4]),
)
TRUE = CostModel(SURVEYED, "bf16", {"nf4": WIDTH, "none": WIDTH})
GRID = [  # tokens, rank, skip, frozen rank, checkpointing: as agent/trainers/benchmark.py runs them
    (60, 8, 0, 0, False),
    (900, 8, 0, 0, False),
    (900, 8, 0, 0, True),
    (900, 64, 0, 0, False),
    (900, 8, 2, 0, False),
    (900, 8, 0, 16, False),
    (60, 64, 0, 0, False),
    (900, 8, 2, 0, True),
]


def setting(
    tokens: float = 900, rank: int = 8, skip: int = 0, frozen: int = 0, is_checkpointed: bool = False
) -> Setting:
    ranks = {m.name: rank for m in SURVEYED.matrices if int(m.name.split(".")[2]) >= skip}
    return Setting(
        bits="nf4",
        n_tokens_mean=tokens,
        n_tokens_max=tokens,
        ranks=ranks,
        frozen=dict.fromkeys(NAMES, frozen),
        checkpointing=is_checkpointed,
        skip=skip,
    )


def points(grid: Sequence[tuple[int, int, int, int, bool]], noise: float = 0.0, seed: int = 0) -> list[Point]:
    rng, made = random.Random(seed), []
    for tokens, rank, skip, frozen, is_checkpointed in grid:
        step_s, peak = TRUE.predict(setting(tokens, rank, skip, frozen, is_checkpointed))
        made.append(
            Point(
                bits="nf4",
                batch=1,
                n_tokens=tokens,
                rank=rank,
                skip=skip,
                frozen_rank=frozen,
                checkpointing=is_checkpointed,
                step_s=step_s * rng.uniform(1 - noise, 1 + noise),
                peak_bytes=int(peak * rng.uniform(1 - noise / 3, 1 + noise / 3)),
            )
        )
    return made


def fitted(made: list[Point]) -> CostModel:
    return fit(SURVEYED, Calibrated(device="cpu", compute="bf16", probe_rank=1, scores=b"", points=made))


def others() -> list[Setting]:
    rng, made = random.Random(5), []
    for _ in range(40):
        skip = rng.choice([0, 1, 2, 3])
        ranks = {n: rng.choice([1, 4, 16, 32]) for n in NAMES if int(n.split(".")[2]) >= skip and rng.random() < 0.7}
        base = setting(rng.randint(100, 2000), skip=skip, frozen=rng.choice([0, 8]), is_checkpointed=rng.random() < 0.3)
        made.append(base._replace(ranks=ranks))
    return made


def errors(model: CostModel) -> tuple[float, float]:
    """Median relative error of time and of memory on settings that were not measured."""
    pairs = [(model.predict(s), TRUE.predict(s)) for s in others()]
    time = np.median([abs(found[0] / true[0] - 1) for found, true in pairs])
    return float(time), float(np.median([abs(found[1] / true[1] - 1) for found, true in pairs]))


def test_it_recovers_what_made_the_points() -> None:
    model = fitted(points(GRID))
    for point, true in zip(GRID, points(GRID), strict=True):
        assert model.predict(setting(*point)) == pytest.approx((true.step_s, true.peak_bytes), rel=0.02)
    time, memory = errors(model)
    assert time < 0.05
    assert memory < 0.03


@pytest.mark.parametrize("seed", range(5))
def test_it_bears_noise(seed: int) -> None:
    time, memory = errors(fitted(points(GRID, noise=0.1, seed=seed)))
    assert time < 0.12
    assert memory < 0.08


def test_a_step_that_another_process_slowed_down_counts_little() -> None:
    made = points(GRID)
    slow = [
        *made[:3],
        Point(**{f: getattr(made[3], f) for f in made[3].__struct_fields__} | {"step_s": 3 * made[3].step_s}),
    ]
    time, _ = errors(fitted([*slow, *made[4:]]))
    assert time < 0.12


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_points_make_a_rough_model(n: int) -> None:
    time, memory = errors(fitted(points(GRID[:n])))
    assert time < 0.6
    assert memory < 0.35


def test_widths_without_points_have_no_model() -> None:
    model = fitted(points(GRID[:2]))
    assert model.bits == ("nf4",)
    assert fitted([]).bits == ()
    with pytest.raises(KeyError):
        model.predict(setting()._replace(bits="int8"))


def test_it_does_without_dimensions() -> None:
    surveyed = Surveyed(base_sha256="0" * 64, matrices=SURVEYED.matrices, n_train=1, n_eval=0)
    model = fit(surveyed, Calibrated(device="cpu", compute="bf16", probe_rank=1, scores=b"", points=points(GRID)))
    for point, true in zip(GRID, points(GRID), strict=True):
        assert model.predict(setting(*point)) == pytest.approx((true.step_s, true.peak_bytes), rel=0.2)


OPTIONS = (0, 1, 8, 64)


@settings(max_examples=50)
@given(
    chosen=st.lists(st.integers(0, len(OPTIONS) - 1), min_size=len(NAMES), max_size=len(NAMES)),
    tokens=st.floats(1, 5000),
    accumulation=st.integers(1, 8),
    skip=st.integers(0, L - 1),
    frozen=st.sampled_from([0, 8]),
    is_checkpointed=st.booleans(),
)
def test_predict_is_base_plus_one_entry_per_matrix(
    chosen: list[int], tokens: float, accumulation: int, skip: int, frozen: int, is_checkpointed: bool
) -> None:
    asked = setting(tokens, frozen=frozen, is_checkpointed=is_checkpointed, skip=skip)
    asked = asked._replace(
        accumulation=accumulation, ranks={n: OPTIONS[o] for n, o in zip(NAMES, chosen, strict=True) if OPTIONS[o]}
    )
    parts, rows = TRUE.marginal(asked, OPTIONS), np.arange(len(NAMES))
    assert parts.time.shape == parts.memory.shape == (len(NAMES), len(OPTIONS))
    assert (parts.time[:, 0] == 0).all()
    assert (parts.memory[:, 0] == 0).all()
    summed = (parts.base_s + parts.time[rows, chosen].sum(), parts.base_bytes + parts.memory[rows, chosen].sum())
    assert TRUE.predict(asked) == pytest.approx(summed, rel=1e-9)


def test_more_of_anything_costs_more() -> None:
    least_s, least_bytes = TRUE.predict(setting())
    for more in (
        setting(1800),
        setting(rank=16),
        setting(frozen=8),
        setting()._replace(n_tokens_mean=901, n_tokens_max=901),
    ):
        assert TRUE.predict(more)[0] > least_s
        assert TRUE.predict(more)[1] > least_bytes
    twice = TRUE.predict(setting()._replace(accumulation=2))
    assert least_s < twice[0] < 2 * least_s  # one optimizer step for both
    assert twice[1] == least_bytes
    checkpointed_s, checkpointed_bytes = TRUE.predict(setting(is_checkpointed=True))
    assert checkpointed_s > least_s
    assert checkpointed_bytes < least_bytes
    skipping_s, skipping_bytes = TRUE.predict(setting(skip=2))
    assert skipping_s < least_s
    assert skipping_bytes < least_bytes


def test_a_correction_scales_predictions() -> None:
    step_s, peak = TRUE.predict(setting())
    assert TRUE.corrected(2.0, 0.5).predict(setting()) == pytest.approx((2 * step_s, 0.5 * peak))


def test_shapes_between_and_beyond_the_measured_ones() -> None:
    shapes = [Shape(batch=8, mean_tokens=400, max_tokens=800), Shape(batch=2, mean_tokens=80, max_tokens=200)]
    found = Calibrated(device="cpu", probe_rank=1, scores=b"", shapes=shapes)
    assert shape_of(found, 8, 64) == (400, 800)
    assert shape_of(found, 5, 64) == (240, 500)
    assert shape_of(found, 16, 64) == (800, 1600)
    assert shape_of(found, 1, 64) == (40, 100)
    assert shape_of(Calibrated(device="cpu", probe_rank=1, scores=b""), 4, 64) == (256, 256)
