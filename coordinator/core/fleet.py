"""The coordinator's brain: one door in, a list of wishes out, no clock, no I/O, no global randomness.

    handle(event, now) -> list[Wish]      the only method that changes anything
    wake_at                               when to come back with a Tick
    resume()                              after a restart: everything that should be under way, asked for again
    check()                               asserts every invariant (tests, simulation)

The shell journals an event, calls handle, performs the wishes.  A restart is snapshot + replay + resume, a simulation is the
same class on virtual time.  What peers do wrong (duplicates, late and unknown messages) is counted and answered, never raised;
a move that the tables do not hold is our own bug and raises IllegalMove.
"""

from __future__ import annotations

from typing import Final

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import packing, planning, rounds, steering, survey, uploads
from coordinator.core.job import Job
from coordinator.core.roster import Roster
from coordinator.core.state import ENDED, STATE_VERSION, AgentState, FleetState, JobState, Phase, Share
from protocol.errors import BadConfig
from protocol.messages import TERMINAL, ExecState

OfJob = (
    ev.JobCancelled
    | ev.JobPaused
    | ev.JobResumed
    | ev.JobRolledBack
    | ev.ShareMoved
    | ev.UpdateOffered
    | ev.UpdateStored
    | ev.UpdateSpoiled
    | ev.PlanReady
    | ev.PlanFailed
    | ev.Aggregated
    | ev.AggregateFailed
)

RETURN_S: Final = 60.0
"""Agents try to reach a broker that was away after pauses that double, up to this (protocol/mqtt_bus.py)."""


