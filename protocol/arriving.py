"""A file that is still coming, to be read as if it were there: whoever asks for what is not here yet waits for it.

A blob arrives nearly in order, and what is made of it is often made from its beginning on.  So a reader in a thread of its own
need not wait for the end.  What it read counts only once the whole is verified: `settled` says so, or that it never will be.

One Arriving is for one purpose, on any number of threads.  The side that receives calls `reached`, `arrived` and `lost` from the
event loop, where they cost microseconds.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from protocol.errors import Unavailable


class Arriving:
    """A file of `size` bytes on its way."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._file: FileIO | None = None
        self._n_bytes = 0
        self._is_whole = False
        self.fault = ""
        """Why it does not come."""

    def reached(self, n_bytes: int, path: Path) -> None:
        """So many bytes from the beginning on are there now, in the file at `path`."""
        with self._changed:
            if self._file is None and not self.fault:
                self._open(path)
            self._n_bytes = min(n_bytes, self.size)
            self._changed.notify_all()

    def _open(self, path: Path) -> None:
        try:
            self._file = path.open("rb", buffering=0)  # held: the file moves into a store when it is whole
        except OSError as error:
            self.fault = f"{path} cannot be read: {error}"
        else:
            weakref.finalize(self, self._file.close)

    def arrived(self) -> None:
        """It is whole, and what it should be."""
        with self._changed:
            self._n_bytes, self._is_whole = self.size, True
            self._changed.notify_all()

    def lost(self, reason: str) -> None:
        """It does not come, or is not what it should be, or its reader shall stop."""
        with self._changed:
            self.fault = reason
            self._changed.notify_all()

    def read(self, n_bytes: int, offset: int) -> bytes:
        """As os.pread: fewer bytes at the end of the file, else all of them, as soon as they are there.  Raises Unavailable."""
        end = min(offset + n_bytes, self.size)
        with self._changed:
            self._changed.wait_for(lambda: self.fault or self._n_bytes >= end)
            if self.fault or self._file is None:
                raise Unavailable(self.fault or "nothing of it ever came")
        return os.pread(self._file.fileno(), max(0, end - offset), offset)

    def settled(self) -> None:
        """Wait until it is whole and verified.  Raises Unavailable when that will not be."""
        with self._changed:
            self._changed.wait_for(lambda: self.fault or self._is_whole)
            if self.fault:
                raise Unavailable(self.fault)


Source: TypeAlias = Path | Arriving
"""Where a file is read from."""
Read: TypeAlias = Callable[[int, int], bytes]
"""So many bytes from an offset on; fewer at the end of the file."""


@contextmanager
def reading(source: Source) -> Iterator[Read]:
    """To read from a file, which is open for as long; one that is still coming is waited for.  Raises OSError, Unavailable."""
    if isinstance(source, Arriving):
        yield source.read
    else:
        with source.open("rb", buffering=0) as file:
            yield partial(os.pread, file.fileno())


def settled(source: Source) -> None:
    """Wait until all that was read is known to be what it should be.  Raises Unavailable when it is not."""
    if isinstance(source, Arriving):
        source.settled()


def size_of(source: Source) -> int:
    """Of the whole file.  Unit: bytes.  Raises OSError."""
    return source.size if isinstance(source, Arriving) else source.stat().st_size
