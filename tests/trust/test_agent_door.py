"""The real agent on a bus in memory: orders that its coordinator did not sign, for it, now, do nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import AgentConfig
from agent.daemon import Agent
from agent.identity import Identity
from coordinator.trust.keyring import Keyring
from coordinator.trust.office import Office
from fedpipe.enrolling import Place, _keep
from protocol import codec, keys
from protocol.bus import Bus, Connected, Received
from protocol.enrolment import Enrol
from protocol.errors import BadConfig
from protocol.memory_bus import MemoryBroker
from protocol.messages import Base, Done, Execution, Plan
from protocol.outgoing import Outgoing
from protocol.topics import Topics

PATIENCE_S = 30.0
topics = Topics("main")
PLAN = topics.down("a", "plan")


def plan(job: str, at: float = 0.0, **changes: object) -> Plan:
    """One that the agent rejects, since it does not know the method: that it answers at all shows that it was taken."""
    said = {"job": job, "round": 1, "attempt": 0, "purpose": "train", "method": "unknown", "base": Base(source="x")}
    times = {"issued_at": at or time.time(), "stop_after_s": 100.0, "ttl_s": 200.0}
    return Plan(**said | times | changes)  # type: ignore[arg-type]


@pytest.fixture
def config(office: Office, tmp_path: Path) -> AgentConfig:
    place = Place(tmp_path / "agent.toml", tmp_path / "agent")
    place.identity.mkdir(parents=True)
    keys.write_public(place.identity / "ca.pem", office.authority.pem.encode())
    key, word = keys.new_key(), office.make_token("a", 1, 60.0, auto_accept=True, now=time.time())
    told = office.enrol(Enrol(token=str(word), csr=keys.request(key, "a")), "", time.time())
    _keep("https://127.0.0.1:1", told, key, place)
    return AgentConfig(agent="a", state_dir=str(place.state_dir), identity_dir=str(place.identity), probe_bytes=0)


class Cloud:
    """What can be published to an agent, by whom it may be."""

    def __init__(self, bus: Bus, ring: Keyring) -> None:
        self.bus = bus
        self.outgoing = Outgoing(time.time, ring.sign)

    def sealed(self, body: Plan | Done, topic: str = PLAN) -> bytes:
        return self.outgoing._seal(topic, self.outgoing.encode(body))

    async def give(self, payload: bytes, topic: str = PLAN) -> None:
        await self.bus.publish(topic, payload)

    async def rejected(self) -> str:
        """The next job of which the agent says that it does not take it."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                match await self.bus.next():
                    case Received(topic, payload, _) if topic == topics.up("a", "exec"):
                        body = codec.decode(payload).b
                        assert isinstance(body, Execution)
                        assert body.state == "REJECTED"
                        return body.job


@asynccontextmanager
async def running(config: AgentConfig, ring: Keyring) -> AsyncIterator[tuple[Agent, Cloud]]:
    broker, stop = MemoryBroker(), asyncio.Event()
    agent = Agent(config, broker.bus("a"))
    async with broker.bus("boss") as bus:
        assert isinstance(await bus.next(), Connected)
        await bus.subscribe(*topics.coordinator_subscriptions())
        task = asyncio.create_task(agent.run(stop))
        cloud = Cloud(bus, ring)
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(await bus.next(), Received):
                pass
        try:
            yield agent, cloud
        finally:
            stop.set()
            await task


async def test_only_what_the_coordinator_signed_for_this_agent_is_done(config: AgentConfig, office: Office) -> None:
    ring = office.keyring
    stranger = Keyring.create(office.folder.parent / "agent")
    async with running(config, ring) as (agent, cloud):
        first = cloud.sealed(plan("first"))
        await cloud.give(first)
        assert await cloud.rejected() == "first"
        forger = Cloud(cloud.bus, stranger)
        for payload in (
            cloud.outgoing.encode(plan("unsigned")),
            forger.sealed(plan("foreign-key")),
            cloud.sealed(plan("for-b"), topics.down("b", "plan")),
            cloud.sealed(plan("as-command"), topics.down("a", "cmd")),
            cloud.sealed(plan("changed"))[:-1] + b"\x01",
            cloud.sealed(plan("too-old", at=1.0)),
        ):
            await cloud.give(payload)
        await cloud.give(cloud.outgoing.encode(Done(xfer="0" * 32)), topics.down("a", "grant"))
        second = cloud.sealed(plan("second"))
        await cloud.give(second)
        assert await cloud.rejected() == "second", "nothing between the two was done"
        await cloud.give(first)
        await cloud.give(second)
        assert await cloud.rejected() == "second", "a broker may repeat the last plan, and no other"
        assert agent.refused == {"unsigned": 2, "unknown_key": 1, "forged": 3, "expired": 1, "replayed": 1}
    async with running(config, ring) as (agent, cloud):
        await cloud.give(first)
        await cloud.give(cloud.sealed(plan("third")))
        assert await cloud.rejected() == "third", "a restart does not make it forget"
        assert agent.refused == {"replayed": 1}


async def test_a_new_signing_key_is_asked_for_and_the_plan_comes_again(
    config: AgentConfig, office: Office, open_desk: Callable[[], Any]
) -> None:
    trust = Path(config.identity_dir) / "trust.json"
    trust.write_text(trust.read_text().replace("https://127.0.0.1:1", open_desk().url))
    async with running(config, office.keyring) as (agent, cloud):
        office.keyring = office.keyring.rotate()
        new = Cloud(cloud.bus, office.keyring)
        await cloud.give(new.sealed(plan("too-early")))
        async with asyncio.timeout(PATIENCE_S):
            while topics.up("a", "state") != topic_of(await cloud.bus.next()):
                pass  # it says birth, upon which a coordinator gives every plan again
        await cloud.give(new.sealed(plan("in-time")))
        assert await cloud.rejected() == "in-time"
        await cloud.give(cloud.sealed(plan("by-the-old-key")))
        assert await cloud.rejected() == "by-the-old-key", "two keys are valid"
        assert agent.refused == {"unknown_key": 1}


def topic_of(happening: object) -> str:
    return happening.topic if isinstance(happening, Received) else ""


async def test_an_agent_that_is_not_enrolled_takes_any_word(config: AgentConfig, office: Office) -> None:
    async with running(msgspec.structs.replace(config, identity_dir=""), office.keyring) as (agent, cloud):
        for job, payload in (("signed", cloud.sealed(plan("signed"))), ("bare", cloud.outgoing.encode(plan("bare")))):
            await cloud.give(payload)
            assert await cloud.rejected() == job
        assert not agent.refused


def test_an_identity_of_another_agent_is_refused(config: AgentConfig) -> None:
    with pytest.raises(BadConfig, match="identity of a of fleet main, not of b of main"):
        Agent(msgspec.structs.replace(config, agent="b"), MemoryBroker().bus("b"))


def test_renewal_is_due_at_two_thirds(config: AgentConfig) -> None:
    identity = Identity(Path(config.identity_dir))
    life_s = identity.expires_at - time.time()
    assert life_s / 2 < identity.renew_at - time.time() < 0.7 * life_s
