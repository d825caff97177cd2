"""Processes that die at every point where it could matter: the result is bit for bit that of a run in which nothing dies.

Real processes, a real mosquitto, real training; the traps are in armed.py.  Two agents do three rounds of a job in which
everything is pinned, so that the masters of its versions are known from one undisturbed run.  FEDPIPE_CRASHES=all (`make
crashes`) springs every trap of every kind; without it those of which each stands for a different promise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import psutil
import pytest

from coordinator.core.events import Happened, UpdateStored
from coordinator.core.state import ENDED, Phase, RoundRecord
from fedpipe.client import Coordinator
from protocol.errors import BadConfig, Unavailable

IS_LONG = os.environ.get("FEDPIPE_CRASHES") == "all"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800 if IS_LONG else 300)]

N_ROUNDS = 3
NOT_HERE = {"AgentRevoked"}
"""A fleet without certificates has none to take back."""
KINDS = sorted({kind.__name__ for kind in get_args(Happened)} - NOT_HERE)
RARE = {
    "UpdateSpoiled",
    "PlanFailed",
    "AggregateFailed",
    "JobCancelled",
    "JobPaused",
    "JobResumed",
    "AgentLeft",
    "Tick",
}
"""What a good job does not bring: provoked, once for each place."""
AFTERWARDS = {"JobRolledBack"}
"""What would be a version more than the undisturbed run has: provoked when that was compared."""
PLACES = ["inbox", "committed", "performed", "said"] if IS_LONG else ["committed", "said"]
RECORDS = {
    f"{kind}.{place}"
    for kind in KINDS
    for place in PLACES
    if kind not in AFTERWARDS and (IS_LONG or kind not in RARE or place == "committed")
} - {"PlanFailed.inbox"}  # a planner that failed once is asked again, and plans
WORK = ["fold.written", "fold.asked", "fold.stored", "version.added", "snapshot.torn", "upload.3", "export.torn"]
WORK += ["fold.begun", "journal.torn", "snapshot.saved", "upload.1", "upload.9"] if IS_LONG else []


# ------------------------------------------------------------------------------------------------- what must come out


class Outcome(NamedTuple):
    """What may not depend on who died: the fp32 masters, who contributed how much to each round, the final losses."""

    masters: list[str]
    samples: dict[int, dict[str, int]]
    losses: dict[str, float]


async def outcome(fleet: Any, job: str = "e2e") -> Outcome:
    """Of a job that has ended, from its journal and its API."""
    folded = [record for record in history(fleet, job) if record.outcome == "aggregated"]
    assert len({record.round for record in folded}) == len(folded), "a round was folded twice"
    samples = {r.round: {a: s.samples for a, s in r.shares.items() if s.state == "DONE"} for r in folded}
    view = await fleet.look(job)
    losses = {agent: found.loss for agent, found in view.evaluations.get(view.version, {}).items()}
    return Outcome(masters_of(fleet, job), samples, losses)


def masters_of(fleet: Any, job: str = "e2e") -> list[str]:
    """The digest of every version's master, from the first on."""
    with contextlib.closing(sqlite3.connect(journal(fleet))) as db:
        rows = db.execute("SELECT version, master FROM versions WHERE job = ? ORDER BY version", (job,)).fetchall()
    assert [version for version, _ in rows] == list(range(1, len(rows) + 1))
    return [master for _, master in rows]


def has_versions(fleet: Any, n: int) -> bool:
    return len(masters_of(fleet)) >= n


def history(fleet: Any, job: str = "e2e") -> list[RoundRecord]:
    """Every round of a job that ended, failed attempts too."""
    with contextlib.closing(sqlite3.connect(journal(fleet))) as db:
        rows = db.execute("SELECT record FROM rounds WHERE job = ? ORDER BY round, attempt", (job,)).fetchall()
    return [msgspec.msgpack.decode(row[0], type=RoundRecord) for row in rows]


