"""What finished shares teach: how far off the cost model was for an agent, what does not fit it, which matrices matter.

Every stored update moves its agent's factors of time and memory by measured / predicted, so the next plan is made with a
cost model that fits this agent, and the scores that it brings move the importance of the matrices it trained.  A share that
ran out of memory bounds the next one.  (Our design; the correction from every round is method.md section 2.)
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from coordinator.core.choice import Choice
from coordinator.core.state import Member
from protocol.messages import Calibrated, Offer

if TYPE_CHECKING:
    from coordinator.core.job import Job

TIME_GAIN: Final = 0.7
"""Share of a step time's error that the next prediction takes over: machines are noisy, and a load may last."""
MEMORY_GAIN: Final = 0.3
"""The same for a memory that was predicted too high; one that was too low is taken over whole."""
FACTOR_RANGE: Final = (1 / 16, 16.0)
RESCORE_GAIN: Final = 0.3
"""How fast importance follows what training sees; the rest is kept."""
OUT_OF_MEMORY: Final = ("out_of_memory", "died: SIGKILL")
"""How the reason of a failed share begins when memory was the cause: torch's own word for it, and the kernel's."""


def learn(job: Job, agent: str, choice: Choice, offer: Offer, scores: Mapping[str, list[float]]) -> None:
    """A stored update: what its training really took, and what it says about the matrices."""
    member = job.state.members.get(agent)
    if member is None:
        return
    expected = choice.predicted
    if expected and offer.steps and offer.train_s:
        off = (offer.train_s / offer.steps) / expected.step_s
        member.time_factor = _moved(member.time_factor, expected.time_factor * off, TIME_GAIN)
        _note_drift(job, f"a step of {agent} took {off:.2f} times what was predicted", off)
    if expected and offer.peak_bytes:
        off = offer.peak_bytes / max(1, expected.peak_bytes)
        seen = expected.memory_factor * off
        member.memory_factor = _moved(member.memory_factor, seen, 1.0 if seen > member.memory_factor else MEMORY_GAIN)
        _note_drift(job, f"{agent} took {off:.2f} times the memory that was predicted", max(1.0, off))
    _rescore(member, scores)


def overhead(job: Job) -> None:
    """A round has ended: what it took beside the longest training, averaged over rounds."""
    state = job.state
    assert state.round is not None
    trained_s = max((s.offer.train_s for s in state.round.shares.values() if s.offer), default=0.0)
    lost_s = max(0.0, job.now - state.round.opened_at - trained_s)
    state.overhead_s = lost_s if not state.overhead_s else (1 - TIME_GAIN) * state.overhead_s + TIME_GAIN * lost_s


def out_of_memory(job: Job, agent: str, choice: Choice | None, reason: str) -> None:
    """A share failed: if memory was the cause, the next plan stays well below what did not fit."""
    member = job.state.members.get(agent)
    if member and choice and choice.predicted and reason.startswith(OUT_OF_MEMORY):
        known = member.oom_bytes or choice.predicted.peak_bytes
        member.oom_bytes = min(known, choice.predicted.peak_bytes)
        job.state.stale = f"{agent} ran out of memory"


def _note_drift(job: Job, text: str, off: float) -> None:
    limit = 1 + job.state.spec.plan.drift_ratio
    if not 1 / limit <= off <= limit:
        job.state.stale = text


def _moved(factor: float, seen: float, gain: float) -> float:
    """A factor on its way to the one that was seen: a moving mean of the logarithm."""
    low, high = FACTOR_RANGE
    moved: float = factor ** (1 - gain) * seen**gain
    return min(high, max(low, moved))


def measured(member: Member) -> Calibrated | None:
    """What an agent measured in its survey, with what its training has taught since."""
    calibrated, surveyed = member.calibrated, member.surveyed
    if not member.learned or calibrated is None or surveyed is None:
        return calibrated
    scores, width = bytearray(calibrated.scores), 4 * calibrated.probe_rank
    for at, matrix in enumerate(surveyed.matrices):
        if found := member.learned.get(matrix.name):
            scores[at * width : at * width + len(found)] = found
    return msgspec.structs.replace(calibrated, scores=bytes(scores))


def _rescore(member: Member, scores: Mapping[str, list[float]]) -> None:
    """Move the scores of the trained matrices towards what training saw, keeping their sum: only their shares are news."""
    calibrated, surveyed = measured(member), member.surveyed
    if not scores or calibrated is None or surveyed is None:
        return
    width = calibrated.probe_rank
    if len(calibrated.scores) != 4 * width * len(surveyed.matrices):
        return
    old = array("f", calibrated.scores)
    rows = {matrix.name: at * width for at, matrix in enumerate(surveyed.matrices) if matrix.name in scores}
    pairs = [(row + i, value) for name, row in rows.items() for i, value in enumerate(scores[name][:width])]
    had, got = sum(old[at] for at, _ in pairs), sum(value for _, value in pairs)
    if not had or not got:
        return
    for at, value in pairs:
        old[at] = (1 - RESCORE_GAIN) * old[at] + RESCORE_GAIN * value * had / got
    moved = {}
    for name, row in rows.items():
        n = max(len(scores[name][:width]), len(member.learned.get(name, b"")) // 4)
        moved[name] = old[row : row + n].tobytes()
    member.learned = member.learned | moved  # a new one: the planner may be reading the old
