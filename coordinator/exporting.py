"""From a job's state and history to an exported adapter with its lineage.  Blocking; the daemon runs it in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.core.state import JobState, RoundRecord
from coordinator.export import export_peft
from coordinator.folding import load_model
from coordinator.lineage import Card, RoundEntry
from coordinator.store import Version
from protocol.blobs import Blobs
from protocol.errors import BadConfig


def held_out_loss(rounds: Sequence[RoundRecord], version: int) -> float | None:
    """Mean over agents of the held-out loss of a version, as they measured it; None when nobody did."""
    losses = [
        share.evaluated.loss
        for record in rounds
        for share in record.shares.values()
        if share.evaluated and share.evaluated.version == version
    ]
    return sum(losses) / len(losses) if losses else None


def lineage(rounds: Sequence[RoundRecord], newest: int) -> list[RoundEntry]:
    """One entry per aggregation up to round `newest`: who took part, with how many samples, the held-out loss of its result.

    `rounds` are all that ended: a version is measured in the round after the one that made it.
    """
    return [
        RoundEntry(
            round=record.round,
            agents=[agent for agent, share in record.shares.items() if share.state == "DONE"],
            samples=sum(share.samples for share in record.shares.values() if share.state == "DONE"),
            loss=held_out_loss(rounds, record.version + 1),
        )
        for record in rounds
        if record.outcome == "aggregated" and record.round <= newest
    ]


def export_version(
    job: JobState, version: Version, rounds: Sequence[RoundRecord], blobs: Blobs, folder: Path, software: str
) -> None:
    """Write one stored version as a PEFT directory.  Raises BadConfig when there is none."""
    card = Card(
        job=job.spec.job.name,
        method=job.spec.job.method,
        base_source=job.spec.model.source,
        base_sha256=job.base_sha256,
        adapter_sha256=version.master,
        license=job.spec.job.license,
        software=software,
        rounds=lineage(rounds, version.round),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_peft(load_model(blobs, version.master), folder, card=card)


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
