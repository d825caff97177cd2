"""One job: from the first survey to a named end, one round after the other.

A job is a loop over one state, WAITING, from which every round starts and to which every round returns:

    WAITING     agents are surveyed (what base, which matrices, how much data); with enough of them idle, a round is planned
    PLANNING    the planner decides who trains what
    COLLECTING  shares are out; updates come in; the round closes when all have answered, when enough have, or at its deadline
    AGGREGATING the stored updates are folded into the next version
    EVALUATING  after the last round everyone measures the final version
    PAUSED      an operator wants no further round for now; nothing is waited for (steering.py)

A survey belongs to an agent, not to a phase: one that joins in round 7 is surveyed while the others train and takes part in
round 8.  A share is an agent's part of a round.  Nothing here waits for an agent: shares end by an answer, by the deadline, or
by the agent having vanished for longer than the grace.  A finished share outlives a failed attempt of its round, and a late
update may enter the next aggregate at a discount, so work that was done is not thrown away.
"""

from __future__ import annotations

import math

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core import learning, planning, plans, rounds, survey
from coordinator.core.roster import Roll, Roster
from coordinator.core.state import ENDED, MOVES, Cause, JobState, Phase, Share, shed
from protocol.errors import IllegalMove
from protocol.messages import TERMINAL, Cancel, ExecState


