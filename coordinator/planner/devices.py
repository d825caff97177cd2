"""A plan for devices that are only described: `fedpipe-coordinator plan --devices FILE`, without a broker and without an agent.

The file says what the model is shaped like and what each kind of server has (docs/examples/devices.toml).  From that this
module makes the measurements that an agent would report, from arithmetic alone: FLOPs divided by the sustained rate, and
protocol/memory.py for bytes.  Importance is taken to be the same for every matrix, falling by a third with each rank.  So the
answer says what would fit and about how long it would take, before anything is bought or installed; once agents measure,
their figures take the place of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta

from coordinator.core.spec import Head, JobSpec
from coordinator.core.state import JobState, Member, RoundPlan
from coordinator.planner import automatic
from coordinator.planner.servers import Ask
from protocol import memory
from protocol.daemon import load_toml
from protocol.errors import BadConfig
from protocol.messages import Allowance, Base, Bits, Calibrated, Dimensions, Id, Matrix, Point, Report, Shape, Surveyed

PROCESS_BYTES: Final = 400 * 2**20
"""Interpreter, libraries and CUDA context."""
SLOWER: Final[dict[Bits, float]] = {"none": 1.0, "nf4": 1.15, "int8": 1.4}
"""Time of a step beside an unquantized base: assumed, for want of a measurement."""
DECAY: Final = 0.67
NOISE_SCALE: Final = 32.0
"""Samples; of the magnitude that fine-tuning shows."""
PROBE: Final = 8
SIZES: Final = (1, 2, 4, 8, 16, 32)

Positive = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=1, le=2**31)]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; a key that is not a field is an error that names it."""


class ModelShape(Table, frozen=True, kw_only=True):
    """A Llama-like decoder, with the names that its config.json uses."""

    hidden_size: Count
    num_hidden_layers: Count
    intermediate_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    vocab_size: Count


class Device(Table, frozen=True, kw_only=True):
    """One kind of server.

    Fields: how many of them; memory that training may hold; sustained teraflops of training (a third of the data sheet's is
    usual); the link; the examples it trains on and their mean length; widths of the base that it supports; its compute type.
    """

    name: Id
    count: Annotated[int, Meta(ge=1, le=100_000)] = 1
    memory_gib: Positive
    tflops: Positive
    up_mbit_per_s: Positive = 20.0
    down_mbit_per_s: Positive = 100.0
    examples: Count = 10_000
    mean_tokens: Positive = 256.0
    bits: Annotated[list[Bits], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["none", "int8", "nf4"]
    )
    compute: memory.Compute = "bf16"


class Devices(Table, frozen=True, kw_only=True):
    """The whole file."""

    model: ModelShape
    device: Annotated[list[Device], Meta(min_length=1, max_length=1000)]


def plan_devices(path: Path, spec: JobSpec | None = None) -> JobState:
    """A job that has been planned for these devices, as far as that can be said without measuring.

    `spec` is a job file to plan for; None is one that leaves everything open.  Raises BadConfig for a file that cannot be
    used and for a job of which no device can take part, with the reasons.
    """
    spec = spec or JobSpec(job=Head(name="devices"), model=Base(source=path.name))
    ask = described(load_toml(path, Devices), spec)
    found = automatic.plan(ask, list(ask.members))
    if not found.choices:
        raise BadConfig("; ".join(f"{agent}: {why}" for agent, why in sorted(found.left_out.items())[:5]))
    plan = RoundPlan(
        round=1,
        reason="devices as described, nothing measured",
        train_s=found.train_s,
        choices=found.choices,
        left_out=found.left_out,
        notes=found.notes,
    )
    return JobState(spec=spec, submitted_at=0.0, matrices=list(ask.matrices), members=dict(ask.members), plan=plan)


def described(devices: Devices, spec: JobSpec) -> Ask:
    """What the planner would be asked about agents on these devices, named by device and number."""
    matrices, dims = _model(devices.model)
    members: dict[str, Member] = {}
    reports: dict[str, Report] = {}
    for device in devices.device:
        surveyed = Surveyed(base_sha256="0" * 64, matrices=matrices, n_train=device.examples, n_eval=0, dimensions=dims)
        member = Member(surveyed=surveyed, calibrated=_measured(device, surveyed, spec))
        for i in range(device.count):
            agent = device.name if device.count == 1 else f"{device.name}-{i + 1}"
            members[agent], reports[agent] = member, _report(device)
    return Ask(
        spec=spec,
        matrices=sorted(matrices, key=lambda m: m.name),
        frozen_rank=spec.adapter.max_rank,
        overhead_s=spec.plan.overhead_s,
        members=members,
        reports=reports,
    )


