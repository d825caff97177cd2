"""Target: a script for the machines of a transfer, which send, broadcast and receive, and for what they write to the disk.

Hostile are both sides: offers and chunks of any geometry reach the receiver, credit of any kind reaches the sender.  Some blobs are
real, so that honest chunks complete them; a script may also kill the receiver, which then resumes from its partial files.
"""

from __future__ import annotations

import hashlib
from itertools import count
from pathlib import Path

import msgspec

from protocol.blobs import Blobs
from protocol.broadcast import EVERYONE, Broadcasts
from protocol.errors import BadMessage
from protocol.frames import chunk_length
from protocol.messages import Blob, Grant
from protocol.pacing import Pace
from protocol.sending import MAX_GRANT_CHUNKS, SendChunk, Sending
from protocol.spool import Partial, Spool
from protocol.transfer import Action, Completed, GaveUp, Receiving, SendGrant, StopListening
from tests.fuzz.files import scratch
from tests.fuzz.script import Script

PEERS = ["a", "b"]
MAX_STORED_BYTES = 8192
BUDGET_BYTES = 4096
CHECKED_EVERY = 4
"""Events between two looks at all invariants, which cost more than the event."""
FIRST = [0, 1, 2, 3, 2**20, 2**30 - 1, 2**32 - 1]
CONTENT = [bytes([n]) * size for n, size in enumerate((1, 1024, 3000, 5000))]
BLOBS = [
    *(Blob(sha256=hashlib.sha256(c).hexdigest(), size=len(c), chunk=1024) for c in CONTENT),
    Blob(sha256="e" * 64, size=3000, chunk=1024),  # nobody has this content
    Blob(sha256="f" * 64, size=2**40, chunk=2**22),
    Blob(sha256="d" * 64, size=2**40, chunk=1024),
    Blob(sha256="c" * 64, size=1, chunk=2**22),
]


def _store() -> Path:
    return Path(scratch("bulk").name, "blobs")


class Receiver:
    """The receiving machine with its disk, as protocol/pulling.py binds them."""

    def __init__(self) -> None:
        self.start()
        for path in [*self.blobs.folder.iterdir(), *self.blobs.partial.iterdir()]:
            if path != self.blobs.partial:
                path.unlink()

    def start(self, rate: float = 0.0) -> None:
        """The process begins anew, with so many bytes per second to ask for (0: any); what is on disk stays."""
        self.blobs = Blobs(_store())
        self.spool = Spool(self.blobs, max_bytes=MAX_STORED_BYTES)
        self.pool = Receiving(
            window=2,
            max_window=4,
            budget_bytes=BUDGET_BYTES,
            timeout_s=1.0,
            max_timeout_s=4.0,
            max_tries=3,
            pace=Pace(rate),
        )
        self.open: dict[tuple[str, str], Partial] = {}
        self.listening: set[tuple[str, str]] = set()
        self.grants: list[tuple[str, Grant]] = []

    def pull(self, peer: str, blob: Blob, now: float, *, listening: bool = False) -> None:
        """Take up an offer; one that is impossible closes what was open under its name."""
        known = self.open.get((peer, blob.xfer))
        if known is not None and known.blob == blob:
            assert not self.pool.open(peer, blob, now, have=known.have), "asking twice is asking once"
            return
        try:
            partial = self.spool.open(blob, owner=peer)
            self.open[peer, blob.xfer] = partial
            (self.listening.add if listening else self.listening.discard)((peer, blob.xfer))
            self.perform(self.pool.open(peer, blob, now, have=partial.have, listening=listening))
        except BadMessage:
            self.perform(self.pool.close(peer, blob.xfer, now))
            self.open.pop((peer, blob.xfer), None)

    def chunk(self, peer: str, xfer: str, index: int, data: bytes, now: float, *, heard: bool = False) -> None:
        """A chunk arrived, `heard` by all who listen or sent to us alone."""
        partial = self.open.get((peer, xfer))
        try:
            if partial is not None:
                partial.write(index, data)
            self.perform(self.pool.chunk(peer, xfer, index, len(data), now, heard=heard))
        except BadMessage:
            return

    def perform(self, actions: list[Action]) -> None:
        """Carry out what the machine decided."""
        for action in actions:
            match action:
                case SendGrant(peer, grant):
                    self.grants.append((peer, grant))
                case Completed(peer, xfer):
                    partial = self.open.pop((peer, xfer))
                    try:
                        path = partial.finish()
                    except BadMessage:
                        continue
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == partial.blob.sha256
                case StopListening(peer, xfer):
                    self.listening.remove((peer, xfer))
                case GaveUp(peer, xfer, _):
                    del self.open[peer, xfer]

    def check(self) -> None:
        """Nothing exceeds what was accepted."""
        self.pool.check()
        assert len(self.pool) == len(self.open)
        for partial in self.open.values():
            assert partial.size <= MAX_STORED_BYTES

    def check_disk(self) -> None:
        """No file outgrows its blob, and what is in the store is what its name says."""
        for path in self.blobs.partial.iterdir():
            assert path.stat().st_size <= MAX_STORED_BYTES + 1024, f"{path.name} has outgrown its blob"
        for sha256 in self.blobs:
            assert hashlib.sha256(self.blobs.path(sha256).read_bytes()).hexdigest() == sha256


