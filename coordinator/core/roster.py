"""What every agent is to every job at this moment, derived from the state and kept up with it: no event walks the fleet.

The state (state.py) is the truth and the only thing that is stored.  What a job asks of it again and again (who could take a
share now, is anybody still at work, who comes back until when) would cost a walk over all agents at each event: a survey of
10,000 agents would look at each 10,000 times.  So there is one pure function, `Roll.standing`, from the state to the standing
of one agent in one job, and whoever changes something about an agent calls `touch`, which puts the agent into other groups.
A restart makes the roster anew from the state; that both are equal after every event is a law that the tests hold.

Cost: `touch` is O(jobs under way) and O(log agents) where an instant changes; every question is O(1), amortised.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.core.state import ENDED, AgentState, FleetState, JobState, Phase
from protocol.messages import TERMINAL, ExecState


class Standing(NamedTuple):
    """What one agent is to one job.  Instants are seconds since the epoch, None where nothing is waited for."""

    ready: bool = False
    """It could take a share of the next round now."""
    coming: bool = False
    """Another job has it, and it is welcome afterwards."""
    unasked: bool = False
    """It is idle, and a survey of it is wanted."""
    surveyed: bool = False
    stray: bool = False
    """Surveyed, and its base is not known to be the job's."""
    surveying: bool = False
    """It is there and its survey is open."""
    working: bool = False
    """It is there and its share is open."""
    done: bool = False
    """Its share of the open round is done."""
    survey_closes_at: float | None = None
    survey_waits_until: float | None = None
    """It has gone with an open survey."""
    share_waits_until: float | None = None
    """It has gone with an open share."""
    missed_until: float | None = None
    """It was surveyed and has gone."""


NOWHERE = Standing()


class Group(set[str]):
    """Agents of whom something holds."""

    def put(self, agent: str, holds: bool) -> None:
        """Let it hold of this agent, or not."""
        (self.add if holds else self.discard)(agent)

    def names(self) -> list[str]:
        """Them all, in order.  A set that was emptied keeps its table, and to walk that would cost as much as before."""
        return sorted(self) if self else []


