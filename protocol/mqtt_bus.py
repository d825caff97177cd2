"""The bus over a real broker: a loop that keeps one Link alive at a time.

    attempt -> welcome -> subscribe everything -> Connected -> ... -> lost -> Disconnected -> pause -> attempt

The pause before attempt n is drawn uniformly from 0 to min(60, 2^n) s ("full jitter"), so a thousand agents do not come
back in one instant; n starts again at 0 only after a connection that lasted a minute, so two agents that carry the same
client id, and throw each other out, calm down by themselves.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiomqtt

from protocol.bus import (
    MQTT_MAX_PACKET_BYTES,
    BrokerConfig,
    BusError,
    Connected,
    Denied,
    Disconnected,
    Happening,
    NotConnected,
    Received,
    Refusal,
    Will,
    parse_url,
)
from protocol.errors import BadConfig
from protocol.mqtt_link import NO_ANSWER, Link, NotWelcome
from protocol.mqtt_reasons import BAD_PASSWORD, NOT_AUTHORIZED, unsteady
from protocol.tls_objection import Objection, objection

STABLE_S: Final = 60.0
SUSPICIOUS: Final = 3
"""So many connections in a row that did not last: brokers do not always say that another client has our id."""
INSISTS: Final = 8
"""Refusals of our credentials in a row, over a minute or so, after which the broker means it: it may just be starting up."""
UNSUPPORTED_VERSION: Final = 132

V5: Final = aiomqtt.ProtocolVersion.V5
V311: Final = aiomqtt.ProtocolVersion.V311


class MqttBus:
    """See protocol.bus.Bus for the contract.  Raises BadConfig at construction, never because of the broker."""

    def __init__(self, config: BrokerConfig, client_id: str, will: Callable[[], Will | None]) -> None:
        self._config = config
        self._client_id = client_id
        self._will = will
        self._address = parse_url(config.url)
        self._credentials()
        self._tls()
        self._version = V311 if config.protocol == "3.1.1" else V5
        self._filters: dict[str, None] = {}
        self._link: Link | None = None
        self._why = "not connected yet"
        self._told = ""
        self._n_short = self._n_refused = 0
        self._max_packet_bytes = MQTT_MAX_PACKET_BYTES
        self._happenings: asyncio.Queue[Happening | None] = asyncio.Queue()
        self._anew: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stay_connected(), name=f"bus {self._client_id}")
        self._task.add_done_callback(lambda _: self._happenings.put_nowait(None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})

    async def next(self) -> Happening:
        """See Bus.next."""
        happening = await self._happenings.get()
        if happening is not None:
            return happening
        self._happenings.put_nowait(None)
        assert self._task is not None
        if not self._task.cancelled() and (bug := self._task.exception()):
            raise bug
        raise NotConnected("the bus is closed")

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """See Bus.publish."""
        if self._link is None:
            raise NotConnected(self._why)
        await self._link.send(topic, payload, qos, retain=retain)

    async def subscribe(self, *filters: str) -> None:
        """See Bus.subscribe."""
        new = [topic for topic in filters if topic not in self._filters]
        self._filters.update(dict.fromkeys(new))
        if self._link is None or not new:
            return
        try:
            await self._link.listen(new)
        except NotConnected:
            return  # the next connection will do it
        except Denied:
            for topic in new:
                self._filters.pop(topic, None)
            raise

    async def unsubscribe(self, *filters: str) -> None:
        """See Bus.unsubscribe."""
        old = [topic for topic in filters if topic in self._filters]
        for topic in old:
            del self._filters[topic]
        if self._link is None or not old:
            return
        try:
            await self._link.ignore(old)
        except NotConnected:
            return  # the next connection starts without them

    async def reconnect(self) -> None:
        """See Bus.reconnect."""
        if self._anew is not None and not self._anew.done():
            self._anew.set_result(None)

    # ------------------------------------------------------------------------------------------------ staying connected

    async def _stay_connected(self) -> None:
        loop, n_failures = asyncio.get_running_loop(), 0
        me = asyncio.current_task()
        assert me is not None
        while True:
            started_s, longest_s = loop.time(), self._config.reconnect_max_s
            contested = await self._one_connection()
            if (
                me.cancelling()
            ):  # Python 3.11's wait_for, in aiomqtt, loses a cancellation that meets the broker's answer
                return
            if loop.time() - started_s > STABLE_S:
                n_failures = self._n_short = 0
            await asyncio.sleep(longest_s if contested else random.uniform(0, min(longest_s, 2.0**n_failures)))
            n_failures = min(n_failures + 1, 16)

    async def _one_connection(self) -> bool:
        """From the attempt to the loss.  True when somebody else lives under our client id: better not to hurry back."""
        try:
            link, welcome = await self._open()
        except (NotWelcome, BadConfig) as error:
            held = await self._objection(error)
            self._turned_away(held.text or str(error), held.refusal or _refusal(error))
            return False
        early: list[Received] = []
        link.deliver = early.append
        try:
            await self._subscribe_all(link)
            link.deliver = self._happenings.put_nowait
            self._link, self._told, self._n_refused = link, "", 0
            if welcome.mqtt_version == 5:  # only this version tells, and a later connection may have to be of the older
                self._max_packet_bytes = welcome.max_packet_bytes
            self._happenings.put_nowait(replace(welcome, max_packet_bytes=self._max_packet_bytes))
            for received in early:
                self._happenings.put_nowait(received)
            self._anew = asyncio.get_running_loop().create_future()
            ends: list[asyncio.Future[Any]] = [link.lost, self._anew]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not link.lost.done():
                self._tell("connecting anew, as asked")
                return False
            self._n_short += 1
            reason = link.lost.result()
            if self._n_short >= SUSPICIOUS and not link.taken_over:
                reason = unsteady(reason, self._client_id)
        except BusError as error:
            reason = str(error)
        finally:
            self._link = None
            await link.close()
        self._tell(reason)
        return link.taken_over

    async def _objection(self, error: NotWelcome | BadConfig) -> Objection:
        """What the broker holds against our certificate, if that is why there was no welcome."""
        if not isinstance(error, NotWelcome) or error.code != NO_ANSWER or (tls := self._tls()) is None:
            return Objection()
        return await objection(self._address, tls)

    async def _open(self) -> tuple[Link, Connected]:
        """A welcomed link.  A broker that refuses MQTT 5 is remembered; one that merely gave no answer is asked anew each time."""
        try:
            return await self._attempt(self._version)
        except NotWelcome as error:
            fallback = self._config.protocol == "auto" and self._version is V5
            if not fallback or error.code not in {UNSUPPORTED_VERSION, NO_ANSWER}:
                raise
            welcomed = await self._attempt(V311)
            if error.code == UNSUPPORTED_VERSION:
                self._version = V311
            return welcomed

    async def _attempt(self, version: aiomqtt.ProtocolVersion) -> tuple[Link, Connected]:
        username, password = self._credentials()
        link = Link(
            self._address,
            self._client_id,
            version=version,
            username=username,
            password=password,
            tls=self._tls(),
            keepalive_s=self._config.keepalive_s,
            will=self._will(),
        )
        try:
            return link, await link.open()
        except BaseException:
            await link.close()
            raise

    async def _subscribe_all(self, link: Link) -> None:
        """Until the broker's filters are ours; they may change while it answers."""
        there: set[str] = set()
        while there != set(self._filters):
            if new := [topic for topic in self._filters if topic not in there]:
                await link.listen(new)
            if old := there - set(self._filters):
                await link.ignore(list(old))
            there = (there | set(new)) - old

    def _turned_away(self, reason: str, refusal: Refusal) -> None:
        """There was no welcome; a refusal of our credentials is told once more when the broker insists on it."""
        self._n_refused = self._n_refused + 1 if refusal else 0
        if self._n_refused == INSISTS:
            self._told = ""
        self._tell(reason, refusal if self._n_refused >= INSISTS else "")

    def _tell(self, reason: str, refusal: Refusal = "") -> None:
        self._why = reason
        if reason != self._told:
            self._told = reason
            self._happenings.put_nowait(Disconnected(reason, refusal))

    # --------------------------------------------------------------------------------------------------------- files

    def _credentials(self) -> tuple[str, str]:
        username = self._config.username or self._address.username
        if not self._config.password_file:
            return username, self._address.password
        try:
            return username, Path(self._config.password_file).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, ValueError) as error:
            raise BadConfig(f"broker.password_file {self._config.password_file}: {error}") from None

    def _tls(self) -> ssl.SSLContext | None:
        config = self._config
        if not self._address.tls:
            if config.ca_file or config.cert_file:
                raise BadConfig("broker.ca_file and broker.cert_file need a url that begins with mqtts://")
            return None
        try:
            context = ssl.create_default_context(cafile=config.ca_file or None)
            if config.cert_file:
                context.load_cert_chain(config.cert_file, config.key_file or None)
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            files = ", ".join(filter(None, [config.ca_file, config.cert_file, config.key_file]))
            raise BadConfig(f"broker certificates ({files}): {error}") from None
        return context


def _refusal(error: NotWelcome | BadConfig) -> Refusal:
    """What a CONNACK says about our credentials."""
    refused = isinstance(error, NotWelcome) and error.code in {BAD_PASSWORD, NOT_AUTHORIZED}
    return "credentials" if refused else ""
