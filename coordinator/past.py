"""What the ended rounds of a job amount to: what was measured of each version, what it was made of, what all of it has cost.

Records never change and people look at a job every few seconds, so what they amount to is extended by what has ended since.  The
records themselves stay on disk: those of a hundred rounds of a thousand agents are 150 MB of objects and take a second to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from sys import intern
from typing import NamedTuple, TypeAlias, TypeVar

from coordinator.core.state import Round, RoundRecord, Share, ShareRecord
from coordinator.cost import Spent, with_share
from protocol.messages import Evaluated

T = TypeVar("T")
Evaluations: TypeAlias = dict[int, Mapping[str, Evaluated]]
"""version -> agent -> what it measured on its own held-out text."""
Losses: TypeAlias = Mapping[int, Mapping[str, float]]
"""version -> agent -> its held-out loss."""


class Fold(NamedTuple):
    """One aggregation: its round, the version it started from, who took part, with how many samples in all."""

    round: int
    start: int
    agents: tuple[str, ...]
    samples: int


class Past(NamedTuple):
    """What the first n_rounds ended rounds amount to, failed attempts included.

    Fields: folds by the version that was made; spent by agent; samples (processed, planned) by round of training, of its last
    attempt; newest, the number of the last of these rounds, and `counted`, its shares (agent, assigned_at) that are in `spent`.
    """

    n_rounds: int = 0
    losses: Losses = {}
    folds: Mapping[int, Fold] = {}
    spent: Mapping[str, Spent] = {}
    samples: Mapping[int, tuple[int, int]] = {}
    newest: int = 0
    counted: frozenset[tuple[str, float]] = frozenset()

    def loss(self, version: int) -> float | None:
        """Mean over the agents that measured a version, each counting the same; None when nobody did."""
        return mean(self.losses.get(version, {}))


def extended(past: Past, records: Iterable[RoundRecord]) -> Past:
    """The same with the rounds that ended next, in order.  Cost: linear in their shares, and in agents and versions of the past.

    Of two measurements of one version by one agent the later counts.  A finished share that a failed attempt left to the next one
    is in the records of both and costs once.
    """
    n_rounds, losses, folds, spent = past.n_rounds, past.losses, dict(past.folds), dict(past.spent)
    samples = dict(past.samples)
    newest, counted = past.newest, set(past.counted)
    for record in records:
        n_rounds += 1
        if record.round != newest:
            newest, counted = record.round, set()
        # An id is in every record: held once.
        shares = {intern(agent): share for agent, share in record.shares.items()}
        losses = joined(losses, _losses(record))
        for agent, share in shares.items():
            if (agent, share.assigned_at) not in counted:
                counted.add((agent, share.assigned_at))
                spent[agent] = with_share(spent.get(agent, Spent()), share)
        if record.outcome == "aggregated":
            done = tuple(agent for agent, share in shares.items() if share.state == "DONE")
            folds[record.version + 1] = Fold(
                record.round, record.version, done, sum(shares[agent].samples for agent in done)
            )
        if record.purpose == "train":
            samples[record.round] = samples_of(record)
    return Past(n_rounds, losses, folds, spent, samples, newest, frozenset(counted))


def samples_of(record: RoundRecord) -> tuple[int, int]:
    """(processed, planned), of shares for which any were planned."""
    planned = [share for share in record.shares.values() if share.planned_samples > 0]
    return sum(share.samples for share in planned), sum(share.planned_samples for share in planned)


def evaluations(rounds: Iterable[RoundRecord | Round]) -> Evaluations:
    """What every agent measured of every version; of two measurements of one version the later counts."""
    found: dict[int, dict[str, Evaluated]] = {}
    for record in rounds:
        shares: Mapping[str, Share | ShareRecord] = record.shares
        for agent, share in shares.items():
            if share.evaluated:
                found.setdefault(share.evaluated.version, {})[agent] = share.evaluated
    return dict(sorted(found.items()))


def with_round(measured: Evaluations, current: Round | None) -> Evaluations:
    """The same with what was measured in the open round."""
    return joined(measured, evaluations([current]) if current else {})


def losses_with(past: Past, current: Round | None) -> Losses:
    """The held-out losses with what was measured in the open round."""
    return joined(past.losses, _losses(current) if current else {})


def _losses(record: RoundRecord | Round) -> dict[int, dict[str, float]]:
    return {v: {intern(agent): one.loss for agent, one in by.items()} for v, by in evaluations([record]).items()}


def joined(one: Mapping[int, Mapping[str, T]], other: Mapping[int, Mapping[str, T]]) -> dict[int, Mapping[str, T]]:
    """By version and agent, in order of versions; of two values the other's counts.  What only one has is not copied."""
    both = {**one, **{version: {**one.get(version, {}), **by} for version, by in other.items()}}
    return dict(sorted(both.items()))


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
    return mean({agent: found.loss for agent, found in measured.items()})


def mean(losses: Mapping[str, float]) -> float | None:
    """Mean over agents, each counting the same; None for none."""
    return fmean(losses.values()) if losses else None
