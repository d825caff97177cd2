"""What an operator does with a job that is there: cancel, pause, resume, roll back; checked before the core hears of it.

Durable when a command returns.  What a job's phase does not allow is NotNow, with what to do instead.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from coordinator.core.events import JobCancelled, JobPaused, JobResumed, JobRolledBack
from coordinator.core.state import ENDED, JobState, Phase
from coordinator.versions import pick
from protocol.errors import BadConfig, Unavailable

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator
    from coordinator.store import Version

Reason = Annotated[str, Meta(max_length=500)]


class PauseAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why, and whether the round under way is to be stopped."""

    reason: Reason = ""
    now: bool = False


class RollbackAsked(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which version to go back to, and why."""

    version: Annotated[int, Meta(ge=0)]
    reason: Reason = ""


class NotNow(BadConfig):
    """The job is not where this could be done."""


class NoSuchVersion(BadConfig):
    """The job does not have this version, or not any more."""


async def cancel(coordinator: Coordinator, job: JobState) -> None:
    """End a job; its finished versions stay.  Raises NotNow for one that has ended, Unavailable when the disk refuses."""
    _refuse_ended(job)
    await coordinator.post(JobCancelled(job=job.spec.job.name))


async def pause(coordinator: Coordinator, job: JobState, asked: PauseAsked, by: str) -> None:
    """Begin no further round.  Raises NotNow for a job that has ended, Unavailable when the disk refuses."""
    _refuse_ended(job)
    await coordinator.post(JobPaused(job=job.spec.job.name, by=by, reason=asked.reason, now=asked.now))


async def resume(coordinator: Coordinator, job: JobState, by: str) -> None:
    """Let a paused job go on.  Raises NotNow for any other, Unavailable when the disk refuses."""
    _refuse_ended(job)
    if job.pause is None:
        raise NotNow(f"job {job.spec.job.name!r} is not paused: it is {job.phase}")
    await coordinator.post(JobResumed(job=job.spec.job.name, by=by))


async def roll_back(coordinator: Coordinator, job: JobState, asked: RollbackAsked, by: str) -> None:
    """Make a new version of an earlier one's content, from which the job goes on or which it hands out.

    Raises NoSuchVersion, naming those that there are, NotNow while a version is being made, Unavailable when the disk refuses
    or has lost the file.
    """
    name, store = job.spec.job.name, coordinator.store
    busy = NotNow(f"a version of {name!r} is just being made: try again in a moment")
    async with coordinator.upkeep.still:  # or what is picked might be pruned before the core refers to it
        versions = await asyncio.to_thread(store.versions, name)
        old = _pick(versions, asked.version)
        if not (coordinator.blobs.has(old.master) and coordinator.blobs.has(old.model.sha256)):
            raise Unavailable(
                f"the files of version {old.version} of {name!r} are gone: restore the folder from a copy"
            )
        if job.phase is Phase.AGGREGATING or coordinator.is_folding(name):
            raise busy
        number = max(job.version, versions[-1].version) + 1
        event = JobRolledBack(
            job=name,
            of=old.version,
            version=number,
            round=old.round,
            model=old.model,
            master=old.master,
            dropped_ratio=old.dropped_ratio,
            by=by,
            reason=asked.reason,
        )
        await coordinator.post(event)
    if coordinator.fleet.state.jobs[name].version != number:
        raise busy


def _pick(versions: list[Version], wanted: int) -> Version:
    if wanted == 0:
        raise NoSuchVersion(
            "version 0 is the base model itself, which is not stored here: submit the job anew to begin from it"
        )
    try:
        return pick(versions, wanted)
    except BadConfig as error:
        raise NoSuchVersion(str(error)) from None


def _refuse_ended(job: JobState) -> None:
    if job.phase in ENDED:
        raise NotNow(f"job {job.spec.job.name!r} has ended already: {job.phase}")
