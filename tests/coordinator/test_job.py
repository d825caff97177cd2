"""Transcripts of jobs: events in, actions out, one story each.  Times are seconds after the start of the story."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.choice import Choice
from coordinator.core.fleet import Fleet, decode_state, encode_state
from coordinator.core.spec import JobSpec, Rounds
from coordinator.core.state import Phase
from protocol.messages import Evaluated, ExecState, Report

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play

LIMITS = {
    "n_rounds": 2,
    "train_s": 100.0,
    "grace_s": 20.0,
    "offline_grace_s": 10.0,
    "survey_s": 50.0,
    "start_wait_s": 30.0,
    "wait_s": 300.0,
}


def rules(**changed: Any) -> dict[str, Any]:
    return LIMITS | changed


# ------------------------------------------------------------------------------------------------------- the good day


def test_two_rounds_and_a_final_evaluation(play: Play) -> None:
    play.submit(round=rules(min_agents=2)).expects(act.Announce, card={"phase": "waiting", "n_rounds": 2})
    play.join("a", "b").expects(act.Assign, agent="a", plan={"purpose": "survey", "round": 0, "stop_after_s": 50.0})
    play.survey("a").lacks(act.MakePlan)
    play.survey("b").expects(act.MakePlan, round=1, attempt=0, agents=["a", "b"])
    for number in (1, 2):
        plan = play.plan().expects(act.Assign, agent="b").plan
        assert (plan.purpose, plan.round, plan.version) == ("train", number, number - 1)
        assert (plan.stop_after_s, plan.ttl_s) == (100.0, 120.0)
        play.move("a", ExecState.ACCEPTED).move("a", ExecState.TRAINING)
        offer = play.offer("a", samples=3)
        play.offers("a", offer).expects(act.Fetch, agent="a", ranks={"k": 2, "q": 2})
        stored = play.feed(ev.UpdateStored(agent="a", offer=offer))
        stored.expects(act.Acknowledge, agent="a", xfer=offer.blob.xfer)
        stored.expects(act.Withdraw, agent="a", cancel=None)
        fold = play.trains("b", samples=9).expects(act.Aggregate, round=number, version=number)
        assert [(c.agent, c.round, c.weight) for c in fold.contributions] == [("a", number, 3.0), ("b", number, 9.0)]
        play.fold().expects(act.Record, record={"round": number, "outcome": "aggregated", "loss": 2.0})
        play.expects(act.Serve, blob={"size": 1000})
    play.expects(act.Assign, agent="a", plan={"purpose": "evaluate", "round": 3, "version": 2, "train": None})
    play.evaluates("a").lacks(act.Finish)
    play.evaluates("b", loss=1.0).expects(act.Finish, phase="completed", reason="")
    record = play.expects(act.Record, record={"purpose": "evaluate", "outcome": "completed"}).record
    assert {a: s.evaluated.loss for a, s in record.shares.items()} == {"a": 1.5, "b": 1.0}
    assert play.phase() is Phase.COMPLETED
    assert play.free()
    assert play.fleet.wake_at is None


def test_the_order_of_arrival_does_not_change_the_fold(play: Play) -> None:
    play.ready("a", "b", "c", round=rules()).plan()
    opened = encode_state(play.fleet.state)
    offers = {a: play.offer(a) for a in "abc"}
    folds = []
    for order in itertools.permutations("abc"):
        fleet = Fleet(decode_state(opened))
        wishes = [w for a in order for w in fleet.handle(ev.UpdateStored(agent=a, offer=offers[a]), play.now)]
        folds.append(next(w for w in wishes if isinstance(w, act.Aggregate)))
    assert [c.agent for c in folds[0].contributions] == ["a", "b", "c"]
    assert all(fold == folds[0] for fold in folds)


def test_the_draw_of_agents_is_fixed_by_seed_round_and_attempt(play: Play) -> None:
    agents = tuple("abcdefgh")
    chosen = play.ready(*agents, round=rules(n_agents=3)).expects(act.MakePlan).agents
    assert len(chosen) == 3
    assert set(chosen) < set(agents)
    other = type(play)().ready(*agents, round=rules(n_agents=3)).expects(act.MakePlan).agents
    assert other == chosen
    seeded = {
        tuple(type(play)().ready(*agents, head={"seed": s}, round=rules(n_agents=3)).expects(act.MakePlan).agents)
        for s in range(8)
    }
    assert len(seeded) > 1


# ----------------------------------------------------------------------------------------------------------- surveys


def test_an_agent_without_data_is_out_and_the_reason_is_kept(play: Play) -> None:
    play.submit(round=rules()).join("a", "b").survey("a", n_train=0)
    assert play.job().members["a"].excluded == "the survey brought nothing to train on"
    play.survey("b").expects(act.MakePlan, agents=["b"])


def test_an_agent_that_cannot_open_its_data_is_out_until_it_starts_again(play: Play) -> None:
    play.submit(round=rules()).join("a").move("a", ExecState.FAILED, reason="no [data.default] table here")
    assert play.job().members["a"].excluded == "no [data.default] table here"
    play.join("a", session=1).lacks(act.Assign)
    play.join("a", session=2).expects(act.Assign, agent="a", plan={"purpose": "survey", "attempt": 1})
    play.survey("a").expects(act.MakePlan, agents=["a"])


def test_an_agent_with_another_base_is_out(play: Play) -> None:
    play.submit(round=rules()).join("a", "b", "c").survey("a").survey("b", base="other")
    play.survey("c").expects(act.MakePlan, agents=["a", "c"])
    assert play.job().members["b"].excluded.startswith("bad_base: has ")
    play.join("b", session=2).lacks(act.Assign, agent="b")


def test_a_named_base_outvotes_the_majority(play: Play) -> None:
    digest = "ab" * 32
    play.submit(model={"source": "toy", "sha256": digest}, round=rules())
    plan = play.join("a", "b").expects(act.Assign, agent="a").plan
    assert plan.base.sha256 == digest
    play.survey("a", "b").lacks(act.MakePlan)
    assert all(m.excluded.startswith("bad_base") for m in play.job().members.values())


def test_a_late_joiner_is_surveyed_while_others_train_and_joins_the_next_round(play: Play) -> None:
    play.ready("a", round=rules()).plan()
    play.at(50).join("b").expects(act.Assign, agent="b", plan={"purpose": "survey", "round": 0})
    play.survey("b").lacks(act.MakePlan)
    play.trains("a").fold().expects(act.MakePlan, round=2, agents=["a", "b"])
    play.plan().expects(act.Assign, agent="b", plan={"purpose": "train", "round": 2, "version": 1})


def test_a_survey_that_takes_too_long_ends_and_the_others_start(play: Play) -> None:
    play.submit(round=rules(survey_s=20.0)).join("a", "b").survey("a")
    play.ticks(19.0).lacks(act.MakePlan)
    ended = play.ticks(20.0)
    ended.expects(act.Withdraw, agent="b", cancel={"round": 0, "reason": "no survey within 20 s"})
    ended.expects(act.MakePlan, agents=["a"])
    assert play.job().members["b"].excluded == "no survey within 20 s"


def test_an_agent_that_was_silent_in_its_survey_is_asked_again_when_it_is_back(play: Play) -> None:
    play.submit(round=rules(survey_s=20.0)).join("a").leave("a").ticks(25.0)
    assert play.job().members["a"].excluded == "no survey within 20 s"
    play.join("a", session=1).expects(act.Assign, agent="a", plan={"purpose": "survey", "attempt": 1})


def test_an_agent_that_dies_in_the_first_survey_holds_nobody_up_longer_than_its_grace(play: Play) -> None:
    play.submit(round=rules()).join("a", "b").survey("a").at(5).leave("b").lacks(act.MakePlan)
    play.ticks(14.9).lacks(act.MakePlan)
    play.ticks(15.0).expects(act.MakePlan, agents=["a"])


def test_a_survey_is_open_when_the_job_completes(play: Play) -> None:
    play.ready("a", round=rules(n_rounds=1)).plan().trains("a").fold()
    play.join("b").expects(act.Assign, agent="b", plan={"purpose": "survey"})
    done = play.evaluates("a")
    done.expects(act.Finish, phase="completed")
    done.expects(act.Withdraw, agent="b", cancel={"round": 0, "reason": "the job is completed"})
    assert play.free()


def test_only_invited_agents_that_know_the_method_are_asked(play: Play) -> None:
    play.submit(head={"only": ["a", "b"]}, round=rules())
    play.join("b", methods=("prompt",)).lacks(act.Assign)
    play.join("c").lacks(act.Assign)
    play.join("a").expects(act.Assign, agent="a")


# ----------------------------------------------------------------------------------------------- quorum and attempts


def test_with_a_quorum_the_deadline_closes_the_round_without_the_straggler(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().at(30).trains("a").lacks(act.Aggregate)
    assert play.fleet.wake_at == play.now + 90.0
    closed = play.ticks(120.0)
    fold = closed.expects(act.Aggregate)
    assert [c.agent for c in fold.contributions] == ["a"]
    cancel = closed.expects(act.Withdraw, agent="b").cancel
    assert "the round closed 120 s after it opened" in cancel.reason
    assert play.fold().expects(act.Record).record.shares["b"].state == "TIMED_OUT"


def test_below_the_quorum_finished_shares_are_kept_and_only_the_others_are_asked_again(play: Play) -> None:
    play.ready("a", "b", "c", round=rules(quorum_ratio=0.6)).plan().trains("a")
    again = play.ticks(120.0)
    again.expects(act.Record, record={"attempt": 0, "outcome": "quorum: 1 of the 2 updates needed"})
    again.expects(act.MakePlan, round=1, attempt=1, agents=["b", "c"])
    play.plan().lacks(act.Assign, agent="a")
    play.expects(act.Assign, agent="b", plan={"round": 1, "attempt": 1})
    fold = play.trains("b", "c").expects(act.Aggregate, attempt=1)
    assert [(c.agent, c.attempt) for c in fold.contributions] == [("a", 0), ("b", 1), ("c", 1)]


def test_too_many_attempts_fail_the_job_and_say_why_each_agent_failed(play: Play) -> None:
    play.ready("a", "b", round=rules(max_attempts=2))
    for _ in range(2):
        play.plan().move("a", ExecState.FAILED, reason="out of memory").move("b", ExecState.REJECTED, reason="busy")
    finish = play.expects(act.Finish, phase="failed")
    assert finish.reason.startswith("quorum: 0 of the 1 updates needed in round 1 after 2 attempts")
    assert "a: out of memory; b: busy" in finish.reason
    assert play.free()


def test_an_update_of_the_failed_attempt_counts_in_the_next_one(play: Play) -> None:
    play.ready("a", "b", round=rules(min_agents=2)).plan().trains("a")
    tardy = play.offer("b")
    play.ticks(120.0).plan().expects(act.Assign, agent="b", plan={"attempt": 1})
    play.offers("b", tardy).expects(act.Fetch, agent="b")
    fold = play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Aggregate, attempt=1)
    assert [(c.agent, c.attempt, c.weight) for c in fold.contributions] == [("a", 0, 4.0), ("b", 0, 4.0)]


@pytest.mark.parametrize("seconds", [120.0, 130.0])
def test_what_the_failed_attempt_lacked_comes_in_before_the_next_one_opens(play: Play, seconds: float) -> None:
    play.ready("a", "b", round=rules(min_agents=2)).plan().trains("a")
    tardy = play.offer("b")
    play.ticks(seconds).offers("b", tardy).expects(act.Fetch, agent="b")
    play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Acknowledge, agent="b")
    fold = play.plan().expects(act.Aggregate, round=1, attempt=1)
    assert [c.agent for c in fold.contributions] == ["a", "b"]


def test_what_the_failed_attempt_lacked_comes_in_while_nobody_is_there(play: Play) -> None:
    play.ready("a", "b", round=rules(min_agents=2)).plan().trains("a")
    tardy = play.offer("b")
    play.leave("b").ticks(15.0)
    assert play.phase() is Phase.WAITING
    fold = play.feed(ev.UpdateStored(agent="b", offer=tardy)).expects(act.Aggregate)
    assert [c.agent for c in fold.contributions] == ["a", "b"]


def test_over_selection_closes_at_the_target_and_supersedes_the_rest(play: Play) -> None:
    play.ready("a", "b", "c", round=rules(n_agents=2, over_select_ratio=1.5, late="drop"))
    play.expects(act.MakePlan, agents=["a", "b", "c"])
    play.plan().trains("c").lacks(act.Aggregate)
    closed = play.trains("a")
    assert [c.agent for c in closed.expects(act.Aggregate).contributions] == ["a", "c"]
    closed.expects(act.Withdraw, agent="b", cancel={"reason": "superseded: enough others answered first"})
    assert play.fold().expects(act.Record).record.shares["b"].state == "SUPERSEDED"


# ---------------------------------------------------------------------------------------------- agents come and leave


def test_a_dead_agent_is_waited_for_during_its_grace_only(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().trains("a").at(5).leave("b").lacks(act.Aggregate)
    play.ticks(14.9).lacks(act.Aggregate)
    closed = play.ticks(15.0)
    assert [c.agent for c in closed.expects(act.Aggregate).contributions] == ["a"]
    closed.expects(act.Withdraw, agent="b", cancel={"reason": "the agent vanished and did not come back in time"})


def test_a_dead_agent_does_not_hurry_those_who_are_at_work(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().leave("b").ticks(60.0).lacks(act.Withdraw)
    play.trains("a").expects(act.Aggregate)


def test_an_agent_that_restarts_in_time_gets_its_plan_again_with_the_time_that_is_left(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().move("b", ExecState.TRAINING).at(5).leave("b")
    again = play.at(12).join("b", session=2).expects(act.Assign, agent="b").plan
    assert (again.round, again.attempt, again.stop_after_s, again.ttl_s) == (1, 0, 88.0, 108.0)
    play.move("b", ExecState.ACCEPTED, serial=1).trains("b", "a").expects(act.Aggregate)
    assert play.fleet.state.counts == {}


def test_the_will_of_an_older_session_is_ignored(play: Play) -> None:
    play.ready("a", round=rules()).plan().join("a", session=2).leave("a", session=1)
    assert play.fleet.state.agents["a"].online
    assert play.fleet.state.counts == {"stale_death": 1}
    play.ticks(60.0)
    assert play.phase() is Phase.COLLECTING


def test_a_birth_that_is_said_twice_repeats_the_plan_and_changes_nothing(play: Play) -> None:
    play.ready("a", round=rules()).plan().move("a", ExecState.TRAINING)
    before = encode_state(play.fleet.state)
    play.join("a", session=1).expects(act.Assign, agent="a", plan={"round": 1})
    assert encode_state(play.fleet.state) == before


def test_a_birth_without_work_clears_an_old_plan(play: Play) -> None:
    assert play.join("a").wishes == [act.Withdraw(agent="a")]


def test_planned_agents_that_leave_are_not_asked(play: Play) -> None:
    play.ready("a", "b", round=rules()).leave("b").plan().lacks(act.Assign, agent="b")
    play.expects(act.Assign, agent="a")


def test_when_too_few_of_the_planned_agents_stay_the_job_waits(play: Play) -> None:
    play.ready("a", "b", round=rules(min_agents=2)).at(3).leave("b").plan().lacks(act.Assign)
    assert play.phase() is Phase.WAITING
    play.join("b").expects(act.MakePlan, agents=["a", "b"], attempt=0)


def test_the_first_round_is_patient_for_start_agents_but_not_for_ever(play: Play) -> None:
    play.ready("a", round=rules(start_agents=3)).lacks(act.MakePlan)
    play.ticks(29.9).lacks(act.MakePlan)
    play.ticks(30.0).expects(act.MakePlan, agents=["a"])


def test_the_first_round_starts_at_once_when_start_agents_are_there(play: Play) -> None:
    play.ready("a", "b", round=rules(start_agents=3)).lacks(act.MakePlan)
    play.at(10).join("c").survey("c").expects(act.MakePlan, agents=["a", "b", "c"])


def test_without_enough_agents_the_job_fails_and_says_who_was_there_and_why_not(play: Play) -> None:
    play.submit(round=rules(min_agents=2)).join("a", "b").survey("a").survey("b", n_train=0)
    play.ticks(299.9).lacks(act.Finish)
    finish = play.ticks(300.0).expects(act.Finish, phase="failed")
    assert finish.reason == (
        "no_agents: 2 needed for 300 s; 2 agents known, 2 online; b: the survey brought nothing to train on"
    )
    assert play.fleet.wake_at is None


def test_an_evaluation_with_nobody_there_completes_the_job(play: Play) -> None:
    play.ready("a", round=rules(n_rounds=1)).plan().trains("a").leave("a")
    play.fold().expects(act.Finish, phase="completed")
    play.expects(act.Record, record={"purpose": "evaluate", "shares": {}})


def test_an_evaluation_does_not_wait_longer_than_its_deadline(play: Play) -> None:
    play.ready("a", "b", round=rules(n_rounds=1)).plan().trains("a", "b").fold().evaluates("a")
    play.ticks(49.9).lacks(act.Finish)
    done = play.ticks(50.0)
    done.expects(act.Finish, phase="completed")
    done.expects(act.Withdraw, agent="b", cancel={"round": 2})


# -------------------------------------------------------------------------------------------------- answers to offers


def test_the_same_update_twice_is_acknowledged_and_another_one_is_declined(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan()
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
    play.ready("a", round=rules(n_rounds=1)).plan()
    offer = play.offer("a")
    play.trains("a").fold().evaluates("a")
    play.offers("a", offer).expects(act.Acknowledge, xfer=offer.blob.xfer)
    stray = msgspec.structs.replace(offer, round=2)
    assert play.offers("a", stray).expects(act.Decline).reason == "superseded: the job is completed"


def test_a_late_update_enters_the_next_fold_once_at_a_discount(play: Play) -> None:
    play.ready("a", "b", round=rules(n_rounds=3, staleness_discount=0.25)).plan()
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
    play.ready("a", "b", round=rules()).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).feed(ev.UpdateStored(agent="b", offer=late)).lacks(act.Aggregate)
    fold = play.fold().plan().trains("a", "b").expects(act.Aggregate, round=2)
    assert [(c.agent, c.round, c.weight) for c in fold.contributions] == [("b", 1, 2.0), ("a", 2, 4.0), ("b", 2, 4.0)]


def test_a_late_update_that_is_too_old_is_declined(play: Play) -> None:
    play.ready("a", "b", round=rules(n_rounds=5, max_staleness=1)).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).fold().plan().trains("a", "b").fold()
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: round 1 is closed")


def test_a_late_update_is_declined_when_the_job_drops_them(play: Play) -> None:
    play.ready("a", "b", round=rules(late="drop")).plan()
    late = play.offer("b")
    play.trains("a").ticks(120.0).fold()
    assert play.offers("b", late).expects(act.Decline).reason.startswith("superseded: round 1 is closed")
    assert play.fleet.state.counts == {"superseded_update": 1}


UNFIT = {
    "too big": ({"size": 200_000}, "200000 bytes offered where the plan allows"),
    "more samples than planned": ({"samples": 17}, "17 samples claimed where 16 were planned"),
    "no sample": ({"samples": 0}, "trained on no sample"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_an_unfit_offer_is_declined_unseen_and_fails_its_share(play: Play, kind: str) -> None:
    fields, why = UNFIT[kind]
    play.ready("a", "b", round=rules()).plan()
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
    play.ready("a", "b", round=rules()).plan()
    late = play.offer("b", **fields)
    play.trains("a").ticks(120.0).fold().plan()
    assert why in play.offers("b", late).lacks(act.Fetch).expects(act.Decline).reason
    assert play.share("b").state is ExecState.OFFERED, "the present share is another one"


def test_a_second_offer_after_a_failed_share_is_declined(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().offers("a", play.offer("a", samples=0))
    reason = play.offers("a", play.offer("a", tag="better")).expects(act.Decline).reason
    assert reason.startswith("superseded: this share has ended as FAILED: bad update")


def test_a_spoiled_update_fails_its_share_and_the_agent_hears_why(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan()
    offer = play.offer("a")
    spoiled = ev.UpdateSpoiled(agent="a", offer=offer, reason="matrix q: not finite")
    play.offers("a", offer).feed(spoiled).expects(act.Decline, xfer=offer.blob.xfer, reason="matrix q: not finite")
    assert play.share("a").state is ExecState.FAILED
    assert [c.agent for c in play.trains("b").expects(act.Aggregate).contributions] == ["b"]


def test_a_spoiled_copy_of_a_stored_update_changes_nothing(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan()
    offer = play.offer("a")
    play.trains("a").feed(ev.UpdateSpoiled(agent="a", offer=offer, reason="the agent vanished"))
    assert play.wishes == []
    assert play.share("a").state is ExecState.DONE


def test_a_loss_that_is_not_a_number_is_left_out_of_the_record(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan().trains("a", loss=math.nan).trains("b", loss=3.0)
    record = play.fold().expects(act.Record).record
    assert record.loss == 3.0
    assert record.shares["a"].loss is None


def test_an_evaluation_that_is_not_finite_or_of_another_version_is_ignored(play: Play) -> None:
    play.ready("a", round=rules()).plan()
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
    play.ready("a", round=rules()).plan().move("a", ExecState.DONE).lacks(act.Aggregate)
    play.trains("a").expects(act.Aggregate)


# --------------------------------------------------------------------------------------------------- noise on the bus


def test_unknown_jobs_unknown_agents_and_stale_words_are_counted_and_ignored(play: Play) -> None:
    play.ready("a", round=rules()).plan().move("a", ExecState.TRAINING, serial=50)
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
    assert play.ready("a", round=rules()).feed(ev.AgentReported(agent="a", report=report)).wishes == []
    assert play.fleet.state.agents["a"].report == report


def test_answers_of_slow_work_that_come_twice_or_too_late_are_ignored(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan()
    before = encode_state(play.fleet.state)
    assert play.plan().wishes == []
    play.feed(ev.PlanFailed(job="j", round=1, attempt=0, reason="late"))
    assert encode_state(play.fleet.state) == before
    play.trains("a", "b").fold()
    assert play.fold().wishes == []
    assert (play.job().version, play.phase()) == (1, Phase.PLANNING)


def test_a_job_that_is_submitted_twice_is_one_job(play: Play) -> None:
    play.ready("a", round=rules()).plan()
    before = encode_state(play.fleet.state)
    assert play.submit(round=rules(n_rounds=9)).wishes == []
    assert encode_state(play.fleet.state) == before


# ------------------------------------------------------------------------------------------------------------- ends


def test_a_planner_without_a_plan_fails_the_job(play: Play) -> None:
    play.ready("a", round=rules()).feed(ev.PlanFailed(job="j", round=1, attempt=0, reason="nothing fits 2 GiB"))
    play.expects(act.Finish, phase="failed", reason="plan: nothing fits 2 GiB")


def test_a_plan_for_too_few_agents_fails_the_job_instead_of_asking_for_ever(play: Play) -> None:
    play.ready("a", "b", round=rules(min_agents=2)).plan(without=("b",))
    assert play.expects(act.Finish).reason.startswith("plan: 1 of the 2 agents needed can take part")
    alone = type(play)().ready("a", round=rules()).plan(without=("a",))
    assert alone.expects(act.Finish).reason.startswith("plan: 0 of the 1 agents needed can take part")


def test_a_fold_that_fails_fails_the_job_and_is_on_record(play: Play) -> None:
    play.ready("a", round=rules()).plan().trains("a")
    play.feed(ev.AggregateFailed(job="j", round=1, attempt=0, reason="no space left on the device"))
    play.expects(act.Record, record={"outcome": "aggregate: no space left on the device"})
    play.expects(act.Finish, phase="failed", reason="aggregate: no space left on the device")
    assert play.free()


SCENES = ("empty", "survey", "planning", "collecting", "aggregating", "waiting", "evaluating")


def _stage(play: Play, scene: str) -> None:
    play.submit(round=rules(n_rounds=1))
    if scene == "empty":
        return
    play.join("a", "b")
    if scene == "survey":
        return
    play.survey("a", "b")
    if scene == "planning":
        return
    play.plan()
    if scene == "collecting":
        play.move("a", ExecState.TRAINING)
        return
    if scene == "waiting":
        play.move("a", ExecState.FAILED).leave("b").ticks(10.0).leave("a")
        play.plan()
        return
    play.trains("a", "b")
    if scene == "evaluating":
        play.fold()


@pytest.mark.parametrize("scene", SCENES)
def test_a_cancel_frees_everyone_in_every_phase(play: Play, scene: str) -> None:
    _stage(play, scene)
    busy = [a.id for a in play.fleet.state.agents.values() if a.task]
    round_ = play.job().round
    assert scene in {"empty", "survey"} or play.phase() == scene
    play.cancel().expects(act.Finish, job="j", phase="cancelled", reason="cancelled by the operator")
    for agent in busy:
        play.expects(act.Withdraw, agent=agent, cancel={"job": "j", "reason": "cancelled by the operator"})
    if round_:
        play.expects(act.Record, record={"round": round_.number, "outcome": "cancelled by the operator"})
    assert play.free()
    assert play.fleet.wake_at is None
    assert play.cancel().wishes == [], "a second cancel has nothing to end"


def test_an_agent_set_free_by_a_cancel_goes_to_the_job_that_waits(play: Play) -> None:
    play.submit("first", round=rules()).join("a").survey("a", job="first").plan("first")
    play.submit("second", round=rules()).lacks(act.Assign)
    play.cancel("first").expects(act.Assign, agent="a", plan={"job": "second", "purpose": "survey"})


def test_an_agent_set_free_by_the_second_job_goes_back_to_the_first_at_once(play: Play) -> None:
    play.submit("first", round=rules()).submit("second", round=rules(n_rounds=1)).join("a")
    play.survey("a", job="first").survey("a", job="second").plan("second")
    assert (play.phase("first"), play.phase("second")) == (Phase.PLANNING, Phase.COLLECTING)
    play.plan("first")
    assert play.phase("first") is Phase.WAITING, "its agent was taken meanwhile"
    play.trains("a", job="second").expects(act.MakePlan, job="first", agents=["a"])


def test_two_jobs_on_one_fleet_take_turns_and_both_finish(play: Play) -> None:
    agents = ("a", "b")
    play.submit("x", round=rules(n_rounds=2)).submit("y", round=rules(n_rounds=2)).join(*agents)
    held: dict[str, str] = {}
    seen = 0
    for _ in range(200):
        for wish in play.everything[seen:]:
            if isinstance(wish, act.Assign):
                assert held.get(wish.agent, wish.plan.job) == wish.plan.job, play.told("two jobs at once")
                held[wish.agent] = wish.plan.job
            elif isinstance(wish, act.Withdraw):
                held.pop(wish.agent, None)
        seen = len(play.everything)
        if all(play.finishes(job) for job in "xy"):
            break
        _work_once(play, agents)
    assert [play.phase(job) for job in "xy"] == [Phase.COMPLETED, Phase.COMPLETED]
    assert [play.job(job).version for job in "xy"] == [2, 2]
    assert not held


def _work_once(play: Play, agents: tuple[str, ...]) -> None:
    """Everyone does the next thing that is wanted of it, first the slow work, then the agents."""
    for job in "xy":
        if play.phase(job) is Phase.PLANNING:
            play.plan(job)
        elif play.phase(job) is Phase.AGGREGATING:
            play.fold(job)
    for agent in agents:
        job = play.fleet.state.agents[agent].task
        if not job:
            continue
        round_ = play.job(job).round
        if round_ is None or agent not in round_.shares:
            play.survey(agent, job=job)
        elif round_.purpose == "train":
            play.trains(agent, job=job)
        else:
            play.evaluates(agent, job=job)


# ----------------------------------------------------------------------------------------------------------- restart


def test_after_a_restart_everything_under_way_is_asked_for_again(play: Play) -> None:
    play.ready("a", "b", round=rules()).plan()
    offer = play.offer("a")
    play.offers("a", offer).move("a", ExecState.UPLOADING).join("c")
    again = Fleet(decode_state(encode_state(play.fleet.state))).resume(play.now + 7.0)
    play.wishes = again
    play.expects(act.Announce, card={"phase": "collecting"})
    play.expects(act.Assign, agent="b", plan={"round": 1, "stop_after_s": 93.0})
    play.expects(act.Assign, agent="c", plan={"purpose": "survey", "stop_after_s": 43.0})
    play.expects(act.Fetch, agent="a", offer=offer)


def test_after_a_restart_slow_work_is_asked_for_again(play: Play) -> None:
    asked = play.ready("a", round=rules()).expects(act.MakePlan)
    assert asked in play.fleet.resume(play.now)
    fold = play.plan().trains("a").expects(act.Aggregate)
    assert fold in play.fleet.resume(play.now)
    play.fold()
    assert act.Serve(job="j", blob=play.job().model) in play.fleet.resume(play.now)


def test_a_snapshot_of_a_newer_version_is_refused(play: Play) -> None:
    play.ready("a", round=rules())
    raw = msgspec.msgpack.decode(encode_state(play.fleet.state))
    newer = msgspec.msgpack.encode({**raw, "v": raw["v"] + 1})
    with pytest.raises(ValueError, match="newer fedpipe"):
        decode_state(newer)


# ----------------------------------------------------------------------------------------------------- what plans say


def test_a_plan_is_complete(play: Play) -> None:
    play.ready(
        "a",
        round=rules(),
        adapter={"alpha": 4.0, "update_dtype": "fp32"},
        train={"learning_rate": 0.001, "max_tokens": 64},
        evaluate={"held_out_ratio": 0.2, "max_samples": 8, "metrics": ["rougeL"]},
        head={"data": "notes", "seed": 3},
    )
    choice = Choice(ranks={"q": 4}, bits="int8", n_steps=5, batch=2, accumulation=3, checkpointing=True)
    plan = play.feed(ev.PlanReady(job="j", round=1, attempt=0, choices={"a": choice})).expects(act.Assign).plan
    assert (plan.bits, plan.ranks, plan.alpha, plan.update_dtype) == ("int8", {"q": 4}, 4.0, "fp32")
    assert (plan.data, plan.data_seed, plan.held_out_ratio) == ("notes", 3, 0.2)
    assert plan.base.sha256 == play.job().base_sha256
    assert plan.max_update_bytes == 4 * (8 + 8) * 4 + 65_536 + 512
    train = plan.train
    assert (train.n_steps, train.batch, train.accumulation, train.checkpointing) == (5, 2, 3, True)
    assert (train.learning_rate, train.max_tokens) == (0.001, 64)
    assert (plan.evaluate.max_samples, plan.evaluate.metrics) == (8, ["rougeL"])


def test_versions_are_measured_every_so_many_rounds_and_at_the_end(play: Play) -> None:
    play.ready("a", round=rules(n_rounds=3), evaluate={"every": 2})
    measured = []
    for _ in range(3):
        measured.append(play.plan().expects(act.Assign).plan.evaluate is not None)
        play.trains("a").fold()
    assert measured == [True, False, True]
    assert play.expects(act.Assign, plan={"purpose": "evaluate"}).plan.evaluate is not None


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"n_agents": 1, "min_agents": 2}, "n_agents = 1 is below min_agents = 2"),
        ({"train_s": 0}, "train_s"),
        ({"minimum": 3}, "minimum"),
    ],
)
def test_a_job_that_could_never_end_well_is_refused(table: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert({"job": {"name": "j"}, "model": {"source": "toy"}, "round": table}, JobSpec)
    assert Rounds(n_agents=0, min_agents=2).n_agents == 0
