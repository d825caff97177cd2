"""A stage for the coordinator's core: feed it events at times of our choosing, look at what it wishes."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED, JobState, Phase, Share
from protocol.messages import Blob, Evaluated, ExecState, Matrix, Offer, Plan, Surveyed

T0 = 1_750_000_000.0
LIMITS = {
    "n_rounds": 2,
    "train_s": 100.0,
    "grace_s": 20.0,
    "offline_grace_s": 10.0,
    "survey_s": 50.0,
    "start_wait_s": 30.0,
    "wait_s": 300.0,
}
PINS: dict[str, dict[str, Any]] = {
    "adapter": {"targets": ["all"], "rank": 8, "bits": "nf4"},
    "train": {"n_steps": 50, "batch": 8},
}
MATRICES = [Matrix(name="k", d_out=8, d_in=16), Matrix(name="q", d_out=8, d_in=8)]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def job_spec(name: str, **tables: dict[str, Any]) -> JobSpec:
    """A job file that leaves nothing to decide; `head` is the rest of its [job] table, `round` what differs from LIMITS."""
    head = {"name": name, **tables.pop("head", {})}
    limits = {**LIMITS, **tables.pop("round", {})}
    pins = {table: {**PINS[table], **tables.pop(table, {})} for table in PINS}
    return msgspec.convert({"job": head, "model": {"source": "toy"}, "round": limits, **pins, **tables}, JobSpec)


def fits(value: object, wanted: object) -> bool:
    """Partial match: a dict asks for these attributes of a Struct, anything else for equality."""
    if isinstance(wanted, dict) and isinstance(value, msgspec.Struct):
        return all(fits(getattr(value, key), part) for key, part in wanted.items())
    return value == wanted


def brief(value: object) -> str:
    """A Struct without its defaults: what a reader of a story needs."""
    if not isinstance(value, msgspec.Struct):
        return repr(value)
    fields = [(f, getattr(value, f.name)) for f in msgspec.structs.fields(value)]
    told = [f"{f.name}={brief(part)}" for f, part in fields if part != f.default and part not in ({}, [])]
    return f"{type(value).__name__}({', '.join(told)})"


class Observer:
    """Knows the wishes and nothing of the core's state, so the core is not asked to judge itself."""

    def __init__(self) -> None:
        self.specs: dict[str, JobSpec] = {}
        self.plans: list[tuple[str, Plan]] = []
        self.fetches: list[act.Fetch] = []
        self.make_plans: list[act.MakePlan] = []
        self.folds: list[act.Aggregate] = []
        self.finished: list[str] = []
        self.asked: dict[str, set[str]] = {}
        self.held: dict[str, Plan] = {}
        self.stored: dict[tuple[str, str, int], Offer] = {}
        self.paused: set[str] = set()
        self.begun: set[tuple[str, int, int]] = set()
        self.restored: dict[str, str] = {}
        self.foreseen: dict[str, act.Aggregate] = {}

    def saw(self, event: ev.Happened, wishes: list[act.Wish]) -> None:
        """Assert what one event and its wishes must be to each other and to all that went before."""
        match event:
            case ev.JobSubmitted():
                self.specs.setdefault(event.spec.job.name, event.spec)
            case ev.UpdateOffered() | ev.UpdateStored():
                self._answers_once(event, wishes)
            case ev.JobPaused(job=job) if job in self.specs and job not in self.finished:
                self.paused.add(job)
            case ev.JobResumed(job=job):
                self.paused.discard(job)
            case _:
                pass
        if not isinstance(event, ev.UpdateStored):
            self.foreseen.clear()
        for wish in wishes:
            self._saw(wish)

    def agrees_with(self, fleet: Fleet) -> None:
        """Assert that the core knows who holds which plan and which jobs have ended."""
        busy = {a.id: a.task for a in fleet.state.agents.values() if a.task}
        assert busy == {a: plan.job for a, plan in self.held.items()}, "a plan is out that nobody keeps track of"
        assert {name for name, job in fleet.state.jobs.items() if job.phase in ENDED} == set(self.finished)

    def _saw(self, wish: act.Wish) -> None:
        match wish:
            case act.Assign():
                holds = self.held.get(wish.agent)
                assert holds is None or holds.job == wish.plan.job, f"{wish.agent} shall serve two jobs"
                self._begins(wish.plan)
                self.held[wish.agent] = wish.plan
                self.plans.append((wish.agent, wish.plan))
            case act.Withdraw():
                self.held.pop(wish.agent, None)
            case act.Fetch():
                self.fetches.append(wish)
            case act.MakePlan():
                assert wish.agents, "a plan for nobody"
                assert wish.job not in self.paused, "a round is planned in a pause"
                assert not any(agents & set(wish.agents) for agents in self.asked.values()), "planned twice"
                self.asked[wish.job] = set(wish.agents)
                self.make_plans.append(wish)
            case act.Announce() if wish.card.phase != Phase.PLANNING:
                self.asked.pop(wish.card.job, None)
            case act.Aggregate():
                self._fold_is_lawful(wish)
                assert self.foreseen.pop(wish.job, wish) == wish, (
                    "all that was on its way came, and another fold is wished"
                )
                self.folds.append(wish)
            case act.AggregateAhead():
                self.foreseen[wish.fold.job] = wish.fold
            case act.Restore():
                self.restored[wish.job] = wish.master
                folded = {(c.agent, c.round) for f in self.folds if f.job == wish.job for c in f.contributions}
                left = [key for key in self.stored if key[0] == wish.job and key[1:] not in folded]
                for key in left:
                    del self.stored[key]
            case act.Finish():
                assert wish.job not in self.finished, f"{wish.job} finished twice"
                assert wish.reason or wish.phase == "completed", "an end without a reason"
                self.finished.append(wish.job)
            case _:
                pass

    def _begins(self, plan: Plan) -> None:
        """In a pause plans are given again, and no others are."""
        key = (plan.job, plan.round, plan.attempt)
        assert plan.purpose == "survey" or plan.job not in self.paused or key in self.begun, "a round in a pause"
        self.begun.add(key)

    def _fold_is_lawful(self, fold: act.Aggregate) -> None:
        restored = self.restored.pop(fold.job, fold.master)
        assert fold.master == restored, "a fold of another version than the one that the job went back to"
        rules = self.specs[fold.job].round
        before = {(c.round, c.agent) for f in self.folds if f.job == fold.job for c in f.contributions}
        now = [(c.round, c.agent) for c in fold.contributions]
        assert now == sorted(set(now)), "twice or out of order"
        assert not before & set(now), f"counted again: {before & set(now)}"
        assert sum(c.round == fold.round for c in fold.contributions) >= rules.min_agents
        for c in fold.contributions:
            offer, lag = self.stored[fold.job, c.agent, c.round], fold.round - c.round
            assert c.sha256 == offer.blob.sha256, "folded what was never stored"
            assert 0 <= lag <= (rules.max_staleness if rules.late == "add" else 0)
            assert c.weight == offer.samples * rules.staleness_discount**lag

    def _answers_once(self, event: ev.UpdateOffered | ev.UpdateStored, wishes: list[act.Wish]) -> None:
        """An offer is pulled, acknowledged or declined; a stored update is acknowledged or declined."""
        offer = event.offer
        kinds = (act.Acknowledge, act.Decline) if isinstance(event, ev.UpdateStored) else _ANSWERS
        answers = [w for w in wishes if isinstance(w, kinds)]
        assert len(answers) == 1, f"{len(answers)} answers to one offer"
        answer = answers[0]
        assert answer.agent == event.agent
        assert (answer.offer.blob.xfer if isinstance(answer, act.Fetch) else answer.xfer) == offer.blob.xfer
        if isinstance(event, ev.UpdateStored) and isinstance(answer, act.Acknowledge):
            self.stored.setdefault((offer.job, event.agent, offer.round), offer)


