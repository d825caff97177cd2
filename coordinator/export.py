"""Export of the global adapter in PEFT's format: a folder that `PeftModel.from_pretrained(base, folder)` loads as it is.

Our deltas are B A with the scale inside, and each matrix has its own rank, so the configuration says alpha = rank for every
one: PEFT's factor alpha / r is then 1.  Its pattern keys are regular expressions matched at the end of a module's name;
anchored, escaped full names make each of them mean exactly one module.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coordinator.lineage import Card, export_folder
from protocol.adapters import Adapter
from protocol.errors import BadConfig, Unavailable

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
    arrays, ranks = {}, {}
    for name, factors in present(adapter).items():
        ranks[name] = factors.rank
        arrays[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(factors.a)
        arrays[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(factors.b)
    config = _config(ranks, card.base_source)
    with export_folder(folder, card) as part:
        try:
            save_file(arrays, part / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of an OSError
            raise Unavailable(f"{folder} cannot be written: {error}") from error
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(card.readme("LoRA adapter", _USAGE, "peft"), encoding="utf-8")


def present(adapter: Adapter) -> Adapter:
    """The matrices of `adapter` that have a component, sorted by name.  Raises BadConfig if there is none."""
    found = {name: factors for name, factors in sorted(adapter.items()) if factors.rank}
    if not found:
        raise BadConfig("the adapter is empty: no round has changed any matrix yet, so there is nothing to export")
    return found


def _config(ranks: dict[str, int], base_source: str) -> dict[str, object]:
    patterns = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_source,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
