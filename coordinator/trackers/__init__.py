"""Rounds told to an experiment tracker as they end: TensorBoard, MLflow, Weights & Biases, or whatever is put behind the same small interface.

    consumer -> points of a round -> bounded queue -> one thread per tracker -> its library -> its files or server

A tracker is a guest: its library is loaded in its own thread, what it raises is one line in the log, and while it hangs its queue
fills and further points are left out and counted.  Nothing waits for it.  It hears of the rounds that end while this process
lives; the coordinator's own records (`fedpipe show`, /v1/jobs) are the ones that are complete.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import RoundRecord
from coordinator.cost import work_s, worked
from protocol.errors import BadConfig

MAX_WAITING: Final = 1000
GOODBYE_S: Final = 5.0

logger = logging.getLogger(__name__)


class TrackersConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where rounds are told to."""

    tensorboard: str = ""
    """A folder that gets one of event files per job; empty: nowhere."""
    mlflow: str = ""
    """A tracking URI, as http://mlflow:5000 or file:///srv/mlruns; empty: nowhere."""
    wandb: str = ""
    """A Weights & Biases project, as `fedpipe` or `team/fedpipe`; its key is in WANDB_API_KEY; empty: nowhere."""
    per_agent: bool = False
    """Also the figures of each agent, which a large fleet has many of."""
    max_agents: Annotated[int, Meta(ge=1, le=10**5)] = 100
    """Of so many agents at most, the first by name."""


class Points(NamedTuple):
    """Figures of one round of a job, at `at` (seconds since the epoch)."""

    job: str
    step: int
    values: Mapping[str, float]
    at: float


class Ended(NamedTuple):
    """A job came to its end."""

    job: str
    phase: str


class Tracker(Protocol):
    """One kind of tracker; called from one thread, and free to raise whatever its library does."""

    def log(self, points: Points) -> None:
        """Take in the figures of a round."""

    def end(self, ended: Ended) -> None:
        """The job has ended."""

    def close(self) -> None:
        """Nothing comes any more."""


# ------------------------------------------------------------------------------------------------------------- figures


def points_of(job: str, record: RoundRecord, n_agents: int = 0) -> Iterator[Points]:
    """What a round's record says, also of the first `n_agents` agents.  Held-out losses belong to the version it began with."""
    at, shares = record.opened_at + record.wall_s, record.shares
    values = {
        "round/seconds": record.wall_s,
        "round/agents_asked": float(len(shares)),
        "round/agents_done": float(sum(share.state == "DONE" for share in shares.values())),
        "round/bytes_up": float(sum(share.bytes_up for share in shares.values())),
        "round/bytes_down": float(sum(share.bytes_down for share in shares.values())),
        "round/work_seconds": sum(map(work_s, worked(record))),
    }
    if known := [share.energy.joules for share in worked(record) if share.energy]:
        values["round/energy_joules"] = sum(known)
    if record.loss is not None:
        values["loss/train"] = record.loss
    measured: dict[str, float] = {}
    for name in sorted(shares)[:n_agents]:
        share = shares[name]
        if share.loss is not None:
            values[f"agent/{name}/loss_train"] = share.loss
        values[f"agent/{name}/train_seconds"] = share.train_s
        values[f"agent/{name}/bytes_up"] = float(share.bytes_up)
        if share.evaluated:
            measured[f"agent/{name}/loss_held_out"] = share.evaluated.loss
    if record.purpose == "train":
        yield Points(job, record.round, values, at)
    found = [share.evaluated for share in shares.values() if share.evaluated]
    if n_samples := sum(one.n_samples for one in found):
        measured["loss/held_out"] = sum(one.loss * one.n_samples for one in found) / n_samples
        yield Points(job, record.version, measured, at)


# ------------------------------------------------------------------------------------------------------------- threads


