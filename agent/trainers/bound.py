"""The configured limit on a GPU's memory, kept by torch's own allocator: beyond it a task fails by name and the host is spared."""

from __future__ import annotations

from typing import Final

import torch

CONTEXT_BYTES: Final = 600 * 2**20
"""What a CUDA context with its kernels takes beside the allocator: some 300 to 600 MiB by device and driver."""


def bound(device: torch.device, limit_bytes: int) -> None:
    """Let this process allocate at most `limit_bytes` on `device`, its context included; 0 is no bound.  On the CPU nothing.

    What is allocated already stays and counts.  RAM has no such bound here: agent/host.py and the control group watch it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allocator_ratio(limit_bytes, total), device)


def allocator_ratio(limit_bytes: int, total_bytes: int) -> float:
    """Share of the device that the allocator may take, 0 to 1."""
    return min(1.0, max(0, limit_bytes - CONTEXT_BYTES) / total_bytes) if limit_bytes else 1.0
