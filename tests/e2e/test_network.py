"""Bad networks, one real fleet: whatever happens to packets and connections, the model is the same, bit for bit.

Three agents in networks of their own and real training; where no network may be made, what a proxy can do is tested all the
same.  The broker's limits are small: packets of 3,000 bytes under chunks of 4 KiB, and queues of eight messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from chaos.fleet import BROKER, CLOUD, Fleet, masters, unfinished
from chaos.network import obstacle
from chaos.verdict import audit, read_logs
from coordinator.views import JobView
from fedpipe.broker import mosquitto_command

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]

SMALL = ["max_packet_size 3000", "max_queued_messages 8"]
STARVED = ["max_packet_size 3000", "max_queued_messages 2", "max_inflight_messages 1"]
JOB_S = 200.0
NOTICED_S = 30.0
"""Two keepalives of 5 s, and what mosquitto and a busy machine take beyond."""


class Stand:
    """The fleet, and the model of a job that nothing disturbed."""

    def __init__(self, fleet: Fleet, quiet: JobView) -> None:
        self.fleet, self.quiet = fleet, quiet
        self.anna, self.berta, self.clara = fleet.agents

    async def training(self, job: str, agent: str) -> None:
        await self.fleet.until(job, lambda view: share(view, agent) == "TRAINING", JOB_S)

    async def is_the_same(self, job: str) -> None:
        """The job ends, everybody's work is in it, and its model is that of the undisturbed one."""
        view = await self.fleet.ended(job, JOB_S)
        assert unfinished(view, len(self.fleet.agents)) == ""
        assert masters(view) == masters(self.quiet)


def job_text(fleet: Fleet, name: str) -> str:
    """Rounds wait for everybody, so that everybody's work is in each."""
    return fleet.job_text(name, round={"min_agents": len(fleet.agents)})


def share(view: JobView, agent: str) -> str:
    found = view.current.shares.get(agent) if view.current and view.current.purpose == "train" else None
    return found.state if found else ""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand(tmp_path_factory: pytest.TempPathFactory, base: Path, texts: dict[str, Path]) -> AsyncIterator[Stand]:
    folder = tmp_path_factory.mktemp("network") / "fleet"
    fleet = Fleet(folder, base, texts, mqtt=True, broker_lines=SMALL)
    fleet.shift_clock(fleet.agents[0], 3600.0)  # an hour wrong, in all that follows
    async with fleet:
        await fleet.submit(job_text(fleet, "quiet"))
        quiet = await fleet.ended("quiet", JOB_S)
        assert unfinished(quiet, 3) == ""
        yield Stand(fleet, quiet)
        logs = fleet.logs()
    assert audit(fleet.state_dir).broken == []
    assert read_logs({name: text for name, text in logs.items() if not name.startswith(BROKER)}) == []


@pytest.fixture(autouse=True)
def good_again(stand: Stand) -> Any:
    yield
    stand.fleet.heal()


async def test_loss_latency_and_a_slow_link(stand: Stand) -> None:
    """30 % loss for one, two seconds each way for another, 64 kbit/s with packets twice and in another order for the third."""
    if reason := obstacle():
        pytest.skip(reason)
    fleet = stand.fleet
    fleet.sides[stand.anna].set(loss_ratio=0.3)
    fleet.sides[stand.berta].set(delay_s=2.0)
    fleet.sides[stand.clara].set(bytes_per_s=8000.0, duplicate_ratio=0.3, reorder_ratio=0.3)
    await fleet.submit(job_text(fleet, "rough"))
    await stand.is_the_same("rough")
    assert fleet.sides[stand.anna].down.n_lost > 10
    assert fleet.sides[stand.clara].down.n_duplicated > 10


async def test_messages_that_come_twice_or_in_another_order(stand: Stand) -> None:
    ways = [way for proxy in stand.fleet.proxies.values() for way in (proxy.up, proxy.down)]
    for way in ways:
        way.duplicate_ratio, way.swap_ratio = 0.3, 0.2
    await stand.fleet.submit(job_text(stand.fleet, "twice"))
    await stand.is_the_same("twice")
    assert sum(way.n_duplicated for way in ways) > 20
    assert sum(way.n_swapped for way in ways) > 10


async def test_partitions_resets_and_flipped_bits_in_mid_round(stand: Stand) -> None:
    fleet, proxies = stand.fleet, stand.fleet.proxies
    await fleet.submit(job_text(fleet, "parted"))
    await stand.training("parted", stand.anna)
    proxies[stand.anna].blackhole()
    for proxy in (proxies[stand.berta], proxies[CLOUD]):
        proxy.up.flip_bits = proxy.down.flip_bits = 3
    for _ in range(5):  # a storm, half a second between two
        proxies[stand.clara].cut()
        await asyncio.sleep(0.5)
    await fleet.until_missed(stand.anna, NOTICED_S)
    proxies[CLOUD].blackhole()
    await fleet.until_knocking(CLOUD, NOTICED_S)
    fleet.heal()
    for proxy in proxies.values():
        proxy.cut()  # what was held back belongs to connections that are gone
    await stand.is_the_same("parted")


async def test_clocks_that_jump_by_days_in_mid_round(stand: Stand) -> None:
    """Deadlines travel as what is left of them, and each daemon counts it on a clock that nobody sets."""
    fleet = stand.fleet
    await fleet.submit(job_text(fleet, "clocks"))
    await stand.training("clocks", stand.berta)
    fleet.shift_clock(CLOUD, 86_400.0)
    fleet.shift_clock(stand.berta, -86_400.0)
    await fleet.until("clocks", lambda view: view.round >= 1, JOB_S)
    fleet.shift_clock(CLOUD, -86_400.0)
    fleet.shift_clock(stand.clara, 86_400.0)
    await stand.is_the_same("clocks")


async def test_a_broker_that_throws_away_what_it_has_acknowledged(stand: Stand) -> None:
    """With room for three messages for each client: births are lost, and states and plans as it happens; somebody says them again."""
    fleet, log = stand.fleet, f"{BROKER}/{BROKER}.log"
    n_up = n_connected(fleet) + len(fleet.agents) + 1
    await fleet.cluster.down(BROKER)
    n_before = len(fleet.logs()[log])
    mosquitto_command(fleet.broker_port, fleet.folder / BROKER, STARVED)
    await fleet.cluster.up(BROKER)
    async with asyncio.timeout(NOTICED_S):
        while n_connected(fleet) < n_up:  # noqa: ASYNC110 - other processes bring it about
            await asyncio.sleep(0.1)
    fleet.proxies[CLOUD].cut()  # all that is retained comes at once to who subscribes anew
    await fleet.submit(job_text(fleet, "starved"))
    await stand.is_the_same("starved")
    await fleet.cluster.down(BROKER)  # it writes its log when it ends
    await fleet.cluster.up(BROKER)
    assert "Outgoing messages are being dropped for client" in fleet.logs()[log][n_before:]


def n_connected(fleet: Fleet) -> int:
    """How often a daemon has found the broker."""
    return sum(log.count("action=bus_up") for log in fleet.logs().values())
