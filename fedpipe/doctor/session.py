"""What the broker lets us do: connect, say, hear, how much at once, how fast; and whether the coordinator is there.

What is said goes where the uplink's probe goes (agent/probe.py), as a transfer that nobody asked for: dropped unread.
The forbidden place is a broadcast that nobody asked for either; it harms no one where the broker lets it through.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from typing import Final, NamedTuple

from fedpipe.doctor.findings import Finding, failed, objected, ok, skipped, warning
from protocol import codec
from protocol.bus import BrokerConfig, Bus, BusError, Connected, Denied, Disconnected, Received, mqtt_bus
from protocol.errors import BadMessage
from protocol.messages import CoordinatorState, Envelope
from protocol.seal import unsealed
from protocol.topics import Topics

CHECKS: Final = ("mqtt", "packet-size", "receive-maximum", "publish", "acl", "subscribe", "round-trip")
HEARD: Final = ("coordinator", "clock")
"""What an agent sees beside: the coordinator's retained birth."""
PATIENCE_S: Final = 15.0
NO_BLOB: Final = "0" * 32
HEARD_S: Final = 2.0
"""A retained message comes at once behind the subscription's acknowledgement."""
FRAME_BYTES: Final = 512
"""Room for a chunk's header and its topic."""
FEW_IN_FLIGHT: Final = 10
SLOW_S: Final = 0.5
AHEAD_S: Final = 30.0


class Guest(NamedTuple):
    """As whom we come: client id, a place of our own to say something, one that must be closed, and what we listen to.

    `is_open` verifies what the coordinator says; without one it is taken as it stands.
    """

    client_id: str
    own: str
    forbidden: str
    filters: list[str]
    state: str
    open: Callable[[str, bytes], Envelope] | None = None


def as_agent(fleet: str, agent: str, client_id: str, opened: Callable[[str, bytes], Envelope] | None) -> Guest:
    """What an agent does."""
    topics = Topics(fleet)
    heard = topics.agent_subscriptions(agent)
    return Guest(client_id, topics.up_probe(agent), topics.blob(NO_BLOB), heard, topics.coordinator_state(), opened)


def as_coordinator(fleet: str, client_id: str) -> Guest:
    """What a coordinator does; what agents say is listened to under a name that no agent has."""
    topics = Topics(fleet)
    return Guest(client_id, topics.blob(NO_BLOB), "", [f"{topics.root}/a/-/up/#"], "")


def session(config: BrokerConfig, guest: Guest) -> Iterator[Finding]:
    """Every finding of CHECKS and, for an agent, of HEARD, in their order, as far as the broker lets us come."""
    loop = asyncio.new_event_loop()
    looks = _looks(config, guest)
    try:
        while True:
            with suppress(StopAsyncIteration):
                yield loop.run_until_complete(anext(looks))
                continue
            return
    finally:
        loop.run_until_complete(looks.aclose())
        loop.close()


async def _looks(config: BrokerConfig, guest: Guest) -> AsyncGenerator[Finding, None]:
    async with mqtt_bus(config, guest.client_id, lambda: None) as bus:
        try:
            async with asyncio.timeout(PATIENCE_S):
                first = await bus.next()
        except TimeoutError:
            yield failed("mqtt", f"no welcome within {PATIENCE_S:.0f} s", "look at the broker's log")
            return
        if isinstance(first, Disconnected):
            yield objected("mqtt", first.reason)
            return
        assert isinstance(first, Connected)
        for finding in _welcome(first, config.chunk_bytes):
            yield finding
        yield await _publish(bus, guest.own, config.chunk_bytes)
        yield await _forbidden(bus, guest.forbidden, first)
        yield await _subscribe(bus, guest.filters)
        yield await _round_trip(bus, guest.own)
        if guest.state:
            for finding in await _coordinator(bus, guest):
                yield finding


