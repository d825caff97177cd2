"""How often a share was begun from the same step: a training that kills its process there is not begun for ever.

A death says nothing when it takes the daemon along, so what counts are the beginnings, on disk before each: a share that made
progress (a later checkpoint) or that was left in order begins its count anew.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from protocol.files import replacing
from protocol.messages import Plan

logger = logging.getLogger(__name__)

MAX_STARTS: Final = 5
"""Beginnings from one step before the share is given up.  A restart of the daemon is one too, whoever wanted it."""


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """Beginnings of one share from one step; `ending` is the last that was seen to fail, in words."""

    job: str
    round: int
    attempt: int
    step: int
    n: int = 0
    ending: str = ""

    def of(self, plan: Plan, step: int) -> bool:
        """Whether these are of this share and this step."""
        return (self.job, self.round, self.attempt, self.step) == (plan.job, plan.round, plan.attempt, step)


class Starts:
    """The count in the file at `path`.  A disk that refuses is no reason not to train: then nothing is counted."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, plan: Plan, step: int) -> str:
        """Count one more beginning of this share from `step`; why there must be none, "" if it may begin."""
        known = self._known()
        begun = known if known and known.of(plan, step) else _begun(plan, step)
        if begun.n >= MAX_STARTS:
            why = f"begun {begun.n} times from step {step} without getting further"
            return f"{begun.ending}; {why}" if begun.ending else f"died: {why}"
        self._keep(msgspec.structs.replace(begun, n=begun.n + 1))
        return ""

    def died(self, ending: str) -> None:
        """Remember how the last beginning ended."""
        if known := self._known():
            self._keep(msgspec.structs.replace(known, ending=ending[:500]))

    def forget(self) -> None:
        """The share ended, or was left in order."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._complain(error)

    def _known(self) -> Begun | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Begun)
        except (msgspec.MsgspecError, OSError):
            return None

    def _keep(self, begun: Begun) -> None:
        try:
            with replacing(self._path) as file:
                file.write(msgspec.json.encode(begun))
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        logger.warning("beginnings of a share are not counted: %s", error, extra={"action": "disk"})


def _begun(plan: Plan, step: int) -> Begun:
    return Begun(job=plan.job, round=plan.round, attempt=plan.attempt, step=step)
