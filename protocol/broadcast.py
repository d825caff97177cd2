"""One blob for many at once: the credit of all who listen is merged, and each chunk is published once for all of them.

The idea.  A hundred agents want the same model in the same minute.  Sent to each, it leaves the coordinator a hundred times;
published once on a topic that all listen to, it leaves once and the broker does the copying.  But a broadcast *pushes*, and a
broker drops for whoever cannot keep up.  So nothing changes for a receiver: it grants credit for named chunks, within its
window (protocol/transfer.py), and says with it that it listens.  Here the credit of all listeners is laid together:

    agents a, b, c:  grant 0..7 (until 90)     a chunk goes out once all members have given credit for it, or for one behind it;
    broadcast:       0 1 2 3 4 5 6 7           so the slowest sets the pace, and no broker holds more than one window for anyone
    agents a, b, c:  grant 8..11               `until`: nobody is waited for beyond the end of what it wants

- **Members** are those that were told of the broadcast (`expect`) and those that have given credit at or beyond the front.
- **Nobody holds up the others for long.** Who lets the front wait for `stall_s`, or eight times the mean gap between chunks, is
  left behind, but at the first chunk not while others keep coming, for up to ARRIVING_S; so are the last few (a tenth, at least
  one) once the front has waited for few alone during half of the time.
  Nobody waits for them any more; they may still hear what they can take, and pull what they miss.
- **Gaps.** Credit for a chunk before the front is for one that was lost, or missed by a late joiner.  It waits for `gather_s`, or
  four times the mean gap, so that others can ask for the same one; then it goes to all who did: to one of them alone, to two and more as a broadcast.
  But who was left behind asks for the first time for what is on its way to it already: that needs no answer.

After the window scheme of pgmcc (Rizzo, 2000), with all receivers as its acker: they are known, and a credit costs 200 bytes
per half window.  Forward error correction (NORM, RFC 5740) would repair independent losses with fewer bytes; over TCP and
with credit a broker drops nothing in the first place.  No I/O and no clock here.  Cost: per credit and chunk O(log members),
and moving an entry within an array of them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from math import inf
from typing import Final

from protocol.frames import chunk_length
from protocol.messages import Blob, Grant
from protocol.sending import SendChunk

EVERYONE: Final = ""
"""The peer of a chunk that goes to all who listen."""
FEW_RATIO: Final = 0.1
"""Of the members; so many are not the fleet's pace but somebody's trouble."""
HELD_RATIO: Final = 0.5
"""Share of the time that the front may wait for few."""
ARRIVING_S: Final = 10.0
"""A thousand agents that were told at once do not all ask within a second: so long the first chunk waits while more keep coming.
Less than the patience of who came first (protocol/transfer.py)."""
FORGET_S: Final = 600.0
"""A broadcast in which nothing happened for so long is over, whoever did not say so."""


class _Broadcast:
    """One blob: who takes part, what was asked for, and how far it has come."""

    def __init__(self, blob: Blob, now: float) -> None:
        self.blob, self.touched_at = blob, now
        self.front = 0  # nothing at or behind it was sent
        self.pace_s = 0.0  # mean gap between chunks at the front
        self._sent_at = -inf
        self._members: dict[str, float] = {}  # to the end of the credit that each gave; infinite when it wants no more
        self._ends: list[float] = []  # the same, sorted
        self._began_at = now
        self._few_since: float | None = None  # the front waits for few alone
        self._held_s = 0.0  # it has waited so in all
        self._left: set[str] = set()
        self._joined: dict[str, int] = {}  # where the front was when each began to listen
        self._came_at = -inf  # the last who did
        self._reach: dict[str, int] = {}  # behind the last chunk that each ever asked for
        self._asked: dict[int, dict[str, None]] = {}
        self._ahead: list[int] = []  # a heap of what is asked for at the front or behind it
        self._ahead_at: dict[int, float] = {}  # and since when
        self._again: dict[int, float] = {}  # what is asked for before the front and since when, the oldest first

    @property
    def is_over(self) -> bool:
        """Whether everybody has been sent all that it asked for and wants no more."""
        return not self._asked and all(end == inf for end in self._members.values())

    def join(self, peer: str, end: float) -> None:
        """A member's credit reaches up to `end`."""
        if end > self._members.get(peer, -1):
            self._drop(peer)
            self._members[peer] = end
            insort(self._ends, end)

    def _drop(self, peer: str) -> None:
        if (end := self._members.pop(peer, None)) is not None:
            del self._ends[bisect_left(self._ends, end)]

    def granted(self, peer: str, grant: Grant, now: float) -> None:
        """Note what a listener asks for."""
        if peer not in self._joined:
            self._joined[peer], self._came_at = self.front, now
        joined, reach = self._joined[peer], self._reach.get(peer, 0)
        for first, n in grant.ranges:
            for index in range(first, first + n):
                if not max(joined, reach) <= index < self.front:
                    self._ask(peer, index, now)
        end = max(first + n for first, n in grant.ranges)
        self._reach[peer] = max(reach, end)
        is_member = peer in self._members or (end > self.front and peer not in self._left)
        if is_member:
            self.join(peer, inf if end >= grant.until else end)
        self._look(now)

    def _ask(self, peer: str, index: int, now: float) -> None:
        if index not in self._asked:
            self._asked[index] = {}
            if index < self.front:
                self._again[index] = now
            else:
                heapq.heappush(self._ahead, index)
                self._ahead_at[index] = now
        self._asked[index][peer] = None

    def leave(self, peer: str) -> None:
        """It listens no longer; what it had asked for is nobody's business any more."""
        self._drop(peer)
        self._joined.pop(peer, None)
        self._reach.pop(peer, None)
        for who in self._asked.values():
            who.pop(peer, None)

    def reset(self) -> None:
        """All credit is void; the members give it anew, and the front is where they then ask."""
        self._asked.clear()
        self._left.clear()
        self._joined.clear()
        self._reach.clear()
        self._ahead.clear()
        self._again.clear()
        self._ahead_at.clear()
        self._left.clear()
        self.front, self._sent_at, self._few_since = 0, -inf, None
        self._members = dict.fromkeys(self._members, 0.0)
        self._ends = [0.0] * len(self._members)

    def due_at(self, stall_s: float, gather_s: float) -> float | None:
        """When there is something to send; None while nobody asks."""
        again = next(iter(self._again.values()), inf) + max(gather_s, 4 * self.pace_s)
        due_at = min(again, self._front_due_at(stall_s) if self._ahead else inf)
        return due_at if due_at < inf else None

    def next_chunk(self, now: float, stall_s: float, gather_s: float) -> SendChunk | None:
        """The next that is due, gaps first; None when nothing is."""
        index, at = next(iter(self._again.items()), (0, inf))
        if at + max(gather_s, 4 * self.pace_s) <= now:
            del self._again[index]
            return self._sent(index)
        if not self._ahead or self._front_due_at(stall_s) > now:
            return None
        index = heapq.heappop(self._ahead)
        del self._ahead_at[index]
        self._leave_behind(index)
        if self._sent_at == -inf:
            self._began_at, self._held_s, self._few_since = now, 0.0, None
        else:
            self.pace_s += (now - self._sent_at - self.pace_s) / 8
        self.front, self._sent_at = index + 1, now
        self._look(now)
        return self._sent(index)

    def _look(self, now: float) -> None:
        """Keep account of how long the front waits for few."""
        n_late = bisect_right(self._ends, self._ahead[0]) if self._ahead else 0
        if 0 < n_late <= max(1, FEW_RATIO * len(self._ends)):
            self._few_since = now if self._few_since is None else self._few_since
        elif self._few_since is not None:
            self._held_s += now - self._few_since
            self._few_since = None

    def _front_due_at(self, stall_s: float) -> float:
        index = self._ahead[0]
        since = max(self._ahead_at[index], self._sent_at)
        if not self._ends or self._ends[0] > index:
            return since
        if not self.front:
            since = max(since, min(self._came_at, since + ARRIVING_S))
        stalled_at = since + max(stall_s, 8 * self.pace_s)
        if self._few_since is None or not self.front:
            return stalled_at
        spared_s = stall_s + HELD_RATIO * (self._few_since - self._began_at) - self._held_s
        return min(stalled_at, self._few_since + max(0.0, spared_s))

    def _leave_behind(self, index: int) -> None:
        if self._ends and self._ends[0] <= index:
            late = [peer for peer, end in self._members.items() if end <= index]
            for peer in late:
                self._drop(peer)
            self._left.update(late)

    def _sent(self, index: int) -> SendChunk | None:
        who = list(self._asked.pop(index))
        if not who:
            return None
        peer = who[0] if len(who) == 1 else EVERYONE
        return SendChunk(peer, self.blob.xfer, index, index * self.blob.chunk, chunk_length(self.blob, index))

    def check(self) -> None:
        """Assert every invariant, for tests."""
        assert set(self._ahead) | set(self._again) == set(self._asked)
        assert set(self._ahead) == set(self._ahead_at)
        assert len(set(self._ahead)) == len(self._ahead)
        assert all(index >= self.front for index in self._ahead)
        assert all(index < self.front for index in self._again)
        assert self._ends == sorted(self._members.values())
        assert not self._left & set(self._members)


