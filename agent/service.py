"""The whole daemon: the agent, and its configuration read anew at a SIGHUP."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agent.config import LIVE, AgentConfig
from agent.daemon import Agent
from protocol.reloading import Reloading
from protocol.sole import hold


async def serve(config: AgentConfig, stop: asyncio.Event, path: Path) -> None:
    """Run until `stop` is set; `path` is the configuration's file."""
    hold(Path(config.state_dir), "agent")
    agent = Agent(config)
    Reloading(path, config, LIVE, agent.renew).listen()
    await agent.run(stop)
