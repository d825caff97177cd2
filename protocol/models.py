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
from typing import BinaryIO, Final, Literal, TypeAlias, cast

import msgspec
import numpy as np

from protocol import files, manifest, tensors
from protocol.adapters import FEW_VALUES, Adapter, Factors, Run, Stack, Stacks, few
from protocol.errors import BadUpdate
from protocol.manifest import Contents, Entry, Header
from protocol.messages import Count, Level, Wire
from protocol.tensors import F32

MODEL: Final = "model"

_Lines: TypeAlias = tuple[Sequence[str], F32, F32]
"""Rows of A (k, d_in) and columns of B (k, d_out) of one component, and of which matrices: all of one shape."""


class ModelHeader(Header, frozen=True, kw_only=True):
    """First object of a model file.  `version` counts the aggregations of the job; the ranks are those of the whole."""

    kind: Literal["model"]
    version: Count
    dtype: Wire
    matrices: msgspec.Raw


_header: Final = msgspec.msgpack.Decoder(ModelHeader)


def write_model(path: Path, adapter: Adapter, *, version: int, dtype: Wire) -> list[Level]:
    """Write `adapter`, in canonical form, and return where each level ends: rank 0 (the header alone) up to the whole.

    The last level's size and digest are those of the file.  On disk when this returns.  Raises BadUpdate, and leaves
    `path` as it was, when a value is not finite in `dtype`.
    """
    stacks = Stacks.of(adapter)
    matrices = manifest.packed_entries(stacks)
    header = ModelHeader(v=manifest.VERSION, kind=MODEL, version=version, dtype=dtype, matrices=matrices)
    digest, size, levels = hashlib.sha256(), 0, []
    with files.replacing(path) as file:
        for rank in range(1 + max((stack.rank for _, stack in stacks.runs), default=0)):
            for block in _level(stacks.runs, rank, dtype) if rank else [manifest.pack_header(header)]:
                file.write(block)
                digest.update(block)
                size += len(block)
            levels.append(Level(rank=rank, size=size, sha256=digest.copy().hexdigest()))
    return levels


def read_model(path: Path, *, max_rank: int | None = None, max_bytes: int) -> Stacks:
    """The adapter in a model file, or in a prefix of one that ends at a level, cut to `max_rank` components.

    Matrices without a component are left out.  Raises BadUpdate for a file that is larger than `max_bytes`, damaged, or
    cut inside a level, and OSError.  Memory: what the components read take in float32, and one level.
    """
    header, contents, levels = _open(path, max_bytes)
    wanted = len(levels) - 1 if max_rank is None else min(max_rank, len(levels) - 1)
    kept: list[Run] = [
        (contents.names[part], _empty(entry, part.stop - part.start, wanted))
        for entry, group in _groups(contents)
        for part in few(group, sum(entry.shape))
        if min(entry.rank, wanted)
    ]
    with path.open("rb") as file:
        file.seek(levels[0])
        for rank in range(1, wanted + 1):
            for lines in _together(_lines(kept, rank)):
                _fill(lines, file, header.dtype)
    return Stacks(kept)


def open_model(path: Path, *, max_bytes: int) -> tuple[ModelHeader, list[int]]:
    """The header, and the size in bytes of the file up to each level it holds, level 0 first.  Raises BadUpdate, OSError."""
    header, _, ends = _open(path, max_bytes)
    return header, ends


def _open(path: Path, max_bytes: int) -> tuple[ModelHeader, Contents, list[int]]:
    size = path.stat().st_size
    if size > max_bytes:
        raise BadUpdate(f"model of {size} bytes exceeds the {max_bytes} that were announced")
    header, contents, end = manifest.read_header(path, _header)
    ends = [end]
    while ends[-1] < size and (members := [found for found in _groups(contents) if found[0].rank >= len(ends)]):
        n_values = sum((group.stop - group.start) * sum(entry.shape) for entry, group in members)
        ends.append(ends[-1] + n_values * tensors.ITEM_BYTES[header.dtype])
    if ends[-1] != size:
        raise BadUpdate(f"model file of {size} bytes does not end with one of its levels: fetch it again")
    return header, contents, ends


