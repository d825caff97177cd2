"""A survey that measures: what it brings, when it ends, what it remembers, and that its failure is not the survey's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from agent import loading
from agent.calibrations import MAX_KEPT, Calibrations, key
from agent.child import Calibrated, Finished, Phase, Stepped, Surveyed, TrainTask
from agent.data import DataConfig, split
from agent.loading import Loaded
from agent.supervisor import ChildConfig, Supervisor
from agent.trainers import Running
from agent.trainers.calibration import Outcome, calibrate, shapes_of
from agent.trainers.qlora import QLora
from protocol import messages
from protocol.messages import Bits, Calibration

MakeTask = Callable[..., TrainTask]
CPU = torch.device("cpu")
SMALL = Calibration(n_batches=2, probe_rank=4, bits=["nf4"], batches=[1, 2], max_tokens=64, max_s=100.0)


@pytest.fixture
def survey(make_task: MakeTask, tmp_path: Path) -> MakeTask:
    def make(ask: Calibration = SMALL, **changes: Any) -> TrainTask:
        settings = {"calibrations": str(tmp_path / "calibrations")} | changes
        return make_task(purpose="survey", train=None, ranks={}, calibration=ask, **settings)

    return make


def run(running: Running, stop_at: int | None = None) -> tuple[list[Any], Finished]:
    events: list[Any] = []
    stop = False
    try:
        while True:
            events.append(running.send(stop) if events else next(running))
            stop = stop or len([e for e in events if isinstance(e, Stepped)]) == stop_at
    except StopIteration as end:
        return events, end.value


def measured(events: list[Any]) -> messages.Calibrated:
    (found,) = (event.result for event in events if isinstance(event, Calibrated))
    return found


def scores(found: messages.Calibrated) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.frombuffer(found.scores, "<f4").reshape(-1, found.probe_rank)


def is_calibrating(events: list[Any]) -> bool:
    return Phase(name="calibrating") in events


# -------------------------------------------------------------------------------------------------- what it brings


def test_a_survey_brings_scores_shapes_points_and_losses(survey: MakeTask, all_ranks: dict[str, int]) -> None:
    events, finished = run(QLora().survey(survey(msgspec.structs.replace(SMALL, bits=["none", "nf4"]))))
    assert finished == Finished()
    assert [type(e) for e in events if not isinstance(e, Stepped)] == [Phase, Surveyed, Phase, Calibrated]
    found = measured(events)
    assert (found.device, found.compute, found.probe_rank) == ("cpu", "fp32", 4)
    assert scores(found).shape == (len(all_ranks), 4)
    assert (np.diff(scores(found)) <= 0).all()
    assert (scores(found)[:, 0] > 0).all()
    assert found.noise_scale > 0
    assert [shape.batch for shape in found.shapes] == [1, 2]
    assert {point.bits for point in found.points} == {"none", "nf4"}
    assert [point.bits for point in found.points] == sorted((p.bits for p in found.points), key=["nf4", "none"].index)
    assert found.losses.keys() == {"none", "nf4"}
    assert all(5 < loss < 7 for loss in found.losses.values()), "ln 384 and a little"
    assert found.seconds > 0
    surveyed = next(e.result for e in events if isinstance(e, Surveyed))
    assert surveyed.dimensions is not None
    assert surveyed.dimensions.n_layers == 2
    steps = [e.step for e in events if isinstance(e, Stepped)]
    assert steps == sorted(steps), "in per cent of the whole"
    assert max(steps) <= 100
    assert steps[-1] > 60


def test_gpt2_and_the_triplet_scorer(survey: MakeTask, gpt2_folder: Path) -> None:
    ask = msgspec.structs.replace(SMALL, scorer="triplet", warmup_steps=3)
    found = measured(run(QLora().survey(survey(ask, base_folder=str(gpt2_folder))))[0])
    assert len(scores(found)) == len(loading.survey(gpt2_folder))
    assert scores(found).max() > 0
    assert found.points


async def test_the_child_says_it_in_frames(survey: MakeTask, tmp_path: Path) -> None:
    supervisor = Supervisor(ChildConfig(threads=1), log=tmp_path / "child.log")
    events: list[Any] = []
    try:
        assert await supervisor.run(survey(), events.append) == Finished()
    finally:
        await supervisor.aclose()
    assert is_calibrating(events)
    assert measured(events).points


# ------------------------------------------------------------------------------------------------------ when it ends


def test_its_time_is_bounded_and_what_is_there_is_returned(survey: MakeTask) -> None:
    ask = msgspec.structs.replace(SMALL, max_s=0.01, n_batches=1000)
    events, finished = run(QLora().survey(survey(ask)))
    assert finished == Finished()
    found = measured(events)
    assert sum(isinstance(e, Stepped) for e in events) == 2, "one micro-batch, twice"
    assert scores(found).max() > 0
    assert found.points == []
    assert found.notes == [
        "matrices were scored on 1 of 1000 micro-batches: time ran out",
        "nf4: not measured, time ran out",
    ]
    assert is_calibrating(run(QLora().survey(survey(ask)))[0]), "what time cut short is not remembered"


def test_a_stop_ends_it_with_what_there_is(survey: MakeTask) -> None:
    events, finished = run(QLora().survey(survey()), stop_at=1)
    assert finished == Finished(stopped="stop")
    assert not any(isinstance(e, Calibrated) for e in events)
    events, finished = run(QLora().survey(survey()), stop_at=6)
    assert finished == Finished()
    assert sum(isinstance(e, Stepped) for e in events) < 12
    assert scores(measured(events)).max() > 0
    assert is_calibrating(run(QLora().survey(survey()), stop_at=1)[0]), "what a stop cut short is not remembered"


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_base_that_fits_at_no_width_is_surveyed_all_the_same(survey: MakeTask) -> None:
    events, finished = run(QLora().survey(survey(memory_limit_bytes=10**6)))
    assert any(isinstance(e, Surveyed) for e in events)
    assert not any(isinstance(e, Calibrated) for e in events)
    assert finished.stopped.startswith("nf4: the base alone exceeds the allowed memory by ")


def outcome(task: TrainTask, ask: Calibration, load: Callable[[Bits], Loaded]) -> Outcome:
    surveyed = next(e.result for e in run(QLora().survey(task))[0] if isinstance(e, Surveyed))
    parts = split.load(task.data, 0, 0.1)
    running = calibrate(ask, surveyed, parts, load, device=CPU, compute="fp32")
    try:
        while True:
            next(running)
    except StopIteration as end:
        result: Outcome = end.value
        return result


@pytest.mark.parametrize(
    ("fault", "is_complete", "is_short", "note"),
    [
        (torch.OutOfMemoryError("no more"), True, True, "int8: out_of_memory: "),
        (RuntimeError("no kernel image"), False, False, "int8: RuntimeError: no kernel image"),
        (ImportError("no bitsandbytes"), False, False, "int8: ImportError: no bitsandbytes"),
    ],
)
def test_one_width_that_breaks_leaves_the_others(
    survey: MakeTask, llama_folder: Path, fault: Exception, is_complete: bool, is_short: bool, note: str
) -> None:
    def load(bits: Bits) -> Loaded:
        if bits == "int8":
            raise fault
        return loading.load(llama_folder, bits, CPU)

    task = survey(msgspec.structs.replace(SMALL, max_s=0.01))
    done = outcome(task, msgspec.structs.replace(SMALL, bits=["int8", "nf4"]), load)
    assert done.calibrated is not None
    assert {point.bits for point in done.calibrated.points} == {"nf4"}
    assert (done.is_complete, done.is_short) == (is_complete, is_short)
    assert [n for n in done.calibrated.notes if n.startswith(note)]
    nothing = outcome(task, msgspec.structs.replace(SMALL, bits=["int8"]), load)
    assert nothing.calibrated is None
    assert nothing.why.startswith(note)


# ------------------------------------------------------------------------------------------------ what it remembers


def test_the_same_question_is_answered_from_memory(survey: MakeTask, tmp_path: Path) -> None:
    first = measured(run(QLora().survey(survey()))[0])
    more_time = msgspec.structs.replace(SMALL, max_s=50.0)
    events, finished = run(QLora().survey(survey(more_time, memory_limit_bytes=2**40)))
    assert finished == Finished()
    assert not is_calibrating(events)
    again = measured(events)
    assert again.seconds == 0
    assert again.notes[0].startswith("measured on 20")
    assert msgspec.structs.replace(again, seconds=first.seconds, notes=first.notes) == first
    (kept,) = (tmp_path / "calibrations").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    assert is_calibrating(run(QLora().survey(survey()))[0])
    assert not is_calibrating(run(QLora().survey(survey()))[0]), "and the damaged file is replaced"


def test_other_text_or_another_question_is_measured(survey: MakeTask, tmp_path: Path, data_file: Path) -> None:
    run(QLora().survey(survey()))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data_file.read_text().splitlines(keepends=True)[:80]))
    for task in (
        survey(data=DataConfig(path=str(other))),
        survey(msgspec.structs.replace(SMALL, probe_rank=2)),
        survey(data_seed=1),
    ):
        assert is_calibrating(run(QLora().survey(task), stop_at=1)[0])


KEPT = messages.Calibrated(device="cpu", probe_rank=1, scores=b"\0\0\0\0", seconds=9.0, notes=["n"] * 16)


def test_what_lacked_memory_holds_until_there_is_more(tmp_path: Path) -> None:
    store = Calibrations(tmp_path / "c")
    assert store.find("a", limit_bytes=0) is None
    store.keep("a", KEPT, now=1.6e9, short_at_bytes=1000)
    found = store.find("a", limit_bytes=1000)
    assert found is not None
    assert found.notes == ["measured on 2020-09-13", *["n"] * 15]
    assert store.find("a", limit_bytes=900) is not None
    assert store.find("a", limit_bytes=1101) is None
    assert store.find("a", limit_bytes=0) is None, "no limit is more than any"
    store.keep("b", KEPT, now=1.6e9)
    assert store.find("b", limit_bytes=0) is not None
    assert store.find("b", limit_bytes=10**9) is not None


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x93\x00\x00\xc0", msgspec.msgpack.encode((1e300, 0, KEPT))])
def test_a_damaged_file_is_no_calibration(tmp_path: Path, damage: bytes) -> None:
    store = Calibrations(tmp_path)
    (tmp_path / "a.calibrated").write_bytes(damage)
    assert store.find("a", limit_bytes=0) is None
    store.keep("a", KEPT, now=1.6e9)
    assert store.find("a", limit_bytes=0) is not None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = Calibrations(tmp_path)
    for i in range(MAX_KEPT + 3):
        store.keep(f"{i}", KEPT, now=1.6e9)
        os.utime(tmp_path / f"{i}.calibrated", (1.6e9 + i, 1.6e9 + i))
    assert [i for i in range(MAX_KEPT + 3) if store.find(f"{i}", limit_bytes=0) is None] == [0, 1, 2]


def test_a_key_is_its_parts_in_any_order() -> None:
    assert key({"a": 1, "b": {"x": [1], "y": 2}}) == key({"b": {"y": 2, "x": [1]}, "a": 1})
    assert key({"a": 1}) != key({"a": 2})


# ------------------------------------------------------------------------------------------------------------ shapes


def test_shapes_are_those_of_real_micro_batches(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "lengths.jsonl"
    rows = [{"prompt": "", "completion": f"{i} river" * (1 + i % 20)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = split.load(DataConfig(path=str(path)), 0, 0.0).train
    ask = Calibration(batches=[1, 4, 16, 512], max_tokens=48)
    lengths = [len(encode_ids(example, tokenizer)) for example in train]
    one, four, many, whole = shapes_of(train, tokenizer, ask)
    assert one.mean_tokens == pytest.approx(np.mean(lengths), rel=0.05)
    assert one.max_tokens == max(lengths) == 48
    assert 4 * np.mean(lengths) < four.mean_tokens < many.mean_tokens / 4 <= 48 * 4
    assert (many.max_tokens, whole.max_tokens) == (48 * 16, 48 * 512)
    assert whole.mean_tokens == 48 * 512
    packed = shapes_of(train, tokenizer, msgspec.structs.replace(ask, packing=True))
    assert one.mean_tokens < packed[0].mean_tokens <= packed[0].max_tokens <= 48


def encode_ids(example: Any, tokenizer: Any) -> list[int]:
    from agent.data.tokens import encode

    return encode(example, tokenizer, 48).ids
