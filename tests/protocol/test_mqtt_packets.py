"""Packets come out of a stream as they went in, however it is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.exception import MalformedPacket

from protocol.mqtt_packets import AHEAD_BYTES, END, Packets, publish_packet

LIMIT = 3 * AHEAD_BYTES
sizes = st.one_of(
    st.integers(0, 300), st.integers(AHEAD_BYTES - 5, AHEAD_BYTES + 5), st.integers(0, LIMIT + AHEAD_BYTES)
)


class Stream:
    """A socket that brings `data` in pieces of these sizes, in turn; at 0 there is nothing yet."""

    def __init__(self, data: bytes, pieces: list[int]) -> None:
        self.data, self.pieces, self.turn = data, pieces, 0

    def recv_into(self, buffer: memoryview, n_bytes: int) -> int:
        assert n_bytes == len(buffer) > 0
        self.turn += 1
        size = self.pieces[self.turn % len(self.pieces)]
        if self.data and not size:
            raise BlockingIOError
        found, self.data = self.data[: min(size, n_bytes)], self.data[min(size, n_bytes) :]
        buffer[: len(found)] = found
        return len(found)


def packets(stream: Stream) -> Iterator[tuple[int, bytes]]:
    cutting = Packets(stream.recv_into, LIMIT)
    while True:
        try:
            command, body = cutting.next()
        except BlockingIOError:
            continue
        if not command:
            return
        yield command, bytes(body)


def packed(command: int, body: bytes) -> bytes:
    digits, n_bytes = bytearray(), len(body)
    while n_bytes >= 128:
        digits.append(n_bytes % 128 | 128)
        n_bytes //= 128
    return bytes((command, *digits, n_bytes)) + body


@given(
    st.lists(st.tuples(st.integers(16, 255), sizes), max_size=6),
    st.lists(st.integers(0, 2 * AHEAD_BYTES), min_size=1, max_size=5).filter(any),
)
def test_what_went_in_comes_out(said: list[tuple[int, int]], pieces: list[int]) -> None:
    bodies = [(command, hashlib.shake_128(bytes((n,))).digest(size)) for n, (command, size) in enumerate(said)]
    stream = Stream(b"".join(packed(*one) for one in bodies), [*pieces, max(pieces)])
    assert list(packets(stream)) == [(command, body[:LIMIT]) for command, body in bodies], (
        "cut off above the limit only"
    )


def test_a_stream_that_ends_in_a_packet_has_ended() -> None:
    for n_bytes in range(1, 40):
        cutting = Packets(Stream(packed(0x30, bytes(200))[:n_bytes], [7]).recv_into, LIMIT)
        assert cutting.next() is END


def test_a_length_that_never_ends_is_refused() -> None:
    with pytest.raises(MalformedPacket):
        Packets(Stream(b"\x30\xff\xff\xff\xff\x01", [9]).recv_into, LIMIT).next()


@given(st.text(min_size=1, max_size=40), sizes, st.booleans(), st.sampled_from([b"", b"\0"]))
def test_a_publish_has_the_bytes_that_the_standard_gives_it(
    topic: str, size: int, retain: bool, properties: bytes
) -> None:
    payload, name = bytes(size), topic.encode()
    body = len(name).to_bytes(2, "big") + name + properties + payload
    assert publish_packet(topic, payload, retain=retain, properties=properties) == packed(
        0x31 if retain else 0x30, body
    )
