"""Laws of the agent's core: whatever comes in whatever order, these hold.

The machine plays a coordinator that plans, repeats, cancels and changes its mind, a model that comes or not, and a child that
obeys, dies or never answers.  It keeps its own account of the child and of the outbox, so the core is not asked to judge itself.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from agent.core.work import SUSPENDED
from protocol.messages import (
    TERMINAL,
    Base,
    Blob,
    Calibrated,
    Evaluated,
    ExecState,
    Level,
    Matrix,
    Offer,
    Plan,
    Surveyed,
)

T0 = 1_750_000_000.0
T = TypeVar("T")
Key = tuple[str, int, int]

MODELS = [
    Blob(
        sha256=f"{n:064x}", size=500, levels=[Level(rank=r, size=100 * r + 100, sha256=f"{n}{r:063x}") for r in (0, 4)]
    )
    for n in (1, 2)
]
EVALUATED = Evaluated(version=1, n_samples=1, n_tokens=9, loss=1.0)
CALIBRATED = Calibrated(device="cpu", probe_rank=1, scores=b"\0\0\0\0")
SURVEYED = Surveyed(base_sha256="b" * 64, matrices=[Matrix(name="q", d_out=8, d_in=8)], n_train=9, n_eval=1)
AFTER = {  # what may be said of a share after what
    ExecState.ACCEPTED: set(ExecState) - {ExecState.OFFERED, ExecState.REJECTED, ExecState.SUPERSEDED},
    ExecState.PREPARING: set(ExecState)
    - {ExecState.OFFERED, ExecState.REJECTED, ExecState.SUPERSEDED, ExecState.ACCEPTED},
    ExecState.TRAINING: TERMINAL - {ExecState.REJECTED, ExecState.SUPERSEDED}
    | {ExecState.TRAINING, ExecState.UPLOADING},
    ExecState.UPLOADING: {ExecState.DONE, ExecState.FAILED, ExecState.SUPERSEDED},
}


def _plan(**said: Any) -> Plan:
    """One share is always planned for the same method."""
    return Plan(**said, method="exotic" if (said["job"], said["round"]) == ("y", 2) else "qlora")


plans = st.builds(
    _plan,
    job=st.sampled_from(["x", "y"]),
    round=st.integers(0, 2),
    attempt=st.integers(0, 1),
    purpose=st.sampled_from(["survey", "train", "train", "train", "evaluate"]),
    base=st.just(Base(source="toy")),
    model=st.none() | st.sampled_from(MODELS),
    issued_at=st.just(T0),
    stop_after_s=st.sampled_from([0.0, 10.0, 100.0, 100.0, 100.0]),
    ttl_s=st.sampled_from([0.0, 20.0, 120.0]),
)


def key_of(said: object) -> Key:
    return said.job, said.round, said.attempt  # type: ignore[attr-defined]


class World(RuleBasedStateMachine):
    """Random events; `busy`, `owed` and `states` are what an observer of the wishes knows."""

    def __init__(self) -> None:
        super().__init__()
        self.now = T0
        self.plans: list[Plan] = []
        self.wanted: list[act.FetchModel] = []
        self.fetched: set[str] = set()
        self.busy: act.StartChild | None = None
        self.told_to_stop = self.killed = self.paused = False
        self.owed: dict[str, Offer] = {}
        self.silent: set[str] = set()  # suspended, and nothing has shown yet that it does not go on
        self.xfers: list[str] = ["f" * 32]
        self.states: dict[Key, ExecState] = {}
        self.serial = self.tag = 0
        self.stopped = False

    @initialize(n_owed=st.integers(0, 2), is_suspended=st.booleans())
    def begin(self, n_owed: int, is_suspended: bool) -> None:
        for number in range(n_owed):
            offer = self._update(("x", number + 1, 0))
            if is_suspended and number == n_owed - 1:
                offer = msgspec.structs.replace(offer, stopped=SUSPENDED)
                self.silent.add(offer.blob.xfer)
            self.owed[offer.blob.xfer] = offer
        self.session = Session(["qlora"], list(self.owed.values()), max_global_rank=8)

    def _update(self, key: Key) -> Offer:
        self.tag += 1
        blob = Blob(sha256=f"{self.tag:032x}" + "0" * 32, size=9)
        self.xfers.append(blob.xfer)
        return Offer(job=key[0], round=key[1], attempt=key[2], kind="lora", blob=blob, samples=3)

    # -------------------------------------------------------------------------------------------- one door, all laws

    def feed(self, event_: ev.Happened) -> list[act.Wish]:
        wishes = self.session.handle(event_, self.now)
        for wish in wishes:
            self._observe(event_, wish)
        return wishes

    def _observe(self, event_: ev.Happened, wish: act.Wish) -> None:
        match wish:
            case act.StartChild():
                assert self.busy is None, "two runs of one child"
                assert not self.stopped, "work is begun on the way down"
                assert wish.plan in self.plans
                assert bool(wish.model_sha256) == (wish.plan.model is not None)
                assert not wish.model_sha256 or wish.model_sha256 in self.fetched
                is_light = wish.plan.purpose == "survey"  # none of these is to be calibrated
                assert self.session.host in {"run", "shrink"} or is_light, "begun while the host needs the device"
                self.busy, self.told_to_stop, self.killed, self.paused = wish, False, False, False
            case act.StopChild():
                assert self.busy, "nothing runs"
                assert not self.told_to_stop, "told twice"
                self.told_to_stop = True
            case act.PauseChild() | act.ShrinkChild():
                assert self.busy, "nothing runs"
                assert not self.told_to_stop, "it ends already"
                self.paused = self.paused or isinstance(wish, act.PauseChild)
            case act.ResumeChild():
                assert self.busy, "nothing runs"
                assert self.paused, "nothing to resume"
                self.paused = False
            case act.KillChild():
                assert self.busy, "nothing runs"
                assert self.told_to_stop, "killed without having been asked to stop"
                assert not self.killed, "killed twice"
                self.killed = True
            case act.FetchModel():
                self.wanted.append(wish)
            case act.OfferUpdate(offer=offer):
                self.owed[offer.blob.xfer] = offer
                assert offer.blob.xfer not in self.silent or isinstance(event_, ev.PlanCame | ev.NothingPlanned)
                self.silent.discard(offer.blob.xfer)
            case act.ForgetUpdate(xfer=xfer):
                settled = isinstance(event_, ev.UpdateAccepted | ev.UpdateDeclined) and event_.xfer == xfer
                assert settled or xfer not in self.owed or self._goes_on(event_, self.owed[xfer]), "an update is lost"
                self.owed.pop(xfer, None)
                self.silent.discard(xfer)
            case act.Say(message=message):
                assert message.serial > self.serial, "serials grow"
                self.serial = message.serial
                self._moves(key_of(message), message.state)
            case _:
                pass

    @staticmethod
    def _goes_on(event_: ev.Happened, offer: Offer) -> bool:
        """Whether the training behind a suspended update is asked for again."""
        asked = isinstance(event_, ev.PlanCame) and (event_.plan.job, event_.plan.round) == (offer.job, offer.round)
        return asked and offer.stopped == SUSPENDED

    def _moves(self, key: Key, state: ExecState) -> None:
        before = self.states.get(key)
        if before in AFTER:
            assert state in AFTER[before], f"{key}: {before} -> {state}"
        else:
            assert state in TERMINAL | {ExecState.ACCEPTED}, f"{key}: begins with {state}"
        self.states[key] = state

    @invariant()
    def holds(self) -> None:
        self.session.check()
        assert set(self.session.outbox) == set(self.owed)
        work = self.session.work
        assert work is not None or self.busy is None, "a run that nobody waits for"
        if self.busy and not self.told_to_stop:
            needed = self.session.host == "pause"
            assert self.paused == needed or self.busy.plan.purpose == "survey", "paused exactly while the host needs it"
        if work is not None:
            assert key_of(work.plan) in self.states
        elif self.stopped:
            assert self.session.wake_at is None

    # ---------------------------------------------------------------------------------------------------- coordinator

    @rule()
    def nothing_planned(self) -> None:
        self.feed(ev.NothingPlanned())

    @rule(plan=plans)
    def plan(self, plan: Plan) -> None:
        self._give(plan)

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def plan_again(self, data: st.DataObject) -> None:
        self._give(self._any(data, self.plans))

    def _give(self, plan: Plan) -> None:
        self.plans.append(plan)
        wishes = self.feed(ev.PlanCame(plan=plan))
        said = any(isinstance(w, act.Say) and key_of(w.message) == key_of(plan) for w in wishes)
        offered = any(
            isinstance(w, act.OfferUpdate) and (w.offer.job, w.offer.round) == key_of(plan)[:2] for w in wishes
        )
        waits = self.session.waiting == plan
        assert self.stopped or said + offered + waits == 1, f"a plan is answered once: {wishes}"

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), reason=st.sampled_from(["", "enough others"]), keep=st.booleans())
    def cancel(self, data: st.DataObject, reason: str, *, keep: bool) -> None:
        job, number, attempt = key_of(self._any(data, self.plans))
        self.feed(ev.CancelCame(job=job, round=number, attempt=attempt, reason=reason, keep=keep))

    @rule(data=st.data(), reason=st.sampled_from(["", "superseded: late", "bad update: NaN"]))
    def answer(self, data: st.DataObject, reason: str) -> None:
        xfer = self._any(data, self.xfers)
        self.feed(ev.UpdateDeclined(xfer=xfer, reason=reason) if reason else ev.UpdateAccepted(xfer=xfer))
        assert xfer not in self.session.outbox

    @rule(session=st.sampled_from("abc"), online=st.booleans())
    def coordinator(self, session: str, *, online: bool) -> None:
        news = online and session * 16 != self.session.coordinator
        wishes = self.feed(ev.CoordinatorSeen(session=session * 16, online=online))
        self._offers_everything(wishes, anything=news)

    @rule()
    def bus_up(self) -> None:
        self._offers_everything(self.feed(ev.BusUp()), anything=True)

    @rule()
    def rebirth(self) -> None:
        self._offers_everything(self.feed(ev.RebirthAsked()), anything=True)

    def _offers_everything(self, wishes: list[act.Wish], *, anything: bool) -> None:
        offered = {w.offer.blob.xfer for w in wishes if isinstance(w, act.OfferUpdate)}
        assert offered == (set(self.owed) - self.silent if anything else set())

    @rule()
    def bus_down(self) -> None:
        assert self.feed(ev.BusDown(reason="cut")) == []

    # ---------------------------------------------------------------------------------------------------------- world

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), lost=st.sampled_from([False, False, True]))
    def model(self, data: st.DataObject, *, lost: bool) -> None:
        """Any model that was ever wished for comes or is lost, perhaps much later."""
        sha256 = self._any(data, self.wanted).sha256
        if lost:
            self.feed(ev.ModelLost(sha256=sha256, reason="no disk"))
        else:
            self.fetched.add(sha256)
            self.feed(ev.ModelFetched(sha256=sha256, n_bytes=9))

    @rule(
        said=st.sampled_from(
            [
                ev.ChildBegan(phase="loading"),
                ev.ChildBegan(phase="evaluating"),
                ev.ChildBegan(phase="training"),
                ev.ChildEvaluated(result=EVALUATED),
                ev.ChildSurveyed(result=SURVEYED),
                ev.ChildCalibrated(result=CALIBRATED),
            ]
        )
    )
    def child_speaks(self, said: ev.Happened) -> None:
        if self.busy:
            self.feed(said)

    @precondition(lambda self: self.busy)
    @rule(n_samples=st.sampled_from([0, 3, 3, 3]))
    def child_finishes(self, n_samples: int) -> None:
        assert self.busy
        plan, self.busy = self.busy.plan, None
        update = self._update(key_of(plan)) if n_samples and plan.purpose == "train" else None
        told = self.told_to_stop
        stopped = "told to" if told else ""
        wishes = self.feed(ev.ChildFinished(samples=n_samples, loss=1.0, train_s=1.0, stopped=stopped, update=update))
        if update:
            kept = [w for w in wishes if isinstance(w, act.OfferUpdate) and w.offer == update]
            thrown = [w for w in wishes if isinstance(w, act.ForgetUpdate) and w.xfer == update.blob.xfer]
            assert len(kept) + len(thrown) == 1, "neither offered nor thrown away"
            assert kept or told, "good work is thrown away"
            event("offered" if kept else "thrown away")

    @precondition(lambda self: self.busy)
    @rule()
    def child_fails(self) -> None:
        self.busy = None
        self.feed(ev.ChildFailed(reason="died"))

    @rule(level=st.sampled_from(["run", "run", "shrink", "pause", "pause", "stop"]))
    def host(self, level: ev.Level) -> None:
        wishes = self.feed(ev.HostSpoke(level=level, reason="" if level == "run" else "services"))
        assert level != "stop" or act.LetChildGo(reason="services") in wishes
        assert level != "stop" or not self.busy or self.told_to_stop, "memory is needed and still held"

    @rule(whim=st.integers(0, 19))
    def stop(self, whim: int) -> None:
        if whim == 19:
            self.stopped = True
            self.feed(ev.StopAsked(reason="stopping"))

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 45.0, 1000.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.feed(ev.Tick())

    @precondition(lambda self: self.session.wake_at is not None)
    @rule()
    def sleep(self) -> None:
        due = self.session.wake_at
        assert due is not None
        assert due > self.now, "nothing would move this on"
        self.now = due
        self.feed(ev.Tick())

    def _any(self, data: st.DataObject, items: list[T]) -> T:
        """Mostly the latest, at times any."""
        back = data.draw(st.integers(0, min(len(items) - 1, 2)) | st.integers(0, len(items) - 1))
        return items[len(items) - 1 - back]

    # -------------------------------------------------------------------------------------------------------- the end

    def teardown(self) -> None:
        """With no word from anybody, time and a child that can be killed bring every work to an end, and lose no update."""
        if not hasattr(self, "session"):
            return
        owed = set(self.owed)
        for _ in range(10):
            if self.killed and self.busy:
                self.child_fails()
            elif self.session.wake_at is not None:
                self.sleep()
            self.holds()
        assert self.session.work is None
        assert self.session.waiting is None
        assert self.session.wake_at is None
        assert self.busy is None
        assert owed <= set(self.owed)


def test_laws() -> None:
    run_state_machine_as_test(World, settings=settings(max_examples=200, stateful_step_count=40))
