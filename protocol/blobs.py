"""Files by content: a folder in which every name is the sha256 of what it names.

So a file that is there is whole and right, writing the same twice is free, and nobody asks which version this is.  A name
appears only by rename after fsync: a crash leaves a temporary file behind, never a wrong blob.  This module and the spool of
unfinished files are on disk because bytes of this size do not pass through the sans-IO cores; those speak digests.

Everything here blocks for as long as the disk does: hashing runs at about 1.5 GB/s, call it in a thread for big files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

from protocol.errors import BadMessage, Unavailable
from protocol.files import sync_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_BYTES: Final = 2**18


class Blobs:
    """A content-addressed store in `folder`, which is created.  `folder / "partial"` holds what is not finished.

    Several processes may use the same folder.  Raises Unavailable when the disk refuses, BadMessage for a name that is no
    digest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.partial = folder / "partial"
        with disk(folder):
            self.partial.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        if _DIGEST.fullmatch(sha256) is None:
            raise BadMessage(f"not a sha256 digest: {sha256[:80]!r}")
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        """Whether the blob is here, whole."""
        return self.path(sha256).is_file()

    def put_bytes(self, data: bytes) -> str:
        """Store `data` durably; its digest."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has(sha256):
            with self.temporary() as temporary:
                temporary.write_bytes(data)
                self.adopt(temporary, sha256)
        return sha256

    def put_file(self, source: Path) -> str:
        """Store a copy of `source` durably; its digest."""
        with self.temporary() as temporary:
            shutil.copyfile(source, temporary)
            return self.adopt(temporary, digest_file(temporary)[0])

    def adopt(self, source: Path, sha256: str, *, is_synced: bool = False) -> str:
        """Move `source`, on the same file system and known to have this digest, into the store, durably.

        `is_synced` says that what is in it is on disk already.
        """
        target = self.path(sha256)
        with disk(self.folder):
            if not is_synced:
                with source.open("rb+") as file:
                    os.fsync(file.fileno())
            source.replace(target)
            sync_folder(self.folder)
        return sha256

    def delete(self, sha256: str) -> None:
        """Forget a blob; one that is not here is no error, and one that the disk does not let go is a blob too many."""
        with suppress(OSError):
            self.path(sha256).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        """Digests of all blobs, in no order."""
        with os.scandir(self.folder) as entries:
            yield from [entry.name for entry in entries if _DIGEST.fullmatch(entry.name)]

    def total_bytes(self) -> int:
        """Size of all blobs, without unfinished files."""
        with os.scandir(self.folder) as entries:
            return sum(entry.stat().st_size for entry in entries if _DIGEST.fullmatch(entry.name))

    def sweep(self, older_than_s: float) -> int:
        """Delete unfinished files that nobody wrote to for so long; how many."""
        oldest, n = time.time() - older_than_s, 0
        for path in self.partial.iterdir():
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    n += 1
        return n

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path of its own for a file that is to be adopted; what is left there at the end of the block is deleted."""
        path = self.partial / f"new-{uuid4().hex}"
        try:
            with disk(self.folder):
                yield path
        finally:
            with suppress(OSError):  # a disk that is read-only by now
                path.unlink(missing_ok=True)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turns an OSError within into Unavailable with a text that names the folder and the space left."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"{folder}: {error} ({_room(folder)}): "
            "make room or check the disk; what is there already is intact and will be used"
        ) from error


def _room(folder: Path) -> str:
    """Free space there, or on the way there if the folder could not even be created."""
    for known in (folder, *folder.parents):
        with suppress(OSError):
            return f"{shutil.disk_usage(known).free / 1e6:.0f} MB free"
    return "free space unknown"


def digest_file(path: Path) -> tuple[str, int]:
    """The sha256 (hex) and size in bytes of a file."""
    with path.open("rb") as file:
        return digest(file)


def digest(file: BufferedReader) -> tuple[str, int]:
    """The sha256 (hex) and size in bytes of what is to be read from the beginning on."""
    return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def digest_prefixes(path: Path, sizes: Sequence[int]) -> list[str]:
    """The sha256 (hex) of the first n bytes, for each n of `sizes` in the order given; one pass over the file.

    Raises ValueError if the file is shorter than the largest.
    """
    found: dict[int, str] = {}
    state, position = hashlib.sha256(), 0
    with path.open("rb") as file:
        for size in sorted(set(sizes)):
            if (missing := size - position - extend_digest(state, file, size - position)) > 0:
                raise ValueError(f"the file ends {missing} bytes before the prefix does")
            position = size
            found[size] = state.hexdigest()
    return [found[size] for size in sizes]


def extend_digest(state: hashlib._Hash, file: BinaryIO, n_bytes: int) -> int:
    """Add the next bytes of `file` to a digest, at most `n_bytes`; how many there were."""
    left = n_bytes
    while left and (block := file.read(min(left, _READ_BYTES))):
        state.update(block)
        left -= len(block)
    return n_bytes - left
