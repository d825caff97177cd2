"""What the planner decides for one agent and one round; the rest of a plan follows from the job."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from protocol.messages import Bits, UpdateDtype


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost model expects of a share, in the units in which it is measured later.

    Fields: one optimizer step, all of them, the transfers (0 while the link is unknown); the training child's peak memory
    beside the limit it was planned for; bytes that go up; progress is steps x batch efficiency x captured importance, the
    number that the planner maximises (its unit means nothing).
    """

    step_s: float
    train_s: float
    down_s: float
    up_s: float
    peak_bytes: int
    limit_bytes: int
    up_bytes: int
    progress: float
    time_factor: float = 1.0
    memory_factor: float = 1.0
    """What the agent's cost model was corrected by when this was predicted."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Ranks per matrix (a matrix that is missing is not trained), base width, and the shape of local training."""

    ranks: dict[str, int]
    bits: Bits
    n_steps: int
    batch: int
    accumulation: int = 1
    checkpointing: bool = False
    rate_ratio: float = 1.0
    """What the job's learning rate is multiplied by, for the size of this agent's steps."""
    update_dtype: UpdateDtype | None = None
    """None: what the job pins (choices of earlier versions)."""
    why: str = ""
    """One line for people: how the numbers above came about."""
    limit: str = ""
    """What keeps this agent from more: memory, time, data, rank, pins, or "" when nobody looked."""
    importance: float = 0.0
    """Share of the total gain that the chosen ranks capture, 0 to 1."""
    predicted: Prediction | None = None
    what_if: dict[str, float] = {}
    """Change -> how many times the progress it would bring, such as {"1 GiB more memory": 1.12}."""

    @property
    def n_samples(self) -> int:
        """Samples of all steps; with packing, rows."""
        return self.n_steps * self.batch * self.accumulation


def share_ranks(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """The same, with ranks that are equal as one map: of 6,000 matrices each takes half a megabyte.  O(maps x matrices)."""
    known: dict[tuple[int, int], dict[str, int]] = {}
    shared: dict[int, dict[str, int]] = {}  # by the map itself
    for ranks in (choice.ranks for choice in choices.values()):
        if id(ranks) not in shared:
            first = known.setdefault((len(ranks), sum(ranks.values())), ranks)
            shared[id(ranks)] = first if first == ranks else ranks
    return {agent: _with_ranks(choice, shared[id(choice.ranks)]) for agent, choice in choices.items()}


def pack_ranks(choices: Mapping[str, Choice]) -> tuple[dict[str, Choice], dict[str, str]]:
    """For the disk: of equal ranks those of the first agent alone, and for the others whose they have.  Cost as share_ranks."""
    shared = share_ranks(choices)
    firsts = {id(shared[agent].ranks): agent for agent in reversed(shared)}
    alike = {a: first for a, choice in shared.items() if (first := firsts[id(choice.ranks)]) != a}
    return {a: _with_ranks(choice, {}) if a in alike else choice for a, choice in shared.items()}, alike


def unpack_ranks(choices: Mapping[str, Choice], alike: Mapping[str, str]) -> dict[str, Choice]:
    """Undo that; what was written before there was such a thing is shared all the same."""
    return share_ranks({a: _with_ranks(choice, choices[alike.get(a, a)].ranks) for a, choice in choices.items()})


def _with_ranks(choice: Choice, ranks: dict[str, int]) -> Choice:
    return choice if choice.ranks is ranks else msgspec.structs.replace(choice, ranks=ranks)
