"""One connection to an MQTT broker, from the first packet to the last, never reused.

aiomqtt's Client gives the loop glue around paho; this class changes what it answers at the places where, measured, messages
or waits get lost in silence:

- the acknowledgement's reason code is read (aiomqtt drops it, so a denied publish looks like a success);
- `lost` is the one fact that the connection is over; it carries the reason as words, and every wait for an answer of the
  broker ends with it (aiomqtt's pending calls run into their timeout instead);
- a connection that dies before its CONNACK ends the attempt at once;
- messages go straight to `deliver`, without a second queue, and neither they nor what is published at QoS 0 pass through paho:
  its way costs three copies of a payload, a call of the socket for every few bytes and objects that nobody reads;
- what is published goes to the socket at once, and the loop is asked to watch that only for what did not fit: to wake it for
  each message would cost as much again as the message;
- a slow uplink is not taken for a dead one: while TCP still gets rid of a backlog, a ping behind it may take its time;
- giving up in the middle of connecting leaves nothing behind, although paho connects in a thread that nobody can stop.

A fresh object per connection, because paho would repeat its own unacknowledged messages after a reconnect, beyond the
broker's Receive Maximum and possibly twice; what must be repeated is the daemon's decision.
"""

# ruff: noqa: ARG002 - callbacks have the arguments that paho gives

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import aiomqtt
from paho.mqtt.client import Client as Paho
from paho.mqtt.client import ConnectFlags, DisconnectFlags
from paho.mqtt.enums import MessageType, MQTTErrorCode
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode

from protocol.bus import MQTT_MAX_PACKET_BYTES, Address, Connected, Denied, NotConnected, Received, TooLarge, Will
from protocol.mqtt_packets import Packets, publish_packet
from protocol.mqtt_reasons import TAKEN_OVER, broken, denial, obstacle, parting, refusal, silent

ANSWER_S: Final = 120.0
"""A broker that answers pings but not, for this long, the question we asked is treated as gone."""
GOODBYE_S: Final = 3.0
MAX_INFLIGHT: Final = 20
FAILURE: Final = 128
NO_ANSWER: Final = 0
MAX_INCOMING_BYTES: Final = 4 * 2**20 + 64 * 1024
"""The largest chunk and its header; an MQTT 5 broker keeps larger packets away from us."""
TURN_BYTES: Final = 256 * 1024
"""Read before others have their turn."""
ENOUGH_BYTES: Final = 96 * 1024
"""Of a large packet so much is waited for at a time: every smaller piece would wake the loop, and cost as much as the whole."""
RECORD_BYTES: Final = 17 * 1024
"""A TLS record: of one that is not whole OpenSSL may hold all but a byte, which the socket will not bring again."""
UNSENT_BYTES: Final = 256 * 1024
"""What may lie unsent in the kernel: enough to keep the line busy, little enough that a ping is not late behind it."""

TIOCOUTQ: Final = 0x5411
BYTES_ACKED_AT: Final = 120
"""Where struct tcp_info (linux/tcp.h, since 4.1) holds tcpi_bytes_acked, a u64."""

SOCKET_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *([(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)] if hasattr(socket, "TCP_NOTSENT_LOWAT") else []),
)


