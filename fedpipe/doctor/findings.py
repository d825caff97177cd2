"""What a look found, and the runner that takes all series of looks at once and leaves none of them out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec

from protocol.errors import OutsideFault


class Status(StrEnum):
    """How a look went.  A warning works, but not as it should, or not for long."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report: which check, how it went, what was found, and what to do about it."""

    check: str
    status: Status
    found: str
    next_step: str = ""


class Series(NamedTuple):
    """Looks that build on each other: `looks` yields one finding for each of `checks`, in their order, within `limit_s` seconds."""

    checks: tuple[str, ...]
    looks: Callable[[], Iterable[Finding]]
    limit_s: float = 30.0


NEVER_CAME: Final = "needs {} first"


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, status=Status.OK, found=found)


def warning(check: str, found: str, next_step: str) -> Finding:
    """Works, but not as it should."""
    return Finding(check=check, status=Status.WARNING, found=found, next_step=next_step)


def failed(check: str, found: str, next_step: str) -> Finding:
    """Does not work."""
    return Finding(check=check, status=Status.FAILED, found=found, next_step=next_step)


def skipped(check: str, found: str, next_step: str = "") -> Finding:
    """Not looked at, and why."""
    return Finding(check=check, status=Status.SKIPPED, found=found, next_step=next_step)


def objected(check: str, error: OutsideFault | str) -> Finding:
    """A fault of ours says `what is wrong: what to do next`; the report has a place for each."""
    found, colon, advice = str(error).rpartition(": ")
    return failed(check, found, advice) if colon else failed(check, advice, "")


def examine(every: Sequence[Series]) -> list[Finding]:
    """All findings, in the order of the series.  Returns after the longest limit at the latest.

    Each series has a thread of its own: a look that hangs (a dead network folder) cannot be stopped, only left behind.
    """
    begun_s = time.monotonic()
    runs = [_Run(series) for series in every]
    for run in runs:
        run.thread.start()
    for run in runs:
        run.thread.join(max(0.0, begun_s + run.series.limit_s - time.monotonic()))
    return [finding for run in runs for finding in run.findings()]


class _Run:
    """One series under way."""

    def __init__(self, series: Series) -> None:
        self.series = series
        self._found: list[Finding] = []
        self._fault: Finding | None = None
        self.thread = threading.Thread(target=self._look, name=f"doctor {series.checks[0]}", daemon=True)

    def _look(self) -> None:
        try:
            for finding in self.series.looks():
                self._found.append(finding)
        except OutsideFault as error:
            self._fault = objected(self._next(), error)
        except ImportError as error:
            advice = "install what this role needs: fedpipe-setup agent, or pip install 'fedpipe[agent]'"
            self._fault = failed(self._next(), f"{error.name or error} is not installed", advice)
        except Exception as error:  # noqa: BLE001 - one look's fault must not hide what the others found
            advice = "this is a fault of the check: look at it by hand"
            self._fault = failed(self._next(), f"{type(error).__name__}: {error}", advice)

    def _next(self) -> str:
        return self.series.checks[min(len(self._found), len(self.series.checks) - 1)]

    def findings(self) -> Iterator[Finding]:
        """What was found, and a line for every look that did not come to its turn."""
        hangs, there, fault = self.thread.is_alive(), list(self._found), self._fault
        yield from there
        if hangs:
            fault = failed(self._next(), f"no answer within {self.series.limit_s:.0f} s", "look at it by hand")
        if fault and len(there) < len(self.series.checks):
            yield fault
            there.append(fault)
        first = next((one.check for one in there if one.status is Status.FAILED), there[-1].check if there else "")
        done = {one.check for one in there}
        yield from (skipped(check, NEVER_CAME.format(first)) for check in self.series.checks if check not in done)


def rank(found: Iterable[Finding]) -> Status:
    """The worst of all: FAILED, WARNING, else OK."""
    statuses = {one.status for one in found}
    return next((status for status in (Status.FAILED, Status.WARNING) if status in statuses), Status.OK)