class Job:
    """The moves of one job over its state, for the length of one event.  Wishes are collected in `out`."""

    def __init__(self, state: JobState, roster: Roster, now: float, out: list[act.Wish]) -> None:
        self.state = state
        self.roster = roster
        self.fleet = roster.fleet
        self.now = now
        self.out = out
        self.name = state.spec.job.name
        self.rules = state.spec.round

    # ------------------------------------------------------------------------------------------------------- phases

    def move(self, to: Phase, reason: str = "") -> None:
        """Go over to another phase.  Raises IllegalMove for one that MOVES does not hold."""
        if to not in MOVES[self.state.phase]:
            story = f"job {self.name}: {self.state.phase} -> {to} in round {self.state.round_number}: {reason}"
            raise IllegalMove(story)
        if to is Phase.WAITING and self.state.phase is not Phase.PLANNING:
            self.state.waiting_since = self.now
        if to is Phase.PLANNING:
            self.roster.hold(self.name, self.state.planned)
        elif self.state.phase is Phase.PLANNING:
            self.roster.release(self.name, self.state.planned)
        self.state.phase, self.state.reason, self.state.since = to, reason, self.now
        self.announce()

    def announce(self) -> None:
        """Say anew where the job stands."""
        self.out.append(act.Announce(card=plans.job_card(self.state)))

    def end(self, to: Phase, reason: str) -> None:
        """End the job: free every agent, say why, hand out what there is."""
        for share in survey.open_surveys(self.state):
            self.end_share(share, 0, ExecState.CANCELLED, reason or f"the job is {to}")
        for share in rounds.open_shares(self.state):
            self.end_share(share, self.state.round_number + 1, ExecState.CANCELLED, reason)
        if self.state.round:
            rounds.record(self, reason or str(to))
        self.move(to, reason)
        self.state.ended_at, self.state.round, self.state.pause = self.now, None, None
        self.roster.close(self.name)
        detail, cause = shed(self.state), self.state.cause
        self.out.append(act.Finish(job=self.name, phase=str(to), reason=reason, cause=cause, detail=detail))

    def fail(self, cause: Cause, why: str) -> None:
        """End the job as failed."""
        self.state.cause = cause
        self.end(Phase.FAILED, f"{cause}: {why}")

    def advance(self) -> None:
        """Do whatever has become possible or due.  While nobody can be heard, nothing begins and no wait is over."""
        if self.state.phase is Phase.WAITING and self.state.pause:
            self.move(Phase.PAUSED, plans.said_by(self.state.pause.by, self.state.pause.reason))
        if self.fleet.deaf_since:
            if self.state.phase in {Phase.COLLECTING, Phase.EVALUATING} and self.roll.is_answered:
                rounds.close(self, "all have answered")
            return
        survey.end_late(self)
        if self.state.phase is not Phase.PAUSED:
            survey.ask(self)
        if self.state.phase is Phase.WAITING:
            self._start()
        elif self.state.phase in {Phase.COLLECTING, Phase.EVALUATING}:
            rounds.close_if_due(self)

    def postpone(self, absence_s: float) -> None:
        """Nobody could be heard for so long: whoever was waited for is waited for as much longer."""
        for share in survey.open_surveys(self.state):
            self.state.members[share.agent].survey_close_at += absence_s
        self.state.waiting_since += absence_s
        if self.state.round:
            self.state.round.stop_at += absence_s
            self.state.round.close_at += absence_s

    @property
    def wake_at(self) -> float | None:
        """When something becomes due by time alone; None when nothing does."""
        if self.state.phase in ENDED or self.fleet.deaf_since:
            return None
        roll = self.roll
        due = [instants.after(self.now) for instants in (roll.survey_closes, roll.survey_waits, roll.share_waits)]
        if self.state.phase is Phase.WAITING:
            waits = (self.rules.start_wait_s, self.rules.survey_s, self.rules.wait_s)
            due += [at for wait in waits if (at := self.state.waiting_since + wait) > self.now]
            due += [roll.missed.after(self.now)] if self._is_final or self.state.is_stopped else []
        if self.state.round and self.state.phase in {Phase.COLLECTING, Phase.EVALUATING}:
            due.append(self.state.round.close_at)
        return min((at for at in due if at is not None), default=None)

    # ------------------------------------------------------------------------------------------------- start a round

    @property
    def roll(self) -> Roll:
        """What the agents are to this job."""
        return self.roster.rolls[self.name]

    def ready(self) -> list[str]:
        """Agents that could take a share of the next round now, by name.  Cost: linear in them."""
        return self.roll.ready.names()

    def _start(self) -> None:
        if self._needs_no_more():
            rounds.begin(self, "train", {})
            return
        first = self.state.round_number == 0 and self.state.attempt == 0
        roll = self.roll
        late = (
            self.now >= self.state.waiting_since + self.rules.survey_s
        )  # or ever new arrivals would put it off for ever
        if not first or late or roll.surveys_vanished(self.now):
            survey.pin_base(self)
            if self._more_to_come():
                return
            if self._is_final:
                if roll.missed.after(self.now) is None:  # measured by all who may still come
                    choices = {a: plans.evaluation_choice(self.state, a) for a in self.ready()}
                    rounds.begin(self, "evaluate", choices)
                return
            if roll.ready and len(roll.ready) >= self.needed(first=first):
                planning.start(self, self.ready())
                return
        if self.now >= self.state.waiting_since + self.rules.wait_s:
            self.fail(*plans.no_agents(self.state, self.fleet))

    def _needs_no_more(self) -> bool:
        """Whether what an attempt lacked came in after it; those that were only stopped are asked again, if they are there."""
        if not self.state.carried or len(self.state.carried) < self.state.quorum:
            return False
        may_come = self.roll.ready or self.roll.missed.after(self.now) is not None or self._more_to_come()
        return not (self.state.is_stopped and may_come)

    def _more_to_come(self) -> bool:
        """Whether to wait for agents of another job: jobs take turns, none lives on what another leaves over."""
        enough = not self._is_final and self.rules.n_agents and len(self.roll.ready) >= self.wanted()
        return bool(self.roll.coming) and not enough and self.now < self.state.waiting_since + self.rules.wait_s

    def wanted(self) -> int:
        """How many agents shall be asked."""
        return math.ceil(self.rules.n_agents * self.rules.over_select_ratio) - len(self.state.carried)

    def needed(self, *, first: bool) -> int:
        """How many agents a round must have; for the first one more are waited for at first."""
        patient = first and self.now < self.state.waiting_since + self.rules.start_wait_s
        wanted = max(self.rules.min_agents, self.rules.start_agents if patient else 0)
        return wanted - len(self.state.carried)

    @property
    def _is_final(self) -> bool:
        return self.state.round_number >= self.rules.n_rounds

    def awaits(self, phase: Phase, number: int, attempt: int) -> bool:
        """Whether this is what the job waits for now."""
        asked = (self.state.round_number + 1, self.state.attempt)
        return self.state.phase is phase and (number, attempt) == asked

    def end_share(self, share: Share, number: int, to: ExecState, reason: str, *, keep: bool = False) -> None:
        """End one share: free its agent and clear its plan; an agent that may still be at work is told to stop.

        With `keep` it keeps what it has trained, for another attempt of the round.
        """
        share.state, share.reason, share.ended_at = to, reason, self.now
        agent = self.fleet.agents[share.agent]
        if agent.task == self.name:
            agent.task = ""
            stops = to not in {ExecState.DONE, ExecState.FAILED, ExecState.REJECTED}
            key = {"job": self.name, "round": number, "attempt": share.attempt}
            cancel = Cancel(**key, reason=reason[:2000], keep=keep) if stops else None  # type: ignore[arg-type]
            self.out.append(act.Withdraw(agent=share.agent, cancel=cancel))
        self.roster.touch(share.agent)

    # ------------------------------------------------------------------------------------------------- aggregation

    def aggregated(self, event: ev.Aggregated) -> None:
        """A new version: the round is over."""
        if not self.awaits(Phase.AGGREGATING, event.round, event.attempt):
            return
        rounds.record(self, "aggregated")
        learning.overhead(self)
        state, ended = self.state, self.state.round
        assert ended is not None
        state.version, state.model, state.master = event.version, event.model, event.master
        state.round_number, state.attempt, state.round = event.round, 0, None
        state.n_stopped = state.first_attempt = 0
        self.roster.touch(*ended.shares)
        if event.version == 1 and state.plan and state.plan.train_s:
            state.stale = "agents now carry the fleet's adapter too"
        oldest = event.round - self.rules.max_staleness
        state.missed = {a: {r: k for r, k in by.items() if r > oldest} for a, by in state.missed.items()}
        state.seen = {a: {r: d for r, d in by.items() if r > oldest} for a, by in state.seen.items()}
        over = oldest if self.rules.late == "add" else event.round
        tried = ((a, {r: k for r, k in by.items() if r > over}) for a, by in state.tried.items())
        state.tried = {agent: by_round for agent, by_round in tried if by_round}
        self.out.append(act.Serve(job=self.name, blob=event.model))
        self.move(Phase.WAITING)

    def aggregate_failed(self, event: ev.AggregateFailed) -> None:
        """The updates are all stored, so a failure here is the coordinator's own: a full disk, a missing file."""
        if self.awaits(Phase.AGGREGATING, event.round, event.attempt):
            self.fail(Cause.AGGREGATE, event.reason)

    # ------------------------------------------------------------------------------------------------- from agents

    def share_moved(self, event: ev.ShareMoved) -> None:
        """An agent moved on with its share; an older or unknown transition is counted and ignored."""
        share = self._share(event)
        if share is None or event.serial <= share.serial:
            self.count("stale_execution")
            return
        share.serial = event.serial
        if event.round == 0:
            survey.moved(self, share, event)
            return
        found = event.evaluated
        if found and not all(map(math.isfinite, [found.loss, *found.metrics.values()])):
            self.count("not_finite")
        elif found and found.version == self.state.version:
            share.evaluated = found
        share.energy = event.energy or share.energy
        if share.state in TERMINAL:
            return
        round_ = self.state.round
        assert round_ is not None
        if event.state is ExecState.DONE and round_.purpose == "train":
            return  # only a stored update makes a training share done
        if event.state in TERMINAL:
            if event.state is ExecState.FAILED:
                learning.out_of_memory(self, event.agent, share.choice, event.reason)
            self.end_share(share, event.round, event.state, event.reason)
        else:
            share.state, share.reason = event.state, event.reason
            share.entered.setdefault(event.state, self.now)

    def _share(self, event: ev.ShareMoved) -> Share | None:
        if event.round == 0:
            member = self.state.members.get(event.agent)
            share = member.survey if member else None
        else:
            round_ = self.state.round
            share = round_.shares.get(event.agent) if round_ and round_.number == event.round else None
        return share if share and share.attempt == event.attempt else None

    def rejoined(self, agent: str, *, reborn: bool) -> None:
        """An agent said birth: give it again what it should be doing."""
        member = self.state.members.get(agent)
        if member and member.survey and member.survey.state not in TERMINAL:
            member.survey.serial = 0 if reborn else member.survey.serial
            self.out.append(act.Assign(agent=agent, plan=plans.survey_plan(self.state, member, self.now)))
        share = self.state.round.shares.get(agent) if self.state.round else None
        if share and share.state not in TERMINAL and self.state.round:
            share.serial = 0 if reborn else share.serial
            plan = plans.share_plan(self.state, self.state.round, share, self.now)
            self.out.append(act.Assign(agent=agent, plan=plan))

    def expel(self, agent: str, reason: str) -> None:
        """An agent may not take part any more: end what it has, and wait for nothing of it."""
        member = self.state.members.get(agent)
        if member:
            if member.survey and member.survey.state not in TERMINAL:
                self.end_share(member.survey, 0, ExecState.FAILED, reason)
            member.excluded, member.surveyed = reason, None
        share = self.state.round.shares.get(agent) if self.state.round else None
        if share and self.state.round and share.state not in TERMINAL:
            self.end_share(share, self.state.round.number, ExecState.FAILED, reason)
        self.state.missed.pop(agent, None)
        self.state.tried.pop(agent, None)

    def count(self, kind: str) -> None:
        """Count what a peer did wrong or twice."""
        self.fleet.counts[kind] = self.fleet.counts.get(kind, 0) + 1

    # ---------------------------------------------------------------------------------------------------- restart

    def resume(self) -> None:
        """Ask again for everything that is under way.  Changes nothing: a replay does not know of it."""
        state = self.state
        if state.phase in ENDED:
            return
        self.announce()
        if state.model:
            self.out.append(act.Serve(job=self.name, blob=state.model))
        for agent in sorted(state.members):
            self.rejoined(agent, reborn=False)
        if state.phase is Phase.PLANNING:
            planning.ask(self)
        elif state.phase is Phase.AGGREGATING and state.round:
            self.out.append(plans.aggregate(state, state.round))
