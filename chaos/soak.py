"""Jobs one after another on a fleet that is being hurt, until the time is up; then the books are read.

Promises: every job ends in a named state, and in time; a job whose rounds all counted everybody has bit for bit the model of
an undisturbed one; no accepted update is lost or counted twice; every version is what its updates fold to; no daemon logs an
exception; none grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

from chaos import faults
from chaos.faults import Fault
from chaos.fleet import BROKER, CLOUD, Fleet, masters, unfinished
from chaos.verdict import Books, Growth, audit, read_logs
from coordinator.core.state import ENDED
from coordinator.views import JobView

REFERENCE: Final = "undisturbed"
JOB_S: Final = 1500.0
"""No job may take longer: every wait of its rounds added up, all attempts used."""
DISK_BYTES: Final = 512 * 2**20
TICK_S: Final = 0.5
MAX_AT_ONCE: Final = 3

Say = Callable[[str], None]


@dataclass
class Account:
    """What happened in one soak."""

    seed: int
    minutes: float
    folder: str
    networks: str
    """"yes", or why the agents had none of their own."""
    faults: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    """Jobs that had to have the undisturbed model, and have it."""
    rounds: Counter[str] = field(default_factory=Counter)
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By kind of fault: from its end to the next progress of the job."""
    books: Books | None = None
    max_rss_bytes: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {
            "books": self.books._asdict() if self.books else None,
            "recoveries_s": {
                kind: {"n": len(s), "median": round(median(s), 2), "max": round(max(s), 2)}
                for kind, s in sorted(self.recoveries_s.items())
            },
        }


