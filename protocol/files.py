"""Files that are either whole or not there: written beside their place, made durable, then renamed into it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EAGER_BYTES: Final = 2**19
BUFFER_BYTES: Final = 2**16

_sync_file_range: Final = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_RANGE_WRITE: Final = 2


class _Eager(FileIO):
    """Has the disk begin with what was written since it last did, whenever that is much."""

    _begun = 0

    def write(self, data: ReadableBuffer, /) -> int:
        n_bytes = super().write(data)
        end = self.tell()
        if end - self._begun >= EAGER_BYTES:
            start_writing(self, self._begun, end - self._begun)
            self._begun = end
        return n_bytes


@contextmanager
def replacing(path: Path, *, is_synced: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content becomes `path` at the end of the block, durably; an error leaves `path` as it was.

    Without `is_synced` it is whole, but whoever wants it to outlive a power cut syncs it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with BufferedWriter(_Eager(part, "w"), BUFFER_BYTES) as file:
            yield file
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if is_synced:
        sync_folder(path.parent)


def start_writing(file: BinaryIO | FileIO, offset: int = 0, n_bytes: int = 0) -> None:
    """Have the disk begin to write what is new there (0 bytes: to the end), so that an fsync later waits less; a hint, no promise.

    sync_file_range(2) with SYNC_FILE_RANGE_WRITE, which Linux has; elsewhere nothing happens.
    """
    if _sync_file_range:
        _sync_file_range(file.fileno(), offset, n_bytes, _RANGE_WRITE)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset` on; fewer, or none, where the file has no more or is gone."""
    try:
        with path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)
    except OSError:
        return b""


def give_to_folder(path: Path) -> None:
    """What root makes in a daemon's folder is the daemon's.  Raises OSError."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is not until its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