class Guest:
    """One tracker in a thread of its own.  `load` makes it there; `name` is for the log."""

    def __init__(self, name: str, load: Callable[[], Tracker], max_waiting: int = MAX_WAITING) -> None:
        self.name, self._load = name, load
        self.n_left_out = 0
        self._queue: queue.Queue[Points | Ended | None] = queue.Queue(max_waiting)
        self._complained = False
        self._thread = threading.Thread(target=self._run, name=f"tracker.{name}", daemon=True)
        self._thread.start()

    def tell(self, item: Points | Ended) -> None:
        """Hand something over, if there is room; never waits."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.n_left_out += 1
            if self.n_left_out == 1:
                text = "%s does not keep up: rounds are left out there"
                logger.warning(text, self.name, extra={"action": "tracker_full"})

    def end(self) -> None:
        """Nothing comes any more; where there is no room to say so, something that waits is left out."""
        while True:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                with suppress(queue.Empty):
                    self._queue.get_nowait()
            else:
                return

    def wait(self, timeout_s: float) -> None:
        """Until it is through with everything, for so long at most."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        tracker: Tracker | None = None
        while (item := self._queue.get()) is not None:
            try:
                tracker = tracker or self._load()
                if isinstance(item, Points):
                    tracker.log(item)
                else:
                    tracker.end(item)
            except Exception as error:  # noqa: BLE001 - a foreign library: whatever it raises, the job is not its business
                self._complain(error)
            else:
                self._complained = False
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001
                self._complain(error)

    def _complain(self, error: Exception) -> None:
        """Once, until something went well again."""
        if not self._complained:
            self._complained = True
            text = " ".join(str(error).split())[:500]
            extra = {"action": "tracker_failed", "tracker": self.name, "error": f"{type(error).__name__}: {text}"}
            logger.warning("a tracker failed; the job goes on", extra=extra)


class Trackers:
    """All trackers of one configuration.  Raises BadConfig for one whose package is not installed."""

    def __init__(self, config: TrackersConfig, fleet: str, folder: Path) -> None:
        """`folder` is for what a library keeps on this machine."""
        self._fleet, self._folder = fleet, folder
        self._config, self.guests = config, list(_guests(config, fleet, folder))

    def renew(self, config: TrackersConfig) -> None:
        """Other trackers from now on; the present ones end with what they have.  Raises BadConfig before any change."""
        if config != self._config:
            guests = list(_guests(config, self._fleet, self._folder))
            self._end()
            self._config, self.guests = config, guests

    def happened(self, _events: Sequence[ev.Happened], wishes: Sequence[act.Wish]) -> None:
        """Take what is worth telling out of what the core wished."""
        if not self.guests:
            return
        n_agents = self._config.max_agents if self._config.per_agent else 0
        for wish in wishes:
            match wish:
                case act.Record(job=job, record=record):
                    for points in points_of(job, record, n_agents):
                        self._tell(points)
                case act.Finish(job=job, phase=phase):
                    self._tell(Ended(job, phase))

    def close(self, timeout_s: float = GOODBYE_S) -> None:
        """End them, waiting for so long at most for what is on its way.  Blocks."""
        self._end()
        for guest in self.guests:
            guest.wait(timeout_s / len(self.guests))

    def _end(self) -> None:
        for guest in self.guests:
            guest.end()

    def _tell(self, item: Points | Ended) -> None:
        for guest in self.guests:
            guest.tell(item)


def _guests(config: TrackersConfig, fleet: str, folder: Path) -> Iterator[Guest]:
    for name in ("tensorboard", "mlflow", "wandb"):
        if getattr(config, name) and find_spec(name) is None:
            raise BadConfig(f"trackers.{name} needs a package: pip install 'fedpipe[{name}]', or leave it empty")
    if config.tensorboard:
        events = Path(config.tensorboard)

        def tensorboard() -> Tracker:
            from coordinator.trackers.tensorboard import TensorBoard

            return TensorBoard(events)

        yield Guest("tensorboard", tensorboard)
    if config.mlflow:
        uri = config.mlflow

        def mlflow() -> Tracker:
            from coordinator.trackers.mlflow import MLflow

            return MLflow(uri, fleet)

        yield Guest("mlflow", mlflow)
    if config.wandb:
        project = config.wandb

        def wandb() -> Tracker:
            from coordinator.trackers.wandb import WandB

            return WandB(project, fleet, folder)

        yield Guest("wandb", wandb)
