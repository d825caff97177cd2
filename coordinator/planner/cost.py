r"""What a share of a round costs on one agent: seconds per optimizer step and peak bytes, from what the agent measured.

    step    = sum of beta_j x_j      x: counts of what a step does (passes over a block, FLOPs, numbers touched, updates)
    memory  = sum of gamma_j y_j     y: bytes by the formula of protocol/memory.py, by kind
                                     weights, interpreter and context are one constant, gamma_0

Both are affine in the ranks: for a given width, batch, accumulation, checkpointing and skip, each (matrix, rank) adds a cost
of its own, which is what the knapsack over ranks needs (`marginal`); `predict` is the sum of exactly these.

The coefficients are fitted per width of the base to the points of agent/trainers/benchmark.py by non-negative least squares
(Lawson and Hanson, 1974) on relative errors.  A weak pull towards what the counts alone say (memory: gamma = 1; time: one price
per FLOP) decides what the points leave open, so one point is enough for a rough model.  Outliers, which a busy machine makes,
count less (Huber's weights, 1964).  Form and priors are our design.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from protocol import memory
from protocol.messages import Bits, Calibrated, Point, Surveyed

F64 = npt.NDArray[np.float64]

PROCESS_BYTES: Final = 400 * 2**20
"""Interpreter and libraries, or a CUDA context: what the constant of the memory is expected to hold beside the weights."""
PULL: Final = 0.03
"""Weight of the prior: a coefficient that is twice its prior costs as much as an error of 3 % times its share of a point."""
OUTLIER: Final = 0.05
"""Relative errors beyond this count linearly instead of squared."""


class Setting(NamedTuple):
    """One way to train.  Tokens are of one micro-batch, with padding: on average (time) and at most (memory).

    ranks are those of the trained adapter and frozen those of the global one, by matrix; a matrix that is missing has none.
    No block below number `skip` has a trained matrix.
    """

    bits: Bits
    n_tokens_mean: float
    n_tokens_max: float
    ranks: Mapping[str, int] = {}
    frozen: Mapping[str, int] = {}
    accumulation: int = 1
    checkpointing: bool = False
    skip: int = 0


class Marginal(NamedTuple):
    """Costs in parts: of the step without any trained matrix, and of each matrix at each rank.

    Shapes: time and memory (K, O) for K matrices in the survey's order and O ranks; a rank of 0 costs 0.  Seconds, bytes.
    """

    base_s: float
    base_bytes: float
    time: F64
    memory: F64


class Width(NamedTuple):
    """Coefficients of one width of the base: seconds per count (7,) and bytes per byte of the formula (5,)."""

    time: F64
    memory: F64


class CostModel:
    """Predicts for one agent, for the widths that it measured: `bits`."""

    def __init__(self, surveyed: Surveyed, compute: memory.Compute, widths: Mapping[Bits, Width]) -> None:
        self._surveyed, self._compute, self._widths = surveyed, compute, dict(widths)
        self._counts = _Counts(surveyed, compute)

    @property
    def bits(self) -> tuple[Bits, ...]:
        """Widths that there is a model of, in the order in which they were measured."""
        return tuple(self._widths)

    def corrected(self, time_factor: float, memory_factor: float) -> CostModel:
        """The same model with everything scaled by what rounds have shown (coordinator/core/learning.py)."""
        widths = {bits: Width(w.time * time_factor, w.memory * memory_factor) for bits, w in self._widths.items()}
        return CostModel(self._surveyed, self._compute, widths)

    def predict(self, setting: Setting) -> tuple[float, float]:
        """Seconds of one optimizer step and peak bytes.  Raises KeyError for a width without a model."""
        counts, width = self._counts, self._widths[setting.bits]
        ranks = counts.by_matrix(setting.ranks)[:, None]
        step_s = counts.base_time(setting) @ width.time + (counts.matrix_time(setting, ranks) @ width.time).sum()
        peak = counts.base_memory(setting) @ width.memory + (counts.matrix_memory(setting, ranks) @ width.memory).sum()
        return float(step_s), float(peak)

    def marginal(self, setting: Setting, options: Sequence[int]) -> Marginal:
        """The same in parts: predict(setting with ranks) is base plus the entries of its ranks.  setting.ranks are ignored.

        Entries of blocks below setting.skip say what the matrix would cost there if the skip were lower: leave them out.
        Cost: O(K O), a millisecond for a thousand matrices.
        """
        counts, width = self._counts, self._widths[setting.bits]
        ranks = np.broadcast_to(np.asarray(options, np.float64), (counts.n_matrices, len(options)))
        return Marginal(
            base_s=float(counts.base_time(setting) @ width.time),
            base_bytes=float(counts.base_memory(setting) @ width.memory),
            time=counts.matrix_time(setting, ranks) @ width.time,
            memory=counts.matrix_memory(setting, ranks) @ width.memory,
        )


def fit(surveyed: Surveyed, calibrated: Calibrated) -> CostModel:
    """The model of one agent.  Widths without a point are not in it.  Deterministic; some milliseconds."""
    counts = _Counts(surveyed, calibrated.compute)
    by_bits: dict[Bits, list[Point]] = {}
    for point in calibrated.points:
        by_bits.setdefault(point.bits, []).append(point)
    widths = {bits: _fitted(counts, points) for bits, points in by_bits.items()}
    return CostModel(surveyed, calibrated.compute, widths)


class _Counts:
    """What a step does and keeps, counted from the model's dimensions alone.

    Time, 7 counts: passes over the blocks; FLOPs forward; FLOPs backward; passes through adapters; numbers that go in and
    out of adapters; FLOPs in adapters; trained numbers that the optimizer updates.
    Memory, 5 kinds of bytes: the constant as formula and process say; activations; activations with checkpointing; logits;
    adapters.
    """

    def __init__(self, surveyed: Surveyed, compute: memory.Compute) -> None:
        self._matrices, self._compute = surveyed.matrices, compute
        self._dims = surveyed.dimensions or memory.guessed(surveyed.matrices)
        self._index = {m.name: i for i, m in enumerate(surveyed.matrices)}
        self._d_in = np.array([m.d_in for m in surveyed.matrices], np.float64)
        self._d_out = np.array([m.d_out for m in surveyed.matrices], np.float64)
        self._block = np.array([memory.block(m.name) for m in surveyed.matrices])

    @property
    def n_matrices(self) -> int:
        return len(self._matrices)

    def by_matrix(self, ranks: Mapping[str, int]) -> F64:
        """Shape (K,)."""
        found = np.zeros(len(self._matrices))
        for name, rank in ranks.items():
            found[self._index[name]] = rank
        return found

    def base_time(self, setting: Setting) -> F64:
        """Of a step without trained matrices whose backward pass still reaches down to block `skip`.  Shape (7,)."""
        is_active = self._block >= setting.skip
        sizes = self._d_in * self._d_out
        total, active = sizes.sum(), (sizes * is_active).sum()
        head = self._dims.vocabulary * self._dims.hidden
        again = float(setting.checkpointing)
        frozen = self.by_matrix(setting.frozen)
        passes = (frozen > 0) * (1 + is_active * (1 + again))
        tokens, width = setting.n_tokens_mean, self._d_in + self._d_out
        micro = np.array(
            [
                1 + active / total * (1 + again),
                2 * tokens * (total + active * again + head),
                2 * tokens * (active + head),
                passes.sum(),
                tokens * (passes * width).sum(),
                2 * tokens * (passes * frozen * width).sum(),
                0.0,
            ]
        )
        return setting.accumulation * micro

    def matrix_time(self, setting: Setting, ranks: F64) -> F64:
        """What each trained matrix adds.  Shapes: ranks (K, O) -> (K, O, 7)."""
        passes = 3.0 + setting.checkpointing  # forward, backward to the input, backward to the factors
        tokens, width = setting.n_tokens_mean, (self._d_in + self._d_out)[:, None]
        is_on = np.sign(ranks)
        zero = np.zeros_like(ranks)
        micro = [
            zero,
            zero,
            zero,
            passes * is_on,
            tokens * passes * is_on * width,
            2 * tokens * passes * ranks * width,
        ]
        return np.stack([*(setting.accumulation * x for x in micro), ranks * width], axis=-1)

    def base_memory(self, setting: Setting) -> F64:
        """Without trained matrices; shape (5,)."""
        dims, compute = self._dims, self._compute
        saved = self._saved(setting)
        constant = (
            memory.weight_bytes(self._matrices, dims.n_other, setting.bits, compute)
            + memory.work_bytes(self._matrices, setting.bits, compute)
            + PROCESS_BYTES
        )
        kept = setting.n_tokens_max * saved.base
        frozen = memory.FROZEN_BYTES * (self.by_matrix(setting.frozen) * (self._d_in + self._d_out)).sum()
        logits = setting.n_tokens_max * memory.LOGIT_BYTES * dims.vocabulary
        return np.array([constant, *self._by_kind(setting, kept), logits, frozen])

    def matrix_memory(self, setting: Setting, ranks: F64) -> F64:
        """What each trained matrix adds.  Shapes: ranks (K, O) -> (K, O, 5)."""
        saved = self._saved(setting)
        inputs = np.array(saved.inputs)[:, None]
        kept = setting.n_tokens_max * (np.sign(ranks) * inputs + ranks * saved.per_rank)
        adapters = memory.TRAINED_BYTES * ranks * (self._d_in + self._d_out)[:, None]
        zero = np.zeros_like(ranks)
        return np.stack([zero, *self._by_kind(setting, kept), zero, adapters], axis=-1)

    def _saved(self, setting: Setting) -> memory.Saved:
        return memory.saved_per_token(
            self._dims,
            self._matrices,
            compute=self._compute,
            skip=setting.skip,
            checkpointing=setting.checkpointing,
        )

    @staticmethod
    def _by_kind(setting: Setting, kept: F64 | float) -> tuple[F64 | float, F64 | float]:
        nothing = kept * 0.0
        return (nothing, kept) if setting.checkpointing else (kept, nothing)

    def setting_of(self, point: Point) -> Setting:
        """The configuration that was run."""
        top = [m for m in self._matrices if memory.block(m.name) >= point.skip]
        return Setting(
            bits=point.bits,
            n_tokens_mean=point.n_tokens,
            n_tokens_max=max(point.n_tokens, point.max_tokens),
            ranks={m.name: min(point.rank, m.d_in, m.d_out) for m in top},
            frozen={m.name: min(point.frozen_rank, m.d_in, m.d_out) for m in self._matrices},
            checkpointing=point.checkpointing,
            skip=point.skip,
        )

    def prior_time(self, per_flop: float) -> F64:
        """Seconds per count if a FLOP costs this much.  Adapters are thin, so a FLOP in them is dearer. Shape (7,)."""
        return np.array(
            [1e-4 * self._dims.n_layers, per_flop, per_flop, 3e-5, 50 * per_flop, 3 * per_flop, 50 * per_flop]
        )


def _fitted(counts: _Counts, points: Sequence[Point]) -> Width:
    settings = [counts.setting_of(point) for point in points]
    ranks = [counts.by_matrix(setting.ranks)[:, None] for setting in settings]
    times = np.array([p.step_s for p in points])
    x = np.array(
        [counts.base_time(c) + counts.matrix_time(c, r).sum(axis=(0, 1)) for c, r in zip(settings, ranks, strict=True)]
    )
    per_flop = float((times / (x[:, 1] + x[:, 2])).min())
    y = np.array(
        [
            counts.base_memory(c) + counts.matrix_memory(c, r).sum(axis=(0, 1))
            for c, r in zip(settings, ranks, strict=True)
        ]
    )
    peaks = np.array([max(1.0, float(p.peak_bytes)) for p in points])
    return Width(
        time=_solved(x, times, counts.prior_time(per_flop), np.full(7, PULL)),
        # The constant is whatever it is: process and weights that lie in a mapped file make the formula's value a guess.
        memory=_solved(y, peaks, np.ones(5), np.array([PULL / 10, PULL, PULL, PULL, PULL])),
    )


def _solved(x: F64, y: F64, prior: F64, pull: F64) -> F64:
    """Non-negative b with x b near y in relative terms, pulled towards `prior`.

    A pull of p makes b_j at twice its prior cost as much as an error of p times the share of y that x_j prior_j explains,
    at least p / 100.  Shapes: x (n, k), y (n,), prior and pull (k,) -> (k,).
    """
    from scipy.optimize import nnls  # 50 MB, and a fleet whose jobs pin everything never fits anything

    scaled = x * prior / y[:, None]  # b relative to its prior
    shares = np.maximum(scaled.max(axis=0), 0.01)
    weights = np.ones(len(y))
    relative: F64 = np.ones(len(prior))
    for _ in range(10):
        left = np.vstack([weights[:, None] * scaled, np.diag(pull * shares)])
        right = np.concatenate([weights, pull * shares])
        relative, _ = nnls(left, right)
        errors = np.abs(scaled @ relative - 1)
        weights = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(errors, 1e-12)))
    return relative * prior


def shape_of(calibrated: Calibrated, batch: int, max_tokens: int) -> tuple[float, float]:
    """Mean and largest number of tokens of a micro-batch of `batch` samples, padding included.

    Between measured batches by interpolation, beyond them in proportion; batch x max_tokens where nothing was measured.
    """
    shapes = sorted(calibrated.shapes, key=lambda shape: shape.batch)
    if not shapes:
        return float(batch * max_tokens), float(batch * max_tokens)
    nearest = shapes[0] if batch < shapes[0].batch else shapes[-1]
    if not shapes[0].batch <= batch <= shapes[-1].batch:
        scale = batch / nearest.batch
        return nearest.mean_tokens * scale, nearest.max_tokens * scale
    sizes = [shape.batch for shape in shapes]
    mean = np.interp(batch, sizes, [shape.mean_tokens for shape in shapes])
    return float(mean), float(np.interp(batch, sizes, [shape.max_tokens for shape in shapes]))
