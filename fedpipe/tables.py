"""Lists of things as tables for a terminal: jobs, agents, versions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from coordinator.figures import duration_text, loss_text, plain, size_text
from coordinator.versions import VersionView
from coordinator.views import AgentView, JobShort
from fedpipe.live import PHASE_COLOURS, paused
from protocol.messages import Report


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def jobs_table(jobs: Sequence[JobShort], now: float) -> Table:
    """One line per job.  `now` is the coordinator's clock."""
    table = _table("job", "rounds", "version", "age", "state", right=("rounds", "version", "age"))
    for job in jobs:
        table.add_row(
            Text(job.name, style="bold"),
            f"{job.round}/{job.n_rounds}",
            str(job.version),
            duration_text(now - job.submitted_at),
            Text(plain(job.text), style=PHASE_COLOURS.get(job.phase, "cyan")),
        )
    return table


def agents_table(agents: Sequence[AgentView], now: float) -> Table:
    """One line per agent.  `now` is the coordinator's clock."""
    right = ("since", "cpus", "memory", "disk")
    table = _table("agent", "state", "since", "works on", "may take", "gpu", "cpus", "memory", "disk", right=right)
    for agent in agents:
        state = Text("online", style="green") if agent.online else Text("offline", style="red")
        if agent.reason:
            state.append(f": {plain(agent.reason)}", style="dim")
        if why := paused(agent):
            state.append(f", paused: {plain(why)}", style="yellow")
        figures = _figures(agent.report) if agent.report else ("", "", "", "", "")
        since = duration_text(now - agent.since) if agent.since else ""
        table.add_row(Text(agent.id, style="bold"), state, since, Text(_work(agent)), *map(Text, figures))
    return table


def _work(agent: AgentView) -> str:
    progress = agent.progress
    if not agent.task or not progress or progress.job != agent.task:
        return agent.task
    step = f" {progress.step}/{progress.n_steps}" if progress.n_steps else ""
    return f"{agent.task}: {plain(progress.phase)}{step}"


def _figures(report: Report) -> tuple[str, str, str, str, str]:
    gpus = ", ".join(
        f"{plain(g.name)} {size_text(g.free_bytes)} free of {size_text(g.total_bytes)}" for g in report.gpus
    )
    memory = f"{size_text(report.ram_available_bytes)} of {size_text(report.ram_total_bytes)}"
    allowed = report.allowance
    may = f"{size_text(allowed.memory_bytes) or 'nothing'} of {plain(allowed.device)}" if allowed else ""
    return may, gpus or "none", str(report.n_cpus), memory, size_text(report.disk_free_bytes)


def versions_table(versions: Sequence[VersionView]) -> Table:
    """One line per version, oldest first."""
    right = ("version", "round", "rank", "size", "cut away", "held-out", "by")
    table = _table("version", "round", "rank", "size", "cut away", "held-out", "by", "sha256", right=right)
    for v in versions:
        table.add_row(
            str(v.version),
            str(v.round),
            str(v.rank),
            size_text(v.size_bytes),
            f"{v.dropped_ratio:.2%}",
            loss_text(v.loss),
            str(v.n_evaluated or ""),
            v.sha256[:12],
        )
    return table
