"""A share of a round: it learns, it is the run that PEFT alone would make, and it can be stopped with true counts."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from agent import loading
from agent.child import Evaluated, Finished, Phase, Stepped, TrainTask
from agent.data import DataConfig
from agent.trainers import Running, TrainingFailed
from agent.trainers.loop import learning_rate
from agent.trainers.lora import adapted, scale_of
from agent.trainers.meter import Meter, out_of_memory_named
from agent.trainers.qlora import QLora, draw_seed
from protocol.adapters import Adapter, canonical
from protocol.errors import BadConfig, BadMessage, BadUpdate
from protocol.messages import Base, Bits, Evaluation, Training
from protocol.models import write_model
from protocol.updates import LoraUpdate

MakeTask = Callable[..., TrainTask]


def run(running: Running, stop_at: int | None = None) -> tuple[list[Any], Finished]:
    """Drain a trainer; tell it to stop with the stop_at-th progress."""
    events: list[Any] = []
    stop = False
    try:
        while True:
            events.append(running.send(stop) if events else next(running))
            stop = len([e for e in events if isinstance(e, Stepped)]) == stop_at
    except StopIteration as end:
        return events, end.value


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, Stepped)]


def update(finished: Finished) -> Adapter:
    opened = LoraUpdate.open(Path(finished.file), max_bytes=2**30)
    return {name: opened.factors(name) for name in opened.ranks}


@pytest.mark.parametrize("bits", ["none", "int8", "nf4"])
def test_it_learns_at_any_bits(make_task: MakeTask, all_ranks: dict[str, int], bits: Bits) -> None:
    trainer = QLora()
    events, finished = run(trainer.train(make_task(bits=bits, n_steps=40, learning_rate=1e-2)))
    found = losses(events)
    assert found[-1] < 0.65 * found[0]
    assert [e.name for e in events if isinstance(e, Phase)] == ["loading", "training"]
    assert finished.samples == 40 * 8
    assert finished.steps == 40
    assert finished.stopped == ""
    assert finished.loss == pytest.approx(np.mean(found))
    assert finished.tokens == [e for e in events if isinstance(e, Stepped)][-1].tokens
    learnt = update(finished)
    assert {name: factors.rank for name, factors in learnt.items()} == all_ranks
    scores = LoraUpdate.open(Path(finished.file), max_bytes=2**30).scores
    assert {name: len(found) for name, found in scores.items()} == all_ranks, "one for each triplet"
    assert all(max(found) > 0 for found in scores.values())
    assert all(np.abs(factors.b).max() > 0 for factors in learnt.values())


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_at_version_zero_it_is_the_run_that_peft_alone_makes(
    make_task: MakeTask, llama_folder: Path, records: list[dict[str, str]], tokenizer: Any, bits: Bits
) -> None:
    task = make_task(
        bits=bits, n_steps=12, held_out_ratio=0.0, warmup_steps=4, max_gradient_norm=0.5, update_dtype="fp32"
    )
    events, finished = run(QLora().train(task))
    theirs, model = by_hand(task, llama_folder, records, tokenizer)
    np.testing.assert_allclose(losses(events), theirs, rtol=1e-5)
    for name, factors in update(finished).items():
        layer = model.get_base_model().get_submodule(name)
        np.testing.assert_allclose(factors.a, layer.lora_A["default"].weight.detach(), atol=2e-5)
        theirs_b = scale_of(2.0, 4) * layer.lora_B["default"].weight.detach().numpy()
        np.testing.assert_allclose(factors.b, theirs_b, atol=2e-5)


def by_hand(task: TrainTask, folder: Path, records: list[dict[str, str]], tokenizer: Any) -> tuple[list[float], Any]:
    """QLoRA written straight against PEFT and torch, sharing only the seeds."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    training = task.plan.train
    assert training is not None
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantized = {"quantization_config": config} if task.plan.bits == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantized)
    torch.manual_seed(draw_seed(task.plan, "adapter"))
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=4 * scale_of(2.0, 4), lora_dropout=0.0, target_modules=modules)
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    found = []
    for step in range(training.n_steps):
        epoch, at = divmod(step * 8, len(records))
        order = random.Random(f"{draw_seed(task.plan, 'order')}/{epoch}").sample(records, len(records))
        texts = [item["prompt"] + item["completion"] + "<eos>" for item in order[at : at + 8]]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, item in enumerate(order[at : at + 8]):
            labels[row, : len(tokenizer(item["prompt"])["input_ids"])] = -100
        loss = model(**{k: v for k, v in batch.items() if k != "token_type_ids"}, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1.0, (step + 1) / 4)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model


