"""Calibration: what a survey measures on the real base, the real device and the agent's own text, in the order of its worth.

    load the most precise width that fits -> score the matrices -> shapes of micro-batches
    nf4, int8, none, as far as they fit: load -> held-out loss of the base -> micro-benchmark

Scores come first: without them there is nothing for a planner to weigh, without points it still has the formula.  All of it
ends at ask.max_s with what is there by then, except that at least one micro-batch is scored.  Each width gets an equal part of
the time that is left.  A width that does not fit, or breaks, is left out with a note; the others go on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import platform
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
import torch

from agent.batches import Batch, endless, summed_loss
from agent.child import Stepped
from agent.data import Example, split
from agent.data.split import Split
from agent.data.tokens import encode, packed
from agent.evaluation import evaluate
from agent.gpus import gpus
from agent.loading import Loaded
from agent.trainers import TrainingFailed, importance
from agent.trainers.benchmark import checkpointed, measure
from agent.trainers.importance import Scored
from agent.trainers.meter import Meter, held_bytes, out_of_memory_named
from protocol import memory
from protocol.errors import OutsideFault
from protocol.memory import Compute
from protocol.messages import Bits, Calibrated, Calibration, Evaluation, Shape, Surveyed, Training

SMALLEST_FIRST: Final[tuple[Bits, ...]] = ("nf4", "int8", "none")
HELD_OUT: Final = Evaluation(max_samples=32)
"""For the loss of the base: what tells widths apart, not a result."""
SKETCH_RATIO: Final = 0.2
"""Of the time that the first pass of the scorer may take; the second takes as long."""
PASSES: Final = 3
"""A forward and backward pass takes about so many forward passes: the base's weights get no gradients, activations do."""
BATCHES: Final = (8, 4, 2, 1)
"""Micro-batches for the scorer: larger ones cost memory and tell no more per sample."""
SHAPE_SAMPLES: Final = 1024
LONGEST: Final = 32
"""So many of the longest texts are always looked at: the largest micro-batch decides about memory."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """calibrated is None when no matrix could be scored, and `why` says why; "stop" is when it was stopped before.

    is_complete: nothing was cut short by time, a stop or a fault.  is_short: something was left out for lack of memory.
    """

    calibrated: Calibrated | None
    why: str
    is_complete: bool
    is_short: bool


def depends_on(ask: Calibration, surveyed: Surveyed, parts: Split, device: torch.device) -> dict[str, object]:
    """All that the outcome depends on, the time it was given apart."""
    return {
        "ask": msgspec.to_builtins(msgspec.structs.replace(ask, max_s=1.0)),
        "base": surveyed.base_sha256,
        "text": [split.digest(parts.train), split.digest(parts.held_out)],
        "device": device_name(device),
        "driver": gpus([])[1] if device.type == "cuda" else "",
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        "versions": {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device) -> str:
    """As in Allowance.device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def calibrate(
    ask: Calibration,
    surveyed: Surveyed,
    parts: Split,
    load: Callable[[Bits], Loaded],
    *,
    device: torch.device,
    compute: Compute,
    limit_bytes: int = 0,
) -> Generator[Stepped, bool, Outcome]:
    """Measure what `ask` asks for.  Yields a Stepped in per cent of the whole; a stop ends it with what there is.

    Args:
        ask: what to measure.
        surveyed: of the same base.
        parts: the agent's text.
        load: the base at one width; the one before may be forgotten.
        device: on which `load` puts it.
        compute: the type in which the base multiplies (agent.loading.compute_type).
        limit_bytes: of the device that this process may hold in all; 0 is no limit.
    """
    return _Calibration(ask, surveyed, parts, load, device, compute, limit_bytes).run()


