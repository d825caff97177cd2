"""One server as the planner sees it: what it measured, what it may use, what is pinned; and which servers are alike.

The cost model and the gain curves are the agent's own.  How its base is held and how large its batches are is decided once
per device class: servers whose step time, memory, link, text and pins are alike to within a few percent (our design).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.core.learning import measured
from coordinator.core.spec import JobSpec, Override
from coordinator.core.state import Member
from coordinator.planner import fixed, gains, uplink
from coordinator.planner.bounds import bounds
from coordinator.planner.cost import CostModel, Marginal, Setting, fit, shape_of
from protocol import memory
from protocol.errors import BadConfig, BadMessage
from protocol.messages import Bits, Calibrated, Matrix, Report, Surveyed, UpdateDtype

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

OOM_RATIO: Final = 0.7
"""A share that ran out of memory is followed by one with at most this part of what it needed beyond the bare base."""
NO_LIMIT: Final = 2**60
BUCKET: Final = 1.1
"""Servers whose figures differ by less than about this are of one class."""


class Mode(NamedTuple):
    """What is decided beside the ranks; no block below number `skip` is trained."""

    bits: Bits
    batch: int
    accumulation: int
    checkpointing: bool
    skip: int

    @property
    def samples_per_step(self) -> int:
        """Of one optimizer step."""
        return self.batch * self.accumulation


class Server(NamedTuple):
    """One agent, ready to be planned for.

    order (K,) is where each matrix of the job lies in the agent's survey; ranks are the options behind option 0; allowed
    (K, O) says which a matrix may take; gain (K, O) is what they are worth to this agent; limit_bytes is what its training
    child may hold.
    """

    agent: str
    cost: CostModel
    calibrated: Calibrated
    surveyed: Surveyed
    pins: Override
    order: npt.NDArray[np.int64]
    ranks: tuple[int, ...]
    allowed: Bools
    gain: F64
    bits: tuple[Bits, ...]
    batches: list[int]
    limit_bytes: int
    up_bytes_per_s: float
    down_bytes_per_s: float
    update_dtype: UpdateDtype

    @property
    def n_samples(self) -> int:
        """Examples that the agent trains on."""
        return self.surveyed.n_train


class Ask(NamedTuple):
    """Everything a plan depends on, and nothing else: the same Ask gives the same plan.

    Fields: matrices of the pinned base, by name; rank of the fleet's adapter that agents carry (0 before the first version);
    what a round costs beside training; bits that agents hold now; members and reports by agent.
    """

    spec: JobSpec
    matrices: Sequence[Matrix]
    frozen_rank: int
    overhead_s: float
    members: Mapping[str, Member]
    reports: Mapping[str, Report]
    bits_now: Mapping[str, Bits] = {}


def server(ask: Ask, agent: str) -> Server:
    """What is known of one agent; its `gain` is its own.  Raises BadMessage for measurements that cannot be used, BadConfig for pins."""
    member, report, pins = ask.members[agent], ask.reports.get(agent), ask.spec.pins(agent)
    found, surveyed = measured(member), member.surveyed
    if found is None or surveyed is None:
        raise BadMessage(member.uncalibrated or "nothing was measured")
    places = {m.name: at for at, m in enumerate(surveyed.matrices)}
    if lacking := [m.name for m in ask.matrices if m.name not in places]:
        raise BadMessage(f"the survey lacks {len(lacking)} matrices of the base, such as {lacking[0]!r}")
    order = np.array([places[m.name] for m in ask.matrices])
    scores = gains.scores_of(found, len(surveyed.matrices))[order]
    may = bounds(report)
    ranks = tuple(sorted({pins.rank} if pins.rank else set(ask.spec.plan.ranks)))
    may.refuse(pins, ranks)
    cost = _fitted(surveyed, found).corrected(member.time_factor, member.memory_factor)
    bits = tuple(b for b in sorted(cost.bits) if b in may.bits and pins.bits in {None, b})
    if not bits:
        held = ", ".join(cost.bits) or "none at all"
        raise BadConfig(
            f"no width of the base is left: measured {held}, allowed {', '.join(may.bits)}, pinned {pins.bits}"
        )
    one = Server(
        agent=agent,
        cost=cost,
        calibrated=found,
        surveyed=surveyed,
        pins=pins,
        order=order,
        ranks=ranks,
        allowed=_allowed(ask, pins, ranks, may.max_rank),
        gain=gains.curves(scores, ask.matrices, ranks),
        bits=bits,
        batches=may.batches([pins.batch] if pins.batch else ask.spec.plan.batches),
        limit_bytes=_limit_bytes(ask, report),
        up_bytes_per_s=report.up_bytes_per_s if report else 0.0,
        down_bytes_per_s=report.down_bytes_per_s if report else 0.0,
        update_dtype=uplink.update_dtype(ask.spec, ask.matrices, report, uplink.typical_s(ask.spec)),
    )
    _priced(ask, one)
    return (
        one._replace(limit_bytes=min(one.limit_bytes, _below(ask, one, member.oom_bytes))) if member.oom_bytes else one
    )


def _priced(ask: Ask, one: Server) -> None:
    """Raise BadMessage unless training costs this agent some time and memory, and not without end."""
    for bits in one.bits:
        found = costs(ask, one, Mode(bits, one.batches[0], 1, checkpointing=False, skip=0))
        step_s = found.base_s + float(found.time.max(axis=1).sum())  # the base's own part may be lost in the noise
        peak_bytes = found.base_bytes + float(found.memory.max(axis=1).sum())
        if not (0 < step_s < np.inf and 0 < peak_bytes < np.inf):
            raise BadMessage(f"its measurements say that a step in {bits} takes {step_s:g} s and {peak_bytes:g} bytes")


def _fitted(surveyed: Surveyed, calibrated: Calibrated) -> CostModel:
    """The agent's cost model.  Measurements come from outside: what no model can be made of is a BadMessage."""
    try:
        return fit(surveyed, calibrated)
    except (ArithmeticError, ValueError, RuntimeError) as error:
        raise BadMessage(f"no cost model can be made of the measurements: {error}") from error