def _welcome(welcome: Connected, chunk_bytes: int) -> Iterator[Finding]:
    if welcome.mqtt_version == 5:
        yield ok("mqtt", "welcome, MQTT 5")
    else:
        advice = "take a broker that speaks MQTT 5 (mosquitto 1.6 or later): the checks of its access control need it"
        yield warning("mqtt", "welcome, but MQTT 3.1.1 only: it does not say when it denies something", advice)
    room_bytes = welcome.max_packet_bytes - FRAME_BYTES
    text = f"the broker takes packets of {welcome.max_packet_bytes} bytes, a chunk has {chunk_bytes}"
    if room_bytes < chunk_bytes:
        fits = max(1024, room_bytes // 1024 * 1024)
        yield failed(
            "packet-size",
            text,
            f"set broker.chunk_bytes = {fits} on both sides, or raise max_packet_size at the broker",
        )
    else:
        yield ok("packet-size", text)
    n = welcome.receive_maximum
    if n < FEW_IN_FLIGHT:
        advice = "raise the broker's receive maximum (mosquitto: max_inflight_messages 20)"
        yield warning("receive-maximum", f"only {n} messages may wait for their acknowledgement", advice)
    else:
        yield ok("receive-maximum", f"{n} messages may wait for their acknowledgement")


async def _publish(bus: Bus, topic: str, chunk_bytes: int) -> Finding:
    try:
        async with asyncio.timeout(PATIENCE_S):
            for size in (1, chunk_bytes):
                await bus.publish(topic, os.urandom(size), qos=1)
    except TimeoutError:
        advice = "raise its message_size_limit, or lower broker.chunk_bytes; and see how fast the line is"
        return failed("publish", f"a chunk was not acknowledged within {PATIENCE_S:.0f} s", advice)
    except BusError as error:
        return objected("publish", error)
    return ok("publish", f"{topic} takes a whole chunk")


async def _forbidden(bus: Bus, topic: str, welcome: Connected) -> Finding:
    if not topic:
        return skipped("acl", "the coordinator may write wherever agents read")
    if welcome.mqtt_version != 5:
        return skipped("acl", "MQTT 3.1.1 does not say what is denied")
    try:
        async with asyncio.timeout(PATIENCE_S):
            await bus.publish(topic, b"\0", qos=1)
    except Denied:
        return ok("acl", "the broker denies an agent the coordinator's topics, as it should")
    except (TimeoutError, BusError) as error:
        return failed("acl", f"no answer to a forbidden message ({error})", "look at the broker's log")
    advice = "give the broker an acl_file: `fedpipe mosquitto-config` writes one"
    return warning("acl", "an agent may write the coordinator's topics: so any of them can give orders to all", advice)


async def _subscribe(bus: Bus, filters: list[str]) -> Finding:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await bus.subscribe(*filters)
    except TimeoutError:
        return failed("subscribe", f"no answer within {PATIENCE_S:.0f} s", "look at the broker's log")
    except BusError as error:
        return objected("subscribe", error)
    return ok("subscribe", ", ".join(filters))


async def _round_trip(bus: Bus, topic: str) -> Finding:
    took = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(5):
                began_s = time.monotonic()
                await bus.publish(topic, b"\0", qos=1)
                took.append(time.monotonic() - began_s)
    except (TimeoutError, BusError) as error:
        return failed("round-trip", f"the broker did not answer ({error})", "look at its log")
    median_s = statistics.median(took)
    text = f"the broker acknowledges after {1000 * median_s:.1f} ms (median of {len(took)})"
    if median_s > SLOW_S:
        return warning("round-trip", text, "see how busy the line and the broker are; transfers will be slow")
    return ok("round-trip", text)


async def _coordinator(bus: Bus, guest: Guest) -> list[Finding]:
    received = None
    with suppress(TimeoutError):
        async with asyncio.timeout(HEARD_S):
            while received is None:
                match await bus.next():
                    case Received(topic, payload, _) if topic == guest.state:
                        received = payload
                    case Disconnected(reason):
                        return [objected("coordinator", reason)]
    if received is None:
        advice = "start the coordinator, correct `fleet` here or there, or allow reading the topic"
        return [failed("coordinator", f"nothing was ever said at {guest.state}", advice)]
    try:
        said = guest.open(guest.state, received) if guest.open else codec.decode(unsealed(received), CoordinatorState)
    except BadMessage as error:
        advice = "was this server enrolled with another fleet or coordinator?  Then `fedpipe enrol --again`"
        return [failed("coordinator", f"it speaks, but is not to be trusted: {error}", advice)]
    assert isinstance(said.b, CoordinatorState)
    return [_presence(said.b), _ahead(said.ts - time.time())]


def _presence(state: CoordinatorState) -> Finding:
    if state.online:
        return ok("coordinator", f"online, {state.software or 'of unknown version'}")
    return warning("coordinator", "offline", "start it: systemctl start fedpipe-coordinator, where it lives")


def _ahead(ahead_s: float) -> Finding:
    """Its birth lies in the past by nobody knows how much, so only a clock of ours that is behind can be seen."""
    if ahead_s > AHEAD_S:
        found = f"the coordinator's birth lies {ahead_s:.0f} s in the future of this machine's clock"
        return failed("clock", found, "set this machine's clock, and see that NTP runs on both")
    return ok("clock", "not behind the coordinator's")
