"""Transcripts of an agent's work: events in, actions out, one story each.  Times are seconds after the start of the story."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from agent.core import actions as act
from agent.core import events as ev
from agent.core.session import Session
from agent.core.work import CHILD_GRACE_S, SUSPENDED
from protocol.messages import (
    Base,
    Blob,
    Calibrated,
    Calibration,
    Energy,
    Evaluated,
    ExecState,
    Level,
    Matrix,
    Offer,
    Plan,
    Surveyed,
    Training,
)

T0 = 1_750_000_000.0
CALIBRATED = Calibrated(device="cpu", probe_rank=1, scores=b"\0\0\0\0")
SURVEYED = Surveyed(base_sha256="b" * 64, matrices=[Matrix(name="q", d_out=8, d_in=8)], n_train=90, n_eval=10)
EVALUATED = Evaluated(version=1, n_samples=10, n_tokens=320, loss=2.5)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


MODEL = Blob(
    sha256=sha("model"),
    size=5000,
    levels=[Level(rank=r, size=1000 * (r + 1), sha256=sha(f"model {r}")) for r in range(5)],
)


def a_plan(**changes: Any) -> Plan:
    """A share of training in round 1 with 100 s to train and 20 s more to hand over."""
    said = {
        "job": "j",
        "round": 1,
        "attempt": 0,
        "purpose": "train",
        "method": "qlora",
        "base": Base(source="toy"),
        "train": Training(n_steps=4),
        "issued_at": T0,
        "stop_after_s": 100.0,
        "ttl_s": 120.0,
    }
    return Plan(**said | changes)


def an_offer(plan: Plan, *, samples: int = 7, tag: str = "") -> Offer:
    blob = Blob(sha256=sha(f"{plan.job}/{plan.round}/{plan.attempt}/{tag}"), size=100)
    return Offer(job=plan.job, round=plan.round, attempt=plan.attempt, kind="lora", blob=blob, samples=samples)


def host(level: ev.Level, reason: str = "") -> ev.HostSpoke:
    return ev.HostSpoke(level=level, reason=reason)


class Play:
    """One story.  Every verb feeds one event; `wishes` holds what the last one brought; the invariants are checked."""

    def __init__(self, *outbox: Offer, methods: tuple[str, ...] = ("qlora",), **limits: int) -> None:
        self.session = Session(list(methods), list(outbox), **limits)
        self.now = T0
        self.wishes: list[act.Wish] = []
        self.said: list[ExecState] = []
        self.serial = 0

    def at(self, seconds: float) -> Play:
        assert self.now <= T0 + seconds, "time runs forward"
        self.now = T0 + seconds
        return self

    def feed(self, event: ev.Happened) -> Play:
        self.wishes = self.session.handle(event, self.now)
        self.session.check()
        for wish in self.wishes:
            if isinstance(wish, act.Say):
                assert wish.message.serial > self.serial, "serials grow"
                self.serial = wish.message.serial
                self.said.append(wish.message.state)
        return self

    def tick(self) -> Play:
        """Let time alone pass, up to what is due next."""
        due = self.session.wake_at
        assert due is not None
        self.now = due
        return self.feed(ev.Tick())

    def plan(self, **changes: Any) -> Play:
        return self.feed(ev.PlanCame(plan=a_plan(**changes)))

    def fetched(self, sha256: str = MODEL.sha256, n_bytes: int = 5000) -> Play:
        return self.feed(ev.ModelFetched(sha256=sha256, n_bytes=n_bytes))

    def began(self, phase: str) -> Play:
        return self.feed(ev.ChildBegan(phase=phase))

    def finished(self, update: Offer | None = None, stopped: str = "") -> Play:
        samples = update.samples if update else 0
        return self.feed(ev.ChildFinished(samples=samples, loss=2.0, train_s=9.0, stopped=stopped, update=update))

    def failed(self, reason: str) -> Play:
        return self.feed(ev.ChildFailed(reason=reason))

    def cancel(
        self, job: str = "j", number: int = 1, attempt: int = 0, reason: str = "not needed", *, keep: bool = False
    ) -> Play:
        return self.feed(ev.CancelCame(job=job, round=number, attempt=attempt, reason=reason, keep=keep))

    def brings(self, *kinds: type[act.Action]) -> Play:
        """The last event brought exactly wishes of these kinds, in this order."""
        assert [type(w) for w in self.wishes] == list(kinds)
        return self

    def wish(self, kind: type[act.Action], **fields: object) -> Any:
        """The one wish of this kind that the last event brought, with these fields."""
        (found,) = [w for w in self.wishes if type(w) is kind]
        for name, value in fields.items():
            assert getattr(found, name) == value
        return found

    def says(self, state: ExecState, **fields: object) -> Play:
        """The last event brought this transition, among others."""
        found = [w.message for w in self.wishes if isinstance(w, act.Say) and w.message.state is state]
        assert found, f"{state} not among {self.wishes}"
        for name, value in fields.items():
            assert getattr(found[-1], name) == value
        return self

    def idle(self) -> Play:
        assert self.session.work is None
        assert self.session.waiting is None
        assert self.session.wake_at is None
        return self


# ------------------------------------------------------------------------------------------------------- the good day


def test_a_survey_is_answered_with_what_the_child_found() -> None:
    play = Play().plan(round=0, purpose="survey", train=None)
    play.brings(act.Say, act.StartChild).says(ExecState.ACCEPTED)
    play.wish(act.StartChild, model_sha256="", bytes_down=0)
    play.began("loading").says(ExecState.PREPARING)
    play.feed(ev.ChildSurveyed(result=SURVEYED)).says(ExecState.PREPARING, surveyed=SURVEYED)
    play.finished().brings(act.Say).says(ExecState.DONE, round=0, surveyed=SURVEYED)
    play.idle()


def test_a_survey_that_calibrates_brings_both_with_its_last_word() -> None:
    play = Play().plan(round=0, purpose="survey", train=None, calibration=Calibration())
    play.began("loading").feed(ev.ChildSurveyed(result=SURVEYED)).says(ExecState.PREPARING, calibrated=None)
    play.began("calibrating").brings()
    play.feed(ev.ChildCalibrated(result=CALIBRATED)).brings()
    play.finished().brings(act.Say)
    play.says(ExecState.DONE, surveyed=SURVEYED, calibrated=CALIBRATED, reason="").idle()


def test_a_calibration_that_fails_does_not_fail_its_survey() -> None:
    def surveyed() -> Play:
        play = Play().plan(round=0, purpose="survey", train=None, calibration=Calibration())
        return play.began("loading").feed(ev.ChildSurveyed(result=SURVEYED)).began("calibrating")

    play = surveyed().finished(stopped="nf4: out_of_memory")
    play.says(ExecState.DONE, surveyed=SURVEYED, calibrated=None, reason="not calibrated: nf4: out_of_memory").idle()
    play = surveyed().failed("died: SIGKILL (out of memory?)")
    play.says(ExecState.DONE, surveyed=SURVEYED, reason="not calibrated: died: SIGKILL (out of memory?)").idle()
    play = surveyed().tick().tick()
    play.brings(act.KillChild, act.Say).says(
        ExecState.DONE, surveyed=SURVEYED, reason="not calibrated: the training child did not stop in time"
    )
    play.failed("died").brings().idle()
    play = Play().plan(round=0, purpose="survey", train=None, calibration=Calibration()).began("loading")
    play.failed("bad_config: no such base").says(ExecState.FAILED, reason="bad_config: no such base").idle()


def test_the_first_round_trains_without_a_model() -> None:
    plan = a_plan()
    update = an_offer(plan)
    play = Play().plan().brings(act.Say, act.StartChild)
    play.wish(act.StartChild, plan=plan, model_sha256="")
    play.began("loading").began("training").says(ExecState.TRAINING)
    play.finished(update).brings(act.OfferUpdate, act.Say).says(ExecState.UPLOADING)
    play.wish(act.OfferUpdate, offer=update)
    play.idle()
    play.feed(ev.UpdateAccepted(xfer=update.blob.xfer)).brings(act.ForgetUpdate, act.Say).says(ExecState.DONE, round=1)
    assert not play.session.outbox
    assert play.said == [ExecState(s) for s in ("ACCEPTED", "PREPARING", "TRAINING", "UPLOADING", "DONE")]


def test_a_later_round_fetches_the_model_evaluates_it_and_trains() -> None:
    play = Play().plan(round=2, version=1, model=MODEL).brings(act.Say, act.Say, act.FetchModel)
    play.says(ExecState.PREPARING)
    play.wish(act.FetchModel, blob=MODEL, size=5000, sha256=MODEL.levels[4].sha256)
    assert play.session.wanted_model == MODEL.levels[4].sha256
    play.fetched("c" * 64).brings()
    play.at(30.0).fetched(MODEL.levels[4].sha256).brings(act.StartChild)
    play.wish(act.StartChild, model_sha256=MODEL.levels[4].sha256, bytes_down=5000)
    play.began("evaluating").brings()
    play.feed(ev.ChildEvaluated(result=EVALUATED)).says(ExecState.PREPARING, evaluated=EVALUATED)
    play.began("training").says(ExecState.TRAINING, evaluated=EVALUATED)
    play.finished(an_offer(a_plan(round=2))).says(ExecState.UPLOADING, round=2, evaluated=EVALUATED)


@pytest.mark.parametrize(("rank", "level"), [(1024, 4), (4, 4), (3, 3), (1, 1)])
def test_a_small_agent_takes_the_prefix_that_it_may_hold(rank: int, level: int) -> None:
    wanted = MODEL.levels[level]
    play = Play(max_global_rank=rank).plan(model=MODEL)
    play.wish(act.FetchModel, blob=MODEL, size=wanted.size, sha256=wanted.sha256)
    play.fetched(wanted.sha256, wanted.size).wish(act.StartChild, model_sha256=wanted.sha256, bytes_down=wanted.size)


def test_a_model_without_levels_is_taken_whole() -> None:
    whole = msgspec.structs.replace(MODEL, levels=[])
    Play(max_global_rank=1).plan(model=whole).wish(act.FetchModel, size=5000, sha256=MODEL.sha256)


def test_a_last_round_only_evaluates() -> None:
    play = Play().plan(round=3, purpose="evaluate", train=None, model=MODEL).fetched(MODEL.levels[4].sha256)
    play.began("evaluating").feed(ev.ChildEvaluated(result=EVALUATED))
    play.finished().brings(act.Say).says(ExecState.DONE, evaluated=EVALUATED)
    play.idle()


# ---------------------------------------------------------------------------------------------------------- deadlines


def test_at_the_deadline_the_child_hands_over_what_it_has() -> None:
    play = Play().plan().began("training")
    assert play.session.wake_at == T0 + 100.0
    play.tick().brings(act.StopChild).wish(act.StopChild, reason="deadline")
    assert play.session.wake_at == T0 + 120.0
    update = an_offer(a_plan(), samples=3)
    play.at(104.0).finished(update, stopped="deadline").wish(act.OfferUpdate, offer=update)
    assert play.session.outbox[update.blob.xfer].samples == 3
    play.idle()


def test_a_child_that_does_not_stop_is_killed_and_its_end_awaited() -> None:
    play = Play().plan().began("training").tick()
    play.tick().brings(act.KillChild, act.Say).says(
        ExecState.TIMED_OUT, reason="the training child did not stop in time"
    )
    assert play.now == T0 + 120.0
    assert play.session.wake_at is None
    play.plan(round=2).brings()
    play.failed("died: SIGKILL").brings(act.Say, act.StartChild).says(ExecState.ACCEPTED, round=2)
    play.finished(an_offer(a_plan(round=2))).says(ExecState.UPLOADING, round=2)


def test_an_update_that_was_finished_while_it_was_killed_is_offered() -> None:
    play = Play().plan().tick().tick().began("training").brings()
    play.finished(an_offer(a_plan())).brings(act.OfferUpdate)
    play.idle()


def test_a_child_gets_its_grace_even_when_the_clock_jumped() -> None:
    play = Play().plan().began("training").at(5000.0).feed(ev.Tick()).brings(act.StopChild)
    assert play.session.wake_at == T0 + 5000.0 + CHILD_GRACE_S
    play.tick().brings(act.KillChild, act.Say)


def test_a_model_that_does_not_come_in_time_ends_the_work() -> None:
    play = Play().plan(model=MODEL).tick().brings(act.DropModel, act.Say)
    play.says(ExecState.TIMED_OUT, reason="deadline, before the model was here")
    play.idle()
    play.fetched(MODEL.levels[4].sha256).brings()


def test_a_plan_without_any_time_left_is_not_begun() -> None:
    play = Play().plan(stop_after_s=0.0, ttl_s=15.0).brings(act.Say)
    play.says(ExecState.TIMED_OUT, reason="no time was left to begin")
    play.idle()


def test_the_same_plan_again_only_moves_the_times() -> None:
    play = Play().plan().began("training").at(50.0)
    play.plan(stop_after_s=30.0, ttl_s=45.0).brings(act.Say).says(ExecState.TRAINING)
    assert play.session.wake_at == T0 + 80.0
    play.tick().brings(act.StopChild)
    assert play.session.wake_at == T0 + 95.0
    play.plan(stop_after_s=30.0, ttl_s=45.0).brings(act.Say)
    assert play.session.wake_at == T0 + 125.0, "it is stopping already, but it has longer for that"


def test_the_same_plan_with_its_model_in_smaller_chunks_is_fetched_so() -> None:
    """The broker came back with a smaller limit: what is asked for by the old numbers would never fit."""
    smaller = msgspec.structs.replace(MODEL, chunk=MODEL.chunk // 2)
    play = Play().plan(round=2, version=1, model=MODEL)
    play.plan(round=2, version=1, model=MODEL).brings(act.Say)
    play.plan(round=2, version=1, model=smaller).brings(act.Say, act.FetchModel).wish(act.FetchModel, blob=smaller)
    play.fetched(MODEL.levels[4].sha256).wish(act.StartChild)


def test_the_same_plan_with_no_time_left_stops_the_work() -> None:
    Play().plan().at(60.0).plan(stop_after_s=0.0, ttl_s=9.0).brings(act.Say, act.StopChild)


# ------------------------------------------------------------------------------------------------------------ cancels


def test_a_cancel_while_fetching_drops_the_model() -> None:
    play = Play().plan(model=MODEL).cancel().brings(act.DropModel, act.Say)
    play.wish(act.DropModel, blob=MODEL)
    play.says(ExecState.CANCELLED, reason="not needed, before the model was here")
    play.idle()


@pytest.mark.parametrize("reason", ["not needed", ""])
def test_a_cancel_while_running_throws_the_work_away(reason: str) -> None:
    update = an_offer(a_plan())
    play = Play().plan().began("training").cancel(reason=reason).brings(act.StopChild)
    play.wish(act.StopChild, reason=reason or "not wanted any more")
    play.finished(update, stopped=reason).brings(act.ForgetUpdate, act.Say).says(ExecState.CANCELLED)
    play.wish(act.ForgetUpdate, xfer=update.blob.xfer)
    assert not play.session.outbox
    play.idle()


def test_a_cancel_after_the_deadline_still_throws_the_work_away() -> None:
    play = Play().plan().tick().cancel().brings()
    play.finished(an_offer(a_plan())).brings(act.ForgetUpdate, act.Say).says(ExecState.CANCELLED, reason="not needed")


def test_a_cancelled_child_that_dies_was_cancelled() -> None:
    Play().plan().cancel().failed("died: SIGTERM").says(ExecState.CANCELLED, reason="not needed")


def test_a_cancelled_child_that_does_not_stop_is_killed() -> None:
    play = Play().plan().cancel()
    play.tick().brings(act.KillChild, act.Say).says(ExecState.CANCELLED, reason="not needed")
    play.failed("died: SIGKILL").brings()
    play.idle()


def test_a_cancel_while_uploading_leaves_the_answer_to_the_coordinator() -> None:
    update = an_offer(a_plan())
    play = Play().plan().finished(update).cancel().brings()
    assert update.blob.xfer in play.session.outbox
    declined = ev.UpdateDeclined(xfer=update.blob.xfer, reason="superseded: enough others answered first")
    play.feed(declined).brings(act.ForgetUpdate, act.Say).says(ExecState.SUPERSEDED, reason=declined.reason)
    assert not play.session.outbox


def test_a_cancel_of_something_else_changes_nothing() -> None:
    play = Play().plan().began("training")
    play.cancel(attempt=1).brings().cancel(number=2).brings().cancel(job="k").brings()


# ------------------------------------------------------------------------------------------------------ one after another


def test_a_new_plan_waits_for_the_end_of_the_child() -> None:
    play = Play().plan().began("training").at(10.0).plan(round=2).brings(act.StopChild)
    play.wish(act.StopChild, reason="superseded by a newer plan")
    play.at(40.0).finished(an_offer(a_plan())).brings(act.ForgetUpdate, act.Say, act.Say, act.StartChild)
    play.says(ExecState.CANCELLED, round=1).says(ExecState.ACCEPTED, round=2)
    play.wish(act.StartChild, plan=a_plan(round=2))
    assert play.session.wake_at == T0 + 110.0, "its time ran while it waited"


def test_a_plan_that_waited_too_long_is_not_begun() -> None:
    play = Play().plan().plan(round=2, stop_after_s=5.0, ttl_s=9.0).at(6.0).failed("died: SIGTERM")
    play.says(ExecState.TIMED_OUT, round=2, reason="no time was left to begin")
    play.idle()


def test_a_new_plan_replaces_a_model_that_is_still_coming() -> None:
    play = Play().plan(model=MODEL).plan(round=2)
    play.brings(act.DropModel, act.Say, act.Say, act.StartChild).says(ExecState.CANCELLED, round=1)
    play.says(ExecState.ACCEPTED, round=2)


def test_only_the_newest_plan_waits() -> None:
    play = Play().plan().plan(round=2).brings(act.StopChild).plan(round=3).brings()
    play.failed("died: SIGTERM").says(ExecState.ACCEPTED, round=3)


def test_a_waiting_plan_can_be_cancelled() -> None:
    play = Play().plan().plan(round=2).cancel(number=2, attempt=1).brings()
    assert play.session.waiting is not None
    play.cancel(number=2).brings().finished().says(ExecState.CANCELLED, round=1)
    play.idle()


def test_what_was_cancelled_and_is_planned_again_is_done_again() -> None:
    play = Play().plan().cancel().plan().brings().failed("died: SIGTERM")
    play.brings(act.Say, act.Say, act.StartChild).says(ExecState.ACCEPTED)


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_method_that_is_not_allowed_here_is_rejected() -> None:
    play = Play().plan(method="exotic").brings(act.Say)
    play.says(ExecState.REJECTED, reason="method 'exotic' is not allowed here: qlora")
    play.idle()
    busy = Play().plan().began("training").plan(round=2, method="exotic").says(ExecState.REJECTED, round=2)
    assert busy.session.work is not None, "what is under way goes on"
    assert busy.session.work.plan.round == 1


def test_training_without_a_single_sample_is_a_failure() -> None:
    play = Play().plan().finished()
    play.says(ExecState.FAILED, reason="no sample was trained: the data set is empty").idle()
    play = Play().plan().tick().finished(stopped="deadline")
    play.says(ExecState.FAILED, reason="no sample was trained: deadline").idle()


def test_a_survey_without_a_result_is_a_failure() -> None:
    Play().plan(purpose="survey", train=None).finished().says(ExecState.FAILED, reason="the work brought no result")


def test_a_child_that_dies_is_a_failure_with_its_reason() -> None:
    Play().plan().began("training").failed("out_of_memory: 2 GB more").says(
        ExecState.FAILED, reason="out_of_memory: 2 GB more"
    ).idle()


def test_a_model_that_cannot_be_had_is_a_failure() -> None:
    play = Play().plan(model=MODEL)
    play.feed(ev.ModelLost(sha256="c" * 64, reason="of another plan")).brings()
    play.feed(ev.ModelLost(sha256=MODEL.levels[4].sha256, reason="the disk is full"))
    play.brings(act.Say).says(ExecState.FAILED, reason="no model: the disk is full").idle()


def test_an_unfit_update_is_a_failure() -> None:
    update = an_offer(a_plan())
    play = Play().plan().finished(update)
    play.feed(ev.UpdateDeclined(xfer=update.blob.xfer, reason="bad update: matrix 'q' has rank 9"))
    play.brings(act.ForgetUpdate, act.Say).says(ExecState.FAILED, reason="bad update: matrix 'q' has rank 9")


def test_a_reason_of_any_length_can_be_said() -> None:
    play = Play().plan().failed("x" * 5000)
    (said,) = [w.message for w in play.wishes if isinstance(w, act.Say)]
    assert len(said.reason) == 2000


# -------------------------------------------------------------------------------------------------- the bus, the coordinator


def test_a_plan_whose_update_lies_in_the_outbox_is_answered_by_offering_it() -> None:
    update = an_offer(a_plan())
    play = Play(update).plan().brings(act.OfferUpdate)
    play.wish(act.OfferUpdate, offer=update)
    play.plan(attempt=1).brings(act.OfferUpdate)
    play.idle()
    play.plan(round=2).says(ExecState.ACCEPTED, round=2)


def test_every_new_connection_says_birth_the_work_and_the_offers() -> None:
    update = an_offer(a_plan())
    play = Play(update).feed(ev.BusUp()).brings(act.SayBirth, act.OfferUpdate)
    play.feed(ev.BusDown(reason="cut")).brings()
    play.plan(round=2).began("training").feed(ev.BusUp()).brings(act.SayBirth, act.Say, act.OfferUpdate)
    play.says(ExecState.TRAINING, round=2)
    play.feed(ev.RebirthAsked()).brings(act.SayBirth, act.Say, act.OfferUpdate)


def test_a_new_session_of_the_coordinator_is_told_everything() -> None:
    def seen(session: str, *, online: bool = True) -> ev.CoordinatorSeen:
        return ev.CoordinatorSeen(session=session * 16, online=online)

    play = Play(an_offer(a_plan())).feed(seen("a")).brings(act.OfferUpdate)
    play.feed(seen("a")).brings()
    play.feed(seen("a", online=False)).brings()
    play.feed(seen("a")).brings()
    play.feed(seen("b")).brings(act.SayBirth, act.OfferUpdate)
    play.plan(round=2).feed(seen("c")).brings(act.SayBirth, act.Say, act.OfferUpdate).says(ExecState.ACCEPTED)


def test_an_answer_to_an_update_that_is_not_here_only_tidies_up() -> None:
    Play().feed(ev.UpdateAccepted(xfer="a" * 32)).brings(act.ForgetUpdate)
    Play().feed(ev.UpdateDeclined(xfer="a" * 32, reason="superseded")).brings(act.ForgetUpdate)


def test_the_child_says_nothing_about_work_that_is_over() -> None:
    play = Play()
    play.began("training").brings()
    play.feed(ev.ChildEvaluated(result=EVALUATED)).brings()
    play.failed("died: SIGKILL").brings().finished().brings()


# ---------------------------------------------------------------------------------------------------------------- stop


def test_a_stop_hands_over_what_there_is_and_takes_nothing_new() -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").feed(ev.StopAsked(reason="the agent is stopping"))
    play.brings(act.StopChild).wish(act.StopChild, reason="the agent is stopping", suspend=True)
    play.plan(round=2).brings()
    play.finished(update, stopped="the agent is stopping").brings(act.OfferUpdate, act.Say)
    play.plan(round=2).brings()
    play.idle()


def test_a_stop_forgets_a_waiting_plan() -> None:
    play = Play().plan().plan(round=2).feed(ev.StopAsked(reason="the agent is stopping")).brings()
    play.failed("died: SIGTERM").brings(act.Say).says(ExecState.CANCELLED, round=1)
    play.idle()


def test_a_stop_leaves_the_share_open_for_the_next_start() -> None:
    Play().plan(model=MODEL).feed(ev.StopAsked(reason="the agent is stopping")).brings().idle()
    Play().feed(host("pause", "a service")).plan().feed(ev.StopAsked(reason="the agent is stopping")).brings().idle()
    Play().feed(ev.StopAsked(reason="the agent is stopping")).brings().idle()
    for end in (ev.ChildFailed(reason="suspended"), ev.ChildFailed(reason="stopped before it began")):
        play = Play().plan().began("training").feed(ev.StopAsked(reason="the agent is stopping"))
        play.feed(end).brings().idle()
    asked = {"round": 0, "purpose": "survey", "train": None}
    play = Play().plan(**asked, calibration=Calibration()).began("loading").feed(ev.ChildSurveyed(result=SURVEYED))
    play.feed(ev.StopAsked(reason="the agent is stopping")).finished(stopped="the agent is stopping").brings().idle()
    play = Play().plan(**asked).began("loading").feed(ev.ChildSurveyed(result=SURVEYED))
    play.feed(ev.StopAsked(reason="the agent is stopping")).finished().says(ExecState.DONE, surveyed=SURVEYED).idle()


def test_a_stop_changes_nothing_of_a_deadline_that_was_there_first() -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").tick().wish(act.StopChild, reason="deadline", suspend=False)
    play = Play().plan().began("training").tick().feed(ev.StopAsked(reason="the agent is stopping")).brings()
    play.finished(update, stopped="deadline").says(ExecState.UPLOADING).idle()


def a_suspended(**changes: Any) -> Offer:
    return msgspec.structs.replace(an_offer(a_plan(**changes), samples=2), stopped=SUSPENDED)


def test_what_a_stop_suspends_is_owed_and_not_said() -> None:
    update = a_suspended()
    play = Play().plan().began("training").feed(ev.StopAsked(reason="the agent is stopping"))
    play.finished(update, stopped=SUSPENDED).brings().idle()
    again = Play(update)
    again.feed(ev.BusUp()).brings(act.SayBirth)
    again.feed(ev.CoordinatorSeen(session="a" * 16, online=True)).brings()
    again.plan().brings(act.ForgetUpdate, act.Say, act.StartChild).wish(act.ForgetUpdate, xfer=update.blob.xfer)
    assert again.session.outbox == {}


def test_what_was_suspended_is_offered_when_its_round_is_over() -> None:
    update = a_suspended()
    for end in (
        ev.NothingPlanned(),
        ev.PlanCame(plan=a_plan(round=2)),
        ev.PlanCame(plan=a_plan(job="k")),
        ev.PlanCame(plan=a_plan(stop_after_s=0.0)),
    ):
        play = Play(update).feed(end)
        assert act.OfferUpdate(offer=update) in play.wishes
        play.feed(ev.NothingPlanned()).brings()
        play.feed(ev.BusUp()).wish(act.OfferUpdate, offer=update)
    play = Play(update).feed(ev.UpdateDeclined(xfer=update.blob.xfer, reason="superseded"))
    play.feed(ev.NothingPlanned()).brings()


def test_a_share_that_will_be_attempted_again_is_kept_as_a_checkpoint() -> None:
    update = a_suspended()
    play = Play().plan().began("training").cancel(reason="paused", keep=True)
    play.brings(act.StopChild).wish(act.StopChild, reason="paused", suspend=True)
    play.finished(update, stopped=SUSPENDED).brings(act.ForgetUpdate, act.Say).says(
        ExecState.CANCELLED, reason="paused"
    )
    play.idle()
    play.plan(attempt=1).brings(act.Say, act.StartChild)


def test_what_cannot_be_kept_for_another_attempt_is_handed_in() -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").cancel(keep=True).finished(update, stopped="not needed")
    play.brings(act.OfferUpdate, act.Say).says(ExecState.UPLOADING).idle()
    play.plan(attempt=1).brings(act.OfferUpdate)


@pytest.mark.parametrize("attempt", [0, 1])
def test_what_is_handed_in_answers_the_plan_that_waits_for_its_child(attempt: int) -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").cancel(keep=True).plan(attempt=attempt).brings()
    play.finished(update, stopped="not needed").brings(act.OfferUpdate, act.Say).says(ExecState.UPLOADING).idle()


def test_what_a_deadline_had_stopped_before_is_handed_in_for_another_attempt() -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").tick().cancel(keep=True).brings()
    play.finished(update, stopped="deadline").brings(act.OfferUpdate, act.Say).idle()


def test_work_that_is_kept_and_then_not_wanted_is_thrown_away() -> None:
    update = an_offer(a_plan(), samples=2)
    play = Play().plan().began("training").cancel(keep=True).cancel(reason="rolled back").brings()
    play.finished(update, stopped="not needed").brings(act.ForgetUpdate, act.Say).idle()


# -------------------------------------------------------------------------------------------------- plans of the past


def test_a_plan_of_the_past_disturbs_nothing() -> None:
    play = Play().plan(round=3, issued_at=30.0).began("training")
    for old in ({"round": 2, "issued_at": 20.0}, {"round": 3, "attempt": -1, "issued_at": 20.0}):
        if old.get("attempt") == -1:
            play = Play().plan(round=3, attempt=1, issued_at=30.0).began("training")
            old["attempt"] = 0
        play.plan(**old).brings()
        assert play.session.past.n_stale == 1
    play.finished(an_offer(a_plan(round=3, attempt=1))).plan(round=2, issued_at=20.0).brings()


def test_a_plan_that_only_looks_old_is_done() -> None:
    """A job of the same name that was begun anew, another coordinator, or the same round said again."""
    play = Play().plan(round=3, issued_at=30.0).plan(round=3, issued_at=29.0).brings(act.Say)
    play = Play().plan(round=3, issued_at=30.0).failed("died").plan(round=1, issued_at=31.0)
    play.brings(act.Say, act.StartChild)
    play = Play().feed(ev.CoordinatorSeen(session="a" * 16, online=True)).plan(round=3, issued_at=30.0).failed("died")
    play.feed(ev.CoordinatorSeen(session="b" * 16, online=True)).plan(round=1, issued_at=2.0)
    play.brings(act.Say, act.StartChild)
    play = Play().plan(round=3, issued_at=30.0).failed("died").plan(round=0, purpose="survey", issued_at=31.0)
    play.brings(act.Say, act.StartChild)
    assert play.session.past.n_stale == 0


def test_a_survey_that_a_broker_kept_does_not_end_what_is_being_trained() -> None:
    play = Play().plan(round=3, issued_at=30.0).began("training").plan(round=0, purpose="survey", issued_at=1.0)
    play.brings()
    assert play.session.past.n_stale == 1


# ----------------------------------------------------------------------------------------------------------- the host


def test_while_the_host_computes_the_child_is_held_and_the_coordinator_knows() -> None:
    play = Play().plan().began("training").feed(host("pause", "a service"))
    play.brings(act.PauseChild, act.Say).says(ExecState.TRAINING, reason="paused for the host: a service")
    play.began("paused").brings()
    play.feed(ev.BusUp()).says(ExecState.TRAINING, reason="paused for the host: a service")
    play.feed(host("run")).brings(act.ResumeChild, act.Say).says(ExecState.TRAINING, reason="")
    play.finished(an_offer(a_plan())).says(ExecState.UPLOADING)


def test_a_pause_longer_than_the_round_ends_with_what_there_is() -> None:
    play = Play().plan().began("training").feed(host("pause", "a service"))
    play.tick().brings(act.StopChild).wish(act.StopChild, reason="deadline")
    play.feed(host("run")).brings()
    play.finished(an_offer(a_plan(), samples=2), stopped="deadline").says(ExecState.UPLOADING, reason="")


def test_a_plan_that_comes_at_the_wrong_hour_waits_for_the_right_one() -> None:
    play = Play().feed(host("pause", "not before 20:00")).plan(model=MODEL).at(10.0).fetched(MODEL.levels[4].sha256)
    play.brings(act.Say).says(ExecState.PREPARING, reason="paused for the host: not before 20:00")
    play.plan(model=MODEL).says(ExecState.PREPARING, reason="paused for the host: not before 20:00")
    play.at(50.0).feed(host("run")).brings(act.StartChild, act.Say).says(ExecState.PREPARING, reason="")
    play.wish(act.StartChild, model_sha256=MODEL.levels[4].sha256, bytes_down=5000)
    play.began("training").brings(act.Say)


def test_a_plan_whose_hour_does_not_come_is_given_back() -> None:
    play = Play().feed(host("pause", "not before 20:00")).plan().tick().brings(act.Say)
    play.says(ExecState.TIMED_OUT, reason="deadline, paused for the host: not before 20:00")
    play.idle()


def test_a_held_plan_can_be_cancelled_and_superseded() -> None:
    play = Play().feed(host("pause", "a service")).plan().cancel().brings(act.Say).says(ExecState.CANCELLED)
    play.idle()
    play.plan(round=2).plan(round=3).says(ExecState.CANCELLED, round=2).says(ExecState.PREPARING, round=3)


def test_a_look_at_base_and_data_needs_no_device() -> None:
    play = Play().feed(host("pause", "a service")).plan(round=0, purpose="survey", train=None)
    play.brings(act.Say, act.StartChild)
    Play().feed(host("pause")).plan(round=0, purpose="survey", train=None, calibration=Calibration()).brings(
        act.Say, act.Say
    )


def test_for_its_memory_the_host_gets_the_child_out_with_what_it_has() -> None:
    play = Play().plan().began("training").feed(host("shrink", "30 MiB are free")).brings(act.ShrinkChild)
    play.feed(host("stop", "20 MiB are free")).brings(act.StopChild, act.LetChildGo)
    play.wish(act.StopChild, reason="the host needs its memory: 20 MiB are free")
    play.feed(host("stop", "10 MiB are free")).brings(act.LetChildGo)
    play.finished(an_offer(a_plan()), stopped="the host needs its memory").says(ExecState.UPLOADING)
    play.plan(round=2).says(ExecState.PREPARING).feed(host("shrink", "later")).brings(
        act.StartChild, act.ShrinkChild, act.Say
    )


def test_what_a_share_took_is_said_at_its_end_however_it_ended() -> None:
    play = Play()
    took = Energy(joules=9.0, source="measured")
    play.plan(model=None, version=0).feed(ev.ChildFailed(reason="died", energy=took)).says(
        ExecState.FAILED, energy=took
    )
    play.plan(round=2, purpose="evaluate", train=None, model=None, version=0)
    play.says(ExecState.ACCEPTED, energy=None)
    found = Evaluated(version=0, n_samples=1, n_tokens=9, loss=2.0)
    play.feed(ev.ChildEvaluated(result=found))
    ended = ev.ChildFinished(samples=0, loss=None, train_s=0.0, stopped="", update=None, energy=took)
    play.feed(ended).says(ExecState.DONE, energy=took, evaluated=found)


def test_an_idle_child_is_let_go_for_memory() -> None:
    Play().feed(host("stop", "20 MiB are free")).brings(act.LetChildGo).idle()
