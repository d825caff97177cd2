"""What the two sides say to each other: frozen Structs in one tagged union, each with hard bounds on every field.

A message that exists is legal: bounds, patterns and types are checked while it is decoded (protocol/codec.py), so nothing
behind the codec asks again whether a length is negative or a name holds a slash.  Evolution follows msgspec's rules: a new
field has a default, no field changes its type, unknown fields are ignored on the wire.

Facts go up (Presence, Report, Progress, Execution, Offer), wishes come down (Plan, Cancel, Rebirth); Grant, Placed, Done and
Refuse travel in both directions because the receiver of a blob drives its transfer, whichever side that is.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

VERSION: Final = 1
"""Major version of the envelope.  Another major version is refused; a minor change adds fields with defaults."""

Id = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z", max_length=64)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Xfer = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Session = Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
Text = Annotated[str, Meta(max_length=2000)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seconds = Annotated[float, Meta(ge=0, le=10**9)]
Instant = Annotated[float, Meta(ge=0, le=10**11)]
"""Seconds since the epoch."""
Url = Annotated[str, Meta(min_length=1, max_length=4096)]
"""Whoever follows it asks protocol/http_store.py first."""
Ratio = Annotated[float, Meta(ge=0, le=1)]
Rank = Annotated[int, Meta(ge=1, le=1024)]
Chunk = Annotated[int, Meta(ge=1024, le=4 * 2**20)]
Bits = Literal["none", "int8", "nf4"]
Wire = Literal["fp32", "fp16", "bf16"]
UpdateDtype = Literal["fp32", "fp16", "bf16", "int8", "nf4"]
MAX_MATRICES: Final = 20_000


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="t"):
    """A whole message: the `t` field of its map names its type."""


# ------------------------------------------------------------------------------------------------ blobs and transfers


class Level(Value, frozen=True, kw_only=True):
    """A prefix of a blob that is useful by itself: the first `rank` components of every matrix."""

    rank: Annotated[int, Meta(ge=0, le=1024)]
    size: Count
    sha256: Sha256


class Blob(Value, frozen=True, kw_only=True):
    """Bytes by content: whoever has the digest has the identity, so any restart resumes and nothing is sent twice."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=1, le=2**40)]
    chunk: Chunk = 256 * 1024
    levels: Annotated[list[Level], Meta(max_length=1025)] = []

    @property
    def xfer(self) -> str:
        """Name of the transfer on the bus: the first 32 hex digits of the digest."""
        return self.sha256[:32]

    @property
    def n_chunks(self) -> int:
        """How many chunk frames the whole takes."""
        return -(-self.size // self.chunk)


class Energy(Value, frozen=True, kw_only=True):
    """What a share took of the device that trained: measured there, or declared as its owner's figure times the time."""

    joules: Annotated[float, Meta(ge=0, le=10**12)]
    source: Literal["measured", "declared"]


class Offer(Message, frozen=True, kw_only=True, tag="offer"):
    """An agent has an update for a round; the coordinator pulls it (Grant), has it already (Done) or declines (Refuse)."""

    job: Id
    round: Count
    attempt: Count
    kind: Name
    blob: Blob
    samples: Count
    loss: float | None = None
    train_s: Seconds = 0.0
    steps: Count = 0
    peak_bytes: Count = 0
    bytes_down: Count = 0
    stopped: Text = ""
    energy: Energy | None = None
    by_store: bool = False
    """Whoever offers it can put it where a URL says."""


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """Credit: send these chunks now, as (first, count) runs.  Never more than the receiver has room for."""

    xfer: Xfer
    ranges: Annotated[list[tuple[Count, Annotated[int, Meta(ge=1, le=4096)]]], Meta(min_length=1, max_length=256)]
    until: Count = 0
    """Above 0: they may come as a broadcast, to which the receiver listens up to this chunk."""
    by_store: bool = False
    """Not over the bus: each run as one object of a store, and Placed says that it is there."""
    urls: Annotated[list[Url], Meta(max_length=64)] = []
    """Where to put them, one for each run; none where the sender has a store of its own."""


class Placed(Message, frozen=True, kw_only=True, tag="placed"):
    """These chunks, asked for with `by_store`, lie in the store, each run as one object.

    `urls` is where to get them, one for each run; none where the receiver has a store of its own.  With a `reason` they do not
    lie there and will not: they are to be asked for over the bus.
    """

    xfer: Xfer
    ranges: Annotated[list[tuple[Count, Annotated[int, Meta(ge=1, le=4096)]]], Meta(min_length=1, max_length=64)]
    urls: Annotated[list[Url], Meta(max_length=64)] = []
    reason: Text = ""


class Done(Message, frozen=True, kw_only=True, tag="done"):
    """The receiver holds the whole, verified and durable: the sender may forget it."""

    xfer: Xfer


class Refuse(Message, frozen=True, kw_only=True, tag="refuse"):
    """The receiver does not want this blob.  `retry_after_s` > 0 asks to offer again then; 0 is final."""

    xfer: Xfer
    reason: Text
    retry_after_s: Seconds = 0.0


# ----------------------------------------------------------------------------------------------------- agent's facts


class Presence(Message, frozen=True, kw_only=True, tag="presence"):
    """Birth (online) and death (the will, or a polite goodbye).  A death of another session than the known one is ignored."""

    session: Session
    online: bool
    reason: Text = ""
    software: Annotated[str, Meta(max_length=64)] = ""
    methods: Annotated[list[Name], Meta(max_length=64)] = []


class Gpu(Value, frozen=True, kw_only=True):
    """One NVIDIA device as NVML sees it at this moment."""

    index: Count
    name: Annotated[str, Meta(max_length=200)]
    total_bytes: Count
    free_bytes: Count
    utilization_ratio: Ratio = 0.0
    n_other_processes: Count = 0
    power_w: Annotated[float, Meta(ge=0, le=10**6)] = 0.0
    temperature_c: Annotated[float, Meta(ge=-300, le=10**4)] = 0.0
    compute: Annotated[str, Meta(max_length=16)] = ""
    mig: bool = False
    ecc_errors: Count = 0


class Allowance(Value, frozen=True, kw_only=True):
    """What the server's owner lets fedpipe take at this moment: the configured limits, applied to what is free.

    Fields: device that trains ("cpu", or the name of the GPU); memory_bytes of that device that the training child may hold
    in all, what it holds now included; the largest rank and micro-batch; paused says why nothing may be trained now.
    """

    device: Annotated[str, Meta(max_length=200)] = "cpu"
    memory_bytes: Count = 0
    max_rank: Rank = 1024
    max_batch: Annotated[int, Meta(ge=1, le=4096)] = 4096
    paused: Text = ""


class Report(Message, frozen=True, kw_only=True, tag="report"):
    """What this server could give to training right now (retained; sent on change and slowly)."""

    gpus: Annotated[list[Gpu], Meta(max_length=64)] = []
    driver: Annotated[str, Meta(max_length=64)] = ""
    n_cpus: Count = 0
    cpu_load_ratio: Annotated[float, Meta(ge=0, le=10**15)] = 0.0
    ram_total_bytes: Count = 0
    ram_available_bytes: Count = 0
    disk_free_bytes: Count = 0
    up_bytes_per_s: Annotated[float, Meta(ge=0, le=10**15)] = 0.0
    down_bytes_per_s: Annotated[float, Meta(ge=0, le=10**15)] = 0.0
    bits: Annotated[list[Bits], Meta(max_length=3)] = []
    update_dtypes: Annotated[list[UpdateDtype], Meta(max_length=5)] = []
    """What updates can be sent in beside fp32, fp16 and bf16."""
    allowance: Allowance | None = None
    notes: Annotated[list[Text], Meta(max_length=16)] = []


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Heartbeat; with a round under way also how far it is.  Not journalled, may be lost."""

    job: Annotated[str, Meta(max_length=64)] = ""
    round: Count = 0
    attempt: Count = 0
    phase: Annotated[str, Meta(max_length=32)] = "idle"
    step: Count = 0
    n_steps: Count = 0
    samples: Count = 0
    loss: float | None = None
    lag_s: Seconds = 0.0


class ExecState(StrEnum):
    """Life of one agent's share of one round, after AWS IoT Jobs."""

    OFFERED = "OFFERED"
    ACCEPTED = "ACCEPTED"
    REJECTED = "REJECTED"
    PREPARING = "PREPARING"
    TRAINING = "TRAINING"
    UPLOADING = "UPLOADING"
    DONE = "DONE"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    CANCELLED = "CANCELLED"
    SUPERSEDED = "SUPERSEDED"


TERMINAL: Final = frozenset(
    {
        ExecState.REJECTED,
        ExecState.DONE,
        ExecState.FAILED,
        ExecState.TIMED_OUT,
        ExecState.CANCELLED,
        ExecState.SUPERSEDED,
    }
)


class Matrix(Value, frozen=True, kw_only=True):
    """A linear weight of the base that an adapter may sit on."""

    name: Name
    d_out: Annotated[int, Meta(ge=1, le=2**24)]
    d_in: Annotated[int, Meta(ge=1, le=2**24)]


class Dimensions(Value, frozen=True, kw_only=True):
    """A decoder's sizes, as the memory formula wants them (protocol/memory.py).

    Fields: width of the residual stream, of the MLP and of keys and values; n_other parameters outside the blocks' matrices.
    """

    hidden: Count
    mlp: Count
    key_value: Count
    vocabulary: Count
    n_layers: Count
    n_other: Count


class Surveyed(Value, frozen=True, kw_only=True):
    """Answer to a survey: what the agent found when it opened its base model and its data."""

    base_sha256: Sha256
    matrices: Annotated[list[Matrix], Meta(min_length=1, max_length=MAX_MATRICES)]
    n_train: Count
    n_eval: Count
    dimensions: Dimensions | None = None


class Shape(Value, frozen=True, kw_only=True):
    """What a micro-batch of `batch` samples of the agent's own text weighs: tokens with padding, on average and at most."""

    batch: Annotated[int, Meta(ge=1, le=4096)]
    mean_tokens: Annotated[float, Meta(ge=0, le=10**10)]
    max_tokens: Count


class Point(Value, frozen=True, kw_only=True):
    """One configuration that was really run for a few steps on the real base model.

    Trainable adapters of `rank` sat on every matrix of the blocks from number `skip` on, a frozen one of `frozen_rank` on
    every matrix; `n_tokens` is the padded size of the micro-batches on average, max_tokens of the largest (0: all alike).
    step_s is one optimizer step of one micro-batch; peak_bytes as in Finished (agent/child.py).
    """

    bits: Bits
    batch: Annotated[int, Meta(ge=1, le=4096)]
    n_tokens: Annotated[float, Meta(ge=1, le=10**10)]
    rank: Annotated[int, Meta(ge=0, le=1024)]
    skip: Count = 0
    frozen_rank: Annotated[int, Meta(ge=0, le=1024)] = 0
    checkpointing: bool = False
    step_s: Annotated[float, Meta(gt=0, le=10**6)]
    peak_bytes: Count
    max_tokens: Count = 0


class Calibrated(Value, frozen=True, kw_only=True):
    """What the agent measured about the base model on its own device and text, so that the planner need not guess.

    Fields: device and compute type that were used; scores of the rank-1 triplets of every matrix, float32 little endian,
    (n_matrices, probe_rank) in the order of Surveyed.matrices, each row descending; noise_scale of the gradient in samples
    (McCandlish et al., 2018); shapes of micro-batches; points that were run, each by its quickest steps; held-out loss of the
    base by width; how much longer a usual step took, because of what else the machine was doing; seconds that all this took
    (0 if it was remembered from before); notes say what was left out and why.
    """

    device: Annotated[str, Meta(max_length=200)]
    compute: Literal["fp32", "bf16"] = "fp32"
    probe_rank: Rank
    scores: Annotated[bytes, Meta(max_length=4 * 2**20)]
    noise_scale: Annotated[float, Meta(ge=0, le=10**9)] = 0.0
    shapes: Annotated[list[Shape], Meta(max_length=32)] = []
    points: Annotated[list[Point], Meta(max_length=128)] = []
    losses: dict[Bits, Annotated[float, Meta(ge=0, le=10**9)]] = {}
    load_ratio: Annotated[float, Meta(ge=1, le=1000)] = 1.0
    seconds: Seconds = 0.0
    notes: Annotated[list[Text], Meta(max_length=16)] = []


class Evaluated(Value, frozen=True, kw_only=True):
    """How a model version does on the agent's own held-out text."""

    version: Count
    n_samples: Count
    n_tokens: Count
    loss: float
    metrics: Annotated[dict[str, float], Meta(max_length=32)] = {}


class Execution(Message, frozen=True, kw_only=True, tag="exec"):
    """A transition of the agent's share of a round.  `serial` grows with each; an older one is ignored."""

    job: Id
    round: Count
    attempt: Count
    serial: Count
    state: ExecState
    reason: Text = ""
    surveyed: Surveyed | None = None
    calibrated: Calibrated | None = None
    evaluated: Evaluated | None = None
    energy: Energy | None = None


# ------------------------------------------------------------------------------------------------ coordinator's wishes


class Base(Value, frozen=True, kw_only=True):
    """The frozen base model: where agents look for it and what it must be.  An empty digest means not yet known."""

    source: Annotated[str, Meta(min_length=1, max_length=500)]
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class Training(Value, frozen=True, kw_only=True):
    """One round of local QLoRA training.  Steps are optimizer steps; a batch is what one micro-step holds."""

    n_steps: Annotated[int, Meta(ge=1, le=10**7)]
    batch: Annotated[int, Meta(ge=1, le=4096)] = 8
    accumulation: Annotated[int, Meta(ge=1, le=4096)] = 1
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-4
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_gradient_norm: Annotated[float, Meta(ge=0)] = 1.0
    warmup_steps: Count = 0
    max_tokens: Annotated[int, Meta(ge=8, le=2**20)] = 512
    packing: bool = False
    checkpointing: bool = False
    seed: Count = 0


class Evaluation(Value, frozen=True, kw_only=True):
    """Which held-out numbers to bring back.  `loss` is always there; the others cost generation time."""

    max_samples: Annotated[int, Meta(ge=1, le=10**7)] = 256
    metrics: Annotated[list[Name], Meta(max_length=16)] = []
    max_new_tokens: Annotated[int, Meta(ge=1, le=4096)] = 48
    max_tokens: Annotated[int, Meta(ge=8, le=2**20)] = 512
    """Where examples are cut; the same in every round, or versions would be measured on different text."""


class Calibration(Value, frozen=True, kw_only=True):
    """What a survey shall also measure; an agent ends it by itself after `max_s` with what it has by then.

    Fields: how matrices are scored, with which probe rank, on how many mini-batches, after how many warm-up steps (only the
    triplet scorer needs them); widths of the base and batches that are open to the planner; how samples become tokens.
    """

    scorer: Literal["gradient", "triplet"] = "gradient"
    probe_rank: Annotated[int, Meta(ge=1, le=64)] = 8
    n_batches: Annotated[int, Meta(ge=1, le=10_000)] = 8
    warmup_steps: Annotated[int, Meta(ge=0, le=10_000)] = 24
    bits: Annotated[list[Bits], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["none", "int8", "nf4"]
    )
    batches: Annotated[list[Annotated[int, Meta(ge=1, le=4096)]], Meta(min_length=1, max_length=16)] = msgspec.field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32]
    )
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 2e-4
    max_tokens: Annotated[int, Meta(ge=8, le=2**20)] = 512
    packing: bool = False
    seed: Count = 0
    max_s: Annotated[float, Meta(gt=0, le=10**6)] = 120.0


