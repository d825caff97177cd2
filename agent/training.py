"""From a plan to the child's task, from the child's ending to a fact: one run at a time.

Whatever goes wrong on the way (no such data, no base, a dead child, a full disk) is the event that ends the run.  A finished
update is in the outbox, durable, before anybody hears of it; while the disk refuses it waits, until the run is told to stop.

A training lives on in its checkpoint: a child that died is started again from there, and so is one whose daemon went down, as
soon as the plan comes again.  agent/starts.py sees that this has an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from agent import bases, checkpoints, child
from agent.config import AgentConfig
from agent.core import actions as act
from agent.core import events as ev
from agent.core.work import SUSPENDED
from agent.energy import Meter, Seen, measured
from agent.metrics import StepClock
from agent.outbox import Outbox
from agent.starts import Starts
from agent.supervisor import Supervisor
from agent.upkeep import sweep_parts
from protocol.blobs import Blobs
from protocol.errors import BadConfig, OutsideFault, Unavailable
from protocol.frames import chunk_for
from protocol.messages import Blob, Offer, Plan, Progress
from protocol.methods import load as load_method

logger = logging.getLogger(__name__)

DEATHS: Final = frozenset({"died", "hung"})
"""Ends of a child that say nothing about its task; what kills it at the same step again is found out by counting."""
DISK_AGAIN_S: Final = 2.0


class Training:
    """The daemon's training child at work.

    `tell` hands facts to the core; `moved` is called whenever progress was made; `allowed_bytes`, asked when a run begins,
    says how much memory it may hold (0: not known); `look` at the energy that the device has used; `up_bytes_per_s` is what
    the link carries, for how an update is cut (0: not known).
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
        look: Callable[[], Seen | None],
        up_bytes_per_s: Callable[[], float],
    ) -> None:
        self.progress, self.steps = Progress(), StepClock()
        self._config, self._blobs, self._outbox = config, blobs, outbox
        self._tell, self._moved, self._allowed_bytes, self._look = tell, moved, allowed_bytes, look
        self._up_bytes_per_s = up_bytes_per_s
        self._folder = Path(config.state_dir)
        self.supervisor = Supervisor(config.child, log=self._folder / "training.log")
        self._run: asyncio.Task[None] | None = None
        self._checkpoint = self._folder / "training.checkpoint"
        self._starts = Starts(self._folder / "training.starts")
        self._meter = Meter()
        self._stop_reason = ""
        self._stopped = asyncio.Event()
        self._suspends = False
        self._orders: list[child.Command] = []

    def renew(self, config: AgentConfig) -> None:
        """Another configuration, from the next run on."""
        self._config = config
        self.supervisor.renew(config.child)

    def begin(self, wish: act.StartChild, group: asyncio.TaskGroup) -> None:
        """Start a run in `group`.  It ends in exactly one ChildFinished or ChildFailed."""
        self._stop_reason, self._suspends = "", False
        self._stopped.clear()
        self._orders = []
        self._run = group.create_task(self._train(wish), name="train")

    def stop(self, reason: str, *, suspend: bool = False) -> None:
        """Ask the run to end with what it has, or to be kept for the next process; it may not have reached the child yet."""
        self._stop_reason, self._suspends = self._stop_reason or reason, suspend
        self._stopped.set()
        self.supervisor.stop(reason, suspend=suspend)

    def order(self, order: child.Pause | child.Resume | child.Shrink) -> None:
        """Tell the run something that changes how it goes on; it may not have reached the child yet."""
        self._orders.append(order)
        self.supervisor.tell(order)

    async def kill(self) -> None:
        """End the run now."""
        self._stop_reason = self._stop_reason or "killed"
        self._stopped.set()
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
        self._meter = Meter(self._config.power_w)
        sweep_parts(self._folder)  # of a child that was killed
        try:
            self._tell(msgspec.structs.replace(await self._ending(wish), energy=self._meter.energy))
        finally:
            self.progress = Progress()
            self._moved()

    async def _ending(self, wish: act.StartChild) -> ev.ChildFinished | ev.ChildFailed:
        try:
            return await self._outcome(wish)
        except OutsideFault as error:
            return ev.ChildFailed(reason=str(error))

    async def _outcome(self, wish: act.StartChild) -> ev.ChildFinished | ev.ChildFailed:
        task, plan = await self._task(wish), wish.plan
        while not self._stopped.is_set():
            if plan.purpose == "train" and (why := self._starts.begin(plan, self._kept_step(plan) or 0)):
                self._forget()
                return ev.ChildFailed(reason=why)
            async with measured(self._meter, self._look, lambda: self.progress.phase != "paused"):
                ending = await self.supervisor.run(task, self._said, self._orders)
            match ending:
                case child.Finished() as finished:
                    return await self._finished(wish, finished)
                case child.Suspended(so_far=so_far) if self._suspends:
                    return await self._suspended(wish, so_far)
                case child.Suspended(so_far=so_far) if (
                    self._stopped.is_set()
                ):  # a deadline, and somebody ended the child
                    return await self._finished(wish, msgspec.structs.replace(so_far, stopped=self._stop_reason))
                case child.Suspended():
                    logger.warning("somebody ended the training child: begun again", extra={"action": "child_died"})
                case child.Failed(reason=reason, detail=detail):
                    text = f"{reason}: {detail}" if detail else reason
                    if self._stopped.is_set() or reason not in DEATHS or self._kept_step(plan) is None:
                        if not self._suspends:
                            self._forget()
                        return ev.ChildFailed(reason=text)
                    self._starts.died(text)
                    logger.warning("begun again from the checkpoint: %s", text, extra={"action": "child_died"})
        return ev.ChildFailed(reason=f"stopped before it began: {self._stop_reason}")

    async def _suspended(self, wish: act.StartChild, so_far: child.Finished) -> ev.ChildFinished | ev.ChildFailed:
        """The checkpoint waits for the plan to come again, the update for that not to happen (agent/core/session.py)."""
        plan = wish.plan
        self._starts.forget()
        extra = {"action": "suspended", "job": plan.job, "round": plan.round}
        logger.info("training is kept for the next start, after step %d", self._kept_step(plan) or 0, extra=extra)
        offer = self._offer(wish, msgspec.structs.replace(so_far, stopped=SUSPENDED))
        try:
            update = await asyncio.to_thread(self._outbox.keep, Path(so_far.file), offer) if so_far.file else None
        except Unavailable:
            update = None
        return _ended(so_far, update) if update else ev.ChildFailed(reason=SUSPENDED)

    def _kept_step(self, plan: Plan) -> int | None:
        """The step from which this share goes on; None without a checkpoint.  One of another round is only in the way."""
        step = checkpoints.steps_at(self._checkpoint, plan.job, plan.round)
        if step is None:
            self._drop_checkpoint()
        return step

    def _drop_checkpoint(self) -> None:
        with contextlib.suppress(OSError):  # a disk that refuses: it will be ignored for its key
            self._checkpoint.unlink(missing_ok=True)

    def _forget(self) -> None:
        """The share is over here: neither its checkpoint nor its beginnings matter."""
        self._drop_checkpoint()
        self._starts.forget()

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
            checkpoint=str(self._checkpoint) if config.checkpoint_s else "",
            checkpoint_s=config.checkpoint_s,
            device=config.device,
            memory_limit_bytes=await self._allowed_bytes(),
            allowed=tuple(config.methods),
        )

    def _said(self, event: child.Event) -> None:
        match event:
            case child.Phase(name="paused" | "saving" as name):
                self.progress = msgspec.structs.replace(self.progress, phase=name)
            case child.Phase(name=name) if self.progress.phase == "paused":
                self.progress = msgspec.structs.replace(self.progress, phase=name)
            case child.Phase(name=name):
                self.progress = msgspec.structs.replace(self.progress, phase=name, step=0, n_steps=0)
                self._tell(ev.ChildBegan(phase=name))
            case child.Resumed(step=step, n_steps=n_steps):
                self.progress = msgspec.structs.replace(self.progress, step=step, n_steps=n_steps)
                extra = {"action": "resumed", "job": self.progress.job, "round": self.progress.round}
                logger.info("resumed at step %d of %d", step, n_steps, extra=extra)
            case child.Stepped():
                self.steps.stepped(event.step, event.seconds)
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
        if not ending.file or not ending.samples:
            return _ended(ending, None)
        update = await self._kept(Path(ending.file), self._offer(wish, ending))
        self._forget()
        for xfer in self._outbox.surplus(self._config.keep.outbox_bytes):
            self._tell(ev.UpdateDeclined(xfer=xfer, reason="dropped by the agent: more is owed than keep.outbox_bytes"))
        return _ended(ending, update)

    def _offer(self, wish: act.StartChild, ending: child.Finished) -> Offer:
        plan = wish.plan
        return Offer(
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            kind=load_method(plan.method, self._config.methods).kind,
            blob=Blob(
                sha256="0" * 64, size=1, chunk=chunk_for(self._up_bytes_per_s(), self._config.broker.chunk_bytes)
            ),
            samples=ending.samples,
            loss=ending.loss,
            train_s=ending.train_s,
            steps=ending.steps,
            peak_bytes=ending.peak_bytes,
            bytes_down=wish.bytes_down,
            stopped=ending.stopped,
            energy=self._meter.energy,
        )

    async def _kept(self, file: Path, offer: Offer) -> Offer:
        """Put an update into the outbox, however often the disk refuses.  Raises Unavailable some time after a stop."""
        loop = asyncio.get_running_loop()
        give_up_at: float | None = None
        while True:
            try:
                return await asyncio.to_thread(self._outbox.keep, file, offer)
            except Unavailable as error:
                if give_up_at is not None and loop.time() >= give_up_at:
                    raise Unavailable(f"disk: {error}") from error
                if self.progress.phase != "saving":
                    logger.error("the update cannot be kept, tried again: %s", error, extra={"action": "disk"})
                self.progress = msgspec.structs.replace(self.progress, phase="saving")
                self._moved()
            if self._stopped.is_set():
                give_up_at = give_up_at or loop.time() + child.LAST_TRIES_S
                await asyncio.sleep(DISK_AGAIN_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DISK_AGAIN_S):
                        await self._stopped.wait()


def _ended(ending: child.Finished, update: Offer | None) -> ev.ChildFinished:
    return ev.ChildFinished(
        samples=ending.samples, loss=ending.loss, train_s=ending.train_s, stopped=ending.stopped, update=update
    )
