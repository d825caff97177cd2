"""Whole fleets on virtual time: nothing accepted is lost, everything comes to an end, and the same seed is the same history."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import Fleet
from fedpipe import simulating
from fedpipe.simulation.scenario import Level, Scenario, draw
from fedpipe.simulation.totals import Broken, Totals, play
from fedpipe.simulation.world import Outcome

SEEDS = range(1, 41)
COMMAND = "from fedpipe.__main__ import main; main()"


def command(*args: str, hash_seed: str = "random") -> subprocess.CompletedProcess[str]:
    """`fedpipe ...` in a process of its own."""
    line = [sys.executable, "-c", COMMAND, *args]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=env)


def told(totals: Totals) -> str:
    return "\n".join([*simulating.lines(totals, Path("story")), *(totals.broken[0].story if totals.broken else [])])


def test_worlds_full_of_faults_break_no_law() -> None:
    totals = simulating.many([draw(seed, None, None, Level.MANY) for seed in SEEDS], lambda *_: None, n_processes=1)
    assert not totals.broken, told(totals)
    assert totals.ends["completed"] > len(SEEDS) / 2, totals.ends
    assert {kind for kind, n in totals.faults.items() if n >= 5} >= {
        "coordinator crash before the commit",
        "coordinator crash after the commit",
        "coordinator crash after handling",
        "coordinator crash between two wishes",
        "coordinator crash before the snapshot",
        "broker crash, all forgotten",
        "agent crash before it heard of its update",
        "transfer broken off",
        "clock step",
        "job paused",
        "job paused at once",
        "job rolled back",
    }


def test_a_large_world_that_forgets_its_journal_breaks_no_law() -> None:
    scenario = draw(7, 500, 2, Level.SOME)
    assert scenario.is_large
    totals = simulating.one(scenario, lambda _: None)
    assert not totals.broken, told(totals)
    assert totals.jobs[0].phase == "completed"


def test_a_world_without_faults_counts_every_update_of_every_round() -> None:
    found = play(draw(4, 6, 3, Level.NONE))
    assert isinstance(found, Outcome), found
    assert found.faults == {}
    assert [(job.phase, job.n_rounds) for job in found.jobs] == [("completed", 3)]


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_the_same_seed_is_the_same_history_in_any_process(seed: int) -> None:
    here = play(draw(seed, None, None, Level.MANY))
    assert isinstance(here, Outcome), here
    there = command("simulate", "--seed", str(seed), "--json", hash_seed=str(seed))
    assert there.returncode == 0, there.stderr
    found = msgspec.json.decode(there.stdout, type=Totals)
    assert (found.digest, found.n_events, found.faults) == (here.digest, here.n_events, here.faults)
    assert play(draw(seed + 1, None, None, Level.MANY)) != here


# ------------------------------------------------------------------------------------------------- the checker can fail


class Forgetful(Fleet):
    """Says that it has every update, and does not count some of them."""

    def handle(self, event: ev.Happened, now: float) -> list[act.Wish]:
        if isinstance(event, ev.UpdateStored) and event.offer.blob.sha256 < "4":
            return [act.Acknowledge(agent=event.agent, xfer=event.offer.blob.xfer)]
        return super().handle(event, now)


class Sleepy(Fleet):
    """Has nothing to wake up for."""

    @property
    def wake_at(self) -> float | None:
        return None


class Moody(Fleet):
    """Does something else when the journal is replayed."""

    n_made = 0

    def __init__(self, *state: object) -> None:
        super().__init__(*state)  # type: ignore[arg-type]
        Moody.n_made += 1
        self.state.counts["made"] = Moody.n_made


class Generous(Fleet):
    """Folds an update that it has never acknowledged."""

    def handle(self, event: ev.Happened, now: float) -> list[act.Wish]:
        wishes = super().handle(event, now)
        stored = isinstance(event, ev.UpdateStored)
        return [wish for wish in wishes if not (stored and isinstance(wish, act.Acknowledge))]


class Unrepentant(Fleet):
    """Says that a job went back, and goes on from where it was."""

    def handle(self, event: ev.Happened, now: float) -> list[act.Wish]:
        masters = {name: job.master for name, job in self.state.jobs.items()}
        wishes = super().handle(event, now)
        for wish in wishes:
            if isinstance(wish, act.Restore):
                self.state.jobs[wish.job].master = masters[wish.job]
        return wishes


BROKEN: dict[Callable[..., Fleet], str] = {
    Forgetful: "was acknowledged and is in no version",
    Sleepy: "wakes never",
    Moody: "does not replay",
    Generous: "was never acknowledged",
}


def scenario_of(line: str) -> Scenario:
    """What a reproduction line runs."""
    said = shlex.split(line)
    assert said[:2] == ["fedpipe", "simulate"]
    options = dict(zip(said[2::2], said[3::2], strict=True))
    assert set(options) == {"--seed", "--agents", "--rounds", "--faults"}
    return draw(int(options["--seed"]), int(options["--agents"]), int(options["--rounds"]), Level(options["--faults"]))


@pytest.mark.parametrize("fleet", BROKEN, ids=lambda fleet: fleet.__name__)
def test_a_core_that_breaks_a_law_is_found_out_and_its_line_finds_it_again(
    fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    found = play(draw(2, None, None, Level.SOME), fleet)
    assert isinstance(found, Broken)
    assert BROKEN[fleet] in found.fault
    again = play(scenario_of(found.command), fleet)
    assert isinstance(again, Broken)
    if fleet is not Moody:
        assert again == found
    totals = Totals()
    totals.add(found)
    assert simulating.lines(totals, tmp_path)[-1] == found.command


def test_a_job_that_goes_back_by_name_only_is_found_out() -> None:
    found = (play(draw(seed, 5, 4, Level.MANY), Unrepentant) for seed in range(1, 100))
    broken = next(world for world in found if isinstance(world, Broken))
    assert "is not the fold" in broken.fault


def test_a_range_that_is_none_is_refused_with_one_that_is() -> None:
    said = command("simulate", "--seeds", "9-3")
    assert (said.returncode, said.stdout) == (78, "")
    assert "such as 1-1000" in said.stderr
    assert "none, some, many" in command("simulate", "--faults", "few").stderr