class Broadcasts:
    """All broadcasts of one sender.  The shell publishes `next_chunk(now)` for as long as there is one; see `wake_at`."""

    def __init__(self, *, stall_s: float = 1.0, gather_s: float = 0.25) -> None:
        self.stall_s, self.gather_s = stall_s, gather_s
        self._open: dict[str, _Broadcast] = {}

    def expect(self, peer: str, blob: Blob, now: float) -> None:
        """`peer` was told that it may listen to `blob`: do not begin before it has asked, or has let the others wait."""
        known = self._of(blob, now)
        if known.is_over and known.front:
            del self._open[blob.xfer]
            known = self._of(blob, now)
        if not known.front:
            known.join(peer, 0)

    def granted(self, peer: str, blob: Blob, grant: Grant, now: float) -> None:
        """A listener asks for chunks of `blob`, which exist."""
        self._of(blob, now).granted(peer, grant, now)

    def _of(self, blob: Blob, now: float) -> _Broadcast:
        known = self._open.get(blob.xfer)
        if known is None or known.blob != blob:
            self._open = {x: b for x, b in self._open.items() if not b.is_over and now - b.touched_at < FORGET_S}
            known = self._open[blob.xfer] = _Broadcast(blob, now)
        known.touched_at = now
        return known

    def next_chunk(self, now: float) -> SendChunk | None:
        """The next chunk to publish, blobs in turn; its peer may be EVERYONE.  It is no longer asked for then."""
        for xfer, one in list(self._open.items()):
            while (at := one.due_at(self.stall_s, self.gather_s)) is not None and at <= now:
                if (chunk := one.next_chunk(now, self.stall_s, self.gather_s)) is not None:
                    self._open[xfer] = self._open.pop(xfer)
                    return chunk
        return None

    @property
    def wake_at(self) -> float | None:
        """When `next_chunk` will have something; it may have passed."""
        due = [one.due_at(self.stall_s, self.gather_s) for one in self._open.values()]
        return min((at for at in due if at is not None), default=None)

    def leave(self, peer: str, xfer: str | None = None) -> None:
        """The peer listens no longer to this blob, or to anything: it pulls, or it is gone."""
        for name, one in self._open.items():
            if xfer in {None, name}:
                one.leave(peer)

    def remove(self, xfer: str) -> None:
        """The blob is not available any more."""
        self._open.pop(xfer, None)

    def reset(self) -> None:
        """The bus is new: all credit is void."""
        for one in self._open.values():
            one.reset()

    def check(self) -> None:
        """Assert every invariant, for tests."""
        for one in self._open.values():
            one.check()
