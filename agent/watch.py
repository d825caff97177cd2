"""Looks at the device that trains, for the policy in agent/host.py: a few milliseconds each, no torch."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import psutil

from agent import profiler
from agent.energy import Seen, look
from agent.gpus import gpus, usage
from agent.host import Sample
from protocol.messages import Gpu


def minute_of_day() -> int:
    """Of the local day, from 0 to 1439."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


class CpuUse(NamedTuple):
    """Processor seconds so far: of all processors, those that were busy, those that went to us and our child."""

    available_s: float
    busy_s: float
    own_s: float


class Watch:
    """Looks at one device, named as in the configuration.  Of the CPU's time it remembers what was used at the last look."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._cpu: CpuUse | None = None

    def look(self, child: int | None) -> Sample:
        """The device now; `child` is the process that trains.  Blocks for some milliseconds."""
        minute = minute_of_day()
        gpu = self._gpu()
        if gpu is None:
            return Sample(minute, False, *profiler.memory(None, child), self._other_cpu(child))
        used = usage(gpu.index, [child] if child else [])
        return Sample(minute, True, *used) if used else Sample(minute, True, gpu.free_bytes)

    def memory(self, child: int | None) -> tuple[int, int | None]:
        """Bytes that are free and that the child holds; None where the driver does not tell."""
        return profiler.memory(self._gpu(), child)

    def energy(self) -> Seen | None:
        """What the device has used, or draws.  Blocks for some milliseconds."""
        gpu = self._gpu()
        return look(gpu.index if gpu else None)

    def _gpu(self) -> Gpu | None:
        return None if self._device == "cpu" else profiler.training_gpu(self._device, gpus([])[0])

    def _other_cpu(self, child: int | None) -> float | None:
        times = psutil.cpu_times()
        before, self._cpu = (
            self._cpu,
            CpuUse(
                available_s=time.monotonic() * (os.cpu_count() or 1),
                busy_s=sum(times[:8]) - times.idle - times.iowait,
                own_s=_cpu_s(os.getpid()) + _cpu_s(child),
            ),
        )
        return other_ratio(before, self._cpu) if before else None


def other_ratio(before: CpuUse, now: CpuUse) -> float:
    """Share of the machine's processor time between two looks that others took.  A child that came or went distorts one."""
    others = now.busy_s - before.busy_s - max(0.0, now.own_s - before.own_s)
    return min(1.0, max(0.0, others / max(1e-3, now.available_s - before.available_s)))


def _cpu_s(pid: int | None) -> float:
    try:
        times = psutil.Process(pid).cpu_times() if pid else None
    except psutil.Error:
        return 0.0
    return times.user + times.system if times else 0.0
