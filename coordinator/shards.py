"""*.safetensors files read and written a tensor at a time: the library's numpy side knows no bf16 and holds them all at once.

The format: 8 bytes with the length of the header, little endian; the header, a JSON map from a name to {dtype, shape,
data_offsets}; the data, to which the offsets are relative.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from protocol.errors import BadConfig
from protocol.messages import Wire
from protocol.tensors import F32, ITEM_BYTES

MAX_HEADER_BYTES: Final = 100 * 2**20
WIRES: Final[dict[str, Wire]] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


class _Header(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


# Works the type out, while there is one thread: two that do so at once end the process (msgspec 0.22).
msgspec.msgpack.Decoder(_Header)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's place: `offset` is from the start of the file; `dtype` is the file's own name for it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def wire(self) -> Wire | None:
        """Our name for the type of its values; None for types we do not compute with."""
        return WIRES.get(self.dtype)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a *.safetensors file by name.  Reads the header only.  Raises BadConfig for a damaged file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if n_header > min(MAX_HEADER_BYTES, size - 8):
            raise BadConfig(f"{path} is no whole safetensors file")
        raw = file.read(n_header)
    try:
        named = msgspec.convert({k: v for k, v in json.loads(raw).items() if k != "__metadata__"}, dict[str, _Header])
    except (ValueError, AttributeError) as error:
        raise BadConfig(f"{path} has a damaged safetensors header: {error}") from error
    start = 8 + n_header
    for name, header in named.items():
        first, last = header.data_offsets
        item_bytes = ITEM_BYTES[WIRES[header.dtype]] if header.dtype in WIRES else None
        wrong_size = item_bytes is not None and last - first != math.prod(header.shape) * item_bytes
        if not 0 <= first <= last <= size - start or wrong_size:
            raise BadConfig(f"{path}: tensor {name!r} lies outside the file or has another size than its shape")
    return {name: Tensor(h.dtype, h.shape, start + h.data_offsets[0]) for name, h in named.items()}


def write_tensors(path: Path, shapes: Iterable[tuple[str, tuple[int, ...]]], values: Iterable[F32]) -> None:
    """Write float32 tensors of these names and shapes, each when `values` brings it.  Raises OSError."""
    header, end = bytearray(b'{"__metadata__":{"format":"pt"}'), 0
    for name, shape in shapes:
        start, end = end, end + 4 * math.prod(shape)
        entry = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
        header += b",%s:%s" % (msgspec.json.encode(name), msgspec.json.encode(entry))
    header += b"}"
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in values:
            file.write(np.ascontiguousarray(array, "<f4").data)
