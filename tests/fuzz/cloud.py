"""Target: a script of hostile births, words, reports and offers for the coordinator's real core, over its real intake.

Two agents are honest and do what they are told when the script lets them; whatever the others say, the laws hold after every
event, a replay from a snapshot goes on alike, and in the end every job ends by time alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from coordinator import intake
from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice, Prediction
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec
from coordinator.core.state import ENDED
from protocol.messages import (
    Allowance,
    Blob,
    Body,
    Calibrated,
    Envelope,
    Evaluated,
    ExecState,
    Execution,
    Matrix,
    Offer,
    Plan,
    Presence,
    Report,
    Surveyed,
)
from tests.fuzz.forged import REALS, SESSIONS
from tests.fuzz.script import Script

T0 = 1_750_000_000.0
HONEST = ["a", "b"]
AGENTS = [*HONEST, "m", "n", "stranger"]
STATES = list(ExecState)
MATRICES = [Matrix(name="q", d_out=8, d_in=8), Matrix(name="v", d_out=8, d_in=4)]
FORGED = [MATRICES, MATRICES[:1], [*MATRICES, *MATRICES], [Matrix(name="z", d_out=2**24, d_in=2**24)]]
PREDICTED = Prediction(
    step_s=1.0, train_s=1.0, down_s=0.0, up_s=0.0, peak_bytes=90, limit_bytes=90, up_bytes=9, progress=1.0
)
CHOICE = Choice(ranks={"q": 2, "v": 2}, bits="nf4", n_steps=1, batch=4, predicted=PREDICTED)
MAX_TICKS = 200
CHECKED_EVERY = 8
"""Events between two looks at all invariants, which cost several times what an event does."""


@cache
def _spec(name: str, whim: int) -> JobSpec:
    rules = {
        "n_rounds": 1 + whim % 2,
        "min_agents": 1 + whim // 2 % 2,
        "n_agents": [0, 2][whim // 4 % 2],
        "late": ["add", "drop"][whim // 8 % 2],
        "train_s": 100.0,
        "survey_s": 50.0,
        "wait_s": 400.0,
    }
    said = {"job": {"name": name}, "model": {"source": "toy"}, "round": rules, "plan": {"calibrate_s": 20.0}}
    pinned = {"adapter": {"targets": ["all"], "rank": 2, "bits": "nf4"}, "train": {"n_steps": 1, "batch": 4}}
    return msgspec.convert(said | (pinned if whim & 16 else {}), JobSpec)


class Cloud:
    """The core, what it wishes, and slow work that answers."""

    def __init__(self) -> None:
        self.fleet, self.now, self.serial, self.tag, self.n_events = Fleet(), T0, 0, 0, 0
        self.held: dict[str, Plan] = {}
        self.plans: list[Plan] = []
        self.fetches: list[act.Fetch] = []
        self.slow: list[act.MakePlan | act.Aggregate] = []
        self.finished: dict[str, str] = {}

    def hear(self, agent: str, body: Body, session: str = SESSIONS[1]) -> None:
        """A message from an agent, through the real intake."""
        event = intake.to_event(agent, Envelope(v=1, ts=self.now, ses=session, seq=1, b=body))
        if event is not None:
            self.feed(event)

    def feed(self, event: ev.Happened) -> None:
        """One event; the laws hold after it, which is looked at now and then."""
        for wish in self.fleet.handle(event, self.now):
            match wish:
                case act.Assign(agent=agent, plan=plan):
                    self.held[agent] = plan
                    self.plans.append(plan)
                case act.Withdraw(agent=agent):
                    self.held.pop(agent, None)
                case act.Fetch():
                    self.fetches.append(wish)
                    assert wish.offer.blob.size < 2**20, "an offer of any size is pulled"
                case act.MakePlan():
                    self.slow.append(wish)
                case act.Aggregate():
                    self.slow.append(wish)
                    self._fair(wish)
                case act.Restore(version=version, of=of):
                    assert of < version, "a version is restored from a later one"
                case act.Finish(job=job):
                    assert job not in self.finished, "ended twice"
                    self.finished[job] = wish.reason
                case _:
                    pass
        self.n_events += 1
        if self.n_events % CHECKED_EVERY == 0:
            self.fleet.check()

    def _fair(self, fold: act.Aggregate) -> None:
        """No agent weighs more than it was planned for, none counts twice."""
        keys = [(c.agent, c.round) for c in fold.contributions]
        assert len(keys) == len(set(keys))
        assert all(0 < c.weight <= CHOICE.n_samples * 512 for c in fold.contributions)

    def work(self) -> None:
        """Planner and aggregation answer what is asked now."""
        asked, self.slow = self.slow, []
        for wish in asked:
            self._answer(wish)

    def _answer(self, wish: act.MakePlan | act.Aggregate) -> None:
        said: dict[str, Any] = {"job": wish.job, "round": wish.round, "attempt": wish.attempt}
        if isinstance(wish, act.MakePlan):
            self.feed(ev.PlanReady(**said, choices=dict.fromkeys(wish.agents, CHOICE), train_s=30.0))
        else:
            digest = f"{wish.version:064x}"
            self.feed(ev.Aggregated(**said, version=wish.version, model=Blob(sha256=digest, size=9), master=digest))

    def obey(self, agent: str) -> None:
        """An honest agent does what its plan says."""
        plan = self.held.get(agent)
        if plan is None:
            return
        found: dict[str, Any] = {"state": ExecState.DONE}
        if plan.purpose == "survey":
            found["surveyed"] = Surveyed(base_sha256="a" * 64, matrices=MATRICES, n_train=9, n_eval=1)
        elif plan.purpose == "evaluate":
            found["evaluated"] = Evaluated(version=plan.version, n_samples=1, n_tokens=9, loss=1.0)
        else:
            self.hand_over(agent, self.offer(plan, samples=4))
            return
        self.serial += 1
        self.hear(agent, Execution(job=plan.job, round=plan.round, attempt=plan.attempt, serial=self.serial, **found))

    def offer(self, plan: Plan, **forged: Any) -> Offer:
        """An offer for a plan, some fields as told."""
        self.tag += 1
        said: dict[str, Any] = {
            "job": plan.job,
            "round": plan.round,
            "attempt": plan.attempt,
            "kind": "lora",
            "blob": Blob(sha256=f"{self.tag:064x}", size=100),
        }
        return Offer(**said | forged)

    def hand_over(self, agent: str, offer: Offer) -> None:
        """Offer, and let the transfer succeed if it is begun."""
        n_before = len(self.fetches)
        self.hear(agent, offer)
        if len(self.fetches) > n_before:
            self.feed(ev.UpdateStored(agent=agent, offer=offer))


def _any_plan(script: Script, cloud: Cloud) -> Plan | None:
    return cloud.plans[-1 - script.below(min(8, len(cloud.plans)))] if cloud.plans else None


def _hostile_words(script: Script, cloud: Cloud, agent: str, plan: Plan) -> None:
    """An agent says anything about any share there ever was."""
    cloud.serial += 1
    surveyed = Surveyed(
        base_sha256=script.pick(["a", "b"]) * 64,
        matrices=script.pick(FORGED),
        n_train=script.pick([0, 9, 2**53]),
        n_eval=0,
    )
    calibrated = Calibrated(
        device="", probe_rank=script.pick([1, 1024]), scores=script.take(8), load_ratio=script.pick([1.0, 1000.0])
    )
    said: dict[str, Any] = {
        "job": script.pick([plan.job, plan.job, plan.job, "z"]),
        "round": script.pick([plan.round, plan.round, 0, plan.round + 1, 2**53]),
        "attempt": script.pick([plan.attempt, plan.attempt, plan.attempt + 1, 2**53]),
        "serial": script.pick([cloud.serial, cloud.serial, 0, 2**53]),
        "state": script.pick(STATES),
        "reason": script.pick(["", "out_of_memory", "bad_base: x", "superseded"]),
    }
    match script.below(4):
        case 0:
            said["surveyed"] = surveyed
        case 1:
            said |= {"surveyed": surveyed, "calibrated": calibrated}
        case 2:
            loss = script.pick(REALS)
            said["evaluated"] = Evaluated(
                version=script.pick([plan.version, 2**53]), n_samples=1, n_tokens=9, loss=loss, metrics={"x": loss}
            )
    cloud.hear(agent, Execution(**said))


def _hostile_offer(script: Script, cloud: Cloud, agent: str, plan: Plan) -> None:
    digests = [f"{script.below(8):064x}", "a" * 64]
    blob = Blob(sha256=script.pick(digests), size=script.pick([1, 100, 100, 2**40]), chunk=script.pick([1024, 2**22]))
    offer = cloud.offer(
        plan,
        blob=blob,
        samples=script.pick([4, 4, 1, 0, 5, 2**53]),
        steps=script.pick([0, 1, 2**53]),
        train_s=script.pick([0.0, 1e-9, 1e9]),
        peak_bytes=script.pick([0, 2**53]),
        loss=script.pick(REALS),
        round=script.pick([plan.round, plan.round, plan.round + 1, 0, 2**53]),
        attempt=script.pick([plan.attempt, plan.attempt, plan.attempt + 1, 2**53]),
        job=script.pick([plan.job, plan.job, "z"]),
    )
    if script.below(2):
        cloud.hear(agent, offer)
    else:
        cloud.hand_over(agent, offer)


def _steers(script: Script, cloud: Cloud) -> None:
    """An operator pauses a job, lets it go on or takes it back, perhaps to what is no version, or as a number that is taken."""
    name = script.pick(["x", "y", "z"])
    job = cloud.fleet.state.jobs.get(name)
    match script.below(4):
        case 0 | 1:
            cloud.feed(ev.JobPaused(job=name, by="o", reason=script.pick(["", "x"]), now=bool(script.below(2))))
        case 2:
            cloud.feed(ev.JobResumed(job=name, by="o"))
        case _:
            version = (job.version if job else 0) + script.pick([1, 1, 1, 0, 2])
            of = script.below(max(1, version))
            model, master = Blob(sha256=f"{of:064x}", size=9), f"{of:064x}"
            cloud.feed(ev.JobRolledBack(job=name, of=of, version=version, round=of, model=model, master=master, by="o"))


def _ends(script: Script, cloud: Cloud) -> None:
    """A transfer that was ever wished for ends, perhaps again, perhaps with forged scores."""
    if not cloud.fetches:
        return
    fetch = cloud.fetches[-1 - script.below(min(4, len(cloud.fetches)))]
    if script.below(2):
        cloud.feed(ev.UpdateSpoiled(agent=fetch.agent, offer=fetch.offer, reason="bad update: x"))
    else:
        scores = {script.pick(["q", "zz"]): [abs(x) for x in REALS[: script.below(5)]]}
        cloud.feed(ev.UpdateStored(agent=fetch.agent, offer=fetch.offer, scores=scores))


def round_(data: bytes) -> None:
    """Hostile and honest events in any order."""
    script, cloud = Script(data), Cloud()
    cloud.feed(ev.JobSubmitted(spec=_spec("x", script.below(32))))
    for agent in HONEST:
        cloud.hear(agent, Presence(session=SESSIONS[1], online=True, methods=["qlora"]))
    while script.more:
        agent, plan = script.pick(AGENTS), _any_plan(script, cloud)
        match script.below(16):
            case 0 | 1:
                known = script.pick([["qlora"], ["qlora"], [], ["../x"]])
                online = script.below(4) > 0
                cloud.hear(agent, Presence(session=script.pick(SESSIONS), online=online, methods=known))
            case 2:
                paused = script.pick(["", "", "hours"])
                cloud.hear(agent, Report(allowance=Allowance(memory_bytes=script.pick([0, 2**53]), paused=paused)))
            case 3 | 4 | 5 if plan:
                _hostile_words(script, cloud, agent, plan)
            case 6 | 7 | 8 if plan:
                _hostile_offer(script, cloud, agent, plan)
            case 9 | 10:
                cloud.obey(script.pick(HONEST))
            case 11 | 12:
                cloud.work()
            case 13:
                cloud.now += script.pick([0.0, 1.0, 30.0, 100.0])
                cloud.feed(ev.Tick())
            case 14:
                _ends(script, cloud)
            case 15:
                match script.below(12):
                    case 0:
                        cloud.feed(ev.JobSubmitted(spec=_spec("y", script.below(32))))
                    case 1:
                        cloud.feed(ev.JobCancelled(job=script.pick(["x", "y", "z"])))
                    case 2:
                        snapshot = encode_state(cloud.fleet.state)
                        cloud.fleet = Fleet(decode_state(snapshot))
                        assert encode_state(cloud.fleet.state) == snapshot
                    case 3 | 4 | 5 | 6 | 7:
                        _steers(script, cloud)
                    case _:
                        cloud.fleet.resume(cloud.now)
            case _:
                cloud.work()
    cloud.fleet.check()
    _time_alone(cloud)
    cloud.fleet.check()


def _time_alone(cloud: Cloud) -> None:
    """With slow work answered and no word from anybody, every job ends; a paused one once it may go on."""
    for job in cloud.fleet.state.jobs:
        cloud.feed(ev.JobResumed(job=job, by="o"))
    for _ in range(MAX_TICKS):
        cloud.work()
        if (at := cloud.fleet.wake_at) is not None:
            cloud.now = at
            cloud.feed(ev.Tick())
        elif not cloud.slow:
            break
    assert all(job.phase in ENDED for job in cloud.fleet.state.jobs.values())
    assert set(cloud.finished) == set(cloud.fleet.state.jobs)
