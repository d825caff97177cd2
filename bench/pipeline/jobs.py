"""Many runs in a few processes, each kept in a file as soon as it is done."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import msgspec

from bench.pipeline import running, world
from bench.pipeline.running import Result
from bench.pipeline.systems import EVERY, Mode


class Job(msgspec.Struct, frozen=True):
    """One run that is wanted."""

    system: str
    rate: float
    mode: Mode
    seed: int
    budget_s: float
    max_rounds: int = 10**6

    def file(self, folder: Path) -> Path:
        """Where its result is kept."""
        return folder / "runs" / f"{hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:24]}.json"


def run_all(jobs: Sequence[Job], folder: Path, n_workers: int) -> list[Result]:
    """Results in the order of the jobs; those that are kept are read, the others are run."""
    missing = [job for job in jobs if not job.file(folder).exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=spawn, initializer=_alone) as pool:
        running_jobs = {pool.submit(_work, job, folder): job for job in missing}
        for n_done, future in enumerate(as_completed(running_jobs), 1):
            job, seconds = running_jobs[future], future.result()
            print(
                f"{n_done}/{len(missing)} {job.system}, {job.mode}, {job.rate:.1e}, seed {job.seed}: {seconds:.0f} s",
                flush=True,
            )
    return [msgspec.json.decode(job.file(folder).read_bytes(), type=Result) for job in jobs]


def _alone() -> None:
    import torch

    torch.set_num_threads(1)


def _work(job: Job, folder: Path) -> float:
    """Run the job and keep its result; how long it took."""
    began = time.monotonic()
    result = running.run(
        _world(folder, job.seed),
        EVERY[job.system],
        rate=job.rate,
        mode=job.mode,
        budget_s=job.budget_s,
        max_rounds=job.max_rounds,
    )
    path = job.file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(result))
    part.rename(path)
    return time.monotonic() - began


@cache
def _world(folder: Path, seed: int) -> world.World:
    return world.load(folder, seed)