class NotWelcome(NotConnected):
    """The attempt failed.  `code` is the CONNACK's; NO_ANSWER without one; None when there was not even a connection."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.code = code


class Link(aiomqtt.Client):
    """One connection.  Order of use: `open`, then anything, then `close` in every case."""

    def __init__(
        self,
        address: Address,
        client_id: str,
        *,
        version: aiomqtt.ProtocolVersion,
        username: str,
        password: str,
        tls: ssl.SSLContext | None,
        keepalive_s: int,
        will: Will | None,
    ) -> None:
        self._whisper = _Whisper()
        properties = None
        if version is aiomqtt.ProtocolVersion.V5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = MAX_INCOMING_BYTES
        super().__init__(
            address.host,
            address.port,
            identifier=client_id,
            username=username or None,
            password=password or None,
            protocol=version,
            clean_session=None if properties else True,
            keepalive=keepalive_s,
            will=aiomqtt.Will(will.topic, will.payload, will.qos, will.retain) if will else None,
            tls_context=tls,
            socket_options=SOCKET_OPTIONS,
            properties=properties,
            logger=self._whisper,
        )
        self.address = address
        self.version = version
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.deliver: Callable[[Received], object] = lambda _: None
        self._welcome: Connected | None = None
        self._parting = 0
        self._answers: dict[int, asyncio.Future[list[int]]] = {}
        self._abandoned = False
        self._is_watching = False
        self._awaited_bytes = 1
        self._thread = threading.get_ident()
        # A read or write that raises is reported only there; to take the exception also keeps asyncio from complaining.
        self._disconnected.add_done_callback(lambda done: self._lose(_broken(self, str(done.exception() or ""))))

    # ------------------------------------------------------------------------------------------ the life of the link

    async def open(self) -> Connected:
        """Connect and wait for the welcome.  Raises NotWelcome, within 20 s or so after the name is resolved."""
        try:
            await super().__aenter__()
        except aiomqtt.MqttCodeError as error:
            code = error.rc.value if isinstance(error.rc, ReasonCode) else int(error.rc or 0)
            raise NotWelcome(refusal(code, str(error.rc), self.address), code) from None
        except aiomqtt.MqttError as error:
            if self.lost.done():
                raise NotWelcome(self.lost.result(), NO_ANSWER) from None
            if self._client.socket() is not None:
                raise NotWelcome(silent(self.address, self.timeout), NO_ANSWER) from None
            raise NotWelcome(obstacle(error.__context__, self.address), None) from None
        assert self._welcome is not None
        if self.lost.done():
            raise NotWelcome(self.lost.result(), NO_ANSWER)
        return self._welcome

    async def close(self) -> None:
        """Say goodbye if there is somebody to say it to, then let go of the socket and of the background task."""
        self._abandoned = True
        polite = self._welcome is not None and not self.lost.done()
        if polite and self._client.disconnect() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            await asyncio.wait({self.lost}, timeout=GOODBYE_S)
        self._client._sock_close()  # noqa: SLF001 - every public way talks to the broker first
        self._lose("the bus is closed")
        if self._misc_task is not None:
            await asyncio.wait({self._misc_task})

    @property
    def taken_over(self) -> bool:
        """Whether the broker said that another client uses our id."""
        return self._parting == TAKEN_OVER

    def _lose(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        if not self._connected.done():
            self._connected.set_exception(aiomqtt.MqttError(reason))
            self._connected.exception()  # nobody may be waiting any more, which asyncio would complain about
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(NotConnected(reason))

    async def _misc_loop(self) -> None:
        """Paho's keepalive, once a second; it counts what the broker says, and this adds what its TCP acknowledges."""
        acked_bytes = 0
        while self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            await asyncio.sleep(1)
            drained = _backlog_acked_bytes(self._client.socket())
            if drained > acked_bytes:
                acked_bytes = drained
                self._client._last_bytes_received = time.monotonic()  # noqa: SLF001 - paho's own clock

    # --------------------------------------------------------------------------------------- questions to the broker

    async def send(self, topic: str, payload: bytes, qos: int, *, retain: bool) -> None:
        """Publish.  Raises NotConnected, Denied, TooLarge."""
        assert self._welcome is not None
        size, limit = _packet_bytes(topic, payload), self._welcome.max_packet_bytes
        if size > limit:
            raise TooLarge(
                f"{size} bytes for {topic}, the broker at {self.address} takes {limit}: raise its max_packet_size"
            )
        if qos:
            info = self._client.publish(topic, payload, qos, retain)
            (code,) = await self._answer(info.rc, info.mid)
        else:
            (code,) = await self._answer(*self._enqueue(topic, payload, retain=retain))
        if code >= FAILURE:
            raise Denied(denial("write", topic, code, self.address), code)

    def _enqueue(self, topic: str, payload: bytes, *, retain: bool) -> tuple[MQTTErrorCode, int]:
        """Put a PUBLISH of QoS 0 behind what paho has to write."""
        mid = self._client._mid_generate()  # noqa: SLF001
        properties = b"\0" if self.version is aiomqtt.ProtocolVersion.V5 else b""
        packet = publish_packet(topic, payload, retain=retain, properties=properties)
        entry = {"command": MessageType.PUBLISH, "mid": mid, "qos": 0, "pos": 0, "packet": packet, "info": None}
        self._client._out_packet.append(entry | {"to_process": len(packet)})  # type: ignore[arg-type]  # noqa: SLF001
        return MQTTErrorCode.MQTT_ERR_SUCCESS, mid

    async def listen(self, filters: list[str]) -> None:
        """Subscribe at QoS 1.  Raises NotConnected, or Denied for the first filter that was refused."""
        codes = await self._answer(*self._client.subscribe([(topic, 1) for topic in filters]))
        for topic, code in zip(filters, codes, strict=True):
            if code >= FAILURE:
                raise Denied(denial("read", topic, code, self.address), code)

    async def ignore(self, filters: list[str]) -> None:
        """Unsubscribe.  Raises NotConnected."""
        await self._answer(*self._client.unsubscribe(filters))

    async def _answer(self, rc: MQTTErrorCode, mid: int | None) -> list[int]:
        """Reason codes of the broker's answer to packet `mid`, or the end of the connection, whichever comes first.

        At QoS 0 the answer is paho's own, once the operating system has taken the last byte.
        """
        if self.lost.done():
            raise NotConnected(self.lost.result())
        if rc != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise NotConnected(broken(self.address, welcomed=True, detail=str(rc)))
        answer: asyncio.Future[list[int]] = self._loop.create_future()
        self._answers[mid] = answer
        self._write(self._client)
        try:
            if answer.done():
                await asyncio.sleep(0)  # whoever publishes much lets others have their turn
                return answer.result()
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            self._lose(silent(self.address, ANSWER_S))
            raise NotConnected(self.lost.result()) from None
        finally:
            self._answers.pop(mid, None)

    def _answered(self, mid: int, codes: list[int]) -> None:
        answer = self._answers.get(mid)
        if answer is not None and not answer.done():
            answer.set_result(codes)

    # ------------------------------------------------------------------------ what paho calls; the signatures are its own

    def _on_connect(
        self,
        client: Paho,
        userdata: Any,
        flags: ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not reason_code.is_failure:
            receive_maximum: int = getattr(properties, "ReceiveMaximum", 65_535)
            # paho's public setter refuses while connected, but only now the limit is known.
            client._max_inflight_messages = min(MAX_INFLIGHT, receive_maximum)  # noqa: SLF001
            self._welcome = Connected(
                mqtt_version=5 if self.version is aiomqtt.ProtocolVersion.V5 else 4,
                max_packet_bytes=getattr(properties, "MaximumPacketSize", MQTT_MAX_PACKET_BYTES),
                receive_maximum=receive_maximum,
                session_present=flags.session_present,
            )
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: Paho,
        userdata: Any,
        flags: DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._parting = reason_code.value
            self._lose(parting(reason_code.value, str(reason_code), self.address))
        else:
            self._lose(_broken(self, self._whisper.last or str(reason_code)))
        if not self._connected.cancelled():  # open() was given up; aiomqtt would ask the cancelled future how it ended
            super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, _client: Paho, _userdata: Any, mid: int, reason_code: ReasonCode, _properties: Properties
    ) -> None:
        self._answered(mid, [reason_code.value])

    def _on_subscribe(
        self,
        client: Paho,
        userdata: Any,
        mid: int,
        reason_codes: list[ReasonCode],
        properties: Properties | None = None,
    ) -> None:
        self._answered(mid, [code.value for code in reason_codes])

    _on_unsubscribe = _on_subscribe

    def _on_socket_open(self, client: Paho, userdata: Any, sock: Any) -> None:
        # In the connecting thread.  Nothing is sent until the loop has taken the socket over.
        self._loop.call_soon_threadsafe(self._attach, client, sock)

    def _attach(self, client: Paho, sock: Any) -> None:
        if self._abandoned:
            client._sock_close()  # noqa: SLF001
        else:
            self._loop.add_reader(sock, self._read, client, Packets(sock.recv_into, MAX_INCOMING_BYTES))
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _read(self, client: Paho, packets: Packets) -> None:
        """In place of paho's: read packets as long as there are any, for one turn."""
        n_bytes = 0
        try:
            while n_bytes < TURN_BYTES:
                if client.socket() is None:
                    return
                command, body = packets.next()
                n_bytes += len(body)
                if not command:
                    rc = MQTTErrorCode.MQTT_ERR_CONN_LOST
                elif command & 0xF0 == MessageType.PUBLISH:
                    rc = self._publish_came(client, command, body)
                else:
                    client._in_packet = {"command": command, "remaining_length": len(body), "packet": bytes(body)}  # type: ignore[typeddict-item]  # noqa: SLF001
                    rc = client._packet_handle()  # noqa: SLF001
                if rc > 0:
                    client._loop_rc_handle(rc)  # noqa: SLF001
                    return
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            client._last_bytes_received = time.monotonic()  # noqa: SLF001 - paho's own clock
            self._await_bytes(client.socket(), max(1, min(packets.n_missing - RECORD_BYTES, ENOUGH_BYTES)))
        except Exception as error:  # noqa: BLE001 - whatever it was, this connection cannot be trusted any more
            self._lose(_broken(self, str(error)))
            client._sock_close()  # noqa: SLF001
        else:
            self._loop.call_soon(self._read, client, packets)  # what TLS and `packets` hold already no selector sees

    def _await_bytes(self, sock: Any, n_bytes: int) -> None:
        """Be woken only when so much is there, or when the connection ends (SO_RCVLOWAT, socket(7))."""
        if n_bytes != self._awaited_bytes:
            self._awaited_bytes = n_bytes
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n_bytes)

    def _publish_came(self, client: Paho, command: int, body: memoryview) -> MQTTErrorCode:
        """A PUBLISH is here (MQTT 5, section 3.3), of QoS 0 or 1, as no more was subscribed to."""
        at = 2 + int.from_bytes(body[:2], "big")
        topic, qos, mid = bytes(body[2:at]), command >> 1 & 3, 0
        if qos:
            mid, at = int.from_bytes(body[at : at + 2], "big"), at + 2
        if self.version is aiomqtt.ProtocolVersion.V5:
            n_bytes, n_digits = VariableByteIntegers.decode(body[at : at + 4])  # type: ignore[no-untyped-call]
            at += n_digits + n_bytes
        if at > len(body):
            raise MalformedPacket(f"a PUBLISH of {len(body)} bytes ends before its payload")
        with suppress(UnicodeDecodeError):  # no broker should pass it on, and nobody here could mean it
            self.deliver(Received(topic.decode(), bytes(body[at:]), bool(command & 1)))
        return client._send_puback(mid) if qos else MQTTErrorCode.MQTT_ERR_SUCCESS  # noqa: SLF001

    def _on_socket_close(self, client: Paho, userdata: Any, sock: Any) -> None:
        self._unwatch(sock)
        super()._on_socket_close(client, userdata, sock)

    def _on_socket_register_write(self, client: Paho, userdata: Any, sock: Any) -> None:
        soon = self._loop.call_soon if threading.get_ident() == self._thread else self._loop.call_soon_threadsafe
        soon(self._write, client)

    def _on_socket_unregister_write(self, client: Paho, userdata: Any, sock: Any) -> None:
        self._unwatch(sock)

    def _unwatch(self, sock: Any) -> None:
        if self._is_watching:
            self._is_watching = False
            self._loop.remove_writer(sock)

    def _write(self, client: Paho) -> None:
        """In place of paho's: write what waits, as far as the socket takes it; the loop watches it for the rest."""
        queue, sock = client._out_packet, client.socket()  # noqa: SLF001
        if not queue or sock is None:
            return
        try:
            while queue and queue[0]["command"] != MessageType.DISCONNECT:
                packet = queue[0]
                packet["pos"] += sock.send(memoryview(packet["packet"])[packet["pos"] :])  # type: ignore[arg-type]
                if packet["pos"] == len(packet["packet"]):
                    queue.popleft()
                    if packet["command"] & 0xF0 == MessageType.PUBLISH and not packet["qos"]:
                        self._answered(packet["mid"], [0])
                client._last_msg_out = time.monotonic()  # noqa: SLF001 - paho's own clock
            if queue:
                client.loop_write()  # closes, too
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not self._is_watching:
                self._is_watching = True
                self._loop.add_writer(sock, self._write, client)
        except Exception as error:  # noqa: BLE001 - whatever it was, this connection cannot be trusted any more
            self._lose(_broken(self, str(error)))
            client._sock_close()  # noqa: SLF001
        else:
            client._call_socket_unregister_write()  # noqa: SLF001
            self._unwatch(sock)


class _Whisper(logging.Logger):
    """paho's and aiomqtt's log, kept out of ours; the last error is remembered because paho tells it to nobody else."""

    last = ""

    def __init__(self) -> None:
        super().__init__("mqtt", logging.ERROR)

    def handle(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _broken(link: Link, detail: str) -> str:
    return broken(link.address, welcomed=link._welcome is not None, detail=detail)  # noqa: SLF001


def _backlog_acked_bytes(sock: Any) -> int:
    """Bytes that the broker's side has acknowledged while more wait to be; 0 without a backlog, or where nobody can tell.

    Without a backlog it proves nothing: a frozen broker's kernel acknowledges our pings too.
    """
    try:
        (waiting,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), TIOCOUTQ, bytes(4)))
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED_AT + 8)
        return (
            int.from_bytes(info[BYTES_ACKED_AT:], sys.byteorder) if waiting else 0
        )  # of an older kernel: no such bytes
    except (OSError, ValueError, AttributeError):
        return 0


def _packet_bytes(topic: str, payload: bytes) -> int:
    """Upper bound of the PUBLISH packet: fixed header 5, topic length 2, packet id 2, properties 1."""
    return 10 + len(topic.encode()) + len(payload)
