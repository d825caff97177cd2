"""What an operator does with a job beside ending it: pause, resume, go back to a version."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.core import actions as act
from coordinator.core.plans import phase_text
from coordinator.core.state import Phase
from protocol.messages import ExecState
from tests.coordinator.conftest import Play, sha

Stage = Callable[[], Play]


@pytest.fixture
def training(play: Play) -> Play:
    """Two agents train in round 1."""
    play.ready("a", "b", round={"n_rounds": 3, "min_agents": 1, "max_attempts": 2}).plan()
    assert play.phase() is Phase.COLLECTING
    return play


@pytest.fixture
def at_version_1(training: Play) -> Play:
    """They have made version 1 and train in round 2."""
    training.trains("a", "b")
    training.fold()
    training.plan()
    assert (training.phase(), training.job().version) == (Phase.COLLECTING, 1)
    return training


def test_a_pause_lets_the_round_end_and_begins_no_other(training: Play) -> None:
    training.pause().lacks(act.Withdraw)
    assert training.phase() is Phase.COLLECTING
    assert phase_text(training.job()) == "collecting, round 1 of 3; then paused, by token:ops: heat"
    training.trains("a", "b")
    training.fold().lacks(act.MakePlan)
    assert training.phase() is Phase.PAUSED
    assert phase_text(training.job()) == "paused before round 2 of 3, by token:ops: heat"


def test_a_paused_job_waits_for_ever_and_its_waits_begin_when_it_goes_on(play: Play) -> None:
    play.submit("j", round={"wait_s": 300.0}).pause().ticks(until=10_000)
    assert play.phase() is Phase.PAUSED
    play.resume().ticks(until=10_299)
    assert play.phase() is Phase.WAITING
    play.ticks(until=10_301)
    assert play.phase() is Phase.FAILED


def test_a_second_pause_is_the_first_one_and_may_make_it_one_at_once(training: Play) -> None:
    training.pause()
    first = training.job().pause
    training.at(5).pause(now=True)
    assert training.job().pause == first
    assert training.phase() is Phase.PAUSED


def test_now_stops_the_round_and_agents_keep_what_they_trained(training: Play) -> None:
    training.trains("a")
    training.pause(now=True)
    assert training.phase() is Phase.PAUSED
    cancel = training.expects(act.Withdraw, agent="b").cancel
    assert (cancel.round, cancel.attempt, cancel.keep) == (1, 0, True)
    assert training.expects(act.Record).record.outcome == "paused: by token:ops: heat"
    training.resume().plan()
    training.expects(act.Assign, agent="b", plan={"round": 1, "attempt": 1})
    training.lacks(act.Assign, agent="a")
    fold = training.trains("b").expects(act.Aggregate)
    assert [(c.agent, c.attempt) for c in fold.contributions] == [("a", 0), ("b", 1)]


def test_stopped_attempts_are_no_failures(training: Play) -> None:
    for _ in range(5):
        training.pause(now=True)
        training.resume().plan()
    assert training.job().attempt == 5
    offer = training.offer("a")
    training.offers("a", offer).expects(act.Fetch)
    training.leave("a", "b").ticks(until=200)
    assert training.phase() is Phase.WAITING, "one of the two attempts that may fail"


def test_what_was_on_its_way_at_the_stop_counts_and_is_not_asked_for_again(training: Play) -> None:
    offer = training.offer("b")
    training.offers("b", offer)
    training.pause(now=True)
    training.stores("b", offer).expects(act.Acknowledge, agent="b")
    training.resume().plan()
    training.lacks(act.Assign, agent="b")
    assert set(training.job().round.shares) == {"a", "b"}  # type: ignore[union-attr]


def test_who_has_gone_in_the_pause_does_not_keep_a_quorum_waiting(training: Play) -> None:
    training.trains("a")
    training.pause(now=True).leave("b")
    training.at(500).resume()
    fold = training.expects(act.Aggregate)
    assert [c.agent for c in fold.contributions] == ["a"]


def test_a_paused_job_leaves_the_agents_to_others(training: Play) -> None:
    training.pause(now=True).submit("k")
    training.survey("a", "b", job="k").plan("k")
    assert training.phase("k") is Phase.COLLECTING


def test_surveys_run_out_in_a_pause_and_begin_again_after_one_that_stops_them(play: Play) -> None:
    play.submit().join("a").pause()
    assert play.share("a").state is ExecState.OFFERED
    play.pause(now=True).expects(act.Withdraw, agent="a")
    play.join("b").lacks(act.Assign, agent="b")
    play.resume().expects(act.Assign, agent="a", plan={"purpose": "survey", "attempt": 1})


def test_the_final_measurement_is_stopped_and_made_again(training: Play) -> None:
    for _ in range(3):
        training.trains("a", "b")
        training.fold()
        training.plan() if training.phase() is Phase.PLANNING else None
    assert training.phase() is Phase.EVALUATING
    training.evaluates("a")
    training.pause(now=True)
    assert training.phase() is Phase.PAUSED
    training.resume().expects(act.Assign, agent="a", plan={"purpose": "evaluate", "attempt": 1})
    training.evaluates("a", "b")
    assert training.phase() is Phase.COMPLETED


def test_a_paused_job_can_be_cancelled_and_an_ended_one_is_not_paused(training: Play) -> None:
    training.pause(now=True).cancel()
    assert (training.phase(), training.job().pause) == (Phase.CANCELLED, None)
    training.pause().resume()
    assert training.wishes == []


# ------------------------------------------------------------------------------------------------------------ rollback


def test_going_back_makes_a_new_version_of_the_old_content(at_version_1: Play) -> None:
    play = at_version_1
    play.trains("a", "b")
    play.fold()
    play.plan()
    play.trains("a")
    play.roll_back(1, version=3)
    play.expects(act.Restore, version=3, of=1, master=sha("j/v1"))
    play.expects(act.Serve, blob={"sha256": sha("j/v1")})
    assert play.expects(act.Withdraw, agent="b").cancel.keep is False
    assert play.job().round_number == 2, "rounds are not given back"
    assert [(r.version, r.of, r.by, r.reason) for r in play.job().rollbacks] == [(3, 1, "token:ops", "worse")]
    play.plan()
    given = [w.plan for w in play.wishes if isinstance(w, act.Assign)]
    assert {(p.version, p.attempt, p.model.sha256) for p in given if p.model} == {(3, 1, sha("j/v1"))}
    assert len(given) == 2, "what a had trained was made from a version that the job has left"
    play.trains("a", "b", tag="anew")
    fold = play.expects(act.Aggregate)
    assert (fold.version, fold.master) == (4, sha("j/v1"))


def test_updates_of_versions_left_behind_are_declined(at_version_1: Play) -> None:
    play = at_version_1
    on_its_way, counted = play.offer("a"), play.offer("b")
    play.offers("a", on_its_way)
    play.trains("b")
    play.roll_back(1, version=2)
    play.plan()
    assert "rolled back" in play.stores("a", on_its_way).expects(act.Decline, agent="a").reason
    assert "rolled back" in play.offers("b", counted).expects(act.Decline, agent="b").reason
    play.trains("a", "b", tag="anew")
    play.expects(act.Aggregate)


def test_a_paused_job_goes_back_and_stays_paused(at_version_1: Play) -> None:
    play = at_version_1
    play.pause(now=True)
    play.roll_back(1, version=2).expects(act.Restore)
    assert (play.phase(), play.job().version) == (Phase.PAUSED, 2)


def test_while_a_version_is_made_there_is_no_way_back(at_version_1: Play) -> None:
    play = at_version_1
    play.trains("a", "b")
    play.roll_back(1, version=2).lacks(act.Restore)
    play.fold()
    assert play.job().version == 2
    play.roll_back(1, version=2).lacks(act.Restore)
    assert play.job().rollbacks == []


def test_an_ended_job_hands_out_the_version_it_went_back_to(at_version_1: Play) -> None:
    play = at_version_1
    play.cancel()
    play.roll_back(1, version=2).expects(act.Restore, round=1)
    assert (play.phase(), play.job().version, play.job().master) == (Phase.CANCELLED, 2, sha("j/v1"))
    play.lacks(act.Serve)
