"""Bytes that one QLoRA training step needs at its peak, from the model's dimensions alone.

    weights       nf4 with double quantization n (1/2 + (1 + 4/256) / 64), int8 n + 4 d_out, else n itemsize
    adapters      r (d_in + d_out), 16 B each where trained (weight, gradient, two Adam moments), 4 B where frozen
    activations   per layer and token:  bf16  12h + 6f + 4kv + sum over trained matrices of 4 d_in + 4 r
                                        fp32  20h + 12f + 8kv, and as much more for what all seven add: 4h + 4f
                  with checkpointing only the layer's input (h items), plus one layer's activations while it is recomputed
    logits        8 V per token: kept in fp32 for the gradient, and once more while it is formed
    work          the largest matrix once, dequantized

The activation counts are exact fits of the tensors that autograd saves for Llama-like layers under torch 2.13 and PEFT 0.21
(PEFT casts the input of each adapted matrix to fp32 apart).  Against measured peaks: -5 to +13 %, with checkpointing -15 to
+25 %.  Multiply by 1.15 and add the context's 300 MB (CUDA) or the interpreter's 400 MB for a budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from protocol.messages import Bits, Matrix

Compute = Literal["fp32", "bf16"]


class Dimensions(NamedTuple):
    """What the formula wants to know of a model.  Fields: h, f, kv, V, L of the formula; parameters outside the matrices."""

    hidden: int
    mlp: int
    key_value: int
    vocabulary: int
    n_layers: int
    n_other: int


def dimensions(folder: Path) -> Dimensions:
    """Read config.json.  Knows the names of Llama-like and of GPT-2-like configurations; raises KeyError for others."""
    config = json.loads((folder / "config.json").read_text())

    def field(*names: str) -> int:
        return int(next(config[name] for name in names if config.get(name) is not None))

    hidden, n_heads = field("hidden_size", "n_embd"), field("num_attention_heads", "n_head")
    head = config.get("head_dim") or hidden // n_heads
    n_layers = field("num_hidden_layers", "n_layer")
    vocabulary = field("vocab_size")
    is_gpt2 = "n_embd" in config
    is_tied = config.get("tie_word_embeddings", is_gpt2)
    positions = field("n_positions") * hidden if is_gpt2 else 0
    return Dimensions(
        hidden=hidden,
        mlp=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        key_value=(config.get("num_key_value_heads") or n_heads) * head,
        vocabulary=vocabulary,
        n_layers=n_layers,
        n_other=vocabulary * hidden * (1 if is_tied else 2) + positions + 2 * hidden * n_layers + hidden,
    )


def weight_bytes(matrices: Sequence[Matrix], n_other: int, bits: Bits, compute: Compute) -> int:
    """The base model as loaded: matrices at `bits`, everything else at the compute type."""
    item = 2 if compute == "bf16" else 4
    n = sum(m.d_in * m.d_out for m in matrices)
    match bits:
        case "nf4":
            return int(n * (0.5 + (1 + 4 / 256) / 64)) + n_other * item
        case "int8":
            return n + 4 * sum(m.d_out for m in matrices) + n_other * item
        case "none":
            return (n + n_other) * item


def adapter_bytes(matrices: Sequence[Matrix], ranks: Mapping[str, int], n_bytes: int) -> int:
    """Factors of the given ranks at `n_bytes` per number: 16 while trained, 4 while frozen."""
    return n_bytes * sum(ranks.get(m.name, 0) * (m.d_in + m.d_out) for m in matrices)


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
    h, f, kv = dims.hidden, dims.mlp, dims.key_value
    if compute == "bf16":
        adapted = sum(4 * m.d_in + 4 * ranks[m.name] for m in matrices if m.name in ranks)
        item, total = 2, dims.n_layers * (12 * h + 6 * f + 4 * kv) + adapted
    else:
        # Inputs shared by several matrices are kept once: the surplus of "all seven" grows with how many are adapted.
        share = sum(m.name in ranks for m in matrices) / max(1, len(matrices))
        item, total = 4, int(dims.n_layers * (20 * h + 12 * f + 8 * kv + share * (4 * h + 4 * f)))
    if checkpointing:
        total = dims.n_layers * item * h + total // max(1, dims.n_layers)
    return n_tokens * total


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
    work = max(m.d_in * m.d_out for m in matrices) * (2 if compute == "bf16" else 4) if bits != "none" else 0
    return (
        weight_bytes(matrices, dims.n_other, bits, compute)
        + adapter_bytes(matrices, ranks, 16)
        + adapter_bytes(matrices, frozen, 4)
        + activation_bytes(dims, matrices, ranks, compute=compute, n_tokens=n_tokens, checkpointing=checkpointing)
        + 8 * dims.vocabulary * n_tokens
        + work
    )
