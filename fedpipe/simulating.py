"""`fedpipe simulate`: worlds on all cores with a progress bar, what came of them, and the line that runs a broken one again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress

from coordinator.figures import plain
from fedpipe.simulation.scenario import Level, Scenario, draw
from fedpipe.simulation.totals import Broken, Totals, play
from fedpipe.simulation.world import Outcome
from protocol.errors import BadConfig

SHOWN_LINES = 12
KIB = 1024


class SimulateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for: one world, or a range of `seeds` such as "1-1000"; what is None is drawn from the seed."""

    seed: int = 1
    seeds: str = ""
    agents: int | None = None
    rounds: int | None = None
    faults: Level = Level.MANY
    story: Path = Path("fedpipe-simulate")


def simulate(options: SimulateOptions, console: Console) -> Totals:
    """Run what was asked for.  Raises BadConfig for a range that is none."""
    with Progress(console=console, transient=True) as progress:
        if options.seeds:
            first, last = _range(options.seeds)
            scenarios = [draw(n, options.agents, options.rounds, options.faults) for n in range(first, last + 1)]
            task = progress.add_task(f"worlds {options.seeds}", total=len(scenarios))

            def moved(totals: Totals, found: Outcome | Broken) -> None:
                progress.update(task, completed=totals.n_worlds)
                if isinstance(found, Broken):  # at once: the rest may take an hour
                    _write(options.story, found)
                    progress.console.print(f"BROKEN {found.command}", style="bold red", highlight=False, soft_wrap=True)

            totals = many(scenarios, moved)
        else:
            task = progress.add_task(f"world {options.seed}", total=1.0)
            scenario = draw(options.seed, options.agents, options.rounds, options.faults)
            totals = one(scenario, lambda ratio: progress.update(task, completed=ratio))
            for broken in totals.broken:
                _write(options.story, broken)
    return totals


def _range(seeds: str) -> tuple[int, int]:
    first, _, last = seeds.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise BadConfig(f"--seeds {seeds}: write two numbers with a dash between, such as 1-1000")
    return int(first), int(last)


def one(scenario: Scenario, moved: Callable[[float], None]) -> Totals:
    """One world, with its costs.  `moved` hears how far it is, 0 to 1."""
    totals, began_at, memory = Totals(), time.perf_counter(), _peak_bytes()
    found = play(scenario, moved=moved)
    totals.add(found)
    if isinstance(found, Outcome):
        totals.jobs, totals.digest = found.jobs, found.digest
    totals.memory_bytes_per_agent = (_peak_bytes() - memory) // scenario.n_agents
    return _timed(totals, began_at)


def many(
    scenarios: Sequence[Scenario], moved: Callable[[Totals, Outcome | Broken], None], n_processes: int | None = None
) -> Totals:
    """All of them, on all cores.  `moved` hears what came of each and of all so far."""
    totals, began_at, history = Totals(), time.perf_counter(), hashlib.blake2b(digest_size=16)
    for found in _each(scenarios, n_processes or os.cpu_count() or 1):
        totals.add(found)
        history.update((found.digest if isinstance(found, Outcome) else found.fault).encode())
        moved(totals, found)
    totals.digest = history.hexdigest()
    return _timed(totals, began_at)


def _each(scenarios: Iterable[Scenario], n_processes: int) -> Iterator[Outcome | Broken]:
    if n_processes == 1:
        yield from map(play, scenarios)
        return
    with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
        yield from pool.imap(play, scenarios, chunksize=4)


def _timed(totals: Totals, began_at: float) -> Totals:
    totals.wall_s = time.perf_counter() - began_at
    totals.events_per_s = totals.n_events / totals.wall_s
    return totals


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def _write(folder: Path, broken: Broken) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"seed-{broken.seed}.txt").write_text("\n".join(broken.story) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"{folder} cannot be written: {error.strerror or error}; name another with --story") from None


def lines(totals: Totals, story: Path) -> list[str]:
    """The summary for people."""
    whole = f"{totals.n_worlds} worlds" if totals.n_worlds > 1 else "one world"
    out = [
        f"{whole}: {totals.n_agents} agents, {totals.simulated_s / 3600:.1f} simulated hours in {totals.wall_s:.1f} s",
        f"history  {totals.digest or 'broken off'}",
        f"events   {totals.n_events} into the coordinator's core, {totals.events_per_s:.0f} per second",
        f"beside   {totals.n_happenings} happenings, {totals.n_messages} messages",
    ]
    if totals.memory_bytes_per_agent:
        out.append(f"memory   {totals.memory_bytes_per_agent / KIB:.1f} KiB per agent, both sides of it")
    out += [
        _row("job", f"{job.job}: {job.phase}, {job.n_rounds} rounds, {job.n_updates} updates", job.reason)
        for job in totals.jobs
    ]
    if not totals.jobs:
        out += [_row("jobs", f"{n:7} {end}") for end, n in totals.ends.items()]
    out += [_row("fault", f"{n:7} {kind}") for kind, n in totals.faults.items()]
    for broken in totals.broken:
        told = broken.story[-SHOWN_LINES:] if totals.n_worlds == 1 else []
        out += [
            *told,
            _row("BROKEN", broken.fault),
            _row("story", str(story / f"seed-{broken.seed}.txt")),
            broken.command,
        ]
    return [plain(line) for line in out]


def _row(head: str, text: str, more: str = "") -> str:
    return f"{head:8} {text}" + (f": {more}" if more else "")