class Sender:
    """The sending machines, as protocol/exchange.py binds them: to one each, and to all who listen."""

    def __init__(self) -> None:
        self.alone, self.all = Sending(max_pending=8), Broadcasts()
        for blob in BLOBS:
            self.alone.add(blob)

    def granted(self, peer: str, grant: Grant, now: float) -> None:
        """Credit came; more than there may be is refused."""
        try:
            blob = self.alone.asked_of(peer, grant)
            if blob is not None and grant.until:
                self.all.granted(peer, blob, grant, now)
            else:
                self.all.leave(peer, grant.xfer)
                self.alone.granted(peer, grant)
        except BadMessage:
            assert sum(n for _, n in grant.ranges) > MAX_GRANT_CHUNKS or any(
                first + n > blob.n_chunks for first, n in grant.ranges for blob in BLOBS if blob.xfer == grant.xfer
            )

    def next_chunk(self, now: float) -> SendChunk | None:
        """The next that is due to anybody."""
        return self.all.next_chunk(now) or self.alone.next_chunk()

    def reset(self) -> None:
        """The bus is new."""
        self.alone.reset()
        self.all.reset()


def transfer(data: bytes) -> None:
    """Offers, chunks, credit, silence and crashes in any order."""
    script, now = Script(data), 0.0
    receiver, sender = Receiver(), Sender()
    for n in count():
        if not script.more:
            break
        peer, blob = script.pick(PEERS), script.pick(BLOBS)
        match script.below(12):
            case 0:
                receiver.pull(peer, blob, now)
            case 1:
                odd = msgspec.structs.replace(
                    blob, size=1 + script.below(2**14), chunk=script.pick([1024, 1500, 2**22])
                )
                receiver.pull(peer, odd, now)
            case 2 | 3:
                _honest(script, receiver, sender, now)
            case 4:
                index = script.pick([0, 1, 2, 3, 2**20, 2**32 - 1])
                piece = script.take(script.pick([1, 952, 1024, 1025, 0]))
                receiver.chunk(peer, blob.xfer, index, piece, now, heard=script.below(2) == 1)
            case 5:
                ranges = [(script.pick(FIRST), script.pick([1, 2, 256, 4096])) for _ in range(1 + script.below(3))]
                xfer, until = script.pick([blob.xfer, "0" * 32]), script.pick([0, 0, 3, 2**53])
                sender.granted(peer, Grant(xfer=xfer, ranges=ranges, until=until), now)
            case 6:
                now += script.pick([0.0, 0.5, 1.0, 30.0])
                receiver.perform(receiver.pool.tick(now))
            case 7:
                receiver.perform(receiver.pool.reset(now, script.pick([None, "a", "b"])))
                sender.reset()
            case 8:
                receiver.perform(receiver.pool.close(peer, blob.xfer, now))
                if gone := receiver.open.pop((peer, blob.xfer), None):
                    gone.discard()
            case 9:
                sender.all.leave(peer, script.pick([blob.xfer, None]))
            case 10:
                sender.all.expect(peer, blob, now)
                receiver.pull(peer, blob, now, listening=True)
            case _:
                receiver.check_disk()
                receiver.start(script.pick([0.0, 0.0, 2000.0]))
        if n % CHECKED_EVERY == 0:
            receiver.check()
            sender.all.check()
        assert sender.alone.n_pending <= 8 * len(PEERS)
    for _ in range(3 * 8 * len(receiver.open)):  # in silence every transfer ends
        if (at := receiver.pool.wake_at) is not None:
            now = max(now, at)
            receiver.perform(receiver.pool.tick(now))
    receiver.check()
    sender.all.check()
    receiver.check_disk()
    assert not receiver.open


def _honest(script: Script, receiver: Receiver, sender: Sender, now: float) -> None:
    """The credit that is out reaches the sender, and what it sends arrives."""
    for peer, grant in receiver.grants:
        sender.granted(peer, grant, now)
    receiver.grants.clear()
    for _ in range(script.below(9)):
        sent = sender.next_chunk(now)
        if sent is None:
            return
        blob = next(blob for blob in BLOBS if blob.xfer == sent.xfer)
        assert sent.length == chunk_length(blob, sent.index) <= blob.size
        known = BLOBS.index(blob)
        content = CONTENT[known] if known < len(CONTENT) else bytes(3000)
        piece = content[sent.offset : sent.offset + sent.length]
        if script.below(8) == 0:
            piece = bytes(len(piece))
        for peer in PEERS if sent.peer == EVERYONE else [sent.peer]:
            if sent.peer != EVERYONE or (peer, sent.xfer) in receiver.listening:
                receiver.chunk(peer, sent.xfer, sent.index, piece, now, heard=sent.peer == EVERYONE)
