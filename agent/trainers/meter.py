"""Measured memory beside predicted memory, and a name for running out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from agent.trainers import TrainingFailed

CONTEXT_BYTES: Final = 512 * 2**20
"""What a process holds of a CUDA device beside torch's own allocations: its context and the kernels it has loaded."""


class Meter:
    """Watches one run on one device.  `predicted_bytes` is what the plan expects; 0 when nobody predicted."""

    def __init__(self, predicted_bytes: int = 0) -> None:
        self.predicted_bytes = predicted_bytes
        self._device: torch.device | None = None
        self._peak_bytes = 0

    def watch(self, device: torch.device) -> None:
        """Begin; before this everything is 0."""
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def see(self) -> None:
        """Note the moment after a forward pass, when activations are at their peak."""
        if self._device is None:
            return
        is_cuda = self._device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self._device) + CONTEXT_BYTES if is_cuda else anonymous_bytes()
        self._peak_bytes = max(self._peak_bytes, now)

    @property
    def peak_bytes(self) -> int:
        """Measured peak.

        With CUDA the most that torch's allocator held and the context; without, the most anonymous memory of this process
        right after a forward pass, which includes some 300 MB of interpreter and libraries.
        """
        self.see()
        return self._peak_bytes


def held_bytes(device: torch.device) -> int:
    """What this process holds of the device now, in the terms of Meter.peak_bytes."""
    return torch.cuda.memory_allocated(device) + CONTEXT_BYTES if device.type == "cuda" else anonymous_bytes()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs.  RSS would count the mapped model file."""
    with Path("/proc/self/status").open() as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises when host or device memory is short."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def out_of_memory_named(meter: Meter) -> Iterator[None]:
    """Turn what torch raises without memory into TrainingFailed("out_of_memory") with predicted and measured bytes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0][:300]
        detail = f"predicted {meter.predicted_bytes} bytes, measured {meter.peak_bytes} bytes: {first}"
        raise TrainingFailed("out_of_memory", detail) from error
