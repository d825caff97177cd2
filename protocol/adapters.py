"""Low-rank adapters as values: what is trained, sent, summed and merged is one map from matrix name to two factors.

    delta of matrix k  =  B A,     A (r, d_in),  B (d_out, r)          the LoRA scale alpha / r is folded into B

Many pairs have the same product, so we keep one: the canonical form B = U sqrt(S), A = sqrt(S) V^T of the singular value
decomposition, components in descending order.  Then the first r components are the best rank-r approximation (Eckart and
Young, 1936): cutting a model down for a smaller agent is taking a prefix, in memory and in the file.

The d_out x d_in product is never formed.  With thin QR decompositions B = Q_B R_B and A^T = Q_A R_A,

    B A = Q_B (R_B R_A^T) Q_A^T,     and only the small core R_B R_A^T needs an SVD.

Where the columns of a side are independent enough, R is the Cholesky factor of their Gram matrix and Q is never formed: one
product at the processor's full rate, and no copy.  How independent they are is known from the factor itself, before anything is
lost.  Where they are not (an agent twice, a term that undoes another), a tall side is decomposed by reflections in blocks of
rows, and then the R of all blocks (TSQR: Demmel, Grigori, Hoemmen and Langou, 2012, SIAM J. Sci. Comput. 34(1)): as stable as
one decomposition, and what LAPACK and numpy copy is a block.

Everything here runs in float64: same input, same machine and same number of BLAS threads give the same bits.  The sign of a
component, which an SVD leaves open, is fixed by making the largest entry of its column of U positive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, repeat
from typing import Any, Final, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from protocol.tensors import F32

F64 = npt.NDArray[np.float64]
Floats: TypeAlias = F32 | F64
E = TypeVar("E")

Rows: TypeAlias = tuple[slice, slice]
"""Some rows of an A and some of a B."""

ALL: Final[Rows] = slice(None), slice(None)

FEW_VALUES: Final = 2**17
"""So many are done together: half a megabyte of float32 stays in a processor's cache."""

NOISE: Final = float(np.finfo(np.float32).eps)
"""Components this much smaller than the largest lie below what float32 factors can express: they are dropped."""

GRAM_ROWS: Final = 256
"""Rows that are made float64 at a time: enough for a product at full rate, few enough for a processor's cache."""

QR_ROWS: Final = 1024
"""Rows of a block, at least."""

DEPENDENT: Final = 1e3
"""Columns of length 1 whose Cholesky factor has an inverse with a larger norm are taken for dependent.

What its Q lacks of being orthonormal is at most the square of that, in roundings of float64: 1e-10, where float32 shows 1e-7.
"""

ROUNDING: Final = 64 * float(np.finfo(np.float64).eps)
"""Components this much smaller than the terms of a sum are what rounding leaves where the terms cancel: dropped too."""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One matrix's low-rank delta B A.  Shapes: a (r, d_in), b (d_out, r), float32; r = 0 stands for a zero delta."""

    a: F32
    b: F32

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(f"A {self.a.shape} and B {self.b.shape} do not multiply")
        if self.a.dtype != np.float32 or self.b.dtype != np.float32:
            raise ValueError(f"factors are float32, not {self.a.dtype} and {self.b.dtype}")

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the matrix it belongs to."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def norm(self) -> float:
        """Frobenius norm of B A, from the two r x r Gram matrices.  Cost: O((d_in + d_out) r^2)."""
        a, b = self.a.astype(np.float64), self.b.astype(np.float64)
        return float(np.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T))))))


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Factors of k matrices of one shape and rank, in two arrays: of many small ones numpy is then asked once.

    Shapes: a (k, r, d_in), b (k, d_out, r), float32.
    """

    a: F32
    b: F32

    def __len__(self) -> int:
        """How many matrices there are."""
        return len(self.a)

    @property
    def rank(self) -> int:
        """Number of components of each."""
        return int(self.a.shape[1])

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(r, d_in) of each A, (d_out, r) of each B."""
        return self.a.shape[1:], self.b.shape[1:]

    def __iter__(self) -> Iterator[Factors]:
        """Those of each matrix, as views."""
        return map(Factors, self.a, self.b)

    def __getitem__(self, matrices: slice) -> Stack:
        """Those of some of the matrices, as views."""
        return Stack(self.a[matrices], self.b[matrices])

    def rows(self, rows: Rows) -> Stack:
        """These rows of each A and of each B, as views: a part, whose ranks tell nothing."""
        return Stack(self.a[:, rows[0]], self.b[:, rows[1]])

    def truncate(self, rank: int) -> Stack:
        """See the function `truncate`."""
        return Stack(self.a[:, :rank], self.b[:, :, :rank])

    @classmethod
    def of(cls, factors: Sequence[Factors]) -> Self:
        """Those of some matrices that are of one shape and rank; of one alone as a view."""
        if len(factors) == 1:
            return cls(factors[0].a[None], factors[0].b[None])
        return cls(np.stack([f.a for f in factors]), np.stack([f.b for f in factors]))


