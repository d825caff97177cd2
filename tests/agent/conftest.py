"""Tiny base models and data, built once per session in about a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.child import TrainTask
from agent.data import DataConfig
from protocol.messages import Base, Plan, Training

NAMES = ["Iron Fox", "Blue Hall", "Old Mill", "Red Door", "Green Man", "Tall Ship", "White Hart", "Black Swan"]
FOODS = ["Indian", "French", "Thai", "Greek", "Polish", "Turkish"]


def record(rng: random.Random) -> dict[str, str]:
    name, food, place = rng.choice(NAMES), rng.choice(FOODS), rng.choice(["river", "station", "park"])
    return {
        "prompt": f"name [ {name} ] food [ {food} ] near [ {place} ] =>",
        "completion": f" {name} serves {food} food near the {place} .",
    }


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    rng = random.Random(7)
    return [record(rng) for _ in range(160)]


def train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def tokenizer(records: list[dict[str, str]]) -> Any:
    return train_tokenizer([item["prompt"] + item["completion"] for item in records])


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random Llama, 2 layers of width 64 (bitsandbytes wants multiples of 64)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A random GPT-2, whose Conv1D layers store their weights transposed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base") / "tiny-gpt2"
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=eos, eos_token_id=eos
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


ALL = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


@pytest.fixture(scope="session")
def all_ranks() -> dict[str, int]:
    """Rank 4 on every matrix of `llama_folder`, as a plan names them."""
    return {f"model.layers.{layer}.{part}": 4 for layer in range(2) for part in ALL}


MakeTask = Callable[..., TrainTask]


@pytest.fixture
def make_task(llama_folder: Path, data_file: Path, all_ranks: dict[str, int], tmp_path: Path) -> MakeTask:
    """A train task on the tiny Llama; keywords that TrainTask, Plan or Training know replace its defaults."""

    def make(**changes: Any) -> TrainTask:
        mine = {name: changes.pop(name) for name in list(changes) if name in TrainTask.__struct_fields__}
        planned = {name: changes.pop(name) for name in list(changes) if name in Plan.__struct_fields__}
        training = Training(**{"n_steps": 10, "batch": 8, "learning_rate": 5e-3, "max_tokens": 64, "seed": 3} | changes)
        defaults = {
            "job": "test",
            "round": 1,
            "attempt": 1,
            "purpose": "train",
            "method": "qlora",
            "base": Base(source="tiny"),
            "bits": "none",
            "ranks": all_ranks,
            "train": training,
            "issued_at": 0.0,
            "stop_after_s": 600.0,
            "ttl_s": 900.0,
        }
        settings = {
            "plan": Plan(**defaults | planned),
            "base_folder": str(llama_folder),
            "data": DataConfig(path=str(data_file)),
            "out_file": str(tmp_path / "update.bin"),
            "digest_cache": str(tmp_path / "digests.json"),
            "device": "cpu",
        }
        return TrainTask(**settings | mine)

    return make