class StoredModel(Mapping[str, Factors]):
    """The adapter in a model file, one matrix at a time: read when it is asked for, and not kept.

    Matrices without a component are left out.  Reading raises BadUpdate for a value that is not finite, and OSError.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Read the header and the places.  Raises BadUpdate as `open_model`, OSError."""
        self._path = path
        self._header, self._contents, ends = _open(path, max_bytes)
        self._offsets: list[list[int]] = [[] for _ in self._contents.groups]
        for rank, at in enumerate(ends[:-1], start=1):
            for number, (entry, group) in enumerate(_groups(self._contents)):
                if entry.rank >= rank:
                    self._offsets[number].append(at)
                    at += (group.stop - group.start) * self._line_bytes(entry)  # noqa: PLW2901 - goes along the level

    def _line_bytes(self, entry: Entry) -> int:
        return sum(entry.shape) * tensors.ITEM_BYTES[self._header.dtype]

    def __getitem__(self, name: str) -> Factors:
        """Both factors of one matrix in float32."""
        if name not in self:
            raise KeyError(name)
        number, place = self._contents.place(name)
        entry, offsets = self._contents.entries[self._contents.groups[number].start], self._offsets[number]
        found = _empty(entry, 1, len(offsets))
        with self._path.open("rb") as file:
            for rank, offset in enumerate(offsets, start=1):
                file.seek(offset + place * self._line_bytes(entry))
                _fill(list(_lines([([name], found)], rank)), file, self._header.dtype)
        (factors,) = found
        return factors

    def __contains__(self, name: object) -> bool:
        """Whether the model has it, without reading it."""
        return bool(self._contents.ranks.get(cast("str", name)))

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return (name for name, rank in self._contents.ranks.items() if rank)

    def __len__(self) -> int:
        """How many matrices there are."""
        return sum(map(bool, self._contents.ranks.values()))


def _groups(contents: Contents) -> Iterator[tuple[Entry, slice]]:
    """Where matrices of one shape and rank stand, which is side by side in every level, and the first of them."""
    return ((contents.entries[group.start], group) for group in contents.groups)


def _empty(entry: Entry, n: int, rank: int) -> Stack:
    """Of `n` such matrices, with at most so many components."""
    kept, (d_out, d_in) = min(entry.rank, rank), entry.shape
    return Stack(np.empty((n, kept, d_in), np.float32), np.empty((n, d_out, kept), np.float32))


def _lines(runs: Iterable[Run], rank: int) -> Iterator[_Lines]:
    """What a level holds, as views in the order of the file."""
    for names, stack in runs:
        if stack.rank >= rank:
            yield names, stack.a[:, rank - 1], stack.b[:, :, rank - 1]


def _together(lines: Iterable[_Lines]) -> Iterator[list[_Lines]]:
    """Those that are short together: to encode and to look at many small ones one by one would take longer."""
    short: list[_Lines] = []
    n_values = 0
    for line in lines:
        size = line[1].size + line[2].size
        if short and n_values + size > FEW_VALUES:
            yield short
            short, n_values = [], 0
        short.append(line)
        n_values += size
    if short:
        yield short


def _level(runs: Iterable[Run], rank: int, dtype: Wire) -> Iterator[bytes]:
    for lines in _together(_lines(runs, rank)):
        values = np.concatenate([np.hstack([rows, columns]).reshape(-1) for _, rows, columns in lines])
        block = tensors.encode(values, dtype)
        _check_finite(lines, values if dtype == "fp32" else tensors.decode(block, values.shape, dtype))
        yield block


def _fill(lines: list[_Lines], file: BinaryIO, dtype: Wire) -> None:
    """Read lines that lie one behind the other in the file."""
    n_values = sum(rows.size + columns.size for _, rows, columns in lines)
    values = tensors.decode(file.read(n_values * tensors.ITEM_BYTES[dtype]), (n_values,), dtype)
    _check_finite(lines, values)
    at = 0
    for names, rows, columns in lines:
        here = values[at : at + rows.size + columns.size].reshape(len(names), -1)
        rows[:], columns[:] = np.hsplit(here, [rows.shape[1]])
        at += here.size


def _check_finite(lines: list[_Lines], values: F32) -> None:
    """`values` are those of the lines, one behind the other."""
    if np.isfinite(values).all():
        return
    named = [(name, (rows.size + columns.size) // len(names)) for names, rows, columns in lines for name in names]
    ends = np.cumsum([n_values for _, n_values in named])
    name, _ = named[int(np.searchsorted(ends, np.argmin(np.isfinite(values)), side="right"))]
    raise BadUpdate(f"matrix {name!r} of the model has values that are not finite numbers")