class _Calibration:
    """One calibration under way."""

    def __init__(
        self,
        ask: Calibration,
        surveyed: Surveyed,
        parts: Split,
        load: Callable[[Bits], Loaded],
        device: torch.device,
        compute: Compute,
        limit_bytes: int,
    ) -> None:
        self._ask, self._surveyed, self._parts, self._load = ask, surveyed, parts, load
        self._dims = surveyed.dimensions or memory.guessed(surveyed.matrices)
        self._device, self._compute, self._limit_bytes = device, compute, limit_bytes
        self._floor_bytes = held_bytes(device)
        self._started = time.monotonic()
        self._deadline = self._started + ask.max_s
        self._notes: list[str] = []
        self._left_out: set[Bits] = set()
        self._is_stopped = self._is_short = False
        self._is_complete = True
        self._part = 0
        self._batch = 1
        self._n_parts = 1 + len(ask.bits)

    def run(self) -> Generator[Stepped, bool, Outcome]:
        """All of it."""
        widths = [bits for bits in SMALLEST_FIRST if bits in self._ask.bits]
        scored: Scored | None = None
        shapes: list[Shape] = []
        for bits in reversed(widths):
            base = self._loaded(bits)
            if base is None:
                continue
            shapes = shapes or shapes_of(self._parts.train, base.tokenizer, self._ask)
            scored = yield from self._trying(bits, self._scored(base, bits, shapes))
            if scored is not None or self._is_stopped:
                break
            base = None  # what could not be scored makes room
        if scored is None:
            why = "stop" if self._is_stopped else "; ".join(self._notes) or "no width of the base was asked for"
            return Outcome(None, why, is_complete=False, is_short=self._is_short)
        result = Calibrated(
            device=device_name(self._device)[:200],
            compute=self._compute,
            probe_rank=self._ask.probe_rank,
            scores=scored.scores.astype("<f4").tobytes(),
            noise_scale=scored.noise_scale,
            shapes=shapes,
        )
        base = None
        for n_before, bits in enumerate(widths):
            self._part = 1 + n_before
            deadline = time.monotonic() + (self._deadline - time.monotonic()) / (len(widths) - n_before)
            if self._is_stopped or time.monotonic() >= self._deadline:
                self._cut(f"{bits}: not measured, {'it was stopped' if self._is_stopped else 'time ran out'}")
                continue
            base = self._loaded(bits)
            if base is not None:
                measured = yield from self._trying(bits, self._measured(base, bits, deadline))
                result = result if measured is None else _joined(result, measured)
            base = None  # the next width needs its room
        notes = [note[:500] for note in dict.fromkeys([*self._notes, *result.notes])][:16]
        result = msgspec.structs.replace(result, seconds=time.monotonic() - self._started, notes=notes)
        return Outcome(result, "", is_complete=self._is_complete, is_short=self._is_short)

    # ------------------------------------------------------------------------------------------------------ the parts

    def _loaded(self, bits: Bits) -> Loaded | None:
        """The base at this width, or a note about why not; what could not be loaded once is not tried again."""
        if bits in self._left_out:
            return None
        missing = self._missing_bytes(bits)
        if missing > 0:
            self._short(f"{bits}: the base alone exceeds the allowed memory by {missing} bytes")
            self._left_out.add(bits)
            return None
        try:
            with out_of_memory_named(Meter()):
                return self._load(bits)
        except (TrainingFailed, OutsideFault, ImportError, ValueError, RuntimeError) as error:
            self._broke(bits, error)
        self._left_out.add(bits)
        return None

    def _scored(self, base: Loaded, bits: Bits, shapes: Sequence[Shape]) -> Generator[Stepped, bool, Scored | None]:
        longest = max(shape.max_tokens / shape.batch for shape in shapes)
        self._batch, checkpointing = self._largest(bits, base, longest)
        n_seen, enough_at = 0, time.monotonic() + SKETCH_RATIO * self._ask.max_s

        def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
            nonlocal n_seen
            for drawn in batches:
                n_seen += 1
                yield drawn

        with checkpointed(base.model, is_on=checkpointing):
            found = yield from self._stepping(
                importance.score(
                    base,
                    counted(self._batches(base, self._batch)),
                    self._ask,
                    is_enough=lambda: time.monotonic() >= enough_at,
                )
            )
        if found is not None and n_seen < self._ask.n_batches:
            self._cut(f"matrices were scored on {n_seen} of {self._ask.n_batches} micro-batches: time ran out")
        return found

    def _measured(self, base: Loaded, bits: Bits, deadline: float) -> Generator[Stepped, bool, Calibrated]:
        """A result with only this width's loss, points and notes in it."""
        running = evaluate(
            base.model,
            base.tokenizer,
            self._parts.held_out,
            HELD_OUT,
            batch=self._batch,
            max_tokens=self._ask.max_tokens,
        )
        score = yield from self._stepping(running, until=deadline, counts=False)
        losses = {bits: score.loss} if score.n_tokens else {}
        found = yield from self._stepping(
            measure(
                base,
                partial(self._batches, base),
                self._ask,
                bits=bits,
                dimensions=self._surveyed.dimensions,
                limit_bytes=self._limit_bytes,
                deadline=deadline,
            )
        )
        if time.monotonic() >= deadline or self._is_stopped:
            self._is_complete = False
        elif found.notes:
            self._is_short = True
        return Calibrated(
            device="",
            probe_rank=1,
            scores=b"",
            losses=losses,
            points=found.points,
            load_ratio=min(found.load_ratio, 1000.0),
            notes=[n[:500] for n in found.notes],
        )

    def _batches(self, base: Loaded, batch: int) -> Iterator[Batch]:
        ask = self._ask
        training = Training(n_steps=1, batch=batch, max_tokens=ask.max_tokens, packing=ask.packing)
        return endless(self._parts.train, base.tokenizer, training, ask.seed)

    # --------------------------------------------------------------------------------------------------------- memory

    def _missing_bytes(self, bits: Bits) -> int:
        needed = memory.weight_bytes(self._surveyed.matrices, self._dims.n_other, bits, self._compute)
        return self._floor_bytes + needed - self._limit_bytes if self._limit_bytes else 0

    def _largest(self, bits: Bits, base: Loaded, longest: float) -> tuple[int, bool]:
        """The largest micro-batch for scoring that time and memory allow, and whether to recompute activations; else the least."""
        most = SKETCH_RATIO * self._ask.max_s / (PASSES * self._ask.n_batches * self._forward_s(base))
        rank = self._ask.probe_rank + importance.OVERSAMPLED
        for batch, checkpointing in [*((batch, False) for batch in BATCHES), (1, True)]:
            if batch > max(1, min(most, len(self._parts.train))):
                continue
            needed = memory.predicted_bytes(
                self._dims,
                self._surveyed.matrices,
                {m.name: min(rank, m.d_in, m.d_out) for m in self._surveyed.matrices},
                frozen={},
                bits=bits,
                compute=self._compute,
                n_tokens=int(batch * longest),
                checkpointing=checkpointing,
            )
            if not self._limit_bytes or self._floor_bytes + needed <= self._limit_bytes:
                return batch, checkpointing
        return 1, True

    def _forward_s(self, base: Loaded) -> float:
        """Seconds of a forward pass of one sample; the first of two that are short only warms up."""
        least = math.inf
        for batch in islice(self._batches(base, 1), 2):
            began = time.monotonic()
            with torch.no_grad():
                summed_loss(base.model, batch).item()
            least = min(least, time.monotonic() - began)
            if least > 1.0:
                break
        return max(least, 1e-6)

    # ---------------------------------------------------------------------------------------------------------- notes

    def _cut(self, note: str) -> None:
        self._is_complete = False
        self._notes.append(note)

    def _short(self, note: str) -> None:
        self._is_short = True
        self._notes.append(note)

    def _broke(self, bits: Bits, error: Exception) -> None:
        if isinstance(error, TrainingFailed) and error.failed.reason == "out_of_memory":
            self._short(f"{bits}: {error}")
            return
        logger.warning("%s cannot be calibrated", bits, extra={"action": "uncalibrated"}, exc_info=error)
        self._cut(f"{bits}: {type(error).__name__}: {error}")

    def _trying(self, bits: Bits, part: Generator[Stepped, bool, T]) -> Generator[Stepped, bool, T | None]:
        try:
            with out_of_memory_named(Meter()):
                return (yield from part)
        except (TrainingFailed, OutsideFault, ImportError, ValueError, RuntimeError) as error:
            self._broke(bits, error)
            return None

    def _stepping(
        self, running: Generator[Stepped, bool, T], *, until: float | None = None, counts: bool = True
    ) -> Generator[Stepped, bool, T]:
        """Pass on the steps of one part in per cent of the whole, remember a stop, and end the part itself at `until`."""
        try:
            step = next(running)
            while True:
                share = step.step / max(1, step.n_steps) if counts else 0.0
                percent = int(100 * (self._part + share) / self._n_parts)
                seconds = time.monotonic() - self._started
                whole = msgspec.structs.replace(step, step=min(percent, 100), n_steps=100, seconds=seconds)
                self._is_stopped = (yield whole) or self._is_stopped
                step = running.send(self._is_stopped or (until is not None and time.monotonic() >= until))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            running.close()