class Plan(Message, frozen=True, kw_only=True, tag="plan"):
    """One agent's share of one round, complete: an agent needs nothing else to do it.

    Times are seconds after `issued_at` on the coordinator's clock: stop training at `stop_after_s` and upload what is
    there; after `ttl_s` the round is closed.  `held_out_ratio` and `data_seed` fix the same local split in each round.
    """

    job: Id
    round: Count
    attempt: Count
    purpose: Literal["survey", "train", "evaluate"]
    method: Name
    base: Base
    data: Id = "default"
    held_out_ratio: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    data_seed: Count = 0
    bits: Bits = "nf4"
    version: Count = 0
    model: Blob | None = None
    broadcast: bool = False
    """The model can be listened to on its `c/blob` topic."""
    by_store: bool = False
    """The model can be had from an object store."""
    ranks: Annotated[dict[Name, Rank], Meta(max_length=MAX_MATRICES)] = {}
    alpha: Annotated[float, Meta(gt=0, le=1024)] = 2.0
    train: Training | None = None
    predicted_bytes: Count = 0
    """Peak memory that the planner expects of this share; 0 when it did not plan it."""
    evaluate: Evaluation | None = None
    calibration: Calibration | None = None
    update_dtype: UpdateDtype = "bf16"
    kept_energy_ratio: Ratio = 1.0
    """Share of the squared norm of each matrix's change that the update must hold; components beyond it stay here."""
    max_update_bytes: Count = 0
    issued_at: Instant
    stop_after_s: Seconds
    ttl_s: Seconds


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop this share of a round now; nothing of it is wanted any more.

    With `keep` the round will be attempted again: an agent keeps its training as a checkpoint and hands in what cannot be kept.
    """

    job: Id
    round: Count
    attempt: Count
    reason: Text = ""
    keep: bool = False


class Rebirth(Message, frozen=True, kw_only=True, tag="rebirth"):
    """The coordinator lost track of this agent: say birth and report again."""


class CoordinatorState(Message, frozen=True, kw_only=True, tag="coordinator"):
    """The coordinator's birth and will.  A new session tells agents to offer again what is not yet acknowledged."""

    session: Session
    online: bool
    software: Annotated[str, Meta(max_length=64)] = ""


class JobCard(Message, frozen=True, kw_only=True, tag="job"):
    """What an agent needs in order to take part, for people and tools that look at the broker."""

    job: Id
    method: Name
    base: Base
    data: Id
    phase: Annotated[str, Meta(max_length=32)]
    round: Count
    n_rounds: Count
    reason: Text = ""


Body = (
    Presence
    | Report
    | Progress
    | Execution
    | Offer
    | Grant
    | Placed
    | Done
    | Refuse
    | Plan
    | Cancel
    | Rebirth
    | CoordinatorState
    | JobCard
)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """Around every message: version, sender's clock, session nonce and sequence number.

    Fields: v major version; ts seconds since the epoch on the sender's clock; ses the sender's session; seq counts the
    sender's messages in this session, so a gap shows a loss and a repeat shows a duplicate; crc the crc32c of all bytes
    before it, little-endian and last of all, or nothing from a sender that has none.
    """

    v: int
    ts: Instant
    ses: Session
    seq: Count
    b: Body
    crc: Annotated[bytes, Meta(max_length=4)] = b""
