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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias

import numpy as np

from protocol import files, manifest, tensors
from protocol.adapters import Adapter, Factors
from protocol.errors import BadUpdate
from protocol.manifest import Entries, Entry, Header
from protocol.messages import Count, Level, Wire
from protocol.tensors import F32

MODEL: Final = "model"
_FEW_VALUES: Final = 2**18

_Line: TypeAlias = tuple[Entry, F32]
"""A row of A or a column of B, and whose it is."""


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


class StoredModel(Mapping[str, Factors]):
    """The adapter in a model file, one matrix at a time: read when it is asked for, and not kept.

    Matrices without a component are left out.  Reading raises BadUpdate for a value that is not finite, and OSError.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Read the header and the places.  Raises BadUpdate as `open_model`, OSError."""
        self._path = path
        self._header, ends = open_model(path, max_bytes=max_bytes)
        self._places: dict[str, tuple[Entry, list[int]]] = {e.name: (e, []) for e in self._header.matrices if e.rank}
        for rank, at in enumerate(ends[:-1], start=1):
            for entry in _members(self._header, rank):
                self._places[entry.name][1].append(at)
                at += sum(entry.shape) * tensors.ITEM_BYTES[self._header.dtype]  # noqa: PLW2901 - goes along the level

    def __getitem__(self, name: str) -> Factors:
        """Both factors of one matrix in float32."""
        entry, places = self._places[name]
        found = _empty(entry, len(places))
        with self._path.open("rb") as file:
            for row, column, at in zip(found.a, found.b.T, places, strict=True):
                file.seek(at)
                _fill([(entry, row), (entry, column)], file, self._header.dtype)
        return found

    def __contains__(self, name: object) -> bool:
        """Whether the model has it, without reading it."""
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many matrices there are."""
        return len(self._places)


def _members(header: ModelHeader, rank: int) -> list[Entry]:
    return [entry for entry in header.matrices if entry.rank >= rank]


def _empty(entry: Entry, rank: int) -> Factors:
    kept = min(entry.rank, rank)
    return Factors(a=np.empty((kept, entry.d_in), np.float32), b=np.empty((entry.d_out, kept), np.float32))


def _lines(header: ModelHeader, adapter: Adapter, rank: int) -> list[_Line]:
    """What a level holds, as views of the adapter in the order of the file."""
    found = [(entry, adapter[entry.name]) for entry in _members(header, rank)]
    return [(entry, line) for entry, f in found for line in (f.a[rank - 1], f.b[:, rank - 1])]


def _few(lines: Iterable[_Line]) -> Iterator[list[_Line]]:
    """Runs of lines that are short together: to encode and to look at many small ones one by one would take longer."""
    few: list[_Line] = []
    n_values = 0
    for entry, line in lines:
        if few and n_values + line.size > _FEW_VALUES:
            yield few
            few, n_values = [], 0
        few.append((entry, line))
        n_values += line.size
    if few:
        yield few


def _level(header: ModelHeader, adapter: Adapter, rank: int) -> bytes:
    blocks = []
    for few in _few(_lines(header, adapter, rank)):
        values = np.concatenate([line for _, line in few])
        blocks.append(tensors.encode(values, header.dtype))
        _check_finite(few, tensors.decode(blocks[-1], values.shape, header.dtype))
    return b"".join(blocks)


def _read_level(file: BinaryIO, header: ModelHeader, rank: int, into: Adapter) -> None:
    for few in _few(_lines(header, into, rank)):
        _fill(few, file, header.dtype)


def _fill(few: list[_Line], file: BinaryIO, dtype: Wire) -> None:
    """Read lines that lie one behind the other in the file."""
    n_values = sum(line.size for _, line in few)
    values = tensors.decode(file.read(n_values * tensors.ITEM_BYTES[dtype]), (n_values,), dtype)
    _check_finite(few, values)
    at = 0
    for _, line in few:
        line[:] = values[at : at + line.size]
        at += line.size


def _check_finite(few: list[_Line], values: F32) -> None:
    """`values` are those of the lines, one behind the other."""
    if np.isfinite(values).all():
        return
    ends = np.cumsum([line.size for _, line in few])
    entry, _ = few[int(np.searchsorted(ends, np.argmin(np.isfinite(values)), side="right"))]
    raise BadUpdate(f"matrix {entry.name!r} of the model has values that are not finite numbers")
