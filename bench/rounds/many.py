"""Many agents in one process: the real daemon with its core, exchange and outbox, except that its child is a thread.

    python -m bench.rounds.many FILE        a JSON list of agent configurations

For fleets of hundreds on one machine, where the coordinator and the broker are what is measured.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from agent import trainers
from agent.child import Command, Ending, Event, Finished, TrainTask
from agent.config import AgentConfig
from agent.daemon import Agent
from agent.supervisor import ChildConfig, Supervisor
from protocol import methods
from protocol.daemon import set_up_logging


class Inline(Supervisor):
    """A supervisor whose child is a thread; it is used with trainers that are done at once."""

    async def run(
        self,
        task: TrainTask,
        on_event: Callable[[Event], None],
        orders: Sequence[Command] = (),  # noqa: ARG002 - they come too late for what is done at once
    ) -> Ending:
        """See Supervisor.run."""
        events, ending = await asyncio.to_thread(_driven, task)
        for event in [*events, ending]:
            on_event(event)
        return ending


def _driven(task: TrainTask) -> tuple[list[Event], Finished]:
    trainer = trainers.load(methods.load(task.plan.method, task.allowed).trainer, task.allowed)()
    running = trainer.survey(task) if task.plan.purpose == "survey" else trainer.train(task)
    events: list[Event] = []
    while True:
        try:
            events.append(next(running))
        except StopIteration as end:
            finished: Finished = end.value
            return events, finished


async def main(configs: Sequence[AgentConfig]) -> None:
    """Run all of them until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as group:
        for config in configs:
            agent = Agent(config)
            agent.training.supervisor = Inline(ChildConfig())
            group.create_task(agent.run(stop), name=config.agent)


if __name__ == "__main__":
    set_up_logging()
    asyncio.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[AgentConfig])))
