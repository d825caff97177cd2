"""A job at a glance, for a terminal: one picture from two views, drawn anew as they change.

    head      which job, where it stands, how long already, how good the adapter has become
    agents    one line each: what it does, how far it is, what it moved, its own last held-out loss
    rounds    one line for each that ended
    notes     who is out, who is gone, and why

Everything is read from JobView and FleetView; nothing here asks or waits.  State is always said in words: colour only repeats
it.  The picture keeps its height while a round runs, so redrawing it does not flicker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.core.state import Phase, RoundRecord
from coordinator.cost import spent_text
from coordinator.figures import duration_text, loss_text, plain, share_text, size_text, sparkline
from coordinator.past import comparable, mean_loss
from coordinator.plan_views import fleet_under_training, round_under_training
from coordinator.views import AgentView, FleetView, JobView, MemberView, ShareView
from protocol.messages import Progress

BAR_COLUMNS: Final = 16
WIDTHS: Final = {"loss": 5, "up": 6, "down": 6, "time": 5}
"""Columns whose figures come and go while the picture stands."""

MAX_AGENTS: Final = 16
MAX_ROUNDS: Final = 10
MAX_NOTES: Final = 4

COLOURS: Final = {
    "TRAINING": "cyan",
    "UPLOADING": "blue",
    "PREPARING": "cyan",
    "calibrating": "cyan",
    "PAUSED": "yellow",
    "DONE": "green",
    "FAILED": "red",
    "REJECTED": "red",
    "TIMED_OUT": "yellow",
    "CANCELLED": "yellow",
    "out": "red",
    "offline": "red",
}
PHASE_COLOURS: Final = {
    Phase.COMPLETED: "green",
    Phase.FAILED: "red",
    Phase.CANCELLED: "yellow",
    Phase.PAUSED: "yellow",
}
BUSY: Final = ("TRAINING", "UPLOADING", "PREPARING", "PAUSED", "calibrating")
BAD_ENDS: Final = frozenset({"FAILED", "REJECTED", "TIMED_OUT", "CANCELLED"})


class Row(NamedTuple):
    """One agent's line: `done` of `total` in what it does now, told as `figure`."""

    agent: str
    state: str
    done: float = 0.0
    total: float = 0.0
    figure: str = ""
    samples: int = 0
    loss: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    held_out: float | None = None
    note: str = ""


def render(
    job: JobView, fleet: FleetView, now: float, *, max_agents: int = MAX_AGENTS, max_rounds: int = MAX_ROUNDS
) -> RenderableType:
    """The whole picture at `now` (the coordinator's clock); made for 100 columns, legible from 80."""
    rows = list(agent_rows(job, fleet))
    parts: list[RenderableType] = [head(job, fleet, now), Text(), agents_table(rows, max_agents)]
    if job.history:
        parts += [Text(), rounds_table(job, max_rounds), Text(f"so far: {spent_text(job.cost)}", style="dim")]
    if found := notes(rows, fleet, job):
        parts += [Text(), *found]
    return Group(*parts)


# ---------------------------------------------------------------------------------------------------------------- head


def head(job: JobView, fleet: FleetView, now: float) -> RenderableType:
    """Two lines of where and what, and the way of the held-out loss so far."""
    broker = fleet.broker
    link = Text(f"broker {broker.address}", style="dim") if broker.connected else Text("no broker", style="bold red")
    elapsed = duration_text((job.ended_at or now) - job.submitted_at)
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    title = Text.assemble((job.name, "bold"), (f"   {job.method} on {_short(plain(job.base))}", "dim"))
    grid.add_row(title, Text.assemble((f"fleet {fleet.fleet}, ", "dim"), link))
    grid.add_row(Text(plain(job.text), style=PHASE_COLOURS.get(job.phase, "cyan")), Text(f"{elapsed} elapsed"))
    return Group(grid, _way(job))


def _short(source: str) -> str:
    """Of a folder its name, which says more than the way there."""
    name = source.rstrip("/").rpartition("/")[2] if source.startswith(("/", "~", ".")) else source
    return name if len(name) <= 40 else "…" + name[-39:]


