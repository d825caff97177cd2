"""A whole fleet on one machine: broker, coordinator and agents as processes of their own, kept alive as systemd would.

Every process has its folder with its configuration, state and log.  Whatever dies, by a crash or by `kill -9`, is noted and
started again after a moment; only a refused configuration (exit code 78) ends the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import tomli_w

from protocol.daemon import EX_CONFIG, EX_NOPERM
from protocol.errors import BadConfig, Unavailable

PR_SET_PDEATHSIG: Final = 1
RESTART_S: Final = 2.0
STOP_S: Final = 20.0


class Member:
    """One process of the fleet: its name, its command line, its log."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name, self.command, self.log = name, list(command), log
        self.environment = dict(environment)
        self.process: asyncio.subprocess.Process | None = None
        self.n_starts = 0

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process; its output goes to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | self.environment,
            )
        self.n_starts += 1
        return self.process

    def last_words(self) -> str:
        """The end of the log, for an error's text."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return lines[-1][-400:] if lines else "(its log is empty)"


class Cluster:
    """The processes of a fleet in `folder`.  `notes` tells what happened to them, as (seconds since the start, text)."""

    def __init__(self, folder: Path, restart_s: float = RESTART_S) -> None:
        self.folder = folder
        self.restart_s = restart_s
        self.members: dict[str, Member] = {}
        self.notes: list[tuple[float, str]] = []
        self.fault: BadConfig | None = None
        self._began = time.monotonic()
        self._stopping = False
        self._keepers: dict[str, asyncio.Task[None]] = {}

    def note(self, text: str) -> None:
        """Remember that something happened now."""
        self.notes.append((time.monotonic() - self._began, text))

    async def add(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Member:
        """Start a process and keep it alive."""
        member = Member(name, command, self.folder / name / f"{name}.log", environment or {})
        self.members[name] = member
        await self.up(name)
        return member

    async def up(self, name: str) -> None:
        """Start a member that is down, and keep it alive from now on."""
        member = self.members[name]
        await member.start()
        self._keepers[name] = asyncio.create_task(self._keep(member), name=f"keep.{name}")

    async def down(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a member by a signal; it stays away until `up`.  One that is just being started again dies as well."""
        member = self.members[name]
        self._keepers[name].cancel()
        await asyncio.wait([self._keepers[name]])
        if member.process and member.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                member.process.send_signal(how)
            await member.process.wait()

    async def add_daemon(self, package: str, name: str, config: Mapping[str, object]) -> Member:
        """Write a daemon's configuration and start it: `python -m {package} run --config ...`."""
        path = self.folder / name / f"{package}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", package, "run", "--config", str(path)]
        return await self.add(name, command, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})

    async def _keep(self, member: Member) -> None:
        while True:
            assert member.process is not None
            code = await member.process.wait()
            if self._stopping:
                return
            if code == EX_CONFIG:
                self.fault = BadConfig(f"{member.name} refused its configuration: {member.last_words()}")
                return
            if code == EX_NOPERM:
                self.note(f"{member.name} ended: its broker refuses it for good")
                return
            self.note(f"{member.name} died ({_cause(code)}); started again")
            await asyncio.sleep(self.restart_s)
            await member.start()

    async def stop(self) -> None:
        """Ask every process to end, agents first and the broker last; then insist."""
        self._stopping = True
        for member in reversed(self.members.values()):
            if member.process and member.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.send_signal(signal.SIGTERM)
        waits = [m.process.wait() for m in self.members.values() if m.process]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*waits), STOP_S)
        for member in self.members.values():
            if member.process and member.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    member.process.kill()
                await member.process.wait()
        for keeper in self._keepers.values():
            keeper.cancel()


def _die_with_parent() -> None:
    """Leave nothing running when this program is killed without a chance to stop its fleet (prctl(2), Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


async def port_open(host: str, port: int, within_s: float, what: str) -> None:
    """Wait until something listens.  Raises Unavailable."""
    end = time.monotonic() + within_s
    while True:
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError:
            if time.monotonic() > end:
                raise Unavailable(
                    f"{what} does not listen on {host}:{port} after {within_s:g} s: see its log"
                ) from None
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return