_ANSWERS = (act.Fetch, act.Acknowledge, act.Decline)


class Play:
    """One story.  Every verb feeds events; `wishes` holds what the last verb brought; the laws are checked at each event."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.observer = Observer()
        self.start = T0
        self.now = T0
        self.wishes: list[act.Wish] = []
        self.everything: list[act.Wish] = []
        self.story: list[str] = []
        self._serials: dict[str, int] = {}

    # -------------------------------------------------------------------------------------------------------- events

    def feed(self, *events: ev.Happened) -> Play:
        self.wishes = []
        for event in events:
            self.story.append(f"{self.now - self.start:8.1f} s  {brief(event)}")
            wishes = self.fleet.handle(event, self.now)
            self.story.extend(f"{'':16}-> {brief(wish)}" for wish in wishes)
            self.wishes += wishes
            self.everything += wishes
            self.observer.saw(event, wishes)
            self._check_laws()
        return self

    def _check_laws(self) -> None:
        self.fleet.check()
        self.observer.agrees_with(self.fleet)
        snapshot = encode_state(self.fleet.state)
        again = Fleet(decode_state(snapshot))
        assert encode_state(again.state) == snapshot, self.told("the snapshot lost something")
        assert again.handle(ev.Tick(), self.now) == [], self.told("something was possible and was not done")
        assert encode_state(again.state) == snapshot, self.told("a tick that is not due changed the state")
        self.fleet.resume(self.now)
        assert encode_state(self.fleet.state) == snapshot, self.told("resume() changed the state")

    def at(self, seconds: float) -> Play:
        """Go to this many seconds after the start; nothing happens by itself."""
        assert self.now <= self.start + seconds, "time runs forward"
        self.now = self.start + seconds
        return self

    def ticks(self, until: float) -> Play:
        """Let time alone pass: a Tick at every wake_at up to this many seconds after the start."""
        wishes: list[act.Wish] = []
        while (due := self.fleet.wake_at) is not None and due <= self.start + until:
            self.now = due
            wishes += self.feed(ev.Tick()).wishes
        self.wishes = wishes
        return self.at(until)

    # --------------------------------------------------------------------------------------------------- what people do

    def submit(self, name: str = "j", **tables: dict[str, Any]) -> Play:
        return self.feed(ev.JobSubmitted(spec=job_spec(name, **tables)))

    def cancel(self, job: str = "j") -> Play:
        return self.feed(ev.JobCancelled(job=job))

    def pause(self, job: str = "j", *, now: bool = False) -> Play:
        return self.feed(ev.JobPaused(job=job, by="token:ops", reason="heat", now=now))

    def resume(self, job: str = "j") -> Play:
        return self.feed(ev.JobResumed(job=job, by="token:ops"))

    def roll_back(self, to: int, version: int, job: str = "j") -> Play:
        """Version `to` once more, as the shell finds it in the store."""
        digest = sha(f"{job}/v{to}")
        model = Blob(sha256=digest, size=1000)
        said: dict[str, Any] = {"job": job, "of": to, "version": version, "round": to, "model": model}
        return self.feed(ev.JobRolledBack(**said, master=digest, by="token:ops", reason="worse"))

    # --------------------------------------------------------------------------------------------------- what agents do

    def join(self, *agents: str, session: int = 1, methods: tuple[str, ...] = ("qlora",)) -> Play:
        if session > 1:
            self._serials = {a: n for a, n in self._serials.items() if a not in agents}
        born = [ev.AgentJoined(agent=a, session=f"{session:016x}", methods=list(methods)) for a in agents]
        return self.feed(*born)

    def leave(self, *agents: str, session: int = 1) -> Play:
        return self.feed(*(ev.AgentLeft(agent=a, session=f"{session:016x}", reason="will") for a in agents))

    def move(self, agent: str, state: ExecState, job: str = "j", **fields: Any) -> Play:
        """The agent's share, as the core has it, moves on; `fields` overrides what the message says."""
        share = self._share(agent, job)
        self._serials[agent] = self._serials.get(agent, 0) + 1
        said = {
            "round": self._round_of(agent, job),
            "attempt": share.attempt if share else 0,
            "serial": self._serials[agent],
        }
        return self.feed(ev.ShareMoved(agent=agent, job=job, state=state, **{**said, **fields}))

    def survey(self, *agents: str, job: str = "j", n_train: int = 10, base: str = "base", **fields: Any) -> Play:
        found = Surveyed(base_sha256=sha(base), matrices=MATRICES, n_train=n_train, n_eval=2)
        wishes: list[act.Wish] = []
        for agent in agents:
            wishes += self.move(agent, ExecState.DONE, job, round=0, surveyed=found, **fields).wishes
        self.wishes = wishes
        return self

    def ready(self, *agents: str, **tables: dict[str, Any]) -> Play:
        """Job j is submitted, these agents join and are surveyed."""
        return self.submit("j", **tables).join(*agents).survey(*agents)

    def offer(self, agent: str, job: str = "j", *, tag: str = "", size: int = 100, **fields: Any) -> Offer:
        """The update that this agent makes of its present share."""
        share = self._share(agent, job)
        said = {
            "round": self._round_of(agent, job),
            "attempt": share.attempt if share else 0,
            "samples": 4,
            "loss": 2.0,
            **fields,
        }
        blob = Blob(sha256=sha(f"{job}/{agent}/{said['round']}/{tag}"), size=size)
        return Offer(job=job, kind="lora", blob=blob, **said)

    def offers(self, agent: str, offer: Offer | None = None, job: str = "j") -> Play:
        return self.feed(ev.UpdateOffered(agent=agent, offer=offer or self.offer(agent, job)))

    def stores(self, agent: str, offer: Offer) -> Play:
        """An offered update is here."""
        return self.feed(ev.UpdateStored(agent=agent, offer=offer))

    def trains(self, *agents: str, job: str = "j", **fields: Any) -> Play:
        """Each agent offers its update and the shell stores it."""
        wishes: list[act.Wish] = []
        for agent in agents:
            offer = self.offer(agent, job, **fields)
            wishes += self.feed(
                ev.UpdateOffered(agent=agent, offer=offer), ev.UpdateStored(agent=agent, offer=offer)
            ).wishes
        self.wishes = wishes
        return self

    def evaluates(self, *agents: str, job: str = "j", loss: float = 1.5) -> Play:
        version = self.job(job).version
        found = Evaluated(version=version, n_samples=2, n_tokens=64, loss=loss)
        wishes: list[act.Wish] = []
        for agent in agents:
            wishes += self.move(agent, ExecState.DONE, job, evaluated=found).wishes
        self.wishes = wishes
        return self

    # ------------------------------------------------------------------------------------- what slow work brings back

    def plan(self, job: str = "j", *, n_steps: int = 2, without: tuple[str, ...] = ()) -> Play:
        """Answer the last MakePlan: every agent does n_steps of batch 8 at rank 2."""
        asked = next(w for w in reversed(self.everything) if isinstance(w, act.MakePlan) and w.job == job)
        choice = Choice(ranks={"k": 2, "q": 2}, bits="nf4", n_steps=n_steps, batch=8)
        choices = {a: choice for a in asked.agents if a not in without}
        return self.feed(ev.PlanReady(job=job, round=asked.round, attempt=asked.attempt, choices=choices))

    def fold(self, job: str = "j") -> Play:
        """Answer the last Aggregate with a new version."""
        asked = next(w for w in reversed(self.everything) if isinstance(w, act.Aggregate) and w.job == job)
        digest = sha(f"{job}/v{asked.version}")
        return self.feed(
            ev.Aggregated(
                job=job,
                round=asked.round,
                attempt=asked.attempt,
                version=asked.version,
                model=Blob(sha256=digest, size=1000),
                master=digest,
            )
        )

    # ------------------------------------------------------------------------------------------------- what came of it

    def expects(self, kind: type[msgspec.Struct], **fields: object) -> Any:
        """The first wish of the last verb that fits; fails with the whole story when there is none."""
        found = [w for w in self.wishes if type(w) is kind and fits(w, fields)]
        assert found, self.told(f"no {kind.__name__} with {fields}")
        return found[0]

    def lacks(self, kind: type[msgspec.Struct], **fields: object) -> Play:
        found = [w for w in self.wishes if type(w) is kind and fits(w, fields)]
        assert not found, self.told(f"unwanted {found[0] if found else ''}")
        return self

    def job(self, name: str = "j") -> JobState:
        return self.fleet.state.jobs[name]

    def phase(self, name: str = "j") -> Phase:
        return self.job(name).phase

    def share(self, agent: str, job: str = "j") -> Share:
        """The agent's share of the open round, or else its survey."""
        share = self._share(agent, job)
        assert share, self.told(f"{agent} has no share of {job}")
        return share

    def _share(self, agent: str, job: str) -> Share | None:
        state = self.job(job)
        if state.round and agent in state.round.shares:
            return state.round.shares[agent]
        return state.members[agent].survey if agent in state.members else None

    def _round_of(self, agent: str, job: str) -> int:
        round_ = self.job(job).round
        return round_.number if round_ and agent in round_.shares else 0

    def finishes(self, job: str = "j") -> list[act.Finish]:
        return [w for w in self.everything if isinstance(w, act.Finish) and w.job == job]

    def free(self) -> bool:
        """Whether no agent has a task."""
        return not any(a.task for a in self.fleet.state.agents.values())

    def told(self, fault: str) -> str:
        return "\n".join([fault, *self.story])


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def observer() -> type[Observer]:
    return Observer
