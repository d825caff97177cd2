"""The training child: `python -m agent.worker PARENT_PID`, started and watched by agent/supervisor.py.

    stdin   commands                 read by a thread, so that a Stop arrives in the middle of a step
    stdout  events, nothing else     whatever the libraries print goes to stderr

One task at a time, in the main thread.  A Stop, a SIGTERM or the end of stdin sets a flag that the trainer hears after the
present micro-batch; a second thread is never in torch.  A SIGTERM suspends what can be suspended: systemd sends it to the
daemon and to its child at once.  A Pause holds the task between two micro-batches.

The kernel is told to kill this process with its parent and to choose it first when memory runs out: the services of the host
and the daemon come before training.

An unexpected exception is reported and then ends the process: after a CUDA fault nothing in it can be trusted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, Final

import msgspec

from agent import child, trainers
from agent.child import (
    Ending,
    Event,
    Failed,
    Finished,
    Pause,
    Phase,
    PhaseName,
    Ready,
    Resume,
    Run,
    Shrink,
    Stop,
    Suspended,
    TrainTask,
)
from agent.trainers import Running, Trainer, TrainingFailed
from protocol import methods
from protocol.errors import OutsideFault
from protocol.malloc import give_back, keep_pages

logger = logging.getLogger("agent.worker")

PR_SET_PDEATHSIG: Final = 1
OOM_SCORE: Final = 800
"""Of 1000, on top of the share of memory in use: before everything that did not volunteer too."""
EX_SOFTWARE: Final = 70
REST_S: Final = 5.0
"""After so long without a task memory is given back: to do so takes 20 ms, and a task that comes sooner wants it again."""


class Mailbox:
    """Commands from the parent.

    For the running task: `why` is not empty while it should stop, `paused` while it should hold; `is_shrinking` and
    `is_suspending` once it was asked to, until that is done.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._tasks: SimpleQueue[TrainTask | None] = SimpleQueue()
        self._heard: SimpleQueue[None] = SimpleQueue()  # a signal handler may put, also while its thread gets
        self.is_shrinking = self.is_suspending = False
        self.why = self.paused = ""

    def listen(self) -> None:
        """Read commands until Quit or the end of the pipe.  Runs in its own thread."""
        try:
            while True:
                match child.decode_command(read_frame(self._source)):
                    case Run(task=task):
                        self.why = self.paused = ""  # a Stop that crossed the end of the task before
                        self.is_shrinking = self.is_suspending = False
                        self._tasks.put(task)
                    case Stop(reason=reason, suspend=suspend):
                        self.is_suspending = suspend  # before `why`, see Worker._drive
                        self.why = reason or "stop"
                    case Pause(reason=reason):
                        self.paused = reason or "paused"
                    case Resume():
                        self.paused = ""
                    case Shrink():
                        self.is_shrinking = True
                    case _:
                        break
                self._heard.put(None)
        except msgspec.DecodeError as error:
            logger.error("unreadable command: %s", error, extra={"action": "garbled"})
        except (OSError, EOFError):
            pass  # the parent let go
        self.finish("quit")

    def finish(self, why: str) -> None:
        """Stop the running task and take no other.  Safe in a signal handler."""
        self.is_suspending = self.is_suspending or (why == child.SIGTERM and not self.why)
        self.why = why if why == child.SIGTERM else self.why or why
        self._tasks.put(None)
        self._heard.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for a command, but not for longer; one that came since the last wait counts."""
        with contextlib.suppress(Empty):
            self._heard.get(timeout=seconds)

    def next(self, rest: Callable[[], None]) -> TrainTask | None:
        """Wait for the next task; None is the end.  `rest` is called once none has come for REST_S."""
        try:
            return self._tasks.get(timeout=REST_S)
        except Empty:
            rest()
            return self._tasks.get()


class Worker:
    """Runs tasks and reports.  Keeps one instance per trainer, so that its base model stays loaded."""

    def __init__(self, mailbox: Mailbox, sink: BinaryIO) -> None:
        self._mailbox = mailbox
        self._sink = sink
        self._trainers: dict[str, Trainer] = {}

    def send(self, event: Event) -> None:
        """Tell the parent; a parent that is gone ends this process by its own means."""
        self._sink.write(child.encode(event))
        self._sink.flush()

    def work(self) -> None:
        """Run tasks until told to end."""
        self.send(Ready(pid=os.getpid()))
        while (task := self._mailbox.next(release)) is not None:
            ending = self._ending(task)
            self.send(ending)
            if isinstance(ending, Suspended):
                return
            if isinstance(ending, Failed):  # out of memory, perhaps
                release()

    def _ending(self, task: TrainTask) -> Ending:
        try:
            return self._run(task)
        except TrainingFailed as error:
            logger.warning("task failed", extra={"action": "task_failed"}, exc_info=True)
            return error.failed
        except OutsideFault as error:
            return Failed(reason=re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower(), detail=str(error))
        except Exception as error:
            logger.exception("task crashed", extra={"action": "task_crashed"})
            self.send(Failed(reason="crashed", detail=f"{type(error).__name__}: {error}"[:1000]))
            raise SystemExit(EX_SOFTWARE) from error

    def _run(self, task: TrainTask) -> Ending:
        trainer = self._trainer(task)
        is_survey = task.plan.purpose == "survey"
        finished = self._drive(trainer, trainer.survey(task) if is_survey else trainer.train(task))
        is_told = isinstance(finished, Finished) and finished.stopped == "stop"
        return msgspec.structs.replace(finished, stopped=self._mailbox.why) if is_told else finished

    def _drive(self, trainer: Trainer, running: Running) -> Finished | Suspended:
        """Run a trainer's generator to its end: its events go up, and between them it hears what the parent asks."""
        phase: PhaseName = "loading"
        try:
            event = next(running)
            while True:
                self.send(event)
                if isinstance(event, Phase):
                    phase = event.name
                if self._mailbox.is_shrinking:
                    self._mailbox.is_shrinking = False
                    if shrink := getattr(trainer, "shrink", None):  # third-party trainers need not have it
                        shrink()
                    release()
                if self._mailbox.paused and not self._mailbox.why:
                    self._hold()
                    self.send(Phase(name=phase))
                is_stopping = bool(
                    self._mailbox.why
                )  # before what says how: the other way round a suspension could be missed
                if self._mailbox.is_suspending:
                    self._mailbox.is_suspending = False
                    suspend = getattr(trainer, "suspend", None)  # likewise
                    so_far = suspend() if suspend is not None else None
                    if so_far is not None:
                        return Suspended(so_far=so_far)
                event = running.send(is_stopping)
        except StopIteration as end:
            finished: Finished = end.value
            return finished
        finally:
            running.close()

    def _hold(self) -> None:
        release()
        while self._mailbox.paused and not self._mailbox.why:
            self.send(Phase(name="paused"))
            self._mailbox.wait(child.PAUSED_SIGN_S)

    def _trainer(self, task: TrainTask) -> Trainer:
        name = methods.load(task.plan.method, task.allowed).trainer
        if name not in self._trainers:
            self._trainers[name] = trainers.load(name, task.allowed)()
        return self._trainers[name]


