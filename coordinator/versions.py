"""A job's versions: which one is meant, what it was made in, how good it is, and what people see of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec

from coordinator.core.state import JobState, Rollback
from coordinator.lineage import RoundEntry
from coordinator.past import Losses, Past, mean
from protocol.errors import BadConfig

if TYPE_CHECKING:
    from coordinator.store import Version


class VersionView(msgspec.Struct, frozen=True, kw_only=True):
    """One stored version of the global adapter; `loss` is the mean of the agents' held-out losses, None until measured."""

    version: int
    round: int
    at: float
    sha256: str
    size_bytes: int
    rank: int
    dropped_ratio: float
    loss: float | None = None
    n_evaluated: int = 0
    kept: bool = True
    """Whether its files are still there to be exported."""
    of: int = 0
    """The earlier version that this one is once more; 0 for one that a round made."""


def pick(versions: Sequence[Version], wanted: int | None) -> Version:
    """The wanted version, or the newest.  Raises BadConfig that says which ones there are and are still kept."""
    if not versions:
        raise BadConfig("the job has no version yet: its first round is not aggregated")
    if wanted is None:
        return versions[-1]
    kept = [version for version in versions if version.kept]
    for version in kept:
        if version.version == wanted:
            return version
    if any(version.version == wanted for version in versions):
        numbers = ", ".join(str(version.version) for version in kept)
        raise BadConfig(f"the files of version {wanted} were pruned (see [keep]): those of {numbers} are kept")
    raise BadConfig(f"no version {wanted}: there are {versions[0].version} to {versions[-1].version}")


def lineage(job: JobState, past: Past, newest: int) -> tuple[list[RoundEntry], list[Rollback]]:
    """The aggregations that version `newest` was made by, oldest first, and the rollbacks between them.

    Rounds whose versions a rollback left behind are no part of it.
    """
    backs = {rollback.version: rollback for rollback in job.rollbacks}
    version = max((v for v in past.folds.keys() | backs.keys() if v <= newest), default=0)
    made: list[RoundEntry] = []
    left: list[Rollback] = []
    while version in past.folds or version in backs:
        if version in backs:
            left.append(backs[version])
            version = backs[version].of
        else:
            fold = past.folds[version]
            agents = list(fold.agents)
            made.append(RoundEntry(round=fold.round, agents=agents, samples=fold.samples, loss=past.loss(version)))
            version = fold.start
    return made[::-1], left[::-1]


def version_views(job: JobState, versions: Iterable[Version], losses: Losses) -> list[VersionView]:
    """Stored versions with their mean held-out loss, oldest first."""
    back = {rollback.version: rollback.of for rollback in job.rollbacks}
    return [
        VersionView(
            version=v.version,
            round=v.round,
            at=v.at,
            sha256=v.master,
            size_bytes=v.model.size,
            rank=v.model.levels[-1].rank if v.model.levels else 0,
            dropped_ratio=v.dropped_ratio,
            loss=mean(losses.get(v.version, {})),
            n_evaluated=len(losses.get(v.version, {})),
            kept=v.kept,
            of=back.get(v.version, 0),
        )
        for v in versions
    ]
