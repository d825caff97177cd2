"""How one agent learns: a trainer turns a task into progress and an update.

A trainer is a generator: it says what happens as it happens, and after each micro-batch it can be told to stop:

    running = trainer.train(task)
    event = next(running)
    while True:
        event = running.send(stop)        # stop = True, from then on: finish with what there is; StopIteration has Finished

The kind of update that it `produces` must be one that the job's aggregator accepts.  The registry is a closed `match`: a name
that came over the wire finds a built-in trainer or an entry point that this agent's own configuration allows, nothing else.
This package imports torch only inside the trainers; importing the registry is free.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from typing import Final, Protocol

from agent.child import Evaluated, Failed, Finished, Phase, Stepped, TrainTask
from protocol import messages, plugins
from protocol.errors import BadConfig

BUILT_IN: Final = ("qlora",)

Happening = Phase | Stepped | Evaluated
Running = Generator[Happening, bool, Finished]


class Trainer(Protocol):
    """One way to learn.  An instance lives as long as its process and may keep what is dear to load (the base model)."""

    produces: str
    """Kind of update: "lora" is protocol/updates.py."""

    def survey(self, task: TrainTask) -> messages.Surveyed:
        """Look at the base and the data without training.  Raises OutsideFault."""
        ...

    def train(self, task: TrainTask) -> Running:
        """Evaluate the received version if the plan says so, then train and write the update to task.out_file.

        A plan of purpose "evaluate" ends after its evaluation.  Raises OutsideFault or TrainingFailed.
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
    found = plugins.load("fedpipe.trainers", name, allowed=allowed, built_in=BUILT_IN)
    if not isinstance(found, type) or not hasattr(found, "produces"):
        raise BadConfig(f"entry point {name!r} of fedpipe.trainers is no Trainer class")
    return found