def release() -> None:
    """Give back what the task no longer needs, such as the tensors in a failed task's traceback: the host may want it."""
    gc.collect()
    if torch := sys.modules.get("torch"):
        torch.cuda.empty_cache()
    give_back()


def read_frame(source: BinaryIO) -> bytes:
    """One frame's body.  Raises EOFError at the end of the stream or for a length that is none of ours."""
    (length,) = child.LENGTH.unpack(_exactly(source, child.LENGTH.size))
    if length > child.MAX_FRAME_BYTES:
        raise EOFError
    return _exactly(source, length)


def _exactly(source: BinaryIO, n_bytes: int) -> bytes:
    data = source.read(n_bytes)
    if len(data) < n_bytes:
        raise EOFError
    return data


def take_over_stdio() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for frames: afterwards stdin is empty and stdout is stderr, also for C libraries."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, sink


def depend_on(parent_pid: int) -> None:
    """Die with the parent, at once and without a chance to hang, and before others when memory runs out."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        raise SystemExit(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def main() -> None:
    """Listen, work, exit."""
    source, sink = take_over_stdio()
    keep_pages(is_one_arena=False)
    depend_on(int(sys.argv[1]))
    warnings.simplefilter("ignore")  # the libraries' advice to their callers is not the operator's business
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    mailbox = Mailbox(source)
    signal.signal(signal.SIGTERM, lambda *_: mailbox.finish(child.SIGTERM))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the whole group; the parent decides what it means here
    threading.Thread(target=mailbox.listen, name="mailbox", daemon=True).start()
    Worker(mailbox, sink).work()


if __name__ == "__main__":
    main()
