"""The bus: the one door between a daemon and the broker, and all that the rest of the program knows about MQTT.

The contract is small on purpose, so that three things can stand behind it: a real broker (protocol/mqtt_bus.py), an
in-memory twin that ships with the package (protocol/memory_bus.py), and whatever MQTT client comes next.

    async with mqtt_bus(config, "coordinator", will) as bus:     # never waits for the broker, never raises because of it
        await bus.subscribe("fed/v1/lab/a/+/up/#")               # remembered, repeated at every reconnect
        match await bus.next():                                  # the only reading door: facts in the order they happened
            case Connected(): ...                                # everything is subscribed: say birth, state the plans again
            case Received(topic, payload): ...
            case Disconnected(reason): ...                       # show it; the bus is reconnecting already

Promises.  Between a Connected and the next Disconnected lies exactly one connection: what was received on it comes between
the two.  Delivery is at most once at QoS 0 and at least once at QoS 1, but only *to the broker and from the broker*: a
publish() that returns means the broker has the message, not that anybody read it.  Every session starts clean: nothing
is resumed from the broker's memory, because a broker loses that memory in a crash; resuming is the daemon's business.
No publish() outlives its connection: it returns, or raises NotConnected the moment the connection is gone.

Memory.  What arrived and was not yet taken by next() is queued without bound; bulk must be credit-controlled by its
receiver, as protocol/transfer.py does.  A QoS-0 publish() returns once the operating system has taken the bytes, so a
sender that awaits each chunk holds one chunk.  Filters of one bus must not overlap: brokers differ in what they do then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Final, Literal, Protocol, Self
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta

from protocol.errors import BadConfig, OutsideFault

MQTT_MAX_PACKET_BYTES: Final = 268_435_460
"""What the protocol itself allows (5 bytes of fixed header, 2**28 - 1 behind it); a broker that names no limit has this one."""


Refusal = Literal["", "credentials", "revoked"]
"""Nothing of the kind; a user, password or certificate that the broker does not take; a certificate that was taken back."""


# ------------------------------------------------------------------------------------------------- what can happen


@dataclass(frozen=True, slots=True)
class Received:
    """A message.  `retained` says that the broker repeats a stored one because we have just subscribed."""

    topic: str
    payload: bytes
    retained: bool


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has welcomed us and acknowledged every subscription.

    `mqtt_version` is 5, or 4 for MQTT 3.1.1.  A limit that the broker did not name is the protocol's own.
    """

    mqtt_version: int
    max_packet_bytes: int
    receive_maximum: int
    session_present: bool


@dataclass(frozen=True, slots=True)
class Disconnected:
    """There is no connection, and why, in words for the operator.  While it stays down, said again only when the reason changes.

    `refusal`: the broker insists that it will not have our credentials, see mqtt_bus.INSISTS.
    """

    reason: str
    refusal: Refusal = ""


Happening = Received | Connected | Disconnected


class BusError(OutsideFault):
    """A publish or subscribe did not reach its goal."""


class NotConnected(BusError):  # noqa: N818
    """There is no connection to the broker now (or no longer); the bus is reconnecting by itself."""


class Denied(BusError):  # noqa: N818
    """The broker said no (MQTT 5 reason code >= 128): a configuration error that repeating will not cure."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class TooLarge(BusError):  # noqa: N818
    """The message exceeds what the broker accepts; it was not sent."""


# ------------------------------------------------------------------------------------------------------ the contract


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker is to say for us when we vanish without a goodbye."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = True


class Bus(Protocol):
    """A connection that repairs itself.  One task reads (`next`), any number may publish."""

    async def __aenter__(self) -> Self:
        """Start connecting in the background."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say goodbye (the will is not published) and close, within seconds."""

    async def next(self) -> Happening:
        """Wait for the next thing that happens.  Raises NotConnected once the bus is closed and everything was taken."""

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Hand a message to the broker; an empty retained payload clears the topic.

        Returns when the broker has acknowledged it (QoS 1) or the operating system has taken it (QoS 0).
        Raises NotConnected, Denied (MQTT 5 and QoS 1 only; older brokers drop in silence) or TooLarge.
        """

    async def subscribe(self, *filters: str) -> None:
        """Listen to these filters from now on and after every reconnect.  Raises Denied when the broker refuses one."""

    async def unsubscribe(self, *filters: str) -> None:
        """Listen to these filters no longer."""

    async def reconnect(self) -> None:
        """Leave politely and come back at once, as with a renewed certificate; without a connection do nothing."""


# --------------------------------------------------------------------------------------------------- configuration


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is and how to talk to it.  Files are read anew at each connection, so renewed ones are picked up."""

    url: str = "mqtt://127.0.0.1:1883"
    username: str = ""
    password_file: str = ""
    ca_file: str = ""  # empty: the system's certificate authorities
    cert_file: str = ""
    key_file: str = ""  # empty: the key lies in cert_file
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 25
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    chunk_bytes: Annotated[int, Meta(ge=1024, le=4 * 2**20)] = 256 * 1024  # 120 * 1024 fits every cloud broker
    reconnect_max_s: Annotated[float, Meta(gt=0, le=3600)] = 60.0


@dataclass(frozen=True, slots=True, repr=False)
class Address:
    """A parsed broker url; the user may stand in it, so it is never printed whole."""

    host: str
    port: int
    tls: bool
    username: str = ""
    password: str = ""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def parse_url(url: str) -> Address:
    """`mqtt://[user[:password]@]host[:1883]` or `mqtts://...[:8883]`.  Raises BadConfig, without repeating a password."""
    advice = "write broker.url as mqtt://host:1883 or mqtts://host:8883"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:  # UnicodeError is one
        raise BadConfig(f"broker.url is not a url ({error}): {advice}") from None
    if parts.scheme not in {"mqtt", "mqtts"} or not host or port == 0 or parts.path.strip("/") or parts.query:
        shown = url if parts.username is None else f"{parts.scheme}://...@{host}"
        raise BadConfig(f"broker.url {shown!r} cannot be used: {advice}")
    tls = parts.scheme == "mqtts"
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Address(host, port or (8883 if tls else 1883), tls, user, password)


def mqtt_bus(config: BrokerConfig, client_id: str, will: Callable[[], Will | None]) -> Bus:
    """The bus over a real broker.  `will` is asked at each attempt to connect, so it can carry the session of that moment.

    Raises BadConfig for a url, a file or a combination that could never connect.
    """
    from protocol.mqtt_bus import MqttBus

    return MqttBus(config, client_id, will)
