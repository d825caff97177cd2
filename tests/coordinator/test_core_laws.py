"""Laws of the coordinator's core: whatever comes in whatever order, these hold.

The machine plays a fleet whose agents are now obedient, now confused, a broker that repeats and delays, and slow work that
answers twice or never.  What it remembers of the wishes (who holds which plan, which updates were folded) is kept apart from the
core's own state, so the core is not asked to judge itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, Phase
from protocol.messages import Blob, Evaluated, ExecState, Matrix, Offer, Plan, Surveyed

if TYPE_CHECKING:
    from collections.abc import Sequence

T0 = 1_750_000_000.0
AGENTS = ("a", "b", "c", "d")
JOBS = ("x", "y")
MATRICES = [Matrix(name="q", d_out=8, d_in=8)]
MAX_TICKS = 400
T = TypeVar("T")

agents = st.sampled_from(AGENTS)
sessions = st.sampled_from([f"{n:016x}" for n in (1, 2)])
rounds = st.fixed_dictionaries(
    {
        "n_rounds": st.integers(1, 3),
        "n_agents": st.sampled_from([0, 2, 3]),
        "min_agents": st.integers(1, 2),
        "start_agents": st.sampled_from([0, 3]),
        "over_select_ratio": st.sampled_from([1.0, 1.5]),
        "quorum_ratio": st.sampled_from([0.0, 0.5, 1.0]),
        "max_attempts": st.integers(1, 3),
        "late": st.sampled_from(["drop", "add"]),
        "max_staleness": st.integers(1, 2),
        "train_s": st.just(100.0),
        "grace_s": st.just(20.0),
        "offline_grace_s": st.just(10.0),
        "survey_s": st.just(50.0),
        "start_wait_s": st.just(30.0),
        "wait_s": st.sampled_from([40.0, 400.0, 400.0]),
    }
)
surveys = st.builds(
    Surveyed,
    base_sha256=st.sampled_from(["a" * 64, "a" * 64, "b" * 64]),
    matrices=st.just(MATRICES),
    n_train=st.sampled_from([0, 9, 9]),
    n_eval=st.just(1),
)
losses = st.sampled_from([1.0, math.nan, math.inf])


def _offer(plan: Plan, tag: int, *, size: int = 100, samples: int = 4) -> Offer:
    blob = Blob(sha256=f"{tag:064x}", size=size)
    return Offer(job=plan.job, round=plan.round, attempt=plan.attempt, kind="lora", blob=blob, samples=samples)


class World(RuleBasedStateMachine):
    """Random events; `held`, `folded` and the lists are what an observer of the wishes knows."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.now = T0
        self.log: list[tuple[ev.Happened, float, list[act.Wish], bytes]] = []
        self.plans: list[tuple[str, Plan]] = []
        self.train_plans: list[tuple[str, Plan]] = []
        self.offers: list[tuple[str, Offer]] = []
        self.fetches: list[act.Fetch] = []
        self.make_plans: list[act.MakePlan] = []
        self.folds: list[act.Aggregate] = []
        self.held: dict[str, Plan] = {}
        self.stored: dict[tuple[str, str, int], str] = {}
        self.finished: list[str] = []
        self.serial = 0
        self.tag = 0

    # -------------------------------------------------------------------------------------------- one door, all laws

    def feed(self, event_: ev.Happened) -> list[act.Wish]:
        wishes = self.fleet.handle(event_, self.now)
        snapshot = encode_state(self.fleet.state)
        self.log.append((event_, self.now, wishes, snapshot))
        for wish in wishes:
            self._observe(wish)
        self._answers_once(event_, wishes)
        return wishes

    def _observe(self, wish: act.Wish) -> None:
        match wish:
            case act.Assign():
                holds = self.held.get(wish.agent)
                assert holds is None or holds.job == wish.plan.job, f"{wish.agent} shall serve two jobs"
                self.held[wish.agent] = wish.plan
                self.plans.append((wish.agent, wish.plan))
                if wish.plan.purpose == "train":
                    self.train_plans.append((wish.agent, wish.plan))
            case act.Withdraw():
                self.held.pop(wish.agent, None)
            case act.Fetch():
                self.fetches.append(wish)
            case act.MakePlan():
                self.make_plans.append(wish)
            case act.Aggregate():
                self._fold_is_lawful(wish)
                self.folds.append(wish)
            case act.Finish():
                assert wish.job not in self.finished, f"{wish.job} finished twice"
                assert wish.reason or wish.phase == "completed", "an end without a reason"
                self.finished.append(wish.job)
            case _:
                pass

    def _fold_is_lawful(self, fold: act.Aggregate) -> None:
        before = {(c.agent, c.round) for f in self.folds if f.job == fold.job for c in f.contributions}
        now = [(c.agent, c.round) for c in fold.contributions]
        assert now == sorted(set(now), key=lambda key: (key[1], key[0])), "twice or out of order"
        assert not before & set(now), f"counted again: {before & set(now)}"
        rules = self.fleet.state.jobs[fold.job].spec.round
        fresh = [c for c in fold.contributions if c.round == fold.round]
        assert len(fresh) >= rules.min_agents
        for c in fold.contributions:
            assert self.stored[fold.job, c.agent, c.round] == c.sha256, "folded what was never stored"
            assert 0 <= fold.round - c.round <= (rules.max_staleness if rules.late == "add" else 0)
            assert 0 < c.weight <= 4.0
        event("late update folded" if len(fresh) < len(fold.contributions) else "folded")

    def _answers_once(self, event_: ev.Happened, wishes: list[act.Wish]) -> None:
        """An offer gets exactly one kind of answer; a stored update is acknowledged or declined."""
        if not isinstance(event_, ev.UpdateOffered | ev.UpdateStored):
            return
        xfer = event_.offer.blob.xfer
        kinds = (act.Acknowledge, act.Decline, *((act.Fetch,) if isinstance(event_, ev.UpdateOffered) else ()))
        answers = [w for w in wishes if isinstance(w, kinds)]
        assert len(answers) == 1, f"{len(answers)} answers to one offer"
        answer = answers[0]
        assert answer.agent == event_.agent
        assert (answer.offer.blob.xfer if isinstance(answer, act.Fetch) else answer.xfer) == xfer

    @invariant()
    def holds(self) -> None:
        self.fleet.check()
        snapshot = encode_state(self.fleet.state)
        assert encode_state(decode_state(snapshot)) == snapshot
        self.fleet.resume(self.now)
        assert encode_state(self.fleet.state) == snapshot, "resume() changed the state"
        ended = {name for name, job in self.fleet.state.jobs.items() if job.phase in ENDED}
        assert ended == set(self.finished)
        busy = {a.id: a.task for a in self.fleet.state.agents.values() if a.task}
        assert busy == {a: plan.job for a, plan in self.held.items()}, "a plan is out that nobody keeps track of"

    # ---------------------------------------------------------------------------------------------------- how it begins

    @initialize(first=rounds, second=st.none() | rounds)
    def submit(self, first: dict[str, Any], second: dict[str, Any] | None) -> None:
        for name, table in zip(JOBS, (first, second), strict=True):
            if table:
                job = {"job": {"name": name}, "model": {"source": "toy"}, "round": table}
                self.feed(ev.JobSubmitted(spec=msgspec.convert(job, JobSpec)))
        for agent in AGENTS[:3]:
            self.join(agent, f"{1:016x}")

    # ------------------------------------------------------------------------------------------------ what goes well

    def _open(self, agent: str) -> Plan | None:
        return self.held.get(agent) if self.fleet.state.agents[agent].online else None

    @rule(agent=agents)
    def join(self, agent: str, session: str = f"{1:016x}") -> None:
        self.feed(ev.AgentJoined(agent=agent, session=session, methods=["qlora"]))

    @rule(n_days=st.integers(1, 4), only=st.sets(agents, min_size=1) | st.just(set(AGENTS)))
    def good_days(self, n_days: int, only: set[str]) -> None:
        """All slow work is answered and some agents do what is wanted of them, a few times over."""
        for _ in range(n_days):
            self.work()
            self.obey(only)

    @rule(only=st.sets(agents, min_size=1))
    def obey(self, only: set[str]) -> None:
        """Some agents do what their plans say."""
        for agent in sorted(only):
            if agent in self.fleet.state.agents and (plan := self._open(agent)):
                self._do(agent, plan)

    @rule(tardy=st.sets(agents, min_size=1, max_size=2), n_days=st.integers(0, 2))
    def straggle(self, tardy: set[str], n_days: int) -> None:
        """Some agents miss the deadline of what they hold and hand it over afterwards."""
        owed = {a: p for a, p in self.held.items() if a in tardy and p.purpose == "train"}
        self.obey(set(AGENTS) - tardy)
        if owed:
            self.now += 120.0
            self.feed(ev.Tick())
        self.good_days(n_days, set(AGENTS) - tardy)
        for agent, plan in sorted(owed.items()):
            self._do(agent, plan)

    def _do(self, agent: str, plan: Plan) -> None:
        self.serial += 1
        said = {"agent": agent, "job": plan.job, "round": plan.round, "attempt": plan.attempt, "serial": self.serial}
        if plan.purpose == "survey":
            found = Surveyed(base_sha256="a" * 64, matrices=MATRICES, n_train=9, n_eval=1)
            self.feed(ev.ShareMoved(**said, state=ExecState.DONE, surveyed=found))
        elif plan.purpose == "evaluate":
            found = Evaluated(version=plan.version, n_samples=1, n_tokens=9, loss=1.0)
            self.feed(ev.ShareMoved(**said, state=ExecState.DONE, evaluated=found))
        else:
            self.tag += 1
            self._hand_over(agent, _offer(plan, self.tag))

    def _hand_over(self, agent: str, offer: Offer) -> None:
        self.offers.append((agent, offer))
        wishes = self.feed(ev.UpdateOffered(agent=agent, offer=offer))
        if any(isinstance(w, act.Fetch) for w in wishes):
            self._store(agent, offer)

    def _store(self, agent: str, offer: Offer) -> None:
        known = self.stored.get((offer.job, agent, offer.round))
        self.stored.setdefault((offer.job, agent, offer.round), offer.blob.sha256)
        wishes = self.feed(ev.UpdateStored(agent=agent, offer=offer))
        if known is None and any(isinstance(w, act.Decline) for w in wishes):
            del self.stored[offer.job, agent, offer.round]

    @rule()
    def work(self) -> None:
        """Planner and aggregation answer whatever is asked now."""
        for wish in self.fleet.resume(self.now):
            if isinstance(wish, act.MakePlan):
                self._plan(wish, set(wish.agents))
            elif isinstance(wish, act.Aggregate):
                self._fold(wish)

    def _plan(self, asked: act.MakePlan, chosen: set[str]) -> None:
        choices = {a: Choice(ranks={"q": 2}, bits="nf4", n_steps=1, batch=4) for a in sorted(chosen)}
        self.feed(ev.PlanReady(job=asked.job, round=asked.round, attempt=asked.attempt, choices=choices))

    def _fold(self, asked: act.Aggregate) -> None:
        digest = f"{asked.version:064x}"
        said = {"job": asked.job, "round": asked.round, "attempt": asked.attempt, "version": asked.version}
        self.feed(ev.Aggregated(**said, model=Blob(sha256=digest, size=9), master=digest))

    # ------------------------------------------------------------------------------------------------- what goes wrong

    @rule(agent=agents, session=sessions)
    def reborn(self, agent: str, session: str) -> None:
        self.join(agent, session)

    @rule(agent=agents, session=sessions)
    def leave(self, agent: str, session: str) -> None:
        self.feed(ev.AgentLeft(agent=agent, session=session, reason="will"))

    @precondition(lambda self: self.plans)
    @rule(
        data=st.data(),
        state=st.sampled_from(list(ExecState)),
        surveyed=st.none() | surveys,
        loss=st.none() | losses,
        stranger=st.sampled_from([None, None, None, "a", "z"]),
        back=st.sampled_from([-1, -1, 0, 3]),
    )
    def babble(
        self,
        data: st.DataObject,
        state: ExecState,
        surveyed: Surveyed | None,
        loss: float | None,
        stranger: str | None,
        back: int,
    ) -> None:
        """An agent says anything about any share that ever was, new, old or of somebody else."""
        agent, plan = self._any(data, self.plans)
        self.serial += 1
        found = Evaluated(version=plan.version, n_samples=1, n_tokens=9, loss=loss) if loss is not None else None
        self.feed(
            ev.ShareMoved(
                agent=stranger or agent,
                job=plan.job,
                round=plan.round,
                attempt=plan.attempt,
                serial=self.serial if back < 0 else back,
                state=state,
                reason="random",
                surveyed=surveyed,
                evaluated=found,
            )
        )

    @precondition(lambda self: self.train_plans)
    @rule(
        data=st.data(),
        size=st.sampled_from([100, 100, 100, 10**6]),
        samples=st.sampled_from([4, 4, 4, 0, 5]),
        past=st.sampled_from([0, 0, 0, 1, -7]),
        foreign=st.sampled_from([False, False, False, True]),
    )
    def offer(self, data: st.DataObject, size: int, samples: int, past: int, *, foreign: bool) -> None:
        """An offer for any plan that ever was, fit or unfit, perhaps of another round or an unknown job."""
        agent, plan = self._any(data, self.train_plans)
        self.tag += 1
        offer = _offer(plan, self.tag, size=size, samples=samples)
        changed = msgspec.structs.replace(offer, round=max(0, plan.round - past), job="z" if foreign else offer.job)
        self.offers.append((agent, changed))
        self.feed(ev.UpdateOffered(agent=agent, offer=changed))

    @precondition(lambda self: self.offers)
    @rule(data=st.data())
    def offer_again(self, data: st.DataObject) -> None:
        agent, offer = self._any(data, self.offers)
        self.feed(ev.UpdateOffered(agent=agent, offer=offer))

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), spoiled=st.sampled_from([False, False, False, True]))
    def transfer_ends(self, data: st.DataObject, *, spoiled: bool) -> None:
        """Any transfer that was ever wished for ends, perhaps again, perhaps much later."""
        fetch = self._any(data, self.fetches)
        if spoiled:
            self.feed(ev.UpdateSpoiled(agent=fetch.agent, offer=fetch.offer, reason="bad update: not finite"))
        else:
            self._store(fetch.agent, fetch.offer)

    @precondition(lambda self: self.make_plans)
    @rule(data=st.data(), chosen=st.sets(agents))
    def planner(self, data: st.DataObject, chosen: set[str]) -> None:
        """The planner answers any question that was ever asked, for some of the agents."""
        self._plan(self._any(data, self.make_plans), chosen)

    @precondition(lambda self: self.folds)
    @rule(data=st.data())
    def fold_again(self, data: st.DataObject) -> None:
        self._fold(self._any(data, self.folds))

    @precondition(lambda self: self.folds or self.make_plans)
    @rule(data=st.data(), bad=st.sampled_from([False, False, False, False, True]))
    def slow_work_fails(self, data: st.DataObject, *, bad: bool) -> None:
        asked = self._any(data, [*self.folds, *self.make_plans])
        said = {"job": asked.job, "round": asked.round, "attempt": asked.attempt if bad else 99, "reason": "disk full"}
        self.feed(ev.AggregateFailed(**said) if isinstance(asked, act.Aggregate) else ev.PlanFailed(**said))

    @rule(job=st.sampled_from([*JOBS, "z"]), whim=st.integers(0, 9))
    def cancel(self, job: str, whim: int) -> None:
        if whim == 9:
            self.feed(ev.JobCancelled(job=job))

    def _any(self, data: st.DataObject, items: Sequence[T]) -> T:
        """Mostly the latest, at times any."""
        back = data.draw(st.integers(0, min(len(items) - 1, 3)) | st.integers(0, len(items) - 1))
        return items[len(items) - 1 - back]

    # ------------------------------------------------------------------------------------------------------------ time

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 45.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.feed(ev.Tick())

    @precondition(lambda self: self.fleet.wake_at is not None)
    @rule()
    def sleep(self) -> None:
        due = self.fleet.wake_at
        assert due is not None
        self.now = due
        self.feed(ev.Tick())
        after = self.fleet.wake_at
        assert after is None or after > due

    # ------------------------------------------------------------------------------------------------------- the end

    def teardown(self) -> None:
        for job in self.fleet.state.jobs.values():
            event(f"job {job.phase}, version {job.version}")
        self._replays_to_the_same()
        self._time_alone_brings_an_end()

    def _replays_to_the_same(self) -> None:
        """The same events give the same wishes and bytes, from nothing and from any snapshot."""
        every = max(1, len(self.log) // 3)
        for start in [0, *range(every, len(self.log), every)]:
            fleet = Fleet(decode_state(self.log[start - 1][3])) if start else Fleet()
            for event_, now, wishes, snapshot in self.log[start:]:
                again = fleet.handle(event_, now)
                assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(wishes)
                assert encode_state(fleet.state) == snapshot

    def _time_alone_brings_an_end(self) -> None:
        """With slow work answered and not one word from any agent, every job ends within a bounded number of ticks."""
        for _ in range(MAX_TICKS):
            self.work()
            self.holds()
            due = self.fleet.wake_at
            if due is None and not self._asked():
                break
            if due is not None and not self._asked():
                self.now = due
                self.feed(ev.Tick())
        assert set(self.finished) == set(self.fleet.state.jobs), {n: j.phase for n, j in self.fleet.state.jobs.items()}
        assert not self.held

    def _asked(self) -> bool:
        return any(j.phase in {Phase.PLANNING, Phase.AGGREGATING} for j in self.fleet.state.jobs.values())


@pytest.mark.parametrize("n_steps", [50])
def test_laws(n_steps: int) -> None:
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=60,
            stateful_step_count=n_steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
