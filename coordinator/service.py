"""The whole daemon: the shell, its web API and the folder for job files, from one configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.daemon import Coordinator
from coordinator.submission import watch_folder


async def serve(config: CoordinatorConfig, stop: asyncio.Event) -> None:
    """Run until `stop` is set."""
    from coordinator.web import serve_api

    coordinator = Coordinator(config)
    jobs = Path(config.jobs_dir) if config.jobs_dir else coordinator.folder / "jobs"
    await coordinator.run(stop, watch_folder(coordinator, jobs), serve_api(coordinator))
