"""Laws of the coordinator's core: whatever comes in whatever order, these hold.

The machine plays a fleet whose agents are now obedient, now confused, a broker that repeats and delays, and slow work that
answers twice or never.  An observer (conftest.py) checks every wish against all that went before.
"""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
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
from coordinator.core.choice import Choice, Prediction
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec
from coordinator.core.state import Phase
from protocol.messages import Allowance, Blob, Calibrated, Evaluated, ExecState, Matrix, Offer, Plan, Report, Surveyed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.coordinator.conftest import Observer

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
        "quorum_ratio": st.sampled_from([0.0, 0.5, 0.5, 1.0]),
        "max_attempts": st.integers(1, 3),
        "late": st.sampled_from(["add", "add", "drop"]),
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
decided = st.sampled_from(
    [
        {"adapter": {"targets": ["all"], "rank": 2, "bits": "nf4"}, "train": {"n_steps": 1, "batch": 4}},
        {"plan": {"calibrate_s": 20.0, "replan_every": 2}},
    ]
)
"""A job that decides everything, and one that leaves it to the planner."""
MEASURED = Calibrated(device="cpu", probe_rank=1, scores=array("f", [1.0]).tobytes())
PREDICTED = Prediction(
    step_s=1.0, train_s=1.0, down_s=0.0, up_s=0.0, peak_bytes=90, limit_bytes=90, up_bytes=9, progress=1.0
)
losses = st.sampled_from([1.0, math.nan, math.inf])


def _offer(plan: Plan, tag: int, *, size: int = 100, samples: int = 4) -> Offer:
    blob = Blob(sha256=f"{tag:064x}", size=size)
    return Offer(job=plan.job, round=plan.round, attempt=plan.attempt, kind="lora", blob=blob, samples=samples)


