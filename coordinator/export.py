"""Export of the global adapter in PEFT's format: a folder that `PeftModel.from_pretrained(base, folder)` loads as it is.

Our deltas are B A with the scale inside, so the configuration says alpha = r, and the factor alpha / r is 1.  Each matrix has
its own rank, but only PEFT reads a rank and an alpha per matrix: llama.cpp divides the one alpha by each matrix's rank
(`get_scale` in src/llama-adapter.h) and would scale all but the widest wrongly.  So the others are filled up with zeros to
the largest rank: B A stays the same, and whatever reads LoRA adapters reads it rightly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from coordinator.lineage import Card, export_folder
from coordinator.shards import write_tensors
from protocol.adapters import Adapter, Factors
from protocol.errors import BadConfig, Unavailable
from protocol.tensors import F32

_USAGE = """
## Use

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, THIS_FOLDER)

The adapter adds no latency once it is folded into the base: `model.merge_and_unload()`.
"""


def export_peft(adapter: Adapter, folder: Path, *, card: Card) -> None:
    """Write `adapter` into `folder` as a PEFT LoRA adapter with its model card; fp32, whole or not at all.

    Matrices without a component are left out.  Raises BadConfig for an adapter without any, or when `folder` holds
    anything but an earlier export, and Unavailable or OSError when the disk refuses.
    """
    names = present(adapter)
    rank = max(adapter[name].rank for name in names)
    shapes = (shape for name in names for shape in _shapes(name, adapter[name], rank))
    values = (side for name in names for side in _filled(adapter[name], rank))
    config = _config(names, rank, card.base_source)
    with export_folder(folder, card) as part:
        try:
            write_tensors(part / "adapter_model.safetensors", shapes, values)
        except OSError as error:
            raise Unavailable(f"{folder} cannot be written: {error}") from error
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card.readme("LoRA adapter", _USAGE, "peft"), encoding="utf-8")


def _shapes(name: str, factors: Factors, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    d_out, d_in = factors.shape
    yield f"base_model.model.{name}.lora_A.weight", (rank, d_in)
    yield f"base_model.model.{name}.lora_B.weight", (d_out, rank)


def _filled(factors: Factors, rank: int) -> tuple[F32, F32]:
    if not (fill := rank - factors.rank):
        return factors.a, factors.b
    return np.pad(factors.a, ((0, fill), (0, 0))), np.pad(factors.b, ((0, 0), (0, fill)))


def present(adapter: Adapter) -> list[str]:
    """The matrices of `adapter` that have a component, in order.  Raises BadConfig if there is none."""
    found = [name for name in sorted(adapter) if adapter[name].rank]
    if not found:
        raise BadConfig("the adapter is empty: no round has changed any matrix yet, so there is nothing to export")
    return found


def _config(targets: list[str], rank: int, base_source: str) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_source,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
