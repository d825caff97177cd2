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
import logging
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

import torch

from agent import calibrations, loading
from agent.bases import base_digest
from agent.batches import endless
from agent.calibrations import Calibrations
from agent.checkpoints import ORIGIN, Point, Stored
from agent.child import Calibrated, Evaluated, Finished, Phase, Resumed, Stepped, Surveyed, TrainTask
from agent.data import split
from agent.data.split import Split
from agent.evaluation import evaluate
from agent.loading import Loaded
from agent.trainers import Running, TrainingFailed, calibration, importance, resuming
from agent.trainers.benchmark import checkpointed, give_back
from agent.trainers.bound import bound
from agent.trainers.importance import Sensitivity
from agent.trainers.insisting import insisting
from agent.trainers.loop import Fit, MicroBatch, adamw, fit
from agent.trainers.lora import Adapted, Start, adapted
from agent.trainers.meter import Meter, out_of_memory_named
from agent.trainers.resuming import Keeper
from protocol import messages
from protocol.adapters import Adapter, cut_energy
from protocol.errors import BadMessage, BadUpdate
from protocol.messages import Bits, Calibration, Plan, Training
from protocol.models import read_model
from protocol.updates import Kind, write_update

logger = logging.getLogger(__name__)

MAX_STEP_SAMPLES: Final = 2**16
"""The micro-batches of a step are drawn before it is made: as text they must fit into memory."""
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
        self._suspend: Callable[[], Finished | None] = _nothing

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
        plan, began_at = task.plan, time.monotonic()
        if plan.purpose == "train" and (plan.train is None or not plan.ranks):
            raise BadMessage("a plan to train needs `train` and at least one matrix in `ranks`")
        if plan.train and plan.train.batch * plan.train.accumulation > MAX_STEP_SAMPLES:
            raise BadMessage(f"a plan to train on more than {MAX_STEP_SAMPLES} samples in one step")
        self._micro_batch = MicroBatch(plan.train.batch if plan.train else 1)
        if (yield Phase(name="loading")):
            return Finished(stopped="stop")
        parts = _read(task)
        frozen = _received(task)
        meter = Meter(plan.predicted_bytes)
        with out_of_memory_named(meter):
            base = self._base(task)
            meter.watch(base.device)
            place = resuming.place(task, self._key[1], parts.train, base.device, began_at)
            stored = place.find() if plan.purpose == "train" else None
            evaluated = stored.header.evaluated if stored else None
            if evaluated is not None:
                yield Evaluated(result=evaluated)
            elif stored is None and plan.evaluate is not None:
                with adapted(base.model, frozen, {}, plan.alpha, seed=0) as model:
                    is_stopping, evaluated = yield from _evaluate(base, model, plan, parts)
                if is_stopping:
                    return Finished(stopped="stop")
            if plan.train is None or plan.purpose != "train":
                return Finished()
            if (yield Phase(name="training")):
                return Finished(stopped="stop")
            start_seed = self.adapter_seed(plan)
            with adapted(base.model, frozen, plan.ranks, plan.alpha, start_seed, start=self.start) as model:
                scores = Sensitivity(importance.weights_of(model.model, plan.ranks))
                keeper = Keeper(place, model.parameters, adamw(model.parameters, plan.train), scores, evaluated)
                self._suspend = lambda: _suspended(task, model, keeper, meter, self.produces)
                try:
                    with checkpointed(base.model, is_on=plan.train.checkpointing):
                        micro_batch = self._micro_batch
                        done = yield from _fit(plan, plan.train, base, model, parts, stored, keeper, meter, micro_batch)
                finally:
                    self._suspend = _nothing
                if done.steps:
                    written = partial(_write, task, model, self.produces, scores)
                    yield from insisting(written, is_stopping=done.is_stopped)
                return _finished(task, done, meter)

    def suspend(self) -> Finished | None:
        """See agent.trainers.Trainer."""
        return self._suspend()

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
    file = Path(task.model_file)
    try:
        return read_model(file, max_bytes=task.max_model_bytes)
    except BadUpdate:
        file.unlink(missing_ok=True)  # it was whole once, so the disk spoiled it: the next attempt fetches it anew
        raise


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
) -> Generator[Phase | Stepped | Evaluated, bool, tuple[bool, messages.Evaluated | None]]:
    """Score the received version, whole and alone; whether to stop, and the score."""
    assert plan.evaluate is not None
    yield Phase(name="evaluating")
    running = evaluate(
        model.model,
        base.tokenizer,
        parts.held_out,
        plan.evaluate,
        batch=plan.train.batch if plan.train else 8,
        max_tokens=plan.evaluate.max_tokens,
    )
    is_stopping, evaluated = False, None
    while True:
        try:
            stepped = running.send(is_stopping) if is_stopping else next(running)
        except StopIteration as end:
            score = end.value
            break
        is_stopping = yield stepped
    if score.n_tokens and not is_stopping:
        evaluated = messages.Evaluated(version=plan.version, **score._asdict())
        yield Evaluated(result=evaluated)
    return is_stopping, evaluated


