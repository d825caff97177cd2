"""Published baselines on the agent: where their adapters start, what of them learns, what is sent, and that they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent import loading, trainers
from agent.child import Evaluated, Finished, Stepped, TrainTask
from agent.trainers import Running
from agent.trainers.lora import adapted, common_rows
from agent.trainers.qlora import QLora
from protocol import methods
from protocol.adapters import Adapter, Factors, truncate
from protocol.errors import BadUpdate
from protocol.messages import Evaluation
from protocol.models import write_model
from protocol.updates import LoraUpdate, open_update

CPU = torch.device("cpu")
SCALE = 2.0
Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
MakeTask = Callable[..., TrainTask]


def run(running: Running) -> tuple[list[Any], Finished]:
    events: list[Any] = []
    try:
        while True:
            events.append(next(running))
    except StopIteration as end:
        return events, end.value


def told_to_stop(running: Running) -> Finished:
    try:
        while True:
            running.send(True)
    except StopIteration as end:
        return end.value


def sent(task: TrainTask) -> Adapter:
    update = LoraUpdate.open(Path(task.out_file), max_bytes=10**9)
    return {name: update.factors(name) for name in update.ranks}


def received(folder: Path, adapter: Adapter) -> dict[str, Any]:
    write_model(folder / "model", adapter, version=1, dtype="fp32")
    return {"model_file": str(folder / "model"), "version": 1, "round": 2}


def drawn(model: Any, names: list[str], rank: int) -> Adapter:
    rng = np.random.default_rng(0)
    shapes = {m.name: (m.d_out, m.d_in) for m in loading.matrices(model)}
    return {
        name: Factors(
            a=rng.normal(0, 0.1, (rank, shapes[name][1])).astype(np.float32),
            b=rng.normal(0, 0.1, (shapes[name][0], rank)).astype(np.float32),
        )
        for name in names
    }


def test_a_continued_adapter_begins_with_the_first_components_and_replaces_the_frozen_one(llama_folder: Path) -> None:
    base = loading.load(llama_folder, "none", CPU).model
    known = drawn(base, [Q, UP, DOWN], 4)
    ranks = {Q: 2, UP: 6}
    ids = torch.arange(12)[None]
    cut = {Q: truncate(known[Q], 2), UP: known[UP], DOWN: known[DOWN]}  # an untrained matrix keeps all it has
    with adapted(base, cut, {}, SCALE, seed=3) as model, torch.no_grad():
        expected = model.model(input_ids=ids, use_cache=False).logits
    with adapted(base, known, ranks, SCALE, seed=3, start="continued") as model:
        with torch.no_grad():
            found = model.model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        start = model.local()
        assert len(model.parameters) == 4
    np.testing.assert_array_equal(start[Q].a, known[Q].a[:2])
    np.testing.assert_allclose(start[Q].b, known[Q].b[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(start[UP].a[4:], common_rows(UP, 6, 64, 3)[4:])
    assert not start[UP].b[:, 4:].any()


def test_all_agents_of_a_job_share_one_random_start() -> None:
    rows = common_rows(Q, 8, 64, seed=5)
    np.testing.assert_array_equal(common_rows(Q, 3, 64, seed=5), rows[:3])
    assert not np.array_equal(common_rows(UP, 8, 64, seed=5), rows)
    assert not np.array_equal(common_rows(Q, 8, 64, seed=6), rows)
    assert 0.9 / 8 < np.abs(rows).max() <= 1 / 8


@pytest.mark.parametrize("name", ["fedavg", "ffalora", "flora"])
def test_every_method_learns_over_two_rounds_and_sends_its_kind(
    name: str, make_task: MakeTask, all_ranks: dict[str, int], tmp_path: Path
) -> None:
    method = methods.load(name)
    trainer = trainers.load(method.trainer)()
    assert trainer.produces == method.kind
    first = make_task(method=name, n_steps=30, learning_rate=1e-2, data_seed=9, update_dtype="fp32")
    events, _ = run(trainer.train(first))
    open_update(Path(first.out_file), method.kind, job="test", round=1, attempt=1, max_bytes=10**8)
    other = "lora" if method.kind == "lora-values" else "lora-values"
    with pytest.raises(BadUpdate, match="offered as"):
        open_update(Path(first.out_file), other, job="test", round=1, attempt=1, max_bytes=10**8)
    learnt = sent(first)
    again = make_task(
        method=name, n_steps=20, learning_rate=1e-2, data_seed=9, update_dtype="fp32", **received(tmp_path, learnt)
    )
    later, _ = run(trainer.train(again))
    losses = [e.loss for e in [*events, *later] if isinstance(e, Stepped)]
    assert np.mean(losses[-5:]) < np.mean(losses[25:30]) < np.mean(losses[:5])
    assert np.mean(losses[30:33]) < 0.8 * np.mean(losses[:3])  # the second round begins where the first ended
    now = sent(again)
    moved = {n: np.abs(now[n].a - learnt[n].a).max() for n in all_ranks}
    if name == "ffalora":
        assert not any(moved.values())
        np.testing.assert_array_equal(learnt[Q].a, common_rows(Q, 4, 64, 9))
    else:
        assert all(moved.values())
    if name == "flora":  # a change, not the model: it begins at zero, elsewhere
        assert np.abs(now[Q].a - learnt[Q].a).max() > 0.05


def test_agents_of_different_ranks_measure_the_same_received_version(
    make_task: MakeTask, all_ranks: dict[str, int], llama_folder: Path, tmp_path: Path
) -> None:
    known = drawn(loading.load(llama_folder, "none", CPU).model, list(all_ranks), 6)
    asked = {"evaluate": Evaluation(max_samples=20), "held_out_ratio": 0.2, "n_steps": 1, **received(tmp_path, known)}
    small = dict.fromkeys(all_ranks, 1)
    found = []
    for trainer, ranks in [
        (trainers.load("continued")(), small),
        (trainers.load("continued")(), all_ranks),
        (QLora(), small),
    ]:
        events, finished = run(trainer.train(make_task(ranks=ranks, **asked)))
        assert finished.steps == 1
        found.append(next(e.result.loss for e in events if isinstance(e, Evaluated)))
    assert found == pytest.approx([found[2]] * 3, rel=1e-5)


def test_a_stop_while_measuring_ends_the_share(make_task: MakeTask) -> None:
    running = trainers.load("continued")().train(make_task(evaluate=Evaluation(max_samples=20), held_out_ratio=0.2))
    while not isinstance(next(running), Stepped):
        pass
    assert told_to_stop(running) == Finished(stopped="stop")
