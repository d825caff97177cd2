"""Transcripts: when a fold is foreseen, and that it is the one that comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coordinator.core import actions as act
from coordinator.core import rounds
from protocol.messages import ExecState

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


def test_it_is_foreseen_when_all_that_is_missing_is_on_its_way(play: Play) -> None:
    play.ready("a", "b", "c").plan()
    a, b, c = (play.offer(name) for name in "abc")
    play.offers("c", c).lacks(act.AggregateAhead)
    play.stores("c", c).lacks(act.AggregateAhead)
    play.offers("a", a).lacks(act.AggregateAhead)
    foreseen = play.offers("b", b).expects(act.AggregateAhead).fold
    assert [one.agent for one in foreseen.contributions] == ["a", "b", "c"]
    assert play.stores("b", b).expects(act.AggregateAhead).fold == foreseen
    assert play.stores("a", a).lacks(act.AggregateAhead).expects(act.Aggregate) == foreseen


def test_one_that_fails_leaves_the_others_to_be_foreseen(play: Play) -> None:
    play.ready("a", "b", "c").plan()
    offers = {name: play.offer(name) for name in "ab"}
    for name, offer in offers.items():
        play.offers(name, offer).lacks(act.AggregateAhead)
    foreseen = play.move("c", ExecState.FAILED, reason="no memory").expects(act.AggregateAhead).fold
    play.stores("a", offers["a"])
    assert play.stores("b", offers["b"]).expects(act.Aggregate) == foreseen


def test_one_that_trains_on_after_its_offer_is_not_on_its_way(play: Play) -> None:
    play.ready("a", "b").plan()
    a, b = play.offer("a"), play.offer("b")
    play.offers("a", a).move("a", ExecState.TRAINING)
    play.offers("b", b).lacks(act.AggregateAhead)


def test_with_more_agents_than_are_wanted_nobody_knows_which_will_be_last(play: Play) -> None:
    play.ready("a", "b", "c", round={"n_agents": 2, "over_select_ratio": 1.5}).plan()
    for name in "abc":
        play.offers(name, play.offer(name)).lacks(act.AggregateAhead)


def test_too_few_for_a_quorum_are_no_fold(play: Play) -> None:
    play.ready("a", "b", round={"min_agents": 2}).plan()
    play.move("b", ExecState.FAILED, reason="no memory")
    play.offers("a", play.offer("a")).lacks(act.AggregateAhead)


@pytest.mark.parametrize("more", [0, 1])
def test_while_many_are_missing_nothing_is_thought_about(play: Play, more: int) -> None:
    names = [f"a{i:02}" for i in range(rounds.MAX_COMING + more)]
    play.ready(*names).plan()
    for name in names[:-1]:
        play.offers(name, play.offer(name))
    play.offers(names[-1], last := play.offer(names[-1]))
    assert any(isinstance(wish, act.AggregateAhead) for wish in play.wishes) is not bool(more)
    if more:
        play.stores(names[-1], last).expects(act.AggregateAhead)


def test_late_updates_are_part_of_what_is_foreseen(play: Play) -> None:
    play.ready("a", "b", round={"late": "add", "max_staleness": 2}).plan()
    tardy = play.offer("b")
    play.trains("a").ticks(120.0).fold().plan()
    play.offers("b", tardy).stores("b", tardy)
    a, b = play.offer("a"), play.offer("b")
    play.offers("a", a)
    foreseen = play.offers("b", b).expects(act.AggregateAhead).fold
    assert [(one.agent, one.round) for one in foreseen.contributions] == [("b", 1), ("a", 2), ("b", 2)]
    play.stores("a", a)
    assert play.stores("b", b).expects(act.Aggregate) == foreseen


def test_after_a_restart_it_is_foreseen_again(play: Play) -> None:
    play.ready("a", "b").plan()
    play.offers("a", play.offer("a"))
    foreseen = play.offers("b", play.offer("b")).expects(act.AggregateAhead)
    assert foreseen in play.fleet.resume(play.now)


def test_a_survey_and_an_evaluation_foresee_nothing(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan()
    play.trains("a", "b").fold()
    play.evaluates("a").lacks(act.AggregateAhead)
