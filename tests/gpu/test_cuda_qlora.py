"""QLoRA on a real GPU: it learns in every precision, and the memory formula holds there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from agent import loading
from agent.child import Calibrated, Finished, Stepped, TrainTask
from agent.data import DataConfig
from agent.trainers.meter import CONTEXT_BYTES
from agent.trainers.qlora import QLora
from protocol import memory, messages
from protocol.messages import Base, Bits, Calibration, Evaluation, Plan, Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

N_WORDS = 8192
DEVICE = "cuda"


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 55 M parameters: large enough that activations and weights outweigh the allocator's rounding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cuda") / "llama-55m"
    words = {word: n for n, word in enumerate(["<pad>", "<eos>", *(f"w{n}" for n in range(N_WORDS - 2))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=N_WORDS,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("cuda") / "train.jsonl"
    with path.open("w") as lines:
        for _ in range(64):
            words = [f"w{rng.randrange(50)}" for _ in range(300)]
            lines.write(json.dumps({"prompt": " ".join(words[:20]), "completion": " ".join(words[20:])}) + "\n")
    return path


MakeTask = Callable[..., TrainTask]


@pytest.fixture
def cuda_task(base_folder: Path, data_file: Path, tmp_path: Path) -> MakeTask:
    def make(bits: Bits, **changes: Any) -> TrainTask:
        settings = {"n_steps": 6, "batch": 8, "max_tokens": 256, "learning_rate": 2e-3} | changes
        plan = Plan(
            job="cuda",
            round=1,
            attempt=1,
            purpose="train",
            method="qlora",
            base=Base(source="llama-55m"),
            bits=bits,
            ranks={matrix.name: 8 for matrix in loading.survey(base_folder)},
            train=Training(**settings),
            evaluate=Evaluation(max_samples=4, metrics=["exact_match"], max_new_tokens=4),
            predicted_bytes=1,
            issued_at=0.0,
            stop_after_s=600.0,
            ttl_s=900.0,
        )
        return TrainTask(
            plan=plan,
            base_folder=str(base_folder),
            data=DataConfig(path=str(data_file)),
            out_file=str(tmp_path / "update.bin"),
            device=DEVICE,
        )

    return make


def run(task: TrainTask) -> tuple[list[float], Finished]:
    running, losses = QLora().train(task), []
    try:
        while True:
            event = next(running)
            if isinstance(event, Stepped) and event.n_steps == 6:
                losses.append(event.loss or 0.0)
    except StopIteration as end:
        return losses, end.value


def test_calibration_on_cuda(cuda_task: MakeTask, tmp_path: Path) -> None:
    ask = Calibration(n_batches=3, batches=[1, 2, 4], max_tokens=256, max_s=240.0)
    task = cuda_task("nf4")
    plan = msgspec.structs.replace(task.plan, purpose="survey", train=None, ranks={}, evaluate=None, calibration=ask)
    task = msgspec.structs.replace(task, plan=plan, calibrations=str(tmp_path), memory_limit_bytes=2**40)
    found = survey(task)
    assert found.device == torch.cuda.get_device_name(DEVICE)
    scores = np.frombuffer(found.scores, "<f4").reshape(-1, found.probe_rank)
    assert len(scores) == len(loading.survey(Path(task.base_folder)))
    assert np.isfinite(scores).all()
    assert (scores[:, 0] > 0).all()
    assert {point.bits for point in found.points} == found.losses.keys() == {"nf4", "int8", "none"}
    assert all(point.peak_bytes > 0 for point in found.points)
    assert found.notes == []
    assert survey(task).seconds == 0, "remembered"


def survey(task: TrainTask) -> messages.Calibrated:
    (found,) = (event.result for event in QLora().survey(task) if isinstance(event, Calibrated))
    return found


@pytest.mark.parametrize("bits", ["nf4", "int8", "none"])
def test_it_learns_on_cuda_after_an_evaluation(cuda_task: MakeTask, bits: Bits) -> None:
    losses, finished = run(cuda_task(bits))
    assert losses[-1] < losses[0] - 0.1
    assert finished.samples == 48
    assert Path(finished.file).is_file()


def test_it_goes_on_from_a_checkpoint(cuda_task: MakeTask, tmp_path: Path) -> None:
    """Kernels may add in another order, so the same to rounding."""
    whole, _ = run(cuda_task("nf4"))
    task = msgspec.structs.replace(cuda_task("nf4"), checkpoint=str(tmp_path / "training.checkpoint"))
    trainer = QLora()
    running = trainer.train(task)
    while not (isinstance(event := next(running), Stepped) and event.n_steps == 6 and event.step == 3):
        pass
    assert trainer.suspend() is not None
    running.close()
    rest, finished = run(task)
    assert rest == pytest.approx(whole[3:], rel=1e-2)
    assert (finished.steps, finished.samples) == (6, 48)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_formula_holds_on_cuda(cuda_task: MakeTask, checkpointing: bool) -> None:
    task = cuda_task("nf4", checkpointing=checkpointing)
    _, finished = run(task)
    folder, training = Path(task.base_folder), task.plan.train
    dims = loading.dimensions(folder)
    assert dims is not None
    assert training is not None
    predicted = memory.predicted_bytes(
        dims,
        loading.survey(folder),
        task.plan.ranks,
        frozen={},
        bits="nf4",
        compute="bf16",
        n_tokens=training.batch * training.max_tokens,
        checkpointing=checkpointing,
    )
    assert predicted == pytest.approx(finished.peak_bytes - CONTEXT_BYTES, rel=0.25)
    assert finished.predicted_bytes == task.plan.predicted_bytes


def test_running_out_of_device_memory_is_named_and_survived(cuda_task: MakeTask) -> None:
    from agent.trainers import TrainingFailed

    share = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.2e9 / share))
    try:
        with pytest.raises(TrainingFailed, match=r"out_of_memory: predicted [1-9]"):
            run(cuda_task("nf4", batch=64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    _, finished = run(cuda_task("nf4"))
    assert finished.steps == 6
