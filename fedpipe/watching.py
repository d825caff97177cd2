"""A job followed to its end: as a live picture on a terminal, as lines in a pipe, as JSON events for programs.

The picture is read anew twice per second instead of being built from events: whatever happens to the coordinator or to the
connection, the next reading is right again.  Only a job that never answered is an error; one that stops answering is waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from coordinator.core.state import ENDED
from coordinator.feed import AnyNews, JobMoved, Listening, Missed
from coordinator.figures import plain
from coordinator.views import FleetView, JobView
from fedpipe.client import Coordinator
from fedpipe.live import render
from protocol.errors import Unavailable

EVERY_S = 0.5
HEAD_LINES = 12


def watch(coordinator: Coordinator, name: str, console: Console) -> JobView:
    """Show the job until it has ended; its last view.  Raises BadConfig for an unknown job, Unavailable at the start only."""
    if console.is_terminal:
        return _picture(coordinator, name, console)
    return _lines(coordinator, name, console)


def _picture(coordinator: Coordinator, name: str, console: Console) -> JobView:
    view, fleet = coordinator.job(name), coordinator.fleet(brief=True)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            n_agents = max(3, (console.height - HEAD_LINES) // 2)
            picture = render(view, fleet, view.now, max_agents=n_agents, max_rounds=max(3, n_agents - 2))
            live.update(picture, refresh=True)
            if view.phase in ENDED:
                return view
            while not (found := _again(coordinator, view)):
                lost = Text("\nthe coordinator does not answer; trying again", style="bold red")
                live.update(Group(picture, lost), refresh=True)
            view, fleet = found


def _again(coordinator: Coordinator, known: JobView) -> tuple[JobView, FleetView] | None:
    """The next reading after a moment, None when the coordinator does not answer."""
    time.sleep(EVERY_S)
    try:
        return coordinator.job(known.name, known), coordinator.fleet(brief=True)
    except Unavailable:
        return None


def _lines(coordinator: Coordinator, name: str, console: Console) -> JobView:
    """One line per change of the job's phase or round."""
    view, said = coordinator.job(name), ""
    while True:
        if view.text != said:
            said = view.text
            console.print(Text(plain(f"{name}: {said}")), soft_wrap=True)
        if view.phase in ENDED:
            return view
        if found := _again(coordinator, view):
            view = found[0]


def follow(coordinator: Coordinator, name: str) -> Iterator[AnyNews]:
    """News of one job (and of all agents) until it has ended.  Raises Unavailable when the stream breaks off."""
    for item in coordinator.events():
        if getattr(item, "job", name) == name:
            yield item
        match item:
            case JobMoved(phase=phase) if item.job == name:
                ended = phase in ENDED
            case Listening(at=at):  # an end after that is news that will come
                ended = 0 < coordinator.job(name).ended_at <= at
            case Missed():
                ended = coordinator.job(name).phase in ENDED
            case _:
                ended = False
        if ended:
            return
    raise Unavailable(f"the coordinator at {coordinator.url} ended the stream: is it being restarted?")
