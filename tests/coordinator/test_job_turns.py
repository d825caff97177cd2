"""Transcripts: several jobs on one fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coordinator.core import actions as act
from coordinator.core.state import Phase

if TYPE_CHECKING:
    from tests.coordinator.conftest import Play


def test_an_agent_set_free_by_a_cancel_goes_to_the_job_that_waits(play: Play) -> None:
    play.submit("first").join("a").survey("a", job="first").plan("first")
    play.submit("second").lacks(act.Assign)
    play.cancel("first").expects(act.Assign, agent="a", plan={"job": "second", "purpose": "survey"})


def test_an_agent_set_free_by_one_job_goes_to_the_one_that_waits_longest(play: Play) -> None:
    play.submit("first").submit("second", round={"n_rounds": 1}).join("a")
    play.survey("a", job="first").lacks(act.Assign, plan={"job": "second"})
    play.plan("first").trains("a", job="first").expects(act.Assign, plan={"job": "second", "purpose": "survey"})
    play.at(1).fold("first").lacks(act.MakePlan)
    play.survey("a", job="second").lacks(act.MakePlan, job="first")
    play.expects(act.MakePlan, job="second", agents=["a"])
    play.plan("second").trains("a", job="second").expects(act.MakePlan, job="first", agents=["a"])


def test_a_job_does_not_wait_for_ever_for_agents_of_another(play: Play) -> None:
    play.submit("long", round={"train_s": 5000.0}).join("a", "b").survey("a", "b", job="long").plan("long")
    play.at(1).submit("short").trains("b", job="long").survey("b", job="short").lacks(act.MakePlan)
    play.ticks(300.9).lacks(act.MakePlan)
    play.ticks(301.0).expects(act.MakePlan, job="short", agents=["b"])


def test_a_job_that_got_no_agent_says_that_others_had_them(play: Play) -> None:
    play.submit("long", round={"train_s": 5000.0}).join("a").survey("a", job="long").plan("long")
    reason = play.submit("short").ticks(300.0).expects(act.Finish, job="short").reason
    assert "1 agents known, 1 online, 1 at work for other jobs" in reason


def test_a_job_with_a_draw_starts_with_the_agents_it_wants(play: Play) -> None:
    play.submit("x", round={"n_agents": 1}).join("a", "b").survey("a", "b", job="x").plan("x")
    busy = next(a.id for a in play.fleet.state.agents.values() if a.task == "x")
    free = "b" if busy == "a" else "a"
    play.submit("y", round={"n_agents": 1}).expects(act.Assign, agent=free, plan={"job": "y", "purpose": "survey"})
    play.survey(free, job="y").expects(act.MakePlan, job="y", agents=[free])


def test_while_a_job_is_planned_its_agents_are_not_planned_for_another(play: Play) -> None:
    play.submit("x", round={"n_agents": 1, "n_rounds": 1}).join("a", "b").survey("a", "b", job="x")
    (first,) = play.expects(act.MakePlan, job="x").agents
    other = "b" if first == "a" else "a"
    play.submit("y", round={"n_agents": 1}).lacks(act.Assign, agent=first)
    play.survey(other, job="y").expects(act.MakePlan, job="y", agents=[other])


@pytest.mark.parametrize("planned", [False, True])
def test_a_draw_leaves_out_whom_another_job_has_or_is_about_to_have(play: Play, planned: bool) -> None:
    play.submit("x", round={"n_agents": 1}).submit("y", round={"n_agents": 1}).join("a", "b")
    play.survey("a", "b", job="x").survey("a", job="y").plan("x").plan("y")
    play.trains("b", job="x").survey("b", job="y").trains("a", job="y")
    (first,) = play.fold("x").expects(act.MakePlan, job="x", round=2).agents
    if planned:
        play.plan("x")
    (second,) = play.fold("y").expects(act.MakePlan, job="y", round=2).agents
    assert {first, second} == {"a", "b"}


def test_the_last_evaluation_waits_for_agents_that_work_for_another_job(play: Play) -> None:
    play.submit("x", round={"n_agents": 1, "n_rounds": 1}).join("a", "b").survey("a", "b", job="x").plan("x")
    first = "a" if play.fleet.state.agents["a"].task else "b"
    other = "b" if first == "a" else "a"
    play.submit("y").survey(other, job="y").trains(first, job="x")
    play.at(1).fold("x").lacks(act.Assign, plan={"job": "x"})
    play.survey(first, job="y").plan("y").trains("a", "b", job="y")
    play.expects(act.Assign, agent="b", plan={"job": "x", "purpose": "evaluate"})
    play.evaluates("a", "b", job="x").expects(act.Finish, job="x", phase="completed")


@pytest.mark.parametrize("jobs", ["xy", "xyz"])
def test_jobs_on_one_fleet_take_turns_with_all_agents_and_all_finish(play: Play, jobs: str) -> None:
    agents = ("a", "b", "c")
    for job in jobs:
        play.submit(job, round={"n_rounds": 3})
    play.join(*agents)
    for _ in range(100):
        if all(play.finishes(job) for job in jobs):
            break
        play.at(play.now - play.start + 1.0)
        _work_once(play, agents, jobs)
    assert [play.phase(job) for job in jobs] == [Phase.COMPLETED] * len(jobs)
    folds = [w for w in play.everything if isinstance(w, act.Aggregate)]
    assert [len(f.contributions) for f in folds] == [3] * 3 * len(jobs)
    assert "".join(f.job for f in folds) == jobs * 3
    measured = [w.record for w in play.everything if isinstance(w, act.Record) and w.record.purpose == "evaluate"]
    assert [len(record.shares) for record in measured] == [3] * len(jobs)


def _work_once(play: Play, agents: tuple[str, ...], jobs: str) -> None:
    """Everyone does the next thing that is wanted of it, first the slow work, then the agents."""
    for job in jobs:
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
