"""`fedpipe doctor`: which roles this machine has, the report as text or JSON, and the exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, get_args

import msgspec

from coordinator.figures import plain
from fedpipe.doctor import roles
from fedpipe.doctor.findings import Finding, Series, Status, examine, failed, rank
from fedpipe.doctor.roles import CONFIGS, How, Role
from protocol.daemon import EX_CONFIG, EX_OK, load_toml
from protocol.errors import BadConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

FOUND: Final = 1
COLOURS: Final = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "red", Status.SKIPPED: "dim"}


class Asked(NamedTuple):
    """What to look at: one role, or "" for all that this machine has."""

    role: str = ""
    config: Path | None = None
    url: str = ""
    token_file: Path | None = None
    how: How = How()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One role's findings, the worst of them, and the exit code: 0, 1 when something failed, 78 for a configuration that is none."""

    role: Role
    status: Status
    exit_code: int
    findings: list[Finding]


def reports(asked: Asked) -> list[Report]:
    """Look.  Raises BadConfig for a role that there is not."""
    return [_report(role, asked) for role in _roles(asked)]


def _roles(asked: Asked) -> list[Role]:
    if asked.role:
        found = next((role for role in get_args(Role) if role == asked.role), None)
        if found is None:
            raise BadConfig(
                f"{asked.role!r} is no role: say one of {', '.join(get_args(Role))}, or none for what is here"
            )
        return [found]
    if asked.config:
        raise BadConfig("--config goes with a role: fedpipe doctor agent --config FILE")
    here: list[Role] = [role for role in get_args(Role) if role in CONFIGS and CONFIGS[role].exists()]
    return here or ["operator"]


def _report(role: Role, asked: Asked) -> Report:
    try:
        found = examine(_series(role, asked))
    except BadConfig as error:
        bad = failed(
            "configuration", str(error), "correct it; docs/examples shows every key, `fedpipe init` writes one"
        )
        return Report(role=role, status=Status.FAILED, exit_code=EX_CONFIG, findings=[bad])
    status = rank(found)
    return Report(role=role, status=status, exit_code=FOUND if status is Status.FAILED else EX_OK, findings=found)


def _series(role: Role, asked: Asked) -> list[Series]:
    if role == "operator":
        return roles.operator(asked.url, asked.token_file)
    place = asked.config or CONFIGS[role]
    if role == "agent":
        from agent.config import AgentConfig

        return roles.agent(load_toml(place, AgentConfig), place, asked.how)
    from coordinator.config import CoordinatorConfig

    return roles.coordinator(load_toml(place, CoordinatorConfig), place, asked.how)


def exit_code(found: list[Report]) -> int:
    """The gravest: 78, then 1, then 0."""
    return max((one.exit_code for one in found), default=EX_OK)


def text(found: list[Report]) -> RenderableType:
    """For people: a table per role, then what to do, the gravest first.  Colour only repeats the words."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for report in found:
        table = Table(box=None, pad_edge=False, title=f"{report.role}", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for one in report.findings:
            words = Text(plain(one.found))
            if one.next_step and one.status is not Status.OK:
                words.append(f"\n-> {plain(one.next_step)}", style="bold")
            table.add_row(one.check, Text(one.status.value, style=COLOURS[one.status]), words)
        parts += [table, Text(_summary(report)), Text("")]
    return Group(*parts[:-1])


def _summary(report: Report) -> str:
    n = {status: sum(one.status is status for one in report.findings) for status in Status}
    parts = [f"{n[status]} {status.value}" for status in Status if n[status]]
    return f"{report.role}: {', '.join(parts)}"
