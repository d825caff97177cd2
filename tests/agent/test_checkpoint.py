"""A training that was interrupted anywhere and goes on in another process hands over the very bytes of one that was not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import checkpoints
from agent.child import Evaluated, Finished, Phase, Resumed, Stepped, TrainTask
from agent.data import DataConfig
from agent.trainers import TrainingFailed, insisting, resuming
from agent.trainers.baselines import Continued
from agent.trainers.qlora import QLora
from protocol.adapters import Adapter, canonical
from protocol.messages import Evaluation
from protocol.models import write_model
from protocol.updates import LoraUpdate

MakeTask = Callable[..., TrainTask]

LONG = {"n_steps": 11, "batch": 4, "accumulation": 3, "warmup_steps": 4, "bits": "nf4", "checkpointing": True}


def run(trainer: QLora, task: TrainTask, *, until: int | None = None, suspend: bool = False) -> tuple[list[Any], Any]:
    """The events of a run, and its end: whole, or broken off at the `until`-th micro-batch, by a death or in order."""
    running = trainer.train(task)
    events: list[Any] = []
    try:
        event = next(running)
        while True:
            events.append(event)
            if sum(isinstance(e, Stepped) for e in events) == until:
                if suspend:
                    assert trainer.suspend() is not None
                running.close()
                return events, None
            event = running.send(False)
    except StopIteration as end:
        return events, end.value


def resumed(events: list[Any]) -> list[int]:
    return [event.step for event in events if isinstance(event, Resumed)]


def whole(make_task: MakeTask, trainer: type[QLora] = QLora, **changes: Any) -> tuple[bytes, Finished]:
    _, finished = run(trainer(), make_task(**changes))
    return Path(finished.file).read_bytes(), finished


@pytest.fixture
def kept(make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTask:
    """A task that is kept after every step, however long that takes."""
    monkeypatch.setattr(resuming, "SHARE", 0)

    def make(**changes: Any) -> TrainTask:
        return make_task(**{"checkpoint": str(tmp_path / "training.checkpoint"), "checkpoint_s": 1e-9} | changes)

    return make


@pytest.mark.parametrize("suspend", [False, True], ids=["killed", "suspended"])
@pytest.mark.parametrize(
    ("changes", "cuts"),
    [
        (LONG, (4, 17)),
        ({"n_steps": 20, "packing": True, "batch": 2, "max_tokens": 128, "bits": "none", "weight_decay": 0.1}, (9, 7)),
    ],
    ids=["accumulated", "packed"],
)
def test_broken_off_twice_it_is_the_same_update(
    make_task: MakeTask, kept: MakeTask, changes: dict[str, Any], cuts: tuple[int, int], suspend: bool
) -> None:
    wanted, undisturbed = whole(make_task, **changes)
    task = kept(**changes)
    n = changes.get("accumulation", 1)
    run(QLora(), task, until=cuts[0], suspend=suspend)
    first = cuts[0] // n
    events, _ = run(QLora(), task, until=cuts[1], suspend=suspend)
    assert resumed(events) == [first]
    assert next(e.step for e in events if isinstance(e, Stepped)) == first + (n == 1), "progress goes on where it was"
    events, finished = run(QLora(), task)
    assert resumed(events) == [first + cuts[1] // n]
    assert Path(finished.file).read_bytes() == wanted
    for name in ("samples", "steps", "tokens", "loss", "stopped"):
        assert getattr(finished, name) == getattr(undisturbed, name)


@pytest.mark.parametrize("cut", [1, 7])
def test_dropout_goes_on_where_it_was(make_task: MakeTask, kept: MakeTask, gpt2_folder: Path, cut: int) -> None:
    """GPT-2's own dropout draws random numbers in every step."""
    ranks = {f"transformer.h.{i}.attn.c_attn": 4 for i in range(2)}
    changes = {"base_folder": str(gpt2_folder), "ranks": ranks, "n_steps": 6, "accumulation": 2, "bits": "none"}
    wanted, _ = whole(make_task, **changes)
    other, _ = whole(make_task, **changes | {"seed": 4})
    assert other != wanted
    run(QLora(), kept(**changes), until=cut, suspend=True)
    events, finished = run(QLora(), kept(**changes))
    assert resumed(events) == [cut // 2]
    assert Path(finished.file).read_bytes() == wanted


def adapter_of(file: str) -> Adapter:
    opened = LoraUpdate.open(Path(file), max_bytes=2**30)
    return {name: canonical(opened.factors(name), 3) for name in opened.ranks}


@pytest.mark.parametrize("trainer", [QLora, Continued])
def test_what_was_measured_is_told_and_not_measured_again(
    make_task: MakeTask, kept: MakeTask, tmp_path: Path, trainer: type[QLora]
) -> None:
    """Also in a later round, with a received model under the adapter."""
    _, first = run(QLora(), make_task())
    model_file = tmp_path / "model.bin"
    write_model(model_file, adapter_of(first.file), version=1, dtype="fp32")
    ask = Evaluation(max_samples=8)
    changes = {"round": 2, "version": 1, "model_file": str(model_file), "evaluate": ask, "held_out_ratio": 0.2}
    events, finished = run(trainer(), make_task(**changes))
    wanted = Path(finished.file).read_bytes()
    (measured,) = [event.result for event in events if isinstance(event, Evaluated)]
    n_batches = sum(isinstance(e, Stepped) for e in events) - 10
    run(trainer(), kept(**changes), until=n_batches + 3)
    events, finished = run(trainer(), kept(**changes, issued_at=9.0, stop_after_s=50.0, attempt=2))
    assert [event.result for event in events if isinstance(event, Evaluated)] == [measured]
    assert [event.name for event in events if isinstance(event, Phase)] == ["loading", "training"]
    assert resumed(events) == [3]
    assert adapter_of(finished.file).keys() == first_keys(make_task)
    assert len(Path(finished.file).read_bytes()) == len(wanted)


def first_keys(make_task: MakeTask) -> set[str]:
    return set(make_task().plan.ranks)


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 2},
        {"job": "other"},
        {"n_steps": 12},
        {"learning_rate": 1e-3},
        {"bits": "nf4"},
        {"data_seed": 1},
        {"held_out_ratio": 0.3},
        {"alpha": 4.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_training_begins_afresh(kept: MakeTask, changes: dict[str, Any]) -> None:
    key = place(kept())
    assert place(kept(**changes)) != key
    assert place(kept(attempt=7, stop_after_s=1.0, predicted_bytes=5)) == key, "the same training, asked for again"


def place(task: TrainTask) -> str:
    import torch

    from agent.data import Example

    examples = [Example(b"1", "", "a"), Example(b"2", "", "b")]
    return resuming.place(task, "b" * 64, examples, torch.device("cpu"), 0.0).key


def test_other_text_or_another_base_begins_afresh(kept: MakeTask, data_file: Path, tmp_path: Path) -> None:
    run(QLora(), kept(), until=3)
    lines = data_file.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(lines)))
    for task in (kept(data=DataConfig(path=str(other))), kept(data=DataConfig(path=str(data_file), max_examples=150))):
        events, _ = run(QLora(), task, until=1)
        assert resumed(events) == []
        run(QLora(), kept(), until=3)
    events, _ = run(QLora(), kept(), until=1)
    assert resumed(events) == [3]


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: damaged(data, len(data) // 2),
        lambda data: damaged(data, 2),
        lambda data: damaged(data, 8),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 3],
        lambda _: b"",
        lambda data: data.replace(b"\xa1v\x01", b"\xa1v\x02", 1),
    ],
    ids=["flipped", "magic", "header", "torn", "half", "empty", "newer"],
)
def test_what_is_damaged_is_no_checkpoint(
    kept: MakeTask, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    task = kept()
    run(QLora(), task, until=2)
    file = Path(task.checkpoint)
    data = file.read_bytes()
    file.write_bytes(spoil(data))
    assert file.read_bytes() != data
    caplog.set_level(logging.WARNING)
    events, _ = run(QLora(), task, until=1)
    assert resumed(events) == []
    assert [vars(record)["action"] for record in caplog.records] == ["checkpoint_lost"]


def test_a_disk_that_refuses_costs_the_checkpoint_and_nothing_else(
    make_task: MakeTask, kept: MakeTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted, _ = whole(make_task)
    caplog.set_level(logging.WARNING)
    task = kept(checkpoint=str(tmp_path / "gone" / "training.checkpoint"))
    _, finished = run(QLora(), task)
    assert Path(finished.file).read_bytes() == wanted
    assert [vars(record)["action"] for record in caplog.records] == ["checkpoint_failed"], "said once"


def test_kept_only_when_asked_for_or_due(kept: MakeTask) -> None:
    task = kept(checkpoint_s=1e6)
    run(QLora(), task, until=5)
    assert not Path(task.checkpoint).exists()
    trainer = QLora()
    assert trainer.suspend() is None, "there is nothing yet"
    run(trainer, task, until=5, suspend=True)
    assert checkpoints.steps_at(Path(task.checkpoint), "test", 1) == 5
    assert checkpoints.steps_at(Path(task.checkpoint), "test", 2) is None
    assert trainer.suspend() is None, "that run is over"


def test_told_to_stop_as_soon_as_it_is_resumed_it_hands_over_what_was_kept(kept: MakeTask) -> None:
    run(QLora(), kept(), until=4, suspend=True)
    running = QLora().train(kept())
    while not isinstance(next(running), Resumed):
        pass
    with pytest.raises(StopIteration) as end:
        running.send(True)
    finished = end.value.value
    assert (finished.steps, finished.samples, finished.stopped) == (4, 32, "stop")
    assert finished.file


def test_an_update_that_finds_no_room_waits_for_it(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insisting, "AGAIN_S", 0.0)
    folder = tmp_path / "absent"
    wanted, _ = whole(make_task)
    running = QLora().train(make_task(out_file=str(folder / "update.bin")))
    event = next(running)
    while event != Phase(name="saving"):
        event = running.send(False)
    assert [running.send(False) for _ in range(3)] == [Phase(name="saving")] * 3
    folder.mkdir()
    with pytest.raises(StopIteration) as end:
        running.send(False)
    assert Path(end.value.value.file).read_bytes() == wanted


def test_an_update_that_never_finds_room_fails_by_name_after_a_stop(
    make_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(insisting, "AGAIN_S", 0.0)
    monkeypatch.setattr(insisting, "LAST_TRIES_S", 0.0)
    running = QLora().train(make_task(n_steps=1, out_file=str(tmp_path / "absent" / "update.bin")))
    event = next(running)
    while event != Phase(name="saving"):
        event = running.send(False)
    with pytest.raises(TrainingFailed, match=r"disk: the update cannot be written: .*make room") as fault:
        running.send(True)
    assert fault.value.failed.reason == "disk"


def test_the_format_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "c"
    point = checkpoints.Point(3, 24, 100, 4.5, 1.0)
    parts = [os.urandom(3000), b"", os.urandom(17)]
    entries = [checkpoints.Entry(str(i), "uint8", (len(p),), len(p)) for i, p in enumerate(parts)]
    header = checkpoints.Header(key="k", job="j", round=2, point=point, rng={"torch": b"\0"}, tensors=entries)
    size = checkpoints.write(path, header, map(memoryview, parts))
    assert size == path.stat().st_size
    found = checkpoints.find(path, "k")
    assert found is not None
    assert found.header == header
    assert [(entry, bytes(data)) for entry, data in found.tensors()] == list(zip(entries, parts, strict=True))
    assert checkpoints.find(path, "other") is None
    assert checkpoints.find(tmp_path / "absent", "k") is None
    assert checkpoints.steps_at(path, "j", 2) == 3
    longer = msgspec.structs.replace(header, tensors=entries[:1])
    checkpoints.write(path, longer, map(memoryview, parts))
    assert checkpoints.find(path, "k") is None, "more bytes than its header names"
