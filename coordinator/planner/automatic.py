"""The planner: which matrices at which rank, which batch, which bits, for how many steps and how long, for every agent.

What a round is worth to one agent (our design, in the frame of method.md section 3):

    progress = quality(bits) x useful(importance(ranks)^3 x efficiency(batch) x steps)

    importance   share of all gain that the chosen ranks capture (coordinator/planner/gains.py); the power is measured
    efficiency   1 / (1 + noise / batch): a step on a larger batch is worth more, ever less so (McCandlish et al., 2018)
    useful       x -> D (1 - exp(-x / D)): far into a round an agent drifts away from the fleet
    quality      what the width of the base costs: its measured held-out loss beside that of the best width

Memory and time limit it: download + steps x step + upload must fit the round.  For one agent and one mode (bits, batch,
accumulation, checkpointing, first trained block) all of these are sums over the matrices, so prefixes of one concave-hull
path (coordinator/planner/hull.py) are compared at once, for every length of the round at once.  The length decouples the
agents: the fleet takes the one with the most progress per second, overhead included, where an agent counts by how much text
stands behind it: a fast server with little text must not hurry the others.  Modes are searched once per device
class; then each agent's ranks are solved for its own costs, its own gains and its own limits, with a certificate.

Nothing that fits to within 5 % of the best is decided by noise: there the width that is loaded already wins, then more
bits, more importance, the larger batch.  And of the ranks, the cheapest that bring all but `thrift` of the progress are
enough: bytes that buy nothing are not sent.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.core.choice import Choice, Prediction
from coordinator.planner import explain, fixed, gains, knapsack, search, uplink
from coordinator.planner.bounds import Bounds, bounds
from coordinator.planner.servers import (
    Ask,
    Mode,
    Server,
    class_of,
    costs,
    down_s,
    server,
    setting,
    upload_s,
)
from protocol.errors import BadConfig, BadMessage

F64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

N_LENGTHS: Final = 16
SLACK: Final = 1 + 1e-9
"""The draft itself must fit the limits that are made of it, rounding included."""


class Planned(NamedTuple):
    """The answer: a choice per agent that can take part, why others cannot, the training time of a round, and remarks."""

    choices: dict[str, Choice]
    left_out: dict[str, str]
    train_s: float | None
    notes: list[str]


def plan(ask: Ask, agents: Sequence[str]) -> Planned:
    """Who trains what.  Deterministic.  Cost: some 0.3 s per device class, and 10 ms per agent."""
    servers, choices, left_out, notes = _servers(ask, agents)
    if not servers:
        return Planned(choices, left_out, ask.spec.round.train_s, notes)
    classes = _classes(ask, servers)
    lengths = _lengths(ask)
    searched = [search.frontiers(ask, members[0]) for members in classes]
    together = sum(
        sum(one.n_samples for one in members) * search.best(ask, members[0], found, lengths, members[0].limit_bytes)
        for members, found in zip(classes, searched, strict=True)
    )
    round_s = float(lengths[int(np.argmax(together / (lengths + ask.overhead_s)))])
    drafts: list[_Draft] = []
    for members, found in zip(classes, searched, strict=True):
        ranked = search.ranked(ask, members[0], found, round_s)
        changes = explain.what_if(ask, members[0], found, round_s)
        for one in members:
            own = ranked or search.ranked(
                ask, one, found, round_s
            )  # what speaks for the class may be the one that fits not
            draft = next((d for mode in own if (d := _draft(ask, one, mode, round_s, changes))), None)
            if draft:
                drafts.append(draft)
            else:
                left_out[one.agent] = explain.why_not(ask, one, round_s)
    solved = knapsack.solve_many([draft.problem for draft in drafts], max_gap=ask.spec.plan.max_gap).answers
    choices |= {d.one.agent: _choice(ask, d, answer) for d, answer in zip(drafts, solved, strict=True)}
    return Planned(choices, left_out, ask.spec.round.train_s or round_s + ask.overhead_s, notes)


# ------------------------------------------------------------------------------------------------------ who and which


def _servers(ask: Ask, agents: Sequence[str]) -> tuple[list[Server], dict[str, Choice], dict[str, str], list[str]]:
    """Those that can be planned for, with the gains of their scope; defaults for those that measured nothing."""
    found: list[Server] = []
    choices: dict[str, Choice] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    known: fixed.Known = {}
    for agent in sorted(agents):
        may = bounds(ask.reports.get(agent))
        try:
            if ask.spec.is_pinned(agent):
                choices[agent] = _fixed(ask, agent, may, known)
                continue
            try:
                found.append(server(ask, agent))
            except BadMessage as error:
                choices[agent] = _fixed(ask, agent, may, known, f"by default: {error}")
                notes.append(f"{agent} takes part with defaults: {error}")
        except BadConfig as error:
            left_out[agent] = str(error)
    alike: dict[tuple[int, ...], list[Server]] = defaultdict(list)
    for one in found:
        alike[one.ranks].append(one)
    fleet = {
        ranks: gains.shared([one.gain for one in those], [one.n_samples for one in those])
        for ranks, those in alike.items()
    }
    rules = ask.spec.plan
    scoped = [one._replace(gain=gains.scoped(one.gain, fleet[one.ranks], rules)) for one in found]
    return scoped, choices, left_out, notes


def _fixed(ask: Ask, agent: str, may: Bounds, known: fixed.Known, why: str = "by default") -> Choice:
    choice = fixed.choose(ask.spec, agent, ask.matrices, may, known, why)
    dtype = uplink.update_dtype(ask.spec, ask.matrices, ask.reports.get(agent), uplink.typical_s(ask.spec))
    return msgspec.structs.replace(choice, update_dtype=dtype)


def _classes(ask: Ask, servers: Sequence[Server]) -> list[list[Server]]:
    """Servers by device class; the first of each is the slowest and most limited and speaks for the others."""
    classes: dict[object, list[tuple[float, int, str, Server]]] = defaultdict(list)
    for one in servers:
        found = costs(ask, one, Mode(one.bits[0], one.batches[0], 1, checkpointing=False, skip=0))
        key = class_of(one, ask.bits_now.get(one.agent), (found.base_s, found.base_bytes))
        classes[key].append((-found.base_s, one.limit_bytes, one.agent, one))
    return [[one for *_, one in sorted(those, key=lambda entry: entry[:3])] for those in classes.values()]


def _lengths(ask: Ask) -> F64:
    """Lengths of a round to choose from, without overhead, (T,) seconds."""
    rules, pinned = ask.spec.plan, ask.spec.round.train_s
    if pinned:
        return np.array([max(pinned - ask.overhead_s, 0.1 * pinned)])
    return np.geomspace(rules.min_train_s, max(rules.min_train_s, rules.max_train_s), N_LENGTHS)


# ------------------------------------------------------------------------------------------------- one agent's choice


class _Draft(NamedTuple):
    """One agent's mode, a choice of ranks that fits, and the knapsack of doing better with the same memory and time."""

    one: Server
    found: search.Frontier
    picked: search.Pick
    problem: knapsack.Problem
    changes: dict[str, float]


