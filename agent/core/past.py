"""Which plans an agent was given before: one that comes again from the past, replayed or kept by a broker, is told apart."""

from __future__ import annotations

from typing import Final

from protocol.messages import Plan

MAX_JOBS: Final = 64
"""Of so many jobs the latest plan is remembered."""


class Past:
    """The latest plan of each job.  `n_stale` counts what was turned away."""

    def __init__(self) -> None:
        self.n_stale = 0
        self._latest: dict[str, Plan] = {}

    def is_stale(self, plan: Plan) -> bool:
        """Whether a later round or attempt was asked for since; takes note of `plan` if not.

        An older round with a later date is a job of the same name begun anew, a survey with a later date one more survey.
        """
        latest = self._latest.get(plan.job)
        if latest and plan.issued_at < latest.issued_at and (plan.round, plan.attempt) < (latest.round, latest.attempt):
            self.n_stale += 1
            return True
        if plan.round == 0:
            return False
        self._latest.pop(plan.job, None)  # the latest stands last
        self._latest[plan.job] = plan
        if len(self._latest) > MAX_JOBS:
            del self._latest[next(iter(self._latest))]
        return False

    def forget(self) -> None:
        """Another coordinator counts for itself."""
        self._latest.clear()
