"""How often a share was begun from the same step: a training that kills its process there is not begun for ever.

A death says nothing when it takes the daemon along, so what counts are the beginnings, on disk before each: a share that made
progress (a later checkpoint) or that was left in order begins its count anew.

The count is written over the one before, in one page: a page that is there already is durable with a single write, where a new
file would take two commits of the file system's journal.  A power cut in the middle of that write costs the count.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import msgspec

from protocol.files import sync_folder
from protocol.messages import Plan

logger = logging.getLogger(__name__)

MAX_STARTS: Final = 5
"""Beginnings from one step before the share is given up.  A restart of the daemon is one too, whoever wanted it."""
PAGE_BYTES: Final = 4096
MAX_ENDING: Final = 500
"""Characters: with all of them escaped the count still fits its page."""


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
            self._keep(msgspec.structs.replace(known, ending=ending[:MAX_ENDING]))

    def forget(self) -> None:
        """The share ended, or was left in order."""
        if self._path.exists():
            self._write(b"", is_synced=False)

    def _known(self) -> Begun | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Begun)
        except (msgspec.MsgspecError, OSError):
            return None

    def _keep(self, begun: Begun) -> None:
        self._write(msgspec.json.encode(begun), is_synced=True)

    def _write(self, text: bytes, *, is_synced: bool) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                is_new = os.fstat(descriptor).st_size != PAGE_BYTES
                os.pwrite(descriptor, text.ljust(PAGE_BYTES), 0)
                if is_synced:
                    os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
            if is_new and is_synced:
                sync_folder(self._path.parent)
        except OSError as error:
            logger.warning("beginnings of a share are not counted: %s", error, extra={"action": "disk"})


def _begun(plan: Plan, step: int) -> Begun:
    return Begun(job=plan.job, round=plan.round, attempt=plan.attempt, step=step)
