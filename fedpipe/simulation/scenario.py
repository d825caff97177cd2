"""What a world is made of, drawn from its seed: how many servers, which jobs, which faults how often."""

from __future__ import annotations

from enum import StrEnum
from random import Random
from typing import Any

import msgspec

from coordinator.core.spec import JobSpec


class Level(StrEnum):
    """How much goes wrong."""

    NONE = "none"
    SOME = "some"
    MANY = "many"


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """How often what goes wrong.  Rates are means per hour, of the whole fleet or (churn, cut, pause) of one agent."""

    delay_s: float = 0.1
    """Of a message, at most."""
    duplicate_ratio: float = 0.0
    swallow_ratio: float = 0.0
    """Of messages that the broker acknowledges and loses."""
    cuts_per_h: float = 0.0
    """Connections of an agent that break."""
    churn_per_h: float = 0.0
    """Crashes and restarts of an agent."""
    pauses_per_h: float = 0.0
    """Times that an agent's host needs the device."""
    coordinator_per_h: float = 0.0
    """Crashes of the coordinator."""
    coordinator_cuts_per_h: float = 0.0
    broker_per_h: float = 0.0
    """Crashes of the broker."""
    child_death_ratio: float = 0.0
    """Of runs."""
    bad_update_ratio: float = 0.0
    away_ratio: float = 0.0
    """Of outages that take hours."""
    clock_step_ratio: float = 0.0
    """Of restarts of the coordinator that find another wall clock."""
    planner_failure_ratio: float = 0.0
    fold_failure_ratio: float = 0.0
    cancel_ratio: float = 0.0
    """Of jobs."""
    job_pauses_per_h: float = 0.0
    """Jobs that an operator pauses, for minutes."""
    rollbacks_per_h: float = 0.0
    """Jobs that an operator takes back to an earlier version."""


CALM = Faults()
SOME = Faults(
    delay_s=0.5,
    duplicate_ratio=0.01,
    cuts_per_h=0.2,
    churn_per_h=0.05,
    pauses_per_h=0.05,
    coordinator_per_h=1.0,
    coordinator_cuts_per_h=0.5,
    broker_per_h=0.3,
    child_death_ratio=0.01,
    bad_update_ratio=0.002,
    away_ratio=0.1,
    clock_step_ratio=0.1,
)
MANY = Faults(
    delay_s=4.0,
    duplicate_ratio=0.1,
    swallow_ratio=0.01,
    cuts_per_h=4.0,
    churn_per_h=2.0,
    pauses_per_h=1.5,
    coordinator_per_h=12.0,
    coordinator_cuts_per_h=6.0,
    broker_per_h=3.0,
    child_death_ratio=0.05,
    bad_update_ratio=0.02,
    away_ratio=0.15,
    clock_step_ratio=0.4,
    planner_failure_ratio=0.01,
    fold_failure_ratio=0.003,
    cancel_ratio=0.05,
    job_pauses_per_h=2.0,
    rollbacks_per_h=2.0,
)
RATES = {Level.NONE: CALM, Level.SOME: SOME, Level.MANY: MANY}


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One world: `seed` decides whatever is not said here."""

    seed: int
    n_agents: int
    n_rounds: int
    level: Level
    jobs: tuple[JobSpec, ...]
    is_large: bool
    """Full checks only now and then, and the journal is not kept beyond a snapshot."""

    @property
    def command(self) -> str:
        """What runs this world again."""
        return f"fedpipe simulate --seed {self.seed} --agents {self.n_agents} --rounds {self.n_rounds} --faults {self.level}"


LARGE = 500


def draw(seed: int, n_agents: int | None, n_rounds: int | None, level: Level) -> Scenario:
    """The world of this seed; what is None is drawn too."""
    chance = Random(f"{seed}/scenario")
    drawn = chance.randint(3, 30), chance.randint(2, 5)
    agents, rounds = n_agents or drawn[0], n_rounds or drawn[1]
    is_large = agents >= LARGE
    n_jobs = 1 if is_large or level is Level.NONE else chance.choice([1, 1, 2])
    jobs = tuple(_job(chance, f"job-{number}", agents, rounds, large=is_large) for number in range(n_jobs))
    return Scenario(seed=seed, n_agents=agents, n_rounds=rounds, level=level, jobs=jobs, is_large=is_large)


def _job(chance: Random, name: str, n_agents: int, n_rounds: int, *, large: bool) -> JobSpec:
    wanted = 0 if large else chance.choice([0, 0, max(1, n_agents // 2)])
    rules: dict[str, Any] = {
        "n_rounds": n_rounds,
        "n_agents": wanted,
        "min_agents": chance.choice([1, 1, 2]) if not wanted else 1,
        "start_agents": n_agents if large else chance.choice([0, n_agents // 2]),
        "start_wait_s": chance.choice([60.0, 300.0]),
        "over_select_ratio": chance.choice([1.0, 1.5]),
        "quorum_ratio": chance.choice([0.3, 0.5, 0.8]),
        "max_attempts": chance.choice([1, 3, 3, 5]),
        "late": chance.choice(["add", "add", "drop"]),
        "max_staleness": chance.choice([1, 2, 3]),
        "train_s": chance.choice([120.0, 300.0, 900.0]),
        "grace_s": chance.choice([30.0, 120.0]),
        "offline_grace_s": chance.choice([10.0, 20.0, 90.0]),
        "survey_s": chance.choice([130.0, 300.0]),
        "wait_s": chance.choice([900.0, 3600.0, 3600.0]),
    }
    is_open = chance.random() < 0.4 and not large
    pins: dict[str, Any] = {"bits": "nf4"} if is_open else {"targets": ["all"], "rank": 4, "bits": "nf4"}
    only = [agent_name(n) for n in range(n_agents) if chance.random() < 0.7] if chance.random() < 0.15 else []
    raw = {
        "job": {"name": name, "seed": chance.getrandbits(20), "only": only},
        "model": {"source": "toy"},
        "adapter": pins,
        "train": {} if is_open else {"n_steps": chance.choice([20, 60]), "batch": 4},
        "plan": {"calibrate_s": 60.0, "replan_every": chance.choice([1, 3, 5])},
        "round": rules,
    }
    return msgspec.convert(raw, JobSpec)


def agent_name(number: int) -> str:
    """How the agent of this number is called."""
    return f"agent-{number:05}"
