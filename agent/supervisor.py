"""The daemon's hold on its training child (the idea is dask's nanny): whatever happens to the child, the daemon hears an event.

    run(task) --> start the child if there is none --> Run --> events ... --> Finished | Suspended | Failed
    stop()        the child hands over what it has, or keeps it; if it does not within grace_s, it is killed
    silence       longer than hang_s between two events: killed, Failed("hung")
    idle_s later  Quit: an idle agent holds neither torch nor a model; after release() at once

The child is kept warm between tasks, since importing torch costs 4 s and loading a base more.  No exception of the child, its
pipe or its start leaves this module: the next run starts a fresh one.  torch is never imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
from msgspec import Meta

from agent import child
from agent.child import (
    SIGTERM,
    Command,
    Ending,
    Event,
    Failed,
    Finished,
    Pause,
    Quit,
    Resume,
    Run,
    Shrink,
    Stop,
    Suspended,
    TrainTask,
)
from protocol.errors import IllegalMove

logger = logging.getLogger(__name__)

Seconds = Annotated[float, Meta(gt=0)]

ENVIRONMENT: Final = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts, so that cuda:1 is the device whose memory the daemon watches
}
"""Set in the child unless the daemon's own environment says otherwise.  Downloads are the daemon's business (agent/bases.py)."""


DYING_S: Final = 5.0
"""How long a child that has closed its pipe may take to say by its exit code why."""


class ChildConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the training child is kept.

    Fields: threads for torch's CPU work, 0 leaves it to torch; nice lowers its priority below the host's services; grace_s
    from a stop to the kill; hang_s without any event to the kill (loading a large base must fit); idle_s until it is let go.
    """

    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    nice: Annotated[int, Meta(ge=0, le=19)] = 10
    grace_s: Seconds = 60.0
    hang_s: Seconds = 900.0
    idle_s: Seconds = 300.0


