from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from bench.transfer_live.node import CLOUD
from tests.protocol.exchange.sides import Side, Start, Wire


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def start(wire: Wire, tmp_path: Path) -> AsyncIterator[Start]:
    """Start a Side: `await start()` is the coordinator, `await start("a1")` an agent."""
    async with AsyncExitStack() as stack:

        async def begin(name: str = CLOUD, **rules: Any) -> Side:
            return await stack.enter_async_context(Side(wire.broker, tmp_path, name, **rules))

        yield begin