def journal(fleet: Any) -> Path:
    folder: Path = fleet.cluster.folder
    return folder / "coordinator" / "state" / "journal.sqlite"


def events(fleet: Any) -> list[Happened]:
    """Everything that the coordinator ever journalled."""
    with contextlib.closing(sqlite3.connect(journal(fleet))) as db:
        return [msgspec.msgpack.decode(row[0], type=Happened) for row in db.execute("SELECT body FROM journal")]


def complaints(fleet: Any) -> list[str]:
    """Errors and traces in any log."""
    return [line for line in fleet.log_lines() if re.search(r"log: \S+ (ERROR|CRITICAL)|Traceback|poison", line)]


async def expect(fleet: Any, wanted: Outcome, *, named: str = "^$", may_miss: bool = False) -> None:
    """The job ended as if nothing had happened, every trap sprang (unless its word may have died with a broker), nothing is left behind, no log complains of what has no name."""
    job = await fleet.ended()
    assert job.phase is Phase.COMPLETED, (job.text, fleet.cluster.notes)
    found = await outcome(fleet)
    assert found == wanted
    assert may_miss or not fleet.still_armed(), "these points were never reached"
    await fleet.until_it_is(lambda: not owed(fleet), "every update was taken")
    await fleet.until_it_is(lambda: not fleet.orphans(), "no child outlives its daemon")
    assert [line for line in complaints(fleet) if not re.search(named, line)] == []


def owed(fleet: Any) -> list[Path]:
    return [
        path for agent in fleet.texts for path in (fleet.cluster.folder / agent / "state" / "outbox").glob("*.update")
    ]


# --------------------------------------------------------------------------------------------------------------- jobs


def job_text(fleet: Any, name: str = "e2e", **tables: dict[str, Any]) -> str:
    rounds = {"n_rounds": N_ROUNDS, "start_agents": 2, "min_agents": 2, "start_wait_s": 0.5, "max_attempts": 10}
    patience = {"train_s": 200.0, "grace_s": 60.0, "wait_s": 200.0}
    tables["round"] = rounds | patience | tables.get("round", {})
    tables["train"] = {"n_steps": 4} | tables.get("train", {})
    tables["job"] = {"name": name} | tables.get("job", {})
    return str(fleet.job_text(**tables))


async def submit(fleet: Any, name: str = "e2e", **tables: dict[str, Any]) -> None:
    """Until the coordinator has the job: it may die with the request in its hands, before or after it knows of it."""
    while not await known(fleet, name):
        with contextlib.suppress(Unavailable):
            await fleet.submit(job_text(fleet, name, **tables))


async def known(fleet: Any, name: str) -> bool:
    """Whether the coordinator knows a job; waits for one that is away."""
    while True:
        try:
            with Coordinator(f"http://127.0.0.1:{fleet.port}") as client:
                return name in {job.name for job in await asyncio.to_thread(client.jobs)}
        except Unavailable:
            await asyncio.sleep(0.02)


async def order(fleet: Any, name: str, what: Callable[[Coordinator, str], Any], wanted: Collection[Phase]) -> None:
    """Until the job is in one of the `wanted` phases: the coordinator may die with the order in its hands."""
    while (job := await fleet.look(name)) is None or job.phase not in wanted:
        with contextlib.suppress(Unavailable, BadConfig), Coordinator(f"http://127.0.0.1:{fleet.port}") as client:
            await asyncio.to_thread(what, client, name)


@asynccontextmanager
async def running(fleet: Any, *, has_agents: bool = True) -> AsyncIterator[Any]:
    """A fleet with its broker's process id in a file."""
    pid_file = fleet.cluster.folder / "broker" / "pid"
    fleet.broker_lines = [f"pid_file {pid_file}", *fleet.broker_lines]
    try:
        await fleet.start("mosquitto", has_agents=has_agents)
        yield fleet
    finally:
        await fleet.cluster.stop()


def of_broker(fleet: Any, name: str) -> str:
    return f"{name} {fleet.cluster.folder / 'broker' / 'pid'}"


