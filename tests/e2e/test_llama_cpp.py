"""llama.cpp computes what peft computes: the merged model as GGUF, and the base as GGUF with the adapter beside it.

Runs where a compiled llama.cpp is:

    pip install sentencepiece
    cmake -B build -DBUILD_SHARED_LIBS=OFF && cmake --build build --target llama-debug llama-quantize     # in its checkout
    LLAMA_CPP=/path/to/the/checkout pytest tests/e2e/test_llama_cpp.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from coordinator.export import export_peft
from coordinator.merge import merge
from tests.coordinator.test_merge import CARD, llama_adapter

CHECKOUT = Path(os.environ.get("LLAMA_CPP", "nowhere"))
PROGRAMS = CHECKOUT / "build" / "bin"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (PROGRAMS / "llama-debug").exists(), reason="LLAMA_CPP names no compiled llama.cpp"),
]

N_WORDS = 400
CONFIG = LlamaConfig(
    vocab_size=N_WORDS,
    hidden_size=128,  # blocks of 32 columns are what llama.cpp quantizes
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.15,
)
CACHE_ERROR = 0.02
"""Its keys and values are kept as fp16; the logits are up to 6, and the adapter moves them by as much."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer that llama.cpp knows, an adapter, both merged; as fedpipe writes them, and as GGUF."""
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder / "base")
    words = sentencepiece.SentencePieceTrainer
    text = Path(__file__).parents[2] / "README.md"
    words.train(
        input=str(text), model_prefix=str(folder / "base/tokenizer"), vocab_size=N_WORDS, model_type="bpe",
        byte_fallback=True, character_coverage=0.99,
    )  # fmt: skip
    (folder / "base/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    adapter = llama_adapter(model)
    export_peft(adapter, folder / "adapter", card=CARD)
    merge(folder / "base", adapter, folder / "merged", card=CARD)
    for name in ("base", "merged"):
        converted("convert_hf_to_gguf.py", str(folder / name), "--outfile", str(folder / f"{name}.gguf"))
    beside = ("--base", str(folder / "base"), "--outfile", str(folder / "adapter.gguf"))
    converted("convert_lora_to_gguf.py", str(folder / "adapter"), *beside)
    return folder


def converted(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, CHECKOUT / script, *arguments, "--outtype", "f32"], check=True, capture_output=True)


def heard(folder: Path, out: str, *arguments: str) -> tuple[list[int], np.ndarray]:
    """The tokens of a prompt as llama.cpp sees them, and the logits of what follows."""
    command = [PROGRAMS / "llama-debug", *arguments, "-p", "The coordinator", "-fa", "off"]
    where = folder / out
    where.mkdir()
    subprocess.run([*command, "--save-logits", "--logits-output-dir", where], check=True, capture_output=True)
    (tokens,) = where.glob("*-tokens.bin")
    (logits,) = (path for path in where.glob("*.bin") if path != tokens)
    return np.fromfile(tokens, np.int32).tolist(), np.fromfile(logits, np.float32)[-N_WORDS:]


def expected(folder: Path, tokens: list[int]) -> dict[str, np.ndarray]:
    """The same from transformers and peft."""
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([tokens])).logits[0, -1].numpy()
        tuned = PeftModel.from_pretrained(base, folder / "adapter")(torch.tensor([tokens])).logits[0, -1].numpy()
    return {"base": plain, "adapter": tuned}


def test_the_base_the_merged_model_and_the_adapter_beside_the_base(folder: Path) -> None:
    tokens, base = heard(folder, "of-base", "-m", str(folder / "base.gguf"))
    told = expected(folder, tokens)
    assert np.abs(told["adapter"] - told["base"]).max() > 1
    assert np.abs(base - told["base"]).max() < CACHE_ERROR
    ways = {
        "of-merged": ["-m", str(folder / "merged.gguf")],
        "of-adapter": ["-m", str(folder / "base.gguf"), "--lora", str(folder / "adapter.gguf")],
    }
    for out, arguments in ways.items():
        same, logits = heard(folder, out, *arguments)
        assert same == tokens
        assert np.abs(logits - told["adapter"]).max() < CACHE_ERROR, out


def test_the_merged_model_can_be_quantized(folder: Path) -> None:
    quantized = folder / "merged-q8.gguf"
    program = PROGRAMS / "llama-quantize"
    subprocess.run([program, folder / "merged.gguf", quantized, "Q8_0"], check=True, capture_output=True)
    tokens, logits = heard(folder, "of-q8", "-m", str(quantized))
    told = expected(folder, tokens)
    assert np.abs(logits - told["adapter"]).max() < 0.1 * np.abs(logits - told["base"]).max()
