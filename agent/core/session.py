"""The agent's brain: what it works on and what it still owes the coordinator.  Events in, actions out, time as an argument.

Two things live here, and they are independent of each other:

    work     at most one share of one round: FETCHING the model -> RUNNING in the child -> gone.  A new plan replaces it.
             While the host needs the device itself, what is fetched is HELD and what runs is paused; its time runs on.
    outbox   finished updates that the coordinator has not accepted yet; each lives on disk and is offered until it is
             accepted or declined, across restarts of either side and of the broker.

So a trained update is never lost to the next plan, and an upload never keeps the agent from training.  Times of a plan are
relative: at stop_after_s the child is told to hand over what it has, at ttl_s the work is given up.  A plan that comes again
(the coordinator repeats it at every birth) only moves these times.

When the daemon goes down, the work is kept on disk where that can be done, and its share stays open: the plan comes again at
the next birth, with the time that is left.  Until then nobody knows whether it comes, so what was trained lies in the outbox as
an update too, unsaid: it is forgotten when the plan comes, and offered, late, when something else comes or nothing.

One child, one run: each StartChild is answered by exactly one ChildFinished or ChildFailed, also after a kill, and nothing
else is begun before.  A plan that comes meanwhile waits, and its time runs.
"""

from __future__ import annotations

from agent.core import actions as act
from agent.core import events as ev
from agent.core.past import Past
from agent.core.work import CHILD_GRACE_S, SUSPENDED, Stage, Work
from protocol.messages import ExecState, Execution, Level, Offer, Plan


