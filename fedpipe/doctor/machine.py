"""The machine under the daemon: its folder, disk and memory, files that must be private, the systemd unit."""

from __future__ import annotations

import itertools
import math
import os
import pwd
import resource
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

from fedpipe.doctor.findings import Finding, failed, ok, skipped, warning

USER: Final = "fedpipe"
MIB: Final = 2**20
GIB: Final = 2**30
PROBE_BYTES: Final = 64 * 1024
FEW_FILES: Final = 1024
LITTLE_MEMORY_BYTES: Final = GIB
"""An idle agent takes 60 MB; what torch imports alone takes half of this."""
MANY_RESTARTS: Final = 3


def user() -> Iterator[Finding]:
    """Finding user: whether this command sees what the daemon would see."""
    name = _user_name(os.geteuid())
    if name != USER and _is_known(USER):
        found = f"run as {name}, the daemon runs as {USER}: what that user may read and write can differ"
        yield warning("user", found, f"run it as the daemon: sudo -u {USER} fedpipe doctor")
    else:
        yield ok("user", name)


def _is_known(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --------------------------------------------------------------------------------------------------------------- disk


def state_dir(folder: Path, min_free_bytes: int) -> Iterator[Finding]:
    """Findings state-dir (a file is written, made durable and deleted again) and disk."""
    if not folder.exists():
        parent = next(place for place in folder.parents if place.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            advice = f"make it for the daemon's user: install -d -m 0700 -o {USER} -g {USER} {folder}"
            yield failed("state-dir", f"{folder} is not there and cannot be made", advice)
            return
        yield ok("state-dir", f"{folder} is not there yet; the daemon makes it")
        folder = parent
    else:
        try:
            _write(folder)
        except OSError as error:
            advice = "make room, or see that it is mounted for writing and belongs to the daemon's user"
            yield failed("state-dir", f"{folder} cannot be written ({error.strerror or error})", advice)
        else:
            yield ok("state-dir", f"{folder} can be written")
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free at {folder}"
    if usage.free < min_free_bytes:
        yield failed(
            "disk", f"{text}, {min_free_bytes / GIB:.1f} GiB must be", "make room, or move state_dir to a larger disk"
        )
    elif usage.free < usage.total / 20:
        yield warning("disk", text, "make room before it is full")
    else:
        yield ok("disk", text)


def _write(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------- memory


def memory() -> Iterator[Finding]:
    """Findings memory (the machine's and the control group's) and open-files."""
    from agent.profiler import cgroup_cap

    cap, ram = cgroup_cap(), psutil.virtual_memory()
    free = min(ram.available, cap.free_bytes)
    limit = f", {cap.memory_bytes / GIB:.1f} GiB allowed by a control group" if math.isfinite(cap.memory_bytes) else ""
    text = f"{free / GIB:.1f} GiB are available of {ram.total / GIB:.1f} GiB{limit}"
    if free < LITTLE_MEMORY_BYTES:
        advice = "end what else runs here, or raise the control group's MemoryMax"
        yield warning("memory", text, advice)
    else:
        yield ok("memory", text)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FEW_FILES:
        yield warning("open-files", f"{soft} files may be open at once", "raise LimitNOFILE of the unit, or ulimit -n")
    else:
        yield ok("open-files", "unlimited" if soft < 0 else f"{soft} may be open at once")


# ------------------------------------------------------------------------------------------------------ private files


def private(files: Iterable[str]) -> Iterator[Finding]:
    """Finding private-files: keys, passwords and tokens that others than their owner and group may read, or nobody here."""
    wanted = sorted({file for file in files if file})
    for file in wanted:
        try:
            mode = Path(file).stat().st_mode
        except OSError as error:
            yield failed("private-files", f"{file}: {error.strerror}", "correct its place in the configuration")
            return
        if mode & (stat.S_IRWXO | stat.S_IWGRP):
            found = f"{file} is open to others (mode {stat.S_IMODE(mode):04o})"
            yield failed("private-files", found, f"chmod 0600 {file}, and make a new secret if others use this machine")
            return
        if not os.access(file, os.R_OK):
            yield failed("private-files", f"{file} cannot be read by this user", f"chown {USER}: {file}")
            return
    if wanted:
        yield ok("private-files", f"{len(wanted)} closed to others: {', '.join(wanted)}")
    else:
        yield skipped("private-files", "none are configured")


# ------------------------------------------------------------------------------------------------------------ systemd


def service(unit: str) -> Iterator[Finding]:
    """Finding service: the daemon's unit."""
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        yield skipped("service", "systemd does not run this machine")
        return
    yield judged(unit, unit_state(unit))


def unit_state(unit: str) -> dict[str, str]:
    """What systemd says of a unit, by property; empty when it says nothing."""
    names = "LoadState,ActiveState,SubState,Result,NRestarts,StatusText,WatchdogUSec,UnitFileState,ExecMainStatus"
    try:
        done = subprocess.run(
            ["systemctl", "show", unit, "-p", names], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def judged(unit: str, state: dict[str, str]) -> Finding:
    """What those properties mean."""
    log = f"journalctl -u {unit} -n 50"
    if state.get("LoadState") != "loaded":
        return warning(
            "service", f"there is no unit {unit}", "install the package, or see that something else restarts it"
        )
    active, text = state.get("ActiveState", ""), state.get("StatusText", "")
    if active == "failed":
        why = f"{state.get('Result')}, exit status {state.get('ExecMainStatus')}"
        return failed(
            "service",
            f"{unit} has failed ({why})",
            f"{log}; then systemctl reset-failed {unit} && systemctl start {unit}",
        )
    if active != "active":
        return warning("service", f"{unit} is {active or 'unknown'}", f"systemctl enable --now {unit}")
    n_restarts = int(state.get("NRestarts", "0") or 0)
    if n_restarts > MANY_RESTARTS:
        return warning("service", f"{unit} runs, after {n_restarts} restarts", log)
    if state.get("WatchdogUSec") in {"0", "infinity"}:
        return warning("service", f"{unit} runs without a watchdog", "set WatchdogSec=60 in the unit")
    if state.get("UnitFileState") != "enabled":
        return warning("service", f"{unit} runs, but does not start with the machine", f"systemctl enable {unit}")
    return ok("service", f"{unit} runs: {text or state.get('SubState', '')}")


def runs(program: str, module: str, is_same: Callable[[Path], bool]) -> bool:
    """Whether a daemon works from a configuration that `is_same`, as far as this user sees the machine's processes."""
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            called = any(Path(word).name == program for word in line[:3]) or module in line[:3]
            if called and "run" in line and is_same(Path(process.cwd()) / _config_of(line, module)):
                return True
        except (psutil.Error, OSError):  # gone meanwhile, or another user's
            continue
    return False


def _config_of(line: list[str], module: str) -> str:
    given = [after for word, after in itertools.pairwise(line) if word == "--config"]
    given += [word.partition("=")[2] for word in line if word.startswith("--config=")]
    return given[-1] if given else f"/etc/fedpipe/{module}.toml"
