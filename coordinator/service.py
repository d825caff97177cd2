"""The whole daemon: the shell, its web API and the folder for job files, from one configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

from coordinator.access import read_token
from coordinator.audit import LOCAL
from coordinator.config import LIVE, CoordinatorConfig
from coordinator.daemon import Coordinator
from coordinator.submission import watch_folder
from coordinator.trackers import Trackers
from protocol.reloading import Reloading
from protocol.sole import hold


def renew(coordinator: Coordinator, trackers: Trackers, config: CoordinatorConfig) -> None:
    """Put a configuration into force that differs in coordinator.config.LIVE alone.  Raises BadConfig before any change."""
    token = read_token(config.web)
    trackers.renew(config.trackers)
    coordinator.token, coordinator.config = token, config
    coordinator.work.renew(config)
    coordinator.disk.renew(config.keep.min_free_bytes)
    coordinator.traffic.renew(config)
    coordinator.upkeep.renew(config.keep)
    coordinator.intake.gate.renew(config.max_agents)


async def serve(config: CoordinatorConfig, stop: asyncio.Event, path: Path | None = None) -> None:
    """Run until `stop` is set; with `path`, the configuration's file, it is read anew at each SIGHUP."""
    from coordinator.trust.desk import serve_desk
    from coordinator.web import serve_api

    hold(Path(config.state_dir), "coordinator")
    coordinator = Coordinator(config)
    trackers = Trackers(config.trackers, config.fleet, coordinator.folder)
    coordinator.watchers.add(trackers.happened)
    if path:

        def reload(wanted: CoordinatorConfig) -> None:
            with coordinator.audit.act(LOCAL, "reload", str(path)):
                renew(coordinator, trackers, wanted)

        Reloading(path, config, LIVE, reload).listen()
    jobs = Path(config.jobs_dir) if config.jobs_dir else coordinator.folder / "jobs"
    try:
        await coordinator.run(stop, watch_folder(coordinator, jobs), serve_api(coordinator), serve_desk(coordinator))
    finally:
        await asyncio.to_thread(trackers.close)
