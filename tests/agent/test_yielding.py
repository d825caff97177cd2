"""A training child gives way: the real one, on a tiny model, is paused, shrunk and stopped while it is paused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.batches import endless
from agent.child import Event, Finished, Pause, Phase, Resume, Stepped, TrainTask
from agent.data import Example
from agent.supervisor import ChildConfig, Supervisor
from agent.trainers.bound import CONTEXT_BYTES, allocator_ratio
from agent.trainers.qlora import QLora
from protocol.messages import Training
from protocol.updates import LoraUpdate

MakeTask = Callable[..., TrainTask]
PATIENCE_S = 120.0


class Ear:
    """Hears the child; `until` waits for an event of a kind that is not accounted for yet."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, fits: Callable[[Event], bool]) -> None:
        seen = 0
        async with asyncio.timeout(PATIENCE_S):
            while not any(fits(event) for event in self.events[seen:]):
                seen = len(self.events)
                self._news.clear()
                await self._news.wait()

    def phases(self) -> list[str]:
        """Without repetitions: a paused child says so again and again."""
        names = [event.name for event in self.events if isinstance(event, Phase)]
        return [name for before, name in zip(["", *names], names, strict=False) if name != before]


def is_step(event: Event) -> bool:
    return isinstance(event, Stepped)


def is_paused(event: Event) -> bool:
    return event == Phase(name="paused")


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    one = Supervisor(ChildConfig(threads=1), log=tmp_path / "child.log")
    yield one
    await one.aclose()


async def test_a_pause_holds_the_work_and_a_resume_finishes_it(supervisor: Supervisor, make_task: MakeTask) -> None:
    ear = Ear()
    running = asyncio.create_task(supervisor.run(make_task(n_steps=30), ear, [Pause(reason="said before it began")]))
    await ear.until(is_paused)
    assert ear.phases() == ["loading", "paused"]
    supervisor.tell(Resume())
    ending = await running
    assert isinstance(ending, Finished)
    assert (ending.steps, ending.samples, ending.stopped) == (30, 240, "")
    assert ear.phases() == ["loading", "paused", "loading", "training"]


async def test_a_paused_run_goes_on_where_it_was(supervisor: Supervisor, make_task: MakeTask) -> None:
    ear = Ear()
    running = asyncio.create_task(supervisor.run(make_task(n_steps=10**6), ear))
    await ear.until(is_step)
    supervisor.tell(Pause(reason="a service"))
    await ear.until(is_paused)
    n_heard = len(ear.events)
    supervisor.tell(Resume())
    await ear.until(lambda event: is_step(event) and event in ear.events[n_heard:])
    assert ear.phases() == ["loading", "training", "paused", "training"]
    supervisor.stop("enough")
    assert isinstance(await running, Finished)


async def test_a_stop_ends_a_paused_run_with_what_it_has(supervisor: Supervisor, make_task: MakeTask) -> None:
    ear = Ear()
    running = asyncio.create_task(supervisor.run(make_task(n_steps=10**6), ear))
    await ear.until(is_step)
    supervisor.tell(Pause(reason="a service"))
    await ear.until(is_paused)
    n_heard = len([event for event in ear.events if is_step(event)])
    supervisor.stop("deadline")
    async with asyncio.timeout(PATIENCE_S):
        ending = await running
    assert isinstance(ending, Finished)
    assert ending.stopped == "deadline"
    assert ending.steps == n_heard, "nothing was trained while it was paused"
    assert ending.samples == 8 * n_heard
    assert LoraUpdate.open(Path(ending.file), max_bytes=2**30).ranks


async def test_a_child_that_was_released_goes_when_its_run_is_over(supervisor: Supervisor, make_task: MakeTask) -> None:
    ear = Ear()
    running = asyncio.create_task(supervisor.run(make_task(n_steps=10**6), ear))
    await ear.until(is_step)
    supervisor.stop("the host needs its memory")
    supervisor.release()
    ending = await running
    assert isinstance(ending, Finished)
    assert ending.samples
    for _ in range(3):
        await asyncio.sleep(0)
    assert supervisor._farewell is not None, "it is idle, and its time to go has come"
    await supervisor._farewell
    assert supervisor.pid is None


