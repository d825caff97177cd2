"""What a round is worth to one agent in each mode of training, for nested choices of ranks and for every length of a round.

The formula is in coordinator/planner/automatic.py; this is its arithmetic, over arrays: (P,) choices of ranks along a
concave-hull path, (T,) lengths.  The order of that path hardly depends on the batch, so it is made once per width, depth
and checkpointing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.planner import hull, uplink
from coordinator.planner.servers import Ask, Mode, Server, costs, down_s, layers, upload_s
from protocol.messages import Bits

F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TOLERANCE: Final = 0.05
"""Modes within this of the best are alike; what else they have decides."""
EXPECTED_GAIN: Final = 0.1
"""A job is expected to lower the loss by this share; a width that starts so far behind is worth nothing."""
CAPACITY: Final = 3.0
"""Power of importance: an adapter that captures nine tenths of the gain takes 1.4 times the steps to the same loss."""
WIDTH: Final[dict[Bits, int]] = {"none": 2, "int8": 1, "nf4": 0}
DEPTHS: Final = (0.0, 0.25, 0.5, 0.75)
"""Shares of the blocks, from the bottom, that may go without adapters: no backward pass reaches them."""
SHORTEST_S: Final = 1e-6
"""A step takes at least this, whatever was measured of a tiny base."""
LARGEST: Final = 2
"""A step accumulates up to this many of the largest micro-batch."""
N_PREFIXES: Final = 160
"""Of a path that are looked at; what lies between two of them is decided by the exact solution."""


class Frontier(NamedTuple):
    """One mode of one server with nested choices of ranks, cheapest first: options (P, K), the others (P,)."""

    mode: Mode
    options: Ints
    importance: F64
    step_s: F64
    peak_bytes: F64
    up_s: F64


class Pick(NamedTuple):
    """One choice of ranks of a frontier, at one length of the round: its place, its steps and what that is worth."""

    at: int
    n_steps: int
    progress: float


def modes(ask: Ask, one: Server) -> Iterator[Mode]:
    """Every mode that the pins leave open.  Accumulation stands in for batches that do not fit or do not exist."""
    pins, depth = one.pins, layers(ask.matrices)
    must = depth[~one.allowed[:, 0]]
    first = int(must.min()) if must.size else int(depth.max())
    skips = [first] if pins.targets else sorted({min(first, int(share * (depth.max() + 1))) for share in DEPTHS})
    for bits in one.bits:
        for skip in skips:
            for checkpointing in [False, True] if pins.checkpointing is None else [pins.checkpointing]:
                for batch in one.batches:
                    wholes = (*one.batches, LARGEST * one.batches[-1])
                    sums = [whole // batch for whole in wholes if whole % batch == 0]
                    for accumulation in [pins.accumulation] if pins.accumulation else sums:
                        yield Mode(bits, batch, accumulation, checkpointing, skip)


def frontiers(ask: Ask, one: Server) -> list[Frontier]:
    """One for every mode that the pins leave open.  Cost: a millisecond for each."""
    paths: dict[tuple[Bits, bool, int], Ints | None] = {}
    found = []
    for mode in modes(ask, one):
        key = (mode.bits, mode.checkpointing, mode.skip)
        if key not in paths:
            paths[key] = _path(ask, one, mode)
        if (options := paths[key]) is not None:
            found.append(_frontier(ask, one, mode, options))
    return found


def frontier(ask: Ask, one: Server, mode: Mode) -> Frontier | None:
    """The frontier of one mode; None when the pins leave nothing to choose."""
    options = _path(ask, one, mode)
    return None if options is None else _frontier(ask, one, mode, options)


def _path(ask: Ask, one: Server, mode: Mode) -> Ints | None:
    """Nested choices of ranks, (P, K), by gain per cost: shares of the memory and of a round's time, added up."""
    open_to = allowed(ask, one, mode)
    if not open_to.any(axis=1).all():
        return None
    parts = costs(ask, one, mode)
    room = max(one.limit_bytes - parts.base_bytes, 1.0)
    time = parts.time / max(parts.base_s, SHORTEST_S) + upload_s(ask, one) / uplink.typical_s(ask.spec)
    path = hull.path(one.gain, parts.memory, time, (1.0 / room, 1.0), open_to)
    at = np.unique(np.linspace(0, len(path.steps), N_PREFIXES).astype(int))
    return path.prefixes(at)


def _frontier(ask: Ask, one: Server, mode: Mode, options: Ints) -> Frontier:
    parts, rows = costs(ask, one, mode), np.arange(len(ask.matrices))

    def summed(part: F64) -> F64:
        sums: F64 = part[rows, options].sum(axis=1)
        return sums

    return Frontier(
        mode=mode,
        options=options,
        importance=summed(one.gain),
        step_s=np.maximum(parts.base_s + summed(parts.time), SHORTEST_S),
        peak_bytes=parts.base_bytes + summed(parts.memory),
        up_s=summed(upload_s(ask, one)),
    )


