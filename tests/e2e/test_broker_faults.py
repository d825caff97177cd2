"""What brokers do to their clients, to the real daemons: each ends well, or in words that say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent import answers
from agent.bases import BasesConfig
from agent.config import AgentConfig
from agent.daemon import Agent
from chaos.proxy import Proxy
from coordinator.config import CoordinatorConfig
from coordinator.core.state import FleetState
from coordinator.daemon import Coordinator
from fedpipe.broker import free_port
from protocol.bus import BrokerConfig, Connected, Disconnected, Received, TooLarge, Will, mqtt_bus
from protocol.messages import Rebirth
from protocol.outgoing import IN_FLIGHT, Outgoing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PATIENCE_S = 60.0


class Heard(logging.Handler):
    """Every log record, for who waits for one."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._news.set()

    def said(self, action: str, text: str = "") -> list[str]:
        """Messages with this action word that hold this text."""
        found = [r.getMessage() for r in self.records if getattr(r, "action", "") == action]
        return [message for message in found if text in message]

    async def hears(self, action: str, text: str = "") -> str:
        async with asyncio.timeout(PATIENCE_S):
            while not (found := self.said(action, text)):
                self._news.clear()
                await self._news.wait()
        return found[0]


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, root = Heard(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.setLevel(level)
    root.removeHandler(handler)


def at(broker: Any, **fields: Any) -> BrokerConfig:
    return BrokerConfig(url=broker.url, reconnect_max_s=0.5, **fields)


@asynccontextmanager
async def living(daemon: Agent | Coordinator) -> AsyncIterator[Any]:
    stop = asyncio.Event()
    running = asyncio.create_task(daemon.run(stop))
    try:
        yield daemon
    finally:
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await running


def an_agent(folder: Path, broker: BrokerConfig, name: str = "anna", state: str = "") -> Agent:
    config = AgentConfig(
        agent=name, state_dir=str(folder / (state or name)), broker=broker, base=BasesConfig(), probe_bytes=0
    )
    return Agent(config)


def a_coordinator(folder: Path, broker: BrokerConfig) -> Coordinator:
    return Coordinator(CoordinatorConfig(state_dir=str(folder / "coordinator"), broker=broker))


async def until(coordinator: Coordinator, what: Callable[[FleetState], bool]) -> None:
    """Wait for a state of the coordinator's core."""
    moved = asyncio.Event()
    coordinator.watchers.add(lambda *_: moved.set())
    async with asyncio.timeout(PATIENCE_S):
        while not what(coordinator.fleet.state):
            moved.clear()
            await moved.wait()


def is_online(state: FleetState) -> bool:
    return "anna" in state.agents and state.agents["anna"].online


# ------------------------------------------------------------------------------------------------------ one name, twice


async def test_two_agents_of_one_name_are_named_and_do_not_make_war(
    mosquitto_broker: Any, tmp_path: Path, heard: Heard
) -> None:
    broker = at(mosquitto_broker)
    async with (
        living(a_coordinator(tmp_path, broker)),
        living(an_agent(tmp_path, broker)),
        living(an_agent(tmp_path, broker, state="copy")),
    ):
        assert "give each its own" in await heard.hears("twins", "agent anna")
        assert "the id anna" in await heard.hears("bus_down", "copied configuration")


async def test_thrown_out_again_and_again_a_client_waits_longer_and_longer(mosquitto_broker: Any) -> None:
    """The pauses grow to the longest one: within n attempts of a war at most some 2^n s / 2 pass between two."""
    config = BrokerConfig(url=mosquitto_broker.url, reconnect_max_s=4.0)
    async with mqtt_bus(config, "twin", lambda: None) as one, mqtt_bus(config, "twin", lambda: None) as other:
        n_welcomes = 0

        async def count(bus: Any) -> None:
            nonlocal n_welcomes
            while True:
                n_welcomes += isinstance(await bus.next(), Connected)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.gather(count(one), count(other))
        assert 2 <= n_welcomes <= 20, "without a pause there would be hundreds"


# -------------------------------------------------------------------------------------------------------- access control

AGENT_SAYS = {"state", "report", "exec", "offer", "answer"}


async def test_a_denied_topic_is_named_with_the_line_that_allows_it(
    start_mosquitto: Callable[..., Any], tmp_path: Path, heard: Heard
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read fed/v1/main/a/anna/down/#\ntopic read fed/v1/main/c/#\n")
    agent = an_agent(tmp_path, at(start_mosquitto(f"acl_file {rules}")))
    async with living(agent):
        for leaf in ("state", "report"):
            said = await heard.hears("publish_refused", f"up/{leaf}")
            assert "`topic write fed/v1/main/a/anna/up/#`" in said
        for leaf in AGENT_SAYS - {"state", "report"}:
            agent.outgoing.say(agent.topics.up("anna", leaf), agent.resources.report)  # type: ignore[arg-type]
            assert "`topic write fed/v1/main/a/anna/up/#`" in await heard.hears("publish_refused", f"up/{leaf}")


async def test_a_coordinator_that_may_not_write_is_told_so(
    start_mosquitto: Callable[..., Any], tmp_path: Path, heard: Heard
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic read #\ntopic write fed/v1/main/a/anna/up/#\n")
    broker = at(start_mosquitto(f"acl_file {rules}"))
    async with living(a_coordinator(tmp_path, broker)), living(an_agent(tmp_path, broker)):
        assert "`topic write fed/v1/main/c/#`" in await heard.hears("publish_refused", "c/state")
        assert "`topic write fed/v1/main/a/anna/down/#`" in await heard.hears("publish_refused", "down/plan")


@pytest.mark.parametrize(
    ("allowed", "protocol", "wanted"),
    [
        # What an acl_file denies to read is acknowledged and stays silent; so is, with 3.1.1, what may not be written.
        (
            "topic write fed/v1/main/a/anna/up/#\ntopic read fed/v1/main/c/#\ntopic readwrite fed/v1/main/a/+/up/#",
            "5",
            "topic read fed/v1/main/a/anna/down/#",
        ),
        (
            "topic write fed/v1/main/a/anna/up/#\ntopic read fed/v1/main/a/anna/down/#",
            "5",
            "topic read fed/v1/main/c/#",
        ),
        (
            "topic read fed/v1/main/a/anna/down/#\ntopic read fed/v1/main/c/#",
            "3.1.1",
            "topic write fed/v1/main/a/anna/up/#",
        ),
    ],
)
async def test_a_topic_that_is_denied_in_silence_is_missed(
    start_mosquitto: Callable[..., Any],
    tmp_path: Path,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    allowed: str,
    protocol: Any,
    wanted: str,
) -> None:
    monkeypatch.setattr(answers, "PATIENCE_S", 1.0)
    rules = tmp_path / "acl"
    rules.write_text(f"{allowed}\nuser cloud\ntopic readwrite #\n")
    broker = start_mosquitto(f"acl_file {rules}")
    async with (
        living(a_coordinator(tmp_path, at(broker, username="cloud"))),
        living(an_agent(tmp_path, at(broker, protocol=protocol))),
    ):
        assert wanted in await heard.hears("unanswered")


async def test_an_agent_without_a_coordinator_says_so_until_there_is_one(
    mosquitto_broker: Any, tmp_path: Path, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "PATIENCE_S", 1.0)
    broker = at(mosquitto_broker)
    async with living(an_agent(tmp_path, broker)):
        assert "start it" in await heard.hears("unanswered", "no coordinator")
        async with living(a_coordinator(tmp_path, broker)) as coordinator:
            await until(coordinator, is_online)


# ------------------------------------------------------------------------------------------------- who does not get in


async def test_a_full_broker_says_so_and_lets_the_next_one_in(start_mosquitto: Callable[..., Any]) -> None:
    broker = start_mosquitto("max_connections 2")
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        inside = await stack.enter_async_context(contextlib.AsyncExitStack())
        for i in range(5):
            bus = mqtt_bus(at(broker), f"client-{i}", lambda: None)
            await (inside if i == 0 else stack).enter_async_context(bus)
            if isinstance(refused := await bus.next(), Disconnected):
                break
        assert isinstance(refused, Disconnected)
        assert "max_connections" in refused.reason
        await inside.aclose()
        while not isinstance(await bus.next(), Connected):
            pass


async def test_hours_without_a_broker_cost_nothing_and_end_at_once() -> None:
    """A thousand attempts are some eight hours at the usual pauses."""
    attempts = asyncio.Queue[None]()
    port = free_port()

    def will() -> Will | None:  # asked for at each attempt
        attempts.put_nowait(None)
        return None

    process = psutil.Process()
    config = BrokerConfig(url=f"mqtt://127.0.0.1:{port}", reconnect_max_s=0.001)
    async with mqtt_bus(config, "patient", will) as bus, asyncio.timeout(PATIENCE_S):
        for _ in range(100):
            await attempts.get()
        files, tasks = process.num_fds(), len(asyncio.all_tasks())
        for _ in range(900):
            await attempts.get()
        assert process.num_fds() <= files + 8
        assert len(asyncio.all_tasks()) <= tasks + 3
        assert isinstance(await bus.next(), Disconnected), "said once"
        async with Proxy("127.0.0.1", 1) as there:  # somebody listens: the next news is another one
            there.accepting = "refuse"
            async with mqtt_bus(BrokerConfig(url=f"mqtt://127.0.0.1:{there.port}"), "other", lambda: None) as other:
                assert "without a welcome" in (await other.next()).reason  # type: ignore[union-attr]
        assert bus._happenings.empty()


# ----------------------------------------------------------------------------------------------- limits of the broker


async def test_a_slow_uplink_is_not_taken_for_a_dead_one(mosquitto_broker: Any) -> None:
    """Two chunks of 128 KiB at 128 kbit/s, each longer under way than the keepalive: they arrive, over one connection."""
    async with Proxy("127.0.0.1", mosquitto_broker.port) as proxy, contextlib.AsyncExitStack() as stack:
        slow = mqtt_bus(BrokerConfig(url=f"mqtt://127.0.0.1:{proxy.port}", keepalive_s=5), "slow", lambda: None)
        reader = mqtt_bus(at(mosquitto_broker), "reader", lambda: None)
        await reader.subscribe("t")
        for bus in (slow, reader):
            await stack.enter_async_context(bus)
            assert isinstance(await bus.next(), Connected)
        proxy.up.bytes_per_s = 16_000
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(2):
                await slow.publish("t", bytes(128 * 1024), qos=0)
            for _ in range(2):
                assert isinstance(await reader.next(), Received)
        assert proxy.n_accepted == 1


async def test_a_vanished_peer_is_noticed_by_the_keepalive(mosquitto_broker: Any, tmp_path: Path, heard: Heard) -> None:
    """No FIN, no RST: the agent notices within two keepalives and a second, the broker within one and a half."""
    async with Proxy("127.0.0.1", mosquitto_broker.port) as proxy:
        link = BrokerConfig(url=f"mqtt://127.0.0.1:{proxy.port}", reconnect_max_s=0.5, keepalive_s=5)
        coordinator, loop = a_coordinator(tmp_path, at(mosquitto_broker)), asyncio.get_running_loop()
        async with living(coordinator), living(an_agent(tmp_path, link)):
            await until(coordinator, is_online)
            proxy.blackhole()
            vanished_at = loop.time()
            await until(coordinator, lambda state: not is_online(state))
            assert loop.time() - vanished_at < 1.5 * 5 + 6, "mosquitto looks every 5 s or so"
            await heard.hears("bus_down")
            assert loop.time() - vanished_at < 2 * 5 + 6
            proxy.heal()
            proxy.cut()
            await until(coordinator, is_online)


async def test_a_message_above_the_limit_names_the_broker_s_setting(start_mosquitto: Callable[..., Any]) -> None:
    async with mqtt_bus(at(start_mosquitto("max_packet_size 3000")), "writer", lambda: None) as bus:
        await bus.next()
        with pytest.raises(TooLarge, match="max_packet_size"):
            await bus.publish("t", bytes(3000))


async def test_words_do_not_wait_for_each_other_s_acknowledgement(mosquitto_broker: Any) -> None:
    """Not one acknowledgement comes back, and twenty messages are at the broker, in order."""
    topics, stop = [f"t/{i:02}" for i in range(IN_FLIGHT)], contextlib.AsyncExitStack()
    async with Proxy("127.0.0.1", mosquitto_broker.port) as proxy, stop as stack, asyncio.timeout(PATIENCE_S):
        reader = mqtt_bus(at(mosquitto_broker), "reader", lambda: None)
        writer = mqtt_bus(BrokerConfig(url=f"mqtt://127.0.0.1:{proxy.port}"), "writer", lambda: None)
        await reader.subscribe("t/#")
        for bus in (reader, writer):
            await stack.enter_async_context(bus)
            assert isinstance(await bus.next(), Connected)
        proxy.down.stalled = True
        outgoing = Outgoing(asyncio.get_running_loop().time)
        publishing = asyncio.create_task(outgoing.run(writer))
        for topic in topics:
            outgoing.say(topic, Rebirth())
        heard = [await reader.next() for _ in topics]
        assert [received.topic for received in heard if isinstance(received, Received)] == topics
        publishing.cancel()
        await asyncio.wait([publishing])