@pytest.fixture(scope="session")
def undisturbed(armed_fleet: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the job comes to when nobody dies."""

    async def run() -> Outcome:
        async with running(armed_fleet(tmp_path_factory.mktemp("undisturbed"))) as fleet:
            await submit(fleet)
            job = await fleet.ended()
            assert job.phase is Phase.COMPLETED, job.text
            assert complaints(fleet) == []
            return await outcome(fleet)

    return asyncio.run(run())


# -------------------------------------------------------------------------------------------------------- coordinator


async def test_the_coordinator_dies_after_every_kind_of_record(
    armed_fleet: Callable[[Path], Any], undisturbed: Outcome, tmp_path: Path
) -> None:
    fleet = armed_fleet(tmp_path)
    first, second = sorted(fleet.texts)
    fleet.arm("coordinator", *RECORDS, *WORK)
    spoiled = {(first, 1), (second, 2), (first, 3)} if IS_LONG else {(first, 1)}
    for agent, number in spoiled:
        fleet.arm(agent, f"kept.{number}", trap="SIGSTOP self")
    async with running(fleet, has_agents=False):
        await submit(fleet)
        tampering = asyncio.gather(*(spoil(fleet, agent, number) for agent, number in sorted(spoiled)))
        for agent in fleet.texts:
            await fleet.add_agent(agent)
        job = await fleet.ended()
        assert job.phase is Phase.COMPLETED, (job.text, fleet.cluster.notes)
        await tampering
        await die_in_jobs_that_end_early(fleet)
        await expect(fleet, undisturbed, named="planner failed|: Traceback")
        await die_while_going_back(fleet, undisturbed)


async def spoil(fleet: Any, agent: str, number: int) -> None:
    """A bit of an update flips on the agent's disk, between training and offer."""
    await fleet.reached(agent, f"kept.{number}")
    await fleet.until_it_is(lambda: fleet.stands_still(agent), f"{agent} stands still")
    (update,) = (fleet.cluster.folder / agent / "state" / "outbox").glob("*.update")
    data = bytearray(update.read_bytes())
    data[-1] ^= 1
    update.write_bytes(data)
    fleet.cluster.members[agent].process.send_signal(signal.SIGCONT)


async def die_in_jobs_that_end_early(fleet: Any) -> None:
    """The records that a good job does not bring: each is provoked until its traps have sprung."""
    for n in range(len(PLACES)):
        if not fleet.still_armed("JobSubmitted", "JobCancelled", "JobPaused", "JobResumed", "AgentLeft"):
            break
        await submit(fleet, f"nobody-{n}", job={"only": ["nobody", "no-one"]})
        leaves = sorted(fleet.texts)[n % 2]
        if unnoticed := set(fleet.still_armed("AgentLeft")):
            await fleet.cluster.down(leaves, signal.SIGKILL)
            await fleet.until_it_is(partial(has_sprung, fleet, unnoticed), "the end of an agent was noticed")
            await fleet.cluster.up(leaves)
        await order(fleet, f"nobody-{n}", Coordinator.pause, {Phase.PAUSED})
        await order(fleet, f"nobody-{n}", Coordinator.resume, {Phase.WAITING})
        await order(fleet, f"nobody-{n}", Coordinator.cancel, ENDED)
    for n in range(len(PLACES)):
        if fleet.still_armed("Tick"):
            waits: dict[str, dict[str, Any]] = {"job": {"only": ["nobody", "no-one"]}, "round": {"wait_s": 0.5}}
            assert "no_agents" in (await ended_early(fleet, f"waits-{n}", **waits)).text
    for n in range(len(PLACES)):
        if fleet.still_armed("PlanFailed"):
            fleet.arm("coordinator", "plan.begun", trap="RAISE")
            job = await ended_early(fleet, f"unplanned-{n}")
            assert "a fault of the planner's own (RuntimeError" in job.text
    for n in range(len(PLACES)):
        if fleet.still_armed("AggregateFailed"):
            fleet.arm("coordinator", "fold.asked", trap="SIGSTOP self")
            ending = asyncio.create_task(ended_early(fleet, f"robbed-{n}"))
            await fleet.until_it_is(lambda: fleet.stands_still("coordinator"), "its updates are here")
            lost = [e for e in events(fleet) if isinstance(e, UpdateStored)][-1].offer.blob.sha256
            (path,) = (fleet.cluster.folder / "coordinator" / "state" / "blobs").rglob(f"*{lost}*")
            path.unlink()
            await fleet.kill("coordinator")
            assert "is gone" in (await ending).text


def has_sprung(fleet: Any, traps: set[str]) -> bool:
    return not traps <= set(fleet.still_armed())


async def die_while_going_back(fleet: Any, undisturbed: Outcome) -> None:
    """Back to version 1, and the coordinator dies on the way: it is made once, of the same content."""
    for n, place in enumerate(["committed"] if not IS_LONG else PLACES, start=1):
        fleet.arm("coordinator", f"JobRolledBack.{place}")
        while (job := await fleet.look("e2e")) is None or job.version < N_ROUNDS + n:
            if job is None:  # it may have gone back before it died: to ask blindly would be to ask twice
                await known(fleet, "e2e")
                continue
            with contextlib.suppress(Unavailable, BadConfig), Coordinator(f"http://127.0.0.1:{fleet.port}") as client:
                await asyncio.to_thread(client.roll_back, "e2e", 1, "the crash test")
        await fleet.until_it_is(lambda: not fleet.still_armed(), "the trap sprang")
        wanted = undisturbed.masters + [undisturbed.masters[0]] * n
        # What is answered is in the journal; the table of versions follows it.
        await fleet.until_it_is(partial(has_versions, fleet, len(wanted)), "the version is written down")
        assert masters_of(fleet) == wanted


async def ended_early(fleet: Any, name: str, **tables: dict[str, Any]) -> Any:
    """A job that fails."""
    await submit(fleet, name, **{"round": {"n_rounds": 1}} | tables)
    ended = await fleet.ended(name)
    assert ended.phase is Phase.FAILED
    return ended


# -------------------------------------------------------------------------------------------------------------- agent


async def test_an_agent_or_its_child_dies_in_every_state(
    armed_fleet: Callable[[Path], Any], undisturbed: Outcome, tmp_path: Path
) -> None:
    fleet = armed_fleet(tmp_path)
    first, second = sorted(fleet.texts)
    # A daemon takes its child along, and a new one imports torch: deaths in a row where there is no child are cheap.
    fleet.arm(first, "OFFERED.0", "DONE.0", "OFFERED.1", "ACCEPTED.1", "TRAINING.1", "offered.1", "DONE.1")
    fleet.arm(first, "PREPARING.2", "UPLOADING.2", "DONE.4")
    fleet.arm(second, "ACCEPTED.0", "PREPARING.1", "kept.1", "done", "ACCEPTED.2", "PREPARING.4")
    fleet.arm(second, "TRAINING.2", "measured.3", trap="SIGKILL children")
    async with running(fleet):
        await submit(fleet)
        await expect(fleet, undisturbed)
        died = [r for r in history(fleet) for s in r.shares.values() if "died" in s.reason]
        assert {record.round for record in died} == {2, 3}, "a dead child ends its share, with a name"


# ------------------------------------------------------------------------------------------------------------- broker


@pytest.mark.parametrize("kill", ["SIGKILL", "SIGTERM"] if IS_LONG else ["SIGKILL"])
async def test_the_broker_dies_in_every_phase_for_longer_than_an_agent_may_be_away(
    armed_fleet: Callable[[Path], Any], undisturbed: Outcome, tmp_path: Path, kill: str
) -> None:
    fleet = armed_fleet(tmp_path)
    first, second = sorted(fleet.texts)
    trap = of_broker(fleet, kill)
    fleet.arm(first, "ACCEPTED.0", "TRAINING.1", "offered.2", "PREPARING.3", "PREPARING.4", trap=trap)
    fleet.arm(second, "OFFERED.1", "done", trap=trap)
    fleet.arm("coordinator", "PlanReady.inbox", "upload.3", "fold.written", trap=trap)
    fleet.cluster.restart_s = 1.0
    async with running(fleet):
        await submit(fleet, round={"offline_grace_s": 0.3})
        await expect(fleet, undisturbed, may_miss=True)
        assert fleet.cluster.members["broker"].n_starts > 6, (
            "a word that dies with a broker springs no trap, but most do"
        )


@pytest.mark.parametrize("at", ["TRAINING.1", *(["PREPARING.0"] if IS_LONG else [])])
async def test_a_broker_comes_back_with_what_it_retained_long_ago(
    armed_fleet: Callable[[Path], Any], undisturbed: Outcome, tmp_path: Path, at: str
) -> None:
    fleet = armed_fleet(tmp_path)
    first, _ = sorted(fleet.texts)
    kept = fleet.cluster.folder / "broker" / "mosquitto.db"
    fleet.broker_lines = ["persistence true", f"persistence_location {kept.parent}/"]
    fleet.arm(first, at, trap=of_broker(fleet, "SIGUSR1"))
    comebacks = ["TRAINING.2", "TRAINING.3"]
    fleet.arm(first, *comebacks, trap=f"{of_broker(fleet, 'SIGSTOP')}\nSIGSTOP children")
    fleet.arm("coordinator", "UpdateStored.said")
    async with running(fleet):
        await submit(fleet)
        await fleet.until_it_is(kept.exists, "the broker wrote down what it retains")
        stale = kept.read_bytes()
        for point in comebacks:
            await fleet.reached(first, point)
            await fleet.cluster.down("broker", signal.SIGKILL)
            kept.write_bytes(stale)
            n_up = n_connected(fleet) + len(fleet.texts)
            coordinator, agent = (psutil.Process(fleet.cluster.members[m].process.pid) for m in ("coordinator", first))
            coordinator.suspend()  # the agents are back before it can say what holds
            await fleet.cluster.up("broker")
            await fleet.until_it_is(partial(is_up, fleet, n_up), "the agents are back")
            for process in (coordinator, *agent.children()):
                process.resume()
        await expect(fleet, undisturbed)
        assert not [line for line in fleet.log_lines() if "superseded by a newer plan" in line], (
            "no training was dropped"
        )


def n_connected(fleet: Any) -> int:
    return sum("agent.daemon: connected" in line for line in fleet.log_lines())


def is_up(fleet: Any, n: int) -> bool:
    return n_connected(fleet) >= n


# --------------------------------------------------------------------------------------------------------- everything


@pytest.mark.skipif(not IS_LONG, reason="make crashes")
@pytest.mark.parametrize("seed", range(4))
async def test_the_power_goes_and_everything_starts_again_in_any_order(
    armed_fleet: Callable[[Path], Any], undisturbed: Outcome, tmp_path: Path, seed: int
) -> None:
    fleet, draw = armed_fleet(tmp_path), random.Random(seed)
    first, second = sorted(fleet.texts)
    fleet.arm("coordinator", "UpdateStored.committed", trap=f"{of_broker(fleet, 'SIGKILL')}\nSIGKILL self")
    cuts = [("coordinator", "fold.written"), (second, "kept.2"), (first, "TRAINING.3")]
    for member, point in cuts:
        fleet.arm(member, point, trap="SIGSTOP self")
    async with running(fleet):
        await submit(fleet)
        for member, point in cuts:
            await fleet.reached(member, point)
            members = list(fleet.cluster.members)
            await asyncio.gather(*(fleet.cluster.down(name, signal.SIGKILL) for name in members))
            for name in draw.sample(members, len(members)):
                await fleet.cluster.up(name)
        await expect(fleet, undisturbed)
