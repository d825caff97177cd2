"""How the coordinator's disk is, in one named state that people and programs see.

    ok        everything can be written
    low       less is free than `keep.min_free_bytes`: nothing new is taken in; the journal still has room
    refused   the disk took a write not: facts and versions wait in memory and are tried again

Writers say how their last write went, a look from time to time sees the free space.  The log hears of a state once, when it
begins and when it is over, however often writers try again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from protocol.errors import Unavailable

PASSING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})
"""Errors of a disk that is full, read-only or failing: they end when somebody makes room or mends it."""

logger = logging.getLogger(__name__)


class DiskState(StrEnum):
    """Whether the disk takes what there is to write."""

    OK = "ok"
    LOW = "low"
    REFUSED = "refused"


def refuses(error: Exception) -> bool:
    """Whether this is the disk that refuses, and the same may succeed later."""
    return isinstance(error, Unavailable) or (isinstance(error, OSError) and error.errno in PASSING)


class Disk:
    """The state of the file system that holds `folder`.  `moved` is called when it changes."""

    def __init__(self, folder: Path, min_free_bytes: int, moved: Callable[[], None] = lambda: None) -> None:
        self._folder, self._min_free_bytes, self._moved = folder, min_free_bytes, moved
        self._refusals: dict[str, str] = {}
        self._low = ""
        self.state = DiskState.OK
        self.reason = ""
        self.deficit_bytes = self.tight_bytes = 0
        """What lacks to the space that is to stay free, and to twice that."""

    def renew(self, min_free_bytes: int) -> None:
        """Another limit, from the next look on."""
        self._min_free_bytes = min_free_bytes

    def refused(self, writer: str, error: Exception) -> None:
        """A writer was refused, with this reason."""
        self._refusals.setdefault(writer, str(error))
        self._told()

    def wrote(self, writer: str) -> None:
        """A writer that may have been refused before was not any more."""
        if self._refusals.pop(writer, None) is not None:
            self._told()

    def refusal(self) -> str:
        """Why a write is refused at present; empty when none is."""
        return self.reason if self.state is DiskState.REFUSED else ""

    def look(self) -> None:
        """See how much is free, and whether the folders can be written at all; files may lie on a disk of their own."""
        places = [place for place in (self._folder, self._folder / "blobs") if place.is_dir()]
        free_bytes = min((shutil.disk_usage(place).free for place in places), default=0)
        self.deficit_bytes = max(0, self._min_free_bytes - free_bytes)
        self.tight_bytes = max(0, 2 * self._min_free_bytes - free_bytes)
        self._low = ""
        if self.deficit_bytes:
            self._low = (
                f"{self._folder}: {free_bytes / 1e6:.0f} MB are free, {self._min_free_bytes / 1e6:.0f} MB are to stay so "
                "(keep.min_free_bytes): no update is taken in until there is room"
            )
        closed = next((place for place in places if not os.access(place, os.W_OK)), None if places else self._folder)
        if closed:
            why = f"{closed} cannot be written: see that it is mounted for writing and belongs to this user"
            self._refusals["folder"] = why
        else:
            self._refusals.pop("folder", None)
        self._told()

    def _told(self) -> None:
        first = next(iter(self._refusals.values()), "")
        before = self.state
        self.state = DiskState.REFUSED if first else DiskState.LOW if self._low else DiskState.OK
        self.reason = first or self._low
        if self.state is before:
            return
        if self.state is DiskState.OK:
            logger.warning("the disk takes everything again", extra={"action": "disk_ok"})
        else:
            writers = sorted(self._refusals)
            logger.error("%s", self.reason, extra={"action": "disk", "state": self.state, "writers": writers})
        self._moved()
