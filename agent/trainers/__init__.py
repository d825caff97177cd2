"""How one agent learns: a trainer turns a task into progress and an update.

A trainer is a generator: it says what happens as it happens, and after each micro-batch it can be told to stop:

    running = trainer.train(task)
    event = next(running)
    while True:
        event = running.send(stop)        # stop = True, from then on: finish with what there is; StopIteration has Finished

Between two events the trainer may be paused for any time, and asked to `shrink`: hold less memory from then on; or to
`suspend`: keep all that the next process needs to go on.  Neither is a must: a trainer without `suspend` is told to stop.

The kind of update that it `produces` must be one that the job's aggregator accepts.  The registry is a closed `match`: a name
that came over the wire finds a built-in trainer or an entry point that this agent's own configuration allows, nothing else.
This package imports torch only inside the trainers; importing the registry is free.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Final, Protocol

from agent.child import Calibrated, Evaluated, Failed, Finished, Phase, Resumed, Stepped, Surveyed, TrainTask
from protocol import plugins
from protocol.errors import BadConfig

BUILT_IN: Final = ("qlora", "continued", "frozen-a", "fresh")

Happening = Phase | Resumed | Stepped | Evaluated | Surveyed | Calibrated
Running = Generator[Happening, bool, Finished]


class Trainer(Protocol):
    """One way to learn.  An instance lives as long as its process and may keep what is dear to load (the base model)."""

    @property
    def produces(self) -> str:
        """Kind of update (protocol/updates.py); a class attribute."""

    def survey(self, task: TrainTask) -> Running:
        """Look at the base and the data without training, and measure what plan.calibration asks for.

        Yields Surveyed as soon as that is known, and Calibrated when there is one; `stopped` of the end says why not.  Raises
        OutsideFault or TrainingFailed; behind Surveyed this costs the measurements only.
        """
        ...

    def train(self, task: TrainTask) -> Running:
        """Evaluate the received version if the plan says so, then train and write the update to task.out_file.

        A plan of purpose "evaluate" ends after its evaluation.  If task.checkpoint is one of this very training, it goes on from
        there (Resumed); it is written every task.checkpoint_s.  Raises OutsideFault or TrainingFailed.
        """
        ...

    def shrink(self) -> None:
        """Halve the micro-batches of the run under way from the next one on, with as many samples per step as before."""
        ...

    def suspend(self) -> Finished | None:
        """Write task.checkpoint as of the last whole step, and the update that a stop would have brought.

        Called between two events; the generator is closed afterwards.  None if there is nothing to keep yet or the disk refuses:
        then it is told to stop.
        """
        ...


class TrainingFailed(Exception):  # noqa: N818 - it is what happened
    """Training ended without a usable update, for a reason that the coordinator must hear by name."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.failed = Failed(reason=reason, detail=detail)


def load(name: str, allowed: Collection[str] = ()) -> type[Trainer]:
    """The trainer called `name`; a third-party one only if in `allowed`.  Raises BadConfig for any other name."""
    match name:
        case "qlora":
            from agent.trainers.qlora import QLora

            return QLora
        case "continued":
            from agent.trainers.baselines import Continued

            return Continued
        case "frozen-a":
            from agent.trainers.baselines import FrozenA

            return FrozenA
        case "fresh":
            from agent.trainers.baselines import Fresh

            return Fresh
    found = plugins.load("fedpipe.trainers", name, allowed=allowed, built_in=BUILT_IN)
    if not isinstance(found, type) or not hasattr(found, "produces"):
        raise BadConfig(f"entry point {name!r} of fedpipe.trainers is no Trainer class")
    return found
