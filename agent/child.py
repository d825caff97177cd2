"""What the daemon and its training child say to each other: length-prefixed msgpack frames over the child's stdin and stdout.

The child exists so that CUDA out-of-memory, hangs, leaks and a SIGKILL are an event in the daemon and not its death, and so
that an idle agent never holds torch in memory.  Commands go down (Run, Stop, Pause, Resume, Shrink, Quit), events come up.  Each Run is answered by
any number of Phase, Resumed, Stepped, Evaluated, Surveyed and Calibrated and then by exactly one Finished, Suspended or Failed; when the child dies first,
the supervisor says Failed in its place.

This module is the whole vocabulary and imports nothing heavy: both processes use it.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import msgspec

from agent.data import DataConfig
from protocol import messages

MAX_FRAME_BYTES: Final = 64 * 2**20
"""A frame above this means that the stream is garbled: 20,000 matrices with long names take 5 MB."""

SIGTERM: Final = "SIGTERM"
"""`stopped` of a task whose child was told to end by a signal, and that cannot be suspended; the child exits behind it."""

LAST_TRIES_S: Final = 8.0
"""So long after a stop an update that the disk refuses is still tried; the core waits for CHILD_GRACE_S = 10 at least."""

PAUSED_SIGN_S: Final = 5.0
"""A paused child says so again this often: silence is the sign of a child that hangs."""

PhaseName = Literal["loading", "calibrating", "evaluating", "training", "saving", "paused"]


class TrainTask(msgspec.Struct, frozen=True, kw_only=True):
    """One share of a round as the child needs it: the plan, where its inputs lie and where the update goes.

    Fields: base_folder holds the base model (agent/bases.py found it), digest_cache the file that remembers its digest,
    calibrations the folder that remembers what was measured with it ("" is neither);
    model_file is the downloaded global adapter, None at version 0; out_file is written by a train task that made at least
    one step; device is "auto", "cpu", "cuda" or "cuda:N"; memory_limit_bytes of it the child may hold in all, 0 is not known;
    checkpoint is the file that training is kept in and goes on from ("" is none), written every checkpoint_s;
    allowed names the third-party trainers that this agent's own configuration permits.
    """

    plan: messages.Plan
    base_folder: str
    data: DataConfig
    model_file: str | None = None
    max_model_bytes: int = 4 * 2**30
    out_file: str = ""
    digest_cache: str = ""
    calibrations: str = ""
    checkpoint: str = ""
    checkpoint_s: float = 60.0
    device: str = "auto"
    memory_limit_bytes: int = 0
    allowed: tuple[str, ...] = ()


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """One frame: the `t` field of its map names its type."""


class Run(Frame, frozen=True, kw_only=True, tag="run"):
    """Do this task; sent only when the previous one has ended."""

    task: TrainTask


class Stop(Frame, frozen=True, kw_only=True, tag="stop"):
    """End the running task after the present micro-batch and hand over what is there.  Without a task it means nothing.

    `suspend` asks to keep it instead, so that the next process goes on with it; what cannot be kept is handed over.
    """

    reason: str
    suspend: bool = False


class Pause(Frame, frozen=True, kw_only=True, tag="pause"):
    """Hold the running task after the present micro-batch, until Resume or Stop.  Without a task it means nothing."""

    reason: str


class Resume(Frame, frozen=True, kw_only=True, tag="resume"):
    """Go on after a Pause."""


class Shrink(Frame, frozen=True, kw_only=True, tag="shrink"):
    """Halve the micro-batches of the running task, at the same samples per step, and give back memory that is only cached."""


class Quit(Frame, frozen=True, kw_only=True, tag="quit"):
    """Stop and exit."""


class Ready(Frame, frozen=True, kw_only=True, tag="ready"):
    """The child is up and listens; torch is imported with the first task."""

    pid: int


class Phase(Frame, frozen=True, kw_only=True, tag="phase"):
    """The task has come to this part.  "paused" is said again every PAUSED_SIGN_S, and behind it what goes on."""

    name: PhaseName


class Resumed(Frame, frozen=True, kw_only=True, tag="resumed"):
    """Training goes on from a checkpoint, after so many steps."""

    step: int
    n_steps: int


class Stepped(Frame, frozen=True, kw_only=True, tag="stepped"):
    """Progress after one micro-batch (training) or one batch (evaluating).

    Fields: step of n_steps complete; samples and tokens since the phase began (tokens: those that carry loss);
    loss per token: mean of the present step so far, or of the evaluation so far; seconds since the phase began.
    """

    step: int
    n_steps: int
    samples: int
    loss: float | None
    tokens: int
    seconds: float


class Evaluated(Frame, frozen=True, kw_only=True, tag="evaluated"):
    """How the received version does on the held-out part."""

    result: messages.Evaluated


class Surveyed(Frame, frozen=True, kw_only=True, tag="surveyed"):
    """What a survey found."""

    result: messages.Surveyed


class Calibrated(Frame, frozen=True, kw_only=True, tag="calibrated"):
    """What a survey measured."""

    result: messages.Calibrated


class Finished(Frame, frozen=True, kw_only=True, tag="finished"):
    """The task ended with what it has.

    Fields: file is the update ("" if there is none); samples really processed and put into the update; loss is the mean
    training loss per token over its steps; stopped is "" when all that was planned was done, else why not; peak_bytes is
    measured (device memory with CUDA, anonymous memory of the process without), predicted_bytes is the plan's.
    """

    file: str = ""
    samples: int = 0
    steps: int = 0
    tokens: int = 0
    loss: float | None = None
    train_s: float = 0.0
    stopped: str = ""
    peak_bytes: int = 0
    predicted_bytes: int = 0


class Suspended(Frame, frozen=True, kw_only=True, tag="suspended"):
    """The task's checkpoint is on disk, and what it would have handed over; the child exits behind it."""

    so_far: Finished


class Failed(Frame, frozen=True, kw_only=True, tag="failed"):
    """The task ended with nothing.

    Reasons: "bad_config", "bad_update", "bad_message", "unavailable" (protocol/errors.py), "base_mismatch", "out_of_memory",
    "loss is not finite", "disk", "crashed" (a bug; the log has the traceback), and from the supervisor "died", "hung", "killed",
    "garbled", "no_child".
    """

    reason: str
    detail: str = ""


Command = Run | Stop | Pause | Resume | Shrink | Quit
Ending = Finished | Suspended | Failed
Event = Ready | Phase | Resumed | Stepped | Evaluated | Surveyed | Calibrated | Finished | Suspended | Failed

LENGTH: Final = struct.Struct(">I")
_commands: Final[msgspec.msgpack.Decoder[Command]] = msgspec.msgpack.Decoder(Command)
_events: Final[msgspec.msgpack.Decoder[Event]] = msgspec.msgpack.Decoder(Event)


def encode(frame: Command | Event) -> bytes:
    """A frame as it goes through the pipe: 4 bytes of length, big endian, then msgpack."""
    body = msgspec.msgpack.encode(frame)
    return LENGTH.pack(len(body)) + body


def decode_command(body: bytes) -> Command:
    """Parse what the parent said.  Raises msgspec.DecodeError."""
    return _commands.decode(body)


def decode_event(body: bytes) -> Event:
    """Parse what the child said.  Raises msgspec.DecodeError."""
    return _events.decode(body)
