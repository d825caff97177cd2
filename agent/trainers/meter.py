"""Measured memory beside predicted memory, and a name for running out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from agent import loading
from agent.batches import Batch
from agent.loading import Loaded
from agent.trainers import TrainingFailed, memory
from protocol.messages import Plan


class Meter:
    """Watches one run.  Before `watch` everything is 0."""

    def __init__(self) -> None:
        self._measure: Callable[[], int] = lambda: 0
        self._predict: Callable[[int], int] = lambda _: 0
        self._peak_bytes = 0
        self._n_tokens = 0

    def watch(self, base: Loaded, folder: Path, plan: Plan, frozen: Mapping[str, int]) -> None:
        """Begin for this model, plan and ranks of the global adapter."""
        device = base.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._measure = lambda: torch.cuda.max_memory_allocated(device)
        else:
            self._measure = anonymous_bytes
        try:
            dimensions = memory.dimensions(folder)
        except (KeyError, StopIteration):
            return  # an architecture that the formula does not know: measured only
        found = loading.matrices(base.model)
        self._predict = lambda n_tokens: memory.predicted_bytes(
            dimensions,
            found,
            plan.ranks,
            frozen=frozen,
            bits=plan.bits,
            compute=base.compute,
            n_tokens=n_tokens,
            checkpointing=plan.train is not None and plan.train.checkpointing,
        )

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the largest decides what is predicted, also if it is the one that does not fit."""
        for batch in batches:
            self._n_tokens = max(self._n_tokens, batch.ids.numel())
            yield batch

    def see(self) -> None:
        """Note the moment after a forward pass, when activations are at their peak."""
        self._peak_bytes = max(self._peak_bytes, self._measure())

    @property
    def peak_bytes(self) -> int:
        """Measured peak.

        With CUDA the most that torch's allocator held; without, the most anonymous memory of this process right after a
        forward pass, which includes some 300 MB of interpreter and libraries.
        """
        self.see()
        return self._peak_bytes

    @property
    def predicted_bytes(self) -> int:
        """By agent/trainers/memory.py for the largest micro-batch so far; 0 for an unknown architecture."""
        return self._predict(self._n_tokens)


def anonymous_bytes() -> int:
    """Memory of this process that no file backs.  RSS would count the mapped model file."""
    with Path("/proc/self/status").open() as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@contextmanager
def out_of_memory_named(meter: Meter) -> Iterator[None]:
    """Turn what torch raises without memory into TrainingFailed("out_of_memory") with predicted and measured bytes."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not is_ours:
            raise
        first = (str(error).splitlines() or [""])[0][:300]
        detail = f"predicted {meter.predicted_bytes} bytes, measured {meter.peak_bytes} bytes: {first}"
        raise TrainingFailed("out_of_memory", detail) from error