def _model(shape: ModelShape) -> tuple[list[Matrix], Dimensions]:
    h, f = shape.hidden_size, shape.intermediate_size
    if h % shape.num_attention_heads:
        raise BadConfig(f"hidden_size {h} is no multiple of num_attention_heads {shape.num_attention_heads}")
    kv = h // shape.num_attention_heads * (shape.num_key_value_heads or shape.num_attention_heads)
    sizes = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }
    matrices = [
        Matrix(name=f"model.layers.{layer}.{kind}", d_out=d_out, d_in=d_in)
        for layer in range(shape.num_hidden_layers)
        for kind, (d_out, d_in) in sizes.items()
    ]
    dims = Dimensions(
        hidden=h,
        mlp=f,
        key_value=kv,
        vocabulary=shape.vocab_size,
        n_layers=shape.num_hidden_layers,
        n_other=2 * shape.vocab_size * h + (2 * shape.num_hidden_layers + 1) * h,
    )
    return matrices, dims


def _report(device: Device) -> Report:
    return Report(
        bits=device.bits,
        up_bytes_per_s=device.up_mbit_per_s * 125_000,
        update_dtypes=["int8", "nf4"],
        down_bytes_per_s=device.down_mbit_per_s * 125_000,
        allowance=Allowance(device=device.name, memory_bytes=int(device.memory_gib * 2**30)),
    )


def _measured(device: Device, surveyed: Surveyed, spec: JobSpec) -> Calibrated:
    """What an agent on this device would have reported."""
    one_row = np.cumprod(np.full(PROBE, DECAY)).astype("<f4")
    scores = np.tile(one_row, (len(surveyed.matrices), 1))
    runs = [(1, 8, 0, False), (4, 8, 0, False), (4, 8, 0, True), (4, 32, 0, False), (4, 8, _half(surveyed), False)]
    longest = min(spec.train.max_tokens, int(4 * device.mean_tokens))
    return Calibrated(
        device=device.name,
        noise_scale=NOISE_SCALE,
        notes=["described, not measured"],
        compute=device.compute,
        probe_rank=PROBE,
        scores=scores.tobytes(),
        shapes=[
            Shape(batch=size, mean_tokens=size * min(device.mean_tokens, longest), max_tokens=size * longest)
            for size in SIZES
        ],
        points=[
            _point(device, surveyed, bits, batch, rank, skip, checkpointing)
            for bits in device.bits
            for batch, rank, skip, checkpointing in runs
        ],
    )


def _half(surveyed: Surveyed) -> int:
    assert surveyed.dimensions is not None
    return surveyed.dimensions.n_layers // 2


def _point(
    device: Device, surveyed: Surveyed, bits: Bits, batch: int, rank: int, skip: int, checkpointing: bool
) -> Point:
    """One configuration by arithmetic: 2 FLOPs per weight and token forward, as many backward from block `skip` on."""
    dims = surveyed.dimensions
    assert dims is not None
    tokens = int(batch * device.mean_tokens)
    weights = sum(m.d_in * m.d_out for m in surveyed.matrices)
    active = sum(m.d_in * m.d_out for m in surveyed.matrices if memory.block(m.name) >= skip)
    head = dims.vocabulary * dims.hidden
    ranks = {m.name: rank for m in surveyed.matrices if memory.block(m.name) >= skip}
    adapters = sum(rank * (m.d_in + m.d_out) for m in surveyed.matrices if m.name in ranks)
    passes = weights + active * (2 if checkpointing else 1) + 2 * head + 3 * adapters
    peak = memory.predicted_bytes(
        dims,
        surveyed.matrices,
        ranks,
        frozen={},
        bits=bits,
        compute=device.compute,
        n_tokens=tokens,
        checkpointing=checkpointing,
    )
    return Point(
        bits=bits,
        batch=batch,
        n_tokens=tokens,
        rank=rank,
        skip=skip,
        checkpointing=checkpointing,
        step_s=2 * tokens * passes / (device.tflops * 1e12) * SLOWER[bits],
        peak_bytes=peak + PROCESS_BYTES,
    )