def factors(finished: Finished) -> dict[str, Any]:
    opened = LoraUpdate.open(Path(finished.file), max_bytes=2**30)
    return {name: opened.factors(name) for name in opened.ranks}


def drain(trainer: QLora, task: TrainTask, shrink_at: tuple[int, ...] = ()) -> tuple[list[Stepped], Finished]:
    """Train to the end; shrink at these numbers of progress."""
    running, steps = trainer.train(task), []
    try:
        event = next(running)
        while True:
            if isinstance(event, Stepped):
                steps.append(event)
                if len(steps) in shrink_at:
                    trainer.shrink()
            event = running.send(False)
    except StopIteration as end:
        return steps, end.value


@pytest.mark.parametrize("packing", [False, True])
def test_shrinking_changes_the_pieces_and_not_the_training(
    make_task: MakeTask, tmp_path: Path, *, packing: bool
) -> None:
    trainer = QLora()
    changes = {"n_steps": 4, "batch": 5, "accumulation": 2, "packing": packing, "update_dtype": "fp32"}
    whole_steps, whole = drain(trainer, make_task(**changes))
    steps, shrunk = drain(trainer, make_task(**changes, out_file=str(tmp_path / "other")), shrink_at=(3, 5))
    # steps 2 x [5, 5]; from the middle of step 2 on pieces of 2: [5, 2, 2, 1]; soon of 1
    assert len(whole_steps) == 8
    assert len(steps) > 20
    assert (shrunk.samples, shrunk.steps, shrunk.tokens) == (whole.samples, whole.steps, whole.tokens)
    assert shrunk.loss == pytest.approx(whole.loss, rel=1e-4)
    for name, wanted in factors(whole).items():
        np.testing.assert_allclose(factors(shrunk)[name].b, wanted.b, rtol=2e-2, atol=1e-5)


def test_a_shrink_before_the_first_step_counts(make_task: MakeTask) -> None:
    trainer = QLora()
    running = trainer.train(make_task(n_steps=1, batch=8))
    next(running)
    trainer.shrink()
    assert [event.samples for event in running if isinstance(event, Stepped)] == [4, 8]


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_is_the_sum_of_its_parts(records: list[dict[str, str]], tokenizer: Any, *, packing: bool) -> None:
    examples = [Example(b"", item["prompt"], item["completion"]) for item in records]
    training = Training(n_steps=1, batch=5, max_tokens=96, packing=packing)
    batch = next(endless(examples, tokenizer, training, 0))
    first, rest = batch.split(2)
    assert (len(first.ids), len(rest.ids)) == (2, 3)
    assert first.n_samples + rest.n_samples == batch.n_samples
    assert first.n_targets + rest.n_targets == batch.n_targets
    assert first.n_targets > 0
    assert (first.n_samples > 2) == packing


def test_paused_time_is_not_training_time(make_task: MakeTask) -> None:
    running = QLora().train(make_task(n_steps=2))
    while next(running) != Phase(name="training"):
        pass
    started = time.monotonic()
    next(running)
    time.sleep(0.5)
    next(running)
    with pytest.raises(StopIteration) as end:
        next(running)
    assert end.value.value.train_s <= time.monotonic() - started - 0.5


def test_the_allocator_gets_what_the_context_leaves() -> None:
    gib = 2**30
    assert allocator_ratio(0, 80 * gib) == 1.0
    assert allocator_ratio(40 * gib + CONTEXT_BYTES, 80 * gib) == 0.5
    assert allocator_ratio(90 * gib, 80 * gib) == 1.0
    assert allocator_ratio(1, 80 * gib) == 0.0
