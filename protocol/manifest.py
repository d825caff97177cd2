"""How every adapter file opens: one msgpack map that says what follows, read with the limits of a hostile peer.

The map lists the matrices as [name, rank, d_out, d_in], sorted by name.  From it follow the place and the length of every
byte behind it, so a file is checked whole (its size must match exactly) before a single value is read.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, BinaryIO, Final, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from protocol.adapters import Adapter
from protocol.errors import BadUpdate
from protocol.messages import MAX_MATRICES, Name

VERSION: Final = 1
MAX_HEADER_BYTES: Final = 8 * 2**20
"""20,000 matrices with names of 200 bytes take 4.4 MB."""

Dimension = Annotated[int, Meta(ge=1, le=2**24)]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One matrix of a file: [name, rank, d_out, d_in]."""

    name: Name
    rank: Annotated[int, Meta(ge=0, le=1024)]
    d_out: Dimension
    d_in: Dimension

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.d_out, self.d_in


Entries = Annotated[list[Entry], Meta(max_length=MAX_MATRICES)]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What all headers have; `kind` says which reader understands the rest."""

    v: int
    kind: Annotated[str, Meta(max_length=64)]


H = TypeVar("H", bound=Header)


def entries_of(adapter: Adapter) -> list[Entry]:
    """The table of contents of `adapter`, sorted by name."""
    return [Entry(name, factors.rank, *factors.shape) for name, factors in sorted(adapter.items())]


def pack_header(header: Header) -> bytes:
    """The header as one msgpack map."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(header, builtin_types=(bytes,)), use_bin_type=True)
    return packed


class _Head(msgspec.Struct):
    v: int


def read_header(path: Path, kind: type[H]) -> tuple[H, int]:
    """The header at the start of `path` and its length in bytes, which is where the values start.

    Raises BadUpdate for anything that is not such a header; reads and allocates in proportion to the header, not the file.
    """
    with path.open("rb") as file:
        packed = _first_object(file)
    try:
        if (found := _version(packed)) != VERSION:
            raise BadUpdate(f"file version {found} is not {VERSION}: upgrade the older side")
        return msgspec.msgpack.decode(packed, type=kind), len(packed)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise BadUpdate(f"invalid header: {error}"[:400]) from None


def _first_object(file: BinaryIO) -> bytes:
    """The bytes of the first msgpack object: found by skipping it, because to build it would believe its lengths."""
    unpacker = msgpack.Unpacker(file, read_size=64 * 1024, max_buffer_size=MAX_HEADER_BYTES)
    try:
        unpacker.skip()
    except (ValueError, msgpack.UnpackException) as error:
        raise BadUpdate(f"no msgpack header within the limits: {type(error).__name__}: {error}"[:400]) from None
    file.seek(0)
    return file.read(unpacker.tell())


def _version(packed: bytes) -> int | str:
    try:
        return msgspec.msgpack.decode(packed, type=_Head).v
    except msgspec.ValidationError as error:
        return f"({error})"[:80]


def check_sorted(entries: list[Entry]) -> None:
    """Raises BadUpdate unless the names are unique and in order, so that equal content has equal bytes."""
    for before, after in pairwise(entries):
        if before.name >= after.name:
            raise BadUpdate(f"matrices are not sorted by name: {after.name!r} follows {before.name!r}")
