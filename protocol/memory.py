"""Bytes that one QLoRA training step needs at its peak, from the model's dimensions alone.

    weights       nf4 with double quantization n (1/2 + (1 + 4/256) / 64), int8 n + 4 d_out, else n itemsize
    adapters      r (d_in + d_out), 16 B each where trained (weight, gradient, two Adam moments), 4 B where frozen
    activations   per token and block, from the first block with a trained matrix on; blocks below it have no backward pass
                      bf16   12h + 6f + 4kv,  and 4 d_in for each trained matrix (PEFT casts its input to fp32 apart)
                      fp32   16h + 12f + 8kv, and 4 d_in, shared by the matrices that read the same input
                  and 4 r for each trained matrix
                  with checkpointing only each block's input (h items), plus the largest block while it is recomputed
    logits        8 V per token: kept in fp32 for the gradient, and once more while it is formed; an upper bound, since they are
                  formed for targets alone (agent/batches.py)
    work          the largest matrix once, dequantized

The activation counts are exact fits of the tensors that autograd saves for Llama-like layers under torch 2.13 and PEFT 0.21.
What a machine adds to them (interpreter, CUDA context, fragmentation) is for measurements to say: coordinator/planner/cost.py
corrects this formula by them, agent/trainers/benchmark.py uses it to try nothing that cannot fit.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

from protocol.messages import Bits, Dimensions, Matrix

Compute = Literal["fp32", "bf16"]

TRAINED_BYTES: Final = 16
"""Per number of a trained factor: weight, gradient and two Adam moments in fp32."""
FROZEN_BYTES: Final = 4
LOGIT_BYTES: Final = 8

_NUMBER: Final = re.compile(r"\.(\d+)\.")


def block(name: str) -> int:
    """Number of the transformer block that a matrix lies in; 0 for a name without one."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else 0


def guessed(matrices: Sequence[Matrix]) -> Dimensions:
    """Dimensions of an architecture whose configuration is not understood, from its matrices: of the right magnitude."""
    hidden = Counter(m.d_in for m in matrices).most_common(1)[0][0]
    return Dimensions(
        hidden=hidden,
        mlp=max(max(m.d_in, m.d_out) for m in matrices),
        key_value=hidden,
        vocabulary=8 * hidden,
        n_layers=len({block(m.name) for m in matrices}),
        n_other=8 * hidden * hidden,
    )


def weight_bytes(matrices: Sequence[Matrix], n_other: int, bits: Bits, compute: Compute) -> int:
    """The base model as loaded: matrices at `bits`, everything else at the compute type."""
    item = _item(compute)
    n = sum(m.d_in * m.d_out for m in matrices)
    match bits:
        case "nf4":
            return int(n * (0.5 + (1 + 4 / 256) / 64)) + n_other * item
        case "int8":
            return n + 4 * sum(m.d_out for m in matrices) + n_other * item
        case "none":
            return (n + n_other) * item


def work_bytes(matrices: Sequence[Matrix], bits: Bits, compute: Compute) -> int:
    """The buffer in which a quantized matrix is dequantized."""
    return max(m.d_in * m.d_out for m in matrices) * _item(compute) if bits != "none" else 0


def adapter_bytes(matrices: Sequence[Matrix], ranks: Mapping[str, int], n_bytes: int) -> int:
    """Factors of the given ranks at `n_bytes` per number: TRAINED_BYTES or FROZEN_BYTES."""
    return n_bytes * sum(ranks.get(m.name, 0) * (m.d_in + m.d_out) for m in matrices)


class Saved(NamedTuple):
    """Bytes per token that a forward pass keeps: always, for each matrix once it is trained, and per rank of a trained one."""

    base: float
    inputs: list[float]
    per_rank: float


def saved_per_token(
    dims: Dimensions, matrices: Sequence[Matrix], *, compute: Compute, skip: int, checkpointing: bool
) -> Saved:
    """What autograd saves when blocks from number `skip` on have trained matrices; affine in which and how high.

    With checkpointing the largest block counts as fully trained, whatever is trained: an upper bound, and affine.
    """
    h, f, kv = dims.hidden, dims.mlp, dims.key_value
    n_active = max(0, dims.n_layers - skip)
    per_block = 12 * h + 6 * f + 4 * kv if compute == "bf16" else 16 * h + 12 * f + 8 * kv
    shared = Counter(_reader(m) for m in matrices) if compute == "fp32" else Counter[tuple[str, int]]()
    inputs = [4 * m.d_in / (shared[_reader(m)] or 1) for m in matrices]
    if not checkpointing:
        return Saved(n_active * per_block, inputs, 4.0)
    by_block: dict[int, float] = defaultdict(float)
    for matrix, n_bytes in zip(matrices, inputs, strict=True):
        by_block[block(matrix.name)] += n_bytes
    recomputed = per_block + max(by_block.values())
    return Saved(n_active * _item(compute) * h + recomputed, [0.0] * len(matrices), 0.0)


def _reader(matrix: Matrix) -> tuple[str, int]:
    """Matrices with the same parent module and input width read the same input: q, k and v; gate and up."""
    return matrix.name.rpartition(".")[0], matrix.d_in


def activation_bytes(
    dims: Dimensions,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    *,
    compute: Compute,
    n_tokens: int,
    checkpointing: bool,
) -> int:
    """What a forward pass of n_tokens (batch x longest) keeps for its backward pass, logits apart."""
    trained = {name: rank for name, rank in ranks.items() if rank}
    if not trained:
        return 0
    skip = min(block(name) for name in trained)
    saved = saved_per_token(dims, matrices, compute=compute, skip=skip, checkpointing=checkpointing)
    added = sum(
        n_bytes + saved.per_rank * trained[m.name]
        for m, n_bytes in zip(matrices, saved.inputs, strict=True)
        if m.name in trained
    )
    return int(n_tokens * (saved.base + added))


def predicted_bytes(
    dims: Dimensions,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    *,
    frozen: Mapping[str, int],
    bits: Bits,
    compute: Compute,
    n_tokens: int,
    checkpointing: bool,
) -> int:
    """Peak bytes of a training step on n_tokens = batch x max_tokens; `frozen` are the global adapter's ranks."""
    return (
        weight_bytes(matrices, dims.n_other, bits, compute)
        + adapter_bytes(matrices, ranks, TRAINED_BYTES)
        + adapter_bytes(matrices, frozen, FROZEN_BYTES)
        + activation_bytes(dims, matrices, ranks, compute=compute, n_tokens=n_tokens, checkpointing=checkpointing)
        + LOGIT_BYTES * dims.vocabulary * n_tokens
        + work_bytes(matrices, bits, compute)
    )


def _item(compute: Compute) -> int:
    return 2 if compute == "bf16" else 4
