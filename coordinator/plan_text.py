"""A plan for a terminal: who does what and why, and ranks as a heat map that is legible without colour.

Made for 100 columns.  A rank is a number on a ground of one hue that grows brighter with it; "·" is a matrix that is not
trained.  The layers of a deep model stand in several blocks side by side, as many as the terminal has room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from coordinator.core.choice import Choice
from coordinator.figures import duration_text, error_text, plain, share_text, size_text, step_text
from coordinator.heatmap import Cell, Grid, Place, cells, grid, level, rank_text
from coordinator.plan_views import AgentPlan, PastShare, PlanView
from protocol.errors import BadConfig

DIM: Final = (30, 41, 82)
BRIGHT: Final = (147, 197, 253)
"""Ends of the heat map's ramp."""
BLOCK_LAYERS: Final = 16
"""Layers that stand below each other before a second block is begun."""
LIMITS: Final = {
    "memory": "memory: more would not fit into what its owner lets it take",
    "time": "time: more would not be finished within the training time of a round",
    "data": "data: more steps would pass over its own text too often",
    "rank": "nothing: more memory or time would bring no more",
    "pins": "pins: the job file decides",
}


# ---------------------------------------------------------------------------------------------------------------- fleet


def fleet_text(view: PlanView, width: int = 100) -> RenderableType:
    """The plan of all agents."""
    found = grid(view.matrices)
    held = cells(found, [plan.choice.ranks for plan in view.agents.values()])
    labels = {place: f"{rank_text(cell.rank)}/{cell.n}" if cell.n else "·" for place, cell in held.items()}
    parts: list[RenderableType] = [_head(view), Text(), _choices(view), Text(), _predictions(view)]
    if held:
        title = f"mean rank of {len(view.agents)} agents / how many of them train it"
        parts += [Text(), Text(title, style="dim"), heat_text(found, held, labels, width)]
    return Group(*parts)


def _head(view: PlanView) -> RenderableType:
    lines = [Text.assemble((view.job, "bold"), f"   plan made for round {view.round}")]
    if view.reason:
        lines[0].append(f": {plain(view.reason)}", style="dim")
    if view.pinned:
        lines.append(Text("the job file decides everything, so nothing was left to plan", style="cyan"))
    figures = [f"training at most {duration_text(view.train_s)}" if view.train_s is not None else ""]
    if view.round_s:
        transfer = f"slowest download and upload {duration_text(view.transfer_s)}"
        figures = [f"predicted round {duration_text(view.round_s)}", *figures, transfer if view.transfer_s else ""]
    if view.under_training is not None:
        figures.append(f"under-training so far {share_text(view.under_training)}")
    lines += [Text(", ".join(filter(None, figures)))] if any(figures) else []
    lines += [Text(plain(f"{agent} is left out: {why}"), style="yellow") for agent, why in view.left_out.items()]
    lines += [Text(plain(note), style="dim") for note in view.notes]
    return Group(*lines)


def _choices(view: PlanView) -> Table:
    right = ("steps", "matrices", "rank sum", "importance", "up")
    table = _table("agent", "base", "batch", "steps", "matrices", "rank sum", "importance", "up", "limit", right=right)
    for names, plan in _alike(view):
        choice = plan.choice
        table.add_row(
            Text(names, style="bold"),
            choice.bits,
            _batch_text(plan),
            str(choice.n_steps),
            f"{len(choice.ranks)}/{len(view.matrices)}",
            str(sum(choice.ranks.values())),
            share_text(choice.importance or None),
            " ".join(filter(None, (_up_text(choice), choice.update_dtype))),
            Text(plain(choice.limit) or "–"),
        )
    return table


def _up_text(choice: Choice) -> str:
    return size_text(choice.predicted.up_bytes) if choice.predicted else ""


def _alike(view: PlanView) -> list[tuple[str, AgentPlan]]:
    """Agents with equal plans and figures in one row, under the name of the first."""
    alike: dict[bytes, list[str]] = {}
    for agent, plan in view.agents.items():
        alike.setdefault(msgspec.msgpack.encode(plan), []).append(agent)
    return [
        (first + (f" and {len(others)} alike" if others else ""), view.agents[first])
        for first, *others in alike.values()
    ]


def _batch_text(plan: AgentPlan) -> str:
    choice = plan.choice
    text = f"{choice.batch}×{choice.accumulation}" if choice.accumulation > 1 else str(choice.batch)
    return f"{text} ckpt" if choice.checkpointing else text