def allowed(ask: Ask, one: Server, mode: Mode) -> npt.NDArray[np.bool_]:
    """Options per matrix, (K, O): blocks below `skip` are not trained."""
    options = one.allowed.copy()
    options[layers(ask.matrices) < mode.skip, 1:] = False
    return options


def budget_s(ask: Ask, one: Server, round_s: F64 | float) -> F64 | float:
    """What is left of a round for training and upload, any shape."""
    return round_s * ask.spec.plan.time_ratio - down_s(ask, one)


def steps_in(ask: Ask, one: Server, mode: Mode, step_s: F64 | float, seconds: F64 | float) -> F64:
    """Optimizer steps that fit, any shape: as many as pinned or none, else no more than the agent's text gives."""
    fits = np.maximum(0.0, np.floor(np.asarray(seconds) / step_s))
    if one.pins.n_steps:
        return np.where(fits >= one.pins.n_steps, float(one.pins.n_steps), 0.0)
    return np.minimum(fits, enough(ask, one, mode))


def enough(ask: Ask, one: Server, mode: Mode) -> int:
    """Steps after which the agent has seen its own text often enough in this round."""
    return max(1, math.ceil(ask.spec.plan.max_epochs * one.n_samples / mode.samples_per_step))


def worth(ask: Ask, one: Server, mode: Mode, importance: F64 | float, steps: F64 | float) -> F64:
    """Progress of so many steps with ranks that capture so much of the gain; any shapes that broadcast."""
    losses, enough = one.calibrated.losses, ask.spec.plan.drift_steps
    least = min(losses.values(), default=0.0)
    behind = (losses[mode.bits] - least) / least if least > 0 and mode.bits in losses else 0.0
    quality = max(0.05, 1 - behind / EXPECTED_GAIN)
    clean = importance**CAPACITY * np.asarray(steps) / (1 + one.calibrated.noise_scale / mode.samples_per_step)
    useful: F64 = quality * enough * (1 - np.exp(-clean / enough))
    return useful


def progress(ask: Ask, one: Server, found: Frontier, round_s: F64, limit_bytes: float) -> F64:
    """What each choice of ranks is worth at each length of the round, (P, T); zero where it does not fit."""
    seconds = np.asarray(budget_s(ask, one, round_s))[None, :] - found.up_s[:, None]
    steps = steps_in(ask, one, found.mode, found.step_s[:, None], seconds)
    fits = (found.peak_bytes <= limit_bytes)[:, None] & (steps >= 1)
    return np.where(fits, worth(ask, one, found.mode, found.importance[:, None], steps), 0.0)


def best(ask: Ask, one: Server, searched: Sequence[Frontier], round_s: F64, limit_bytes: float) -> F64:
    """Most progress in any mode at each length of the round, (T,); zeros where nothing fits."""
    found = [progress(ask, one, f, round_s, limit_bytes).max(axis=0) for f in searched]
    return np.max(found, axis=0) if found else np.zeros(len(round_s))


def pick(ask: Ask, one: Server, found: Frontier, round_s: float) -> Pick | None:
    """The cheapest ranks that bring all but `thrift` of the best progress of this mode; None when nothing fits."""
    worths = progress(ask, one, found, np.array([round_s]), one.limit_bytes)[:, 0]
    if worths.max() <= 0:
        return None
    at = int(np.argmax(worths >= (1 - ask.spec.plan.thrift) * worths.max()))
    seconds = float(budget_s(ask, one, round_s)) - found.up_s[at]
    return Pick(at, int(steps_in(ask, one, found.mode, found.step_s[at], seconds)), float(worths[at]))


def ranked(ask: Ask, one: Server, searched: Sequence[Frontier], round_s: float) -> list[Mode]:
    """Modes in the order in which they should be tried: the best, and what is as good but better otherwise, first."""
    now = ask.bits_now.get(one.agent)
    picked = [(chosen, found) for found in searched if (chosen := pick(ask, one, found, round_s))]
    top = max((chosen.progress for chosen, _ in picked), default=0.0)

    def order(entry: tuple[Pick, Frontier]) -> tuple[object, ...]:
        (chosen, found), mode = entry, entry[1].mode
        if chosen.progress < (1 - TOLERANCE) * top:
            return (1, -chosen.progress)
        importance = round(float(found.importance[chosen.at]), 2)
        more = (-WIDTH[mode.bits], mode.checkpointing, -importance, -mode.samples_per_step, mode.accumulation)
        return (0, mode.bits != now, *more)

    return [found.mode for _, found in sorted(picked, key=order)]
