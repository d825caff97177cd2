"""A whole world: one coordinator, its broker, a fleet of servers, operators and bad luck; from the first birth to the last quiet.

It runs until every job has ended, while faults go on; then the faults stop, everybody comes back, and whatever is owed must be
settled: no agent at work, no update unanswered, no plan left on the broker.  What goes wrong on the way is raised at the event
that brought it about.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import msgspec

from coordinator.core import events as ev
from coordinator.core.fleet import Fleet
from coordinator.core.state import ENDED, JobState
from fedpipe.simulation.broker import COORDINATOR, Broker
from fedpipe.simulation.child import Traits
from fedpipe.simulation.clockwork import EPOCH, Clockwork
from fedpipe.simulation.cloud import CRASH_POINTS, Cloud
from fedpipe.simulation.disk import digest, served
from fedpipe.simulation.edge import Edge
from fedpipe.simulation.scenario import CALM, RATES, Level, Scenario, agent_name
from fedpipe.simulation.witness import Witness

SETTLES_S: Final = 4 * 3600.0
"""After the last job has ended, everything that is owed is settled within this."""
HAPPENINGS: Final = 2_000
"""Per agent, round and job, at most; some fifty are usual."""
LOOK_S: Final = 20.0
SLACK_S: Final = 6 * 3600.0
EVERY: Final = 20_000
"""Events between two full checks in a large world."""


class JobEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How one job ended."""

    job: str
    phase: str
    reason: str
    n_rounds: int
    n_updates: int
    """Updates in its last version."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a world; the same seed gives the same, byte for byte."""

    seed: int
    digest: str
    jobs: list[JobEnd]
    faults: dict[str, int]
    n_agents: int
    n_events: int
    """That the coordinator's core took in."""
    n_happenings: int
    n_messages: int
    simulated_s: float


