"""Update files: what an agent hands in after a round, as a stream of msgpack objects that any msgpack reader can follow.

    {v, kind, job, round, attempt, dtype, matrices: [[name, rank, d_out, d_in], ...],              the header, one map
     scores: [[float, ...], ...] (optional: importance of the rank-1 triplets of each matrix, descending)}
    [A bytes, B bytes]                                                    one record per matrix, in the header's order

The lengths in a record always take the five bytes of msgpack's bin 32, so every record's place follows from the header.
A reader goes straight to one matrix, and the coordinator sums a fleet's updates holding a single matrix of each.

The file comes from a peer: names, ranks, shapes, sizes, framing and finiteness are checked, nothing is ever unpickled, and
a fault is a BadUpdate that names the matrix.  A flipped bit inside a value is the digest's business, not this module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
from msgspec import Meta

from protocol import files, manifest, tensors
from protocol.adapters import Adapter, Factors
from protocol.errors import BadUpdate
from protocol.manifest import Entries, Entry, Header
from protocol.messages import MAX_MATRICES, Count, Wire

_FRAME_BYTES: Final = 1 + 5 + 5


Kind = Literal["lora", "lora-values"]
"""What the factors are: a change to the version received, or (baselines) the adapter itself after training."""


Scores = Annotated[list[Annotated[float, Meta(ge=0, le=1e30)]], Meta(max_length=64)]


class LoraHeader(Header, frozen=True, kw_only=True):
    """First object of an update in low-rank factors.  The scale alpha / r is already inside B: the delta is B A."""

    kind: Kind
    job: Annotated[str, Meta(max_length=64)]
    round: Count
    attempt: Count
    dtype: Wire
    matrices: Entries
    scores: Annotated[list[Scores], Meta(max_length=MAX_MATRICES)] = []
    """By matrix, in the order of `matrices`, or none at all."""


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """An update in low-rank factors on disk.  Holds the header and the places, no file descriptor and no values."""

    path: Path
    header: LoraHeader
    size: int
    _places: Mapping[str, tuple[Entry, int]]

    @classmethod
    def open(cls, path: Path, *, max_bytes: int) -> LoraUpdate:
        """Read the header and check that the file is exactly as long as it says.  Raises BadUpdate, OSError."""
        size = _size_within(path, max_bytes)
        header, end = manifest.read_header(path, LoraHeader)
        manifest.check_sorted(header.matrices)
        if header.scores and len(header.scores) != len(header.matrices):
            raise BadUpdate(f"{len(header.scores)} lists of scores for {len(header.matrices)} matrices")
        places: dict[str, tuple[Entry, int]] = {}
        for entry in header.matrices:
            places[entry.name] = entry, end
            end += _FRAME_BYTES + sum(_lengths(entry, header.dtype))
        if size != end:
            raise BadUpdate(f"update of {size} bytes should have {end} by its header: truncated or damaged, send again")
        return cls(path, header, size, places)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every matrix in the file; 0 for a matrix that was trained and did not move."""
        return {entry.name: entry.rank for entry in self.header.matrices}

    @property
    def scores(self) -> dict[str, list[float]]:
        """What the agent measured on the way about the importance of rank-1 triplets, descending; {} if it did not."""
        found = zip(self.header.matrices, self.header.scores, strict=False)  # one for each, or none
        return {entry.name: sorted(scores, reverse=True) for entry, scores in found if scores}

    def check(self, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raises BadUpdate naming the first matrix that differs from the plan.

        The matrices must be exactly those of `ranks`, with the shapes (d_out, d_in) of the base model.  A rank may be
        lower than planned, because an agent may cut components without energy, but never higher.
        """
        if stray := self.ranks.keys() ^ ranks.keys():
            name = min(stray)
            raise BadUpdate(f"matrix {name!r} is {'missing from the update' if name in ranks else 'not in the plan'}")
        for entry in self.header.matrices:
            if entry.shape != shapes[entry.name]:
                raise BadUpdate(f"matrix {entry.name!r} has shape {entry.shape}, the base has {shapes[entry.name]}")
            if entry.rank > ranks[entry.name]:
                raise BadUpdate(f"matrix {entry.name!r} has rank {entry.rank}, planned was {ranks[entry.name]}")

    def check_values(self) -> None:
        """Read everything once, one matrix at a time.  Raises BadUpdate for bad framing or a value that is not finite."""
        for name in self._places:
            _check_finite(name, self.factors(name))

    def factors(self, name: str) -> Factors:
        """A and B of one matrix as float32.  Raises KeyError for an unknown name, BadUpdate when the file is damaged."""
        entry, offset = self._places[name]
        n_a, n_b = _lengths(entry, self.header.dtype)
        with self.path.open("rb") as file:
            file.seek(offset)
            record = memoryview(file.read(_FRAME_BYTES + n_a + n_b))
        if len(record) != _FRAME_BYTES + n_a + n_b or record[:6] != _open_a(n_a) or record[6 + n_a :][:5] != _bin(n_b):
            raise BadUpdate(f"record of matrix {name!r} is damaged: send the update again")
        a = tensors.decode(record[6 : 6 + n_a], (entry.rank, entry.d_in), self.header.dtype)
        b = tensors.decode(record[11 + n_a :], (entry.d_out, entry.rank), self.header.dtype)
        return Factors(a, b)


Update: TypeAlias = LoraUpdate
"""Any update on disk; other kinds (seed scalars, dense deltas) join this union and the match in `open_update`."""


def open_update(path: Path, kind: str, *, job: str, round: int, attempt: int, max_bytes: int) -> Update:  # noqa: A002
    """Open an update of `kind` that must belong to this job, round and attempt.  Raises BadUpdate, OSError."""
    match kind:
        case "lora" | "lora-values":
            update = LoraUpdate.open(path, max_bytes=max_bytes)
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
    dtype: Wire,
    kind: Kind = "lora",
    scores: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> int:
    """Write `adapter` as an update of `kind`, with the scores of some of its matrices, and return its size in bytes.

    On disk when this returns.

    Raises BadUpdate, and leaves `path` as it was, when a value is not finite in `dtype`: training diverged, or fp16 is too
    narrow for it.
    """
    header = LoraHeader(
        v=manifest.VERSION,
        kind=kind,
        job=job,
        round=round,
        attempt=attempt,
        dtype=dtype,
        matrices=manifest.entries_of(adapter),
        scores=[[float(score) for score in scores.get(name, ())] for name in sorted(adapter)] if scores else [],
    )
    with files.replacing(path) as file:
        file.write(manifest.pack_header(header))
        for entry in header.matrices:
            file.write(_record(entry, adapter[entry.name], dtype))
        return file.tell()


def _record(entry: Entry, factors: Factors, dtype: Wire) -> bytes:
    a, b = tensors.encode(factors.a, dtype), tensors.encode(factors.b, dtype)
    sent = Factors(tensors.decode(a, factors.a.shape, dtype), tensors.decode(b, factors.b.shape, dtype))
    _check_finite(entry.name, sent)
    return _open_a(len(a)) + a + _bin(len(b)) + b


def _size_within(path: Path, max_bytes: int) -> int:
    size = path.stat().st_size
    if size > max_bytes:
        raise BadUpdate(f"update of {size} bytes exceeds the {max_bytes} of the plan")
    return size


def _lengths(entry: Entry, dtype: Wire) -> tuple[int, int]:
    try:
        a = tensors.size_bytes((entry.rank, entry.d_in), dtype)
        return a, tensors.size_bytes((entry.d_out, entry.rank), dtype)
    except BadUpdate as error:
        raise BadUpdate(f"matrix {entry.name!r}: {error}") from None


def _bin(n_bytes: int) -> bytes:
    return b"\xc6" + n_bytes.to_bytes(4, "big")


def _open_a(n_bytes: int) -> bytes:
    return b"\x92" + _bin(n_bytes)


def _check_finite(name: str, factors: Factors) -> None:
    if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
        raise BadUpdate(f"matrix {name!r} has values that are not finite numbers")
