"""The coordinator on a bus in memory, and what a job brings when nothing goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.coordinator.daemon.stage import Stage, undisturbed


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(Stage(tmp_path, stack))


@pytest.fixture(scope="session")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The masters of peers a and bb."""
    return asyncio.run(undisturbed(tmp_path_factory.mktemp("undisturbed"), "a", "bb"))
