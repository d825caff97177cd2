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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal, TypeAlias

import numpy as np

from protocol import files, manifest, tensors
from protocol.adapters import FEW_VALUES, Adapter, Factors, Stack, runs
from protocol.errors import BadUpdate
from protocol.manifest import Entries, Entry, Header
from protocol.messages import Count, Level, Wire
from protocol.tensors import F32

MODEL: Final = "model"

_Lines: TypeAlias = tuple[Sequence[Entry], F32, F32]
"""Rows of A (k, d_in) and columns of B (k, d_out) of one component, and of which matrices: all of one shape."""


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
    grouped = list(_runs(header.matrices))
    digest, size, levels = hashlib.sha256(), 0, []
    with files.replacing(path) as file:
        for rank in range(1 + max((entry.rank for entry in header.matrices), default=0)):
            for block in _level(grouped, adapter, rank, dtype) if rank else [manifest.pack_header(header)]:
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
    kept = [(run, _empty(run, wanted)) for run in _runs(header.matrices) if min(run[0].rank, wanted)]
    with path.open("rb") as file:
        file.seek(levels[0])
        for rank in range(1, wanted + 1):
            for few in _few(_lines(kept, rank)):
                _fill(few, file, header.dtype)
    return {entry.name: factors for run, stack in kept for entry, factors in zip(run, stack, strict=True)}


def open_model(path: Path, *, max_bytes: int) -> tuple[ModelHeader, list[int]]:
    """The header, and the size in bytes of the file up to each level it holds, level 0 first.  Raises BadUpdate, OSError."""
    size = path.stat().st_size
    if size > max_bytes:
        raise BadUpdate(f"model of {size} bytes exceeds the {max_bytes} that were announced")
    header, end = manifest.read_header(path, ModelHeader)
    manifest.check_sorted(header.matrices)
    ends, rank, grouped = [end], 0, list(_runs(header.matrices))
    while ends[-1] < size and (members := [run for run in grouped if run[0].rank > rank]):
        n_values = sum(len(run) * sum(run[0].shape) for run in members)
        ends.append(ends[-1] + n_values * tensors.ITEM_BYTES[header.dtype])
        rank += 1
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
        found = _empty([entry], len(places))
        with self._path.open("rb") as file:
            for rank, at in enumerate(places, start=1):
                file.seek(at)
                _fill(list(_lines([([entry], found)], rank)), file, self._header.dtype)
        (factors,) = found
        return factors

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


def _runs(entries: Entries) -> Iterator[Sequence[Entry]]:
    """Matrices of one shape and rank, a few at a time: they stand side by side in every level."""
    return runs(entries, lambda e: (e.rank, e.shape), lambda e: sum(e.shape))


def _empty(run: Sequence[Entry], rank: int) -> Stack:
    n, kept, (d_out, d_in) = len(run), min(run[0].rank, rank), run[0].shape
    return Stack(np.empty((n, kept, d_in), np.float32), np.empty((n, d_out, kept), np.float32))


def _lines(stacks: Iterable[tuple[Sequence[Entry], Stack]], rank: int) -> Iterator[_Lines]:
    """What a level holds, as views in the order of the file."""
    for run, stack in stacks:
        if run[0].rank >= rank:
            yield run, stack.a[:, rank - 1], stack.b[:, :, rank - 1]


def _few(lines: Iterable[_Lines]) -> Iterator[list[_Lines]]:
    """Those that are short together: to encode and to look at many small ones one by one would take longer."""
    few: list[_Lines] = []
    n_values = 0
    for line in lines:
        size = line[1].size + line[2].size
        if few and n_values + size > FEW_VALUES:
            yield few
            few, n_values = [], 0
        few.append(line)
        n_values += size
    if few:
        yield few


def _cut(grouped: Iterable[Sequence[Entry]], adapter: Adapter, rank: int) -> Iterator[_Lines]:
    """The same of an adapter, copied."""
    for run in grouped:
        if run[0].rank >= rank:
            factors = [adapter[entry.name] for entry in run]
            yield run, np.stack([f.a[rank - 1] for f in factors]), np.stack([f.b[:, rank - 1] for f in factors])


def _level(grouped: Iterable[Sequence[Entry]], adapter: Adapter, rank: int, dtype: Wire) -> Iterator[bytes]:
    for few in _few(_cut(grouped, adapter, rank)):
        values = np.concatenate([np.hstack([rows, columns]).reshape(-1) for _, rows, columns in few])
        block = tensors.encode(values, dtype)
        _check_finite(few, values if dtype == "fp32" else tensors.decode(block, values.shape, dtype))
        yield block


def _fill(few: list[_Lines], file: BinaryIO, dtype: Wire) -> None:
    """Read lines that lie one behind the other in the file."""
    n_values = sum(rows.size + columns.size for _, rows, columns in few)
    values = tensors.decode(file.read(n_values * tensors.ITEM_BYTES[dtype]), (n_values,), dtype)
    _check_finite(few, values)
    at = 0
    for run, rows, columns in few:
        here = values[at : at + rows.size + columns.size].reshape(len(run), -1)
        rows[:], columns[:] = np.hsplit(here, [rows.shape[1]])
        at += here.size


def _check_finite(few: list[_Lines], values: F32) -> None:
    """`values` are those of the lines, one behind the other."""
    if np.isfinite(values).all():
        return
    entries = [entry for run, _, _ in few for entry in run]
    ends = np.cumsum([sum(entry.shape) for entry in entries])
    entry = entries[int(np.searchsorted(ends, np.argmin(np.isfinite(values)), side="right"))]
    raise BadUpdate(f"matrix {entry.name!r} of the model has values that are not finite numbers")
