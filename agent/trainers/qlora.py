"""QLoRA as one agent's share of a round (Dettmers et al., 2023; Hu et al., 2021), on top of the fleet's adapter so far.

    load base (kept between tasks) -> put on adapters -> evaluate the received version -> train -> write the local adapter

What is trained and sent is in agent/trainers/lora.py, the loop in agent/trainers/loop.py, the memory it takes in
protocol/memory.py.  This file is the order of things.  Randomness comes from (seed, round, purpose): the same plan on
the same data makes the same run, and no two rounds shuffle alike.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import ClassVar, Final

import torch

from agent import calibrations, loading
from agent.bases import base_digest
from agent.batches import endless
from agent.calibrations import Calibrations
from agent.child import Calibrated, Evaluated, Finished, Phase, Stepped, Surveyed, TrainTask
from agent.data import split
from agent.data.split import Split
from agent.evaluation import evaluate
from agent.loading import Loaded
from agent.trainers import Running, TrainingFailed, calibration, importance
from agent.trainers.benchmark import checkpointed, give_back
from agent.trainers.bound import bound
from agent.trainers.importance import Sensitivity
from agent.trainers.loop import Fit, MicroBatch, fit
from agent.trainers.lora import Adapted, Start, adapted
from agent.trainers.meter import Meter, out_of_memory_named
from protocol import messages
from protocol.adapters import Adapter
from protocol.errors import BadMessage
from protocol.messages import Bits, Calibration, Plan, Training
from protocol.models import read_model
from protocol.updates import Kind, write_update

N_SCORES: Final = 8
"""Triplets of a matrix whose importance is told: further ones follow from the decay of these."""


class QLora:
    """The trainer.  Keeps the base model it loaded last; everything else lives for one task."""

    produces: ClassVar[Kind] = "lora"
    start: ClassVar[Start] = "subspace"

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._loaded: Loaded | None = None
        self._micro_batch = MicroBatch(1)

    def survey(self, task: TrainTask) -> Running:
        """The base's digest and matrices and the size of the data, without loading weights; then the calibration."""
        if (yield Phase(name="loading")):
            return Finished(stopped="stop")
        folder = Path(task.base_folder)
        parts = _read(task)
        surveyed = messages.Surveyed(
            base_sha256=_digest(task),
            matrices=loading.survey(folder),
            n_train=len(parts.train),
            n_eval=len(parts.held_out),
            dimensions=loading.dimensions(folder),
        )
        is_stopping = yield Surveyed(result=surveyed)
        if task.plan.calibration is None:
            return Finished()
        if is_stopping:
            return Finished(stopped="stop")
        return (yield from self._calibrate(task, task.plan.calibration, surveyed, parts))

    def _calibrate(self, task: TrainTask, ask: Calibration, surveyed: messages.Surveyed, parts: Split) -> Running:
        device = loading.pick_device(task.device)
        kept = Calibrations(Path(task.calibrations)) if task.calibrations else None
        key = calibrations.key(calibration.depends_on(ask, surveyed, parts, device))
        limit_bytes = task.memory_limit_bytes
        if kept is not None and (known := kept.find(key, limit_bytes=limit_bytes)):
            yield Calibrated(result=known)
            return Finished()
        if (yield Phase(name="calibrating")):
            return Finished(stopped="stop")
        for library in ("peft", "bitsandbytes"):  # now, so that `_forget` freezes them
            with contextlib.suppress(ImportError):
                importlib.import_module(library)
        self._forget()
        done = yield from calibration.calibrate(
            ask,
            surveyed,
            parts,
            lambda bits: self._base(task, bits),
            device=device,
            compute=loading.compute_type(Path(task.base_folder), device),
            limit_bytes=limit_bytes,
        )
        if done.calibrated is None:
            return Finished(stopped=done.why)
        if kept is not None and done.is_complete:
            kept.keep(key, done.calibrated, now=time.time(), short_at_bytes=limit_bytes if done.is_short else 0)
        yield Calibrated(result=done.calibrated)
        return Finished()

    def train(self, task: TrainTask) -> Running:
        """One share of a round; see agent.trainers.Trainer."""
        plan = task.plan
        if plan.purpose == "train" and (plan.train is None or not plan.ranks):
            raise BadMessage("a plan to train needs `train` and at least one matrix in `ranks`")
        training = plan.train or Training(n_steps=1)
        self._micro_batch = MicroBatch(training.batch)
        if (yield Phase(name="loading")):
            return Finished(stopped="stop")
        parts = _read(task)
        frozen = _received(task)
        ranks = plan.ranks if plan.purpose == "train" else {}
        meter = Meter(plan.predicted_bytes)
        with out_of_memory_named(meter):
            base = self._base(task)
            meter.watch(base.device)
            seed = self.adapter_seed(plan)
            with adapted(base.model, frozen, ranks, plan.alpha, seed, start=self.start) as model:
                if plan.evaluate is not None and not (yield from _evaluate(base, model, plan, parts)):
                    return Finished(stopped="stop")
                if plan.purpose != "train":
                    return Finished()
                if (yield Phase(name="training")):
                    return Finished(stopped="stop")
                batches = endless(parts.train, base.tokenizer, training, draw_seed(plan, "order"))
                with checkpointed(base.model, is_on=training.checkpointing):
                    torch.manual_seed(draw_seed(plan, "dropout"))
                    sensitivity = Sensitivity(importance.weights_of(model.model, ranks))
                    done = yield from fit(
                        model.model,
                        batches,
                        model.parameters,
                        training,
                        micro_batch=self._micro_batch,
                        after_forward=meter.see,
                        before_step=lambda step: _observe(sensitivity, step, training.n_steps),
                    )
                return _written(task, model, done, meter, self.produces, sensitivity)

    @staticmethod
    def adapter_seed(plan: Plan) -> int:
        """Decides the random start of A."""
        return draw_seed(plan, "adapter")

    def shrink(self) -> None:
        """See agent.trainers.Trainer."""
        self._micro_batch.shrink()

    def _base(self, task: TrainTask, bits: Bits | None = None) -> Loaded:
        bits = bits or task.plan.bits
        device = loading.pick_device(task.device)
        bound(device, task.memory_limit_bytes)
        key = (task.base_folder, _digest(task), bits, str(device))
        if self._loaded is None or key != self._key:
            self._forget()  # free the old one first: two do not fit
            self._loaded = loading.load(Path(task.base_folder), bits, device)
            self._key = key
            give_back()  # quantizing leaves the room of the wide weights behind
        return self._loaded

    def _forget(self) -> None:
        self._key, self._loaded = (), None
        give_back()
        # What is left are the libraries' own objects, half a million: the many collections of a calibration, 0.4 s each with
        # them, need not look at them again.
        gc.freeze()


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
    base: Loaded, model: Adapted, plan: Plan, parts: Split
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
        is_stopping = yield stepped
    if score.n_tokens and not is_stopping:
        yield Evaluated(result=messages.Evaluated(version=plan.version, **score._asdict()))
    return not is_stopping


def _observe(sensitivity: Sensitivity, step: int, n_steps: int) -> None:
    if importance.is_due(step, n_steps):
        sensitivity.observe()


def _written(
    task: TrainTask, model: Adapted, done: Fit, meter: Meter, kind: Kind, sensitivity: Sensitivity
) -> Finished:
    plan = task.plan
    if done.steps:
        write_update(
            Path(task.out_file),
            model.local(),
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            dtype=plan.update_dtype,
            kind=kind,
            scores={name: found[:N_SCORES] for name, found in sensitivity.scores().items()},
        )
    return Finished(
        file=task.out_file if done.steps else "",
        samples=done.samples,
        steps=done.steps,
        tokens=done.tokens,
        loss=done.loss,
        train_s=done.seconds,
        stopped="stop" if done.is_stopped else "",
        peak_bytes=meter.peak_bytes,
        predicted_bytes=meter.predicted_bytes,
    )
