"""The slow half of a round: stored updates in, the next version out.  Blocking; the daemon runs it in a thread.

Idempotent: the same Aggregate action gives the same bytes, so after a crash it is simply done again.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from coordinator import aggregators
from coordinator.aggregators import Weighted
from coordinator.core import actions as act
from coordinator.core import events as ev
from protocol import methods
from protocol.adapters import Adapter
from protocol.blobs import Blobs
from protocol.errors import BadUpdate
from protocol.malloc import give_back
from protocol.messages import Blob, Wire
from protocol.models import StoredModel, read_model, write_model
from protocol.updates import open_update

MAX_MODEL_BYTES = 2**40


def fold(action: act.Aggregate, blobs: Blobs, chunk_bytes: int, allowed: Collection[str] = ()) -> ev.Aggregated:
    """Aggregate, store the fp32 master and the file that agents download, and say what they are.

    Raises BadUpdate when an update cannot be used or is gone, Unavailable when the disk refuses.
    """
    give_back()  # what the transfers left lies in pieces, too small for what is needed now
    try:
        return _fold(action, blobs, chunk_bytes, allowed)
    finally:
        give_back()  # nothing else here needs as much


def _fold(action: act.Aggregate, blobs: Blobs, chunk_bytes: int, allowed: Collection[str]) -> ev.Aggregated:
    for sha256 in [*(c.sha256 for c in action.contributions), *filter(None, [action.master])]:
        if not blobs.has(sha256):
            raise BadUpdate(f"{blobs.path(sha256)} is gone: nothing but the coordinator should delete there")
    method = methods.load(action.method, allowed)
    updates = [
        Weighted(
            agent=c.agent,
            round=c.round,
            weight=c.weight,
            update=open_update(
                blobs.path(c.sha256),
                method.kind,
                job=action.job,
                round=c.round,
                attempt=c.attempt,
                max_bytes=c.size,
            ),
        )
        for c in action.contributions
    ]
    model = StoredModel(blobs.path(action.master), max_bytes=MAX_MODEL_BYTES) if action.master else {}
    aggregator = aggregators.load(method.aggregator, allowed)
    result = aggregator.aggregate(model, updates, max_rank=action.max_rank, server_lr=action.server_lr)
    master = _store(blobs, result.adapter, action.version, "fp32", chunk_bytes)
    wire = cast("Wire", action.model_dtype)
    served = master if wire == "fp32" else _store(blobs, result.adapter, action.version, wire, chunk_bytes)
    dropped = result.dropped_ratio.values()
    return ev.Aggregated(
        job=action.job,
        round=action.round,
        attempt=action.attempt,
        version=action.version,
        model=served,
        master=master.sha256,
        dropped_ratio=sum(dropped) / len(dropped) if dropped else 0.0,
    )


def load_model(blobs: Blobs, master: str) -> Adapter:
    """The adapter in a stored master file; empty before the first version."""
    return read_model(blobs.path(master), max_bytes=MAX_MODEL_BYTES) if master else {}


def _store(blobs: Blobs, adapter: Adapter, version: int, dtype: Wire, chunk_bytes: int) -> Blob:
    with blobs.temporary() as part:
        levels = write_model(part, adapter, version=version, dtype=dtype)
        whole = levels[-1]
        blobs.adopt(part, whole.sha256, is_synced=True)
    return Blob(sha256=whole.sha256, size=whole.size, chunk=chunk_bytes, levels=levels)