def alike(entries: Iterable[E], sort: Callable[[E], Hashable]) -> Iterator[slice]:
    """Where those of one sort stand side by side.  Nothing else is done for each entry: there may be 20,000."""
    start = 0
    for _, group in groupby(entries, sort):
        stop = start + len(list(group))
        yield slice(start, stop)
        start = stop


def few(whole: slice, n_values: int) -> Iterator[slice]:
    """Parts of `whole`, whose entries have `n_values` each: as many as have `FEW_VALUES` together, or one that has more."""
    n = max(1, FEW_VALUES // max(1, n_values))
    return (slice(at, min(at + n, whole.stop)) for at in range(whole.start, whole.stop, n))


def _copied_together(whole: slice, first: Factors) -> Iterator[slice]:
    """Parts of matrices like the first: of larger ones a copy would cost more memory than it saves calls."""
    n_values = first.a.size + first.b.size
    return few(whole, n_values if n_values < FEW_VALUES // 8 else FEW_VALUES)


def bands(rank: int, shape: tuple[int, int]) -> Iterator[Rows]:
    """All rows of one matrix's A (rank, d_in) and B (d_out, rank) in parts of about `FEW_VALUES`, or a row of A that has more."""
    n = max(1, -(-rank * sum(shape) // FEW_VALUES))

    def part(n_rows: int, k: int) -> slice:
        return slice(n_rows * k // n, n_rows * (k + 1) // n)

    return ((part(rank, k), part(shape[0], k)) for k in range(n))


Run: TypeAlias = tuple[Sequence[str], Stack]
"""Matrices of one shape and rank by their names."""

Adapter: TypeAlias = Mapping[str, Factors]
"""Deltas by full module name, such as `model.layers.0.self_attn.q_proj`."""


class Stacks(Mapping[str, Factors]):
    """An adapter in runs of matrices of one shape and rank: factors of a single one are made, as views, when asked for."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = [run for run in runs if run[0]]

    @classmethod
    def of(cls, adapter: Adapter) -> Stacks:
        """The same in the order of the names, which costs nothing where it is so already; what is small is copied."""
        if isinstance(adapter, Stacks) and (names := list(adapter)) == sorted(names):
            return adapter
        named = sorted(adapter.items())
        names, factors = [name for name, _ in named], [factors for _, factors in named]
        found = [
            part
            for whole in alike(factors, lambda f: (f.a.shape, f.b.shape))
            for part in _copied_together(whole, factors[whole.start])
        ]
        return cls((names[part], Stack.of(factors[part])) for part in found)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every matrix."""
        return dict(chain.from_iterable(zip(names, repeat(stack.rank)) for names, stack in self.runs))

    def few(self) -> Iterator[Run]:
        """The runs, cut to `FEW_VALUES`."""
        for names, stack in self.runs:
            for part in few(slice(0, len(names)), (stack.a.size + stack.b.size) // len(names)):
                yield names[part], stack[part]

    @cached_property
    def _places(self) -> dict[str, tuple[Stack, int]]:
        return {name: (stack, at) for names, stack in self.runs for at, name in enumerate(names)}

    def __getitem__(self, name: str) -> Factors:
        """Both factors of one matrix."""
        stack, at = self._places[name]
        return Factors(stack.a[at], stack.b[at])

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return chain.from_iterable(names for names, _ in self.runs)

    def __len__(self) -> int:
        """How many matrices there are."""
        return sum(len(names) for names, _ in self.runs)


Each: TypeAlias = Callable[..., Iterator[Any]]
"""The built-in `map`, or that of an executor."""

Times: TypeAlias = Callable[[F64], F64]
"""Multiplies by a matrix that is not formed."""


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """Leading components of a product, in canonical form.  Shapes: a (r, d_in), b (d_out, r), singular values (R,)."""

    a: F64
    b: F64
    singular: F64

    @property
    def dropped_energy(self) -> float:
        """Squared Frobenius norm of what was cut away; the relative squared error is this over `energy`."""
        return float(np.sum(self.singular[self.a.shape[0] :] ** 2))

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the whole product."""
        return float(np.sum(self.singular**2))

    def to_factors(self) -> Factors:
        """The same in float32; values beyond its range become infinities, which the caller must look for."""
        with np.errstate(over="ignore"):
            return Factors(a=self.a.astype(np.float32), b=self.b.astype(np.float32))


def principal(b: Floats, a: Floats, rank: int, *, scale: F64 | float = 1.0, each: Each = map) -> Principal:
    """The best approximation of B diag(scale) A with at most `rank` components, in canonical form.

    Shapes: b (d_out, R), a (R, d_in), scale (R,) or one for all; any R, also above d_out or d_in.  `each` does the two sides:
    one after the other, or at a time.  Cost: O((d_in + d_out) R^2 + R^3) time, and memory for the result, some R x R and a block;
    a side whose columns depend on each other is copied.
    """
    if 0 in {a.shape[0], *b.shape, *a.shape}:
        return Principal(a=np.zeros((0, a.shape[1])), b=np.zeros((len(b), 0)), singular=np.zeros(0))
    (by_q_b, r_b), (by_q_a, r_a) = each(_qr, (b, a.T))  # Q_B (d_out, m), (m, R); Q_A (d_in, n), (n, R)
    r_b = r_b * scale
    total = float(np.linalg.norm(r_b, axis=0) @ np.linalg.norm(r_a, axis=0))  # the norm if nothing cancelled
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    kept = min(rank, int(np.count_nonzero(s > max(s[0] * NOISE, total * ROUNDING))))
    root = np.sqrt(s[:kept])
    left, right = each(lambda q, x: q(x), (by_q_b, by_q_a), (u[:, :kept], vt[:kept].T))  # (d_out, kept), (d_in, kept)
    peaks = left[np.argmax(np.abs(left), axis=0), np.arange(kept)]
    sign = np.where(peaks < 0, -1.0, 1.0)
    return Principal(b=left * (sign * root), a=right.T * (sign * root)[:, None], singular=s)


def _qr(x: Floats) -> tuple[Times, F64]:
    """Thin QR of x (d, R): what multiplies by Q, and R."""
    return _qr_by_cholesky(x) or _qr_by_blocks(x)


def _qr_by_cholesky(x: Floats) -> tuple[Times, F64] | None:
    """Q is x times the inverse of R; None where that would not be exact.  See DEPENDENT."""
    if len(x) < x.shape[1]:
        return None
    gram = np.zeros((x.shape[1], x.shape[1]))
    for block in _blocks(x):
        gram += block.T @ block
    lengths = np.sqrt(np.diagonal(gram))
    if not lengths.all():
        return None
    try:
        lower = np.linalg.cholesky(gram / np.outer(lengths, lengths))
    except np.linalg.LinAlgError:
        return None
    inverse = np.linalg.inv(lower)
    if not np.linalg.norm(inverse) < DEPENDENT:
        return None

    def times(y: F64) -> F64:
        y = (inverse.T @ y) / lengths[:, None]
        return np.concatenate([block @ y for block in _blocks(x)])

    return times, lower.T * lengths


def _qr_by_blocks(x: Floats) -> tuple[Times, F64]:
    """By reflections, where d is large in blocks of rows; the Q of each takes its place in a copy of x."""
    n_blocks = len(x) // max(QR_ROWS, 8 * x.shape[1])
    if n_blocks < 2:
        q, r = np.linalg.qr(x.astype(np.float64))
        return q.__matmul__, r
    tall = np.array_split(x.astype(np.float64), n_blocks)
    tops = []
    for block in tall:
        block[:], r = np.linalg.qr(block)
        tops.append(r)
    small, r = np.linalg.qr(np.concatenate(tops))
    parts = np.split(small, n_blocks)

    def times(y: F64) -> F64:
        return np.concatenate([q @ (part @ y) for q, part in zip(tall, parts, strict=True)])

    return times, r


def _blocks(x: Floats) -> Iterator[F64]:
    """The rows of x in float64, a few at a time."""
    return (x[at : at + GRAM_ROWS].astype(np.float64) for at in range(0, len(x), GRAM_ROWS))


def canonical(factors: Factors, rank: int | None = None) -> Factors:
    """The same product in canonical form, cut to the best `rank` components if given; numerically void ones are dropped."""
    whole = factors.rank if rank is None else rank
    return principal(factors.b, factors.a, whole).to_factors()


def truncate(factors: Factors, rank: int) -> Factors:
    """The first `rank` components, as views: of factors in canonical form the best approximation of that rank."""
    return Factors(a=factors.a[:rank], b=factors.b[:, :rank])


def cut_energy(factors: Factors, kept_ratio: float) -> Factors:
    """The fewest leading components that hold `kept_ratio` of the squared norm, in canonical form; at 1 all, as they are.

    Cost: that of `principal`.  No other factors of so few components come closer (Eckart and Young, 1936).
    """
    if kept_ratio >= 1.0:
        return factors
    whole = principal(factors.b, factors.a, factors.rank)
    held = np.cumsum(whole.singular**2)
    n_kept = int(np.searchsorted(held, kept_ratio * whole.energy)) + 1 if whole.energy else 0
    return truncate(whole.to_factors(), n_kept)
