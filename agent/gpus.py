"""NVIDIA devices as NVML sees them, each field by itself.

What a device cannot tell (a MIG parent, a laptop part, inside a container) costs that field and no other.

NVML is the driver's own library; `nvidia-ml-py` only binds it.  It is opened once and kept open: on a server without the
persistence daemon the first client wakes the device up, which takes seconds.  Without a driver it is looked for again every few
seconds, which is a search of the disk, so one that was installed later is found without a restart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import Any, Final, Literal, NamedTuple, TypeVar

import psutil
import pynvml as nvml

from protocol.messages import Gpu

T = TypeVar("T")

_opened: list[bool] = []
_missing_at: list[float] = []
LOOK_AGAIN_S: Final = 5.0
MAX_GPUS: Final = 64
UTILIZATION_S: Final = 3.0
"""How far back a process's use of the device counts: the driver takes a sample about once a second."""


def gpus(notes: list[str]) -> tuple[list[Gpu], str]:
    """Return the devices that this process may use and the driver's version ('' without one).

    `CUDA_VISIBLE_DEVICES` is respected, by index in PCI order or by the beginning of a UUID.  What could not be read is added
    to `notes` in words.  Never raises for a missing or broken driver.
    """
    missing = "no NVIDIA driver: training runs on the CPU"
    if _missing_at and time.monotonic() - _missing_at[0] < LOOK_AGAIN_S:
        notes.append(missing)
        return [], ""
    _missing_at.clear()
    try:
        if not _opened:
            nvml.nvmlInit()
            _opened.append(True)
        driver = _read(nvml.nvmlSystemGetDriverVersion, "", "driver version", notes)
        handles = [(i, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(min(nvml.nvmlDeviceGetCount(), MAX_GPUS))]
    except nvml.NVMLError_LibraryNotFound:
        _missing_at.append(time.monotonic())
        notes.append(missing)
        return [], ""
    except nvml.NVMLError as error:
        _close()  # after a driver update the open library is useless; the next look opens it anew
        notes.append(f"NVML does not answer ({error}): training runs on the CPU; try nvidia-smi on this server")
        return [], ""
    ours = _own_processes()
    return [_gpu(i, handle, ours, notes) for i, handle in handles if _visible(i, handle)], _text(driver)


def _close() -> None:
    if _opened:
        _opened.clear()
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError:
            return


def _gpu(index: int, handle: Any, ours: set[int], notes: list[str]) -> Gpu:
    """Read one device; costs a few milliseconds."""

    def read(get: Callable[..., T], default: T, what: str, *args: object) -> T:
        return _read(get, default, f"GPU {index}: {what}", notes, handle, *args)

    memory = read(nvml.nvmlDeviceGetMemoryInfo, None, "memory")
    major, minor = read(nvml.nvmlDeviceGetCudaComputeCapability, (0, 0), "compute capability")
    busy = read(nvml.nvmlDeviceGetUtilizationRates, None, "utilization")
    none: list[Any] = []
    computing = read(nvml.nvmlDeviceGetComputeRunningProcesses, none, "compute processes")
    drawing = read(nvml.nvmlDeviceGetGraphicsRunningProcesses, none, "graphics processes")
    return Gpu(
        index=index,
        name=_text(read(nvml.nvmlDeviceGetName, "unknown", "name"))[:200],
        total_bytes=int(memory.total) if memory else 0,
        free_bytes=int(memory.free) if memory else 0,
        utilization_ratio=min(1.0, busy.gpu / 100) if busy else 0.0,
        n_other_processes=len({p.pid for p in [*computing, *drawing]} - ours),
        power_w=read(nvml.nvmlDeviceGetPowerUsage, 0, "power") / 1000,
        temperature_c=float(read(nvml.nvmlDeviceGetTemperature, 0, "temperature", nvml.NVML_TEMPERATURE_GPU)),
        compute=f"{major}.{minor}" if major else "",
        mig=read(nvml.nvmlDeviceGetMigMode, (0, 0), "MIG mode")[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        ecc_errors=read(
            nvml.nvmlDeviceGetTotalEccErrors,
            0,
            "ECC errors",
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        ),
    )


class Usage(NamedTuple):
    """Who uses one device now.  own_bytes and other_ratio are None where the driver does not tell whose use it is.

    That is so in a container with process ids of its own: there our child is a stranger among the device's processes.
    """

    free_bytes: int
    own_bytes: int | None
    other_ratio: float | None
    power_w: float
    temperature_c: float


def usage(index: int, ours: Collection[int]) -> Usage | None:
    """Look at one device; `ours` are the processes that train here now.  None when NVML does not answer.

    Use by other fedpipe agents is not counted in other_ratio: two of them on one device would stop each other.
    """
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        return None
    none: list[Any] = []
    computing = _read(nvml.nvmlDeviceGetComputeRunningProcesses, none, "", [], handle)
    held = {p.pid: p.usedGpuMemory for p in computing}
    mine = [held[pid] for pid in ours if pid in held]
    is_known = not ours or (bool(mine) and None not in mine)
    return Usage(
        free_bytes=int(memory.free),
        own_bytes=sum(mine) if is_known else None,
        other_ratio=_other_ratio(handle, ours) if is_known else None,
        power_w=_read(nvml.nvmlDeviceGetPowerUsage, 0, "", [], handle) / 1000,
        temperature_c=float(_read(nvml.nvmlDeviceGetTemperature, 0, "", [], handle, nvml.NVML_TEMPERATURE_GPU)),
    )


def energy(index: int) -> tuple[Literal["joules", "watts"], float] | None:
    """What a device spent since its driver was loaded or, where it keeps no count (before Volta), what it draws now.

    None when NVML does not answer.
    """
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        try:
            return "joules", nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return "watts", nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except nvml.NVMLError:
        return None


def _other_ratio(handle: Any, ours: Collection[int]) -> float | None:
    """Share of the device's time that went to others in the last seconds; None when the driver keeps no such account."""
    since_us = int((time.time() - UTILIZATION_S) * 1e6)
    try:
        seen = nvml.nvmlDeviceGetProcessUtilization(handle, since_us)
    except nvml.NVMLError_NotFound:  # no process did anything
        return 0.0
    except nvml.NVMLError:
        return None
    busy: dict[int, int] = {}
    for one in seen:
        busy[one.pid] = max(busy.get(one.pid, 0), one.smUtil)
    return min(1.0, sum(n for pid, n in busy.items() if n and pid not in ours and not _is_training(pid)) / 100)


def _is_training(pid: int) -> bool:
    try:
        return "agent.worker" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _read(get: Callable[..., T], default: T, what: str, notes: list[str], *args: object) -> T:
    """Call NVML; a device that does not have the field is no news, any other failure is noted."""
    try:
        return get(*args)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return default
    except nvml.NVMLError as error:
        notes.append(f"{what} could not be read: {error}")
        return default


def _visible(index: int, handle: Any) -> bool:
    """Whether `CUDA_VISIBLE_DEVICES` lets this process use the device; a MIG instance's name hides nothing here."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return True
    names = [w.strip() for w in wanted.split(",") if w.strip()]
    uuid = _text(_read(nvml.nvmlDeviceGetUUID, "", "UUID", [], handle))
    return any(n == str(index) or n.startswith("MIG-") or (n.startswith("GPU-") and uuid.startswith(n)) for n in names)


def _own_processes() -> set[int]:
    """This process and everything below it: the training child's memory on the device is ours to plan with."""
    try:
        me = psutil.Process()
        return {me.pid, *(child.pid for child in me.children(recursive=True))}
    except psutil.Error:
        return {os.getpid()}


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
