"""Leading components of a sum of many low-rank products, by block Krylov iteration on the sum that is never formed.

With M = sum s_i B_i A_i over a whole fleet, the factors side by side are wider than an exact decomposition can afford, but M
times a thin block costs little: M X = sum s_i B_i (A_i X).  From a random block the method collects (Musco and Musco, 2015,
arXiv 1504.05477; block Golub-Kahan with full reorthogonalisation)

    V_1 = orth(M^T W),     Y_j = M V_j,     V_{j+1} = orth((I - V V^T) M^T Y_j),

and M V V^T = [Y_1 Y_2 ...] [V_1 V_2 ...]^T, cut to rank r, is the answer.  It keeps all blocks, not the last one like subspace
iteration (Halko, Martinsson and Tropp, 2011): for the same work its error is smaller by orders of magnitude where the spectrum
has a tail, and the noise of many agents is one.  What a block adds to the energy of the r components falls faster than
geometrically, so the last two tell what the next one could add: it ends when that is below `TOLERANCE` squared of it, or after
`MAX_BLOCKS`.

Large products are of float32, small matrices float64.  An update is divided by its largest entries on the way in, so no
square leaves float32's range.  The random block follows from the matrix's name; terms are taken in the order given: the same
terms give the same bits.

Cost: 2 (d_in + d_out) R l flops for each of at most 2 MAX_BLOCKS products, R columns in all, l = r.  Memory: `HELD_BYTES` of
decoded factors, and the blocks; what does not fit is read again for each product, so it does not grow with the fleet.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from protocol.adapters import Factors, principal, truncate
from protocol.tensors import F32

TOLERANCE: Final = 1e-3
"""Error of the components that are kept, relative to their norm."""
MAX_BLOCKS: Final = 8
HELD_BYTES: Final = 160 * 2**20
_CHUNK_COLUMNS: Final = 512
_PROBES: Final = 8
"""Random directions that see how much the blocks have not seen."""
_EPS: Final = float(np.finfo(np.float32).eps)
_ROUNDING: Final = 16 * _EPS
"""Components this much smaller than the sum, or than its terms where they cancel, are what rounding leaves: dropped."""


class Term(NamedTuple):
    """One summand scale * B A: its columns are known, its factors are read when they are needed."""

    rank: int
    scale: float
    read: Callable[[], Factors]


class Leading(NamedTuple):
    """The components found, and the share (0..1) of the squared norm that they leave out.

    The share is estimated: what the blocks have seen is exact, the rest comes from eight random directions.
    """

    factors: Factors
    dropped_ratio: float


def fits(rank: int, shape: tuple[int, int]) -> bool:
    """Whether blocks for `rank` components leave a matrix of `shape` enough room to be worth it."""
    return MAX_BLOCKS * block_width(rank) <= min(shape)


def block_width(rank: int) -> int:
    """Columns of a block for `rank` components."""
    return max(rank, 8)


def leading(name: str, terms: Sequence[Term], rank: int) -> Leading:
    """The best `rank` components of the sum of the terms of one matrix, nearly.  Raises what reading a term raises."""
    stack, width = _Stack(terms), block_width(rank)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    seen = stack.from_left(rng.standard_normal((stack.shape[0], width + _PROBES), dtype=np.float32))
    v, probes = _orth(seen[:, :width]), seen[:, width:]
    y = stack.from_right(v)
    best, energy = _best(y, rank)
    gain, expected = energy, energy
    while expected > TOLERANCE**2 * energy and y.shape[1] < MAX_BLOCKS * width:
        fresh = _beside(v, stack.from_left(_even(y[:, -width:])))
        fresh = _beside(v, _orth(fresh))  # once more: where nothing new was left, orth has made something up
        fresh = _orth(fresh)
        v, y, before = np.hstack([v, fresh]), np.hstack([y, stack.from_right(fresh)]), energy
        best, energy = _best(y, rank)
        gain, expected = energy - before, max(0.0, energy - before) ** 2 / gain if gain > 0 else 0.0
    found = principal(y @ best, (v @ best).T, rank, scale=stack.unit)
    n_true = int(np.count_nonzero(found.singular > _ROUNDING * max(found.singular.max(initial=0.0), stack.norm)))
    factors = truncate(found.to_factors(), n_true)
    whole = _energy(y) + _energy(_beside(v, probes)) / _PROBES
    return Leading(factors, max(0.0, 1 - energy / whole) if whole else 0.0)


class _Stack:
    """The sum, to multiply by: its terms side by side in chunks, of which as many as fit are held and the others read again.

    shape: (d_out, d_in).  unit: what its products are to be multiplied by; entries of the largest term are about 1 in it.
    norm: that of the sum if its terms were orthogonal.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms, self._parts = terms, list(_parts(terms))
        self._held: dict[range, tuple[F32, F32]] = {}
        squared_norms: list[float] = []
        sizes: list[float] = []
        free_bytes = HELD_BYTES
        for part in self._parts:
            chunk = self._read(part, (sizes, squared_norms))
            free_bytes -= sum(side.nbytes for side in chunk)
            if free_bytes >= 0:
                self._held[part] = chunk
        self.shape = chunk[0].shape[1], chunk[1].shape[1]
        self.unit = max(map(abs, sizes)) or 1.0
        self.norm = math.sqrt(math.fsum(t.scale**2 * square for t, square in zip(terms, squared_norms, strict=True)))
        shares = np.array(sizes) / self.unit
        ranks = [term.rank for term in terms]
        self._scales = {
            part: np.repeat(shares[list(part)], ranks[part.start : part.stop]).astype(np.float32)[:, None]
            for part in self._parts
        }

    def from_right(self, x: F32) -> F32:
        """M x for x (d_in, l), in units."""
        return _total(b.T @ (scale * (a @ x)) for scale, b, a in self._chunks())

    def from_left(self, x: F32) -> F32:
        """M^T x for x (d_out, l), in units."""
        return _total(a.T @ (scale * (b @ x)) for scale, b, a in self._chunks())

    def _chunks(self) -> Iterator[tuple[F32, F32, F32]]:
        for part in self._parts:
            yield self._scales[part], *(self._held.get(part) or self._read(part))

    def _read(self, part: range, noted: tuple[list[float], list[float]] | None = None) -> tuple[F32, F32]:
        """Columns of B and rows of A as rows, every term divided by its largest entries; sizes and squared norms are `noted`."""
        terms, start = self._terms[part.start : part.stop], 0
        sides: list[F32] = []
        for term in terms:
            factors, size, stop = term.read(), 1.0, start + term.rank
            sides = sides or [np.empty((sum(t.rank for t in terms), d), np.float32) for d in factors.shape]
            for side, rows in zip(sides, (factors.b.T, factors.a), strict=True):
                peak = max(float(rows.max(initial=0.0)), -float(rows.min(initial=0.0))) or 1.0
                np.divide(rows, np.float32(peak), out=side[start:stop])
                size *= peak
            if noted is not None:
                sizes, squared_norms = noted
                sizes.append(term.scale * size)
                b, a = (side[start:stop] @ side[start:stop].T for side in sides)
                squared_norms.append(max(0.0, float(np.sum(b * a, dtype=np.float64))) * size**2)
            start = stop
        return sides[0], sides[1]