def _fit(
    plan: Plan,
    training: Training,
    base: Loaded,
    model: Adapted,
    parts: Split,
    stored: Stored | None,
    keeper: Keeper,
    meter: Meter,
    micro_batch: MicroBatch,
) -> Generator[Resumed | Stepped, bool, Fit]:
    """Train, from the stored point on if there is one."""
    torch.manual_seed(draw_seed(plan, "dropout"))
    start = keeper.resume(stored) if stored else ORIGIN
    if stored is None:
        keeper.note(ORIGIN)  # after a long evaluation that is worth keeping too
    if stored and (yield Resumed(step=start.steps, n_steps=training.n_steps)):
        return _fitted(start)
    return (
        yield from fit(
            model.model,
            endless(parts.train, base.tokenizer, training, draw_seed(plan, "order"), skip=start.samples),
            model.parameters,
            training,
            micro_batch=micro_batch,
            after_forward=meter.see,
            before_step=lambda step: _observe(keeper.sensitivity, step, training.n_steps),
            after_step=keeper.note,
            optimizer=keeper.optimizer,
            start=start,
        )
    )


def _observe(sensitivity: Sensitivity, step: int, n_steps: int) -> None:
    if importance.is_due(step, n_steps):
        sensitivity.observe()


def _write(task: TrainTask, model: Adapted, kind: Kind, sensitivity: Sensitivity) -> None:
    plan = task.plan
    kept_ratio = plan.kept_energy_ratio if kind == "lora" else 1.0
    write_update(
        Path(task.out_file),
        {name: cut_energy(factors, kept_ratio) for name, factors in model.local().items()},
        job=plan.job,
        round=plan.round,
        attempt=plan.attempt,
        dtype=plan.update_dtype,
        kind=kind,
        scores={name: found[:N_SCORES] for name, found in sensitivity.scores().items()},
    )


def _finished(task: TrainTask, done: Fit, meter: Meter) -> Finished:
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


def _nothing() -> None:
    """What a trainer that does not train has to suspend."""


def _suspended(task: TrainTask, model: Adapted, keeper: Keeper, meter: Meter, kind: Kind) -> Finished | None:
    """Keep the training, and beside it what it brought so far: nobody knows yet whether it will go on."""
    if not keeper.write():
        return None
    done = _fitted(keeper.point)
    try:
        if done.steps:
            _write(task, model, kind, keeper.sensitivity)
        return _finished(task, done, meter)
    except (OSError, BadUpdate) as error:
        logger.warning("only the checkpoint is kept: %s", error, extra={"action": "disk"})
        return Finished()


def _fitted(point: Point) -> Fit:
    return Fit(point.steps, point.samples, point.tokens, point.loss, point.seconds, is_stopped=True)
