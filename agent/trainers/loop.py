"""The training loop, top to bottom: learning rate, micro-batches, clipped AdamW step, progress, and a way out.

A step is `accumulation` micro-batches.  Its loss is the mean over all their target tokens, not the mean of their means: a
micro-batch of short answers does not weigh as much as one of long answers.

Every yield reports one finished micro-batch and hears whether to stop.  On a stop in the middle of a step the gradients so far
are re-scaled to the tokens they saw and applied: nothing that was computed is thrown away and the sample count stays true.
A yield may take long, when the host needs the device; its time is not counted.  Micro-batches may shrink at any time: a drawn
one is then split, so the same step is made of the same samples in more pieces.

A run may begin at a Point that an earlier one reached.  With the weights, the optimizer and the random generators of that
point (agent/trainers/resuming.py) it is then, bit for bit on a CPU, the rest of the run that was interrupted.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from agent.batches import Batch, summed_loss
from agent.checkpoints import ORIGIN, Point
from agent.child import Stepped
from agent.trainers import TrainingFailed
from protocol.messages import Training


class Fit(NamedTuple):
    """What a run did.  loss is the mean over its steps; seconds without pauses; is_stopped when a stop ended it early."""

    steps: int
    samples: int
    tokens: int
    loss: float | None
    seconds: float
    is_stopped: bool


class MicroBatch:
    """How many rows a micro-batch may have."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def shrink(self) -> None:
        """Half of it, from the next one on."""
        self.n_rows = max(1, self.n_rows // 2)


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up, then constant: a round is short, and the coordinator sets each round's rate."""
    return training.learning_rate * min(1.0, (step + 1) / max(1, training.warmup_steps))


def adamw(parameters: Sequence[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """What moves the parameters; `fit` sets the rate of every step.  Fused: adapters are many small tensors."""
    return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


def fit(
    model: Any,
    batches: Iterator[Batch],
    parameters: Sequence[torch.nn.Parameter],
    training: Training,
    *,
    micro_batch: MicroBatch,
    after_forward: Callable[[], None],
    before_step: Callable[[int], None] = lambda _: None,
    after_step: Callable[[Point], None] = lambda _: None,
    optimizer: torch.optim.Optimizer | None = None,
    start: Point = ORIGIN,
) -> Generator[Stepped, bool, Fit]:
    """Train `parameters` until training.n_steps optimizer steps are made.

    Args:
        model: called with input_ids; only `parameters` may require gradients.
        batches: endless micro-batches; the first is that of the step after `start`.
        parameters: what the optimizer moves.
        training: the plan's numbers.
        micro_batch: larger ones are split.
        after_forward: called when activations are at their peak, to measure.
        before_step: called with the number of the step, from 0, when its gradients are complete and not yet clipped.
        after_step: called with the point that a step reached, before anything else happens; its time is not counted.
        optimizer: from `adamw`, with the state of an earlier run; a fresh one if there is none.
        start: where that run was.

    Raises TrainingFailed as soon as a loss or a gradient is not finite.
    """
    model.train()
    optimizer = optimizer or adamw(parameters, training)
    started = time.monotonic()
    away = -start.seconds  # seconds that yields took, less those of the run before
    steps, samples, tokens, loss_sum, _ = start

    def stepped(loss: float) -> Stepped:
        return Stepped(
            step=steps, n_steps=training.n_steps, samples=samples, loss=loss, tokens=tokens, seconds=worked()
        )

    def worked() -> float:
        return time.monotonic() - started - away

    is_stopping, seen, planned = False, 0, 0
    while steps < training.n_steps and not is_stopping:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, steps)
        micro_batches = deque(islice(batches, training.accumulation))
        planned = max(1, sum(batch.n_targets for batch in micro_batches))
        seen, total = 0, 0.0
        while micro_batches:
            batch = micro_batches.popleft()
            if len(batch.ids) > micro_batch.n_rows:
                batch, rest = batch.split(micro_batch.n_rows)
                micro_batches.appendleft(rest)
            loss = summed_loss(model, batch)
            after_forward()
            torch.autograd.backward(loss / planned)
            total += loss.item()  # waits for the device: a stop never finds more than one micro-batch in flight
            if not math.isfinite(total):
                raise TrainingFailed("loss is not finite", f"in step {steps + 1}")
            seen += batch.n_targets
            samples, tokens = samples + batch.n_samples, tokens + batch.n_targets
            if not micro_batches:
                break
            asked_at = time.monotonic()
            is_stopping = yield stepped(total / max(1, seen))
            away += time.monotonic() - asked_at
            if is_stopping:
                break
        before_step(steps)
        _step(optimizer, parameters, training.max_gradient_norm, rescale=planned / max(1, seen))
        steps, mean = steps + 1, total / max(1, seen)
        loss_sum += mean
        asked_at = time.monotonic()
        after_step(Point(steps, samples, tokens, loss_sum, worked()))
        is_stopping = (yield stepped(mean)) or is_stopping
        away += time.monotonic() - asked_at
    done = Point(steps, samples, tokens, loss_sum, worked())
    is_early = steps < training.n_steps or max(1, seen) < planned
    return Fit(steps, samples, tokens, done.loss, done.seconds, is_early)


def _step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter], max_norm: float, *, rescale: float
) -> None:
    if rescale != 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= rescale
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)  # 0 is no clipping
    if not torch.isfinite(norm):
        raise TrainingFailed("loss is not finite", "its gradient is not")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # frees the gradients before the next forward pass
