"""Model files: the global adapter as agents download it, laid out so that a smaller model is a prefix of the file.

    {v, kind: "model", version, dtype, matrices: [[name, rank, d_out, d_in], ...]}        the header, one msgpack map
    level 1:   row 1 of A, column 1 of B   of every matrix, sorted by name
    level 2:   row 2 of A, column 2 of B   of every matrix of rank >= 2
    ...

Components are in descending order (protocol/adapters.py), so the first r levels are the best approximation of rank r.  One
blob serves every agent: the one that has room for r components fetches up to the end of level r and checks that prefix
against its own digest, and all of them listen to one broadcast.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np

from protocol import files, manifest, tensors
from protocol.adapters import Adapter, Factors
from protocol.errors import BadUpdate
from protocol.manifest import Entries, Entry, Header
from protocol.messages import Count, Level, Wire
from protocol.tensors import F32

MODEL: Final = "model"


class ModelHeader(Header, frozen=True, kw_only=True):
    """First object of a model file.  `version` counts the aggregations of the job; the ranks are those of the whole."""

    kind: Literal["model"]
    version: Count
    dtype: Wire
    matrices: Entries


def write_model(path: Path, adapter: Adapter, *, version: int, dtype: Wire) -> list[Level]:
    """Write `adapter`, in canonical form, and return where each level ends: rank 0 (the header alone) up to the whole.

    The last level's size and digest are those of the file.  On disk when this returns.  Raises BadUpdate, and leaves
    `path` as it was, when a value is not finite in `dtype`.
    """
    header = ModelHeader(
        v=manifest.VERSION, kind=MODEL, version=version, dtype=dtype, matrices=manifest.entries_of(adapter)
    )
    digest, size, levels = hashlib.sha256(), 0, []
    with files.replacing(path) as file:
        for rank in range(1 + max((entry.rank for entry in header.matrices), default=0)):
            block = _level(header, adapter, rank) if rank else manifest.pack_header(header)
            file.write(block)
            digest.update(block)
            size += len(block)
            levels.append(Level(rank=rank, size=size, sha256=digest.copy().hexdigest()))
    return levels


def read_model(path: Path, *, max_rank: int | None = None, max_bytes: int) -> Adapter:
    """The adapter in a model file, or in a prefix of one that ends at a level, cut to `max_rank` components.

    Matrices without a component are left out.  Raises BadUpdate for a file that is larger than `max_bytes`, damaged, or
    cut inside a level, and OSError.  Memory: what the components read take in float32, and one level.
    """
    header, levels = open_model(path, max_bytes=max_bytes)
    wanted = len(levels) - 1 if max_rank is None else min(max_rank, len(levels) - 1)
    kept = {entry.name: _empty(entry, wanted) for entry in header.matrices if min(entry.rank, wanted)}
    with path.open("rb") as file:
        file.seek(levels[0])
        for rank in range(1, wanted + 1):
            _read_level(file, header, rank, kept)
    return kept


def open_model(path: Path, *, max_bytes: int) -> tuple[ModelHeader, list[int]]:
    """The header, and the size in bytes of the file up to each level it holds, level 0 first.  Raises BadUpdate, OSError."""
    size = path.stat().st_size
    if size > max_bytes:
        raise BadUpdate(f"model of {size} bytes exceeds the {max_bytes} that were announced")
    header, end = manifest.read_header(path, ModelHeader)
    manifest.check_sorted(header.matrices)
    ends, rank = [end], 0
    while ends[-1] < size and (members := _members(header, rank := rank + 1)):
        ends.append(ends[-1] + sum(sum(entry.shape) for entry in members) * tensors.ITEM_BYTES[header.dtype])
    if ends[-1] != size:
        raise BadUpdate(f"model file of {size} bytes does not end with one of its levels: fetch it again")
    return header, ends


def _members(header: ModelHeader, rank: int) -> list[Entry]:
    return [entry for entry in header.matrices if entry.rank >= rank]


def _empty(entry: Entry, rank: int) -> Factors:
    kept = min(entry.rank, rank)
    return Factors(a=np.empty((kept, entry.d_in), np.float32), b=np.empty((entry.d_out, kept), np.float32))


def _level(header: ModelHeader, adapter: Adapter, rank: int) -> bytes:
    parts = []
    for entry in _members(header, rank):
        factors = adapter[entry.name]
        for line in (factors.a[rank - 1], factors.b[:, rank - 1]):
            parts.append(tensors.encode(line, header.dtype))
            _check_finite(entry, tensors.decode(parts[-1], line.shape, header.dtype))
    return b"".join(parts)


def _read_level(file: BinaryIO, header: ModelHeader, rank: int, into: Adapter) -> None:
    item_bytes = tensors.ITEM_BYTES[header.dtype]
    for entry in _members(header, rank):
        row = tensors.decode(file.read(entry.d_in * item_bytes), (entry.d_in,), header.dtype)
        column = tensors.decode(file.read(entry.d_out * item_bytes), (entry.d_out,), header.dtype)
        _check_finite(entry, row)
        _check_finite(entry, column)
        into[entry.name].a[rank - 1], into[entry.name].b[:, rank - 1] = row, column


def _check_finite(entry: Entry, values: F32) -> None:
    if not np.isfinite(values).all():
        raise BadUpdate(f"matrix {entry.name!r} of the model has values that are not finite numbers")
