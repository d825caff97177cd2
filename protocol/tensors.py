"""float32 arrays <-> bytes on the wire: fp32, fp16 or bf16, little endian, C order, nothing else.

numpy has no bf16.  A bf16 is the upper half of a float32, so it travels as a uint16, rounded to nearest even like hardware
does it: round(x) = (x + 0x7FFF + lowest kept bit) >> 16 on the bit pattern.  Only a NaN needs care, because the carry could
turn its payload into an infinity; it keeps its upper half with the quiet bit set.

What arrives is never trusted: the shape is bounded before anything is allocated and the length must match it exactly.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import BadUpdate
from protocol.messages import Wire

F32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MAX_DIMENSION: Final = 2**24
MAX_TENSOR_BYTES: Final = 2**32 - 1
"""What a msgpack bin can hold; one LoRA factor of a 7B model at rank 64 takes 3 MB."""

ITEM_BYTES: Final[dict[Wire, int]] = {"fp32": 4, "fp16": 2, "bf16": 2}


def size_bytes(shape: tuple[int, ...], dtype: Wire) -> int:
    """How many bytes an array of `shape` takes.  Raises BadUpdate for a shape that is out of bounds."""
    n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if not 0 <= min(shape, default=0) <= max(shape, default=0) <= MAX_DIMENSION or n_bytes > MAX_TENSOR_BYTES:
        raise BadUpdate(f"shape {shape} is out of bounds: at most {MAX_DIMENSION} each and {MAX_TENSOR_BYTES} bytes")
    return n_bytes


def encode(array: F32, dtype: Wire) -> bytes:
    """Bytes of `array`.  Too large for fp16 becomes an infinity, which the receiver refuses; bf16 keeps float32's range."""
    size_bytes(array.shape, dtype)
    match dtype:
        case "fp32":
            return array.astype("<f4", copy=False).tobytes()
        case "fp16":
            with np.errstate(over="ignore", under="ignore"):
                return array.astype("<f2").tobytes()
        case "bf16":
            return to_bf16(array).astype("<u2", copy=False).tobytes()


def decode(data: bytes | bytearray | memoryview | Bytes, shape: tuple[int, ...], dtype: Wire) -> F32:
    """A fresh, writable float32 array of `shape`, from bytes or rows of bytes.

    Raises BadUpdate when `data` is not exactly as long as that takes.
    """
    expected = size_bytes(shape, dtype)
    rows = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if rows.size != expected:
        raise BadUpdate(f"{rows.size} bytes cannot be {dtype} of shape {shape}: that takes {expected}")
    raw = np.array(rows).reshape(-1)  # one copy, aligned
    match dtype:
        case "fp32":
            return raw.view("<f4").astype(np.float32, copy=False).reshape(shape)
        case "fp16":
            return raw.view("<f2").astype(np.float32).reshape(shape)
        case "bf16":
            return from_bf16(raw.view("<u2")).reshape(shape)


def to_bf16(array: F32) -> npt.NDArray[np.uint16]:
    """float32 -> bf16 bit patterns, rounded to nearest even; NaN stays NaN, what rounds past the range is an infinity."""
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """Bf16 bit patterns -> the float32 values they stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