def _parts(terms: Sequence[Term]) -> Iterator[range]:
    """Runs of terms of a few hundred columns: wide enough for a fast product, narrow enough to be read again."""
    start, columns = 0, 0
    for i, term in enumerate(terms):
        if columns and columns + term.rank > _CHUNK_COLUMNS:
            yield range(start, i)
            start, columns = i, 0
        columns += term.rank
    yield range(start, len(terms))


def _total(products: Iterator[F32]) -> F32:
    total = next(products)
    for product in products:
        total += product
    return total


def _orth(x: F32) -> F32:
    """Orthonormal columns that span those of x."""
    found: F32 = np.linalg.qr(x)[0]
    return found


def _even(y: F32) -> F32:
    """Columns that span those of y and are about orthonormal: a power of M is then not taken of its largest alone."""
    squares, vectors = np.linalg.eigh((y.T @ y).astype(np.float64))
    floor = max(squares[-1] * _EPS, 1e-30)
    return np.asarray(y @ (vectors / np.sqrt(np.maximum(squares, floor))).astype(np.float32))


def _beside(v: F32, x: F32) -> F32:
    """What of x the orthonormal columns of v do not span."""
    return x - v @ (v.T @ x)


def _best(y: F32, rank: int) -> tuple[F32, float]:
    """The directions (l, rank) in which y is largest, and the squared norm of y in them."""
    squares, vectors = np.linalg.eigh((y.T @ y).astype(np.float64))
    return vectors[:, : -rank - 1 : -1].astype(np.float32), float(np.sum(np.maximum(squares[-rank:], 0.0)))


def _energy(x: F32) -> float:
    return float(np.sum(np.square(x), dtype=np.float64))
