"""What processes take: processor time and memory, read from /proc for a process and all its children."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

EVERY_S: Final = 0.25


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def mentioning(text: str) -> list[psutil.Process]:
    """Processes with this text in their command line: those of a program that lets its own go their own ways."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if text in " ".join(process.cmdline()):
                found.append(process)
    return found


def cpu_s(pid: int) -> float:
    """Processor seconds that a process and its children have used, those that have ended included."""
    return cpu_of(family(pid))


def cpu_of(processes: Iterable[psutil.Process]) -> float:
    """Processor seconds that these have used, and those of their children that have ended."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def resident_bytes(pid: int) -> int:
    """RSS of one process alone."""
    return int(psutil.Process(pid).memory_info().rss)


def forget_peak(pid: int) -> None:
    """Let the kernel's mark of the largest RSS begin anew (proc(5), clear_refs 5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """The largest RSS of one process since its start or `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no VmHWM of process {pid}")


@contextmanager
def sampled(processes: Callable[[], list[psutil.Process]], kinds: Mapping[str, str]) -> Iterator[dict[str, int]]:
    """Peak RSS in bytes of what `processes` finds, by the first of `kinds` whose text is in its command line.

    For systems whose processes come and go: their sizes are looked at every EVERY_S, and those of one kind count one by one.
    """
    found: dict[str, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(EVERY_S):
            for process in processes():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    line = " ".join(process.cmdline())
                    kind = next((kind for kind, text in kinds.items() if text in line), None)
                    if kind:
                        found[kind] = max(found.get(kind, 0), process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