def _predictions(view: PlanView) -> Table:
    names = ("agent", "step", "measured", "training", "peak memory", "measured", "time ×", "memory ×")
    table = _table(*names, right=names[1:])
    for agents, plan in _alike(view):
        said, (step, memory) = plan.choice.predicted, _measured(plan.measured)
        table.add_row(
            Text(agents, style="bold"),
            step_text(said.step_s if said else 0.0),
            step,
            duration_text(said.train_s) if said else "",
            _of(said.peak_bytes, said.limit_bytes) if said else "",
            memory,
            f"{plan.time_factor:.2f}",
            f"{plan.memory_factor:.2f}",
        )
    return table


def _beside(text: Callable[[float], str], measured: float, predicted: float) -> str:
    error = error_text(measured, predicted)
    return f"{text(measured)} ({error})" if error else text(measured)


def _measured(share: PastShare | None) -> tuple[str, str]:
    """Step and peak memory, each with how far it is from what was predicted."""
    if share is None:
        return "", ""
    said = share.predicted
    step = _beside(step_text, share.step_s, said.step_s if said else 0.0)
    return step, _beside(size_text, share.peak_bytes, said.peak_bytes if said else 0)


def _of(part: int, whole: int) -> str:
    return f"{size_text(part)} of {size_text(whole)}" if whole else size_text(part)


# ---------------------------------------------------------------------------------------------------------------- agent


def agent_text(view: PlanView, agent: str, width: int = 100) -> RenderableType:
    """One agent's plan with its reasons.  Raises BadConfig for an agent that has none."""
    plan = plan_of(view, agent)
    found = grid(view.matrices)
    held = cells(found, [plan.choice.ranks])
    labels = {place: rank_text(cell.rank) for place, cell in held.items()}
    parts: list[RenderableType] = [
        Text.assemble((view.job, "bold"), "   plan of ", (agent, "bold"), f", made for round {view.round}"),
        Text(plan_line(view, plan)),
        *(_fact(*fact) for fact in agent_facts(plan, view.job_s)),
        Text(),
        Text("rank of each layer's matrices", style="dim"),
        heat_text(found, held, labels, width),
    ]
    if plan.past:
        parts += [Text(), _past(plan.past)]
    return Group(*parts)


def plan_of(view: PlanView, agent: str) -> AgentPlan:
    """The plan of one agent.  Raises BadConfig for an agent that has none, with why or with the names that there are."""
    if agent in view.left_out:
        raise BadConfig(f"agent {agent!r} is left out of the plan of {view.job!r}: {view.left_out[agent]}")
    if agent not in view.agents:
        names = sorted(view.agents)
        known = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise BadConfig(f"agent {agent[:80]!r} has no part in the plan of {view.job!r}: it is for {known or 'nobody'}")
    return view.agents[agent]


def plan_line(view: PlanView, plan: AgentPlan) -> str:
    """What the agent shall do, in one line."""
    choice = plan.choice
    base = "full-precision base" if choice.bits == "none" else f"{choice.bits} base"
    batch = f"batch {choice.batch}" + (f"×{choice.accumulation}" if choice.accumulation > 1 else "")
    saved = ", checkpointing" if choice.checkpointing else ""
    ranks = f"{len(choice.ranks)} of {len(view.matrices)} matrices, rank sum {sum(choice.ranks.values())}"
    share = f", {share_text(choice.importance)} of the importance" if choice.importance else ""
    return f"{base}, {batch}{saved}, {choice.n_steps} steps; {ranks}{share}"


