"""What a look at a long job costs: 100 rounds of a thousand agents, as objects all at once, and as a past that is extended.

    python -m bench.history [--agents 1000] [--rounds 100]

Each side runs in a process of its own, whose peak is compared with its start.  The records are made up in the shape of real ones,
with a measurement of held-out loss for each share.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import msgspec

from coordinator.core.state import RoundRecord, ShareRecord
from coordinator.past import Past, extended
from coordinator.plan_views import LOOK_BACK, PastShare, past_shares
from coordinator.store import Store
from protocol.messages import Evaluated, ExecState

JOB: Final = "j"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=100)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedpipe-history-") as folder:
        path = Path(folder) / "journal.sqlite"
        write(path, asked.agents, asked.rounds)
        print(f"{asked.agents} agents, {asked.rounds} rounds, {path.stat().st_size / 1e6:.0f} MB of records")
        whole = told("all records at once", at_once, path)
        told("past, the first time", first, path)
        again = told("past, a round later", later, path)
        told("history as JSON", as_json, path)
        told("plan, every share", partial(shares_as_json, all_of_them=True), path)
        told("plan, the last shares", shares_as_json, path)
        print(f"a look costs {whole / again:.0f} times less once the past is known")


def write(path: Path, n_agents: int, n_rounds: int) -> None:
    """A store with so many records."""
    store = Store(path)
    for number in range(1, n_rounds + 1):
        store.record(JOB, record(number, n_agents))
    store.close()


def record(number: int, n_agents: int) -> RoundRecord:
    """A round whose agents all came through."""
    begun = 30.0 * number
    shares = {
        f"agent-{agent:04}": ShareRecord(
            state="DONE",
            samples=40,
            loss=3.2,
            bytes_up=1_049_126,
            bytes_down=1_049_126,
            train_s=12.5,
            wall_s=20.1,
            evaluated=Evaluated(version=number - 1, n_samples=10, n_tokens=1000, loss=3.1 + agent / 1e4),
            bits="nf4",
            rank_sum=512,
            planned_samples=40,
            step_s=0.2,
            peak_bytes=10**9,
            assigned_at=begun,
            entered={ExecState.ACCEPTED: begun + 0.1, ExecState.TRAINING: begun + 1.0},
            ended_at=begun + 22.0,
        )
        for agent in range(n_agents)
    }
    return RoundRecord(
        round=number,
        attempt=0,
        purpose="train",
        version=number - 1,
        outcome="aggregated",
        opened_at=begun,
        wall_s=25.0,
        loss=3.0,
        shares=shares,
    )


def at_once(path: Path) -> float:
    """Seconds of processor time to read everything and to work out what it amounts to."""
    store, started = Store(path), time.process_time()
    records = list(store.rounds(JOB))
    extended(Past(), records)
    return time.process_time() - started


def first(path: Path) -> float:
    """The same, a record at a time."""
    store, started = Store(path), time.process_time()
    store.past(JOB)
    return time.process_time() - started


def later(path: Path) -> float:
    """With one round more than were there at the last look."""
    store = Store(path)
    n_rounds = store.past(JOB).n_rounds
    one = next(store.rounds(JOB, n_rounds - 1))
    store.record(JOB, msgspec.structs.replace(one, round=n_rounds + 1))
    started = time.process_time()
    store.past(JOB)
    return time.process_time() - started


def as_json(path: Path) -> float:
    """All records as the API sends them."""
    store, started = Store(path), time.process_time()
    for one in store.rounds(JOB):
        msgspec.json.encode(one)
    return time.process_time() - started


def shares_as_json(path: Path, *, all_of_them: bool = False) -> float:
    """What came of each agent's shares, beside a plan: all of them, or the last ones as its view has them."""
    store = Store(path)
    n_rounds = 0 if all_of_them else store.past(JOB).n_rounds
    started, shares = time.process_time(), dict[str, list[PastShare]]()
    if all_of_them:
        for one in store.rounds(JOB):
            for agent, found in past_shares([one]).items():
                shares.setdefault(agent, []).extend(found)
    else:
        shares = past_shares(store.rounds(JOB, n_rounds - LOOK_BACK))
    msgspec.json.encode(shares)
    return time.process_time() - started


def told(what: str, side: Callable[[Path], float], path: Path) -> float:
    """Run one side, print its figures; its seconds."""
    context = get_context("fork")
    found = context.SimpleQueue()
    process = context.Process(target=lambda: found.put(_measured(side, path)))
    process.start()
    seconds, n_bytes = found.get()
    process.join()
    print(f"{what:22}{seconds:8.3f} CPU s {n_bytes / 2**20:8.0f} MiB above the start")
    return seconds


def _measured(side: Callable[[Path], float], path: Path) -> tuple[float, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = side(path)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    main()
