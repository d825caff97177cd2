"""What each rank of each matrix is worth: from measured scores of rank-1 triplets to concave gain curves.

A curve G_k(r) is the sum of the r largest triplet scores of matrix k (method.md section 1).  Beyond the probe's rank the
scores are continued by the geometric decay of the measured ones.  Curves are shares: over all matrices at their largest rank
they sum to 1, so that agents with other losses, other text and other scales of the gradient can be averaged.

    global   the fleet's curves: the agents' mean, weighted by their training samples
    local    the agent's own
    blend    a mixture of both

Everything here is a function over arrays; shapes (K, O) are matrices x options, option 0 being "not trained".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from coordinator.core.spec import Planning
from protocol.errors import BadMessage
from protocol.messages import Calibrated, Matrix

F64 = npt.NDArray[np.float64]

MAX_DECAY: Final = 0.98
"""No curve may promise more beyond the probe than fifty times its last measured score."""


def scores_of(calibrated: Calibrated, n_matrices: int) -> F64:
    """The measured triplet scores, (n_matrices, probe_rank), rows descending.  Raises BadMessage for anything else."""
    found = np.frombuffer(calibrated.scores, "<f4").astype(np.float64) if len(calibrated.scores) % 4 == 0 else None
    if found is None or found.size != n_matrices * calibrated.probe_rank:
        wanted = n_matrices * calibrated.probe_rank * 4
        raise BadMessage(f"scores have {len(calibrated.scores)} bytes, {n_matrices} matrices need {wanted}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise BadMessage("scores are not all finite and positive")
    if not found.any():
        raise BadMessage("every score is zero: the base or the text gives no gradient")
    rows: F64 = -np.sort(-found.reshape(n_matrices, calibrated.probe_rank), axis=1)
    return rows


def curves(scores: F64, matrices: Sequence[Matrix], ranks: Sequence[int]) -> F64:
    """Gain of every matrix at every rank, (K, 1 + len(ranks)), column 0 for rank 0; the last column sums to 1.

    A rank above min(d_in, d_out) is worth as much as that.  Cost: O(K max(ranks)).
    """
    k, probe = scores.shape
    widest = max(ranks)
    steps = np.arange(1, max(0, widest - probe) + 1)
    tail = scores[:, -1:] * _decay(scores)[:, None] ** steps  # (K, widest - probe)
    summed = np.concatenate([np.zeros((k, 1)), np.cumsum(np.hstack([scores, tail]), axis=1)], axis=1)
    limits = np.array([min(m.d_in, m.d_out) for m in matrices])[:, None]
    gain = np.take_along_axis(summed, np.minimum(np.array([0, *ranks])[None, :], limits), axis=1)
    shares: F64 = gain / gain[:, -1].sum()
    return shares


def _decay(scores: F64) -> F64:
    """Ratio of one score to the one before, from the geometric mean over the probe's second half, (K,)."""
    probe = scores.shape[1]
    if probe == 1:
        return np.full(len(scores), 0.5)
    first = probe // 2 - (probe == 2)
    n = probe - 1 - first
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(scores[:, first] > 0, scores[:, -1] / scores[:, first], 0.0)
    decay: F64 = np.minimum(ratio ** (1 / n), MAX_DECAY)
    return decay


def shared(own: Sequence[F64], weights: Sequence[float]) -> F64:
    """The fleet's curves: the mean of the agents', weighted by samples."""
    mean: F64 = np.average(np.stack(own), axis=0, weights=np.maximum(np.asarray(weights, float), 1e-9))
    return mean


def scoped(own: F64, fleet: F64, rules: Planning) -> F64:
    """Whose importance counts for one agent."""
    share = {"global": 0.0, "local": 1.0, "blend": rules.blend}[rules.scope]
    return share * own + (1 - share) * fleet
