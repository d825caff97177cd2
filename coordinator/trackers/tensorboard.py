"""TensorBoard: one folder of event files per job, written without TensorFlow or torch."""

from __future__ import annotations

from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from coordinator.trackers import Ended, Points


class TensorBoard:
    """See Tracker.  A restart adds a file to the job's folder, which TensorBoard reads as one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, EventFileWriter] = {}

    def log(self, points: Points) -> None:
        """See Tracker."""
        writer = self._writers.get(points.job) or EventFileWriter(str(self._folder / points.job))
        self._writers[points.job] = writer
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.values.items()]
        writer.add_event(Event(wall_time=points.at, step=points.step, summary=Summary(value=values)))
        writer.flush()

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        if writer := self._writers.pop(ended.job, None):
            writer.close()

    def close(self) -> None:
        """See Tracker."""
        for job in list(self._writers):
            self.end(Ended(job, ""))
