"""Transcripts: agents that are surveyed, come, leave and come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.fleet import decode_state, encode_state
from coordinator.core.state import Phase
from protocol.messages import ExecState, Matrix, Surveyed
from tests.coordinator.conftest import MATRICES, sha

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


# ------------------------------------------------------------------------------------------------------------ surveys


def test_an_agent_without_data_is_out_and_the_reason_is_kept(play: Play) -> None:
    play.submit().join("a", "b").survey("a", n_train=0)
    assert play.job().members["a"].excluded == "the survey brought nothing to train on"
    play.survey("b").expects(act.MakePlan, agents=["b"])


def test_an_agent_that_cannot_open_its_data_is_out_until_it_starts_again(play: Play) -> None:
    play.submit().join("a").move("a", ExecState.FAILED, reason="no [data.default] table here")
    assert play.job().members["a"].excluded == "no [data.default] table here"
    play.join("a", session=1).lacks(act.Assign)
    play.join("a", session=2).expects(act.Assign, agent="a", plan={"purpose": "survey", "attempt": 1})
    play.survey("a").expects(act.MakePlan, agents=["a"])


def test_an_agent_with_another_base_is_out(play: Play) -> None:
    play.submit().join("a", "b", "c").survey("a").survey("b", base="other")
    play.survey("c").expects(act.MakePlan, agents=["a", "c"])
    assert play.job().members["b"].excluded.startswith("bad_base: has ")
    play.join("b", session=2).lacks(act.Assign, agent="b")


def test_a_named_base_outvotes_the_majority(play: Play) -> None:
    digest = "ab" * 32
    play.submit(model={"source": "toy", "sha256": digest})
    plan = play.join("a", "b").expects(act.Assign, agent="a").plan
    assert plan.base.sha256 == digest
    play.survey("a", "b").lacks(act.MakePlan)
    assert all(m.excluded.startswith("bad_base") for m in play.job().members.values())
    finish = play.ticks(300.0).expects(act.Finish, phase="failed", cause="bad_base")
    assert finish.reason.startswith("bad_base: 1 needed for 300 s")


def test_a_late_joiner_is_surveyed_while_others_train_and_joins_the_next_round(play: Play) -> None:
    play.ready("a").plan()
    play.at(50).join("b").expects(act.Assign, agent="b", plan={"purpose": "survey", "round": 0})
    play.survey("b").lacks(act.MakePlan)
    play.trains("a").fold().expects(act.MakePlan, round=2, agents=["a", "b"])
    play.plan().expects(act.Assign, agent="b", plan={"purpose": "train", "round": 2, "version": 1})


def test_a_survey_that_takes_too_long_ends_and_the_others_start(play: Play) -> None:
    play.submit(round={"survey_s": 20.0}).join("a", "b").survey("a")
    play.ticks(19.0).lacks(act.MakePlan)
    ended = play.ticks(20.0)
    ended.expects(act.Withdraw, agent="b", cancel={"round": 0, "reason": "no survey within 20 s"})
    ended.expects(act.MakePlan, agents=["a"])
    assert play.job().members["b"].excluded == "no survey within 20 s"


def test_an_agent_that_was_silent_in_its_survey_is_asked_again_when_it_is_back(play: Play) -> None:
    play.submit(round={"survey_s": 20.0}).join("a").leave("a").ticks(25.0)
    assert play.job().members["a"].excluded == "no survey within 20 s"
    play.join("a", session=1).expects(act.Assign, agent="a", plan={"purpose": "survey", "attempt": 1})


def test_an_agent_that_dies_in_the_first_survey_holds_nobody_up_longer_than_its_grace(play: Play) -> None:
    play.submit().join("a", "b").survey("a").at(5).leave("b").lacks(act.MakePlan)
    play.ticks(14.9).lacks(act.MakePlan)
    play.ticks(15.0).expects(act.MakePlan, agents=["a"])


def test_a_survey_that_comes_after_its_time_changes_nothing(play: Play) -> None:
    play.submit().join("a", "b").survey("b").ticks(50.0).plan()
    assert play.survey("a").wishes == []
    assert play.job().members["a"].surveyed is None
    assert play.job().members["a"].excluded == "no survey within 50 s"


def test_those_who_find_other_matrices_in_the_same_base_are_out(play: Play) -> None:
    forged = Surveyed(base_sha256=sha("base"), matrices=[Matrix(name="z", d_out=9, d_in=9)], n_train=2**53, n_eval=0)
    play.submit().join("a", "b", "c", "d")
    play.move("a", ExecState.DONE, round=0, surveyed=forged)
    play.survey("b", "c", "d").expects(act.MakePlan, agents=["b", "c", "d"])
    assert "z" not in {m.name for m in play.job().matrices}, "the first by name does not decide it alone"
    assert play.job().members["a"].excluded.startswith("bad_base: finds other matrices")
    play.plan().join("e").move("e", ExecState.DONE, round=0, surveyed=forged)
    assert play.job().members["e"].excluded.startswith("bad_base: finds other matrices"), "nor later"
    twice = Surveyed(base_sha256=sha("base"), matrices=[*play.job().matrices] * 2, n_train=9, n_eval=0)
    play.join("f").move("f", ExecState.DONE, round=0, surveyed=twice)
    assert play.job().members["f"].excluded.startswith("bad_base: finds other matrices")


def test_what_a_fleet_has_in_common_is_held_once(play: Play) -> None:
    state = decode_state(encode_state(play.submit().join("a", "b").survey("a").survey("b").plan().fleet.state))
    job = next(iter(state.jobs.values()))
    one, other = (job.members[agent].surveyed for agent in ("a", "b"))
    assert one
    assert other
    assert one.matrices is other.matrices
    assert job.plan
    assert job.plan.choices["a"].ranks is job.plan.choices["b"].ranks
    assert encode_state(state) == encode_state(play.fleet.state)


def test_what_a_fleet_has_in_common_is_in_a_snapshot_once(play: Play) -> None:
    listed = msgspec.msgpack.encode(MATRICES)

    def n_named() -> int:
        bare = msgspec.structs.replace(play.job(), matrices=[], plan=None, round=None)
        return encode_state(msgspec.structs.replace(play.fleet.state, jobs={"j": bare})).count(listed)

    play.submit().join("a", "b", "c", "d").survey("a")
    assert n_named() == 1
    play.survey("b").survey("c").survey("d")
    assert n_named() == 1
    assert not play.job().alike, "the state itself is as it was"
    play.plan()
    ranks = msgspec.msgpack.encode(play.job().plan.choices["a"].ranks)
    plan = play.job().plan.packed()
    assert msgspec.msgpack.encode(plan).count(ranks) == 1
    assert plan.unpacked() == play.job().plan
    whole = msgspec.msgpack.encode(msgspec.structs.replace(play.fleet.state, v=1))
    assert encode_state(decode_state(whole)) == encode_state(play.fleet.state), "earlier versions had the list for each"


def test_ever_new_arrivals_do_not_put_off_the_first_round(play: Play) -> None:
    play.submit(round={"survey_s": 20.0, "wait_s": 300.0}).join("s0", "a").survey("a")
    play.everything.clear()
    for number in range(1, 10):
        play.at(number * 5 - 4).join(f"s{number}").ticks(number * 5)
    (made,) = (wish for wish in play.everything if isinstance(wish, act.MakePlan))
    assert made.agents == ["a"]


def test_only_the_first_round_waits_for_surveys(play: Play) -> None:
    play.ready("a").plan().join("b")
    play.trains("a").fold().expects(act.MakePlan, round=2, agents=["a"])


def test_a_survey_is_open_when_the_job_completes(play: Play) -> None:
    play.ready("a", round={"n_rounds": 1}).plan().trains("a").fold()
    play.join("b").expects(act.Assign, agent="b", plan={"purpose": "survey"})
    done = play.evaluates("a")
    done.expects(act.Finish, phase="completed")
    done.expects(act.Withdraw, agent="b", cancel={"round": 0, "reason": "the job is completed"})
    assert play.free()


def test_only_invited_agents_that_know_the_method_are_asked(play: Play) -> None:
    play.submit(head={"only": ["a", "b"]})
    play.join("b", methods=("prompt",)).lacks(act.Assign)
    play.join("c").lacks(act.Assign)
    play.join("a").expects(act.Assign, agent="a")


# ---------------------------------------------------------------------------------------------- agents come and leave


def test_a_dead_agent_is_waited_for_during_its_grace_only(play: Play) -> None:
    play.ready("a", "b").plan().trains("a").at(5).leave("b").lacks(act.Aggregate)
    play.ticks(14.9).lacks(act.Aggregate)
    closed = play.ticks(15.0)
    assert [c.agent for c in closed.expects(act.Aggregate).contributions] == ["a"]
    closed.expects(act.Withdraw, agent="b", cancel={"reason": "the agent vanished and did not come back in time"})


def test_a_dead_agent_does_not_hurry_those_who_are_at_work(play: Play) -> None:
    play.ready("a", "b").plan().leave("b").ticks(60.0).lacks(act.Withdraw)
    play.trains("a").expects(act.Aggregate)


def test_an_agent_that_restarts_in_time_gets_its_plan_again_with_the_time_that_is_left(play: Play) -> None:
    play.ready("a", "b").plan().move("b", ExecState.TRAINING).at(5).leave("b")
    again = play.at(12).join("b", session=2).expects(act.Assign, agent="b").plan
    assert (again.round, again.attempt, again.stop_after_s, again.ttl_s) == (1, 0, 88.0, 108.0)
    play.move("b", ExecState.ACCEPTED, serial=1).trains("b", "a").expects(act.Aggregate)
    assert play.fleet.state.counts == {}


def test_the_will_of_an_older_session_is_ignored(play: Play) -> None:
    play.ready("a").plan().join("a", session=2).leave("a", session=1)
    assert play.fleet.state.agents["a"].online
    assert play.fleet.state.counts == {"stale_death": 1}
    play.ticks(60.0)
    assert play.phase() is Phase.COLLECTING


def test_a_birth_that_is_said_twice_repeats_the_plan_and_changes_nothing(play: Play) -> None:
    play.ready("a").plan().move("a", ExecState.TRAINING)
    before = encode_state(play.fleet.state)
    play.join("a", session=1).lacks(act.Withdraw).expects(act.Assign, agent="a", plan={"round": 1})
    assert encode_state(play.fleet.state) == before


def test_a_birth_without_work_clears_an_old_plan(play: Play) -> None:
    assert play.join("a").wishes == [act.Withdraw(agent="a")]


def test_planned_agents_that_leave_are_not_asked(play: Play) -> None:
    play.ready("a", "b").leave("b").plan().lacks(act.Assign, agent="b")
    play.expects(act.Assign, agent="a")


def test_when_too_few_of_the_planned_agents_stay_the_job_waits(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).at(3).leave("b").plan().lacks(act.Assign)
    assert play.phase() is Phase.WAITING
    play.join("b").expects(act.MakePlan, agents=["a", "b"], attempt=0)


def test_plans_that_come_to_nothing_do_not_make_the_wait_longer(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).at(100).leave("b").plan().lacks(act.Assign)
    play.ticks(299.9).lacks(act.Finish)
    play.ticks(300.0).expects(act.Finish, phase="failed")


def test_the_first_round_is_patient_for_start_agents_but_not_for_ever(play: Play) -> None:
    play.ready("a", round={"start_agents": 3}).lacks(act.MakePlan)
    play.ticks(29.9).lacks(act.MakePlan)
    play.ticks(30.0).expects(act.MakePlan, agents=["a"])


def test_the_first_round_starts_at_once_when_start_agents_are_there(play: Play) -> None:
    play.ready("a", "b", round={"start_agents": 3}).lacks(act.MakePlan)
    play.at(10).join("c").survey("c").expects(act.MakePlan, agents=["a", "b", "c"])


def test_without_enough_agents_the_job_fails_and_says_who_was_there_and_why_not(play: Play) -> None:
    play.submit(round={"min_agents": 2}).join("a", "b").survey("a").survey("b", n_train=0)
    play.ticks(299.9).lacks(act.Finish)
    finish = play.ticks(300.0).expects(act.Finish, phase="failed", cause="no_agents")
    assert finish.reason == (
        "no_agents: 2 needed for 300 s; 2 agents known, 2 online, 0 at work for other jobs; b: the survey brought nothing to train on"
    )
    assert play.fleet.wake_at is None


def test_an_evaluation_with_nobody_there_completes_the_job(play: Play) -> None:
    play.ready("a", round={"n_rounds": 1}).plan().trains("a").leave("a")
    play.fold().lacks(act.Finish)
    play.ticks(9.9).lacks(act.Finish)
    play.ticks(10.0).expects(act.Finish, phase="completed")
    play.expects(act.Record, record={"purpose": "evaluate", "shares": {}})


def test_the_evaluation_waits_for_one_who_may_come_back(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan().trains("a", "b").leave("b")
    play.fold().lacks(act.Assign)
    play.at(5).join("b", session=2).expects(act.Assign, agent="a", plan={"purpose": "evaluate"})
    play.expects(act.Assign, agent="b", plan={"purpose": "evaluate"})


def test_an_evaluation_does_not_wait_longer_than_its_deadline(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan().trains("a", "b").fold().evaluates("a")
    play.ticks(49.9).lacks(act.Finish)
    done = play.ticks(50.0)
    done.expects(act.Finish, phase="completed")
    done.expects(act.Withdraw, agent="b", cancel={"round": 2})


# ------------------------------------------------------------------------------------------------- without a broker


def test_a_broker_that_goes_down_says_that_all_have_gone_and_nobody_is_given_up_for_that(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan().leave("a", "b").feed(ev.BusLost())
    assert play.fleet.wake_at is None
    play.ticks(3600.0).lacks(act.Record)
    play.feed(ev.BusFound()).ticks(3601.0).join("a", "b").expects(act.Assign, agent="b", plan={"attempt": 0})
    play.trains("a", "b").expects(act.Aggregate, attempt=0)


def test_the_deadlines_wait_as_long_as_nobody_could_be_heard(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan()
    assert play.job().round
    left_s = play.job().round.close_at - play.now
    play.feed(ev.BusLost()).ticks(1000.0).lacks(act.Record)
    play.feed(ev.BusFound())
    assert play.job().round.close_at - play.now == left_s


def test_who_does_not_come_back_to_the_broker_is_given_up_in_the_end(play: Play) -> None:
    play.ready("a", "b").plan().trains("a").leave("b").feed(ev.BusLost())
    play.ticks(100.0).feed(ev.BusFound())
    play.ticks(100.0 + 60.0 + 9.9).lacks(act.Aggregate)  # their longest pause, and the grace
    play.ticks(100.0 + 60.0 + 10.0).expects(act.Aggregate)


def test_an_update_that_was_on_disk_already_closes_the_round_without_a_broker(play: Play) -> None:
    play.ready("a").plan()
    offer = play.offer("a")
    play.offers("a", offer).feed(ev.BusLost(), ev.UpdateStored(agent="a", offer=offer)).expects(act.Aggregate)
    play.fold().lacks(act.Assign)
    play.feed(ev.BusFound()).expects(act.MakePlan, round=2)


def test_a_coordinator_that_was_down_gives_the_time_back_that_it_missed(play: Play) -> None:
    play.ready("a", "b").plan()
    assert play.job().round
    close_at, down_at = play.job().round.close_at, play.now
    play.now += 500.0
    play.feed(ev.BusLost(since=down_at), ev.BusFound()).lacks(act.Record)
    assert play.job().round.close_at == close_at + 500.0
