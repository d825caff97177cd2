"""Training checkpoints on disk: how far a share's training is, so that after a restart within the round it goes on from there.

    "fpcp" | u32 length of the header | header, msgpack | tensors, raw | sha256 of all before

One file, the newest point; it appears whole or not at all.  It belongs to what its key says (the caller lists all that the
training depends on): another key, another version or a damaged byte makes it no checkpoint, and training begins afresh.

Tensors pass one by one in both directions: nothing of the size of an adapter is held twice.  torch is not imported; what the
bytes mean is told in agent/trainers/resuming.py.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import msgspec

from protocol.files import replacing
from protocol.messages import Evaluated

logger = logging.getLogger(__name__)

MAGIC: Final = b"fpcp"
VERSION: Final = 1
LENGTH: Final = struct.Struct(">I")
DIGEST_BYTES: Final = 32
BLOCK_BYTES: Final = 2**20


class Point(NamedTuple):
    """Between two optimizer steps: how many were made, over what, the sum of their losses and the seconds they took."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Mean over the steps; None before the first."""
        return self.loss_sum / self.steps if self.steps else None


ORIGIN: Final = Point()


class Entry(msgspec.Struct, frozen=True):
    """One tensor of the file: its name, torch's name of its type, its shape, its size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is of: a share of this round of this job, if the key is the same.

    `rng` holds the states of random generators by name, `evaluated` what needs no repeating.
    """

    v: int = VERSION
    key: str
    job: str
    round: int
    point: Point
    evaluated: Evaluated | None = None
    rng: dict[str, bytes] = {}
    tensors: list[Entry] = []


class Stored(NamedTuple):
    """A checkpoint that was found whole; `at_byte` is where its tensors begin."""

    path: Path
    header: Header
    at_byte: int

    def tensors(self) -> Iterator[tuple[Entry, bytearray]]:
        """Every tensor's entry and bytes, in the order of the file.  Raises OSError."""
        with self.path.open("rb") as file:
            file.seek(self.at_byte)
            for entry in self.header.tensors:
                data = bytearray(entry.n_bytes)
                file.readinto(data)
                yield entry, data


def write(path: Path, header: Header, tensors: Iterable[memoryview]) -> int:
    """Put a checkpoint in the place of the one before, durably; its size in bytes.

    Raises OSError when the disk refuses; the one before stays then.  Cost: one pass of sha256 and one fsync.
    """
    packed = msgspec.msgpack.encode(header)
    head: tuple[bytes | memoryview, ...] = (MAGIC, LENGTH.pack(len(packed)), packed)
    digest = hashlib.sha256()
    with replacing(path) as file:
        for part in chain(head, tensors):
            file.write(part)
            digest.update(part)
        return file.tell() + file.write(digest.digest())


def find(path: Path, key: str) -> Stored | None:
    """The checkpoint at `path` if it is one of `key`; anything else is None, with a line in the log for what is damaged.

    Cost: reads the whole file once.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            if header.key != key:
                return None
            at_byte = file.tell()
            _check_digest(file)
            if at_byte + sum(entry.n_bytes for entry in header.tensors) + DIGEST_BYTES != path.stat().st_size:
                raise ValueError("its tensors do not fill it")
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, OSError, ValueError) as error:
        logger.warning("checkpoint not used, training begins afresh: %s", error, extra={"action": "checkpoint_lost"})
        return None
    return Stored(path, header, at_byte)


def steps_at(path: Path, job: str, round_: int) -> int | None:
    """After how many steps the checkpoint at `path` was made, by its own word; None if it is none of this round.  Cheap."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
    except (msgspec.MsgspecError, OSError, ValueError):
        return None
    return header.point.steps if (header.job, header.round) == (job, round_) else None


def _read_header(file: BinaryIO) -> Header:
    head = file.read(len(MAGIC) + LENGTH.size)
    if len(head) != len(MAGIC) + LENGTH.size or not head.startswith(MAGIC):
        raise ValueError("it is no checkpoint")
    (length,) = LENGTH.unpack_from(head, len(MAGIC))
    packed = file.read(length)
    version = _versioned.decode(packed).v
    if version != VERSION:
        raise ValueError(f"it has format version {version}, this software writes {VERSION}")
    return _header.decode(packed)


class _Versioned(msgspec.Struct, frozen=True):
    v: int


_versioned: Final = msgspec.msgpack.Decoder(_Versioned)
_header: Final = msgspec.msgpack.Decoder(Header)


def _check_digest(file: BinaryIO) -> None:
    """The last bytes must be the digest of all before."""
    end = file.seek(0, 2) - DIGEST_BYTES
    file.seek(0)
    digest = hashlib.sha256()
    while (left := end - file.tell()) > 0 and (block := file.read(min(left, BLOCK_BYTES))):
        digest.update(block)
    if file.read() != digest.digest():
        raise ValueError("its digest is not that of its content")