def _way(job: JobView) -> RenderableType:
    """Rounds done as a bar, then the mean held-out loss of every version, over agents of which it can be compared."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(total=job.n_rounds, completed=min(job.n_rounds, job.round + _fraction(job)), width=20)
    cells: list[RenderableType] = [bar, Text(f"{job.round} of {job.n_rounds} rounds done")]
    losses = [loss for measured in comparable(job.evaluations).values() if (loss := mean_loss(measured)) is not None]
    if losses:
        way = loss_text(losses[0]) if len(losses) == 1 else f"{loss_text(losses[0])} → {loss_text(losses[-1])}"
        cells.append(Text.assemble("held-out loss ", (way, "bold"), " ", (sparkline(losses), "cyan")))
    grid.add_row(*cells)
    return grid


def _fraction(job: JobView) -> float:
    """How much of the open training round is trained, 0 to 1."""
    if job.current is None or job.current.purpose != "train" or not job.current.shares:
        return 0.0
    parts = [
        1.0
        if share.state in {"DONE", "UPLOADING"}
        else share.progress.step / share.progress.n_steps
        if share.progress and share.progress.n_steps
        else 0.0
        for share in job.current.shares.values()
    ]
    return sum(parts) / len(parts)


# -------------------------------------------------------------------------------------------------------------- agents


def agent_rows(job: JobView, fleet: FleetView) -> Iterator[Row]:
    """One row per agent that the job knows, by name."""
    away = {agent.id: agent.reason or "no connection" for agent in fleet.agents if not agent.online}
    busy = {agent.id: agent.progress for agent in fleet.agents if agent.task == job.name}
    shares = job.current.shares if job.current else {}
    last = job.history[-1] if job.history else None
    for agent, member in sorted(job.members.items()):
        held_out = next((m[agent].loss for m in reversed(job.evaluations.values()) if agent in m), None)
        if agent in shares:
            row = _share_row(agent, shares[agent])
        elif job.ended_at and last and agent in last.shares:
            row = _ended_row(agent, last)
        else:
            row = _idle_row(agent, member, busy.get(agent))
        row = row._replace(held_out=held_out)
        if agent in away and not job.ended_at:
            state = "offline" if row.state == "idle" else row.state
            row = row._replace(state=state, note=f"offline: {away[agent]}")
        yield row


def _share_row(agent: str, share: ShareView) -> Row:
    progress = share.progress
    done, total, figure, state = 0.0, 1.0, "", share.state
    if progress and progress.phase == "paused" and state in {"PREPARING", "TRAINING"}:
        state = "PAUSED"
    match share.state:
        case "DONE":
            done, figure = 1.0, "done"
        case "UPLOADING" if share.size_up:
            done, total, figure = share.bytes_up, share.size_up, f"{share.bytes_up / share.size_up:.0%} sent"
        case "TRAINING" if progress and progress.n_steps:
            done, total, figure = progress.step, progress.n_steps, f"{progress.step}/{progress.n_steps}"
        case "PREPARING" | "UPLOADING" | "TRAINING" if progress and state != "PAUSED":
            figure = progress.phase
    return Row(
        agent=agent,
        state=state,
        done=done,
        total=total,
        figure=figure,
        samples=share.samples,
        loss=share.loss,
        bytes_up=share.bytes_up,
        bytes_down=share.bytes_down,
        seconds=share.wall_s,
        note=share.reason,
    )


def _ended_row(agent: str, record: RoundRecord) -> Row:
    share = record.shares[agent]
    done = float(share.state == "DONE")
    return Row(
        agent=agent,
        state=share.state,
        done=done,
        total=1.0,
        figure="done" if done else "",
        samples=share.samples,
        loss=share.loss,
        bytes_up=share.bytes_up,
        bytes_down=share.bytes_down,
        seconds=share.wall_s,
        note=share.reason,
    )


def _idle_row(agent: str, member: MemberView, progress: Progress | None) -> Row:
    if member.excluded:
        return Row(agent, "out", note=member.excluded)
    if member.survey in {"", "DONE"}:
        return Row(agent, "idle")
    if progress and progress.phase == "calibrating" and progress.n_steps:
        figure = f"{progress.step}/{progress.n_steps}"
        return Row(agent, "calibrating", done=progress.step, total=progress.n_steps, figure=figure)
    return Row(agent, "survey", figure=progress.phase if progress else "")


def agents_table(rows: list[Row], max_agents: int) -> RenderableType:
    """The agents' lines; of too many, those at work first, and the rest as a count."""
    if not rows:
        return Text("no agent is in the job yet", style="dim")
    table = _table()
    table.add_column("agent", max_width=18, overflow="ellipsis", no_wrap=True)
    table.add_column("state", min_width=9, no_wrap=True)
    table.add_column("progress", max_width=BAR_COLUMNS)  # the one that gives way in a narrow terminal
    table.add_column("", min_width=8, no_wrap=True)
    for name in ("samples", "loss", "up", "down", "time", "held-out"):
        table.add_column(name, justify="right", no_wrap=True, min_width=WIDTHS.get(name))
    shown = rows
    if len(rows) > max_agents:
        shown = sorted(sorted(rows, key=lambda row: row.state not in BUSY)[:max_agents])
    for row in shown:
        table.add_row(*_cells(row))
    if len(shown) == len(rows):
        return table
    states = [row.state for row in rows if row not in shown]
    rest = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return Group(table, Text(f"and {len(states)} more: {rest}", style="dim"))


