"""What the ended rounds of a job amount to: what was measured of each version, and what all of it has cost.

Records never change, so this may be worked out in a thread while the job goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

import msgspec

from coordinator.core.state import Round, RoundRecord, Share, ShareRecord
from protocol.messages import Evaluated

Evaluations: TypeAlias = dict[int, dict[str, Evaluated]]
"""version -> agent -> what it measured on its own held-out text."""


class CostView(msgspec.Struct, frozen=True, kw_only=True):
    """What the agents of a job have spent on the rounds that ended; gpu_s is the part of train_s that GPUs worked."""

    train_s: float = 0.0
    gpu_s: float = 0.0
    samples: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    n_shares: int = 0
    n_failed: int = 0


class Past(NamedTuple):
    """The ended rounds of a job with what they amount to."""

    rounds: list[RoundRecord]
    evaluations: Evaluations
    cost: CostView


def look_back(rounds: list[RoundRecord], devices: Mapping[str, str]) -> Past:
    """What these rounds amount to.  Cost: linear in their shares."""
    return Past(rounds, evaluations(rounds), cost_so_far(rounds, devices))


def evaluations(rounds: Iterable[RoundRecord | Round]) -> Evaluations:
    """What every agent measured of every version; of two measurements of one version the later counts."""
    found: Evaluations = {}
    for record in rounds:
        shares: Mapping[str, Share | ShareRecord] = record.shares
        for agent, share in shares.items():
            if share.evaluated:
                found.setdefault(share.evaluated.version, {})[agent] = share.evaluated
    return dict(sorted(found.items()))


def with_round(measured: Evaluations, current: Round | None) -> Evaluations:
    """The same with what was measured in the open round."""
    fresh = evaluations([current]) if current else {}
    return dict(sorted((measured | {v: measured.get(v, {}) | by for v, by in fresh.items()}).items()))


def mean_loss(measured: Mapping[str, Evaluated]) -> float | None:
    """Mean over agents, each counting the same; None when nobody measured."""
    return sum(e.loss for e in measured.values()) / len(measured) if measured else None


def cost_so_far(rounds: Iterable[RoundRecord], devices: Mapping[str, str]) -> CostView:
    """Everything that agents handed in until the last ended round.  `devices` says what each agent trains on.

    A finished share that a failed attempt left to the next one is in the records of both; it counts once.  Cost: linear in
    shares of all rounds.
    """
    once: dict[tuple[int, str, float], tuple[str, ShareRecord]] = {}
    for record in rounds:
        for agent, share in record.shares.items():
            once[record.round, agent, share.assigned_at] = agent, share
    shares = list(once.values())
    return CostView(
        train_s=sum(share.train_s for _, share in shares),
        gpu_s=sum(share.train_s for agent, share in shares if devices.get(agent, "cpu") != "cpu"),
        samples=sum(share.samples for _, share in shares),
        bytes_up=sum(share.bytes_up for _, share in shares),
        bytes_down=sum(share.bytes_down for _, share in shares),
        n_shares=len(shares),
        n_failed=sum(share.state != "DONE" for _, share in shares),
    )
