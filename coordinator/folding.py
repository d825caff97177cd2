"""The slow half of a round: stored updates in, the next version out.  Blocking; the daemon runs it in a thread.

Idempotent: the same Aggregate action gives the same bytes, so after a crash it is simply done again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final, cast

from coordinator import aggregators
from coordinator.aggregators import Aggregate, Aggregator, Weighted
from coordinator.core import actions as act
from coordinator.core import events as ev
from protocol import methods
from protocol.adapters import Adapter
from protocol.arriving import Source
from protocol.blobs import Blobs
from protocol.errors import BadConfig, BadUpdate
from protocol.malloc import give_back
from protocol.messages import Blob, Wire
from protocol.methods import Method
from protocol.models import StoredModel, read_model, write_model
from protocol.updates import open_update

MAX_MODEL_BYTES = 2**40


@dataclass(frozen=True, slots=True)
class Unchecked:
    """An update that is still on its way, or here and not compared with its plan: the ranks of that."""

    source: Source
    ranks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Early:
    """How a fold begins before it is asked for: which updates nobody has checked, by digest, and a wait until it is `asked` for."""

    unchecked: Mapping[str, Unchecked]
    asked: Callable[[], None]


NOT_EARLY: Final = Early({}, lambda: None)


def fold(
    action: act.Aggregate, blobs: Blobs, chunk_bytes: int, allowed: Collection[str] = (), early: Early = NOT_EARLY
) -> ev.Aggregated:
    """Aggregate, store the fp32 master and the file that agents download, and say what they are.

    An `early` one waits for what it reads and is not here, and again before anything is in the store; it raises what its waits raise.
    Raises BadUpdate when an update cannot be used or is gone, Unavailable when the disk refuses.
    """
    give_back()  # what the transfers left lies in pieces, too small for what is needed now
    try:
        return _fold(action, blobs, chunk_bytes, allowed, early)
    finally:
        give_back()  # nothing else here needs as much


def _fold(
    action: act.Aggregate, blobs: Blobs, chunk_bytes: int, allowed: Collection[str], early: Early
) -> ev.Aggregated:
    wire, result = cast("Wire", action.model_dtype), _sum(action, blobs, allowed, early)
    dropped = result.dropped_ratio.values()
    dropped_ratio = sum(dropped) / len(dropped) if dropped else 0.0
    with ExitStack() as stack:
        parts = {dtype: stack.enter_context(blobs.temporary()) for dtype in dict.fromkeys(("fp32", wire))}
        whole = {
            dtype: write_model(part, result.adapter, version=action.version, dtype=dtype)
            for dtype, part in parts.items()
        }
        del result, dropped  # a model's worth of memory, and the wait may be long
        early.asked()
        for dtype, part in parts.items():
            blobs.adopt(part, whole[dtype][-1].sha256, is_synced=True)
    levels = whole[wire]
    return ev.Aggregated(
        job=action.job,
        round=action.round,
        attempt=action.attempt,
        version=action.version,
        model=Blob(sha256=levels[-1].sha256, size=levels[-1].size, chunk=chunk_bytes, levels=levels),
        master=whole["fp32"][-1].sha256,
        dropped_ratio=dropped_ratio,
    )


def _sum(action: act.Aggregate, blobs: Blobs, allowed: Collection[str], early: Early) -> Aggregate:
    for sha256 in [*(c.sha256 for c in action.contributions), *filter(None, [action.master])]:
        if sha256 not in early.unchecked and not blobs.has(sha256):
            raise BadUpdate(f"{blobs.path(sha256)} is gone: nothing but the coordinator should delete there")
    method, aggregator = _method(action, allowed)
    updates, shapes = [], {m.name: (m.d_out, m.d_in) for m in action.matrices} if early.unchecked else {}
    for c in action.contributions:
        one = early.unchecked.get(c.sha256)
        update = open_update(
            one.source if one else blobs.path(c.sha256),
            method.kind,
            job=action.job,
            round=c.round,
            attempt=c.attempt,
            max_bytes=c.size,
        )
        if one:  # a header that lies may not decide how much memory is taken
            update.check(one.ranks, shapes)
        updates.append(Weighted(agent=c.agent, round=c.round, weight=c.weight, update=update))
    model = StoredModel(blobs.path(action.master), max_bytes=MAX_MODEL_BYTES) if action.master else {}
    return aggregator.aggregate(model, updates, max_rank=action.max_rank, server_lr=action.server_lr)


def pays_early(action: act.Aggregate, allowed: Collection[str]) -> bool:
    """Whether this fold takes so long that it should begin before it is asked for; not if it cannot be done at all."""
    with suppress(BadConfig):
        return aggregators.is_slow(_method(action, allowed)[1])
    return False


def _method(action: act.Aggregate, allowed: Collection[str]) -> tuple[Method, Aggregator]:
    method = methods.load(action.method, allowed)
    return method, aggregators.load(method.aggregator, allowed)


def load_model(blobs: Blobs, master: str) -> Adapter:
    """The adapter in a stored master file; empty before the first version."""
    return read_model(blobs.path(master), max_bytes=MAX_MODEL_BYTES) if master else {}