def test_training_evaluating_and_training_again_keeps_gradients_alive(
    all_ranks: dict[str, int], make_task: MakeTask
) -> None:
    """On CPUs with AVX512-BF16 an unguarded evaluation re-packs the 4-bit weights and all later gradients are None."""
    trainer = QLora()
    task = make_task(bits="nf4", evaluate=Evaluation(max_samples=8, metrics=["exact_match"], max_new_tokens=4))
    run(trainer.train(task), stop_at=None)
    base = trainer._loaded
    assert base is not None
    events, _ = run(trainer.train(task))  # evaluates first, on the base that has trained and been evaluated before
    found = losses(events[[isinstance(e, Phase) and e.name == "training" for e in events].index(True) :])
    assert found[-1] < found[0] - 0.5
    with adapted(base.model, {}, all_ranks, 2.0, seed=0) as model:
        model.model.eval()
        model.model(input_ids=torch.arange(8)[None], use_cache=False)
        model.model.train()
        logits = model.model(input_ids=torch.arange(8)[None], use_cache=False).logits
        logits.square().mean().backward()
        dead = [name for name, p in model.model.named_parameters() if "lora_B" in name and not p.grad.abs().sum() > 0]
    assert dead == []


def test_a_second_round_goes_on_from_the_first(make_task: MakeTask, tmp_path: Path) -> None:
    trainer = QLora()
    wanted = Evaluation(max_samples=50, metrics=["perplexity", "token_accuracy", "unknown"])
    task = make_task(bits="nf4", n_steps=40, evaluate=wanted, held_out_ratio=0.2)
    events, finished = run(trainer.train(task))
    before = next(e.result for e in events if isinstance(e, Evaluated))
    model_file = tmp_path / "model.bin"
    merged = {name: canonical(factors, 3) for name, factors in update(finished).items()}
    write_model(model_file, merged, version=1, dtype="fp32")
    plan = msgspec.structs.replace(task.plan, round=2, version=1)
    events, finished = run(trainer.train(msgspec.structs.replace(task, plan=plan, model_file=str(model_file))))
    after = next(e.result for e in events if isinstance(e, Evaluated))
    assert after.loss < 0.7 * before.loss
    assert (after.version, after.n_samples) == (1, before.n_samples)
    assert after.metrics["perplexity"] == pytest.approx(np.exp(after.loss))
    assert after.metrics["token_accuracy"] > before.metrics["token_accuracy"]
    assert "unknown" not in after.metrics
    found = losses(events[[isinstance(e, Evaluated) for e in events].index(True) :])
    assert found[0] == pytest.approx(after.loss, rel=0.3)  # B = 0: it starts where the received version is
    assert np.mean(found[-5:]) < found[0]


def test_a_model_that_the_disk_spoiled_is_not_there_any_more(make_task: MakeTask, tmp_path: Path) -> None:
    spoiled = tmp_path / "model.bin"
    spoiled.write_bytes(b"")
    with pytest.raises(BadUpdate):
        run(QLora().train(make_task(n_steps=1, model_file=str(spoiled))))
    assert not spoiled.exists()


def test_only_the_energy_that_was_asked_for_is_sent(make_task: MakeTask) -> None:
    trainer = QLora()
    _, finished = run(trainer.train(make_task(n_steps=4, update_dtype="fp32")))
    whole = update(finished)
    _, finished = run(trainer.train(make_task(n_steps=4, update_dtype="nf4", kept_energy_ratio=0.8)))
    cut = update(finished)
    assert sum(f.rank for f in cut.values()) < sum(f.rank for f in whole.values())
    for name, factors in whole.items():
        assert 0.75 * factors.norm() ** 2 < cut[name].norm() ** 2 < 1.05 * factors.norm() ** 2


def test_the_same_plan_makes_the_same_update_and_another_round_another(make_task: MakeTask) -> None:
    trainer = QLora()
    made = []
    for number in (1, 1, 2):
        _, finished = run(trainer.train(make_task(round=number, n_steps=3)))
        made.append(update(finished))
    for name in made[0]:
        np.testing.assert_array_equal(made[0][name].b, made[1][name].b)
        assert not np.array_equal(made[0][name].b, made[2][name].b)


def test_a_stop_returns_what_there_is_with_true_counts(make_task: MakeTask) -> None:
    events, finished = run(QLora().train(make_task(n_steps=1000)), stop_at=3)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert len(steps) == finished.steps == 3
    assert finished.samples == 24
    assert finished.stopped == "stop"
    assert any(factors.b.any() for factors in update(finished).values())


def test_a_stop_between_micro_batches_applies_them_as_if_they_were_the_step(make_task: MakeTask) -> None:
    trainer = QLora()
    _, halved = run(trainer.train(make_task(n_steps=5, accumulation=4, update_dtype="fp32")), stop_at=2)
    _, whole = run(trainer.train(make_task(n_steps=1, accumulation=2, update_dtype="fp32", out_file=halved.file + "2")))
    assert (halved.samples, halved.steps, halved.stopped) == (16, 1, "stop")
    assert (whole.samples, whole.steps, whole.stopped) == (16, 1, "")
    assert halved.loss == pytest.approx(whole.loss)
    for name, factors in update(whole).items():
        np.testing.assert_allclose(update(halved)[name].b, factors.b, rtol=1e-3, atol=1e-6)


def test_accumulation_is_the_large_batch(make_task: MakeTask) -> None:
    trainer = QLora()
    one, _ = run(trainer.train(make_task(n_steps=4, batch=16)))
    four, _ = run(trainer.train(make_task(n_steps=4, batch=4, accumulation=4)))
    np.testing.assert_allclose(losses(four)[3::4], losses(one), rtol=1e-4)