def _cells(row: Row) -> Iterator[RenderableType]:
    colour = COLOURS.get(row.state, "dim")
    yield Text(row.agent, style="bold" if row.state in BUSY else "")
    yield Text(row.state.lower().replace("_", " "), style=colour)
    yield (
        ProgressBar(total=row.total, completed=row.done, complete_style=colour, finished_style=colour)
        if row.total
        else Text()
    )
    yield Text(plain(row.figure))
    yield Text(f"{row.samples:,}" if row.samples else "")
    yield Text(loss_text(row.loss) if row.loss is not None else "")
    yield Text(size_text(row.bytes_up))
    yield Text(size_text(row.bytes_down))
    yield Text(duration_text(row.seconds) if row.seconds else "")
    yield Text(loss_text(row.held_out) if row.held_out is not None else "", style="bold")


def _table() -> Table:
    return Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim", collapse_padding=True)


# -------------------------------------------------------------------------------------------------------------- rounds


def rounds_table(job: JobView, max_rounds: int) -> Table:
    """The last ended rounds.  Held-out is the mean over the agents that measured the round's result, which is one round later."""
    table = _table()
    so_far = fleet_under_training(job.history)
    for name, justify in (
        ("round", "right"),
        ("outcome", "left"),
        ("agents", "right"),
        ("samples", "right"),
        ("loss", "right"),
        ("up", "right"),
        ("down", "right"),
        ("time", "right"),
        ("held-out", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=name != "outcome", max_width=36)  # type: ignore[arg-type]
    if so_far is not None:
        table.add_column("undone", justify="right", no_wrap=True)
        table.caption = Text(f"undone: under-training, {share_text(so_far)} of all planned samples so far")
        table.caption_justify = "left"
    for record in job.history[-max_rounds:]:
        undone = round_under_training(record) if record.purpose == "train" else None
        table.add_row(*round_cells(job, record), "" if undone is None else share_text(undone))
    return table


def round_cells(job: JobView, record: RoundRecord) -> Iterator[RenderableType]:
    """One ended round, as the cells of a row."""
    done = [share for share in record.shares.values() if share.state == "DONE"]
    trained = record.purpose == "train"
    counted = record.outcome == "aggregated" or not trained
    measured = job.evaluations.get(record.version + 1 if trained and counted else record.version, {})
    loss = mean_loss(measured) if counted else None
    yield Text(f"{record.round}" + (f".{record.attempt + 1}" if record.attempt else "") if trained else "final")
    style = "" if counted else "yellow"
    yield Text(plain(record.outcome) if trained else "measured", style=style, no_wrap=True, overflow="ellipsis")
    yield Text(f"{len(done)}/{len(record.shares)}", style="" if len(done) == len(record.shares) else "yellow")
    yield Text(f"{sum(share.samples for share in done):,}" if trained else "")
    yield Text(loss_text(record.loss) if trained else "")
    yield Text(size_text(sum(share.bytes_up for share in record.shares.values())))
    yield Text(size_text(sum(share.bytes_down for share in record.shares.values())))
    yield Text(duration_text(record.wall_s))
    yield Text(loss_text(loss) if loss is not None else "", style="bold")


# --------------------------------------------------------------------------------------------------------------- notes


def notes(rows: list[Row], fleet: FleetView, job: JobView) -> list[Text]:
    """What needs a person's eye: no broker; agents that are out, gone, failed, paused or not measured, with the reason."""
    lines = [] if fleet.broker.connected else [f"no broker: {fleet.broker.fault}"]
    lines += [f"disk {fleet.disk}: {fleet.disk_reason}"] if fleet.disk_reason else []
    lines += [f"{r.agent}: {r.note}" for r in rows if r.note and (r.state in BAD_ENDS | {"out"} or "offline" in r.note)]
    if not job.ended_at:
        lines += [f"{a.id}: paused: {why}" for a in fleet.agents if a.id in job.members and (why := paused(a))]
    lines += [f"{a}: not calibrated: {m.uncalibrated}" for a, m in sorted(job.members.items()) if m.uncalibrated]
    more = [f"and {len(lines) - MAX_NOTES} more"] if len(lines) > MAX_NOTES else []
    return [Text(plain(line), style="yellow", no_wrap=True, overflow="ellipsis") for line in lines[:MAX_NOTES] + more]


def paused(agent: AgentView) -> str:
    """Why this agent may not train now, in its owner's words; empty when it may."""
    allowance = agent.report.allowance if agent.report and agent.online else None
    return allowance.paused if allowance else ""
