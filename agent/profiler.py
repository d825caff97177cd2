"""What could this server give to training right now?

FedPipe lets each server train with the resources that its own services leave free; so the report tells what is free at this
moment, not what was bought.  The host's limits are read as the kernel enforces them on us: the cgroup of the systemd unit or
of the container caps processors and memory below what the machine has.

A look costs some milliseconds and imports neither torch nor bitsandbytes.  `changed` says whether it is worth a message.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

import msgspec
import psutil

from agent.gpus import gpus, usage
from agent.limits import Limits
from protocol.messages import Allowance, Bits, Gpu, Report
from protocol.widths import Quantized

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_CGROUP: Final = Path("/proc/self/cgroup")
MAX_NOTES: Final = 16
LIMITS: Final = Limits()


class Link:
    """How fast bytes really moved, up and down, as seen by the transfers themselves.  No clock and no I/O.

    rate = sum of decayed bytes / sum of decayed seconds; what was seen `half_life_s` of transfer time ago counts half.  Long
    transfers thus weigh more than short ones, which say more about latency than about the link.
    """

    def __init__(self, half_life_s: float = 30.0) -> None:
        self._half_life_s = half_life_s
        self._sent = (0.0, 0.0)
        self._received = (0.0, 0.0)

    def up(self, n_bytes: int, seconds: float) -> None:
        """Fold in an upload, or a part of one."""
        self._sent = self._fold(self._sent, n_bytes, seconds)

    def down(self, n_bytes: int, seconds: float) -> None:
        """Fold in a download, or a part of one."""
        self._received = self._fold(self._received, n_bytes, seconds)

    @property
    def up_bytes_per_s(self) -> float:
        """Measured uplink; 0 while nothing was sent."""
        return self._sent[0] / self._sent[1] if self._sent[1] else 0.0

    @property
    def down_bytes_per_s(self) -> float:
        """Measured downlink; 0 while nothing was received."""
        return self._received[0] / self._received[1] if self._received[1] else 0.0

    def _fold(self, old: tuple[float, float], n_bytes: int, seconds: float) -> tuple[float, float]:
        if n_bytes <= 0 or seconds <= 0:
            return old
        kept = 0.5 ** (seconds / self._half_life_s)
        return old[0] * kept + n_bytes, old[1] * kept + seconds


class Cap(msgspec.Struct, frozen=True):
    """What the control groups above this process allow it; infinite where they say nothing."""

    n_cpus: float = math.inf
    memory_bytes: float = math.inf
    free_bytes: float = math.inf


def profile(
    data_dir: Path,
    link: Link | None = None,
    *,
    limits: Limits = LIMITS,
    device: str = "auto",
    child: int | None = None,
    paused: str = "",
) -> Report:
    """Look at this server now.  `data_dir` need not exist yet; its file system is the one whose free space counts.

    The allowance is for `device` (as in the configuration) under `limits`; what the training child, a process id, holds of it
    counts as free.  `paused` says why nothing may be trained now.

    Load is the machine's, as a ratio of its processors; free memory counts caches that the kernel would give up.  Never
    raises for something that cannot be read: the field keeps its default and `notes` says so.
    """
    notes: list[str] = []
    devices, driver = gpus(notes)
    cap = cgroup_cap()
    ram = psutil.virtual_memory()
    bits = _bits(notes)
    if not (allowed := [width for width in bits if width in limits.bits]):
        notes.append(f"limits.bits = {limits.bits} leaves none of {bits}: allow one of these")
    return Report(
        gpus=devices,
        driver=driver[:64],
        n_cpus=max(1, math.floor(min(len(os.sched_getaffinity(0)), cap.n_cpus))),
        cpu_load_ratio=round(psutil.getloadavg()[0] / (os.cpu_count() or 1), 3),
        ram_total_bytes=int(min(ram.total, cap.memory_bytes)),
        ram_available_bytes=int(min(ram.available, cap.free_bytes)),
        disk_free_bytes=_disk_free(data_dir, notes),
        up_bytes_per_s=link.up_bytes_per_s if link else 0.0,
        down_bytes_per_s=link.down_bytes_per_s if link else 0.0,
        bits=allowed,
        update_dtypes=list(get_args(Quantized)),
        allowance=_allowance(limits, training_gpu(device, devices), child, paused),
        notes=[note[:500] for note in notes[:MAX_NOTES]],
    )


def changed(old: Report, new: Report) -> bool:
    """Whether a planner could decide differently: another machine, or something free that moved by a tenth of the whole."""
    fixed = ("driver", "n_cpus", "ram_total_bytes", "bits", "update_dtypes", "notes")
    if any(getattr(old, name) != getattr(new, name) for name in fixed) or len(old.gpus) != len(new.gpus):
        return True
    if _allowance_changed(old.allowance, new.allowance):
        return True
    return (
        abs(old.ram_available_bytes - new.ram_available_bytes) > 0.1 * new.ram_total_bytes
        or abs(old.cpu_load_ratio - new.cpu_load_ratio) > 0.25
        or _ratio(old.disk_free_bytes, new.disk_free_bytes) > 1.1
        or _ratio(old.up_bytes_per_s, new.up_bytes_per_s) > 1.25
        or _ratio(old.down_bytes_per_s, new.down_bytes_per_s) > 1.25
        or any(_gpu_changed(a, b) for a, b in zip(old.gpus, new.gpus, strict=True))
    )


def training_gpu(wanted: str, devices: Sequence[Gpu]) -> Gpu | None:
    """The device that `wanted` ("auto", "cpu", "cuda" or "cuda:N") means to torch, None for the CPU; without importing torch."""
    if wanted == "cpu" or not devices or _is_cpu_build():
        return None
    _, _, index = wanted.partition(":")
    return devices[int(index)] if index.isdigit() and int(index) < len(devices) else devices[0]


def available_ram() -> int:
    """Memory in bytes that this process and its children may still take: the machine's or the control group's."""
    return int(min(psutil.virtual_memory().available, cgroup_cap().free_bytes))


def own_ram(pid: int | None) -> int:
    """Memory of a process that no file backs, in bytes; 0 without one."""
    try:
        held = psutil.Process(pid).memory_info() if pid else None
    except psutil.Error:
        return 0
    return max(0, held.rss - held.shared) if held else 0


def memory(gpu: Gpu | None, child: int | None) -> tuple[int, int | None]:
    """Bytes of the training device (None: the CPU) that are free and that the child holds, None if that is not known."""
    if gpu is None:
        return available_ram(), own_ram(child)
    used = usage(gpu.index, [child] if child else [])
    return (used.free_bytes, used.own_bytes) if used else (gpu.free_bytes, None)


def _allowance(limits: Limits, gpu: Gpu | None, child: int | None, paused: str) -> Allowance:
    free, own = memory(gpu, child)
    return Allowance(
        device=gpu.name if gpu else "cpu",
        memory_bytes=limits.allowed_bytes(free, own or 0),
        max_rank=limits.max_rank,
        max_batch=limits.max_batch,
        paused=paused[:2000],
    )


def _is_cpu_build() -> bool:
    """Whether torch, by the name of its version, knows no CUDA at all."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def cgroup_cap(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> Cap:
    """Read the limits of this process's control group and of all groups above it (cgroup v2; others say nothing).

    Memory in use counts without the inactive file cache, which the kernel reclaims before it kills.
    """
    cap = Cap()
    for folder in _groups(root, own):
        limit = _number(folder / "memory.max")
        free = math.inf
        if math.isfinite(limit):
            used = _number(folder / "memory.current", missing=0.0)
            free = max(0.0, limit - max(0.0, used - _inactive_file(folder / "memory.stat")))
        cpus = _cpu_quota(folder / "cpu.max")
        cap = Cap(min(cap.n_cpus, cpus), min(cap.memory_bytes, limit), min(cap.free_bytes, free))
    return cap


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of our own group and of its ancestors, from /proc/self/cgroup's line `0::/a/b`."""
    path = next((line[3:] for line in _lines(own) if line.startswith("0::/")), "/")
    leaf = root / path.strip("/")
    return [leaf, *(p for p in leaf.parents if p.is_relative_to(root))]