def _joined(result: Calibrated, more: Calibrated) -> Calibrated:
    return msgspec.structs.replace(
        result,
        losses=result.losses | more.losses,
        points=[*result.points, *more.points],
        load_ratio=max(result.load_ratio, more.load_ratio),
        notes=[*result.notes, *more.notes],
    )


def shapes_of(train: Sequence[Example], tokenizer: Any, ask: Calibration) -> list[Shape]:
    """What micro-batches of each of ask.batches weigh in tokens, padding included.

    The mean is over shuffles of a random sample of the text; the maximum is a micro-batch that holds the longest row.  Cost:
    cuts some SHAPE_SAMPLES examples into tokens.
    """
    rng = np.random.default_rng(ask.seed)
    drawn = rng.choice(len(train), min(SHAPE_SAMPLES, len(train)), replace=False)
    tokens = [encode(train[i], tokenizer, ask.max_tokens) for i in drawn]
    long = sorted(train, key=_n_characters, reverse=True)[:LONGEST]
    longest = max(len(encode(example, tokenizer, ask.max_tokens).ids) for example in long)
    rows = packed(tokens, ask.max_tokens) if ask.packing else ([row] for row in tokens)
    lengths = np.array([sum(len(row.ids) for row in together) for together in rows])
    longest = max(longest, int(lengths.max()))
    return [
        Shape(batch=batch, mean_tokens=_mean_longest(lengths, batch, rng) * batch, max_tokens=longest * batch)
        for batch in sorted(set(ask.batches))
    ]


def _mean_longest(lengths: np.ndarray[Any, np.dtype[Any]], batch: int, rng: np.random.Generator) -> float:
    n = max(64, 4096 // batch)
    epochs = (rng.permutation(lengths) for _ in range(-(-n * batch // len(lengths))))
    stream = np.concatenate(list(epochs))[: n * batch].reshape(n, batch)
    return float(stream.max(1).mean())


def _n_characters(example: Example) -> int:
    prompt = example.prompt
    n = len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)
    return n + len(example.completion)
