"""Update files: what an agent hands in after a round, as a stream of msgpack objects that any msgpack reader can follow.

    {v, kind, job, round, attempt, dtype, matrices: deflated [[name, rank, d_out, d_in], ...],     the header, one map
     scores: [bf16 values, ...] (optional: importance of the rank-1 triplets of each matrix, descending)}
    [A bytes, B bytes]                                                    one record per matrix, in the header's order

In fp32, fp16 and bf16 these are A (r, d_in) and B (d_out, r); in int8 and NF4 (protocol/quantized.py) B is transposed, so that a
row is a component on both sides.

The lengths in a record always take the five bytes of msgpack's bin 32, so every record's place follows from the header.
A reader goes straight to one matrix, and the coordinator sums a fleet's updates holding a single matrix of each.  One that is
still coming (protocol/arriving.py) is read as far as it is here, and waited for.

The file comes from a peer: names, ranks, shapes, sizes, framing and finiteness are checked, nothing is ever unpickled, and
a fault is a BadUpdate that names the matrix.  A flipped bit inside a value is the digest's business, not this module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias, cast

import msgspec
import numpy as np
from msgspec import Meta

from protocol import files, manifest, quantized, tensors
from protocol.adapters import ALL, Adapter, Factors, Rows, Stack, Stacks, bands, few
from protocol.arriving import Source, reading, size_of
from protocol.errors import BadUpdate
from protocol.manifest import Contents, Entry, Header
from protocol.messages import MAX_MATRICES, Count, UpdateDtype, Wire
from protocol.tensors import F32, Bytes

_FRAME_BYTES: Final = 1 + 5 + 5


MAX_SCORE: Final = 1e30
_BY_COMPONENT: Final = frozenset({"int8", "nf4"})

Kind = Literal["lora", "lora-values"]
"""What the factors are: a change to the version received, or (baselines) the adapter itself after training."""


Scores = (
    Annotated[bytes, Meta(max_length=128)]
    | Annotated[list[Annotated[float, Meta(ge=0, le=MAX_SCORE)]], Meta(max_length=64)]
)
"""At most 64 of one matrix, in bf16; earlier versions sent them as numbers."""


class LoraHeader(Header, frozen=True, kw_only=True):
    """First object of an update in low-rank factors.  The scale alpha / r is already inside B: the delta is B A."""

    kind: Kind
    job: Annotated[str, Meta(max_length=64)]
    round: Count
    attempt: Count
    dtype: UpdateDtype
    matrices: msgspec.Raw
    scores: Annotated[list[Scores], Meta(max_length=MAX_MATRICES)] = []
    """By matrix, in the order of `matrices`, or none at all."""


_header: Final = msgspec.msgpack.Decoder(LoraHeader)


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """An update in low-rank factors on disk.  Holds the header and the places, no file descriptor and no values."""

    source: Source
    header: LoraHeader
    size: int
    contents: Contents
    _offsets: Sequence[int]
    """Of the first record of each group of the contents."""

    @classmethod
    def open(cls, source: Source, *, max_bytes: int) -> LoraUpdate:
        """Read the header and check that the file is exactly as long as it says.

        Raises BadUpdate, OSError; here and at every reading Unavailable for one that is not coming any more.
        """
        size = _size_within(source, max_bytes)
        header, contents, end = manifest.read_header(source, _header)
        if header.scores and len(header.scores) != len(contents.entries):
            raise BadUpdate(f"{len(header.scores)} lists of scores for {len(contents.entries)} matrices")
        _check_scores(header.scores)
        offsets = []
        for group in contents.groups:
            offsets.append(end)
            n_record = _FRAME_BYTES + sum(_lengths(contents.entries[group.start], header.dtype))
            end += (group.stop - group.start) * n_record
        if size != end:
            raise BadUpdate(f"update of {size} bytes should have {end} by its header: truncated or damaged, send again")
        return cls(source, header, size, contents, offsets)

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of every matrix in the file; 0 for a matrix that was trained and did not move."""
        return self.contents.ranks

    @property
    def scores(self) -> dict[str, list[float]]:
        """What the agent measured on the way about the importance of rank-1 triplets, descending; {} if it did not."""
        found = zip(self.contents.names, self.header.scores, strict=False)  # one for each, or none
        return {name: sorted(_numbers(scores), reverse=True) for name, scores in found if scores}

    def check(self, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises BadUpdate naming the first matrix that differs from the plan.

        The matrices must be exactly those of `ranks`, with the shapes (d_out, d_in) of the base model.  A rank may be
        lower than planned, because an agent may cut components without energy, but never higher.
        """
        if self.contents.is_of(ranks, shapes):
            return
        if stray := self.ranks.keys() ^ ranks.keys():
            name = min(stray)
            raise BadUpdate(f"matrix {name!r} is {'missing from the update' if name in ranks else 'not in the plan'}")
        for entry in self.contents.entries:
            if entry.shape != shapes[entry.name]:
                raise BadUpdate(f"matrix {entry.name!r} has shape {entry.shape}, the base has {shapes[entry.name]}")
            if entry.rank > ranks[entry.name]:
                raise BadUpdate(f"matrix {entry.name!r} has rank {entry.rank}, planned was {ranks[entry.name]}")

    def check_values(self) -> None:
        """Read everything once, a few values at a time.  Raises BadUpdate for bad framing or a value that is not finite."""
        for group in self.contents.groups:
            entry = self.contents.entries[group.start]
            for part in few(group, entry.rank * sum(entry.shape)):
                names = self.contents.names[part]
                for rows in bands(entry.rank, entry.shape) if len(names) == 1 and self._is_plain else [ALL]:
                    _check_finite(names, self.stack(names, rows))

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of one matrix.  Raises KeyError for an unknown name."""
        return self.contents.shapes[name]

    def factors(self, name: str) -> Factors:
        """A and B of one matrix as float32.  Raises KeyError for an unknown name, BadUpdate when the file is damaged."""
        (factors,) = self.stack([name])
        return factors

    def stack(self, names: Sequence[str], rows: Rows = ALL) -> Stack:
        """Those of matrices of one shape and rank that stand one behind the other in the file.  Raises as `factors`.

        With `rows` these of each side alone, for which no more of a single matrix is read, unless it lies there by component.
        """
        if rows is not ALL:
            is_alone = len(names) == 1 and self._is_plain
            return self._band(names[0], rows) if is_alone else self.stack(names).rows(rows)
        number, place = self.contents.place(names[0])
        entry = self.contents.entries[self.contents.groups[number].start]
        n_a, n_b = _lengths(entry, self.header.dtype)
        n_record, opening = _FRAME_BYTES + n_a + n_b, _open_a(n_a)
        with reading(self.source) as read:
            data = read(len(names) * n_record, self._offsets[number] + place * n_record)
        if len(data) == len(names) * n_record:
            records = np.frombuffer(data, np.uint8).reshape(len(names), n_record)
            frame = np.frombuffer(opening + _bin(n_b), np.uint8)
            at = len(opening) + n_a
            sound = (records[:, : len(opening)] == frame[: len(opening)]).all(axis=1)
            sound &= (records[:, at : at + 5] == frame[len(opening) :]).all(axis=1)
            if sound.all():
                return _decode(
                    ((entry.rank, entry.d_in), (entry.d_out, entry.rank)),
                    records[:, len(opening) : at],
                    records[:, at + 5 :],
                    self.header.dtype,
                )
        else:
            sound = np.arange(len(names)) < len(data) // n_record
        raise _damaged(names[int(np.argmin(sound))])

    def _band(self, name: str, rows: Rows) -> Stack:
        number, place = self.contents.place(name)
        entry, dtype = self.contents.entries[self.contents.groups[number].start], cast("Wire", self.header.dtype)
        n_a, n_b = _lengths(entry, dtype)
        at, found = self._offsets[number] + place * (_FRAME_BYTES + n_a + n_b), []
        sides = (_open_a(n_a), entry.rank, entry.d_in), (_bin(n_b), entry.d_out, entry.rank)
        with reading(self.source) as read:
            for (opening, n_rows, width), part in zip(sides, rows, strict=True):
                start, stop, _ = part.indices(n_rows)
                n_row, first = width * tensors.ITEM_BYTES[dtype], at + len(opening)
                data = read((stop - start) * n_row, first + start * n_row)
                if read(len(opening), at) != opening or len(data) != (stop - start) * n_row:
                    raise _damaged(name)
                found.append(tensors.decode(data, (1, stop - start, width), dtype))
                at = first + n_rows * n_row
        return Stack(*found)

    @property
    def _is_plain(self) -> bool:
        return self.header.dtype not in _BY_COMPONENT


Update: TypeAlias = LoraUpdate
"""Any update on disk; other kinds (seed scalars, dense deltas) join this union and the match in `open_update`."""


def open_update(source: Source, kind: str, *, job: str, round: int, attempt: int, max_bytes: int) -> Update:  # noqa: A002
    """Open an update of `kind` that must belong to this job, round and attempt.  Raises as LoraUpdate.open."""
    match kind:
        case "lora" | "lora-values":
            update = LoraUpdate.open(source, max_bytes=max_bytes)
        case _:
            raise BadUpdate(f"no reader for updates of kind {kind[:64]!r}: upgrade this side")
    header = update.header
    if header.kind != kind:
        raise BadUpdate(f"an update of kind {header.kind!r} offered as {kind!r}")
    if (header.job, header.round, header.attempt) != (job, round, attempt):
        raise BadUpdate(
            f"update of {header.job} round {header.round}.{header.attempt} offered as {job} round {round}.{attempt}"
        )
    return update


def write_update(
    path: Path,
    adapter: Adapter,
    *,
    job: str,
    round: int,  # noqa: A002
    attempt: int,
    dtype: UpdateDtype,
    kind: Kind = "lora",
    scores: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> int:
    """Write `adapter` as an update of `kind`, with the scores of some of its matrices, and return its size in bytes.

    The file is whole when this returns; who wants it to outlive a power cut syncs it.

    Raises BadUpdate, and leaves `path` as it was, when a value is not finite in `dtype`: training diverged, or fp16 is too
    narrow for it.
    """
    stacks = Stacks.of(adapter)
    header = LoraHeader(
        v=manifest.VERSION,
        kind=kind,
        job=job,
        round=round,
        attempt=attempt,
        dtype=dtype,
        matrices=manifest.deflated(manifest.packed_entries(stacks)),
        scores=[_packed(scores.get(name, ())) for name in stacks] if scores else [],
    )
    with files.replacing(path, is_synced=False) as file:
        file.write(manifest.pack_header(header))
        for names, stack in stacks.few():
            file.write(_records(names, stack, dtype))
        return file.tell()


def _packed(scores: Sequence[float]) -> bytes:
    return tensors.encode(np.array(scores, np.float32), "bf16")


def _numbers(scores: bytes | list[float]) -> list[float]:
    if isinstance(scores, list):
        return scores
    found: list[float] = tensors.decode(scores, (len(scores) // 2,), "bf16").tolist()
    return found


def _check_scores(scores: Sequence[bytes | list[float]]) -> None:
    for one in scores:
        if (isinstance(one, bytes) and len(one) % 2) or not all(0 <= score <= MAX_SCORE for score in _numbers(one)):
            raise BadUpdate(f"scores must be numbers from 0 to {MAX_SCORE:g}")


def _records(names: Sequence[str], stack: Stack, dtype: UpdateDtype) -> bytes:
    """Those of matrices of one shape and rank.  Raises BadUpdate for a value that is not finite in `dtype`."""
    a, b = _encode(stack.a, dtype), _encode(stack.b.transpose(0, 2, 1) if dtype in _BY_COMPONENT else stack.b, dtype)
    _check_finite(names, stack if dtype == "fp32" else _decode(stack.shapes, a, b, dtype))
    (_, n_a), (_, n_b) = a.shape, b.shape
    opening, middle = np.frombuffer(_open_a(n_a), np.uint8), np.frombuffer(_bin(n_b), np.uint8)
    return np.hstack([np.tile(opening, (len(names), 1)), a, np.tile(middle, (len(names), 1)), b]).tobytes()


def _encode(arrays: F32, dtype: UpdateDtype) -> Bytes:
    """Bytes of arrays (k, r, d), each a row."""
    match dtype:
        case "int8" | "nf4":
            encoded = b"".join(quantized.encode(array, dtype) for array in arrays)
        case _:
            encoded = tensors.encode(arrays, dtype)
    return np.frombuffer(encoded, np.uint8).reshape(len(arrays), -1)


def _decode(shapes: tuple[tuple[int, int], tuple[int, int]], a: Bytes, b: Bytes, dtype: UpdateDtype) -> Stack:
    """The way back; `shapes` are those of A and B of each matrix."""
    (rank, d_in), (d_out, _) = shapes
    match dtype:
        case "int8" | "nf4":
            rows = [quantized.decode(memoryview(row), (rank, d_in), dtype) for row in a]
            columns = [quantized.decode(memoryview(row), (rank, d_out), dtype).T for row in b]
            return Stack(np.stack(rows), np.stack(columns))
        case _:
            n = len(a)
            return Stack(tensors.decode(a, (n, rank, d_in), dtype), tensors.decode(b, (n, d_out, rank), dtype))


def _size_within(source: Source, max_bytes: int) -> int:
    size = size_of(source)
    if size > max_bytes:
        raise BadUpdate(f"update of {size} bytes exceeds the {max_bytes} of the plan")
    return size


def _lengths(entry: Entry, dtype: UpdateDtype) -> tuple[int, int]:
    try:
        return size_bytes((entry.rank, entry.d_in), dtype), size_bytes((entry.rank, entry.d_out), dtype)
    except BadUpdate as error:
        raise BadUpdate(f"matrix {entry.name!r}: {error}") from None


def size_bytes(shape: tuple[int, int], dtype: UpdateDtype) -> int:
    """How many bytes one factor of `shape` (r, d) takes in an update.  Raises BadUpdate for a shape that is out of bounds."""
    match dtype:
        case "int8" | "nf4":
            return quantized.size_bytes(shape, dtype)
        case _:
            return tensors.size_bytes(shape, dtype)


def _bin(n_bytes: int) -> bytes:
    return b"\xc6" + n_bytes.to_bytes(4, "big")


def _open_a(n_bytes: int) -> bytes:
    return b"\x92" + _bin(n_bytes)


def _damaged(name: str) -> BadUpdate:
    return BadUpdate(f"record of matrix {name!r} is damaged: send the update again")


def _check_finite(names: Sequence[str], stack: Stack) -> None:
    """One look at all of them, and one at each only when something is wrong."""
    if not (np.isfinite(stack.a).all() and np.isfinite(stack.b).all()):
        for name, a, b in zip(names, stack.a, stack.b, strict=True):
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise BadUpdate(f"matrix {name!r} has values that are not finite numbers")