class World:
    """One scenario at work.  `make_fleet` makes the coordinator's core."""

    def __init__(self, scenario: Scenario, make_fleet: Callable[..., Fleet] = Fleet) -> None:
        self.scenario = scenario
        self.clockwork = Clockwork(scenario.seed)
        self.faults = RATES[scenario.level]
        self.witness = Witness(EVERY if scenario.is_large else 1)
        self.broker = Broker(self.clockwork, self.faults)
        self._chance = self.clockwork.chance("world")
        self.edges: dict[str, Edge] = {}
        for number in range(scenario.n_agents):
            traits = _traits(agent_name(number), self._chance, scenario.level)
            self.edges[traits.name] = Edge(traits, self.clockwork, self.broker, self.faults, self.witness)
        self.cloud = Cloud(
            self.clockwork,
            self.broker,
            self.faults,
            self.witness,
            self.edges,
            make_fleet,
            keeps_journal=not scenario.is_large,
        )
        self._make_fleet = make_fleet
        self._most = 100_000 + HAPPENINGS * scenario.n_agents * scenario.n_rounds * len(scenario.jobs)
        self._names = list(self.edges)
        self._is_calm = self._is_settled = False

    # ------------------------------------------------------------------------------------------------------ the course

    def run(self, moved: Callable[[float], None] = lambda _: None) -> Outcome:
        """From beginning to end; `moved` hears now and then how far it is, 0 to 1.  Raises AssertionError for what must not be."""
        self._begin()
        self._until(self._all_ended, self._bound_s(), "a job has no end", moved)
        self._calm()
        self._until(lambda: self._is_settled, SETTLES_S, "something is owed for ever", moved)
        self.cloud.fleet.check()
        self.witness.all_is_accounted_for(self.cloud.disk, self.cloud.fleet)
        if not self.scenario.is_large:
            self.witness.replays(self.cloud.disk, self.cloud.fleet, self._make_fleet)
        return self._outcome()

    def _begin(self) -> None:
        always, chance = self.clockwork.always, self._chance
        for edge in self.edges.values():
            edge.cloud = self.cloud
            late_s = chance.uniform(60, 4000) if self.scenario.level is Level.MANY and chance.random() < 0.15 else 0.0
            self.clockwork.after(late_s + chance.uniform(0, 30), always, edge.start)
        self.clockwork.after(0.0, always, self.cloud.start)
        for number, spec in enumerate(self.scenario.jobs):
            self.clockwork.after(number * chance.uniform(1, 600), always, self._submit, number)
            if chance.random() < self.faults.cancel_ratio:
                self.clockwork.after(chance.uniform(10, 3000), always, self._cancel, spec.job.name)
        rates: dict[str, tuple[float, Callable[[], None]]] = {
            "cut": (self.faults.cuts_per_h * len(self.edges), self._cut),
            "churn": (self.faults.churn_per_h * len(self.edges), self._churn),
            "pause": (self.faults.pauses_per_h * len(self.edges), self._pause),
            "coordinator": (self.faults.coordinator_per_h, self._crash_coordinator),
            "coordinator cut": (self.faults.coordinator_cuts_per_h, self._cut_coordinator),
            "broker": (self.faults.broker_per_h, self._crash_broker),
            "job pause": (self.faults.job_pauses_per_h, self._pause_job),
            "rollback": (self.faults.rollbacks_per_h, self._roll_back),
        }
        for name, (per_h, what) in rates.items():
            if per_h:
                self._again(self.clockwork.chance(f"when/{name}"), per_h / 3600, what, first=True)

    def _until(self, is_over: Callable[[], bool], within_s: float, fault: str, moved: Callable[[float], None]) -> None:
        limit = self.clockwork.now + within_s
        while not is_over():
            assert self.clockwork.step(), f"{fault}: nothing will ever happen any more ({self._where()})"
            assert self.clockwork.now < limit, f"{fault} within {within_s:.0f} s ({self._where()})"
            assert self.clockwork.n_happenings < self._most, f"it turns in a circle ({self._where()})"
            if self.clockwork.n_happenings % EVERY == 0:
                moved(self._done_ratio())

    def _all_ended(self) -> bool:
        return len(self.witness.ends) == len(self.scenario.jobs) and self.cloud.is_done

    def _look(self) -> None:
        """Now and then, in the end: is everything settled?"""
        self._is_settled = self.cloud.running and self._settled()
        self.clockwork.after(LOOK_S, self.clockwork.always, self._look)

    def _settled(self) -> bool:
        known = self.cloud.fleet.state.agents
        agree = all((a := known.get(e.name)) and a.online and a.session == e.session for e in self.edges.values())
        return agree and not self.broker.n_plans and all(edge.is_idle for edge in self.edges.values())

    def _where(self) -> str:
        jobs = [
            f"{s.spec.job.name} {s.phase} {s.round_number}/{s.attempt}" for s in self.cloud.fleet.state.jobs.values()
        ]
        owing = [edge.name for edge in self.edges.values() if not edge.is_idle]
        return f"{', '.join(jobs)}; not at rest: {', '.join(owing[:5]) or 'nobody'}"

    def _done_ratio(self) -> float:
        n_done = sum(job.round_number for job in self.cloud.fleet.state.jobs.values())
        return n_done / (self.scenario.n_rounds * len(self.scenario.jobs))

    def _bound_s(self) -> float:
        """Within this every job must have ended: all its waits, one after the other."""
        total_s = SLACK_S
        for spec in self.scenario.jobs:
            rules = spec.round
            attempt_s = rules.wait_s + (rules.train_s or 600.0) + rules.grace_s + 600.0
            total_s += (rules.n_rounds * rules.max_attempts + 1) * attempt_s + 2 * rules.survey_s
        return total_s

    def _outcome(self) -> Outcome:
        jobs = [
            JobEnd(
                job=name,
                phase=str(job.phase),
                reason=job.reason,
                n_rounds=job.round_number,
                n_updates=sum(1 for key in self.witness.folded if key[0] == name),
            )
            for name, job in self.cloud.fleet.state.jobs.items()
        ]
        return Outcome(
            seed=self.scenario.seed,
            digest=self.clockwork.digest,
            jobs=jobs,
            faults=dict(sorted(self.clockwork.faults.items())),
            n_agents=len(self.edges),
            n_events=self.witness.n_events,
            n_happenings=self.clockwork.n_happenings,
            n_messages=self.broker.n_messages,
            simulated_s=self.clockwork.now - EPOCH,
        )

    # ------------------------------------------------------------------------------------------------------ operators

    def _submit(self, number: int) -> None:
        """An operator hands in a job, and again as long as nobody says that it is there."""
        spec = self.scenario.jobs[number]
        if self.cloud.running:
            if spec.job.name in self.cloud.fleet.state.jobs:
                return
            self.cloud.tell(ev.JobSubmitted(spec=spec))
        self.clockwork.after(20.0, self.clockwork.always, self._submit, number)

    def _cancel(self, name: str) -> None:
        if self.cloud.running:
            self.clockwork.fault("job cancelled", COORDINATOR)
            self.cloud.tell(ev.JobCancelled(job=name))

    def _any_job(self) -> JobState | None:
        jobs = list(self.cloud.fleet.state.jobs.values()) if self.cloud.running else []
        return self._chance.choice(jobs) if jobs else None

    def _pause_job(self) -> None:
        job = self._any_job()
        if job is None or job.phase in ENDED:
            return
        at_once = self._chance.random() < 0.5
        self.clockwork.fault("job paused" + (" at once" if at_once else ""), COORDINATOR)
        self.cloud.tell(ev.JobPaused(job=job.spec.job.name, by="operator", now=at_once))
        self.clockwork.after(self._chance.uniform(5, 600), self.clockwork.always, self._resume_job, job.spec.job.name)

    def _resume_job(self, name: str) -> None:
        """An operator lets a job go on, and says so again until it does."""
        if self.cloud.running:
            if self.cloud.fleet.state.jobs[name].pause is None:
                return
            self.cloud.tell(ev.JobResumed(job=name, by="operator"))
        self.clockwork.after(20.0, self.clockwork.always, self._resume_job, name)

    def _roll_back(self) -> None:
        """To any version that there is; whoever looked too early names one as new that is not."""
        job = self._any_job()
        if job is None or not job.version:
            return
        name, of = job.spec.job.name, self._chance.randint(1, job.version)
        version = job.version + (self._chance.random() < 0.9)
        self.clockwork.fault("job rolled back", COORDINATOR)
        master = self.witness.master(name, of)
        model = served(master)
        back = ev.JobRolledBack(
            job=name, of=of, version=version, round=1, model=model, master=master, by="operator", reason="worse"
        )
        self.cloud.tell(back)

    # -------------------------------------------------------------------------------------------------------- bad luck

    def _again(self, chance: Random, per_s: float, what: Callable[[], None], *, first: bool = False) -> None:
        """A Poisson process that ends with the last job."""
        if self._is_calm:
            return
        if not first:
            what()
        self.clockwork.after(chance.expovariate(per_s), self.clockwork.always, self._again, chance, per_s, what)

    def _outage_s(self) -> float:
        away = self._chance.random() < self.faults.away_ratio
        return self._chance.uniform(1800, 14_400) if away else self._chance.expovariate(1 / 40)

    def _any(self) -> Edge:
        return self.edges[self._chance.choice(self._names)]

    def _cut(self) -> None:
        edge = self._any()
        if self.broker.is_connected(edge.name):
            self.clockwork.fault("connection cut", edge.name)
            edge.reachable = False
            self.clockwork.after(self._outage_s(), self.clockwork.always, self._reach, edge)
            self.broker.cut(edge.name, notices_after_s=self._chance.choice([0.0, 0.0, 35.0]))

    def _reach(self, edge: Edge) -> None:
        edge.reachable = True

    def _churn(self) -> None:
        edge = self._any()
        if not edge.running:
            return
        back_s = self._outage_s()
        if self._chance.random() < 0.5:
            self.clockwork.fault("agent crash", edge.name)
            edge.crash()
            self.clockwork.after(back_s, self.clockwork.always, self._revive, edge)
        else:
            self.clockwork.fault("agent restart", edge.name)
            edge.stop(lambda: self.clockwork.after(back_s, self.clockwork.always, self._revive, edge))

    def _revive(self, edge: Edge) -> None:
        if not edge.running:
            edge.start()

    def _pause(self) -> None:
        edge = self._any()
        if edge.running:
            self.clockwork.fault("host needs the device", edge.name)
            edge.host_speaks(self._chance.choice(["pause", "pause", "stop", "shrink"]))
            self.clockwork.after(self._chance.uniform(20, 900), self.clockwork.always, self._unpause, edge)

    def _unpause(self, edge: Edge) -> None:
        if edge.running:
            edge.host_speaks("run")

    def _crash_coordinator(self) -> None:
        if not self.cloud.running or self.cloud.doomed:
            return
        point = self._chance.choice(CRASH_POINTS)
        if point == "idle":
            self.cloud.crash()
        else:
            self.cloud.doomed = point
        self._await_crash()

    def _await_crash(self) -> None:
        """It dies when it comes to that point; then somebody starts it again, on a clock that may stand elsewhere."""
        if self.cloud.running:
            self.clockwork.after(1.0, self.clockwork.always, self._await_crash)
            return
        steps = self._chance.random() < self.faults.clock_step_ratio
        step_s = self._chance.choice([-7200.0, -60.0, 30.0, 1000.0, 7200.0]) if steps else 0.0
        if steps:
            self.clockwork.fault("clock step", COORDINATOR)
        down_s = self._chance.expovariate(1 / 30) + 1.0
        self.clockwork.after(down_s, self.clockwork.always, self.cloud.start, step_s)

    def _cut_coordinator(self) -> None:
        if self.broker.is_connected(COORDINATOR):
            self.clockwork.fault("coordinator cut", COORDINATOR)
            self.broker.cut(COORDINATOR, notices_after_s=self._chance.choice([0.0, 35.0]))

    def _crash_broker(self) -> None:
        if self.broker.up:
            forgets = self._chance.random() < 0.7
            self.clockwork.fault("broker crash" + (", all forgotten" if forgets else ""), "broker")
            self.broker.crash(forgets=forgets)
            self.clockwork.after(self._chance.expovariate(1 / 30), self.clockwork.always, self._restart_broker)

    def _restart_broker(self) -> None:
        self.broker.up = True

    def _calm(self) -> None:
        """No more faults, and everybody comes back."""
        self._is_calm = True
        self.clockwork.note("world", "-- calm --")
        self.broker.faults = CALM
        self.cloud.faults = CALM
        self.cloud.doomed = ""
        for edge in self.edges.values():
            edge.faults = CALM
            edge.reachable = True
            self.clockwork.after(60.0, self.clockwork.always, self._revive, edge)
        self._look()


def _traits(name: str, chance: Random, level: Level) -> Traits:
    odd = level is not Level.NONE and chance.random() < (0.15 if level is Level.MANY else 0.02)
    kind = chance.choice(["base", "data", "method", "slow", "slow"]) if odd else ""
    return Traits(
        name=name,
        methods=["other"] if kind == "method" else ["qlora"],
        base_sha256=digest("another base" if kind == "base" else "the base"),
        n_train=0 if kind == "data" else chance.randint(20, 2000),
        step_s=chance.lognormvariate(0.5, 0.5) * (20 if kind == "slow" else 1),
        load_s=chance.uniform(1, 30),
        upload_s=chance.lognormvariate(1.0, 1.0),
        download_s=chance.lognormvariate(1.0, 1.0),
        memory_bytes=2**33,
    )
