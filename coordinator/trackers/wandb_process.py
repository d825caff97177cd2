"""The process that W&B's library lives in: one run per job, found again after a restart by its id; see wandb.py."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, Final

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it reports its faults to its makers; read when it is imported

import msgspec
import wandb

from coordinator.trackers.wandb import Told

GOODBYE_S: Final = 20.0
EXIT_CODES: Final = {"completed": 0, "failed": 1, "cancelled": 255}
"""What W&B shows as finished, crashed and killed."""
POINTS_ONLY: Final = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Nothing of this machine is sent but its points."""


class Runs:
    """The runs of this fleet's jobs that are open here."""

    def __init__(self, project: str, fleet: str, folder: Path) -> None:
        entity, _, self._project = project.rpartition("/")
        self._entity, self._fleet, self._folder = entity or None, fleet, folder
        self._open: dict[str, wandb.Run] = {}

    def take(self, told: Told) -> None:
        """Do what was told.  The axis is our own: W&B's steps only grow, and a held-out loss belongs to a version before."""
        if told.points:
            job, step, values, at = told.points
            self._run(job).log({**values, "step": step, "_timestamp": at})
        elif told.ended:
            job, phase = told.ended
            self._run(job).finish(exit_code=EXIT_CODES.get(phase, 0))
            del self._open[job]

    def _run(self, job: str) -> wandb.Run:
        if job not in self._open:
            run = wandb.init(
                entity=self._entity,
                project=self._project,
                group=self._fleet,
                id=f"{self._fleet}-{job}",
                name=job,
                dir=self._folder,
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(host=self._fleet, **POINTS_ONLY),
            )
            run.define_metric("*", step_metric="step")
            self._open[job] = run
        return self._open[job]


def read(source: BinaryIO, heard: Callable[[Told | None], Any]) -> None:
    """Hand on every line, None at the end; and end this process some time after that, whatever holds it."""
    for line in source:
        heard(msgspec.json.decode(line, type=Told))
    heard(None)
    timer = threading.Timer(GOODBYE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main() -> None:
    """Answer each line with one: what failed, or nothing."""
    project, fleet, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    told: SimpleQueue[Told | None] = SimpleQueue()
    threading.Thread(target=read, args=(sys.stdin.buffer, told.put), daemon=True).start()
    runs = Runs(project, fleet, Path(folder))
    while (item := told.get()) is not None:
        try:
            runs.take(item)
            fault = ""
        except Exception as error:  # noqa: BLE001 - a foreign library: told to the coordinator, which logs it
            fault = " ".join(f"{type(error).__name__}: {error}".split())
        print(fault, file=answers, flush=True)


if __name__ == "__main__":
    main()