def _draft(ask: Ask, one: Server, mode: Mode, round_s: float, changes: dict[str, float]) -> _Draft | None:
    """What this agent could do in one mode; None when nothing fits."""
    found = search.frontier(ask, one, mode)
    picked = search.pick(ask, one, found, round_s) if found else None
    if found is None or picked is None:
        return None
    parts, at = costs(ask, one, mode), picked.at
    used_s = picked.n_steps * float(found.step_s[at] - parts.base_s) + float(found.up_s[at])
    problem = knapsack.Problem(
        value=one.gain,
        memory=parts.memory,
        time=picked.n_steps * parts.time + upload_s(ask, one),
        memory_limit=max(0.0, float(found.peak_bytes[at]) - parts.base_bytes) * SLACK,
        time_limit=max(0.0, used_s) * SLACK,
        allowed=search.allowed(ask, one, mode),
    )
    return _Draft(one, found, picked, problem, changes)


def _choice(ask: Ask, draft: _Draft, answer: knapsack.Solution | knapsack.Infeasible) -> Choice:
    """The better of the draft and what the solver made of it."""
    one, found, picked = draft.one, draft.found, draft.picked
    mode = found.mode
    is_better = isinstance(answer, knapsack.Solution) and answer.value >= found.importance[picked.at]
    ranks = _ranks(ask, one, answer.options if is_better else found.options[picked.at])  # type: ignore[union-attr]
    importance = _captured(ask, one, ranks)
    step_s, peak_bytes = one.cost.predict(setting(ask, one, mode, ranks))
    up_bytes = sum(ranks.get(m.name, 0) * uplink.side_bytes([m], one.update_dtype) for m in ask.matrices)
    predicted = Prediction(
        step_s=step_s,
        train_s=picked.n_steps * step_s,
        down_s=down_s(ask, one),
        up_s=up_bytes / one.up_bytes_per_s if one.up_bytes_per_s else 0.0,
        peak_bytes=int(peak_bytes),
        limit_bytes=explain.bound_bytes(one),
        up_bytes=up_bytes,
        progress=float(search.worth(ask, one, mode, importance, picked.n_steps)),
        time_factor=ask.members[one.agent].time_factor,
        memory_factor=ask.members[one.agent].memory_factor,
    )
    limited_by = explain.limit(ask, one, mode, picked.n_steps, draft.changes)
    return Choice(
        ranks=ranks,
        bits=mode.bits,
        n_steps=picked.n_steps,
        batch=mode.batch,
        accumulation=mode.accumulation,
        checkpointing=mode.checkpointing,
        rate_ratio=_rate_ratio(ask, one, mode),
        update_dtype=one.update_dtype,
        why=explain.why(ask, mode, ranks, importance, predicted, limited_by),
        limit=limited_by,
        importance=importance,
        predicted=predicted,
        what_if=draft.changes,
    )


def _ranks(ask: Ask, one: Server, options: Ints) -> dict[str, int]:
    """Rank by name of the matrices that are trained."""
    chosen = ((m, (0, *one.ranks)[option]) for m, option in zip(ask.matrices, options, strict=True))
    return {m.name: min(rank, m.d_in, m.d_out) for m, rank in chosen if rank}


def _rate_ratio(ask: Ask, one: Server, mode: Mode) -> float:
    """The square-root rule for Adam (Malladi et al., 2022, arXiv 2205.10287); a pinned batch keeps the rate as it is."""
    return 1.0 if one.pins.batch else math.sqrt(mode.samples_per_step / ask.spec.plan.rate_samples)


def _captured(ask: Ask, one: Server, ranks: dict[str, int]) -> float:
    """Share of all gain that these ranks capture."""
    places = [bisect.bisect_left(one.ranks, ranks[m.name]) + 1 if m.name in ranks else 0 for m in ask.matrices]
    return float(one.gain[np.arange(len(places)), np.minimum(places, len(one.ranks))].sum() / one.gain[:, -1].sum())
