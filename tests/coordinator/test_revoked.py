"""An operator revokes an agent: whatever it had ends with that reason, nothing of it is waited for, and it may come back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.core import actions as act
from coordinator.core import events as ev
from coordinator.core.state import Phase
from protocol.messages import ExecState

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


def test_its_share_ends_and_the_round_closes_without_it(play: Play) -> None:
    play.ready("a", "b", "c", round={"min_agents": 2, "n_rounds": 1}).plan()
    play.move("c", ExecState.TRAINING).trains("a")
    revoked = play.feed(ev.AgentRevoked(agent="c", reason="stolen"))
    revoked.expects(act.Withdraw, agent="c", cancel=None)
    assert (play.share("c").state, play.share("c").reason) == (ExecState.FAILED, "revoked: stolen")
    play.trains("b").expects(act.Aggregate, round=1)
    record = play.fold().expects(act.Record, record={"outcome": "aggregated"}).record
    assert record.shares["c"].reason == "revoked: stolen"
    play.evaluates("a").evaluates("b").expects(act.Finish, phase="completed")


def test_the_final_evaluation_does_not_wait_for_it(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 1}).plan()
    play.trains("a", "b")
    play.feed(ev.AgentRevoked(agent="b"))
    play.fold().expects(act.Assign, agent="a", plan={"purpose": "evaluate"})
    play.evaluates("a").expects(act.Finish, phase="completed")


def test_its_survey_ends_too(play: Play) -> None:
    play.submit(round={"min_agents": 1}).join("a", "b").survey("a")
    play.feed(ev.AgentRevoked(agent="b")).expects(act.MakePlan, agents=["a"])
    assert play.job().members["b"].excluded == "revoked"
    assert not play.fleet.state.agents["b"].task


def test_revoked_again_or_unknown_changes_nothing(play: Play) -> None:
    play.ready("a", "b").plan().feed(ev.AgentRevoked(agent="b")).feed(ev.AgentRevoked(agent="b"))
    play.lacks(act.Withdraw, agent="b")
    play.feed(ev.AgentRevoked(agent="ghost"))
    assert not play.fleet.state.agents["ghost"].online


def test_enrolled_again_it_is_surveyed_and_takes_part(play: Play) -> None:
    play.ready("a", "b", round={"n_rounds": 2, "min_agents": 1}).plan()
    play.feed(ev.AgentRevoked(agent="b")).trains("a").fold().plan()
    play.join("b", session=2).expects(act.Assign, agent="b", plan={"purpose": "survey"})
    play.survey("b").trains("a").fold()
    play.expects(act.Assign, agent="b", plan={"purpose": "evaluate"})
    assert play.phase() is Phase.EVALUATING
