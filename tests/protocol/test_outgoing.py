"""What is said at which quality of service: what the next word makes up for need not wait for a broker's acknowledgement."""

from __future__ import annotations

import asyncio
import logging

import pytest

from protocol.memory_bus import MemoryBroker
from protocol.messages import Done, Grant, Progress
from protocol.outgoing import Outgoing

XFER = "0" * 32


async def test_credit_and_heartbeats_ask_for_no_acknowledgement(caplog: pytest.LogCaptureFixture) -> None:
    """With one message of QoS 1 per round trip, credit that stood in line ran out before it was given."""
    caplog.set_level(logging.ERROR)
    broker = MemoryBroker()
    broker.deny = lambda _client, _topic: True  # which a broker says of QoS 1 alone
    async with broker.bus("a") as bus:
        while not bus.connected:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        outgoing = Outgoing(lambda: 0.0)
        running = asyncio.create_task(outgoing.run(bus))
        for body in (Grant(xfer=XFER, ranges=[(0, 1)]), Progress(), Done(xfer=XFER)):
            outgoing.say(f"said/{type(body).__name__}", body)
        async with asyncio.timeout(10):
            while not caplog.records:  # noqa: ASYNC110 - nothing else tells of it
                await asyncio.sleep(0)
        running.cancel()
    assert [vars(record)["action"] for record in caplog.records] == ["publish_refused"]
    assert "said/Done" in caplog.text


async def test_a_saying_is_over_when_the_broker_has_it_and_when_the_connection_ends() -> None:
    broker = MemoryBroker()
    async with broker.bus("a") as bus:
        outgoing = Outgoing(lambda: 0.0)
        first = outgoing.say("said", Done(xfer=XFER))
        assert not first.is_over, "it stands in line, and nobody publishes"
        running = asyncio.create_task(outgoing.run(bus))
        async with asyncio.timeout(10):
            while not first.is_over:  # noqa: ASYNC110 - nothing else tells of it
                await asyncio.sleep(0)
            broker.hold("a")
            second = outgoing.say("said", Done(xfer=XFER))
            while not second.is_over:  # noqa: ASYNC110
                await asyncio.sleep(0)
        running.cancel()