def test_a_stop_before_the_first_step_leaves_no_update(make_task: MakeTask) -> None:
    task = make_task(evaluate=Evaluation(max_samples=100), held_out_ratio=0.5, batch=4)
    events, finished = run(QLora().train(task), stop_at=1)
    assert (finished.file, finished.samples, finished.stopped) == ("", 0, "stop")
    assert not any(isinstance(event, Evaluated) for event in events)
    assert not Path(task.out_file).exists()


def test_a_stop_before_loading_costs_no_loading(make_task: MakeTask) -> None:
    trainer = QLora()
    running = trainer.train(make_task())
    assert next(running) == Phase(name="loading")
    with pytest.raises(StopIteration) as end:
        running.send(True)
    assert end.value.value == Finished(stopped="stop")
    assert trainer._loaded is None


def test_packing_and_checkpointing_learn_too(make_task: MakeTask) -> None:
    trainer = QLora()
    plain, _ = run(trainer.train(make_task(n_steps=8)))
    checkpointed, _ = run(trainer.train(make_task(n_steps=8, checkpointing=True)))
    np.testing.assert_allclose(losses(checkpointed), losses(plain), rtol=1e-4)
    again, _ = run(trainer.train(make_task(n_steps=8)))
    assert losses(again) == losses(plain)
    events, finished = run(trainer.train(make_task(n_steps=8, batch=2, packing=True, max_tokens=128)))
    assert losses(events)[-1] < losses(events)[0]
    assert finished.samples > 8 * 2 * 2


def test_a_survey_and_an_evaluation(make_task: MakeTask, all_ranks: dict[str, int]) -> None:
    trainer = QLora()
    events, finished = run(trainer.survey(make_task(purpose="survey", train=None, ranks={})))
    assert finished == Finished()
    phase, surveyed = events
    assert phase == Phase(name="loading")
    found = surveyed.result
    assert {matrix.name for matrix in found.matrices} == set(all_ranks)
    assert found.n_train + found.n_eval == 160
    assert re.fullmatch("[0-9a-f]{64}", found.base_sha256)
    only = make_task(
        purpose="evaluate",
        train=None,
        evaluate=Evaluation(max_samples=5),
        base=Base(source="x", sha256=found.base_sha256),
    )
    events, finished = run(trainer.train(only))
    assert finished == Finished()
    assert next(e.result for e in events if isinstance(e, Evaluated)).n_samples == 5


def test_another_base_than_the_plans_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(TrainingFailed, match=r"base_mismatch: .*fetch the same model"):
        run(QLora().train(make_task(base=Base(source="x", sha256="0" * 64))))


def test_a_loss_that_is_not_finite_is_named(make_task: MakeTask, llama_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingFailed, match="loss is not finite"):
        run(QLora().train(make_task(base_folder=str(broken))))


def test_what_cannot_be_trained_is_a_named_fault(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    for changes, fault, text in [
        ({"ranks": {}}, BadMessage, "at least one matrix"),
        ({"train": None}, BadMessage, "needs `train`"),
        ({"batch": 4096, "accumulation": 4096}, BadMessage, "samples in one step"),
        ({"ranks": {"model.layers.9.mlp.up_proj": 4}}, BadMessage, "does not have"),
        ({"data": DataConfig(path=str(tmp_path / "gone"))}, BadConfig, "does not exist"),
        ({"base_folder": str(tmp_path / "gone")}, BadConfig, "no model folder"),
        ({"base_folder": str(tmp_path)}, BadConfig, "cannot be loaded"),
        ({"device": "cuda:7"}, BadConfig, "is not here"),
    ]:
        with pytest.raises(fault, match=text):
            run(QLora().train(make_task(**changes)))


def test_running_out_of_memory_is_named_with_bytes() -> None:
    with (
        pytest.raises(TrainingFailed, match=r"out_of_memory: predicted 0 bytes, measured 0 bytes: .*can't allocate"),
        out_of_memory_named(Meter()),
    ):
        torch.empty(2**52)
    with pytest.raises(RuntimeError, match=r"size mismatch|must match"), out_of_memory_named(Meter()):
        _ = torch.zeros(2) + torch.zeros(3)


def test_warm_up_is_linear_then_constant() -> None:
    training = Training(n_steps=9, learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(training, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(Training(n_steps=9, learning_rate=1.0), 0) == 1.0


def test_gpt2_learns_in_four_bits(make_task: MakeTask, gpt2_folder: Path) -> None:
    ranks = {matrix.name: 4 for matrix in loading.survey(gpt2_folder)}
    task = make_task(base_folder=str(gpt2_folder), ranks=ranks, bits="nf4", n_steps=20)
    events, finished = run(QLora().train(task))
    assert losses(events)[-1] < losses(events)[0] - 0.5
    assert {name: factors.shape for name, factors in update(finished).items()} == {
        matrix.name: (matrix.d_out, matrix.d_in) for matrix in loading.survey(gpt2_folder)
    }