class Session:
    """Everything the agent knows and decides.  `methods` it may train with; `max_global_rank` caps its download."""

    def __init__(self, methods: list[str], outbox: list[Offer], max_global_rank: int = 1024) -> None:
        self.methods = methods
        self.max_global_rank = max_global_rank
        self.outbox: dict[str, Offer] = {o.blob.xfer: o for o in outbox}
        self.suspended = {o.blob.xfer for o in outbox if o.stopped == SUSPENDED}
        self.work: Work | None = None
        self.waiting: Plan | None = None
        self.stopping = False
        self.coordinator = ""
        self.host: ev.Level = "run"
        self.host_reason = ""
        self._waiting_since = 0.0
        self.past = Past()
        self._serial = 0
        self._now = 0.0
        self._out: list[act.Wish] = []

    # ------------------------------------------------------------------------------------------------------ one door

    def handle(self, event: ev.Happened, now: float) -> list[act.Wish]:
        """Take in one fact at `now` (seconds since the epoch) and say what shall be done."""
        self._now, self._out = now, []
        match event:
            case ev.BusUp():
                self._restate(birth=True)
            case ev.RebirthAsked():
                self._restate(birth=True)
            case ev.CoordinatorSeen():
                self._coordinator_seen(event)
            case ev.PlanCame():
                self._plan_came(event.plan)
            case ev.NothingPlanned():
                self._settle_suspended(None)
            case ev.CancelCame():
                self._cancel(event)
            case ev.ModelFetched() | ev.ModelLost():
                self._model(event)
            case ev.ChildBegan() | ev.ChildEvaluated() | ev.ChildSurveyed() | ev.ChildCalibrated():
                self._child_moved(event)
            case ev.ChildFinished():
                self._finished(event)
            case ev.ChildFailed():
                self._failed(event)
            case ev.UpdateAccepted():
                self._settled(event.xfer, ExecState.DONE, "")
            case ev.UpdateDeclined():
                superseded = event.reason.startswith("superseded")
                self._settled(event.xfer, ExecState.SUPERSEDED if superseded else ExecState.FAILED, event.reason)
            case ev.HostSpoke():
                self._host_spoke(event)
            case ev.StopAsked():
                self.stopping, self.waiting = True, None
                self._leave(event.reason)
            case ev.BusDown() | ev.Tick():
                pass
        self._due()
        return self._out

    @property
    def wake_at(self) -> float | None:
        """When the work must be stopped or given up; None without work, or when only the end of a killed child is awaited."""
        if self.work is None or self.work.stage is Stage.KILLED:
            return None
        return self.work.close_at if self.work.stage is Stage.STOPPING else self.work.stop_at

    @property
    def owed(self) -> list[Offer]:
        """Updates to be offered: all of the outbox but those whose training may go on."""
        return [offer for xfer, offer in self.outbox.items() if xfer not in self.suspended]

    @property
    def wanted_model(self) -> str:
        """Digest of the model (or its prefix) that the work needs; "" when it needs none."""
        return self._level(self.work.plan).sha256 if self.work and self.work.plan.model else ""

    def check(self) -> None:
        """Assert what must hold between any two events."""
        ending = self.work is not None and self.work.stage in {Stage.STOPPING, Stage.KILLED}
        assert self.waiting is None or ending, "a plan waits for nothing"
        held = self.work is not None and self.work.stage is Stage.HELD
        assert not held or self.host in {"pause", "stop"}, "work is held for nothing"
        at = self.wake_at
        assert at is None or at > self._now, f"wake_at {at} is not after {self._now}"

    # ---------------------------------------------------------------------------------------------------- said again

    def _restate(self, *, birth: bool) -> None:
        if birth:
            self._out.append(act.SayBirth())
        if self.work:
            self._say(self.work.state, self.work.held)
        self._out.extend(act.OfferUpdate(offer=offer) for offer in self.owed)

    def _coordinator_seen(self, event: ev.CoordinatorSeen) -> None:
        if event.online and event.session != self.coordinator:
            known, self.coordinator = self.coordinator, event.session
            self.past.forget()
            self._restate(birth=bool(known))  # of the first one it is not known what it heard of the words at BusUp

    def _say(self, state: ExecState, reason: str = "", plan: Plan | Offer | None = None) -> None:
        self._serial += 1
        mine = plan is None
        plan = plan or (self.work.plan if self.work else None)
        assert plan is not None
        message = Execution(
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            serial=self._serial,
            state=state,
            reason=reason[:2000],
            surveyed=self.work.surveyed if mine and self.work else None,
            calibrated=self.work.calibrated if mine and self.work else None,
            evaluated=self.work.evaluated if mine and self.work else None,
            energy=self.work.energy if mine and self.work else None,
        )
        self._out.append(act.Say(message=message))

    # --------------------------------------------------------------------------------------------------------- plans

    def _plan_came(self, plan: Plan) -> None:
        if self.stopping:
            return  # it is given again at the next birth
        if self.past.is_stale(plan):
            return
        self._settle_suspended(plan)
        if self._is_at_work_on(plan):
            assert self.work is not None
            self.work.set_times(plan, self._now)
            self._say(self.work.state, self.work.held)
            if self.work.stage is Stage.FETCHING and plan.model and plan.model != self.work.plan.model:
                self.work.plan = plan  # its model now comes in chunks of another size
                self._fetch(plan)
            return
        if self._owes(plan):
            self._restate(birth=False)
            return
        if plan.method not in self.methods:
            self._say(
                ExecState.REJECTED, f"method {plan.method!r} is not allowed here: {', '.join(self.methods)}", plan
            )
            return
        if self.work:
            self.waiting, self._waiting_since = plan, self._now
            self._stop_work("superseded by a newer plan", discard=True)
            return
        self._begin(plan, self._now)

    def _settle_suspended(self, plan: Plan | None) -> None:
        """A training that was suspended goes on with its plan; with another, or none, what it brought so far is offered."""
        for xfer in sorted(self.suspended):
            offer = self.outbox[xfer]
            if plan and (plan.job, plan.round) == (offer.job, offer.round) and plan.stop_after_s > 0:
                del self.outbox[xfer]
                self._out.append(act.ForgetUpdate(xfer=xfer))
            else:
                self._out.append(act.OfferUpdate(offer=offer))
        self.suspended = set()

    def _is_at_work_on(self, plan: Plan) -> bool:
        work = self.work
        key = (plan.job, plan.round, plan.attempt)
        return work is not None and work.key == key and not work.unwanted and work.stage is not Stage.KILLED

    def _owes(self, plan: Plan) -> bool:
        """Whether the round of a plan is trained already, in whichever attempt."""
        return any((offer.job, offer.round) == (plan.job, plan.round) for offer in self.outbox.values())

    def _begin(self, plan: Plan, came_at: float) -> None:
        self.waiting = None
        if came_at + plan.stop_after_s <= self._now:
            self._say(ExecState.TIMED_OUT, "no time was left to begin", plan)
            return
        self.work = Work(plan, came_at)
        self._say(ExecState.ACCEPTED)
        if plan.model is None:
            self._run("")
            return
        self.work.state = ExecState.PREPARING
        self._say(ExecState.PREPARING)
        self._fetch(plan)

    def _fetch(self, plan: Plan) -> None:
        assert plan.model is not None
        level, how = self._level(plan), {"listen": plan.broadcast, "by_store": plan.by_store}
        self._out.append(act.FetchModel(blob=plan.model, size=level.size, sha256=level.sha256, **how))

    def _level(self, plan: Plan) -> Level:
        assert plan.model is not None
        whole = Level(rank=self.max_global_rank, size=plan.model.size, sha256=plan.model.sha256)
        fitting = [level for level in plan.model.levels if level.rank <= self.max_global_rank]
        return max(fitting, key=lambda level: level.rank, default=whole)

    def _run(self, model_sha256: str) -> None:
        """Begin, or wait until the host allows it; only a look at base and data needs nothing of the device."""
        assert self.work is not None
        work, plan = self.work, self.work.plan
        work.model_sha256 = model_sha256
        is_light = plan.purpose == "survey" and plan.calibration is None
        if self.host in {"pause", "stop"} and not is_light:
            work.stage, work.state = Stage.HELD, ExecState.PREPARING
            self._hold(work)
            return
        work.stage, work.held = Stage.RUNNING, ""
        self._out.append(act.StartChild(plan=plan, model_sha256=model_sha256, bytes_down=work.bytes_down))
        if self.host == "shrink":
            self._out.append(act.ShrinkChild(reason=self.host_reason))

    def _model(self, event: ev.ModelFetched | ev.ModelLost) -> None:
        work = self.work
        if work is None or work.stage is not Stage.FETCHING or work.plan.model is None:
            return
        if event.sha256 != self._level(work.plan).sha256:
            return
        if isinstance(event, ev.ModelLost):
            self._end(ExecState.FAILED, f"no model: {event.reason}")
            return
        work.bytes_down = event.n_bytes
        self._run(event.sha256)

    # --------------------------------------------------------------------------------------------------------- child

    def _child_moved(self, event: ev.ChildBegan | ev.ChildEvaluated | ev.ChildSurveyed | ev.ChildCalibrated) -> None:
        work = self.work
        if work is None or work.stage in {Stage.FETCHING, Stage.HELD, Stage.KILLED}:
            return
        match event:
            case ev.ChildBegan():
                training = event.phase == "training" or work.state is ExecState.TRAINING
                state = ExecState.TRAINING if training else ExecState.PREPARING
                if state is work.state:
                    return
                work.state = state
            case ev.ChildEvaluated():
                work.evaluated = event.result
            case ev.ChildSurveyed():
                work.surveyed = event.result
            case ev.ChildCalibrated():
                work.calibrated = event.result
                return  # the end of the survey follows at once and says it
        self._say(work.state, work.held)

    def _finished(self, event: ev.ChildFinished) -> None:
        work = self.work
        if work is None or work.stage in {Stage.FETCHING, Stage.HELD}:
            return
        work.energy = event.energy
        is_suspended = event.update is not None and event.update.stopped == SUSPENDED
        if work.unwanted and (is_suspended or not work.is_kept or event.update is None):
            if event.update is not None:
                self._out.append(act.ForgetUpdate(xfer=event.update.blob.xfer))
            self._end(ExecState.CANCELLED, work.unwanted)
        elif is_suspended:
            self.work = None  # the outbox on disk has it, for the next start
        elif event.update is not None:
            self.outbox[event.update.blob.xfer] = event.update
            self._out.append(act.OfferUpdate(offer=event.update))
            work.state = ExecState.UPLOADING
            self._end(ExecState.UPLOADING, "")
        elif work.plan.purpose == "train":
            self._end(ExecState.FAILED, f"no sample was trained: {event.stopped or 'the data set is empty'}")
        elif work.surveyed is None and work.evaluated is None:
            self._end(ExecState.FAILED, event.stopped or "the work brought no result")
        else:
            self._end(*work.lost(ExecState.DONE, event.stopped))

    def _failed(self, event: ev.ChildFailed) -> None:
        work = self.work
        if work is None or work.stage in {Stage.FETCHING, Stage.HELD}:
            return
        work.energy = event.energy
        self._end(*work.lost(ExecState.FAILED, event.reason))

    # ---------------------------------------------------------------------------------------------------------- host

    def _host_spoke(self, event: ev.HostSpoke) -> None:
        """Pass on what the host needs; a share that was stopped for it is over, one that is only held goes on later."""
        self.host, self.host_reason = event.level, event.reason
        work = self.work
        if event.level == "stop":
            if work and work.stage is Stage.RUNNING:
                self._stop_work(f"the host needs its memory: {event.reason}", discard=False)
            self._out.append(act.LetChildGo(reason=event.reason))
        if work is None:
            return
        match work.stage, event.level:
            case Stage.HELD, "run" | "shrink":
                self._run(work.model_sha256)
                self._say(work.state)
            case (Stage.HELD, _) | (Stage.RUNNING, "pause"):
                if work.stage is Stage.RUNNING:
                    self._out.append(act.PauseChild(reason=event.reason))
                self._hold(work)
            case Stage.RUNNING, "run" | "shrink":
                if event.level == "shrink":
                    self._out.append(act.ShrinkChild(reason=event.reason))
                if work.held:
                    work.held = ""
                    self._out.append(act.ResumeChild())
                    self._say(work.state)

    def _hold(self, work: Work) -> None:
        held, work.held = work.held, f"paused for the host: {self.host_reason}"
        if work.held != held:
            self._say(work.state, work.held)

    # --------------------------------------------------------------------------------------------------------- ends

    def _end(self, state: ExecState, reason: str) -> None:
        """The work is over here: say how, unless it was said when its child was killed or the share stays open, and begin what waits."""
        assert self.work is not None
        is_kept = (
            self.stopping and not self.work.unwanted and (reason or state in {ExecState.FAILED, ExecState.TIMED_OUT})
        )
        if self.work.stage is not Stage.KILLED and not is_kept:
            self._say(state, reason)
        self._next()

    def _leave(self, reason: str) -> None:
        """Go down with the share open: what is fetched stays, what runs is kept if it can be, and nothing is said of it."""
        work = self.work
        if work and work.stage in {Stage.FETCHING, Stage.HELD}:
            self.work = None
        elif work and work.stage is Stage.RUNNING:
            work.stage = Stage.STOPPING
            work.close_at = max(work.close_at, self._now + CHILD_GRACE_S)
            self._out.append(act.StopChild(reason=reason, suspend=True))

    def _next(self) -> None:
        self.work, plan = None, self.waiting
        if plan and self._owes(plan):  # kept when the round was put off, and offered with its end
            self.waiting = None
        elif plan:
            self._begin(plan, self._waiting_since)

    def _stop_work(self, reason: str, *, discard: bool) -> None:
        work, reason = self.work, reason or "not wanted any more"
        if work is None:
            return
        match work.stage:
            case Stage.FETCHING:
                assert work.plan.model is not None
                self._out.append(act.DropModel(blob=work.plan.model))
                self._end(
                    ExecState.CANCELLED if discard else ExecState.TIMED_OUT, f"{reason}, before the model was here"
                )
            case Stage.HELD:
                self._end(ExecState.CANCELLED if discard else ExecState.TIMED_OUT, f"{reason}, {work.held}")
            case Stage.RUNNING:
                work.stage = Stage.STOPPING
                work.unwanted = reason if discard else ""
                work.close_at = max(work.close_at, self._now + CHILD_GRACE_S)
                self._out.append(act.StopChild(reason=reason, suspend=work.is_kept))
            case Stage.STOPPING | Stage.KILLED:
                work.unwanted = work.unwanted or (reason if discard else "")

    def _cancel(self, event: ev.CancelCame) -> None:
        key = (event.job, event.round, event.attempt)
        if self.waiting and (self.waiting.job, self.waiting.round, self.waiting.attempt) == key:
            self.waiting = None
        if self.work and self.work.key == key:
            self.work.is_kept = event.keep and (self.work.is_kept or not self.work.unwanted)
            self._stop_work(event.reason, discard=True)

    def _due(self) -> None:
        """What time alone demands: hand over at stop_at, give up at close_at."""
        work = self.work
        if work is None:
            return
        if self._now >= work.close_at and work.stage is Stage.STOPPING:
            self._out.append(act.KillChild())
            work.stage = Stage.KILLED
            work.state, why = work.lost(ExecState.TIMED_OUT, "the training child did not stop in time")
            self._say(work.state, why)
        elif self._now >= work.stop_at and work.stage is not Stage.STOPPING:
            self._stop_work("deadline", discard=False)

    def _settled(self, xfer: str, state: ExecState, reason: str) -> None:
        offer = self.outbox.pop(xfer, None)
        self.suspended.discard(xfer)
        self._out.append(act.ForgetUpdate(xfer=xfer))
        if offer is not None:
            self._say(state, reason, offer)
