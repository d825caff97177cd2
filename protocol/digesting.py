"""The digest of a file that is still coming, made beside the event loop, while the disk begins to write what is there.

sha256 takes half a second for a gigabyte, and an fsync at the end waits for the disk to write all of it: a loop that receives has
better uses for both.  One thread serves a whole process, in order, so a digest needs no lock.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from io import FileIO
from queue import Queue
from typing import TYPE_CHECKING, Final

from protocol.files import start_writing

if TYPE_CHECKING:
    from collections.abc import Callable

    _Work = tuple[Callable[[bytes | memoryview], None], bytes | memoryview]

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES: Final = 2 * 2**20
"""In pieces that wait for the thread; who brings more waits with them, so memory stays bounded."""
WRITE_BYTES: Final = 2**20
"""New bytes for which the disk is asked to begin."""


class _Pieces(Queue["_Work"]):
    """A queue that is full by its bytes; each entry counts as one more, so that none is nothing."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._n_bytes = 0

    def _qsize(self) -> int:
        return self._n_bytes

    def _put(self, item: _Work) -> None:
        super()._put(item)
        self._n_bytes += 1 + len(item[1])

    def _get(self) -> _Work:
        item = super()._get()
        self._n_bytes -= 1 + len(item[1])
        return item


_waiting: Final = _Pieces(MAX_WAITING_BYTES)
_starting = threading.Lock()
_thread: list[threading.Thread] = []


class Digesting:
    """The sha256 of the pieces handed in so far, which are what `file` holds from its beginning on.

    The file is closed when nobody uses it any more: the thread may still work on what everybody else has given up.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._sha256 = hashlib.sha256()
        self._n_bytes = self._n_begun = 0

    def add(self, piece: bytes | memoryview) -> None:
        """The next bytes of the file, already written there.  Costs microseconds, unless too many wait."""
        if not _thread:
            _start()
        _waiting.put((self._take, piece))

    def settled(self) -> hashlib._Hash:
        """The digest of all that was added, once it is made.  Blocks; call it in a thread, and add nothing afterwards."""
        done = threading.Event()
        if _thread:
            _waiting.put((lambda _: done.set(), b""))
            done.wait()
        return self._sha256

    def _take(self, piece: bytes | memoryview) -> None:
        self._sha256.update(piece)
        self._n_bytes += len(piece)
        if self._n_bytes - self._n_begun >= WRITE_BYTES:
            start_writing(self._file, self._n_begun, self._n_bytes - self._n_begun)
            self._n_begun = self._n_bytes


def _start() -> None:
    with _starting:
        if not _thread:
            _thread.append(threading.Thread(target=_run, name="digest", daemon=True))
            _thread[0].start()


def _run() -> None:
    while True:
        work, piece = _waiting.get()
        try:
            work(piece)
        except Exception:  # a digest that lacks a piece fails its file, a thread that ends would stop the whole process
            logger.exception("a piece was not hashed", extra={"action": "bug"})
        del work, piece  # or the last one of all would be held until the next comes
