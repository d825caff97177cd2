"""As much of MQTT 5 as a light agent needs (OASIS, MQTT Version 5.0, 2019): packets out, packets in, no state and no I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

CONNACK: Final = 0x20
PUBLISH: Final = 0x30
PUBACK: Final = 0x40
PING: Final = b"\xc0\x00"
GOODBYE: Final = b"\xe0\x00"


class Packet(NamedTuple):
    """A packet from the broker: the first byte's upper half, its lower half, and what follows the length."""

    kind: int
    flags: int
    body: bytes


def connect(client: str, *, keepalive_s: int, will_topic: str, will: bytes) -> bytes:
    """Begin a clean session with a retained will at QoS 1."""
    head = b"\x00\x04MQTT\x05\x2e" + struct.pack(">H", keepalive_s) + b"\x00"
    return _packet(0x10, head + _text(client) + b"\x00" + _text(will_topic) + struct.pack(">H", len(will)) + will)


def subscribe(number: int, *filters: str) -> bytes:
    """Listen at QoS 1."""
    return _packet(0x82, struct.pack(">HB", number, 0) + b"".join(_text(one) + b"\x01" for one in filters))


def publish(topic: str, payload: bytes, *, number: int = 0, retain: bool = False) -> bytes:
    """Say something: at QoS 1 with a packet's number, at QoS 0 without one."""
    middle = struct.pack(">H", number) if number else b""
    return _packet(PUBLISH | (2 if number else 0) | retain, _text(topic) + middle + b"\x00" + payload)


def acknowledge(number: int) -> bytes:
    """The answer to a message of QoS 1."""
    return struct.pack(">BBH", PUBACK, 2, number)


def published(packet: Packet) -> tuple[str, bytes, int]:
    """Topic, payload and number (0 at QoS 0) of a message that came."""
    n = int.from_bytes(packet.body[:2], "big")
    topic, at = packet.body[2 : 2 + n].decode(), 2 + n
    number = 0
    if packet.flags & 6:
        number, at = int.from_bytes(packet.body[at : at + 2], "big"), at + 2
    n_properties, at = _length(packet.body, at) or (0, at)
    return topic, packet.body[at + n_properties :], number


def packets(received: bytearray) -> Iterator[Packet]:
    """Whole packets, which are taken off the front of what was received."""
    while len(received) >= 2 and (found := _length(received, 1)):
        n, at = found
        if len(received) < at + n:
            return
        packet = Packet(received[0] & 0xF0, received[0] & 0x0F, bytes(received[at : at + n]))
        del received[: at + n]
        yield packet


def _length(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """A variable byte integer and where it ends; None while it is not whole."""
    value = shift = 0
    for place in range(at, min(at + 4, len(data))):
        value |= (data[place] & 0x7F) << shift
        shift += 7
        if not data[place] & 0x80:
            return value, place + 1
    return None


def _packet(first: int, body: bytes) -> bytes:
    n, length = len(body), bytearray()
    while True:
        n, digit = divmod(n, 128)
        length.append(digit | (0x80 if n else 0))
        if not n:
            return bytes([first]) + bytes(length) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data
