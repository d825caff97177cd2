"""Job files: read, checked as far as that is possible without the fleet, and only then handed to the core."""

from __future__ import annotations

import asyncio
import logging
import tomllib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator import aggregators
from coordinator.audit import LOCAL
from coordinator.core.events import JobSubmitted
from coordinator.core.spec import JobSpec
from protocol import methods
from protocol.daemon import load_toml, to_struct
from protocol.errors import BadConfig, OutsideFault, Unavailable

if TYPE_CHECKING:
    from coordinator.daemon import Coordinator

SCAN_S = 2.0
logger = logging.getLogger(__name__)


class Taken(BadConfig):
    """Another job has this name."""


def read_job(path: Path, allowed: Collection[str] = ()) -> JobSpec:
    """A job from a TOML file.  Raises BadConfig that names the file and the key."""
    return check_job(load_toml(path, JobSpec), allowed)


def parse_job(text: str, where: str, allowed: Collection[str] = ()) -> JobSpec:
    """A job from TOML text that came from `where`.  Raises BadConfig."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"{where}: not valid TOML: {error}") from None
    return check_job(to_struct(raw, JobSpec, where), allowed)


def check_job(spec: JobSpec, allowed: Collection[str] = ()) -> JobSpec:
    """The job, if its parts fit together.  Raises BadConfig."""
    method = methods.load(spec.job.method, allowed)
    aggregators.fits(method.kind, aggregators.load(method.aggregator, allowed))
    rules = spec.round
    if rules.n_agents and rules.min_agents > rules.n_agents:
        raise BadConfig(f"round.min_agents {rules.min_agents} is more than round.n_agents {rules.n_agents}")
    if spec.job.only and rules.min_agents > len(spec.job.only):
        raise BadConfig(f"round.min_agents {rules.min_agents}, but job.only names {len(spec.job.only)} agents")
    if strangers := set(spec.agents) - set(spec.job.only) if spec.job.only else set():
        raise BadConfig(f"[agents.{min(strangers)}] is not among job.only")
    return spec


async def submit(coordinator: Coordinator, spec: JobSpec) -> None:
    """Hand a checked job to the core; durable when this returns.

    Raises Taken for a name that another job has, Unavailable when the disk refuses.
    """
    name = spec.job.name
    if name not in coordinator.fleet.state.jobs:
        await coordinator.post(JobSubmitted(spec=spec))
        taken = coordinator.fleet.state.jobs.get(name)
        if taken is None:
            raise Unavailable("the coordinator could not take this job: its log says why")
        if taken.spec == spec:  # another one may have been faster
            return
    raise Taken(f"there is a job {name!r} already: choose another job.name")


async def watch_folder(coordinator: Coordinator, folder: Path) -> None:
    """Submit every *.toml that is dropped into `folder`; it is renamed to .submitted or .refused, with the reason beside it."""
    with suppress(OSError):  # a disk that takes nothing is told of elsewhere
        folder.mkdir(parents=True, exist_ok=True)
    submitted: set[Path] = set()  # whose names the disk has not let change yet
    while True:
        for path in sorted(folder.glob("*.toml")):
            with suppress(Unavailable, OSError):  # it stays there and is looked at again
                await _take(coordinator, path, submitted)
        await asyncio.sleep(SCAN_S)


async def _take(coordinator: Coordinator, path: Path, submitted: set[Path]) -> None:
    """Submit one file.  Raises Unavailable or OSError when the disk refuses, whether or not the job is submitted by then."""
    try:
        if path not in submitted:
            spec = read_job(path, coordinator.config.allow_methods)
            async with coordinator.audit.doing(LOCAL, "submit", spec.job.name):
                await submit(coordinator, spec)
            submitted.add(path)
        path.replace(path.with_suffix(".submitted"))
        submitted.discard(path)
    except Unavailable:
        raise
    except OutsideFault as error:
        logger.error("job refused: %s", error, extra={"action": "job_refused", "file": path.name})
        path.with_suffix(".reason").write_text(f"{error}\n", encoding="utf-8")
        path.replace(path.with_suffix(".refused"))