def agent_facts(plan: AgentPlan, job_s: float = 0.0) -> Iterator[tuple[str, str]]:
    """(what, text) lines that explain one agent's plan, for a job that has been running for `job_s`.  Texts are not plain yet."""
    choice, said = plan.choice, plan.choice.predicted
    if choice.why:
        yield "why", choice.why
    if choice.limit:
        yield "limit", LIMITS.get(choice.limit, choice.limit)
    if plan.pins:
        yield "pinned", ", ".join(plan.pins)
    if said:
        moved = f", {size_text(said.up_bytes)} up" if said.up_bytes else ""
        moved += f", download {duration_text(said.down_s)}" if said.down_s else ""
        moved += f", upload {duration_text(said.up_s)}" if said.up_s else ""
        step, training = step_text(said.step_s), duration_text(said.train_s)
        memory = _of(said.peak_bytes, said.limit_bytes)
        yield "predicted", f"{step} per step, {training} of training, {memory} at the peak{moved}"
    if plan.calibrated_s is not None:
        took = f"in {duration_text(plan.calibrated_s)}" if plan.calibrated_s else "before, and remembered"
        took += f" ({share_text(plan.calibrated_s / job_s)} of the job)" if plan.calibrated_s and job_s else ""
        yield "calibrated", "; ".join([f"on {plan.device}, {took}", *plan.calibration_notes])
    elif plan.uncalibrated:
        yield "calibrated", f"no: {plan.uncalibrated}"
    if (plan.time_factor, plan.memory_factor) != (1.0, 1.0):
        yield "corrected", f"by what was measured: time × {plan.time_factor:.2f}, memory × {plan.memory_factor:.2f}"
    if plan.oom_bytes:
        yield "memory", f"a share with a predicted {size_text(plan.oom_bytes)} ran out of it: the next stay well below"
    for change, factor in choice.what_if.items():
        yield "what if", f"{change}: {what_if_text(factor)}"


def what_if_text(factor: float) -> str:
    """How many times the progress, in words."""
    gain = factor - 1.0
    if abs(gain) < 0.005:
        return "no more progress per round"
    return f"{share_text(abs(gain))} {'more' if gain > 0 else 'less'} progress per round"


def _fact(name: str, text: str) -> RenderableType:
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(width=10, style="dim", no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(name, Text(plain(text)))
    return line


def _past(past: list[PastShare]) -> Table:
    names = ("round", "state", "base", "rank sum", "samples", "step", "predicted", "peak memory", "predicted")
    right = ("round", "rank sum", "samples", "step", "predicted", "peak memory")
    table = _table(*names, right=right)
    for share in past:
        said = share.predicted
        number = f"{share.round}" + (f".{share.attempt + 1}" if share.attempt else "")
        step, memory = _measured(share)
        samples = f"{share.samples} of {share.planned_samples}" if share.planned_samples else str(share.samples)
        table.add_row(
            number,
            Text(plain(share.state.lower().replace("_", " "))),
            share.bits,
            str(share.rank_sum or ""),
            samples,
            step,
            step_text(said.step_s if said else 0.0),
            memory,
            size_text(said.peak_bytes if said else 0),
        )
    return table


# ------------------------------------------------------------------------------------------------------------- heat map


def heat_text(found: Grid, held: Mapping[Place, Cell], labels: Mapping[Place, str], width: int) -> RenderableType:
    """The grid with a label in each cell, in at most `width` columns as long as one block fits."""
    top = max((cell.rank for cell in held.values()), default=0.0)
    cell_width = max([2, *map(len, labels.values()), *map(len, found.kinds)]) + 1
    names = ["–" if layer is None else str(layer) for layer in found.layers]
    margin = max(map(len, names), default=1) + 1
    fit = max(1, (width + 3) // (margin + cell_width * len(found.kinds) + 3))
    n_blocks = min(fit, math.ceil(len(names) / BLOCK_LAYERS)) or 1
    height = math.ceil(len(names) / n_blocks)
    blocks = Table.grid(padding=(0, 3, 0, 0))
    shown: list[RenderableType] = []
    for start in range(0, len(names), height or 1):
        lines = [Text(" " * margin + "".join(f"{kind:>{cell_width}}" for kind in found.kinds), style="dim")]
        for layer, name in list(zip(found.layers, names, strict=True))[start : start + height]:
            line = Text(f"{name:>{margin - 1}} ", style="dim")
            for kind in found.kinds:
                cell = held.get((layer, kind))
                text = labels.get((layer, kind), "")
                line.append(f"{text:>{cell_width}}", style=_style(level(cell.rank, top) if cell else 0.0))
            lines.append(line)
        shown.append(Text("\n", no_wrap=True).join(lines))
    blocks.add_row(*shown)
    return blocks


def _style(strength: float) -> Style:
    if strength <= 0:
        return Style(dim=True)
    ground = (round(low + (high - low) * strength) for low, high in zip(DIM, BRIGHT, strict=True))
    return Style(color="#000000" if strength > 0.55 else "#ffffff", bgcolor=Color.from_rgb(*ground), dim=False)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table