class World(RuleBasedStateMachine):
    """Random events on a core that an observer watches."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.observer = observer
        self.now = T0
        self.log: list[tuple[ev.Happened, float, list[act.Wish], bytes]] = []
        self.offers: list[tuple[str, Offer]] = []
        self.serial = 0
        self.tag = 0
        self.versions: dict[str, list[ev.Aggregated | ev.JobRolledBack]] = {name: [] for name in JOBS}

    def feed(self, event_: ev.Happened) -> list[act.Wish]:
        anew = Fleet(decode_state(encode_state(self.fleet.state)))
        wishes = self.fleet.handle(event_, self.now)
        assert anew.handle(event_, self.now) == wishes, "what is kept up with the state differs from what it says"
        assert anew.wake_at == self.fleet.wake_at
        self.log.append((event_, self.now, wishes, encode_state(self.fleet.state)))
        self.observer.saw(event_, wishes)
        return wishes

    @invariant()
    def holds(self) -> None:
        self.fleet.check()
        self.observer.agrees_with(self.fleet)
        snapshot = encode_state(self.fleet.state)
        again = Fleet(decode_state(snapshot))
        assert encode_state(again.state) == snapshot
        assert again.handle(ev.Tick(), self.now) == [], "something was possible and was not done"
        assert encode_state(again.state) == snapshot
        self.fleet.resume(self.now)
        assert encode_state(self.fleet.state) == snapshot, "resume() changed the state"

    # ---------------------------------------------------------------------------------------------------- how it begins

    @initialize(first=rounds, second=st.none() | rounds, tables=st.lists(decided, min_size=2, max_size=2))
    def submit(
        self, first: dict[str, Any], second: dict[str, Any] | None, tables: list[dict[str, dict[str, Any]]]
    ) -> None:
        for name, table in zip(JOBS, (first, second), strict=True):
            if table:
                job = {"job": {"name": name}, "model": {"source": "toy"}, "round": table, **tables[name == JOBS[0]]}
                self.feed(ev.JobSubmitted(spec=msgspec.convert(job, JobSpec)))
        for agent in AGENTS[:3]:
            self.join(agent, f"{1:016x}")

    # ------------------------------------------------------------------------------------------------ what goes well

    def _open(self, agent: str) -> Plan | None:
        return self.observer.held.get(agent) if self.fleet.state.agents[agent].online else None

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
        self.work()
        owed = {a: p for a, p in self.observer.held.items() if a in tardy and p.purpose == "train"}
        self.obey(set(AGENTS) - tardy)
        if owed:
            self.now += 120.0
            self.feed(ev.Tick())
        self.good_days(n_days, set(AGENTS) - tardy)
        for agent, plan in sorted(owed.items()):
            self._do(agent, plan)
        self.good_days(n_days, set(AGENTS))

    def _do(self, agent: str, plan: Plan) -> None:
        self.serial += 1
        said: dict[str, Any] = {
            "agent": agent,
            "job": plan.job,
            "round": plan.round,
            "attempt": plan.attempt,
            "serial": self.serial,
        }
        if plan.purpose == "survey":
            surveyed = Surveyed(base_sha256="a" * 64, matrices=MATRICES, n_train=9, n_eval=1)
            measured = MEASURED if plan.calibration else None
            self.feed(ev.ShareMoved(**said, state=ExecState.DONE, surveyed=surveyed, calibrated=measured))
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
            self.feed(ev.UpdateStored(agent=agent, offer=offer))

    @rule()
    def work(self) -> None:
        """Planner and aggregation answer whatever is asked now."""
        for wish in self.fleet.resume(self.now):
            if isinstance(wish, act.MakePlan):
                self._plan(wish, set(wish.agents))
            elif isinstance(wish, act.Aggregate):
                self._fold(wish)

    def _plan(self, asked: act.MakePlan, chosen: set[str]) -> None:
        """A job that leaves something open gets a plan that holds for a while, with one agent left out in turn."""
        is_open = not self.observer.specs[asked.job].is_pinned("")
        out = {min(chosen)} if is_open and len(chosen) > 2 and asked.round % 2 else set[str]()
        choice = Choice(ranks={"q": 2}, bits="nf4", n_steps=1, batch=4, predicted=PREDICTED if is_open else None)
        self.feed(
            ev.PlanReady(
                job=asked.job,
                round=asked.round,
                attempt=asked.attempt,
                choices=dict.fromkeys(sorted(chosen - out), choice),
                reason=asked.reason,
                train_s=30.0 if is_open else None,
                left_out=dict.fromkeys(out, "not enough memory"),
            )
        )

    def _fold(self, asked: act.Aggregate) -> None:
        digest = f"{asked.version:064x}"
        said: dict[str, Any] = {
            "job": asked.job,
            "round": asked.round,
            "attempt": asked.attempt,
            "version": asked.version,
        }
        done = ev.Aggregated(**said, model=Blob(sha256=digest, size=9), master=digest)
        self.feed(done)
        made = self.versions[asked.job]
        if self.fleet.state.jobs[asked.job].version == done.version and done.version not in {v.version for v in made}:
            made.append(done)

    # ------------------------------------------------------------------------------------------------- what goes wrong

    @rule(agent=agents, session=sessions)
    def reborn(self, agent: str, session: str) -> None:
        self.join(agent, session)

    @rule(agent=agents, memory=st.sampled_from([1, 100, 1000]), paused=st.sampled_from(["", "", "outside the hours"]))
    def report(self, agent: str, memory: int, paused: str) -> None:
        """What the agent may use changes, at times to nothing."""
        allowance = Allowance(memory_bytes=memory, paused=paused)
        self.feed(ev.AgentReported(agent=agent, report=Report(allowance=allowance)))

    @rule(agent=agents, session=sessions)
    def leave(self, agent: str, session: str) -> None:
        self.feed(ev.AgentLeft(agent=agent, session=session, reason="will"))

    @rule(is_back=st.sampled_from([True, True, False]), ago=st.sampled_from([0.0, 0.0, 500.0]))
    def broker(self, ago: float, *, is_back: bool) -> None:
        """The broker goes, and comes back; a coordinator that was down says since when it heard nobody."""
        self.feed(ev.BusFound() if is_back else ev.BusLost(since=self.now - ago if ago else 0.0))

    @rule(agent=agents)
    def revoke(self, agent: str) -> None:
        self.feed(ev.AgentRevoked(agent=agent, reason="stolen"))

    @precondition(lambda self: self.observer.plans)
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
        agent, plan = self._any(data, self.observer.plans)
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

    @precondition(lambda self: any(p.purpose == "train" for _, p in self.observer.plans))
    @rule(
        data=st.data(),
        size=st.sampled_from([100, 100, 100, 10**6]),
        samples=st.sampled_from([4, 4, 4, 0, 5]),
        past=st.sampled_from([0, 0, 0, 1, -7]),
        foreign=st.sampled_from([False, False, False, True]),
    )
    def offer(self, data: st.DataObject, size: int, samples: int, past: int, *, foreign: bool) -> None:
        """An offer for any plan that ever was, fit or unfit, perhaps of another round or an unknown job."""
        agent, plan = self._any(data, [(a, p) for a, p in self.observer.plans if p.purpose == "train"])
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

    @precondition(lambda self: self.observer.fetches)
    @rule(data=st.data(), spoiled=st.sampled_from([False, False, False, True]))
    def transfer_ends(self, data: st.DataObject, *, spoiled: bool) -> None:
        """Any transfer that was ever wished for ends, perhaps again, perhaps much later."""
        fetch = self._any(data, self.observer.fetches)
        if spoiled:
            self.feed(ev.UpdateSpoiled(agent=fetch.agent, offer=fetch.offer, reason="bad update: not finite"))
        else:
            self.feed(ev.UpdateStored(agent=fetch.agent, offer=fetch.offer))

    @precondition(lambda self: self.observer.make_plans)
    @rule(data=st.data(), chosen=st.sets(agents))
    def planner(self, data: st.DataObject, chosen: set[str]) -> None:
        """The planner answers any question that was ever asked, for some of the agents."""
        self._plan(self._any(data, self.observer.make_plans), chosen)

    @precondition(lambda self: self.observer.folds)
    @rule(data=st.data())
    def fold_again(self, data: st.DataObject) -> None:
        self._fold(self._any(data, self.observer.folds))

    @precondition(lambda self: self.observer.folds or self.observer.make_plans)
    @rule(data=st.data(), bad=st.sampled_from([False, False, False, False, True]))
    def slow_work_fails(self, data: st.DataObject, *, bad: bool) -> None:
        slow: list[act.Aggregate | act.MakePlan] = [*self.observer.folds, *self.observer.make_plans]
        asked = self._any(data, slow)
        said: dict[str, Any] = {
            "job": asked.job,
            "round": asked.round,
            "attempt": asked.attempt if bad else 99,
            "reason": "disk full",
        }
        self.feed(ev.AggregateFailed(**said) if isinstance(asked, act.Aggregate) else ev.PlanFailed(**said))

    @rule(job=st.sampled_from([*JOBS, "z"]), whim=st.integers(0, 9))
    def cancel(self, job: str, whim: int) -> None:
        if whim == 9:
            self.feed(ev.JobCancelled(job=job))

    @rule(job=st.sampled_from(JOBS), now=st.booleans(), for_long=st.booleans())
    def pause(self, job: str, *, now: bool, for_long: bool) -> None:
        """An operator pauses a job, for a moment or until somebody else resumes it."""
        self.feed(ev.JobPaused(job=job, by="ops", reason="heat", now=now))
        if not for_long:
            self.good_days(1, set(AGENTS))
            self.resume(job)

    @rule(job=st.sampled_from(JOBS))
    def resume(self, job: str) -> None:
        self.feed(ev.JobResumed(job=job, by="ops"))

    @precondition(lambda self: any(self.versions.values()))
    @rule(data=st.data(), stale=st.sampled_from([False, False, False, True]))
    def roll_back(self, data: st.DataObject, *, stale: bool) -> None:
        """An operator goes back to a version that there is; at times the number for it is taken by then."""
        job = data.draw(st.sampled_from([name for name, made in self.versions.items() if made]))
        made = self.versions[job]
        old = self._any(data, made)
        number = self.fleet.state.jobs[job].version + (0 if stale else 1)
        back = ev.JobRolledBack(
            job=job, of=old.version, version=number, round=old.round, model=old.model, master=old.master, by="ops"
        )
        wishes = self.feed(back)
        if any(isinstance(wish, act.Restore) for wish in wishes):
            assert self.fleet.state.jobs[job].master == old.master
            made.append(back)

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
        """With the broker there, slow work answered and not one word from any agent, every job ends within a bounded number of ticks."""
        self.feed(ev.BusFound())
        for name in JOBS:
            self.resume(name)
        for _ in range(MAX_TICKS):
            self.work()
            self.holds()
            due = self.fleet.wake_at
            if due is None and not self._asked():
                break
            if due is not None and not self._asked():
                self.now = due
                self.feed(ev.Tick())
        assert set(self.observer.finished) == set(self.fleet.state.jobs), {
            n: j.phase for n, j in self.fleet.state.jobs.items()
        }
        assert not self.observer.held

    def _asked(self) -> bool:
        return any(j.phase in {Phase.PLANNING, Phase.AGGREGATING} for j in self.fleet.state.jobs.values())


def test_laws(observer: type[Observer]) -> None:
    run_state_machine_as_test(
        lambda: World(observer()),  # type: ignore[arg-type]  # a factory will do
        settings=settings(
            max_examples=200,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
