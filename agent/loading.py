"""A base model in memory: quantized, frozen, and safe to alternate between training and evaluation.

    bits    weights of the blocks' linear layers       everything else
    nf4     4-bit NormalFloat, double quantization     compute type
    int8    LLM.int8                                   compute type
    none    compute type                               compute type

The compute type is bf16 where the hardware multiplies it natively and the model is large enough to gain, else fp32.
Freezing is by hand: PEFT's prepare_model_for_kbit_training would double the embeddings by casting them to fp32.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from protocol.errors import BadConfig
from protocol.memory import Compute
from protocol.messages import Bits, Dimensions, Matrix

BF16_FROM_BYTES: Final = 64 * 2**20
"""Below this much weight on disk casting costs more than bf16 saves on a CPU (measured on models of 3 MB and 200 MB)."""

_IN_A_BLOCK: Final = re.compile(r"\.\d+\.")


class Loaded(NamedTuple):
    """A frozen base model with its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    compute: Compute


def quiet() -> None:
    """Turn off what the libraries say about themselves while loading; call before bitsandbytes is imported."""
    for name in ("bitsandbytes", "accelerate", "peft", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pick_device(wanted: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one.  Raises BadConfig when a device is asked for that is not there."""
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadConfig(
            f'device "{wanted}" is not here ({torch.cuda.device_count()} CUDA devices): set device = "auto"'
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def compute_type(folder: Path, device: torch.device) -> Compute:
    """The type in which matrices are multiplied."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    from bitsandbytes.functional import has_avx512bf16

    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return "bf16" if has_avx512bf16() and n_bytes >= BF16_FROM_BYTES else "fp32"


def load(folder: Path, bits: Bits, device: torch.device) -> Loaded:
    """Load a base model and its tokenizer from a local folder, never from a hub, never running code from it.

    Raises BadConfig for a folder that transformers cannot read.  Cost: seconds per billion parameters, mostly the disk's.
    """
    if not (folder / "config.json").is_file():
        raise BadConfig(f"{folder} is no model folder: it has no config.json")
    quiet()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    compute = compute_type(folder, device)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    only_local = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **only_local)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=_quantization(bits, dtype),
            device_map={"": str(device)},
            use_safetensors=True,
            **only_local,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BadConfig(f"base model {folder} cannot be loaded: {str(error)[:300]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    _freeze(model)
    return Loaded(model, tokenizer, device, compute)


def _quantization(bits: Bits, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    match bits:
        case "nf4":  # the library's defaults are fp4 and fp32
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "none":
            return None


def _freeze(model: Any) -> None:
    model.requires_grad_(requires_grad=False)
    model.config.use_cache = False  # a cache would also switch off the masks of packed rows
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first evaluation would re-pack 4-bit weights for an operator without gradients:
        # the next training step would silently learn nothing.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def matrices(model: nn.Module) -> list[Matrix]:
    """Every linear weight inside the model's repeated blocks, by full module name: no embeddings, no head.

    GPT-2's Conv1D stores its weight transposed; d_out and d_in are what the layer maps to and from.
    """
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in model.named_modules():
        if not _IN_A_BLOCK.search(name):
            continue
        if isinstance(module, nn.Linear):
            found.append(Matrix(name=name, d_out=module.out_features, d_in=module.in_features))
        elif isinstance(module, Conv1D):
            found.append(Matrix(name=name, d_out=module.weight.shape[1], d_in=module.weight.shape[0]))
    return found


def survey(folder: Path) -> list[Matrix]:
    """The matrices of a model that is not loaded: built without weights, so it takes a second and no memory."""
    quiet()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadConfig(f"base model {folder} cannot be read: {str(error)[:300]}") from error
    return matrices(model)


def dimensions(folder: Path) -> Dimensions | None:
    """The sizes that the memory formula wants, from config.json; None for a file that is neither Llama-like nor GPT-2-like."""
    try:
        config = json.loads((folder / "config.json").read_text())

        def field(*names: str) -> int:
            return int(next(config[name] for name in names if config.get(name) is not None))

        hidden, n_heads = field("hidden_size", "n_embd"), field("num_attention_heads", "n_head")
        head = int(config.get("head_dim") or hidden // n_heads)
        n_layers, vocabulary = field("num_hidden_layers", "n_layer"), field("vocab_size")
        is_gpt2 = "n_embd" in config
        is_tied = config.get("tie_word_embeddings", is_gpt2)
        positions = field("n_positions") * hidden if is_gpt2 else 0
        return Dimensions(
            hidden=hidden,
            mlp=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
            key_value=int(config.get("num_key_value_heads") or n_heads) * head,
            vocabulary=vocabulary,
            n_layers=n_layers,
            n_other=vocabulary * hidden * (1 if is_tied else 2) + positions + 2 * hidden * n_layers + hidden,
        )
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, StopIteration):
        return None