class Supervisor:
    """At most one child and one running task.  Use it from one event loop; `aclose` at the end."""

    def __init__(self, config: ChildConfig, *, log: Path | None = None) -> None:
        """`log` takes the child's stderr; None lets it share ours."""
        self._config = config
        self._log = log
        self._process: Process | None = None
        self._patience: asyncio.Timeout | None = None  # of the running task
        self._stopping, self._suspends = "", False
        self._is_unwanted = False
        self._idle: asyncio.TimerHandle | None = None
        self._farewell: asyncio.Task[None] | None = None

    def renew(self, config: ChildConfig) -> None:
        """Another configuration, from the next child or run on."""
        self._config = config

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def is_running(self) -> bool:
        """Whether a task is under way."""
        return self._patience is not None

    async def run(self, task: TrainTask, on_event: Callable[[Event], None], orders: Sequence[Command] = ()) -> Ending:
        """Have the child do `task`.  Every event goes to `on_event` as it comes, the ending too, which is also returned.

        `orders` are told once the child has the task: what was said for it until then.  Cancelling this kills the child.  Raises IllegalMove when a task is under way.
        """
        if self._patience is not None:
            raise IllegalMove("a task is under way: wait for its end before the next run")
        self._patience = asyncio.timeout(self._config.hang_s)
        self._stopping = ""
        try:
            ending = await self._run(task, on_event, orders)
        except BaseException:
            await self.kill()
            raise
        finally:
            self._patience = None
        idle_s = 0.0 if self._is_unwanted else self._config.idle_s
        self._idle = asyncio.get_running_loop().call_later(idle_s, self._let_go)
        self._is_unwanted = False
        on_event(ending)
        return ending

    async def _run(self, task: TrainTask, on_event: Callable[[Event], None], orders: Sequence[Command]) -> Ending:
        assert self._patience is not None
        try:
            async with self._patience:
                process = await self._alive()
                _say(process, Run(task=task))
                for order in orders:
                    _say(process, order)
                if self._stopping:  # while the child was starting
                    _say(process, Stop(reason=self._stopping, suspend=self._suspends))
                while not isinstance(event := await _hear(process), Ending):
                    on_event(event)
                    if not self._stopping:
                        self._be_patient(self._config.hang_s)
                    # Reading what is buffered never suspends: a fast child would starve the loop.
                    await asyncio.sleep(0)
            if _is_last(event):
                await self.kill()
            return event
        except TimeoutError:
            await self.kill()
            if self._stopping:
                return Failed(
                    reason="killed", detail=f"did not stop within {self._config.grace_s:g} s: {self._stopping}"
                )
            return Failed(reason="hung", detail=f"no sign of life for {self._config.hang_s:g} s")
        except (EOFError, ConnectionError):
            return Failed(reason="died", detail=await self._cause_of_death())
        except msgspec.DecodeError as error:
            await self.kill()
            return Failed(reason="garbled", detail=f"the child's events are not readable: {error}")
        except OSError as error:
            return Failed(reason="no_child", detail=f"the training process cannot be started: {error}")

    def stop(self, reason: str, *, suspend: bool = False) -> None:
        """Ask the running task to end with what it has; without one, nothing.  Repeating changes nothing.

        `suspend` asks to keep it for the next process instead, which ends as Suspended where it can be kept.
        """
        if self._patience is None or self._stopping:
            return
        self._stopping, self._suspends = reason or "stop", suspend
        if self._process is not None:
            _say(self._process, Stop(reason=self._stopping, suspend=suspend))
        self._be_patient(self._config.grace_s)

    def tell(self, order: Pause | Resume | Shrink) -> None:
        """Pass an order on to the running task; without one, nothing."""
        if self._patience is not None and self._process is not None:
            _say(self._process, order)

    def release(self) -> None:
        """Let the child go as soon as it has no task: its memory is needed."""
        self._is_unwanted = self._patience is not None
        if self._idle is not None and not self._is_unwanted:
            self._idle.cancel()
            self._let_go()

    async def kill(self) -> None:
        """End the child now; a running task ends as Failed("died")."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def aclose(self) -> None:
        """Let the child go, at the latest after grace_s by force."""
        self.stop("shutting down")
        if self._idle is not None:
            self._idle.cancel()
        self._let_go()
        if self._farewell is not None:
            await self._farewell

    def _be_patient(self, seconds: float) -> None:
        if self._patience is not None:
            with contextlib.suppress(RuntimeError):  # it has run out already and the kill is under way
                self._patience.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _alive(self) -> Process:
        if self._idle is not None:
            self._idle.cancel()
        if self._farewell is not None:
            await self._farewell
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        return self._process

    async def _start(self) -> Process:
        with contextlib.ExitStack() as files:
            stderr: IO[bytes] | None = None
            if self._log is not None:
                self._log.parent.mkdir(parents=True, exist_ok=True)
                stderr = files.enter_context(self._log.open("ab"))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent.worker", str(os.getpid())),
                stdin=PIPE,
                stdout=PIPE,
                stderr=stderr,
                env=self._environment(),
                # Above twice this much unread output asyncio stops reading, and then never hears that the child has ended.
                limit=child.MAX_FRAME_BYTES,
            )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, self._config.nice)
        logger.info("training child started", extra={"action": "child_started", "pid": process.pid})
        return process

    def _environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self._config.threads)} if self._config.threads else {}
        return {**ENVIRONMENT, **os.environ, **threads}

    async def _cause_of_death(self) -> str:
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DYING_S):
                await self._process.wait()
        await self.kill()  # without its pipe it is of no use even if it lives
        code = self._process.returncode or 0
        if code >= 0:
            return f"exit code {code}; its log has the rest"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"

    def _let_go(self) -> None:
        if self._process is not None and self._process.returncode is None and self._farewell is None:
            self._farewell = asyncio.get_running_loop().create_task(
                self._see_off(self._process), name="supervisor.farewell"
            )

    async def _see_off(self, process: Process) -> None:
        _say(process, Quit())
        try:
            async with asyncio.timeout(self._config.grace_s):
                await process.wait()
        except TimeoutError:
            await self.kill()
        self._farewell = None


def _is_last(ending: Ending) -> bool:
    """Whether the child exits after it: waiting for that keeps the next run from talking to a dying one."""
    match ending:
        case Failed(reason=reason):
            return reason == "crashed"
        case Finished(stopped=stopped):
            return stopped == SIGTERM
        case Suspended():
            return True


def _say(process: Process, command: Command) -> None:
    assert process.stdin is not None
    with contextlib.suppress(ConnectionError, RuntimeError):  # a dead child is noticed where its answer is awaited
        process.stdin.write(child.encode(command))


async def _hear(process: Process) -> Event:
    assert process.stdout is not None
    try:
        (length,) = child.LENGTH.unpack(await process.stdout.readexactly(child.LENGTH.size))
        if length > child.MAX_FRAME_BYTES:
            raise msgspec.DecodeError(f"frame of {length} bytes")
        return child.decode_event(await process.stdout.readexactly(length))
    except asyncio.IncompleteReadError:
        raise EOFError from None
