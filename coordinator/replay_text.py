"""A replay for people: the story as a table, then what was compared and how it came out."""

from __future__ import annotations

import time
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from coordinator.replay import Check, Replayed, Step

_STYLES = {"equal": "green", "different": "bold red", "unknown": "dim"}


def story(found: Replayed, *, of_round: bool) -> RenderableType:
    """The whole answer; the facts one by one only where one round was asked for."""
    told: list[RenderableType] = [_steps(found.steps), ""] if of_round else []
    return Group(*told, _checks(found.checks), verdict(found))


def verdict(found: Replayed) -> Text:
    """The last line: equal or not."""
    counts = {v: sum(c.verdict == v for c in found.checks) for v in _STYLES}
    text = f"{len(found.steps)} events after row {found.since} run again: {counts['equal']} comparisons are equal"
    if counts["unknown"]:
        text += f", {counts['unknown']} cannot be made"
    if found.equal:
        return Text(f"{text}.", style="green")
    return Text(f"{text}, {counts['different']} differ: keep the folder and report it.", style="bold red")


def _steps(steps: list[Step]) -> Table:
    start = steps[0].at if steps else 0.0
    begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start))
    table = Table(title=f"since {begun}" if steps else None, title_justify="left", box=None, pad_edge=False)
    table.add_column("s", justify="right")
    for name in ("event", "agent", "phase", "what the core wished"):
        table.add_column(name, overflow="fold")
    for step in steps:
        table.add_row(f"{step.at - start:.1f}", step.event, step.agent, step.phase, _grouped(step.wishes))
    return table


def _grouped(wishes: list[str]) -> str:
    """Equal kinds in a row in one phrase."""
    said = []
    for kind, some in groupby(wishes, key=lambda wish: wish.partition(" ")[0]):
        what = [wish.partition(" ")[2] for wish in some]
        many = f"{kind} ({len(what)})" if len(what) > 3 else f"{kind} {', '.join(what)}".rstrip(" ,")
        said.append(many)
    return "; ".join(said)


def _checks(checks: list[Check]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("compared", "", "with"):
        table.add_column(name, overflow="fold")
    for check in checks:
        table.add_row(check.what, Text(check.verdict, style=_STYLES[check.verdict]), check.detail)
    return table
