"""Components of an update <-> few bits: int8 with one scale per component, NF4 with one per block of 64.

Only changes are sent like this, never values: relative rounding costs 0.5 % (int8) or 9 % (NF4) of a change, as noise that
averages out over the fleet, but it would cost as much of the whole adapter.  Averages over a fleet pay for it with next to
nothing, where dropping small entries (top-k) loses: after a few steps of Adam all entries of a change are about as large.

    int8   scales bf16 (r,)                                     codes int8 (r, d)              value = scale x code
    nf4    scales bf16 (r,)    shares u8 (r, ceil(d / 64))      codes 4 bits (r, ceil(d / 2))  value = scale x share / 255 x level

A row is one component: a row of A, or a column of B, whose entries have one magnitude.  The 16 levels are the quantiles of a
normal distribution (NF4; Dettmers et al., 2023, arXiv 2305.14314, appendix E); the scale of a block is itself one byte, as a
share of its component's (the paper's double quantization).  So NF4 takes 4.125 bits a value.  Scales and shares are rounded
up, so that nothing is cut off.  The low half of a byte of codes comes first; a row of odd length ends with a zero that nobody reads.

All is little endian.  Same input, same bytes.  Bounds are checked before anything is allocated.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import BadUpdate
from protocol.tensors import F32, MAX_DIMENSION, MAX_TENSOR_BYTES, from_bf16
from protocol.widths import BLOCK, SCALE_BYTES, Quantized, component_bytes, n_blocks, n_pairs

LEVELS: Final[F32] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""NF4: quantiles of N(0, 1) within [-1, 1], with an exact zero (arXiv 2305.14314, appendix E)."""
_BETWEEN: Final[F32] = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
_PAIRS: Final[F32] = np.stack([LEVELS[np.arange(256) & 15], LEVELS[np.arange(256) >> 4]], axis=1)
"""By byte: the two levels that it stands for."""


def size_bytes(shape: tuple[int, int], kind: Quantized) -> int:
    """How many bytes `shape` (r, d) takes.  Raises BadUpdate for a shape that is out of bounds."""
    r, d = shape
    n_bytes = r * component_bytes(d, kind)
    if not (0 <= r <= MAX_DIMENSION and 0 <= d <= MAX_DIMENSION) or n_bytes > MAX_TENSOR_BYTES:
        raise BadUpdate(f"shape {shape} is out of bounds: at most {MAX_DIMENSION} each and {MAX_TENSOR_BYTES} bytes")
    return n_bytes


def encode(rows: F32, kind: Quantized) -> bytes:
    """Bytes of `rows` (r, d).  What is not finite stays so when it is decoded, for the receiver to refuse."""
    r, d = rows.shape
    size_bytes((r, d), kind)
    with np.errstate(all="ignore"):  # what is not finite is decoded as such
        largest = np.abs(rows).max(axis=1, initial=0.0)
        scales = _up_to_bf16(largest / np.float32(127) if kind == "int8" else largest)
        widths = from_bf16(scales)
        if kind == "int8":
            codes = np.rint(rows / _divisor(widths)[:, None]).astype(np.int8)
            return b"".join((scales.astype("<u2").tobytes(), codes.tobytes()))
        blocks = np.zeros((r, n_blocks(d), BLOCK), np.float32)
        blocks.reshape(r, n_blocks(d) * BLOCK)[:, :d] = rows
        shares = np.ceil(np.abs(blocks).max(axis=2) / _divisor(widths)[:, None] * np.float32(255))
        shares = np.minimum(shares, 255).astype(np.uint8)
        levels = np.searchsorted(_BETWEEN, blocks / _divisor(_block_scales(widths, shares))[:, :, None])
    flat = levels.astype(np.uint8).reshape(r, n_blocks(d) * BLOCK)[:, : 2 * n_pairs(d)]
    return b"".join((scales.astype("<u2").tobytes(), shares.tobytes(), (flat[:, ::2] | flat[:, 1::2] << 4).tobytes()))


def decode(data: bytes | bytearray | memoryview, shape: tuple[int, int], kind: Quantized) -> F32:
    """A fresh float32 array of `shape` (r, d).  Raises BadUpdate when `data` is not exactly as long as that takes."""
    expected = size_bytes(shape, kind)
    if len(data) != expected:
        raise BadUpdate(f"{len(data)} bytes cannot be {kind} of shape {shape}: that takes {expected}")
    r, d = shape
    scales = from_bf16(np.frombuffer(data, "<u2", r))
    with np.errstate(all="ignore"):
        if kind == "int8":
            found: F32 = np.frombuffer(data, np.int8, r * d, SCALE_BYTES * r).reshape(r, d) * scales[:, None]
            return found
        shares = np.frombuffer(data, np.uint8, r * n_blocks(d), SCALE_BYTES * r).reshape(r, n_blocks(d))
        codes = np.frombuffer(data, np.uint8, r * n_pairs(d), SCALE_BYTES * r + shares.size).reshape(r, n_pairs(d))
        levels = np.zeros((r, n_blocks(d), BLOCK), np.float32)
        flat = levels.reshape(r, n_blocks(d) * BLOCK)
        flat[:, : 2 * n_pairs(d)] = np.take(_PAIRS, codes, axis=0).reshape(r, 2 * n_pairs(d))
        levels *= _block_scales(scales, shares)[:, :, None]
        return np.ascontiguousarray(flat[:, :d])


def _block_scales(scales: F32, shares: npt.NDArray[np.uint8]) -> F32:
    found: F32 = scales[:, None] * (shares.astype(np.float32) / np.float32(255))
    return found


def _up_to_bf16(scales: F32) -> npt.NDArray[np.uint16]:
    """The next bf16 that is not smaller, as its bits; what is not finite stays so."""
    return np.where(np.isnan(scales), 0x7FC0, (scales.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def _divisor(scales: F32) -> F32:
    """The same, but 1 where all is zero."""
    return np.where(scales == 0, np.float32(1), scales)