def _allowed(ask: Ask, pins: Override, ranks: Sequence[int], max_rank: int) -> Bools:
    """Which matrix may take which rank, (K, 1 + len(ranks)).  A pinned set of matrices must be trained, all of it."""
    full = np.array([min(m.d_in, m.d_out) for m in ask.matrices])
    options = np.array(ranks)
    fits = (options[None, :] <= np.maximum(full, options.min())[:, None]) & (options <= max_rank)
    chosen = np.ones(len(full), dtype=bool)
    if pins.targets:
        names = {m.name for m in fixed.select(ask.matrices, pins.targets)}
        chosen = np.array([m.name in names for m in ask.matrices])
    idle = np.full(len(full), not pins.targets) | ~chosen
    return np.column_stack([idle, fits & chosen[:, None]])


def _below(ask: Ask, one: Server, oom_bytes: int) -> int:
    """A limit below what did not fit once.  The base itself cannot shrink; a share that needed nothing else leaves no room."""
    depth, batch = int(layers(ask.matrices).max()), one.pins.batch or 1
    floor = min(costs(ask, one, Mode(bits, batch, 1, checkpointing=True, skip=depth)).base_bytes for bits in one.bits)
    return int(floor + OOM_RATIO * (oom_bytes - floor))


def _limit_bytes(ask: Ask, report: Report | None) -> int:
    """What the agent's training child may hold: its allowance, or what seems free, less a margin."""
    free = NO_LIMIT
    if report and report.allowance and report.allowance.memory_bytes:
        free = report.allowance.memory_bytes
    elif report and report.gpus:
        free = max(gpu.free_bytes for gpu in report.gpus)
    elif report and report.ram_available_bytes:
        free = report.ram_available_bytes
    return int(free * ask.spec.plan.memory_ratio)


def setting(ask: Ask, one: Server, mode: Mode, ranks: Mapping[str, int] | None = None) -> Setting:
    """A setting as the cost model wants it, on this agent's own text."""
    mean, largest = shape_of(one.calibrated, mode.batch, ask.spec.train.max_tokens)
    return Setting(
        bits=mode.bits,
        n_tokens_mean=mean,
        n_tokens_max=largest,
        ranks=ranks or {},
        frozen={m.name: min(ask.frozen_rank, m.d_in, m.d_out) for m in ask.matrices} if ask.frozen_rank else {},
        accumulation=mode.accumulation,
        checkpointing=mode.checkpointing,
        skip=mode.skip,
    )


def costs(ask: Ask, one: Server, mode: Mode) -> Marginal:
    """Seconds and bytes of a mode, in parts; matrices in the job's order, options in the server's with 0 in front."""
    found = one.cost.marginal(setting(ask, one, mode), (0, *one.ranks))
    return found._replace(time=found.time[one.order], memory=found.memory[one.order])


def upload_s(ask: Ask, one: Server) -> F64:
    """Seconds that each matrix adds to the upload at each option, (K, O); zeros while the link is unknown."""
    sides = np.array([uplink.side_bytes([m], one.update_dtype) for m in ask.matrices], np.float64)
    seconds = sides / one.up_bytes_per_s if one.up_bytes_per_s else 0.0 * sides
    return seconds[:, None] * np.array([0, *one.ranks], np.float64)[None, :]


def down_s(ask: Ask, one: Server) -> float:
    """Seconds until the fleet's adapter is there; 0 while the link is unknown."""
    n_bytes = ask.frozen_rank * uplink.side_bytes(ask.matrices, ask.spec.adapter.model_dtype)
    return n_bytes / one.down_bytes_per_s if one.down_bytes_per_s else 0.0


def layers(matrices: Sequence[Matrix]) -> npt.NDArray[np.int64]:
    """Number of the block that each matrix sits in, (K,)."""
    return np.array([memory.block(m.name) for m in matrices])


def class_of(one: Server, held: Bits | None, reference: tuple[float, float]) -> tuple[object, ...]:
    """Servers with equal keys are of one device class.  `reference` are step time and memory of one common mode."""
    figures = (
        *reference,
        one.limit_bytes,
        one.up_bytes_per_s,
        one.down_bytes_per_s,
        one.n_samples,
        one.calibrated.noise_scale,
    )
    rounded = tuple(round(math.log(figure, BUCKET)) if figure > 0 else 0 for figure in figures)
    return (
        one.calibrated.device,
        one.bits,
        tuple(one.batches),
        held,
        one.ranks,
        one.allowed.tobytes(),
        _pinned(one.pins),
        one.update_dtype,
        rounded,
    )


def _pinned(pins: Override) -> tuple[object, ...]:
    return (pins.bits, pins.n_steps, pins.batch, pins.accumulation, pins.checkpointing)
