"""From a plan to the child's task, from the child's ending to a fact: one run at a time.

Whatever goes wrong on the way (no such data, no base, a dead child, a full disk) is the event that ends the run.  A finished
update is in the outbox, durable, before anybody hears of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from agent import bases, child
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.outbox import Outbox
from agent.supervisor import Supervisor
from protocol.blobs import Blobs
from protocol.errors import BadConfig, OutsideFault
from protocol.messages import Blob, Offer, Progress
from protocol.methods import load as load_method


class Training:
    """The daemon's training child at work.

    `tell` hands facts to the core; `moved` is called whenever progress was made; `allowed_bytes`, asked when a run begins,
    says how much memory it may hold (0: not known).
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        blobs: Blobs,
        outbox: Outbox,
        tell: Callable[[ev.Happened], None],
        moved: Callable[[], None],
        allowed_bytes: Callable[[], Awaitable[int]],
    ) -> None:
        self.progress = Progress()
        self._config, self._blobs, self._outbox = config, blobs, outbox
        self._tell, self._moved, self._allowed_bytes = tell, moved, allowed_bytes
        self._folder = Path(config.state_dir)
        self.supervisor = Supervisor(config.child, log=self._folder / "training.log")
        self._run: asyncio.Task[None] | None = None
        self._stop_reason = ""
        self._orders: list[child.Command] = []

    def begin(self, wish: act.StartChild, group: asyncio.TaskGroup) -> None:
        """Start a run in `group`.  It ends in exactly one ChildFinished or ChildFailed."""
        self._stop_reason = ""
        self._orders = []
        self._run = group.create_task(self._train(wish), name="train")

    def stop(self, reason: str) -> None:
        """Ask the run to end with what it has; it may not have reached the child yet."""
        self._stop_reason = reason
        self.supervisor.stop(reason)

    def order(self, order: child.Pause | child.Resume | child.Shrink) -> None:
        """Tell the run something that changes how it goes on; it may not have reached the child yet."""
        self._orders.append(order)
        self.supervisor.tell(order)

    async def kill(self) -> None:
        """End the run now."""
        await self.supervisor.kill()

    async def wind_down(self) -> None:
        """Wait for a run that was told to stop, for as long as the child has grace; then let the child go."""
        if self._run is not None:
            await asyncio.wait([self._run], timeout=self._config.child.grace_s)
        await self.supervisor.aclose()
        if self._run is not None:
            self._run.cancel()

    async def _train(self, wish: act.StartChild) -> None:
        plan = wish.plan
        self.progress = Progress(job=plan.job, round=plan.round, attempt=plan.attempt, phase="loading")
        try:
            self._tell(await self._outcome(wish))
        except OutsideFault as error:
            self._tell(ev.ChildFailed(reason=str(error)))
        finally:
            self.progress = Progress()
            self._moved()

    async def _outcome(self, wish: act.StartChild) -> ev.ChildFinished | ev.ChildFailed:
        task = await self._task(wish)
        if self._stop_reason:
            return ev.ChildFailed(reason=f"stopped before it began: {self._stop_reason}")
        match await self.supervisor.run(task, self._said, self._orders):
            case child.Finished() as finished:
                return await self._finished(wish, finished)
            case child.Failed(reason=reason, detail=detail):
                return ev.ChildFailed(reason=f"{reason}: {detail}" if detail else reason)

    async def _task(self, wish: act.StartChild) -> child.TrainTask:
        config = self._config
        plan = config.limits.kept(wish.plan)
        data = config.data.get(plan.data)
        if data is None:
            known = ", ".join(sorted(config.data)) or "none"
            raise BadConfig(f"no data set {plan.data!r} here (there is: {known}): add [data.{plan.data}] with its path")
        base_folder = await asyncio.to_thread(bases.resolve, plan.base, config.base)
        return child.TrainTask(
            plan=plan,
            base_folder=str(base_folder),
            data=data,
            model_file=str(self._blobs.path(wish.model_sha256)) if wish.model_sha256 else None,
            max_model_bytes=config.limits.max_model_bytes,
            out_file=str(self._folder / "training.update"),
            digest_cache=str(self._folder / "digests.json"),
            calibrations=str(self._folder / "calibrations"),
            device=config.device,
            memory_limit_bytes=await self._allowed_bytes(),
            allowed=tuple(config.methods),
        )

    def _said(self, event: child.Event) -> None:
        match event:
            case child.Phase(name="paused"):
                self.progress = msgspec.structs.replace(self.progress, phase="paused")
            case child.Phase(name=name) if self.progress.phase == "paused":
                self.progress = msgspec.structs.replace(self.progress, phase=name)
            case child.Phase(name=name):
                self.progress = msgspec.structs.replace(self.progress, phase=name, step=0, n_steps=0)
                self._tell(ev.ChildBegan(phase=name))
            case child.Stepped():
                self.progress = msgspec.structs.replace(
                    self.progress, step=event.step, n_steps=event.n_steps, samples=event.samples, loss=event.loss
                )
            case child.Evaluated(result=result):
                self._tell(ev.ChildEvaluated(result=result))
            case child.Surveyed(result=surveyed):
                self._tell(ev.ChildSurveyed(result=surveyed))
            case child.Calibrated(result=calibrated):
                self._tell(ev.ChildCalibrated(result=calibrated))
        self._moved()

    async def _finished(self, wish: act.StartChild, ending: child.Finished) -> ev.ChildFinished:
        update = None
        if ending.file and ending.samples:
            plan = wish.plan
            offer = Offer(
                job=plan.job,
                round=plan.round,
                attempt=plan.attempt,
                kind=load_method(plan.method, self._config.methods).kind,
                blob=Blob(sha256="0" * 64, size=1, chunk=self._config.broker.chunk_bytes),
                samples=ending.samples,
                loss=ending.loss,
                train_s=ending.train_s,
                steps=ending.steps,
                peak_bytes=ending.peak_bytes,
                bytes_down=wish.bytes_down,
                stopped=ending.stopped,
            )
            update = await asyncio.to_thread(self._outbox.keep, Path(ending.file), offer)
        return ev.ChildFinished(
            samples=ending.samples, loss=ending.loss, train_s=ending.train_s, stopped=ending.stopped, update=update
        )
