"""From a job's state and history to an exported adapter with its lineage.  Blocking; the daemon runs it in a thread."""

from __future__ import annotations

from pathlib import Path

from coordinator.core.plans import said_by
from coordinator.core.state import JobState
from coordinator.export import export_peft
from coordinator.folding import load_model
from coordinator.lineage import Card
from coordinator.past import Past
from coordinator.store import Version
from coordinator.versions import lineage
from protocol.blobs import Blobs
from protocol.malloc import give_back


def export_version(job: JobState, version: Version, past: Past, blobs: Blobs, folder: Path, software: str) -> None:
    """Write one stored version as a PEFT directory.  Raises BadConfig when there is none."""
    made, left = lineage(job, past, version.version)
    card = Card(
        job=job.spec.job.name,
        method=job.spec.job.method,
        base_source=job.spec.model.source,
        base_sha256=job.base_sha256,
        adapter_sha256=version.master,
        license=job.spec.job.license,
        software=software,
        rounds=made,
        rollbacks=[
            f"version {back.version} is version {back.of} once more, {said_by(back.by, back.reason)}" for back in left
        ],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        export_peft(load_model(blobs, version.master), folder, card=card)
    finally:
        give_back()  # a whole model was in memory
