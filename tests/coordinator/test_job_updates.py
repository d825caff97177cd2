"""Transcripts: every kind of offer and its answer, and noise on the bus."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import encode_state
from coordinator.core.state import Phase, with_detail
from protocol.messages import Evaluated, ExecState, Report

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


# -------------------------------------------------------------------------------------------------- answers to offers


def test_the_same_update_twice_is_acknowledged_and_another_one_is_declined(play: Play) -> None:
    play.ready("a", "b").plan()
    offer, other = play.offer("a"), play.offer("a", tag="second run")
    play.trains("a")
    assert play.offers("a", offer).wishes == [act.Acknowledge(agent="a", xfer=offer.blob.xfer)]
    assert play.feed(ev.UpdateStored(agent="a", offer=offer)).wishes == [
        act.Acknowledge(agent="a", xfer=offer.blob.xfer)
    ]
    assert "different update" in play.offers("a", other).expects(act.Decline, xfer=other.blob.xfer).reason
    assert "different update" in play.feed(ev.UpdateStored(agent="a", offer=other)).expects(act.Decline).reason
    assert len(play.trains("b").expects(act.Aggregate).contributions) == 2


def test_a_stored_update_is_acknowledged_even_after_the_job(play: Play) -> None:
    play.ready("a", round={"n_rounds": 1}).plan()
    offer = play.offer("a")
    play.trains("a").fold().evaluates("a")
    play.offers("a", offer).expects(act.Acknowledge, xfer=offer.blob.xfer)
    stray = msgspec.structs.replace(offer, round=2)
    assert play.offers("a", stray).expects(act.Decline).reason == "superseded: the job is completed"


def test_an_ended_job_sheds_what_no_answer_needs_and_hands_it_over(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan()
    play.trains("a", "b").fold()
    at_work = len(encode_state(play.fleet.state))
    detail = play.evaluates("a", "b").expects(act.Finish, phase="completed").detail
    assert sorted(detail.members) == ["a", "b"]
    assert [m.surveyed.n_train for m in detail.members.values()] == [10, 10]
    assert [m.name for m in detail.matrices] == ["k", "q"]
    assert sorted(detail.plan.choices) == ["a", "b"]
    job = play.job()
    assert [job.members, job.matrices, job.plan, job.planned] == [{}, [], None, []]
    assert with_detail(job, detail).members is detail.members
    assert with_detail(job, None) is job, "it ended before details were kept"
    assert len(encode_state(play.fleet.state)) < at_work - 500


def test_a_late_update_enters_the_next_fold_once_at_a_discount(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 3, "staleness_discount": 0.25}).plan()
    late = play.offer("b", samples=8)
    play.trains("a").ticks(120.0).fold().plan().trains("a")
    play.offers("b", late).expects(act.Fetch, agent="b", ranks={"k": 2, "q": 2})
    play.feed(ev.UpdateStored(agent="b", offer=late)).expects(act.Acknowledge)
    play.feed(ev.UpdateStored(agent="b", offer=late)).expects(act.Acknowledge)
    fold = play.trains("b").expects(act.Aggregate, round=2)
    assert [(c.agent, c.round, c.weight) for c in fold.contributions] == [("b", 1, 2.0), ("a", 2, 4.0), ("b", 2, 4.0)]
    fold = play.fold().plan().trains("a", "b").expects(act.Aggregate, round=3)
    assert [(c.agent, c.round) for c in fold.contributions] == [("a", 3), ("b", 3)]


def test_a_late_update_that_comes_during_the_fold_waits_for_the_next(play: Play) -> None:
    play.ready("a", "b").plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).feed(ev.UpdateStored(agent="b", offer=late)).lacks(act.Aggregate)
    fold = play.fold().plan().trains("a", "b").expects(act.Aggregate, round=2)
    assert [(c.agent, c.round, c.weight) for c in fold.contributions] == [("b", 1, 2.0), ("a", 2, 4.0), ("b", 2, 4.0)]


def test_a_late_update_that_is_too_old_is_declined(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 5, "max_staleness": 1}).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).fold().plan().trains("a", "b").fold()
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: round 1 is closed")


def test_during_a_fold_the_age_of_a_late_update_is_that_at_the_next_fold(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 5, "max_staleness": 1}).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).fold().plan().trains("a", "b").expects(act.Aggregate, round=2)
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: round 1 is closed")


def test_a_late_update_that_no_fold_is_left_for_is_declined_rather_than_acknowledged(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0)
    assert play.phase() is Phase.AGGREGATING
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: the last round is closed")
    play.feed(ev.UpdateStored(agent="b", offer=late)).lacks(act.Acknowledge).expects(act.Decline)
    play.leave("b").fold()
    assert play.phase() is Phase.WAITING, "for b, until its grace is over"
    play.offers("b", late).expects(act.Decline)


def test_a_late_update_is_declined_when_the_job_drops_them(play: Play) -> None:
    play.ready("a", "b", round={"late": "drop"}).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).fold()
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: round 1 is closed")
    assert play.fleet.state.counts == {"superseded_update": 1}


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "too big": ({"size": 200_000}, "200000 bytes offered where the plan allows"),
    "more samples than planned": ({"samples": 17}, "17 samples claimed where 16 were planned"),
    "more steps than planned": ({"steps": 2**53}, "with 9007199254740992 steps claimed where"),
    "no sample": ({"samples": 0}, "trained on no sample"),
}


def test_an_offer_for_an_attempt_that_there_cannot_be_is_declined_and_the_share_stays(play: Play) -> None:
    play.ready("a").plan()
    declined = play.offers("a", play.offer("a", attempt=2**53)).expects(act.Decline)
    assert declined.reason.startswith("bad update: attempt 9007199254740992")
    play.trains("a").expects(act.Aggregate)


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_offer_is_declined_unseen_and_fails_its_share(play: Play, kind: str) -> None:
    fields, why = UNFIT[kind]
    play.ready("a", "b").plan()
    unfit = play.offer("a", **fields)
    declined = play.offers("a", unfit).lacks(act.Fetch)
    assert why in declined.expects(act.Decline, agent="a", xfer=unfit.blob.xfer).reason
    declined.expects(act.Withdraw, agent="a", cancel=None)
    assert play.fleet.state.counts == {"bad_update": 1}
    assert [c.agent for c in play.trains("b").expects(act.Aggregate).contributions] == ["b"]
    share = play.fold().expects(act.Record).record.shares["a"]
    assert share.state == "FAILED"
    assert why in share.reason


@pytest.mark.parametrize("kind", UNFIT)
def test_a_late_offer_must_fit_its_plan_as_well(play: Play, kind: str) -> None:
    fields, why = UNFIT[kind]
    play.ready("a", "b").plan()
    late = play.offer("b", **fields)
    play.trains("a").ticks(120.0).fold().plan()
    assert why in play.offers("b", late).lacks(act.Fetch).expects(act.Decline).reason
    assert play.share("b").state is ExecState.OFFERED, "the present share is another one"


def test_an_unfit_update_of_an_earlier_attempt_does_not_fail_the_present_share(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan().trains("a")
    unfit = play.offer("b", samples=0)
    play.ticks(120.0).plan().offers("b", unfit).lacks(act.Withdraw).expects(act.Decline, agent="b")
    play.trains("b").expects(act.Aggregate, attempt=1)


def test_an_update_is_held_against_the_plan_of_its_own_attempt(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan(n_steps=4).trains("a")
    tardy = play.offer("b", samples=32)
    play.ticks(120.0).plan(n_steps=2)
    play.offers("b", tardy).expects(act.Fetch, offer=tardy)
    assert "32 samples claimed where 16" in play.offers("b", play.offer("b", samples=32)).expects(act.Decline).reason


def test_an_update_of_the_first_attempt_counts_in_the_third_by_its_own_plan(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan(n_steps=4).trains("a")
    tardy = play.offer("b", samples=32)
    play.ticks(120.0).plan(n_steps=2).ticks(240.0).plan(n_steps=1)
    assert play.job().attempt == 2
    play.offers("b", tardy).expects(act.Fetch, offer=tardy)
    fold = play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Aggregate)
    assert [(c.agent, c.attempt, c.weight) for c in fold.contributions] == [("a", 0, 4.0), ("b", 0, 32.0)]


def test_an_update_of_a_share_that_had_failed_and_began_again_is_held_against_its_own_plan(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan(n_steps=4).trains("a")
    tardy = play.offer("b", samples=32)
    play.move("b", ExecState.FAILED, reason="died: SIGKILL").plan(n_steps=2)
    assert play.job().attempt == 1
    play.offers("b", tardy).expects(act.Fetch, offer=tardy)


@pytest.mark.parametrize("is_planned", [False, True])
def test_a_job_that_drops_late_updates_takes_those_of_a_round_that_is_still_open(play: Play, is_planned: bool) -> None:
    play.ready("a", "b", round={"min_agents": 2, "late": "drop"}).plan(n_steps=4).trains("a")
    tardy = play.offer("b", samples=32)
    play.ticks(120.0)
    if is_planned:
        play.plan(n_steps=2)
    play.offers("b", tardy).expects(act.Fetch, offer=tardy)
    play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Acknowledge)
    assert play.expects(act.Aggregate).attempt == 1 if is_planned else play.plan().expects(act.Aggregate)
    assert play.fold().job().tried == {}


def test_a_second_offer_after_a_failed_share_is_declined(play: Play) -> None:
    play.ready("a", "b").plan().offers("a", play.offer("a", samples=0))
    reason = play.offers("a", play.offer("a", tag="better")).expects(act.Decline).reason
    assert reason.startswith("superseded: this share has ended as FAILED: bad update")


def test_a_spoiled_update_fails_its_share_and_the_agent_hears_why(play: Play) -> None:
    play.ready("a", "b").plan()
    offer = play.offer("a")
    spoiled = ev.UpdateSpoiled(agent="a", offer=offer, reason="matrix q: not finite")
    play.offers("a", offer).feed(spoiled).expects(act.Decline, xfer=offer.blob.xfer, reason="matrix q: not finite")
    assert play.share("a").state is ExecState.FAILED
    assert [c.agent for c in play.trains("b").expects(act.Aggregate).contributions] == ["b"]


def test_a_spoiled_update_of_an_earlier_attempt_gives_the_agent_its_plan_again(play: Play) -> None:
    """Offered in place of training anew: a coordinator that died before it declined it would else wait for nothing."""
    play.ready("a", "b", round={"min_agents": 2}).plan()
    offer = play.offer("a")
    spoiled = ev.UpdateSpoiled(agent="a", offer=offer, reason="matrix q: not finite")
    play.trains("b").offers("a", offer).feed(spoiled).plan()
    play.offers("a", offer).expects(act.Fetch)
    assert play.feed(spoiled).lacks(act.Withdraw).expects(act.Assign, agent="a").plan.attempt == 1
    assert [type(wish) for wish in play.wishes] == [act.Decline, act.Assign], "the plan behind the refusal"
    assert play.share("a").state is ExecState.OFFERED
    play.trains("a").expects(act.Aggregate, attempt=1)


def test_a_spoiled_copy_of_a_stored_update_changes_nothing(play: Play) -> None:
    play.ready("a", "b").plan()
    offer = play.offer("a")
    play.trains("a").feed(ev.UpdateSpoiled(agent="a", offer=offer, reason="the agent vanished"))
    assert play.wishes == []
    assert play.share("a").state is ExecState.DONE


def test_a_loss_that_is_not_a_number_is_left_out_of_the_record(play: Play) -> None:
    play.ready("a", "b").plan().trains("a", loss=math.nan).trains("b", loss=3.0)
    record = play.fold().expects(act.Record).record
    assert record.loss == 3.0
    assert record.shares["a"].loss is None


def test_an_evaluation_that_is_not_finite_or_of_another_version_is_ignored(play: Play) -> None:
    play.ready("a").plan()
    good = Evaluated(version=0, n_samples=2, n_tokens=9, loss=2.5, metrics={"rougeL": 0.5})
    for bad in (
        msgspec.structs.replace(good, loss=math.nan),
        msgspec.structs.replace(good, loss=math.inf),
        msgspec.structs.replace(good, metrics={"rougeL": math.nan}),
        msgspec.structs.replace(good, version=7),
    ):
        play.move("a", ExecState.PREPARING, evaluated=bad)
        assert play.share("a").evaluated is None
    play.move("a", ExecState.PREPARING, evaluated=good)
    assert play.share("a").evaluated == good


def test_the_word_done_does_not_replace_the_update(play: Play) -> None:
    play.ready("a").plan().move("a", ExecState.DONE).lacks(act.Aggregate)
    play.trains("a").expects(act.Aggregate)


# --------------------------------------------------------------------------------------------------- noise on the bus


def test_unknown_jobs_unknown_agents_and_stale_words_are_counted_and_ignored(play: Play) -> None:
    play.ready("a").plan().move("a", ExecState.TRAINING, serial=50)
    before = play.share("a").state
    stray = play.offer("a")
    play.move("a", ExecState.FAILED, serial=50)
    play.move("a", ExecState.FAILED, serial=51, attempt=3)
    play.move("a", ExecState.FAILED, serial=52, round=9)
    play.move("stranger", ExecState.DONE)
    assert play.wishes == []
    assert play.share("a").state is before
    play.feed(ev.ShareMoved(agent="a", job="none", round=1, attempt=0, serial=99, state=ExecState.FAILED))
    assert play.wishes == []
    play.offers("a", msgspec.structs.replace(stray, job="none")).expects(act.Decline, agent="a")
    play.offers("stranger", stray).expects(act.Decline, agent="stranger")
    play.feed(ev.PlanFailed(job="j", round=1, attempt=0, reason="late"))
    play.feed(ev.AggregateFailed(job="j", round=1, attempt=0, reason="early"))
    assert play.wishes == []
    assert play.fleet.state.counts == {"stale_execution": 4, "unknown_job": 2, "superseded_update": 1}
    assert play.phase() is Phase.COLLECTING


def test_a_report_is_kept_and_asks_for_nothing(play: Play) -> None:
    report = Report(n_cpus=4)
    assert play.ready("a").feed(ev.AgentReported(agent="a", report=report)).wishes == []
    assert play.fleet.state.agents["a"].report == report


def test_answers_of_slow_work_that_come_twice_or_too_late_are_ignored(play: Play) -> None:
    play.ready("a", "b").plan()
    before = encode_state(play.fleet.state)
    assert play.plan().wishes == []
    play.feed(ev.PlanFailed(job="j", round=1, attempt=0, reason="late"))
    assert encode_state(play.fleet.state) == before
    play.trains("a", "b").fold()
    assert play.fold().wishes == []
    assert (play.job().version, play.phase()) == (1, Phase.PLANNING)


def test_a_job_that_is_submitted_twice_is_one_job(play: Play) -> None:
    play.ready("a").plan()
    before = encode_state(play.fleet.state)
    assert play.submit(round={"n_rounds": 9}).wishes == []
    assert encode_state(play.fleet.state) == before
