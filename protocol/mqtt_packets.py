"""MQTT packets cut from a byte stream and put into one, without growing buffers and with few calls of the socket.

    fixed header | topic length u16, topic | packet id u16, at QoS 1 | properties, MQTT 5 | payload        (MQTT 5, section 3.3)

paho asks the socket for the first bytes one by one and grows a buffer by what each further call brings, of which TLS makes one for
every 16 KiB.  Here a little is read ahead, as much as a TLS record holds, and the rest of a large packet goes straight to its
place, which is the same for every packet: new memory for each would have to be zeroed, and is in no cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from paho.mqtt.enums import MessageType
from paho.mqtt.exception import MalformedPacket

AHEAD_BYTES: Final = 16 * 1024
MAX_LENGTH_DIGITS: Final = 4


class Packet(NamedTuple):
    """One packet: its first byte (type and flags), and all behind the fixed header, which is there until the next one is asked for."""

    command: int
    body: memoryview


END: Final = Packet(0, memoryview(b""))


class Packets:
    """Cuts what `recv_into(buffer, n)` brings into packets.

    Of a body above `max_bytes` the rest is thrown away: whoever reads what is left refuses it, and nobody has to hold it.
    """

    def __init__(self, recv_into: Callable[[memoryview, int], int], max_bytes: int) -> None:
        assert max_bytes >= AHEAD_BYTES, "what was read ahead never has to be thrown away"
        self._recv_into, self._max_bytes = recv_into, max_bytes
        self._ahead, self._place = memoryview(bytearray(AHEAD_BYTES)), memoryview(bytearray(AHEAD_BYTES))
        self._start = self._end = 0  # of what was read ahead and not yet taken
        self._command, self._body, self._n_have, self._n_surplus = END.command, END.body, 0, 0

    @property
    def n_missing(self) -> int:
        """Bytes that the packet under way still lacks; 0 between packets."""
        return len(self._body) - self._n_have

    def next(self) -> Packet:
        """The next packet; one of type 0, which there is not, at the end of the stream.

        Raises what `recv_into` raises when nothing is there yet, to be called again then, and MalformedPacket for a stream that is
        not MQTT's.
        """
        while not self._command and not self._begin():
            self._ahead[: self._end - self._start] = self._ahead[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
            n_bytes = self._recv_into(self._ahead[self._end :], AHEAD_BYTES - self._end)
            if not n_bytes:
                return END
            self._end += n_bytes
        while self.n_missing:
            n_bytes = self._recv_into(self._body[self._n_have :], self.n_missing)
            if not n_bytes:
                return END
            self._n_have += n_bytes
        while self._n_surplus:
            scratch = self._ahead[: self._n_surplus]
            n_bytes = self._recv_into(scratch, len(scratch))
            if not n_bytes:
                return END
            self._n_surplus -= n_bytes
        packet = Packet(self._command, self._body)
        self._command, self._body, self._n_have = END.command, END.body, 0
        return packet

    def _begin(self) -> bool:
        """Take a fixed header and what follows it from what was read ahead; False if the header is not whole yet."""
        size, at = 0, self._start + 1
        for digit in range(MAX_LENGTH_DIGITS):
            if at >= self._end:
                return False
            size |= (self._ahead[at] & 127) << 7 * digit
            at += 1
            if self._ahead[at - 1] < 128:
                break
        else:
            raise MalformedPacket("a packet's length has more than four digits")
        if (n_held := min(size, self._max_bytes)) > len(self._place):
            self._place = memoryview(bytearray(n_held))
        self._command, self._body = self._ahead[self._start], self._place[:n_held]
        self._n_have, self._n_surplus = min(len(self._body), self._end - at), size - len(self._body)
        self._body[: self._n_have] = self._ahead[at : at + self._n_have]
        self._start = at + self._n_have
        return True


def publish_packet(topic: str, payload: bytes, *, retain: bool, properties: bytes) -> memoryview:
    """A PUBLISH of QoS 0; `properties` as they go over the wire, nothing at all before MQTT 5."""
    name = topic.encode()
    head = len(name).to_bytes(2, "big") + name + properties
    first = bytes((MessageType.PUBLISH | retain, *_length(len(head) + len(payload))))
    return memoryview(b"".join((first, head, payload)))


def _length(n_bytes: int) -> list[int]:
    """A variable byte integer (section 1.5.5)."""
    digits = [n_bytes & 127]
    while n_bytes := n_bytes >> 7:
        digits[-1] |= 128
        digits.append(n_bytes & 127)
    return digits
