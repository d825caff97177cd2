"""The plain loop of the comparison and the real trainer learn the same, or the ratio of their speeds would say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agent.trainers.qlora import QLora
from bench import training
from bench.training import Run, Setting, Spent
from fedpipe import corpus
from fedpipe.corpus import Pair
from protocol.messages import Bits, Training


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer that reads bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    letters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_both_sides_make_the_same_steps(base: Path, tmp_path: Path, bits: Bits) -> None:
    texts = [
        Pair(f"{n} and one", " is " + "more" * (n % 7)) for n in range(60)
    ]  # of different lengths: rows are filled up
    data = tmp_path / "text.jsonl"
    corpus.write_jsonl(texts, data)
    wanted = Training(n_steps=13, batch=4, learning_rate=1e-2, max_tokens=32)
    run = training.compare(training.task_for(base, data, tmp_path, bits, "cpu", wanted), QLora())
    assert len(run.losses) == len(run.plain_losses) == 13
    assert run.losses == pytest.approx(run.plain_losses, abs=1e-4)
    assert run.losses[-1] < run.losses[0] - 0.5
    assert min(run.agent.cpu_s, run.plain.cpu_s, run.checkpoint.cpu_s) > 0


def test_the_summary_takes_the_median_pair_and_a_checkpoint_in_each_interval() -> None:
    def pair(agent_s: float, **changes: Any) -> Run:
        return Run(Spent(agent_s, agent_s), Spent(3.0, 6.0), Spent(1.5, 9.0), [4.0, 2.0], [4.0, 2.5])._replace(
            **changes
        )

    runs = [pair(4.0), pair(3.0), pair(6.0, plain_losses=[4.75, 2.0])]
    found = training.summary(Setting("demo", "nf4", 8, 96), runs, n_steps=12, checkpoint_s=60.0)
    assert (found["ratio"], found["worst_ratio"], found["ratio_wall"]) == (0.75, 0.5, 1.5)
    assert found["ratio_with_checkpoints"] == pytest.approx(0.75 * 60 / 61.5)
    assert found["plain_samples_per_cpu_s"] == 32.0
    assert (found["loss"], found["loss_gap"]) == (2.0, 0.75)
