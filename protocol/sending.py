"""The sending half of every transfer: what is on offer, what was granted and is still to be sent, when to offer again.

A sender decides nothing: it sends what it was given credit for (the idea is told in protocol/transfer.py).  Two things make
it robust.  Granted chunks wait here as (transfer, index) pairs, not as bytes, one small queue per peer, served in turn: a
thousand agents that ask at once cost no memory and none waits behind another's model.  And a chunk that is granted again
while it still waits is sent once: an impatient receiver cannot double the load of a slow link.

No import of asyncio, sockets or clocks here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

import msgspec

from protocol.errors import BadMessage
from protocol.frames import chunk_length
from protocol.messages import Blob, Grant, Offer

MAX_GRANT_CHUNKS: Final = 256
"""A grant above the largest window is no honest receiver's."""


MAX_POSTPONED_S: Final = 3600.0
"""No receiver puts an update off for longer: it would be as good as lost."""


class SendChunk(msgspec.Struct, frozen=True):
    """Read `length` bytes at `offset` of the blob and publish them (QoS 0) to `peer` as chunk `index`."""

    peer: str
    xfer: str
    index: int
    offset: int
    length: int


class SendOffer(msgspec.Struct, frozen=True):
    """Publish this offer (QoS 1)."""

    offer: Offer


class Sending:
    """Blobs that peers may pull, and the chunks they have credit for.

    The shell publishes `next_chunk()` for as long as there is one, awaiting each publish, so that the bus's own pushback
    sets the pace.  `max_pending` chunks may wait per peer; a grant beyond that is dropped and the receiver asks again.
    """

    def __init__(self, *, max_pending: int = 2 * MAX_GRANT_CHUNKS) -> None:
        self.max_pending = max_pending
        self.n_dropped = 0
        self._blobs: dict[str, Blob] = {}
        self._pending: dict[str, OrderedDict[tuple[str, int], None]] = {}
        self._turn: deque[str] = deque()

    def add(self, blob: Blob) -> None:
        """Make `blob` available; a blob of another geometry under the same name replaces it."""
        self._blobs[blob.xfer] = blob

    def remove(self, xfer: str) -> None:
        """No longer available; what was granted of it is forgotten."""
        self._blobs.pop(xfer, None)

    def __contains__(self, xfer: str) -> bool:
        return xfer in self._blobs

    def asked_of(self, peer: str, grant: Grant) -> Blob | None:
        """The blob that this credit is for, None if it is not here.

        Raises BadMessage for chunks that do not exist or more than MAX_GRANT_CHUNKS of them.
        """
        blob = self._blobs.get(grant.xfer)
        if blob is None:
            return None
        if any(first + n > blob.n_chunks for first, n in grant.ranges):
            raise BadMessage(f"{peer} grants chunks beyond the {blob.n_chunks} of {grant.xfer}")
        if sum(n for _, n in grant.ranges) > MAX_GRANT_CHUNKS:
            raise BadMessage(f"{peer} grants more than {MAX_GRANT_CHUNKS} chunks at once")
        return blob

    def granted(self, peer: str, grant: Grant) -> bool:
        """Queue what `peer` asks for; False if that blob is not here (the shell answers Refuse).  Raises as `asked_of`."""
        if self.asked_of(peer, grant) is None:
            return False
        queue = self._pending.get(peer)
        if queue is None:
            queue = self._pending[peer] = OrderedDict()
            self._turn.append(peer)
        for first, n in grant.ranges:
            for index in range(first, first + n):
                if len(queue) < self.max_pending:
                    queue[grant.xfer, index] = None
                elif (grant.xfer, index) not in queue:
                    self.n_dropped += 1
        return True

    def next_chunk(self) -> SendChunk | None:
        """The next chunk to send, peers in turn; None when nobody has credit.  It is no longer pending then."""
        while self._turn:
            peer = self._turn.popleft()
            queue = self._pending[peer]
            (xfer, index), _ = queue.popitem(last=False)
            if queue:
                self._turn.append(peer)
            else:
                del self._pending[peer]
            blob = self._blobs.get(xfer)
            if blob is not None and chunk_length(blob, index) > 0:
                return SendChunk(peer, xfer, index, index * blob.chunk, chunk_length(blob, index))
        return None

    def drop_peer(self, peer: str) -> None:
        """The peer is gone: forget its credit."""
        if self._pending.pop(peer, None) is not None:
            self._turn.remove(peer)

    def reset(self) -> None:
        """The bus is new: all credit is void, receivers grant again."""
        self._pending.clear()
        self._turn.clear()

    @property
    def n_pending(self) -> int:
        """Chunks that have credit and wait here."""
        return sum(map(len, self._pending.values()))


@dataclass(slots=True)
class _Upload:
    offer: Offer
    tries: int
    due_at: float


class Uploads:
    """An agent's outbox on the bus: every finished update is offered until the coordinator has it or finally refuses it.

    Offered at once; again after `repeat_s`, doubling up to `max_repeat_s`, while there is no answer; a grant silences it for
    `quiet_s`, after which the receiver must have given up or forgotten, so it is offered again.  Costs O(uploads) per call,
    and an agent has a handful.
    """

    def __init__(self, *, repeat_s: float = 5.0, max_repeat_s: float = 300.0, quiet_s: float = 90.0) -> None:
        self.repeat_s = repeat_s
        self.max_repeat_s = max_repeat_s
        self.quiet_s = quiet_s
        self._uploads: dict[str, _Upload] = {}

    def add(self, offer: Offer, now: float) -> list[SendOffer]:
        """Offer an update; another offer of the same blob replaces the earlier one."""
        self._uploads[offer.blob.xfer] = _Upload(offer, 0, now)
        return self.tick(now)

    def granted(self, xfer: str, now: float) -> None:
        """The coordinator pulls: keep quiet for a while."""
        upload = self._uploads.get(xfer)
        if upload is not None:
            upload.tries, upload.due_at = 0, now + self.quiet_s

    def done(self, xfer: str) -> Offer | None:
        """The coordinator has it, or finally refused it: forget it and say what it was (None: nothing known)."""
        upload = self._uploads.pop(xfer, None)
        return None if upload is None else upload.offer

    def postponed(self, xfer: str, retry_after_s: float, now: float) -> None:
        """Refused for the moment: offer again after `retry_after_s`."""
        upload = self._uploads.get(xfer)
        if upload is not None:
            upload.tries, upload.due_at = 0, now + min(retry_after_s, MAX_POSTPONED_S)

    def reset(self, now: float) -> list[SendOffer]:
        """The coordinator was reborn or the bus is new: offer everything again at once."""
        for upload in self._uploads.values():
            upload.tries, upload.due_at = 0, now
        return self.tick(now)

    def tick(self, now: float) -> list[SendOffer]:
        """Offer what is due; see `wake_at`."""
        due = [upload for upload in self._uploads.values() if upload.due_at <= now]
        for upload in due:
            upload.due_at = now + min(self.repeat_s * 2**upload.tries, self.max_repeat_s)
            upload.tries = min(upload.tries + 1, 30)
        return [SendOffer(upload.offer) for upload in due]

    @property
    def wake_at(self) -> float | None:
        """When the next offer is due."""
        return min((upload.due_at for upload in self._uploads.values()), default=None)

    def __len__(self) -> int:
        """Updates not yet acknowledged."""
        return len(self._uploads)
