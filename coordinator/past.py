"""What the ended rounds of a job amount to: what was measured of each version, and what all of it has cost.

Records never change, so this may be worked out in a thread while the job goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from coordinator.core.state import Round, RoundRecord, Share, ShareRecord
from coordinator.cost import FREE, CostView, Prices, cost_so_far
from protocol.messages import Evaluated

Evaluations: TypeAlias = dict[int, dict[str, Evaluated]]
"""version -> agent -> what it measured on its own held-out text."""


class Past(NamedTuple):
    """The ended rounds of a job with what they amount to."""

    rounds: list[RoundRecord]
    evaluations: Evaluations
    cost: CostView


def look_back(rounds: list[RoundRecord], devices: Mapping[str, str], prices: Prices = FREE) -> Past:
    """What these rounds amount to.  Cost: linear in their shares."""
    return Past(rounds, evaluations(rounds), cost_so_far(rounds, devices, prices))


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


def comparable(measured: Evaluations) -> Evaluations:
    """The same of those agents alone that measured both the first version and the last; what all measured of the last if none did.

    A mean over whoever measured moves because somebody came or went, too; of these the means can be compared.
    """
    if not measured:
        return {}
    first, last = min(measured), max(measured)
    both = measured[first].keys() & measured[last].keys()
    if not both:
        return {last: measured[last]}
    return {version: {a: found for a, found in by.items() if a in both} for version, by in measured.items()}


def mean_loss(measured: Mapping[str, Evaluated]) -> float | None:
    """Mean over agents, each counting the same; None when nobody measured."""
    return sum(e.loss for e in measured.values()) / len(measured) if measured else None
