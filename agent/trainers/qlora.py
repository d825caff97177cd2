"""QLoRA as one agent's share of a round (Dettmers et al., 2023; Hu et al., 2021), on top of the fleet's adapter so far.

    load base (kept between tasks) -> put on adapters -> evaluate the received version -> train -> write the local adapter

What is trained and sent is in agent/trainers/lora.py, the loop in agent/trainers/loop.py, the memory it takes in
agent/trainers/memory.py.  This file is the order of things.  Randomness comes from (seed, round, purpose): the same plan on
the same data makes the same run, and no two rounds shuffle alike.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from agent import loading
from agent.bases import base_digest
from agent.batches import endless
from agent.child import Evaluated, Finished, Phase, Stepped, TrainTask
from agent.data import split
from agent.data.split import Split
from agent.evaluation import evaluate
from agent.loading import Loaded
from agent.trainers import Running, TrainingFailed
from agent.trainers.loop import Fit, fit
from agent.trainers.lora import Adapted, adapted
from agent.trainers.meter import Meter, out_of_memory_named
from protocol import messages
from protocol.adapters import Adapter
from protocol.errors import BadMessage
from protocol.messages import Plan, Training
from protocol.models import read_model
from protocol.updates import write_update


class QLora:
    """The trainer.  Keeps the base model it loaded last; everything else lives for one task."""

    produces = "lora"

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._loaded: Loaded | None = None

    def survey(self, task: TrainTask) -> messages.Surveyed:
        """The base's digest and matrices and the size of the data.  Loads no weights."""
        folder = Path(task.base_folder)
        parts = _read(task)
        return messages.Surveyed(
            base_sha256=_digest(task),
            matrices=loading.survey(folder),
            n_train=len(parts.train),
            n_eval=len(parts.held_out),
        )

    def train(self, task: TrainTask) -> Running:
        """One share of a round; see agent.trainers.Trainer."""
        plan = task.plan
        if plan.purpose == "train" and (plan.train is None or not plan.ranks):
            raise BadMessage("a plan to train needs `train` and at least one matrix in `ranks`")
        deadline = time.monotonic() + task.time_limit_s if task.time_limit_s else float("inf")
        if (yield Phase(name="loading")):
            return Finished(stopped=_why(deadline))
        parts = _read(task)
        frozen = _received(task)
        ranks = plan.ranks if plan.purpose == "train" else {}
        training = plan.train or Training(n_steps=1)
        meter = Meter()
        with out_of_memory_named(meter):
            base = self._base(task)
            meter.watch(base, Path(task.base_folder), plan, {name: f.rank for name, f in frozen.items()})
            with adapted(base.model, frozen, ranks, plan.alpha, draw_seed(plan, "adapter")) as model:
                if plan.evaluate is not None and not (yield from _evaluate(base, model, plan, parts, deadline)):
                    return Finished(stopped=_why(deadline))
                if plan.purpose != "train":
                    return Finished()
                if (yield Phase(name="training")):
                    return Finished(stopped=_why(deadline))
                batches = endless(parts.train, base.tokenizer, training, draw_seed(plan, "order"))
                with _checkpointing(base.model, is_on=training.checkpointing):
                    torch.manual_seed(draw_seed(plan, "dropout"))
                    done = yield from fit(
                        model.model,
                        meter.noting(batches),
                        model.parameters,
                        training,
                        is_out_of_time=lambda: time.monotonic() >= deadline,
                        after_forward=meter.see,
                    )
                return _written(task, model, done, meter, deadline)

    def _base(self, task: TrainTask) -> Loaded:
        device = loading.pick_device(task.device)
        key = (task.base_folder, _digest(task), task.plan.bits, str(device))
        if self._loaded is None or key != self._key:
            self._loaded = None  # free the old one first: two do not fit
            gc.collect()
            self._loaded = loading.load(Path(task.base_folder), task.plan.bits, device)
            self._key = key
        return self._loaded


def _read(task: TrainTask) -> Split:
    return split.load(task.data, task.plan.data_seed, task.plan.held_out_ratio)


def _received(task: TrainTask) -> Adapter:
    if task.model_file is None:
        return {}
    return read_model(Path(task.model_file), max_bytes=task.max_model_bytes)


def _digest(task: TrainTask) -> str:
    found = base_digest(Path(task.base_folder), Path(task.digest_cache) if task.digest_cache else None)
    wanted = task.plan.base.sha256
    if wanted and found != wanted:
        detail = f"{task.base_folder} has digest {found[:12]}, the plan wants {wanted[:12]}: fetch the same model"
        raise TrainingFailed("base_mismatch", detail)
    return found


def draw_seed(plan: Plan, purpose: str) -> int:
    """63 bits for one purpose of one round."""
    seed = plan.train.seed if plan.train else 0
    drawn = hashlib.blake2b(f"{seed}/{plan.round}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big") >> 1


def _evaluate(
    base: Loaded, model: Adapted, plan: Plan, parts: Split, deadline: float
) -> Generator[Phase | Stepped | Evaluated, bool, bool]:
    """Score the received version; whether to go on.  The local adapter is zero, so it does not matter that it is on."""
    assert plan.evaluate is not None
    yield Phase(name="evaluating")
    training = plan.train or Training(n_steps=1)
    running = evaluate(
        model.model,
        base.tokenizer,
        parts.held_out,
        plan.evaluate,
        batch=training.batch,
        max_tokens=plan.evaluate.max_tokens,
    )
    is_stopping = False
    while True:
        try:
            stepped = running.send(is_stopping) if is_stopping else next(running)
        except StopIteration as end:
            score = end.value
            break
        is_stopping = (yield stepped) or time.monotonic() >= deadline
    if score.n_tokens and not is_stopping:
        yield Evaluated(result=messages.Evaluated(version=plan.version, **score._asdict()))
    return not is_stopping


@contextmanager
def _checkpointing(model: Any, *, is_on: bool) -> Iterator[None]:
    if not is_on:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})  # reentrant would need inputs with gradients
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _written(task: TrainTask, model: Adapted, done: Fit, meter: Meter, deadline: float) -> Finished:
    plan = task.plan
    if done.steps:
        write_update(
            Path(task.out_file),
            model.local(),
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            dtype=plan.update_dtype,
        )
    return Finished(
        file=task.out_file if done.steps else "",
        samples=done.samples,
        steps=done.steps,
        tokens=done.tokens,
        loss=done.loss,
        train_s=done.seconds,
        stopped=_why(deadline) if done.is_stopped else "",
        peak_bytes=meter.peak_bytes,
        predicted_bytes=meter.predicted_bytes,
    )


def _why(deadline: float) -> str:
    return "deadline" if time.monotonic() >= deadline else "stop"
