"""How every adapter file opens: one msgpack map that says what follows, read with the limits of a hostile peer.

The map lists the matrices as [name, rank, d_out, d_in], sorted by name.  From it follow the place and the length of every
byte behind it, so a file is checked whole (its size must match exactly) before a single value is read.

In an update the list is deflated (RFC 1950): names of a model's matrices repeat each other, and beside the few bits of a small
update they would count.  Both forms are read everywhere.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, repeat
from operator import attrgetter
from typing import Annotated, Final, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from protocol.adapters import Stacks, alike
from protocol.arriving import Read, Source, reading
from protocol.errors import BadUpdate
from protocol.messages import MAX_MATRICES, Name

VERSION: Final = 1
MAX_HEADER_BYTES: Final = 8 * 2**20
"""20,000 matrices with names of 200 bytes take 4.4 MB."""
_READ_BYTES: Final = 64 * 2**10

Dimension = Annotated[int, Meta(ge=1, le=2**24)]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
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
    """What all headers begin with; `kind` says which reader understands the rest.  Each has a field `matrices`, of Entries."""

    v: int
    kind: Annotated[str, Meta(max_length=64)]


H = TypeVar("H", bound=Header)


@dataclass(frozen=True, eq=False)
class Contents:
    """The table of contents of a file, and what follows from it: worked out once for all files that have the same.

    Where `groups` lie are entries of one shape and rank.
    """

    raw: msgspec.Raw
    entries: Sequence[Entry]
    _asked: list[tuple[Mapping[str, int], Mapping[str, tuple[int, int]]]] = field(default_factory=list, repr=False)
    """What it was last found to be of."""

    @cached_property
    def names(self) -> list[str]:
        """In order."""
        return [entry.name for entry in self.entries]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of each matrix; 0 for one that was trained and did not move."""
        return {entry.name: entry.rank for entry in self.entries}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of each matrix."""
        return {entry.name: entry.shape for entry in self.entries}

    def is_of(self, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Whether exactly these are its matrices.  Asked again with the same two maps, which must not change, it costs nothing."""
        for known_ranks, known_shapes in self._asked:
            if known_ranks is ranks and known_shapes is shapes:
                return True
        if (self.ranks, self.shapes) != (ranks, shapes):
            return False
        self._asked[:] = [(ranks, shapes)]
        return True

    @cached_property
    def groups(self) -> list[slice]:
        """Runs of entries of one shape and rank."""
        return list(alike(self.entries, attrgetter("rank", "d_out", "d_in")))

    @cached_property
    def _starts(self) -> list[int]:
        return [group.start for group in self.groups]

    def place(self, name: str) -> tuple[int, int]:
        """The number of the group that a matrix is in, and its place there.  Raises KeyError for an unknown name."""
        at = bisect_left(self.names, name)
        if at == len(self.names) or self.names[at] != name:
            raise KeyError(name)
        number = bisect_right(self._starts, at) - 1
        return number, at - self._starts[number]


_BIN: Final = (b"\xc4", b"\xc5", b"\xc6")
"""How bytes begin in msgpack."""
_entries: Final = msgspec.msgpack.Decoder(Entries)


@lru_cache(maxsize=4)
def _contents(packed: bytes) -> Contents:
    """Kept for a few: the updates of a round, and the models of a job, have the same table or nearly."""
    entries = _entries.decode(_inflated(packed))
    for before, after in pairwise(entries):
        if before.name >= after.name:  # equal content has equal bytes
            raise BadUpdate(f"matrices are not sorted by name: {after.name!r} follows {before.name!r}")
    return Contents(msgspec.Raw(packed), entries)


def _inflated(packed: bytes) -> bytes:
    if packed[:1] not in _BIN:
        return packed
    inflating = zlib.decompressobj()
    try:
        found = inflating.decompress(msgspec.msgpack.decode(packed, type=bytes), MAX_HEADER_BYTES)
    except zlib.error as error:
        raise BadUpdate(f"the list of matrices is damaged: {error}") from None
    if not inflating.eof or inflating.unused_data:
        raise BadUpdate(f"the list of matrices is cut off, followed by something, or above {MAX_HEADER_BYTES} bytes")
    return found


def packed_entries(stacks: Stacks) -> msgspec.Raw:
    """The table of contents of an adapter whose names are in order."""
    found: list[Entry] = []
    for names, stack in stacks.runs:
        (rank, d_in), (d_out, _) = stack.shapes
        found += map(Entry, names, repeat(rank), repeat(d_out), repeat(d_in))
    return msgspec.Raw(msgspec.msgpack.encode(found))


def deflated(entries: msgspec.Raw) -> msgspec.Raw:
    """The same, small."""
    return msgspec.Raw(msgspec.msgpack.encode(zlib.compress(entries, 1)))


def pack_header(header: Header) -> bytes:
    """The header as one msgpack map."""
    return msgspec.msgpack.encode(header)


class _Head(msgspec.Struct):
    v: int


class _Listed(msgspec.Struct):
    matrices: msgspec.Raw


# Made when this is imported, as that of every kind of header: msgspec 0.22 works a type out when it is first decoded, and while one
# thread is at it, another that decodes the same type ends the process.  Headers are read by several at a time.
_head: Final = msgspec.msgpack.Decoder(_Head)
_listed: Final = msgspec.msgpack.Decoder(_Listed)


def read_header(source: Source, kind: msgspec.msgpack.Decoder[H]) -> tuple[H, Contents, int]:
    """The header at the start of `source`, its table of contents, and its length in bytes, which is where the values start.

    `kind` decodes one kind of header; it is made by a module, not by a call.  Raises BadUpdate for anything that is not such a header; reads and allocates in proportion to the header, not the file.
    """
    with reading(source) as read:
        packed = _first_object(read)
    try:
        if (found := _version(packed)) != VERSION:
            raise BadUpdate(f"file version {found} is not {VERSION}: upgrade the older side")
        header = kind.decode(packed)
        contents = _contents(bytes(_listed.decode(packed).matrices))
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise BadUpdate(f"invalid header: {error}"[:400]) from None
    return msgspec.structs.replace(header, matrices=contents.raw), contents, len(packed)


def _first_object(read: Read) -> bytes:
    """The bytes of the first msgpack object: found by skipping it, because to build it would believe its lengths."""
    unpacker, found = msgpack.Unpacker(read_size=_READ_BYTES, max_buffer_size=MAX_HEADER_BYTES), bytearray()
    while piece := read(_READ_BYTES, len(found)):
        found += piece
        try:
            unpacker.feed(piece)
            unpacker.skip()
        except msgpack.OutOfData:
            continue
        except (ValueError, msgpack.UnpackException) as error:
            raise BadUpdate(f"no msgpack header within the limits: {type(error).__name__}: {error}"[:400]) from None
        return bytes(found[: unpacker.tell()])
    raise BadUpdate(f"no msgpack header within the limits: the file ends after {len(found)} bytes")


def _version(packed: bytes) -> int | str:
    try:
        return _head.decode(packed).v
    except msgspec.ValidationError as error:
        return f"({error})"[:80]