def _cpu_quota(file: Path) -> float:
    """Parse `cpu.max`: '150000 100000' is one and a half processors, 'max 100000' is no limit."""
    quota, _, period = next(iter(_lines(file)), "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else math.inf


def _inactive_file(file: Path) -> float:
    fields = dict(line.split(" ", 1) for line in _lines(file) if " " in line)
    return float(fields.get("inactive_file", 0))


def _number(file: Path, missing: float = math.inf) -> float:
    text = next(iter(_lines(file)), "")
    return float(text) if text.isdigit() else missing


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _disk_free(folder: Path, notes: list[str]) -> int:
    existing = next((p for p in [folder.absolute(), *folder.absolute().parents] if p.exists()), Path("/"))
    try:
        return psutil.disk_usage(str(existing)).free
    except OSError as error:
        notes.append(f"free space of {existing} could not be read: {error}")
        return 0


def _bits(notes: list[str]) -> list[Bits]:
    """Return how the base can be held here: quantization needs bitsandbytes, which also runs on the CPU."""
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        notes.append("bitsandbytes is not installed: no 4-bit or 8-bit base; install the extra fedpipe[agent]")
        return ["none"]
    return ["none", "int8", "nf4"]


def _ratio(a: float, b: float) -> float:
    """Return how many times the larger is the smaller: 1 for equal, infinite if exactly one of them is zero."""
    low, high = sorted((a, b))
    return high / low if low else (math.inf if high else 1.0)


def _allowance_changed(old: Allowance | None, new: Allowance | None) -> bool:
    if old is None or new is None:
        return old is not new
    fixed = ("device", "max_rank", "max_batch", "paused")
    return any(getattr(old, name) != getattr(new, name) for name in fixed) or (
        abs(old.memory_bytes - new.memory_bytes) > 0.1 * max(old.memory_bytes, new.memory_bytes)
    )


def _gpu_changed(old: Gpu, new: Gpu) -> bool:
    fixed = ("index", "name", "total_bytes", "n_other_processes", "compute", "mig", "ecc_errors")
    return (
        any(getattr(old, name) != getattr(new, name) for name in fixed)
        or abs(old.free_bytes - new.free_bytes) > 0.1 * new.total_bytes
        or abs(old.utilization_ratio - new.utilization_ratio) > 0.25
        or abs(old.temperature_c - new.temperature_c) > 10
    )
