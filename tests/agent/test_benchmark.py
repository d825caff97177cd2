"""The micro-benchmark on a real tiny model: points that make sense, limits that hold, a base left as it was."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agent import loading
from agent.batches import Batch, pad
from agent.data.tokens import Tokens
from agent.loading import Loaded
from agent.trainers import benchmark
from agent.trainers.benchmark import Measured, checkpointed, measure
from agent.trainers.lora import adapted
from agent.trainers.meter import anonymous_bytes
from protocol.messages import Bits, Calibration


def text(size: int) -> Iterator[Batch]:
    n = 0
    while True:
        n += 1
        rows = [list(range(3, 3 + 8 + (5 * n + row) % 9)) for row in range(size)]
        yield pad([Tokens(ids=ids, labels=ids) for ids in rows], 0)


def start(base: Loaded, bits: Bits = "none", **changes: Any) -> Generator[Any, bool, Measured]:
    settings: dict[str, Any] = {"dimensions": None, "limit_bytes": 0, "deadline": time.monotonic() + 120} | changes
    batches = settings.pop("batches", [1, 4])
    return measure(base, text, Calibration(batches=batches), bits=bits, **settings)


def finish(running: Generator[Any, bool, Measured]) -> Measured:
    try:
        while True:
            next(running)
    except StopIteration as end:
        found: Measured = end.value
        return found


@pytest.fixture(scope="module")
def base(llama_folder: Path) -> Loaded:
    return loading.load(llama_folder, "none", torch.device("cpu"))


def test_points_differ_in_everything_that_costs_and_leave_the_base_alone(base: Loaded) -> None:
    before = {name: type(module) for name, module in base.model.named_modules()}
    found = finish(start(base))
    assert found.notes == []
    assert len({p.n_tokens for p in found.points}) == 2
    for field in ("rank", "skip", "frozen_rank", "checkpointing"):
        assert len({getattr(p, field) for p in found.points}) > 1, field
    assert all(0 < p.step_s < 30 and p.n_tokens <= p.max_tokens for p in found.points)
    assert all(50e6 < p.peak_bytes < 20e9 for p in found.points)
    assert {name: type(module) for name, module in base.model.named_modules()} == before
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.is_gradient_checkpointing


def test_one_size_of_batch_is_cut_in_half_for_a_second_count_of_tokens(base: Loaded) -> None:
    found = finish(start(base, batches=[2]))
    assert len({p.n_tokens for p in found.points}) == 2
    assert {p.batch for p in found.points} == {2}


def test_what_is_predicted_not_to_fit_is_not_tried(base: Loaded) -> None:
    none = finish(start(base, limit_bytes=1))
    assert none.points == []
    assert any("bytes are missing" in note for note in none.notes)
    limit = anonymous_bytes() + 4 * 2**20
    some = finish(start(base, batches=[1, 4, 512], limit_bytes=limit))
    assert some.points
    assert max(p.batch for p in some.points) == 4


def test_running_out_of_memory_all_the_same_is_a_note(base: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = type(base.model).forward, []

    def scarce(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if kwargs["input_ids"].shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(base.model), "forward", scarce)
    found = finish(start(base))
    assert {p.batch for p in found.points} == {1}
    assert any("ran out of memory" in note for note in found.notes)
    assert not any(
        isinstance(module, torch.nn.Module) and "lora" in name for name, module in base.model.named_modules()
    )


def test_a_stop_and_the_deadline_end_it_with_what_there_is(base: Loaded) -> None:
    assert finish(start(base, deadline=time.monotonic())).points == []
    running = start(base)
    for _ in range(benchmark.N_STEPS + 1):
        next(running)
    with pytest.raises(StopIteration) as end:
        running.send(True)
    assert len(end.value.value.points) == 1


def test_it_runs_on_a_four_bit_base(llama_folder: Path) -> None:
    quantized = loading.load(llama_folder, "nf4", torch.device("cpu"))
    found = finish(start(quantized, "nf4", dimensions=loading.dimensions(llama_folder)))
    assert {p.bits for p in found.points} == {"nf4"}
    assert len(found.points) >= 6


def test_checkpointing_sends_no_gradient_below_the_first_trained_matrix(base: Loaded) -> None:
    ids, ranks = torch.ones(1, 4, dtype=torch.long), {"model.layers.1.mlp.down_proj": 2}
    with adapted(base.model, {}, ranks, 2.0, seed=0):
        with checkpointed(base.model, is_on=True):
            base.model.train()
            assert base.model.is_gradient_checkpointing
            assert not base.model.get_input_embeddings()(ids).requires_grad
            assert base.model(input_ids=ids, use_cache=False).logits.requires_grad
        assert not base.model.is_gradient_checkpointing
        assert not base.model.get_input_embeddings()(ids).requires_grad
