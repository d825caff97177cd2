"""The micro-benchmark: a few configurations run for a few steps on the real base, to know what a step costs here.

    small          two token counts give the cost of a pass and of a token; the large one is as large as
    large            memory and a step of about a second allow
    skip           trained blocks at the top only: what the backward pass and the trained adapters cost
    high rank      cost per rank, of the small batch too: there the optimizer stands out
    frozen         the global adapter's share
    checkpointing  its memory; its time follows from the others

coordinator/planner/cost.py fits its coefficients to these points.  The order is by what the fit gains from them, so any
beginning of the list is useful by itself.  Each step is a real one (agent/trainers/loop.py).  A point takes turns with a few
micro-batches of the agent's own text, because on a CPU shapes that change cost memory of their own: freed blocks do not fit the
next shape (a quarter of the peak, measured).  Of each micro-batch the fastest step counts, since other processes can only make
a step slower.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from statistics import fmean, median
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from msgspec import structs

from agent.batches import Batch
from agent.child import Stepped
from agent.data.tokens import IGNORED
from agent.loading import Loaded, matrices
from agent.trainers import TrainingFailed
from agent.trainers.loop import MicroBatch, fit
from agent.trainers.lora import adapted
from agent.trainers.meter import Meter, held_bytes, is_out_of_memory
from protocol import memory
from protocol.adapters import Adapter, Factors
from protocol.messages import Bits, Calibration, Dimensions, Matrix, Point, Training

STEP_S: Final = 1.0
"""A step of the large batch should not take longer."""
N_BATCHES: Final = 3
"""Different micro-batches in a point."""
N_STEPS: Final = 1 + 2 * N_BATCHES
"""Of one point; the first warms up."""
POINT_S: Final = 2.0
"""A point ends once it has taken so long and has seen every micro-batch."""
N_POINTS: Final = 9
SHORT_STEPS: Final = N_POINTS * (1 + N_BATCHES)
"""Steps of a whole benchmark that is in a hurry."""
SLACK: Final = 1.3
"""The formula for activations is right within this factor."""


class Measured(NamedTuple):
    """What came of it: the points in the order they were run, and why others are missing (texts for Calibrated.notes)."""

    points: list[Point]
    notes: list[str]
    load_ratio: float = 1.0
    """How much longer a usual step took than the quickest of its kind."""


class Probe(NamedTuple):
    """A point that is yet to be run."""

    batch: int
    micro_batches: tuple[Batch, ...]
    rank: int
    skip: int = 0
    frozen_rank: int = 0
    checkpointing: bool = False

    @property
    def n_tokens(self) -> float:
        """With padding, on average."""
        return sum(batch.ids.numel() for batch in self.micro_batches) / len(self.micro_batches)

    @property
    def max_tokens(self) -> int:
        """With padding, of the largest."""
        return max(batch.ids.numel() for batch in self.micro_batches)


def measure(
    base: Loaded,
    batches_of: Callable[[int], Iterator[Batch]],
    ask: Calibration,
    *,
    bits: Bits,
    dimensions: Dimensions | None,
    limit_bytes: int,
    deadline: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Stepped, bool, Measured]:
    """Measure step time and peak memory of one width of the base, the most informative points first.

    Drive it like agent/trainers/loop.fit: it yields a Stepped after every optimizer step (step of n_steps over all points of
    this width; loss None), hears whether to stop, and returns (StopIteration.value) what was measured by then.  It never
    raises for a lack of memory: that becomes a note.  The base is as it was before when it ends, however it ends.

    Args:
        base: loaded at `bits`, without adapters.
        batches_of: micro-batches of so many samples of the agent's own text; the first few of each size are used.
        ask: its batches and seed.
        bits: width of `base`, goes into the points.
        dimensions: agent.loading.dimensions(folder); None is guessed from the matrices.
        limit_bytes: of the device that this process may hold in all; a point that is predicted to need more is left out.
            0 is no limit.
        deadline: on time.monotonic's clock; no step begins behind it.
        clock: what steps are timed by, in seconds.

    Cost: some 40 steps of at most about a second.
    """
    bench = _Bench(
        base, bits, dimensions or memory.guessed(matrices(base.model)), limit_bytes, deadline, ask.seed, clock
    )
    yield from bench.run_all(batches_of, sorted(ask.batches))
    return bench.measured()


class _Bench:
    """One width of one base, and what is known of its costs so far."""

    def __init__(
        self,
        base: Loaded,
        bits: Bits,
        dims: Dimensions,
        limit_bytes: int,
        deadline: float,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self._base, self._bits, self._dims, self._limit_bytes = base, bits, dims, limit_bytes
        self._deadline, self._seed, self._clock = deadline, seed, clock
        self._matrices = matrices(base.model)
        self._points: list[tuple[Point, int]] = []  # with what was held before it
        self._notes: list[str] = []
        self._loads: list[float] = []
        self._step, self._started = 0, time.monotonic()

    def measured(self) -> Measured:
        """Peaks as if all points had begun with as much held as the last ones: libraries cache more and more."""
        most = max((held for _, held in self._points), default=0)
        points = [structs.replace(p, peak_bytes=p.peak_bytes + most - held) for p, held in self._points]
        return Measured(points, self._notes, max(1.0, median(self._loads or [1.0])))

    def run_all(
        self, batches_of: Callable[[int], Iterator[Batch]], sizes: Sequence[int]
    ) -> Generator[Stepped, bool, None]:
        """The points in their order, until the time is over or a stop."""
        give_back()
        small = Probe(sizes[0], _some(batches_of(sizes[0])), rank=8)
        if (yield from self._run(small)):
            return
        large = self._larger(small, batches_of, sizes)
        if large is None:
            half = small._replace(micro_batches=tuple(map(_half, small.micro_batches)))
            small, large = half, small
            if (yield from self._run(half)):
                return
        else:
            if (yield from self._run(large)):
                return
            # The first was chosen by the price of a token in a small batch, which is too high.
            larger = self._larger(large, batches_of, sizes)
            if larger is not None and (yield from self._run(large := larger)):
                return
        n_blocks = 1 + max((memory.block(m.name) for m in self._matrices), default=0)
        for probe in (
            large._replace(skip=n_blocks // 2),
            large._replace(checkpointing=True),
            large._replace(rank=64),
            large._replace(frozen_rank=16),
            large._replace(skip=n_blocks // 2, checkpointing=True),
            small._replace(rank=64),
        ):
            if (yield from self._run(probe)):
                return

    def _larger(self, last: Probe, batches_of: Callable[[int], Iterator[Batch]], sizes: Sequence[int]) -> Probe | None:
        """The largest size beyond `last` whose step is short enough and whose memory fits."""
        if not self._points or not any(point.batch == last.batch for point, _ in self._points):
            return None
        step_s = min(STEP_S, max(0.0, self._deadline - time.monotonic()) / SHORT_STEPS)
        done = [(point.n_tokens, point.step_s) for point, _ in self._points]
        (n_tokens, seconds), per_token = done[-1], done[-1][1] / done[-1][0]
        if len(done) > 1 and n_tokens > done[-2][0]:
            per_token = max(per_token / 4, (seconds - done[-2][1]) / (n_tokens - done[-2][0]))
        found = None
        for size in sizes:
            if size <= last.batch:
                continue
            if seconds + (size / last.batch - 1) * n_tokens * per_token > 2 * step_s:
                break  # not even worth cutting the text into tokens
            probe = Probe(size, _some(batches_of(size)), rank=8)
            is_long = seconds + (probe.n_tokens - n_tokens) * per_token > step_s
            if is_long or self._missing_bytes(probe._replace(rank=64)) > 0:
                break
            found = probe
        return found

    def _missing_bytes(self, probe: Probe) -> int:
        """By how much the probe is expected to exceed the limit; on top of what is held now, weights included."""
        if not self._limit_bytes:
            return 0
        needed = _added_bytes(self._dims, self._matrices, probe, self._bits, self._base)
        return held_bytes(self._base.device) + int(SLACK * needed) - self._limit_bytes

    def _run(self, probe: Probe) -> Generator[Stepped, bool, bool]:
        """Run one point and note what came of it; whether to stop here."""
        if time.monotonic() >= self._deadline:
            self._notes.append(f"{self._bits}: time ran out before {_words(probe)}")
            return True
        if (missing := self._missing_bytes(probe)) > 0:
            self._notes.append(f"{self._bits}: {_words(probe)} left out, {missing} bytes are missing")
            return False
        is_stopping = False
        try:
            is_stopping = yield from self._steps(probe)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._notes.append(f"{self._bits}: {_words(probe)} ran out of memory")
        except TrainingFailed as failed:
            is_stopping = True
            self._notes.append(f"{self._bits}: {_words(probe)}: {failed}")
        give_back()  # outside the handlers, whose traceback would keep the tensors alive
        return is_stopping

    def _steps(self, probe: Probe) -> Generator[Stepped, bool, bool]:
        device = self._base.device
        ranks = {m.name: min(probe.rank, m.d_in, m.d_out) for m in self._matrices if memory.block(m.name) >= probe.skip}
        training = Training(n_steps=N_STEPS, batch=probe.batch, learning_rate=1e-6)
        n, held = len(probe.micro_batches), held_bytes(device)
        meter, times, is_stopping = Meter(), [], False
        with (
            adapted(self._base.model, _frozen(self._matrices, probe.frozen_rank), ranks, 2.0, self._seed) as model,
            checkpointed(self._base.model, is_on=probe.checkpointing),
        ):
            meter.watch(device)
            running = fit(
                model.model,
                cycle(probe.micro_batches),
                model.parameters,
                training,
                micro_batch=MicroBatch(max(len(batch.ids) for batch in probe.micro_batches)),
                after_forward=meter.see,
            )
            began = before = self._clock()
            for _ in running:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(self._clock() - before)
                is_stopping = (yield self._stepped()) or time.monotonic() >= self._deadline
                before = self._clock()
                if is_stopping or (len(times) > n and before - began > POINT_S):
                    break
            running.close()
        if len(times) > n:
            point = Point(
                bits=self._bits,
                batch=probe.batch,
                n_tokens=probe.n_tokens,
                max_tokens=probe.max_tokens,
                rank=probe.rank,
                skip=probe.skip,
                frozen_rank=probe.frozen_rank,
                checkpointing=probe.checkpointing,
                step_s=sum(min(times[1:][i::n]) for i in range(n)) / n,
                peak_bytes=meter.peak_bytes,
            )
            self._points.append((point, held))
            self._loads.append(fmean(times[1:]) / point.step_s)
        return is_stopping

    def _stepped(self) -> Stepped:
        self._step += 1
        n_steps, seconds = N_POINTS * N_STEPS, time.monotonic() - self._started
        return Stepped(step=self._step, n_steps=n_steps, samples=0, loss=None, tokens=0, seconds=seconds)


@contextmanager
def checkpointed(model: Any, *, is_on: bool) -> Iterator[None]:
    """Activation checkpointing for the time of the block, and no backward pass below the first trained matrix."""
    if not is_on:
        yield
        return
    model.activation_checkpointing_enable({"use_reentrant": False})  # reentrant would need inputs with gradients
    # Under PEFT transformers gives the embeddings gradients all the same: every block would be recomputed and gone back
    # through, and switching checkpointing off would not take that away.
    model.disable_input_require_grads()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _some(batches: Iterator[Batch]) -> tuple[Batch, ...]:
    return tuple(islice(batches, N_BATCHES))


def _added_bytes(dims: Dimensions, found: Sequence[Matrix], probe: Probe, bits: Bits, base: Loaded) -> int:
    """What the probe needs beside the weights, by the formula."""
    ranks = {m.name: probe.rank for m in found if memory.block(m.name) >= probe.skip}
    whole = memory.predicted_bytes(
        dims,
        found,
        ranks,
        frozen={m.name: probe.frozen_rank for m in found},
        bits=bits,
        compute=base.compute,
        n_tokens=probe.max_tokens,
        checkpointing=probe.checkpointing,
    )
    return whole - memory.weight_bytes(found, dims.n_other, bits, base.compute)


def _frozen(found: Sequence[Matrix], rank: int) -> Adapter:
    """A global adapter that changes nothing: its values do not matter for what it costs."""
    if not rank:
        return {}
    return {
        m.name: Factors(
            a=np.full((min(rank, m.d_in, m.d_out), m.d_in), 1e-3, np.float32),
            b=np.zeros((m.d_out, min(rank, m.d_in, m.d_out)), np.float32),
        )
        for m in found
    }


def _half(batch: Batch) -> Batch:
    """The first half of every row."""
    n = max(2, batch.ids.shape[1] // 2)

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[:, :n]

    ids, labels = batch.ids[:, :n], batch.labels[:, :n].clone()
    prompts = (labels[:, 1:] == IGNORED).all(dim=1)
    labels[prompts, -1] = ids[prompts, -1]  # without an answer a row would have no loss
    return batch._replace(
        ids=ids,
        labels=labels,
        mask=cut(batch.mask),
        positions=cut(batch.positions),
        n_targets=int((labels[:, 1:] != IGNORED).sum()),
    )


def give_back() -> None:
    """Free to the system what a run held: the next one's peak must be its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _words(probe: Probe) -> str:
    parts = [f"batch {probe.batch} ({probe.max_tokens} tokens)", f"rank {probe.rank}"]
    parts += [f"{probe.skip} blocks skipped"] if probe.skip else []
    parts += [f"global rank {probe.frozen_rank}"] if probe.frozen_rank else []
    parts += ["checkpointing"] if probe.checkpointing else []
    return ", ".join(parts)
