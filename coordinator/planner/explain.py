"""Why an agent got what it got, in words and numbers: what limits it, what more of that would bring, why nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from coordinator.core.choice import Prediction
from coordinator.planner.search import Frontier, best, enough, frontier, modes
from coordinator.planner.servers import NO_LIMIT, Ask, Mode, Server

LONGER: Final = 1.5
GIB: Final = 2**30
ROOMIER_TEXT: Final = "1 GiB more memory"
LONGER_TEXT: Final = f"{LONGER:g} times the round"
MATTERS: Final = 1.005
"""More of a limit that brings less than this does not count as one."""
ENDS: Final = {
    "memory": "memory decides",
    "time": "time decides",
    "data": "one pass over its own text is enough",
    "rank": "more of nothing would bring more",
    "pins": "as pinned",
}


def what_if(ask: Ask, one: Server, searched: Sequence[Frontier], round_s: float) -> dict[str, float]:
    """How many times the progress one more GiB or a longer round would bring, modes chosen anew."""
    now, longer = best(ask, one, searched, np.array([round_s, LONGER * round_s]), one.limit_bytes)
    roomier = best(ask, one, searched, np.array([round_s]), one.limit_bytes + GIB)[0]
    if now <= 0:
        return {}
    return {ROOMIER_TEXT: float(roomier / now), LONGER_TEXT: float(longer / now)}


def limit(ask: Ask, one: Server, mode: Mode, n_steps: int, changes: dict[str, float]) -> str:
    """What keeps the agent from more."""
    if one.pins.rank and one.pins.n_steps:
        return "pins"
    if n_steps >= enough(ask, one, mode):
        return "data"
    memory, time = changes.get(ROOMIER_TEXT, 1.0), changes.get(LONGER_TEXT, 1.0)
    if max(memory, time) < MATTERS:
        return "rank"
    return "memory" if memory > time else "time"


def why(ask: Ask, mode: Mode, ranks: dict[str, int], importance: float, predicted: Prediction, limited_by: str) -> str:
    """One line for people."""
    room = f" of {predicted.limit_bytes / GIB:.2f}" if predicted.limit_bytes else ""
    depth = f" from block {mode.skip} on" if mode.skip else ""
    recomputed = ", activations recomputed" if mode.checkpointing else ""
    return (
        f"{len(ranks)} of {len(ask.matrices)} matrices{depth} capture {importance:.0%} of the gain; "
        f"{mode.bits}, {mode.samples_per_step} samples a step{recomputed}: {predicted.train_s:.1f} s of training, "
        f"{predicted.peak_bytes / GIB:.2f}{room} GiB; {ENDS[limited_by]}"
    )


def why_not(ask: Ask, one: Server, round_s: float) -> str:
    """Why nothing fits this agent, with the numbers and what to do."""
    found = [f for mode in modes(ask, one) if (f := frontier(ask, one, mode))]
    if not found:
        return f"the pinned matrices leave nothing to train: {one.pins.targets}"
    need, mode = min(((float(f.peak_bytes[_least(f)]), f.mode) for f in found), key=lambda entry: entry[0])
    if need > one.limit_bytes:
        missing = (need - one.limit_bytes) / GIB
        return (
            f"not enough memory: {mode.bits} with batch {mode.batch} at the lowest rank needs {need / GIB:.2f} GiB, "
            f"{one.limit_bytes / GIB:.2f} may be used: {missing:.2f} GiB are missing; free them, or relax what is pinned"
        )
    fitting = [f for f in found if f.peak_bytes[_least(f)] <= one.limit_bytes]
    step_s, up_s = min((float(f.step_s[_least(f)]), float(f.up_s[_least(f)])) for f in fitting)
    return (
        f"not enough time: {one.pins.n_steps or 1} steps of {step_s:.2f} s and {up_s:.1f} s of upload do not fit a round of "
        f"{round_s:.1f} s: raise round.train_s or plan.max_train_s, or relax what is pinned"
    )


def _least(found: Frontier) -> int:
    """The cheapest choice that trains anything."""
    return int(np.argmax(found.importance > 0))


def bound_bytes(one: Server) -> int:
    """The memory limit for people: 0 where there is none."""
    return one.limit_bytes if one.limit_bytes < NO_LIMIT // 2 else 0
