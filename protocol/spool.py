"""Unfinished transfers on disk: a partial file and behind its data the log of the chunks in it, so that any restart resumes.

    chunk 0 | chunk 1 | ... | header: digest, size and chunk of the blob | (index, checksum) | (index, checksum) | ...

The state machines of a transfer do no I/O, the bus carries bytes, and somebody has to hold them in between: this module and
the store that finished files move to (protocol/blobs.py) are the only ones besides the bus and the daemons' scaffolding that
touch the outside.

The log instead of a bitmap.  Per chunk it appends eight bytes: the index, and the crc32c of the frame that brought it, so that
nothing is computed twice.  On resume every logged chunk is read back and checked; what does not fit is simply asked for
again.  So neither has to be ahead of the other: killed between two writes, or after a power cut that kept the log and
lost the data, the worst is one more chunk on the bus.  Hence no fsync until the whole is verified, and no loss at all on
kill -9.  The log is cut off when the digest is right, and the file moves into the store as it is.

One file, not two: while a disk is syncing, making one takes a millisecond, and a thousand agents come at once.

What comes in order is hashed while it comes, by a thread (protocol/digesting.py); the rest, and what an earlier process left, is
read at the end.  The digest so far lives and dies with a descriptor that holds the file (_Seen), so it can only ever speak for the file that it was made of,
and what it has seen is what the kernel holds for that file; fsync says at the end whether the disk holds it, too.  A Spool
holds the files of its last MAX_OPEN transfers; of another the digest is forgotten, and it is read at the end.

To write, files are opened each time (a few percent of what a chunk costs): so a deleted file takes no more chunks, and nobody
keeps a file system from being made read-only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final

from protocol.bitmap import Bitmap
from protocol.blobs import Blobs, disk, extend_digest
from protocol.digesting import Digesting
from protocol.errors import BadMessage, IllegalMove, Unavailable
from protocol.frames import checksum, chunk_length, n_prefix_chunks
from protocol.messages import Blob
from protocol.topics import is_id, is_xfer

_HEADER = struct.Struct(">4s32sQI")  # magic, sha256, size, chunk
_RECORD = struct.Struct(">II")  # index, checksum of its frame
_MAGIC: Final = b"fpl3"
MAX_OPEN: Final = 64
"""Transfers whose file stays open: a thousand agents must not need a thousand descriptors."""
_NAMES: Final = threading.Lock()
"""Held while partial files are made, deleted or given to the store: they are verified in a thread, and may be given up meanwhile."""
_LATEST: Final[weakref.WeakValueDictionary[Path, Partial]] = weakref.WeakValueDictionary()
"""Who opened a file last: two must not write to what one of them verifies."""


class _Seen:
    """A partial file, held open, and the digest of what was written to it so far, in order."""

    def __init__(self, path: Path) -> None:
        file = path.open("rb", buffering=0)
        self._stat = os.fstat(file.fileno())
        self.digesting, self.n_chunks = Digesting(file), 0

    def is_of(self, descriptor: int) -> bool:
        """Whether it speaks for the file behind `descriptor`."""
        return os.path.samestat(self._stat, os.fstat(descriptor))


class Partial:
    """One unfinished file.  `have` tells which chunks are on disk, and is what a receiver needs to resume.

    Raises Unavailable from any method when the disk refuses; the file then holds what it held before.
    """

    def __init__(
        self,
        blobs: Blobs,
        blob: Blob,
        size: int | None,
        owner: str,
        reserve_bytes: int = 0,
        opened: Callable[[Partial], None] = lambda _: None,
    ) -> None:
        self.blob = blob
        self.size = blob.size if size is None else size
        self.have = Bitmap(n_prefix_chunks(blob, size))
        self._blobs, self._reserve_bytes, self._opened = blobs, reserve_bytes, opened
        self.path = blobs.partial / f"{owner}.{blob.xfer}"
        self._log_end = blob.size + _HEADER.size
        self._seen: _Seen | None = None
        self.is_verifying = False
        with disk(blobs.folder), _NAMES:
            self._resume()

    @property
    def n_ready_bytes(self) -> int:
        """How much is there from the beginning on, without a gap."""
        gap = next(self.have.missing(), None)
        return self.size if gap is None else gap[0] * self.blob.chunk

    def write(self, index: int, data: bytes | memoryview, crc: int | None = None) -> bool:
        """Put a chunk in its place; False if it is there already or beyond the wanted prefix.

        `crc` is that of its frame, if it came in one: nothing is copied then.  Raises BadMessage for an index or a length that
        this blob does not have.
        """
        if index < 0 or not 0 < len(data) == chunk_length(self.blob, index):
            raise BadMessage(f"chunk {index} of {len(data)} bytes does not belong to {self.blob.xfer}")
        if index >= len(self.have) or index in self.have:
            return False
        if crc is None or len(data) > self._length(index):
            data = bytes(data[: self._length(index)])
            crc = checksum(index, data)
        with disk(self._blobs.folder):
            if self._reserve_bytes and shutil.disk_usage(self._blobs.folder).free < self._reserve_bytes:
                raise OSError(errno.ENOSPC, f"{self._reserve_bytes / 1e6:.0f} MB are to stay free")
            seen = self._seen or self._look()
            with _writing(self.path) as descriptor:
                if not seen.is_of(descriptor):
                    raise FileNotFoundError(errno.ENOENT, "the unfinished file was begun anew")
                _write_at(descriptor, data, index * self.blob.chunk)
                _write_at(descriptor, _RECORD.pack(index, crc), self._log_end)
        self._log_end += _RECORD.size
        if index == seen.n_chunks:
            seen.digesting.add(data)
            seen.n_chunks += 1
        return self.have.add(index)

    def finish(self, sha256: str | None = None) -> Path:
        """Verify the digest (of the whole blob unless told), move the file into the store, durably; its path.

        Cost: a read of what did not come in order, and an fsync, so call it in a thread.  Raises BadMessage when the digest
        differs; everything is deleted then, and the transfer may start again.  Raises IllegalMove while chunks are missing,
        Unavailable when it was given up or begun anew meanwhile.
        """
        if not self.have.complete:
            raise IllegalMove(f"{self.blob.xfer}: finished with {len(self.have) - self.have.count} chunks missing")
        expected = self.blob.sha256 if sha256 is None else sha256
        with _NAMES:
            self._check_latest()
            self.is_verifying = True
        try:
            with disk(self._blobs.folder), self.path.open("rb+", buffering=0) as file:
                found = self._verify(file, self._seen, expected)
        finally:
            self.is_verifying = False
            self.close()
        if found != expected:
            raise BadMessage(
                f"{self.blob.xfer} arrived with digest {found[:16]}.. instead of {expected[:16]}..: ask again"
            )
        return self._blobs.path(found)

    def close(self) -> None:
        """Let go of the descriptor, and of the digest with it: what is there already is read at the end."""
        self._seen = None

    def discard(self) -> None:
        """Delete everything of this transfer; what the disk does not let go is swept later."""
        self.close()
        with suppress(OSError), _NAMES:
            self.path.unlink(missing_ok=True)

    def _look(self) -> _Seen:
        self._seen = _Seen(self.path)
        self._opened(self)
        return self._seen

    def _verify(self, file: FileIO, seen: _Seen | None, expected: str) -> str:
        """The digest of the file, which is in the store now if it is the expected one, and nowhere otherwise."""
        digest, n_bytes = hashlib.sha256(), 0
        if seen and seen.is_of(file.fileno()) and os.fstat(file.fileno()).st_size >= self.size:  # nobody cut it
            digest, n_bytes = seen.digesting.settled(), min(self.size, seen.n_chunks * self.blob.chunk)
        file.seek(n_bytes)
        extend_digest(digest, file, self.size - n_bytes)
        if (found := digest.hexdigest()) == expected:
            file.truncate(self.size)
            os.fsync(file.fileno())
        with _NAMES:
            self._check_latest()
            if not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                raise Unavailable(f"{self.blob.xfer} was given up and begun anew while it was verified")
            if found == expected:
                self._blobs.adopt(self.path, found, is_synced=True)
            else:
                self.path.unlink()
        return found

    def _check_latest(self) -> None:
        if _LATEST.get(self.path, self) is not self:
            raise Unavailable(f"{self.blob.xfer} was begun anew before it was verified")

    def _length(self, index: int) -> int:
        return min(chunk_length(self.blob, index), self.size - index * self.blob.chunk)

    def _resume(self) -> None:
        """Take over what an earlier process left, chunk by chunk as far as it can be proved."""
        header = _HEADER.pack(_MAGIC, bytes.fromhex(self.blob.sha256), self.blob.size, self.blob.chunk)
        earlier = _LATEST.get(self.path)
        _LATEST[self.path] = self
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(self.blob.size)
            is_ours = file.read(_HEADER.size) == header
            if is_ours and not (earlier and earlier.is_verifying):
                self._take_over(file, file.read())
                return
        self.path.unlink(missing_ok=True)  # what was begun before may be just being verified: it is another file
        with self.path.open("xb") as file:
            file.seek(self.blob.size)
            file.write(header)

    def _take_over(self, file: BinaryIO, log: bytes) -> None:
        for index, crc in _records(log):
            self._log_end += _RECORD.size
            if index < len(self.have) and index not in self.have:
                file.seek(index * self.blob.chunk)
                piece = file.read(self._length(index))
                if len(piece) == self._length(index) and checksum(index, piece) == crc:
                    self.have.add(index)


class Spool:
    """Opens partial files next to the store that they end in.

    Refuses blobs above `max_bytes`, and leaves `reserve_bytes` of the disk free for what is more important.
    """

    def __init__(self, blobs: Blobs, *, max_bytes: int = 64 * 2**30, reserve_bytes: int = 0) -> None:
        self.blobs = blobs
        self.max_bytes, self.reserve_bytes = max_bytes, reserve_bytes
        self._opened: weakref.WeakKeyDictionary[Partial, None] = weakref.WeakKeyDictionary()

    def open(self, blob: Blob, *, size: int | None = None, owner: str = "self") -> Partial:
        """The partial file of `blob` (or of its first `size` bytes) from `owner`, resumed if there is one.

        The same content from two owners goes into two files: nobody can spoil another's transfer.  Cost: reads back what
        is there.  Raises BadMessage for an impossible or too big blob, Unavailable if the disk has no room for the rest.
        """
        if not is_xfer(blob.xfer) or not is_id(owner):
            raise BadMessage(f"no transfer {blob.xfer[:40]!r} of {owner[:80]!r} can be stored")
        partial_bytes = blob.size if size is None else size
        if partial_bytes > self.max_bytes:
            raise BadMessage(f"{blob.xfer} has {partial_bytes} bytes, at most {self.max_bytes} are accepted here")
        partial = Partial(self.blobs, blob, size, owner, self.reserve_bytes, self._keep_open)
        missing_bytes = min(partial_bytes, (len(partial.have) - partial.have.count) * blob.chunk)
        free_bytes = shutil.disk_usage(self.blobs.folder).free
        if missing_bytes + self.reserve_bytes > free_bytes:
            kept = f", of which {self.reserve_bytes / 1e6:.0f} MB are to stay so" if self.reserve_bytes else ""
            raise Unavailable(
                f"{self.blobs.folder}: {missing_bytes / 1e6:.0f} MB are still to come and {free_bytes / 1e6:.0f} MB are "
                f"free{kept}: make room, the transfer resumes then"
            )
        return partial

    def _keep_open(self, partial: Partial) -> None:
        """Of too many open ones, the one that was opened first is closed."""
        self._opened.pop(partial, None)
        self._opened[partial] = None
        if len(self._opened) > MAX_OPEN:
            first = next(iter(self._opened))
            del self._opened[first]
            first.close()


def _records(log: bytes) -> Iterator[tuple[int, int]]:
    """The whole records of a log; a torn last one is not there."""
    yield from _RECORD.iter_unpack(log[: len(log) - len(log) % _RECORD.size])


@contextmanager
def _writing(path: Path) -> Iterator[int]:
    """A descriptor to write to an existing file."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, or raise OSError."""
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, offset)
        view, offset = view[n:], offset + n
