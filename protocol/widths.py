"""How many bytes a component of an update takes, by the type of its values: arithmetic that codec, core and planner share."""

from __future__ import annotations

from typing import Final, Literal

from protocol.messages import UpdateDtype

Quantized = Literal["int8", "nf4"]

SCALE_BYTES: Final = 2
"""Of a component, in bf16."""
BLOCK: Final = 64
"""Values of a component that share a scale in NF4."""


def component_bytes(length: int, dtype: UpdateDtype) -> int:
    """Bytes of one row of A or one column of B with `length` values, scales included; the layouts are in quantized.py."""
    match dtype:
        case "fp32":
            return 4 * length
        case "fp16" | "bf16":
            return 2 * length
        case "int8":
            return SCALE_BYTES + length
        case "nf4":
            return SCALE_BYTES + n_blocks(length) + n_pairs(length)


def n_blocks(length: int) -> int:
    """Scales of a component in NF4."""
    return -(-length // BLOCK)


def n_pairs(length: int) -> int:
    """Bytes of a component's codes in NF4, two to a byte."""
    return -(-length // 2)
