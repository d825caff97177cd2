"""What came of one world or of many, and what is said of one that broke a law."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable

import msgspec

from coordinator.core.fleet import Fleet
from fedpipe.simulation.scenario import Scenario
from fedpipe.simulation.world import JobEnd, Outcome, World


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A world in which something happened that must not."""

    seed: int
    fault: str
    command: str
    """Runs it again."""
    story: list[str]
    """What happened last, and where in the code it was noticed."""


class Totals(msgspec.Struct, kw_only=True):
    """Sums over worlds."""

    n_worlds: int = 0
    n_agents: int = 0
    n_events: int = 0
    """That the coordinators' cores took in."""
    n_happenings: int = 0
    n_messages: int = 0
    simulated_s: float = 0.0
    ends: dict[str, int] = {}
    """Jobs, by how they ended."""
    faults: dict[str, int] = {}
    jobs: list[JobEnd] = []
    """Of one world."""
    broken: list[Broken] = []
    digest: str = ""
    """Of the history; of many worlds, of all their digests."""
    wall_s: float = 0.0
    events_per_s: float = 0.0
    """How fast the cores were fed, with all that surrounds them."""
    memory_bytes_per_agent: int = 0
    """Of one world: both sides of it, the coordinator's and the agent's."""

    def add(self, found: Outcome | Broken) -> None:
        """Count one world in."""
        self.n_worlds += 1
        if isinstance(found, Broken):
            self.broken.append(found)
            return
        self.n_agents += found.n_agents
        self.n_events += found.n_events
        self.n_happenings += found.n_happenings
        self.n_messages += found.n_messages
        self.simulated_s += found.simulated_s
        self.faults = _sum(self.faults, found.faults)
        self.ends = _sum(self.ends, Counter(map(_end, found.jobs)))


def play(
    scenario: Scenario,
    make_fleet: Callable[..., Fleet] = Fleet,
    moved: Callable[[float], None] = lambda _: None,
) -> Outcome | Broken:
    """One world to its end, however it ends; `moved` hears how far it is, 0 to 1."""
    world = World(scenario, make_fleet)
    try:
        return world.run(moved)
    except Exception as error:  # noqa: BLE001  # whatever the cores raise is what was looked for
        fault = f"{type(error).__name__}: {error}"[:500]
        story = [*world.clockwork.story(), *traceback.format_exc().splitlines()]
        return Broken(seed=scenario.seed, fault=fault, command=scenario.command, story=story)


def _end(job: JobEnd) -> str:
    return job.phase + (f": {job.reason.split(':')[0]}" if job.reason else "")


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(one) + Counter(other)).items()))