class Instants:
    """At most one instant per agent; the earliest to come is found without a walk."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def put(self, agent: str, at: float | None) -> None:
        """Set this agent's instant, or take it away."""
        if at is None:
            del self._at[agent]
        else:
            self._at[agent] = at
            heapq.heappush(self._heap, (at, agent))

    def __len__(self) -> int:
        """Agents with an instant."""
        return len(self._at)

    def after(self, now: float) -> float | None:
        """The earliest instant after `now`, which never goes back; None when there is none."""
        while self._heap and (self._heap[0][0] <= now or self._at.get(self._heap[0][1]) != self._heap[0][0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def past(self, now: float) -> list[str]:
        """The agents whose instant has come since this was last asked, by name; `after` forgets them."""
        found = set()
        while self._heap and self._heap[0][0] <= now:
            at, agent = heapq.heappop(self._heap)
            if self._at.get(agent) == at:
                found.add(agent)
        return sorted(found)


class Roll:
    """The standing of all agents in one job, and those of one standing together."""

    def __init__(self, job: JobState, fleet: FleetState) -> None:
        self.job = job
        self._name, self._method = job.spec.job.name, job.spec.job.method
        self._grace_s = job.spec.round.offline_grace_s
        self._only = frozenset(job.spec.job.only)
        self._fleet, self._agents = fleet, fleet.agents
        self.of: dict[str, Standing] = {}
        self.ready, self.coming, self.unasked, self.surveyed, self.stray = (Group() for _ in range(5))
        self.surveying, self.working, self.done = (Group() for _ in range(3))
        self.survey_closes, self.survey_waits, self.share_waits, self.missed = (Instants() for _ in range(4))
        self._groups = (
            *(
                self.ready,
                self.coming,
                self.unasked,
                self.surveyed,
                self.stray,
                self.surveying,
                self.working,
                self.done,
            ),
            *(self.survey_closes, self.survey_waits, self.share_waits, self.missed),
        )

    def standing(self, agent: AgentState, holder: str) -> Standing:
        """By the state alone; `holder` is the job that is just planning for this agent, or ""."""
        job = self.job
        member = job.members.get(agent.id)
        share = job.round.shares.get(agent.id) if job.round else None
        gone_from = max(agent.since, self._fleet.heard_from)
        back_by = None if agent.online else math.inf if self._fleet.deaf_since else gone_from + self._grace_s
        held = holder not in {"", self._name}
        free = not agent.task and not held and self._may_join(agent)
        elsewhere = held or agent.task not in {"", self._name}
        welcome = agent.id not in job.carried and not (member and member.excluded)
        found = member.surveyed if member else None
        is_surveying = member is not None and member.survey is not None and member.survey.state not in TERMINAL
        is_working = share is not None and share.state not in TERMINAL
        return Standing(
            ready=free and found is not None and agent.id not in job.carried,
            coming=elsewhere and welcome and self._may_join(agent),
            unasked=free and found is None and not (member and member.excluded),
            surveyed=found is not None,
            stray=found is not None and found.base_sha256 != job.base_sha256,
            surveying=is_surveying and agent.online,
            working=is_working and agent.online,
            done=share is not None and share.state is ExecState.DONE,
            survey_closes_at=member.survey_close_at if is_surveying and member else None,
            survey_waits_until=back_by if is_surveying else None,
            share_waits_until=back_by if is_working else None,
            missed_until=back_by if found else None,
        )

    def _may_join(self, agent: AgentState) -> bool:
        """Whether this agent is there, is wanted, knows the method and may train at present."""
        wanted = agent.online and (not self._only or agent.id in self._only) and self._method in agent.methods
        return wanted and not (agent.report and agent.report.allowance and agent.report.allowance.paused)

    def touch(self, agent: str, holder: str) -> None:
        """Something about this agent has changed: find its standing anew."""
        old, new = self.of.get(agent, NOWHERE), self.standing(self._agents[agent], holder)
        if new == old:
            return
        self.of[agent] = new
        for group, was, now in zip(self._groups, old, new, strict=True):
            if was != now:
                group.put(agent, now)  # type: ignore[attr-defined]  # a bool for a group, an instant for instants

    def surveys_vanished(self, now: float) -> bool:
        """Whether no survey is open whose agent is there or may still come back in time."""
        return not self.surveying and self.survey_waits.after(now) is None

    @property
    def is_answered(self) -> bool:
        """Whether every share of the open round has ended."""
        return not self.working and not self.share_waits

    def shares_vanished(self, now: float) -> bool:
        """Whether no share is open whose agent is there or may still come back in time."""
        return not self.working and self.share_waits.after(now) is None


class Roster:
    """The rolls of all jobs under way, in the order in which the jobs were handed in."""

    def __init__(self, fleet: FleetState) -> None:
        self.fleet = fleet
        self.rolls: dict[str, Roll] = {}
        self._holder = _holders(fleet)
        for job in fleet.jobs.values():
            if job.phase not in ENDED:
                self.open(job)

    def open(self, job: JobState) -> None:
        """Take in a job.  Cost: O(agents)."""
        roll = self.rolls[job.spec.job.name] = Roll(job, self.fleet)
        for agent in self.fleet.agents:
            roll.touch(agent, self._holder.get(agent, ""))

    def close(self, job: str) -> None:
        """A job has ended: nothing is asked about it any more."""
        del self.rolls[job]

    def touch(self, *agents: str) -> None:
        """Something about these agents has changed."""
        for agent in agents:
            for roll in self.rolls.values():
                roll.touch(agent, self._holder.get(agent, ""))

    def hold(self, job: str, agents: Iterable[str]) -> None:
        """A job is just being planned for these agents: no other may have them."""
        for agent in agents:
            self._holder[agent] = job
            self.touch(agent)

    def release(self, job: str, agents: Iterable[str]) -> None:
        """The plan of a job is made, or not wanted any more."""
        for agent in agents:
            if self._holder.get(agent) == job:
                del self._holder[agent]
                self.touch(agent)

    def check(self) -> None:
        """Assert that a roster made anew from the state would say the same.  Cost: linear in agents and jobs."""
        under_way = [name for name, job in self.fleet.jobs.items() if job.phase not in ENDED]
        assert list(self.rolls) == under_way, f"rolls of {list(self.rolls)}, under way {under_way}"
        assert self._holder == _holders(self.fleet), "agents are held by other jobs than those that are being planned"
        for name, roll in self.rolls.items():
            anew = Roll(self.fleet.jobs[name], self.fleet)
            for agent in self.fleet.agents.values():
                said, is_ = roll.of.get(agent.id, NOWHERE), anew.standing(agent, self._holder.get(agent.id, ""))
                assert said == is_, f"{name}: {agent.id} stands as {is_}, not {said}"
            assert roll.of.keys() <= self.fleet.agents.keys(), f"{name}: agents that nobody knows"


def _holders(fleet: FleetState) -> dict[str, str]:
    """Which job is just being planned for which agent."""
    planning = (job for job in fleet.jobs.values() if job.phase is Phase.PLANNING)
    return {agent: job.spec.job.name for job in planning for agent in job.planned}
