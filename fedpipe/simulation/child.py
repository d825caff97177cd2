"""The training child as a duration and a result: it opens, measures, trains, and at times dies, hangs or comes to nothing."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from typing import Final, NamedTuple

from agent.core import actions as act
from agent.core import events as ev
from agent.core.work import SUSPENDED
from fedpipe.simulation.clockwork import Clockwork, Life
from fedpipe.simulation.scenario import Faults
from protocol.messages import Blob, Calibrated, Evaluated, Matrix, Offer, Plan, Surveyed

MATRICES: Final = [Matrix(name="block.k", d_out=8, d_in=16), Matrix(name="block.q", d_out=8, d_in=8)]
UPDATE_BYTES: Final = 1000


class Traits(NamedTuple):
    """What one server is like."""

    name: str
    methods: list[str]
    base_sha256: str
    n_train: int
    step_s: float
    load_s: float
    upload_s: float
    download_s: float
    memory_bytes: int


class Child:
    """One run at a time; each ends in exactly one ChildFinished or ChildFailed, if its agent lives to hear it."""

    def __init__(
        self, traits: Traits, clockwork: Clockwork, life: Life, faults: Faults, say: Callable[[ev.Happened], None]
    ) -> None:
        self._traits, self._clockwork, self._life, self._faults, self._say = traits, clockwork, life, faults, say
        self._chance = clockwork.chance("children")
        self._run: act.StartChild | None = None
        self._turn = 0

    @property
    def is_busy(self) -> bool:
        """Whether it runs."""
        return self._run is not None

    def begin(self, wish: act.StartChild, *, boot: int) -> None:
        """Start a run."""
        assert self._run is None, f"{self._traits.name} shall train two things"
        self._run, self._boot = wish, boot
        self._phase, self._is_paused, self._is_hung = "loading", False, False
        self._samples_done, self._stop = 0, ""
        self._next(self._traits.load_s, self._loaded)
        if self._chance.random() < self._faults.child_death_ratio:
            self._is_hung = self._chance.random() < 0.3
            if not self._is_hung:
                self._clockwork.after(self._chance.uniform(0, 120), self._life, self._dies, wish)

    def _next(self, seconds: float, what: Callable[[], None]) -> None:
        self._turn += 1
        self._due, self._what = self._clockwork.now + seconds, what
        self._clockwork.after(seconds, self._life, self._comes, self._turn)

    def _comes(self, turn: int) -> None:
        if turn == self._turn and self._run is not None and not self._is_paused:
            self._what()

    def pause(self) -> None:
        """Hold it."""
        if self._run is not None and not self._is_paused:
            self._is_paused, self._left_s = True, max(0.0, self._due - self._clockwork.now)

    def resume(self) -> None:
        """Go on."""
        if self._run is not None and self._is_paused:
            self._is_paused = False
            self._next(self._left_s, self._what)

    def stop(self, *, suspend: bool = False) -> None:
        """Hand over, or keep, what there is after the present step; a hung child does not hear it."""
        if self._run is None:
            return
        if self._is_hung:
            self._turn += 1
            self._clockwork.faults["child hung"] += 1
            return
        self._stop, self._is_paused = SUSPENDED if suspend else "deadline", False
        plan = self._run.plan
        if self._phase == "training" and plan.train is not None:
            done_s = max(0.0, self._clockwork.now - self._began_at)
            n_steps = min(plan.train.n_steps, int(done_s / self._traits.step_s))
            self._samples_done = n_steps * plan.train.batch
        self._next(min(5.0, self._traits.step_s), self._trained if self._phase == "training" else self._nothing)

    def kill(self) -> None:
        """End it now."""
        self._turn += 1
        self._clockwork.after(0.2, self._life, self._dies, self._run)

    # ---------------------------------------------------------------------------------------------------- its course

    def _loaded(self) -> None:
        assert self._run is not None
        plan = self._run.plan
        if plan.purpose == "survey":
            traits = self._traits
            found = Surveyed(base_sha256=traits.base_sha256, matrices=MATRICES, n_train=traits.n_train, n_eval=2)
            self._say(ev.ChildSurveyed(result=found))
            self._next(30.0 if plan.calibration else 0.0, self._calibrated)
            return
        if plan.evaluate is not None:
            self._say(ev.ChildEvaluated(result=Evaluated(version=plan.version, n_samples=2, n_tokens=64, loss=2.0)))
        if plan.train is None:
            self._end(ev.ChildFinished(samples=0, loss=None, train_s=0.0, stopped=self._stop, update=None))
            return
        self._phase, self._began_at = "training", self._clockwork.now
        self._say(ev.ChildBegan(phase="training"))
        self._samples_done = plan.train.n_steps * plan.train.batch
        self._next(plan.train.n_steps * self._traits.step_s * self._chance.uniform(0.8, 1.3), self._trained)

    def _calibrated(self) -> None:
        assert self._run is not None
        if self._run.plan.calibration is not None:
            scores = array("f", [1.0] * len(MATRICES)).tobytes()
            self._say(ev.ChildCalibrated(result=Calibrated(device="cpu", probe_rank=1, scores=scores)))
        self._nothing()

    def _nothing(self) -> None:
        if self._stop == SUSPENDED:
            self._end(ev.ChildFailed(reason=SUSPENDED))
            return
        self._end(ev.ChildFinished(samples=0, loss=None, train_s=0.0, stopped=self._stop, update=None))

    def _trained(self) -> None:
        assert self._run is not None
        plan, n = self._run.plan, self._samples_done
        if plan.train is None or n == 0:
            self._nothing()
            return
        took_s = self._clockwork.now - self._began_at
        update = Offer(
            job=plan.job,
            round=plan.round,
            attempt=plan.attempt,
            kind="lora",
            blob=Blob(sha256=self._digest(plan, n), size=UPDATE_BYTES),
            samples=n,
            loss=2.0,
            train_s=took_s,
            steps=n // plan.train.batch,
            peak_bytes=plan.predicted_bytes,
            stopped=self._stop,
        )
        self._end(ev.ChildFinished(samples=n, loss=2.0, train_s=took_s, stopped=self._stop, update=update))

    def _digest(self, plan: Plan, n: int) -> str:
        """Of an update: another run of the same share brings other bytes."""
        assert self._run is not None
        text = f"{plan.job}/{plan.round}/{plan.attempt}/{self._traits.name}/{self._run.model_sha256}/{n}/{self._boot}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _dies(self, run: act.StartChild | None) -> None:
        if run is not None and self._run is run:
            self._clockwork.faults["child died"] += 1
            self._end(ev.ChildFailed(reason="died: SIGKILL"))

    def _end(self, event: ev.ChildFinished | ev.ChildFailed) -> None:
        self._turn += 1
        self._run = None
        self._say(event)
