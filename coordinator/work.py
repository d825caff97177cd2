"""Slow work of the coordinator, off its consumer: planning, checking updates, aggregating, exporting.

Each piece ends in exactly one event, whatever happens, so the core never waits for a call that does not come back.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from coordinator import folding
from coordinator.ahead import Ahead
from coordinator.config import CoordinatorConfig
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import FleetState, JobState, RoundRecord
from coordinator.disk import Disk, refuses
from coordinator.exporting import export_version
from coordinator.folding import Unchecked
from coordinator.planner import automatic
from coordinator.planner.servers import Ask
from coordinator.store import Store, Version
from coordinator.versions import pick
from protocol import SOFTWARE, methods
from protocol.blobs import Blobs
from protocol.errors import BadConfig, BadUpdate, OutsideFault, Unavailable
from protocol.messages import Matrix
from protocol.updates import open_update

RETRY_S: Final = 15.0
"""Between two tries of what the disk refused."""
N_CHECKING: Final = 2
"""Updates that are checked at a time, each in a few buffers of half a megabyte; one of 8 MiB takes some milliseconds."""

logger = logging.getLogger(__name__)


def question(fleet: FleetState, wish: act.MakePlan) -> Ask:
    """What the planner is asked, as it is now: a plan is made beside the core, whose state moves on meanwhile."""
    job = fleet.jobs[wish.job]
    reports = {agent: report for agent in wish.agents if (report := fleet.agents[agent].report)}
    return Ask(
        spec=job.spec,
        matrices=list(job.matrices),
        frozen_rank=max((level.rank for level in job.model.levels), default=0) if job.model else 0,
        overhead_s=job.overhead_s or job.spec.plan.overhead_s,
        members={agent: copy.copy(job.members[agent]) for agent in wish.agents},
        reports=reports,
        bits_now={agent: choice.bits for agent, choice in job.plan.choices.items()} if job.plan else {},
    )


class Work:
    """The slow jobs over one store and one folder of blobs."""

    def __init__(
        self, config: CoordinatorConfig, store: Store, blobs: Blobs, clock: Callable[[], float], disk: Disk
    ) -> None:
        self._config, self._store, self._blobs, self._clock, self._disk = config, store, blobs, clock, disk
        self._shapes: tuple[Sequence[Matrix], Mapping[str, tuple[int, int]]] = [], {}
        self._checking = asyncio.Semaphore(N_CHECKING)
        self.ahead = Ahead(self._folded)

    def renew(self, config: CoordinatorConfig) -> None:
        """Another configuration, from the next piece of work on."""
        self._config = config

    async def plan(self, wish: act.MakePlan, fleet: FleetState) -> ev.PlanReady | ev.PlanFailed:
        """Who trains what."""
        asked = {"job": wish.job, "round": wish.round, "attempt": wish.attempt}
        ask, started = question(fleet, wish), time.monotonic()
        try:
            found = await asyncio.to_thread(automatic.plan, ask, wish.agents)
        except BadConfig as error:
            return ev.PlanFailed(reason=str(error), **asked)  # type: ignore[arg-type]
        except Exception as error:  # ours: the job ends with it, the other jobs and the daemon go on
            logger.exception("the planner failed", extra={"action": "plan_failed", "job": wish.job})
            reason = f"a fault of the planner's own ({type(error).__name__}: {error}): the coordinator's log says more"
            return ev.PlanFailed(reason=reason, **asked)  # type: ignore[arg-type]
        extra = {
            "action": "plan",
            "job": wish.job,
            "round": wish.round,
            "reason": wish.reason,
            "agents": len(found.choices),
            "left_out": len(found.left_out),
            "train_s": found.train_s and round(found.train_s, 1),
            "seconds": round(time.monotonic() - started, 3),
        }
        logger.info("round planned", extra=extra)
        return ev.PlanReady(
            choices=found.choices,
            reason=wish.reason,
            train_s=found.train_s,
            left_out=found.left_out,
            notes=found.notes,
            **asked,  # type: ignore[arg-type]
        )

    async def fold(self, wish: act.Aggregate) -> ev.Aggregated | ev.AggregateFailed:
        """The next version, stored.  A full disk is waited out; whatever else goes wrong is the end of the job."""
        while True:
            try:
                done = await self.ahead.take(wish)
                if done is None:
                    done = await asyncio.to_thread(self._folded, wish)
                self._store.add_version(
                    Version(
                        job=done.job,
                        version=done.version,
                        round=done.round,
                        master=done.master,
                        model=done.model,
                        dropped_ratio=done.dropped_ratio,
                        at=self._clock(),
                        updates=wish.contributions,
                    )
                )
            except (Unavailable, OSError) as error:
                self._disk.refused(f"version {wish.version} of {wish.job}", error)
                await asyncio.sleep(RETRY_S)
            except OutsideFault as error:
                return ev.AggregateFailed(job=wish.job, round=wish.round, attempt=wish.attempt, reason=str(error))
            else:
                self._disk.wrote(f"version {wish.version} of {wish.job}")
                return done

    def fold_ahead(
        self, wish: act.Aggregate, unchecked: Callable[[act.Aggregate], Mapping[str, Unchecked] | None]
    ) -> None:
        """Begin a fold that is likely to be asked for, if that pays; `unchecked` finds what of it is still on its way."""
        if not self.ahead.may_begin(wish) or not folding.pays_early(wish, self._config.allow_methods):
            return
        if found := unchecked(wish):
            self.ahead.begin(wish, found)

    def _folded(self, wish: act.Aggregate, early: folding.Early = folding.NOT_EARLY) -> ev.Aggregated:
        config = self._config
        return folding.fold(wish, self._blobs, config.broker.chunk_bytes, config.allow_methods, early)

    async def write_down(self, wish: act.Written) -> None:
        """Write down how a round ended, or a job, or which version is an earlier one; a full disk is waited out."""
        what = {act.Record: "a round's record", act.Finish: "a job's end", act.Restore: "a version"}[type(wish)]
        while True:
            try:
                match wish:
                    case act.Record(job=job, record=record):
                        self._store.record(job, record)
                    case act.Finish(job=job, detail=detail) if detail:
                        self._store.close_job(job, detail)
                    case act.Restore():
                        self._store.add_version(restored(wish))
            except Unavailable as error:
                self._disk.refused(what, error)
                await asyncio.sleep(RETRY_S)
            else:
                break
        self._disk.wrote(what)
        match wish:
            case act.Record(job=job, record=record):
                _log_round(job, record)
            case act.Restore(job=job, version=version, of=of):
                extra = {"action": "rolled_back", "job": job, "version": version, "of": of}
                logger.info("version %d is version %d once more", version, of, extra=extra)

    async def judge(self, wish: act.Fetch) -> ev.UpdateStored | ev.UpdateSpoiled:
        """Whether a complete update fits its plan; it counts only then.  Raises OSError when our disk does not give it.

        One that does not fit is not deleted here: its agent may have offered the digest of a file that others need.
        """
        try:
            async with self._checking:
                scores = await asyncio.to_thread(self._check, wish)
        except BadUpdate as error:
            return ev.UpdateSpoiled(agent=wish.agent, offer=wish.offer, reason=f"bad update: {error}")
        return ev.UpdateStored(agent=wish.agent, offer=wish.offer, scores=scores)

    def _check(self, wish: act.Fetch) -> dict[str, list[float]]:
        """Raise BadUpdate for an update that does not fit; else what it says about its matrices' importance."""
        offer, kind = wish.offer, methods.load(wish.method, self._config.allow_methods).kind
        if offer.kind != kind:
            raise BadUpdate(f"an update of kind {offer.kind!r} where {kind!r} was planned")
        with suppress(OSError):
            os.utime(self._blobs.path(offer.blob.sha256))  # no orphan: it is wanted now, see pruning.ORPHAN_AGE_S
        update = open_update(
            self._blobs.path(offer.blob.sha256),
            kind,
            job=offer.job,
            round=offer.round,
            attempt=offer.attempt,
            max_bytes=offer.blob.size,
        )
        update.check(wish.ranks, self._shapes_of(wish.matrices))
        update.check_values()
        return update.scores

    def _shapes_of(self, matrices: Sequence[Matrix]) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) by name; kept, because the updates of a job are all asked about one list."""
        known, shapes = self._shapes
        if known is not matrices:
            shapes = {m.name: (m.d_out, m.d_in) for m in matrices}
            self._shapes = matrices, shapes
        return shapes

    async def export(self, job: JobState, folder: Path) -> None:
        """Write a job's newest version as a PEFT directory; a job without any leaves none."""
        name, done, told = job.spec.job.name, 0, False
        while (versions := self._store.versions(name)) and (newest := pick(versions, None)).version != done:
            try:
                past = await asyncio.to_thread(self._store.past, name)
                await asyncio.to_thread(export_version, job, newest, past, self._blobs, folder, SOFTWARE)
            except (OutsideFault, OSError) as error:
                if not told:
                    logger.error("not exported: %s", error, extra={"action": "export_failed", "job": name})
                if not refuses(error):
                    return
                told = True
                await asyncio.sleep(RETRY_S)
            else:
                done = newest.version


def restored(wish: act.Restore) -> Version:
    """The row of a version that is an earlier one once more."""
    said = {name: getattr(wish, name) for name in ("job", "version", "round", "master", "model", "dropped_ratio", "at")}
    return Version(**said)


def _log_round(job: str, record: RoundRecord) -> None:
    extra = {
        "action": "round",
        "job": job,
        "round": record.round,
        "attempt": record.attempt,
        "outcome": record.outcome,
        "loss": record.loss,
        "wall_s": round(record.wall_s, 2),
        "done": sum(s.state == "DONE" for s in record.shares.values()),
        "agents": len(record.shares),
    }
    logger.info("round closed", extra=extra)
