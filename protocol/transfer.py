"""The receiving half of every transfer: who may send how many chunks now, decided without I/O and on a clock that is handed in.

The idea.  A broker acknowledges what it has, not what was delivered; it drops silently once a client's queue is full, and
nothing in MQTT pushes back from a slow subscriber to a fast publisher.  So nobody pushes bulk here.  The receiver *pulls*: it
grants credit for named chunks, never more than it has room for, and the sender sends exactly those.

    sender                                  receiver
      | ---- Offer / Plan: Blob {sha256, size, chunk} ---> |   size and count are judged before any credit is given
      | <--- Grant {xfer, [(0, 8)]} ---------------------- |   QoS 1
      | ---- frames 0..7 --------------------------------> |   QoS 0
      | <--- Grant {xfer, [(8, 4)]} ---------------------- |   once half of the window is used up, so 1 grant per 4 chunks
      |          ...                                       |   digest of the whole verified, made durable
      | <--- Done {xfer} --------------------------------- |   only now may the sender forget

Why QoS 0 for chunks.  The credit already says what is missing, so a broker's retry would be a second, worse copy of the same
memory: QoS 1 persists every chunk, queues it for a dead session and delivers it twice.  At QoS 0 the broker's memory stays
flat and a lost chunk costs one new grant.

Why identity is the content hash.  Neither a connection nor a process names a transfer, but what is in it.  Whoever restarts
(agent, coordinator, broker) looks at what lies on its disk under that name and asks for the rest.

What the pool keeps, per transfer (protocol/pulls.py): `wanted`, the chunks to ask for, and `out`, those asked for and not
here.  A chunk in neither is here already.  From this follow the rules:

- At most `window` chunks are out per peer, at most `budget_bytes` over all peers.  The budget, not the number of peers,
  bounds the broker's and our memory.  It is charged per chunk at the size of a full one.
- A peer that could use credit stands in one queue, `_hungry`; it is served in turn, by a batch, and goes to the back.  When
  the budget is used up the queue waits for the next byte that comes free: a chunk, a timeout, a transfer that ends.
- Time is counted per transfer and only while something is out: any new chunk restarts it, waiting for budget is not the
  peer's fault.  When it runs out, everything out is wanted again, the peer's window is halved
  and the patience doubles.  `max_tries` of that in a row without a single new chunk: given up, with a reason.
- A long link needs a longer window and a narrow one a shorter: from `window` on it follows the link, up to `max_window`
  (protocol/windows.py), and does not outgrow its peer's share of the budget.
- A chunk that arrives after its timer is as good as any other: it is taken from `wanted` and never asked for again.
- A new connection voids all credit (`reset`): what was under way at QoS 0 is gone.
- A transfer may listen to a broadcast of its blob (protocol/broadcast.py).  Its credit then says so, and goes on ahead of
  what is heard; a chunk that was passed over is a gap, asked for when the rest is here.  A listener that is sent more than
  the budget without having asked for it cannot keep up, and one that hears nothing is deaf: both stop listening and pull.

The shell's duties: write a chunk (Partial.write) before it reports it here; call `tick` only while connected and after its
own receive queue is empty, or our own slowness would look like the peer's; perform the actions in order.  Every call is O(1)
up to the credit that it hands out, `tick` is O(log n) per timer; no call depends on the number of chunks or peers.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import msgspec

from protocol.alarms import Alarms
from protocol.bitmap import Bitmap
from protocol.errors import BadMessage
from protocol.frames import chunk_length, n_prefix_chunks
from protocol.messages import Blob, Grant
from protocol.pacing import Pace
from protocol.pulls import Pull, Sender
from protocol.windows import Window

MAX_WINDOW: Final = 256
"""Chunks in flight to one peer; so also the most that one grant may name."""
DEAF_TRIES: Final = 2
"""Silences in a row after which a broadcast is taken for ended, or never to come; its sender may wait for others for a while."""


class SendGrant(msgspec.Struct, frozen=True):
    """Send this credit to `peer` (QoS 1)."""

    peer: str
    grant: Grant


class Completed(msgspec.Struct, frozen=True):
    """Every wanted byte is here and the transfer is closed; verify the digest, then answer Done or open it afresh."""

    peer: str
    xfer: str


class GaveUp(msgspec.Struct, frozen=True):
    """Nothing came for too long; the transfer is closed.  What is on disk stays: a later offer resumes there."""

    peer: str
    xfer: str
    reason: str


class StopListening(msgspec.Struct, frozen=True):
    """The broadcast of this open transfer is of no use here: it is pulled from now on."""

    peer: str
    xfer: str


Action = SendGrant | Completed | GaveUp | StopListening


@dataclass(slots=True)
class Counts:
    """What happened since the start, for metrics: chunks, and what was wrong with those that were not used."""

    n_chunks: int = 0
    n_bytes: int = 0
    n_grants: int = 0
    n_voided: int = 0  # asked for, not here in time (or the bus was reset)
    n_unasked: int = 0  # used without credit being out: late, or from a broadcast
    n_unneeded: int = 0  # duplicates, and broadcast chunks beyond a prefix
    n_stray: int = 0  # of a transfer that is not open
    n_bad: int = 0  # of impossible index or length
    n_given_up: int = 0


class Receiving:
    """All downloads into one receiver: for a coordinator many agents' uploads, for an agent one model from "coordinator".

    Keep `budget_bytes` a few times below what the broker queues for one client (1000 messages, 64 MiB suggested).
    """

    def __init__(
        self,
        *,
        window: int = 8,
        max_window: int | None = None,
        budget_bytes: int = 32 * 2**20,
        timeout_s: float = 5.0,
        max_timeout_s: float = 60.0,
        max_tries: int = 8,
        pace: Pace | None = None,
    ) -> None:
        assert 1 <= window <= (max_window or window) <= MAX_WINDOW
        assert 0 < timeout_s <= max_timeout_s
        self.window = window
        self.max_window = max_window or window
        self.budget_bytes = budget_bytes
        self.timeout_s = timeout_s
        self.max_timeout_s = max_timeout_s
        self.max_tries = max_tries
        self.pace = pace or Pace()
        self.out_bytes = 0
        self.counts = Counts()
        self._peers: dict[str, Sender] = {}
        self._open: dict[tuple[str, str], Pull] = {}
        self._hungry: deque[Sender] = deque()
        self._alarms: Alarms[Pull] = Alarms()
        self._paced_until: float | None = None

    def open(
        self,
        peer: str,
        blob: Blob,
        now: float,
        *,
        size: int | None = None,
        have: Bitmap | None = None,
        listening: bool = False,
    ) -> list[Action]:
        """Begin (or go on) to pull `blob`, or its first `size` bytes, from `peer`; `have` are the chunks on disk.

        `listening` says that a broadcast of it is subscribed to.

        Repeating the same open changes nothing; another geometry under the same name replaces it.  Raises BadMessage for
        a blob that cannot be pulled at all.  Whether its size is acceptable is for the caller to know.
        """
        n = n_prefix_chunks(blob, size)
        if min(blob.chunk, blob.size) > self.budget_bytes:
            raise BadMessage(
                f"chunks of {blob.chunk} bytes exceed the budget of {self.budget_bytes}: use smaller chunks"
            )
        known = self._open.get((peer, blob.xfer))
        if known is not None and (known.blob, known.size) == (blob, size):
            return []
        if known is not None:
            self._remove(known)
        assert have is None or len(have) == n, "the bitmap is of another transfer"
        wanted = Bitmap(n, full=True) if have is None else have.inverted()
        if not wanted.count:
            return [Completed(peer, blob.xfer), *self._serve(now)]
        source = self._peers.setdefault(peer, Sender(peer, Window(self.window, self.max_window)))
        transfer = Pull(source, blob, size, wanted, listening, now, min(blob.chunk, blob.size))
        self._open[peer, blob.xfer] = transfer
        source.turn.append(transfer)
        self._want(source)
        return self._serve(now)

    def chunk(self, peer: str, xfer: str, index: int, n_bytes: int, now: float, *, heard: bool = False) -> list[Action]:
        """A chunk arrived and is written, `heard` in a broadcast or sent to us alone.

        What nobody needs is counted and changes nothing.
        """
        transfer = self._open.get((peer, xfer))
        if transfer is None:
            self.counts.n_stray += 1
            return []
        if n_bytes < 1 or n_bytes != chunk_length(transfer.blob, index):
            self.counts.n_bad += 1
            return []
        actions = self._heard(transfer, index) if heard and transfer.listening else []
        source = transfer.peer
        if (credit := transfer.out.pop(index, None)) is not None:
            source.n_out -= 1
            self.out_bytes -= transfer.unit_bytes
        elif transfer.wanted.discard(index):
            self.counts.n_unasked += 1
        else:
            self.counts.n_unneeded += 1
            self._want(source)  # it may have been passed over
            return [*actions, *self._serve(now)] if self._hungry else actions
        share = self.budget_bytes / (transfer.unit_bytes * len(self._peers))
        source.window.arrived(credit, now, share)
        self.counts.n_chunks += 1
        self.counts.n_bytes += n_bytes
        transfer.moved(now)
        if transfer.out:
            self._arm(transfer, now)
        else:
            self._alarms.cancel(transfer)
        if not transfer.out and not transfer.wanted.count:
            self._remove(transfer)
            return [*actions, Completed(peer, xfer), *self._serve(now)]
        self._want(source)
        return [*actions, *self._serve(now)] if self._hungry else actions

    def alive(self, peer: str, xfer: str, now: float) -> None:
        """The sender has done its part, and it is for us to take it: nobody is silent."""
        transfer = self._open.get((peer, xfer))
        if transfer is not None and transfer.out:
            transfer.tries = 0
            self._arm(transfer, now)

    def tick(self, now: float) -> list[Action]:
        """Handle the timers that ran out; see `wake_at`."""
        self._paced_until = None
        given_up = [action for transfer in self._alarms.ring(now) for action in self._expire(transfer)]
        return given_up + self._serve(now)

    @property
    def wake_at(self) -> float | None:
        """When to call `tick` at the latest; it may find that nothing is due yet, and moves this on."""
        return min((at for at in (self._alarms.wake_at, self._paced_until) if at is not None), default=None)

    def close(self, peer: str, xfer: str, now: float) -> list[Action]:
        """Stop wanting this transfer (nothing happens if it is not open); its credit serves the others."""
        transfer = self._open.get((peer, xfer))
        if transfer is not None:
            self._remove(transfer)
        return self._serve(now)

    def drop_peer(self, peer: str, now: float) -> list[Action]:
        """The peer is gone: close all its transfers.  A later offer opens them again."""
        if peer in self._peers:
            for transfer in list(self._peers[peer].turn):
                self._remove(transfer)
        return self._serve(now)

    def reset(self, now: float, peer: str | None = None) -> list[Action]:
        """All credit (or that of one peer, when it was reborn) is void: the bus is new.  Grant again what is missing."""
        for source in self._peers.values():
            if peer not in {None, source.name}:
                continue
            source.window.reset()
            for transfer in source.turn:
                transfer.tries = transfer.overrun_bytes = 0
                self._void(transfer)
            self._want(source)
        return self._serve(now)

    def __len__(self) -> int:
        """Open transfers."""
        return len(self._open)

    def remaining(self, peer: str, xfer: str) -> int | None:
        """Chunks still to come, for display; None if it is not open."""
        transfer = self._open.get((peer, xfer))
        return None if transfer is None else transfer.wanted.count + len(transfer.out)

    def has_room(self, n_bytes: int) -> bool:
        """Whether a transfer that begins now gets credit for so many bytes, or for half of all: nobody waits for any."""
        return not self._hungry and min(n_bytes, self.budget_bytes // 2) <= self.budget_bytes - self.out_bytes

    # ------------------------------------------------------------------------------------------------------- credit

    def _want(self, peer: Sender) -> None:
        """Queue a peer that has half of its window free: a smaller batch would not be worth a grant."""
        if not peer.hungry and 2 * peer.n_out <= peer.window.size:
            peer.hungry = True
            self._hungry.append(peer)

    def _serve(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._hungry:
            peer = self._hungry[0]
            transfer = peer.next()
            room = int(peer.window.size) - peer.n_out
            if transfer is not None and room > 0:
                if (pause_s := self.pace.wait_s(now)) > 0:
                    self._paced_until = now + pause_s
                    break
                ask = min(room, transfer.wanted.count, self.pace.most(now, transfer.unit_bytes))
                n = min(ask, (self.budget_bytes - self.out_bytes) // transfer.unit_bytes)
                if n < min(ask, max(1, self.budget_bytes // (2 * transfer.unit_bytes))):
                    break  # it stays first in the queue until a batch fits
                actions.append(self._grant(transfer, n, now))
            self._hungry.popleft()
            peer.hungry = False
            if transfer is not None:
                self._want(peer)
        return actions

    def _grant(self, transfer: Pull, asked: int, now: float) -> SendGrant:
        peer = transfer.peer
        ranges = transfer.take(asked, peer.window.credit(now))
        n = sum(length for _, length in ranges)
        peer.n_out += n
        self.out_bytes += n * transfer.unit_bytes
        peer.turn.rotate(-1)
        self.pace.take(n * transfer.unit_bytes, now)
        self._arm(transfer, now)
        self.counts.n_grants += 1
        until = len(transfer.wanted) if transfer.listening else 0
        return SendGrant(peer.name, Grant(xfer=transfer.blob.xfer, ranges=ranges, until=until))

    def _heard(self, transfer: Pull, index: int) -> list[Action]:
        """The broadcast has come to `index`: what it passed over is a gap, and credit goes on behind it."""
        if index < transfer.front:
            return []
        n_passed = transfer.passed_over(index)
        transfer.peer.n_out -= n_passed
        self.out_bytes -= n_passed * transfer.unit_bytes
        self.counts.n_voided += n_passed
        if not transfer.out:
            self._alarms.cancel(transfer)
        if index in transfer.out:
            transfer.overrun_bytes = 0
            return []
        transfer.from_index = max(transfer.from_index, index + 1)
        transfer.overrun_bytes += transfer.unit_bytes
        return self._stop_listening(transfer) if transfer.overrun_bytes > self.budget_bytes else []

    def _stop_listening(self, transfer: Pull) -> list[Action]:
        transfer.listening = False
        transfer.from_index = 0
        return [StopListening(transfer.peer.name, transfer.blob.xfer)]

    def _void(self, transfer: Pull) -> None:
        """Take back all credit of a transfer: what is out is wanted again."""
        transfer.want_again()
        self.counts.n_voided += len(transfer.out)
        self._release(transfer)

    def _release(self, transfer: Pull) -> None:
        transfer.peer.n_out -= len(transfer.out)
        self.out_bytes -= len(transfer.out) * transfer.unit_bytes
        transfer.out.clear()
        self._alarms.cancel(transfer)

    def _remove(self, transfer: Pull) -> None:
        self._release(transfer)
        peer = transfer.peer
        del self._open[peer.name, transfer.blob.xfer]
        peer.turn.remove(transfer)
        if peer.turn:
            self._want(peer)
            return
        del self._peers[peer.name]
        if peer.hungry:
            self._hungry.remove(peer)

    # --------------------------------------------------------------------------------------------------------- time

    def _arm(self, transfer: Pull, now: float) -> None:
        self._alarms.set(transfer, now + transfer.patience_s(self.timeout_s, self.max_timeout_s))

    def _expire(self, transfer: Pull) -> list[Action]:
        peer = transfer.peer
        transfer.tries += 1
        peer.window.silent()
        self._void(transfer)
        if transfer.tries < self.max_tries:
            self._want(peer)
            is_deaf = transfer.listening and transfer.tries >= DEAF_TRIES
            return self._stop_listening(transfer) if is_deaf else []
        n, size = transfer.wanted.count, transfer.unit_bytes
        hint = "" if transfer.pace_s else f": does the broker pass on chunks of {size} bytes?  See broker.chunk_bytes"
        self._remove(transfer)
        self.counts.n_given_up += 1
        reason = f"{peer.name} sent nothing after {self.max_tries} grants; {n} chunks are missing{hint}"
        return [GaveUp(peer.name, transfer.blob.xfer, reason)]

    def check(self) -> None:
        """Assert every invariant; cost O(chunks), for tests."""
        assert 0 <= self.out_bytes <= self.budget_bytes
        assert self.out_bytes == sum(len(t.out) * t.unit_bytes for t in self._open.values())
        assert {id(p) for p in self._hungry} == {id(p) for p in self._peers.values() if p.hungry}
        assert len(set(map(id, self._hungry))) == len(self._hungry)
        for name, peer in self._peers.items():
            assert peer.turn
            assert peer.n_out == sum(len(t.out) for t in peer.turn) <= self.max_window
            assert 1 <= peer.window.size <= self.max_window
            starving = peer.next() is not None and 2 * peer.n_out <= peer.window.size
            assert peer.hungry or not starving, f"{name} could use credit and nobody knows"
        if self._hungry:
            assert self.out_bytes or self._paced_until, "somebody waits although nothing is out"
        for transfer in self._open.values():
            assert transfer.wanted.count or transfer.out
            assert not any(index in transfer.wanted for index in transfer.out)
            assert bool(transfer.out) == (transfer in self._alarms), "a timer for nothing, or none"