class Fleet:
    """All agents and all jobs.  State changes only through `handle`, which costs O(jobs under way + log agents), amortised."""

    def __init__(self, state: FleetState | None = None) -> None:
        self.state = state or FleetState()
        self.roster = Roster(self.state)
        self._now = 0.0

    # ------------------------------------------------------------------------------------------------------ one door

    def handle(self, event: ev.Happened, now: float) -> list[act.Wish]:
        """Take in one fact at `now` (seconds since the epoch) and say what shall be done."""
        self._now = now
        out: list[act.Wish] = []
        match event:
            case ev.JobSubmitted():
                self._submit(event, now, out)
            case ev.AgentJoined():
                self._joined(event, now, out)
            case ev.AgentLeft():
                self._left(event, now)
            case ev.AgentRevoked():
                self._revoked(event, now, out)
            case ev.AgentReported():
                self._agent(event.agent).report = event.report
                self.roster.touch(event.agent)
            case ev.BusLost():
                self._lost(event, now)
            case ev.BusFound():
                self._found(now, out)
            case ev.Tick():
                pass
            case _:
                self._to_job(event, now, out)
        self._advance(now, out)
        return out

    def _advance(self, now: float, out: list[act.Wish]) -> None:
        """Let every job go as far as it can, who waits longest first; an agent that one frees may be what another needs."""
        n_before = -1
        while n_before < len(out):
            n_before = len(out)
            for state in sorted(self._under_way(), key=lambda s: s.waiting_since):
                Job(state, self.roster, now, out).advance()

    def _under_way(self) -> list[JobState]:
        return [roll.job for roll in self.roster.rolls.values()]

    @property
    def wake_at(self) -> float | None:
        """The next instant at which time alone changes something (seconds since the epoch)."""
        jobs = (Job(state, self.roster, self._now, []).wake_at for state in self._under_way())
        return min((at for at in jobs if at is not None), default=None)

    def resume(self, now: float) -> list[act.Wish]:
        """What should be under way, after a restart or a lost broker.  Changes nothing."""
        out: list[act.Wish] = []
        for state in self.state.jobs.values():
            job = Job(state, self.roster, now, out)
            job.resume()
            uploads.resume(job)
            rounds.look_ahead(job)
        return out

    def open_share(self, agent: AgentState) -> Share | None:
        """What an agent should be at; None when that is nothing."""
        job = self.state.jobs.get(agent.task)
        if job is None:
            return None
        member = job.members.get(agent.id)
        shares = (member.survey if member else None, job.round.shares.get(agent.id) if job.round else None)
        return next((share for share in shares if share and share.state not in TERMINAL), None)

    def remind(self, agent: str, now: float) -> list[act.Wish]:
        """The plan of an agent's open share once more.  Changes nothing; O(jobs under way)."""
        out: list[act.Wish] = []
        for state in self._under_way():
            Job(state, self.roster, now, out).rejoined(agent, reborn=False)
        return out

    # ------------------------------------------------------------------------------------------------------- dispatch

    def _to_job(self, event: OfJob, now: float, out: list[act.Wish]) -> None:
        if isinstance(event, ev.UpdateOffered | ev.UpdateStored | ev.UpdateSpoiled):
            name = event.offer.job
        else:
            name = event.job
        state = self.state.jobs.get(name)
        if state is None:
            self._unknown_job(event, out)
            return
        job = Job(state, self.roster, now, out)
        match event:
            case ev.UpdateOffered():
                uploads.offered(job, event)
            case ev.UpdateStored():
                uploads.stored(job, event)
            case ev.UpdateSpoiled():
                uploads.spoiled(job, event)
            case ev.ShareMoved():
                job.share_moved(event)
            case ev.PlanReady():
                planning.ready(job, event)
            case ev.PlanFailed():
                planning.failed(job, event)
            case ev.Aggregated():
                job.aggregated(event)
            case ev.AggregateFailed():
                job.aggregate_failed(event)
            case ev.JobPaused():
                steering.pause(job, event)
            case ev.JobResumed():
                steering.resume(job, event)
            case ev.JobRolledBack():
                steering.roll_back(job, event)
            case ev.JobCancelled() if state.phase not in ENDED:
                job.end(Phase.CANCELLED, event.reason)
        rounds.look_ahead(job)

    def _unknown_job(self, event: OfJob, out: list[act.Wish]) -> None:
        self.state.counts["unknown_job"] = self.state.counts.get("unknown_job", 0) + 1
        if isinstance(event, ev.UpdateOffered):
            reason = f"superseded: there is no job {event.offer.job} here"
            out.append(act.Decline(agent=event.agent, xfer=event.offer.blob.xfer, reason=reason))

    def _submit(self, event: ev.JobSubmitted, now: float, out: list[act.Wish]) -> None:
        name = event.spec.job.name
        if name in self.state.jobs:  # the shell refuses a taken name; a replayed submission is harmless
            return
        self.state.jobs[name] = JobState(spec=event.spec, submitted_at=now, since=now, waiting_since=now)
        self.roster.open(self.state.jobs[name])
        Job(self.state.jobs[name], self.roster, now, out).resume()

    def _agent(self, name: str) -> AgentState:
        return self.state.agents.setdefault(name, AgentState(id=name))

    def _joined(self, event: ev.AgentJoined, now: float, out: list[act.Wish]) -> None:
        agent = self._agent(event.agent)
        reborn = agent.session != event.session
        back = reborn or not agent.online
        if back:
            agent.since, agent.reason = now, ""
        agent.session, agent.online = event.session, True
        agent.software, agent.methods = event.software, event.methods
        working = agent.task
        for state in self._under_way():
            job = Job(state, self.roster, now, out)
            if back:
                survey.forgive(job, agent.id, reborn=reborn)
            job.rejoined(agent.id, reborn=reborn)
        self.roster.touch(agent.id)
        if not working:
            out.append(act.Withdraw(agent=agent.id))

    def _left(self, event: ev.AgentLeft, now: float) -> None:
        agent = self._agent(event.agent)
        if agent.session != event.session:
            self.state.counts["stale_death"] = self.state.counts.get("stale_death", 0) + 1
            return
        if agent.online:
            agent.online, agent.since, agent.reason = False, now, event.reason
            self.roster.touch(agent.id)

    def _revoked(self, event: ev.AgentRevoked, now: float, out: list[act.Wish]) -> None:
        agent, reason = self._agent(event.agent), f"revoked: {event.reason}" if event.reason else "revoked"
        agent.online, agent.since, agent.reason = False, now, reason
        for state in self._under_way():
            Job(state, self.roster, now, out).expel(agent.id, reason)
        self.roster.touch(agent.id)

    def _lost(self, event: ev.BusLost, now: float) -> None:
        """A broker that goes down says that all agents have gone; what is waited for waits until somebody can be heard."""
        if not self.state.deaf_since:
            self.state.deaf_since = min(event.since or now, now)
            self.roster.touch(*self.state.agents)

    def _found(self, now: float, out: list[act.Wish]) -> None:
        if not self.state.deaf_since:
            return
        absence_s = now - self.state.deaf_since
        self.state.deaf_since, self.state.heard_from = 0.0, now + min(RETURN_S, 2 * absence_s)
        for state in self._under_way():
            Job(state, self.roster, now, out).postpone(absence_s)
        self.roster.touch(*self.state.agents)

    # ----------------------------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        """Assert what must hold between any two events.  Cost: linear in agents and shares."""
        for agent in self.state.agents.values():
            assert not agent.task or agent.task in self.state.jobs, f"{agent.id} works for no job"
        for name, job in self.state.jobs.items():
            busy = {a.id for a in self.state.agents.values() if a.task == name}
            open_shares = {m.survey.agent for m in job.members.values() if m.survey and m.survey.state not in TERMINAL}
            if job.round:
                mine = {a for a, s in job.round.shares.items() if s.state not in TERMINAL}
                assert not mine & open_shares, f"{name}: two shares for one agent"
                open_shares |= mine
                assert job.phase in {Phase.COLLECTING, Phase.AGGREGATING, Phase.EVALUATING}, (
                    f"{name}: round in {job.phase}"
                )
                assert job.round.number == job.round_number + 1, f"{name}: round number"
                for share in job.round.shares.values():
                    done = share.state is ExecState.DONE
                    assert not done or job.round.purpose == "evaluate" or share.offer, f"{name}: done without update"
            assert busy == open_shares, f"{name}: busy {sorted(busy)} but open shares {sorted(open_shares)}"
            assert job.phase not in ENDED or not busy, f"{name}: ended, yet agents work"
            self._check_steering(name, job)
            if job.phase is Phase.COLLECTING:
                assert job.round, f"{name}: collecting without a round"
        self.roster.check()
        at = self.wake_at
        assert at is None or at > self._now, f"wake_at {at} is not after {self._now}"

    @staticmethod
    def _check_steering(name: str, job: JobState) -> None:
        """A pause holds, and nothing that was made from a version the job has left is counted."""
        may_end = {Phase.COLLECTING, Phase.AGGREGATING, Phase.EVALUATING}
        assert job.pause is None or job.phase in may_end | {Phase.PAUSED}, f"{name}: paused, yet {job.phase}"
        assert job.pause or job.phase is not Phase.PAUSED, f"{name}: paused by nobody"
        assert max(job.n_stopped, job.first_attempt) <= job.attempt, f"{name}: more stops than attempts"
        shares = [*job.carried.values(), *(job.round.shares.values() if job.round else ())]
        for share in shares:
            assert not share.offer or share.offer.attempt >= job.first_attempt, f"{name}: an update of a version left"
        for rollback in job.rollbacks:
            assert rollback.of < rollback.version <= job.version, f"{name}: {rollback}, version {job.version}"


def encode_state(state: FleetState) -> bytes:
    """The snapshot's bytes (msgpack)."""
    jobs = {name: packing.packed(job) for name, job in state.jobs.items()}
    return msgspec.msgpack.encode(msgspec.structs.replace(state, v=STATE_VERSION, jobs=jobs))


def decode_state(data: bytes) -> FleetState:
    """The state from a snapshot.  Raises BadConfig for a snapshot of a newer version."""
    version = msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])["v"]
    if msgspec.msgpack.decode(version, type=int) > STATE_VERSION:
        raise BadConfig("this state was written by a newer fedpipe: install that version again")
    state = msgspec.msgpack.decode(data, type=FleetState)
    for job in state.jobs.values():
        packing.unpack(job)
    return state