class Soak:
    """One soak of `minutes`.  `say` hears what happens, line by line."""

    def __init__(self, fleet: Fleet, account: Account, say: Say, *, own_disk: bool, mean_gap_s: float) -> None:
        self.fleet, self.account = fleet, account
        self.under: list[Fault] = []
        self.job: JobView | None = None
        self._say = say
        self._chance = random.Random(account.seed)
        self._sequence = faults.sequence(fleet, self._chance, own_disk=own_disk, mean_gap_s=mean_gap_s)
        self._healed: list[tuple[str, float]] = []
        self._sign: object = None
        self._growth = Growth()

    async def run(self) -> None:
        """The undisturbed job, then disturbed ones until the time is up.  Broken promises are in the account."""
        reference = await self._job(REFERENCE)
        if reference is None or (why := unfinished(reference, len(self.fleet.agents))):
            self.account.broken.append(f"the undisturbed job did not come through: {why if reference else 'no end'}")
            return
        end, number = time.monotonic() + 60 * self.account.minutes, 0
        async with asyncio.TaskGroup() as group:
            hurting = [group.create_task(self._hurt()), group.create_task(self._sample())]
            while time.monotonic() < end and not self.account.broken:
                number += 1
                job = await self._job(f"soak-{number}")
                if job is not None:
                    self._compare(job, reference)
            for task in hurting:
                task.cancel()
        self.fleet.heal()
        self.account.broken += self._growth.broken()
        self.account.max_rss_bytes = self._growth.max_rss_bytes
        self.account.restarts = {name: m.n_starts - 1 for name, m in self.fleet.cluster.members.items()}

    async def _job(self, name: str) -> JobView | None:
        """Run one job to its end; None, and a broken promise, when it has none."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(JOB_S):
                await self.fleet.submit(self.fleet.job_text(name), JOB_S)
                while True:
                    job = await self.fleet.look(name)
                    if job:
                        self._noticed(job)
                        if job.phase in ENDED:
                            break
                    await asyncio.sleep(TICK_S)
        except TimeoutError:
            where = self.job.text if self.job else "never seen"
            self.account.broken.append(f"{name} had no end after {JOB_S:.0f} s: {where}")
            return None
        self.account.jobs[str(job.phase)] += 1
        self.account.rounds.update(record.outcome.split(":")[0] for record in job.history if record.purpose == "train")
        self._say(f"{name}: {job.text}, {job.round} rounds in {time.monotonic() - began:.0f} s")
        return job

    def _compare(self, job: JobView, reference: JobView) -> None:
        if job.phase != "completed" and not job.reason:
            self.account.broken.append(f"{job.name} ended as {job.phase} without a reason")
        if why := unfinished(job, len(self.fleet.agents)):
            self._say(f"{job.name}: its model may differ: {why}")
        elif masters(job) == masters(reference):
            self.account.equal += 1
        else:
            self.account.broken.append(f"{job.name}: every share is done, and the model is another one")

    def _noticed(self, job: JobView) -> None:
        """Has it moved since the last look?  Then the faults that were healed before are recovered from."""
        self.job = job
        shares = job.current.shares.items() if job.current else ()
        steps = {agent: (s.state, s.progress.step if s.progress else 0, s.bytes_up) for agent, s in shares}
        surveys = {agent: member.survey for agent, member in job.members.items()}
        sign = (job.name, job.phase, job.round, job.attempt, steps, surveys)
        if sign != self._sign:
            self._sign, now = sign, time.monotonic()
            for kind, healed_at in self._healed:
                self.account.recoveries_s[kind].append(now - healed_at)
            self._healed.clear()

    async def _hurt(self) -> None:
        async with asyncio.TaskGroup() as group:
            for fault in self._sequence:
                await asyncio.sleep(fault.gap_s)
                while len(self.under) >= MAX_AT_ONCE or any(fault.victim == other.victim for other in self.under):
                    await asyncio.sleep(TICK_S)
                group.create_task(self._strike(fault))

    async def _strike(self, fault: Fault) -> None:
        self.under.append(fault)
        self.account.faults[fault.kind] += 1
        self._say(str(fault))
        harm = faults.ALL[fault.kind](self.fleet, fault.victim, self._chance)
        try:
            for pause_s in harm:
                await asyncio.sleep(fault.lasts_s if pause_s is None else pause_s)
        finally:
            for _ in harm:  # it was cancelled in the middle: heal all the same
                pass
            self.under.remove(fault)
            self._healed.append((fault.kind, time.monotonic()))

    async def _sample(self) -> None:
        while True:
            for name in [CLOUD, *self.fleet.agents, BROKER]:
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    process = self.fleet.processes(name)[0]
                    age_s = time.time() - process.create_time()
                    self._growth.sample(name, process.pid, age_s, process.memory_info().rss, process.num_fds())
            await asyncio.sleep(4 * TICK_S)


@contextlib.asynccontextmanager
async def small_disk(folder: Path) -> AsyncIterator[bool]:
    """A disk of its own at `folder`, so that it may be filled; False where that is not permitted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            faults.free_disk(folder)
            shutil.copytree(folder, folder.with_name("state-after"), dirs_exist_ok=True)
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


async def soak(
    folder: Path, base: Path, texts: dict[str, Path], *, seed: int, minutes: float, say: Say, mean_gap_s: float = 8.0
) -> Account:
    """A whole soak in `folder`, which must be new.  Raises nothing for a broken promise: it is in the account."""
    state_dir = folder / CLOUD / "state"
    async with small_disk(state_dir) as own_disk:
        persistent = ["persistence true", f"persistence_location {folder / BROKER}/", "autosave_interval 5"]
        async with Fleet(folder, base, texts, seed=seed, state_dir=state_dir, broker_lines=persistent) as fleet:
            account = Account(seed, minutes, str(folder), fleet.why_not or "yes")
            runs = Soak(fleet, account, say, own_disk=own_disk, mean_gap_s=mean_gap_s)
            await runs.run()
        account.books = audit(state_dir)
    account.broken += account.books.broken + read_logs(fleet.logs())
    return account


def plain_say(text: str) -> None:
    """One line on stderr with the time of day."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
