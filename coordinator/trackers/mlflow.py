"""MLflow: one experiment per fleet and one run per job, found again after a restart by its tag."""

from __future__ import annotations

import os
from typing import Final

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports its use to its makers; read when it is imported

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from coordinator.trackers import Ended, Points

TAG: Final = "fedpipe.job"
STATUS: Final = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}
MAX_METRICS: Final = 1000
"""Of one request, as MLflow's REST API has it."""


class MLflow:
    """See Tracker."""

    def __init__(self, uri: str, fleet: str) -> None:
        if uri.startswith("file:"):  # MLflow asks to be told that this is meant: it maintains that store, and no more
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        self._fleet = f"fedpipe/{fleet}"
        self._runs: dict[str, str] = {}

    def log(self, points: Points) -> None:
        """See Tracker."""
        at_ms = int(points.at * 1000)
        metrics = [Metric(name, value, at_ms, points.step) for name, value in points.values.items()]
        run = self._run(points.job)
        for first in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run, metrics[first : first + MAX_METRICS])

    def end(self, ended: Ended) -> None:
        """See Tracker."""
        self._client.set_terminated(self._run(ended.job), STATUS.get(ended.phase, "FINISHED"))
        self._runs.pop(ended.job, None)

    def close(self) -> None:
        """See Tracker; runs of jobs under way stay open for the next process."""

    def _run(self, job: str) -> str:
        if job not in self._runs:
            known = self._client.get_experiment_by_name(self._fleet)
            experiment = known.experiment_id if known else self._client.create_experiment(self._fleet)
            found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{job}'", max_results=1)
            run = found[0] if found else self._client.create_run(experiment, tags={TAG: job}, run_name=job)
            self._runs[job] = run.info.run_id
        return self._runs[job]
