"""What a crash of the coordinator leaves on its disk, and digests as of the files there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from coordinator.core.state import Contribution
from protocol.messages import Blob


class Disk:
    """What a crash leaves."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, bytes]] = []
        self.n_forgotten = 0
        """Rows before these, which a snapshot covers."""
        self.snapshot: tuple[int, bytes] = (0, b"")
        self.last_at = 0.0
        self.blobs: set[str] = set()
        self.records: set[tuple[str, int, int]] = set()

    @property
    def n_rows(self) -> int:
        """All that were ever written."""
        return self.n_forgotten + len(self.rows)


def digest(text: str) -> str:
    """A digest as of a file with this content."""
    return hashlib.sha256(text.encode()).hexdigest()


def served(master: str) -> Blob:
    """What agents are given of this master."""
    return Blob(sha256=digest(f"served/{master}"), size=1000)


def folded(master: str, contributions: Sequence[Contribution]) -> str:
    """The next master: it depends on the one before and on every contribution, in order."""
    return digest(f"{master}/" + "/".join(f"{c.agent} {c.round} {c.sha256} {c.weight!r}" for c in contributions))
