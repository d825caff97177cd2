"""Weights & Biases from a process of its own: its library keeps whoever imported it from ending while its server is silent.

    guest's thread -- one JSON line per item --> coordinator/trackers/wandb_process.py -- W&B's library --> server or folder
                   <-- one line: what failed, or nothing --

The end of its input is the end of that process, at the latest `GOODBYE_S` later: a coordinator that stops does not wait for it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from coordinator.trackers import Ended, Points


class Told(msgspec.Struct, frozen=True):
    """One line to the process: one of the two."""

    points: Points | None = None
    ended: Ended | None = None


class WandB:
    """See Tracker.  `project` may have the team before it, as in team/project; files are kept in `folder`/wandb."""

    def __init__(self, project: str, fleet: str, folder: Path) -> None:
        self._command = [sys.executable, "-m", "coordinator.trackers.wandb_process", project, fleet, str(folder)]
        self._process: subprocess.Popen[bytes] | None = None

    def log(self, points: Points) -> None:
        """See Tracker."""
        self._tell(Told(points=points))

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        self._tell(Told(ended=ended))

    def close(self) -> None:
        """See Tracker; a run of a job under way is taken up again by the next process."""
        if self._process:
            self._process.communicate()

    def _tell(self, item: Told) -> None:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(item) + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            self._process = None  # the next item gets another
            raise EOFError(f"the process for W&B ended with {process.wait()}: the log above says why")
        if fault := answer.decode().strip():
            raise RuntimeError(fault)

    def _started(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        # A Ctrl-C is for the coordinator.
        return subprocess.Popen(self._command, stdin=pipe, stdout=pipe, start_new_session=True)
