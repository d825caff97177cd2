"""What a unit of each limit is worth: the prices that minimise the Lagrangian bound of many knapsacks at once.

g(p, q) = p + q + sum_k max_o (value - p memory - q time)[k, o], with limits of 1, is convex, and its slope is what the best options leave of
the limits.  The line through a query that is normal to the slope has the minimum on its far side, so a polygon around the minimum is cut
through its centroid again and again, which takes away at least 1/e of its area (Levin, 1965; Newman, 1965).  It starts as the
triangle p + q <= g(0, 0), in which the minimum lies because g(p, q) >= p + q.  Where the polygon touches an axis and its centroid is
near it, every other query is put on the axis: a limit that does not bind has the price 0 and not a small one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]

N_CUTS: Final = 64
PRICE_GAP: Final = 2e-5  # how far g may be from its minimum, as a share of it
NEAR: Final = 0.05  # a price below this share of the other is near the axis


def best_prices(value: F32, memory: F32, time: F32) -> F64:
    """Step 1, for limits of 1 each and values whose best sum to 1: (n, K, O) three times -> (n, 2).

    Stops for each problem when g is within PRICE_GAP of its minimum, after N_CUTS at the latest.
    """
    n = len(value)
    prices = np.zeros((n, 2))
    lowest = np.full(n, np.inf)
    floor = np.zeros(n)
    polygon = np.tile(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), (n, 1, 1))  # (n, P, 2)
    query = np.zeros((n, 2))
    live = np.arange(n)
    for step in range(N_CUTS):
        g, slope = _dual(value, memory, time, query)
        better = g < lowest[live]
        prices[live[better]], lowest[live[better]] = query[better], g[better]
        rise = np.einsum("npd,nd->np", polygon - query[:, None], slope)
        floor[live] = np.maximum(floor[live], g + rise.min(axis=1))
        goes_on = lowest[live] - floor[live] > PRICE_GAP * lowest[live]
        if not goes_on.any():
            break
        if goes_on.mean() < 0.7:  # copying costs about as much as one evaluation
            live, polygon, rise, g = live[goes_on], polygon[goes_on], rise[goes_on], g[goes_on]
            value, memory, time = value[goes_on], memory[goes_on], time[goes_on]
        polygon = _cut(polygon, (lowest[live] - g)[:, None] - rise)
        query = _centroid(polygon)
        if step % 2:  # not each time: where the minimum is off the axis after all, a query on it cuts nothing away
            near = (polygon.min(axis=1) <= 0) & (query < NEAR * query[:, ::-1])
            query[near] = 0.0
    return prices


def _dual(value: F32, memory: F32, time: F32, prices: F64) -> tuple[F64, F64]:
    """G (n,) at prices (n, 2) for limits of 1, and its slope (n, 2): what the best options leave of each limit."""
    n, n_matrices, n_options = value.shape
    p, q = prices.astype(np.float32).T[:, :, None, None]
    net = memory * p
    net += time * q
    np.subtract(value, net, out=net)
    best = net.reshape(-1, n_options).argmax(axis=1) + np.arange(n * n_matrices) * n_options
    top, used_memory, used_time = (
        x.take(best).reshape(n, n_matrices).sum(axis=1, dtype=np.float64) for x in (net, memory, time)
    )
    return prices.sum(axis=1) + top, np.stack([1 - used_memory, 1 - used_time], axis=1)


def _cut(polygon: F64, inside: F64) -> F64:
    """The part of each convex polygon (n, P, 2) where `inside`, linear and given at the vertices (n, P), is >= 0: (n, P', 2).

    Vertices may repeat: that is how polygons of different size share one array.  What would be empty stays as it is.
    """
    n = len(polygon)
    following, ahead = np.roll(polygon, -1, axis=1), np.roll(inside, -1, axis=1)
    keeps = inside >= 0
    crosses = keeps != (ahead >= 0)
    share = np.divide(inside, inside - ahead, out=np.zeros_like(inside), where=crosses)[..., None]
    corners = np.stack([polygon, polygon + share * (following - polygon)], axis=2).reshape(n, -1, 2)
    there = np.stack([keeps, crosses], axis=2).reshape(n, -1)
    empty = ~there.any(axis=1)
    there[empty, ::2] = True
    order = np.argsort(~there, axis=1, kind="stable")[:, : there.sum(axis=1).max()]
    order = np.where(np.take_along_axis(there, order, axis=1), order, order[:, :1])
    return np.take_along_axis(corners, order[..., None], axis=1)


def _centroid(polygon: F64) -> F64:
    """(n, P, 2) -> (n, 2); the mean of the vertices where there is no area."""
    rays = polygon - polygon[:, :1]
    a, b = rays[:, 1:-1], rays[:, 2:]
    area = np.abs(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])
    total = area.sum(axis=1)
    flat = total <= 1e-30
    weighed = (area[..., None] * (a + b)).sum(axis=1) / (3 * np.where(flat, 1.0, total))[:, None]
    found = np.where(flat[:, None], polygon.mean(axis=1), polygon[:, 0] + weighed)
    return np.asarray(np.maximum(found, 0.0))
