"""What an operator may do with a job beside ending it: pause it, let it go on, go back to an earlier version.

A pause is a wish that lasts: the round under way ends, or is stopped, and instead of the next one the job is PAUSED, where no
time runs.  A stopped attempt is no failed one: it does not count, its finished shares are carried, and its agents keep what they
have trained for the next attempt.

To go back makes a new version of an old one's content: the history of versions is never rewritten.  What was made from the
versions in between, also what is still on its way, belongs to none of the versions to come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import plans, rounds, survey
from coordinator.core.state import ENDED, Pause, Phase, Rollback
from protocol.messages import ExecState

if TYPE_CHECKING:
    from coordinator.core.job import Job


def pause(job: Job, event: ev.JobPaused) -> None:
    """Begin no further round; with `now`, end the one under way, and all surveys.  A second pause changes nothing of the first."""
    state = job.state
    if state.phase in ENDED:
        return
    state.pause = state.pause or Pause(by=event.by, at=job.now, reason=event.reason)
    outcome = f"paused: {plans.said_by(state.pause.by, state.pause.reason)}"
    if event.now:
        for share in survey.open_surveys(state):
            job.end_share(share, 0, ExecState.CANCELLED, outcome)
        if state.phase in {Phase.COLLECTING, Phase.EVALUATING}:
            rounds.stop(job, outcome, keep=True)
    if state.phase is Phase.PLANNING:
        job.move(Phase.WAITING, outcome)
    elif state.phase in {Phase.COLLECTING, Phase.AGGREGATING, Phase.EVALUATING}:
        job.announce()


def resume(job: Job, _event: ev.JobResumed) -> None:
    """Go on where the job was; one that is not paused goes on anyhow."""
    if job.state.pause is None:
        return
    job.state.pause = None
    if job.state.phase is Phase.PAUSED:
        job.move(Phase.WAITING)
    else:
        job.announce()


def roll_back(job: Job, event: ev.JobRolledBack) -> None:
    """Go on from an earlier version's content; an ended job hands it out.

    Nothing comes of it while a version is being made, or when its number is taken: the shell looks, and says so.
    """
    state = job.state
    if state.phase is Phase.AGGREGATING or event.version <= state.version:
        return
    outcome = f"rolled_back: to version {event.of}, {plans.said_by(event.by, event.reason)}"
    if state.phase in {Phase.COLLECTING, Phase.EVALUATING}:
        rounds.stop(job, outcome, keep=False)
    elif state.phase is Phase.PLANNING:
        job.move(Phase.WAITING, outcome)
    state.version, state.model, state.master = event.version, event.model, event.master
    told = Rollback(version=event.version, of=event.of, by=event.by, at=job.now, reason=event.reason)
    state.rollbacks = [*state.rollbacks, told]
    restored = {name: getattr(event, name) for name in ("version", "of", "round", "model", "master", "dropped_ratio")}
    job.out.append(act.Restore(job=job.name, at=job.now, **restored))
    if state.phase not in ENDED:
        _forget_updates(job)
        state.stale = f"the job went back to version {event.of}"
        job.out.append(act.Serve(job=job.name, blob=event.model))
    job.announce()


def _forget_updates(job: Job) -> None:
    """Whatever is not yet folded was made from a version that the job has left."""
    state, carried = job.state, job.state.carried
    state.carried, state.quorum, state.is_stopped = {}, 0, False
    state.missed, state.tried, state.late = {}, {}, []
    for digests in state.seen.values():
        digests.pop(state.round_number + 1, None)
    state.first_attempt = state.attempt
    job.roster.touch(*carried)
